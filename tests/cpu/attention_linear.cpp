// Attention at linear cost, and its state for generation, against the double precision oracle.
#include "llmc/cpu/attention_linear.h"
#include "llmc/cpu/attention_state.h"
#include "tests/attention_kinds.h"
#include "tests/helpers.h"
#include "tests/reference.h"

using namespace reference;

namespace {

std::vector<AttentionOption> kinds(int D) {
    std::vector<AttentionOption> all;
    for (const AttentionOption& option : every_option({DecayKind::none, DecayKind::learned}))
        if (has_linear_form(option.config, D)) all.push_back(option);
    return all;
}

// Both passes with each of these numbers of threads, of which more than heads cut a head into ranges.
template <class Real>
void check(const AttentionOption& kind, int B, int T, int H, int D, const std::vector<int>& thread_counts,
           double tolerance) {
    INFO(describe(kind));
    const bool decays = kind.decay != DecayKind::none;
    CAPTURE(B);
    CAPTURE(T);
    CAPTURE(H);
    CAPTURE(D);
    const int C = H * D;
    Floats delta(decays ? H : 0);
    for (int h = 0; h < (int)delta.size(); h++) delta[h] = 1.0f + 2 * h;
    const float* decay = decays ? delta.data() : nullptr;
    // Numbers without a first row of x^2 about 1e-6, which `sum` divides by x^2 + 1e-6: what rounding is to a
    // product there is 2/x times that to its gradient.
    auto qkv = convert<Real>(normal((size_t)B * T * 3 * C, 4)),
         dout = convert<Real>(normal((size_t)B * T * C, 2));
    Attention y = attention_forward(to_double(qkv), to_double(delta), kind.config, B, T, H, D);
    AttentionGradients d =
        attention_backward(to_double(dout), to_double(qkv), to_double(delta), kind.config, B, T, H, D);
    auto run = [&] {
        std::vector<Real> out((size_t)B * T * C, Real(NAN)), dqkv(qkv.size(), Real(NAN));
        Floats stats(cpu::stats_size<Real>(kind.config, B, T, H, D), NAN), ddecay(decays ? H : 0, 0.5f);
        cpu::attention_linear_forward(out.data(), stats.data(), qkv.data(), decay, kind.config, B, T, H, D);
        CHECK(relative_error(to_double(out), y.out) < tolerance);
        Floats sums(stats.begin(), stats.begin() + (stats.empty() ? 0 : B * H * T));
        if (kind.config.has_row_sum()) CHECK(relative_error(to_double(sums), y.stats) < 1e-5);
        cpu::attention_linear_backward(dqkv.data(), decays ? ddecay.data() : nullptr, dout.data(), out.data(),
                                       stats.data(), qkv.data(), decay, kind.config, B, T, H, D);
        for (int part = 0; part < 3 && T > 1; part++) {  // q, k, v
            CAPTURE(part);
            CHECK(relative_error(part_of(to_double(dqkv), part, C), part_of(d.dqkv, part, C),
                                 0.1 * norm(d.dqkv)) < tolerance);
        }
        for (float& x : ddecay) x -= 0.5f;
        if (decays && T > 1) CHECK(relative_error(to_double(ddecay), d.ddecay, d.ddecay_terms) < tolerance);
        return std::make_pair(out, dqkv);
    };
    for (int threads : thread_counts) {
        CAPTURE(threads);
        Threads scope(threads);
        auto first = run(), again = run();
        CHECK(same_bits(first.first, again.first));
        CHECK(same_bits(first.second, again.second));
    }
}

struct Size {
    int B, T, H, D;
};
const std::vector<Size> kSizes = {{2, 1, 1, 8},    {2, 7, 3, 8},   {1, 64, 2, 32},
                                  {1, 65, 1, 32},  {2, 130, 3, 8}, {1, 130, 2, 64},
                                  {1, 257, 1, 80}, {1, 200, 3, 7}, {1, 129, 1, 33}};

// The kinds to test at a size: all at a small one.
std::vector<AttentionOption> kinds(const Size& size) {
    std::vector<AttentionOption> all = kinds(size.D);
    if (!thorough() && size.T > 65)
        std::erase_if(all, [](const AttentionOption& kind) { return !one_of_each_scale(kind); });
    return all;
}

}  // namespace

TEST_CASE("linear attention: every kind and size against the oracle, float32") {
    for (const Size& s : kSizes)
        for (const AttentionOption& kind : kinds(s)) check<float>(kind, s.B, s.T, s.H, s.D, {2, 5}, 1e-5);
}

TEST_CASE("linear attention: every kind and size against the oracle, bf16") {
    for (const Size& s : kSizes)
        for (const AttentionOption& kind : kinds(s)) check<cpu::bf16>(kind, s.B, s.T, s.H, s.D, {2}, 1e-2);
}

