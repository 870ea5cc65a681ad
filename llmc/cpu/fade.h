// The numbers by which one head multiplies the rows of A, and by which its weights fade between a key and a
// query. All forms of attention take them from here.
//
// With --decay fixed and learned the fade of query i and key j is gamma^(i-j), so one table by distance holds
// all of them. With a gate it is F_ij, the product of f_t over j < t <= i, where f_t differs for each token.
// A sum of log f over all tokens so far would have lost its last digits after some thousand tokens. So the
// sums begin again in each tile of 64 tokens, and all exponents are sums of numbers that are not positive:
//
//   i and j in the same tile    the fade of query i-1, times f_i
//   j in an earlier tile        from_start_i, times the fade of the whole tiles between, times to_end_j
//
// where from_start_i is the product of f from the first token of the tile of i up to i, and to_end_j that of
// the tokens after j in the tile of j. Thus no pair needs an exp() of its own. Softmax adds log F_ij to its
// scores, so its tables hold logarithms, which are added up instead.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/tile.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

// What the weights of a layer fade by. Nothing, unless there are values.
struct Decay {
    const float* values = nullptr;  // delta (H) with gamma_h = sigmoid(delta_h); with a gate log f (B,H,T)
    bool is_gate = false;

    Decay(const float* delta) : values(delta) {}
    static Decay gate(const float* log_f) {
        Decay decay(log_f);
        decay.is_gate = true;
        return decay;
    }
    explicit operator bool() const { return values != nullptr; }
};

// The fades (logarithms for softmax) of one tile of queries and one of keys.
struct TileFades {
    const float* first = nullptr;  // null: no decay
    int stride = 0;                // of the rows
    explicit operator bool() const { return first != nullptr; }
    vec operator()(int row, int lane) const { return load(first + row * stride + lane); }
};

// Fades below this count as 0. A row always has its own token with a fade of 1, so nothing is lost. Otherwise
// there would be subnormal numbers, with which processors compute a hundred times more slowly.
constexpr float kSmallestFade = 1e-19f;

inline vec drop_smallest(vec fade) {
    return fade < kSmallestFade ? vec{} : fade;
}

class HeadFactors {
  public:
    double log_gamma = 0;
    bool has_decay = false, is_gate = false;
    // (T): c_i / sqrt(D)^p of a polynomial, or 1 / sqrt(D)^p with the scale `sum`, whose c_i depends on the
    // scores. It is 1 for every other kind of attention.
    std::vector<float> row_factor;
    // (T) for the scale `row` with a decay, otherwise empty: e_i = -d log c_i / d log gamma. At distance e_i
    // the change of gamma^(i-j) and that of c_i cancel, so a term there adds nothing to the gradient of log
    // gamma.
    std::vector<float> neutral_distance;

    HeadFactors() = default;
    //   head: counts the heads (H), or with a gate the sequences and heads (B,H)
    HeadFactors(const AttentionConfig& config, Decay decay, int head, int T, int D)
        : has_decay(decay), is_gate(decay.is_gate), row_factor(T, 1.0f), is_log_(config.softmax()) {
        const double qk_factor = std::pow((double)D, -0.5 * config.power());
        const bool has_row_length = config.polynomial() && config.scale == ScaleKind::row;
        if (is_gate) {
            make_gate(decay.values + (size_t)head * T, T);
            if (has_row_length) {
                row_length_ = gated_row_lengths(decay.values + (size_t)head * T, T);
                // c_i is that of the length 1 divided by sqrt(n_i): a loop that the compiler makes vectors
                // of.
                const double shortest = row_scale_of_length(config, 0, 1, D) * qk_factor;
                for (int i = 0; i < T; i++) row_factor[i] = (float)(shortest / std::sqrt(row_length_[i]));
            } else {
                for (int i = 0; i < T; i++)
                    row_factor[i] = (float)(row_scale_of_length(config, i, 1, D) * qk_factor);
            }
            return;
        }
        if (decay) log_gamma = ::log_gamma(decay.values[head]);
        for (int i = 0; i < T; i++) row_factor[i] = (float)(row_scale(config, i, log_gamma, D) * qk_factor);
        if (!has_decay) return;
        if (has_row_length)
            for (double e : row_scale_log_derivatives(T, log_gamma)) neutral_distance.push_back((float)e);
        size_ = T + 2 * kTile;
        memory_ = AlignedArray(2 * (size_t)size_ + 2 * kTile);
        rising_ = memory_.get(), falling_ = rising_ + size_;
        for (int at = 0; at < size_; at++) {
            // Pairs at a distance below 0 are masked, so any number will do for them.
            int distance = std::max(0, at - kTile);
            float fade = (float)(config.softmax() ? distance * log_gamma : std::exp(distance * log_gamma));
            rising_[at] = falling_[size_ - 1 - at] = fade;
        }
        from_start_ = falling_ + size_, to_end_ = from_start_ + kTile;
        for (int t = 0; t < kTile; t++) {
            from_start_[t] = (float)std::exp(t * log_gamma);
            to_end_[t] = (float)std::exp((kTile - t) * log_gamma);
        }
    }

