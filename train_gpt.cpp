// The CPU trainer. This file is the model: a GPT-2 with softmax or polynomial attention, its forward pass,
// its backward pass and its update, in the order of the algorithm. The layers are in llmc/cpu/, a header
// each; the loop, the command line, files and everything else that the CUDA trainer shares are in llmc/. See
// README.md.
//
// Real, float or bf16, is what the matrix products multiply and most activations are kept in; the residual
// stream, all statistics, weights, gradients and moments are float.
//
//   make && ./train_gpt train --data data/shakespeare --out out/run --attention poly3
#include <omp.h>

#include <chrono>
#include <cmath>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "llmc/config.h"
#include "llmc/cpu/adamw.h"
#include "llmc/cpu/attention.h"
#include "llmc/cpu/attention_cached.h"
#include "llmc/cpu/attention_linear.h"
#include "llmc/cpu/attention_norms.h"
#include "llmc/cpu/attention_state.h"
#include "llmc/cpu/classifier.h"
#include "llmc/cpu/dispatch.h"
#include "llmc/cpu/embedding.h"
#include "llmc/cpu/gelu.h"
#include "llmc/cpu/layernorm.h"
#include "llmc/cpu/matmul.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/qk_norm_rope.h"
#include "llmc/cpu/short_conv.h"
#include "llmc/cpu/threads.h"
#include "llmc/model.h"
#include "llmc/parameters.h"

namespace cpu::inline LLMC_ISA {

// What the forward pass leaves for the backward pass. Where an option is off its output is its input.
template <class Real>
struct LayerActivations {
    Real* ln_1;            // (B,T,C)
    float* ln_1_mean;      // (B,T)
    float* ln_1_rstd;      // (B,T)
    Real* qkv;             // (B,T,3C)
    Real* conv;            // (B,T,3C): after the short convolution
    Real* heads;           // (B,T,3C): after qk-norm and RoPE
    float* qk_rstd;        // (B,T,2H)
    Real* attn;            // (B,T,C)
    float* attn_stats;     // (stats_size)
    float* residual_attn;  // (B,T,C): residual stream after attention
    Real* ln_2;            // (B,T,C)
    float* ln_2_mean;      // (B,T)
    float* ln_2_rstd;      // (B,T)
    Real* fc;              // (B,T,4C)
    Real* gelu;            // (B,T,4C)
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
    float* logits;     // (classifier_rows,Vp); reused
    Real* dlogits;     // (classifier_rows,Vp): their gradient, which may take their place
    float* losses;     // (B,T)
};

// Gradients of activations, reused from layer to layer.
template <class Real>
struct ActivationGradients {
    float* residual;      // (B,T,C)
    Real* residual_real;  // (B,T,C): the same for matrix products
    Real* norm;           // (B,T,C): of a LayerNorm's output, or of attention's
    Real* qkv;            // (B,T,3C)
    Real* conv;           // (B,T,3C), with short_conv
    Real* fc;             // (B,T,4C)
};

// What generation keeps of the tokens so far: their keys and values, or a state of fixed size.
struct Cache {
    int length = 0;                          // tokens
    bool has_state = false;                  // rather than keys and values
    std::vector<std::vector<float>> kv;      // (L): (length,2C)
    std::vector<std::vector<float>> state;   // (L): (H,state_size)
    std::vector<std::vector<float>> before;  // (L): (K-1,3C), the last rows into the short convolution
};

template <class Real>
struct GPT : Model {
    static constexpr bool kIsFloat = std::is_same_v<Real, float>;

    AttentionConfig attention;
    int L, H, D, C, V, Vp;
    Tensors weights, gradients;
    Activations<Real> acts;
    ActivationGradients<Real> grads;
    std::vector<float> fixed_decay;  // (H), with decay fixed
    std::vector<float> rope;         // (T,D), with RoPE: of the positions of the tokens now in the model
    Cache cache;

