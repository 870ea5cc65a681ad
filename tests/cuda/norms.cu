// The norms of llmc/cuda against their definitions (tests/norms.h).
#include <limits>

#include "dev/ptxsim/report.h"
#include "llmc/cuda/attention/norms.h"
#include "tests/cuda/helpers.h"
#include "tests/norms.h"

using namespace cuda_test;
using reference::AttentionOption;

namespace {

struct Size {
    int B, T, H, D;
};

// The norms (H), computed from the stats of attention_forward. They must have the same bits under every
// schedule. With `gates`, the decay comes from gates that are the same for all tokens.
template <class Real>
std::vector<AttentionNorms> measure(const AttentionOption& option, const Size& size,
                                    const std::vector<Real>& qkv, bool gates = false) {
    const int B = size.B, T = size.T, H = size.H, D = size.D;
    const AttentionConfig& config = option.config;
    const Device<Real> device_qkv(qkv), out((size_t)B * T * H * D);
    const Device<float> delta(reference::decay_of(option, H));
    const Device<float> stats(gpu::stats_size<Real>(config, B, T, H, D));
    Floats log_f;
    for (int i = 0; i < B * H * T && gates; i++)
        log_f.push_back((float)reference::log_sigmoid(reference::decay_of(option, H)[i / T % H]));
    const Device<float> device_log_f(log_f);
    gpu::Decay decay(delta.size() ? delta.get() : nullptr);
    if (gates) decay = gpu::Decay::gate(device_log_f.get());
    {
        const Device<float> scratch(gpu::attention_forward_scratch(T, H, gates ? B : 0));
        gpu::attention_forward(out.get(), stats.get(), scratch.get(), device_qkv.get(), decay, config, B, T,
                               H, D, nullptr);
    }
    std::vector<NormSums> first;
    under_every_schedule([&] {
        const Device<float> scratch(gpu::attention_norms_scratch(B, T, H, gates));
        const Device<NormSums> sums(H);
        gpu::attention_norms(sums.get(), scratch.get(), device_qkv.get(),
                             stats.size() ? stats.get() : nullptr, decay, config, B, T, H, D, nullptr);
        std::vector<NormSums> got = sums.host();
        std::string reports;
        for (const ptxsim::Report& r : ptxsim::take_reports()) reports += r.text + "\n";
        CHECK_MESSAGE(reports.empty(), reports);
        if (first.empty()) first = got;
        CHECK_MESSAGE(std::memcmp(got.data(), first.data(), H * sizeof(NormSums)) == 0,
                      "other bits than under the first schedule");
    });
    std::vector<AttentionNorms> norms;
    for (const NormSums& sums : first) norms.push_back(sums.norms(config, B, T, D));
    return norms;
}

template <class Real>
void check_norms(const AttentionOption& option, const Size& size, const Floats& qkv, double tolerance = 1e-5,
                 bool gates = false) {
    const int B = size.B, T = size.T, H = size.H, D = size.D;
    INFO(describe(option), ", B ", B, ", T ", T, ", H ", H, ", D ", D);
    const std::vector<Real> rounded = convert<Real>(qkv);
    std::vector<AttentionNorms> norms = measure(option, size, rounded, gates);
    const Floats delta = reference::decay_of(option, H);
    for (int h = 0; h < H; h++) {
        CAPTURE(h);
        double log_gamma = delta.empty() ? 0 : reference::log_sigmoid(delta[h]);
        reference::check_norms(
            norms[h], reference::attention_norms(to_double(rounded), log_gamma, option.config, h, B, T, H, D),
            tolerance);
        REQUIRE((norms[h].mean_gate > 0) == gates);
        if (gates) CHECK(norms[h].mean_gate == doctest::Approx(std::exp(log_gamma)));
    }
}

Floats random_qkv(const Size& size) {
    return reference::normal((size_t)size.B * size.T * 3 * size.H * size.D, 1);
}

}  // namespace

