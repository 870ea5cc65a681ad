// Attention of llmc/cuda against the double precision oracle: in tiles, with every kind at small sizes and
// sizes at the edges of tiles and of the kernels' head sizes; at linear cost; and generation's, from keys and
// values and from a state.
#include "llmc/cuda/attention/cached.h"
#include "llmc/cuda/attention/state.h"
#include "tests/cuda/attention.h"

using namespace cuda_test;

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
    const std::vector<Kind> kinds = reference::every_option();
    for (size_t i = 0; i < kinds.size(); i++) {
        check_attention<Real>(kinds[i], {2, 7, kIsFloat<Real> ? 2 : 3, kIsFloat<Real> ? 8 : 32});
        if (thorough() || one_of_each_scale(kinds[i]))
            check_attention<Real>(kinds[i], {1, kEdge<Real> + 2, 1, kIsFloat<Real> ? 8 : 32});
        if (i % 3 == i / 3 % 3) check_attention<Real>(kinds[i], large[i / 3 % large.size()]);
    }
}

TEST_CASE_TEMPLATE("cuda attention: every head size with every activation", Real, float, gpu::bf16) {
    const std::vector<int> sizes = kIsFloat<Real> ? std::vector{64, 128} : std::vector{32, 64, 80, 96, 128};
    for (AttentionKind activation : reference::every_kind())
        for (size_t i = 0; i < sizes.size(); i++) {
            bool odd = ((int)activation + i) % 2;
            check_attention<Real>({{.kind = activation, .scale = odd ? ScaleKind::row : ScaleKind::sum},
                                   odd ? DecayKind::learned : DecayKind::none},
                                  {1, kEdge<Real> + 16, 1, sizes[i]});
            if (!thorough()) continue;
            // Every branch of every instance: three tiles; heads as large as the kernel's, and heads of which
            // the last pack has but one number.
            const int smaller = i > 0 ? sizes[i - 1] : sizes[0] / 2;
            for (ScaleKind scale : {ScaleKind::row, ScaleKind::sum})
                for (DecayKind decay : {DecayKind::none, DecayKind::fixed, DecayKind::learned})
                    for (int D : {sizes[i], smaller + 1})
                        check_attention<Real>({{.kind = activation, .scale = scale}, decay},
                                              {1, 2 * kEdge<Real> + 16, 1, D});
        }
}

TEST_CASE_TEMPLATE("cuda attention: a decay learned from many sequences", Real, float, gpu::bf16) {
    check_attention<Real>({{.kind = AttentionKind::poly2}, DecayKind::learned}, {140, 2, 1, 8});
}

TEST_CASE_TEMPLATE("cuda attention: extreme decays, from forgetting at once to never", Real, float,
                   gpu::bf16) {
    // sigmoid(-30) underflows when it is raised to a power; sigmoid(40) is 1, where a geometric sum is 0 / 0.
    const Floats delta = {-30.0f, -3.0f, 0.2f, 12.0f, 40.0f};
    for (const Kind& kind : reference::every_option())
        if (kind.decay == DecayKind::fixed && one_of_each_scale(kind))
            for (int T : {1, kEdge<Real> + 6})
                check_attention(kind, {1, T, 5, 8}, random_qkv<Real>({1, T, 5, 8}), delta);
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
        for (const Kind& kind : reference::every_option())
            if (kind.decay != DecayKind::fixed && one_of_each_scale(kind))
                check_attention(kind, size, qkv, decay_of(kind, size.H));
    }
}

TEST_CASE_TEMPLATE("cuda attention: softmax and sigmoid with scores of +-100", Real, float, gpu::bf16) {
    // Scaled so that the largest |x| is 100: a float score is then off by some 1e-5, and so are the weights.
    // The exponentials of sigmoid overflow.
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
        for (AttentionKind activation : {AttentionKind::softmax, AttentionKind::sigmoid})
            for (DecayKind decay : {DecayKind::none, DecayKind::learned}) {
                const Kind kind{{.kind = activation}, decay};
                check_attention(kind, size, qkv, decay_of(kind, H), 1e-4);
            }
    }
}

