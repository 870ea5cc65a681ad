// AdamW (arXiv 1711.05101) and the norm of the gradient.
#pragma once
#include <cmath>
#include <cstddef>
#include <vector>

namespace cpu {

// One step in one pass over memory: m and v are the moving averages of the gradient times grad_scale (the
// clip factor) and of its square, bias-corrected by `step`, which counts from 1; weight decay is decoupled.
inline void adamw_update(float* param,       // (n)
                         const float* grad,  // (n)
                         float* m,           // (n)
                         float* v,           // (n)
                         size_t n, float learning_rate, float beta1, float beta2, float eps,
                         float weight_decay, float grad_scale, int step) {
    float step_size = (float)(learning_rate / (1 - std::pow((double)beta1, step)));
    float v_scale = (float)(1 / std::sqrt(1 - std::pow((double)beta2, step)));
    float keep = 1 - learning_rate * weight_decay;
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) {
        float g = grad[i] * grad_scale;
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        param[i] = param[i] * keep - step_size * m[i] / (std::sqrt(v[i]) * v_scale + eps);
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
