// The numbers of llmc/norms.h for every head of a layer: the twin of llmc/cpu/attention_norms.h, where the
// formulas are. They have kernels of their own, which go through the same tiles, so that attention itself
// costs no more.
#pragma once
#include "llmc/cuda/attention/attention.h"
#include "llmc/norms.h"

namespace gpu {

// The number of floats in the scratch buffer of attention_norms, which begins at an 8-byte address.
size_t attention_norms_scratch(int B, int T, int H, bool gates = false);

template <class Real>
void attention_norms(NormSums* sums,      // (H)
                     float* scratch,      // (attention_norms_scratch)
                     const Real* qkv,     // (B,T,3C), as attention_forward read it
                     const float* stats,  // as attention_forward left them; may be null if stats_size is 0
                     const Decay& decay, const AttentionConfig& config, int B, int T, int H, int D,
                     cudaStream_t stream);

}  // namespace gpu
