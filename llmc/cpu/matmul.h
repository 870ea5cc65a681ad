// Matrix products of row-major float32 matrices, and the linear layer on top of them.
//
// matmul() goes through oneDNN where it was found at build time (-DLLMC_ONEDNN; versions 2 and 3), and
// through matmul_loops(), the same in plain OpenMP loops, otherwise. Both are compiled, so that tests compare
// them.
#pragma once
#include <cstddef>
#include <cstring>
#include <vector>

#ifdef LLMC_ONEDNN
#include <oneapi/dnnl/dnnl.hpp>
#include <tuple>
#include <unordered_map>
#endif

namespace cpu {

// c (M,N) = a (M,K) b (K,N) + bias (N), or c += a b where `accumulate`. trans_a: `a` is stored as (K,M);
// trans_b: `b` is stored as (N,K).
inline void matmul_loops(float* c,        // (M,N)
                         const float* a,  // (M,K), or (K,M) where trans_a
                         const float* b,  // (K,N), or (N,K) where trans_b
                         int M, int N, int K, bool trans_a, bool trans_b, bool accumulate,
                         const float* bias = nullptr) {  // (N)
    // Rows of c in blocks, so that a row of b that was fetched serves several rows of c.
    constexpr int kRows = 8;
#pragma omp parallel for schedule(static)
    for (int m0 = 0; m0 < M; m0 += kRows) {
        int rows = M - m0 < kRows ? M - m0 : kRows;
        for (int m = m0; m < m0 + rows; m++) {
            float* cm = c + (size_t)m * N;
            if (!accumulate && bias) memcpy(cm, bias, sizeof(float) * N);
            if (!accumulate && !bias) memset(cm, 0, sizeof(float) * N);
        }
        if (trans_b) {
            for (int n = 0; n < N; n++) {
                const float* bn = b + (size_t)n * K;
                for (int m = m0; m < m0 + rows; m++) {
                    float sum = 0;
                    if (trans_a) {
                        for (int k = 0; k < K; k++) sum += a[(size_t)k * M + m] * bn[k];
                    } else {
                        const float* am = a + (size_t)m * K;
#pragma omp simd reduction(+ : sum)
                        for (int k = 0; k < K; k++) sum += am[k] * bn[k];
                    }
                    c[(size_t)m * N + n] += sum;
                }
            }
        } else {
            for (int k = 0; k < K; k++) {
                const float* bk = b + (size_t)k * N;
                for (int m = m0; m < m0 + rows; m++) {
                    float amk = trans_a ? a[(size_t)k * M + m] : a[(size_t)m * K + k];
                    float* cm = c + (size_t)m * N;
#pragma omp simd
                    for (int n = 0; n < N; n++) cm[n] += amk * bk[n];
                }
            }
        }
    }
}

#ifdef LLMC_ONEDNN
namespace onednn {

// A oneDNN matmul primitive is made for one set of sizes; making one takes longer than running a small one,
// so they are kept. Called from one thread only: oneDNN spreads the work over OpenMP's threads itself.
using Key = std::tuple<int, int, int, bool, bool, bool, bool>;  // M, N, K, trans_a, trans_b, accumulate, bias

struct KeyHash {
    size_t operator()(const Key& key) const {
        auto [M, N, K, trans_a, trans_b, accumulate, bias] = key;
        size_t hash = M;
        for (size_t part :
             {(size_t)N, (size_t)K, (size_t)(trans_a + 2 * trans_b + 4 * accumulate + 8 * bias)})
            hash = hash * 0x9E3779B97F4A7C15u + part;
        return hash;
    }
};

struct Product {
    dnnl::matmul primitive;
    dnnl::memory a, b, bias, c;
    std::unordered_map<int, dnnl::memory> arguments;
};

inline dnnl::engine& engine() {
    static dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
    return cpu;
}

inline Product make_product(const Key& key) {
    auto [M, N, K, trans_a, trans_b, accumulate, has_bias] = key;
    using dnnl::memory;
    constexpr auto f32 = memory::data_type::f32;
    memory::desc a({M, K}, f32, trans_a ? memory::dims{1, M} : memory::dims{K, 1});
    memory::desc b({K, N}, f32, trans_b ? memory::dims{1, K} : memory::dims{N, 1});
    memory::desc c({M, N}, f32, memory::dims{N, 1});
    memory::desc bias = has_bias ? memory::desc({1, N}, f32, memory::dims{N, 1}) : memory::desc();
    dnnl::primitive_attr attributes;
    if (accumulate) {
        dnnl::post_ops sum;
        sum.append_sum(1.0f);
        attributes.set_post_ops(sum);
    }
#if DNNL_VERSION_MAJOR >= 3
    dnnl::matmul::primitive_desc description(engine(), a, b, bias, c, attributes);
#else
    dnnl::matmul::primitive_desc description(dnnl::matmul::desc(a, b, bias, c), attributes, engine());
#endif
    Product p;
    p.primitive = dnnl::matmul(description);
    p.a = memory(a, engine(), nullptr);
    p.b = memory(b, engine(), nullptr);
    p.c = memory(c, engine(), nullptr);
    p.arguments = {{DNNL_ARG_SRC, p.a}, {DNNL_ARG_WEIGHTS, p.b}, {DNNL_ARG_DST, p.c}};
    if (has_bias) p.arguments[DNNL_ARG_BIAS] = p.bias = memory(bias, engine(), nullptr);
    return p;
}

inline void matmul(float* c, const float* a, const float* b, int M, int N, int K, bool trans_a, bool trans_b,
                   bool accumulate, const float* bias) {
    static dnnl::stream stream(engine());
    static std::unordered_map<Key, Product, KeyHash> products;
    Key key(M, N, K, trans_a, trans_b, accumulate, bias != nullptr);
    auto found = products.find(key);
    if (found == products.end()) found = products.emplace(key, make_product(key)).first;
    Product& p = found->second;
    p.a.set_data_handle(const_cast<float*>(a));
    p.b.set_data_handle(const_cast<float*>(b));
    p.c.set_data_handle(c);
    if (bias) p.bias.set_data_handle(const_cast<float*>(bias));
    p.primitive.execute(stream, p.arguments);
    stream.wait();
}

}  // namespace onednn
#endif

// c (M,N) = a b + bias, or c += a b where `accumulate` (then without bias). See matmul_loops for the shapes.
inline void matmul(float* c,        // (M,N)
                   const float* a,  // (M,K), or (K,M) where trans_a
                   const float* b,  // (K,N), or (N,K) where trans_b
                   int M, int N, int K, bool trans_a, bool trans_b, bool accumulate,
                   const float* bias = nullptr) {  // (N)
#ifdef LLMC_ONEDNN
    onednn::matmul(c, a, b, M, N, K, trans_a, trans_b, accumulate, bias);
#else
    matmul_loops(c, a, b, M, N, K, trans_a, trans_b, accumulate, bias);
#endif
}

// out += the sum of the rows of inp.
inline void add_column_sums(float* out,        // (C) +=
                            const float* inp,  // (N,C)
                            int N, int C) {
    constexpr int kColumns = 64;
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < C; c0 += kColumns) {
        int columns = C - c0 < kColumns ? C - c0 : kColumns;
        float sum[kColumns] = {};
        for (int n = 0; n < N; n++) {
            const float* row = inp + (size_t)n * C + c0;
            if (columns == kColumns) {  // a constant trip count keeps the sums in registers
                for (int c = 0; c < kColumns; c++) sum[c] += row[c];
            } else {
                for (int c = 0; c < columns; c++) sum[c] += row[c];
            }
        }
        for (int c = 0; c < columns; c++) out[c0 + c] += sum[c];
    }
}

// The linear layer: out = inp weight + bias.
inline void matmul_forward(float* out,           // (N,OC)
                           const float* inp,     // (N,IC)
                           const float* weight,  // (IC,OC)
                           const float* bias,    // (OC), or null
                           int N, int IC, int OC) {
    matmul(out, inp, weight, N, OC, IC, false, false, false, bias);
}

inline void matmul_backward(float* dinp,          // (N,IC), or null: not wanted
                            float* dweight,       // (IC,OC) +=
                            float* dbias,         // (OC) +=, or null
                            const float* dout,    // (N,OC)
                            const float* inp,     // (N,IC)
                            const float* weight,  // (IC,OC)
                            int N, int IC, int OC) {
    if (dinp) matmul(dinp, dout, weight, N, IC, OC, false, true, false);
    matmul(dweight, inp, dout, IC, OC, N, true, false, true);
    if (dbias) add_column_sums(dbias, dout, N, OC);
}

}  // namespace cpu
