// Softmax and polynomial attention of llmc/cpu against the double precision oracle, and the oracle's backward
// pass against finite differences of its forward pass.
#include "llmc/cpu/attention.h"
#include "tests/reference.h"

using namespace reference;

namespace {

const float kNan = std::numeric_limits<float>::quiet_NaN();

struct Option {
    AttentionConfig config;
    DecayKind decay;
};

// Every kind of attention: softmax once and each polynomial with each scale, times none, fixed, learned
// decay.
std::vector<Option> all_options() {
    std::vector<Option> options;
    for (int power = 0; power <= 4; power++)
        for (ScaleKind scale :
             {ScaleKind::row, ScaleKind::context, ScaleKind::mean, ScaleKind::sum, ScaleKind::constant})
            for (DecayKind decay : {DecayKind::none, DecayKind::fixed, DecayKind::learned})
                if (power > 0 || scale == ScaleKind::row) {
                    AttentionConfig config;
                    config.power = power;
                    config.scale = scale;
                    config.constant = -0.35;
                    config.context = 300;  // longer than the sequences here, as a context may be
                    options.push_back({config, decay});
                }
    return options;
}

std::string describe(const Option& o) {
    std::string scale = o.config.scale == ScaleKind::constant ? "constant" : kScaleNames[(int)o.config.scale];
    return kAttentionNames[o.config.power] + (o.config.softmax() ? "" : ", scale " + scale) + ", decay " +
           kDecayNames[(int)o.decay];
}

// delta (H), spaced evenly from 1 to 5.5, as a model starts with; empty without decay.
Floats decay_of(const Option& option, int H) {
    Floats delta(option.decay == DecayKind::none ? 0 : H);
    for (size_t h = 0; h < delta.size(); h++) delta[h] = 1.0f + (H > 1 ? 4.5f * h / (H - 1) : 0.0f);
    return delta;
}

// The rows of q (part 0), k (1) or v (2) of qkv (B,T,3C).
Vector part_of(const Vector& qkv, int part, int C) {
    Vector x;
    for (size_t i = 0; i < qkv.size(); i++)
        if ((int)(i / C % 3) == part) x.push_back(qkv[i]);
    return x;
}

const float* or_null(const Floats& x) {
    return x.empty() ? nullptr : x.data();
}

// Both passes of one call. The backward pass gets the oracle's out and stats, so that each is judged alone.
void check_attention(const Option& option, int B, int T, int H, int D, const Floats& qkv /*(B,T,3C)*/,
                     const Floats& delta, double tolerance = 1e-5) {
    INFO(describe(option));
    CAPTURE(B);
    CAPTURE(T);
    CAPTURE(H);
    CAPTURE(D);
    const int C = H * D;
    const AttentionConfig& config = option.config;
    const bool has_stats = config.softmax() || config.has_row_sum();
    Floats dout = normal((size_t)B * T * C, 5), scratch_stats((size_t)B * H * T, kNan);

    Attention y = attention_forward(to_double(qkv), to_double(delta), config, B, T, H, D);
    std::vector<Output> outputs = {{"out", Output::overwritten, y.out, tolerance}};
    if (has_stats) outputs.push_back({"stats", Output::overwritten, y.stats, tolerance});
    check_layer({qkv, delta}, outputs, [&](auto& o) {
        cpu::attention_forward(o["out"], has_stats ? o["stats"] : scratch_stats.data(), qkv.data(),
                               or_null(delta), config, B, T, H, D);
    });

    AttentionGradients d =
        attention_backward(to_double(dout), to_double(qkv), to_double(delta), config, B, T, H, D);
    Floats out = to_float(y.out), stats = has_stats ? to_float(y.stats) : Floats(y.stats.size(), kNan);
    outputs = {{"dqkv", Output::overwritten, d.dqkv, tolerance}};
    // ddecay is a sum whose terms cancel; with one head, nothing else is in its norm.
    if (option.decay == DecayKind::learned)
        outputs.push_back({"ddecay", Output::added_to, d.ddecay, std::max(tolerance, 1e-4)});
    Floats dqkv = check_layer({dout, out, stats, qkv, delta}, outputs, [&](auto& o) {
        cpu::attention_backward(o["dqkv"], o["ddecay"], dout.data(), out.data(), stats.data(), qkv.data(),
                                or_null(delta), config, B, T, H, D);
    })[0];
    // Each part alone, for one may be much smaller than the others. Not with a single key, where the weights
    // of softmax and `sum` are constant and dq and dk nothing but rounding.
    for (int part = 0; part < 3 && T > 1; part++) {
        CAPTURE(part);
        Vector got = part_of(to_double(dqkv), part, C), expected = part_of(d.dqkv, part, C);
        CHECK(relative_error(got, expected, 0.1 * norm(d.dqkv)) < tolerance);
    }
}

Floats random_qkv(int B, int T, int C, double scale = 1) {
    return normal((size_t)B * T * 3 * C, 1, scale);
}

}  // namespace

