// Softmax and polynomial attention of llmc/cuda against the double precision oracle: every kind at small
// sizes, and sizes at the edges of tiles and of the kernels' head sizes.
#include "llmc/cuda/attention.h"
#include "tests/cuda_helpers.h"

using namespace cuda_test;
using reference::AttentionGradients;

namespace {

struct Size {
    int B, T, H, D;
};

struct Kind {
    AttentionConfig config;
    DecayKind decay;
};

std::vector<Kind> all_kinds() {
    std::vector<Kind> kinds;
    for (int power = 0; power <= 4; power++)
        for (ScaleKind scale :
             {ScaleKind::row, ScaleKind::context, ScaleKind::mean, ScaleKind::sum, ScaleKind::constant})
            for (DecayKind decay : {DecayKind::none, DecayKind::fixed, DecayKind::learned})
                if (power > 0 || scale == ScaleKind::row)
                    kinds.push_back(
                        {{.power = power, .scale = scale, .constant = -0.35, .context = 300}, decay});
    return kinds;
}

Floats decay_of(const Kind& kind, int H) {
    Floats delta(kind.decay == DecayKind::none ? 0 : H);
    for (size_t h = 0; h < delta.size(); h++) delta[h] = initial_decay(h, H);
    return delta;
}

// Constants and the scale `context` are `mean` to the kernels.
bool one_of_each_scale(const Kind& kind) {
    return kind.config.scale == ScaleKind::row || kind.config.scale == ScaleKind::sum;
}

// The rows of q (part 0), k (1) or v (2) of qkv (B,T,3C).
Vector part_of(const Vector& qkv, int part, int C) {
    Vector x;
    for (size_t i = 0; i < qkv.size(); i++)
        if ((int)(i / C % 3) == part) x.push_back(qkv[i]);
    return x;
}

// Both passes. The backward pass gets the oracle's out and stats, so that each is judged alone. `tolerance`
// is that of floats.
template <class Real>
void check_attention(const Kind& kind, const Size& size, const std::vector<Real>& qkv, const Floats& delta,
                     double tolerance = 1e-5) {
    auto [B, T, H, D] = size;
    const int C = H * D;
    const AttentionConfig& config = kind.config;
    INFO(kAttentionNames[config.power], ", scale ", (int)config.scale, ", decay ",
         kDecayNames[(int)kind.decay], ", B ", B, ", T ", T, ", H ", H, ", D ", D);
    constexpr bool kBf16 = std::is_same_v<Real, gpu::bf16>;
    const double dqkv_tolerance = kBf16 ? 1e-2 : tolerance;
    const bool learned = kind.decay == DecayKind::learned;
    const std::vector<Real> dout = convert<Real>(reference::normal((size_t)B * T * C, 5));
    const Device<Real> device_qkv(qkv), device_dout(dout);
    const Device<float> device_delta(delta);
    const float* decay = delta.empty() ? nullptr : device_delta.get();

    reference::Attention y =
        reference::attention_forward(to_double(qkv), to_double(delta), config, B, T, H, D);
    std::vector<Expected> outputs = {expect<Real>("out", y.out, dqkv_tolerance)};
    const bool has_stats = gpu::stats_size<Real>(config, B, T, H, D) > 0;
    Vector stats = y.stats;  // the sums of the rows, then, where it is kept, the output before it is rounded
    if (gpu::keeps_exact_output<Real>(config)) stats.insert(stats.end(), y.out.begin(), y.out.end());
    stats.resize(gpu::stats_size<Real>(config, B, T, H, D));
    if (has_stats) outputs.push_back(expect<float>("stats", stats, dqkv_tolerance));
    Vector sums;
    check_layer(outputs, [&](auto& out) {
        const Device<float> scratch(gpu::attention_forward_scratch(T, H));
        float* row_stats = has_stats ? (float*)out["stats"] : nullptr;
        gpu::attention_forward<Real>(out["out"], row_stats, scratch.get(), device_qkv.get(), decay, config, B,
                                     T, H, D, nullptr);
        if (!has_stats) return;
        Floats host(y.stats.size());
        gpu::check(cudaMemcpy(host.data(), row_stats, host.size() * sizeof(float), cudaMemcpyDeviceToHost));
        sums = to_double(host);
    });
    if (has_stats)
        CHECK(reference::relative_error(sums, y.stats) < tolerance);  // as good as floats in either case

    AttentionGradients d =
        reference::attention_backward(to_double(dout), to_double(qkv), to_double(delta), config, B, T, H, D);
    outputs = {expect<Real>("dqkv", d.dqkv, dqkv_tolerance)};
    if (learned) {  // its terms cancel; those of x^4 / sum x^4 most
        double of_bf16 = config.power == 4 && config.has_row_sum() ? 0.15 : 3e-2;
        outputs.push_back(
            expect<float>("ddecay", d.ddecay, kBf16 ? of_bf16 : std::max(tolerance, 1e-4), true));
    }
    const Device<Real> device_out(convert<Real>(y.out));
    const Device<float> device_stats(convert<float>(stats));
    std::vector<Real> got(qkv.size());
    check_layer(outputs, [&](auto& out) {
        const Device<float> scratch(gpu::attention_backward_scratch(B, T, H));
        gpu::attention_backward<Real>(out["dqkv"], learned ? (float*)out["ddecay"] : nullptr, scratch.get(),
                                      device_dout.get(), device_out.get(), device_stats.get(),
                                      device_qkv.get(), decay, config, B, T, H, D, nullptr);
        gpu::check(cudaMemcpy(got.data(), out["dqkv"], got.size() * sizeof(Real), cudaMemcpyDeviceToHost));
    });
    // Each part alone, for one may be much smaller than the others. Not with a single key, where the weights
    // of softmax and `sum` are constant and dq and dk nothing but rounding.
    for (int part = 0; part < 3 && T > 1; part++) {
        CAPTURE(part);
        CHECK(reference::relative_error(part_of(to_double(got), part, C), part_of(d.dqkv, part, C),
                                        0.1 * reference::norm(d.dqkv)) < dqkv_tolerance);
    }
}

template <class Real>
std::vector<Real> random_qkv(const Size& size) {
    return convert<Real>(reference::normal((size_t)size.B * size.T * 3 * size.H * size.D, 1));
}

template <class Real>
void check_attention(const Kind& kind, const Size& size) {
    check_attention(kind, size, random_qkv<Real>(size), decay_of(kind, size.H));
}

}  // namespace

