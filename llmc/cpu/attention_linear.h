// Polynomial attention at a cost that is linear in the length. The numbers are those of attention.h except
// for rounding.
//
//   (q.k)^p = phi(q) . phi(k), where phi holds the products of p channels (arXiv 2507.04239, "symmetric
//   power"), so sum_j (q_i.k_j)^p v_j = phi(q_i) . S with the state S = sum_j phi(k_j) v_j^T, (features,D).
//
// The tokens are processed in chunks of 64. Pairs within a chunk go through the tiles of attention.h, pairs
// with an earlier chunk through the state. A decay fades the state from chunk to chunk (fade.h). A factor c_i
// of the row does not matter here, because phi(q_i) . S is simply multiplied by it. The scale `sum` has this
// form only for an even p, because absolute values have none. Its normaliser is phi(q_i) . z with z = sum_j
// phi(k_j), which fades as the state does.
//
// The features come in tiles of 64 products, so that phi is built from whole vectors and the rest of the work
// is tile_product. A tile has all products of p blocks of channels: 64 channels for p = 1, 8 x 8 channels for
// p = 2, 4 x 4 x 4 channels for p = 3. Only tiles with ordered blocks (A <= B <= C) exist. Their products are
// multiplied by the number of arrangements of the blocks.
//
// The backward pass goes through the chunks twice: from left to right with S for dq, and from right to left
// with dS = sum_i phi(q_i) dO_i^T for dk and dv. Forward and backward together cost 7 products of
// (features,D) for each token.
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
    float multiplicity;  // number of arrangements of the blocks
    int row;             // row of the state with its first feature
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

// phi = the products of one tile of features, times `factor`, and times the weights if there are any.
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
        auto append = [&](vec value) {
            store(out, value);
            out += kTile;
        };
        if constexpr (kPower == 1)
            for (int i = 0; i < tile.features; i++) append(load(a + i * kTile + t) * weight);
        if constexpr (kPower == 2)
            for (int i = 0; i < 8; i++) {
                vec x = load(a + i * kTile + t) * weight;
                for (int j = 0; j < 8; j++) append(x * load(b + j * kTile + t));
            }
        if constexpr (kPower == 3)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) {
                    vec xy = load(a + i * kTile + t) * weight * load(b + j * kTile + t);
                    for (int k = 0; k < 4; k++) append(xy * load(c + k * kTile + t));
                }
    }
}

// Adds the gradient of x, which follows from dphi. dphi contains the weights already.
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

// The state of one head between two chunks. The backward pass has the same with q instead of k, and dO
// instead of v.
struct LinearState {
    size_t features, Dp;
    AlignedArray memory;
    float* s;   // (features,Dp): sum phi(k_j) gamma^n v_j^T, where n is the distance of j to the next token.
                // With a gate, gamma^n is the fade from j to the last token.
    float* ds;  // (features,Dp): its derivative by log gamma, sum n phi(k_j) gamma^n v_j^T, or null
    float* z;   // (features): sum phi(k_j) gamma^n, for the scale `sum`
    float* dz;  // (features): its derivative by log gamma, or null
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