    GPT(const GPTConfig& config, const ModelOptions& options)
        : Model(config, padded_vocabulary(config)),
          attention(config.attention()),
          L(config.layers),
          H(config.heads),
          D(config.head_size()),
          C(config.channels),
          V(config.vocab_size),
          Vp(padded_vocabulary(config)),
          options(options),
          training(options.purpose == Purpose::training) {
        auto require_linear_form = [&](bool wanted, const char* flag) {
            if (wanted && !has_linear_form(attention, D))
                usage_error(
                    flag, ": ", kAttentionNames[attention.power], ", scale ", config.attention_scale,
                    ", heads of ", D,
                    ": expected poly1, poly2, or poly3 with heads of at most 32, and no scale sum with odd "
                    "powers");
        };
        if (options.precision == Precision::tf32)
            usage_error("--dtype tf32: the CPU has no such products: expected fp32 or bf16");
        if (options.cuda_graph) usage_error("--cuda-graph: only train_gptcu has it");
        if (options.stochastic_rounding) usage_error("--stochastic-rounding: only train_gptcu has it");
        if (options.gradients != Precision::fp32) usage_error("--gradients bf16: only train_gptcu has it");
        require_linear_form(options.kernel == AttentionKernel::linear, "--attention-kernel linear");
        require_linear_form(options.cache == CacheKind::state, "--cache state");
        for (int h = 0; h < H && config.decay == DecayKind::fixed; h++)
            fixed_decay.push_back(initial_decay(h, H));
        state_plan.add(array(Store::weights), table.size, "weights");
        if (!kIsFloat) state_plan.add(weights_real, table.size, "weights in bf16");
        if (training) {
            state_plan.add(array(Store::gradients), table.size, "gradients");
            state_plan.add(array(Store::m), table.size, "AdamW's m");
            state_plan.add(array(Store::v), table.size, "AdamW's v");
        }
        decode_rows = std::min(256, options.batch * options.seq);
        plan_activations();
    }

    void start_forward(const int* inputs, const int* targets, int B, int T, float dloss,
                       AttentionNorms* norms = nullptr) override {
        forward_blocks(inputs, B, T, nullptr, norms);
        classifier(acts.losses, dloss != 0 ? grads.norm : nullptr, dloss != 0 ? gradients.wte : nullptr,
                   acts.logits, acts.dlogits, acts.ln_f, real(weights.wte), targets, dloss / (B * T),
                   accumulates, B * T, C, V, Vp);
        double total = 0;
        for (int bt = 0; bt < B * T; bt++) total += acts.losses[bt];
        loss += total / (B * T);
    }

    double take_loss() override { return std::exchange(loss, 0.0); }

    // From tokens (B,T) to the output of the last LayerNorm. With a cache (B = 1) the tokens follow those in
    // it.
    void forward_blocks(const int* tokens, int B, int T, Cache* cache, AttentionNorms* norms = nullptr) {
        int start = cache ? cache->length : 0, N = B * T;
        if (config.rope() && (cache || rope_end != T)) {
            rope = rope_table(T, D, start);
            rope_end = cache ? -1 : T;
        }
        embedding_forward(acts.embedded, tokens, weights.wte,
                          weights.wpe ? weights.wpe + (size_t)start * C : nullptr, B, T, C);
        float* residual = acts.embedded;
        for (int l = 0; l < L; l++) {
            LayerActivations<Real>& a = acts.h[l];
            LayerTensors& w = weights.h[l];
            if (l == 0)
                layernorm_forward(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N,
                                  C);
            forward_to_gelu(l, residual, B, T, cache);
            if (norms) attention_norms(norms + l * H, a.heads, a.attn_stats, decay(l), attention, B, T, H, D);
            matmul_forward(acts.delta, a.gelu, real(w.fc_proj_weight), w.fc_proj_bias, N, 4 * C, C);
            // The addition to the residual stream goes together with the LayerNorm that reads it next.
            bool last = l + 1 == L;
            residual_layernorm_forward(a.residual_mlp, last ? acts.ln_f : acts.h[l + 1].ln_1,
                                       last ? acts.ln_f_mean : acts.h[l + 1].ln_1_mean,
                                       last ? acts.ln_f_rstd : acts.h[l + 1].ln_1_rstd, a.residual_attn,
                                       acts.delta, last ? weights.ln_f_weight : weights.h[l + 1].ln_1_weight,
                                       last ? weights.ln_f_bias : weights.h[l + 1].ln_1_bias, N, C);
            residual = a.residual_mlp;
        }
        if (cache) cache->length += T;
    }

