// Causal attention, forward and backward, in tiles of 64 queries by 64 keys: no (T,T) matrix is stored, and
// what lies above the diagonal is not computed.
//
//   x_ij = q_i . k_j / sqrt(D),  O = A V,  j <= i
//   softmax: A_ij = exp(x_ij + (i-j) log gamma) / sum_j        (arXiv 1706.03762; tiling: arXiv 2307.08691)
//   poly<p>: A_ij = c_i gamma^(i-j) x_ij^p                     (arXiv 2410.18613; c_i: row_scale())
//   sigmoid: A_ij = gamma^(i-j) sigmoid(x_ij - log(i+1))       (arXiv 2409.04431)
//
// qkv rows are q (H,D), k (H,D), v (H,D). decay holds delta (H) with gamma_h = sigmoid(delta_h), or is null:
// gamma is 1. stats keeps what backward needs of a row (B,H,T): the log-sum-exp for softmax, 1e-6 + sum_j
// gamma^(i-j) |x_ij^p| for the scale `sum`, nothing otherwise; and for `sum` in bf16, where dO . O is a small
// difference that a rounded O would spoil, O itself in float (B,T,C) behind that (stats_size). Results are
// the same bits for the same number of threads.
//
// Tiles hold q . k; a polynomial's 1/sqrt(D)^p goes with c_i. Sums are float32, and so are the scores; with
// bf16 the factors of every product are bf16 (tile.h).
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/tile.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

inline float inverse_sqrt(int D) {
    return 1.0f / sqrtf((float)D);
}

// What a power of q . k is multiplied by to be one of x; 1 for an activation that is no power.
inline float score_factor(int power, int D) {
    return (float)std::pow((double)D, -0.5 * power);
}

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

// What the rows and distances of one head are multiplied by.
class HeadScale {
  public:
    bool decays;
    std::vector<float> c;  // (T): c_i / sqrt(D)^p of a polynomial; without c_i for `sum`; otherwise 1
    // (T) for `row` with decay, empty otherwise: e_i = -d log c_i / d log gamma. At distance e_i the change
    // of gamma^(i-j) and that of c_i cancel, so a term there adds nothing to the gradient of log gamma.
    std::vector<float> neutral_distance;

