// Attention of llmc/cpu against the double precision oracle, in float and in bf16, and
// the oracle's backward pass against finite differences of its forward pass. The oracle gets the inputs
// rounded as the layer does.
#include "llmc/cpu/attention.h"
#include "llmc/cpu/attention_cached.h"
#include "tests/attention_kinds.h"
#include "tests/helpers.h"
#include "tests/reference.h"

using namespace reference;
using cpu::bf16;

namespace {

const float kNan = std::numeric_limits<float>::quiet_NaN();

// is_nan() to hand to an algorithm.
const auto is_nan_value = [](auto x) { return is_nan(x); };

// Both passes of one call. The backward pass gets the oracle's out and stats, so that each is judged alone.
// `tolerance` is that of floats.
template <class Real>
void check_attention(const AttentionOption& option, int B, int T, int H, int D,
                     const std::vector<Real>& qkv /*(B,T,3C)*/, const Floats& delta,
                     double tolerance = 1e-5) {
    INFO(describe(option));
    CAPTURE(B);
    CAPTURE(T);
    CAPTURE(H);
    CAPTURE(D);
    const int C = H * D;
    const AttentionConfig& config = option.config;
    double out_tolerance = tolerance, dqkv_tolerance = tolerance;
    double ddecay_tolerance = tolerance;
    if (kIsBf16<Real>) {  // weights and their gradients are rounded
        out_tolerance = dqkv_tolerance = 1e-2;
        ddecay_tolerance = std::max(1e-2, 200 * tolerance);
    }
    std::vector<Real> dout = convert<Real>(normal((size_t)B * T * C, 5));

    Attention y = attention_forward(to_double(qkv), to_double(delta), config, B, T, H, D);
    std::vector<Output> outputs = {output<Real>("out", Output::overwritten, y.out, out_tolerance)};
    Vector stats = y.stats;  // the sums of the rows, then, where it is kept, the output before it is rounded
    if (cpu::keeps_exact_output<Real>(config)) stats.insert(stats.end(), y.out.begin(), y.out.end());
    stats.resize(cpu::stats_size<Real>(config, B, T, H, D));
    if (!stats.empty()) outputs.push_back({"stats", Output::overwritten, stats, out_tolerance});
    std::vector<Floats> got = check_layer({qkv, delta}, outputs, [&](auto& o) {
        cpu::attention_forward<Real>(o["out"], o["stats"], qkv.data(), or_null(delta), config, B, T, H, D);
    });
    if (!stats.empty()) {  // as good as floats in either case
        Vector sums = to_double(got[1]);
        sums.resize(y.stats.size());
        CHECK(relative_error(sums, y.stats) < tolerance);
    }

    AttentionGradients d =
        attention_backward(to_double(dout), to_double(qkv), to_double(delta), config, B, T, H, D);
    std::vector<Real> out = convert<Real>(y.out);
    Floats float_stats = to_float(stats);
    outputs = {output<Real>("dqkv", Output::overwritten, d.dqkv, dqkv_tolerance)};
    if (option.decay == DecayKind::learned)
        outputs.push_back(
            {"ddecay", Output::added_to, d.ddecay, ddecay_tolerance, {}, false, d.ddecay_terms});
    Floats dqkv = check_layer({dout, out, float_stats, qkv, delta}, outputs, [&](auto& o) {
        cpu::attention_backward<Real>(o["dqkv"], o["ddecay"], dout.data(), out.data(), float_stats.data(),
                                      qkv.data(), or_null(delta), config, B, T, H, D);
    })[0];
    // Each part alone, for one may be much smaller than the others. Not with a single key, where the weights
    // of softmax and `sum` are constant and dq and dk nothing but rounding.
    for (int part = 0; part < 3 && T > 1; part++) {
        CAPTURE(part);
        Vector got = part_of(to_double(dqkv), part, C), expected = part_of(d.dqkv, part, C);
        CHECK(relative_error(got, expected, 0.1 * norm(d.dqkv)) < dqkv_tolerance);
    }
}

template <class Real>
std::vector<Real> random_qkv(int B, int T, int C, double scale = 1) {
    return convert<Real>(normal((size_t)B * T * 3 * C, 1, scale));
}

}  // namespace

