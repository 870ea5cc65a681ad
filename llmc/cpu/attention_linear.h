// Polynomial attention at a cost that is linear in the length: the same numbers as attention.h but for
// rounding.
//
//   (q.k)^p = phi(q) . phi(k), where phi holds the products of p channels (arXiv 2507.04239, "symmetric
//   power"), so sum_j (q_i.k_j)^p v_j = phi(q_i) . S with the state S = sum_j phi(k_j) v_j^T, (features,D).
//
// Tokens come in chunks of 64: pairs within a chunk go through the tiles of attention.h, those with an
// earlier chunk through the state. c_i is a factor of the row and commutes with all this; a decay fades the
// state from chunk to chunk. Nothing but `sum` with odd p is in the way, whose absolute values have no such
// form: with even p its normaliser is phi(q_i) . z, z = sum_j phi(k_j), which fades as the state does.
//
// Features are tiles of 64 products, so that phi is made of whole vectors and all else is tile_product:
// blocks of 64 channels for p = 1, all 8 x 8 of two blocks of 8 channels for p = 2, 4 x 4 x 4 of three blocks
// of 4 for p = 3. Blocks come in order (A <= B <= C) and count as often as they could be arranged.
//
// The backward pass goes through the chunks twice: from the left with S, for dq, and from the right with
// dS = sum_i phi(q_i) dO_i^T, for dk and dv. With p the cost is that of 7 products of (features,D) a token.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "llmc/attention_linear_form.h"
#include "llmc/config.h"
#include "llmc/cpu/attention.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/tile.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

struct FeatureTile {
    int block[3];        // the first channel of each block
    float multiplicity;  // arrangements of the blocks
    int row;             // of its first feature in the state
    int features;        // at most 64
};

inline std::vector<FeatureTile> feature_tiles(int power, int D) {
    std::vector<FeatureTile> tiles;
    auto add = [&](int a, int b, int c, float multiplicity, int features) {
        int row = tiles.empty() ? 0 : tiles.back().row + tiles.back().features;
        tiles.push_back({{a, b, c}, multiplicity, row, features});
    };
    if (power == 1)
        for (int a = 0; a < padded(D); a += kTile) add(a, 0, 0, 1, std::min(kTile, padded(D) - a));
    if (power == 2)
        for (int a = 0; a < D; a += 8)
            for (int b = a; b < D; b += 8) add(a, b, 0, a == b ? 1 : 2, kTile);
    if (power == 3)
        for (int a = 0; a < D; a += 4)
            for (int b = a; b < D; b += 4)
                for (int c = b; c < D; c += 4) add(a, b, c, a == c ? 1 : a == b || b == c ? 3 : 6, kTile);
    return tiles;
}

inline int feature_count(int power, int D) {
    const FeatureTile last = feature_tiles(power, D).back();
    return last.row + last.features;
}

// phi = the products of one tile of features, times factor and, unless null, weights.
template <int kPower>
inline void build_features(float* phi,       // (features,64 tokens)
                           const float* xt,  // (Dp,64 tokens)
                           const FeatureTile& tile,
                           const float* weights,  // (64 tokens), or null
                           float factor) {
    static_assert(kPower >= 1 && kPower <= 3);
    const float *a = xt + tile.block[0] * kTile, *b = xt + tile.block[1] * kTile,
                *c = xt + tile.block[2] * kTile;
    for (int t = 0; t < kTile; t += kLanes) {
        vec weight = weights ? load(weights + t) * factor : broadcast(factor);
        float* out = phi + t;
        auto put = [&](vec value) {
            store(out, value);
            out += kTile;
        };
        if constexpr (kPower == 1)
            for (int i = 0; i < tile.features; i++) put(load(a + i * kTile + t) * weight);
        if constexpr (kPower == 2)
            for (int i = 0; i < 8; i++) {
                vec x = load(a + i * kTile + t) * weight;
                for (int j = 0; j < 8; j++) put(x * load(b + j * kTile + t));
            }
        if constexpr (kPower == 3)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) {
                    vec xy = load(a + i * kTile + t) * weight * load(b + j * kTile + t);
                    for (int k = 0; k < 4; k++) put(xy * load(c + k * kTile + t));
                }
    }
}

