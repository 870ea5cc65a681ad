// Causal attention, forward and backward, in tiles of 64 queries by 64 keys. No (T,T) matrix is stored, and
// tiles above the diagonal are not computed.
//
//   x_ij = q_i . k_j / sqrt(D),  O = A V,  j <= i
//   softmax: A_ij = exp(x_ij + log F_ij) / sum_j        (arXiv 1706.03762; tiling: arXiv 2307.08691)
//   poly<p>: A_ij = c_i F_ij x_ij^p                     (arXiv 2410.18613; c_i: row_scale())
//   sigmoid: A_ij = F_ij sigmoid(x_ij - log(i+1))       (arXiv 2409.04431)
//
// The fade F_ij is gamma^(i-j) with --decay fixed or learned, a product of gates with --decay gate (arXiv
// 2503.02130; fade.h), and 1 without a decay.
//
// A row of qkv is q (H,D), k (H,D), v (H,D).
//
// stats keeps what the backward pass needs of each row (B,H,T): the log-sum-exp for softmax, and
// 1e-6 + sum_j F_ij |x_ij^p| for the scale `sum`. Other kinds need nothing. With `sum` in bf16 O
// follows once more, in float (B,T,C).
//
// The tiles hold q . k instead of x, so c_i takes over the 1/sqrt(D)^p of a polynomial. The scores and all
// sums are float32; with bf16 the factors of every product are bf16 (tile.h). The results are the same bits
// for the same number of threads.
//
// Words and names of all attention_*.h:
//   row          row i of A, dA or O, which belongs to query i
//   row factor   c_i / sqrt(D)^p
//   fade         F_ij, which makes weights smaller with the distance of query and key
//   dot          dO_i . O_i, which the derivative of a row's normaliser needs
//   part         a range of the tiles of one head; each part is the task of one thread
//   dA, dX       the gradients of the weights and of the scores
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/cpu/fade.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/tile.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

inline float inverse_sqrt(int D) {
    return 1.0f / sqrtf((float)D);
}

// (q . k)^p times this is x^p. `power` is 0, and the factor 1, for an activation that is not a power.
inline float score_factor(int power, int D) {
    return (float)std::pow((double)D, -0.5 * power);
}

// The place of the first channel of a head in a tensor (B,T,row_size). bh counts the sequences and heads
// (B,H).
inline size_t head_offset(int bh, int row_size, int T, int H, int D) {
    return (size_t)(bh / H) * T * row_size + (size_t)(bh % H) * D;
}

// dO_i . O_i is a small difference of large numbers with the scale `sum`, so a rounded O would spoil it.
template <class Real>
inline bool keeps_exact_output(const AttentionConfig& config) {
    return config.has_row_sum() && !std::is_same_v<Real, float>;
}

// Floats in stats.
template <class Real>
inline size_t stats_size(const AttentionConfig& config, size_t B, size_t T, int H, int D) {
    if (!config.softmax() && !config.has_row_sum()) return 0;
    return B * T * H * (keeps_exact_output<Real>(config) ? 1 + D : 1);
}

// The argument of an activation: q . k if it is a power, otherwise the score.
template <class A>
inline vec activation_argument(vec qk, float qk_to_score) {
    return A::kPower > 0 ? qk : qk * qk_to_score;
}

// The numbers of keys that the queries i, i+1, ..., i+15 see.
inline vec keys_seen(int i) {
    return __builtin_convertvector(lane_index() + (i + 1), vec);
}

