// Generation's attention against the oracle: from keys and values, and from a state.
#include "llmc/cuda/attention/cached.h"

#include "llmc/cuda/attention/state.h"
#include "tests/attention_kinds.h"
#include "tests/cuda/helpers.h"

using namespace cuda_test;

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
