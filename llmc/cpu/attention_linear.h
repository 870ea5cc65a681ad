// Polynomial attention at a cost that is linear in the length. The numbers are those of attention.h except
// for rounding.
//
//   (q.k)^p = phi(q) . phi(k) (attention_linear_features.h), so sum_j (q_i.k_j)^p v_j = phi(q_i) . S with the
//   state S = sum_j phi(k_j) v_j^T, (features,D).
//
// The tokens are processed in chunks of 64. Pairs within a chunk go through the tiles of attention.h, pairs
// with an earlier chunk through the state. A decay fades the state from chunk to chunk (fade.h). A factor c_i
// of the row does not matter here, because phi(q_i) . S is simply multiplied by it. The scale `sum` has this
// form only for an even p, because absolute values have none. Its normaliser is phi(q_i) . z with z = sum_j
// phi(k_j), which fades as the state does.
//
// The backward pass goes through the chunks twice: from left to right with S for dq, and from right to left
// with dS = sum_i phi(q_i) dO_i^T for dk and dv. Forward and backward together cost 7 products of
// (features,D) for each token. poly1 has code of its own for a head (attention_linear_poly1.h), because there
// loads and copies weigh more than the products.
//
// States are float32. With bf16 the factors of every product are bf16, as in the tiles, so a tile of the
// state is rounded when it becomes a factor. With `sum` they are float32, because its gradient is a small
// difference of what follows from S and from z.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

#include "llmc/attention_linear_form.h"
#include "llmc/config.h"
#include "llmc/cpu/attention.h"
#include "llmc/cpu/attention_linear_features.h"
#include "llmc/cpu/attention_linear_poly1.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/linear_state.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/tile.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

