// Causal attention, softmax and polynomial, forward and backward: the twin of llmc/cpu/attention.h, where the
// formulas and the contents of stats are. bf16 on tensor cores here, float in attention_float.h.
//
// A block has 64 queries (or keys) and walks through the tiles of 64 keys (or queries) that they see; its
// four warps have 16 rows each. The next tile comes by cp.async while one is worked on; scores and weights
// never leave registers. What lies above the diagonal is not computed, on the diagonal in steps of 16. Head
// sizes 32, 64, 80, 96 and 128 have kernels of their own, others up to 128 go with the next of these, padded
// with zeros.
//
// An activation is a small struct. One with kOnline = false is a function of the single score, with value()
// and slope(): its kernels have no row maximum, no rescaling, no log-sum-exp and no dO . O.
//
// Backward: one kernel over tiles of keys for dk and dv, one over tiles of queries for dq, which makes the
// scores once more: 7 products instead of 5. So nothing is added up across blocks: the result is the same
// bits always, without atomics, without blocks that wait for others and without a buffer that grows with T^2.
#pragma once
#include "llmc/cuda/attention_float.h"
#include "llmc/cuda/attention_kernels.h"

namespace gpu {

template <class Real>
bool keeps_exact_output(const AttentionConfig& config) {
    return config.has_row_sum() && !std::is_same_v<Real, float>;
}

// Floats in stats.
template <class Real>
size_t stats_size(const AttentionConfig& config, size_t B, size_t T, int H, int D) {
    if (!config.softmax() && !config.has_row_sum()) return 0;
    return B * T * H * (keeps_exact_output<Real>(config) ? 1 + D : 1);
}

// ------------------------------------------------------------------------------------------------- launch

// Rows that a block has.
template <class Real>
constexpr int attention_tile = std::is_same_v<Real, float> ? kFloatTile : kAttentionTile;

// Calls f with the kernels' head size.
template <class Real, class F>
void with_head_size(int D, F f) {
    if constexpr (std::is_same_v<Real, float>) {
        if (D <= 64) return f(std::integral_constant<int, 64>());
        if (D <= 128) return f(std::integral_constant<int, 128>());
    } else {
        if (D <= 32) return f(std::integral_constant<int, 32>());
        if (D <= 64) return f(std::integral_constant<int, 64>());
        if (D <= 80) return f(std::integral_constant<int, 80>());
        if (D <= 96) return f(std::integral_constant<int, 96>());
        if (D <= 128) return f(std::integral_constant<int, 128>());
    }
    fail("attention: head size ", D, ", the CUDA kernels go up to 128");
}
template <class F>
void with_activation(int power, F f) {
    switch (power) {
        case 0:
            return f(Softmax());
        case 1:
            return f(Poly<1>());
        case 2:
            return f(Poly<2>());
        case 3:
            return f(Poly<3>());
        case 4:
            return f(Poly<4>());
    }
    fail("attention: power ", power, ", expected 0 (softmax) to 4");
}

// Blocks may have more than 48 KB of shared memory where they ask for it.
template <class Kernel, class... Args>
void launch_attention(Kernel* kernel, dim3 grid, size_t shared, cudaStream_t stream, Args... args) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<grid, kAttentionThreads, shared, stream>>>(args...);
    check_launch();
}

// Floats in the scratch buffer of attention_forward.
inline size_t attention_forward_scratch(int T, int H) {
    return AttentionTables::size(T, H);
}

