// Decay gates: f_t = sigmoid(u_t . w_h + b_h) of token t and head h, by which attention to everything before
// token t fades (attention/gates.h). The layer makes log f, which keeps its digits near f = 1. The twin of
// llmc/cpu/decay_gate.h.
#pragma once
#include <algorithm>

#include "llmc/cuda/reduce.h"

namespace gpu {

constexpr int kGateHeads = 8;    // that a thread has sums for
constexpr int kGateRows = 4;     // tokens of a warp, in the forward pass
constexpr int kGateTokens = 16;  // tokens whose gradients a block has at a time
constexpr int kGateBlock = 128;

// A warp takes a few tokens and heads. Blocks: (tokens, heads).
template <class Real>
__global__ void __launch_bounds__(kGateBlock)
    decay_gate_forward_kernel(float* log_f /*(B,H,T)*/, const Real* u /*(N,C)*/, const Real* weight /*(C,H)*/,
                              const float* bias /*(H)*/, int N, int T, int C, int H) {
    const int lane = threadIdx.x % kWarp, h0 = blockIdx.y * kGateHeads;
    const int n0 = (blockIdx.x * (kGateBlock / kWarp) + threadIdx.x / kWarp) * kGateRows;
    float z[kGateRows][kGateHeads] = {};
    for (int c = lane; c < C; c += kWarp) {
        float x[kGateRows];
#pragma unroll
        for (int r = 0; r < kGateRows; r++) x[r] = n0 + r < N ? to_float(u[(size_t)(n0 + r) * C + c]) : 0;
#pragma unroll
        for (int k = 0; k < kGateHeads; k++) {
            const float w = h0 + k < H ? to_float(weight[(size_t)c * H + h0 + k]) : 0;
#pragma unroll
            for (int r = 0; r < kGateRows; r++) z[r][k] = fmaf(x[r], w, z[r][k]);
        }
    }
#pragma unroll
    for (int r = 0; r < kGateRows; r++)
#pragma unroll
        for (int k = 0; k < kGateHeads; k++) {
            const float sum = warp_sum(z[r][k]);
            const int n = n0 + r, h = h0 + k;
            if (lane != r * kGateHeads + k || n >= N || h >= H) continue;
            const float x = sum + bias[h];
            log_f[((size_t)(n / T) * H + h) * T + n % T] = x > 0 ? -log1pf(expf(-x)) : x - log1pf(expf(x));
        }
}

template <class Real>
void decay_gate_forward(float* log_f,        // (B,H,T)
                        const Real* u,       // (B,T,C)
                        const Real* weight,  // (C,H)
                        const float* bias,   // (H)
                        int B, int T, int C, int H, cudaStream_t stream) {
    static_assert(kGateRows * kGateHeads == kWarp);  // so each lane writes one result
    const int rows = kGateBlock / kWarp * kGateRows;
    decay_gate_forward_kernel<<<dim3(ceil_div(B * T, rows), ceil_div(H, kGateHeads)), kGateBlock, 0,
                                stream>>>(log_f, u, weight, bias, B * T, T, C, H);
    check_launch();
}

// Computes the gradient of z for kGateTokens tokens from n0 on and kGateHeads heads from h0 on: that of log f
// times d log f / dz = 1 - f.
__device__ inline void load_gate_gradients(float (&dz)[kGateTokens][kGateHeads], const float* dlog_f,
                                           const float* log_f, int n0, int h0, int end, int T, int H) {
    for (int i = threadIdx.x; i < kGateTokens * kGateHeads; i += kGateBlock) {
        const int n = n0 + i % kGateTokens, h = h0 + i / kGateTokens;
        const size_t at = ((size_t)(n / T) * H + h) * T + n % T;
        dz[i % kGateTokens][i / kGateTokens] = n < end && h < H ? -dlog_f[at] * expm1f(log_f[at]) : 0;
    }
}

// A thread takes a channel of kGateTokens tokens. Blocks: (tokens, channels).
template <class Real>
__global__ void __launch_bounds__(kGateBlock)
    decay_gate_input_kernel(Real* du /*(N,C) +=*/, const float* dlog_f, const float* log_f,
                            const Real* weight, int N, int T, int C, int H) {
    __shared__ float dz[kGateTokens][kGateHeads];
    const int c = blockIdx.y * kGateBlock + threadIdx.x, n0 = blockIdx.x * kGateTokens;
    float sums[kGateTokens] = {};
    for (int h0 = 0; h0 < H; h0 += kGateHeads) {
        __syncthreads();
        load_gate_gradients(dz, dlog_f, log_f, n0, h0, N, T, H);
        __syncthreads();
        if (c >= C) continue;
#pragma unroll
        for (int k = 0; k < kGateHeads; k++) {
            const float w = h0 + k < H ? to_float(weight[(size_t)c * H + h0 + k]) : 0;
#pragma unroll
            for (int r = 0; r < kGateTokens; r++) sums[r] = fmaf(dz[r][k], w, sums[r]);
        }
    }
    if (c >= C) return;
#pragma unroll
    for (int r = 0; r < kGateTokens; r++) {
        if (n0 + r >= N) break;
        Real& to = du[(size_t)(n0 + r) * C + c];
        to = from_float<Real>(to_float(to) + sums[r]);
    }
}

// Sums over a part of the tokens. A thread takes a channel and kGateHeads heads; the channel after the last
// one is 1, so its sums are those of the bias. Blocks: (channels, heads, parts).
template <class Real>
__global__ void __launch_bounds__(kGateBlock)
    decay_gate_weight_kernel(float* partial /*(parts,C+1,H)*/, const float* dlog_f, const float* log_f,
                             const Real* u, int rows, int N, int T, int C, int H) {
    __shared__ float dz[kGateTokens][kGateHeads];
    const int c = blockIdx.x * kGateBlock + threadIdx.x, h0 = blockIdx.y * kGateHeads;
    const int begin = blockIdx.z * rows, end = min(N, begin + rows);
    float sums[kGateHeads] = {};
    for (int n0 = begin; n0 < end; n0 += kGateTokens) {
        __syncthreads();
        load_gate_gradients(dz, dlog_f, log_f, n0, h0, end, T, H);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < kGateTokens; r++) {
            const float x = c < C && n0 + r < end ? to_float(u[(size_t)(n0 + r) * C + c]) : 1;
#pragma unroll
            for (int k = 0; k < kGateHeads; k++) sums[k] = fmaf(x, dz[r][k], sums[k]);
        }
    }
    if (c > C) return;
#pragma unroll
    for (int k = 0; k < kGateHeads; k++)
        if (h0 + k < H) partial[((size_t)blockIdx.z * (C + 1) + c) * H + h0 + k] = sums[k];
}

