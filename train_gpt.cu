// The CUDA trainer. This file is the model, as train_gpt.cpp is for the CPU: it has the same forward pass and
// backward pass, in the same order. Each layer has a header in llmc/cuda/, the twin of one in llmc/cpu/. The
// training loop, the command line, the files and everything else are in llmc/, and both trainers share them.
//
// Real is float or bf16: the type of the matrix products and of most activations. The residual stream, all
// statistics, the weights and the optimizer's moments are float. Gradient is float or bf16: the type in which
// the gradients of matrices and embeddings are added up.
//
//   make train_gptcu && ./train_gptcu train --data data/shakespeare --out out/run --attention poly3
//   make train_gptcu_sim: runs the same object file on dev/ptxsim, on machines without a GPU
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "llmc/activations.h"
#include "llmc/config.h"
#include "llmc/cuda/adamw.h"
#include "llmc/cuda/attention/attention.h"
#include "llmc/cuda/attention/linear.h"
#include "llmc/cuda/attention/norms.h"
#include "llmc/cuda/cache.h"
#include "llmc/cuda/classifier.h"
#include "llmc/cuda/decay_gate.h"
#include "llmc/cuda/device.h"
#include "llmc/cuda/embedding.h"
#include "llmc/cuda/gelu.h"
#include "llmc/cuda/gradients.h"
#include "llmc/cuda/inputs.h"
#include "llmc/cuda/layernorm.h"
#include "llmc/cuda/matmul.h"
#include "llmc/cuda/memory.h"
#include "llmc/cuda/output_gate.h"
#include "llmc/cuda/pass_graphs.h"
#include "llmc/cuda/qk_norm_rope.h"
#include "llmc/cuda/scratch.h"
#include "llmc/cuda/short_conv.h"
#include "llmc/cuda/value_scale.h"
#include "llmc/model.h"
#include "llmc/parameter_store.h"

namespace gpu {

std::unique_ptr<Model> make_model(const GPTConfig& config, const ModelOptions& options);

template <class Real, class Gradient = float>
struct GPT : Model {
    static constexpr bool kFloatGradients = std::is_same_v<Gradient, float>;

    std::vector<AttentionConfig> attention;  // (L)
    int L, H, D, C, F, V, Vp;
    ParameterStore<DeviceMemory, Real, Gradient> parameters;
    const Tensors<float>& weights = parameters.weights;
    const Tensors<Real>& weights_real = parameters.weights_real;
    const Tensors<Gradient, float>& gradients = parameters.gradients;
    Activations<Real> acts;
    ActivationGradients<Real> grads;
    Inputs inputs;
    Real* logits;        // (classifier_rows,Vp): the logits, then their gradient; reused
    float* scratch;      // (scratch_size): partial sums and tables; one layer after another uses it
    float* fixed_decay;  // (H), with --decay fixed
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
        host_logits.resize(V);
        size_t B = options.batch, T = options.seq;
        std::vector<size_t> stats;  // (L)
        for (const AttentionConfig& a : attention) stats.push_back(stats_size<Real>(a, B, T, H, D));
        plan_activations(plan, acts, grads, config, options, stats);
        inputs.add_to(plan, config, options);
        plan.add(logits, (size_t)classifier_rows((int)(B * T), Vp) * Vp);
        plan.add(workspace, kMatmulWorkspace);
        clip.add_to(plan);
        plan.add(loss_sum, 1);
        plan.add(fixed_decay, H);
        // If any block uses the linear form, block 0 does.
        plan.add(scratch, scratch_size<Real>(config, options, linear(0, (int)T)));
    }

    ~GPT() override {
        if (!stream) return;
        if (model_stream == stream) model_stream = nullptr;
        cudaStreamDestroy(stream);
    }

    void run(const Batch& batch, const Pass& pass, const BucketHooks& hooks = {}) override {
        inputs.place(batch, stream);
        if (!options.cuda_graph || pass.norms) return enqueue(batch.B, batch.T, batch.counted, pass, hooks);
        // The launch of a graph puts all of its kernels into the stream at once. So it comes after all
        // weights and before the first bucket is announced.
        for (int bucket = 0; bucket < (int)sharding.buckets.size(); bucket++)
            call(hooks.before_forward, bucket);
        graphs.launch(batch.B, batch.T, pass, stream,
                      [&] { enqueue(batch.B, batch.T, batch.counted, pass, {}); });
        for (int bucket = 0; pass.backward && bucket < (int)sharding.buckets.size(); bucket++)
            call(hooks.ready, bucket);
    }

