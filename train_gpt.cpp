// The CPU trainer. This file is the model: a GPT-2 with softmax or polynomial attention, its forward pass,
// its backward pass and its update, in the order of the algorithm. The layers are in llmc/cpu/, a header
// each; the loop, the command line, files and everything else that the CUDA trainer shares are in llmc/. See
// README.md.
//
//   make && ./train_gpt train --data data/shakespeare --out out/run --attention poly3
#include <omp.h>

#include <chrono>
#include <cmath>
#include <string>
#include <vector>

#include "llmc/config.h"
#include "llmc/cpu/adamw.h"
#include "llmc/cpu/attention.h"
#include "llmc/cpu/attention_cached.h"
#include "llmc/cpu/classifier.h"
#include "llmc/cpu/embedding.h"
#include "llmc/cpu/gelu.h"
#include "llmc/cpu/layernorm.h"
#include "llmc/cpu/matmul.h"
#include "llmc/cpu/memory.h"
#include "llmc/cpu/qk_norm_rope.h"
#include "llmc/cpu/short_conv.h"
#include "llmc/model.h"
#include "llmc/parameters.h"

// What the forward pass leaves for the backward pass. Where an option is off its output is its input.
struct LayerActivations {
    float* ln_1;           // (B,T,C)
    float* ln_1_mean;      // (B,T)
    float* ln_1_rstd;      // (B,T)
    float* qkv;            // (B,T,3C)
    float* conv;           // (B,T,3C): after the short convolution
    float* heads;          // (B,T,3C): after qk-norm and RoPE
    float* qk_rstd;        // (B,T,2H)
    float* attn;           // (B,T,C)
    float* attn_stats;     // (B,H,T)
    float* residual_attn;  // (B,T,C): residual stream after attention
    float* ln_2;           // (B,T,C)
    float* ln_2_mean;      // (B,T)
    float* ln_2_rstd;      // (B,T)
    float* fc;             // (B,T,4C)
    float* gelu;           // (B,T,4C)
    float* residual_mlp;   // (B,T,C): residual stream after the MLP
};

struct Activations {
    float* embedded;  // (B,T,C)
    std::vector<LayerActivations> h;
    float* ln_f;       // (B,T,C)
    float* ln_f_mean;  // (B,T)
    float* ln_f_rstd;  // (B,T)
    float* delta;      // (B,T,C): what a block adds to the residual stream; reused
    float* logits;     // (classifier_rows,Vp); reused
    float* losses;     // (B,T)
};

// Gradients of activations, reused from layer to layer.
struct ActivationGradients {
    float* residual;  // (B,T,C)
    float* norm;      // (B,T,C): of a LayerNorm's output, or of attention's
    float* qkv;       // (B,T,3C)
    float* conv;      // (B,T,3C), with short_conv
    float* fc;        // (B,T,4C)
};

// Keys and values of the tokens so far, for generation.
struct Cache {
    int length = 0;                      // tokens
    std::vector<std::vector<float>> kv;  // (L): (length,2C)
    std::vector<std::vector<float>>
        before;  // (L): (K-1,3C), the last rows that went into the short convolution
};

struct GPT {
    GPTConfig config;
    AttentionConfig attention;
    int L, H, D, C, V, Vp;
    ParameterTable table;
    Tensors weights, gradients;
    Activations acts;
    ActivationGradients grads;
    std::vector<float> fixed_decay;  // (H), with decay fixed
    std::vector<float> rope;         // (context,D), with RoPE
    Cache cache;

    // Plans memory for batches of up to B x T tokens; allocate() before anything else.
    GPT(const GPTConfig& config, Purpose purpose, int B, int T)
        : config(config),
          attention(config.attention()),
          L(config.layers),
          H(config.heads),
          D(config.head_size()),
          C(config.channels),
          V(config.vocab_size),
          Vp((config.vocab_size + 15) / 16 * 16),
          table(config, Vp),
          training(purpose == Purpose::training) {
        for (int h = 0; h < H && config.decay == DecayKind::fixed; h++)
            fixed_decay.push_back(initial_decay(h, H));
        state_plan.add(array(Store::weights), table.size, "weights");
        if (training) {
            state_plan.add(array(Store::gradients), table.size, "gradients");
            state_plan.add(array(Store::m), table.size, "AdamW's m");
            state_plan.add(array(Store::v), table.size, "AdamW's v");
        }
        decode_rows = std::min(256, B * T);
        plan_activations(B, T);
    }
    GPT(const GPT&) = delete;
    GPT& operator=(const GPT&) = delete;