// ------------------------------------------------------------------------------------------- at linear cost

namespace {

// The kinds with a linear form for heads of D: `row` and `sum` with and without decay, other scales with it.
std::vector<Kind> linear_kinds(int D) {
    std::vector<Kind> kinds;
    for (const Kind& kind : reference::every_option())
        if (has_linear_form(kind.config, D) && kind.decay != DecayKind::fixed &&
            (one_of_each_scale(kind) || kind.decay == DecayKind::learned))
            kinds.push_back(kind);
    return kinds;
}

// Segments of 64 tokens, to be small.
template <class Real>
void check_linear(const Kind& kind, const Size& size, int segment = 64) {
    check_attention(kind, size, random_qkv<Real>(size), decay_of(kind, size.H), 1e-5, segment);
}

}  // namespace

TEST_CASE_TEMPLATE("cuda linear attention: every kind over several segments", Real, float, gpu::bf16) {
    for (const Kind& kind : linear_kinds(8)) check_linear<Real>(kind, {1, 66, 1, 8});
}

TEST_CASE_TEMPLATE("cuda linear attention: every head size with every power", Real, float, gpu::bf16) {
    struct Case {
        AttentionKind activation;
        Size size;
    };
    std::vector<Case> cases = {
        {AttentionKind::poly1, {1, 1, 1, 32}},   {AttentionKind::poly1, {2, 65, 3, 7}},
        {AttentionKind::poly1, {1, 66, 1, 33}},  {AttentionKind::poly1, {1, 65, 1, 96}},
        {AttentionKind::poly1, {1, 65, 1, 128}}, {AttentionKind::poly2, {1, 64, 1, 16}},
        {AttentionKind::poly2, {1, 70, 2, 20}},  {AttentionKind::poly2, {1, 65, 1, 40}},
        {AttentionKind::poly3, {1, 1, 1, 8}},    {AttentionKind::poly3, {1, 65, 3, 7}},
        {AttentionKind::poly3, {1, 70, 1, 12}}};
    if (thorough() || !std::is_same_v<Real, float>) cases.push_back({AttentionKind::poly2, {1, 65, 1, 72}});
    if (thorough())
        cases.insert(cases.end(), {{AttentionKind::poly2, {1, 130, 2, 64}},
                                   {AttentionKind::poly2, {1, 65, 1, 99}},
                                   {AttentionKind::poly2, {1, 66, 1, 128}},
                                   {AttentionKind::poly3, {1, 130, 1, 32}}});
    for (size_t i = 0; i < cases.size(); i++) {
        const auto& [activation, size] = cases[i];
        const bool sum = activation == AttentionKind::poly2 && i % 2;
        check_linear<Real>({{.kind = activation, .scale = sum ? ScaleKind::sum : ScaleKind::row},
                            i % 3 ? DecayKind::learned : DecayKind::none},
                           size);
    }
    if (!thorough()) return;
    // Every branch of every instance: a segment of two tiles, and one that ends within its second.
    constexpr int kTile = gpu::attention_tile<Real>;
    for (AttentionKind activation : reference::linear_kinds())
        for (int D : {32, 17, 64, 33, 80, 65, 96, 81, 128, 97}) {
            if (activation == AttentionKind::poly2 && std::is_same_v<Real, float> && D > 64)
                continue;  // minutes each
            for (ScaleKind scale : {ScaleKind::row, ScaleKind::sum})
                for (DecayKind decay : {DecayKind::none, DecayKind::fixed, DecayKind::learned})
                    if (has_linear_form({.kind = activation, .scale = scale}, D))
                        check_linear<Real>({{.kind = activation, .scale = scale}, decay},
                                           {1, 3 * kTile + 2, 1, D}, 2 * kTile);
        }
}

