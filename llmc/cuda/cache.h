// What generation keeps about the tokens so far. For each layer this is their keys and values or, if its
// attention has a linear form, a state of fixed size (attention/state.h). In addition it keeps the last
// inputs of the short convolution, and what attention needs of earlier gates.
#pragma once
#include <algorithm>
#include <vector>

#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/cuda/attention/cached.h"
#include "llmc/cuda/attention/state.h"
#include "llmc/cuda/memory.h"
#include "llmc/cuda/short_conv.h"
#include "llmc/model.h"

namespace gpu {

template <class Real>
class Cache {
  public:
    int length = 0;  // number of tokens so far

    Cache() = default;
    Cache(const GPTConfig& config, CacheKind kind, cudaStream_t stream)
        : config_(config),
          attention_(config.attention_of_blocks()),
          kind_(kind),
          stream_(stream),
          H_(config.heads),
          D_(config.head_size()),
          C_(config.channels),
          kv_(config.layers),
          state_(config.layers),
          gate_sums_(config.layers) {
        size_t rows = (size_t)std::max(0, config.short_conv - 1) * 3 * C_;
        for (int l = 0; l < config.layers; l++) {
            conv_history_.emplace_back(rows);
            check(cudaMemsetAsync(conv_history_[l].get(), 0, rows * sizeof(Real), stream_));
            row_lengths_.emplace_back(has_gates() ? H_ : 0);
        }
    }

    // Must be called before each group of new tokens. Changes from keys and values to the state if the user
    // asked for it or if it has become smaller.
    //   decay(l): the decay of layer l; with gates only that it has them
    template <class DecayOf>
    void begin(DecayOf decay) {
        for (int l = 0; l < (int)state_.size(); l++) {
            if (!changes_to_state(l)) continue;
            size_t size = H_ * state_size(attention_[l].power(), D_);
            state_[l] = DeviceArray<float>(size);
            check(cudaMemsetAsync(state_[l].get(), 0, size * sizeof(float), stream_));
            DeviceArray<float> log_f(length && has_gates() ? (size_t)length * H_ : 0);
            if (log_f.size()) gates_of_sums(log_f.get(), gate_sums_[l].get(), length, H_, stream_);
            if (length)
                attention_state_of_cache(state_[l].get(), kv_[l].get(),
                                         has_gates() ? Decay::gate(log_f.get()) : decay(l), attention_[l],
                                         length, H_, D_, stream_);
            wait_for(stream_);
            kv_[l] = DeviceArray<Real>();
            gate_sums_[l] = DeviceArray<double>();
        }
    }

    // Computes attention for T new tokens, which see each other and all earlier tokens, and adds their keys
    // and values to the cache.
    void attention_forward(Real* out,           // (T,C)
                           const Real* heads,   // (T,3C)
                           const Decay& decay,  // with gates: log f (H,T) of the new tokens
                           int l, int T) {
        int end = length + T;
        if (has_gates()) {
            row_scale_.grow((size_t)T * H_, stream_);
            if (!has_state(l)) gate_sums_[l].grow((size_t)end * H_, stream_);
            cached_gates(has_state(l) ? nullptr : gate_sums_[l].get(), row_lengths_[l].get(),
                         row_scale_.get(), decay.log_f, attention_[l], length, T, H_, D_, stream_);
        } else if (l == 0 || config_.decay == DecayKind::learned) {
            place_row_scale(decay.delta, l, T);
        }
        if (has_state(l)) {
            scratch_.grow(attention_state_scratch(attention_[l].power(), H_, D_), stream_);
            attention_state_forward(out, state_[l].get(), scratch_.get(), heads, decay, row_scale_.get(),
                                    attention_[l], T, H_, D_, stream_);
            return;
        }
        DeviceArray<Real>& kv = kv_[l];
        size_t row = 2 * (size_t)C_;
        kv.grow(end * row, stream_);
        check(cudaMemcpy2DAsync(kv.get() + length * row, row * sizeof(Real), heads + C_,
                                3 * C_ * sizeof(Real), row * sizeof(Real), T, cudaMemcpyDeviceToDevice,
                                stream_));
        scratch_.grow((size_t)T * H_ * end, stream_);
        attention_cached_forward(out, scratch_.get(), heads, kv.get(), decay.delta, row_scale_.get(),
                                 attention_[l], length, T, H_, D_, stream_, gate_sums_[l].get());
    }

    // Computes the short convolution of T new rows and keeps the last ones for the next call.
    void short_conv_forward(Real* out,            // (T,3C)
                            const Real* inp,      // (T,3C)
                            const float* weight,  // (K,3C)
                            int l, int T) {
        size_t K = config_.short_conv, W = 3 * (size_t)C_, rows = K - 1 + T;
        DeviceArray<Real> joined(rows * W), convolved(rows * W);
        auto copy = [&](Real* to, const Real* from, size_t n) {
            check(cudaMemcpyAsync(to, from, n * W * sizeof(Real), cudaMemcpyDeviceToDevice, stream_));
        };
        copy(joined.get(), conv_history_[l].get(), K - 1);
        copy(joined.get() + (K - 1) * W, inp, T);
        gpu::short_conv_forward(convolved.get(), joined.get(), weight, 1, (int)rows, (int)W, (int)K, stream_);
        copy(out, convolved.get() + (K - 1) * W, T);
        copy(conv_history_[l].get(), joined.get() + T * W, K - 1);
        wait_for(stream_);  // the two arrays are freed at the end of this function
    }

  private:
    GPTConfig config_;
    std::vector<AttentionConfig> attention_;  // (L)
    CacheKind kind_ = CacheKind::automatic;
    cudaStream_t stream_ = nullptr;
    int H_ = 0, D_ = 0, C_ = 0;
    std::vector<DeviceArray<Real>> kv_;             // (L): (length,2C) and room for more
    std::vector<DeviceArray<float>> state_;         // (L): (H,state_size), instead of keys and values
    std::vector<DeviceArray<double>> gate_sums_;    // (L): with gates and keys, (length,H) and room for more
    std::vector<DeviceArray<double>> row_lengths_;  // (L): with gates, (H)
    std::vector<DeviceArray<Real>> conv_history_;   // (L): (K-1,3C)
    DeviceArray<float> scratch_;                    // for attention; all layers share it
    DeviceArray<float> row_scale_;                  // (T,H): c_i of the new tokens

    bool has_gates() const { return config_.decay == DecayKind::gate; }
    bool has_state(int l) const { return state_[l].size() > 0; }

    bool changes_to_state(int l) const {
        if (has_state(l) || kind_ == CacheKind::kv || !has_linear_form(attention_[l], D_)) return false;
        return kind_ == CacheKind::state || length >= state_pays_from(attention_[l].power(), D_);
    }

    // Computes c_i of the new tokens. With a learned decay each layer has its own; otherwise all have that of
    // block 0, except for softmax, which ignores it.
    void place_row_scale(const float* decay, int l, int T) {
        std::vector<float> delta(H_), scales;
        if (decay) copy_to_host(delta.data(), decay, H_, stream_);
        const AttentionConfig& attention = attention_[l];
        bool from_scores = attention.softmax() || attention.has_row_sum();  // the kernels then find c_i
        for (int t = length; t < length + T; t++)
            for (int h = 0; h < H_; h++)
                scales.push_back(
                    from_scores ? 1 : (float)row_scale(attention, t, decay ? log_gamma(delta[h]) : 0, D_));
        row_scale_.grow(scales.size(), stream_);
        copy_to_device(row_scale_.get(), scales.data(), scales.size(), stream_);
        wait_for(stream_);
    }
};

}  // namespace gpu