TEST_CASE_TEMPLATE("cuda norms: every kind at every small size, and every size", Real, float, gpu::bf16) {
    const std::vector<Size> large = {{1, 65, 1, 32}, {1, 33, 3, 7},  {2, 40, 1, 80},
                                     {1, 64, 1, 20}, {2, 1, 2, 128}, {1, 34, 1, 127}};
    const std::vector<AttentionOption> options = reference::norms_options();
    for (size_t i = 0; i < options.size(); i++) {
        const int edge = gpu::attention_tile<Real>;
        for (const Size& size :
             {Size{2, 1, 1, 8}, Size{2, 7, 3, 8}, Size{1, edge + 3, 1, 5}, large[i % large.size()]})
            check_norms<Real>(options[i], size, random_qkv(size));
        for (const Size& size : large)
            if (thorough()) check_norms<Real>(options[i], size, random_qkv(size));
    }
}

TEST_CASE("cuda norms: more keys than one thread adds up in float") {
    check_norms<float>({{.kind = AttentionKind::poly3}, DecayKind::fixed}, {1, 530, 1, 8},
                       random_qkv({1, 530, 1, 8}));
    check_norms<gpu::bf16>({{}, DecayKind::fixed}, {1, 300, 1, 8}, random_qkv({1, 300, 1, 8}));
}

TEST_CASE_TEMPLATE("cuda norms: a decay that comes from gates", Real, float, gpu::bf16) {
    const Size size = {2, gpu::attention_tile<Real> + 3, 2, 5};
    for (const AttentionOption& option : reference::norms_options())
        if (option.decay == DecayKind::fixed) check_norms<Real>(option, size, random_qkv(size), 1e-5, true);
}

TEST_CASE("cuda norms: many sequences") {
    check_norms<float>({{.kind = AttentionKind::poly2}, DecayKind::fixed}, {140, 2, 1, 8},
                       random_qkv({140, 2, 1, 8}));
}

TEST_CASE("cuda norms: rows that one key has nearly to itself") {
    // As in tests/cpu/norms.cpp, the remaining error comes from rounding large scores to float.
    const Size size = {1, 40, 2, 8};
    const int C = size.H * size.D;
    Floats qkv = reference::normal((size_t)size.T * 3 * C, 4, 0.05);
    for (int t = 0; t < size.T; t++)
        for (int h = 0; h < size.H; h++) {
            qkv[(size_t)t * 3 * C + h * size.D] = 8;
            qkv[(size_t)t * 3 * C + C + h * size.D] = t == 0 ? 4 : 0;
        }
    for (const AttentionOption& option : reference::norms_options())
        if (option.config.softmax() || option.config.has_row_sum())
            check_norms<float>(option, size, qkv, 3e-5);
}

TEST_CASE("cuda norms: rows of zeros") {
    const Size size = {2, 37, 1, 8};
    const int C = size.H * size.D;
    Floats qkv = random_qkv(size);
    auto clear = [&](int b, int t, int part) {
        float* row = &qkv[((size_t)(b * size.T + t) * 3 + part) * C];
        std::fill(row, row + C, 0.0f);
    };
    for (int t : {3, 32, 33}) clear(1, t, 1);
    for (int t : {0, 3, 32, 36}) clear(0, t, 0), clear(1, t, 0);
    for (const AttentionOption& option : reference::norms_options()) check_norms<float>(option, size, qkv);
}

TEST_CASE("cuda norms: a NaN shows in its head, and in no other") {
    const Size size = {2, 40, 2, 8};
    const int C = size.H * size.D;
    const std::vector<AttentionOption> options = reference::norms_options();
    for (size_t i = 0; i < options.size(); i++) {
        INFO(describe(options[i]));
        int part = i / 2 % 2;
        Floats qkv = random_qkv(size);
        qkv[((size_t)(size.T + 17) * 3 + part) * C + size.D + 3] = std::numeric_limits<float>::quiet_NaN();
        std::vector<AttentionNorms> norms = measure(options[i], size, qkv);
        CHECK(std::isfinite(norms[0].norm));
        CHECK(std::isnan(norms[1].norm));
        CHECK(std::isnan(norms[1].score_std));
    }
}
