// Times every kernel of llmc/cuda alone, at the sizes of a model: the median of several calls between two
// events, with nothing of what it reads in the L2 cache.
#include "dev/bench/cuda_layers.h"

#include <algorithm>
#include <random>
#include <set>

#include "llmc/cuda/adamw.h"
#include "llmc/cuda/attention/attention.h"
#include "llmc/cuda/attention/cached.h"
#include "llmc/cuda/attention/linear.h"
#include "llmc/cuda/classifier.h"
#include "llmc/cuda/embedding.h"
#include "llmc/cuda/gelu.h"
#include "llmc/cuda/layernorm.h"
#include "llmc/cuda/matmul.h"
#include "llmc/cuda/memory.h"
#include "llmc/cuda/output_gate.h"
#include "llmc/cuda/qk_norm_rope.h"
#include "llmc/cuda/short_conv.h"
#include "llmc/rope.h"

namespace layers_bench {
namespace {

using namespace gpu;

// Uniform numbers of mean 0 and this standard deviation. Zeros would draw less power than training does, and
// leave the card's clocks higher.
template <class T>
__global__ void fill_kernel(T* x, size_t n, uint32_t seed, float deviation) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        uint32_t bits = (uint32_t)i * 2654435761u ^ seed;
        bits = (bits ^ bits >> 16) * 0x85EBCA6Bu;
        bits = (bits ^ bits >> 13) * 0xC2B2AE35u;
        x[i] = from_float<T>(((int)(bits ^ bits >> 16)) * (0x1p-31f * 1.7320508f * deviation));
    }
}

__global__ void copy_kernel(Pack<float>* __restrict__ to, const Pack<float>* __restrict__ from, size_t n) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        to[i] = from[i];
}

// Fills the L2 cache with lines that it only reads. So the next kernel has no changed lines to write back.
__global__ void read_kernel(float* never, const Pack<float>* from, size_t n) {
    float sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        for (int k = 0; k < Pack<float>::size; k++) sum += from[i][k];
    if (sum == 1e30f) *never = sum;
}

// For the kernels above.
unsigned blocks_for(size_t n) {
    return (unsigned)std::clamp<size_t>(ceil_div<size_t>(n, 256), 1, 8 * kMultiprocessors);
}

class Events {
  public:
    Events() {
        for (cudaEvent_t* event : {&begin_, &end_}) check(cudaEventCreate(event));
    }
    Events(const Events&) = delete;
    ~Events() {
        for (cudaEvent_t event : {begin_, end_}) cudaEventDestroy(event);
    }
    void begin(cudaStream_t stream) { check(cudaEventRecord(begin_, stream)); }
    void end(cudaStream_t stream) { check(cudaEventRecord(end_, stream)); }
    double milliseconds() const {
        float ms;
        check(cudaEventElapsedTime(&ms, begin_, end_));
        return std::max(ms, 1e-6f);
    }

  private:
    cudaEvent_t begin_, end_;
};

class Stopwatch {
  public:
    Stopwatch(int repeat, bool flushes) : repeat_(repeat), events_(repeat + 1), never_(1) {
        int device, bytes;
        check(cudaGetDevice(&device));
        check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
        other_ = DeviceArray<float>(flushes ? (size_t)bytes / 2 : 1024);  // twice the cache
        fill_kernel<<<blocks_for(other_.size()), 256>>>(other_.get(), other_.size(), 1, 1.0f);
        check_launch();
    }