TEST_CASE("oracle: attention_backward agrees with finite differences") {
    for (const AttentionOption& option : every_option()) {
        INFO(describe(option));
        const int B = 2, T = 5, H = 2, D = 3, C = H * D;
        Vector qkv, delta = to_double(decay_of(option, H)), dout = to_double(normal(B * T * C, 2));
        // Away from x = 0, where abs(x^p) of scale `sum` has a kink for odd p.
        auto smallest_score = [&] {
            double smallest = 1;
            for (int b = 0; b < B; b++)
                for (int h = 0; h < H; h++)
                    for (int i = 0; i < T; i++) {
                        const double* q = &qkv[(size_t)(b * T + i) * 3 * C + h * D];
                        const double* k = &qkv[(size_t)b * T * 3 * C + C + h * D];
                        for (double x : attention_row(q, k, 0, option.config, i, C, D).x)
                            smallest = std::min(smallest, std::abs(x));
                    }
            return smallest;
        };
        for (int seed = 0; qkv.empty() || smallest_score() < 0.01; seed++)
            qkv = to_double(normal(B * T * 3 * C, seed));
        auto loss = [&] { return dot(dout, attention_forward(qkv, delta, option.config, B, T, H, D).out); };
        AttentionGradients d = attention_backward(dout, qkv, delta, option.config, B, T, H, D);
        CHECK(relative_error(d.dqkv, finite_differences(qkv, loss, 1e-5)) < 1e-6);
        CHECK(relative_error(d.ddecay, finite_differences(delta, loss, 1e-4)) < 1e-6);
    }
}

TEST_CASE_TEMPLATE("attention: every kind at every small size, and every size", Real, float, bf16) {
    struct Size {
        int B, T, H, D;
    };
    const std::vector<Size> small = {{2, 1, 1, 8}, {2, 7, 3, 8}, {1, 65, 1, 32}};
    const std::vector<Size> large = {{2, 64, 3, 8},   {2, 65, 1, 64}, {2, 130, 1, 80}, {2, 130, 3, 8},
                                     {1, 7, 3, 80},   {2, 64, 2, 32}, {1, 65, 3, 80},  {1, 130, 2, 64},
                                     {2, 130, 1, 32}, {2, 64, 1, 64}, {2, 7, 3, 7},    {1, 65, 3, 33},
                                     {2, 1, 3, 80}};
    std::vector<AttentionOption> options = every_option();
    for (size_t i = 0; i < options.size(); i++) {
        for (const Size& s : small)
            check_attention(options[i], s.B, s.T, s.H, s.D, random_qkv<Real>(s.B, s.T, s.H * s.D),
                            decay_of(options[i], s.H));
        for (size_t j : {5 * i, 5 * i + 1, 5 * i + 2}) {  // every size serves every fifth kind or so
            const Size& s = large[j % large.size()];
            check_attention(options[i], s.B, s.T, s.H, s.D, random_qkv<Real>(s.B, s.T, s.H * s.D),
                            decay_of(options[i], s.H));
        }
    }
}

TEST_CASE_TEMPLATE("attention: extreme decays, from forgetting at once to never", Real, float, bf16) {
    // sigmoid(-30) underflows when it is raised to a power; sigmoid(40) is 1, where a geometric sum is 0 / 0.
    const Floats delta = {-30.0f, -3.0f, 12.0f, 40.0f};
    for (const AttentionOption& option : every_option())
        if (option.decay == DecayKind::fixed)
            for (int T : {1, 70}) check_attention(option, 1, T, 4, 8, random_qkv<Real>(1, T, 32), delta);
}

