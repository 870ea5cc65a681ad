// One head of linear attention of poly1. Its features are the channels of q and k themselves, so the state is
// S = sum_j k_j v_j^T, (D,D), and no features are built. attention_linear.h has the passes over the chunks,
// and all other powers.
//
// A chunk has so few operations that its loads and copies must be few, too. Products within the chunk and
// through the state share the same words of q, k, v and dO. A product whose sum goes over channels reads rows
// of q, k and v where they are. The results of kTileRows rows go through all products up to the output while
// they are in the nearest cache.
//
// The backward pass from left to right only keeps the state before each chunk. The pass from right to left
// computes dq, dk and dv.
//
// The gradient of a decay needs no sum over pairs: weights are linear in q and in k, so the sum of
// g_ij = A_ij dA_ij over the keys of query i is q_i . dq_i, and that over the queries of key j is k_j . dk_j.
#pragma once
#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "llmc/cpu/fade.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/linear_state.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/tile.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

// The methods are those of LinearHead. Pointers to rows of qkv, out, dout and dqkv begin at this head's
// channels.
template <class Real>
class LinearHeadPoly1 {
  public:
    static constexpr bool kKeepsDerivative = false;  // log_gamma_gradient() does not need it

    LinearHeadPoly1(const HeadFactors& factors, bool wants_decay, double* gate_sums, int T, int C, int D,
                    float* scratch)  // (scratch_size(D))
        : factors_(factors),
          wants_decay_(wants_decay),
          gate_sums_(gate_sums),
          T_(T),
          C_(C),
          D_(D),
          Dp_(padded(D)),
          words_(Dp_ / N) {
        auto floats = [&](size_t n) { return std::exchange(scratch, scratch + n); };
        for (Word** tile : {&q_rows_, &k_rows_, &v_rows_, &d_o_rows_, &kt_, &vt_, &q_pairs_, &kv_pairs_,
                            &d_o_pairs_, &faded_})
            *tile = (Word*)floats(kTile * words_);
        for (Word** tile : {&s_rows_, &s_pairs_, &s_transposed_}) *tile = (Word*)floats(Dp_ * words_);
        for (Word** tile : {&a_, &dx_}) *tile = (Word*)floats(kTile * kTile / N);
        for (float** tile : {&x_, &da_}) *tile = floats(kTileRows * kTile);
        dx_rows_ = (Word*)floats(kTileRows * kTile / N);
        sums_ = floats(kTileRows * Dp_);
        fades_ = floats(kTile * kTile);
    }

    static size_t scratch_size(int D) {  // floats
        const size_t Dp = padded(D), words = Dp / N;
        return 10 * kTile * words + 3 * Dp * words + 2 * kTile * kTile / N +
               kTileRows * (2 * kTile + kTile / N + Dp) + kTile * kTile;
    }
    static size_t kept_size(bool /*has_gate_sums*/, int features, int D) {  // floats
        return (size_t)features * padded(D) / N;
    }

    void add_keys(LinearState& state, const Real* qkv /*(T,3C)*/, int chunk) {
        begin(chunk);
        const Rows k = load_rows(k_rows_, qkv + C_, 3 * C_), v = load_rows(v_rows_, qkv + 2 * C_, 3 * C_);
        accumulate(state, k, to_end_, pairs(kv_pairs_, v), [&](int r) {
            prefetch(qkv + C_, 3 * C_, first_ + kTile + r);
            prefetch(qkv + 2 * C_, 3 * C_, first_ + kTile + r);
        });
    }