    // Puts the kernels of a pass into the stream. The tokens must already be on the device.
    void enqueue(int B, int T, int counted, const Pass& pass, const BucketHooks& hooks) {
        int N = B * T;
        if (pass.norms && norm_sums.size() == 0) norm_sums = DeviceArray<NormSums>(L * H);
        forward_blocks(B, T, nullptr, pass.norms ? norm_sums.get() : nullptr, hooks.before_forward);
        if (pass.backward) call(hooks.before_backward, table.bucket_of_embeddings());
        classifier(acts.losses, pass.backward ? grads.norm : nullptr, gradients.wte, logits, acts.ln_f,
                   weights_real.wte, inputs.targets, pass.loss_scale / counted, adds(pass), N, C, V, Vp,
                   *matmuls, stream);
        add_mean_loss(loss_sum, acts.losses, N, counted, stream);
        if (pass.backward) backward(B, T, pass, hooks);
        if (!pass.norms) return;
        std::vector<NormSums> sums(L * H);
        copy_to_host(sums.data(), norm_sums.get(), L * H, stream);
        for (int head = 0; head < L * H; head++)
            pass.norms[head] = sums[head].norms(attention[head / H], B, T, D);
    }

    double take_loss() override {
        double total;
        copy_to_host(&total, loss_sum, 1, stream);
        check(cudaMemsetAsync(loss_sum, 0, sizeof total, stream));
        return total;
    }