TEST_CASE_TEMPLATE("attention: rows of zeros", Real, float, bf16) {
    const int B = 2, T = 67, H = 2, D = 8, C = H * D;
    // Some keys, then some keys and queries. A query of zeros has all of `sum`'s normaliser in its 1e-6: its
    // gradients hide those of all other rows. A key of zeros sits at the kink of abs(x), where `sum` with an
    // odd power takes the derivative 0.
    for (bool queries : {false, true}) {
        CAPTURE(queries);
        std::vector<Real> qkv = random_qkv<Real>(B, T, C);
        auto clear = [&](int b, int t, int part) {
            Real* row = &qkv[((size_t)(b * T + t) * 3 + part) * C];
            std::fill(row, row + C, Real(0.0f));
        };
        for (int t : {3, 64, 65}) clear(1, t, 1);
        if (queries)
            for (int t : {0, 3, 64, 66}) clear(0, t, 0), clear(1, t, 0);
        for (const AttentionOption& option : every_option())
            check_attention(option, B, T, H, D, qkv, decay_of(option, H));
    }
}

TEST_CASE_TEMPLATE("attention: softmax and sigmoid with scores of +-100", Real, float, bf16) {
    // Scaled so that the largest |x| is 100: a float score is then off by some 1e-5, and so are the weights.
    // The exponentials of sigmoid overflow.
    const int B = 1, T = 66, H = 2, D = 16, C = H * D;
    for (double sign : {1.0, -1.0}) {
        CAPTURE(sign);
        std::vector<Real> qkv = random_qkv<Real>(B, T, C);
        Vector exact = to_double(qkv);
        double largest = 0;
        for (int i = 0; i < T; i++)
            for (int h = 0; h < H; h++) {
                const double *q = &exact[(size_t)i * 3 * C + h * D], *k = &exact[C + h * D];
                for (double x : attention_row(q, k, 0, AttentionConfig(), i, C, D).x)
                    largest = std::max(largest, std::abs(x));
            }
        for (size_t i = 0; i < qkv.size(); i++)
            if (i / C % 3 == 0) qkv[i] = qkv[i] * (float)(sign * 100 / largest);
        for (AttentionKind kind : {AttentionKind::softmax, AttentionKind::sigmoid})
            for (DecayKind decay : {DecayKind::none, DecayKind::learned}) {
                AttentionOption option{{.kind = kind}, decay};
                check_attention(option, B, T, H, D, qkv, decay_of(option, H), 1e-4);
            }
    }
}

TEST_CASE_TEMPLATE("attention: with v = 1 everywhere, softmax and the sum of an even power give 1", Real,
                   float, bf16) {
    const int B = 2, T = 130, H = 3, D = 8, C = H * D;
    std::vector<Real> qkv = random_qkv<Real>(B, T, C, 3);
    for (size_t i = 0; i < qkv.size(); i++)
        if (i / C % 3 == 2) qkv[i] = 1;
    for (const AttentionOption& option : every_option()) {
        bool normalised =
            option.config.softmax() || (option.config.has_row_sum() && option.config.power() % 2 == 0);
        if (!normalised) continue;
        INFO(describe(option));
        std::vector<Real> out((size_t)B * T * C, kNan);
        Floats delta = decay_of(option, H), stats(cpu::stats_size<Real>(option.config, B, T, H, D));
        cpu::attention_forward(out.data(), stats.data(), qkv.data(), or_null(delta), option.config, B, T, H,
                               D);
        for (int i = 0; i < T; i++) {  // row 0 of `sum` has but one score, which 1e-6 may outweigh
            CAPTURE(i);
            if (i > 0 || option.config.softmax())
                CHECK((float)out[(size_t)i * C] == doctest::Approx(1.0).epsilon(kIsBf16<Real> ? 1e-2 : 1e-4));
        }
    }
}

TEST_CASE_TEMPLATE("attention: scale row gives rows of unit norm for Gaussian q and k", Real, float, bf16) {
    // With v the identity the output is A itself.
    const int B = 400, T = 16, H = 1, D = 16;
    std::vector<Real> qkv = random_qkv<Real>(B, T, D), out((size_t)B * T * D, kNan);
    for (int row = 0; row < B * T; row++)
        for (int d = 0; d < D; d++) qkv[((size_t)row * 3 + 2) * D + d] = d == row % T;
    const Floats delta = {1.0f};
    for (AttentionKind kind : {AttentionKind::poly1, AttentionKind::poly2})
        for (bool decay : {false, true}) {
            const AttentionConfig config{.kind = kind};
            INFO(describe(config));
            CAPTURE(decay);
            cpu::attention_forward(out.data(), nullptr, qkv.data(), decay ? delta.data() : nullptr, config, B,
                                   T, H, D);
            double mean_square = 0;
            for (Real a : out) mean_square += (double)a * a / (B * T);
            CHECK(mean_square == doctest::Approx(1.0).epsilon(0.1));
        }
}

