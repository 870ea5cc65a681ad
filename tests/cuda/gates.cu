// Decay gates of llmc/cuda against the double precision oracle: attention with them in every form, and the
// layer that makes them.
#include <optional>
#include <random>

#include "llmc/cuda/attention/cached.h"
#include "llmc/cuda/attention/state.h"
#include "llmc/cuda/decay_gate.h"
#include "tests/cuda/attention.h"

using namespace cuda_test;
using reference::one_of_each_scale;

namespace {

template <class Real>
constexpr bool kIsFloat = std::is_same_v<Real, float>;
template <class Real>
constexpr int kEdge = gpu::attention_tile<Real>;

enum class Gates { usual, near_1, near_0, mixed };

// log f (B,H,T).
Floats log_gates(const Size& size, Gates kind) {
    std::mt19937 generator(7);
    Floats log_f = reference::normal((size_t)size.B * size.H * size.T, 3, kind == Gates::usual ? 2 : 1,
                                     kind == Gates::near_1   ? 9
                                     : kind == Gates::near_0 ? -16
                                                             : 2);
    for (float& x : log_f) {
        if (kind == Gates::mixed) x = Floats{-100, -14, 0, 5, 8, 12, 20, 40}[generator() % 8];
        x = (float)reference::log_sigmoid(x);
    }
    return log_f;
}

// Both passes. The backward pass gets the oracle's out and stats, so that each is judged alone.
template <class Real>
void check_gates(const AttentionConfig& config, const Size& size, Gates gates = Gates::usual,
                 int segment = kTiled, double tolerance = 1e-5) {
    const int B = size.B, T = size.T, H = size.H, D = size.D;
    const int C = H * D;
    INFO(reference::describe(config), ", B ", B, ", T ", T, ", H ", H, ", D ", D, ", gates ", (int)gates,
         ", segment ", segment);
    if (!kIsFloat<Real>) tolerance = 1e-2;
    const std::vector<Real> qkv = random_qkv<Real>(size);
    const std::vector<Real> dout = convert<Real>(reference::normal((size_t)B * T * C, 5));
    const Floats log_f = log_gates(size, gates);
    const Device<Real> device_qkv(qkv), device_dout(dout);
    const Device<float> device_log_f(log_f);
    const auto decay = gpu::Decay::gate(device_log_f.get());

    reference::Attention y =
        reference::attention_forward(to_double(qkv), to_double(log_f), config, B, T, H, D, true);
    std::vector<Expected> outputs = {expect<Real>("out", y.out, tolerance)};
    Vector stats = y.stats;
    if (gpu::keeps_exact_output<Real>(config)) stats.insert(stats.end(), y.out.begin(), y.out.end());
    stats.resize(gpu::stats_size<Real>(config, B, T, H, D));
    if (stats.size()) outputs.push_back(expect<float>("stats", stats, tolerance));
    check_layer(outputs, [&](auto& out) {
        float* row_stats = stats.size() ? (float*)out["stats"] : nullptr;
        run_forward<Real>(out["out"], row_stats, device_qkv.get(), decay, config, size, segment);
    });

    const auto d = reference::attention_backward(to_double(dout), to_double(qkv), to_double(log_f), config, B,
                                                 T, H, D, true);
    outputs = {expect<Real>("dqkv", d.dqkv, tolerance), expect<float>("dlog_f", d.ddecay, tolerance)};
    if (T == 1) outputs[1].floor = 1;
    const Device<Real> device_out(convert<Real>(y.out));
    const Device<float> device_stats(convert<float>(stats));
    check_layer(outputs, [&](auto& out) {
        run_backward<Real>(out["dqkv"], out["dlog_f"], device_dout.get(), device_out.get(),
                           device_stats.get(), device_qkv.get(), decay, config, size, segment);
    });
}

}  // namespace

TEST_CASE("reference attention with gates: its backward pass against finite differences") {
    const int B = 1, T = 5, H = 2, D = 3;
    for (const AttentionConfig& config : reference::every_config()) {
        INFO(reference::describe(config));
        Vector qkv = to_double(reference::normal(B * T * 3 * H * D, 1));
        Vector log_f = to_double(log_gates({B, T, H, D}, Gates::usual));
        const Vector dout = to_double(reference::normal(B * T * H * D, 2));
        auto loss = [&] {
            return reference::dot(reference::attention_forward(qkv, log_f, config, B, T, H, D, true).out,
                                  dout);
        };
        const auto d = reference::attention_backward(dout, qkv, log_f, config, B, T, H, D, true);
        CHECK(reference::relative_error(d.dqkv, reference::finite_differences(qkv, loss, 1e-5)) < 1e-6);
        CHECK(reference::relative_error(d.ddecay, reference::finite_differences(log_f, loss, 1e-5)) < 1e-6);
    }
}