TEST_CASE("oracle: attention_backward agrees with finite differences") {
    for (const Option& option : all_options()) {
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

TEST_CASE("attention: every kind at every small size, and every size") {
    struct Size {
        int B, T, H, D;
    };
    const std::vector<Size> small = {{2, 1, 1, 8}, {2, 7, 3, 8}, {1, 65, 1, 32}};
    const std::vector<Size> large = {{2, 64, 3, 8},   {2, 65, 1, 64}, {2, 130, 1, 80}, {2, 130, 3, 8},
                                     {1, 7, 3, 80},   {2, 64, 2, 32}, {1, 65, 3, 80},  {1, 130, 2, 64},
                                     {2, 130, 1, 32}, {2, 64, 1, 64}, {2, 7, 3, 7},    {1, 65, 3, 33},
                                     {2, 1, 3, 80}};
    std::vector<Option> options = all_options();
    for (size_t i = 0; i < options.size(); i++) {
        for (const Size& s : small)
            check_attention(options[i], s.B, s.T, s.H, s.D, random_qkv(s.B, s.T, s.H * s.D),
                            decay_of(options[i], s.H));
        for (size_t j : {5 * i, 5 * i + 1, 5 * i + 2}) {  // every size serves every fifth kind or so
            const Size& s = large[j % large.size()];
            check_attention(options[i], s.B, s.T, s.H, s.D, random_qkv(s.B, s.T, s.H * s.D),
                            decay_of(options[i], s.H));
        }
    }
}

TEST_CASE("attention: extreme decays, from forgetting at once to never") {
    // sigmoid(-30) underflows when it is raised to a power; sigmoid(40) is 1, where a geometric sum is 0 / 0.
    const Floats delta = {-30.0f, -3.0f, 12.0f, 40.0f};
    for (const Option& option : all_options())
        if (option.decay == DecayKind::fixed)
            for (int T : {1, 70}) check_attention(option, 1, T, 4, 8, random_qkv(1, T, 32), delta);
}

TEST_CASE("attention: rows of zeros") {
    const int B = 2, T = 67, H = 2, D = 8, C = H * D;
    // Some keys, then some keys and queries. A query of zeros has all of `sum`'s normaliser in its 1e-6: its
    // gradients hide those of all other rows. A key of zeros sits at the kink of abs(x), where `sum` with an
    // odd power takes the derivative 0.
    for (bool queries : {false, true}) {
        CAPTURE(queries);
        Floats qkv = random_qkv(B, T, C);
        auto clear = [&](int b, int t, int part) {
            float* row = &qkv[((size_t)(b * T + t) * 3 + part) * C];
            std::fill(row, row + C, 0.0f);
        };
        for (int t : {3, 64, 65}) clear(1, t, 1);
        if (queries)
            for (int t : {0, 3, 64, 66}) clear(0, t, 0), clear(1, t, 0);
        for (const Option& option : all_options())
            check_attention(option, B, T, H, D, qkv, decay_of(option, H));
    }
}

TEST_CASE("attention: softmax with logits of +-100") {
    // Scaled so that the largest |x| is 100: a float logit is then off by some 1e-5, and so are the weights.
    const int B = 1, T = 66, H = 2, D = 16, C = H * D;
    for (double sign : {1.0, -1.0}) {
        CAPTURE(sign);
        Floats qkv = random_qkv(B, T, C);
        Vector exact = to_double(qkv);
        double largest = 0;
        for (int i = 0; i < T; i++)
            for (int h = 0; h < H; h++) {
                const double *q = &exact[(size_t)i * 3 * C + h * D], *k = &exact[C + h * D];
                for (double x : attention_row(q, k, 0, AttentionConfig(), i, C, D).x)
                    largest = std::max(largest, std::abs(x));
            }
        for (size_t i = 0; i < qkv.size(); i++)
            if (i / C % 3 == 0) qkv[i] *= (float)(sign * 100 / largest);
        for (DecayKind decay : {DecayKind::none, DecayKind::learned}) {
            Option option{AttentionConfig(), decay};
            check_attention(option, B, T, H, D, qkv, decay_of(option, H), 1e-4);
        }
    }
}

TEST_CASE("attention: with v = 1 everywhere, softmax and the sum of an even power give 1") {
    const int B = 2, T = 130, H = 3, D = 8, C = H * D;
    Floats qkv = random_qkv(B, T, C, 3);
    for (size_t i = 0; i < qkv.size(); i++)
        if (i / C % 3 == 2) qkv[i] = 1;
    for (const Option& option : all_options()) {
        bool normalised =
            option.config.softmax() ||
            (option.config.has_row_sum() && option.config.power % 2 == 0 && option.decay == DecayKind::none);
        if (!normalised) continue;
        INFO(describe(option));
        Floats delta = decay_of(option, H), out((size_t)B * T * C, kNan), stats((size_t)B * H * T);
        cpu::attention_forward(out.data(), stats.data(), qkv.data(), or_null(delta), option.config, B, T, H,
                               D);
        for (int i = 0; i < T; i++) {  // row 0 of `sum` has but one score, which 1e-6 may outweigh
            CAPTURE(i);
            if (i > 0 || option.config.softmax())
                CHECK(out[(size_t)i * C] == doctest::Approx(1.0).epsilon(1e-4));
        }
    }
}

TEST_CASE("attention: scale row gives rows of unit norm for Gaussian q and k") {
    // With v the identity the output is A itself.
    const int B = 400, T = 16, H = 1, D = 16;
    Floats qkv = random_qkv(B, T, D), out((size_t)B * T * D, kNan), stats((size_t)B * T);
    for (int row = 0; row < B * T; row++)
        for (int d = 0; d < D; d++) qkv[((size_t)row * 3 + 2) * D + d] = d == row % T;
    const Floats delta = {1.0f};
    for (int power : {1, 2})
        for (bool decay : {false, true}) {
            CAPTURE(power);
            CAPTURE(decay);
            AttentionConfig config;
            config.power = power;
            cpu::attention_forward(out.data(), stats.data(), qkv.data(), decay ? delta.data() : nullptr,
                                   config, B, T, H, D);
            double mean_square = 0;
            for (float a : out) mean_square += (double)a * a / (B * T);
            CHECK(mean_square == doctest::Approx(1.0).epsilon(0.1));
        }
}

TEST_CASE("attention: the future does not leak, bit for bit") {
    const int B = 1, T = 130, H = 3, D = 8, C = H * D;
    const Floats qkv = random_qkv(B, T, C), dout = normal((size_t)T * C, 2);
    for (const Option& option : all_options())
        for (int j : {1, 63, 64, 65, 129}) {
            INFO(describe(option));
            CAPTURE(j);
            Floats delta = decay_of(option, H);
            Floats stats((size_t)H * T, kNan);
            auto forward = [&](const Floats& x, float* row_stats) {
                Floats out((size_t)T * C, kNan);
                cpu::attention_forward(out.data(), row_stats, x.data(), or_null(delta), option.config, B, T,
                                       H, D);
                return out;
            };
            Floats out = forward(qkv, stats.data());
            Floats changed = qkv, other_stats = stats;  // k and v of token j
            for (int c = 0; c < 2 * C; c++) changed[(size_t)j * 3 * C + C + c] *= -50;
            Floats changed_out = forward(changed, other_stats.data());
            CHECK(std::equal(out.begin(), out.begin() + (size_t)j * C, changed_out.begin()));
            CHECK(!std::equal(out.begin() + (size_t)j * C, out.end(), changed_out.begin() + (size_t)j * C));

            // Backward: what reaches k and v of tokens after j does not come from the output of token j.
            auto backward = [&](const Floats& dy) {
                Floats dqkv((size_t)T * 3 * C, kNan), ddecay(H);
                cpu::attention_backward(dqkv.data(), delta.empty() ? nullptr : ddecay.data(), dy.data(),
                                        out.data(), stats.data(), qkv.data(), or_null(delta), option.config,
                                        B, T, H, D);
                return dqkv;
            };
            Floats changed_dout = dout;
            for (int c = 0; c < C; c++) changed_dout[(size_t)j * C + c] *= -50;
            Floats before = backward(dout), after = backward(changed_dout);
            CHECK(std::equal(before.begin() + (size_t)(j + 1) * 3 * C, before.end(),
                             after.begin() + (size_t)(j + 1) * 3 * C));
            CHECK(!std::equal(before.begin(), before.begin() + (size_t)(j + 1) * 3 * C, after.begin()));
        }
}

TEST_CASE("attention: a NaN comes out as NaN") {
    const int B = 2, T = 70, H = 2, D = 8, C = H * D;
    for (const Option& option : all_options())
        for (int part = 0; part < 3; part++)
            for (int j : {0, 17, 63, 64, 69}) {
                INFO(describe(option));
                CAPTURE(part);
                CAPTURE(j);
                Floats qkv = random_qkv(B, T, C), out((size_t)B * T * C), stats((size_t)B * H * T);
                Floats delta = decay_of(option, H);
                qkv[((size_t)(T + j) * 3 + part) * C + D + 3] = kNan;  // second sequence, second head
                cpu::attention_forward(out.data(), stats.data(), qkv.data(), or_null(delta), option.config, B,
                                       T, H, D);
                const float *other = &out[0], *row = &out[(size_t)(T + j) * C],
                            *last = &out[(size_t)(2 * T - 1) * C];
                CHECK(std::none_of(other, other + (size_t)T * C, is_nan));
                CHECK(std::none_of(row, row + D, is_nan));
                if (part == 0) CHECK(std::all_of(row + D, row + C, is_nan));
                if (part == 1) CHECK(std::all_of(last + D, last + C, is_nan));
                if (part == 2) CHECK(is_nan(last[D + 3]));

                Floats dqkv(qkv.size()), dout((size_t)B * T * C, 1.0f);
                cpu::attention_backward(dqkv.data(), nullptr, dout.data(), out.data(), stats.data(),
                                        qkv.data(), or_null(delta), option.config, B, T, H, D);
                CHECK(std::none_of(dqkv.begin(), dqkv.begin() + (size_t)T * 3 * C, is_nan));
                CHECK(std::any_of(dqkv.begin() + (size_t)T * 3 * C, dqkv.end(), is_nan));
            }
}

TEST_CASE("attention: the gradient of a learned decay over 2048 tokens, by finite differences") {
    // Both passes as a model runs them, in float. The two sums of ddecay are large and nearly cancel.
    const int B = 1, T = 2048, H = 2, D = 8, C = H * D;
    const Floats qkv = random_qkv(B, T, C), dout = normal((size_t)T * C, 2);
    for (const Option& option : all_options()) {
        if (option.decay != DecayKind::learned) continue;
        INFO(describe(option));
        const Floats delta = decay_of(option, H);
        Floats out((size_t)T * C), stats((size_t)H * T), dqkv(qkv.size()), ddecay(H);
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
            CHECK(std::abs(ddecay[h] - expected[h]) < 2e-5 * std::abs(expected[h]));
        }
    }
}