template <class Real>
constexpr bool kIsFloat = std::is_same_v<Real, float>;
// Sizes that are one more than a tile take the kernels' tile, to be small.
template <class Real>
constexpr int kEdge = gpu::attention_tile<Real>;

TEST_CASE_TEMPLATE("cuda attention: every kind at every small size, and every size", Real, float, gpu::bf16) {
    const std::vector<Size> of_bf16 = {{1, 64, 2, 64},   {1, 65, 2, 64}, {1, 130, 1, 80}, {1, 100, 1, 96},
                                       {1, 129, 1, 128}, {1, 70, 3, 40}, {1, 33, 1, 7},   {1, 32, 2, 20},
                                       {2, 31, 1, 100},  {1, 1, 1, 32}};
    const std::vector<Size> of_floats = {{1, 32, 2, 64}, {1, 65, 1, 64}, {1, 40, 1, 80}, {1, 33, 1, 128},
                                         {1, 34, 3, 40}, {1, 33, 1, 7},  {2, 31, 1, 99}, {1, 1, 1, 32}};
    const std::vector<Size>& large = kIsFloat<Real> ? of_floats : of_bf16;
    const std::vector<Kind> kinds = all_kinds();
    for (size_t i = 0; i < kinds.size(); i++) {
        check_attention<Real>(kinds[i], {2, 7, kIsFloat<Real> ? 2 : 3, kIsFloat<Real> ? 8 : 32});
        check_attention<Real>(kinds[i], {1, kEdge<Real> + 2, 1, kIsFloat<Real> ? 8 : 32});
        if (i % 3 == i / 3 % 3) check_attention<Real>(kinds[i], large[i / 3 % large.size()]);
    }
}

