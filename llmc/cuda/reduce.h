// Sums and maxima over the lanes of a warp and the threads of a block. The order of additions is fixed, so
// that results are the same bits in every run.
#pragma once
#include "llmc/cuda/common.h"

namespace gpu {

struct Sum {
    template <class T>
    static __device__ T neutral() {
        return {};
    }
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
    __device__ float2 operator()(float2 a, float2 b) const { return {a.x + b.x, a.y + b.y}; }
};

struct Max {
    template <class T>
    static __device__ T neutral() {
        return -INFINITY;
    }
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class T>
__device__ T from_lane_xor(T x, int bits) {
    return __shfl_xor_sync(0xFFFFFFFFu, x, bits);
}
__device__ inline float2 from_lane_xor(float2 x, int bits) {
    return {from_lane_xor(x.x, bits), from_lane_xor(x.y, bits)};
}

// Combines the lanes whose numbers differ only in these bits, one bit after another. Each of them gets the
// result.
template <class Op, int... kBits, class T>
__device__ T reduce_lanes(T x) {
    ((x = Op()(x, from_lane_xor(x, kBits))), ...);
    return x;
}
template <class Op, class T>
__device__ T reduce_warp(T x) {
    return reduce_lanes<Op, 16, 8, 4, 2, 1>(x);
}
template <class T>
__device__ T warp_sum(T x) {
    return reduce_warp<Sum>(x);
}

// The sum over groups of `lanes` neighbouring lanes, a power of two.
__device__ inline float group_sum(float x, int lanes) {
    for (int bit = lanes / 2; bit > 0; bit /= 2) x += from_lane_xor(x, bit);
    return x;
}

// Every thread of a block gets the result. The block has whole warps, at most 32. `shared` has room for a
// number of each warp; it may be used again after the next barrier.
template <class Op, class T>
__device__ T reduce_block(T x, T* shared) {
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    x = reduce_warp<Op>(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return reduce_warp<Op>(lane < warps ? shared[lane] : Op::template neutral<T>());
}
template <class T>
__device__ T block_sum(T x, T* shared) {
    return reduce_block<Sum>(x, shared);
}
__device__ inline float block_max(float x, float* shared) {
    return reduce_block<Max>(x, shared);
}

// The same sum, but the warps' sums are added one after another.
template <int kThreads, class T>
__device__ T block_sum_in_order(T x, T* shared) {
    x = warp_sum(x);
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
    __syncthreads();
    T total{};
    for (int warp = 0; warp < kThreads / kWarp; warp++) total += shared[warp];
    return total;
}

}  // namespace gpu