// The gradient of x from that of phi, which has its weights already.
template <int kPower>
inline void feature_gradients(float* dxt,         // (Dp,64 tokens) +=
                              const float* dphi,  // (features,64 tokens)
                              const float* xt,    // (Dp,64 tokens)
                              const FeatureTile& tile) {
    const int A = tile.block[0] * kTile, B = tile.block[1] * kTile, C = tile.block[2] * kTile;
    for (int t = 0; t < kTile; t += kLanes) {
        const float* d = dphi + t;
        auto next = [&] { return load(std::exchange(d, d + kTile)); };
        auto add = [&](int at, vec value) { store(dxt + at + t, load(dxt + at + t) + value); };
        auto x = [&](int at) { return load(xt + at + t); };
        if constexpr (kPower == 1)
            for (int i = 0; i < tile.features; i++) add(A + i * kTile, next());
        if constexpr (kPower == 2)
            for (int i = 0; i < 8; i++) {
                vec left = x(A + i * kTile), dleft = {};
                for (int j = 0; j < 8; j++) {
                    vec g = next();
                    dleft += g * x(B + j * kTile);
                    add(B + j * kTile, g * left);
                }
                add(A + i * kTile, dleft);
            }
        if constexpr (kPower == 3)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) {
                    vec left = x(A + i * kTile), middle = x(B + j * kTile), both = left * middle, sum = {};
                    for (int k = 0; k < 4; k++) {
                        vec g = next();
                        sum += g * x(C + k * kTile);
                        add(C + k * kTile, g * both);
                    }
                    add(A + i * kTile, sum * middle);
                    add(B + j * kTile, sum * left);
                }
    }
}

// The state of one head between two chunks. That of the backward pass, with q for k and dO for v, is alike.
struct LinearState {
    size_t features, Dp;
    AlignedArray memory;
    float* s;   // (features,Dp): sum phi(k_j) gamma^n v_j^T, n the distance of j to the first token after
    float* ds;  // (features,Dp): its derivative by log gamma, sum n phi(k_j) gamma^n v_j^T; null: not wanted
    float* z;   // (features): sum phi(k_j) gamma^n, for `sum`
    float* dz;  // (features): its derivative by log gamma; null: not wanted
    bool zero = true;

    LinearState(int features, int D, bool wants_decay)
        : features(features),
          Dp(padded(D)),
          memory(size(wants_decay)),
          s(memory.get()),
          ds(wants_decay ? s + features * Dp : nullptr),
          z(s + (size_t)features * Dp * (wants_decay ? 2 : 1)),
          dz(wants_decay ? z + features : nullptr) {
        clear();
    }
    void clear() {
        std::fill_n(memory.get(), size(ds), 0.0f);
        zero = true;
    }

    // this = earlier, which ends where this one's tokens begin, followed by this: `tokens` tokens.
    void follow(const LinearState& earlier, double log_gamma, double tokens) {
        float fade = (float)std::exp(log_gamma * tokens);
        for (size_t i = 0; i < features * Dp; i++) {
            if (ds) ds[i] += fade * (earlier.ds[i] + (float)tokens * earlier.s[i]);
            s[i] += fade * earlier.s[i];
        }
        for (size_t i = 0; i < features; i++) {
            if (dz) dz[i] += fade * (earlier.dz[i] + (float)tokens * earlier.z[i]);
            z[i] += fade * earlier.z[i];
        }
        zero = zero && earlier.zero;
    }

  private:
    size_t size(bool wants_decay) const { return features * (Dp + 1) * (wants_decay ? 2 : 1); }
};

