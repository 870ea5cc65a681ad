// AdamW (arXiv 1711.05101) and the norm of the gradient.
#pragma once
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

// One step in one pass over memory: m and v are the moving averages of the gradient times grad_scale (the
// clip factor) and of its square, bias-corrected by `step`, which counts from 1; weight decay is decoupled.
// Called by all threads of a parallel region it shares the work among them and does not wait for them.
template <class Real>
inline void adamw_update(float* param,       // (n)
                         Real* copy,         // (n): the new param in bf16, or null where Real is float
                         const float* grad,  // (n)
                         float* m,           // (n)
                         float* v,           // (n)
                         size_t n, float learning_rate, float beta1, float beta2, float eps,
                         float weight_decay, float grad_scale, int step) {
    float step_size = (float)(learning_rate / (1 - std::pow((double)beta1, step)));
    float v_scale = (float)(1 / std::sqrt(1 - std::pow((double)beta2, step)));
    float keep = 1 - learning_rate * weight_decay;
    constexpr size_t kBlock = 4096;
#pragma omp for schedule(static) nowait
    for (size_t i0 = 0; i0 < n; i0 += kBlock) {
        size_t end = i0 + kBlock < n ? i0 + kBlock : n;
#pragma omp simd
        for (size_t i = i0; i < end; i++) {
            float g = grad[i] * grad_scale;
            m[i] = beta1 * m[i] + (1 - beta1) * g;
            v[i] = beta2 * v[i] + (1 - beta2) * g * g;
            param[i] = param[i] * keep - step_size * m[i] / (std::sqrt(v[i]) * v_scale + eps);
        }
        if constexpr (!std::is_same_v<Real, float>)
            for_vectors((int)(end - i0),
                        [&](int i, int lanes) { store(copy + i0 + i, load(param + i0 + i, lanes), lanes); });
    }
}

// In double, over blocks and then over the blocks in order: the same for every number of threads.
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

}  // namespace cpu
