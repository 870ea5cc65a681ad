// A causal depthwise convolution over time: z_t = sum_{s<K} weight[s] inp_{t-s}, zero before the first token.
#pragma once
#include <cstddef>

namespace cpu {

inline void short_conv_forward(float* out,           // (B,T,W)
                               const float* inp,     // (B,T,W)
                               const float* weight,  // (K,W)
                               int B, int T, int W, int K) {
#pragma omp parallel for schedule(static)
    for (int bt = 0; bt < B * T; bt++) {
        const float* x = inp + (size_t)bt * W;
        float* o = out + (size_t)bt * W;
        for (int w = 0; w < W; w++) o[w] = weight[w] * x[w];
        for (int s = 1; s < K && s <= bt % T; s++) {
            const float* ws = weight + (size_t)s * W;
            const float* xs = x - (size_t)s * W;
            for (int w = 0; w < W; w++) o[w] += ws[w] * xs[w];
        }
    }
}

// The threads share out the channels, as in embedding_backward.
inline void short_conv_backward(float* dinp,          // (B,T,W)
                                float* dweight,       // (K,W) +=
                                const float* dout,    // (B,T,W)
                                const float* inp,     // (B,T,W)
                                const float* weight,  // (K,W)
                                int B, int T, int W, int K) {
    constexpr int kColumns = 64;
#pragma omp parallel for schedule(static)
    for (int w0 = 0; w0 < W; w0 += kColumns) {
        int w1 = w0 + kColumns < W ? w0 + kColumns : W;
        for (int bt = 0; bt < B * T; bt++) {
            int t = bt % T;
            float* dx = dinp + (size_t)bt * W;
            const float* x = inp + (size_t)bt * W;
            for (int w = w0; w < w1; w++) dx[w] = 0;
            for (int s = 0; s < K && t + s < T; s++) {
                const float* ds = dout + (size_t)(bt + s) * W;
                const float* ws = weight + (size_t)s * W;
                float* dws = dweight + (size_t)s * W;
                for (int w = w0; w < w1; w++) {
                    dx[w] += ws[w] * ds[w];
                    dws[w] += x[w] * ds[w];
                }
            }
        }
    }
}

}  // namespace cpu