    // Adds the state of all earlier tokens to this state, which consists of the last `tokens` tokens.
    void add_earlier(const LinearState& earlier, double log_fade, double tokens) {
        float fade = (float)std::exp(log_fade);
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

// The work of the chunks of one head, which read a state and add to it. Pointers to rows of qkv, out, dout
// and dqkv begin at this head's channels.
template <int kPower, class Real>
class LinearHead {
  public:
    //   wants_decay: whether the gradient of log gamma is wanted
    //   gate_sums: (2,T) +=: for HeadFactors::gate_gradient(), or null: not wanted
    LinearHead(const std::vector<FeatureTile>& tiles, const HeadFactors& factors, bool has_row_sum,
               bool wants_decay, double* gate_sums, int T, int C, int D,
               float* scratch)  // (scratch_size(D))
        : tiles_(tiles),
          factors_(factors),
          has_row_sum_(has_row_sum),
          wants_decay_(wants_decay),
          gate_sums_(gate_sums),
          T_(T),
          C_(C),
          D_(D),
          Dp_(padded(D)),
          scratch_(scratch) {
        auto floats = [&](size_t n) { return std::exchange(scratch_, scratch_ + n); };
        for (float** transposed : {&qt_, &kt_, &vt_, &d_o_t_, &dxt_}) *transposed = floats(Dp_ * kTile);
        for (float** rows : {&v_, &d_o_}) *rows = floats(kTile * Dp_);
        for (float** features : {&phi_, &dphi_}) *features = floats(kTile * kTile);
        float *from_start, *to_end;
        for (float** lanes : {&from_start, &to_end, &fade_to_end_slope_, &row_dot_, &faded_dot_, &distance_})
            *lanes = floats(kTile);
        for (int t = 0; t < kTile; t++) {
            from_start[t] = (float)std::exp(t * factors.log_gamma);
            to_end[t] = (float)std::exp((kTile - t) * factors.log_gamma);
            fade_to_end_slope_[t] = (kTile - t) * to_end[t];
        }
        fade_from_start_ = from_start, fade_to_end_ = to_end;
        chunk_fade_ = to_end[0];
    }

    static size_t scratch_size(int D) {  // floats
        return (size_t)kTile * (7 * padded(D) + 2 * kTile + 6) +
               std::max(forward_scratch(D), backward_scratch(1, D));
    }

    // Adds the keys of a chunk to the state of the keys before it.
    void add_keys(LinearState& state, const Real* qkv /*(T,3C)*/, int chunk) {
        set_fades(chunk);
        load_keys(qkv, chunk);
        for (const FeatureTile& tile : tiles_) add_keys(state, tile);
        state.zero = false;
    }

    // Computes the outputs of a chunk, then adds its keys to the state, unless it is the last chunk.
    void forward(Real* out /*(T,C)*/, float* stats /*(T)*/, float* exact /*(T,C)*/, LinearState& state,
                 const Real* qkv /*(T,3C)*/, int chunk) {
        int i0 = chunk * kTile;
        bool last = i0 + kTile >= T_;
        set_fades(chunk);
        ForwardTile<Poly<kPower>, Real> queries(factors_, has_row_sum_, T_, C_, D_, scratch_);
        queries.begin(qkv, i0);
        queries.add_keys(qkv, i0);
        load_transposed(qt_, qkv, 3 * C_, i0);
        if (!last) load_keys(qkv, chunk);
        for (const FeatureTile& tile : tiles_) {
            if (!state.zero) {
                const float* s = state.s + tile.row * Dp_;
                build_features<kPower>(phi_, qt_, tile, if_decay(fade_from_start_), tile.multiplicity);
                for (int r = 0; r < kTile; r += kTileRows)
                    tile_product<true, true>(queries.o + r * Dp_, Dp_, phi_ + r, kTile, s, Dp_, Dp_,
                                             tile.features);
                for (int t = 0; has_row_sum_ && t < kTile; t += kLanes) {
                    vec total = load(queries.running_sum + t);
                    for (int f = 0; f < tile.features; f++)
                        total += load(phi_ + f * kTile + t) * state.z[tile.row + f];
                    store(queries.running_sum + t, total);
                }
            }
            if (!last) add_keys(state, tile);
        }
        state.zero = false;
        queries.finish(out, stats, exact);
    }

    // Goes from left to right: writes the part of dq (64,Dp) that comes through the state, then adds the keys
    // of this chunk to the state, unless it is the last chunk. Returns the gradient of log gamma through the
    // state.
    double backward_queries(float* dq, LinearState& state, const Real* dout /*(T,C)*/,
                            const float* row_factor /*(T)*/, const float* row_dot /*(T), or null*/,
                            const Real* qkv /*(T,3C)*/, int chunk) {
        int i0 = chunk * kTile;
        bool last = i0 + kTile >= T_;
        set_fades(chunk);
        load_queries(qkv, dout, row_factor, row_dot, chunk);
        if (!last) load_keys(qkv, chunk);
        std::fill_n(dxt_, Dp_ * kTile, 0.0f);
        vec dlog_gamma = {};  // in each lane: the sum over its queries
        for (const FeatureTile& tile : tiles_) {
            if (!state.zero) {
                if (wants_decay_) {
                    build_features<kPower>(phi_, qt_, tile, if_decay(fade_from_start_), tile.multiplicity);
                    multiply(dphi_, state.ds, d_o_t_, tile);
                    for (int f = 0; f < tile.features; f++)
                        for (int t = 0; t < kTile; t += kLanes) {
                            vec g = load(dphi_ + f * kTile + t);
                            if (has_row_sum_) g -= load(row_dot_ + t) * state.dz[tile.row + f];
                            dlog_gamma += load(phi_ + f * kTile + t) * g;
                        }
                }
                multiply(dphi_, state.s, d_o_t_, tile);
                for (int f = 0; f < tile.features; f++) {
                    float z = state.z[tile.row + f];
                    for (int t = 0; t < kTile; t += kLanes) {
                        float* d = dphi_ + f * kTile + t;
                        vec g = load(d);
                        if (has_row_sum_) g -= load(row_dot_ + t) * z;
                        if (wants_decay_) dlog_gamma += load(phi_ + f * kTile + t) * g * load(distance_ + t);
                        if (factors_.has_decay) g *= load(fade_from_start_ + t);
                        store(d, g * tile.multiplicity);
                    }
                }
                feature_gradients<kPower>(dxt_, dphi_, qt_, tile);
            }
            if (!last) add_keys(state, tile);
        }
        state.zero = false;
        if (gate_sums_) add_gate_sums(i0, qt_, true);
        std::fill_n(dq, kTile * Dp_, 0.0f);
        add_transposed(dq, dxt_);
        double total = 0;
        for (int lane = 0; lane < kLanes; lane++) total += dlog_gamma[lane];
        return total;
    }

    // Adds the queries of a chunk to the state of the queries after it.
    void add_queries(LinearState& dstate, const Real* dout, const float* row_factor, const float* row_dot,
                     const Real* qkv, int chunk) {
        set_fades(chunk);
        load_queries(qkv, dout, row_factor, row_dot, chunk);
        for (const FeatureTile& tile : tiles_) add_queries(dstate, tile);
        dstate.zero = false;
    }

    // Goes from right to left: writes dk and dv of a chunk, and adds to dq (64,Dp) the part that comes from
    // keys of the same chunk. Then it adds the queries of this chunk to dstate, unless it is the first chunk.
    // Returns the gradient of log gamma from the pairs within the chunk.
    double backward_keys(Real* dqkv /*(T,3C)*/, float* dq, LinearState& dstate, const Real* dout,
                         const float* row_factor, const float* row_dot, const Real* qkv, int chunk) {
        int j0 = chunk * kTile;
        set_fades(chunk);
        BackwardTiles<Poly<kPower>, Real> keys(factors_, has_row_sum_, wants_decay_, gate_sums_, chunk,
                                               chunk + 1, T_, C_, D_, nullptr, row_dot, scratch_);
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
                build_features<kPower>(phi_, kt_, tile, if_decay(fade_to_end_), 1);
                for (int r = 0; r < kTile; r += kTileRows)
                    tile_product<true, true>(keys.dv + r * Dp_, Dp_, phi_ + r, kTile, ds, Dp_, Dp_,
                                             tile.features);
                multiply(dphi_, dstate.s, vt_, tile);
                if (factors_.has_decay || has_row_sum_)
                    for (int f = 0; f < tile.features; f++)
                        for (int t = 0; t < kTile; t += kLanes) {
                            float* d = dphi_ + f * kTile + t;
                            vec g = load(d);
                            if (has_row_sum_) g -= dstate.z[tile.row + f];
                            if (factors_.has_decay) g *= load(fade_to_end_ + t);
                            store(d, g);
                        }
                feature_gradients<kPower>(dxt_, dphi_, kt_, tile);
            }
            if (chunk > 0) add_queries(dstate, tile);
        }
        dstate.zero = false;
        if (gate_sums_) add_gate_sums(j0, kt_, false);
        add_transposed(keys.dk, dxt_);
        keys.write_keys(dqkv);
        return keys.dlog_gamma;
    }