    void forward(Real* out /*(T,C)*/, float* /*stats*/, float* /*exact*/, LinearState& state, const Real* qkv,
                 int chunk) {
        begin(chunk);
        const Rows q = load_rows(q_rows_, qkv, 3 * C_), k = load_rows(k_rows_, qkv + C_, 3 * C_),
                   v = load_rows(v_rows_, qkv + 2 * C_, 3 * C_);
        const Word *kt = transposed(kt_, k, kTile), *v_pairs = pairs(kv_pairs_, v);
        const Word* s = state.zero ? nullptr : pairs_of(s_pairs_, state.s);
        const TileFades fades = factors_.fades_of_queries(first_, first_, fades_);
        for (int r = 0; r < kTile; r += kTileRows) {
            const int seen = r + kTileRows;
            prefetch(qkv, 3 * C_, first_ + kTile + r);
            tile_product<false, false>(x_, kTile, q[r], q.stride, kt, kTile, padded(seen), words_);
            for (int i = 0; i < kTileRows; i++)
                for (int j = 0; j < seen; j += kLanes)
                    store((Number*)a_ + i * kTile + j, weight(load(x_ + i * kTile + j), fades, r + i, j));
            prefetch(qkv + C_, 3 * C_, first_ + kTile + r);
            through_state(q, s, from_start_, r);
            prefetch(qkv + 2 * C_, 3 * C_, first_ + kTile + r);
            tile_product<false, true>(sums_, Dp_, a_, kTile / N, v_pairs, Dp_, Dp_, seen / N);
            for (int i = 0; i < kTileRows && r + i < tokens_; i++) {
                Real* row = out + (size_t)(first_ + r + i) * C_;
                const float factor = factors_.row_factor[first_ + r + i];
                for_vectors(D_, [&](int d, int n) { store(row + d, load(sums_ + i * Dp_ + d) * factor, n); });
            }
        }
        if (first_ + kTile < T_)
            accumulate(state, k, to_end_, v_pairs, [&](int r) { prefetch<1>(out, C_, first_ + kTile + r); });
    }

    double backward_from_left(float* kept, LinearState& state, const Real* /*dout*/,
                              const float* /*row_factor*/, const float* /*row_dot*/, const Real* qkv,
                              int chunk) {
        for (int i = 0; i < Dp_ * Dp_; i += kLanes) store((Number*)kept + i, load(state.s + i));
        if (chunk * kTile + kTile < T_) add_keys(state, qkv, chunk);
        return 0;
    }

    void add_queries(LinearState& dstate, const Real* dout /*(T,C)*/, const float* row_factor /*(T)*/,
                     const float* /*row_dot*/, const Real* qkv, int chunk) {
        begin(chunk);
        const Rows q = load_rows(q_rows_, qkv, 3 * C_), d_o = load_rows(d_o_rows_, dout, C_, row_factor);
        accumulate(dstate, q, from_start_, pairs(d_o_pairs_, d_o), [](int) {});
    }

    void begin_correction(const LinearState& state, const LinearState& dstate, int /*end*/) {
        if (gate_sums_) crossing_ = crossing_pairs(state.s, dstate);
    }

    double backward_from_right(Real* dqkv /*(T,3C)*/, const float* kept, LinearState& dstate,
                               const Real* dout, const float* row_factor, const float* /*row_dot*/,
                               const Real* qkv, int chunk) {
        begin(chunk);
        const Rows q = load_rows(q_rows_, qkv, 3 * C_), k = load_rows(k_rows_, qkv + C_, 3 * C_),
                   v = load_rows(v_rows_, qkv + 2 * C_, 3 * C_),
                   d_o = load_rows(d_o_rows_, dout, C_, row_factor);
        const Word *kt = transposed(kt_, k, kTile), *vt = transposed(vt_, v, kTile);
        const Word *q_pairs = pairs(q_pairs_, q), *k_pairs = pairs(kv_pairs_, k),
                   *d_o_pairs = pairs(d_o_pairs_, d_o);
        const TileFades fades = factors_.fades_of_queries(first_, first_, fades_);
        // Sums of g_ij. pairs_at_end are those that cross the end of the chunk.
        double pairs_of_queries[kTile] = {}, pairs_of_keys[kTile] = {}, pairs_at_end = 0;
        const bool wants_sums = gate_sums_ || wants_decay_;

        const Word* st = chunk > 0 ? transposed(s_transposed_, {(const Word*)kept, words_}, Dp_) : nullptr;
        for (int r = 0; r < kTile; r += kTileRows) {  // queries
            const int seen = r + kTileRows;
            prefetch(qkv, 3 * C_, first_ - kTile + r);
            tile_product<false, false>(x_, kTile, q[r], q.stride, kt, kTile, padded(seen), words_);
            prefetch(qkv + C_, 3 * C_, first_ - kTile + r);
            tile_product<false, false>(da_, kTile, d_o[r], d_o.stride, vt, kTile, padded(seen), words_);
            const Word* dx_rows = store_weights(fades, r);
            prefetch(qkv + 2 * C_, 3 * C_, first_ - kTile + r);
            through_state(d_o, st, from_start_, r);
            tile_product<false, true>(sums_, Dp_, dx_rows, kTile / N, k_pairs, Dp_, Dp_, seen / N);
            for (int i = 0; wants_sums && i < kTileRows; i++) pairs_of_queries[r + i] = product(q, r + i, i);
            write_rows(dqkv, r);
        }
        const Word *ds = nullptr, *dst = nullptr;
        if (!dstate.zero) {
            ds = pairs_of(s_pairs_, dstate.s);
            dst = transposed(s_transposed_, {rows_of(s_rows_, dstate.s), words_}, Dp_);
        }
        for (int r = 0; r < kTile; r += kTileRows) {  // keys
            const int from = r / N;                   // the word of the first query that sees them
            prefetch(dout, C_, first_ - kTile + r);
            through_state(v, dst, to_end_, r);
            prefetch<1>(dqkv, 3 * C_, first_ - kTile + r);
            for (int i = 0; wants_decay_ && i < kTileRows; i++) pairs_at_end += product(k, r + i, i);
            tile_product<true, true>(sums_, Dp_, dx_ + from * kTile + r, kTile, q_pairs + from * Dp_, Dp_,
                                     Dp_, kTile / N - from);
            for (int i = 0; wants_sums && i < kTileRows; i++) pairs_of_keys[r + i] = product(k, r + i, i);
            write_rows(dqkv + C_, r);
            prefetch<1>(dqkv + C_, 3 * C_, first_ - kTile + r);
            through_state(k, ds, to_end_, r);
            prefetch<1>(dqkv + 2 * C_, 3 * C_, first_ - kTile + r);
            tile_product<true, true>(sums_, Dp_, a_ + from * kTile + r, kTile, d_o_pairs + from * Dp_, Dp_,
                                     Dp_, kTile / N - from);
            write_rows(dqkv + 2 * C_, r);
        }
        auto crossing = [&] { return chunk > 0 ? crossing_pairs((const Number*)kept, dstate) : 0; };
        if (wants_decay_) pairs_at_end += chunk_fade_ * crossing();
        if (chunk > 0) accumulate(dstate, q, from_start_, d_o_pairs, [](int) {});
        if (gate_sums_) add_gate_sums(pairs_of_queries, pairs_of_keys, crossing());
        return wants_decay_ ? log_gamma_gradient(pairs_of_queries, pairs_of_keys, pairs_at_end) : 0;
    }

