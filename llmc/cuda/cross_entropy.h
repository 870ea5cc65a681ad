// Softmax cross-entropy over the vocabulary, loss and gradient in one pass. A block reads its row of logits
// once, keeps it in shared memory if it fits, and writes the gradient in its place.
#pragma once
#include <algorithm>

#include "llmc/cuda/reduce.h"
#include "llmc/cuda/vector.h"

namespace gpu {

constexpr int kCrossEntropyThreads = 1024;

// A block takes one row. With kKeeps it keeps the row in shared memory, otherwise it reads the row again.
template <class Real, int kWidth, bool kKeeps>
__global__ void __launch_bounds__(kCrossEntropyThreads)
    cross_entropy_kernel(float* losses, Real* dlogits, const Real* logits, const int* targets, float dloss,
                         int V, int Vp) {
    extern __shared__ __align__(16) unsigned char row_memory[];
    __shared__ float shared[2][kWarp];
    Real* kept = reinterpret_cast<Real*>(row_memory);
    const Real* row = logits + (size_t)blockIdx.x * Vp;
    int target = targets[blockIdx.x], begin = threadIdx.x * kWidth, step = blockDim.x * kWidth;
    // This is read first, because the gradient may take its place.
    float target_logit = threadIdx.x == 0 && target >= 0 ? to_float(row[target]) : 0.0f;

    // This thread's largest logit so far, and the sum of exponentials relative to it.
    float running_max = -INFINITY, total = 0;
    for (int v = begin; v < V; v += step) {
        Vec<kWidth> x = load_vec<kWidth>(row + v);
        if constexpr (kKeeps) store_vec(kept + v, x);
        float pack_max = x[0];
#pragma unroll
        for (int i = 1; i < kWidth; i++)
            if (v + i < V) pack_max = fmaxf(pack_max, x[i]);
        if (pack_max > running_max) {
            total *= expf(running_max - pack_max);
            running_max = pack_max;
        }
#pragma unroll
        for (int i = 0; i < kWidth; i++)
            if (v + i < V) total += expf(x[i] - running_max);
    }
    float largest = block_max(running_max, shared[0]);
    total = block_sum(total == 0 ? 0.0f : total * expf(running_max - largest), shared[1]);
    if (target < 0) dloss = 0;  // the row does not count
    if (threadIdx.x == 0) losses[blockIdx.x] = target < 0 ? 0.0f : logf(total) + (largest - target_logit);
    if (!dlogits) return;

    float factor = dloss / total;
    Real* drow = dlogits + (size_t)blockIdx.x * Vp;
    for (int v = begin; v < Vp; v += step) {
        Vec<kWidth> x{};
        if (v < V) x = load_vec<kWidth>((kKeeps ? kept : row) + v);
#pragma unroll
        for (int i = 0; i < kWidth; i++) {
            x[i] = v + i < V ? expf(x[i] - largest) * factor : 0.0f;
            if (v + i == target) x[i] -= dloss;
        }
        store_vec(drow + v, x);
    }
}

// losses = -log softmax(logits[:V])[target], and 0 where the target is -1. If dlogits is wanted, it is the
// gradient times dloss, with zeros in the padding V..Vp.
template <class Real>
void cross_entropy(float* losses,       // (N)
                   Real* dlogits,       // (N,Vp), or null: not wanted; may be logits
                   const Real* logits,  // (N,Vp)
                   const int* targets,  // (N)
                   float dloss, int N, int V, int Vp, cudaStream_t stream) {
    int device = 0, limit = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    int bytes = Vp * (int)sizeof(Real), reductions = 2 * kWarp * (int)sizeof(float);
    auto run = [&](auto width, auto keeps) {
        constexpr int kWidth = width();
        auto kernel = cross_entropy_kernel<Real, kWidth, keeps()>;
        int threads = std::min(kCrossEntropyThreads, ceil_div(ceil_div(Vp, kWidth), kWarp) * kWarp);
        if (keeps()) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        kernel<<<N, threads, keeps() ? bytes : 0, stream>>>(losses, dlogits, logits, targets, dloss, V, Vp);
        check_launch();
    };
    auto choose = [&](auto width) {
        if (bytes + reductions <= limit) {
            run(width, std::true_type());
        } else {
            run(width, std::false_type());
        }
    };
    if (in_packs<Real>(Vp, logits, dlogits)) {
        choose(std::integral_constant<int, Pack<Real>::size>());
    } else {
        choose(std::integral_constant<int, 1>());
    }
}

constexpr int kMeanLossThreads = 1024;

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    mean_loss_kernel(double* sum, const float* losses, int N, int counted) {
    __shared__ double shared[kThreads / kWarp];
    double total = 0;
    for (int n = threadIdx.x; n < N; n += kThreads) total += losses[n];
    total = block_sum(total, shared);
    if (threadIdx.x == 0) *sum += total / counted;
}

// Adds the mean of the `counted` losses that are not left out to *sum, which stays on the device.
inline void add_mean_loss(double* sum,          // (1) +=
                          const float* losses,  // (N)
                          int N, int counted, cudaStream_t stream) {
    mean_loss_kernel<kMeanLossThreads><<<1, kMeanLossThreads, 0, stream>>>(sum, losses, N, counted);
    check_launch();
}

}  // namespace gpu
