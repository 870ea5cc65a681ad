// LayerNorm over the channels (eps 1e-5), alone and fused with the residual addition before it.
#pragma once
#include <cmath>
#include <cstddef>
#include <vector>

namespace cpu {

constexpr float kLayerNormEps = 1e-5f;

// out = (row - mean) rstd weight + bias, for one row.
inline void layernorm_row(float* out, float* mean, float* rstd, const float* row, const float* weight,
                          const float* bias, int C) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < C; c++) sum += row[c];
    float m = sum / C;
    float squares = 0;  // of the deviations: E[x^2] - E[x]^2 would lose all digits where the mean is large
#pragma omp simd reduction(+ : squares)
    for (int c = 0; c < C; c++) squares += (row[c] - m) * (row[c] - m);
    float r = 1.0f / sqrtf(squares / C + kLayerNormEps);
    for (int c = 0; c < C; c++) out[c] = (row[c] - m) * r * weight[c] + bias[c];
    *mean = m;
    *rstd = r;
}

inline void layernorm_forward(float* out,           // (N,C)
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

// residual = inp + delta, out = LayerNorm(residual), in one pass over memory.
inline void residual_layernorm_forward(float* residual,      // (N,C)
                                       float* out,           // (N,C)
                                       float* mean,          // (N)
                                       float* rstd,          // (N)
                                       const float* inp,     // (N,C)
                                       const float* delta,   // (N,C)
                                       const float* weight,  // (C)
                                       const float* bias,    // (C)
                                       int N, int C) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * C;
        for (int c = 0; c < C; c++) residual[row + c] = inp[row + c] + delta[row + c];
        layernorm_row(out + row, mean + n, rstd + n, residual + row, weight, bias, C);
    }
}

// dinp is added to, for it is the gradient of the residual stream. Weight gradients are summed over blocks of
// rows, then over the blocks in order, so that they do not depend on the number of threads.
inline void layernorm_backward(float* dinp,          // (N,C) +=
                               float* dweight,       // (C) +=
                               float* dbias,         // (C) +=
                               const float* dout,    // (N,C)
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
            const float* d = dout + (size_t)n * C;
            const float* x = inp + (size_t)n * C;
            float* dx = dinp + (size_t)n * C;
            float m = mean[n], r = rstd[n];
            float sum = 0, sum_normed = 0;  // of dnorm and dnorm * norm, with dnorm = d * weight
#pragma omp simd reduction(+ : sum, sum_normed)
            for (int c = 0; c < C; c++) {
                float dnorm = d[c] * weight[c];
                sum += dnorm;
                sum_normed += dnorm * ((x[c] - m) * r);
            }
            sum /= C;
            sum_normed /= C;
            for (int c = 0; c < C; c++) {
                float norm = (x[c] - m) * r;
                dw[c] += d[c] * norm;
                db[c] += d[c];
                dx[c] += (d[c] * weight[c] - sum - norm * sum_normed) * r;
            }
        }
    }
    for (int block = 0; block < blocks; block++) {
        const float* dw = partial.data() + (size_t)block * 2 * C;
        for (int c = 0; c < C; c++) dweight[c] += dw[c];
        for (int c = 0; c < C; c++) dbias[c] += dw[C + c];
    }
}

}  // namespace cpu
