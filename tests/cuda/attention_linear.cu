// Attention at linear cost of llmc/cuda against the double precision oracle: every kind that has the linear
// form, over several segments and at their edges. Segments of 64 tokens, to be small.
#include "llmc/cuda/attention/linear.h"

#include "tests/cuda/attention.h"

using namespace cuda_test;

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