    // Computes the output of the last LayerNorm from the tokens on the device. sums (L,H) receives the sums
    // for the attention's norms; null: they are not wanted.
    void forward_blocks(int B, int T, Cache<Real>* cache, NormSums* sums = nullptr,
                        const BucketHook& before = {}) {
        int start = cache ? cache->length : 0, N = B * T;
        call(before, table.bucket_of_embeddings());
        embedding_forward(acts.embedded, inputs.tokens, weights_real.wte,
                          weights_real.wpe ? weights_real.wpe + (size_t)start * C : nullptr, B, T, C, stream);
        float* residual = acts.embedded;
        for (int l = 0; l < L; l++) {
            LayerActivations<Real>& a = acts.h[l];
            const auto& w = weights.h[l];
            const auto& w_real = weights_real.h[l];
            call(before, table.bucket_of_block(l));
            if (l == 0)
                layernorm_forward(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N,
                                  C, stream);
            forward_to_gelu(l, residual, B, T, cache);
            if (sums)
                attention_norms(sums + l * H, scratch, a.heads, a.attn_stats, decay(l), attention[l], B, T, H,
                                D, stream);
            matmul_forward(acts.delta, a.gelu, w_real.fc_proj_weight, w_real.fc_proj_bias, N, F, C, *matmuls,
                           stream);
            // One kernel adds to the residual stream and applies the LayerNorm that reads the sum next.
            bool last = l + 1 == L;
            residual_layernorm_forward(a.residual_mlp, last ? acts.ln_f : acts.h[l + 1].ln_1,
                                       last ? acts.ln_f_mean : acts.h[l + 1].ln_1_mean,
                                       last ? acts.ln_f_rstd : acts.h[l + 1].ln_1_rstd, a.residual_attn,
                                       acts.delta, last ? weights.ln_f_weight : weights.h[l + 1].ln_1_weight,
                                       last ? weights.ln_f_bias : weights.h[l + 1].ln_1_bias, N, C, stream);
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
        matmul_forward(a.qkv, a.ln_1, w_real.attn_weight, w_real.attn_bias, N, C, 3 * C, *matmuls, stream);
        if (config.short_conv && cache) {
            cache->short_conv_forward(a.conv, a.qkv, w.conv_weight, l, T);
        } else if (config.short_conv) {
            short_conv_forward(a.conv, a.qkv, w.conv_weight, B, T, 3 * C, config.short_conv, stream);
        }
        if (config.qk_norm || config.rope())
            qk_norm_rope_forward(a.heads, a.qk_rstd, a.conv, w.q_gain, inputs.rope, B, T, H, D, stream);
        if (attention[l].value_factor() != 1)
            scale_values(a.heads, (float)attention[l].value_factor(), N, C, stream);
        if (config.decay == DecayKind::gate)
            decay_gate_forward(a.log_f, a.ln_1, w_real.decay_gate_weight, w.decay_gate_bias, B, T, C, H,
                               stream);
        if (cache) {
            cache->attention_forward(a.attn, a.heads, decay(l), l, T);
        } else if (linear(l, T)) {
            attention_linear_forward(a.attn, a.attn_stats, scratch, a.heads, decay(l), attention[l], B, T, H,
                                     D, stream);
        } else {
            attention_forward(a.attn, a.attn_stats, scratch, a.heads, decay(l), attention[l], B, T, H, D,
                              stream);
        }
        if (config.output_gate) {
            matmul_forward<Real>(a.gate, a.ln_1, w_real.out_gate_weight, nullptr, N, C, C, *matmuls, stream);
            output_gate_forward(a.gated, a.attn, a.gate, (size_t)N * C, stream);
        }
        matmul_forward(acts.delta, a.gated, w_real.attn_proj_weight, w_real.attn_proj_bias, N, C, C, *matmuls,
                       stream);
        residual_layernorm_forward(a.residual_attn, a.ln_2, a.ln_2_mean, a.ln_2_rstd, residual, acts.delta,
                                   w.ln_2_weight, w.ln_2_bias, N, C, stream);
        if (gelu_fuses(F)) {
            matmul_gelu_forward(a.gelu, a.fc, a.ln_2, w_real.fc_weight, w_real.fc_bias, N, C, F, *matmuls,
                                stream);
        } else {
            matmul_forward(a.fc, a.ln_2, w_real.fc_weight, w_real.fc_bias, N, C, F, *matmuls, stream);
            gelu_forward(a.gelu, a.fc, (size_t)N * F, stream);
        }
    }

    // Runs after the forward pass. The classifier has already put the gradient of ln_f's output into
    // grads.norm, and the output projection's part of the gradient of wte into gradients.wte.
    void backward(int B, int T, const Pass& pass, const BucketHooks& hooks) {
        int N = B * T;
        bool accumulate = adds(pass);
        parameters.zero_added_gradients(
            pass.first, [&](auto* x, size_t n) { check(cudaMemsetAsync(x, 0, n * sizeof *x, stream)); });
        check(cudaMemsetAsync(grads.residual, 0, (size_t)N * C * sizeof(float), stream));
        layernorm_backward(grads.residual, grads.residual_real, gradients.ln_f_weight, gradients.ln_f_bias,
                           scratch, grads.norm, acts.h[L - 1].residual_mlp, acts.ln_f_mean, acts.ln_f_rstd,
                           weights.ln_f_weight, N, C, stream);
        for (int l = L - 1; l >= 0; l--) {
            LayerActivations<Real>& a = acts.h[l];
            const auto& w = weights.h[l];
            const auto& w_real = weights_real.h[l];
            const auto& d = gradients.h[l];
            const float* residual = l > 0 ? acts.h[l - 1].residual_mlp : acts.embedded;
            recompute(l, residual, B, T);
            call(hooks.before_backward, table.bucket_of_block(l));
            bool fuses = gelu_fuses(F);
            matmul_gelu_backward(grads.fc, d.fc_proj_weight, d.fc_proj_bias, grads.residual_real, a.gelu,
                                 w_real.fc_proj_weight, fuses ? a.fc : nullptr, accumulate, N, F, C, *matmuls,
                                 stream);
            if (!fuses) gelu_backward(grads.fc, d.fc_bias, scratch, grads.fc, a.fc, N, F, stream);
            matmul_backward(grads.norm, d.fc_weight, fuses ? d.fc_bias : nullptr, grads.fc, a.ln_2,
                            w_real.fc_weight, accumulate, N, C, F, *matmuls, stream);
            layernorm_backward(grads.residual, grads.residual_real, d.ln_2_weight, d.ln_2_bias, scratch,
                               grads.norm, a.residual_attn, a.ln_2_mean, a.ln_2_rstd, w.ln_2_weight, N, C,
                               stream);
            matmul_backward(grads.norm, d.attn_proj_weight, d.attn_proj_bias, grads.residual_real, a.gated,
                            w_real.attn_proj_weight, accumulate, N, C, C, *matmuls, stream);
            if (config.output_gate)
                output_gate_backward(grads.norm, grads.gate, grads.norm, a.attn, a.gate, (size_t)N * C,
                                     stream);
            float* ddecay = config.decay == DecayKind::gate ? grads.log_f : d.decay;
            if (linear(l, T)) {
                attention_linear_backward(grads.qkv, ddecay, scratch, grads.norm, a.attn, a.attn_stats,
                                          a.heads, decay(l), attention[l], B, T, H, D, stream);
            } else {
                attention_backward(grads.qkv, ddecay, scratch, grads.norm, a.attn, a.attn_stats, a.heads,
                                   decay(l), attention[l], B, T, H, D, stream);
            }
            if (attention[l].value_factor() != 1)
                scale_values(grads.qkv, (float)attention[l].value_factor(), N, C, stream);
            if (config.qk_norm || config.rope())
                qk_norm_rope_backward(grads.qkv, d.q_gain, scratch, grads.qkv, a.conv, a.qk_rstd, w.q_gain,
                                      inputs.rope, B, T, H, D, stream);
            Real* dqkv = grads.qkv;
            if (config.short_conv) {
                short_conv_backward(grads.conv, d.conv_weight, scratch, grads.qkv, a.qkv, w.conv_weight, B, T,
                                    3 * C, config.short_conv, stream);
                dqkv = grads.conv;
            }
            matmul_backward(grads.norm, d.attn_weight, d.attn_bias, dqkv, a.ln_1, w_real.attn_weight,
                            accumulate, N, C, 3 * C, *matmuls, stream);
            if (config.output_gate)
                matmul_backward(grads.norm, d.out_gate_weight, nullptr, grads.gate, a.ln_1,
                                w_real.out_gate_weight, accumulate, N, C, C, *matmuls, stream,
                                /*adds_dinp=*/true);
            if (config.decay == DecayKind::gate)
                decay_gate_backward(grads.norm, d.decay_gate_weight, d.decay_gate_bias, scratch, grads.log_f,
                                    a.log_f, a.ln_1, w_real.decay_gate_weight, accumulate, B, T, C, H,
                                    stream);
            layernorm_backward(grads.residual, grads.residual_real, d.ln_1_weight, d.ln_1_bias, scratch,
                               grads.norm, residual, a.ln_1_mean, a.ln_1_rstd, w.ln_1_weight, N, C, stream);
            call(hooks.ready, table.bucket_of_block(l));
        }
        embedding_backward(gradients.wte, gradients.wpe, scratch, grads.residual, inputs.tokens, B, T, C, V,
                           stream);
        call(hooks.ready, table.bucket_of_embeddings());
        // The norm and the optimizer read all gradients from one array.
        if constexpr (!kFloatGradients) {
            Span vectors = parameters.gradients_span(table.bucket_of_vectors());
            if (pass.last)
                move_gradients((Gradient*)vectors.data, parameters.small_gradients, vectors.size, false,
                               stream);
        }
        call(hooks.ready, table.bucket_of_vectors());
    }

    // Computes again the activations of block l that the forward pass did not keep. residual (B,T,C) is the
    // input of the block.
    void recompute(int l, const float* residual, int B, int T) {
        LayerActivations<Real>& a = acts.h[l];
        const auto& w = weights.h[l];
        int N = B * T;
        if (is_recomputed(options, Recompute::block, l, L)) {
            layernorm_forward(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N, C,
                              stream);
            forward_to_gelu(l, residual, B, T, nullptr);
            return;
        }
        if (is_recomputed(options, Recompute::gelu, l, L)) {
            if (config.output_gate) output_gate_forward(a.gated, a.attn, a.gate, (size_t)N * C, stream);
            gelu_forward(a.gelu, a.fc, (size_t)N * F, stream);
        }
        if (is_recomputed(options, Recompute::layernorm, l, L)) {
            layernorm_recompute(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N, C,
                                stream);
            layernorm_recompute(a.ln_2, a.ln_2_mean, a.ln_2_rstd, a.residual_attn, w.ln_2_weight, w.ln_2_bias,
                                N, C, stream);
        }
    }

    Span gradients_span(int bucket) const override { return parameters.gradients_span(bucket); }
    Span weights_span(int bucket) const override { return parameters.weights_span(bucket); }
    Element element_of(Store store) const override {
        return store == Store::weights ? kElement<Real> : kElement<Gradient>;
    }
    void keep_gradients(int bucket, bool add) override {
        parameters.keep_gradients(bucket, [&](Gradient* to, const Gradient* from, size_t n) {
            move_gradients(to, from, n, add, stream);
        });
    }

    double gradient_norm(Slice slice) const override {
        add_squares(slice);
        return clip.norm(stream);
    }

    using Model::clip_gradients;
    void clip_gradients(double max_norm, Communicator& communicator) override {
        add_squares(table.all());
        if (sharding.level > 0) {
            communicator.all_reduce(clip.sum());
            communicator.join();
        }
        clip.set_factor(max_norm, stream);
    }

    double clipped_norm() override { return clip.norm(stream); }

    std::unique_ptr<Optimizer> make_optimizer(const AdamW& adamw) override {
        return std::make_unique<AdamWOptimizer<Real, Gradient>>(table, sharding.kept, parameters.arrays,
                                                                adamw, options.stochastic_rounding,
                                                                options.seed, stream);
    }

    const float* decode(const int* tokens, int n) override {
        for (int done = 0; done < n;) {
            int count = std::min({n - done, kPromptRows, options.batch * options.seq});
            cache.begin([&](int l) { return decay(l); });
            inputs.place(tokens + done, 1, count, cache.length, stream);
            forward_blocks(1, count, &cache);
            done += count;
            if (done == n) copy_logits(host_logits.data(), acts.ln_f + (size_t)(count - 1) * C, 1);
        }
        return host_logits.data();
    }

    void clear_cache() override { cache = Cache<Real>(config, options.cache, stream); }

    void all_logits(float* out, const int* tokens, int B, int T) override {
        inputs.place(tokens, B, T, 0, stream);
        forward_blocks(B, T, nullptr);
        int N = B * T, chunk = classifier_rows(N, Vp);
        for (int n = 0; n < N; n += chunk)
            copy_logits(out + (size_t)n * V, acts.ln_f + (size_t)n * C, std::min(chunk, N - n));
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

    void allocate(size_t more = 0) override {
        MemoryInfo info = memory_info();
        size_t needed = parameters.bytes() + plan.bytes() + more;
        if (needed > info.free)
            out_of_memory(needed, info, flags_that_fit(config, options, info.free, more, make_model));
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        model_stream = stream;
        parameters.allocate();
        plan.allocate();
        parameters.arrays.clip_factor = clip.factor;
        DeviceMemory::zero(loss_sum, 1);
        matmuls = std::make_unique<MatmulContext>(workspace, options.precision == Precision::tf32);
        DeviceMemory::write(fixed_decay, initial_decays(H).data(), H);
    }

  private:
    ModelOptions options;
    cudaStream_t stream = nullptr;
    std::unique_ptr<MatmulContext> matmuls;
    PassGraphs graphs;
    DeviceArray<NormSums> norm_sums;  // (L,H), allocated by the first pass that asks for norms
    char* workspace;                  // (kMatmulWorkspace) bytes: the workspace of cuBLASLt
    GradientClip<Gradient> clip;
    double* loss_sum;                // (1): mean losses of the passes since the last take_loss()
    std::vector<float> host_logits;  // (V): of the last token
    MemoryPlan plan;                 // of the activations

    // Whether a pass adds to the gradients of matrices. At level 2, the sums are elsewhere.
    bool adds(const Pass& pass) const { return !pass.first && sharding.level < 2; }

    void add_squares(Slice slice) const {
        clip.start(stream);
        parameters.for_gradients(slice, [&](const Gradient* x, size_t n) { clip.add(x, n, stream); });
    }

    static int padded_vocabulary(const GPTConfig& config) { return (config.vocab_size + 15) / 16 * 16; }

    // Whether the attention of block l is computed in its linear form.
    bool linear(int l, int T) const {
        if (options.kernel == AttentionKernel::automatic) return linear_pays(attention[l], T, D);
        return options.kernel == AttentionKernel::linear && !attention[l].softmax();
    }

    // The decay of layer l: of its gates, which the forward pass has made, or of delta (H).
    Decay decay(int l) const {
        if (config.decay == DecayKind::gate) return Decay::gate(acts.h[l].log_f);
        return config.decay == DecayKind::fixed ? fixed_decay : weights.h[l].decay;
    }

    // Writes the logits that follow from n rows of the last LayerNorm's output to the host.
    void copy_logits(float* out /*(n,V)*/, const Real* rows /*(n,C)*/, int n) {
        matmul(logits, rows, weights_real.wte, n, Vp, C, false, true, false, {}, *matmuls, stream);
        std::vector<Real> values((size_t)n * Vp);
        copy_to_host(values.data(), logits, values.size(), stream);
        for (int i = 0; i < n; i++) std::copy_n(&values[(size_t)i * Vp], V, out + (size_t)i * V);
    }
};

std::unique_ptr<Model> make_model(const GPTConfig& config, const ModelOptions& options) {
    if (options.precision == Precision::bf16) {
        if (options.gradients == Precision::bf16) return std::make_unique<GPT<bf16, bf16>>(config, options);
        return std::make_unique<GPT<bf16>>(config, options);
    }
    return std::make_unique<GPT<float>>(config, options);
}

// llmc/cuda/main.cpp calls this.
Backend backend() {
    Capabilities can{.program = "train_gptcu",
                     .tf32 = true,
                     .bf16_gradients = true,
                     .stochastic_rounding = true,
                     .cuda_graph = true,
                     .largest_head = 128};
    return {device_name(), can, make_model, set_threads, connect, measured_peak};
}

}  // namespace gpu
