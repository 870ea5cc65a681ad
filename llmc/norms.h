// Numbers that show what attention does while it trains: the Frobenius norms of its matrix and of its
// Jacobian, and what explains them. arXiv 2410.18613 says that softmax works because these norms are of the
// order sqrt(T). attention_norms of each backend measures the numbers of every head on one micro-batch of B
// sequences, and the trainer writes them to metrics.jsonl.
//
// In the formulas i is a query, j <= i is a key that it sees, x_ij = q_i . k_j / sqrt(D) is the score before
// any decay, and A is as in llmc/cpu/attention.h. All sums also go over the B sequences, so there are B T
// rows and B T (T+1) / 2 pairs.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "llmc/attention_scale.h"
#include "llmc/config.h"

struct AttentionNorms {
    double norm;            // sqrt(sum_ij A_ij^2 / (B T)): ||A||_F / sqrt(T), the root mean square over B
    double jacobian_norm;   // sqrt(sum_i sum_jk (dA_ij / dx_ik)^2 / (B T)); dA_ij / dx_ik is 0 across rows
    double max_weight;      // largest |A_ij|
    double negative_mass;   // sum of |A_ij| where A_ij < 0, over the sum of all |A_ij|; 0 where A is 0
    double effective_keys;  // (sum_j |A_ij|)^2 / sum_j A_ij^2, mean over rows; 0 for a row of zeros
    double entropy;         // softmax: -sum_j A_ij log A_ij in nats, mean over rows; otherwise 0
    double score_std;       // standard deviation of x_ij about its mean, over pairs
    double max_score;       // largest |x_ij|
    double moment_excess;   // poly<p>: mean of x_ij^(2p) over pairs, divided by m_p, minus 1; otherwise 0
    double mean_gate = 0;   // --decay gate: mean of f_t; otherwise 0
};

// What a backend measures of a head: sums over rows and pairs, and maxima.
struct NormSums {
    double square = 0, jacobian = 0, absolute = 0, negative = 0, effective_keys = 0, entropy = 0;
    double score = 0, score_square = 0, moment = 0;
    double gate = 0;  // f_t, with gates
    double max_weight = 0, max_score = 0;

    void add(const NormSums& other) {
        square += other.square;
        jacobian += other.jacobian;
        absolute += other.absolute;
        negative += other.negative;
        effective_keys += other.effective_keys;
        entropy += other.entropy;
        score += other.score;
        score_square += other.score_square;
        moment += other.moment;
        gate += other.gate;
        max_weight = std::max(max_weight, other.max_weight);
        max_score = std::max(max_score, other.max_score);
    }

    // The means over all rows of B sequences.
    AttentionNorms norms(const AttentionConfig& config, int B, int T, int D) const {
        double rows = (double)B * T, pairs = rows * (T + 1) / 2;
        AttentionNorms n;
        // The sums are of weights without this factor.
        const double factor = std::abs(config.value_factor());
        n.norm = factor * std::sqrt(square / rows);
        n.jacobian_norm = factor * std::sqrt(jacobian / rows);
        n.max_weight = factor * max_weight;
        n.negative_mass = config.value_factor() < 0 ? 1 : absolute == 0 ? 0 : negative / absolute;
        n.effective_keys = effective_keys / rows;
        n.entropy = entropy / rows;
        double mean = score / pairs;
        n.score_std = std::sqrt(std::max(score_square / pairs - mean * mean, 0.0));
        n.max_score = max_score;
        n.moment_excess = config.polynomial() ? moment / pairs / gaussian_moment(config.power(), D) - 1 : 0;
        if (gate > 0) n.mean_gate = gate / rows;
        return n;
    }
};

struct GaussianNorms {
    double norm, jacobian_norm;
};

// The root mean square of both norms that AttentionNorms would have for q, k ~ N(0, I_D). E[x^(2p)] is m_p,
// so row i has the mean squares c_i^2 m_p n_i and c_i^2 p^2 m_(p-1) n_i, with n_i = sum_j gamma^(2(i-j)).
// There is no such number for the scale `sum`, whose normaliser depends on the scores, and for other kinds of
// attention. log_gamma is 0 without a decay.
inline std::optional<GaussianNorms> gaussian_norms(const AttentionConfig& config, int D, int64_t T,
                                                   double log_gamma) {
    if (!config.polynomial() || config.has_row_sum()) return std::nullopt;
    double c2_n = 0;  // the mean of c_i^2 n_i
    for (int64_t i = 0; i < T; i++) {
        double c = row_scale(config, i, log_gamma, D);
        c2_n += c * c * effective_row_length(i, log_gamma) / T;
    }
    int p = config.power();
    return GaussianNorms{std::sqrt(c2_n * gaussian_moment(p, D)),
                         p * std::sqrt(c2_n * gaussian_moment(p - 1, D))};
}
