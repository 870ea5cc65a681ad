// Polynomial attention at a cost that is linear in the length: the twin of llmc/cpu/attention_linear.h, where
// the idea is explained. The numbers are those of attention.h, except for rounding.
//
// The sequence is cut into segments. Pairs within one go through the tiles of attention.h; those across a
// boundary between two go through its state, by kernels that run for all boundaries, tokens and heads at
// once:
//
//   linear_states  what a segment's keys give to the state of the boundary after it, sum gamma^n phi(k) v^T
//   linear_scan    each boundary's state: what was given to it and, faded, to those before
//   linear_rows    o of the queries after it, phi(q) S; the tiles add theirs
//
// The backward pass does the first two for the keys, and from the right for the queries, whose states
// dS = sum c_i gamma^n phi(q) dO^T lie at the same boundaries; then linear_rows makes dq from S, dk and dv
// from dS. A boundary is at a distance from every key and query, so that with a decay nothing is taken to a
// negative power of gamma, and the gradient of log gamma is a sum of shares: queries times their distance,
// keys times theirs, and for each two neighbouring boundaries what passes both.
//
// In bf16 features and states are rounded where tensor cores multiply them and float elsewhere; the
// normaliser of `sum` is float throughout.
#pragma once
#include <algorithm>

#include "llmc/attention_linear_form.h"
#include "llmc/cuda/attention/attention.h"
#include "llmc/cuda/attention/features.h"

namespace gpu {

// Tokens in a segment. The states of a head have as many numbers as features times D for each: with a quarter
// as many tokens as features they take the memory of four outputs in float, and pairs within a segment
// are a small share of the work.
inline int linear_segment(int power, int D) {
    int tokens = feature_tiles(power, D) * kFeatures / 4;
    return std::max(128, ceil_div(tokens, 64) * 64);
}

// Whether the linear form is the faster one at T tokens, by operations: with both passes the tiles have 9
// products of (T+64)/2 keys for each query, the linear form 7 of its features and those of half a segment.
// The overhead waits for a measurement on hardware.
inline bool linear_pays(const AttentionConfig& config, int T, int D) {
    constexpr int kOverhead = 512;
    if (!has_linear_form(config, D)) return false;
    int features = feature_tiles(config.power(), D) * kFeatures, segment = linear_segment(config.power(), D);
    return 9.0 * (T + 64) / 2 > 7.0 * features + 9.0 * (segment + 64) / 2 + kOverhead;
}

// Floats in the scratch buffers of the two functions. segment: as theirs.
template <class Real>
size_t attention_linear_forward_scratch(const AttentionConfig& config, int B, int T, int H, int D,
                                        int segment = 0);
template <class Real>
size_t attention_linear_backward_scratch(const AttentionConfig& config, int B, int T, int H, int D,
                                         int segment = 0);

template <class Real>
void attention_linear_forward(Real* out,           // (B,T,C)
                              float* stats,        // (stats_size)
                              float* scratch,      // (attention_linear_forward_scratch)
                              const Real* qkv,     // (B,T,3C)
                              const float* decay,  // (H), or null
                              const AttentionConfig& config, int B, int T, int H, int D, cudaStream_t stream,
                              int segment = 0 /*tokens, a multiple of 64; 0: linear_segment()*/);

template <class Real>
void attention_linear_backward(Real* dqkv,          // (B,T,3C)
                               float* ddecay,       // (H) +=, or null: not wanted
                               float* scratch,      // (attention_linear_backward_scratch), at 16 bytes
                               const Real* dout,    // (B,T,C)
                               const Real* out,     // (B,T,C)
                               const float* stats,  // (stats_size)
                               const Real* qkv,     // (B,T,3C)
                               const float* decay,  // (H), or null
                               const AttentionConfig& config, int B, int T, int H, int D, cudaStream_t stream,
                               int segment = 0);

}  // namespace gpu
