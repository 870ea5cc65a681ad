// AdamW (arXiv 1711.05101), the norm of the gradient and the factor that clips it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/vector.h"
#include "llmc/optimizer.h"

namespace cpu::inline LLMC_ISA {

// Does one step in one pass over memory. The gradient is multiplied by clip_factor first. m and v are the
// moving averages of the gradient and of its square; `step`, which counts from 1, corrects their bias. Weight
// decay is decoupled. All threads of a parallel region must call this function. It divides the work among
// them and does not wait for them.
template <class Real>
inline void adamw_update(float* param,       // (n)
                         Real* copy,         // (n): the new param in bf16, or null if Real is float
                         const float* grad,  // (n)
                         float* m,           // (n)
                         float* v,           // (n)
                         size_t n, float learning_rate, float beta1, float beta2, float eps,
                         float weight_decay, float clip_factor, int step) {
    float step_size = (float)(learning_rate / (1 - std::pow((double)beta1, step)));
    float v_scale = (float)(1 / std::sqrt(1 - std::pow((double)beta2, step)));
    float keep = 1 - learning_rate * weight_decay;
    constexpr size_t kBlock = 4096;
#pragma omp for schedule(static) nowait
    for (size_t i0 = 0; i0 < n; i0 += kBlock) {
        size_t end = i0 + kBlock < n ? i0 + kBlock : n;
#pragma omp simd
        for (size_t i = i0; i < end; i++) {
            float g = grad[i] * clip_factor;
            m[i] = beta1 * m[i] + (1 - beta1) * g;
            v[i] = beta2 * v[i] + (1 - beta2) * g * g;
            param[i] = param[i] * keep - step_size * m[i] / (std::sqrt(v[i]) * v_scale + eps);
        }
        if constexpr (!std::is_same_v<Real, float>)
            for_vectors((int)(end - i0),
                        [&](int i, int lanes) { store(copy + i0 + i, load(param + i0 + i, lanes), lanes); });
    }
}

// The sum is in double. Each block is summed on its own and then the blocks in order, so the result does not
// depend on the number of threads.
inline double sum_of_squares(const float* x, size_t n) {
    constexpr size_t kBlock = 1 << 16;
    size_t blocks = (n + kBlock - 1) / kBlock;
    std::vector<double> partial(blocks);
#pragma omp parallel for schedule(static)
    for (size_t block = 0; block < blocks; block++) {
        size_t end = (block + 1) * kBlock < n ? (block + 1) * kBlock : n;
        double total = 0;
#pragma omp simd reduction(+ : total)
        for (size_t i = block * kBlock; i < end; i++) total += (double)x[i] * x[i];
        partial[block] = total;
    }
    double total = 0;
    for (double p : partial) total += p;
    return total;
}

// Assigns gradients, or adds them, to another array.
inline void move_gradients(float* to,          // (n) =, or += if `add` is set
                           const float* from,  // (n)
                           size_t n, bool add) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) to[i] = add ? to[i] + from[i] : from[i];
}

// The factor by which gradients of this norm must be multiplied so that their norm is at most max_norm (0: no
// limit). It is NaN if the norm is not finite.
inline float clip_factor(double norm, double max_norm) {
    if (!std::isfinite(norm)) return NAN;
    return max_norm > 0 && norm > max_norm ? (float)(max_norm / norm) : 1.0f;
}

template <class Real>
class AdamWOptimizer : public OptimizerState<HostMemory> {
  public:
    AdamWOptimizer(const ParameterTable& table, const Kept& kept, const ParameterArrays<Real, float>& model,
                   const AdamW& settings)
        : OptimizerState(table, kept, {std::begin(kAdamWArrays), std::end(kAdamWArrays)},
                         settings.attention_lr),
          model_(model),
          settings_(settings) {}

    void step(Slice slice, double learning_rate, int step) override {
        if (std::isnan(*model_.clip_factor)) return;
#pragma omp parallel
        {
            update({slice.begin, std::min(slice.end, table_.vectors().begin)}, settings_.weight_decay,
                   learning_rate, step);
            update({std::max(slice.begin, table_.vectors().begin), slice.end}, 0, learning_rate, step);
        }
    }

  private:
    const ParameterArrays<Real, float>& model_;
    AdamW settings_;

    // All threads of a parallel region must call it.
    void update(Slice slice, double weight_decay, double learning_rate, int step) {
        for_each(slice, [&](Slice piece, size_t place, double factor) {
            adamw_update(
                model_.weights_at(piece.begin, place), model_.copy ? model_.copy + piece.begin : nullptr,
                model_.gradients_at(piece.begin, place), values(0) + place, values(1) + place, piece.size(),
                (float)(learning_rate * factor), (float)settings_.beta1, (float)settings_.beta2,
                (float)settings_.eps, (float)weight_decay, *model_.clip_factor, step);
        });
    }
};

}  // namespace cpu