// One head: what its chunks do to the states, and get from them. Pointers to rows of qkv, out, dout and dqkv
// begin at this head's channels.
template <int kPower, class Real>
class LinearHead {
  public:
    LinearHead(const std::vector<FeatureTile>& tiles, const HeadScale& scale, double log_gamma, bool row_sum,
               bool wants_decay, int T, int C, int D, float* scratch)  // (scratch_size(D))
        : tiles_(tiles),
          scale_(scale),
          row_sum_(row_sum),
          wants_decay_(wants_decay),
          T_(T),
          C_(C),
          D_(D),
          Dp_(padded(D)),
          scratch_(scratch) {
        auto floats = [&](size_t n) { return std::exchange(scratch_, scratch_ + n); };
        for (float** transposed : {&qt_, &kt_, &vt_, &dot_, &dxt_}) *transposed = floats(Dp_ * kTile);
        for (float** rows : {&v_, &d_o_}) *rows = floats(kTile * Dp_);
        for (float** features : {&phi_, &dphi_}) *features = floats(kTile * kTile);
        for (float** lanes : {&from_start_, &to_end_, &to_end_slope_, &row_dot_, &faded_dot_, &distance_})
            *lanes = floats(kTile);
        for (int t = 0; t < kTile; t++) {
            from_start_[t] = (float)std::exp(t * log_gamma);
            to_end_[t] = (float)std::exp((kTile - t) * log_gamma);
            to_end_slope_[t] = (kTile - t) * to_end_[t];
        }
        fade_ = to_end_[0];
    }

    static size_t scratch_size(int D) {  // floats
        return (size_t)kTile * (7 * padded(D) + 2 * kTile + 6) +
               std::max(forward_scratch(D), backward_scratch(1, D));
    }

    // state: of the keys before the chunk; with its keys afterwards.
    void add_keys(LinearState& state, const Real* qkv /*(T,3C)*/, int chunk) {
        load_keys(qkv, chunk);
        for (const FeatureTile& tile : tiles_) add_keys(state, tile);
        state.zero = false;
    }

    // The outputs of a chunk; and its keys into the state, unless it is the last.
    void forward(Real* out /*(T,C)*/, float* stats /*(T)*/, float* exact /*(T,C)*/, LinearState& state,
                 const Real* qkv /*(T,3C)*/, int chunk) {
        int i0 = chunk * kTile;
        bool last = i0 + kTile >= T_;
        ForwardTile<Poly<kPower>, Real> queries(scale_, row_sum_, T_, C_, D_, scratch_);
        queries.begin(qkv, i0);
        queries.add_keys(qkv, i0);
        load_transposed(qt_, qkv, 3 * C_, i0);
        if (!last) load_keys(qkv, chunk);
        for (const FeatureTile& tile : tiles_) {
            if (!state.zero) {
                const float* s = state.s + tile.row * Dp_;
                build_features<kPower>(phi_, qt_, tile, fading(from_start_), tile.multiplicity);
                for (int r = 0; r < kTile; r += kTileRows)
                    tile_product<true, true>(queries.o + r * Dp_, Dp_, phi_ + r, kTile, s, Dp_, Dp_,
                                             tile.features);
                for (int t = 0; row_sum_ && t < kTile; t += kLanes) {
                    vec total = load(queries.total + t);
                    for (int f = 0; f < tile.features; f++)
                        total += load(phi_ + f * kTile + t) * state.z[tile.row + f];
                    store(queries.total + t, total);
                }
            }
            if (!last) add_keys(state, tile);
        }
        state.zero = false;
        queries.finish(out, stats, exact);
    }

