// Polynomial attention at a cost that is linear in the length: the twin of llmc/cpu/attention_linear.h, where
// the idea is explained. The results are those of attention.h, except for rounding.
//
// The sequence is cut into segments. Pairs inside a segment go through the tiles of attention.h. Pairs on two
// sides of a boundary go through its state, by kernels that run for all boundaries, tokens and heads at once:
//
//   linear_states  the part that a segment's keys give to the boundary after it, sum gamma^n phi(k) v^T
//   linear_scan    the state of each boundary: its own part and, faded, the parts of all earlier segments
//   linear_rows    o of the queries after a boundary, phi(q) S, to which the tiles add theirs
//
// The backward pass does the first two for the keys, and then, from the right, for the queries, whose states
// dS = sum c_i gamma^n phi(q) dO^T lie at the same boundaries. After that linear_rows makes dq from S, and dk
// and dv from dS. Every key and query is at a positive distance from its boundary, so no power of gamma is
// negative. The gradient of log gamma is a sum of shares: one of the queries, by their distance to the
// boundary, one of the keys, by theirs, and one of each two neighbouring boundaries, by what passes both.
//
// In bf16, features and states are rounded to bf16 where tensor cores multiply them, and are float elsewhere.
// The normaliser of `sum` is always float.
#pragma once
#include <algorithm>

#include "llmc/attention_linear_form.h"
#include "llmc/cuda/attention/attention.h"

namespace gpu {

constexpr int kFeatures = 64;  // in a tile of features

// How many channels a block of them has (features.h).
__host__ __device__ constexpr int feature_block(int power) {
    return power == 1 ? 64 : power == 2 ? 8 : 4;
}

inline int feature_tiles(int power, int D) {
    int n = ceil_div(D, feature_block(power));
    return power == 1 ? n : power == 2 ? n * (n + 1) / 2 : n * (n + 1) * (n + 2) / 6;
}

// The number of tokens in a segment. The states of a head have D numbers for each feature. With a quarter as
// many tokens as features they take the memory of four outputs in float, and the pairs inside a segment are a
// small share of the work.
inline int linear_segment(int power, int D) {
    int tokens = feature_tiles(power, D) * kFeatures / 4;
    return std::max(128, ceil_div(tokens, 64) * 64);
}

// Whether the linear form is faster at T tokens, by the number of operations. Over both passes the tiles have
// 9 products of (T+64)/2 keys for each query; the linear form has 7 of its features, and 9 of half a segment.
// The overhead is a guess until somebody measures it on hardware.
inline bool linear_pays(const AttentionConfig& config, int T, int D) {
    constexpr int kOverhead = 512;
    if (!has_linear_form(config, D)) return false;
    int features = feature_tiles(config.power(), D) * kFeatures, segment = linear_segment(config.power(), D);
    return 9.0 * (T + 64) / 2 > 7.0 * features + 9.0 * (segment + 64) / 2 + kOverhead;
}

// The numbers of floats in the scratch buffers of the two functions, for the same segment.
template <class Real>
size_t attention_linear_forward_scratch(const AttentionConfig& config, int B, int T, int H, int D,
                                        int segment = 0, bool gates = false);
template <class Real>
size_t attention_linear_backward_scratch(const AttentionConfig& config, int B, int T, int H, int D,
                                         int segment = 0, bool gates = false);

template <class Real>
void attention_linear_forward(Real* out,        // (B,T,C)
                              float* stats,     // (stats_size)
                              float* scratch,   // (attention_linear_forward_scratch)
                              const Real* qkv,  // (B,T,3C)
                              const Decay& decay, const AttentionConfig& config, int B, int T, int H, int D,
                              cudaStream_t stream,
                              int segment = 0 /*tokens, a multiple of 64; 0 stands for linear_segment()*/);

template <class Real>
void attention_linear_backward(Real* dqkv,        // (B,T,3C)
                               float* ddecay,     // as in attention_backward
                               float* scratch,    // (attention_linear_backward_scratch), at a 16-byte address
                               const Real* dout,  // (B,T,C)
                               const Real* out,   // (B,T,C)
                               const float* stats,  // (stats_size)
                               const Real* qkv,     // (B,T,3C)
                               const Decay& decay, const AttentionConfig& config, int B, int T, int H, int D,
                               cudaStream_t stream, int segment = 0);

}  // namespace gpu
