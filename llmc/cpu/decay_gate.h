// The gate of --decay gate: a factor f = sigmoid(u . w_h + b_h) for each token and head, by which attention
// forgets all earlier tokens. u is the input of the projection that makes q, k and v.
//
// There are only a few heads, so both passes read u once, in plain loops, and take no longer than a matrix
// product would.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

constexpr int kGateHeads = 4;  // heads whose sums stay in registers together

// The weight (C,H) as (H,C), in floats.
template <class Real>
inline std::vector<float> gate_rows(const Real* weight, int C, int H) {
    std::vector<float> rows((size_t)H * C);
    for (int c = 0; c < C; c++)
        for (int h = 0; h < H; h++) rows[(size_t)h * C + c] = weight[(size_t)c * H + h];
    return rows;
}

template <class Real>
inline void decay_gate_forward(float* log_f,        // (B,H,T)
                               const Real* inp,     // (B,T,C)
                               const Real* weight,  // (C,H)
                               const float* bias,   // (H)
                               int B, int T, int C, int H) {
    const std::vector<float> rows = gate_rows(weight, C, H);
#pragma omp parallel for schedule(static)
    for (int bt = 0; bt < B * T; bt++) {
        const Real* u = inp + (size_t)bt * C;
        for (int h0 = 0; h0 < H; h0 += kGateHeads) {
            const int heads = std::min(kGateHeads, H - h0);
            vec sums[kGateHeads] = {};
            const float* from[kGateHeads];  // a head beyond the last one repeats it
            for (int i = 0; i < kGateHeads; i++) from[i] = &rows[(size_t)std::min(h0 + i, H - 1) * C];
            for_vectors(C, [&](int c, int n) {
                const vec x = load(u + c, n);
                for (int i = 0; i < kGateHeads; i++) sums[i] += x * load(from[i] + c, n);
            });
            for (int i = 0; i < heads; i++) {
                const float z = bias[h0 + i] + sum(sums[i]);
                // log sigmoid(z), where the argument of exp() is never positive
                log_f[((size_t)(bt / T) * H + h0 + i) * T + bt % T] =
                    std::min(z, 0.0f) - std::log1p(std::exp(-std::abs(z)));
            }
        }
    }
}

// The channels are divided among the threads, as in embedding_backward.
template <class Real>
inline void decay_gate_backward(Real* dinp,           // (B,T,C) +=
                                float* dweight,       // (C,H) += if `accumulate`, otherwise =
                                float* dbias,         // (H) +=
                                const float* dlog_f,  // (B,H,T)
                                const float* log_f,   // (B,H,T)
                                const Real* inp,      // (B,T,C)
                                const Real* weight,   // (C,H)
                                bool accumulate, int B, int T, int C, int H) {
    const int N = B * T;
    const std::vector<float> rows = gate_rows(weight, C, H);
    std::vector<float> dz((size_t)N * H);  // (N,H)
#pragma omp parallel for schedule(static)
    for (int h = 0; h < H; h++) {
        double total = 0;
        for (int bt = 0; bt < N; bt++) {
            const size_t at = ((size_t)(bt / T) * H + h) * T + bt % T;
            // d log sigmoid(z) = 1 - sigmoid(z)
            total += dz[(size_t)bt * H + h] = dlog_f[at] * -std::expm1(log_f[at]);
        }
        dbias[h] += (float)total;
    }
#pragma omp parallel for schedule(static)
    for (int c = 0; c < C; c += kLanes) {
        const int lanes = std::min(kLanes, C - c);
        for (int h0 = 0; h0 < H; h0 += kGateHeads) {
            const int heads = std::min(kGateHeads, H - h0);
            vec w[kGateHeads] = {}, dw[kGateHeads] = {};
            for (int i = 0; i < heads; i++) w[i] = load(&rows[(size_t)(h0 + i) * C + c], lanes);
            for (int bt = 0; bt < N; bt++) {
                const size_t at = (size_t)bt * C + c;
                const vec u = load(inp + at, lanes);
                vec du = load(dinp + at, lanes);
                for (int i = 0; i < heads; i++) {
                    const float d = dz[(size_t)bt * H + h0 + i];
                    du += d * w[i];
                    dw[i] += d * u;
                }
                store(dinp + at, du, lanes);
            }
            for (int i = 0; i < heads; i++)
                for (int lane = 0; lane < lanes; lane++) {
                    float& to = dweight[(size_t)(c + lane) * H + h0 + i];
                    to = (accumulate ? to : 0.0f) + dw[i][lane];
                }
        }
    }
}

}  // namespace cpu
