// The scratch memory of the layers. They run one after another, so all of them use the same memory.
#pragma once
#include <algorithm>
#include <cstddef>

#include "llmc/config.h"
#include "llmc/cuda/attention/attention.h"
#include "llmc/cuda/attention/linear.h"
#include "llmc/cuda/attention/norms.h"
#include "llmc/cuda/decay_gate.h"
#include "llmc/cuda/embedding.h"
#include "llmc/cuda/gelu.h"
#include "llmc/cuda/layernorm.h"
#include "llmc/cuda/qk_norm_rope.h"
#include "llmc/cuda/short_conv.h"
#include "llmc/model.h"

namespace gpu {

// The number of floats that the layer with the largest need takes, for batches of up to options.batch x
// options.seq.
//   linear: whether attention is computed in its linear form at T = options.seq
template <class Real>
size_t scratch_size(const GPTConfig& config, const ModelOptions& options, bool linear) {
    int B = options.batch, T = options.seq, N = B * T;
    int H = config.heads, D = config.head_size(), C = config.channels, K = config.short_conv;
    AttentionConfig attention = config.attention();
    // A sequence shorter than T may use tiles even if the linear form is used at T.
    const bool gates = config.decay == DecayKind::gate;
    size_t forward = attention_forward_scratch(T, H, gates ? B : 0);
    size_t backward = attention_backward_scratch(B, T, H, gates);
    if (linear) {
        forward = std::max(forward, attention_linear_forward_scratch<Real>(attention, B, T, H, D, 0, gates));
        backward =
            std::max(backward, attention_linear_backward_scratch<Real>(attention, B, T, H, D, 0, gates));
    }
    if (options.purpose != Purpose::training) return forward;
    return std::max({forward, backward, attention_norms_scratch(B, T, H, gates),
                     embedding_backward_scratch(B, T, C), layernorm_backward_scratch(N, C),
                     gelu_backward_scratch(N, config.mlp_width()), config.qk_norm ? qk_norm_rope_scratch(B, T, H) : 0,
                     gates ? decay_gate_scratch(B, T, C, H) : 0, K ? short_conv_scratch(B, T, 3 * C, K) : 0});
}

}  // namespace gpu