    // Goes from left to right: writes the part of dq (64,Dp) that comes through the state, then adds the keys
    // of this chunk to the state, unless it is the last. Returns the gradient of log gamma through the state.
    double backward_queries(float* dq, LinearState& state, const Real* dout /*(T,C)*/,
                            const float* row_factor /*(T)*/, const float* row_dot /*(T), or null*/,
                            const Real* qkv /*(T,3C)*/, int chunk) {
        int i0 = chunk * kTile;
        bool last = i0 + kTile >= T_;
        load_queries(qkv, dout, row_factor, row_dot, chunk);
        if (!last) load_keys(qkv, chunk);
        std::fill_n(dxt_, Dp_ * kTile, 0.0f);
        vec slopes = {};  // by lanes: of the queries' distances and of the state's derivative
        for (const FeatureTile& tile : tiles_) {
            if (!state.zero) {
                if (wants_decay_) {
                    build_features<kPower>(phi_, qt_, tile, fading(from_start_), tile.multiplicity);
                    multiply(dphi_, state.ds, dot_, tile);
                    for (int f = 0; f < tile.features; f++)
                        for (int t = 0; t < kTile; t += kLanes) {
                            vec g = load(dphi_ + f * kTile + t);
                            if (row_sum_) g -= load(row_dot_ + t) * state.dz[tile.row + f];
                            slopes += load(phi_ + f * kTile + t) * g;
                        }
                }
                multiply(dphi_, state.s, dot_, tile);
                for (int f = 0; f < tile.features; f++) {
                    float z = state.z[tile.row + f];
                    for (int t = 0; t < kTile; t += kLanes) {
                        float* d = dphi_ + f * kTile + t;
                        vec g = load(d);
                        if (row_sum_) g -= load(row_dot_ + t) * z;
                        if (wants_decay_) slopes += load(phi_ + f * kTile + t) * g * load(distance_ + t);
                        if (scale_.decays) g *= load(from_start_ + t);
                        store(d, g * tile.multiplicity);
                    }
                }
                feature_gradients<kPower>(dxt_, dphi_, qt_, tile);
            }
            if (!last) add_keys(state, tile);
        }
        state.zero = false;
        std::fill_n(dq, kTile * Dp_, 0.0f);
        add_transposed(dq, dxt_);
        double total = 0;
        for (int lane = 0; lane < kLanes; lane++) total += slopes[lane];
        return total;
    }

    // dstate: of the queries after the chunk; with its queries afterwards.
    void add_queries(LinearState& dstate, const Real* dout, const float* row_factor, const float* row_dot,
                     const Real* qkv, int chunk) {
        load_queries(qkv, dout, row_factor, row_dot, chunk);
        for (const FeatureTile& tile : tiles_) add_queries(dstate, tile);
        dstate.zero = false;
    }

    // From the right: dk and dv of a chunk are written, what its queries take from within it is added to dq
    // (64,Dp); then its queries go into dstate, unless it is the first. Returns the gradient of log gamma
    // within the chunk.
    double backward_keys(Real* dqkv /*(T,3C)*/, float* dq, LinearState& dstate, const Real* dout,
                         const float* row_factor, const float* row_dot, const Real* qkv, int chunk) {
        int j0 = chunk * kTile;
        BackwardTiles<Poly<kPower>, Real> keys(scale_, row_sum_, wants_decay_, chunk, chunk + 1, T_, C_, D_,
                                               nullptr, row_dot, scratch_);
        keys.load_queries(qkv, dout, row_factor);
        keys.begin_keys(qkv, j0);
        keys.add_queries(dq, j0);
        load_transposed(kt_, qkv + C_, 3 * C_, j0);
        load_transposed(vt_, qkv + 2 * C_, 3 * C_, j0);
        if (chunk > 0) load_queries(qkv, dout, row_factor, row_dot, chunk);
        std::fill_n(dxt_, Dp_ * kTile, 0.0f);
        for (const FeatureTile& tile : tiles_) {
            if (!dstate.zero) {
                const float* ds = dstate.s + tile.row * Dp_;
                build_features<kPower>(phi_, kt_, tile, fading(to_end_), 1);
                for (int r = 0; r < kTile; r += kTileRows)
                    tile_product<true, true>(keys.dv + r * Dp_, Dp_, phi_ + r, kTile, ds, Dp_, Dp_,
                                             tile.features);
                multiply(dphi_, dstate.s, vt_, tile);
                if (scale_.decays || row_sum_)
                    for (int f = 0; f < tile.features; f++)
                        for (int t = 0; t < kTile; t += kLanes) {
                            float* d = dphi_ + f * kTile + t;
                            vec g = load(d);
                            if (row_sum_) g -= dstate.z[tile.row + f];
                            if (scale_.decays) g *= load(to_end_ + t);
                            store(d, g);
                        }
                feature_gradients<kPower>(dxt_, dphi_, kt_, tile);
            }
            if (chunk > 0) add_queries(dstate, tile);
        }
        dstate.zero = false;
        add_transposed(keys.dk, dxt_);
        keys.write_keys(dqkv);
        return keys.dlog_gamma;
    }

