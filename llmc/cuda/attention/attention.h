// Causal attention of every kind, forward and backward: the twin of llmc/cpu/attention.h, where the formulas
// and the contents of stats are. The kernels for bf16 use tensor cores (kernels_bf16.h), those for float
// plain multiply-adds (kernels_float.h).
//
// A block takes a tile of 64 queries and walks through the tiles of 64 keys that they see; in the kernel for
// dk and dv it takes 64 keys and walks through the queries that see them. Each of its four warps has 16 rows.
// The next tile is copied while the block works on one, and scores and weights never leave the registers.
// Tiles above the diagonal are not computed, and on the diagonal only the blocks of 16 x 16 that hold a
// visible pair. Head sizes 32, 64, 80, 96 and 128 have kernels of their own. Other sizes up to 128 use the
// kernel of the next larger one, padded with zeros.
//
// An activation (llmc/activation.h) that is not online is a function of a single score: its kernels have no
// row maximum, no rescaling, no log-sum-exp and no dO . O.
//
// The backward pass has one kernel for dk and dv and one for dq, which computes the scores once more: 7
// products instead of 5. In return nothing is added up across blocks. So the result is always the same bits,
// and there are no atomics, no blocks that wait for others and no buffer that grows with T^2.
//
// Each public header of this folder declares functions for the host, and the .cu file of the same name
// defines them for float and bf16. They have objects of their own, because their many kernels take longer to
// build than everything else. gated.cu has those of attention.cu again, with gates. Words and names of all
// files here:
//
//   tile      64 rows (float: 32) of q, k, v or dO in shared memory; also the pairs of two of them
//   row       row i of A, of dA or of O: a query. Where a kernel's own rows are keys, it says so
//   stage     one of two buffers for tiles: one is filled while the other is read
//   stats     what the forward pass keeps of each row: softmax's log-sum-exp, or the sum of the scale `sum`
//   dot       dO_i . O_i, which the derivative of a row's normaliser needs
//   fade      gamma^n at distance n = i-j: "inside" a tile, and "beyond" it, from its edge to another tile
//   share     what one thread or block contributes to a sum that others complete
//   segment   a stretch of tokens of the linear form (linear.h); pairs inside it go through tiles
//   boundary  the place between two segments, given by the token that follows it
//   slot      the index of a boundary, and the place of its state in memory
//   part      what one segment alone gives to the state of a boundary
#pragma once
#include "llmc/config.h"
#include "llmc/cuda/attention/decay.h"
#include "llmc/cuda/common.h"

namespace gpu {

constexpr int kAttentionTile = 64;      // queries or keys in a tile of bf16
constexpr int kFloatTile = 32;          // and of float
constexpr int kAttentionThreads = 128;  // in a block: four warps

template <class Real>
constexpr int attention_tile = std::is_same_v<Real, float> ? kFloatTile : kAttentionTile;

// Whether stats also has the output in float, because dO . O is a small difference of large numbers with the
// scale `sum`.
template <class Real>
bool keeps_exact_output(const AttentionConfig& config) {
    return config.has_row_sum() && !std::is_same_v<Real, float>;
}

// The number of floats in stats.
template <class Real>
size_t stats_size(const AttentionConfig& config, size_t B, size_t T, int H, int D) {
    if (!config.softmax() && !config.has_row_sum()) return 0;
    return B * T * H * (keeps_exact_output<Real>(config) ? 1 + D : 1);
}

// The number of floats in the scratch buffer of attention_forward, which begins at an 8-byte address.
//   gates: B if there are gates, otherwise 0
size_t attention_forward_scratch(int T, int H, int gates = 0);

// The linear form (linear.h) cuts the sequence into segments. The tiles then compute the pairs inside each
// segment and add what the other segments give. Length 0 means a single segment.
struct AttentionSegments {
    int length = 0;                 // tokens, a multiple of 64
    const float* sums = nullptr;    // forward (B,T,C): o without c_i; backward (B,T,3C): dq, dk and dv
    const float* totals = nullptr;  // (B,H,T): the sum of gamma^(i-j) |x_ij^p|, only for the scale `sum`
};

// If there are segments, scratch holds the tables already: the linear form has made them.
template <class Real>
void attention_forward(Real* out,        // (B,T,C)
                       float* stats,     // (stats_size)
                       float* scratch,   // (attention_forward_scratch)
                       const Real* qkv,  // (B,T,3C)
                       const Decay& decay, const AttentionConfig& config, int B, int T, int H, int D,
                       cudaStream_t stream, const AttentionSegments& segments = {});

// The number of floats in the scratch buffer of attention_backward, which begins at an 8-byte address.
size_t attention_backward_scratch(int B, int T, int H, bool gates = false);

//   crossing (B,H,boundaries): with gates and segments, what pairs on two sides of a boundary add to the
//   gradient of log f there. The sums of rows and columns (gates.h) have such pairs already, too.
template <class Real>
void attention_backward(Real* dqkv,        // (B,T,3C)
                        float* ddecay,     // (H) +=, or null if it is not wanted; (B,H,T) of log f for gates
                        float* scratch,    // (attention_backward_scratch)
                        const Real* dout,  // (B,T,C)
                        const Real* out,   // (B,T,C)
                        const float* stats,  // (stats_size)
                        const Real* qkv,     // (B,T,3C)
                        const Decay& decay, const AttentionConfig& config, int B, int T, int H, int D,
                        cudaStream_t stream, const AttentionSegments& segments = {},
                        const double* crossing = nullptr);

}  // namespace gpu
