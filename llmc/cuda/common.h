// What all kernels share: errors, 128-bit loads and stores, sums over a warp and a block.
//
// Layers are templates over Real, float or bf16: what activations are kept in. Statistics, sums and gradients
// of weights are float. Every function takes a stream, launches there and does not wait. Arrays that kernels
// read in packs begin at 16-byte addresses (all buffers of MemoryPlan do); where a row's length is no
// multiple of a pack the rest goes element by element.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>

#include "llmc/error.h"

namespace gpu {

using bf16 = __nv_bfloat16;

constexpr int kWarp = 32;

// Fails with the CUDA error's text and where it was seen.
inline void check(cudaError_t status, std::source_location where = std::source_location::current()) {
    if (status == cudaSuccess) return;
    fail("CUDA: ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ", ", where.file_name(), ":",
         where.line(), ")");
}

// After a launch: it may have been refused.
inline void check_launch(std::source_location where = std::source_location::current()) {
    check(cudaGetLastError(), where);
}

template <class Int>
__host__ __device__ constexpr Int ceil_div(Int n, Int by) {
    return (n + by - 1) / by;
}

// 16 bytes of T, which are read and written at once.
template <class T>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T values[size];
    __device__ T& operator[](int i) { return values[i]; }
    __device__ const T& operator[](int i) const { return values[i]; }
};

template <class T>
__device__ Pack<T> load_pack(const T* at) {
    return *reinterpret_cast<const Pack<T>*>(at);
}
template <class T>
__device__ void store_pack(T* at, const Pack<T>& pack) {
    *reinterpret_cast<Pack<T>*>(at) = pack;
}

__device__ inline float to_float(float x) {
    return x;
}
__device__ inline float to_float(bf16 x) {
    return __bfloat162float(x);
}
template <class Real>
__device__ Real from_float(float x) {
    if constexpr (std::is_same_v<Real, bf16>) {
        return __float2bfloat16_rn(x);
    } else {
        return x;
    }
}

constexpr float kLog2e = 1.44269504088896340736f;

__device__ inline float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What activations (llmc/activation.h) compute with: approximations that are off by 1 or 2 units in the last
// place.
struct DeviceMath {
    __device__ float exp(float x) const { return fast_exp2(x * kLog2e); }
    __device__ float reciprocal(float x) const {
        float y;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    }
};

// Of all lanes, in all lanes. The order of additions is fixed.
__device__ inline float warp_sum(float x) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
    return x;
}

// Of all threads, in all threads; the block is of whole warps, at most 32. `shared` (32) may be used again
// after the next barrier.
__device__ inline float block_sum(float x, float* shared) {
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    x = warp_sum(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? shared[lane] : 0.0f);
}
__device__ inline float block_max(float x, float* shared) {
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    x = warp_max(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? shared[lane] : -INFINITY);
}

}  // namespace gpu
