// Launches the attention kernels for tiles. Those for gates take as long to build as all others, so they are
// in an object of their own (gated.cu), and two cores can build both at once.
#pragma once
#include "llmc/cuda/attention/kernels_bf16.h"
#include "llmc/cuda/attention/kernels_float.h"

namespace gpu {

// Calls f with the kernels' head size. With gates there are fewer sizes, because each takes long to build:
// heads of 80 and 96 use the kernels for 128.
template <class Real, bool kGates, class F>
void with_head_size(int D, F f) {
    if constexpr (std::is_same_v<Real, float>) {
        if (D <= 64) return f(std::integral_constant<int, 64>());
        if (D <= 128) return f(std::integral_constant<int, 128>());
    } else {
        if (D <= 32) return f(std::integral_constant<int, 32>());
        if (D <= 64) return f(std::integral_constant<int, 64>());
        if constexpr (!kGates) {
            if (D <= 80) return f(std::integral_constant<int, 80>());
            if (D <= 96) return f(std::integral_constant<int, 96>());
        }
        if (D <= 128) return f(std::integral_constant<int, 128>());
    }
    fail("attention: head size ", D, ", the CUDA kernels go up to 128");
}

// The arguments are those of the kernels, and the blocks. shape.gate is used only with kGates.
template <bool kGates, class Real>
void launch_forward(Real* out, float* stats, float* exact, const Real* qkv, const GatedShape& shape,
                    AttentionKind kind, dim3 grid, cudaStream_t stream) {
    with_activation<kGates>(kind, [&]<class A>(A) {
        with_head_size<Real, kGates>(shape.D, [&](auto size) {
            constexpr int kD = size;
            if constexpr (std::is_same_v<Real, float>) {
                size_t shared = (3 * FloatTile<kD>::size + FloatWeights::size) * sizeof(float);
                launch_attention(attention_forward_float_kernel<A, kD>, grid, shared, stream, out, stats, qkv,
                                 shape);
            } else {
                size_t floats = kAttentionTile * sizeof(float);
                size_t shared = 5 * Tile<kD>::size * sizeof(bf16) + (kGated<A> ? 4 : 1) * floats;
                launch_attention(attention_forward_kernel<A, kD>, grid, shared, stream, out, stats, exact,
                                 qkv, shape);
            }
        });
    });
}

template <bool kGates, class Real>
void launch_backward(Real* dqkv, double* dlog_gamma, const Real* dout, const float* stats, const float* dot,
                     const Real* qkv, const GatedShape& shape, AttentionKind kind, dim3 grid,
                     cudaStream_t stream) {
    with_activation<kGates>(kind, [&]<class A>(A) {
        with_head_size<Real, kGates>(shape.D, [&](auto size) {
            constexpr int kD = size;
            if constexpr (std::is_same_v<Real, float>) {
                size_t shared = (4 * FloatTile<kD>::size + FloatWeights::size) * sizeof(float);
                launch_attention(attention_backward_keys_float_kernel<A, kD>, grid, shared, stream, dqkv,
                                 dout, stats, dot, qkv, shape);
                launch_attention(attention_backward_queries_float_kernel<A, kD>, grid, shared, stream, dqkv,
                                 dlog_gamma, dout, stats, dot, qkv, shape);
            } else {
                size_t shared = 6 * Tile<kD>::size * sizeof(bf16), floats = kAttentionTile * sizeof(float);
                const int tables = kGated<A> ? 2 : 1;
                launch_attention(attention_backward_keys_kernel<A, kD>, grid, shared + (4 + tables) * floats,
                                 stream, dqkv, dout, stats, dot, qkv, shape);
                launch_attention(attention_backward_queries_kernel<A, kD>, grid,
                                 shared + (kGated<A> ? 4 : 1) * floats, stream, dqkv, dlog_gamma, dout, stats,
                                 dot, qkv, shape);
            }
        });
    });
}

}  // namespace gpu