    // One block from its first LayerNorm's output to the input of its last matrix product. residual (B,T,C)
    // is what goes into the block.
    void forward_to_gelu(int l, const float* residual, int B, int T, Cache* cache) {
        LayerActivations<Real>& a = acts.h[l];
        LayerTensors& w = weights.h[l];
        int start = cache ? cache->length : 0, N = B * T;
        matmul_forward(a.qkv, a.ln_1, real(w.attn_weight), w.attn_bias, N, C, 3 * C);
        if (config.short_conv) short_conv(a, w, B, T, cache ? &cache->before[l] : nullptr);
        if (config.qk_norm || config.rope())
            qk_norm_rope_forward(a.heads, a.qk_rstd, a.conv, w.q_gain, angles(), B, T, H, D);
        if (cache && cache->has_state) {
            attention_state_forward(a.attn, cache->state[l].data(), a.heads, decay(l), attention, start, T, H,
                                    D);
        } else if (cache) {
            std::vector<float>& kv = cache->kv[l];
            for (int t = 0; t < T; t++)
                kv.insert(kv.end(), a.heads + (size_t)t * 3 * C + C, a.heads + (size_t)(t + 1) * 3 * C);
            attention_cached_forward(a.attn, a.heads, kv.data(), decay(l), attention, start, T, H, D);
        } else {
            auto run = linear(T) ? attention_linear_forward<Real> : attention_forward<Real>;
            run(a.attn, a.attn_stats, a.heads, decay(l), attention, B, T, H, D);
        }
        matmul_forward(acts.delta, a.attn, real(w.attn_proj_weight), w.attn_proj_bias, N, C, C);
        residual_layernorm_forward(a.residual_attn, a.ln_2, a.ln_2_mean, a.ln_2_rstd, residual, acts.delta,
                                   w.ln_2_weight, w.ln_2_bias, N, C);
        matmul_forward(a.fc, a.ln_2, real(w.fc_weight), w.fc_bias, N, C, 4 * C);
        gelu_forward(a.gelu, a.fc, (size_t)N * 4 * C);
    }