    // Mean loss of inputs and targets (B,T). Where dloss != 0 (the gradient of the mean loss) everything is
    // left for backward(), and the output projection's share of the gradients is already there.
    double forward(const int* inputs, const int* targets, int B, int T, float dloss) {
        forward_blocks(inputs, B, T, nullptr);
        cpu::classifier(acts.losses, dloss != 0 ? grads.norm : nullptr, dloss != 0 ? gradients.wte : nullptr,
                        acts.logits, acts.ln_f, weights.wte, targets, dloss / (B * T), B * T, C, V, Vp);
        double total = 0;
        for (int bt = 0; bt < B * T; bt++) total += acts.losses[bt];
        return total / (B * T);
    }

    // From tokens (B,T) to the output of the last LayerNorm. With a cache (B = 1) the tokens follow those in
    // it.
    void forward_blocks(const int* tokens, int B, int T, Cache* cache) {
        int start = cache ? cache->length : 0, N = B * T;
        if (config.rope()) extend_rope(start + T);
        const float* angles = config.rope() ? rope.data() + (size_t)start * D : nullptr;
        cpu::embedding_forward(acts.embedded, tokens, weights.wte,
                               weights.wpe ? weights.wpe + (size_t)start * C : nullptr, B, T, C);
        float* residual = acts.embedded;
        for (int l = 0; l < L; l++) {
            LayerActivations& a = acts.h[l];
            LayerTensors& w = weights.h[l];
            if (l == 0)
                cpu::layernorm_forward(a.ln_1, a.ln_1_mean, a.ln_1_rstd, residual, w.ln_1_weight, w.ln_1_bias,
                                       N, C);
            cpu::matmul_forward(a.qkv, a.ln_1, w.attn_weight, w.attn_bias, N, C, 3 * C);
            if (config.short_conv) short_conv(a, w, B, T, cache ? &cache->before[l] : nullptr);
            if (config.qk_norm || config.rope())
                cpu::qk_norm_rope_forward(a.heads, a.qk_rstd, a.conv, w.q_gain, angles, B, T, H, D);
            if (cache) {
                std::vector<float>& kv = cache->kv[l];
                for (int t = 0; t < T; t++)
                    kv.insert(kv.end(), a.heads + (size_t)t * 3 * C + C, a.heads + (size_t)(t + 1) * 3 * C);
                cpu::attention_cached_forward(a.attn, a.heads, kv.data(), decay(l), attention, start, T, H,
                                              D);
            } else {
                cpu::attention_forward(a.attn, a.attn_stats, a.heads, decay(l), attention, B, T, H, D);
            }
            cpu::matmul_forward(acts.delta, a.attn, w.attn_proj_weight, w.attn_proj_bias, N, C, C);
            cpu::residual_layernorm_forward(a.residual_attn, a.ln_2, a.ln_2_mean, a.ln_2_rstd, residual,
                                            acts.delta, w.ln_2_weight, w.ln_2_bias, N, C);
            cpu::matmul_forward(a.fc, a.ln_2, w.fc_weight, w.fc_bias, N, C, 4 * C);
            cpu::gelu_forward(a.gelu, a.fc, (size_t)N * 4 * C);
            cpu::matmul_forward(acts.delta, a.gelu, w.fc_proj_weight, w.fc_proj_bias, N, 4 * C, C);
            // The addition to the residual stream goes together with the LayerNorm that reads it next.
            bool last = l + 1 == L;
            cpu::residual_layernorm_forward(a.residual_mlp, last ? acts.ln_f : acts.h[l + 1].ln_1,
                                            last ? acts.ln_f_mean : acts.h[l + 1].ln_1_mean,
                                            last ? acts.ln_f_rstd : acts.h[l + 1].ln_1_rstd, a.residual_attn,
                                            acts.delta,
                                            last ? weights.ln_f_weight : weights.h[l + 1].ln_1_weight,
                                            last ? weights.ln_f_bias : weights.h[l + 1].ln_1_bias, N, C);
            residual = a.residual_mlp;
        }
        if (cache) cache->length += T;
    }