// Turns the scores of one tile of keys into weights without their row factors. A row of s is a key and its
// lanes are queries, so one vector holds the running sums of 16 rows of A. For softmax it rescales o where
// the maximum of a row grows.
//   i0, j0: the first query and key.
template <class A, class Word>
inline void scores_to_weights(Word* weights,       // (64 keys,64) in words; may be s
                              float* s,            // (64 keys,64)
                              float* running_max,  // (64)
                              float* running_sum,  // (64)
                              float* o,            // (64,Dp)
                              const TileFades& fades, bool has_row_sum, int i0, int j0, int D) {
    bool diagonal = i0 == j0;
    int Dp = padded(D);
    float qk_to_score = inverse_sqrt(D);
    for (int i = 0; i < kTile; i += kLanes) {
        int seen = diagonal ? i + kLanes : kTile;                 // keys that some of these 16 queries see
        auto store_weights = [&](int j, vec first, vec second) {  // the weights of keys j and j+1
            if constexpr (std::is_same_v<Word, float>) {
                store(weights + j * kTile + i, first);
                store(weights + (j + 1) * kTile + i, second);
            } else {
                store_pairs(weights + j / 2 * kTile + i, first, second);
            }
        };
        vec sum = load(running_sum + i);
        if constexpr (A::kOnline) {
            vec old_max = load(running_max + i), new_max = old_max;
            for (int j = 0; j < seen; j++) {
                vec x = load(s + j * kTile + i) * qk_to_score;
                if (fades) x += fades(j, i);
                if (diagonal) x = lane_index() + i >= j ? x : broadcast(-INFINITY);
                store(s + j * kTile + i, x);
                new_max = max(new_max, x);
            }
            vec rescale = exp(old_max - new_max);
            sum *= rescale;
            for (int j = 0; j < seen; j += 2) {
                vec first = exp(load(s + j * kTile + i) - new_max);
                vec second = exp(load(s + (j + 1) * kTile + i) - new_max);
                store_weights(j, first, second);
                sum += first + second;
            }
            store(running_max + i, new_max);
            for (int r = 0; j0 > 0 && r < kLanes; r++) {
                float* row = o + (i + r) * Dp;
                for (int d = 0; d < Dp; d += kLanes) store(row + d, load(row + d) * rescale[r]);
            }
        } else {
            auto weight = [&](int j) {
                vec x = activation_argument<A>(load(s + j * kTile + i), qk_to_score);
                vec a = A::value(x, keys_seen(i0 + i), VectorMath());
                if (diagonal) a = lane_index() + i >= j ? a : vec{};
                if (fades) a *= fades(j, i);
                if (has_row_sum) sum += abs(a);
                return a;
            };
            for (int j = 0; j < seen; j += 2) {
                vec first = weight(j), second = weight(j + 1);
                store_weights(j, first, second);
            }
        }
        store(running_sum + i, sum);
    }
}

// The forward pass of 64 queries of one head. The caller calls begin(), then add_keys() for each tile of keys
// that they see, then finish(). Pointers to rows of qkv and of out begin at this head's channels.
template <class A, class Real>
struct ForwardTile {
    using Word = TileWord<Real>;
    static constexpr int N = kDepth<Word>;

    const HeadFactors& factors;
    bool has_row_sum;
    int T, C, D, Dp;
    int i0 = 0, queries = 0;
    Word* qt;            // (Dp/N,64)
    Word* k;             // (64,Dp/N)
    Word* v_rows;        // (64,Dp/N)
    Word* v;             // (64/N,Dp)
    float* s;            // (64 keys,64 queries)
    Word* a;             // (64/N keys,64 queries)
    float* o;            // (64,Dp): the output without the row factors
    float* running_max;  // (64): the largest score so far, for softmax
    float* running_sum;  // (64): of exp(x) for softmax, of |weights| for `sum`
    float* fades;        // (64,64): memory for fades_of_keys()

    ForwardTile(const HeadFactors& factors, bool has_row_sum, int T, int C, int D,
                float* scratch)  // (forward_scratch(D))
        : factors(factors), has_row_sum(has_row_sum), T(T), C(C), D(D), Dp(padded(D)) {
        auto words = [&](int n) { return (Word*)std::exchange(scratch, scratch + n); };
        qt = words(kTile * Dp / N);
        k = words(kTile * Dp / N);
        v_rows = words(kTile * Dp / N);
        v = N > 1 ? words(kTile * Dp / N) : v_rows;
        s = (float*)words(kTile * kTile);
        a = N > 1 ? words(kTile * kTile / N) : (Word*)s;
        o = (float*)words(kTile * Dp);
        running_max = (float*)words(kTile);
        running_sum = (float*)words(kTile);
        fades = (float*)words(kTile * kTile);
    }