  private:
    const std::vector<FeatureTile>& tiles_;
    const HeadScale& scale_;
    bool row_sum_, wants_decay_;
    int T_, C_, D_, Dp_;
    float* scratch_;                // of the tiles within a chunk
    float *qt_, *kt_, *vt_, *dot_;  // (Dp,64)
    float* dxt_;                    // (Dp,64): gradient of q or of k
    float *v_, *d_o_;               // (64,Dp): v, c_i dO
    float *phi_, *dphi_;            // (64 features,64 tokens)
    float *from_start_, *to_end_;   // (64): gamma^t, gamma^(64-t)
    float* to_end_slope_;           // (64): (64-t) gamma^(64-t)
    float *row_dot_, *faded_dot_;   // (64): dO . O of `sum`, times c_i; times gamma^t, too
    float* distance_;               // (64): of a query to the chunk's start, less the neutral one
    float fade_;                    // gamma^64

    const float* fading(const float* weights) const { return scale_.decays ? weights : nullptr; }

    void load_transposed(float* tile, const Real* rows, int stride, int first) {
        load_tile_transposed(tile, rows + (size_t)first * stride, stride, std::min(kTile, T_ - first), D_);
    }

    void load_keys(const Real* qkv, int chunk) {
        int j0 = chunk * kTile;
        load_transposed(kt_, qkv + C_, 3 * C_, j0);
        load_tile(v_, qkv + (size_t)j0 * 3 * C_ + 2 * C_, 3 * C_, std::min(kTile, T_ - j0), D_);
    }

    void load_queries(const Real* qkv, const Real* dout, const float* row_factor, const float* row_dot,
                      int chunk) {
        int i0 = chunk * kTile, n = std::min(kTile, T_ - i0);
        load_transposed(qt_, qkv, 3 * C_, i0);
        load_tile(d_o_, dout + (size_t)i0 * C_, C_, n, D_, row_factor + i0);
        if constexpr (!std::is_same_v<TileWord<Real>, float>)  // as the tiles within a chunk have it
            for (int i = 0; i < kTile * Dp_; i++) d_o_[i] = bf16(d_o_[i]);
        transpose(dot_, kTile, Dp_, [&](int r, int d) { return load(d_o_ + r * Dp_ + d); });
        std::fill_n(row_dot_, kTile, 0.0f);
        if (row_dot) std::copy_n(row_dot + i0, n, row_dot_);
        for (int t = 0; t < kTile; t++) faded_dot_[t] = row_dot_[t] * from_start_[t];
        for (int t = 0; t < kTile; t++)
            distance_[t] =
                (float)t - (t < n && !scale_.neutral_distance.empty() ? scale_.neutral_distance[i0 + t] : 0);
    }

    // x (64,Dp) += the transpose of xt (Dp,64). Leaves nothing in vt_.
    void add_transposed(float* x, const float* xt) {
        transpose(vt_, Dp_, kTile, [&](int d, int t) { return load(xt + d * kTile + t); });
        for (int i = 0; i < kTile * Dp_; i += kLanes) store(x + i, load(x + i) + load(vt_ + i));
    }

    // out (features,64 tokens) = the tile's rows of s (features,Dp) xt (Dp,64 tokens).
    void multiply(float* out, const float* s, const float* xt, const FeatureTile& tile) {
        for (int r = 0; r < tile.features; r += kTileRows)
            tile_product<false, false>(out + r * kTile, kTile, s + (size_t)(tile.row + r) * Dp_, Dp_, xt,
                                       kTile, kTile, Dp_);
    }