TEST_CASE_TEMPLATE("cuda attention with gates: every kind", Real, float, gpu::bf16) {
    for (const AttentionConfig& config : reference::every_config()) {
        check_gates<Real>(config, {2, 7, 2, 8});
        check_gates<Real>(config, {1, 2 * kEdge<Real> + 2, 1, 8}, Gates::mixed);
    }
}

TEST_CASE_TEMPLATE("cuda attention with gates: gates near 0 and near 1, and the edges of tiles", Real, float,
                   gpu::bf16) {
    for (const AttentionConfig& config : reference::every_config())
        if (one_of_each_scale({config, DecayKind::none}))
            for (Gates gates : {Gates::near_0, Gates::near_1})
                for (int T : {1, kEdge<Real> + 1}) check_gates<Real>(config, {1, T, 2, 8}, gates);
}

TEST_CASE_TEMPLATE("cuda attention with gates: every head size and every activation", Real, float,
                   gpu::bf16) {
    const std::vector<int> sizes = kIsFloat<Real> ? std::vector{64, 128} : std::vector{32, 64, 80, 96, 128};
    for (AttentionKind kind : reference::every_kind())
        for (size_t i = 0; i < sizes.size(); i++) {
            if (!thorough() && (int)kind % sizes.size() != i) continue;
            check_gates<Real>({.kind = kind, .scale = i % 2 ? ScaleKind::row : ScaleKind::sum},
                              {1, kEdge<Real> + 16, 1, sizes[i] - (int)kind % 2});
        }
}

TEST_CASE_TEMPLATE("cuda attention with gates: a long sequence", Real, float, gpu::bf16) {
    // With gates near 1 the first token still counts for the last one.
    for (AttentionKind kind : {AttentionKind::softmax, AttentionKind::poly3})
        for (Gates gates : {Gates::mixed, Gates::near_1})
            check_gates<Real>({.kind = kind}, {1, thorough() ? 2048 : 200, 1, 8}, gates);
}

TEST_CASE_TEMPLATE("cuda linear attention with gates: every power over several segments", Real, float,
                   gpu::bf16) {
    for (AttentionKind kind : reference::linear_kinds())
        for (ScaleKind scale : {ScaleKind::row, ScaleKind::mean, ScaleKind::sum})
            if (has_linear_form({.kind = kind, .scale = scale}, 4))
                for (Gates gates : {Gates::usual, Gates::near_1, Gates::mixed})
                    check_gates<Real>({.kind = kind, .scale = scale}, {1, 200, 2, 4}, gates, 64);
    // Several blocks of channels, so that features have different multiplicities.
    check_gates<Real>({.kind = AttentionKind::poly2, .scale = ScaleKind::sum}, {1, 130, 1, 12}, Gates::near_1,
                      64);
    check_gates<Real>({.kind = AttentionKind::poly3}, {1, 130, 1, 6}, Gates::near_1, 64);
    check_gates<Real>({.kind = AttentionKind::poly2}, {2, 65, 1, 8}, Gates::near_0, 64);
    check_gates<Real>({.kind = AttentionKind::poly1}, {1, 130, 1, 8}, Gates::usual, 0);
    if (!thorough()) return;
    for (AttentionKind kind : reference::linear_kinds())
        for (Gates gates : {Gates::mixed, Gates::near_1})
            check_gates<Real>({.kind = kind}, {1, 2048, 1, 8}, gates, 0);
}

// ------------------------------------------------------------------------------------------- of generation

