// Products of row-major matrices, and the linear layer that uses them. The factors are float or bf16, the
// sums are in float32, and the product is stored in float or bf16.
//
// matmul() calls oneDNN (version 2 or 3) if that was found at build time (-DLLMC_ONEDNN). Otherwise it calls
// matmul_loops(), which computes the same in plain OpenMP loops. Both are compiled, so that tests can compare
// them. If the instruction set cannot multiply bf16, the factors are converted to float first.
#pragma once
#include <cstddef>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#ifdef LLMC_ONEDNN
#include <oneapi/dnnl/dnnl.hpp>
#include <tuple>
#include <unordered_map>
#endif

#include "llmc/cpu/bf16.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/threads.h"
#include "llmc/error.h"

namespace cpu::inline LLMC_ISA {

// c (M,N) = a (M,K) b (K,N) + bias (N), or c += a b if `accumulate`. With trans_a, `a` is stored as (K,M).
// With trans_b, `b` is stored as (N,K).
inline void matmul_loops(float* c,        // (M,N)
                         const float* a,  // (M,K), or (K,M) with trans_a
                         const float* b,  // (K,N), or (N,K) with trans_b
                         int M, int N, int K, bool trans_a, bool trans_b, bool accumulate,
                         const float* bias = nullptr) {  // (N)
    // The rows of c are computed in blocks, so that a row of b is fetched once for several rows of c.
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

// A matmul primitive of oneDNN is made for one set of sizes and one number of threads. To make one takes
// longer than to run a small one, so they are kept. Only one thread may call this, because oneDNN distributes
// the work over OpenMP's threads itself.
using Key = std::tuple<int, int, int, int, int>;  // M, N, K, number of threads, Kind::bits()

// The properties of a product except its sizes.
struct Kind {
    bool trans_a, trans_b, accumulate, bias;
    bool factors_bf16, product_bf16;
    int bits() const {
        return trans_a + 2 * trans_b + 4 * accumulate + 8 * bias + 16 * factors_bf16 + 32 * product_bf16;
    }
};

struct KeyHash {
    size_t operator()(const Key& key) const {
        auto [M, N, K, threads, bits] = key;
        size_t hash = M;
        for (size_t part : {(size_t)N, (size_t)K, (size_t)threads, (size_t)bits})
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

inline Product make_product(int M, int N, int K, const Kind& kind) {
    using dnnl::memory;
    auto type = [](bool is_bf16) { return is_bf16 ? memory::data_type::bf16 : memory::data_type::f32; };
    memory::desc a({M, K}, type(kind.factors_bf16), kind.trans_a ? memory::dims{1, M} : memory::dims{K, 1});
    memory::desc b({K, N}, type(kind.factors_bf16), kind.trans_b ? memory::dims{1, K} : memory::dims{N, 1});
    memory::desc c({M, N}, type(kind.product_bf16), memory::dims{N, 1});
    memory::desc bias = kind.bias ? memory::desc({1, N}, type(false), memory::dims{N, 1}) : memory::desc();
    dnnl::primitive_attr attributes;
    if (kind.accumulate) {
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
    if (kind.bias) p.arguments[DNNL_ARG_BIAS] = p.bias = memory(bias, engine(), nullptr);
    return p;
}

template <class Result, class Factor>
inline void matmul(Result* c, const Factor* a, const Factor* b, int M, int N, int K, bool trans_a,
                   bool trans_b, bool accumulate, const float* bias) try {
    static dnnl::stream stream(engine());
    static std::unordered_map<Key, Product, KeyHash> products;
    Kind kind{trans_a,
              trans_b,
              accumulate,
              bias != nullptr,
              std::is_same_v<Factor, bf16>,
              std::is_same_v<Result, bf16>};
    Key key(M, N, K, settle_threads(), kind.bits());
    auto found = products.find(key);
    if (found == products.end()) found = products.emplace(key, make_product(M, N, K, kind)).first;
    Product& p = found->second;
    p.a.set_data_handle(const_cast<Factor*>(a));
    p.b.set_data_handle(const_cast<Factor*>(b));
    p.c.set_data_handle(c);
    if (bias) p.bias.set_data_handle(const_cast<float*>(bias));
    p.primitive.execute(stream, p.arguments);
    stream.wait();
} catch (const dnnl::error& e) {
    if (e.status == dnnl_out_of_memory) throw std::bad_alloc();
    fail("oneDNN cannot multiply (", M, ",", K, ") by (", K, ",", N, ") in ",
         std::is_same_v<Factor, bf16> ? "bf16" : "float32", " on this processor (status ", (int)e.status,
         "); is ONEDNN_MAX_CPU_ISA set?");
}

}  // namespace onednn
#endif

#if defined(__AVX512BF16__) && defined(LLMC_ONEDNN)
constexpr bool kMultipliesBf16 = true;
#else
constexpr bool kMultipliesBf16 = false;
#endif

// Returns n numbers as floats. The next call with the same `place` overwrites them. If x is null, it returns
// the memory without values.
inline float* converted(const bf16* x, size_t n, int place) {
    static std::vector<float> memory[3];
    std::vector<float>& floats = memory[place];
    if (floats.size() < n) floats.resize(n);
    if (x) {
#pragma omp parallel for simd schedule(static)
        for (size_t i = 0; i < n; i++) floats[i] = x[i];
    }
    return floats.data();
}

// c (M,N) = a b + bias, or c += a b if `accumulate`; then there is no bias.
template <class Result, class Factor>
inline void matmul(Result* c,        // (M,N)
                   const Factor* a,  // (M,K), or (K,M) with trans_a
                   const Factor* b,  // (K,N), or (N,K) with trans_b
                   int M, int N, int K, bool trans_a, bool trans_b, bool accumulate,
                   const float* bias = nullptr) {  // (N)
    if constexpr (std::is_same_v<Factor, bf16> && !kMultipliesBf16) {
        matmul(c, converted(a, (size_t)M * K, 0), converted(b, (size_t)K * N, 1), M, N, K, trans_a, trans_b,
               accumulate, bias);
    } else if constexpr (std::is_same_v<Factor, float> && std::is_same_v<Result, bf16>) {
        float* product = converted(accumulate ? c : nullptr, (size_t)M * N, 2);
        matmul(product, a, b, M, N, K, trans_a, trans_b, accumulate, bias);
#pragma omp parallel for simd schedule(static)
        for (size_t i = 0; i < (size_t)M * N; i++) c[i] = product[i];
    } else {
#ifdef LLMC_ONEDNN
        onednn::matmul(c, a, b, M, N, K, trans_a, trans_b, accumulate, bias);
#else
        matmul_loops(c, a, b, M, N, K, trans_a, trans_b, accumulate, bias);
#endif
    }
}

// out += the sum of the rows of inp.
template <class Real>
inline void add_column_sums(float* out,       // (C) +=
                            const Real* inp,  // (N,C)
                            int N, int C) {
    constexpr int kColumns = 64;
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < C; c0 += kColumns) {
        int columns = C - c0 < kColumns ? C - c0 : kColumns;
        float sum[kColumns] = {};
        for (int n = 0; n < N; n++) {
            const Real* row = inp + (size_t)n * C + c0;
            if (columns == kColumns) {  // with a constant number of iterations the sums stay in registers
                for (int c = 0; c < kColumns; c++) sum[c] += row[c];
            } else {
                for (int c = 0; c < columns; c++) sum[c] += row[c];
            }
        }
        for (int c = 0; c < columns; c++) out[c0 + c] += sum[c];
    }
}

// The linear layer: out = inp weight + bias.
template <class Real>
inline void matmul_forward(Real* out,           // (N,OC)
                           const Real* inp,     // (N,IC)
                           const Real* weight,  // (IC,OC)
                           const float* bias,   // (OC), or null
                           int N, int IC, int OC) {
    matmul(out, inp, weight, N, OC, IC, false, false, false, bias);
}

template <class Real>
inline void matmul_backward(Real* dinp,          // (N,IC) =, or += if `adds_dinp`; null: not wanted
                            float* dweight,      // (IC,OC) += if `accumulate`, otherwise =
                            float* dbias,        // (OC) +=, or null
                            const Real* dout,    // (N,OC)
                            const Real* inp,     // (N,IC)
                            const Real* weight,  // (IC,OC)
                            bool accumulate, int N, int IC, int OC, bool adds_dinp = false) {
    if (dinp) matmul(dinp, dout, weight, N, IC, OC, false, true, adds_dinp);
    matmul(dweight, inp, dout, IC, OC, N, true, false, accumulate);
    if (dbias) add_column_sums(dbias, dout, N, OC);
}

}  // namespace cpu