    // s = fade s + phi_ x (64,Dp), the tile's rows.
    void accumulate(float* s, const FeatureTile& tile, const float* x) {
        s += (size_t)tile.row * Dp_;
        if (scale_.decays)
            for (int i = 0; i < tile.features * Dp_; i += kLanes) store(s + i, load(s + i) * fade_);
        for (int r = 0; r < tile.features; r += kTileRows)
            tile_product<false, true>(s + r * Dp_, Dp_, phi_ + r * kTile, kTile, x, Dp_, Dp_, kTile);
    }

    // z = fade z + phi_ summed up over the tokens, the tile's rows.
    void accumulate_sums(float* z, const FeatureTile& tile) {
        for (int f = 0; f < tile.features; f++) {
            vec total = {};
            for (int t = 0; t < kTile; t += kLanes) total += load(phi_ + f * kTile + t);
            z[tile.row + f] = fade_ * z[tile.row + f] + sum(total);
        }
    }

    void add_keys(LinearState& state, const FeatureTile& tile) {
        if (state.ds) {
            float* s = state.s + (size_t)tile.row * Dp_;
            float* ds = state.ds + (size_t)tile.row * Dp_;
            for (int i = 0; i < tile.features * Dp_; i += kLanes)
                store(ds + i, load(ds + i) + (float)kTile * load(s + i));
            build_features<kPower>(phi_, kt_, tile, to_end_slope_, 1);
            accumulate(state.ds, tile, v_);
            if (row_sum_) {
                for (int f = tile.row; f < tile.row + tile.features; f++)
                    state.dz[f] += (float)kTile * state.z[f];
                accumulate_sums(state.dz, tile);
            }
        }
        build_features<kPower>(phi_, kt_, tile, fading(to_end_), 1);
        accumulate(state.s, tile, v_);
        if (row_sum_) accumulate_sums(state.z, tile);
    }

    void add_queries(LinearState& dstate, const FeatureTile& tile) {
        build_features<kPower>(phi_, qt_, tile, fading(from_start_), tile.multiplicity);
        accumulate(dstate.s, tile, d_o_);
        if (!row_sum_) return;
        build_features<kPower>(phi_, qt_, tile, faded_dot_, tile.multiplicity);
        accumulate_sums(dstate.z, tile);
    }
};

// Whether the linear form is the faster one at T tokens. A query sees (T+64)/2 keys of 64-wide tiles on
// average, at as many operations each as a feature has with a state, and half a chunk; the tiles have the
// higher rate in bf16, and the linear form has more to load and to transpose for each chunk (`make bench`
// measures the crossovers).
template <class Real>
inline bool linear_pays(const AttentionConfig& config, int T, int D) {
    constexpr bool kPairs = !std::is_same_v<TileWord<Real>, float>;
    if (!has_linear_form(config, D)) return false;
    double ratio = kPairs ? 1.75 : 1.0, overhead = kPairs ? 150 : 200;
    return T > ratio * 2 * feature_count(config.power(), D) + overhead;
}

// Heads are tasks; where they are fewer than threads each is cut into ranges of chunks, whose states are made
// beforehand.
inline int linear_parts(int heads, int chunks) {
    int threads = omp_get_max_threads();
    return heads >= threads ? 1 : std::min(chunks, (threads + heads - 1) / heads);
}