    // Queries i0 .. i0+63.
    void begin(const Real* qkv /*(T,3C)*/, int first_query) {
        i0 = first_query;
        queries = std::min(kTile, T - i0);
        load_tile_transposed(qt, qkv + (size_t)i0 * 3 * C, 3 * C, queries, D);
        std::fill(o, o + kTile * Dp, 0.0f);
        std::fill(running_max, running_max + kTile, -INFINITY);
        std::fill(running_sum, running_sum + kTile, 0.0f);
    }

    // Keys j0 .. j0+63, j0 <= i0.
    void add_keys(const Real* qkv /*(T,3C)*/, int j0) {
        bool diagonal = j0 == i0;
        const Real* kv = qkv + (size_t)j0 * 3 * C + C;
        load_tile(k, kv, 3 * C, std::min(kTile, T - j0), D);
        load_tile(v_rows, kv + C, 3 * C, std::min(kTile, T - j0), D);
        if constexpr (N > 1) pair_rows(v, v_rows, D);
        // On the diagonal, queries before a key do not see it.
        for (int r = 0; r < kTile; r += kTileRows) {  // keys
            int first = diagonal ? r / kLanes * kLanes : 0;
            tile_product<false, false>(s + r * kTile + first, kTile, k + r * Dp / N, Dp / N, qt + first,
                                       kTile, kTile - first, Dp / N);
        }
        scores_to_weights<A>(a, s, running_max, running_sum, o, factors.fades_of_keys(i0, j0, fades),
                             has_row_sum, i0, j0, D);
        for (int r = 0; r < kTile; r += kTileRows)  // queries
            tile_product<true, true>(o + r * Dp, Dp, a + r, kTile, v, Dp, Dp,
                                     (diagonal ? r + kTileRows : kTile) / N);
    }

    // exact (T,C) gets the output in float, and may be null.
    void finish(Real* out /*(T,C)*/, float* stats /*(T)*/, float* exact) {
        for (int r = 0; r < queries; r++) {
            float factor = factors.row_factor[i0 + r];
            if (A::kOnline) {
                stats[i0 + r] = running_max[r] + std::log(running_sum[r]);
                factor = 1.0f / running_sum[r];
            } else if (has_row_sum) {
                stats[i0 + r] = running_sum[r] * factor + (float)kRowSumEps;
                factor /= stats[i0 + r];
            }
            Real* row = out + (size_t)(i0 + r) * C;
            float* copy = exact ? exact + (size_t)(i0 + r) * C : nullptr;
            for_vectors(D, [&](int d, int n) {
                vec value = load(o + r * Dp + d, n) * factor;
                store(row + d, value, n);
                if (exact) store(copy + d, value, n);
            });
        }
    }
};

inline size_t forward_scratch(int D) {  // floats
    return (size_t)kTile * (5 * padded(D) + 3 * kTile + 2);
}

template <class Real>
inline void attention_forward(Real* out,        // (B,T,C)
                              float* stats,     // (stats_size)
                              const Real* qkv,  // (B,T,3C)
                              Decay decay, const AttentionConfig& config, int B, int T, int H, int D) {
    int C = H * D, tiles = (T + kTile - 1) / kTile;
    LayerFactors factors(config, decay, B, T, H, D);
    float* exact = keeps_exact_output<Real>(config) ? stats + (size_t)B * H * T : nullptr;
    with_activation(config.kind, [&]<class A>(A) {
#pragma omp parallel
        {
            AlignedArray scratch(forward_scratch(D));
            // Later tiles see more keys. They come first, so that the threads end together.
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < B * H * tiles; task++) {
                int tile = tiles - 1 - task / (B * H), bh = task % (B * H);
                const Real* head = qkv + head_offset(bh, 3 * C, T, H, D);
                ForwardTile<A, Real> queries(factors[bh], config.has_row_sum(), T, C, D, scratch.get());
                queries.begin(head, tile * kTile);
                for (int j0 = 0; j0 <= tile * kTile; j0 += kTile) queries.add_keys(head, j0);
                size_t row = head_offset(bh, C, T, H, D);
                queries.finish(out + row, stats ? stats + (size_t)bh * T : nullptr,
                               exact ? exact + row : nullptr);
            }
        }
    });
}