  private:
    const std::vector<FeatureTile>& tiles_;
    const HeadFactors& factors_;
    bool has_row_sum_, wants_decay_;
    double* gate_sums_;
    int T_, C_, D_, Dp_;
    float* scratch_;                               // for the tiles within a chunk
    float *qt_, *kt_, *vt_, *d_o_t_;               // (Dp,64)
    float* dxt_;                                   // (Dp,64): gradient of q or of k
    float *v_, *d_o_;                              // (64,Dp): v, and dO times the row factors
    float *phi_, *dphi_;                           // (64 features,64 tokens)
    const float *fade_from_start_, *fade_to_end_;  // (64): gamma^t, gamma^(64-t), or those of set_fades()
    float* fade_to_end_slope_;                     // (64): (64-t) gamma^(64-t)
    float *row_dot_, *faded_dot_;  // (64): dot for the scale `sum`, and the same times fade_from_start_
    float* distance_;   // (64): distance of a query from the start of the chunk, minus the neutral distance
    float chunk_fade_;  // gamma^64, or that of set_fades()

    // With a gate, each chunk has fades of its own.
    void set_fades(int chunk) {
        if (!factors_.is_gate) return;
        fade_from_start_ = factors_.from_start(chunk), fade_to_end_ = factors_.to_end(chunk);
        chunk_fade_ = factors_.chunk_fade(chunk);
    }

