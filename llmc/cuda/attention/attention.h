// Causal attention of every kind, forward and backward: the twin of llmc/cpu/attention.h, where the
// formulas and the contents of stats are. bf16 on tensor cores here, float in kernels_float.h.
//
// A block has 64 queries (or keys) and walks through the tiles of 64 keys (or queries) that they see; its
// four warps have 16 rows each. The next tile comes by cp.async while one is worked on; scores and weights
// never leave registers. What lies above the diagonal is not computed, on the diagonal in steps of 16. Head
// sizes 32, 64, 80, 96 and 128 have kernels of their own, others up to 128 go with the next of these, padded
// with zeros.
//
// An activation (llmc/activation.h) that is not online is a function of the single score: its kernels have no
// row maximum, no rescaling, no log-sum-exp and no dO . O.
//
// Backward: one kernel over tiles of keys for dk and dv, one over tiles of queries for dq, which makes the
// scores once more: 7 products instead of 5. So nothing is added up across blocks: the result is the same
// bits always, without atomics, without blocks that wait for others and without a buffer that grows with T^2.
//
// The functions are defined in attention.cu, for float and bf16: its many kernels take longer to build than
// all the rest.
#pragma once
#include "llmc/config.h"
#include "llmc/cuda/attention/tiles_bf16.h"

namespace gpu {

template <class Real>
bool keeps_exact_output(const AttentionConfig& config) {
    return config.has_row_sum() && !std::is_same_v<Real, float>;
}

// Floats in stats.
template <class Real>
size_t stats_size(const AttentionConfig& config, size_t B, size_t T, int H, int D) {
    if (!config.softmax() && !config.has_row_sum()) return 0;
    return B * T * H * (keeps_exact_output<Real>(config) ? 1 + D : 1);
}

// Floats in the scratch buffer of attention_forward.
inline size_t attention_forward_scratch(int T, int H) {
    return AttentionTables::size(T, H);
}

// Where there are segments, the linear form calls it and has made the tables in scratch.
template <class Real>
void attention_forward(Real* out,           // (B,T,C)
                       float* stats,        // (stats_size)
                       float* scratch,      // (attention_forward_scratch)
                       const Real* qkv,     // (B,T,3C)
                       const float* decay,  // (H), or null
                       const AttentionConfig& config, int B, int T, int H, int D, cudaStream_t stream,
                       const AttentionSegments& segments = {});

// Floats in the scratch buffer of attention_backward, which begins at an 8-byte address.
inline size_t attention_backward_scratch(int B, int T, int H) {
    size_t tiles = ceil_div(T, kFloatTile);  // the smaller
    return (2 * tiles + T) * B * H + AttentionTables::size(T, H);
}

// What is in it.
struct AttentionBackwardTerms {
    double* dlog_gamma;  // (B,H,tiles)
    float* dot;          // (B,H,T): dO_i . O_i, for softmax and `sum` alone
    AttentionTables tables;
};

// Makes dot and the tables: the first thing that attention_backward does, unless there are segments.
template <class Real>
AttentionBackwardTerms attention_backward_terms(float* scratch,      // (attention_backward_scratch)
                                                const Real* dout,    // (B,T,C)
                                                const Real* out,     // (B,T,C)
                                                const float* stats,  // (stats_size)
                                                const float* decay,  // (H), or null
                                                const AttentionConfig& config, int B, int T, int H, int D,
                                                cudaStream_t stream);

template <class Real>
void attention_backward(Real* dqkv,          // (B,T,3C)
                        float* ddecay,       // (H) +=, or null: not wanted
                        float* scratch,      // (attention_backward_scratch)
                        const Real* dout,    // (B,T,C)
                        const Real* out,     // (B,T,C)
                        const float* stats,  // (stats_size)
                        const Real* qkv,     // (B,T,3C)
                        const float* decay,  // (H), or null
                        const AttentionConfig& config, int B, int T, int H, int D, cudaStream_t stream,
                        const AttentionSegments& segments = {});

}  // namespace gpu