    HeadScale(const AttentionConfig& config, const float* decay, int h, int T, int D)
        : decays(decay != nullptr), c(T, 1.0f) {
        double log_g = decay ? log_gamma(decay[h]) : 0;
        double to_power = std::pow((double)D, -0.5 * config.power());
        for (int i = 0; i < T; i++) c[i] = (float)(row_scale(config, i, log_g, D) * to_power);
        if (!decays) return;
        if (config.polynomial() && config.scale == ScaleKind::row)
            for (double e : row_scale_log_derivatives(T, log_g)) neutral_distance.push_back((float)e);
        size_ = T + 2 * kTile;
        rising_ = AlignedArray(size_);
        falling_ = AlignedArray(size_);
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
    AlignedArray rising_, falling_;
};

// One for all heads where there is no decay, one a head otherwise.
inline std::vector<HeadScale> head_scales(const AttentionConfig& config, const float* decay, int T, int H,
                                          int D) {
    std::vector<HeadScale> scales;
    for (int h = 0; h < (decay ? H : 1); h++) scales.emplace_back(config, decay, h, T, D);
    return scales;
}

// What an activation takes: q . k for a power, otherwise the score.
template <class A>
inline vec activation_argument(vec qk, float to_x) {
    return A::kPower > 0 ? qk : qk * to_x;
}

// The keys that the queries i, i+1, ..., i+15 see.
inline vec keys_seen(int i) {
    return __builtin_convertvector(lane_index() + (i + 1), vec);
}

// The scores of one tile of keys become weights, not yet scaled by rows. A row of s is a key, its lanes are
// queries, so that the running sums of the rows of A go down the columns, 16 rows of A at a time.
//   i0, j0: the first query and key. Softmax: o is rescaled where the maximum grows.
template <class A, class Word>
inline void scores_to_weights(Word* weights,   // (64 keys,64) in words; may be s
                              float* s,        // (64 keys,64)
                              float* largest,  // (64)
                              float* total,    // (64)
                              float* o,        // (64,Dp)
                              const HeadScale& scale, bool row_sum, int i0, int j0, int D) {
    bool diagonal = i0 == j0;
    int Dp = padded(D);
    float to_x = inverse_sqrt(D);
    for (int i = 0; i < kTile; i += kLanes) {
        int seen = diagonal ? i + kLanes : kTile;       // keys that some of these 16 queries see
        auto put = [&](int j, vec first, vec second) {  // the weights of keys j and j+1
            if constexpr (std::is_same_v<Word, float>) {
                store(weights + j * kTile + i, first);
                store(weights + (j + 1) * kTile + i, second);
            } else {
                store_pairs(weights + j / 2 * kTile + i, first, second);
            }
        };
        vec sum = load(total + i);
        if constexpr (A::kOnline) {
            vec before = load(largest + i), most = before;
            for (int j = 0; j < seen; j++) {
                vec x = load(s + j * kTile + i) * to_x;
                if (scale.decays) x += scale.rising(i0 + i - j0 - j);
                if (diagonal) x = lane_index() + i >= j ? x : broadcast(-INFINITY);
                store(s + j * kTile + i, x);
                most = max(most, x);
            }
            vec rescale = exp(before - most);
            sum *= rescale;
            for (int j = 0; j < seen; j += 2) {
                vec first = exp(load(s + j * kTile + i) - most);
                vec second = exp(load(s + (j + 1) * kTile + i) - most);
                put(j, first, second);
                sum += first + second;
            }
            store(largest + i, most);
            for (int r = 0; j0 > 0 && r < kLanes; r++) {
                float* row = o + (i + r) * Dp;
                for (int d = 0; d < Dp; d += kLanes) store(row + d, load(row + d) * rescale[r]);
            }
        } else {
            auto weight = [&](int j) {
                vec x = activation_argument<A>(load(s + j * kTile + i), to_x);
                vec a = A::value(x, keys_seen(i0 + i), VectorMath());
                if (diagonal) a = lane_index() + i >= j ? a : vec{};
                if (scale.decays) a *= scale.rising(i0 + i - j0 - j);
                if (row_sum) sum += abs(a);
                return a;
            };
            for (int j = 0; j < seen; j += 2) {
                vec first = weight(j), second = weight(j + 1);
                put(j, first, second);
            }
        }
        store(total + i, sum);
    }
}

// 64 queries of one head: begin(), add_keys() for the tiles of keys that they see, finish(). Pointers to rows
// of qkv and of out begin at this head's channels.
template <class A, class Real>
struct ForwardTile {
    using Word = TileWord<Real>;
    static constexpr int N = kDepth<Word>;

    const HeadScale& scale;
    bool row_sum;
    int T, C, D, Dp;
    int i0 = 0, queries = 0;
    Word* qt;        // (Dp/N,64)
    Word* k;         // (64,Dp/N)
    Word* v_rows;    // (64,Dp/N)
    Word* v;         // (64/N,Dp)
    float* s;        // (64 keys,64 queries)
    Word* a;         // (64/N keys,64 queries)
    float* o;        // (64,Dp): without the rows' factors
    float* largest;  // (64): softmax's running maximum
    float* total;    // (64): the running sum

    ForwardTile(const HeadScale& scale, bool row_sum, int T, int C, int D,
                float* scratch)  // (forward_scratch(D))
        : scale(scale), row_sum(row_sum), T(T), C(C), D(D), Dp(padded(D)) {
        auto words = [&](int n) { return (Word*)std::exchange(scratch, scratch + n); };
        qt = words(kTile * Dp / N);
        k = words(kTile * Dp / N);
        v_rows = words(kTile * Dp / N);
        v = N > 1 ? words(kTile * Dp / N) : v_rows;
        s = (float*)words(kTile * kTile);
        a = N > 1 ? words(kTile * kTile / N) : (Word*)s;
        o = (float*)words(kTile * Dp);
        largest = (float*)words(kTile);
        total = (float*)words(kTile);
    }