TEST_CASE_TEMPLATE("cuda linear attention: extreme decays, from forgetting at once to never", Real, float,
                   gpu::bf16) {
    const Floats delta = {-30.0f, -3.0f, 12.0f, 40.0f};
    const Size size = {1, 129, 4, 4};
    for (ScaleKind scale : {ScaleKind::row, ScaleKind::sum})
        check_attention({{.kind = AttentionKind::poly2, .scale = scale}, DecayKind::fixed}, size,
                        random_qkv<Real>(size), delta, 1e-5, 64);
}

TEST_CASE_TEMPLATE("cuda linear attention: rows of zeros in `sum`", Real, float, gpu::bf16) {
    const Size size = {1, 130, 1, 8};
    std::vector<Real> qkv = random_qkv<Real>(size);
    for (int t : {3, 64, 65, 129})
        for (int part : {0, 1}) {
            if (part == 0 && t == 65) continue;
            auto row = qkv.begin() + (t * 3 + part) * size.D;
            std::fill(row, row + size.D, Real(0.0f));
        }
    const Kind kind = {{.kind = AttentionKind::poly2, .scale = ScaleKind::sum}, DecayKind::learned};
    check_attention(kind, size, qkv, decay_of(kind, size.H), 1e-5, 64);
}

TEST_CASE_TEMPLATE("cuda linear attention: many segments", Real, float, gpu::bf16) {
    for (AttentionKind activation : reference::linear_kinds())
        check_linear<Real>({{.kind = activation,
                             .scale = activation == AttentionKind::poly2 ? ScaleKind::sum : ScaleKind::row},
                            DecayKind::learned},
                           {1, 270, 1, 4});
}

TEST_CASE("cuda linear attention: a learned decay's gradient over many segments") {
    check_linear<float>({{.kind = AttentionKind::poly2, .scale = ScaleKind::row}, DecayKind::learned},
                        {1, 600, 1, 4});
}

TEST_CASE_TEMPLATE("cuda linear attention: segments of its own length", Real, float, gpu::bf16) {
    CHECK(gpu::linear_segment(1, 8) == 128);
    CHECK(gpu::linear_segment(2, 64) == 576);
    check_linear<Real>({{.kind = AttentionKind::poly2, .scale = ScaleKind::row}, DecayKind::learned},
                       {1, 130, 1, 8}, 0);
}

TEST_CASE("cuda linear attention: pays for long sequences") {
    AttentionConfig config{.kind = AttentionKind::poly2};
    CHECK(!gpu::linear_pays(config, 1024, 64));
    CHECK(gpu::linear_pays(config, 16384, 64));
    config.kind = AttentionKind::poly1;
    CHECK(gpu::linear_pays(config, 1024, 64));
    config.scale = ScaleKind::sum;
    CHECK(!gpu::linear_pays(config, 1 << 20, 64));
}

// -------------------------------------------------------------------------------------------- of generation

