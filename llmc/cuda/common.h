// What all kernels share: errors, and the conversions between float and bf16.
//
// Layers are templates over Real, float or bf16, which is the type of their activations. Statistics, sums and
// gradients of vectors are float. Every function takes a stream, launches there and does not wait.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "llmc/cuda/runtime.h"

namespace gpu {

using bf16 = __nv_bfloat16;

constexpr int kWarp = 32;

// Call this after a launch, which may have been refused.
inline void check_launch(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    check(cudaGetLastError(), file, line);
}

template <class Int>
__host__ __device__ constexpr Int ceil_div(Int n, Int by) {
    return (n + by - 1) / by;
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

}  // namespace gpu
