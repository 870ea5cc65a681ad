// The numbers of llmc/norms.h for every head of a layer, in tiles as attention goes: the twin of
// llmc/cpu/attention_norms.h, where the formulas are. Kernels of its own, so that attention itself pays
// nothing for them.
#pragma once
#include "llmc/cuda/attention/attention.h"
#include "llmc/norms.h"

namespace gpu {

// Floats in the scratch buffer of attention_norms, which begins at an 8-byte address.
inline size_t attention_norms_scratch(int B, int T, int H) {
    size_t blocks = (size_t)B * H * ceil_div(T, kFloatTile);  // the smaller tile
    return blocks * sizeof(NormSums) / sizeof(float) + AttentionTables::size(T, H);
}

template <class Real>
void attention_norms(NormSums* sums,      // (H)
                     float* scratch,      // (attention_norms_scratch)
                     const Real* qkv,     // (B,T,3C): what attention_forward read
                     const float* stats,  // what attention_forward left; may be null where that is nothing
                     const float* decay,  // (H), or null
                     const AttentionConfig& config, int B, int T, int H, int D, cudaStream_t stream);

}  // namespace gpu
