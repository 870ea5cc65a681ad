// Causal attention, softmax and polynomial, forward and backward, in tiles of 64 queries by 64 keys: no (T,T)
// matrix is stored, and what lies above the diagonal is not computed.
//
//   x_ij = q_i . k_j / sqrt(D),  O = A V,  j <= i
//   softmax: A_ij = exp(x_ij + (i-j) log gamma) / sum_j        (arXiv 1706.03762; tiling: arXiv 2307.08691)
//   poly<p>: A_ij = c_i gamma^(i-j) x_ij^p                     (arXiv 2410.18613; c_i:
//   llmc/attention_scale.h)
//
// qkv rows are q (H,D), k (H,D), v (H,D). decay holds delta (H) with gamma_h = sigmoid(delta_h), or is null:
// gamma is 1. stats keeps what backward needs of a row: the log-sum-exp for softmax, 1e-6 + sum |x^p| for the
// scale `sum`, nothing otherwise. Results are the same bits for the same number of threads.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/tile.h"
#include "llmc/cpu/vector.h"

namespace cpu {

// What the rows and distances of one head are multiplied by.
class HeadScale {
  public:
    bool decays;
    std::vector<float> c;  // (T): c_i of a polynomial; 1 for softmax and `sum`

    HeadScale(const AttentionConfig& config, const float* decay, int h, int T, int D)
        : decays(decay != nullptr), c(T, 1.0f) {
        double log_g = decay ? log_gamma(decay[h]) : 0;
        if (!config.softmax())
            for (int i = 0; i < T; i++) c[i] = (float)row_scale(config, i, log_g, D);
        if (!decays) return;
        size_ = T + 2 * kTile;
        rising_ = Floats(size_);
        falling_ = Floats(size_);
        for (int at = 0; at < size_; at++) {
            int n =
                std::max(0, at - kTile);  // distances below 0 are masked by causal(), so any value will do
            float value = (float)(config.softmax() ? n * log_g : std::exp(n * log_g));
            rising_.get()[at] = falling_.get()[size_ - 1 - at] = value;
        }
    }

    // gamma^n, or n log gamma for softmax, at distances n, n+1, ..., n+15 (one key, 16 queries); -kTile <= n
    // < T.
    vec rising(int n) const { return load(rising_.get() + kTile + n); }
    // The same at n, n-1, ..., n-15 (one query, 16 keys).
    vec falling(int n) const { return load(falling_.get() + size_ - 1 - kTile - n); }