// Computes the weights A without c_i, and the gradient dX of the activation's argument, which is q . k for a
// power and otherwise the score. It reads q . k from s and c_i dO V^T from da. On the diagonal it writes only
// the columns that add_queries() computed.
//   Returns the gradient of log gamma if `wants_decay` is set. For softmax it is sum_ij (i-j) dX_ij.
//   Otherwise it is sum_ij (i-j-e_i) A_ij dA_ij with the neutral distance e_i (HeadFactors). For `sum`, dA_ij
//   is reduced by sign(x_ij^p) dO_i . O_i here, because gamma changes the normaliser, too. With a gate, the
//   factors of (i-j) are added to gate_sums (null: not wanted) instead.
template <class A, class Word>
inline double weights_and_score_gradients(Word* a_pairs,         // (64 queries,64) in words of two; may be s
                                          Word* dx_pairs,        // (64 queries,64) in words of two; may be da
                                          Word* dx_rows,         // (64,64) in words; may be da
                                          const float* s,        // (64 queries,64 keys)
                                          const float* da,       // (64 queries,64 keys)
                                          const float* stats,    // (64): softmax's log-sum-exp
                                          const float* row_dot,  // (64): dO_i . O_i, for `sum` times c_i
                                          const HeadFactors& factors, const TileFades& fades,
                                          bool has_row_sum, bool wants_decay, GateSums* gate_sums,
                                          int queries, int i0, int j0, int D) {
    bool diagonal = i0 == j0;
    float qk_to_score = inverse_sqrt(D);
    vec dlog_gamma = {};  // in each lane: the sum over its keys
    // A and dX of query i and 16 keys from j on.
    auto compute = [&](int i, int j, vec& a, vec& dx) {
        vec x = load(s + i * kTile + j), d = load(da + i * kTile + j);
        if constexpr (A::kOnline) {
            x *= qk_to_score;
            if (fades) x += fades(i, j);
            a = exp(x - stats[i]);
            dx = a * (d - row_dot[i]);
        } else {
            x = activation_argument<A>(x, qk_to_score);
            vec value = A::value(x, broadcast((float)(i0 + i + 1)), VectorMath());
            vec slope = A::slope(x, value, VectorMath());
            vec fade = fades ? fades(i, j) : broadcast(1.0f);
            a = value * fade;
            if (has_row_sum) {  // the normaliser sums |x^p|, whose derivative has the sign of x^p
                vec dot = broadcast(row_dot[i]);
                if (A::kPower % 2 == 0) d -= dot;
                if (A::kPower % 2 == 1) d -= x > 0.0f ? dot : x < 0.0f ? -dot : vec{};
            }
            dx = d * fade * slope;
        }
        if (diagonal) {
            vint visible = lane_index() + j <= i;
            a = visible ? a : vec{};
            dx = visible ? dx : vec{};
        }
        if (gate_sums) {
            gate_sums->add(i, j, A::kOnline ? dx : a * d, diagonal);
        } else if (wants_decay && i < queries) {
            int distance = i0 + i - j0 - j;
            float neutral = factors.neutral_distance.empty() ? 0.0f : factors.neutral_distance[i0 + i];
            dlog_gamma +=
                (A::kOnline ? dx : a * d) * (__builtin_convertvector(distance - lane_index(), vec) - neutral);
        }
    };
    for (int i = 0; i < kTile; i += 2) {
        int seen = diagonal ? i / kTileRows * kTileRows + kTileRows : kTile;
        for (int j = 0; j < seen; j += kLanes) {
            vec a[2], dx[2];
            compute(i, j, a[0], dx[0]);
            compute(i + 1, j, a[1], dx[1]);
            if constexpr (std::is_same_v<Word, float>) {
                for (int r = 0; r < 2; r++) store(a_pairs + (i + r) * kTile + j, a[r]);
                for (int r = 0; r < 2; r++) store(dx_rows + (i + r) * kTile + j, dx[r]);
            } else {
                store_pairs(a_pairs + i / 2 * kTile + j, a[0], a[1]);
                store_pairs(dx_pairs + i / 2 * kTile + j, dx[0], dx[1]);
                for (int r = 0; r < 2; r++) store((bf16*)dx_rows + (i + r) * kTile + j, dx[r]);
            }
        }
    }
    double total = 0;
    for (int lane = 0; lane < kLanes; lane++) total += dlog_gamma[lane];
    return total;
}

