// The numbers by which attention scales its rows and by which its weights fade with distance. Every backend
// uses them.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "llmc/config.h"
#include "llmc/host_device.h"

// delta_h of a head at the start of training: the heads are evenly spaced from 1.0 to 5.5. With --decay fixed
// it stays there.
inline float initial_decay(int head, int H) {
    return H == 1 ? 1.0f : 1.0f + 4.5f * head / (H - 1);
}
inline std::vector<float> initial_decays(int H) {
    std::vector<float> delta;
    for (int h = 0; h < H; h++) delta.push_back(initial_decay(h, H));
    return delta;
}

// log gamma with gamma = sigmoid(delta). It is finite for every finite delta, because the argument of exp()
// is never positive.
LLMC_HD inline double log_gamma(double delta) {
    return delta > 0 ? -log1p(exp(-delta)) : delta - log1p(exp(delta));
}

// n_i = sum_{j<=i} gamma^(2(i-j)) of the scale `row`. It is i+1 without a decay (log_gamma 0).
LLMC_HD inline double effective_row_length(int64_t i, double log_gamma) {
    if (log_gamma == 0) return (double)(i + 1);
    return expm1(2 * (i + 1) * log_gamma) / expm1(2 * log_gamma);
}

// e_i = -d log c_i / d log gamma of the scale `row`, for every i < T. It is sum_{j<=i} (i-j) gamma^(2(i-j)) /
// n_i. The numerator S_i comes from the recurrence S_i = gamma^2 (S_{i-1} + n_{i-1}).
inline std::vector<double> row_scale_log_derivatives(int64_t T, double log_gamma) {
    std::vector<double> e(T);
    double numerator = 0, squared = std::exp(2 * log_gamma);
    for (int64_t i = 1; i < T; i++) {
        numerator = squared * (numerator + effective_row_length(i - 1, log_gamma));
        e[i] = numerator / effective_row_length(i, log_gamma);
    }
    return e;
}

// n_i with a gate, where f_t takes the place of gamma: n_i = 1 + f_i^2 n_(i-1).
inline std::vector<double> gated_row_lengths(const float* log_f /*(T)*/, int64_t T) {
    std::vector<double> n(T, 1.0);
    for (int64_t i = 1; i < T; i++) n[i] += std::exp(2.0 * log_f[i]) * n[i - 1];
    return n;
}

// c_i of a polynomial: A_ij = c_i F_ij x_ij^p, where F_ij is the fade of the decay. For the scale `sum` it is
// 1 here, because the real c_i depends on the scores. It is also 1 for every other kind of attention.
//   length: n_i, for the scale `row`
inline double row_scale_of_length(const AttentionConfig& config, int64_t i, double length, int D) {
    if (!config.polynomial()) return 1;
    double m = gaussian_moment(config.power(), D);
    switch (config.scale) {
        case ScaleKind::row:
            return 1 / std::sqrt(m * length);
        case ScaleKind::context:
            return 1 / std::sqrt((double)config.context);
        case ScaleKind::mean:
            return 1 / (std::sqrt(m) * (i + 1));
        case ScaleKind::constant:
            return config.constant;
        case ScaleKind::sum:
            return 1;
    }
    return 1;
}
inline double row_scale(const AttentionConfig& config, int64_t i, double log_gamma, int D) {
    return row_scale_of_length(config, i, effective_row_length(i, log_gamma), D);
}

// The scale `sum` has c_i = 1 / (kRowSumEps + sum_j F_ij |x_ij^p|).
constexpr double kRowSumEps = 1e-6;