    // Adds the gradients of the last forward(), which left that of ln_f's output in grads.norm.
    void backward(const int* inputs, int B, int T) {
        int N = B * T;
        const float* angles = config.rope() ? rope.data() : nullptr;
        std::fill(grads.residual, grads.residual + (size_t)N * C, 0.0f);
        cpu::layernorm_backward(grads.residual, gradients.ln_f_weight, gradients.ln_f_bias, grads.norm,
                                acts.h[L - 1].residual_mlp, acts.ln_f_mean, acts.ln_f_rstd,
                                weights.ln_f_weight, N, C);
        for (int l = L - 1; l >= 0; l--) {
            LayerActivations& a = acts.h[l];
            LayerTensors& w = weights.h[l];
            LayerTensors& d = gradients.h[l];
            cpu::matmul_backward(grads.fc, d.fc_proj_weight, d.fc_proj_bias, grads.residual, a.gelu,
                                 w.fc_proj_weight, N, 4 * C, C);
            cpu::gelu_backward(grads.fc, grads.fc, a.fc, (size_t)N * 4 * C);
            cpu::matmul_backward(grads.norm, d.fc_weight, d.fc_bias, grads.fc, a.ln_2, w.fc_weight, N, C,
                                 4 * C);
            cpu::layernorm_backward(grads.residual, d.ln_2_weight, d.ln_2_bias, grads.norm, a.residual_attn,
                                    a.ln_2_mean, a.ln_2_rstd, w.ln_2_weight, N, C);
            cpu::matmul_backward(grads.norm, d.attn_proj_weight, d.attn_proj_bias, grads.residual, a.attn,
                                 w.attn_proj_weight, N, C, C);
            cpu::attention_backward(grads.qkv, d.decay, grads.norm, a.attn, a.attn_stats, a.heads, decay(l),
                                    attention, B, T, H, D);
            if (config.qk_norm || config.rope())
                cpu::qk_norm_rope_backward(grads.qkv, d.q_gain, grads.qkv, a.conv, a.qk_rstd, w.q_gain,
                                           angles, B, T, H, D);
            float* dqkv = grads.qkv;
            if (config.short_conv) {
                cpu::short_conv_backward(grads.conv, d.conv_weight, grads.qkv, a.qkv, w.conv_weight, B, T,
                                         3 * C, config.short_conv);
                dqkv = grads.conv;
            }
            cpu::matmul_backward(grads.norm, d.attn_weight, d.attn_bias, dqkv, a.ln_1, w.attn_weight, N, C,
                                 3 * C);
            const float* residual = l > 0 ? acts.h[l - 1].residual_mlp : acts.embedded;
            cpu::layernorm_backward(grads.residual, d.ln_1_weight, d.ln_1_bias, grads.norm, residual,
                                    a.ln_1_mean, a.ln_1_rstd, w.ln_1_weight, N, C);
        }
        cpu::embedding_backward(gradients.wte, gradients.wpe, grads.residual, inputs, B, T, C);
    }

    void zero_gradients() { std::fill_n(array(Store::gradients), table.size, 0.0f); }

    double gradient_norm() const {
        return std::sqrt(cpu::sum_of_squares(array(Store::gradients), table.size));
    }

    // One AdamW step on the gradients times grad_scale; step counts from 1.
    void update(const AdamW& o, double learning_rate, double grad_scale, int step) {
        for (const ParameterTensor& t : table.tensors)
            cpu::adamw_update(array(Store::weights) + t.offset, array(Store::gradients) + t.offset,
                              array(Store::m) + t.offset, array(Store::v) + t.offset, t.size,
                              (float)learning_rate, (float)o.beta1, (float)o.beta2, (float)o.eps,
                              t.weight_decay ? (float)o.weight_decay : 0.0f, (float)grad_scale, step);
    }

    // Logits (V) of the token after `tokens` (n), which follow those already in the cache.
    const float* decode(const int* tokens, int n) {
        for (int done = 0; done < n;) {
            int count = std::min(n - done, decode_rows);
            forward_blocks(tokens + done, 1, count, &cache);
            done += count;
            if (done == n)
                cpu::matmul(acts.logits, acts.ln_f + (size_t)(count - 1) * C, weights.wte, 1, Vp, C, false,
                            true, false);
        }
        return acts.logits;
    }