// The backward pass of the pairs of one head whose queries are in the tiles first .. end-1. The caller calls
// load_queries() once. Then for each tile of keys it calls begin_keys(), add_queries() for each of these
// tiles that sees the keys, and write_keys(). Pointers to rows of qkv, dout and dqkv begin at this head's
// channels.
template <class A, class Real>
struct BackwardTiles {
    using Word = TileWord<Real>;
    static constexpr int N = kDepth<Word>;

    const HeadFactors& factors;
    bool has_row_sum, wants_decay;
    double* gate_sums;  // (2,T) +=: for HeadFactors::gate_gradient(), or null: not wanted
    int first, end, T, C, D, Dp;
    size_t tile_words;          // the size of a tile with D channels
    const float* stats;         // (T): softmax's log-sum-exp
    const float* row_dot;       // (T): dO_i . O_i, or null if nothing needs it
    int j0 = 0, keys = 0;       // the first key of the current tile, and the number of its keys
    double dlog_gamma = 0;      // the gradient of log gamma so far
    Word *kt, *vt;              // (Dp/N,64)
    Word *k_rows, *k;           // (64,Dp/N), (64/N,Dp)
    float *dk, *dv;             // (64,Dp)
    float *s, *da;              // (64 queries,64 keys)
    float* fades;               // (64,64): memory for fades_of_queries()
    Word *a, *dx, *dx_rows;     // two of (64/N queries,64 keys), and one of (64 queries,64/N keys)
    Word *q_rows, *d_o_rows;    // (end-first,64,Dp/N): q and c_i dO
    Word *q_pairs, *d_o_pairs;  // (end-first,64/N,Dp)

    BackwardTiles(const HeadFactors& factors, bool has_row_sum, bool wants_decay, double* gate_sums,
                  int first, int end, int T, int C, int D, const float* stats, const float* row_dot,
                  float* scratch)  // (backward_scratch(end-first,D))
        : factors(factors),
          has_row_sum(has_row_sum),
          wants_decay(wants_decay),
          gate_sums(gate_sums),
          first(first),
          end(end),
          T(T),
          C(C),
          D(D),
          Dp(padded(D)),
          tile_words((size_t)kTile * Dp / N),
          stats(stats),
          row_dot(row_dot) {
        auto words = [&](size_t n) { return (Word*)std::exchange(scratch, scratch + n); };
        kt = words(tile_words);
        vt = words(tile_words);
        k_rows = words(tile_words);
        k = N > 1 ? words(tile_words) : k_rows;
        dk = (float*)words(kTile * Dp);
        dv = (float*)words(kTile * Dp);
        s = (float*)words(kTile * kTile);
        da = (float*)words(kTile * kTile);
        fades = (float*)words(kTile * kTile);
        a = N > 1 ? words(kTile * kTile / N) : (Word*)s;
        dx = N > 1 ? words(kTile * kTile / N) : (Word*)da;
        dx_rows = N > 1 ? words(kTile * kTile / N) : (Word*)da;
        q_rows = words(tile_words * (end - first));
        d_o_rows = words(tile_words * (end - first));
        q_pairs = N > 1 ? words(tile_words * (end - first)) : q_rows;
        d_o_pairs = N > 1 ? words(tile_words * (end - first)) : d_o_rows;
    }