namespace {

// `state`: made of the first `start` tokens.
template <class Real>
void check_cached(const AttentionConfig& config, bool decays, int start, int n, int H, int D,
                  bool state = false, float least_delta = 1) {
    const int T = start + n, C = H * D;
    INFO(reference::describe(config));
    CAPTURE(decays);
    CAPTURE(start);
    CAPTURE(n);
    CAPTURE(D);
    CAPTURE(state);
    std::vector<Real> qkv = convert<Real>(reference::normal((size_t)T * 3 * C, 1));
    Floats delta;
    for (int h = 0; h < H && decays; h++) delta.push_back(least_delta + h);
    Vector all = reference::attention_forward(to_double(qkv), to_double(delta), config, 1, T, H, D).out;
    std::vector<Real> cache;
    for (int t = 0; t < T; t++)
        cache.insert(cache.end(), qkv.begin() + (size_t)t * 3 * C + C, qkv.begin() + (size_t)(t + 1) * 3 * C);
    Floats scales;
    for (int t = start; t < T; t++)
        for (int h = 0; h < H; h++)
            scales.push_back(config.softmax() || config.has_row_sum()
                                 ? NAN
                                 : (float)row_scale(config, t, decays ? log_gamma(delta[h]) : 0, D));
    Device<Real> d_qkv(std::vector<Real>(qkv.begin() + (size_t)start * 3 * C, qkv.end())), d_cache(cache);
    Device<float> d_delta(delta), d_scales(scales);
    Vector expected(all.begin() + (size_t)start * C, all.end());
    const float* decay = decays ? d_delta.get() : nullptr;
    // The first rows of `sum` are divided by x^2, which may be tiny beside the features that it is a sum of.
    double tolerance = state && config.has_row_sum() && std::is_same_v<Real, float> ? 1e-4 : 0;
    check_layer({expect<Real>("out", expected, tolerance)}, [&](auto& out) {
        if (state) {
            Device<float> states(Floats(H * gpu::state_size(config.power(), D))),
                scratch(gpu::attention_state_scratch(config.power(), H, D));
            if (start)
                gpu::attention_state_of_cache<Real>(states.get(), d_cache.get(), decay, config, start, H, D,
                                                    nullptr);
            gpu::attention_state_forward<Real>(out["out"], states.get(), scratch.get(), d_qkv.get(), decay,
                                               d_scales.get(), config, n, H, D, nullptr);
        } else {
            Device<float> scores((size_t)n * H * T);
            gpu::attention_cached_forward<Real>(out["out"], scores.get(), d_qkv.get(), d_cache.get(), decay,
                                                d_scales.get(), config, start, n, H, D, nullptr);
        }
        gpu::check(cudaDeviceSynchronize());
    });
}

}  // namespace

TEST_CASE_TEMPLATE("attention on the GPU: a few new tokens after those in the cache", Real, float,
                   gpu::bf16) {
    for (const AttentionConfig& config : reference::every_config())
        for (bool decays : {false, true}) {
            check_cached<Real>(config, decays, 0, 1, 1, 8);
            check_cached<Real>(config, decays, 65, 2, 3, 9);
            check_cached<Real>(config, decays, 140, 1, 2, 64);
            if (config.scale == ScaleKind::row) check_cached<Real>(config, decays, 600, 1, 1, 3);
        }
    // log sigmoid(-100) is -100, although exp(100) overflows.
    for (AttentionKind kind : {AttentionKind::softmax, AttentionKind::poly1})
        check_cached<Real>({.kind = kind}, true, 3, 2, 1, 8, false, -100);
}

TEST_CASE_TEMPLATE("attention on the GPU: a few new tokens after those in the state", Real, float,
                   gpu::bf16) {
    for (AttentionKind kind : reference::linear_kinds())
        for (ScaleKind scale : {ScaleKind::row, ScaleKind::sum})
            for (bool decays : {false, true}) {
                const AttentionConfig config{.kind = kind, .scale = scale};
                if (!has_linear_form(config, 8)) continue;
                check_cached<Real>(config, decays, 0, 1, 1, 8, true);
                check_cached<Real>(config, decays, 0, 18, 1, 4, true);
                check_cached<Real>(config, decays, 7, 2, 3, 5, true);
            }
    AttentionConfig config;
    config.kind = AttentionKind::poly1;
    for (int D : {64, 128}) check_cached<Real>(config, true, 20, 1, 2, D, true);
    config.kind = AttentionKind::poly2;
    for (int D : {40, 72}) check_cached<Real>(config, true, 1, 1, 1, D, true);
    config.scale = ScaleKind::sum;
    check_cached<Real>(config, false, 1, 1, 1, 65, true);
    config.scale = ScaleKind::row;
    config.kind = AttentionKind::poly3;
    check_cached<Real>(config, true, 1, 1, 1, thorough() ? 32 : 12, true);
}
