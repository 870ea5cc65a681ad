// LayerNorm over the channels, alone and fused with the residual addition before it. The residual stream is
// float, the normalised rows are Real.
#pragma once
#include <algorithm>

#include "llmc/cuda/column_sums.h"
#include "llmc/layer_constants.h"

namespace gpu {

constexpr int kMaxChannels = 16384;

enum class LayerNormPass { forward, residual, recompute };

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / kWarp;
constexpr int kNormBlocks = 4 * kMultiprocessors;

// A warp takes one row after another. With kHeld > 0, rows of up to kHeld groups of 128 columns stay in
// registers, and weight and bias in shared memory. With 0, rows have any length and are read again when they
// are needed again.
template <LayerNormPass kPass, class Real, int kHeld, bool kPacked>
__global__ void __launch_bounds__(kNormThreads)
    layernorm_forward_kernel(float* residual, Real* out, float* mean, float* rstd, const float* inp,
                             const Real* delta, const float* __restrict__ weight,
                             const float* __restrict__ bias, int N, int C) {
    constexpr int kGroup = 4 * kWarp;
    __shared__ alignas(16) float shared[2][kHeld ? kHeld * kGroup : 4];
    if constexpr (kHeld > 0) {
#pragma unroll
        for (int c = threadIdx.x * 4; c < kHeld * kGroup; c += kNormThreads * 4)
            if (c < C) {
                store_vec(&shared[0][c], load_vec<4>(weight + c));
                store_vec(&shared[1][c], load_vec<4>(bias + c));
            }
        weight = shared[0], bias = shared[1];
        __syncthreads();
    }
    Columns<4, kPacked> columns{(int)threadIdx.x % kWarp, kWarp, C};
    int groups = columns.groups();
    auto for_groups = [&](auto f) {
        if constexpr (kHeld > 0) {
#pragma unroll
            for (int i = 0; i < kHeld; i++) f(i);
        } else {
#pragma unroll 2
            for (int i = 0; i < groups; i++) f(i);
        }
    };
    for (int row = blockIdx.x * kNormWarps + threadIdx.x / kWarp; row < N; row += gridDim.x * kNormWarps) {
        size_t begin = (size_t)row * C;
        Vec<4> held[kHeld ? kHeld : 1] = {};
        if constexpr (kHeld > 0) for_groups([&](int i) { held[i] = columns.load(inp + begin, i); });
        // The row itself. If it is not held, a lane reads again what it wrote.
        auto row_at = [&](int i) {
            if constexpr (kHeld > 0) {
                return held[i];
            } else {
                return columns.load((kPass == LayerNormPass::residual ? residual : inp) + begin, i);
            }
        };
        float m, r;
        if constexpr (kPass == LayerNormPass::recompute) {
            m = mean[row], r = rstd[row];
        } else {
            if constexpr (kPass == LayerNormPass::residual) {
                for_groups([&](int i) {
                    Vec<4> x = kHeld > 0 ? held[kHeld ? i : 0] : columns.load(inp + begin, i);
                    Vec<4> d = columns.load(delta + begin, i);
#pragma unroll
                    for (int k = 0; k < 4; k++) x[k] += d[k];
                    columns.store(residual + begin, i, x);
                    if constexpr (kHeld > 0) held[i] = x;
                });
            }
            float total = 0, squares = 0;
            for_groups([&](int i) {
                Vec<4> x = row_at(i);
#pragma unroll
                for (int k = 0; k < 4; k++) total += x[k];
            });
            m = warp_sum(total) / C;
            // The sum is over squares of deviations, because E[x^2] - E[x]^2 loses all digits if the mean is
            // large.
            for_groups([&](int i) {
                Vec<4> x = row_at(i);
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (columns.has(i, k)) squares += (x[k] - m) * (x[k] - m);
            });
            r = 1.0f / sqrtf(warp_sum(squares) / C + kLayerNormEps);
            if (columns.lane == 0) mean[row] = m, rstd[row] = r;
        }
        for_groups([&](int i) {
            Vec<4> x = row_at(i), w = columns.load(weight, i), b = columns.load(bias, i);
#pragma unroll
            for (int k = 0; k < 4; k++) x[k] = (x[k] - m) * r * w[k] + b[k];
            columns.store(out + begin, i, x);
        });
    }
}

template <LayerNormPass kPass, class Real>
void launch_layernorm_forward(float* residual, Real* out, float* mean, float* rstd, const float* inp,
                              const Real* delta, const float* weight, const float* bias, int N, int C,
                              cudaStream_t stream) {
    constexpr int kGroup = 4 * kWarp;
    auto kernel = C % 4 != 0         ? layernorm_forward_kernel<kPass, Real, 0, false>
                  : C <= 8 * kGroup  ? layernorm_forward_kernel<kPass, Real, 8, true>
                  : C <= 16 * kGroup ? layernorm_forward_kernel<kPass, Real, 16, true>
                                     : layernorm_forward_kernel<kPass, Real, 0, true>;
    int blocks = std::min(ceil_div(N, kNormWarps), kNormBlocks);
    kernel<<<blocks, kNormThreads, 0, stream>>>(residual, out, mean, rstd, inp, delta, weight, bias, N, C);
    check_launch();
}

template <class Real>
void layernorm_forward(Real* out,            // (N,C)
                       float* mean,          // (N)
                       float* rstd,          // (N)
                       const float* inp,     // (N,C)
                       const float* weight,  // (C)
                       const float* bias,    // (C)
                       int N, int C, cudaStream_t stream) {
    launch_layernorm_forward<LayerNormPass::forward, Real>(nullptr, out, mean, rstd, inp, nullptr, weight,
                                                           bias, N, C, stream);
}

// Makes out once more, from the mean and rstd that the forward pass found.
template <class Real>
void layernorm_recompute(Real* out,            // (N,C)
                         const float* mean,    // (N)
                         const float* rstd,    // (N)
                         const float* inp,     // (N,C)
                         const float* weight,  // (C)
                         const float* bias,    // (C)
                         int N, int C, cudaStream_t stream) {
    launch_layernorm_forward<LayerNormPass::recompute, Real>(nullptr, out, const_cast<float*>(mean),
                                                             const_cast<float*>(rstd), inp, nullptr, weight,
                                                             bias, N, C, stream);
}

// residual = inp + delta, out = LayerNorm(residual), in one pass over memory.
template <class Real>
void residual_layernorm_forward(float* residual,      // (N,C), may be inp
                                Real* out,            // (N,C)
                                float* mean,          // (N)
                                float* rstd,          // (N)
                                const float* inp,     // (N,C)
                                const Real* delta,    // (N,C)
                                const float* weight,  // (C)
                                const float* bias,    // (C)
                                int N, int C, cudaStream_t stream) {
    launch_layernorm_forward<LayerNormPass::residual, Real>(residual, out, mean, rstd, inp, delta, weight,
                                                            bias, N, C, stream);
}

// ------------------------------------------------------------------------------------------------- backward

constexpr int kNormBackwardThreads = 512;  // at most

// A block takes every gridDim.x-th row. A thread has so few columns that their weight gradients, summed over
// all rows of the block, stay in registers. There are at most kGroups groups of 4 blockDim.x columns. With
// kHeld the row stays in registers too, otherwise it is read twice.
template <class Real, int kGroups, bool kHeld, bool kPacked>
__global__ void __launch_bounds__(kNormBackwardThreads)
    layernorm_backward_kernel(float* dinp, Real* dinp_copy, float* partial, const Real* __restrict__ dout,
                              const float* __restrict__ inp, const float* __restrict__ mean,
                              const float* __restrict__ rstd, const float* __restrict__ weight, int N,
                              int C) {
    __shared__ float2 shared[2][kNormBackwardThreads / kWarp];  // rows alternate between the two
    Columns<4, kPacked> columns{(int)threadIdx.x, (int)blockDim.x, C};
    int groups = columns.groups(), turn = 0;
    Vec<4> dw[kGroups] = {}, db[kGroups] = {}, w[kHeld ? kGroups : 1];
    if constexpr (kHeld) {
#pragma unroll
        for (int i = 0; i < kGroups; i++) w[i] = columns.load(weight, i);
    }
    for (int row = blockIdx.x; row < N; row += gridDim.x, turn ^= 1) {
        size_t begin = (size_t)row * C;
        // The compiler must not compute the offsets of columns before the loop: to keep them would take more
        // registers than there are.
        if constexpr (!kHeld) asm volatile("" : "+r"(columns.lane));
        Vec<4> d[kHeld ? kGroups : 1], x[kHeld ? kGroups : 1], dx[kHeld ? kGroups : 1];
        if constexpr (kHeld) {
#pragma unroll
            for (int i = 0; i < kGroups; i++) {
                d[i] = columns.load(dout + begin, i);
                x[i] = columns.load(inp + begin, i);
                dx[i] = columns.load(dinp + begin, i);
            }
        }
        float m = mean[row], r = rstd[row], total = 0, total_normed = 0;
#pragma unroll
        for (int i = 0; i < kGroups; i++) {
            if (!kHeld && i >= groups) break;
            Vec<4> di, xi, wi;
            if constexpr (kHeld) {
                di = d[i], xi = x[i], wi = w[i];
            } else {
                di = columns.load(dout + begin, i), xi = columns.load(inp + begin, i);
                wi = columns.load(weight, i);
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float dnorm = di[k] * wi[k];
                total += dnorm;
                total_normed += dnorm * ((xi[k] - m) * r);
            }
        }
        float2 sums = block_sum(float2{total, total_normed}, shared[turn]);
        float mean_dnorm = sums.x / C, mean_normed = sums.y / C;
#pragma unroll
        for (int i = 0; i < kGroups; i++) {
            if (!kHeld && i >= groups) break;
            Vec<4> di, xi, wi, sum;
            if constexpr (kHeld) {
                di = d[i], xi = x[i], wi = w[i], sum = dx[i];
            } else {
                di = columns.load(dout + begin, i), xi = columns.load(inp + begin, i);
                wi = columns.load(weight, i), sum = columns.load(dinp + begin, i);
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float norm = (xi[k] - m) * r;
                dw[i][k] += di[k] * norm;
                db[i][k] += di[k];
                sum[k] += (di[k] * wi[k] - mean_dnorm - norm * mean_normed) * r;
            }
            columns.store(dinp + begin, i, sum);
            if constexpr (!std::is_same_v<Real, float>) columns.store(dinp_copy + begin, i, sum);
        }
    }
    Columns<4, kPacked> to{columns.lane, columns.width, padded_columns(C)};
    float* sums = partial + (size_t)blockIdx.x * 2 * to.C;
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
        if (i >= to.groups()) break;
        to.store(sums, i, dw[i]);
        to.store(sums + to.C, i, db[i]);
    }
}

