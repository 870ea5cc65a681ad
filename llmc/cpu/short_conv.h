// A causal depthwise convolution over time: z_t = sum_{s<K} weight[s] inp_{t-s}, zero before the first token.
#pragma once
#include <cstddef>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

template <class Real>
inline void short_conv_forward(Real* out,            // (B,T,W)
                               const Real* inp,      // (B,T,W)
                               const float* weight,  // (K,W)
                               int B, int T, int W, int K) {
#pragma omp parallel for schedule(static)
    for (int bt = 0; bt < B * T; bt++)
        for (int w0 = 0; w0 < W; w0 += kLanes) {
            int lanes = W - w0 < kLanes ? W - w0 : kLanes;
            vec sum = {};
            for (int s = 0; s < K && s <= bt % T; s++)
                sum +=
                    load(weight + (size_t)s * W + w0, lanes) * load(inp + (size_t)(bt - s) * W + w0, lanes);
            store(out + (size_t)bt * W + w0, sum, lanes);
        }
}

// The channels are divided among the threads, as in embedding_backward.
template <class Real>
inline void short_conv_backward(Real* dinp,           // (B,T,W)
                                float* dweight,       // (K,W) +=
                                const Real* dout,     // (B,T,W)
                                const Real* inp,      // (B,T,W)
                                const float* weight,  // (K,W)
                                int B, int T, int W, int K) {
#pragma omp parallel for schedule(static)
    for (int w0 = 0; w0 < W; w0 += kLanes) {
        int lanes = W - w0 < kLanes ? W - w0 : kLanes;
        for (int bt = 0; bt < B * T; bt++) {
            int t = bt % T;
            vec x = load(inp + (size_t)bt * W + w0, lanes), dx = {};
            for (int s = 0; s < K && t + s < T; s++) {
                vec d = load(dout + (size_t)(bt + s) * W + w0, lanes);
                size_t at = (size_t)s * W + w0;
                dx += load(weight + at, lanes) * d;
                store(dweight + at, load(dweight + at, lanes) + x * d, lanes);
            }
            store(dinp + (size_t)bt * W + w0, dx, lanes);
        }
    }
}

}  // namespace cpu
