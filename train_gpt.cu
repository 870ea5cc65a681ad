// The CUDA trainer. This file is the model, as train_gpt.cpp is for the CPU: the same forward pass, backward
// pass and update, in the same order. The layers are in llmc/cuda/, a header each, twins of those in
// llmc/cpu/; the loop, the command line, files and all else are in llmc/ and are those of the CPU trainer.
//
// Real, float or bf16, is what the matrix products multiply and most activations are kept in; the residual
// stream, all statistics, weights and moments are float; Gradient, float or bf16, is what the gradients of
// matrices and embeddings are added up in.
//
//   make train_gptcu && ./train_gptcu train --data data/shakespeare --out out/run --attention poly3
//   make train_gptcu_sim: the same object on dev/ptxsim, for machines without a GPU
#include <chrono>
#include <cmath>
#include <compare>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "llmc/config.h"
#include "llmc/cuda/adamw.h"
#include "llmc/cuda/attention.h"
#include "llmc/cuda/attention_linear.h"
#include "llmc/cuda/attention_norms.h"
#include "llmc/cuda/cache.h"
#include "llmc/cuda/classifier.h"
#include "llmc/cuda/embedding.h"
#include "llmc/cuda/gelu.h"
#include "llmc/cuda/layernorm.h"
#include "llmc/cuda/matmul.h"
#include "llmc/cuda/memory.h"
#include "llmc/cuda/qk_norm_rope.h"
#include "llmc/cuda/short_conv.h"
#include "llmc/cuda/small_gradients.h"
#include "llmc/model.h"
#include "llmc/parameters.h"

namespace gpu {

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
    int* inputs;      // (B,T)
    int* targets;     // (B,T)
    float* embedded;  // (B,T,C)
    std::vector<LayerActivations<Real>> h;
    Real* ln_f;        // (B,T,C)
    float* ln_f_mean;  // (B,T)
    float* ln_f_rstd;  // (B,T)
    Real* delta;       // (B,T,C): what a block adds to the residual stream; reused
    Real* logits;      // (classifier_rows,Vp), then their gradient; reused
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

template <class Real, class Gradient = float>
struct GPT : Model {
    static constexpr bool kIsFloat = std::is_same_v<Real, float>;
    static constexpr bool kFloatGradients = std::is_same_v<Gradient, float>;

    AttentionConfig attention;
    int L, H, D, C, V, Vp;
    Tensors weights;
    Tensors gradients;  // where Gradient is bf16 without those of matrices and embeddings
    Activations<Real> acts;
    ActivationGradients<Real> grads;
    float* scratch;      // of the layers' partial sums and tables, one after the other
    float* fixed_decay;  // (H), with decay fixed
    float* rope;         // (T,D), with RoPE: of the positions of the tokens now in the model
    Cache<Real> cache;

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
        require_linear_form(options.kernel == AttentionKernel::linear, "--attention-kernel linear");
        require_linear_form(options.cache == CacheKind::state, "--cache state");
        if (options.stochastic_rounding && kIsFloat)
            usage_error(
                "--stochastic-rounding: there is no copy of the weights to round without --dtype bf16");
        if (options.gradients == Precision::bf16 && kFloatGradients)
            usage_error("--gradients bf16: expected --dtype bf16 with it");
        if (D > 128) usage_error("heads of ", D, " channels: the CUDA trainer has kernels for at most 128");
        state_plan.add(array(Store::weights), table.size, "weights");
        if (!kIsFloat) state_plan.add(weights_real, table.size, "weights in bf16");
        if (training) {
            state_plan.add(all_gradients, table.size, "gradients");
            if (!kFloatGradients) state_plan.add(small_gradients, small_size(table));
            state_plan.add(array(Store::m), table.size, "AdamW's m");
            state_plan.add(array(Store::v), table.size, "AdamW's v");
        }
        decode_rows = std::min(256, options.batch * options.seq);
        plan_activations();
    }

    ~GPT() override {
        for (auto& [pass, graph] : graphs)
            if (graph) cudaGraphExecDestroy(graph);
        if (stream) cudaStreamDestroy(stream);
    }

