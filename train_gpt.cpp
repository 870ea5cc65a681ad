// The CPU trainer. This file is the model: a GPT-2 with one of several kinds of attention. It has the forward
// pass and the backward pass, in the order of the algorithm. Each layer has a header in llmc/cpu/. The
// training loop, the command line, the files and everything else that both trainers share are in llmc/. See
// README.md.
//
// Real is float or bf16: the type of the matrix products and of most activations. The residual stream, all
// statistics, the weights, the gradients and the optimizer's moments are float.
//
//   make && ./train_gpt train --data data/shakespeare --out out/run --attention poly3
#include <cmath>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "llmc/activations.h"
#include "llmc/config.h"
#include "llmc/cpu/adamw.h"
#include "llmc/cpu/attention.h"
#include "llmc/cpu/attention_linear.h"
#include "llmc/cpu/attention_norms.h"
#include "llmc/cpu/cache.h"
#include "llmc/cpu/classifier.h"
#include "llmc/cpu/decay_gate.h"
#include "llmc/cpu/dispatch.h"
#include "llmc/cpu/embedding.h"
#include "llmc/cpu/gelu.h"
#include "llmc/cpu/layernorm.h"
#include "llmc/cpu/matmul.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/mpi.h"
#include "llmc/cpu/output_gate.h"
#include "llmc/cpu/peak.h"
#include "llmc/cpu/qk_norm_rope.h"
#include "llmc/cpu/short_conv.h"
#include "llmc/cpu/threads.h"
#include "llmc/cpu/value_scale.h"
#include "llmc/model.h"
#include "llmc/parameter_store.h"

namespace cpu::inline LLMC_ISA {

template <class Real>
struct GPT : Model {
    static constexpr bool kIsFloat = std::is_same_v<Real, float>;

    std::vector<AttentionConfig> attention;  // (L)
    int L, H, D, C, F, V, Vp;
    ParameterStore<HostMemory, Real> parameters;
    const Tensors<float>&weights = parameters.weights, &gradients = parameters.gradients;
    const Tensors<Real>& weights_real = parameters.weights_real;
    Activations<Real> acts;
    ActivationGradients<Real> grads;
    float* logits;  // (classifier_rows,Vp): reused
    Real* dlogits;  // (classifier_rows,Vp): gradient of the logits; the same memory if Real is float
    std::vector<float> fixed_decay;  // (H), with --decay fixed
    std::vector<float> rope;         // (T,D), with RoPE: angles for the positions of the current tokens
    Cache<Real> cache;

    GPT(const GPTConfig& config, const ModelOptions& options)
        : Model(config, padded_vocabulary(config), options.sharding),
          attention(config.attention_of_blocks()),
          L(config.layers),
          H(config.heads),
          D(config.head_size()),
          C(config.channels),
          F(config.mlp_width()),
          V(config.vocab_size),
          Vp(padded_vocabulary(config)),
          parameters(table, sharding, options.purpose == Purpose::training),
          options(options) {
        if (config.decay == DecayKind::fixed) fixed_decay = initial_decays(H);
        size_t B = options.batch, T = options.seq;
        std::vector<size_t> stats;  // (L)
        for (const AttentionConfig& a : attention) stats.push_back(stats_size<Real>(a, B, T, H, D));
        plan_activations(plan, acts, grads, config, options, stats);
        size_t logits_size = (size_t)classifier_rows((int)(B * T), Vp) * Vp;
        plan.add(logits, logits_size);
        if constexpr (kIsFloat) {
            plan.alias(dlogits, logits);
        } else {
            plan.add(dlogits, logits_size);
        }
    }