  private:
    int size_ = 0;
    Floats rising_, falling_;
};

// One for all heads where there is no decay, one a head otherwise.
inline std::vector<HeadScale> head_scales(const AttentionConfig& config, const float* decay, int T, int H,
                                          int D) {
    std::vector<HeadScale> scales;
    for (int h = 0; h < (decay ? H : 1); h++) scales.emplace_back(config, decay, h, T, D);
    return scales;
}

inline vint lane_index() {
    return vint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

// x^p.
template <int kPower>
inline vec power(vec x) {
    static_assert(kPower >= 0 && kPower <= 4);
    if constexpr (kPower == 0) return broadcast(1.0f);
    if constexpr (kPower == 1) return x;
    if constexpr (kPower == 2) return x * x;
    if constexpr (kPower == 3) return x * x * x;
    if constexpr (kPower == 4) return (x * x) * (x * x);
}

// The scores of one tile of keys become weights, not yet scaled by rows. A row of s (64,64) is a key, its
// lanes are queries, so that the running sums of the rows of A go down the columns, 16 rows of A at a time.
//   i0, j0: the first query and key. Softmax: o (64,Dp) is rescaled where the maximum grows.
template <int kPower>
inline void scores_to_weights(float* s, float* largest, float* total, float* o, const HeadScale& scale,
                              bool row_sum, int i0, int j0, int Dp) {
    bool diagonal = i0 == j0;
    for (int i = 0; i < kTile; i += kLanes) {
        int seen = diagonal ? i + kLanes : kTile;  // keys that some of these 16 queries see
        vec sum = load(total + i);
        if constexpr (kPower == 0) {
            vec before = load(largest + i), most = before;
            for (int j = 0; j < seen; j++) {
                vec x = load(s + j * kTile + i);
                if (scale.decays) x += scale.rising(i0 + i - j0 - j);
                if (diagonal) x = lane_index() + i >= j ? x : broadcast(-INFINITY);
                store(s + j * kTile + i, x);
                most = max(most, x);
            }
            vec rescale = exp(before - most);
            sum *= rescale;
            for (int j = 0; j < seen; j++) {
                vec e = exp(load(s + j * kTile + i) - most);
                store(s + j * kTile + i, e);
                sum += e;
            }
            store(largest + i, most);
            for (int r = 0; j0 > 0 && r < kLanes; r++) {
                float* row = o + (i + r) * Dp;
                for (int d = 0; d < Dp; d += kLanes) store(row + d, load(row + d) * rescale[r]);
            }
        } else {
            for (int j = 0; j < seen; j++) {
                vec a = power<kPower>(load(s + j * kTile + i));
                if (diagonal) a = lane_index() + i >= j ? a : vec{};
                if (row_sum) sum += abs(a);
                if (scale.decays) a *= scale.rising(i0 + i - j0 - j);
                store(s + j * kTile + i, a);
            }
        }
        store(total + i, sum);
    }
}

// Queries i0 .. i0+63 of one head against all keys up to them.
template <int kPower>
inline void attention_forward_tile(float* out,        // (T,C), from this head's channels on
                                   float* stats,      // (T)
                                   const float* qkv,  // (T,3C), from this head's channels on
                                   const HeadScale& scale, bool row_sum, int i0, int T, int C, int D,
                                   float* scratch) {
    int Dp = padded(D), queries = std::min(kTile, T - i0);
    float* qt = scratch;                 // (Dp,64): q^T / sqrt(D)
    float* k = qt + Dp * kTile;          // (64,Dp)
    float* v = k + kTile * Dp;           // (64,Dp)
    float* o = v + kTile * Dp;           // (64,Dp)
    float* s = o + kTile * Dp;           // (64 keys, 64 queries)
    float* largest = s + kTile * kTile;  // (64): softmax's running maximum
    float* total = largest + kTile;      // (64): the running sum
    load_tile_transposed(qt, qkv + (size_t)i0 * 3 * C, 3 * C, queries, D, 1.0f / sqrtf((float)D));
    std::fill(o, o + kTile * Dp, 0.0f);
    std::fill(largest, largest + kTile, -INFINITY);
    std::fill(total, total + kTile, 0.0f);

    for (int j0 = 0; j0 <= i0; j0 += kTile) {
        bool diagonal = j0 == i0;
        const float* kv = qkv + (size_t)j0 * 3 * C + C;
        load_tile(k, kv, 3 * C, std::min(kTile, T - j0), D, 1.0f);
        load_tile(v, kv + C, 3 * C, std::min(kTile, T - j0), D, 1.0f);
        for (int r = 0; r < kTile;
             r += kTileRows) {  // keys; on the diagonal, queries before them do not see them
            int first = diagonal ? r / kLanes * kLanes : 0;
            tile_product<false, false>(s + r * kTile + first, kTile, k + r * Dp, Dp, qt + first, kTile,
                                       kTile - first, Dp);
        }
        scores_to_weights<kPower>(s, largest, total, o, scale, row_sum, i0, j0, Dp);
        for (int r = 0; r < kTile; r += kTileRows)  // queries
            tile_product<true, true>(o + r * Dp, Dp, s + r, kTile, v, Dp, Dp,
                                     diagonal ? r + kTileRows : kTile);
    }

    for (int r = 0; r < queries; r++) {
        float factor = scale.c[i0 + r];
        if (kPower == 0) {
            stats[i0 + r] = largest[r] + std::log(total[r]);
            factor = 1.0f / total[r];
        } else if (row_sum) {
            stats[i0 + r] = total[r] + (float)kRowSumEps;
            factor = 1.0f / stats[i0 + r];
        }
        for (int d = 0; d < D; d++) out[(size_t)(i0 + r) * C + d] = o[r * Dp + d] * factor;
    }
}

// Calls f with the power as a compile-time constant: the inner loops then hold no branch on it.
template <class F>
inline void with_power(int power, F f) {
    switch (power) {
        case 0:
            return f(std::integral_constant<int, 0>());
        case 1:
            return f(std::integral_constant<int, 1>());
        case 2:
            return f(std::integral_constant<int, 2>());
        case 3:
            return f(std::integral_constant<int, 3>());
        case 4:
            return f(std::integral_constant<int, 4>());
    }
    fail("attention: power ", power, ", expected 0 (softmax) to 4");
}

inline void attention_forward(float* out,          // (B,T,C)
                              float* stats,        // (B,H,T)
                              const float* qkv,    // (B,T,3C)
                              const float* decay,  // (H), or null
                              const AttentionConfig& config, int B, int T, int H, int D) {
    int C = H * D, tiles = (T + kTile - 1) / kTile;
    std::vector<HeadScale> scales = head_scales(config, decay, T, H, D);
    with_power(config.power, [&](auto power) {
#pragma omp parallel
        {
            Floats scratch((size_t)kTile * (4 * padded(D) + kTile + 2));
            // Later tiles see more keys: longest first, so that the threads end together.
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < B * H * tiles; task++) {
                int tile = tiles - 1 - task / (B * H), bh = task % (B * H), b = bh / H, h = bh % H;
                attention_forward_tile<power>(out + (size_t)b * T * C + h * D,
                                              stats ? stats + (size_t)bh * T : nullptr,
                                              qkv + (size_t)b * T * 3 * C + h * D, scales[decay ? h : 0],
                                              config.has_row_sum(), tile * kTile, T, C, D, scratch.get());
            }
        }
    });
}

// The weights and the gradient of the scores of one tile, in place: s (64 queries, 64 keys) becomes A without
// c_i, da = c_i dO V^T becomes dX. On the diagonal only the columns that attention_backward_tiles computed.
//   row_dot (64): dO_i . O_i, and for `sum` divided by the normaliser. Returns sum_ij (i-j) A_ij dA_ij for a
//   polynomial, sum_ij (i-j) dX_ij for softmax, where `wants_decay`: the gradient of log gamma, but for c_i's
//   part.
template <int kPower>
inline double weights_and_score_gradients(float* s, float* da, const float* stats, const float* row_dot,
                                          const HeadScale& scale, bool row_sum, bool wants_decay, int queries,
                                          int i0, int j0) {
    bool diagonal = i0 == j0;
    vec ddecay = {};
    for (int i = 0; i < kTile; i++) {
        int seen = diagonal ? i / kTileRows * kTileRows + kTileRows : kTile;
        for (int j = 0; j < seen; j += kLanes) {
            float* sij = s + i * kTile + j;
            float* daij = da + i * kTile + j;
            vec x = load(sij), d = load(daij), a, dx;
            int distance = i0 + i - j0 - j;
            if constexpr (kPower == 0) {
                if (scale.decays) x += scale.falling(distance);
                a = exp(x - stats[i]);
                dx = a * (d - row_dot[i]);
            } else {
                vec slope = (float)kPower * power<kPower - 1>(x);
                vec fade = scale.decays ? scale.falling(distance) : broadcast(1.0f);
                a = power<kPower>(x) * fade;
                dx = d * fade;
                if (row_sum) {  // of |x^p|, whose derivative has the sign of x^p
                    vec dot = broadcast(row_dot[i]);
                    if (kPower % 2 == 0) dx -= dot;
                    if (kPower % 2 == 1) dx -= x > 0.0f ? dot : x < 0.0f ? -dot : vec{};
                }
                dx *= slope;
            }
            if (diagonal) {
                vint visible = lane_index() + j <= i;
                a = visible ? a : vec{};
                dx = visible ? dx : vec{};
            }
            if (wants_decay && i < queries)
                ddecay += (kPower == 0 ? dx : a * d) * __builtin_convertvector(distance - lane_index(), vec);
            store(sij, a);
            store(daij, dx);
        }
    }
    double total = 0;
    for (int lane = 0; lane < kLanes; lane++) total += ddecay[lane];
    return total;
}

// Key tiles first .. last-1 of one head against all queries from them on. dk and dv of these keys are whole;
// dq is this range's share. Returns the gradient of log gamma as above.
template <int kPower>
inline double attention_backward_tiles(float* dq,
                                       int dq_stride,            // rows (D), from query first*64 on: assigned
                                       float* dqkv,              // (T,3C), from this head's channels on
                                       const float* dout,        // (T,C), from this head's channels on
                                       const float* stats,       // (T)
                                       const float* row_dot,     // (T), or null where nothing needs it
                                       const float* row_factor,  // (T): c_i
                                       const float* qkv,         // (T,3C), from this head's channels on
                                       const HeadScale& scale, bool row_sum, bool wants_decay, int first,
                                       int last, int T, int C, int D, float* scratch) {
    int Dp = padded(D), tiles = (T + kTile - 1) / kTile;
    float inverse_sqrt = 1.0f / sqrtf((float)D);
    float* kt = scratch;               // (Dp,64)
    float* vt = kt + Dp * kTile;       // (Dp,64)
    float* k = vt + Dp * kTile;        // (64,Dp)
    float* q = k + kTile * Dp;         // (64,Dp): q / sqrt(D)
    float* d_o = q + kTile * Dp;       // (64,Dp): c_i dO
    float* dk = d_o + kTile * Dp;      // (64,Dp)
    float* dv = dk + kTile * Dp;       // (64,Dp)
    float* dq_tile = dv + kTile * Dp;  // (64,Dp)
    float* s = dq_tile + kTile * Dp;   // (64 queries, 64 keys): scores, then weights
    float* da = s + kTile * kTile;     // (64 queries, 64 keys): gradient of the weights, then of the scores
    double ddecay = 0;
    for (int tile = first; tile < last; tile++) {
        int j0 = tile * kTile, keys = std::min(kTile, T - j0);
        const float* kv = qkv + (size_t)j0 * 3 * C + C;
        load_tile_transposed(kt, kv, 3 * C, keys, D, 1.0f);
        load_tile_transposed(vt, kv + C, 3 * C, keys, D, 1.0f);
        load_tile(k, kv, 3 * C, keys, D, inverse_sqrt);
        std::fill(dk, dk + kTile * Dp, 0.0f);
        std::fill(dv, dv + kTile * Dp, 0.0f);
        for (int i0 = j0; i0 < tiles * kTile; i0 += kTile) {
            bool diagonal = i0 == j0;
            int queries = std::min(kTile, T - i0);
            load_tile(q, qkv + (size_t)i0 * 3 * C, 3 * C, queries, D, inverse_sqrt);
            load_tile(d_o, dout + (size_t)i0 * C, C, queries, D, 1.0f, row_factor + i0);
            for (int r = 0; r < kTile; r += kTileRows) {  // queries; on the diagonal they see no later keys
                int seen = diagonal ? padded(r + kTileRows) : kTile;
                tile_product<false, false>(s + r * kTile, kTile, q + r * Dp, Dp, kt, kTile, seen, Dp);
                tile_product<false, false>(da + r * kTile, kTile, d_o + r * Dp, Dp, vt, kTile, seen, Dp);
            }
            // Padded queries have x = 0 and dO = 0; only softmax's exp(0 - lse) needs a value to subtract.
            float lse[kTile] = {}, dot[kTile] = {};
            if (kPower == 0) std::copy_n(stats + i0, queries, lse);
            if (row_dot) std::copy_n(row_dot + i0, queries, dot);
            ddecay += weights_and_score_gradients<kPower>(s, da, lse, dot, scale, row_sum, wants_decay,
                                                          queries, i0, j0);
            for (int r = 0; r < kTile; r += kTileRows) {  // keys
                int from = diagonal ? r : 0;              // the first query that sees them
                const float* a = s + from * kTile + r;
                const float* dx = da + from * kTile + r;
                tile_product<true, true>(dv + r * Dp, Dp, a, kTile, d_o + from * Dp, Dp, Dp, kTile - from);
                tile_product<true, true>(dk + r * Dp, Dp, dx, kTile, q + from * Dp, Dp, Dp, kTile - from);
            }
            for (int r = 0; r < queries; r += kTileRows)
                tile_product<false, false>(dq_tile + r * Dp, Dp, da + r * kTile, kTile, k, Dp, Dp,
                                           diagonal ? r + kTileRows : kTile);
            for (int r = 0; r < queries; r++) {
                float* row = dq + (size_t)(i0 + r - first * kTile) * dq_stride;
                const float* add = dq_tile + r * Dp;
                if (tile == first) {
                    for (int d = 0; d < D; d++) row[d] = add[d];
                } else {
                    for (int d = 0; d < D; d++) row[d] += add[d];
                }
            }
        }
        for (int r = 0; r < keys; r++) {
            float* row = dqkv + (size_t)(j0 + r) * 3 * C;
            for (int d = 0; d < D; d++) row[C + d] = dk[r * Dp + d];
            for (int d = 0; d < D; d++) row[2 * C + d] = dv[r * Dp + d];
        }
    }
    return ddecay;
}

// dot (B,H,T) = dout . out, a head: softmax's and sum's derivatives of the normaliser, and the learned
// decay's.
inline void head_dots(float* dot, const float* dout, const float* out, int B, int T, int H, int D) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int bh = 0; bh < B * H; bh++)
        for (int t = 0; t < T; t++) {
            size_t at = ((size_t)(bh / H) * T + t) * H * D + (size_t)(bh % H) * D;
            float total = 0;
#pragma omp simd reduction(+ : total)
            for (int d = 0; d < D; d++) total += dout[at + d] * out[at + d];
            dot[(size_t)bh * T + t] = total;
        }
}

