// The oracle of attention's norms: llmc/norms.h from its definitions, with dense rows of A in double and for
// each the whole Jacobian matrix.
#pragma once
#include "llmc/norms.h"
#include "tests/attention_kinds.h"
#include "tests/reference.h"

namespace reference {

// The options that norms are measured with: they do not depend on where a decay comes from.
inline std::vector<AttentionOption> norms_options() {
    return every_option({DecayKind::none, DecayKind::fixed});
}

// (n,n): dA_j / dx_k of a row of n keys.
inline Vector dense_jacobian(const AttentionRow& row, const AttentionConfig& config) {
    int n = (int)row.x.size(), p = config.power();
    Vector J((size_t)n * n);
    for (int j = 0; j < n; j++)
        for (int k = 0; k < n; k++) {
            double& d = J[(size_t)j * n + k];
            if (config.softmax()) {
                d = row.A[j] * ((j == k) - row.A[k]);
                continue;
            }
            if (j == k) d = row.slope[j];
            if (!config.has_row_sum()) continue;
            // d(1/s) / dx_k = -sign(x_k^p) (ds / dx_k) / s^2, and slope is (ds / dx_k) / s without that sign
            double xp = power(row.x[k], p);
            d -= row.A[j] * ((xp > 0) - (xp < 0)) * row.slope[k];
        }
    return J;
}

// The norms of one head, as llmc/norms.h defines them. log_fade(b, i) gives log F_ij (i+1) of a row.
template <class LogFade>
AttentionNorms attention_norms(const Vector& qkv /*(B,T,3C)*/, LogFade log_fade,
                               const AttentionConfig& config, int h, int B, int T, int H, int D) {
    int C = H * D;
    double square = 0, jacobian = 0, absolute = 0, negative = 0, moment = 0;
    AttentionNorms n = {};
    Vector scores;
    for (int b = 0; b < B; b++)
        for (int i = 0; i < T; i++) {
            const double* rows = &qkv[(size_t)b * T * 3 * C + h * D];
            AttentionRow row =
                attention_row(rows + (size_t)i * 3 * C, rows + C, log_fade(b, i), config, i, C, D);
            double row_absolute = 0, row_square = 0;
            for (int j = 0; j <= i; j++) {
                double a = row.A[j];
                row_square += a * a;
                row_absolute += std::abs(a);
                if (a < 0) negative -= a;
                if (config.softmax() && a > 0) n.entropy -= a * std::log(a) / (B * T);
                n.max_weight = std::max(n.max_weight, std::abs(a));
                n.max_score = std::max(n.max_score, std::abs(row.x[j]));
                moment += power(row.x[j], 2 * config.power());
                scores.push_back(row.x[j]);
            }
            if (row_square > 0) n.effective_keys += row_absolute * row_absolute / row_square / (B * T);
            square += row_square;
            absolute += row_absolute;
            Vector J = dense_jacobian(row, config);
            jacobian += dot(J, J);
        }
    n.norm = std::sqrt(square / (B * T));
    n.jacobian_norm = std::sqrt(jacobian / (B * T));
    n.negative_mass = absolute > 0 ? negative / absolute : 0;
    double mean = dot(scores, Vector(scores.size(), 1.0)) / scores.size(), variance = 0;
    for (double x : scores) variance += (x - mean) * (x - mean) / scores.size();
    n.score_std = std::sqrt(variance);
    double m = 1;
    for (int s = 0; s < config.power(); s++) m *= (2 * s + 1) * (1 + 2.0 * s / D);
    if (config.polynomial()) n.moment_excess = moment / scores.size() / m - 1;
    return n;
}
// log_gamma 0 means no decay.
inline AttentionNorms attention_norms(const Vector& qkv, double log_gamma, const AttentionConfig& config,
                                      int h, int B, int T, int H, int D) {
    auto log_fade = [&](int, int i) {
        Vector fade(i + 1);
        for (int j = 0; j <= i; j++) fade[j] = (i - j) * log_gamma;
        return fade;
    };
    return attention_norms(qkv, log_fade, config, h, B, T, H, D);
}

// A number below `floor` is held to tolerance * floor.
inline void check_number(const std::string& name, double got, double expected, double tolerance,
                         double floor = 0) {
    CAPTURE(name);
    CAPTURE(got);
    CAPTURE(expected);
    CHECK(std::abs(got - expected) <= tolerance * std::max(std::abs(expected), floor));
}

inline void check_norms(const AttentionNorms& got, const AttentionNorms& expected, double tolerance) {
    check_number("norm", got.norm, expected.norm, tolerance);
    check_number("jacobian_norm", got.jacobian_norm, expected.jacobian_norm, tolerance);
    check_number("max_weight", got.max_weight, expected.max_weight, tolerance);
    check_number("negative_mass", got.negative_mass, expected.negative_mass, tolerance);
    check_number("effective_keys", got.effective_keys, expected.effective_keys, tolerance);
    check_number("entropy", got.entropy, expected.entropy, tolerance, 0.1);
    check_number("score_std", got.score_std, expected.score_std, tolerance);
    check_number("max_score", got.max_score, expected.max_score, tolerance);
    check_number("moment", 1 + got.moment_excess, 1 + expected.moment_excess, tolerance);
}

}  // namespace reference