    void run(const Batch& batch, const Pass& pass, const BucketHooks& hooks = {}) override {
        int N = batch.B * batch.T, counted = batch.counted;
        forward_blocks(batch.inputs, batch.B, batch.T, nullptr, pass.norms, hooks.before_forward);
        if (pass.backward) call(hooks.before_backward, table.bucket_of_embeddings());
        classifier(acts.losses, pass.backward ? grads.norm : nullptr, gradients.wte, logits, dlogits,
                   acts.ln_f, weights_real.wte, batch.targets, pass.loss_scale / counted, adds(pass), N, C, V,
                   Vp);
        double total = 0;
        for (int n = 0; n < N; n++) total += acts.losses[n];
        loss_sum += total / counted;
        if (pass.backward) backward(batch, pass, hooks);
    }

    double take_loss() override { return std::exchange(loss_sum, 0.0); }

    // Computes the output of the last LayerNorm from the tokens (B,T). With a cache (B = 1), the tokens
    // follow the ones in the cache.
    void forward_blocks(const int* tokens, int B, int T, Cache<Real>* cache, AttentionNorms* norms = nullptr,
                        const BucketHook& before = {}) {
        int start = cache ? cache->length : 0, N = B * T;
        if (config.rope() && (cache || rope_end != T)) {
            rope = rope_table(config, T, start);
            rope_end = cache ? -1 : T;
        }
        call(before, table.bucket_of_embeddings());
        embedding_forward(acts.embedded, tokens, weights_real.wte,
                          weights_real.wpe ? weights_real.wpe + (size_t)start * C : nullptr, B, T, C);
        float* residual = acts.embedded;
        for (int l = 0; l < L; l++) {
            LayerActivations<Real>& a = acts.h[l];
            const auto& w = weights.h[l];
            const auto& w_real = weights_real.h[l];
            call(before, table.bucket_of_block(l));
            if (l == 0)
                layernorm_forward(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N,
                                  C);
            forward_to_gelu(l, residual, B, T, cache);
            if (norms)
                attention_norms(norms + l * H, a.heads, a.attn_stats, decay(l), attention[l], B, T, H, D);
            matmul_forward(acts.delta, a.gelu, w_real.fc_proj_weight, w.fc_proj_bias, N, F, C);
            // One function adds to the residual stream and applies the LayerNorm that reads the sum next.
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

    // Computes one block from the output of its first LayerNorm to the input of its last matrix product.
    // residual (B,T,C) is the input of the block.
    void forward_to_gelu(int l, const float* residual, int B, int T, Cache<Real>* cache) {
        LayerActivations<Real>& a = acts.h[l];
        const auto& w = weights.h[l];
        const auto& w_real = weights_real.h[l];
        int N = B * T;
        matmul_forward(a.qkv, a.ln_1, w_real.attn_weight, w.attn_bias, N, C, 3 * C);
        if (config.short_conv && cache) {
            cache->short_conv_forward(a.conv, a.qkv, w.conv_weight, l, T);
        } else if (config.short_conv) {
            short_conv_forward(a.conv, a.qkv, w.conv_weight, B, T, 3 * C, config.short_conv);
        }
        if (config.qk_norm || config.rope())
            qk_norm_rope_forward(a.heads, a.qk_rstd, a.conv, w.q_gain, angles(), B, T, H, D);
        if (attention[l].value_factor() != 1) scale_values(a.heads, (float)attention[l].value_factor(), N, C);
        if (config.decay == DecayKind::gate)
            decay_gate_forward(a.log_f, a.ln_1, w_real.decay_gate_weight, w.decay_gate_bias, B, T, C, H);
        if (cache) {
            cache->attention_forward(a.attn, a.heads, decay(l), l, T);
        } else if (linear(l, T)) {
            attention_linear_forward(a.attn, a.attn_stats, a.heads, decay(l), attention[l], B, T, H, D);
        } else {
            attention_forward(a.attn, a.attn_stats, a.heads, decay(l), attention[l], B, T, H, D);
        }
        if (config.output_gate) {
            matmul_forward<Real>(a.gate, a.ln_1, w_real.out_gate_weight, nullptr, N, C, C);
            output_gate_forward(a.gated, a.attn, a.gate, (size_t)N * C);
        }
        matmul_forward(acts.delta, a.gated, w_real.attn_proj_weight, w.attn_proj_bias, N, C, C);
        residual_layernorm_forward(a.residual_attn, a.ln_2, a.ln_2_mean, a.ln_2_rstd, residual, acts.delta,
                                   w.ln_2_weight, w.ln_2_bias, N, C);
        matmul_forward(a.fc, a.ln_2, w_real.fc_weight, w.fc_bias, N, C, F);
        gelu_forward(a.gelu, a.fc, (size_t)N * F);
    }

    // Runs after the forward pass. The classifier has already put the gradient of ln_f's output into
    // grads.norm, and the output projection's part of the gradient of wte into gradients.wte.
    void backward(const Batch& batch, const Pass& pass, const BucketHooks& hooks) {
        int B = batch.B, T = batch.T, N = B * T;
        bool accumulate = adds(pass);
        parameters.zero_added_gradients(pass.first, [](float* x, size_t n) { HostMemory::zero(x, n); });
        std::fill(grads.residual, grads.residual + (size_t)N * C, 0.0f);
        layernorm_backward(grads.residual, grads.residual_real, gradients.ln_f_weight, gradients.ln_f_bias,
                           grads.norm, acts.h[L - 1].residual_mlp, acts.ln_f_mean, acts.ln_f_rstd,
                           weights.ln_f_weight, N, C);
        for (int l = L - 1; l >= 0; l--) {
            LayerActivations<Real>& a = acts.h[l];
            const auto& w = weights.h[l];
            const auto& w_real = weights_real.h[l];
            const auto& d = gradients.h[l];
            const float* residual = l > 0 ? acts.h[l - 1].residual_mlp : acts.embedded;
            recompute(l, residual, B, T);
            call(hooks.before_backward, table.bucket_of_block(l));
            matmul_backward(grads.fc, d.fc_proj_weight, d.fc_proj_bias, grads.residual_real, a.gelu,
                            w_real.fc_proj_weight, accumulate, N, F, C);
            gelu_backward(grads.fc, d.fc_bias, grads.fc, a.fc, N, F);
            matmul_backward(grads.norm, d.fc_weight, nullptr, grads.fc, a.ln_2, w_real.fc_weight, accumulate,
                            N, C, F);
            layernorm_backward(grads.residual, grads.residual_real, d.ln_2_weight, d.ln_2_bias, grads.norm,
                               a.residual_attn, a.ln_2_mean, a.ln_2_rstd, w.ln_2_weight, N, C);
            matmul_backward(grads.norm, d.attn_proj_weight, d.attn_proj_bias, grads.residual_real, a.gated,
                            w_real.attn_proj_weight, accumulate, N, C, C);
            if (config.output_gate)
                output_gate_backward(grads.norm, grads.gate, grads.norm, a.attn, a.gate, (size_t)N * C);
            float* ddecay = config.decay == DecayKind::gate ? grads.log_f : d.decay;
            if (linear(l, T)) {
                attention_linear_backward(grads.qkv, ddecay, grads.norm, a.attn, a.attn_stats, a.heads,
                                          decay(l), attention[l], B, T, H, D);
            } else {
                attention_backward(grads.qkv, ddecay, grads.norm, a.attn, a.attn_stats, a.heads, decay(l),
                                   attention[l], B, T, H, D);
            }
            if (attention[l].value_factor() != 1)
                scale_values(grads.qkv, (float)attention[l].value_factor(), N, C);
            if (config.qk_norm || config.rope())
                qk_norm_rope_backward(grads.qkv, d.q_gain, grads.qkv, a.conv, a.qk_rstd, w.q_gain, angles(),
                                      B, T, H, D);
            Real* dqkv = grads.qkv;
            if (config.short_conv) {
                short_conv_backward(grads.conv, d.conv_weight, grads.qkv, a.qkv, w.conv_weight, B, T, 3 * C,
                                    config.short_conv);
                dqkv = grads.conv;
            }
            matmul_backward(grads.norm, d.attn_weight, d.attn_bias, dqkv, a.ln_1, w_real.attn_weight,
                            accumulate, N, C, 3 * C);
            if (config.output_gate)
                matmul_backward(grads.norm, d.out_gate_weight, nullptr, grads.gate, a.ln_1,
                                w_real.out_gate_weight, accumulate, N, C, C, /*adds_dinp=*/true);
            if (config.decay == DecayKind::gate)
                decay_gate_backward(grads.norm, d.decay_gate_weight, d.decay_gate_bias, grads.log_f, a.log_f,
                                    a.ln_1, w_real.decay_gate_weight, accumulate, B, T, C, H);
            layernorm_backward(grads.residual, grads.residual_real, d.ln_1_weight, d.ln_1_bias, grads.norm,
                               residual, a.ln_1_mean, a.ln_1_rstd, w.ln_1_weight, N, C);
            call(hooks.ready, table.bucket_of_block(l));
        }
        embedding_backward(gradients.wte, gradients.wpe, grads.residual, batch.inputs, B, T, C);
        call(hooks.ready, table.bucket_of_embeddings());
        call(hooks.ready, table.bucket_of_vectors());
    }

    // Computes again the activations of block l that the forward pass did not keep. residual (B,T,C) is the
    // input of the block.
    void recompute(int l, const float* residual, int B, int T) {
        LayerActivations<Real>& a = acts.h[l];
        const auto& w = weights.h[l];
        int N = B * T;
        if (is_recomputed(options, Recompute::block, l, L)) {
            layernorm_forward(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N, C);
            forward_to_gelu(l, residual, B, T, nullptr);
            return;
        }
        if (is_recomputed(options, Recompute::gelu, l, L)) {
            if (config.output_gate) output_gate_forward(a.gated, a.attn, a.gate, (size_t)N * C);
            gelu_forward(a.gelu, a.fc, (size_t)N * F);
        }
        if (is_recomputed(options, Recompute::layernorm, l, L)) {
            layernorm_recompute(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N, C);
            layernorm_recompute(a.ln_2, a.ln_2_mean, a.ln_2_rstd, a.residual_attn, w.ln_2_weight, w.ln_2_bias,
                                N, C);
        }
    }

    Span gradients_span(int bucket) const override { return parameters.gradients_span(bucket); }
    Span weights_span(int bucket) const override { return parameters.weights_span(bucket); }
    Element element_of(Store store) const override {
        return store == Store::weights ? kElement<Real> : kElement<float>;
    }
    void keep_gradients(int bucket, bool add) override {
        parameters.keep_gradients(
            bucket, [&](float* to, const float* from, size_t n) { move_gradients(to, from, n, add); });
    }

    double gradient_norm(Slice slice) const override { return std::sqrt(gradient_squares(slice)); }

    using Model::clip_gradients;
    void clip_gradients(double max_norm, Communicator& communicator) override {
        squares = gradient_squares(table.all());
        if (sharding.level > 0) {
            communicator.all_reduce({&squares, 1});
            communicator.join();
        }
        norm = std::sqrt(squares);
        gradient_factor = clip_factor(norm, max_norm);
    }

    double clipped_norm() override { return norm; }

    std::unique_ptr<Optimizer> make_optimizer(const AdamW& adamw) override {
        return std::make_unique<AdamWOptimizer<Real>>(table, sharding.kept, parameters.arrays, adamw);
    }

    const float* decode(const int* tokens, int n) override {
        for (int done = 0; done < n;) {
            int count = std::min({n - done, kPromptRows, options.batch * options.seq});
            cache.begin([&](int l) { return decay(l); });
            forward_blocks(tokens + done, 1, count, &cache);
            done += count;
            if (done == n) last_logits(acts.ln_f + (size_t)(count - 1) * C);
        }
        return logits;
    }

    void clear_cache() override { cache = Cache<Real>(config, options.cache); }

    void all_logits(float* out, const int* inputs, int B, int T) override {
        forward_blocks(inputs, B, T, nullptr);
        int N = B * T, chunk = classifier_rows(N, Vp);
        for (int n0 = 0; n0 < N; n0 += chunk) {
            int rows = std::min(chunk, N - n0);
            last_logits(acts.ln_f + (size_t)n0 * C, rows);
            for (int n = 0; n < rows; n++)
                std::copy_n(logits + (size_t)n * Vp, V, out + (size_t)(n0 + n) * V);
        }
    }

    void read(Store store, const ParameterTensor& t, float* out) const override {
        parameters.read(store, t, out);
    }
    void write(Store store, const ParameterTensor& t, const float* in) override {
        parameters.write(store, t, in);
    }
    void gather(Communicator& communicator, const ParameterTensor& t, float* out) const override {
        parameters.gather(communicator, t, out);
    }

    std::string first_nonfinite() const override { return parameters.first_nonfinite(plan); }

    std::vector<MemoryGroup> memory() const override {
        return {{"weights", parameters.weights_bytes()},
                {"gradients", parameters.gradients_bytes()},
                {"activations", plan.bytes()}};
    }

    void allocate(size_t = 0) override {
        parameters.allocate();
        parameters.arrays.clip_factor = &gradient_factor;
        plan.allocate();
    }

  private:
    ModelOptions options;
    int rope_end = -1;    // rope holds positions 0 .. rope_end-1; -1: it holds other positions
    double loss_sum = 0;  // mean losses of the passes since the last take_loss()
    double squares = 0;   // sum of the squared gradients, and its root, which clip_gradients() found
    double norm = 0;
    float gradient_factor = 1;  // the optimizer multiplies the gradients by it
    MemoryPlan plan;            // of the activations

    // Whether a pass adds to the gradients of matrices. At level 2, the sums are elsewhere.
    bool adds(const Pass& pass) const { return !pass.first && sharding.level < 2; }

    double gradient_squares(Slice slice) const {
        double squares = 0;
        parameters.for_gradients(slice, [&](const float* x, size_t n) { squares += sum_of_squares(x, n); });
        return squares;
    }

    static int padded_vocabulary(const GPTConfig& config) { return (config.vocab_size + 15) / 16 * 16; }

    // Whether the attention of block l is computed in its linear form.
    bool linear(int l, int T) const {
        if (options.kernel == AttentionKernel::automatic) return linear_pays(attention[l], T, D);
        return options.kernel == AttentionKernel::linear && !attention[l].softmax();
    }

    Decay decay(int l) const {
        if (config.decay == DecayKind::gate) return Decay::gate(acts.h[l].log_f);
        return config.decay == DecayKind::fixed ? fixed_decay.data() : weights.h[l].decay;
    }

    // The table of RoPE (T,D); null without RoPE.
    const float* angles() const { return config.rope() ? rope.data() : nullptr; }

    // Writes the logits (n,Vp) that follow from n rows (n,C) of the last LayerNorm's output.
    void last_logits(const Real* rows, int n = 1) {
        matmul(logits, rows, weights_real.wte, n, Vp, C, false, true, false);
    }
};

inline std::unique_ptr<Model> make_model(const GPTConfig& config, const ModelOptions& options) {
    if (options.precision == Precision::bf16) return std::make_unique<GPT<bf16>>(config, options);
    return std::make_unique<GPT<float>>(config, options);
}

}  // namespace cpu

#ifndef LLMC_TESTING  // tests include this file for the model alone
template <>
Backend cpu::backend<cpu::Isa::LLMC_ISA>() {
    return {"CPU", Capabilities{.program = "train_gpt"}, make_model, set_threads, connect, measured_peak};
}
#endif