namespace {

// Keys and values of `start` tokens, of which a state is made if there is to be one, and then n tokens.
template <class Real>
void check_cached_gates(const AttentionConfig& config, int start, int n, int H, int D, bool state,
                        std::optional<float> constant = {} /*log f of every token*/) {
    const int T = start + n, C = H * D;
    INFO(reference::describe(config));
    CAPTURE(start);
    CAPTURE(state);
    const std::vector<Real> qkv = convert<Real>(reference::normal((size_t)T * 3 * C, 1));
    const Floats log_f = constant ? Floats(H * T, *constant) : log_gates({1, T, H, D}, Gates::mixed);
    const Vector all =
        reference::attention_forward(to_double(qkv), to_double(log_f), config, 1, T, H, D, true).out;
    std::vector<Real> cache;
    for (int t = 0; t < T; t++)
        cache.insert(cache.end(), qkv.begin() + (size_t)t * 3 * C + C, qkv.begin() + (size_t)(t + 1) * 3 * C);
    Floats before, after;  // log f of the first tokens, and of the new ones
    for (int h = 0; h < H; h++) {
        const auto head = log_f.begin() + h * T;
        before.insert(before.end(), head, head + start);
        after.insert(after.end(), head + start, head + T);
    }
    const Device<Real> d_qkv(std::vector<Real>(qkv.begin() + (size_t)start * 3 * C, qkv.end())),
        d_cache(cache);
    const Device<float> d_before(before), d_after(after), scales((size_t)T * H), again((size_t)start * H);
    const Device<double> sums((size_t)T * H), lengths(H);
    const Vector expected(all.begin() + (size_t)start * C, all.end());
    // The first rows of `sum` are divided by x^2, which may be tiny beside the features that it is a sum of.
    const double tolerance = state && config.has_row_sum() && kIsFloat<Real> ? 1e-4 : 0;
    check_layer({expect<Real>("out", expected, tolerance)}, [&](auto& out) {
        if (start)
            gpu::cached_gates(sums.get(), lengths.get(), scales.get(), d_before.get(), config, 0, start, H, D,
                              nullptr);
        gpu::cached_gates(state ? nullptr : sums.get(), lengths.get(), scales.get(), d_after.get(), config,
                          start, n, H, D, nullptr);
        if (state) {
            const Device<float> states(Floats(H * gpu::state_size(config.power(), D))),
                scratch(gpu::attention_state_scratch(config.power(), H, D));
            if (start) {
                gpu::gates_of_sums(again.get(), sums.get(), start, H, nullptr);
                gpu::attention_state_of_cache<Real>(
                    states.get(), d_cache.get(), gpu::Decay::gate(again.get()), config, start, H, D, nullptr);
            }
            gpu::attention_state_forward<Real>(out["out"], states.get(), scratch.get(), d_qkv.get(),
                                               gpu::Decay::gate(d_after.get()), scales.get(), config, n, H, D,
                                               nullptr);
        } else {
            const Device<float> scores((size_t)n * H * T);
            gpu::attention_cached_forward<Real>(out["out"], scores.get(), d_qkv.get(), d_cache.get(), nullptr,
                                                scales.get(), config, start, n, H, D, nullptr, sums.get());
        }
        gpu::check(cudaDeviceSynchronize());
    });
}

}  // namespace

TEST_CASE_TEMPLATE("attention with gates on the GPU: a few new tokens after those in the cache or the state",
                   Real, float, gpu::bf16) {
    for (const AttentionConfig& config : reference::every_config()) {
        check_cached_gates<Real>(config, 0, 2, 2, 4, false);
        check_cached_gates<Real>(config, 66, 3, 2, 4, false);
        if (!has_linear_form(config, 4)) continue;
        check_cached_gates<Real>(config, 0, 18, 2, 4, true);
        check_cached_gates<Real>(config, 9, 3, 2, 4, true);
    }
}

TEST_CASE("a state with gates on the GPU keeps its digits over thousands of tokens that hardly fade") {
    check_cached_gates<float>({.kind = AttentionKind::poly1}, 3000, 2, 1, 4, true, -1.1e-4f);
}

// ------------------------------------------------------------------------------------------------ the layer

TEST_CASE_TEMPLATE("cuda decay gate: both passes", Real, float, gpu::bf16) {
    struct Shape {
        int B, T, C, H;
    };
    for (const Shape& shape :
         {Shape{1, 1, 1, 1}, Shape{2, 3, 40, 3}, Shape{2, 70, 130, 9}, Shape{1, 300, 128, 4}}) {
        const int B = shape.B, T = shape.T, C = shape.C, H = shape.H;
        CAPTURE(C);
        const int N = B * T;
        const std::vector<Real> u = convert<Real>(reference::normal((size_t)N * C, 1));
        const std::vector<Real> weight = convert<Real>(reference::normal((size_t)C * H, 2));
        Floats bias = reference::normal(H, 3, 8);
        if (H == 9) bias[8] = -150;  // so that f is less than the least float
        const Floats dlog_f = reference::normal((size_t)N * H, 4);
        const Vector log_f =
            reference::decay_gate_forward(to_double(u), to_double(weight), to_double(bias), B, T, C, H);
        const auto d = reference::decay_gate_backward(to_double(dlog_f), to_double(u), to_double(weight),
                                                      to_double(bias), B, T, C, H);
        const Device<Real> d_u(u), d_weight(weight);
        const Device<float> d_bias(bias), d_dlog_f(dlog_f), d_log_f(reference::to_float(log_f)),
            scratch(gpu::decay_gate_scratch(B, T, C, H));
        check_layer({expect<float>("log_f", log_f, 1e-5)}, [&](auto& out) {
            gpu::decay_gate_forward<Real>(out["log_f"], d_u.get(), d_weight.get(), d_bias.get(), B, T, C, H,
                                          nullptr);
        });
        for (bool accumulate : {false, true})
            check_layer(
                {expect<Real>("du", d.dinp, 0, true), expect<float>("dweight", d.dweight, 0, accumulate),
                 expect<float>("dbias", d.dbias, 0, true)},
                [&](auto& out) {
                    gpu::decay_gate_backward<Real, float>(
                        out["du"], out["dweight"], out["dbias"], scratch.get(), d_dlog_f.get(), d_log_f.get(),
                        d_u.get(), d_weight.get(), accumulate, B, T, C, H, nullptr);
                });
    }
}