    // Follows forward(), which left the gradient of ln_f's output in grads.norm and the output projection's
    // share of the gradients.
    void backward(const int* inputs, int B, int T) override {
        int N = B * T;
        std::fill(grads.residual, grads.residual + (size_t)N * C, 0.0f);
        layernorm_backward(grads.residual, grads.residual_real, gradients.ln_f_weight, gradients.ln_f_bias,
                           grads.norm, acts.h[L - 1].residual_mlp, acts.ln_f_mean, acts.ln_f_rstd,
                           weights.ln_f_weight, N, C);
        for (int l = L - 1; l >= 0; l--) {
            LayerActivations<Real>& a = acts.h[l];
            LayerTensors& w = weights.h[l];
            LayerTensors& d = gradients.h[l];
            const float* residual = l > 0 ? acts.h[l - 1].residual_mlp : acts.embedded;
            recompute(l, residual, B, T);
            matmul_backward(grads.fc, d.fc_proj_weight, d.fc_proj_bias, grads.residual_real, a.gelu,
                            real(w.fc_proj_weight), accumulates, N, 4 * C, C);
            gelu_backward(grads.fc, d.fc_bias, grads.fc, a.fc, N, 4 * C);
            matmul_backward(grads.norm, d.fc_weight, nullptr, grads.fc, a.ln_2, real(w.fc_weight),
                            accumulates, N, C, 4 * C);
            layernorm_backward(grads.residual, grads.residual_real, d.ln_2_weight, d.ln_2_bias, grads.norm,
                               a.residual_attn, a.ln_2_mean, a.ln_2_rstd, w.ln_2_weight, N, C);
            matmul_backward(grads.norm, d.attn_proj_weight, d.attn_proj_bias, grads.residual_real, a.attn,
                            real(w.attn_proj_weight), accumulates, N, C, C);
            auto run = linear(T) ? attention_linear_backward<Real> : attention_backward<Real>;
            run(grads.qkv, d.decay, grads.norm, a.attn, a.attn_stats, a.heads, decay(l), attention, B, T, H,
                D);
            if (config.qk_norm || config.rope())
                qk_norm_rope_backward(grads.qkv, d.q_gain, grads.qkv, a.conv, a.qk_rstd, w.q_gain, angles(),
                                      B, T, H, D);
            Real* dqkv = grads.qkv;
            if (config.short_conv) {
                short_conv_backward(grads.conv, d.conv_weight, grads.qkv, a.qkv, w.conv_weight, B, T, 3 * C,
                                    config.short_conv);
                dqkv = grads.conv;
            }
            matmul_backward(grads.norm, d.attn_weight, d.attn_bias, dqkv, a.ln_1, real(w.attn_weight),
                            accumulates, N, C, 3 * C);
            layernorm_backward(grads.residual, grads.residual_real, d.ln_1_weight, d.ln_1_bias, grads.norm,
                               residual, a.ln_1_mean, a.ln_1_rstd, w.ln_1_weight, N, C);
        }
        embedding_backward(gradients.wte, gradients.wpe, grads.residual, inputs, B, T, C);
        accumulates = true;
    }

    // What forward() did not keep of block l. residual (B,T,C) is what goes into the block.
    void recompute(int l, const float* residual, int B, int T) {
        LayerActivations<Real>& a = acts.h[l];
        LayerTensors& w = weights.h[l];
        int N = B * T;
        bool shared = l + 1 < L;  // later blocks have overwritten it
        if (options.recompute == Recompute::block && shared) {
            layernorm_forward(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N, C);
            forward_to_gelu(l, residual, B, T, nullptr);
        } else if (options.recompute != Recompute::none && shared) {
            gelu_forward(a.gelu, a.fc, (size_t)N * 4 * C);
            if (options.recompute == Recompute::layernorm) {
                layernorm_recompute(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N,
                                    C);
                layernorm_recompute(a.ln_2, a.ln_2_mean, a.ln_2_rstd, a.residual_attn, w.ln_2_weight,
                                    w.ln_2_bias, N, C);
            }
        }
    }

    // The gradients of the matrices are assigned by the first backward pass, so only the rest is zeroed.
    void zero_gradients() override {
        accumulates = false;
        for (const ParameterTensor& t : table.tensors)
            if (!t.weight_decay || t.name == "wpe.weight")
                std::fill_n(array(Store::gradients) + t.offset, t.size, 0.0f);
    }

    double gradient_norm(int layer = -1) const override {
        if (layer < 0) return std::sqrt(sum_of_squares(array(Store::gradients), table.size));
        const float* begin = gradients.h[layer].ln_1_weight;
        const float* end = layer + 1 < L ? gradients.h[layer + 1].ln_1_weight : gradients.ln_f_weight;
        return std::sqrt(sum_of_squares(begin, end - begin));
    }

    double update(const AdamW& o, double learning_rate, double max_norm, int step) override {
        double norm = gradient_norm(), grad_scale = max_norm > 0 && norm > max_norm ? max_norm / norm : 1;
        if (!std::isfinite(norm)) return norm;
#pragma omp parallel
        for (const ParameterTensor& t : table.tensors)
            adamw_update(array(Store::weights) + t.offset, weights_real + t.offset,
                         array(Store::gradients) + t.offset, array(Store::m) + t.offset,
                         array(Store::v) + t.offset, t.size, (float)learning_rate, (float)o.beta1,
                         (float)o.beta2, (float)o.eps, t.weight_decay ? (float)o.weight_decay : 0.0f,
                         (float)grad_scale, step);
        return norm;
    }