TEST_CASE_TEMPLATE("attention: the future does not leak, bit for bit", Real, float, bf16) {
    const int B = 1, T = 130, H = 3, D = 8, C = H * D;
    const std::vector<Real> qkv = random_qkv<Real>(B, T, C), dout = convert<Real>(normal((size_t)T * C, 2));
    for (const AttentionOption& option : every_option())
        for (int j : {1, 63, 64, 65, 129}) {
            INFO(describe(option));
            CAPTURE(j);
            Floats delta = decay_of(option, H);
            Floats stats(cpu::stats_size<Real>(option.config, B, T, H, D), kNan);
            auto forward = [&](const std::vector<Real>& x, float* row_stats) {
                std::vector<Real> out((size_t)T * C, kNan);
                cpu::attention_forward(out.data(), row_stats, x.data(), or_null(delta), option.config, B, T,
                                       H, D);
                return out;
            };
            std::vector<Real> out = forward(qkv, stats.data());
            std::vector<Real> changed = qkv;  // k and v of token j
            Floats other_stats = stats;
            for (int c = 0; c < 2 * C; c++)
                changed[(size_t)j * 3 * C + C + c] = -50.0f * changed[(size_t)j * 3 * C + C + c];
            std::vector<Real> changed_out = forward(changed, other_stats.data());
            CHECK(std::equal(out.begin(), out.begin() + (size_t)j * C, changed_out.begin()));
            CHECK(!std::equal(out.begin() + (size_t)j * C, out.end(), changed_out.begin() + (size_t)j * C));

            // Backward: what reaches k and v of tokens after j does not come from the output of token j.
            auto backward = [&](const std::vector<Real>& dy) {
                std::vector<Real> dqkv((size_t)T * 3 * C, kNan);
                Floats ddecay(H);
                cpu::attention_backward(dqkv.data(), delta.empty() ? nullptr : ddecay.data(), dy.data(),
                                        out.data(), stats.data(), qkv.data(), or_null(delta), option.config,
                                        B, T, H, D);
                return dqkv;
            };
            std::vector<Real> changed_dout = dout;
            for (int c = 0; c < C; c++)
                changed_dout[(size_t)j * C + c] = -50.0f * changed_dout[(size_t)j * C + c];
            std::vector<Real> before = backward(dout), after = backward(changed_dout);
            CHECK(std::equal(before.begin() + (size_t)(j + 1) * 3 * C, before.end(),
                             after.begin() + (size_t)(j + 1) * 3 * C));
            CHECK(!std::equal(before.begin(), before.begin() + (size_t)(j + 1) * 3 * C, after.begin()));
        }
}

TEST_CASE_TEMPLATE("attention: a NaN comes out as NaN", Real, float, bf16) {
    const int B = 2, T = 70, H = 2, D = 8, C = H * D;
    for (const AttentionOption& option : every_option())
        for (int part = 0; part < 3; part++)
            for (int j : {0, 17, 63, 64, 69}) {
                INFO(describe(option));
                CAPTURE(part);
                CAPTURE(j);
                std::vector<Real> qkv = random_qkv<Real>(B, T, C), out((size_t)B * T * C);
                Floats stats(cpu::stats_size<Real>(option.config, B, T, H, D)), delta = decay_of(option, H);
                qkv[((size_t)(T + j) * 3 + part) * C + D + 3] = kNan;  // second sequence, second head
                cpu::attention_forward(out.data(), stats.data(), qkv.data(), or_null(delta), option.config, B,
                                       T, H, D);
                const Real *other = &out[0], *row = &out[(size_t)(T + j) * C],
                           *last = &out[(size_t)(2 * T - 1) * C];
                CHECK(std::none_of(other, other + (size_t)T * C, is_nan_value));
                CHECK(std::none_of(row, row + D, is_nan_value));
                if (part == 0) CHECK(std::all_of(row + D, row + C, is_nan_value));
                if (part == 1) CHECK(std::all_of(last + D, last + C, is_nan_value));
                if (part == 2) CHECK(is_nan(last[D + 3]));

                std::vector<Real> dqkv(qkv.size()), dout((size_t)B * T * C, 1.0f);
                cpu::attention_backward(dqkv.data(), nullptr, dout.data(), out.data(), stats.data(),
                                        qkv.data(), or_null(delta), option.config, B, T, H, D);
                CHECK(std::none_of(dqkv.begin(), dqkv.begin() + (size_t)T * 3 * C, is_nan_value));
                CHECK(std::any_of(dqkv.begin() + (size_t)T * 3 * C, dqkv.end(), is_nan_value));
            }
}