// The states at the ends of ranges of chunks: add(state, bh, chunk) takes chunk by chunk, from the left or,
// where `backward`, from the right. The result is (B*H,parts): what comes before each range; empty for a
// single part.
template <class Add>
inline std::vector<LinearState> range_states(int heads, int parts, int chunks, bool backward, int features,
                                             int D, bool wants_decay, const std::vector<double>& log_gammas,
                                             Add add) {
    std::vector<LinearState> states;
    if (parts == 1) return states;
    for (int i = 0; i < heads * parts; i++) states.emplace_back(features, D, wants_decay);
    auto cut = [&](int part) { return (int)((int64_t)chunks * part / parts); };
    // Range r writes its contribution to slot r+1, the state that range r+1 starts from.
    auto range = [&](int r) { return backward ? parts - 1 - r : r; };
#pragma omp parallel for schedule(dynamic, 1)
    for (int task = 0; task < heads * (parts - 1); task++) {
        int bh = task / (parts - 1), r = task % (parts - 1), part = range(r);
        LinearState& state = states[(size_t)bh * parts + range(r + 1)];
        for (int i = 0; i < cut(part + 1) - cut(part); i++)
            add(state, bh, backward ? cut(part + 1) - 1 - i : cut(part) + i);
    }
#pragma omp parallel for schedule(static)
    for (int bh = 0; bh < heads; bh++)
        for (int r = 1; r + 1 < parts; r++) {
            int part = range(r);  // what range r added lies in slot r+1, on top of what slot r has
            states[(size_t)bh * parts + range(r + 1)].follow(states[(size_t)bh * parts + part],
                                                             log_gammas[bh % log_gammas.size()],
                                                             (double)kTile * (cut(part + 1) - cut(part)));
        }
    return states;
}

template <class Real>
inline void attention_linear_forward(Real* out,           // (B,T,C)
                                     float* stats,        // (stats_size)
                                     const Real* qkv,     // (B,T,3C)
                                     const float* decay,  // (H), or null
                                     const AttentionConfig& config, int B, int T, int H, int D) {
    int C = H * D, chunks = (T + kTile - 1) / kTile, parts = linear_parts(B * H, chunks);
    std::vector<HeadScale> scales = head_scales(config, decay, T, H, D);
    std::vector<double> log_gammas;
    for (int h = 0; h < H; h++) log_gammas.push_back(decay ? log_gamma(decay[h]) : 0);
    float* exact = keeps_exact_output<Real>(config) ? stats + (size_t)B * H * T : nullptr;
    with_linear_power(config.kind, [&](auto power) {
        using Head = LinearHead<power, Real>;
        std::vector<FeatureTile> tiles = feature_tiles(power, D);
        int features = feature_count(power, D);
        auto head = [&](int bh, float* scratch) {
            int h = bh % H;
            return Head(tiles, scales[decay ? h : 0], log_gammas[h], config.has_row_sum(), false, T, C, D,
                        scratch);
        };
        auto rows = [&](int bh) { return qkv + (size_t)(bh / H) * T * 3 * C + bh % H * D; };
        auto states = range_states(B * H, parts, chunks, false, features, D, false, log_gammas,
                                   [&](LinearState& state, int bh, int chunk) {
                                       AlignedArray scratch(Head::scratch_size(D));
                                       head(bh, scratch.get()).add_keys(state, rows(bh), chunk);
                                   });
#pragma omp parallel
        {
            AlignedArray scratch(Head::scratch_size(D));
            LinearState own(parts > 1 ? 0 : features, D, false);
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < B * H * parts; task++) {
                int bh = task / parts, part = task % parts;
                LinearState& state = parts > 1 ? states[task] : own;
                if (parts == 1) state.clear();
                Head work = head(bh, scratch.get());
                for (int chunk = (int)((int64_t)chunks * part / parts);
                     chunk < (int)((int64_t)chunks * (part + 1) / parts); chunk++)
                    work.forward(out + (size_t)(bh / H) * T * C + bh % H * D,
                                 stats ? stats + (size_t)bh * T : nullptr,
                                 exact ? exact + (size_t)(bh / H) * T * C + bh % H * D : nullptr, state,
                                 rows(bh), chunk);
            }
        }
    });
}