    // The fades of the queries i0 .. i0+63 and the keys j0 .. j0+63, j0 <= i0. A row belongs to a key and its
    // lanes to queries. Those of queries that do not see the key are any finite numbers.
    TileFades fades_of_keys(int i0, int j0, float* memory /*(64,64)*/) const {
        if (!has_decay) return {};
        if (!is_gate) return {rising_ + kTile + (i0 - j0), -1};
        if (i0 == j0)
            fill_diagonal(memory, kTile - 1, -1, i0 + 1);
        else
            combine(memory, to_end_ + j0, from_start_ + i0, i0, j0);
        return {memory, kTile};
    }
    // The same, where a row belongs to a query and its lanes to keys.
    TileFades fades_of_queries(int i0, int j0, float* memory /*(64,64)*/) const {
        if (!has_decay) return {};
        if (!is_gate) return {falling_ + size_ - 1 - kTile - (i0 - j0), -1};
        if (i0 == j0)
            fill_diagonal(memory, 0, 1, i0);
        else
            combine(memory, from_start_ + i0, to_end_ + j0, i0, j0);
        return {memory, kTile};
    }

    // For the linear form. Its chunks are the tiles. With a gate, the state of the keys before a chunk is
    // faded to the last token before it; otherwise to its first token, so that from_start_t = gamma^t and
    // to_end_t = gamma^(64-t). Both are null without a decay.
    const float* from_start(int chunk) const { return from_start_ + at(chunk); }  // (64)
    const float* to_end(int chunk) const { return to_end_ + at(chunk); }          // (64)
    float chunk_fade(int chunk) const {
        return is_gate ? fade_of(totals_[chunk]) : has_decay ? to_end_[0] : 1.0f;
    }
    // The logarithm of the fade over whole chunks.
    double log_fade(int first, int end) const {
        if (!is_gate) return log_gamma * ((double)kTile * (end - first));
        double total = 0;
        for (int chunk = first; chunk < end; chunk++) total += totals_[chunk];
        return total;
    }

    // The gradient of log f. Each log f_t is a part of log F_ij for i >= t > j, so its gradient is the sum of
    // that of log F_ij over these pairs, which is the sum over i >= t of the pairs of query i minus those of
    // key i. With the scale `row`, c_i depends on f, too, through n_i = 1 + f_i^2 n_(i-1).
    void gate_gradient(float* dlog_f,       // (T)
                       const double* sums,  // (2,T): as GateSums::add_to() adds them up
                       const float* log_f,  // (T)
                       int T) const {
        const double *pairs = sums, *rows = sums + T;
        double total = 0, dlength = 0;  // dlength: the gradient of n_i
        for (int t = T - 1; t > 0; t--) {
            dlog_f[t] = (float)(total += pairs[t]);
            if (row_length_.empty()) continue;
            dlength = std::exp(2.0 * log_f[t]) * (dlength - 0.5 * rows[t] / row_length_[t]);
            dlog_f[t] += (float)(2 * dlength * row_length_[t - 1]);
        }
        dlog_f[0] = 0;  // no query and key have the first token between them
    }

