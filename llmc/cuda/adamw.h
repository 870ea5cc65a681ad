// AdamW (arXiv 1711.05101), the norm of the gradient, and the factor that clips it. None of them leaves the
// device.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "llmc/cuda/columns.h"
#include "llmc/cuda/memory.h"
#include "llmc/cuda/reduce.h"
#include "llmc/optimizer.h"
#include "llmc/parameters.h"
#include "llmc/rng.h"

namespace gpu {

// Adds 16 random bits to the lower half of x's bits and keeps the upper half. The result is one of the two
// neighbours of x in bf16, with the probabilities that make the mean x.
__device__ inline bf16 round_stochastically(float x, uint32_t random16) {
    uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7F800000u) == 0x7F800000u) return from_float<bf16>(x);
    return __ushort_as_bfloat16((unsigned short)((bits + random16) >> 16));
}

struct AdamwStep {
    float learning_rate, beta1, beta2, eps, weight_decay, step_size, v_scale;
    bool stochastic;
    uint64_t seed, step;
};

constexpr int kAdamwThreads = 256, kAdamwTurns = 4;  // packs per thread
constexpr int kAdamwTile = kAdamwThreads * 4 * kAdamwTurns;

template <class Real, class Gradient>
__global__ void __launch_bounds__(kAdamwThreads)
    adamw_kernel(float* __restrict__ param, Real* __restrict__ copy, const Gradient* __restrict__ grad,
                 float* __restrict__ m, float* __restrict__ v, size_t n, size_t index, size_t decayed,
                 const float* __restrict__ grad_scale, AdamwStep o) {
    size_t begin = (size_t)blockIdx.x * kAdamwTile;
    float scale = *grad_scale;
    if (isnan(scale)) return;
#pragma unroll 1
    for (int turn = 0; turn < kAdamwTurns; turn++) {
        size_t i = begin + (turn * kAdamwThreads + threadIdx.x) * 4;
        if (i >= n) return;
        size_t count = n - i;
        Vec<4> p = load_vec<4>(param + i, count), g = load_vec<4>(grad + i, count);
        Vec<4> mi = load_vec<4>(m + i, count), vi = load_vec<4>(v + i, count);
        float keep = i < decayed ? 1.0f - o.learning_rate * o.weight_decay : 1.0f;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float gk = g[k] * scale;
            mi[k] = o.beta1 * mi[k] + (1.0f - o.beta1) * gk;
            vi[k] = o.beta2 * vi[k] + (1.0f - o.beta2) * gk * gk;
            p[k] = p[k] * keep - o.step_size * mi[k] / (sqrtf(vi[k]) * o.v_scale + o.eps);
        }
        store_vec(param + i, p, count);
        store_vec(m + i, mi, count);
        store_vec(v + i, vi, count);
        if constexpr (!std::is_same_v<Real, float>) {
            if (o.stochastic) {
                PhiloxBlock random = random_block(o.seed, o.step, (index + i) / 4);
#pragma unroll
                for (int k = 0; k < 4; k++) p[k] = to_float(round_stochastically(p[k], random[k] >> 16));
            }
            store_vec(copy + i, p, count);
        }
    }
}

// Takes one step with n elements in one pass over memory. m and v are the moving averages of the gradient
// times *grad_scale (the clip factor) and of its square. Both are corrected for their bias by `step`, which
// counts from 1. Weight decay is decoupled. Nothing changes if the factor is NaN. The bf16 copy is rounded to
// nearest, or stochastically with bits that depend on seed, step and the element's index alone.
template <class Real, class Gradient>
void adamw_update(float* param,          // (n)
                  Real* copy,            // (n): the new param in bf16, or null where Real is float
                  const Gradient* grad,  // (n)
                  float* m,              // (n)
                  float* v,              // (n)
                  size_t n,
                  size_t index,    // of the first element in the whole model, a multiple of 4
                  size_t decayed,  // how many elements have weight decay, a multiple of 4 or at least n
                  float learning_rate, float beta1, float beta2, float eps, float weight_decay,
                  const float* grad_scale,  // (1), on the device
                  int step, bool stochastic, uint64_t seed, cudaStream_t stream) {
    if (n == 0) return;
    float step_size = (float)(learning_rate / (1 - std::pow((double)beta1, step)));
    float v_scale = (float)(1 / std::sqrt(1 - std::pow((double)beta2, step)));
    AdamwStep o{learning_rate, beta1,   beta2,      eps,  weight_decay,
                step_size,     v_scale, stochastic, seed, (uint64_t)step};
    unsigned blocks = (unsigned)ceil_div(n, (size_t)kAdamwTile);
    adamw_kernel<<<blocks, kAdamwThreads, 0, stream>>>(param, copy, grad, m, v, n, index, decayed, grad_scale,
                                                       o);
    check_launch();
}

// ----------------------------------------------------------------------------------------- sum_of_squares

constexpr int kSquaresThreads = 256, kSquaresTurns = 4, kSquaresBlocks = 6 * kMultiprocessors;
constexpr int kSquaresAddThreads = 1024;
static_assert(kSquaresBlocks <= kSquaresAddThreads);
constexpr int kSquaresTile = kSquaresThreads * 4 * kSquaresTurns;

