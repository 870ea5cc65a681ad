// Softmax and sigmoid attention with --attention-scale NUMBER: A is that many times as large. Multiplying the
// values does the same, and attention itself need not know.
#pragma once
#include "llmc/cuda/common.h"
#include "llmc/cuda/vector.h"

namespace gpu {

constexpr int kValueScaleThreads = 256;

template <class Real>
__global__ void __launch_bounds__(kValueScaleThreads)
    scale_values_kernel(Real* qkv, float factor, size_t n, int C) {
    size_t i = (size_t)blockIdx.x * kValueScaleThreads + threadIdx.x;
    if (i >= n) return;
    Real* v = qkv + i / C * 3 * C + 2 * C + i % C;
    *v = Real(to_float(*v) * factor);
}

// v *= factor in rows of q, k and v. The backward pass is the same function on the gradients.
template <class Real>
void scale_values(Real* qkv /*(N,3C)*/, float factor, int N, int C, cudaStream_t stream) {
    size_t n = (size_t)N * C;
    scale_values_kernel<<<ceil_div(n, (size_t)kValueScaleThreads), kValueScaleThreads, 0, stream>>>(
        qkv, factor, n, C);
    check_launch();
}

}  // namespace gpu
