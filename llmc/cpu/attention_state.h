// Attention of new tokens to all tokens so far through a state of fixed size. It serves generation with
// polynomial attention, in time and memory that do not grow with the text. The formulas are those of
// attention_linear.h with the plain feature map: phi(k) has the (D+p-1 choose p) products k_a k_b k_c with
// a <= b <= c, and phi(q) has the same products times the number of their arrangements. The state is float32
// for every type of model, because its sums grow with the text.
//
// The state of a head is sum_j F_ij phi(k_j) v_j^T (features,D), where F_ij is the fade of the decay, and
// then, for the scale `sum`, sum_j F_ij phi(k_j) (features).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/cpu/fade.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

// Features of a head: (D+p-1 choose p).
inline int64_t state_features(int power, int D) {
    int64_t n = 1;
    for (int i = 0; i < power; i++) n = n * (D + i) / (i + 1);
    return n;
}

inline size_t state_size(int power, int D) {  // floats of a head
    return (size_t)state_features(power, D) * (D + 1);
}

// From this number of tokens on, a state is smaller than keys and values, and its update is cheaper than a
// pass over them.
inline int64_t state_pays_from(int power, int D) {
    return state_features(power, D);
}

// Calls f(feature of q, feature of k) for all features in order.
template <class F>
inline void for_features(int power, const float* q /*(D)*/, const float* k /*(D)*/, int D, F f) {
    for (int a = 0; a < D; a++) {
        if (power == 1) {
            f(q[a], k[a]);
            continue;
        }
        for (int b = a; b < D; b++) {
            float qq = q[a] * q[b], kk = k[a] * k[b];
            if (power == 2) {
                f(a == b ? qq : 2 * qq, kk);
                continue;
            }
            for (int c = b; c < D; c++)
                f(qq * q[c] * (a == c ? 1.0f : a == b || b == c ? 3.0f : 6.0f), kk * k[c]);
        }
    }
}

// Adds the tokens start .. start+n-1 to the state, through which they see each other. The kind of attention
// must have a linear form (has_linear_form()).
template <class Real>
inline void attention_state_forward(
    Real* out,            // (n,C), or null if only the state is wanted
    float* state,         // (H,state_size)
    double* row_lengths,  // (H): with a gate, n_i of the last token, 0 at first
    const Real* qkv,      // (n,3C)
    Decay decay,          // with a gate: log f (n,H) of the new tokens
    const AttentionConfig& config, int start, int n, int H, int D) {
    int C = H * D;
    const int power = config.power();
    size_t size = state_size(power, D);
    float inverse_sqrt_d = 1.0f / sqrtf((float)D);
#pragma omp parallel for schedule(dynamic, 1)
    for (int h = 0; h < H; h++) {
        double log_g = decay && !decay.is_gate ? log_gamma(decay.values[h]) : 0;
        // The fade of one token in two parts. Over thousands of tokens with a fade near 1, what a float
        // leaves out of it would add up.
        float fade, fade_rest;
        auto set_fade = [&](double f) { fade = (float)f, fade_rest = (float)(f - fade); };
        set_fade(std::exp(log_g));
        std::vector<float> q(D), k(D), v(D), o(D);
        for (int t = 0; t < n; t++) {
            double row_length;
            if (decay.is_gate) {
                const double f = std::exp((double)decay.values[(size_t)t * H + h]);
                set_fade(f);
                row_length = row_lengths[h] = 1 + f * f * row_lengths[h];
            } else {
                row_length = effective_row_length(start + t, log_g);
            }
            const Real* row = qkv + (size_t)t * 3 * C + h * D;
            for (int d = 0; d < D; d++)
                q[d] = row[d] * inverse_sqrt_d, k[d] = row[C + d], v[d] = row[2 * C + d];
            std::fill(o.begin(), o.end(), 0.0f);
            double total = 0;  // double, because it has thousands of terms and the largest come first
            float *s = state + h * size, *z = s + state_features(power, D) * D;
            for_features(power, q.data(), k.data(), D, [&](float phi_q, float phi_k) {
                for_vectors(D, [&](int d, int lanes) {
                    const vec old = load(s + d, lanes);
                    const vec sum = fade * old + (fade_rest * old + phi_k * load(&v[d], lanes));
                    store(s + d, sum, lanes);
                    store(&o[d], load(&o[d], lanes) + phi_q * sum, lanes);
                });
                s += D;
                *z = fade * *z + (fade_rest * *z + phi_k);
                total += phi_q * *z++;
            });
            if (!out) continue;
            double row_factor = config.has_row_sum() ? 1 / (total + kRowSumEps)
                                                     : row_scale_of_length(config, start + t, row_length, D);
            for (int d = 0; d < D; d++) out[(size_t)t * C + h * D + d] = (float)(o[d] * row_factor);
        }
    }
}

}  // namespace cpu