    // Adds the pairs that go through the state to the sums of a gate. They follow from the gradients dxt_ of
    // the queries or keys xt without a sum over features: weights are homogeneous in both, so x . dx is p
    // times the sum of the pairs.
    void add_gate_sums(int first, const float* xt /*(Dp,64)*/, bool of_queries) {
        for (int t = 0; t < kTile; t += kLanes) {
            vec total = {};
            for (int d = 0; d < D_; d++) total += load(xt + d * kTile + t) * load(dxt_ + d * kTile + t);
            for (int lane = 0; lane < kLanes && first + t + lane < T_; lane++) {
                double pairs = total[lane] / kPower, *sums = gate_sums_ + first + t + lane;
                *sums += of_queries ? pairs : -pairs;
                if (of_queries) sums[T_] += pairs;
            }
        }
    }

    // The weights that build_features() takes: null without a decay, because all are 1 then.
    const float* if_decay(const float* weights) const { return factors_.has_decay ? weights : nullptr; }

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
        if constexpr (!std::is_same_v<TileWord<Real>, float>)  // rounded as in the tiles within a chunk
            for (int i = 0; i < kTile * Dp_; i++) d_o_[i] = bf16(d_o_[i]);
        transpose(d_o_t_, kTile, Dp_, [&](int r, int d) { return load(d_o_ + r * Dp_ + d); });
        std::fill_n(row_dot_, kTile, 0.0f);
        if (row_dot) std::copy_n(row_dot + i0, n, row_dot_);
        for (int t = 0; t < kTile; t++) faded_dot_[t] = row_dot_[t] * fade_from_start_[t];
        for (int t = 0; t < kTile; t++)
            distance_[t] =
                (float)t -
                (t < n && !factors_.neutral_distance.empty() ? factors_.neutral_distance[i0 + t] : 0);
    }

    // x (64,Dp) += the transpose of xt (Dp,64). It overwrites vt_.
    void add_transposed(float* x, const float* xt) {
        transpose(vt_, Dp_, kTile, [&](int d, int t) { return load(xt + d * kTile + t); });
        for (int i = 0; i < kTile * Dp_; i += kLanes) store(x + i, load(x + i) + load(vt_ + i));
    }

    // out (features,64 tokens) = s (features,Dp) xt (Dp,64 tokens), for the rows of this tile.
    void multiply(float* out, const float* s, const float* xt, const FeatureTile& tile) {
        for (int r = 0; r < tile.features; r += kTileRows)
            tile_product<false, false>(out + r * kTile, kTile, s + (size_t)(tile.row + r) * Dp_, Dp_, xt,
                                       kTile, kTile, Dp_);
    }

    // s = fade s + phi_ x (64,Dp), for the rows of this tile.
    void accumulate(float* s, const FeatureTile& tile, const float* x) {
        s += (size_t)tile.row * Dp_;
        if (factors_.has_decay)
            for (int i = 0; i < tile.features * Dp_; i += kLanes) store(s + i, load(s + i) * chunk_fade_);
        for (int r = 0; r < tile.features; r += kTileRows)
            tile_product<false, true>(s + r * Dp_, Dp_, phi_ + r * kTile, kTile, x, Dp_, Dp_, kTile);
    }

    // z = fade z + the sum of phi_ over the tokens, for the rows of this tile.
    void accumulate_sums(float* z, const FeatureTile& tile) {
        for (int f = 0; f < tile.features; f++) {
            vec total = {};
            for (int t = 0; t < kTile; t += kLanes) total += load(phi_ + f * kTile + t);
            z[tile.row + f] = chunk_fade_ * z[tile.row + f] + sum(total);
        }
    }

    void add_keys(LinearState& state, const FeatureTile& tile) {
        if (state.ds) {
            float* s = state.s + (size_t)tile.row * Dp_;
            float* ds = state.ds + (size_t)tile.row * Dp_;
            for (int i = 0; i < tile.features * Dp_; i += kLanes)
                store(ds + i, load(ds + i) + (float)kTile * load(s + i));
            build_features<kPower>(phi_, kt_, tile, fade_to_end_slope_, 1);
            accumulate(state.ds, tile, v_);
            if (has_row_sum_) {
                for (int f = tile.row; f < tile.row + tile.features; f++)
                    state.dz[f] += (float)kTile * state.z[f];
                accumulate_sums(state.dz, tile);
            }
        }
        build_features<kPower>(phi_, kt_, tile, if_decay(fade_to_end_), 1);
        accumulate(state.s, tile, v_);
        if (has_row_sum_) accumulate_sums(state.z, tile);
    }

    void add_queries(LinearState& dstate, const FeatureTile& tile) {
        build_features<kPower>(phi_, qt_, tile, if_decay(fade_from_start_), tile.multiplicity);
        accumulate(dstate.s, tile, d_o_);
        if (!has_row_sum_) return;
        build_features<kPower>(phi_, qt_, tile, faded_dot_, tile.multiplicity);
        accumulate_sums(dstate.z, tile);
    }
};