  private:
    using Word = TileWord<Real>;
    static constexpr int N = kDepth<Word>;
    using Number = std::conditional_t<N == 1, float, bf16>;  // in a word

    struct Rows {
        const Word* first;
        int stride;  // in words
        const Word* operator[](int r) const { return first + (size_t)r * stride; }
    };

    const HeadFactors& factors_;
    bool wants_decay_;
    double* gate_sums_;
    int T_, C_, D_, Dp_, words_;         // words_: in a row of Dp numbers
    int first_ = 0, tokens_ = 0;         // the first token of the chunk, and their number
    const float *from_start_, *to_end_;  // (64): the fades of this chunk, or null without a decay
    float chunk_fade_;
    Word *q_rows_, *k_rows_, *v_rows_, *d_o_rows_;  // (64,Dp/N): memory for load_rows()
    Word *kt_, *vt_;                                // (Dp/N,64)
    Word *q_pairs_, *kv_pairs_, *d_o_pairs_;        // (64/N,Dp); dO times the row factors
    Word* faded_;                                   // (64/N,Dp): q or k times the fades of the tokens
    Word *s_rows_, *s_pairs_, *s_transposed_;       // (Dp,Dp/N), (Dp/N,Dp), (Dp/N,Dp): a state
    Word *a_, *dx_;                                 // (64/N queries,64 keys)
    float *x_, *da_;                                // (kTileRows queries,64 keys)
    Word* dx_rows_;                                 // (kTileRows queries,64/N keys)
    float* sums_;                                   // (kTileRows,Dp)
    float* fades_;                                  // (64,64): memory for fades_of_queries()
    double crossing_ = 0;                           // the pairs that cross the end of the chunk

    void begin(int chunk) {
        first_ = chunk * kTile, tokens_ = std::min(kTile, T_ - first_);
        from_start_ = factors_.from_start(chunk), to_end_ = factors_.to_end(chunk);
        chunk_fade_ = factors_.chunk_fade(chunk);
    }

    // The rows of the chunk, which stay where they are if they need no change.
    Rows load_rows(Word* memory /*(64,Dp/N)*/, const Real* src /*(T,stride)*/, int stride,
                   const float* row_factors = nullptr /*(T)*/) {
        src += (size_t)first_ * stride;
        if (std::is_same_v<Real, Number> && !row_factors && tokens_ == kTile && D_ == Dp_)
            return {(const Word*)src, stride / N};
        load_tile(memory, src, stride, tokens_, D_, row_factors ? row_factors + first_ : nullptr);
        return {memory, words_};
    }