    void start_forward(const int* inputs, const int* targets, int B, int T, float dloss,
                       AttentionNorms* norms = nullptr) override {
        int N = B * T;
        copy_to_device(acts.targets, targets, N, stream);
        place_tokens(inputs, B, T, nullptr);
        auto enqueue = [&](NormSums* sums) {
            forward_blocks(B, T, nullptr, sums);
            classifier(acts.losses, dloss != 0 ? grads.norm : nullptr,
                       dloss != 0 ? gradient(weights.wte) : nullptr, acts.logits, acts.ln_f,
                       real(weights.wte), acts.targets, dloss / N, accumulates, N, C, V, Vp, *matmuls,
                       stream);
            add_mean_loss(loss, acts.losses, N, stream);
        };
        if (norms) {
            if (norm_sums.size() == 0) norm_sums = DeviceArray<NormSums>(L * H);
            enqueue(norm_sums.get());
            std::vector<NormSums> sums(L * H);
            copy_to_host(sums.data(), norm_sums.get(), L * H, stream);
            for (int head = 0; head < L * H; head++) norms[head] = sums[head].norms(attention, B, T, D);
        } else {
            launch({.backward = false, .B = B, .T = T, .dloss = dloss, .accumulates = accumulates},
                   [&] { enqueue(nullptr); });
        }
    }

    double take_loss() override {
        double total;
        copy_to_host(&total, loss, 1, stream);
        check(cudaMemsetAsync(loss, 0, sizeof total, stream));
        return total;
    }

    // Tokens (B,T) and what depends on their positions, to the device. With a cache (B = 1) the tokens follow
    // those in it.
    void place_tokens(const int* tokens, int B, int T, const Cache<Real>* cache) {
        int start = cache ? cache->length : 0;
        copy_to_device(acts.inputs, tokens, (size_t)B * T, stream);
        if (config.rope() && (cache || rope_end != T)) {
            std::vector<float> angles = rope_table(T, D, start);
            copy_to_device(rope, angles.data(), angles.size(), stream);
            check(cudaStreamSynchronize(stream));
            rope_end = cache ? -1 : T;
        }
    }

