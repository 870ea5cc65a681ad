// What a model keeps between its forward and its backward pass. It is the same for every backend: the
// buffers and their names, which of them share memory, what the backward pass computes again, and where a NaN
// came from.
#pragma once
#include <algorithm>
#include <cstddef>
#include <string>
#include <type_traits>
#include <vector>

#include "llmc/config.h"
#include "llmc/error.h"
#include "llmc/memory_plan.h"
#include "llmc/model.h"
#include "llmc/parameters.h"

// The results of one block's forward pass that its backward pass reads. If the model lacks an optional layer,
// that layer's output is the same memory as its input.
template <class Real>
struct LayerActivations {
    Real* ln_1;            // (B,T,C)
    float* ln_1_mean;      // (B,T)
    float* ln_1_rstd;      // (B,T)
    Real* qkv;             // (B,T,3C)
    Real* conv;            // (B,T,3C): q, k, v after the short convolution
    Real* heads;           // (B,T,3C): q, k, v after qk-norm and RoPE
    float* qk_rstd;        // (B,T,2H), with qk-norm
    float* log_f;          // (B,H,T): the logarithms of the gates, with --decay gate
    Real* attn;            // (B,T,C)
    float* attn_stats;     // (stats_size), with the kinds of attention that need them
    Real* gate;            // (B,T,C), with output_gate: before its sigmoid
    Real* gated;           // (B,T,C): attention's output after the output gate
    float* residual_attn;  // (B,T,C): residual stream after attention
    Real* ln_2;            // (B,T,C)
    float* ln_2_mean;      // (B,T)
    float* ln_2_rstd;      // (B,T)
    Real* fc;              // (B,T,F)
    Real* gelu;            // (B,T,F)
    float* residual_mlp;   // (B,T,C): residual stream after the MLP
};

template <class Real>
struct Activations {
    float* embedded;  // (B,T,C)
    std::vector<LayerActivations<Real>> h;
    Real* ln_f;        // (B,T,C)
    float* ln_f_mean;  // (B,T)
    float* ln_f_rstd;  // (B,T)
    Real* delta;       // (B,T,C): what a block adds to the residual stream; reused
    float* losses;     // (B,T)
};

// Gradients of activations. All layers use the same buffers, one after another.
template <class Real>
struct ActivationGradients {
    float* residual;      // (B,T,C)
    Real* residual_real;  // (B,T,C): the same values in the type of the matrix products
    Real* norm;           // (B,T,C): gradient of the output of a LayerNorm or of attention
    Real* qkv;            // (B,T,3C)
    Real* conv;           // (B,T,3C), with short_conv
    Real* gate;           // (B,T,C), with output_gate; the same memory as fc
    float* log_f;         // (B,H,T), with --decay gate
    Real* fc;             // (B,T,F)
};

// Whether the backward pass must compute these activations of block l again because later blocks have
// overwritten them. Those of the last block are still there.
inline bool is_recomputed(const ModelOptions& options, Recompute group, int l, int L) {
    return options.recompute >= group && l + 1 < L;
}

