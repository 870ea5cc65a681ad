// Two optional layers between the qkv projection and attention, in one pass. The first is an RMS norm of each
// head of q and k, with a learned gain for each head of q. The second is rotary positions (arXiv 2104.09864),
// which rotate the pairs of channels i and i + D/2. A row of qkv is q (H,D), k (H,D), v (H,D); v is copied.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"
#include "llmc/layer_constants.h"
#include "llmc/rope.h"

namespace cpu::inline LLMC_ISA {

using ::rope_table;

// out must not be inp. Without the norm, rstd is not written.
template <class Real>
inline void qk_norm_rope_forward(Real* out,            // (B,T,3C)
                                 float* rstd,          // (B,T,2H): the heads of q, then those of k
                                 const Real* inp,      // (B,T,3C)
                                 const float* q_gain,  // (H), or null: no norm
                                 const float* rope,    // (T,D) from rope_table, or null: no rotation
                                 int B, int T, int H, int D) {
    int C = H * D, half = D / 2;
#pragma omp parallel for schedule(static)
    for (int bt = 0; bt < B * T; bt++) {
        const float* cosine = rope ? rope + (size_t)(bt % T) * D : nullptr;
        const float* sine = rope ? cosine + half : nullptr;
        for (int h = 0; h < 2 * H; h++) {
            const Real* x = inp + (size_t)bt * 3 * C + h * D;
            Real* o = out + (size_t)bt * 3 * C + h * D;
            float scale = 1;
            if (q_gain) {
                vec squares = {};
                for_vectors(D, [&](int i, int n) { squares += load(x + i, n) * load(x + i, n); });
                float r = 1.0f / sqrtf(sum(squares) / D + kQkNormEps);
                rstd[(size_t)bt * 2 * H + h] = r;
                scale = h < H ? r * q_gain[h] : r;
            }
            if (rope) {
                for_vectors(half, [&](int i, int n) {
                    vec a = load(x + i, n) * scale, b = load(x + half + i, n) * scale;
                    vec c = load(cosine + i, n), s = load(sine + i, n);
                    store(o + i, a * c - b * s, n);
                    store(o + half + i, b * c + a * s, n);
                });
            } else {
                for_vectors(D, [&](int i, int n) { store(o + i, load(x + i, n) * scale, n); });
            }
        }
        const Real* v = inp + (size_t)bt * 3 * C + 2 * C;
        Real* o = out + (size_t)bt * 3 * C + 2 * C;
        std::copy_n(v, C, o);
    }
}

template <class Real>
inline void qk_norm_rope_backward(Real* dinp,           // (B,T,3C), may be dout
                                  float* dq_gain,       // (H) +=, or null if q_gain is null
                                  const Real* dout,     // (B,T,3C)
                                  const Real* inp,      // (B,T,3C)
                                  const float* rstd,    // (B,T,2H)
                                  const float* q_gain,  // (H), or null
                                  const float* rope,    // (T,D), or null
                                  int B, int T, int H, int D) {
    int C = H * D, half = D / 2;
    std::vector<float> dgain(q_gain ? (size_t)B * T * H : 0);  // (B,T,H), summed in order at the end
#pragma omp parallel
    {
        std::vector<float> unrotated(D);  // gradient of the head after the norm and before the rotation
#pragma omp for schedule(static)
        for (int bt = 0; bt < B * T; bt++) {
            for (int h = 0; h < 2 * H; h++) {
                size_t at = (size_t)bt * 3 * C + h * D;
                float* d = unrotated.data();
                if (rope) {  // the inverse rotation
                    const float* cosine = rope + (size_t)(bt % T) * D;
                    const float* sine = cosine + half;
                    for_vectors(half, [&](int i, int n) {
                        vec a = load(dout + at + i, n), b = load(dout + at + half + i, n);
                        vec c = load(cosine + i, n), s = load(sine + i, n);
                        store(d + i, a * c + b * s, n);
                        store(d + half + i, b * c - a * s, n);
                    });
                } else {
                    for_vectors(D, [&](int i, int n) { store(d + i, load(dout + at + i, n), n); });
                }
                float r = 1, gain = 1, mean = 0;
                const Real* x = inp + at;
                if (q_gain) {
                    r = rstd[(size_t)bt * 2 * H + h];
                    gain = h < H ? q_gain[h] : 1.0f;
                    vec dots = {};  // products of d and the normalised head
                    for_vectors(D, [&](int i, int n) { dots += load(d + i, n) * (load(x + i, n) * r); });
                    float dot = sum(dots);
                    if (h < H) dgain[(size_t)bt * H + h] = dot;
                    mean = dot / D;
                }
                for_vectors(D, [&](int i, int n) {
                    vec dx = load(d + i, n);
                    if (q_gain) dx = gain * r * (dx - load(x + i, n) * r * mean);
                    store(dinp + at + i, dx, n);
                });
            }
            size_t v = (size_t)bt * 3 * C + 2 * C;
            if (dinp != dout) std::copy_n(dout + v, C, dinp + v);
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