  private:
    bool is_log_ = false;
    int size_ = 0;
    AlignedArray memory_;
    float *rising_ = nullptr, *falling_ = nullptr;     // (size)
    float* step_ = nullptr;                            // (tiles,64), with a gate
    float *from_start_ = nullptr, *to_end_ = nullptr;  // (tiles,64) with a gate, otherwise (64)
    std::vector<double> totals_;                       // (tiles): sum of log f, with a gate
    std::vector<double> row_length_;                   // (T): n_i, with a gate and the scale `row`

    void make_gate(const float* log_f /*(T)*/, int T) {
        const int tiles = (T + kTile - 1) / kTile;
        size_ = tiles * kTile;
        memory_ = AlignedArray(3 * (size_t)size_);
        step_ = memory_.get(), from_start_ = step_ + size_, to_end_ = from_start_ + size_;
        std::copy_n(log_f, T, step_);
        std::fill(step_ + T, step_ + size_, 0.0f);
        for (int first = 0; first < size_; first += kTile) {
            double total = 0;
            for (int t = 0; t < kTile; t++) from_start_[first + t] = (float)(total += step_[first + t]);
            totals_.push_back(total);
            total = 0;
            for (int t = kTile - 1; t >= 0; total += step_[first + t--]) to_end_[first + t] = (float)total;
        }
        if (is_log_) return;
        for (int at = 0; at < 3 * size_; at += kLanes)
            store(step_ + at, drop_smallest(exp(load(step_ + at))));
    }

    size_t at(int chunk) const { return is_gate ? (size_t)chunk * kTile : 0; }

    static float fade_of(double log_fade) {
        const double fade = std::exp(log_fade);
        return fade < kSmallestFade ? 0.0f : (float)fade;
    }

    // A tile on the diagonal. Each row follows from the one before it, which is one token nearer to the
    // diagonal: all of its pairs have f_t between them in addition, where t is this row plus `t`.
    void fill_diagonal(float* tile, int first_row, int direction, int t) const {
        vec fades[kTile / kLanes] = {};
        for (int row = first_row; row >= 0 && row < kTile; row += direction) {
            const float step = row == first_row ? 0.0f : step_[t + row];
            for (int i = 0; i < kTile / kLanes; i++) {
                const vec fade = is_log_ ? fades[i] + step : drop_smallest(fades[i] * step);
                fades[i] = lane_index() + i * kLanes == row ? broadcast(is_log_ ? 0.0f : 1.0f) : fade;
                store(tile + row * kTile + i * kLanes, fades[i]);
            }
        }
    }

    // A tile below the diagonal.
    void combine(float* tile, const float* rows /*(64)*/, const float* lanes /*(64)*/, int i0, int j0) const {
        double log_between = 0;
        for (int between = i0 / kTile - 1; between > j0 / kTile; between--) log_between += totals_[between];
        const float between = is_log_ ? (float)log_between : fade_of(log_between);
        for (int lane = 0; lane < kTile; lane += kLanes) {
            const vec right = load(lanes + lane);
            if (is_log_) {
                for (int row = 0; row < kTile; row++)
                    store(tile + row * kTile + lane, right + between + rows[row]);
            } else {
                const vec faded = drop_smallest(right * between);
                for (int row = 0; row < kTile; row++)
                    store(tile + row * kTile + lane, drop_smallest(faded * rows[row]));
            }
        }
    }
};

// The factors of every head of a layer. Without a decay they are the same for all heads, and exist once. With
// a gate those of each sequence differ.
class LayerFactors {
  public:
    LayerFactors(const AttentionConfig& config, Decay decay, int B, int T, int H, int D)
        : heads_(!decay          ? 1
                 : decay.is_gate ? B * H
                                 : H) {
#pragma omp parallel for schedule(static) if (decay.is_gate)
        for (size_t head = 0; head < heads_.size(); head++)
            heads_[head] = HeadFactors(config, decay, (int)head, T, D);
    }
    const HeadFactors& operator[](int bh) const {
        return heads_[bh % heads_.size()];
    }