    // The median time of f(), which enqueues its work in the default stream.
    template <class F>
    double milliseconds(F f) {
        int calls = repeat_;
        for (int i = -1; i < calls; i++) {  // the first finds algorithms, and how long it takes
            read_kernel<<<blocks_for(other_.size() / 4), 256>>>(
                never_.get(), (const Pack<float>*)other_.get(), other_.size() / 4);
            check_launch();
            Events& events = events_[i + 1];
            events.begin(nullptr);
            f();
            events.end(nullptr);
            if (i >= 0) continue;
            check(cudaDeviceSynchronize());
            calls = std::clamp((int)(kMost / events.milliseconds()), std::min(3, repeat_), repeat_);
        }
        check(cudaDeviceSynchronize());
        std::vector<double> times;
        for (int i = 0; i < calls; i++) times.push_back(events_[i + 1].milliseconds());
        std::nth_element(times.begin(), times.begin() + calls / 2, times.end());
        return times[calls / 2];
    }

  private:
    static constexpr double kMost = 500;  // ms for one layer
    int repeat_;
    std::vector<Events> events_;
    DeviceArray<float> never_, other_;
};

template <class T>
DeviceArray<T> random(size_t n, float deviation = 1) {
    static uint32_t seed = 0;
    DeviceArray<T> x(n);
    fill_kernel<<<blocks_for(n), 256>>>(x.get(), n, ++seed * 0x9E3779B9u, deviation);
    check_launch();
    return x;
}
template <class T>
DeviceArray<T> on_device(const std::vector<T>& values) {
    DeviceArray<T> x(values.size());
    copy_to_device(x.get(), values.data(), values.size(), nullptr);
    check(cudaDeviceSynchronize());
    return x;
}

// Kernels of attention that are compared.
struct Form {
    AttentionKind kind;
    bool linear;
};

template <class Real>
class Bench {
  public:
    Bench(const Settings& settings, Results& results, const std::function<void()>& changed)
        : s(settings),
          results(results),
          changed(changed),
          stopwatch(s.repeat, s.flushes_cache),
          workspace(kMatmulWorkspace),
          context(workspace.get()) {
        cudaDeviceProp properties;
        int device;
        check(cudaGetDevice(&device));
        check(cudaGetDeviceProperties(&properties, device));
        results.device = properties.name;
    }

    // By the better of a kernel and cudaMemcpy, and the best size.
    void ceilings() {
        size_t n = s.copied / sizeof(float);
        DeviceArray<float> to(n), from = random<float>(n);
        auto copies = [&](auto f) {
            results.copy_rate = std::max(results.copy_rate, 2e3 * s.copied / stopwatch.milliseconds(f));
        };
        copies([&] {
            copy_kernel<<<blocks_for(n / 4), 256>>>((Pack<float>*)to.get(), (const Pack<float>*)from.get(),
                                                    n / 4);
            check_launch();
        });
        copies([&] {
            check(cudaMemcpyAsync(to.get(), from.get(), s.copied, cudaMemcpyDeviceToDevice, nullptr));
        });
        for (int size : s.products) {
            auto a = random<Real>((size_t)size * size), b = random<Real>(a.size());
            DeviceArray<Real> c(a.size());
            double ms = stopwatch.milliseconds([&] {
                matmul(c.get(), a.get(), b.get(), size, size, size, false, false, false, {}, context,
                       nullptr);
            });
            results.product_rate = std::max(results.product_rate, 2e3 * size * size * size / ms);
        }
        changed();
    }

    void layers() {
        embedding();
        layernorm();
        heads();
        linear("qkv", C, 3 * C, false, false);
        linear("attention projection", C, C, false, false);
        linear("fc", C, 4 * C, true, false);
        linear("fc projection", 4 * C, C, false, true);
        gelu();
        for (const Form& form : forms()) {
            Attention a = attention(form, B, T);
            for (Layer* layer : {&a.forward, &a.backward}) add(*layer);
        }
        attention_cached();
        classifier();
        update();
    }

    // About as many tokens at every length.
    void attention_against_length() {
        int tokens = *std::max_element(s.lengths.begin(), s.lengths.end());
        for (int length : s.lengths)
            for (const Form& form : forms()) {
                results.attention.push_back(attention(form, std::max(1, tokens / length), length));
                changed();
            }
    }

  private:
    const Settings& s;
    Results& results;
    const std::function<void()>& changed;
    Stopwatch stopwatch;
    DeviceArray<char> workspace;
    MatmulContext context;