    void clear_cache() {
        cache = Cache();
        cache.kv.resize(L);
        cache.before.assign(L, std::vector<float>((size_t)std::max(0, config.short_conv - 1) * 3 * C, 0.0f));
    }

    // Logits (B,T,V) of every position, for dump.
    void all_logits(float* out, const int* inputs, int B, int T) {
        forward_blocks(inputs, B, T, nullptr);
        for (int n = 0; n < B * T; n++) {
            cpu::matmul(acts.logits, acts.ln_f + (size_t)n * C, weights.wte, 1, Vp, C, false, true, false);
            std::copy(acts.logits, acts.logits + V, out + (size_t)n * V);
        }
    }

    void read(Store store, const ParameterTensor& t, float* out) const {
        std::copy_n(array(store) + t.offset, t.size, out);
    }
    void write(Store store, const ParameterTensor& t, const float* in) {
        std::copy_n(in, t.size, array(store) + t.offset);
    }

    // Where a NaN or Inf came from: weights and moments, then activations in the order of the forward pass,
    // then gradients in that of the backward pass. Empty where all is finite.
    std::string first_nonfinite() const {
        auto finite = [](const float* x, size_t n) {
            for (size_t i = 0; i < n; i++)
                if (!std::isfinite(x[i])) return false;
            return true;
        };
        for (const ParameterTensor& t : table.tensors)
            for (auto [store, what] :
                 {std::pair(Store::weights, "weight "), std::pair(Store::m, "AdamW's m of "),
                  std::pair(Store::v, "AdamW's v of ")})
                if (array(store) && !finite(array(store) + t.offset, t.size)) return what + t.name;
        for (const cpu::MemoryPlan::Buffer& buffer : activation_plan.buffers())
            if (buffer.kept && !finite(*buffer.slot, buffer.size)) return "activation " + buffer.name;
        for (size_t i = training ? table.tensors.size() : 0; i-- > 0;) {
            const ParameterTensor& t = table.tensors[i];
            if (!finite(array(Store::gradients) + t.offset, t.size)) return "gradient of " + t.name;
        }
        return "";
    }

    std::vector<MemoryGroup> memory() const {
        return {{"weights and optimizer", state_plan.bytes()}, {"activations", activation_plan.bytes()}};
    }

    void allocate() {
        state_plan.allocate();
        activation_plan.allocate();
        for (Store store : {Store::weights, Store::gradients, Store::m, Store::v})
            if (array(store)) std::fill_n(array(store), table.size, 0.0f);
        weights = table.view(array(Store::weights));
        if (training) gradients = table.view(array(Store::gradients));
        for (LayerActivations& a : acts.h) {
            if (!training) a = acts.h[0];
            if (!config.short_conv) a.conv = a.qkv;
            if (!config.qk_norm && !config.rope()) a.heads = a.conv;
        }
    }

    static const char* backend() { return "CPU"; }

    // 0: as many as there are cores. Returns how many there will be.
    static int set_threads(int threads) {
        if (threads > 0) omp_set_num_threads(threads);
        return omp_get_max_threads();
    }

    // Operations a second of a large matrix product on this machine, now: what the log's share of the peak is
    // of.
    static double measured_peak() {
        constexpr int n = 512;
        cpu::Floats a(n * n), b(n * n), c(n * n);
        std::fill_n(a.get(), n * n, 1.0f);
        std::fill_n(b.get(), n * n, 1.0f);
        double best = 0;
        for (int repetition = 0; repetition < 8; repetition++) {  // the first makes the primitive
            auto start = std::chrono::steady_clock::now();
            cpu::matmul(c.get(), a.get(), b.get(), n, n, n, false, false, false);
            std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            best = std::max(best, 2.0 * n * n * n / seconds.count());
        }
        return best;
    }

  private:
    int decode_rows;  // tokens of a prompt that go through decode() at a time
    bool training;
    float* arrays[4] = {};  // (table.size) each, by Store
    cpu::MemoryPlan state_plan, activation_plan;