template <class Real>
inline void attention_linear_backward(Real* dqkv,          // (B,T,3C)
                                      float* ddecay,       // (H) +=, or null: not wanted
                                      const Real* dout,    // (B,T,C)
                                      const Real* out,     // (B,T,C)
                                      const float* stats,  // (stats_size)
                                      const Real* qkv,     // (B,T,3C)
                                      const float* decay,  // (H), or null
                                      const AttentionConfig& config, int B, int T, int H, int D) {
    int C = H * D, Dp = padded(D), chunks = (T + kTile - 1) / kTile, parts = linear_parts(B * H, chunks);
    std::vector<HeadScale> scales = head_scales(config, decay, T, H, D);
    std::vector<double> log_gammas;
    for (int h = 0; h < H; h++) log_gammas.push_back(decay ? log_gamma(decay[h]) : 0);
    RowTerms terms(dout, out, stats, config, B, T, H, D);
    std::vector<double> dlog_gamma((size_t)B * H * parts);
    with_linear_power(config.kind, [&](auto power) {
        using Head = LinearHead<power, Real>;
        std::vector<FeatureTile> tiles = feature_tiles(power, D);
        int features = feature_count(power, D);
        auto head = [&](int bh, float* scratch) {
            int h = bh % H;
            return Head(tiles, scales[decay ? h : 0], log_gammas[h], config.has_row_sum(), ddecay, T, C, D,
                        scratch);
        };
        auto at = [&](int bh, int stride) { return (size_t)(bh / H) * T * stride + bh % H * D; };
        auto factor = [&](int bh) { return terms.factor_of(bh, scales[decay ? bh % H : 0]); };
        auto dot = [&](int bh) { return terms.dot_of(bh); };
        auto states = range_states(B * H, parts, chunks, false, features, D, ddecay, log_gammas,
                                   [&](LinearState& state, int bh, int chunk) {
                                       AlignedArray scratch(Head::scratch_size(D));
                                       head(bh, scratch.get()).add_keys(state, qkv + at(bh, 3 * C), chunk);
                                   });
        auto dstates = range_states(B * H, parts, chunks, true, features, D, false, log_gammas,
                                    [&](LinearState& dstate, int bh, int chunk) {
                                        AlignedArray scratch(Head::scratch_size(D));
                                        head(bh, scratch.get())
                                            .add_queries(dstate, dout + at(bh, C), factor(bh), dot(bh),
                                                         qkv + at(bh, 3 * C), chunk);
                                    });
#pragma omp parallel
        {
            AlignedArray scratch(Head::scratch_size(D)),
                dq((size_t)(chunks + parts - 1) / parts * kTile * Dp);
            LinearState own(parts > 1 ? 0 : features, D, ddecay), down(parts > 1 ? 0 : features, D, false);
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < B * H * parts; task++) {
                int bh = task / parts, part = task % parts;
                int first = (int)((int64_t)chunks * part / parts),
                    end = (int)((int64_t)chunks * (part + 1) / parts);
                LinearState& state = parts > 1 ? states[task] : own;
                LinearState& dstate = parts > 1 ? dstates[task] : down;
                if (parts == 1) state.clear(), dstate.clear();
                Head work = head(bh, scratch.get());
                auto dq_of = [&](int chunk) { return dq.get() + (size_t)(chunk - first) * kTile * Dp; };
                for (int chunk = first; chunk < end; chunk++)
                    dlog_gamma[task] +=
                        work.backward_queries(dq_of(chunk), state, dout + at(bh, C), factor(bh), dot(bh),
                                              qkv + at(bh, 3 * C), chunk);
                for (int chunk = end - 1; chunk >= first; chunk--)
                    dlog_gamma[task] +=
                        work.backward_keys(dqkv + at(bh, 3 * C), dq_of(chunk), dstate, dout + at(bh, C),
                                           factor(bh), dot(bh), qkv + at(bh, 3 * C), chunk);
                for (int t = first * kTile; t < std::min(T, end * kTile); t++) {
                    Real* row = dqkv + at(bh, 3 * C) + (size_t)t * 3 * C;
                    const float* from = dq_of(first) + (size_t)(t - first * kTile) * Dp;
                    for_vectors(D, [&](int d, int n) { store(row + d, load(from + d, n), n); });
                }
            }
        }
    });
    if (ddecay) add_decay_gradient(ddecay, dlog_gamma, decay, B, H);
}

}  // namespace cpu