// The work of the chunks of one head, which read a state and add to it. Pointers to rows of qkv, out, dout
// and dqkv begin at this head's channels.
//   Word: of the features and of what they are multiplied by
template <int kPower, class Real, class Word>
class LinearHead {
  public:
    // Whether the gradient of log gamma needs the derivative of the state.
    static constexpr bool kKeepsDerivative = true;

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
        for (Word** tile : {&words_, &d_o_t_, &rows_, &pairs_}) *tile = (Word*)floats(kTile * Dp_ / N);
        for (float** tile : {&qt_, &kt_, &dxt_, &dq_}) *tile = floats(kTile * Dp_);
        for (Word** tile : {&phi_, &state_words_}) *tile = (Word*)floats(kTile * std::max(kTile, Dp_) / N);
        for (float** tile : {&float_phi_, &dphi_}) *tile = floats(kTile * kTile);
        for (float** lanes : {&fade_to_end_slope_, &row_dot_, &distance_}) *lanes = floats(kTile);
        for (int t = 0; wants_decay && t < kTile; t++)
            fade_to_end_slope_[t] = (kTile - t) * factors.to_end(0)[t];
    }

    // What the backward pass from left to right keeps of a chunk for the pass from right to left: the part of
    // dq that comes through the state (Dp,64), and to correct the sums of a gate (correct_gate_sums()) the
    // state itself.
    static size_t kept_size(bool has_gate_sums, int features, int D) {  // floats
        return (size_t)kTile * padded(D) + (saves(has_gate_sums) ? features * (padded(D) / N + 1) : 0);
    }

    static size_t scratch_size(int D) {  // floats
        const size_t Dp = padded(D);
        return kTile * (8 * Dp + 2 * std::max<size_t>(kTile, Dp) + 2 * kTile + 3) +
               std::max(forward_scratch(D), backward_scratch(1, D));
    }

    // Adds the keys of a chunk to the state of the keys before it.
    void add_keys(LinearState& state, const Real* qkv /*(T,3C)*/, int chunk) {
        set_fades(chunk);
        load_keys(qkv, chunk);
        for (const FeatureTile& tile : tiles_) add_keys(state, tile, pairs_);
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
        const float* qt = floats_of(qt_, queries.qt, Dp_ / kTileN);
        const Word* v = pairs_;
        if constexpr (kSharesTiles) {
            v = queries.v;
            if (!last) kt_now_ = load_transposed(kt_, qkv + C_, 3 * C_, i0);
        } else {
            if (!last) load_keys(qkv, chunk);
        }
        for (const FeatureTile& tile : tiles_) {
            if (!state.zero) {
                add_through_state(queries.o, state.s, qt, tile, fade_from_start_, true);
                if (has_row_sum_) {
                    for (int t = 0; t < kTile; t += kLanes) {
                        vec total = load(queries.running_sum + t);
                        for (int f = 0; f < tile.features; f++)
                            total += load((const Number*)phi_ + f * kTile + t) * state.z[tile.row + f];
                        store(queries.running_sum + t, total);
                    }
                }
            }
            if (!last) add_keys(state, tile, v);
        }
        state.zero = false;
        queries.finish(out, stats, exact);
    }

    // Goes from left to right: writes the part of dq that comes through the state, then adds the keys of this
    // chunk to the state, unless it is the last chunk. Returns the gradient of log gamma through the state.
    double backward_from_left(float* kept /*(kept_size)*/, LinearState& state, const Real* dout /*(T,C)*/,
                              const float* row_factor /*(T)*/, const float* row_dot /*(T), or null*/,
                              const Real* qkv /*(T,3C)*/, int chunk) {
        int i0 = chunk * kTile;
        bool last = i0 + kTile >= T_;
        float *dqt = kept, *saved = saves(gate_sums_) ? kept + kTile * Dp_ : nullptr;
        if (saved) std::copy_n(state.z, state.features, saved);
        Word* saved_words = saved ? (Word*)(saved + state.features) : nullptr;
        set_fades(chunk);
        load_row_terms(row_dot, chunk);
        const float* qt = load_transposed(qt_, qkv, 3 * C_, i0);
        load_rows(rows_, dout + (size_t)i0 * C_, C_, i0, row_factor + i0);
        load_tile_transposed(d_o_t_, (const Number*)rows_, Dp_, kTile, D_);
        if (!last) load_keys(qkv, chunk);
        std::fill_n(dqt, Dp_ * kTile, 0.0f);
        vec dlog_gamma = {};  // in each lane: the sum over its queries
        for (const FeatureTile& tile : tiles_) {
            if (!state.zero) {
                if (wants_decay_) {
                    build_features<kPower, PairsOf::features>(float_phi_, qt, tile, fade_from_start_, true);
                    multiply(dphi_, state.ds, d_o_t_, tile);
                    for (int f = 0; f < tile.features; f++)
                        for (int t = 0; t < kTile; t += kLanes) {
                            vec g = load(dphi_ + f * kTile + t);
                            if (has_row_sum_) g -= load(row_dot_ + t) * state.dz[tile.row + f];
                            dlog_gamma += load(float_phi_ + f * kTile + t) * g;
                        }
                }
                multiply(dphi_, state.s, d_o_t_, tile, saved_words);
                if (has_row_sum_ || wants_decay_)
                    for (int f = 0; f < tile.features; f++) {
                        float z = state.z[tile.row + f];
                        for (int t = 0; t < kTile; t += kLanes) {
                            int at = f * kTile + t;
                            vec g = load(dphi_ + at);
                            if (has_row_sum_) g -= load(row_dot_ + t) * z;
                            if (wants_decay_) dlog_gamma += load(float_phi_ + at) * g * load(distance_ + t);
                            store(dphi_ + at, g);
                        }
                    }
                feature_gradients<kPower>(dqt, dphi_, qt, tile, true);
            }
            if (!last) add_keys(state, tile, pairs_);
        }
        state.zero = false;
        finish_gradients(dqt, qt, fade_from_start_, i0, true);
        double total = 0;
        for (int lane = 0; lane < kLanes; lane++) total += dlog_gamma[lane];
        return total;
    }

    // Adds the queries of a chunk to the state of the queries after it.
    void add_queries(LinearState& dstate, const Real* dout, const float* row_factor, const float* row_dot,
                     const Real* qkv, int chunk) {
        int i0 = chunk * kTile;
        set_fades(chunk);
        load_row_terms(row_dot, chunk);
        const float* qt = load_transposed(qt_, qkv, 3 * C_, i0);
        load_pairs(dout + (size_t)i0 * C_, C_, i0, row_factor + i0);
        for (const FeatureTile& tile : tiles_) add_queries(dstate, tile, qt, pairs_);
        dstate.zero = false;
    }

    // Before the pass from right to left: the states of the keys before the chunk `end` and of the
    // queries from there on.
    void begin_correction(const LinearState& state, const LinearState& dstate, int end) {
        if (!saves(gate_sums_)) return;
        corrected_from_ = std::min(T_, end * kTile);
        crossing_ = corrected_from_ < T_ ? crossing_pairs(state.z, state.s, dstate) : 0;
    }

    // Goes from right to left: writes dq, dk and dv of a chunk. Then it adds the queries of this chunk to
    // dstate, unless it is the first chunk. Returns the gradient of log gamma from the pairs within the
    // chunk.
    double backward_from_right(Real* dqkv /*(T,3C)*/, const float* kept, LinearState& dstate,
                               const Real* dout, const float* row_factor, const float* row_dot,
                               const Real* qkv, int chunk) {
        int j0 = chunk * kTile;
        set_fades(chunk);
        load_row_terms(row_dot, chunk);
        BackwardTiles<Poly<kPower>, Real> keys(factors_, has_row_sum_, wants_decay_, gate_sums_, chunk,
                                               chunk + 1, T_, C_, D_, nullptr, row_dot, scratch_);
        keys.load_queries(qkv, dout, row_factor);
        keys.begin_keys(qkv, j0);
        std::fill_n(dq_, kTile * Dp_, 0.0f);
        keys.add_queries(dq_, j0);
        const float* kt = floats_of(kt_, keys.kt, Dp_ / kTileN);
        const float* qt = chunk > 0 ? load_transposed(qt_, qkv, 3 * C_, j0) : nullptr;
        const Word *vt = words_, *d_o = pairs_;
        if constexpr (kSharesTiles) {
            vt = keys.vt, d_o = keys.d_o_pairs;
        } else {
            load_tile_transposed(words_, qkv + (size_t)j0 * 3 * C_ + 2 * C_, 3 * C_, keys.keys, D_);
            load_pairs(dout + (size_t)j0 * C_, C_, j0, row_factor + j0);
        }
        std::fill_n(dxt_, Dp_ * kTile, 0.0f);
        for (const FeatureTile& tile : tiles_) {
            if (!dstate.zero) {
                add_through_state(keys.dv, dstate.s, kt, tile, fade_to_end_, false);
                multiply(dphi_, dstate.s, vt, tile);
                for (int f = 0; has_row_sum_ && f < tile.features; f++)
                    for (int t = 0; t < kTile; t += kLanes) {
                        float* d = dphi_ + f * kTile + t;
                        store(d, load(d) - dstate.z[tile.row + f]);
                    }
                feature_gradients<kPower>(dxt_, dphi_, kt, tile, false);
            }
            if (chunk > 0) add_queries(dstate, tile, qt, d_o);
        }
        dstate.zero = false;
        finish_gradients(dxt_, kt, fade_to_end_, j0, false);
        if (saves(gate_sums_) && chunk > 0) correct_gate_sums(j0, kept + kTile * Dp_, dstate);
        add_transposed(keys.dk, dxt_);
        keys.write_keys(dqkv);
        add_transposed(dq_, kept);
        for (int r = 0; r < keys.keys; r++)
            for_vectors(D_, [&](int d, int n) {
                store(dqkv + (size_t)(j0 + r) * 3 * C_ + d, load(dq_ + r * Dp_ + d, n), n);
            });
        return keys.dlog_gamma;
    }

  private:
    static constexpr int N = kDepth<Word>, kTileN = kDepth<TileWord<Real>>;
    static constexpr bool kSharesTiles = N == kTileN;        // with the products within a chunk
    using Number = std::conditional_t<N == 1, float, bf16>;  // in a word

    const std::vector<FeatureTile>& tiles_;
    const HeadFactors& factors_;
    bool has_row_sum_, wants_decay_;
    double* gate_sums_;
    int T_, C_, D_, Dp_;
    float* scratch_;                               // for the tiles within a chunk
    float *qt_, *kt_;                              // (Dp,64)
    const float* kt_now_ = nullptr;                // (Dp,64): the keys of this chunk
    float *dxt_, *dq_;                             // (Dp,64): gradient of k; (64,Dp): of q
    Word *words_, *d_o_t_;                         // (Dp/N,64): memory; dO times the row factors
    Word* rows_;                                   // (64,Dp/N): memory
    Word* pairs_;                                  // (64/N,Dp): v, or dO times the row factors
    Word *phi_, *state_words_;                     // features of one tile, and its rows of a state
    float *float_phi_, *dphi_;                     // (64 features,64 tokens)
    const float *fade_from_start_, *fade_to_end_;  // (64): see HeadFactors; null without a decay
    float* fade_to_end_slope_;                     // (64): (64-t) gamma^(64-t)
    float* row_dot_;                               // (64): dot for the scale `sum`
    float* distance_;  // (64): distance of a query from the start of the chunk, minus the neutral distance
    double crossing_ = 0;  // the pairs that cross the token corrected_from_
    int corrected_from_ = 0;
    float chunk_fade_;

    static bool saves(bool has_gate_sums) { return N > 1 && has_gate_sums; }

    void set_fades(int chunk) {
        fade_from_start_ = factors_.from_start(chunk), fade_to_end_ = factors_.to_end(chunk);
        chunk_fade_ = factors_.chunk_fade(chunk);
    }

    const float* load_transposed(float* memory /*(Dp,64)*/, const Real* rows, int stride, int first) {
        Word* words = N > 1 ? words_ : (Word*)memory;
        load_tile_transposed(words, rows + (size_t)first * stride, stride, std::min(kTile, T_ - first), D_);
        return floats_of(memory, words, Dp_ / N);
    }

    // Products with row factors are rounded as in the tiles.
    void load_rows(Word* tile, const Real* src, int stride, int first, const float* row_factors) {
        load_tile(tile, src, stride, std::min(kTile, T_ - first), D_, row_factors);
        if constexpr (!kSharesTiles)
            for (int i = 0; i < kTile * Dp_; i++) tile[i] = bf16(tile[i]);
    }

    void load_pairs(const Real* src, int stride, int first, const float* row_factors) {
        load_rows(N > 1 ? rows_ : pairs_, src, stride, first, row_factors);
        if constexpr (N > 1) pair_rows(pairs_, rows_, D_);
    }

    void load_keys(const Real* qkv, int chunk) {
        int j0 = chunk * kTile;
        kt_now_ = load_transposed(kt_, qkv + C_, 3 * C_, j0);
        load_pairs(qkv + (size_t)j0 * 3 * C_ + 2 * C_, 3 * C_, j0, nullptr);
    }

    void load_row_terms(const float* row_dot, int chunk) {
        int i0 = chunk * kTile, n = std::min(kTile, T_ - i0);
        std::fill_n(row_dot_, kTile, 0.0f);
        if (row_dot) std::copy_n(row_dot + i0, n, row_dot_);
        for (int t = 0; t < kTile; t++)
            distance_[t] =
                (float)t -
                (t < n && !factors_.neutral_distance.empty() ? factors_.neutral_distance[i0 + t] : 0);
    }

    // Multiplies the gradients of x by the fades of the tokens, and adds the pairs that go through the state
    // to the sums of a gate. They follow without a sum over features: weights are homogeneous in q and in k,
    // so x . dx is p times the sum of the pairs.
    void finish_gradients(float* dxt /*(Dp,64)*/, const float* xt /*(Dp,64)*/, const float* fades, int first,
                          bool of_queries) {
        if (!factors_.has_decay) return;
        for (int t = 0; t < kTile; t += kLanes) {
            vec total = {};
            for (int d = 0; d < D_; d++) {
                const vec g = load(dxt + d * kTile + t) * load(fades + t);
                store(dxt + d * kTile + t, g);
                total += load(xt + d * kTile + t) * g;
            }
            for (int lane = 0; gate_sums_ && lane < kLanes && first + t + lane < T_; lane++) {
                double pairs = total[lane] / kPower, *sums = gate_sums_ + first + t + lane;
                *sums += of_queries ? pairs : -pairs;
                if (of_queries) sums[T_] += pairs;
            }
        }
    }

    // The sum of the pairs whose keys are in a state (z, s) and whose queries are in dstate.
    template <class T>
    double crossing_pairs(const float* z, const T* s, const LinearState& dstate) const {
        double total = 0;
        for (size_t f = 0; f < dstate.features; f++) {
            vec pairs = {};
            for (int d = 0; d < Dp_; d += kLanes)
                pairs += load(s + f * Dp_ + d) * load(dstate.s + f * Dp_ + d);
            total += sum(pairs) - z[f] * dstate.z[f];
        }
        return total;
    }

    // The gradient of a gate is the sum of all pairs that it lies between, which is found by adding up
    // gate_sums_ from the right. Each pair is added with its query and subtracted with its key. In bf16 the
    // two are rounded differently, and what is left of them would grow with the number of tokens. But at the
    // first token of a chunk the states give the same sum without a detour, so the sums of the tokens up to
    // the next chunk are changed by what is missing, each by the same.
    void correct_gate_sums(int first, const float* saved, const LinearState& dstate) {
        const double crossing = crossing_pairs(saved, (const Number*)(saved + dstate.features), dstate);
        double missing = crossing - crossing_;
        for (int t = first; t < corrected_from_; t++) missing -= gate_sums_[t];
        for (int t = first; t < corrected_from_; t++) gate_sums_[t] += missing / (corrected_from_ - first);
        corrected_from_ = first, crossing_ = crossing;
    }

    // x (64,Dp) += the transpose of xt (Dp,64).
    void add_transposed(float* x, const float* xt) {
        transpose(
            Dp_, kTile, [&](int d, int t) { return load(xt + d * kTile + t); },
            [&](int t, int d, vec row) { store(x + t * Dp_ + d, load(x + t * Dp_ + d) + row); });
    }

    // The rows of a state for a tile of features, as the words of a product that sums over features.
    const Word* pairs_of_features(const float* s, const FeatureTile& tile) {
        s += (size_t)tile.row * Dp_;
        if constexpr (N == 1) {
            return s;
        } else {
            for (int f = 0; f < tile.features; f += 2)
                for (int d = 0; d < Dp_; d += kLanes)
                    store_pairs(state_words_ + f / 2 * Dp_ + d, load(s + f * Dp_ + d),
                                load(s + (f + 1) * Dp_ + d));
            return state_words_;
        }
    }

    // The same for a product that sums over channels.
    const Word* pairs_of_channels(const float* s, const FeatureTile& tile, Word* words) {
        s += (size_t)tile.row * Dp_;
        if constexpr (N == 1) {
            return s;
        } else {
            for (int i = 0; i < tile.features * Dp_; i += kLanes) store((bf16*)words + i, load(s + i));
            return words;
        }
    }

    // o (64,Dp) += the features of xt (Dp,64) times the rows of a state, for one tile of features.
    void add_through_state(float* o, const float* s, const float* xt, const FeatureTile& tile,
                           const float* weights, bool of_queries) {
        build_features<kPower, PairsOf::features>(phi_, xt, tile, weights, of_queries);
        const Word* words = pairs_of_features(s, tile);
        for (int r = 0; r < kTile; r += kTileRows)
            tile_product<true, true>(o + r * Dp_, Dp_, phi_ + r, kTile, words, Dp_, Dp_, tile.features / N);
    }

    // out (features,64 tokens) = s (features,Dp) xt (Dp,64 tokens), for the rows of this tile.
    // The words of the state are in `saved` (features,Dp/N) afterwards if that is not null.
    void multiply(float* out, const float* s, const Word* xt /*(Dp/N,64)*/, const FeatureTile& tile,
                  Word* saved = nullptr) {
        const Word* words =
            pairs_of_channels(s, tile, saved ? saved + (size_t)tile.row * Dp_ / N : state_words_);
        for (int r = 0; r < tile.features; r += kTileRows)
            tile_product<false, false>(out + r * kTile, kTile, words + r * Dp_ / N, Dp_ / N, xt, kTile, kTile,
                                       Dp_ / N);
    }

    // s = fade s + the features of xt (Dp,64) times x, for the rows of this tile.
    void accumulate(float* s, const float* xt, const FeatureTile& tile, const float* weights, bool of_queries,
                    const Word* x /*(64/N,Dp)*/) {
        build_features<kPower, PairsOf::tokens>(phi_, xt, tile, weights, of_queries);
        s += (size_t)tile.row * Dp_;
        for (int r = 0; r < tile.features; r += kTileRows)
            tile_product<false, true>(s + r * Dp_, Dp_, phi_ + r * kTile / N, kTile / N, x, Dp_, Dp_,
                                      kTile / N, chunk_fade_);
    }

    // z = fade z + the sum of `features` (features,64 tokens), times the factors of the tokens if there are
    // any, for the rows of this tile.
    template <class T>
    void accumulate_sums(float* z, const T* features, const FeatureTile& tile,
                         const float* factors = nullptr) {
        for (int f = 0; f < tile.features; f++) {
            vec total = {};
            for (int t = 0; t < kTile; t += kLanes) {
                const vec phi = load(features + f * kTile + t);
                total += factors ? phi * load(factors + t) : phi;
            }
            z[tile.row + f] = chunk_fade_ * z[tile.row + f] + sum(total);
        }
    }

    void add_keys(LinearState& state, const FeatureTile& tile, const Word* v /*(64/N,Dp)*/) {
        if (state.ds) {
            float* s = state.s + (size_t)tile.row * Dp_;
            float* ds = state.ds + (size_t)tile.row * Dp_;
            for (int i = 0; i < tile.features * Dp_; i += kLanes)
                store(ds + i, load(ds + i) + (float)kTile * load(s + i));
            accumulate(state.ds, kt_now_, tile, fade_to_end_slope_, false, v);
            if (has_row_sum_) {
                for (int f = tile.row; f < tile.row + tile.features; f++)
                    state.dz[f] += (float)kTile * state.z[f];
                accumulate_sums(state.dz, (const Number*)phi_, tile);
            }
        }
        accumulate(state.s, kt_now_, tile, fade_to_end_, false, v);
        if (has_row_sum_) accumulate_sums(state.z, (const Number*)phi_, tile);
    }

    void add_queries(LinearState& dstate, const FeatureTile& tile, const float* qt /*(Dp,64)*/,
                     const Word* d_o /*(64/N,Dp)*/) {
        accumulate(dstate.s, qt, tile, fade_from_start_, true, d_o);
        if (has_row_sum_) accumulate_sums(dstate.z, (const Number*)phi_, tile, row_dot_);
    }
};