// Whether the linear form is faster than the tiles at T tokens. A query sees (T+64)/2 keys in tiles on
// average. A key costs as many operations as a feature of the state, and half a chunk of keys is seen in both
// forms. But the tiles have a higher rate in bf16, and the linear form has more to load and to transpose for
// each chunk. `make bench` measured where the two are equally fast.
template <class Real>
inline bool linear_pays(const AttentionConfig& config, int T, int D) {
    constexpr bool kPairs = !std::is_same_v<TileWord<Real>, float>;
    if (!has_linear_form(config, D)) return false;
    double ratio = kPairs ? 1.75 : 1.0, overhead = kPairs ? 150 : 200;
    return T > ratio * 2 * feature_count(config.power(), D) + overhead;
}

// All heads of one call. Each head is a task, or several parts if there are fewer heads than threads. A part
// is a range of chunks, and the states that it starts from are made first.
template <int kPower, class Real>
class LinearHeads {
  public:
    using Head = LinearHead<kPower, Real>;

    LinearHeads(const AttentionConfig& config, Decay decay, bool wants_decay, int B, int T, int H, int D)
        : config_(config),
          wants_decay_(wants_decay && !decay.is_gate),
          B_(B),
          T_(T),
          H_(H),
          D_(D),
          chunks_((T + kTile - 1) / kTile),
          factors_(config, decay, B, T, H, D),
          tiles_(feature_tiles(kPower, D)),
          features_(feature_count(kPower, D)) {
        int threads = omp_get_max_threads(), heads = B * H;
        parts_ = heads >= threads ? 1 : std::min(chunks_, (threads + heads - 1) / heads);
    }

