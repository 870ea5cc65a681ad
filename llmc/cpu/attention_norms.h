// Computes the numbers of llmc/norms.h for every head of a layer, in the tiles of attention_forward: one pass
// over the scores, and no (T,T) matrix.
//
// A row's Jacobian, dA_j / dx_k, is not computed as a matrix, because the sum of its squares follows from a
// few sums over the row. With f the activation, g_k = gamma^(i-k), w_k = c g_k f'(x_k), and for `sum`
// a_k = |A_k|, where c is 1 / s and s = 1e-6 + sum_k g_k |x_k^p|:
//
//   kind         dA_j / dx_k                    its square, summed over j and k
//   softmax      A_j (1[j=k] - A_k)             sum_j A_j^2 (1 - 2 A_j + sum_k A_k^2)
//   `sum`        w_k (1[j=k] -+ a_j)            sum_k w_k^2 (1 - 2 a_k + sum_j a_j^2)
//   all others   w_k 1[j=k]                     sum_k w_k^2
//
// (Where x_k = 0, |x^p| has the derivative 0 or none. There `sum` has no term -+ a_j, and so no sum over j.)
//
// The sums of softmax and `sum` are small differences of large numbers once one key m has nearly all of a
// row, as happens in training. So the key m with the largest weight is left out of the sums. The other keys
// are the rest. A weight in the rest is at most 1/2, and 1 - a_m is computed as the sum of the rest, so
// nothing cancels:
//
//   softmax      A_m^2 (R_1^2 + R_2) + R_2 (1 + A_m^2 + R_2) - 2 R_3,    R_n = sum_rest A_k^n
//   `sum`        w_m^2 ((1 - a_m)^2 + R_2) + sum_rest w_k^2 (1 - 2 a_k) + (a_m^2 + R_2) sum_rest w_k^2
//
// One pass is enough: the largest weight so far is kept apart, and it joins the rest when a larger one comes.
//
// The sums are float within a tile and double beyond, and are added in a fixed order of rows and query tiles.
// So the results are the same bits for any number of threads. A NaN in qkv makes the sums of a head NaN, but
// not its two maxima.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "llmc/config.h"
#include "llmc/cpu/attention.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/tile.h"
#include "llmc/cpu/vector.h"
#include "llmc/norms.h"

namespace cpu::inline LLMC_ISA {

// Running sums over the keys of 64 queries, each (64).
struct RowSums {
    double score[kTile], score_square[kTile];        // x, x^2
    double moment[kTile];                            // x^(2p)
    double absolute[kTile], negative[kTile];         // |A|, and where A < 0
    double square[kTile];                            // A^2
    double slope[kTile];                             // (w / kSlopeFactor)^2
    double entropy[kTile];                           // -A log A
    double rest[kTile], rest_square[kTile];          // A, A^2 of softmax; a, a^2 of `sum`
    double rest_cube[kTile];                         // A^3
    double rest_slope[kTile], rest_diagonal[kTile];  // (w / p)^2, and that times 1 - 2a
    float max_score[kTile], max_weight[kTile];       // |x|, |A|
    float largest[kTile], largest_fade[kTile];       // the key m: A of softmax; |x|, g of `sum`
};

// sum (16) += v.
inline void add_to(double* sum, vec v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int lane = 0; lane < kLanes; lane++) sum[lane] += lanes[lane];
}

