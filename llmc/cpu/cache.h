// What generation keeps about the tokens so far. For each layer this is their keys and values or, if its
// attention has a linear form, a state of fixed size (attention_state.h). In addition it keeps the last
// inputs of the short convolution, and with keys and values the gates of the tokens.
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

#include "llmc/attention_linear_form.h"
#include "llmc/config.h"
#include "llmc/cpu/attention_cached.h"
#include "llmc/cpu/attention_state.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/short_conv.h"
#include "llmc/model.h"

namespace cpu::inline LLMC_ISA {

template <class Real>
class Cache {
  public:
    int length = 0;  // number of tokens so far

    Cache() = default;
    Cache(const GPTConfig& config, CacheKind kind)
        : config_(config),
          attention_(config.attention_of_blocks()),
          kind_(kind),
          H_(config.heads),
          D_(config.head_size()),
          C_(config.channels),
          kv_(config.layers),
          log_f_(config.layers),
          state_(config.layers),
          row_lengths_(config.layers) {
        size_t rows = std::max(0, config.short_conv - 1);
        conv_history_.assign(config.layers, std::vector<float>(rows * 3 * C_, 0.0f));
    }

    // Must be called before each group of new tokens. Changes from keys and values to the state if the user
    // asked for it or if it has become smaller.
    //   decay(l): the decay of layer l; with a gate, its values are not read
    template <class DecayOf>
    void begin(DecayOf decay) {
        constexpr int kRows = 64;
        std::vector<float> rows;  // (64,3C), q is 0
        for (int l = 0; l < (int)state_.size(); l++) {
            if (!changes_to_state(l)) continue;
            rows.resize((size_t)kRows * 3 * C_);
            state_[l].assign(H_ * state_size(attention_[l].power(), D_), 0.0f);
            row_lengths_[l].assign(H_, 0.0);
            for (int t0 = 0; t0 < length; t0 += kRows) {
                int n = std::min(kRows, length - t0);
                for (int t = 0; t < n; t++)
                    std::copy_n(&kv_[l][(size_t)(t0 + t) * 2 * C_], 2 * C_, &rows[(size_t)t * 3 * C_ + C_]);
                Decay some = decay(l);
                if (some.is_gate) some.values = &log_f_[l][(size_t)t0 * H_];
                attention_state_forward<float>(nullptr, state_[l].data(), row_lengths_[l].data(), rows.data(),
                                               some, attention_[l], t0, n, H_, D_);
            }
            std::vector<float>().swap(kv_[l]);
            log_f_[l].clear();
        }
    }

    // Computes attention for T new tokens, which see each other and all earlier tokens, and adds their keys
    // and values to the cache.
    void attention_forward(Real* out,          // (T,C)
                           const Real* heads,  // (T,3C)
                           Decay decay, int l, int T) {
        if (decay.is_gate) {  // from (H,T) to (T,H), after that of earlier tokens
            std::vector<float>& log_f = log_f_[l];
            if (has_state(l)) log_f.clear();
            for (int t = 0; t < T; t++)
                for (int h = 0; h < H_; h++) log_f.push_back(decay.values[(size_t)h * T + t]);
            decay.values = log_f.data();
        }
        if (has_state(l)) {
            attention_state_forward(out, state_[l].data(), row_lengths_[l].data(), heads, decay,
                                    attention_[l], length, T, H_, D_);
            return;
        }
        std::vector<float>& kv = kv_[l];
        for (int t = 0; t < T; t++)
            kv.insert(kv.end(), heads + (size_t)t * 3 * C_ + C_, heads + (size_t)(t + 1) * 3 * C_);
        attention_cached_forward(out, heads, kv.data(), decay, attention_[l], length, T, H_, D_);
    }

    // Computes the short convolution of T new rows and keeps the last ones for the next call.
    void short_conv_forward(Real* out,            // (T,3C)
                            const Real* inp,      // (T,3C)
                            const float* weight,  // (K,3C)
                            int l, int T) {
        int K = config_.short_conv, W = 3 * C_, n = K - 1 + T;
        std::vector<float> rows = conv_history_[l], convolved((size_t)n * W);  // (K-1+T,3C)
        rows.insert(rows.end(), inp, inp + (size_t)T * W);
        cpu::short_conv_forward(convolved.data(), rows.data(), weight, 1, n, W, K);
        std::copy(convolved.end() - (size_t)T * W, convolved.end(), out);
        conv_history_[l].assign(rows.end() - (size_t)(K - 1) * W, rows.end());
    }

    bool has_state(int l) const { return !state_[l].empty(); }  // false: layer l has keys and values

  private:
    GPTConfig config_;
    std::vector<AttentionConfig> attention_;  // (L)
    CacheKind kind_ = CacheKind::automatic;
    int H_ = 0, D_ = 0, C_ = 0;
    std::vector<std::vector<float>> kv_;            // (L): (length,2C)
    std::vector<std::vector<float>> log_f_;         // (L): (length,H) with a gate, or only the new tokens'
    std::vector<std::vector<float>> state_;         // (L): (H,state_size)
    std::vector<std::vector<double>> row_lengths_;  // (L): (H) beside a state, for gates
    std::vector<std::vector<float>> conv_history_;  // (L): (K-1,3C)

    bool changes_to_state(int l) const {
        if (has_state(l) || kind_ == CacheKind::kv || !has_linear_form(attention_[l], D_)) return false;
        return kind_ == CacheKind::state || length >= state_pays_from(attention_[l].power(), D_);
    }
};

}  // namespace cpu