// Whether the linear form is faster than the tiles at T tokens. A query sees (T+64)/2 keys in tiles on
// average. A key costs as many operations as a feature of the state, and half a chunk of keys is seen in both
// forms. But from poly2 on, the linear form has more to load and to transpose for each chunk. `make bench`
// measured where the two are equally fast, which is nearly the same in float32 and bf16.
inline bool linear_pays(const AttentionConfig& config, int T, int D) {
    const int overhead = config.power() == 1 ? 0 : 200;
    return has_linear_form(config, D) && T > 2 * feature_count(config.power(), D) + overhead;
}

// All heads of one call. Each head is a task, or several parts if there are fewer heads than threads. A part
// is a range of chunks, and the states that it starts from are made first.
template <int kPower, class Real, class Word>
class LinearHeads {
  public:
    using Head = std::conditional_t<kPower == 1, LinearHeadPoly1<Real>, LinearHead<kPower, Real, Word>>;

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
    int features() const { return features_; }
    int tasks() const { return B_ * H_ * parts_; }  // (B,H,parts)
    int first_chunk(int part) const { return (int)((int64_t)chunks_ * part / parts_); }
    int max_chunks() const { return (chunks_ + parts_ - 1) / parts_; }  // in a part
    // Whether the state of the keys has its derivative by log gamma.
    bool keeps_derivative() const { return wants_decay_ && Head::kKeepsDerivative; }
    const LayerFactors& factors() const { return factors_; }
    const HeadFactors& factors(int bh) const { return factors_[bh]; }
    size_t at(int bh, int row_size) const { return head_offset(bh, row_size, T_, H_, D_); }