    const int B = s.batch, T = s.seq, N = B * T, C = s.channels, H = s.heads, D = C / H, V = s.vocab_size,
              Vp = (V + 15) / 16 * 16;
    const double NC = (double)N * C;
    static constexpr double kReal = sizeof(Real), kFloat = sizeof(float);

    template <class F>
    void time(Layer& layer, F f) {
        try {
            layer.ms = stopwatch.milliseconds(f);
        } catch (const Error& e) {
            layer.error = e.what();
        }
    }
    void add(Layer layer) {
        results.layers.push_back(std::move(layer));
        changed();
    }
    template <class F>
    void measure(const std::string& name, double bytes, double operations, F f) {
        Layer layer{name, bytes, operations};
        time(layer, f);
        add(layer);
    }

    void embedding() {
        std::vector<int> ids(N);
        std::mt19937 generator(1);
        for (int& id : ids) id = (int)(generator() % V);
        double rows = (double)std::set<int>(ids.begin(), ids.end()).size();
        auto tokens = on_device(ids);
        auto wte = random<float>((size_t)V * C), wpe = random<float>((size_t)T * C);
        auto wte_real = random<Real>((size_t)V * C), wpe_real = random<Real>((size_t)T * C);
        auto out = random<float>((size_t)N * C);
        measure("embedding forward", kFloat * (N + C * N) + kReal * C * (rows + T), 0, [&] {
            embedding_forward(out.get(), tokens.get(), wte_real.get(), wpe_real.get(), B, T, C, nullptr);
        });
        DeviceArray<float> scratch(embedding_backward_scratch(B, T, C));
        measure("embedding backward", kFloat * (N + C * (N + 2 * rows + 2.0 * T)), 0, [&] {
            embedding_backward(wte.get(), wpe.get(), scratch.get(), out.get(), tokens.get(), B, T, C, V,
                               nullptr);
        });
    }

    void layernorm() {
        size_t n = (size_t)N * C;
        auto inp = random<float>(n), residual = random<float>(n), weight = random<float>(C),
             bias = random<float>(C), mean = random<float>(N), rstd = random<float>(N);
        auto out = random<Real>(n), delta = random<Real>(n);
        double statistics = kFloat * 2 * N;
        measure("layernorm forward", NC * (kFloat + kReal) + statistics, 0, [&] {
            layernorm_forward(out.get(), mean.get(), rstd.get(), inp.get(), weight.get(), bias.get(), N, C,
                              nullptr);
        });
        measure("layernorm recompute", NC * (kFloat + kReal) + statistics, 0, [&] {
            layernorm_recompute(out.get(), mean.get(), rstd.get(), inp.get(), weight.get(), bias.get(), N, C,
                                nullptr);
        });
        measure("residual + layernorm forward", NC * 2 * (kFloat + kReal) + statistics, 0, [&] {
            residual_layernorm_forward(residual.get(), out.get(), mean.get(), rstd.get(), inp.get(),
                                       delta.get(), weight.get(), bias.get(), N, C, nullptr);
        });
        constexpr bool kCopies = !std::is_same_v<Real, float>;
        DeviceArray<float> scratch(layernorm_backward_scratch(N, C));
        measure("layernorm backward", NC * (3 * kFloat + (kCopies ? 2 : 1) * kReal) + statistics, 0, [&] {
            layernorm_backward(residual.get(), kCopies ? delta.get() : nullptr, weight.get(), bias.get(),
                               scratch.get(), out.get(), inp.get(), mean.get(), rstd.get(), weight.get(), N,
                               C, nullptr);
        });
    }

