// The gate on attention's output (arXiv 2505.06708): every channel is multiplied by the sigmoid of a number
// of its own. A linear layer makes these numbers from the input of the qkv projection.
#pragma once
#include "llmc/cuda/vector.h"

namespace gpu {

// sigmoid(z) and its derivative, both from exp(-|z|). 1 - sigmoid(z) would lose the digits of the derivative
// where z is large.
__device__ inline void sigmoid_and_slope(float& sigmoid, float& slope, float z) {
    const float e = __expf(-fabsf(z)), reciprocal = __fdividef(1.0f, 1.0f + e), far = e * reciprocal;
    sigmoid = z < 0.0f ? far : reciprocal;
    slope = far * reciprocal;
}

constexpr int kOutputGateThreads = 256;

template <class Real>
__global__ void __launch_bounds__(kOutputGateThreads)
    output_gate_forward_kernel(Real* out, const Real* inp, const Real* gate, size_t n) {
    constexpr int kPack = Pack<Real>::size;
    size_t i = ((size_t)blockIdx.x * kOutputGateThreads + threadIdx.x) * kPack;
    if (i >= n) return;
    Vec<kPack> x = load_vec<kPack>(inp + i, n - i), z = load_vec<kPack>(gate + i, n - i);
#pragma unroll
    for (int k = 0; k < kPack; k++) {
        float sigmoid, slope;
        sigmoid_and_slope(sigmoid, slope, z[k]);
        x[k] *= sigmoid;
    }
    store_vec(out + i, x, n - i);
}

template <class Real>
__global__ void __launch_bounds__(kOutputGateThreads)
    output_gate_backward_kernel(Real* dinp, Real* dgate, const Real* dout, const Real* inp, const Real* gate,
                                size_t n) {
    constexpr int kPack = Pack<Real>::size;
    size_t i = ((size_t)blockIdx.x * kOutputGateThreads + threadIdx.x) * kPack;
    if (i >= n) return;
    Vec<kPack> d = load_vec<kPack>(dout + i, n - i), x = load_vec<kPack>(inp + i, n - i),
               z = load_vec<kPack>(gate + i, n - i);
#pragma unroll
    for (int k = 0; k < kPack; k++) {
        float sigmoid, slope;
        sigmoid_and_slope(sigmoid, slope, z[k]);
        x[k] *= d[k] * slope;
        d[k] *= sigmoid;
    }
    store_vec(dgate + i, x, n - i);
    store_vec(dinp + i, d, n - i);
}

template <class Real>
unsigned output_gate_blocks(size_t n) {
    return (unsigned)ceil_div(n, (size_t)kOutputGateThreads * Pack<Real>::size);
}

// out = inp sigmoid(gate).
template <class Real>
void output_gate_forward(Real* out,         // (n)
                         const Real* inp,   // (n)
                         const Real* gate,  // (n)
                         size_t n, cudaStream_t stream) {
    output_gate_forward_kernel<<<output_gate_blocks<Real>(n), kOutputGateThreads, 0, stream>>>(out, inp, gate,
                                                                                               n);
    check_launch();
}

template <class Real>
void output_gate_backward(Real* dinp,        // (n), may be dout
                          Real* dgate,       // (n)
                          const Real* dout,  // (n)
                          const Real* inp,   // (n)
                          const Real* gate,  // (n)
                          size_t n, cudaStream_t stream) {
    output_gate_backward_kernel<<<output_gate_blocks<Real>(n), kOutputGateThreads, 0, stream>>>(
        dinp, dgate, dout, inp, gate, n);
    check_launch();
}

}  // namespace gpu