// Adds all of the above to a plan, for batches of up to options.batch x options.seq. A block has its own
// buffer if the backward pass will read it. Otherwise all blocks share the buffer of the first one.
//   attn_stats (L): the numbers of floats that the blocks' attention keeps for its backward pass
template <class Real, class Memory>
void plan_activations(MemoryPlan<Memory>& plan, Activations<Real>& acts, ActivationGradients<Real>& grads,
                      const GPTConfig& config, const ModelOptions& options,
                      const std::vector<size_t>& attn_stats) {
    size_t N = (size_t)options.batch * options.seq, C = config.channels, H = config.heads;
    size_t F = config.mlp_width();
    bool training = options.purpose == Purpose::training;
    auto shares = [&](Recompute group) { return !training || options.recompute >= group; };
    const size_t most_stats = *std::max_element(attn_stats.begin(), attn_stats.end());
    acts.h.resize(config.layers);
    plan.add(acts.embedded, N * C, "embedded");
    for (int l = 0; l < config.layers; l++) {
        LayerActivations<Real>&a = acts.h[l], &first = acts.h[0];
        a = {};
        std::string h = str("h.", l, ".");
        auto add = [&](auto& slot, auto& first_slot, size_t size, const char* name, Recompute group) {
            if (shares(group) && l > 0) {
                plan.alias(slot, first_slot);
            } else {
                plan.add(slot, size, shares(group) ? "" : h + name);
            }
        };
        auto block = Recompute::block;
        add(a.ln_1, first.ln_1, N * C, "ln_1", Recompute::layernorm);
        add(a.ln_1_mean, first.ln_1_mean, N, "ln_1 mean", block);
        add(a.ln_1_rstd, first.ln_1_rstd, N, "ln_1 rstd", block);
        add(a.qkv, first.qkv, N * 3 * C, "attn.qkv", block);
        if (config.short_conv) {
            add(a.conv, first.conv, N * 3 * C, "attn.conv", block);
        } else {
            plan.alias(a.conv, a.qkv);
        }
        if (config.qk_norm) add(a.qk_rstd, first.qk_rstd, N * 2 * H, "attn.qk rstd", block);
        if (config.qk_norm || config.rope()) {
            add(a.heads, first.heads, N * 3 * C, "attn.heads", block);
        } else {
            plan.alias(a.heads, a.conv);
        }
        if (config.decay == DecayKind::gate) add(a.log_f, first.log_f, N * H, "attn.log_f", block);
        const size_t stats = shares(block) ? most_stats : attn_stats[l];
        if (stats) add(a.attn_stats, first.attn_stats, stats, "attn.stats", block);
        add(a.attn, first.attn, N * C, "attn.out", block);
        if (config.output_gate) {
            add(a.gate, first.gate, N * C, "attn.gate", block);
            add(a.gated, first.gated, N * C, "attn.gated", Recompute::gelu);
        } else {
            plan.alias(a.gated, a.attn);
        }
        add(a.residual_attn, first.residual_attn, N * C, "attn.residual", block);
        add(a.ln_2, first.ln_2, N * C, "ln_2", Recompute::layernorm);
        add(a.ln_2_mean, first.ln_2_mean, N, "ln_2 mean", block);
        add(a.ln_2_rstd, first.ln_2_rstd, N, "ln_2 rstd", block);
        add(a.fc, first.fc, N * F, "mlp.fc", block);
        add(a.gelu, first.gelu, N * F, "mlp.gelu", Recompute::gelu);
        if (training || l == 0) {
            plan.add(a.residual_mlp, N * C, h + "mlp.residual");
        } else {
            plan.alias(a.residual_mlp, first.residual_mlp);
        }
    }
    plan.add(acts.ln_f, N * C, "ln_f");
    plan.add(acts.ln_f_mean, N, "ln_f mean");
    plan.add(acts.ln_f_rstd, N, "ln_f rstd");
    plan.add(acts.losses, N, "losses");
    plan.add(acts.delta, N * C);
    grads = {};
    if (!training) return;
    plan.add(grads.residual, N * C);
    if constexpr (std::is_same_v<Real, float>) {
        plan.alias(grads.residual_real, grads.residual);
    } else {
        plan.add(grads.residual_real, N * C);
    }
    if (config.output_gate) {
        plan.add_either(grads.fc, N * F, grads.gate, N * C);
    } else {
        plan.add(grads.fc, N * F);
    }
    plan.add(grads.norm, N * C);
    plan.add(grads.qkv, N * 3 * C);
    if (config.short_conv) plan.add(grads.conv, N * 3 * C);
    if (config.decay == DecayKind::gate) plan.add(grads.log_f, N * H);
}

// Says which flags make a model fit into `free` bytes of memory together with `more` bytes that others will
// take. Tries, in this order: recomputation (same results), bf16, a smaller batch.
template <class MakeModel>
std::string flags_that_fit(const GPTConfig& config, const ModelOptions& options, size_t free, size_t more,
                           MakeModel make_model) {
    bool can_be_bf16 = options.purpose == Purpose::training && options.precision != Precision::bf16;
    for (int batch = options.batch; batch > 0; batch /= 2)
        for (bool to_bf16 : {false, can_be_bf16})
            for (int r = (int)options.recompute; r <= (int)Recompute::block; r++) {
                ModelOptions smaller = options;
                smaller.batch = batch, smaller.recompute = (Recompute)r;
                if (to_bf16) smaller.precision = Precision::bf16;
                size_t needed = more;
                for (const MemoryGroup& group : make_model(config, smaller)->memory()) needed += group.bytes;
                if (needed > free) continue;
                return str(
                    "it fits with", batch < options.batch ? str(" --batch ", batch) : "",
                    to_bf16 ? " --dtype bf16" : "",
                    smaller.recompute > options.recompute ? str(" --recompute ", kRecomputeNames[r]) : "");
            }
    return "expected a shorter --seq, a smaller model or a larger GPU";
}
