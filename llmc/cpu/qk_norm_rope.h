// What stands between the qkv projection and attention, in one pass: RMS norm of q and k a head, with a
// learned gain a head on q, then rotary positions (arXiv 2104.09864), pairing channel i with i + D/2. Each is
// optional. A row of qkv is q (H,D), k (H,D), v (H,D); v passes through.
#pragma once
#include <cmath>
#include <cstddef>
#include <vector>

namespace cpu {

constexpr float kQkNormEps = 1e-6f;

// (T,D): row t is cos(t w_i) for i < D/2, then sin(t w_i), with w_i = 10000^(-2i/D).
inline std::vector<float> rope_table(int T, int D) {
    std::vector<float> table((size_t)T * D);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < D / 2; i++) {
            double angle = t * std::pow(10000.0, -2.0 * i / D);
            table[(size_t)t * D + i] = (float)std::cos(angle);
            table[(size_t)t * D + D / 2 + i] = (float)std::sin(angle);
        }
    return table;
}

// out may not be inp. rstd is left alone where there is no norm.
inline void qk_norm_rope_forward(float* out,           // (B,T,3C)
                                 float* rstd,          // (B,T,2H): of q, then of k
                                 const float* inp,     // (B,T,3C)
                                 const float* q_gain,  // (H), or null: no norm
                                 const float* rope,    // (T,D) from rope_table, or null: no rotation
                                 int B, int T, int H, int D) {
    int C = H * D, half = D / 2;
#pragma omp parallel for schedule(static)
    for (int bt = 0; bt < B * T; bt++) {
        for (int h = 0; h < 2 * H; h++) {
            const float* x = inp + (size_t)bt * 3 * C + h * D;
            float* o = out + (size_t)bt * 3 * C + h * D;
            float scale = 1;
            if (q_gain) {
                float squares = 0;
#pragma omp simd reduction(+ : squares)
                for (int i = 0; i < D; i++) squares += x[i] * x[i];
                float r = 1.0f / sqrtf(squares / D + kQkNormEps);
                rstd[(size_t)bt * 2 * H + h] = r;
                scale = h < H ? r * q_gain[h] : r;
            }
            if (rope) {
                const float* cosine = rope + (size_t)(bt % T) * D;
                const float* sine = cosine + half;
                for (int i = 0; i < half; i++) {
                    float a = x[i] * scale, b = x[i + half] * scale;
                    o[i] = a * cosine[i] - b * sine[i];
                    o[i + half] = b * cosine[i] + a * sine[i];
                }
            } else {
                for (int i = 0; i < D; i++) o[i] = x[i] * scale;
            }
        }
        const float* v = inp + (size_t)bt * 3 * C + 2 * C;
        float* o = out + (size_t)bt * 3 * C + 2 * C;
        for (int c = 0; c < C; c++) o[c] = v[c];
    }
}

inline void qk_norm_rope_backward(float* dinp,          // (B,T,3C), may be dout
                                  float* dq_gain,       // (H) +=, or null where q_gain is
                                  const float* dout,    // (B,T,3C)
                                  const float* inp,     // (B,T,3C)
                                  const float* rstd,    // (B,T,2H)
                                  const float* q_gain,  // (H), or null
                                  const float* rope,    // (T,D), or null
                                  int B, int T, int H, int D) {
    int C = H * D, half = D / 2;
    std::vector<float> dgain(q_gain ? (size_t)B * T * H : 0);  // (B,T,H), summed in order at the end
#pragma omp parallel
    {
        std::vector<float> unrotated(D);  // gradient of the normalised, not yet rotated head
#pragma omp for schedule(static)
        for (int bt = 0; bt < B * T; bt++) {
            for (int h = 0; h < 2 * H; h++) {
                size_t at = (size_t)bt * 3 * C + h * D;
                float* d = unrotated.data();
                if (rope) {  // the inverse rotation
                    const float* cosine = rope + (size_t)(bt % T) * D;
                    const float* sine = cosine + half;
                    for (int i = 0; i < half; i++) {
                        float a = dout[at + i], b = dout[at + i + half];
                        d[i] = a * cosine[i] + b * sine[i];
                        d[i + half] = b * cosine[i] - a * sine[i];
                    }
                } else {
                    for (int i = 0; i < D; i++) d[i] = dout[at + i];
                }
                if (!q_gain) {
                    for (int i = 0; i < D; i++) dinp[at + i] = d[i];
                    continue;
                }
                const float* x = inp + at;
                float r = rstd[(size_t)bt * 2 * H + h];
                float gain = h < H ? q_gain[h] : 1.0f;
                float dot = 0;  // of d with the normalised head
#pragma omp simd reduction(+ : dot)
                for (int i = 0; i < D; i++) dot += d[i] * (x[i] * r);
                if (h < H) dgain[(size_t)bt * H + h] = dot;
                float mean = dot / D;
                for (int i = 0; i < D; i++) dinp[at + i] = gain * r * (d[i] - x[i] * r * mean);
            }
            size_t v = (size_t)bt * 3 * C + 2 * C;
            if (dinp != dout)
                for (int c = 0; c < C; c++) dinp[v + c] = dout[v + c];
        }
    }
    if (!q_gain) return;
    for (int h = 0; h < H; h++) {
        double total = 0;
        for (int bt = 0; bt < B * T; bt++) total += dgain[(size_t)bt * H + h];
        dq_gain[h] += (float)total;
    }
}

}  // namespace cpu