// Adds one tile s (64 keys, 64 queries) of q . k to the sums of its queries.
//   row (64): the log-sum-exp for softmax, c_i for a polynomial.
template <class A, bool kRowSum>
inline void add_scores(RowSums& sums, const float* s, const float* row, const TileFades& fades, int i0,
                       int j0, int D) {
    bool diagonal = i0 == j0;
    float qk_to_score = inverse_sqrt(D);
    for (int i = 0; i < kTile; i += kLanes) {
        int seen = diagonal ? i + kLanes : kTile;  // keys that some of these 16 queries see
        vec score = {}, score_square = {}, moment = {}, absolute = {}, negative = {}, square = {}, slope = {};
        vec entropy = {}, rest = {}, rest_square = {}, rest_cube = {}, rest_slope = {}, rest_diagonal = {};
        vec max_score = load(sums.max_score + i), max_weight = load(sums.max_weight + i);
        vec largest = load(sums.largest + i), largest_fade = load(sums.largest_fade + i);
        const vec row_i = load(row + i), keys = keys_seen(i0 + i);
        vec largest_a, unused_slope;  // a_m of `sum`
        if constexpr (kRowSum)
            A::weighted(largest_a, unused_slope, largest, largest_fade * row_i, keys, VectorMath());
        for (int j = 0; j < seen; j++) {
            vint visible = lane_index() + i >= j;
            vec x = load(s + j * kTile + i) * qk_to_score;
            if (diagonal) x = visible ? x : vec{};
            vec x2 = x * x, y = abs(x);
            score += x;
            score_square += x2;
            max_score = max(y, max_score);
            if constexpr (A::kOnline) {
                vec log_a = x - row_i;
                if (fades) log_a += fades(j, i);
                vec a = exp(log_a);
                if (diagonal) a = visible ? a : vec{};
                entropy -= a * log_a;
                vec r = a > largest ? largest : a;
                largest = max(a, largest);
                rest += r;
                rest_square += r * r;
                rest_cube += r * r * r;
            } else {
                vec fade = fades ? fades(j, i) : broadcast(1.0f);
                if (diagonal) fade = visible ? fade : vec{};
                vec a, da;
                A::weighted(a, da, x, fade * row_i, keys, VectorMath());
                if constexpr (A::kPower > 0) moment += A::value(x2, keys, VectorMath());
                absolute += abs(a);
                negative += max(-a, vec{});
                square += a * a;
                max_weight = max(abs(a), max_weight);
                slope += da * da;
                if constexpr (kRowSum) {
                    const vint larger = abs(a) > largest_a;
                    const vec r = larger ? largest : y, r_fade = larger ? largest_fade : fade;
                    largest = larger ? y : largest;
                    largest_fade = larger ? fade : largest_fade;
                    largest_a = larger ? abs(a) : largest_a;
                    vec r_a, w;
                    A::weighted(r_a, w, r, r_fade * row_i, keys, VectorMath());
                    rest += r_a;
                    rest_square += r_a * r_a;
                    rest_slope += r > 0.0f ? w * w : vec{};  // abs(x) has no slope at 0
                    rest_diagonal += w * w * (1.0f - 2.0f * r_a);
                }
            }
        }
        add_to(sums.score + i, score);
        add_to(sums.score_square + i, score_square);
        store(sums.max_score + i, max_score);
        if constexpr (A::kOnline) {
            add_to(sums.entropy + i, entropy);
            add_to(sums.rest_cube + i, rest_cube);
        } else {
            add_to(sums.moment + i, moment);
            add_to(sums.absolute + i, absolute);
            add_to(sums.negative + i, negative);
            add_to(sums.square + i, square);
            add_to(sums.slope + i, slope);
            store(sums.max_weight + i, max_weight);
        }
        if constexpr (A::kOnline || kRowSum) {
            add_to(sums.rest + i, rest);
            add_to(sums.rest_square + i, rest_square);
            store(sums.largest + i, largest);
        }
        if constexpr (kRowSum) {
            add_to(sums.rest_slope + i, rest_slope);
            add_to(sums.rest_diagonal + i, rest_diagonal);
            store(sums.largest_fade + i, largest_fade);
        }
    }
}

// The numbers of row r from its sums. c is c_i of a polynomial.
template <class A, bool kRowSum>
inline NormSums finish_row(const RowSums& sums, int r, double c) {
    NormSums row;
    row.score = sums.score[r];
    row.score_square = sums.score_square[r];
    row.max_score = sums.max_score[r];
    double R1 = sums.rest[r], R2 = sums.rest_square[r];
    if constexpr (A::kOnline) {
        double a = sums.largest[r], a2 = a * a;
        row.absolute = R1 + a;
        row.square = R2 + a2;
        row.jacobian = a2 * (R1 * R1 + R2) + R2 * (1 + a2 + R2) - 2 * sums.rest_cube[r];
        row.max_weight = a;
        row.entropy = sums.entropy[r];
    } else {
        row.absolute = sums.absolute[r];
        row.negative = sums.negative[r];
        row.square = sums.square[r];
        row.jacobian = A::kSlopeFactor * A::kSlopeFactor * sums.slope[r];
        row.max_weight = sums.max_weight[r];
        row.moment = sums.moment[r];
        if constexpr (kRowSum) {
            double w = std::pow((double)sums.largest[r], A::kPower - 1) * c * sums.largest_fade[r];
            double a = w * sums.largest[r], one_minus_a = R1 + kRowSumEps * c;
            row.jacobian = A::kSlopeFactor * A::kSlopeFactor *
                           (w * w * (one_minus_a * one_minus_a + R2) + sums.rest_diagonal[r] +
                            (a * a + R2) * sums.rest_slope[r]);
        }
    }
    if (row.square != 0) row.effective_keys = row.absolute * row.absolute / row.square;
    return row;
}

