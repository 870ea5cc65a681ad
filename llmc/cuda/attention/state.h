// Attention of new tokens to all earlier ones through a state of fixed size: the twin of
// llmc/cpu/attention_state.h, for the kinds of attention with has_linear_form(). The state is float whatever
// the model computes in, because its sums grow with the text.
//
// The features are those of features.h. The state of a head has sum_j gamma^(i-j) phi(k_j) v_j^T (features,D)
// and then, for the scale `sum`, sum_j gamma^(i-j) phi(k_j) (features).
#pragma once
#include "llmc/cuda/attention/linear.h"

namespace gpu {

inline size_t state_size(int power, int D) {  // floats of a head
    return (size_t)feature_tiles(power, D) * kFeatures * (D + 1);
}

// From this number of tokens on, the state is smaller than their keys and values, and costs less to update
// than they cost to read.
inline int state_pays_from(int power, int D) {
    return feature_tiles(power, D) * kFeatures;
}

// The number of floats in the scratch buffer of attention_state_forward.
size_t attention_state_scratch(int power, int H, int D);

// Adds n tokens to the state and computes their outputs; a token sees itself and the tokens before it.
template <class Real>
void attention_state_forward(Real* out,               // (n,C)
                             float* state,            // (H,state_size)
                             float* scratch,          // (attention_state_scratch)
                             const Real* qkv,         // (n,3C)
                             const Decay& decay,      // gates: log_f (H,n)
                             const float* row_scale,  // (n,H): c_i of the new rows; `sum` ignores it
                             const AttentionConfig& config, int n, int H, int D, cudaStream_t stream);

// Adds n tokens to the state without their outputs, given the keys and values that a cache has kept of them.
template <class Real>
void attention_state_of_cache(float* state,        // (H,state_size)
                              const Real* cache,   // (n,2C)
                              const Decay& decay,  // gates: log_f (H,n)
                              const AttentionConfig& config, int n, int H, int D, cudaStream_t stream);

}  // namespace gpu
