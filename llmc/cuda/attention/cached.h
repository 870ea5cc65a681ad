// Attention of a few new tokens to all earlier ones, whose keys and values are kept: for generation. The
// formulas are those of attention.h. A token costs O(T), and its output is that of attention_forward except
// for rounding.
#pragma once
#include "llmc/config.h"
#include "llmc/cuda/common.h"

namespace gpu {

template <class Real>
void attention_cached_forward(
    Real* out,               // (n,C)
    float* scores,           // (n,H,start+n), scratch
    const Real* qkv,         // (n,3C): tokens start .. start+n-1, of which only q is read
    const Real* cache,       // (start+n,2C): k and v of every token so far
    const float* decay,      // (H): delta, or null
    const float* row_scale,  // (n,H): c_i of the new rows; softmax and `sum` ignore it
    const AttentionConfig& config, int start, int n, int H, int D, cudaStream_t stream);

}  // namespace gpu
