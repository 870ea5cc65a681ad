// Attention of a few new tokens to all tokens so far, whose keys and values are kept, for generation. The
// formulas are those of attention.h. A new token costs O(T), and its output is that of attention_forward
// except for rounding.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/cpu/fade.h"
#include "llmc/cpu/isa.h"

namespace cpu::inline LLMC_ISA {

template <class Real>
inline void attention_cached_forward(Real* out,        // (n,C)
                                     const Real* qkv,  // (n,3C): of tokens start .. start+n-1; only q is read
                                     const float* cache,  // (start+n,2C): k and v of every token so far
                                     Decay decay,  // with a gate: log f (start+n,H) of every token so far
                                     const AttentionConfig& config, int start, int n, int H, int D) {
    int C = H * D;
    with_activation(config.kind, [&]<class A>(A) {
#pragma omp parallel
        {
            std::vector<float> a(start + n), o(D);  // a row of A, and of the output
            std::vector<double> log_fade(start + n);
#pragma omp for collapse(2) schedule(static)
            for (int t = 0; t < n; t++)
                for (int h = 0; h < H; h++) {
                    int i = start + t;
                    double log_g = decay && !decay.is_gate ? log_gamma(decay.values[h]) : 0;
                    double row_length = decay.is_gate ? 0 : effective_row_length(i, log_g);  // n_i
                    log_fade[i] = 0;
                    for (int j = i - 1; j >= 0; j--)
                        log_fade[j] = decay.is_gate ? log_fade[j + 1] + decay.values[(size_t)(j + 1) * H + h]
                                                    : (i - j) * log_g;
                    const Real* q = qkv + (size_t)t * 3 * C + h * D;
                    float inverse_sqrt = 1.0f / sqrtf((float)D), largest = -INFINITY;
                    for (int j = 0; j <= i; j++) {
                        const float* k = cache + (size_t)j * 2 * C + h * D;
                        float dot = 0;
#pragma omp simd reduction(+ : dot)
                        for (int d = 0; d < D; d++) dot += q[d] * k[d];
                        a[j] = dot * inverse_sqrt;
                        if constexpr (A::kOnline) {
                            a[j] += (float)log_fade[j];
                            largest = std::max(largest, a[j]);
                        }
                    }
                    double total = 0;  // the row's normaliser
                    for (int j = 0; j <= i; j++) {
                        if constexpr (A::kOnline) {
                            total += a[j] = std::exp(a[j] - largest);
                        } else {
                            a[j] = A::value(a[j], i + 1.0f, ScalarMath());
                            if (decay) a[j] *= (float)std::exp(log_fade[j]);
                            if (decay.is_gate) row_length += std::exp(2 * log_fade[j]);
                            total += std::fabs(a[j]);
                        }
                    }
                    float row_factor =
                        (float)(A::kOnline             ? 1 / total
                                : config.has_row_sum() ? 1 / (total + kRowSumEps)
                                                       : row_scale_of_length(config, i, row_length, D));
                    std::fill(o.begin(), o.end(), 0.0f);
                    for (int j = 0; j <= i; j++) {
                        const float* v = cache + (size_t)j * 2 * C + C + h * D;
                        for (int d = 0; d < D; d++) o[d] += a[j] * v[d];
                    }
                    for (int d = 0; d < D; d++) out[(size_t)t * C + h * D + d] = o[d] * row_factor;
                }
        }
    });
}

}  // namespace cpu
