// Moving gradients between arrays. All arrays begin at 16-byte addresses.
#pragma once
#include "llmc/cuda/memory.h"
#include "llmc/cuda/vector.h"

namespace gpu {

constexpr int kGradientThreads = 256;

template <class To, class From>
__global__ void __launch_bounds__(kGradientThreads)
    move_gradients_kernel(To* __restrict__ to, const From* __restrict__ from, size_t n, bool add) {
    size_t i = ((size_t)blockIdx.x * kGradientThreads + threadIdx.x) * 4;
    if (i >= n) return;
    Vec<4> x = load_vec<4>(from + i, n - i);
    if (add) {
        Vec<4> y = load_vec<4>(to + i, n - i);
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] += y[k];
    }
    store_vec(to + i, x, n - i);
}

// Assigns gradients, or adds them, to an array that may have another type.
template <class To, class From>
void move_gradients(To* to,            // (n) =, or += if `add` is set
                    const From* from,  // (n)
                    size_t n, bool add, cudaStream_t stream) {
    if (n == 0) return;
    unsigned blocks = (unsigned)ceil_div(n, (size_t)kGradientThreads * 4);
    move_gradients_kernel<<<blocks, kGradientThreads, 0, stream>>>(to, from, n, add);
    check_launch();
}

}  // namespace gpu