    float*& array(Store store) { return arrays[(int)store]; }
    float* array(Store store) const { return arrays[(int)store]; }

    // Activations are kept for each layer where a backward pass follows, and shared by all layers otherwise.
    void plan_activations(int B, int T) {
        size_t N = (size_t)B * T;
        auto keep = [&](float*& slot, size_t size, const std::string& name) {
            activation_plan.add(slot, size, name, true);
        };
        auto reuse = [&](float*& slot, size_t size, const std::string& name) {
            activation_plan.add(slot, size, name, false);
        };
        keep(acts.embedded, N * C, "embedded");
        acts.h.resize(L);
        for (int l = 0; l < (training ? L : 1); l++) {
            LayerActivations& a = acts.h[l];
            std::string h = str("h.", l, ".");
            keep(a.ln_1, N * C, h + "ln_1");
            keep(a.ln_1_mean, N, h + "ln_1 mean");
            keep(a.ln_1_rstd, N, h + "ln_1 rstd");
            keep(a.qkv, N * 3 * C, h + "attn.qkv");
            if (config.short_conv) keep(a.conv, N * 3 * C, h + "attn.conv");
            if (config.qk_norm) keep(a.qk_rstd, N * 2 * H, h + "attn.qk rstd");
            if (config.qk_norm || config.rope()) keep(a.heads, N * 3 * C, h + "attn.heads");
            if (attention.softmax() || attention.has_row_sum()) keep(a.attn_stats, N * H, h + "attn.stats");
            keep(a.attn, N * C, h + "attn.out");
            keep(a.residual_attn, N * C, h + "attn.residual");
            keep(a.ln_2, N * C, h + "ln_2");
            keep(a.ln_2_mean, N, h + "ln_2 mean");
            keep(a.ln_2_rstd, N, h + "ln_2 rstd");
            keep(a.fc, N * 4 * C, h + "mlp.fc");
            keep(a.gelu, N * 4 * C, h + "mlp.gelu");
            keep(a.residual_mlp, N * C, h + "mlp.residual");
        }
        keep(acts.ln_f, N * C, "ln_f");
        keep(acts.ln_f_mean, N, "ln_f mean");
        keep(acts.ln_f_rstd, N, "ln_f rstd");
        keep(acts.losses, N, "losses");
        reuse(acts.delta, N * C, "delta");
        reuse(acts.logits, (size_t)cpu::classifier_rows((int)N, Vp) * Vp, "logits");
        if (!training) return;
        reuse(grads.residual, N * C, "gradient of residual");
        reuse(grads.norm, N * C, "gradient of norm");
        reuse(grads.qkv, N * 3 * C, "gradient of qkv");
        if (config.short_conv) reuse(grads.conv, N * 3 * C, "gradient of conv");
        reuse(grads.fc, N * 4 * C, "gradient of fc");
    }

    // delta (H) of layer l, or null without decay.
    const float* decay(int l) const {
        return config.decay == DecayKind::fixed ? fixed_decay.data() : weights.h[l].decay;
    }

    void extend_rope(int T) {
        if (rope.size() < (size_t)T * D) rope = cpu::rope_table(std::max(T, 2 * (int)(rope.size() / D)), D);
    }

    // a.conv from a.qkv. While generating, the rows before these come from `before`, and the last ones go
    // there.
    void short_conv(LayerActivations& a, const LayerTensors& w, int B, int T, std::vector<float>* before) {
        int K = config.short_conv, W = 3 * C;
        if (!before) return cpu::short_conv_forward(a.conv, a.qkv, w.conv_weight, B, T, W, K);
        std::vector<float> rows = *before, out((size_t)(K - 1 + T) * W);  // (K-1+T,3C)
        rows.insert(rows.end(), a.qkv, a.qkv + (size_t)T * W);
        cpu::short_conv_forward(out.data(), rows.data(), w.conv_weight, 1, K - 1 + T, W, K);
        std::copy(out.end() - (size_t)T * W, out.end(), a.conv);
        before->assign(rows.end() - (size_t)(K - 1) * W, rows.end());
    }
};

#ifndef LLMC_TESTING  // tests include this file
#include "llmc/main.h"

int main(int argc, char** argv) {
    return run<GPT>("train_gpt", argc, argv);
}
#endif