    const float* decode(const int* tokens, int n) override {
        for (int done = 0; done < n;) {
            int count = std::min(n - done, decode_rows);
            bool pays = has_linear_form(attention, D) && cache.length >= state_pays_from(attention.power, D);
            if (!cache.has_state &&
                (options.cache == CacheKind::state || (options.cache == CacheKind::automatic && pays)))
                hand_over();
            forward_blocks(tokens + done, 1, count, &cache);
            done += count;
            if (done == n)
                matmul(acts.logits, acts.ln_f + (size_t)(count - 1) * C, real(weights.wte), 1, Vp, C, false,
                       true, false);
        }
        return acts.logits;
    }

    void clear_cache() override {
        cache = Cache();
        cache.kv.resize(L);
        cache.state.resize(L);
        cache.before.assign(L, std::vector<float>((size_t)std::max(0, config.short_conv - 1) * 3 * C, 0.0f));
    }

    void all_logits(float* out, const int* inputs, int B, int T) override {
        forward_blocks(inputs, B, T, nullptr);
        for (int n = 0; n < B * T; n++) {
            matmul(acts.logits, acts.ln_f + (size_t)n * C, real(weights.wte), 1, Vp, C, false, true, false);
            std::copy(acts.logits, acts.logits + V, out + (size_t)n * V);
        }
    }

    void read(Store store, const ParameterTensor& t, float* out) const override {
        std::copy_n(array(store) + t.offset, t.size, out);
    }
    void write(Store store, const ParameterTensor& t, const float* in) override {
        std::copy_n(in, t.size, array(store) + t.offset);
        if (!kIsFloat && store == Store::weights) std::copy_n(in, t.size, weights_real + t.offset);
    }

    // Weights and moments, then activations in the order of the forward pass, then gradients in that of the
    // backward pass.
    std::string first_nonfinite() const override {
        for (const ParameterTensor& t : table.tensors)
            for (auto [store, what] :
                 {std::pair(Store::weights, "weight "), std::pair(Store::m, "AdamW's m of "),
                  std::pair(Store::v, "AdamW's v of ")})
                if (array(store) && !all_finite(array(store) + t.offset, t.size)) return what + t.name;
        std::string activation = activation_plan.first_nonfinite();
        if (!activation.empty()) return "activation " + activation;
        for (size_t i = training ? table.tensors.size() : 0; i-- > 0;) {
            const ParameterTensor& t = table.tensors[i];
            if (!all_finite(array(Store::gradients) + t.offset, t.size)) return "gradient of " + t.name;
        }
        return "";
    }

    std::vector<MemoryGroup> memory() const override {
        return {{"weights and optimizer", state_plan.bytes()}, {"activations", activation_plan.bytes()}};
    }

    void allocate() override {
        state_plan.allocate();
        activation_plan.allocate();
        for (Store store : {Store::weights, Store::gradients, Store::m, Store::v})
            if (array(store)) std::fill_n(array(store), table.size, 0.0f);
        weights = table.view(array(Store::weights));
        if (training) gradients = table.view(array(Store::gradients));
        if constexpr (kIsFloat) {
            weights_real = nullptr;
            acts.dlogits = acts.logits;
            grads.residual_real = grads.residual;
        } else {
            std::fill_n(weights_real, table.size, Real(0.0f));
        }
    }

  private:
    ModelOptions options;
    bool training;
    int rope_end = -1;         // rope is that of positions 0 .. rope_end-1; -1: of others
    int decode_rows;           // tokens of a prompt that go through decode() at a time
    bool accumulates = false;  // the gradients of matrices hold those of earlier micro-batches
    double loss = 0;           // of the forward passes since it was asked for
    float* arrays[4] = {};     // (table.size) each, by Store
    Real* weights_real;        // (table.size): weights in bf16; null where Real is float
    MemoryPlan state_plan, activation_plan;

