// GELU in its tanh form, x sigmoid(u2): llmc/layer_constants.h has the formula.
#pragma once
#include <algorithm>

#include "llmc/cuda/column_sums.h"
#include "llmc/layer_constants.h"

namespace gpu {

__device__ inline float gelu(float x) {
    float u2 = x * kGeluScale * (1.0f + kGeluCubic * x * x);
    return __fdividef(x, 1.0f + __expf(-u2));
}

__device__ inline float gelu_derivative(float x) {
    x = x < -kGeluFar ? -kGeluFar : x > kGeluFar ? kGeluFar : x;
    float u2 = x * kGeluScale * (1.0f + kGeluCubic * x * x);
    float sigmoid = __fdividef(1.0f, 1.0f + __expf(-u2));
    float du2 = kGeluScale * (1.0f + 3.0f * kGeluCubic * x * x);
    return sigmoid + x * sigmoid * (1.0f - sigmoid) * du2;
}

constexpr int kGeluThreads = 256;

template <class Real>
__global__ void __launch_bounds__(kGeluThreads) gelu_forward_kernel(Real* out, const Real* inp, size_t n) {
    constexpr int kPack = Pack<Real>::size;
    size_t i = ((size_t)blockIdx.x * kGeluThreads + threadIdx.x) * kPack;
    if (i >= n) return;
    Vec<kPack> x = load_vec<kPack>(inp + i, n - i);
#pragma unroll
    for (int k = 0; k < kPack; k++) x[k] = gelu(x[k]);
    store_vec(out + i, x, n - i);
}

template <class Real>
void gelu_forward(Real* out,        // (n)
                  const Real* inp,  // (n)
                  size_t n, cudaStream_t stream) {
    size_t blocks = ceil_div(n, (size_t)kGeluThreads * Pack<Real>::size);
    gelu_forward_kernel<<<(unsigned)blocks, kGeluThreads, 0, stream>>>(out, inp, n);
    check_launch();
}

// A block takes as many columns of 64 rows as a warp reads at once. Each of its 8 warps takes every 8th row.
constexpr int kGeluRows = 64;

template <class Real, bool kPacked>
__global__ void __launch_bounds__(kGeluThreads)
    gelu_backward_kernel(Real* dinp, float* partial, const Real* dout, const Real* inp, int N, int C) {
    constexpr int kPack = Pack<Real>::size, kWarps = kGeluThreads / kWarp, kTile = kWarp * kPack;
    __shared__ alignas(16) float sums[kWarps][kTile];
    int warp = threadIdx.x / kWarp, tile = blockIdx.x;
    Columns<kPack, kPacked> columns{(int)threadIdx.x % kWarp, kWarp, C};
    int end = min(N, (int)(blockIdx.y + 1) * kGeluRows);
    Vec<kPack> sum{};
#pragma unroll 2
    for (int row = blockIdx.y * kGeluRows + warp; row < end; row += kWarps) {
        size_t at = (size_t)row * C;
        Vec<kPack> d = columns.load(dout + at, tile), x = columns.load(inp + at, tile);
#pragma unroll
        for (int k = 0; k < kPack; k++) {
            d[k] *= gelu_derivative(x[k]);
            sum[k] += d[k];
        }
        columns.store(dinp + at, tile, d);
    }
#pragma unroll
    for (int k = 0; k < kPack; k++) sums[warp][columns.at(0, k)] = sum[k];
    __syncthreads();
    int c = threadIdx.x * 4, padded = padded_columns(C);
    if (c >= kTile || tile * kTile + c >= padded) return;
    Vec<4> total{};
#pragma unroll
    for (int w = 0; w < kWarps; w++)
#pragma unroll
        for (int k = 0; k < 4; k++) total[k] += sums[w][c + k];
    store_vec(partial + (size_t)blockIdx.y * padded + tile * kTile + c, total);
}

// The number of floats of scratch that gelu_backward() needs.
inline size_t gelu_backward_scratch(int N, int C) {
    return (size_t)ceil_div(N, kGeluRows) * padded_columns(C);
}

// Also sums dinp over the rows into dbias, the gradient of the bias in front, while dinp is in registers.
// Blocks of rows are summed first, then their sums in a fixed order.
template <class Real>
void gelu_backward(Real* dinp,        // (N,C), may be dout
                   float* dbias,      // (C) +=
                   float* scratch,    // (gelu_backward_scratch(N, C))
                   const Real* dout,  // (N,C)
                   const Real* inp,   // (N,C)
                   int N, int C, cudaStream_t stream) {
    constexpr int kPack = Pack<Real>::size;
    dim3 grid(ceil_div(C, kWarp * kPack), ceil_div(N, kGeluRows));
    auto kernel = C % kPack == 0 ? gelu_backward_kernel<Real, true> : gelu_backward_kernel<Real, false>;
    kernel<<<grid, kGeluThreads, 0, stream>>>(dinp, scratch, dout, inp, N, C);
    check_launch();
    add_partial_sums(dbias, nullptr, scratch, (int)grid.y, C, stream);
}

}  // namespace gpu