// A block has at least 8 rows, so that its partial sums are few numbers compared with its rows.
inline int layernorm_backward_blocks(int N) {
    return std::min(ceil_div(N, 8), 6 * kMultiprocessors);
}

// The number of floats of scratch that layernorm_backward() needs.
inline size_t layernorm_backward_scratch(int N, int C) {
    return (size_t)layernorm_backward_blocks(N) * 2 * padded_columns(C);
}

// Adds to dinp, because it is the gradient of the residual stream. Weight gradients are summed over the rows
// of each block, then over the blocks, always in the same order.
template <class Real>
void layernorm_backward(float* dinp,          // (N,C) +=
                        Real* dinp_copy,      // (N,C): dinp in bf16; not written if Real is float
                        float* dweight,       // (C) +=
                        float* dbias,         // (C) +=
                        float* scratch,       // (layernorm_backward_scratch(N, C))
                        const Real* dout,     // (N,C)
                        const float* inp,     // (N,C)
                        const float* mean,    // (N)
                        const float* rstd,    // (N)
                        const float* weight,  // (C)
                        int N, int C, cudaStream_t stream) {
    if (C > kMaxChannels) fail("layernorm_backward: ", C, " channels, expected at most ", kMaxChannels);
    int blocks = layernorm_backward_blocks(N);
    int threads = std::min(ceil_div(C, 8 * kWarp) * kWarp, kNormBackwardThreads);
    auto kernel = C % 4 != 0                      ? layernorm_backward_kernel<Real, 8, false, false>
                  : C <= 8 * kNormBackwardThreads ? layernorm_backward_kernel<Real, 2, true, true>
                                                  : layernorm_backward_kernel<Real, 8, false, true>;
    kernel<<<blocks, threads, 0, stream>>>(dinp, dinp_copy, scratch, dout, inp, mean, rstd, weight, N, C);
    check_launch();
    add_partial_sums(dweight, dbias, scratch, blocks, C, stream);
}

}  // namespace gpu