    static int padded_vocabulary(const GPTConfig& config) {
        return (config.vocab_size + 15) / 16 * 16;
    }

    float*& array(Store store) {
        return arrays[(int)store];
    }
    float* array(Store store) const {
        return arrays[(int)store];
    }

    // A tensor of the weights as matrix products take it.
    const Real* real(const float* weight) const {
        if constexpr (kIsFloat) {
            return weight;
        } else {
            return weights_real + (weight - array(Store::weights));
        }
    }

    // Activations are kept for each layer where a backward pass reads them, and shared by all layers
    // otherwise.
    void plan_activations() {
        size_t B = options.batch, T = options.seq, N = B * T;
        acts.h.resize(L);
        activation_plan.add(acts.embedded, N * C, "embedded");
        for (int l = 0; l < L; l++) {
            LayerActivations<Real>& a = acts.h[l];
            LayerActivations<Real>& first = acts.h[0];
            std::string h = str("h.", l, ".");
            // In memory of its own, or in the first layer's where this much is recomputed.
            auto add = [&](auto& slot, auto& shared, size_t size, const char* name, Recompute from) {
                bool shares = !training || options.recompute >= from;
                if (shares && l > 0) {
                    activation_plan.alias(slot, shared);
                } else {
                    activation_plan.add(slot, size, shares ? "" : h + name);
                }
            };
            auto block = Recompute::block;
            add(a.ln_1, first.ln_1, N * C, "ln_1", Recompute::layernorm);
            add(a.ln_1_mean, first.ln_1_mean, N, "ln_1 mean", block);
            add(a.ln_1_rstd, first.ln_1_rstd, N, "ln_1 rstd", block);
            add(a.qkv, first.qkv, N * 3 * C, "attn.qkv", block);
            a.conv = a.heads = nullptr;
            if (config.short_conv) {
                add(a.conv, first.conv, N * 3 * C, "attn.conv", block);
            } else {
                activation_plan.alias(a.conv, a.qkv);
            }
            if (config.qk_norm) add(a.qk_rstd, first.qk_rstd, N * 2 * H, "attn.qk rstd", block);
            if (config.qk_norm || config.rope()) {
                add(a.heads, first.heads, N * 3 * C, "attn.heads", block);
            } else {
                activation_plan.alias(a.heads, a.conv);
            }
            if (size_t size = stats_size<Real>(attention, B, T, H, D))
                add(a.attn_stats, first.attn_stats, size, "attn.stats", block);
            add(a.attn, first.attn, N * C, "attn.out", block);
            add(a.residual_attn, first.residual_attn, N * C, "attn.residual", block);
            add(a.ln_2, first.ln_2, N * C, "ln_2", Recompute::layernorm);
            add(a.ln_2_mean, first.ln_2_mean, N, "ln_2 mean", block);
            add(a.ln_2_rstd, first.ln_2_rstd, N, "ln_2 rstd", block);
            add(a.fc, first.fc, N * 4 * C, "mlp.fc", block);
            add(a.gelu, first.gelu, N * 4 * C, "mlp.gelu", Recompute::gelu);
            if (training || l == 0) {
                activation_plan.add(a.residual_mlp, N * C, h + "mlp.residual");
            } else {
                activation_plan.alias(a.residual_mlp, first.residual_mlp);
            }
        }
        activation_plan.add(acts.ln_f, N * C, "ln_f");
        activation_plan.add(acts.ln_f_mean, N, "ln_f mean");
        activation_plan.add(acts.ln_f_rstd, N, "ln_f rstd");
        activation_plan.add(acts.losses, N, "losses");
        size_t logits = (size_t)classifier_rows((int)N, Vp) * Vp;
        activation_plan.add(acts.delta, N * C);
        activation_plan.add(acts.logits, logits);
        if (!training) return;
        if (!kIsFloat) activation_plan.add(acts.dlogits, logits);
        activation_plan.add(grads.residual, N * C);
        if (!kIsFloat) activation_plan.add(grads.residual_real, N * C);
        activation_plan.add(grads.norm, N * C);
        activation_plan.add(grads.qkv, N * 3 * C);
        if (config.short_conv) activation_plan.add(grads.conv, N * 3 * C);
        activation_plan.add(grads.fc, N * 4 * C);
    }