// Adds up the parts.
template <class Gradient>
__global__ void decay_gate_sums_kernel(Gradient* dweight, float* dbias, const float* partial, int parts,
                                       bool accumulate, int C, int H) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, size = (C + 1) * H;
    if (i >= size) return;
    float sum = 0;
    for (int part = 0; part < parts; part++) sum += partial[(size_t)part * size + i];
    if (i >= C * H) {
        dbias[i - C * H] += sum;
    } else {
        dweight[i] = from_float<Gradient>(accumulate ? to_float(dweight[i]) + sum : sum);
    }
}

inline int decay_gate_parts(int N) {
    return std::clamp(N / (4 * kGateTokens), 1, 64);
}

// The number of floats of scratch that decay_gate_backward() needs.
inline size_t decay_gate_scratch(int B, int T, int C, int H) {
    return (size_t)decay_gate_parts(B * T) * (C + 1) * H;
}

template <class Real, class Gradient>
void decay_gate_backward(Real* du,             // (B,T,C) +=
                         Gradient* dweight,    // (C,H), added to if accumulate
                         float* dbias,         // (H) +=
                         float* scratch,       // (decay_gate_scratch)
                         const float* dlog_f,  // (B,H,T)
                         const float* log_f,   // (B,H,T)
                         const Real* u,        // (B,T,C)
                         const Real* weight,   // (C,H)
                         bool accumulate, int B, int T, int C, int H, cudaStream_t stream) {
    const int N = B * T, parts = decay_gate_parts(N), rows = ceil_div(N, parts);
    decay_gate_input_kernel<<<dim3(ceil_div(N, kGateTokens), ceil_div(C, kGateBlock)), kGateBlock, 0,
                              stream>>>(du, dlog_f, log_f, weight, N, T, C, H);
    check_launch();
    decay_gate_weight_kernel<<<dim3(ceil_div(C + 1, kGateBlock), ceil_div(H, kGateHeads), parts), kGateBlock,
                               0, stream>>>(scratch, dlog_f, log_f, u, rows, N, T, C, H);
    check_launch();
    decay_gate_sums_kernel<<<ceil_div((C + 1) * H, kGateBlock), kGateBlock, 0, stream>>>(
        dweight, dbias, scratch, parts, accumulate, C, H);
    check_launch();
}

}  // namespace gpu