    // From the tokens to the output of the last LayerNorm. sums (L,H), or null: of the attention's norms.
    void forward_blocks(int B, int T, Cache<Real>* cache, NormSums* sums = nullptr) {
        int start = cache ? cache->length : 0, N = B * T;
        embedding_forward(acts.embedded, acts.inputs, weights.wte,
                          weights.wpe ? weights.wpe + (size_t)start * C : nullptr, B, T, C, stream);
        float* residual = acts.embedded;
        for (int l = 0; l < L; l++) {
            LayerActivations<Real>& a = acts.h[l];
            LayerTensors& w = weights.h[l];
            if (l == 0)
                layernorm_forward(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N,
                                  C, stream);
            forward_to_gelu(l, residual, B, T, cache);
            if (sums)
                attention_norms(sums + l * H, scratch, a.heads, a.attn_stats, decay(l), attention, B, T, H, D,
                                stream);
            matmul_forward(acts.delta, a.gelu, real(w.fc_proj_weight), real(w.fc_proj_bias), N, 4 * C, C,
                           *matmuls, stream);
            // The addition to the residual stream goes together with the LayerNorm that reads it next.
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

    // One block from its first LayerNorm's output to the input of its last matrix product. residual (B,T,C)
    // is what goes into the block.
    void forward_to_gelu(int l, const float* residual, int B, int T, Cache<Real>* cache) {
        LayerActivations<Real>& a = acts.h[l];
        LayerTensors& w = weights.h[l];
        int N = B * T;
        matmul_forward(a.qkv, a.ln_1, real(w.attn_weight), real(w.attn_bias), N, C, 3 * C, *matmuls, stream);
        if (config.short_conv && cache) {
            cache->short_conv_forward(a.conv, a.qkv, w.conv_weight, l, T);
        } else if (config.short_conv) {
            short_conv_forward(a.conv, a.qkv, w.conv_weight, B, T, 3 * C, config.short_conv, stream);
        }
        if (config.qk_norm || config.rope())
            qk_norm_rope_forward(a.heads, a.qk_rstd, a.conv, w.q_gain, angles(), B, T, H, D, stream);
        if (cache) {
            cache->attention_forward(a.attn, a.heads, decay(l), l, T);
        } else if (linear(T)) {
            attention_linear_forward(a.attn, a.attn_stats, scratch, a.heads, decay(l), attention, B, T, H, D,
                                     stream);
        } else {
            attention_forward(a.attn, a.attn_stats, scratch, a.heads, decay(l), attention, B, T, H, D,
                              stream);
        }
        matmul_forward(acts.delta, a.attn, real(w.attn_proj_weight), real(w.attn_proj_bias), N, C, C,
                       *matmuls, stream);
        residual_layernorm_forward(a.residual_attn, a.ln_2, a.ln_2_mean, a.ln_2_rstd, residual, acts.delta,
                                   w.ln_2_weight, w.ln_2_bias, N, C, stream);
        if (gelu_fuses(4 * C)) {
            matmul_gelu_forward(a.gelu, a.fc, a.ln_2, real(w.fc_weight), real(w.fc_bias), N, C, 4 * C,
                                *matmuls, stream);
        } else {
            matmul_forward(a.fc, a.ln_2, real(w.fc_weight), real(w.fc_bias), N, C, 4 * C, *matmuls, stream);
            gelu_forward(a.gelu, a.fc, (size_t)N * 4 * C, stream);
        }
    }

    // Follows forward(), which left the gradient of ln_f's output in grads.norm and the output projection's
    // share of the gradients.
    void backward(const int*, int B, int T) override {
        launch({.backward = true, .B = B, .T = T, .dloss = 0, .accumulates = accumulates},
               [&] { backward_blocks(B, T); });
        accumulates = true;
    }

    void backward_blocks(int B, int T) {
        int N = B * T;
        check(cudaMemsetAsync(grads.residual, 0, (size_t)N * C * sizeof(float), stream));
        layernorm_backward(grads.residual, copy_of_residual(), gradients.ln_f_weight, gradients.ln_f_bias,
                           scratch, grads.norm, acts.h[L - 1].residual_mlp, acts.ln_f_mean, acts.ln_f_rstd,
                           weights.ln_f_weight, N, C, stream);
        for (int l = L - 1; l >= 0; l--) {
            LayerActivations<Real>& a = acts.h[l];
            LayerTensors& w = weights.h[l];
            LayerTensors& d = gradients.h[l];
            const float* residual = l > 0 ? acts.h[l - 1].residual_mlp : acts.embedded;
            recompute(l, residual, B, T);
            bool fuses = gelu_fuses(4 * C);
            matmul_gelu_backward(grads.fc, gradient(w.fc_proj_weight), d.fc_proj_bias, grads.residual_real,
                                 a.gelu, real(w.fc_proj_weight), fuses ? a.fc : nullptr, accumulates, N,
                                 4 * C, C, *matmuls, stream);
            if (!fuses) gelu_backward(grads.fc, d.fc_bias, scratch, grads.fc, a.fc, N, 4 * C, stream);
            matmul_backward(grads.norm, gradient(w.fc_weight), fuses ? d.fc_bias : nullptr, grads.fc, a.ln_2,
                            real(w.fc_weight), accumulates, N, C, 4 * C, *matmuls, stream);
            layernorm_backward(grads.residual, copy_of_residual(), d.ln_2_weight, d.ln_2_bias, scratch,
                               grads.norm, a.residual_attn, a.ln_2_mean, a.ln_2_rstd, w.ln_2_weight, N, C,
                               stream);
            matmul_backward(grads.norm, gradient(w.attn_proj_weight), d.attn_proj_bias, grads.residual_real,
                            a.attn, real(w.attn_proj_weight), accumulates, N, C, C, *matmuls, stream);
            if (linear(T)) {
                attention_linear_backward(grads.qkv, d.decay, scratch, grads.norm, a.attn, a.attn_stats,
                                          a.heads, decay(l), attention, B, T, H, D, stream);
            } else {
                attention_backward(grads.qkv, d.decay, scratch, grads.norm, a.attn, a.attn_stats, a.heads,
                                   decay(l), attention, B, T, H, D, stream);
            }
            if (config.qk_norm || config.rope())
                qk_norm_rope_backward(grads.qkv, d.q_gain, scratch, grads.qkv, a.conv, a.qk_rstd, w.q_gain,
                                      angles(), B, T, H, D, stream);
            Real* dqkv = grads.qkv;
            if (config.short_conv) {
                short_conv_backward(grads.conv, d.conv_weight, scratch, grads.qkv, a.qkv, w.conv_weight, B, T,
                                    3 * C, config.short_conv, stream);
                dqkv = grads.conv;
            }
            matmul_backward(grads.norm, gradient(w.attn_weight), d.attn_bias, dqkv, a.ln_1,
                            real(w.attn_weight), accumulates, N, C, 3 * C, *matmuls, stream);
            layernorm_backward(grads.residual, copy_of_residual(), d.ln_1_weight, d.ln_1_bias, scratch,
                               grads.norm, residual, a.ln_1_mean, a.ln_1_rstd, w.ln_1_weight, N, C, stream);
        }
        embedding_backward(gradient(weights.wte), gradient(weights.wpe), scratch, grads.residual, acts.inputs,
                           B, T, C, V, stream);
        if constexpr (!kFloatGradients) round_gradients(all_gradients, small_gradients, small_places, stream);
    }

    // What forward() did not keep of block l. residual (B,T,C) is what goes into the block.
    void recompute(int l, const float* residual, int B, int T) {
        LayerActivations<Real>& a = acts.h[l];
        LayerTensors& w = weights.h[l];
        int N = B * T;
        bool shared = l + 1 < L;  // later blocks have overwritten it
        if (options.recompute == Recompute::block && shared) {
            layernorm_forward(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N, C,
                              stream);
            forward_to_gelu(l, residual, B, T, nullptr);
        } else if (options.recompute != Recompute::none && shared) {
            gelu_forward(a.gelu, a.fc, (size_t)N * 4 * C, stream);
            if (options.recompute == Recompute::layernorm) {
                layernorm_recompute(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N,
                                    C, stream);
                layernorm_recompute(a.ln_2, a.ln_2_mean, a.ln_2_rstd, a.residual_attn, w.ln_2_weight,
                                    w.ln_2_bias, N, C, stream);
            }
        }
    }

    // The gradients of the matrices are assigned by the first backward pass, so only the rest is zeroed.
    void zero_gradients() override {
        accumulates = false;
        for (const ParameterTensor& t : table.tensors)
            if (t.name == "wpe.weight" || (!t.weight_decay && kFloatGradients))
                check(cudaMemsetAsync(all_gradients + t.offset, 0, t.size * sizeof(Gradient), stream));
        if (!kFloatGradients)
            check(cudaMemsetAsync(small_gradients, 0, small_size(table) * sizeof(float), stream));
    }

    double gradient_norm(int layer = -1) const override {
        const Gradient *begin = all_gradients, *end = begin + table.size;
        if (layer >= 0) {
            begin = gradient(weights.h[layer].ln_1_weight);
            end = gradient(layer + 1 < L ? weights.h[layer + 1].ln_1_weight : weights.ln_f_weight);
        }
        double total;
        sum_of_squares(squares, squares + 1, begin, end - begin, stream);
        copy_to_host(&total, squares, 1, stream);
        return std::sqrt(total);
    }

    double update(const AdamW& o, double learning_rate, double max_norm, int step) override {
        std::vector<DecayRange> ranges = decay_ranges(table, (float)o.weight_decay);
        if (decays.size() != ranges.size()) decays = DeviceArray<DecayRange>(ranges.size());
        copy_to_device(decays.get(), ranges.data(), ranges.size(), stream);
        sum_of_squares(squares, squares + 1, all_gradients, table.size, stream);
        clip_factor(scale, squares, max_norm, stream);
        adamw_update(array(Store::weights), weights_real, all_gradients, array(Store::m), array(Store::v),
                     table.size, (float)learning_rate, (float)o.beta1, (float)o.beta2, (float)o.eps,
                     decays.get(), (int)ranges.size(), scale, step, options.stochastic_rounding, options.seed,
                     stream);
        double total;
        copy_to_host(&total, squares, 1, stream);
        return std::sqrt(total);
    }

    const float* decode(const int* tokens, int n) override {
        for (int done = 0; done < n;) {
            int count = std::min(n - done, decode_rows);
            cache.begin([&](int l) { return decay(l); });
            place_tokens(tokens + done, 1, count, &cache);
            forward_blocks(1, count, &cache);
            done += count;
            if (done == n) last_logits(acts.ln_f + (size_t)(count - 1) * C);
        }
        return host_logits.data();
    }

    void clear_cache() override { cache = Cache<Real>(config, options.cache, stream); }

    void all_logits(float* out, const int* inputs, int B, int T) override {
        place_tokens(inputs, B, T, nullptr);
        forward_blocks(B, T, nullptr);
        for (int n = 0; n < B * T; n++) {
            last_logits(acts.ln_f + (size_t)n * C);
            std::copy_n(host_logits.begin(), V, out + (size_t)n * V);
        }
    }

    void read(Store store, const ParameterTensor& t, float* out) const override {
        if (store != Store::gradients) return copy_to_host(out, array(store) + t.offset, t.size, stream);
        std::vector<Gradient> values(t.size);
        copy_to_host(values.data(), all_gradients + t.offset, t.size, stream);
        std::copy(values.begin(), values.end(), out);
    }
    void write(Store store, const ParameterTensor& t, const float* in) override {
        copy_to_device(array(store) + t.offset, in, t.size, stream);
        if (!kIsFloat && store == Store::weights) {
            std::vector<Real> rounded(t.size);
            for (size_t i = 0; i < t.size; i++) rounded[i] = Real(in[i]);
            copy_to_device(weights_real + t.offset, rounded.data(), t.size, stream);
            check(cudaStreamSynchronize(stream));
        }
        check(cudaStreamSynchronize(stream));
    }

    // Weights and moments, then activations in the order of the forward pass, then gradients in that of the
    // backward pass.
    std::string first_nonfinite() const override {
        check(cudaStreamSynchronize(stream));
        for (const ParameterTensor& t : table.tensors)
            for (auto [store, what] :
                 {std::pair(Store::weights, "weight "), std::pair(Store::m, "AdamW's m of "),
                  std::pair(Store::v, "AdamW's v of ")})
                if (array(store) && !all_finite(array(store) + t.offset, t.size)) return what + t.name;
        std::string activation = activation_plan.first_nonfinite();
        if (!activation.empty()) return "activation " + activation;
        for (size_t i = training ? table.tensors.size() : 0; i-- > 0;) {
            const ParameterTensor& t = table.tensors[i];
            if (!all_finite(all_gradients + t.offset, t.size)) return "gradient of " + t.name;
        }
        return "";
    }

    std::vector<MemoryGroup> memory() const override {
        return {{"weights and optimizer", state_plan.bytes()}, {"activations", activation_plan.bytes()}};
    }

    size_t bytes() const { return state_plan.bytes() + activation_plan.bytes(); }

    void allocate() override {
        MemoryInfo info = memory_info();
        if (bytes() > info.free) out_of_memory(bytes(), info, flags_that_fit(info.free));
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        state_plan.allocate();
        activation_plan.allocate();
        for (Store store : {Store::weights, Store::m, Store::v})
            if (array(store)) check(cudaMemsetAsync(array(store), 0, table.size * sizeof(float), stream));
        weights = table.view(array(Store::weights));
        if (training) place_gradients();
        if constexpr (kIsFloat) {
            weights_real = nullptr;
            grads.residual_real = grads.residual;
        } else {
            check(cudaMemsetAsync(weights_real, 0, table.size * sizeof(Real), stream));
        }
        matmuls = std::make_unique<MatmulContext>(workspace, options.precision == Precision::tf32);
        check(cudaMemsetAsync(loss, 0, sizeof *loss, stream));
        if (config.decay == DecayKind::fixed) {
            std::vector<float> delta;
            for (int h = 0; h < H; h++) delta.push_back(initial_decay(h, H));
            copy_to_device(fixed_decay, delta.data(), H, stream);
            check(cudaStreamSynchronize(stream));
        }
    }

  private:
    // What the launches of a pass depend on.
    struct Pass {
        bool backward;
        int B, T;
        float dloss;
        bool accumulates;
        auto operator<=>(const Pass&) const = default;
    };

    // What enqueue() puts into the stream. With --cuda-graph it does so the first time, when algorithms are
    // still looked for, is captured the second time, and from then on the graph is launched instead.
    template <class F>
    void launch(const Pass& pass, F enqueue) {
        if (!options.cuda_graph) return enqueue();
        auto [found, is_new] = graphs.try_emplace(pass, nullptr);
        if (is_new) return enqueue();
        if (!found->second) {
            cudaGraph_t graph;
            check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            enqueue();
            check(cudaStreamEndCapture(stream, &graph));
            check(cudaGraphInstantiate(&found->second, graph, 0));
            check(cudaGraphDestroy(graph));
        }
        check(cudaGraphLaunch(found->second, stream));
    }

    ModelOptions options;
    bool training;
    cudaStream_t stream = nullptr;
    std::unique_ptr<MatmulContext> matmuls;
    std::map<Pass, cudaGraphExec_t> graphs;
    // (L,H), once norms are asked for
    DeviceArray<NormSums> norm_sums;
    char* workspace;  // (kMatmulWorkspace) bytes: cuBLASLt's
    double* squares;  // (1 + kSquaresBlocks): the norm's
    float* scale;     // (1): what the gradients are multiplied with
    double* loss;     // (1): the sum of the mean losses of the forward passes since it was taken
    DeviceArray<DecayRange> decays;
    int rope_end = -1;               // rope is that of positions 0 .. rope_end-1; -1: of others
    int decode_rows;                 // tokens of a prompt that go through decode() at a time
    bool accumulates = false;        // the gradients of matrices hold those of earlier micro-batches
    std::vector<float> host_logits;  // (V): on the host
    float* arrays[4] = {};           // (table.size) each, by Store, without the gradients
    Real* weights_real;              // (table.size): weights in bf16; null where Real is float
    MemoryPlan state_plan, activation_plan;
    // (table.size); where those are bf16, also the small tensors' in float (small_size), and their places.
    Gradient* all_gradients = nullptr;
    float* small_gradients = nullptr;
    DeviceArray<SmallTensor> small_places;

    static int padded_vocabulary(const GPTConfig& config) { return (config.vocab_size + 15) / 16 * 16; }

    // What to change on the command line so that the model takes no more than `free` bytes: rather what keeps
    // the results than the precision, and rather that than the batch.
    std::string flags_that_fit(size_t free) const {
        for (int batch = options.batch; batch > 0; batch /= 2)
            for (bool to_bf16 : {false, training && kIsFloat})
                for (int r = (int)options.recompute; r <= (int)Recompute::block; r++) {
                    ModelOptions smaller = options;
                    smaller.batch = batch, smaller.recompute = (Recompute)r;
                    if ((to_bf16 ? GPT<bf16>(config, smaller).bytes() : GPT(config, smaller).bytes()) > free)
                        continue;
                    return str("it fits with", batch < options.batch ? str(" --batch ", batch) : "",
                               to_bf16 ? " --dtype bf16" : "",
                               smaller.recompute > options.recompute
                                   ? str(" --recompute ", kRecomputeNames[r])
                                   : "");
                }
        return "expected a shorter --seq, a smaller model or a larger GPU";
    }

    float*& array(Store store) { return arrays[(int)store]; }
    float* array(Store store) const { return arrays[(int)store]; }

    // A tensor of the weights as matrix products take it.
    const Real* real(const float* weight) const {
        if constexpr (kIsFloat) {
            return weight;
        } else {
            return weights_real + (weight - array(Store::weights));
        }
    }
    // The gradient of a tensor of the weights.
    Gradient* gradient(const float* weight) const {
        return weight ? all_gradients + (weight - array(Store::weights)) : nullptr;
    }
    Real* copy_of_residual() const { return kIsFloat ? nullptr : grads.residual_real; }

    void place_gradients() {
        check(cudaMemsetAsync(all_gradients, 0, table.size * sizeof(Gradient), stream));
        if constexpr (kFloatGradients) {
            gradients = table.view(all_gradients);
        } else {
            std::vector<SmallTensor> tensors = small_tensors(table);
            auto next = tensors.begin();
            gradients = table.view_at([&](const ParameterTensor& t) {
                return t.weight_decay ? nullptr : small_gradients + next++->from;
            });
            small_places = DeviceArray<SmallTensor>(tensors.size());
            copy_to_device(small_places.get(), tensors.data(), tensors.size(), stream);
            check(cudaStreamSynchronize(stream));
        }
    }

    // Activations are kept for each layer where a backward pass reads them, and shared by all layers
    // otherwise.
    void plan_activations() {
        size_t B = options.batch, T = options.seq, N = B * T;
        acts.h.resize(L);
        activation_plan.add(acts.inputs, N);
        activation_plan.add(acts.targets, N);
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
            a.conv = a.heads = nullptr, a.qk_rstd = a.attn_stats = nullptr;
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
        activation_plan.add(acts.delta, N * C);
        activation_plan.add(acts.logits, (size_t)classifier_rows((int)N, Vp) * Vp);
        activation_plan.add(workspace, kMatmulWorkspace);
        activation_plan.add(squares, 1 + kSquaresBlocks);
        activation_plan.add(scale, 1);
        activation_plan.add(loss, 1);
        activation_plan.add(fixed_decay, H);
        if (config.rope()) activation_plan.add(rope, T * D);
        activation_plan.add(scratch, scratch_size((int)B, (int)T));
        if (!training) return;
        activation_plan.add(grads.residual, N * C);
        if (!kIsFloat) activation_plan.add(grads.residual_real, N * C);
        activation_plan.add(grads.norm, N * C);
        activation_plan.add(grads.qkv, N * 3 * C);
        if (config.short_conv) activation_plan.add(grads.conv, N * 3 * C);
        activation_plan.add(grads.fc, N * 4 * C);
    }

    // Floats: the most that a layer wants.
    size_t scratch_size(int B, int T) const {
        int N = B * T;
        // At a length where the linear form does not pay yet attention is tiled, whatever it is at T.
        size_t forward = attention_forward_scratch(T, H), backward = attention_backward_scratch(B, T, H);
        if (linear(T)) {
            forward = std::max(forward, attention_linear_forward_scratch<Real>(attention, B, T, H, D));
            backward = std::max(backward, attention_linear_backward_scratch<Real>(attention, B, T, H, D));
        }
        if (!training) return forward;
        return std::max({forward, backward, attention_norms_scratch(B, T, H),
                         embedding_backward_scratch(B, T, C), layernorm_backward_scratch(N, C),
                         gelu_backward_scratch(N, 4 * C), config.qk_norm ? qk_norm_rope_scratch(B, T, H) : 0,
                         config.short_conv ? short_conv_scratch(B, T, 3 * C, config.short_conv) : 0});
    }

    // Whether attention takes its linear form.
    bool linear(int T) const {
        if (options.kernel == AttentionKernel::automatic) return linear_pays(attention, T, D);
        return options.kernel == AttentionKernel::linear;
    }

    // delta (H) of layer l, or null without decay.
    const float* decay(int l) const {
        return config.decay == DecayKind::fixed ? fixed_decay : weights.h[l].decay;
    }

    // RoPE's (T,D), or null without.
    const float* angles() const { return config.rope() ? rope : nullptr; }

    // The logits (V) of one row (C) of the last LayerNorm's output, on the host.
    void last_logits(const Real* row) {
        matmul(acts.logits, row, real(weights.wte), 1, Vp, C, false, true, false, {}, *matmuls, stream);
        std::vector<Real> logits(V);
        copy_to_host(logits.data(), acts.logits, V, stream);
        host_logits.assign(logits.begin(), logits.end());
    }
};

// On the simulator, too, within a second: the matrices grow until a product takes a millisecond.
inline double measured_peak(Precision precision) {
    auto measure = [=](auto type) {
        using Real = decltype(type);
        DeviceArray<char> workspace(kMatmulWorkspace);
        MatmulContext context(workspace.get(), precision == Precision::tf32);
        double best = 0, seconds = 0;
        auto fits = [](size_t n) { return 3 * n * n * sizeof(Real) < memory_info().free; };
        for (int n = 512; n <= 8192 && seconds < 1e-3 && fits(n); n *= 2) {
            DeviceArray<Real> a((size_t)n * n), b((size_t)n * n), c((size_t)n * n);
            for (DeviceArray<Real>* x : {&a, &b}) check(cudaMemset(x->get(), 0, x->size() * sizeof(Real)));
            for (int repetition = 0; repetition < 5; repetition++) {  // the first finds the algorithm
                check(cudaDeviceSynchronize());
                auto start = std::chrono::steady_clock::now();
                matmul(c.get(), a.get(), b.get(), n, n, n, false, false, false, {}, context, nullptr);
                check(cudaDeviceSynchronize());
                seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
                best = std::max(best, 2.0 * n * n * n / seconds);
            }
        }
        return best;
    };
    return precision == Precision::bf16 ? measure(bf16()) : measure(float());
}

// The host's threads do nothing but wait.
inline int set_threads(int) {
    return 1;
}

inline std::unique_ptr<Model> make_model(const GPTConfig& config, const ModelOptions& options) {
    if (options.precision == Precision::bf16) {
        if (options.gradients == Precision::bf16) return std::make_unique<GPT<bf16, bf16>>(config, options);
        return std::make_unique<GPT<bf16>>(config, options);
    }
    return std::make_unique<GPT<float>>(config, options);
}

// For llmc/cuda/main.cpp.
Backend backend() {
    cudaDeviceProp properties;
    int device;
    check(cudaGetDevice(&device));
    check(cudaGetDeviceProperties(&properties, device));
    return {properties.name, make_model, set_threads, measured_peak};
}

}  // namespace gpu