    // Queries i0 .. i0+63.
    void begin(const Real* qkv /*(T,3C)*/, int first_query) {
        i0 = first_query;
        queries = std::min(kTile, T - i0);
        load_tile_transposed(qt, qkv + (size_t)i0 * 3 * C, 3 * C, queries, D);
        std::fill(o, o + kTile * Dp, 0.0f);
        std::fill(largest, largest + kTile, -INFINITY);
        std::fill(total, total + kTile, 0.0f);
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
        scores_to_weights<A>(a, s, largest, total, o, scale, row_sum, i0, j0, D);
        for (int r = 0; r < kTile; r += kTileRows)  // queries
            tile_product<true, true>(o + r * Dp, Dp, a + r, kTile, v, Dp, Dp,
                                     (diagonal ? r + kTileRows : kTile) / N);
    }

    // exact (T,C): out once more, in float; may be null.
    void finish(Real* out /*(T,C)*/, float* stats /*(T)*/, float* exact) {
        for (int r = 0; r < queries; r++) {
            float factor = scale.c[i0 + r];
            if (A::kOnline) {
                stats[i0 + r] = largest[r] + std::log(total[r]);
                factor = 1.0f / total[r];
            } else if (row_sum) {
                stats[i0 + r] = total[r] * factor + (float)kRowSumEps;
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
    return (size_t)kTile * (5 * padded(D) + 2 * kTile + 2);
}

template <class Real>
inline void attention_forward(Real* out,           // (B,T,C)
                              float* stats,        // (stats_size)
                              const Real* qkv,     // (B,T,3C)
                              const float* decay,  // (H), or null
                              const AttentionConfig& config, int B, int T, int H, int D) {
    int C = H * D, tiles = (T + kTile - 1) / kTile;
    std::vector<HeadScale> scales = head_scales(config, decay, T, H, D);
    float* exact = keeps_exact_output<Real>(config) ? stats + (size_t)B * H * T : nullptr;
    with_activation(config.kind, [&]<class A>(A) {
#pragma omp parallel
        {
            AlignedArray scratch(forward_scratch(D));
            // Later tiles see more keys: longest first, so that the threads end together.
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < B * H * tiles; task++) {
                int tile = tiles - 1 - task / (B * H), bh = task % (B * H), b = bh / H, h = bh % H;
                const Real* head = qkv + (size_t)b * T * 3 * C + h * D;
                ForwardTile<A, Real> queries(scales[decay ? h : 0], config.has_row_sum(), T, C, D,
                                             scratch.get());
                queries.begin(head, tile * kTile);
                for (int j0 = 0; j0 <= tile * kTile; j0 += kTile) queries.add_keys(head, j0);
                queries.finish(out + (size_t)b * T * C + h * D, stats ? stats + (size_t)bh * T : nullptr,
                               exact ? exact + (size_t)b * T * C + h * D : nullptr);
            }
        }
    });
}

// The weights and the gradient of the scores of one tile. s becomes A without c_i, da = c_i dO V^T becomes
// the gradient of the activation's argument: of q . k for a power, otherwise of the score. On the diagonal
// only the columns that add_queries() computed.
//   Returns the gradient of log gamma where `wants_decay`: sum_ij (i-j) dX_ij for softmax; otherwise
//   sum_ij (i-j-e_i) A_ij dA_ij, with the distance e_i that is neutral (HeadScale) and, for `sum`, dA_ij less
//   sign(x_ij^p) dO_i . O_i, which is what gamma does to the normaliser.
template <class A, class Word>
inline double weights_and_score_gradients(Word* a_pairs,         // (64 queries,64) in words of two; may be s
                                          Word* dx_pairs,        // (64 queries,64) in words of two; may be da
                                          Word* dx_rows,         // (64,64) in words; may be da
                                          const float* s,        // (64 queries,64 keys)
                                          const float* da,       // (64 queries,64 keys)
                                          const float* stats,    // (64): softmax's log-sum-exp
                                          const float* row_dot,  // (64): dO_i . O_i, for `sum` times c_i
                                          const HeadScale& scale, bool row_sum, bool wants_decay, int queries,
                                          int i0, int j0, int D) {
    bool diagonal = i0 == j0;
    float to_x = inverse_sqrt(D);
    vec ddecay = {};
    // A and dX of query i and 16 keys from j on.
    auto compute = [&](int i, int j, vec& a, vec& dx) {
        vec x = load(s + i * kTile + j), d = load(da + i * kTile + j);
        int distance = i0 + i - j0 - j;
        if constexpr (A::kOnline) {
            x *= to_x;
            if (scale.decays) x += scale.falling(distance);
            a = exp(x - stats[i]);
            dx = a * (d - row_dot[i]);
        } else {
            x = activation_argument<A>(x, to_x);
            vec value = A::value(x, broadcast((float)(i0 + i + 1)), VectorMath());
            vec slope = A::slope(x, value, VectorMath());
            vec fade = scale.decays ? scale.falling(distance) : broadcast(1.0f);
            a = value * fade;
            if (row_sum) {  // of |x^p|, whose derivative has the sign of x^p
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
        if (wants_decay && i < queries) {
            float neutral = scale.neutral_distance.empty() ? 0.0f : scale.neutral_distance[i0 + i];
            ddecay +=
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
    for (int lane = 0; lane < kLanes; lane++) total += ddecay[lane];
    return total;
}

// The backward pass of one head, or of its queries in the tiles first .. end-1 and keys among them:
// load_queries() once, then for each tile of keys begin_keys(), add_queries() for the tiles that see them,
// and write_keys(). Pointers to rows of qkv, dout and dqkv begin at this head's channels.
template <class A, class Real>
struct BackwardTiles {
    using Word = TileWord<Real>;
    static constexpr int N = kDepth<Word>;

    const HeadScale& scale;
    bool row_sum, wants_decay;
    int first, end, T, C, D, Dp;
    size_t size;                // of a tile with D channels, in words
    const float* stats;         // (T): softmax's log-sum-exp
    const float* row_dot;       // (T), or null where nothing needs it
    int j0 = 0, keys = 0;       // of the tile of keys
    double dlog_gamma = 0;      // gradient of log gamma
    Word *kt, *vt;              // (Dp/N,64)
    Word *k_rows, *k;           // (64,Dp/N), (64/N,Dp)
    float *dk, *dv;             // (64,Dp)
    float *s, *da;              // (64 queries,64 keys)
    Word *a, *dx, *dx_rows;     // (64/N queries,64 keys) twice, (64 queries,64/N keys)
    Word *q_rows, *d_o_rows;    // (end-first,64,Dp/N): q and c_i dO
    Word *q_pairs, *d_o_pairs;  // (end-first,64/N,Dp)

    BackwardTiles(const HeadScale& scale, bool row_sum, bool wants_decay, int first, int end, int T, int C,
                  int D, const float* stats, const float* row_dot,
                  float* scratch)  // (backward_scratch(end-first,D))
        : scale(scale),
          row_sum(row_sum),
          wants_decay(wants_decay),
          first(first),
          end(end),
          T(T),
          C(C),
          D(D),
          Dp(padded(D)),
          size((size_t)kTile * Dp / N),
          stats(stats),
          row_dot(row_dot) {
        auto words = [&](size_t n) { return (Word*)std::exchange(scratch, scratch + n); };
        kt = words(size);
        vt = words(size);
        k_rows = words(size);
        k = N > 1 ? words(size) : k_rows;
        dk = (float*)words(kTile * Dp);
        dv = (float*)words(kTile * Dp);
        s = (float*)words(kTile * kTile);
        da = (float*)words(kTile * kTile);
        a = N > 1 ? words(kTile * kTile / N) : (Word*)s;
        dx = N > 1 ? words(kTile * kTile / N) : (Word*)da;
        dx_rows = N > 1 ? words(kTile * kTile / N) : (Word*)da;
        q_rows = words(size * (end - first));
        d_o_rows = words(size * (end - first));
        q_pairs = N > 1 ? words(size * (end - first)) : q_rows;
        d_o_pairs = N > 1 ? words(size * (end - first)) : d_o_rows;
    }

    // row_factor (T): c_i / sqrt(D)^p.
    void load_queries(const Real* qkv /*(T,3C)*/, const Real* dout /*(T,C)*/, const float* row_factor) {
        for (int tile = first; tile < end; tile++) {
            int i0 = tile * kTile, queries = std::min(kTile, T - i0);
            size_t at = size * (tile - first);
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
        size_t at = size * (i0 / kTile - first);
        for (int r = 0; r < kTile; r += kTileRows) {  // queries; on the diagonal they see no later keys
            int seen = diagonal ? padded(r + kTileRows) : kTile;
            tile_product<false, false>(s + r * kTile, kTile, q_rows + at + r * Dp / N, Dp / N, kt, kTile,
                                       seen, Dp / N);
            tile_product<false, false>(da + r * kTile, kTile, d_o_rows + at + r * Dp / N, Dp / N, vt, kTile,
                                       seen, Dp / N);
        }
        // Padded queries have q = 0 and dO = 0; only softmax's exp(0 - lse) needs a value to subtract.
        float lse[kTile] = {}, dot[kTile] = {};
        if (A::kOnline) std::copy_n(stats + i0, queries, lse);
        if (row_dot) std::copy_n(row_dot + i0, queries, dot);
        dlog_gamma += weights_and_score_gradients<A>(a, dx, dx_rows, s, da, lse, dot, scale, row_sum,
                                                     wants_decay, queries, i0, j0, D);
        for (int r = 0; r < kTile; r += kTileRows) {  // keys
            int from = (diagonal ? r : 0) / N;        // the first query that sees them, in words
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
    return (size_t)kTile * ((6 + 2 * tiles) * padded(D) + 7 * kTile / 2);
}

// dot = dout . out, a head: softmax's and sum's derivatives of the normaliser. With factors, of factor dout
// as the tiles have it: for `sum` the two must not differ even by a rounding.
template <class Real, class Out>
inline void head_dots(float* dot,           // (B,H,T)
                      const Real* dout,     // (B,T,C)
                      const Out* out,       // (B,T,C)
                      const float* factor,  // (B,H,T), or null: 1
                      int B, int T, int H, int D) {
    using Factor = std::conditional_t<std::is_same_v<TileWord<Real>, float>, float, bf16>;
#pragma omp parallel for collapse(2) schedule(static)
    for (int bh = 0; bh < B * H; bh++)
        for (int t = 0; t < T; t++) {
            size_t at = ((size_t)(bh / H) * T + t) * H * D + (size_t)(bh % H) * D;
            float total = 0, scale = factor ? factor[(size_t)bh * T + t] : 1.0f;
#pragma omp simd reduction(+ : total)
            for (int d = 0; d < D; d++)
                total += (float)Factor((float)dout[at + d] * scale) * (float)out[at + d];
            dot[(size_t)bh * T + t] = total;
        }
}

// What the backward pass needs of a row of A, beside the scores.
struct RowTerms {
    int T;
    std::vector<float> dot;  // (B,H,T): dO_i . O_i, for `sum` times its factor; empty where nothing needs it
    std::vector<float> factor;  // (B,H,T): c_i / sqrt(D)^p of `sum`; empty otherwise

    template <class Real>
    RowTerms(const Real* dout, const Real* out, const float* stats, const AttentionConfig& config, int B,
             int T, int H, int D)
        : T(T) {
        size_t n = (size_t)B * H * T;
        if (config.has_row_sum()) {
            factor.resize(n);
            for (size_t i = 0; i < n; i++) factor[i] = score_factor(config.power(), D) / stats[i];
        }
        if (!config.softmax() && !config.has_row_sum()) return;
        dot.resize(n);
        const float* factors = factor.empty() ? nullptr : factor.data();
        if (keeps_exact_output<Real>(config)) {
            head_dots(dot.data(), dout, stats + n, factors, B, T, H, D);
        } else {
            head_dots(dot.data(), dout, out, factors, B, T, H, D);
        }
    }
    // (T) of sequence and head bh.
    const float* dot_of(int bh) const { return dot.empty() ? nullptr : dot.data() + (size_t)bh * T; }
    const float* factor_of(int bh, const HeadScale& scale) const {
        return factor.empty() ? scale.c.data() : factor.data() + (size_t)bh * T;
    }
};

// ddecay from the gradients of log gamma (B,H,parts).
inline void add_decay_gradient(float* ddecay,  // (H) +=
                               const std::vector<double>& dlog_gamma,
                               const float* decay,  // (H)
                               int B, int H) {
    size_t parts = dlog_gamma.size() / (B * H);
    for (int h = 0; h < H; h++) {
        double total = 0;
        for (int b = 0; b < B; b++)
            for (size_t part = 0; part < parts; part++) total += dlog_gamma[(b * H + h) * parts + part];
        // d log sigmoid(delta) = 1 - sigmoid(delta)
        ddecay[h] += (float)(total * -std::expm1(log_gamma(decay[h])));
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

template <class Real>
inline void attention_backward(Real* dqkv,          // (B,T,3C)
                               float* ddecay,       // (H) +=, or null: not wanted
                               const Real* dout,    // (B,T,C)
                               const Real* out,     // (B,T,C)
                               const float* stats,  // (stats_size)
                               const Real* qkv,     // (B,T,3C)
                               const float* decay,  // (H), or null
                               const AttentionConfig& config, int B, int T, int H, int D) {
    int C = H * D, tiles = (T + kTile - 1) / kTile, Dp = padded(D);
    bool row_sum = config.has_row_sum();
    std::vector<HeadScale> scales = head_scales(config, decay, T, H, D);
    RowTerms rows(dout, out, stats, config, B, T, H, D);
    // A head is one task, or several ranges of key tiles where there are few heads for the threads; then each
    // has its own share of dq, added up at the end.
    int wanted = (4 * omp_get_max_threads() + B * H - 1) / (B * H);
    std::vector<int> cuts =
        balanced_cuts(tiles, B * H >= omp_get_max_threads() ? 1 : std::min({tiles, wanted, kMaxParts}));
    int parts = (int)cuts.size() - 1;
    size_t share = (size_t)tiles * kTile * Dp;
    AlignedArray shares(parts > 1 ? B * H * parts * share : 0);  // (B,H,parts,tiles*64,Dp)
    float final_scale = config.polynomial() ? 1.0f : inverse_sqrt(D);
    auto write_dq = [&](int bh, int t, const float* dq) {  // (Dp)
        Real* row = dqkv + ((size_t)(bh / H) * T + t) * 3 * C + (size_t)(bh % H) * D;
        for_vectors(D, [&](int d, int n) { store(row + d, load(dq + d, n) * final_scale, n); });
    };
    std::vector<double> dlog_gamma((size_t)B * H * parts);
    with_activation(config.kind, [&]<class A>(A) {
#pragma omp parallel
        {
            AlignedArray scratch(backward_scratch(tiles, D)), dq_scratch(parts > 1 ? 0 : share);
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < B * H * parts; task++) {
                int part = task / (B * H), bh = task % (B * H), b = bh / H, h = bh % H;
                const Real* head = qkv + (size_t)b * T * 3 * C + h * D;
                float* dq = parts > 1 ? shares.get() + ((size_t)bh * parts + part) * share : dq_scratch.get();
                size_t skipped = (size_t)cuts[part] * kTile * Dp;
                std::fill(dq + skipped, dq + share, 0.0f);
                const HeadScale& scale = scales[decay ? h : 0];
                BackwardTiles<A, Real> work(scale, row_sum, ddecay != nullptr, cuts[part], tiles, T, C, D,
                                            stats ? stats + (size_t)bh * T : nullptr, rows.dot_of(bh),
                                            scratch.get());
                work.load_queries(head, dout + (size_t)b * T * C + h * D, rows.factor_of(bh, scale));
                for (int j0 = cuts[part] * kTile; j0 < cuts[part + 1] * kTile; j0 += kTile) {
                    work.begin_keys(head, j0);
                    for (int i0 = j0; i0 < T; i0 += kTile) work.add_queries(dq + (size_t)i0 * Dp, i0);
                    work.write_keys(dqkv + (size_t)b * T * 3 * C + h * D);
                }
                dlog_gamma[(size_t)bh * parts + part] = work.dlog_gamma;
                for (int t = 0; parts == 1 && t < T; t++) write_dq(bh, t, dq + (size_t)t * Dp);
            }
        }
    });
    if (parts > 1) {
#pragma omp parallel for collapse(2) schedule(static)
        for (int bh = 0; bh < B * H; bh++)
            for (int t = 0; t < T; t++) {
                float* dq = shares.get() + (size_t)bh * parts * share + (size_t)t * Dp;  // of the first part
                for (int part = 1; part < parts && cuts[part] * kTile <= t; part++)
                    for (int d = 0; d < Dp; d++) dq[d] += dq[part * share + d];
                write_dq(bh, t, dq);
            }
    }
    if (ddecay) add_decay_gradient(ddecay, dlog_gamma, decay, B, H);
}

}  // namespace cpu