    int parts() const { return parts_; }
    int tasks() const { return B_ * H_ * parts_; }  // (B,H,parts)
    int first_chunk(int part) const { return (int)((int64_t)chunks_ * part / parts_); }
    int max_chunks() const { return (chunks_ + parts_ - 1) / parts_; }  // in a part
    bool wants_decay() const { return wants_decay_; }                   // the gradient of log gamma
    const LayerFactors& factors() const { return factors_; }
    const HeadFactors& factors(int bh) const { return factors_[bh]; }
    size_t at(int bh, int row_size) const { return head_offset(bh, row_size, T_, H_, D_); }

    Head head(int bh, float* scratch, double* gate_sums = nullptr) const {
        return Head(tiles_, factors(bh), config_.has_row_sum(), wants_decay_, gate_sums, T_, H_ * D_, D_,
                    scratch);
    }

    // The state of a thread, which goes through whole heads. It is empty if heads have several parts, because
    // each part has a state then.
    LinearState thread_state(bool wants_decay) const {
        return LinearState(parts_ == 1 ? features_ : 0, D_, wants_decay);
    }

    // The states (B*H,parts) of the keys before each part; empty if there is only one.
    std::vector<LinearState> key_states(const Real* qkv) const {
        return states(false, wants_decay_, [&](Head& head, LinearState& state, int bh, int chunk) {
            head.add_keys(state, qkv + at(bh, 3 * H_ * D_), chunk);
        });
    }

    // The states (B*H,parts) of the queries after each part; empty if there is only one.
    std::vector<LinearState> query_states(const Real* dout, const RowTerms& rows, const Real* qkv) const {
        return states(true, false, [&](Head& head, LinearState& dstate, int bh, int chunk) {
            head.add_queries(dstate, dout + at(bh, H_ * D_), rows.factor(bh, factors(bh)), rows.dot(bh),
                             qkv + at(bh, 3 * H_ * D_), chunk);
        });
    }

  private:
    const AttentionConfig& config_;
    bool wants_decay_;
    int B_, T_, H_, D_, chunks_, parts_;
    LayerFactors factors_;
    std::vector<FeatureTile> tiles_;
    int features_;

    // add(head, state, bh, chunk) adds one chunk. The order is from left to right, or from right to left if
    // `backward` is set. In this order, part r adds its chunks to the state that part r+1 starts from.
    template <class Add>
    std::vector<LinearState> states(bool backward, bool wants_decay, Add add) const {
        std::vector<LinearState> states;
        if (parts_ == 1) return states;
        for (int i = 0; i < tasks(); i++) states.emplace_back(features_, D_, wants_decay);
        auto in_order = [&](int r) { return backward ? parts_ - 1 - r : r; };
#pragma omp parallel for schedule(dynamic, 1)
        for (int task = 0; task < B_ * H_ * (parts_ - 1); task++) {
            int bh = task / (parts_ - 1), r = task % (parts_ - 1);
            int first = first_chunk(in_order(r)), end = first_chunk(in_order(r) + 1);
            LinearState& state = states[(size_t)bh * parts_ + in_order(r + 1)];
            AlignedArray scratch(Head::scratch_size(D_));
            Head work = head(bh, scratch.get());
            for (int i = 0; i < end - first; i++) add(work, state, bh, backward ? end - 1 - i : first + i);
        }
#pragma omp parallel for schedule(static)
        for (int bh = 0; bh < B_ * H_; bh++)
            for (int r = 1; r + 1 < parts_; r++) {
                int part = in_order(r);
                int first = first_chunk(part), end = first_chunk(part + 1);
                states[(size_t)bh * parts_ + in_order(r + 1)].add_earlier(states[(size_t)bh * parts_ + part],
                                                                          factors(bh).log_fade(first, end),
                                                                          (double)kTile * (end - first));
            }
        return states;
    }
};