  private:
    std::vector<HeadFactors> heads_;
};

// Sums over the pairs of a tile of g_ij, the gradient of log F_ij as a factor of A_ij.
struct GateSums {
    vec queries[kTile] = {};        // in each lane: the sum over its keys
    vec keys[kTile / kLanes] = {};  // the sums of the keys over all queries
    vec own[kTile / kLanes] = {};   // g_ii, on the diagonal

    // g: query i and the keys j, j+1, ..., j+15, with zeros for those that it does not see.
    void add(int i, int j, vec g, bool diagonal) {
        if (diagonal) {  // the fade of a token to itself is always 1
            own[j / kLanes] += lane_index() + j == i ? g : vec{};
            g = lane_index() + j == i ? vec{} : g;
        }
        queries[i] += g;
        keys[j / kLanes] += g;
    }
    // Adds the pairs of each query minus those of each key to (T), and all g_ij of each query to the next
    // (T).
    void add_to(double* sums /*(2,T)*/, int i0, int j0, int T) const {
        for (int i = 0; i < kTile && i0 + i < T; i++) {
            const double pairs = sum(queries[i]);
            sums[i0 + i] += pairs;
            sums[T + i0 + i] += pairs + own[i / kLanes][i % kLanes];
        }
        for (int j = 0; j < kTile && j0 + j < T; j++) sums[j0 + j] -= keys[j / kLanes][j % kLanes];
    }
};

// The gradient of a decay, which the tasks of the threads add up in pieces.
class DecayGradient {
  public:
    //   ddecay: (H) += the gradient of delta, or with a gate (B,H,T) = that of log f, or null: not wanted
    //   gate_parts: the number of parts of a head that add to the same gate_sums() of a head
    DecayGradient(float* ddecay, Decay decay, int B, int T, int H, int parts, int gate_parts)
        : ddecay_(ddecay), decay_(decay), B_(B), T_(T), H_(H), parts_(parts), gate_parts_(gate_parts) {
        dlog_gamma_.resize((size_t)B * H * parts);
        if (wants_gate()) gate_sums_.resize((size_t)B * H * gate_parts * 2 * T);
    }
    bool wants_gamma() const { return ddecay_ && !decay_.is_gate; }
    bool wants_gate() const { return ddecay_ && decay_.is_gate; }

    double& dlog_gamma(int bh, int part) { return dlog_gamma_[(size_t)bh * parts_ + part]; }
    double* gate_sums(int bh, int part) {  // (2,T) +=, or null: not wanted
        return wants_gate() ? &gate_sums_[((size_t)bh * gate_parts_ + part) * 2 * T_] : nullptr;
    }

    void finish(const LayerFactors& factors) {
        if (wants_gamma()) finish_gamma();
        if (wants_gate()) {
#pragma omp parallel for schedule(static)
            for (int bh = 0; bh < B_ * H_; bh++) finish_gate(bh, factors[bh]);
        }
    }

  private:
    float* ddecay_;
    Decay decay_;
    int B_, T_, H_, parts_, gate_parts_;
    std::vector<double> dlog_gamma_;  // (B,H,parts)
    std::vector<double> gate_sums_;   // (B,H,gate_parts,2,T)

    void finish_gamma() {
        for (int h = 0; h < H_; h++) {
            double total = 0;
            for (int b = 0; b < B_; b++)
                for (int part = 0; part < parts_; part++) total += dlog_gamma(b * H_ + h, part);
            // d log sigmoid(delta) = 1 - sigmoid(delta)
            ddecay_[h] += (float)(total * -std::expm1(log_gamma(decay_.values[h])));
        }
    }

    void finish_gate(int bh, const HeadFactors& factors) {
        double* sums = gate_sums(bh, 0);
        for (int part = 1; part < gate_parts_; part++)
            for (int t = 0; t < 2 * T_; t++) sums[t] += gate_sums(bh, part)[t];
        size_t at = (size_t)bh * T_;
        factors.gate_gradient(ddecay_ + at, sums, decay_.values + at, T_);
    }
};

}  // namespace cpu