// Where to cut the key tiles of a head into `parts` of about equal work: tile j is seen by tiles - j tiles of
// queries.
inline std::vector<int> balanced_cuts(int tiles, int parts) {
    std::vector<int> cuts = {0};
    double all = 0.5 * tiles * (tiles + 1), done = 0;
    for (int tile = 0; tile < tiles; tile++) {
        done += tiles - tile;
        if (done >= all * cuts.size() / parts) cuts.push_back(tile + 1);
    }
    return cuts;
}

constexpr int kMaxParts = 8;  // of a head, each with a dq of its own

inline void attention_backward(float* dqkv,         // (B,T,3C)
                               float* ddecay,       // (H) +=, or null: not wanted
                               const float* dout,   // (B,T,C)
                               const float* out,    // (B,T,C)
                               const float* stats,  // (B,H,T)
                               const float* qkv,    // (B,T,3C)
                               const float* decay,  // (H), or null
                               const AttentionConfig& config, int B, int T, int H, int D) {
    int C = H * D, tiles = (T + kTile - 1) / kTile;
    bool row_sum = config.has_row_sum();
    std::vector<HeadScale> scales = head_scales(config, decay, T, H, D);
    std::vector<float> row_dot, row_factor;
    if (config.softmax() || row_sum || ddecay) {
        row_dot.resize((size_t)B * H * T);
        head_dots(row_dot.data(), dout, out, B, T, H, D);
    }
    if (row_sum) {
        row_factor.resize((size_t)B * H * T);
        for (size_t i = 0; i < row_factor.size(); i++) row_factor[i] = 1.0f / stats[i];
        for (size_t i = 0; i < row_factor.size(); i++) row_dot[i] *= row_factor[i];
    }
    // A head is one task, or several ranges of key tiles where there are few heads for the threads; then each
    // has its own share of dq, added up at the end.
    int wanted = (4 * omp_get_max_threads() + B * H - 1) / (B * H);
    std::vector<int> cuts =
        balanced_cuts(tiles, B * H >= omp_get_max_threads() ? 1 : std::min({tiles, wanted, kMaxParts}));
    int parts = (int)cuts.size() - 1;
    Floats shares(parts > 1 ? (size_t)B * H * parts * T * D : 0);  // (B,H,parts,T,D)
    std::vector<double> dlog_gamma((size_t)B * H * parts);
    with_power(config.power, [&](auto power) {
#pragma omp parallel
        {
            Floats scratch((size_t)kTile * (8 * padded(D) + 2 * kTile));
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < B * H * parts; task++) {
                int part = task / (B * H), bh = task % (B * H), b = bh / H, h = bh % H;
                const HeadScale& scale = scales[decay ? h : 0];
                float* head = dqkv + (size_t)b * T * 3 * C + h * D;
                size_t from = (size_t)cuts[part] * kTile;
                float* dq = parts > 1 ? shares.get() + (((size_t)bh * parts + part) * T + from) * D : head;
                dlog_gamma[(size_t)bh * parts + part] = attention_backward_tiles<power>(
                    dq, parts > 1 ? D : 3 * C, head, dout + (size_t)b * T * C + h * D,
                    stats ? stats + (size_t)bh * T : nullptr,
                    row_dot.empty() ? nullptr : row_dot.data() + (size_t)bh * T,
                    row_sum ? row_factor.data() + (size_t)bh * T : scale.c.data(),
                    qkv + (size_t)b * T * 3 * C + h * D, scale, row_sum, ddecay != nullptr, cuts[part],
                    cuts[part + 1], T, C, D, scratch.get());
            }
        }
    });
    if (parts > 1) {
#pragma omp parallel for collapse(2) schedule(static)
        for (int bh = 0; bh < B * H; bh++)
            for (int t = 0; t < T; t++) {
                float* dq = dqkv + ((size_t)(bh / H) * T + t) * 3 * C + (size_t)(bh % H) * D;
                for (int part = 0; part < parts && cuts[part] * kTile <= t; part++) {
                    const float* share = shares.get() + (((size_t)bh * parts + part) * T + t) * D;
                    for (int d = 0; d < D; d++) dq[d] = part ? dq[d] + share[d] : share[d];
                }
            }
    }
    if (!ddecay) return;
    for (int h = 0; h < H; h++) {
        double log_g = log_gamma(decay[h]), total = 0;
        for (int b = 0; b < B; b++)
            for (int part = 0; part < parts; part++) total += dlog_gamma[((size_t)b * H + h) * parts + part];
        if (!config.softmax() && config.scale == ScaleKind::row) {  // c_i depends on gamma too
            std::vector<double> e = row_scale_log_derivatives(T, log_g);
            for (int b = 0; b < B; b++)
                for (int i = 0; i < T; i++) total -= e[i] * row_dot[((size_t)b * H + h) * T + i];
        }
        ddecay[h] +=
            (float)(total * -std::expm1(log_g));  // d log sigmoid(delta) / d delta = 1 - sigmoid(delta)
    }
}

}  // namespace cpu