template <class Real>
void attention_forward(Real* out,           // (B,T,C)
                       float* stats,        // (stats_size)
                       float* scratch,      // (attention_forward_scratch)
                       const Real* qkv,     // (B,T,3C)
                       const float* decay,  // (H), or null
                       const AttentionConfig& config, int B, int T, int H, int D, cudaStream_t stream) {
    AttentionTables tables(scratch, decay != nullptr, T, H);
    make_tables(tables, decay, config, T, H, D, stream);
    AttentionShape shape{T, H, D, config.has_row_sum(), decay != nullptr, 1 / std::sqrt((float)D), tables};
    float* exact = keeps_exact_output<Real>(config) ? stats + (size_t)B * H * T : nullptr;
    dim3 grid(B * H, ceil_div(T, attention_tile<Real>));
    with_activation(config.power, [&]<class A>(A) {
        with_head_size<Real>(D, [&](auto size) {
            constexpr int kD = size;
            if constexpr (std::is_same_v<Real, float>) {
                size_t shared = (3 * FloatTile<kD>::size + FloatWeights::size) * sizeof(float);
                launch_attention(attention_forward_float_kernel<A, kD>, grid, shared, stream, out, stats, qkv,
                                 shape);
            } else {
                size_t shared = 5 * Tile<kD>::size * sizeof(bf16) + kAttentionTile * sizeof(float);
                launch_attention(attention_forward_kernel<A, kD>, grid, shared, stream, out, stats, exact,
                                 qkv, shape);
            }
        });
    });
}

// Floats in the scratch buffer of attention_backward, which begins at an 8-byte address.
inline size_t attention_backward_scratch(int B, int T, int H) {
    size_t tiles = ceil_div(T, kFloatTile);  // the smaller
    return (2 * tiles + T) * B * H + AttentionTables::size(T, H);
}

template <class Real>
void attention_backward(Real* dqkv,          // (B,T,3C)
                        float* ddecay,       // (H) +=, or null: not wanted
                        float* scratch,      // (attention_backward_scratch)
                        const Real* dout,    // (B,T,C)
                        const Real* out,     // (B,T,C)
                        const float* stats,  // (stats_size)
                        const Real* qkv,     // (B,T,3C)
                        const float* decay,  // (H), or null
                        const AttentionConfig& config, int B, int T, int H, int D, cudaStream_t stream) {
    int tiles = ceil_div(T, attention_tile<Real>), rows = B * T * H;
    double* dlog_gamma = ddecay ? reinterpret_cast<double*>(scratch) : nullptr;
    float* dot = scratch + 2 * (size_t)tiles * B * H;
    AttentionTables tables(dot + rows, decay != nullptr, T, H);
    make_tables(tables, decay, config, T, H, D, stream);
    if (config.softmax() || config.has_row_sum()) {
        int blocks = ceil_div(rows, 16);
        if (keeps_exact_output<Real>(config)) {
            attention_dots<<<blocks, 128, 0, stream>>>(dot, dout, stats + rows, rows, T, H, D);
        } else {
            attention_dots<<<blocks, 128, 0, stream>>>(dot, dout, out, rows, T, H, D);
        }
        check_launch();
    }
    AttentionShape shape{T, H, D, config.has_row_sum(), decay != nullptr, 1 / std::sqrt((float)D), tables};
    dim3 grid(B * H, tiles);
    with_activation(config.power, [&]<class A>(A) {
        with_head_size<Real>(D, [&](auto size) {
            constexpr int kD = size;
            if constexpr (std::is_same_v<Real, float>) {
                size_t shared = (4 * FloatTile<kD>::size + FloatWeights::size) * sizeof(float);
                launch_attention(attention_backward_keys_float_kernel<A, kD>, grid, shared, stream, dqkv,
                                 dout, stats, dot, qkv, shape);
                launch_attention(attention_backward_queries_float_kernel<A, kD>, grid, shared, stream, dqkv,
                                 dlog_gamma, dout, stats, dot, qkv, shape);
            } else {
                size_t shared = 6 * Tile<kD>::size * sizeof(bf16), floats = kAttentionTile * sizeof(float);
                launch_attention(attention_backward_keys_kernel<A, kD>, grid, shared + 5 * floats, stream,
                                 dqkv, dout, stats, dot, qkv, shape);
                launch_attention(attention_backward_queries_kernel<A, kD>, grid, shared + floats, stream,
                                 dqkv, dlog_gamma, dout, stats, dot, qkv, shape);
            }
        });
    });
    if (ddecay) add_decay_gradient(ddecay, dlog_gamma, decay, B, tiles, H, stream);
}

}  // namespace gpu