TEST_CASE_TEMPLATE("cuda attention: every head size with every activation", Real, float, gpu::bf16) {
    const std::vector<int> sizes = {32, 64, 80, 96, 128};
    for (int power = 0; power <= 4; power++)
        for (size_t i = kIsFloat<Real> ? 3 : 0; i < sizes.size(); i++) {
            bool odd = (power + i) % 2;
            check_attention<Real>({{.power = power, .scale = odd ? ScaleKind::row : ScaleKind::sum},
                                   odd ? DecayKind::learned : DecayKind::none},
                                  {1, kEdge<Real> + 16, 1, sizes[i]});
        }
}

TEST_CASE_TEMPLATE("cuda attention: extreme decays, from forgetting at once to never", Real, float,
                   gpu::bf16) {
    // sigmoid(-30) underflows when it is raised to a power; sigmoid(40) is 1, where a geometric sum is 0 / 0.
    const Floats delta = {-30.0f, -3.0f, 12.0f, 40.0f};
    for (const Kind& kind : all_kinds())
        if (kind.decay == DecayKind::fixed && one_of_each_scale(kind))
            for (int T : {1, kEdge<Real> + 6})
                check_attention(kind, {1, T, 4, 8}, random_qkv<Real>({1, T, 4, 8}), delta);
}

TEST_CASE_TEMPLATE("cuda attention: rows of zeros", Real, float, gpu::bf16) {
    const int edge = kEdge<Real>;
    const Size size = {2, edge + 3, 1, 8};
    const int C = size.H * size.D;
    // Some keys, then some keys and queries. A query of zeros has all of `sum`'s normaliser in its 1e-6; a
    // key of zeros sits at the kink of abs(x), where `sum` with an odd power takes the derivative 0.
    for (bool queries : {false, true}) {
        CAPTURE(queries);
        std::vector<Real> qkv = random_qkv<Real>(size);
        auto clear = [&](int b, int t, int part) {
            Real* row = &qkv[((size_t)(b * size.T + t) * 3 + part) * C];
            std::fill(row, row + C, Real(0.0f));
        };
        for (int t : {3, edge, edge + 1}) clear(1, t, 1);
        if (queries)
            for (int t : {0, 3, edge, edge + 2}) clear(0, t, 0), clear(1, t, 0);
        for (const Kind& kind : all_kinds())
            if (kind.decay != DecayKind::fixed && one_of_each_scale(kind))
                check_attention(kind, size, qkv, decay_of(kind, size.H));
    }
}

TEST_CASE_TEMPLATE("cuda attention: softmax with logits of +-100", Real, float, gpu::bf16) {
    // Scaled so that the largest |x| is 100: a float logit is then off by some 1e-5, and so are the weights.
    const Size size = {1, 66, 2, 16};
    const int T = size.T, H = size.H, D = size.D, C = H * D;
    for (double sign : {1.0, -1.0}) {
        CAPTURE(sign);
        std::vector<Real> qkv = random_qkv<Real>(size);
        Vector exact = to_double(qkv);
        double largest = 0;
        for (int i = 0; i < T; i++)
            for (int h = 0; h < H; h++)
                for (double x : reference::attention_row(&exact[(size_t)i * 3 * C + h * D], &exact[C + h * D],
                                                         0, AttentionConfig(), i, C, D)
                                    .x)
                    largest = std::max(largest, std::abs(x));
        for (size_t i = 0; i < qkv.size(); i++)
            if (i / C % 3 == 0) qkv[i] = Real((float)qkv[i] * (float)(sign * 100 / largest));
        for (DecayKind decay : {DecayKind::none, DecayKind::learned})
            check_attention({AttentionConfig(), decay}, size, qkv, decay_of({AttentionConfig(), decay}, H),
                            1e-4);
    }
}