    void load_queries(const Real* qkv /*(T,3C)*/, const Real* dout /*(T,C)*/,
                      const float* row_factor /*(T)*/) {
        for (int tile = first; tile < end; tile++) {
            int i0 = tile * kTile, queries = std::min(kTile, T - i0);
            size_t at = tile_words * (tile - first);
            load_tile(q_rows + at, qkv + (size_t)i0 * 3 * C, 3 * C, queries, D);
            load_tile(d_o_rows + at, dout + (size_t)i0 * C, C, queries, D,
                      A::kOnline ? nullptr : row_factor + i0);
            if constexpr (N > 1) {
                pair_rows(q_pairs + at, q_rows + at, D);
                pair_rows(d_o_pairs + at, d_o_rows + at, D);
            }
        }
    }

    void begin_keys(const Real* qkv /*(T,3C)*/, int first_key) {
        j0 = first_key;
        keys = std::min(kTile, T - j0);
        const Real* kv = qkv + (size_t)j0 * 3 * C + C;
        load_tile_transposed(kt, kv, 3 * C, keys, D);
        load_tile_transposed(vt, kv + C, 3 * C, keys, D);
        load_tile(k_rows, kv, 3 * C, keys, D);
        if constexpr (N > 1) pair_rows(k, k_rows, D);
        std::fill(dk, dk + kTile * Dp, 0.0f);
        std::fill(dv, dv + kTile * Dp, 0.0f);
    }

    // Queries i0 .. i0+63, i0 >= j0.
    void add_queries(float* dq /*(64,Dp) +=*/, int i0) {
        bool diagonal = i0 == j0;
        int queries = std::min(kTile, T - i0);
        size_t at = tile_words * (i0 / kTile - first);
        for (int r = 0; r < kTile; r += kTileRows) {  // queries, which see no later keys on the diagonal
            int seen = diagonal ? padded(r + kTileRows) : kTile;
            tile_product<false, false>(s + r * kTile, kTile, q_rows + at + r * Dp / N, Dp / N, kt, kTile,
                                       seen, Dp / N);
            tile_product<false, false>(da + r * kTile, kTile, d_o_rows + at + r * Dp / N, Dp / N, vt, kTile,
                                       seen, Dp / N);
        }
        // Padded queries have q = 0 and dO = 0. Their lse is set, because softmax subtracts it.
        float lse[kTile] = {}, dot[kTile] = {};
        if (A::kOnline) std::copy_n(stats + i0, queries, lse);
        if (row_dot) std::copy_n(row_dot + i0, queries, dot);
        std::optional<GateSums> sums;
        if (gate_sums) sums.emplace();
        dlog_gamma += weights_and_score_gradients<A>(
            a, dx, dx_rows, s, da, lse, dot, factors, factors.fades_of_queries(i0, j0, fades), has_row_sum,
            wants_decay, sums ? &*sums : nullptr, queries, i0, j0, D);
        if (sums) sums->add_to(gate_sums, i0, j0, T);
        for (int r = 0; r < kTile; r += kTileRows) {  // keys
            int from = (diagonal ? r : 0) / N;        // the word of the first query that sees them
            tile_product<true, true>(dv + r * Dp, Dp, a + from * kTile + r, kTile, d_o_pairs + at + from * Dp,
                                     Dp, Dp, kTile / N - from);
            tile_product<true, true>(dk + r * Dp, Dp, dx + from * kTile + r, kTile, q_pairs + at + from * Dp,
                                     Dp, Dp, kTile / N - from);
        }
        for (int r = 0; r < kTile; r += kTileRows)  // queries
            tile_product<false, true>(dq + r * Dp, Dp, dx_rows + r * kTile / N, kTile / N, k, Dp, Dp,
                                      (diagonal ? r + kTileRows : kTile) / N);
    }