    Head head(int bh, float* scratch, double* gate_sums = nullptr) const {
        if constexpr (kPower == 1)
            return Head(factors(bh), wants_decay_, gate_sums, T_, H_ * D_, D_, scratch);
        else
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
        return states(false, keeps_derivative(), [&](Head& head, LinearState& state, int bh, int chunk) {
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

// Calls f with LinearHeads of a kind, made from the other arguments.
template <class Real, class F, class... Arguments>
inline void with_linear_heads(F f, const AttentionConfig& config, Arguments... arguments) {
    with_linear_power(config.kind, [&](auto power) {
        if constexpr (has_linear_sum(power))
            if (config.has_row_sum()) return f(LinearHeads<power, Real, float>(config, arguments...));
        f(LinearHeads<power, Real, TileWord<Real>>(config, arguments...));
    });
}

template <class Real>
inline void attention_linear_forward(Real* out,        // (B,T,C)
                                     float* stats,     // (stats_size)
                                     const Real* qkv,  // (B,T,3C)
                                     Decay decay, const AttentionConfig& config, int B, int T, int H, int D) {
    int C = H * D;
    float* exact = keeps_exact_output<Real>(config) ? stats + (size_t)B * H * T : nullptr;
    auto run = [&]<class Heads>(const Heads& heads) {
        auto states = heads.key_states(qkv);
#pragma omp parallel
        {
            AlignedArray scratch(Heads::Head::scratch_size(D));
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
    };
    with_linear_heads<Real>(run, config, decay, false, B, T, H, D);
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
    int C = H * D;
    RowTerms rows(dout, out, stats, config, B, T, H, D);
    auto run = [&]<class Heads>(const Heads& heads) {
        auto states = heads.key_states(qkv);
        auto dstates = heads.query_states(dout, rows, qkv);
        DecayGradient decay_gradient(ddecay, decay, B, T, H, heads.parts(), 1);  // parts have own tokens
        const size_t kept_size = Heads::Head::kept_size(decay_gradient.wants_gate(), heads.features(), D);
#pragma omp parallel
        {
            AlignedArray scratch(Heads::Head::scratch_size(D));
            AlignedArray part_kept(heads.max_chunks() * kept_size);
            LinearState thread_state = heads.thread_state(heads.keeps_derivative()),
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
                auto kept = [&](int chunk) { return part_kept.get() + (chunk - first) * kept_size; };
                for (int chunk = first; chunk < end; chunk++)
                    dlog_gamma += head.backward_from_left(kept(chunk), state, rows_dout, row_factor, row_dot,
                                                          rows_qkv, chunk);
                head.begin_correction(state, dstate, end);
                for (int chunk = end - 1; chunk >= first; chunk--)
                    dlog_gamma += head.backward_from_right(rows_dqkv, kept(chunk), dstate, rows_dout,
                                                           row_factor, row_dot, rows_qkv, chunk);
            }
        }
        decay_gradient.finish(heads.factors());
    };
    with_linear_heads<Real>(run, config, decay, ddecay != nullptr, B, T, H, D);
}

}  // namespace cpu