    void heads() {
        constexpr int kTaps = 4;
        size_t n = (size_t)N * 3 * C;
        auto inp = random<Real>(n), out = random<Real>(n), dout = random<Real>(n);
        auto rstd = random<float>((size_t)N * 2 * H), gain = random<float>(H), dgain = random<float>(H);
        auto angles = on_device(rope_table(T, D, 0));
        double statistics = kFloat * 2.0 * N * H;
        measure("qk-norm and RoPE forward", 6 * NC * kReal + statistics, 0, [&] {
            qk_norm_rope_forward(out.get(), rstd.get(), inp.get(), gain.get(), angles.get(), B, T, H, D,
                                 nullptr);
        });
        DeviceArray<float> scratch(
            std::max(qk_norm_rope_scratch(B, T, H), short_conv_scratch(B, T, 3 * C, kTaps)));
        measure("qk-norm and RoPE backward", 6 * NC * kReal + statistics, 0, [&] {  // in place: v stays
            qk_norm_rope_backward(dout.get(), dgain.get(), scratch.get(), dout.get(), inp.get(), rstd.get(),
                                  gain.get(), angles.get(), B, T, H, D, nullptr);
        });
        auto weight = random<float>((size_t)kTaps * 3 * C), dweight = random<float>(weight.size());
        measure("short conv forward", 6 * NC * kReal, 0,
                [&] { short_conv_forward(out.get(), inp.get(), weight.get(), B, T, 3 * C, kTaps, nullptr); });
        measure("short conv backward", 9 * NC * kReal, 0, [&] {
            short_conv_backward(out.get(), dweight.get(), scratch.get(), dout.get(), inp.get(), weight.get(),
                                B, T, 3 * C, kTaps, nullptr);
        });
        const size_t gated = (size_t)N * C;
        measure("output gate forward", 3 * NC * kReal, 0,
                [&] { output_gate_forward(out.get(), inp.get(), dout.get(), gated, nullptr); });
        measure("output gate backward", 5 * NC * kReal, 0, [&] {
            output_gate_backward(out.get(), out.get() + gated, out.get(), inp.get(), dout.get(), gated,
                                 nullptr);
        });
    }

    // to_gelu: GELU is in its epilogue; from_gelu: its derivative in the epilogue of the backward pass.
    void linear(const std::string& name, int IC, int OC, bool to_gelu, bool from_gelu) {
        to_gelu &= gelu_fuses(OC), from_gelu &= gelu_fuses(IC);
        size_t in = (size_t)N * IC, out = (size_t)N * OC, both = (size_t)IC * OC;
        auto inp = random<Real>(in), weight = random<Real>(both, 0.02f), bias = random<Real>(OC),
             result = random<Real>(out),
             pre_gelu = random<Real>(std::max(to_gelu ? out : 1, from_gelu ? in : 1)),
             dinp = random<Real>(in);
        auto dweight = random<float>(both), dbias = random<float>(OC);
        double products = 2.0 * N * IC * OC;
        measure("matmul " + name + (to_gelu ? " + GELU" : "") + " forward",
                kReal * (in + both + OC + (to_gelu ? 2.0 : 1.0) * out), products, [&] {
                    if (to_gelu) {
                        matmul_gelu_forward(result.get(), pre_gelu.get(), inp.get(), weight.get(), bias.get(),
                                            N, IC, OC, context, nullptr);
                    } else {
                        matmul_forward(result.get(), inp.get(), weight.get(), bias.get(), N, IC, OC, context,
                                       nullptr);
                    }
                });
        measure("matmul " + name + (from_gelu ? " + dGELU" : "") + " backward",
                kReal * (out + both + (from_gelu ? 3.0 : 2.0) * in) + kFloat * both, 2 * products, [&] {
                    matmul_gelu_backward(dinp.get(), dweight.get(), dbias.get(), result.get(), inp.get(),
                                         weight.get(), from_gelu ? pre_gelu.get() : nullptr, false, N, IC, OC,
                                         context, nullptr);
                });
        measure("bias gradient of " + name, kReal * out, 0, [&] {
            add_column_sums(dbias.get(), context.scratch<kColumnSumsScratch>(), result.get(), N, OC, nullptr);
        });
    }