    void write_keys(Real* dqkv /*(T,3C)*/) {
        float factor = A::kPower > 0 ? 1.0f : inverse_sqrt(D);
        for (int r = 0; r < keys; r++) {
            Real* row = dqkv + (size_t)(j0 + r) * 3 * C;
            for_vectors(D, [&](int d, int n) {
                store(row + C + d, load(dk + r * Dp + d, n) * factor, n);
                store(row + 2 * C + d, load(dv + r * Dp + d, n), n);
            });
        }
    }
};

inline size_t backward_scratch(int tiles, int D) {  // floats
    return (size_t)kTile * ((6 + 2 * tiles) * padded(D) + 9 * kTile / 2);
}

// dot = dout . out for each row and head. If there are row factors, dot is their product with dout, rounded
// as in the tiles, times out. With the scale `sum` the two must not differ even by a rounding, because dot is
// subtracted from a number that is nearly equal.
template <class Real, class Out>
inline void head_dots(float* dot,               // (B,H,T)
                      const Real* dout,         // (B,T,C)
                      const Out* out,           // (B,T,C)
                      const float* row_factor,  // (B,H,T), or null: 1
                      int B, int T, int H, int D) {
    using Factor = std::conditional_t<std::is_same_v<TileWord<Real>, float>, float, bf16>;
#pragma omp parallel for collapse(2) schedule(static)
    for (int bh = 0; bh < B * H; bh++)
        for (int t = 0; t < T; t++) {
            size_t at = head_offset(bh, H * D, T, H, D) + (size_t)t * H * D;
            float total = 0, factor = row_factor ? row_factor[(size_t)bh * T + t] : 1.0f;
#pragma omp simd reduction(+ : total)
            for (int d = 0; d < D; d++)
                total += (float)Factor((float)dout[at + d] * factor) * (float)out[at + d];
            dot[(size_t)bh * T + t] = total;
        }
}

// What the backward pass needs for each row of A in addition to the scores.
class RowTerms {
  public:
    template <class Real>
    RowTerms(const Real* dout, const Real* out, const float* stats, const AttentionConfig& config, int B,
             int T, int H, int D)
        : T_(T) {
        size_t n = (size_t)B * H * T;
        if (config.has_row_sum()) {
            factor_.resize(n);
            for (size_t i = 0; i < n; i++) factor_[i] = score_factor(config.power(), D) / stats[i];
        }
        if (!config.softmax() && !config.has_row_sum()) return;
        dot_.resize(n);
        const float* factors = factor_.empty() ? nullptr : factor_.data();
        if (keeps_exact_output<Real>(config)) {
            head_dots(dot_.data(), dout, stats + n, factors, B, T, H, D);
        } else {
            head_dots(dot_.data(), dout, out, factors, B, T, H, D);
        }
    }
    // dO_i . O_i (T), times the row factor for `sum`; null if this kind of attention does not need it.
    const float* dot(int bh) const { return dot_.empty() ? nullptr : dot_.data() + (size_t)bh * T_; }
    // c_i / sqrt(D)^p (T).
    const float* factor(int bh, const HeadFactors& factors) const {
        return factor_.empty() ? factors.row_factor.data() : factor_.data() + (size_t)bh * T_;
    }

  private:
    int T_;
    std::vector<float> dot_;     // (B,H,T), or empty
    std::vector<float> factor_;  // (B,H,T) for `sum`, otherwise empty
};

// Cuts the key tiles of a head into `parts` of about equal work and returns their borders (parts+1). Key tile
// j has work with the tiles - j tiles of queries that see it.
inline std::vector<int> balanced_cuts(int tiles, int parts) {
    std::vector<int> cuts = {0};
    double all = 0.5 * tiles * (tiles + 1), done = 0;
    for (int tile = 0; tile < tiles; tile++) {
        done += tiles - tile;
        if (done >= all * cuts.size() / parts) cuts.push_back(tile + 1);
    }
    return cuts;
}

constexpr int kMaxParts = 8;  // parts of a head, because each has a dq in memory