    // Has kTileRows rows loaded into the cache, because a head's part of a row is too short for the processor
    // to see what comes next. Processors drop prefetches if there are too many at once, so each product gets
    // some.
    template <int kWrites = 0>
    void prefetch(const Real* rows /*(T,stride)*/, int stride, int first) const {
        for (int t = first; t >= 0 && t < std::min(first + kTileRows, T_); t++)
            for (int d = 0; d < D_; d += kAlignment / sizeof(Real))
                __builtin_prefetch(rows + (size_t)t * stride + d, kWrites, 3);
    }

    // The words of a product that sums over rows, (64/N,Dp).
    const Word* pairs(Word* memory, const Rows& x /*(64,Dp/N)*/) {
        if constexpr (N == 1) {
            load_tile(memory, x[0], x.stride, kTile, Dp_);
        } else {
            pair_rows(memory, x[0], Dp_, x.stride);
        }
        return memory;
    }
    // The same where each row is multiplied by a factor.
    const Word* faded_pairs(const Rows& x /*(64,Dp/N)*/, const float* factors /*(64), or null: 1*/) {
        if (!factors) return pairs(faded_, x);
        for (int r = 0; r < kTile; r += N)
            for (int d = 0; d < Dp_; d += kLanes) {
                auto row = [&](int i) { return load((const Number*)x[i] + d) * factors[i]; };
                if constexpr (N == 1) {
                    store(faded_ + r * Dp_ + d, row(r));
                } else {
                    store_pairs(faded_ + r / N * Dp_ + d, row(r), row(r + 1));
                }
            }
        return faded_;
    }

    // The transpose of rows of words, (Dp/N,rows).
    const Word* transposed(Word* memory, const Rows& x /*(rows,Dp/N)*/, int rows) {
        transpose(
            rows, padded(words_),
            [&](int r, int c) { return load((const float*)x[r] + c, std::min(words_ - c, kLanes)); },
            [&](int c, int r, vec x) {
                if (c < words_) store((float*)memory + c * rows + r, x);
            });
        return memory;
    }

    // A state in words for a product that sums over its rows, (Dp/N,Dp).
    const Word* pairs_of(Word* memory, const float* s /*(Dp,Dp)*/) {
        if constexpr (N == 1) {
            return s;
        } else {
            for (int r = 0; r < Dp_; r += 2)
                for (int d = 0; d < Dp_; d += kLanes)
                    store_pairs(memory + r / 2 * Dp_ + d, load(s + r * Dp_ + d), load(s + (r + 1) * Dp_ + d));
            return memory;
        }
    }
    // The same for a product that sums over its columns, (Dp,Dp/N).
    const Word* rows_of(Word* memory, const float* s /*(Dp,Dp)*/) {
        if constexpr (N == 1) {
            return s;
        } else {
            for (int i = 0; i < Dp_ * Dp_; i += kLanes) store((Number*)memory + i, load(s + i));
            return memory;
        }
    }

    // s = fade s + x^T y, where x (64,Dp/N) is multiplied by `fades` (64).
    template <class F>
    void accumulate(LinearState& state, const Rows& x, const float* fades, const Word* y /*(64/N,Dp)*/,
                    F prefetch_rows) {
        const Word* faded = faded_pairs(x, fades);
        for (int r = 0; r < Dp_; r += kTileRows) {
            if (r < kTile) prefetch_rows(r);
            tile_product<true, true>(state.s + r * Dp_, Dp_, faded + r, Dp_, y, Dp_, Dp_, kTile / N,
                                     chunk_fade_);
        }
        state.zero = false;
    }

    // sums (kTileRows,Dp) = x s for the rows r, r+1, ..., times the fades of these tokens.
    void through_state(const Rows& x /*(64,Dp/N)*/, const Word* s /*(Dp/N,Dp), or null: 0*/,
                       const float* fades /*(64)*/, int r) {
        if (!s) return (void)std::fill_n(sums_, kTileRows * Dp_, 0.0f);
        tile_product<false, false>(sums_, Dp_, x[r], x.stride, s, Dp_, Dp_, words_);
        for (int i = 0; fades && i < kTileRows; i++)
            for (int d = 0; d < Dp_; d += kLanes)
                store(sums_ + i * Dp_ + d, load(sums_ + i * Dp_ + d) * fades[r + i]);
    }

