// LayerNorm over the channels (eps 1e-5), alone or together with the residual addition in front of it.
#pragma once
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"
#include "llmc/layer_constants.h"

namespace cpu::inline LLMC_ISA {

// out = (row - mean) rstd weight + bias, for one row.
template <class Real>
inline void normalize_row(Real* out,  // (C)
                          float mean, float rstd,
                          const float* row,     // (C)
                          const float* weight,  // (C)
                          const float* bias,    // (C)
                          int C) {
    for_vectors(C, [&](int c, int n) {
        store(out + c, (load(row + c, n) - mean) * rstd * load(weight + c, n) + load(bias + c, n), n);
    });
}

// The same, but computes mean and rstd from the row first.
template <class Real>
inline void layernorm_row(Real* out,            // (C)
                          float* mean,          // (1)
                          float* rstd,          // (1)
                          const float* row,     // (C)
                          const float* weight,  // (C)
                          const float* bias,    // (C)
                          int C) {
    vec total = {};
    for_vectors(C, [&](int c, int n) { total += load(row + c, n); });
    float m = sum(total) / C;
    vec squares = {};  // of x - mean, because E[x^2] - E[x]^2 loses all digits if the mean is large
    for_vectors(C, [&](int c, int n) {
        vec x = load(row + c, n) - m;
        if (n < kLanes) x = lane_index() < n ? x : vec{};
        squares += x * x;
    });
    float r = 1.0f / sqrtf(sum(squares) / C + kLayerNormEps);
    *mean = m;
    *rstd = r;
    normalize_row(out, m, r, row, weight, bias, C);
}

template <class Real>
inline void layernorm_forward(Real* out,            // (N,C)
                              float* mean,          // (N)
                              float* rstd,          // (N)
                              const float* inp,     // (N,C)
                              const float* weight,  // (C)
                              const float* bias,    // (C)
                              int N, int C) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++)
        layernorm_row(out + (size_t)n * C, mean + n, rstd + n, inp + (size_t)n * C, weight, bias, C);
}

// Computes out again from the mean and rstd that the forward pass found.
template <class Real>
inline void layernorm_recompute(Real* out,            // (N,C)
                                const float* mean,    // (N)
                                const float* rstd,    // (N)
                                const float* inp,     // (N,C)
                                const float* weight,  // (C)
                                const float* bias,    // (C)
                                int N, int C) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++)
        normalize_row(out + (size_t)n * C, mean[n], rstd[n], inp + (size_t)n * C, weight, bias, C);
}

// residual = inp + delta, out = LayerNorm(residual), in one pass over memory.
template <class Real>
inline void residual_layernorm_forward(float* residual,      // (N,C)
                                       Real* out,            // (N,C)
                                       float* mean,          // (N)
                                       float* rstd,          // (N)
                                       const float* inp,     // (N,C)
                                       const Real* delta,    // (N,C)
                                       const float* weight,  // (C)
                                       const float* bias,    // (C)
                                       int N, int C) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * C;
        for_vectors(C, [&](int c, int lanes) {
            store(residual + row + c, load(inp + row + c, lanes) + load(delta + row + c, lanes), lanes);
        });
        layernorm_row(out + row, mean + n, rstd + n, residual + row, weight, bias, C);
    }
}

// Adds to dinp, because dinp is the gradient of the residual stream. The gradients of weight and bias are
// summed in each block of rows and then over the blocks in order, so they do not depend on the number of
// threads.
template <class Real>
inline void layernorm_backward(float* dinp,          // (N,C) +=
                               Real* dinp_copy,      // (N,C): dinp in bf16, or null if Real is float
                               float* dweight,       // (C) +=
                               float* dbias,         // (C) +=
                               const Real* dout,     // (N,C)
                               const float* inp,     // (N,C)
                               const float* mean,    // (N)
                               const float* rstd,    // (N)
                               const float* weight,  // (C)
                               int N, int C) {
    constexpr int kRows = 64;
    int blocks = (N + kRows - 1) / kRows;
    std::vector<float> partial((size_t)blocks * 2 * C, 0.0f);  // (blocks,2,C)
#pragma omp parallel for schedule(static)
    for (int block = 0; block < blocks; block++) {
        float* dw = partial.data() + (size_t)block * 2 * C;
        float* db = dw + C;
        int end = (block + 1) * kRows < N ? (block + 1) * kRows : N;
        for (int n = block * kRows; n < end; n++) {
            const Real* d = dout + (size_t)n * C;
            const float* x = inp + (size_t)n * C;
            float* dx = dinp + (size_t)n * C;
            Real* copy = dinp_copy ? dinp_copy + (size_t)n * C : nullptr;
            float m = mean[n], r = rstd[n];
            vec total = {}, total_normed = {};  // sums of dnorm = d * weight, and of dnorm * norm
            for_vectors(C, [&](int c, int n) {
                vec dnorm = load(d + c, n) * load(weight + c, n);
                total += dnorm;
                total_normed += dnorm * ((load(x + c, n) - m) * r);
            });
            float mean_dnorm = sum(total) / C, mean_normed = sum(total_normed) / C;
            for_vectors(C, [&](int c, int n) {
                vec dc = load(d + c, n), norm = (load(x + c, n) - m) * r;
                store(dw + c, load(dw + c, n) + dc * norm, n);
                store(db + c, load(db + c, n) + dc, n);
                vec sum = load(dx + c, n) + (dc * load(weight + c, n) - mean_dnorm - norm * mean_normed) * r;
                store(dx + c, sum, n);
                if constexpr (!std::is_same_v<Real, float>) store(copy + c, sum, n);
            });
        }
    }
    for (int block = 0; block < blocks; block++) {
        const float* dw = partial.data() + (size_t)block * 2 * C;
        for (int c = 0; c < C; c++) dweight[c] += dw[c];
        for (int c = 0; c < C; c++) dbias[c] += dw[C + c];
    }
}

}  // namespace cpu