    void gelu() {
        size_t n = (size_t)N * 4 * C;
        auto inp = random<Real>(n), out = random<Real>(n), dout = random<Real>(n);
        auto dbias = random<float>(4 * C);
        measure("GELU forward", 8 * NC * kReal, 0, [&] { gelu_forward(out.get(), inp.get(), n, nullptr); });
        DeviceArray<float> scratch(gelu_backward_scratch(N, 4 * C));
        measure("GELU backward", 12 * NC * kReal, 0, [&] {
            gelu_backward(out.get(), dbias.get(), scratch.get(), dout.get(), inp.get(), N, 4 * C, nullptr);
        });
    }

    // The kernels that there are for this size of the heads.
    std::vector<Form> forms() const {
        std::vector<Form> forms;
        for (bool linear : {false, true})
            for (size_t i = 0; i < std::size(kAttentionNames); i++) {
                const AttentionKind kind = (AttentionKind)i;
                if (!linear || has_linear_form({.kind = kind}, D)) forms.push_back({kind, linear});
            }
        return forms;
    }

    // Operations are those of the triangle of T (T + 1) / 2 pairs: two products forward and five backward,
    // whatever a kernel needs.
    Attention attention(const Form& form, int B, int T) {
        AttentionConfig config;
        config.kind = form.kind;
        size_t n = (size_t)B * T * C;
        double product = 2.0 * C * B * T * (T + 1) / 2, one = kReal * n;
        const char *attention = kAttentionNames[(int)form.kind], *kernel = form.linear ? "linear" : "tiled";
        std::string name = std::string("attention ") + attention + " " + kernel;
        Attention a{attention,
                    kernel,
                    B,
                    T,
                    {name + " forward", 4 * one, 2 * product},
                    {name + " backward", 8 * one, 5 * product}};
        try {
            auto qkv = random<Real>(3 * n), out = random<Real>(n), dout = random<Real>(n),
                 dqkv = random<Real>(3 * n);
            DeviceArray<float> stats(stats_size<Real>(config, B, T, H, D));
            DeviceArray<float> scratch(
                std::max({attention_forward_scratch(T, H), attention_backward_scratch(B, T, H),
                          form.linear ? attention_linear_forward_scratch<Real>(config, B, T, H, D) : 0,
                          form.linear ? attention_linear_backward_scratch<Real>(config, B, T, H, D) : 0}));
            time(a.forward, [&] {
                if (form.linear) {
                    attention_linear_forward(out.get(), stats.get(), scratch.get(), qkv.get(), nullptr,
                                             config, B, T, H, D, nullptr);
                } else {
                    attention_forward(out.get(), stats.get(), scratch.get(), qkv.get(), nullptr, config, B, T,
                                      H, D, nullptr);
                }
            });
            time(a.backward, [&] {
                if (form.linear) {
                    attention_linear_backward(dqkv.get(), nullptr, scratch.get(), dout.get(), out.get(),
                                              stats.get(), qkv.get(), nullptr, config, B, T, H, D, nullptr);
                } else {
                    attention_backward(dqkv.get(), nullptr, scratch.get(), dout.get(), out.get(), stats.get(),
                                       qkv.get(), nullptr, config, B, T, H, D, nullptr);
                }
            });
        } catch (const Error& e) {  // out of memory
            a.forward.error = a.backward.error = e.what();
        }
        return a;
    }

    // One new token after T - 1 others.
    void attention_cached() {
        auto qkv = random<Real>(3 * C), out = random<Real>(C), cache = random<Real>((size_t)T * 2 * C);
        auto scores = random<float>((size_t)H * T), scale = random<float>(H);
        AttentionConfig config;
        measure("attention of a token to the cache", kReal * 2.0 * T * C, 0, [&] {
            attention_cached_forward(out.get(), scores.get(), qkv.get(), cache.get(), nullptr, scale.get(),
                                     config, T - 1, 1, H, D, nullptr);
        });
    }