    // x times the fade of query i and the keys j, j+1, ..., and 0 for keys that the query does not see.
    static vec weight(vec x, const TileFades& fades, int i, int j) {
        if (fades) x *= fades(i, j);
        return lane_index() + j <= i ? x : vec{};
    }

    // A and dX of the queries r, r+1, ... from x and dA. Returns the rows of dX, (kTileRows,64/N).
    const Word* store_weights(const TileFades& fades, int r) {
        for (int i = 0; i < kTileRows; i += 2)
            for (int j = 0; j < r + kTileRows; j += kLanes) {
                vec a[2], dx[2];
                for (int n = 0; n < 2; n++) {
                    a[n] = weight(load(x_ + (i + n) * kTile + j), fades, r + i + n, j);
                    dx[n] = weight(load(da_ + (i + n) * kTile + j), fades, r + i + n, j);
                }
                if constexpr (N == 1) {
                    for (int n = 0; n < 2; n++) store(a_ + (r + i + n) * kTile + j, a[n]);
                    for (int n = 0; n < 2; n++) store(dx_ + (r + i + n) * kTile + j, dx[n]);
                } else {
                    store_pairs(a_ + (r + i) / 2 * kTile + j, a[0], a[1]);
                    store_pairs(dx_ + (r + i) / 2 * kTile + j, dx[0], dx[1]);
                    for (int n = 0; n < 2; n++) store((Number*)dx_rows_ + (i + n) * kTile + j, dx[n]);
                }
            }
        return N == 1 ? dx_ + r * kTile : dx_rows_;
    }

    // The scalar product of row r of x and row i of the sums.
    float product(const Rows& x /*(64,Dp/N)*/, int r, int i) const {
        vec total = {};
        for (int d = 0; d < Dp_; d += kLanes)
            total += load((const Number*)x[r] + d) * load(sums_ + i * Dp_ + d);
        return sum(total);
    }

    // Writes the sums as the gradient of the rows r, r+1, ... of q, k or v.
    void write_rows(Real* dqkv /*(T,3C)*/, int r) {
        for (int i = 0; i < kTileRows && r + i < tokens_; i++) {
            Real* row = dqkv + (size_t)(first_ + r + i) * 3 * C_;
            for_vectors(D_, [&](int d, int n) { store(row + d, load(sums_ + i * Dp_ + d), n); });
        }
    }

    // The sum of the pairs whose keys are in a state and whose queries are in dstate.
    template <class T>
    double crossing_pairs(const T* s /*(Dp,Dp)*/, const LinearState& dstate) const {
        double total = 0;
        for (int f = 0; f < Dp_; f++) {
            vec pairs = {};
            for (int d = 0; d < Dp_; d += kLanes)
                pairs += load(s + f * Dp_ + d) * load(dstate.s + f * Dp_ + d);
            total += sum(pairs);
        }
        return total;
    }

    // Adds the pairs of the queries and keys of a chunk to the sums of a gate. LinearHead says why they are
    // corrected by what is missing to the pairs that cross the first token of the chunk.
    void add_gate_sums(const double* of_queries /*(64)*/, const double* of_keys /*(64)*/, double crossing) {
        double missing = crossing - std::exchange(crossing_, crossing);
        for (int t = 0; t < tokens_; t++) missing -= of_queries[t] - of_keys[t];
        for (int t = 0; t < tokens_; t++) {
            gate_sums_[first_ + t] += of_queries[t] - of_keys[t] + missing / tokens_;
            gate_sums_[T_ + first_ + t] += of_queries[t];
        }
    }

    // The part of a chunk in the gradient of log gamma, which is the sum of all g_ij times i-j (minus e_i).
    // The distance i-j is the sum of the distances in the chunks that the pair reaches over: in each, that
    // from the key or the chunk's begin to the query or the chunk's end.
    //   pairs_at_end: the pairs that cross the end of the chunk
    double log_gamma_gradient(const double* of_queries /*(64)*/, const double* of_keys /*(64)*/,
                              double pairs_at_end) const {
        double total = kTile * pairs_at_end;
        for (int t = 0; t < tokens_; t++) {
            total += t * (of_queries[t] - of_keys[t]);
            if (!factors_.neutral_distance.empty())
                total -= factors_.neutral_distance[first_ + t] * of_queries[t];
        }
        return total;
    }
};

}  // namespace cpu