TEST_CASE("linear attention: the future does not leak, bit for bit") {
    const int T = 200, H = 1, D = 16;
    for (const AttentionOption& kind : kinds(D))
        for (int j : {1, 63, 64, 65, 128, 199}) {
            Floats qkv = normal((size_t)T * 3 * D, 1), out((size_t)T * D), other(out), stats(T),
                   delta = {2.0f};
            const float* decay = kind.decay == DecayKind::none ? nullptr : delta.data();
            auto run = [&](Floats& o) {
                cpu::attention_linear_forward(o.data(), stats.data(), qkv.data(), decay, kind.config, 1, T, H,
                                              D);
            };
            run(out);
            for (int c = 0; c < 2 * D; c++) qkv[(size_t)j * 3 * D + D + c] *= -50;
            run(other);
            CHECK(std::equal(out.begin(), out.begin() + j * D, other.begin()));
            CHECK(!std::equal(out.begin() + j * D, out.end(), other.begin() + j * D));
        }
}

TEST_CASE("linear attention: a fast decay does not overflow or divide by zero") {
    const int T = 200, H = 2, D = 16;
    Floats qkv = normal((size_t)T * 3 * H * D, 1), out((size_t)T * H * D), stats((size_t)H * T);
    Floats dqkv(qkv.size()), dout = normal(out.size(), 2), delta = {-30.0f, -3.0f}, ddecay(H);
    for (const AttentionOption& kind : kinds(D)) {
        cpu::attention_linear_forward(out.data(), stats.data(), qkv.data(), delta.data(), kind.config, 1, T,
                                      H, D);
        cpu::attention_linear_backward(dqkv.data(), ddecay.data(), dout.data(), out.data(), stats.data(),
                                       qkv.data(), delta.data(), kind.config, 1, T, H, D);
        for (const Floats* x : {&out, &dqkv, &ddecay})
            CHECK(std::all_of(x->begin(), x->end(), [](float v) { return std::isfinite(v); }));
    }
}

TEST_CASE("linear attention: the gradient of a learned decay over 2048 tokens") {
    const int T = 2048, H = 2, D = 8;
    for (const AttentionOption& kind : kinds(D))
        if (kind.decay != DecayKind::none && (thorough() || one_of_each_scale(kind)))
            check<float>(kind, 1, T, H, D, {2}, 1e-5);
}

TEST_CASE("attention by a state gives the outputs of attention, in any pieces") {
    for (const Size& s : kSizes)
        for (const AttentionOption& kind : kinds(s.D)) {
            if (s.B > 1) continue;
            INFO(describe(kind));
            const bool decays = kind.decay != DecayKind::none;
            CAPTURE(s.T);
            CAPTURE(s.D);
            const int C = s.H * s.D;
            Floats qkv = normal((size_t)s.T * 3 * C, 1), out((size_t)s.T * C, NAN), delta;
            for (int h = 0; h < (decays ? s.H : 0); h++) delta.push_back(1.0f + h);
            Floats state(s.H * cpu::state_size(kind.config.power(), s.D));
            std::vector<double> row_lengths(s.H);
            for (int start = 0, n = 1; start < s.T; start += n, n = n % 5 + 1) {
                n = std::min(n, s.T - start);
                cpu::attention_state_forward(&out[(size_t)start * C], state.data(), row_lengths.data(),
                                             &qkv[(size_t)start * 3 * C], decays ? delta.data() : nullptr,
                                             kind.config, start, n, s.H, s.D);
            }
            Attention y = attention_forward(to_double(qkv), to_double(delta), kind.config, 1, s.T, s.H, s.D);
            // The first rows of `sum` are divided by x^2, which may be tiny beside the features that it is a
            // sum of.
            CHECK(relative_error(to_double(out), y.out) < (kind.config.has_row_sum() ? 1e-4 : 1e-5));
        }
}

TEST_CASE(
    "the linear form is there for poly1, poly2 and small heads of poly3, but not for sum with odd powers") {
    auto has = [](AttentionKind kind, ScaleKind scale, int D) {
        return has_linear_form({.kind = kind, .scale = scale}, D);
    };
    CHECK(!has(AttentionKind::softmax, ScaleKind::row, 8));
    CHECK(has(AttentionKind::poly1, ScaleKind::row, 128));
    CHECK(!has(AttentionKind::poly1, ScaleKind::sum, 128));
    CHECK(has(AttentionKind::poly2, ScaleKind::sum, 128));
    CHECK(has(AttentionKind::poly3, ScaleKind::mean, 32));
    CHECK(!has(AttentionKind::poly3, ScaleKind::mean, 33));
    CHECK(!has(AttentionKind::poly3, ScaleKind::sum, 32));
    CHECK(!has(AttentionKind::poly4, ScaleKind::row, 8));
    CHECK(cpu::state_features(1, 64) == 64);
    CHECK(cpu::state_features(2, 64) == 2080);
    CHECK(cpu::state_features(3, 32) == 5984);
}

TEST_CASE("attention takes its linear form from the lengths on at which that is the faster one") {
    auto check_pays_from = [](AttentionKind kind, int D, int T) {
        AttentionConfig config;
        config.kind = kind;
        CHECK(!cpu::linear_pays(config, T, D));
        CHECK(cpu::linear_pays(config, T + 1, D));
    };
    check_pays_from(AttentionKind::poly1, 64, 128);
    check_pays_from(AttentionKind::poly2, 32, 1288);
    check_pays_from(AttentionKind::poly2, 64, 4424);
    CHECK(!cpu::linear_pays(AttentionConfig(), 1 << 24, 8));  // softmax
}