// The numbers of queries i0 .. i0+63 of one head, with all keys that they see.
template <class A, bool kRowSum, class Real>
inline NormSums attention_norms_tile(const Real* qkv,     // (T,3C), from this head's channels on
                                     const float* stats,  // (T)
                                     const HeadFactors& factors, int i0, int T, int C, int D,
                                     float* scratch) {
    int Dp = padded(D), queries = std::min(kTile, T - i0);
    float* qt = scratch;             // (Dp,64)
    float* k = qt + Dp * kTile;      // (64,Dp)
    float* s = k + kTile * Dp;       // (64 keys, 64 queries)
    float* row = s + kTile * kTile;  // (64)
    float* fades = row + kTile;      // (64,64)
    std::fill(row, row + kTile, 0.0f);
    for (int r = 0; r < queries; r++) {
        row[r] = factors.row_factor[i0 + r] / score_factor(A::kPower, D);  // c_i, because x is used here
        if (A::kOnline) row[r] = stats[i0 + r];
        if (kRowSum) row[r] = 1.0f / stats[i0 + r];
    }
    load_tile_transposed(qt, qkv + (size_t)i0 * 3 * C, 3 * C, queries, D);

    RowSums sums = {};
    for (int j0 = 0; j0 <= i0; j0 += kTile) {
        load_tile(k, qkv + (size_t)j0 * 3 * C + C, 3 * C, std::min(kTile, T - j0), D);
        for (int r = 0; r < kTile; r += kTileRows) {  // keys, which earlier queries do not see
            int first = j0 == i0 ? r / kLanes * kLanes : 0;
            tile_product<false, false>(s + r * kTile + first, kTile, k + r * Dp, Dp, qt + first, kTile,
                                       kTile - first, Dp);
        }
        add_scores<A, kRowSum>(sums, s, row, factors.fades_of_keys(i0, j0, fades), i0, j0, D);
    }
    NormSums total;
    for (int r = 0; r < queries; r++) total.add(finish_row<A, kRowSum>(sums, r, row[r]));
    return total;
}

template <class Real>
inline void attention_norms(AttentionNorms* norms,  // (H)
                            const Real* qkv,        // (B,T,3C): what attention_forward read
                            const float* stats,     // from attention_forward; may be null if stats_size is 0
                            Decay decay, const AttentionConfig& config, int B, int T, int H, int D) {
    int C = H * D, tiles = (T + kTile - 1) / kTile;
    LayerFactors factors(config, decay, B, T, H, D);
    std::vector<NormSums> parts((size_t)B * H * tiles);  // (H,B,tiles)
    auto measure = [&]<class A>(A, auto row_sum) {
#pragma omp parallel
        {
            AlignedArray scratch((size_t)kTile * (2 * padded(D) + 2 * kTile + 1));
            // Later tiles see more keys. They come first, so that the threads end together.
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < B * H * tiles; task++) {
                int tile = tiles - 1 - task / (B * H), bh = task % (B * H), b = bh / H, h = bh % H;
                parts[((size_t)h * B + b) * tiles + tile] = attention_norms_tile<A, row_sum>(
                    qkv + head_offset(bh, 3 * C, T, H, D), stats ? stats + (size_t)bh * T : nullptr,
                    factors[bh], tile * kTile, T, C, D, scratch.get());
            }
        }
    };
    with_activation(config.kind, [&]<class A>(A activation) {
        if constexpr (A::kPower > 0)
            if (config.has_row_sum()) return measure(activation, std::true_type());
        measure(activation, std::false_type());
    });

    for (int h = 0; h < H; h++) {
        NormSums sums;
        for (int part = 0; part < B * tiles; part++) sums.add(parts[(size_t)h * B * tiles + part]);
        norms[h] = sums.norms(config, B, T, D);
        if (!decay.is_gate) continue;
        double gates = 0;
        for (int b = 0; b < B; b++)
            for (int t = 0; t < T; t++) gates += std::exp(decay.values[((size_t)b * H + h) * T + t]);
        norms[h].mean_gate = gates / ((double)B * T);
    }
}

}  // namespace cpu