template <class Real>
inline void attention_backward(Real* dqkv,          // (B,T,3C)
                               float* ddecay,       // as in DecayGradient
                               const Real* dout,    // (B,T,C)
                               const Real* out,     // (B,T,C)
                               const float* stats,  // (stats_size)
                               const Real* qkv,     // (B,T,3C)
                               Decay decay, const AttentionConfig& config, int B, int T, int H, int D) {
    int C = H * D, tiles = (T + kTile - 1) / kTile, Dp = padded(D);
    LayerFactors factors(config, decay, B, T, H, D);
    RowTerms rows(dout, out, stats, config, B, T, H, D);
    // A head has several parts if there are fewer heads than threads. Then each part has a dq of its own, and
    // these are added up at the end.
    int wanted = (4 * omp_get_max_threads() + B * H - 1) / (B * H);
    std::vector<int> cuts =
        balanced_cuts(tiles, B * H >= omp_get_max_threads() ? 1 : std::min({tiles, wanted, kMaxParts}));
    int parts = (int)cuts.size() - 1;
    size_t dq_size = (size_t)tiles * kTile * Dp;
    AlignedArray part_dq(parts > 1 ? B * H * parts * dq_size : 0);  // (B,H,parts,tiles*64,Dp)
    float dq_factor = config.polynomial() ? 1.0f : inverse_sqrt(D);
    auto write_dq = [&](int bh, int t, const float* dq) {  // (Dp)
        Real* row = dqkv + head_offset(bh, 3 * C, T, H, D) + (size_t)t * 3 * C;
        for_vectors(D, [&](int d, int n) { store(row + d, load(dq + d, n) * dq_factor, n); });
    };
    DecayGradient decay_gradient(ddecay, decay, B, T, H, parts, parts);
    with_activation(config.kind, [&]<class A>(A) {
#pragma omp parallel
        {
            AlignedArray scratch(backward_scratch(tiles, D)), dq_scratch(parts > 1 ? 0 : dq_size);
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < B * H * parts; task++) {
                int part = task / (B * H), bh = task % (B * H);
                size_t head = head_offset(bh, 3 * C, T, H, D);
                float* dq =
                    parts > 1 ? part_dq.get() + ((size_t)bh * parts + part) * dq_size : dq_scratch.get();
                size_t skipped = (size_t)cuts[part] * kTile * Dp;  // queries that see no key of this part
                std::fill(dq + skipped, dq + dq_size, 0.0f);
                BackwardTiles<A, Real> work(factors[bh], config.has_row_sum(), decay_gradient.wants_gamma(),
                                            decay_gradient.gate_sums(bh, part), cuts[part], tiles, T, C, D,
                                            stats ? stats + (size_t)bh * T : nullptr, rows.dot(bh),
                                            scratch.get());
                work.load_queries(qkv + head, dout + head_offset(bh, C, T, H, D),
                                  rows.factor(bh, factors[bh]));
                for (int j0 = cuts[part] * kTile; j0 < cuts[part + 1] * kTile; j0 += kTile) {
                    work.begin_keys(qkv + head, j0);
                    for (int i0 = j0; i0 < T; i0 += kTile) work.add_queries(dq + (size_t)i0 * Dp, i0);
                    work.write_keys(dqkv + head);
                }
                decay_gradient.dlog_gamma(bh, part) = work.dlog_gamma;
                for (int t = 0; parts == 1 && t < T; t++) write_dq(bh, t, dq + (size_t)t * Dp);
            }
        }
    });
    if (parts > 1) {
#pragma omp parallel for collapse(2) schedule(static)
        for (int bh = 0; bh < B * H; bh++)
            for (int t = 0; t < T; t++) {
                float* dq = part_dq.get() + (size_t)bh * parts * dq_size + (size_t)t * Dp;  // that of part 0
                for (int part = 1; part < parts && cuts[part] * kTile <= t; part++)
                    for (int d = 0; d < Dp; d++) dq[d] += dq[part * dq_size + d];
                write_dq(bh, t, dq);
            }
    }
    decay_gradient.finish(factors);
}

}  // namespace cpu