    void classifier() {
        int rows = classifier_rows(N, Vp);
        std::vector<int> ids(N);
        std::mt19937 generator(2);
        for (int& id : ids) id = (int)(generator() % V);
        auto targets = on_device(ids);
        auto logits = random<Real>((size_t)rows * Vp), inp = random<Real>((size_t)N * C),
             dinp = random<Real>((size_t)N * C), wte = random<Real>((size_t)Vp * C, 0.02f);
        auto losses = random<float>(N), dwte = random<float>((size_t)Vp * C);
        DeviceArray<double> sum = on_device(std::vector<double>(1));
        float dloss = 1.0f / N;
        measure("cross-entropy forward and backward", kReal * 2.0 * rows * Vp, 0, [&] {
            cross_entropy(losses.get(), logits.get(), logits.get(), targets.get(), dloss, rows, V, Vp,
                          nullptr);
        });
        measure("mean of the losses", kFloat * N, 0,
                [&] { add_mean_loss(sum.get(), losses.get(), N, N, nullptr); });
        measure("classifier forward", kReal * (NC + (double)Vp * C), 2.0 * NC * Vp, [&] {
            gpu::classifier(losses.get(), dinp.get(), dwte.get(), logits.get(), inp.get(), wte.get(),
                            targets.get(), 0.0f, false, N, C, V, Vp, context, nullptr);
        });
        measure("classifier forward and backward", kReal * (2 * NC + (double)Vp * C) + kFloat * Vp * C,
                6.0 * NC * Vp, [&] {
                    gpu::classifier(losses.get(), dinp.get(), dwte.get(), logits.get(), inp.get(), wte.get(),
                                    targets.get(), dloss, false, N, C, V, Vp, context, nullptr);
                });
    }

    // AdamW over all parameters of the model.
    void update() {
        GPTConfig config;
        config.layers = s.layers, config.heads = H, config.channels = C, config.vocab_size = V;
        config.context = T;
        ParameterTable table(config, Vp);
        size_t n = table.size;
        auto param = random<float>(n), grad = random<float>(n, 1e-3f), m = random<float>(n, 1e-3f);
        auto v = on_device(std::vector<float>(n, 1e-6f));
        auto scale = on_device(std::vector<float>(1, 1.0f));
        auto copy = random<Real>(n);
        DeviceArray<double> squares(1 + kSquaresBlocks);
        measure("gradient norm and clip factor", kFloat * n, 0, [&] {
            check(cudaMemsetAsync(squares.get(), 0, sizeof(double), nullptr));
            sum_of_squares(squares.get(), squares.get() + 1, grad.get(), n, nullptr);
            clip_factor(scale.get(), squares.get(), 1e30, nullptr);
        });
        constexpr bool kCopies = !std::is_same_v<Real, float>;
        for (bool stochastic : {false, true}) {
            if (stochastic && !kCopies) continue;
            measure(stochastic ? "AdamW, rounded stochastically" : "AdamW",
                    n * (7 * kFloat + kCopies * kReal), 0, [&] {
                        adamw_update(param.get(), kCopies ? copy.get() : nullptr, grad.get(), m.get(),
                                     v.get(), n, 0, table.vectors().begin, 1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f,
                                     scale.get(), 10, stochastic, 1, nullptr);
                    });
        }
    }
};

template <class Real>
void measure_as(const Settings& settings, Results& results, const std::function<void()>& changed) {
    Bench<Real> bench(settings, results, changed);
    bench.ceilings();
    if (!settings.attention_only) bench.layers();
    if (settings.attention_only) bench.attention_against_length();
}

}  // namespace

void measure(const Settings& settings, Results& results, const std::function<void()>& changed) {
    if (settings.bf16) {
        measure_as<bf16>(settings, results, changed);
    } else {
        measure_as<float>(settings, results, changed);
    }
}

}  // namespace layers_bench