template <class Real>
inline void attention_linear_forward(Real* out,        // (B,T,C)
                                     float* stats,     // (stats_size)
                                     const Real* qkv,  // (B,T,3C)
                                     Decay decay, const AttentionConfig& config, int B, int T, int H, int D) {
    int C = H * D;
    float* exact = keeps_exact_output<Real>(config) ? stats + (size_t)B * H * T : nullptr;
    with_linear_power(config.kind, [&](auto power) {
        LinearHeads<power, Real> heads(config, decay, false, B, T, H, D);
        auto states = heads.key_states(qkv);
#pragma omp parallel
        {
            AlignedArray scratch(LinearHead<power, Real>::scratch_size(D));
            LinearState thread_state = heads.thread_state(false);
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < heads.tasks(); task++) {
                int bh = task / heads.parts(), part = task % heads.parts();
                LinearState& state = states.empty() ? thread_state : states[task];
                if (states.empty()) state.clear();
                auto head = heads.head(bh, scratch.get());
                size_t row = heads.at(bh, C);
                for (int chunk = heads.first_chunk(part); chunk < heads.first_chunk(part + 1); chunk++)
                    head.forward(out + row, stats ? stats + (size_t)bh * T : nullptr,
                                 exact ? exact + row : nullptr, state, qkv + heads.at(bh, 3 * C), chunk);
            }
        }
    });
}

template <class Real>
inline void attention_linear_backward(Real* dqkv,          // (B,T,3C)
                                      float* ddecay,       // as in DecayGradient
                                      const Real* dout,    // (B,T,C)
                                      const Real* out,     // (B,T,C)
                                      const float* stats,  // (stats_size)
                                      const Real* qkv,     // (B,T,3C)
                                      Decay decay, const AttentionConfig& config, int B, int T, int H,
                                      int D) {
    int C = H * D, Dp = padded(D);
    RowTerms rows(dout, out, stats, config, B, T, H, D);
    with_linear_power(config.kind, [&](auto power) {
        LinearHeads<power, Real> heads(config, decay, ddecay, B, T, H, D);
        auto states = heads.key_states(qkv);
        auto dstates = heads.query_states(dout, rows, qkv);
        DecayGradient decay_gradient(ddecay, decay, B, T, H, heads.parts(), 1);  // parts have own tokens
#pragma omp parallel
        {
            AlignedArray scratch(LinearHead<power, Real>::scratch_size(D));
            AlignedArray part_dq((size_t)heads.max_chunks() * kTile * Dp);
            LinearState thread_state = heads.thread_state(heads.wants_decay()),
                        thread_dstate = heads.thread_state(false);
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < heads.tasks(); task++) {
                int bh = task / heads.parts(), part = task % heads.parts();
                int first = heads.first_chunk(part), end = heads.first_chunk(part + 1);
                LinearState& state = states.empty() ? thread_state : states[task];
                LinearState& dstate = states.empty() ? thread_dstate : dstates[task];
                if (states.empty()) state.clear(), dstate.clear();
                auto head = heads.head(bh, scratch.get(), decay_gradient.gate_sums(bh, 0));
                double& dlog_gamma = decay_gradient.dlog_gamma(bh, part);
                const Real *rows_qkv = qkv + heads.at(bh, 3 * C), *rows_dout = dout + heads.at(bh, C);
                Real* rows_dqkv = dqkv + heads.at(bh, 3 * C);
                const float *row_dot = rows.dot(bh), *row_factor = rows.factor(bh, heads.factors(bh));
                auto dq = [&](int chunk) { return part_dq.get() + (size_t)(chunk - first) * kTile * Dp; };
                for (int chunk = first; chunk < end; chunk++)
                    dlog_gamma += head.backward_queries(dq(chunk), state, rows_dout, row_factor, row_dot,
                                                        rows_qkv, chunk);
                for (int chunk = end - 1; chunk >= first; chunk--)
                    dlog_gamma += head.backward_keys(rows_dqkv, dq(chunk), dstate, rows_dout, row_factor,
                                                     row_dot, rows_qkv, chunk);
                for (int t = first * kTile; t < std::min(T, end * kTile); t++) {
                    const float* from = part_dq.get() + (size_t)(t - first * kTile) * Dp;
                    for_vectors(D, [&](int d, int n) {
                        store(rows_dqkv + (size_t)t * 3 * C + d, load(from + d, n), n);
                    });
                }
            }
        }
        decay_gradient.finish(heads.factors());
    });
}

}  // namespace cpu
