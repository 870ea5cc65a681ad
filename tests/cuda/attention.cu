// Attention of llmc/cuda against the double precision oracle: every kind at small
// sizes, and sizes at the edges of tiles and of the kernels' head sizes.
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