TEST_CASE_TEMPLATE("attention: the gradient of a learned decay over 2048 tokens, by finite differences", Real,
                   float, bf16) {
    // Both passes as a model runs them. The two sums of ddecay are large and nearly cancel.
    const int B = 1, T = 2048, H = 2, D = 8, C = H * D;
    const std::vector<Real> qkv = random_qkv<Real>(B, T, C), dout = convert<Real>(normal((size_t)T * C, 2));
    for (const AttentionOption& option : every_option()) {
        if (option.decay != DecayKind::learned || !(thorough() || one_of_each_scale(option))) continue;
        INFO(describe(option));
        const Floats delta = decay_of(option, H);
        std::vector<Real> out((size_t)T * C), dqkv(qkv.size());
        Floats stats(cpu::stats_size<Real>(option.config, B, T, H, D)), ddecay(H);
        cpu::attention_forward(out.data(), stats.data(), qkv.data(), delta.data(), option.config, B, T, H, D);
        cpu::attention_backward(dqkv.data(), ddecay.data(), dout.data(), out.data(), stats.data(), qkv.data(),
                                delta.data(), option.config, B, T, H, D);
        // delta of a head moves the output of that head alone: all heads take their step in the same call.
        const double step = 1e-3;
        Vector above = to_double(delta), below = above, expected(H);
        for (double& x : above) x += step;
        for (double& x : below) x -= step;
        Vector out_above = attention_forward(to_double(qkv), above, option.config, B, T, H, D).out;
        Vector out_below = attention_forward(to_double(qkv), below, option.config, B, T, H, D).out;
        for (size_t i = 0; i < out_above.size(); i++)
            expected[i % C / D] += dout[i] * (out_above[i] - out_below[i]) / (2 * step);
        for (int h = 0; h < H; h++) {
            CAPTURE(h);
            CAPTURE(expected[h]);
            CHECK(std::abs(ddecay[h] - expected[h]) < (kIsBf16<Real> ? 3e-2 : 2e-5) * std::abs(expected[h]));
        }
    }
}

TEST_CASE_TEMPLATE("attention: a few new tokens after those in the cache", Real, float, bf16) {
    const int B = 1, T = 67, H = 3, D = 9, C = H * D;
    const std::vector<Real> qkv = random_qkv<Real>(B, T, C);
    Floats cache;  // k and v of each token
    for (int t = 0; t < T; t++)
        cache.insert(cache.end(), qkv.begin() + ((size_t)t * 3 + 1) * C,
                     qkv.begin() + ((size_t)t + 1) * 3 * C);
    for (const AttentionOption& option : every_option()) {
        INFO(describe(option));
        const Floats delta = decay_of(option, H);
        const Vector whole =
            attention_forward(to_double(qkv), to_double(delta), option.config, B, T, H, D).out;
        for (int start : {0, 1, 30, T - 1}) {
            CAPTURE(start);
            int n = std::min(T - start, 40);
            Vector expected(whole.begin() + (size_t)start * C, whole.begin() + (size_t)(start + n) * C);
            check_layer({qkv, cache, delta},
                        {output<Real>("out", Output::overwritten, expected, stored<Real>())}, [&](auto& o) {
                            cpu::attention_cached_forward<Real>(o["out"], qkv.data() + (size_t)start * 3 * C,
                                                                cache.data(), or_null(delta), option.config,
                                                                start, n, H, D);
                        });
        }
    }
}