    // Whether attention takes its linear form.
    bool linear(int T) const {
        if (options.kernel == AttentionKernel::automatic) return linear_pays<Real>(attention, T, D);
        return options.kernel == AttentionKernel::linear;
    }

    // delta (H) of layer l, or null without decay.
    const float* decay(int l) const {
        return config.decay == DecayKind::fixed ? fixed_decay.data() : weights.h[l].decay;
    }

    // RoPE's (T,D), or null without.
    const float* angles() const {
        return config.rope() ? rope.data() : nullptr;
    }

    // Goes over from keys and values to the state.
    void hand_over() {
        constexpr int kRows = 64;
        std::vector<float> rows((size_t)kRows * 3 * C, 0.0f);  // (64,3C), q is 0
        cache.has_state = true;
        for (int l = 0; l < L; l++) {
            cache.state[l].assign(H * state_size(attention.power, D), 0.0f);
            for (int t0 = 0; t0 < cache.length; t0 += kRows) {
                int n = std::min(kRows, cache.length - t0);
                for (int t = 0; t < n; t++)
                    std::copy_n(&cache.kv[l][(size_t)(t0 + t) * 2 * C], 2 * C, &rows[(size_t)t * 3 * C + C]);
                attention_state_forward<float>(nullptr, cache.state[l].data(), rows.data(), decay(l),
                                               attention, t0, n, H, D);
            }
            std::vector<float>().swap(cache.kv[l]);
        }
    }

    // a.conv from a.qkv. While generating, the rows before these come from `before`, and the last ones go
    // there.
    void short_conv(LayerActivations<Real>& a, const LayerTensors& w, int B, int T,
                    std::vector<float>* before) {
        int K = config.short_conv, W = 3 * C;
        if (!before) return short_conv_forward(a.conv, a.qkv, w.conv_weight, B, T, W, K);
        std::vector<float> rows = *before, out((size_t)(K - 1 + T) * W);  // (K-1+T,3C)
        rows.insert(rows.end(), a.qkv, a.qkv + (size_t)T * W);
        short_conv_forward(out.data(), rows.data(), w.conv_weight, 1, K - 1 + T, W, K);
        std::copy(out.end() - (size_t)T * W, out.end(), a.conv);
        before->assign(rows.end() - (size_t)(K - 1) * W, rows.end());
    }
};

inline double measured_peak(Precision precision) {
    auto measure = [](auto type) {
        using Real = decltype(type);
        constexpr int n = 512;
        std::vector<Real> a(n * n, Real(1.0f)), b(n * n, Real(1.0f));
        std::vector<float> c(n * n);
        double best = 0;
        for (int repetition = 0; repetition < 8; repetition++) {  // the first makes the primitive
            auto start = std::chrono::steady_clock::now();
            matmul(c.data(), a.data(), b.data(), n, n, n, false, false, false);
            std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            best = std::max(best, 2.0 * n * n * n / seconds.count());
        }
        return best;
    };
    return precision == Precision::bf16 ? measure(bf16()) : measure(float());
}

inline int set_threads(int threads) {
    if (threads > 0) omp_set_num_threads(threads);
    return settle_threads();
}

inline std::unique_ptr<Model> make_model(const GPTConfig& config, const ModelOptions& options) {
    if (options.precision == Precision::bf16) return std::make_unique<GPT<bf16>>(config, options);
    return std::make_unique<GPT<float>>(config, options);
}

}  // namespace cpu

#ifndef LLMC_TESTING  // tests include this file
template <>
Backend cpu::backend<cpu::Isa::LLMC_ISA>() {
    return {"CPU", make_model, set_threads, measured_peak};
}
#endif
