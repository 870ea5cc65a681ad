// A causal depthwise convolution over time: z_t = sum_{s<K} weight[s] inp_{t-s}, zero before the first token.
//
// A thread has a pack of channels. It goes through some rows with the last K of them in its registers, so
// that each row is read about once. Convolutions with more than kConvTaps taps read rows again, which are in
// the caches by then.
#pragma once
#include <algorithm>
#include <cstddef>

#include "llmc/cuda/column_sums.h"
#include "llmc/cuda/vector.h"

namespace gpu {

constexpr int kConvTaps = 4;
constexpr int kConvLanes = 32, kConvRuns = 8;  // threads of a block along the channels and along time

// The number of rows that a thread goes through.
inline int short_conv_rows(int T) {
    return std::clamp(ceil_div(T, kConvRuns), 1, 32);
}
inline int short_conv_parts(int T) {
    return ceil_div(T, short_conv_rows(T) * kConvRuns);
}

// Shared memory for a row of a block's threads: kWidth numbers for each lane. The stride keeps both orders,
// by lanes and by channels, free of bank conflicts.
template <int kWidth>
struct ConvRow {
    static constexpr int kStride = kConvLanes + kConvLanes / kWidth;
    float values[kWidth * kStride];
    __device__ float& at(int i, int lane) { return values[i * kStride + lane]; }
    __device__ void put(const Vec<kWidth>& x) {
#pragma unroll
        for (int i = 0; i < kWidth; i++) at(i, threadIdx.x) = x[i];
    }
    __device__ Vec<kWidth> take() {
        Vec<kWidth> x;
#pragma unroll
        for (int i = 0; i < kWidth; i++) x[i] = at(i, threadIdx.x);
        return x;
    }
};

// Reads the taps of a block's channels, once for all its rows.
template <int kWidth, int K>
__device__ void load_taps(Vec<kWidth> (&taps)[K], ConvRow<kWidth>* shared, const float* weight, int w,
                          int W) {
    static_assert(K <= kConvRuns);
    if (w < W && threadIdx.y < K) {
        shared[threadIdx.y].put(load_vec<kWidth>(weight + (size_t)threadIdx.y * W + w));
    }
    __syncthreads();
    if (w >= W) return;
#pragma unroll
    for (int s = 0; s < K; s++) taps[s] = shared[s].take();
}

template <class Real, int kWidth, int K>
__global__ void __launch_bounds__(kConvLanes* kConvRuns, 1)
    short_conv_forward_kernel(Real* out, const Real* inp, const float* weight, int rows, int T, int W) {
    int w = (blockIdx.x * kConvLanes + threadIdx.x) * kWidth;
    int begin = (blockIdx.y * kConvRuns + threadIdx.y) * rows, end = min(T, begin + rows);
    __shared__ ConvRow<kWidth> shared[K];
    Vec<kWidth> taps[K], x[K] = {};  // x[s] is row t - s
    load_taps(taps, shared, weight, w, W);
    if (w >= W || begin >= T) return;
    size_t at = (size_t)blockIdx.z * T * W + w;
#pragma unroll
    for (int s = 0; s < K - 1; s++)
        if (begin - 1 - s >= 0) x[s] = load_vec<kWidth>(inp + at + (size_t)(begin - 1 - s) * W);
#pragma unroll K
    for (int t = begin; t < end; t++) {
#pragma unroll
        for (int s = K - 1; s > 0; s--) x[s] = x[s - 1];
        x[0] = load_vec<kWidth>(inp + at + (size_t)t * W);
        Vec<kWidth> sum{};
#pragma unroll
        for (int s = 0; s < K; s++)
#pragma unroll
            for (int i = 0; i < kWidth; i++) sum[i] += taps[s][i] * x[s][i];
        store_vec(out + at + (size_t)t * W, sum);
    }
}

// Makes the gradients of at most K taps from `first` on, and dinp unless it is null. A block writes its sums
// of the taps' gradients to its row of partial.
template <class Real, int kWidth, int K>
__global__ void __launch_bounds__(kConvLanes* kConvRuns, 1)
    short_conv_backward_kernel(Real* dinp,
                               float* partial,  // (gridDim.z,gridDim.y,taps,W)
                               const Real* dout, const Real* inp, const float* weight, int first, int taps,
                               int rows, int T, int W) {
    __shared__ ConvRow<kWidth> shared[kConvRuns];
    int w = (blockIdx.x * kConvLanes + threadIdx.x) * kWidth;
    int begin = (blockIdx.y * kConvRuns + threadIdx.y) * rows, end = min(T, begin + rows);
    size_t at = (size_t)blockIdx.z * T * W + w;
    Vec<kWidth> weights[K], dtaps[K] = {};
    const bool has_dinp = K < kConvTaps || dinp;  // with fewer taps there is always a dinp
    if (has_dinp) load_taps(weights, shared, weight, w, W);
    if (w < W && begin < T) {
        Vec<kWidth> d[K] = {};  // d[s] is row t + first + s
#pragma unroll
        for (int s = 1; s < K; s++)
            if (begin + first + s - 1 < T)
                d[s] = load_vec<kWidth>(dout + at + (size_t)(begin + first + s - 1) * W);
        for (int t = begin; t < end; t++) {
#pragma unroll
            for (int s = 0; s < K - 1; s++) d[s] = d[s + 1];
            int last = t + first + K - 1;
            if (last < T) {
                d[K - 1] = load_vec<kWidth>(dout + at + (size_t)last * W);
            } else {
                d[K - 1] = {};
            }
            Vec<kWidth> x = load_vec<kWidth>(inp + at + (size_t)t * W);
#pragma unroll
            for (int s = 0; s < K; s++)
#pragma unroll
                for (int i = 0; i < kWidth; i++) dtaps[s][i] += x[i] * d[s][i];
            if (!has_dinp) continue;
            Vec<kWidth> dx{};
#pragma unroll
            for (int s = 0; s < K; s++)
#pragma unroll
                for (int i = 0; i < kWidth; i++) dx[i] += weights[s][i] * d[s][i];
            store_vec(dinp + at + (size_t)t * W, dx);
        }
    }
    float* to = partial + (size_t)(blockIdx.z * gridDim.y + blockIdx.y) * taps * W;
    int thread = threadIdx.y * kConvLanes + threadIdx.x;
#pragma unroll
    for (int s = 0; s < K; s++) {
        __syncthreads();
        shared[threadIdx.y].put(dtaps[s]);
        __syncthreads();
        int column = blockIdx.x * kConvLanes * kWidth + thread;
        if (thread >= kConvLanes * kWidth || column >= W || first + s >= taps) continue;
        float sum = 0;
        for (int run = 0; run < kConvRuns; run++) sum += shared[run].at(thread % kWidth, thread / kWidth);
        to[(size_t)(first + s) * W + column] = sum;
    }
}

// For any K. A thread makes one pack of one row: of the convolution, or with kReversed of its transpose,
// which makes dinp from dout.
template <class Real, int kWidth, bool kReversed>
__global__ void short_conv_wide_kernel(Real* out, const Real* inp, const float* weight, int T, int W, int K) {
    int w = (blockIdx.x * kConvLanes + threadIdx.x) * kWidth, t = blockIdx.y * kConvRuns + threadIdx.y;
    if (w >= W || t >= T) return;
    size_t at = ((size_t)blockIdx.z * T + t) * W + w;
    Vec<kWidth> sum{};
    for (int s = 0; s < K && (kReversed ? t + s < T : s <= t); s++) {
        Vec<kWidth> x = load_vec<kWidth>(kReversed ? inp + at + (size_t)s * W : inp + at - (size_t)s * W);
        Vec<kWidth> tap = load_vec<kWidth>(weight + (size_t)s * W + w);
#pragma unroll
        for (int i = 0; i < kWidth; i++) sum[i] += tap[i] * x[i];
    }
    store_vec(out + at, sum);
}

// Calls run(width, taps), where taps is K, or kConvTaps if K is larger.
template <class Real, class Run>
void choose_short_conv(bool packs, int K, Run run) {
    auto with_width = [&](auto width) {
        if (K == 1) return run(width, std::integral_constant<int, 1>());
        if (K == 2) return run(width, std::integral_constant<int, 2>());
        if (K == 3) return run(width, std::integral_constant<int, 3>());
        run(width, std::integral_constant<int, kConvTaps>());
    };
    if (packs) {
        with_width(std::integral_constant<int, Pack<Real>::size>());
    } else {
        with_width(std::integral_constant<int, 1>());
    }
}

template <class Real>
void short_conv_forward(Real* out,            // (B,T,W)
                        const Real* inp,      // (B,T,W)
                        const float* weight,  // (K,W)
                        int B, int T, int W, int K, cudaStream_t stream) {
    choose_short_conv<Real>(in_packs<Real>(W, out, inp, weight), K, [&](auto width, auto taps) {
        constexpr int kWidth = width();
        dim3 block(kConvLanes, kConvRuns);
        int columns = ceil_div(W, kConvLanes * kWidth);
        if (K <= kConvTaps) {
            short_conv_forward_kernel<Real, kWidth, taps()>
                <<<dim3(columns, short_conv_parts(T), B), block, 0, stream>>>(out, inp, weight,
                                                                              short_conv_rows(T), T, W);
        } else {
            short_conv_wide_kernel<Real, kWidth, false>
                <<<dim3(columns, ceil_div(T, kConvRuns), B), block, 0, stream>>>(out, inp, weight, T, W, K);
        }
        check_launch();
    });
}

// The number of floats of scratch that short_conv_backward() needs.
inline size_t short_conv_scratch(int B, int T, int W, int K) {
    return kColumnSumsScratch + (size_t)B * short_conv_parts(T) * K * W;
}

template <class Real>
void short_conv_backward(Real* dinp,           // (B,T,W)
                         float* dweight,       // (K,W) +=
                         float* scratch,       // (short_conv_scratch)
                         const Real* dout,     // (B,T,W)
                         const Real* inp,      // (B,T,W)
                         const float* weight,  // (K,W)
                         int B, int T, int W, int K, cudaStream_t stream) {
    float* partial = scratch + kColumnSumsScratch;
    int parts = short_conv_parts(T);
    choose_short_conv<Real>(in_packs<Real>(W, dinp, dout, inp, weight), K, [&](auto width, auto taps) {
        constexpr int kWidth = width();
        dim3 block(kConvLanes, kConvRuns);
        int columns = ceil_div(W, kConvLanes * kWidth);
        for (int first = 0; first < K; first += taps()) {
            short_conv_backward_kernel<Real, kWidth, taps()><<<dim3(columns, parts, B), block, 0, stream>>>(
                K <= kConvTaps ? dinp : nullptr, partial, dout, inp, weight, first, K, short_conv_rows(T), T,
                W);
            check_launch();
        }
        if (K <= kConvTaps) return;
        short_conv_wide_kernel<Real, kWidth, true>
            <<<dim3(columns, ceil_div(T, kConvRuns), B), block, 0, stream>>>(dinp, dout, weight, T, W, K);
        check_launch();
    });
    add_column_sums(dweight, scratch, partial, B * parts, K * W, stream);
}

}  // namespace gpu
