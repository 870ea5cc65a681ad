// What linear attention carries from one chunk of tokens to the next (attention_linear.h).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/tile.h"

namespace cpu::inline LLMC_ISA {

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

}  // namespace cpu
