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
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "llmc/activations.h"
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

template <class Real, class Gradient = float>
struct GPT : Model {
    static constexpr bool kIsFloat = std::is_same_v<Real, float>;
    static constexpr bool kFloatGradients = std::is_same_v<Gradient, float>;

    AttentionConfig attention;
    int L, H, D, C, V, Vp;
    Tensors<float> weights;
    Tensors<Real> weights_real;  // the weights in the type of the matrix products
    Tensors<Gradient, float> gradients;
    Activations<Real> acts;
    ActivationGradients<Real> grads;
    int* inputs;         // (B,T)
    int* targets;        // (B,T)
    Real* logits;        // (classifier_rows,Vp): the logits, then their gradient; reused
    float* scratch;      // (scratch_size): partial sums and tables; one layer after another uses it
    float* fixed_decay;  // (H), with --decay fixed
    float* rope;         // (T,D), with RoPE: angles for the positions of the current tokens
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
        size_t B = options.batch, T = options.seq;
        parameter_plan.add(arrays.weights, table.size);
        if (!kIsFloat) parameter_plan.add(arrays.copy, table.size);
        if (training) parameter_plan.add(gradient_array, table.size);
        if (training && !kFloatGradients) parameter_plan.add(small_array, small_size(table));
        plan_activations(activation_plan, acts, grads, config, options,
                         stats_size<Real>(attention, B, T, H, D));
        activation_plan.add(inputs, B * T);
        activation_plan.add(targets, B * T);
        activation_plan.add(logits, (size_t)classifier_rows((int)(B * T), Vp) * Vp);
        activation_plan.add(workspace, kMatmulWorkspace);
        activation_plan.add(squares, 1 + kSquaresBlocks);
        activation_plan.add(gradient_factor, 1);
        activation_plan.add(loss_sum, 1);
        activation_plan.add(fixed_decay, H);
        if (config.rope()) activation_plan.add(rope, T * D);
        activation_plan.add(scratch, scratch_size((int)B, (int)T));
    }

    ~GPT() override {
        for (auto& [pass, graph] : graphs)
            if (graph) cudaGraphExecDestroy(graph);
        if (stream) cudaStreamDestroy(stream);
    }

    void run(const Batch& batch, const Pass& pass, const ReadyFunction& ready = {}) override {
        copy_to_device(targets, batch.targets, (size_t)batch.B * batch.T, stream);
        place_tokens(batch.inputs, batch.B, batch.T, nullptr);
        if (!options.cuda_graph || pass.norms) return enqueue(batch.B, batch.T, pass, ready);
        launch_graph(batch.B, batch.T, pass);
        // The launch of a graph puts all of its kernels into the stream at once, so all buckets are announced
        // after it.
        for (int bucket = 0; pass.backward && pass.last && ready && bucket <= L; bucket++) ready(bucket);
    }

    // Puts the kernels of a pass into the stream. The tokens must already be on the device.
    void enqueue(int B, int T, const Pass& pass, const ReadyFunction& ready) {
        int N = B * T;
        if (pass.norms && norm_sums.size() == 0) norm_sums = DeviceArray<NormSums>(L * H);
        forward_blocks(B, T, nullptr, pass.norms ? norm_sums.get() : nullptr);
        classifier(acts.losses, pass.backward ? grads.norm : nullptr, gradients.wte, logits, acts.ln_f,
                   weights_real.wte, targets, pass.loss_scale / N, !pass.first, N, C, V, Vp, *matmuls,
                   stream);
        add_mean_loss(loss_sum, acts.losses, N, stream);
        if (pass.backward) backward(B, T, pass, ready);
        if (!pass.norms) return;
        std::vector<NormSums> sums(L * H);
        copy_to_host(sums.data(), norm_sums.get(), L * H, stream);
        for (int head = 0; head < L * H; head++) pass.norms[head] = sums[head].norms(attention, B, T, D);
    }

    double take_loss() override {
        double total;
        copy_to_host(&total, loss_sum, 1, stream);
        check(cudaMemsetAsync(loss_sum, 0, sizeof total, stream));
        return total;
    }

    // Copies the tokens (B,T), and the RoPE table of their positions, to the device. With a cache (B = 1),
    // the tokens follow the ones in the cache.
    void place_tokens(const int* tokens, int B, int T, const Cache<Real>* cache) {
        int start = cache ? cache->length : 0;
        copy_to_device(inputs, tokens, (size_t)B * T, stream);
        if (config.rope() && (cache || rope_end != T)) {
            std::vector<float> angles = rope_table(T, D, start);
            copy_to_device(rope, angles.data(), angles.size(), stream);
            check(cudaStreamSynchronize(stream));
            rope_end = cache ? -1 : T;
        }
    }

    // Computes the output of the last LayerNorm from the tokens on the device. sums (L,H) receives the sums
    // for the attention's norms; null: they are not wanted.
    void forward_blocks(int B, int T, Cache<Real>* cache, NormSums* sums = nullptr) {
        int start = cache ? cache->length : 0, N = B * T;
        embedding_forward(acts.embedded, inputs, weights.wte,
                          weights.wpe ? weights.wpe + (size_t)start * C : nullptr, B, T, C, stream);
        float* residual = acts.embedded;
        for (int l = 0; l < L; l++) {
            LayerActivations<Real>& a = acts.h[l];
            const auto& w = weights.h[l];
            const auto& w_real = weights_real.h[l];
            if (l == 0)
                layernorm_forward(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N,
                                  C, stream);
            forward_to_gelu(l, residual, B, T, cache);
            if (sums)
                attention_norms(sums + l * H, scratch, a.heads, a.attn_stats, decay(l), attention, B, T, H, D,
                                stream);
            matmul_forward(acts.delta, a.gelu, w_real.fc_proj_weight, w_real.fc_proj_bias, N, 4 * C, C,
                           *matmuls, stream);
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
        matmul_forward(acts.delta, a.attn, w_real.attn_proj_weight, w_real.attn_proj_bias, N, C, C, *matmuls,
                       stream);
        residual_layernorm_forward(a.residual_attn, a.ln_2, a.ln_2_mean, a.ln_2_rstd, residual, acts.delta,
                                   w.ln_2_weight, w.ln_2_bias, N, C, stream);
        if (gelu_fuses(4 * C)) {
            matmul_gelu_forward(a.gelu, a.fc, a.ln_2, w_real.fc_weight, w_real.fc_bias, N, C, 4 * C, *matmuls,
                                stream);
        } else {
            matmul_forward(a.fc, a.ln_2, w_real.fc_weight, w_real.fc_bias, N, C, 4 * C, *matmuls, stream);
            gelu_forward(a.gelu, a.fc, (size_t)N * 4 * C, stream);
        }
    }

    // Runs after the forward pass. The classifier has already put the gradient of ln_f's output into
    // grads.norm, and the output projection's part of the gradient of wte into gradients.wte.
    void backward(int B, int T, const Pass& pass, const ReadyFunction& ready) {
        int N = B * T;
        bool accumulate = !pass.first;
        if (pass.first) zero_added_gradients();
        auto is_ready = [&](int bucket) {
            if (!pass.last) return;
            if constexpr (!kFloatGradients)
                small_gradients.round(gradient_array, small_array, buckets[bucket], stream);
            if (ready) ready(bucket);
        };
        check(cudaMemsetAsync(grads.residual, 0, (size_t)N * C * sizeof(float), stream));
        layernorm_backward(grads.residual, copy_of_residual(), gradients.ln_f_weight, gradients.ln_f_bias,
                           scratch, grads.norm, acts.h[L - 1].residual_mlp, acts.ln_f_mean, acts.ln_f_rstd,
                           weights.ln_f_weight, N, C, stream);
        for (int l = L - 1; l >= 0; l--) {
            LayerActivations<Real>& a = acts.h[l];
            const auto& w = weights.h[l];
            const auto& w_real = weights_real.h[l];
            const auto& d = gradients.h[l];
            const float* residual = l > 0 ? acts.h[l - 1].residual_mlp : acts.embedded;
            recompute(l, residual, B, T);
            bool fuses = gelu_fuses(4 * C);
            matmul_gelu_backward(grads.fc, d.fc_proj_weight, d.fc_proj_bias, grads.residual_real, a.gelu,
                                 w_real.fc_proj_weight, fuses ? a.fc : nullptr, accumulate, N, 4 * C, C,
                                 *matmuls, stream);
            if (!fuses) gelu_backward(grads.fc, d.fc_bias, scratch, grads.fc, a.fc, N, 4 * C, stream);
            matmul_backward(grads.norm, d.fc_weight, fuses ? d.fc_bias : nullptr, grads.fc, a.ln_2,
                            w_real.fc_weight, accumulate, N, C, 4 * C, *matmuls, stream);
            layernorm_backward(grads.residual, copy_of_residual(), d.ln_2_weight, d.ln_2_bias, scratch,
                               grads.norm, a.residual_attn, a.ln_2_mean, a.ln_2_rstd, w.ln_2_weight, N, C,
                               stream);
            matmul_backward(grads.norm, d.attn_proj_weight, d.attn_proj_bias, grads.residual_real, a.attn,
                            w_real.attn_proj_weight, accumulate, N, C, C, *matmuls, stream);
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
            matmul_backward(grads.norm, d.attn_weight, d.attn_bias, dqkv, a.ln_1, w_real.attn_weight,
                            accumulate, N, C, 3 * C, *matmuls, stream);
            layernorm_backward(grads.residual, copy_of_residual(), d.ln_1_weight, d.ln_1_bias, scratch,
                               grads.norm, residual, a.ln_1_mean, a.ln_1_rstd, w.ln_1_weight, N, C, stream);
            is_ready(L - 1 - l);
        }
        embedding_backward(gradients.wte, gradients.wpe, scratch, grads.residual, inputs, B, T, C, V, stream);
        is_ready(L);
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
        if (is_recomputed(options, Recompute::gelu, l, L))
            gelu_forward(a.gelu, a.fc, (size_t)N * 4 * C, stream);
        if (is_recomputed(options, Recompute::layernorm, l, L)) {
            layernorm_recompute(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias, N, C,
                                stream);
            layernorm_recompute(a.ln_2, a.ln_2_mean, a.ln_2_rstd, a.residual_attn, w.ln_2_weight, w.ln_2_bias,
                                N, C, stream);
        }
    }

    // Zeroes the gradients that layers add to. The first pass of a step assigns all others.
    void zero_added_gradients() {
        for (const ParameterTensor& t : table.tensors)
            if (!gradient_is_assigned(t.kind) && (kFloatGradients || !has_small_gradient(t.kind)))
                check(cudaMemsetAsync(gradient_array + t.offset, 0, t.size * sizeof(Gradient), stream));
        if (!kFloatGradients)
            check(cudaMemsetAsync(small_array, 0, small_size(table) * sizeof(float), stream));
    }

    double gradient_norm(Slice slice) const override {
        double total;
        sum_of_squares(squares, squares + 1, gradient_array + slice.begin, slice.size(), stream);
        copy_to_host(&total, squares, 1, stream);
        return std::sqrt(total);
    }

    // The norm and the factor stay on the device, so the optimizer's step does not have to wait for the host.
    void clip_gradients(double max_norm) override {
        sum_of_squares(squares, squares + 1, gradient_array, table.size, stream);
        clip_factor(gradient_factor, squares, max_norm, stream);
    }

    double clipped_norm() override {
        double total;
        copy_to_host(&total, squares, 1, stream);
        return std::sqrt(total);
    }

    std::unique_ptr<Optimizer> make_optimizer(const AdamW& adamw) override {
        return std::make_unique<AdamWOptimizer<Real, Gradient>>(
            table, arrays, adamw, options.stochastic_rounding, options.seed, stream);
    }

    const float* decode(const int* tokens, int n) override {
        for (int done = 0; done < n;) {
            int count = std::min({n - done, kPromptRows, options.batch * options.seq});
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
        if (store == Store::weights) return DeviceMemory::read(out, arrays.weights + t.offset, t.size);
        std::vector<Gradient> values(t.size);
        DeviceMemory::read(values.data(), gradient_array + t.offset, t.size);
        std::copy(values.begin(), values.end(), out);
    }
    void write(Store store, const ParameterTensor& t, const float* in) override {
        if (store == Store::gradients) {
            std::vector<Gradient> values(in, in + t.size);
            return DeviceMemory::write(gradient_array + t.offset, values.data(), t.size);
        }
        DeviceMemory::write(arrays.weights + t.offset, in, t.size);
        if constexpr (!kIsFloat) {
            std::vector<Real> rounded(in, in + t.size);
            DeviceMemory::write(arrays.copy + t.offset, rounded.data(), t.size);
        }
    }

    std::string first_nonfinite() const override {
        return first_nonfinite_of(table, arrays.weights, activation_plan, gradient_array);
    }

    std::vector<MemoryGroup> memory() const override {
        return {{"weights and gradients", parameter_plan.bytes()}, {"activations", activation_plan.bytes()}};
    }

    size_t bytes() const { return parameter_plan.bytes() + activation_plan.bytes(); }

    void allocate(size_t more = 0) override {
        MemoryInfo info = memory_info();
        if (bytes() + more > info.free)
            out_of_memory(bytes() + more, info, flags_that_fit(std::max(info.free, more) - more));
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        parameter_plan.allocate();
        activation_plan.allocate();
        arrays.gradients = gradient_array;
        arrays.clip_factor = gradient_factor;
        DeviceMemory::zero(arrays.weights, table.size);
        DeviceMemory::zero(loss_sum, 1);
        weights = table.view(arrays.weights);
        if constexpr (kIsFloat) {
            weights_real = weights;
        } else {
            DeviceMemory::zero(arrays.copy, table.size);
            weights_real = table.view(arrays.copy);
        }
        if (training) place_gradients();
        matmuls = std::make_unique<MatmulContext>(workspace, options.precision == Precision::tf32);
        if (config.decay == DecayKind::fixed) {
            std::vector<float> delta;
            for (int h = 0; h < H; h++) delta.push_back(initial_decay(h, H));
            DeviceMemory::write(fixed_decay, delta.data(), H);
        }
    }

  private:
    // The launches of a pass depend on this: B, T, backward, loss_scale, first, last.
    using GraphKey = std::tuple<int, int, bool, float, bool, bool>;

    // With --cuda-graph, the first pass of a kind is put into the stream kernel by kernel, because the matrix
    // products still search for their algorithms. The second one is captured as a graph, and from then on
    // that graph is launched.
    void launch_graph(int B, int T, const Pass& pass) {
        GraphKey key(B, T, pass.backward, pass.loss_scale, pass.first, pass.last);
        auto [found, is_new] = graphs.try_emplace(key, nullptr);
        if (is_new) return enqueue(B, T, pass, {});
        if (!found->second) {
            cudaGraph_t graph;
            check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            try {
                enqueue(B, T, pass, {});
            } catch (...) {
                // Memory cannot be freed during a capture, and the handling of the exception frees memory.
                if (cudaStreamEndCapture(stream, &graph) == cudaSuccess) cudaGraphDestroy(graph);
                throw;
            }
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
    std::map<GraphKey, cudaGraphExec_t> graphs;
    DeviceArray<NormSums> norm_sums;  // (L,H), allocated by the first pass that asks for norms
    char* workspace;                  // (kMatmulWorkspace) bytes: the workspace of cuBLASLt
    double* squares;                  // (1 + kSquaresBlocks): sum of the squared gradients, then scratch
    float* gradient_factor;           // (1): the optimizer multiplies the gradients by it
    double* loss_sum;                 // (1): mean losses of the passes since the last take_loss()
    int rope_end = -1;                // rope holds positions 0 .. rope_end-1; -1: it holds other positions
    std::vector<float> host_logits;   // (V): on the host
    ParameterArrays<Real, Gradient> arrays{};  // (table.size) each
    Gradient* gradient_array = nullptr;        // (table.size)
    float* small_array = nullptr;              // (small_size), if Gradient is bf16
    SmallGradients small_gradients;
    std::vector<Slice> buckets = table.buckets();
    MemoryPlan parameter_plan, activation_plan;

    static int padded_vocabulary(const GPTConfig& config) { return (config.vocab_size + 15) / 16 * 16; }

    // Says which flags make the model fit into `free` bytes. Tries, in this order: recomputation (same
    // results), bf16, a smaller batch.
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

    Real* copy_of_residual() const { return kIsFloat ? nullptr : grads.residual_real; }

    void place_gradients() {
        DeviceMemory::zero(gradient_array, table.size);
        if constexpr (kFloatGradients) {
            gradients = table.view(gradient_array);
        } else {
            size_t next = 0;
            gradients = table.view<Gradient, float>(gradient_array, [&](const ParameterTensor& t) {
                return small_array + std::exchange(next, next + ceil_div<size_t>(t.size, 16) * 16);
            });
            small_gradients = SmallGradients(table);
        }
    }

    // The number of floats that the layer with the largest need takes.
    size_t scratch_size(int B, int T) const {
        int N = B * T;
        // A sequence shorter than T may use tiles even if the linear form is used at T.
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

    // Whether attention is computed in its linear form.
    bool linear(int T) const {
        if (options.kernel == AttentionKernel::automatic) return linear_pays(attention, T, D);
        return options.kernel == AttentionKernel::linear;
    }

    // The decay parameters delta (H) of layer l; null without decay.
    const float* decay(int l) const {
        return config.decay == DecayKind::fixed ? fixed_decay : weights.h[l].decay;
    }

    // The table of RoPE (T,D); null without RoPE.
    const float* angles() const { return config.rope() ? rope : nullptr; }

    // Brings the logits (V) that follow from one row (C) of the last LayerNorm's output to the host.
    void last_logits(const Real* row) {
        matmul(logits, row, weights_real.wte, 1, Vp, C, false, true, false, {}, *matmuls, stream);
        std::vector<Real> values(V);
        copy_to_host(values.data(), logits, V, stream);
        host_logits.assign(values.begin(), values.end());
    }
};

// The matrices grow until a product takes a millisecond, so the simulator needs less than a second, too.
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
            for (int repetition = 0; repetition < 5; repetition++) {  // the first one finds the algorithm
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

// The host's threads only wait for the device, so one is enough.
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

// The text of --version about the build.
std::string describe_build() {
    size_t cublas = cublasLtGetVersion();
    std::string architectures;
    for (int architecture : {__CUDA_ARCH_LIST__})
        architectures += str(architectures.empty() ? "" : ", ", "sm_", architecture / 10);
    return str("for GPUs of ", architectures, " and newer; nvcc ", __CUDACC_VER_MAJOR__, ".",
               __CUDACC_VER_MINOR__, ".", __CUDACC_VER_BUILD__, "; matrix products by cuBLASLt ",
               cublas / 10000, ".", cublas / 100 % 100, ".", cublas % 100);
}

// llmc/cuda/main.cpp calls this.
Backend backend() {
    cudaDeviceProp properties;
    int device;
    check(cudaGetDevice(&device));
    check(cudaGetDeviceProperties(&properties, device));
    Capabilities can{.program = "train_gptcu",
                     .tf32 = true,
                     .bf16_gradients = true,
                     .stochastic_rounding = true,
                     .cuda_graph = true,
                     .largest_head = 128};
    return {properties.name, can, make_model, set_threads, measured_peak};
}

}  // namespace gpu