template <class T>
__global__ void __launch_bounds__(kSquaresThreads)
    sum_of_squares_kernel(double* partial, const T* __restrict__ x, size_t n) {
    __shared__ double shared[kSquaresThreads / kWarp];
    double total = 0;
    for (size_t tile = blockIdx.x * (size_t)kSquaresTile; tile < n;
         tile += gridDim.x * (size_t)kSquaresTile) {
        Vec<4> values[kSquaresTurns] = {};
#pragma unroll
        for (int turn = 0; turn < kSquaresTurns; turn++) {
            size_t i = tile + (turn * kSquaresThreads + threadIdx.x) * 4;
            if (i < n) values[turn] = load_vec<4>(x + i, n - i);
        }
#pragma unroll
        for (int turn = 0; turn < kSquaresTurns; turn++)
#pragma unroll
            for (int k = 0; k < 4; k++) total += (double)values[turn][k] * values[turn][k];
    }
    total = block_sum_in_order<kSquaresThreads>(total, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

static __global__ void __launch_bounds__(kSquaresAddThreads)
    add_squares_kernel(double* sum, const double* __restrict__ partial, int parts) {
    __shared__ double shared[kSquaresAddThreads / kWarp];
    double total = (int)threadIdx.x < parts ? partial[threadIdx.x] : 0.0;
    total = block_sum_in_order<kSquaresAddThreads>(total, shared);
    if (threadIdx.x == 0) *sum += total;
}

// The sum is in double. A fixed number of blocks sum first, and then their sums are added.
template <class T>
void sum_of_squares(double* sum,      // (1), on the device: +=
                    double* scratch,  // (kSquaresBlocks)
                    const T* x,       // (n)
                    size_t n, cudaStream_t stream) {
    if (n == 0) return;
    int blocks = (int)std::min(ceil_div(n, (size_t)kSquaresTile), (size_t)kSquaresBlocks);
    sum_of_squares_kernel<<<blocks, kSquaresThreads, 0, stream>>>(scratch, x, n);
    check_launch();
    add_squares_kernel<<<1, kSquaresAddThreads, 0, stream>>>(sum, scratch, blocks);
    check_launch();
}

static __global__ void clip_factor_kernel(float* grad_scale, const double* sum, double max_norm) {
    double norm = sqrt(*sum);
    *grad_scale = !isfinite(norm) ? NAN : max_norm > 0 && norm > max_norm ? (float)(max_norm / norm) : 1.0f;
}

// *grad_scale is the factor that brings a gradient with this sum of squares to a norm of at most max_norm;
// with max_norm 0 it is 1. It is NaN if the norm is not finite.
inline void clip_factor(float* grad_scale,  // (1), on the device
                        const double* sum,  // (1), on the device
                        double max_norm, cudaStream_t stream) {
    clip_factor_kernel<<<1, 1, 0, stream>>>(grad_scale, sum, max_norm);
    check_launch();
}

// The norm of a model's gradients, and the factor that clips them. Both stay on the device until the host
// asks for them, so an optimizer's step does not wait for the host.
template <class Gradient>
class GradientClip {
  public:
    float* factor;  // (1): the optimizer multiplies the gradients by it

    void add_to(MemoryPlan& plan) {
        plan.add(squares_, 1 + kSquaresBlocks);
        plan.add(factor, 1);
    }
    // These add up the squares of arrays: start(), then add() for each array.
    void start(cudaStream_t stream) const { check(cudaMemsetAsync(squares_, 0, sizeof(double), stream)); }
    void add(const Gradient* gradients, size_t n, cudaStream_t stream) const {
        sum_of_squares(squares_, squares_ + 1, gradients, n, stream);
    }
    Span sum() const { return {squares_, 1}; }
    // Sets the factor that follows from the sum.
    void set_factor(double max_norm, cudaStream_t stream) const {
        clip_factor(factor, squares_, max_norm, stream);
    }
    // The norm that follows from the sum. Waits for it.
    double norm(cudaStream_t stream) const {
        double total;
        copy_to_host(&total, squares_, 1, stream);
        return std::sqrt(total);
    }

  private:
    double* squares_;  // (1 + kSquaresBlocks): the sum of the squared gradients, then scratch
};

// -------------------------------------------------------------------------------------------- the optimizer

template <class Real, class Gradient>
class AdamWOptimizer : public OptimizerState<DeviceMemory> {
  public:
    AdamWOptimizer(const ParameterTable& table, const Kept& kept,
                   const ParameterArrays<Real, Gradient>& model, const AdamW& settings,
                   bool stochastic_rounding, uint64_t seed, cudaStream_t& stream)
        : OptimizerState(table, kept, {std::begin(kAdamWArrays), std::end(kAdamWArrays)},
                         settings.attention_lr),
          model_(model),
          settings_(settings),
          stochastic_rounding_(stochastic_rounding),
          seed_(seed),
          stream_(stream) {}

    void step(Slice slice, double learning_rate, int step) override {
        const Slice decayed = {0, table_.vectors().begin};
        for_each(slice, [&](Slice piece, size_t place, double factor) {
            adamw_update(model_.weights_at(piece.begin, place),
                         model_.copy ? model_.copy + piece.begin : nullptr,
                         model_.gradients_at(piece.begin, place), values(0) + place, values(1) + place,
                         piece.size(), piece.begin, overlap(piece, decayed).size(),
                         (float)(learning_rate * factor), (float)settings_.beta1, (float)settings_.beta2,
                         (float)settings_.eps, (float)settings_.weight_decay, model_.clip_factor, step,
                         stochastic_rounding_, seed_, stream_);
        });
    }

  private:
    const ParameterArrays<Real, Gradient>& model_;
    AdamW settings_;
    bool stochastic_rounding_;
    uint64_t seed_;
    cudaStream_t& stream_;  // the model's
};

}  // namespace gpu
