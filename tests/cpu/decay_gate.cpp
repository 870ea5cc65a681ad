// --decay gate: the layer that makes the gates, and all forms of attention with gates, against the double
// precision oracle, whose backward passes are held against finite differences.
#include "llmc/cpu/decay_gate.h"

#include "llmc/cpu/attention.h"
#include "llmc/cpu/attention_cached.h"
#include "llmc/cpu/attention_linear.h"
#include "llmc/cpu/attention_norms.h"
#include "llmc/cpu/attention_state.h"
#include "tests/attention_kinds.h"
#include "tests/helpers.h"
#include "tests/norms.h"
#include "tests/reference.h"

using namespace reference;
using cpu::bf16;
using cpu::Decay;

namespace {

// log f of n tokens, from gates near 1, over all between, to gates near 0.
Floats random_log_gates(size_t n, uint64_t seed = 7) {
    Floats log_f = normal(n, seed, 4, 3);
    for (float& x : log_f) x = (float)log_sigmoid(x);
    return log_f;
}

template <class Real>
std::vector<Real> random_as(size_t n, uint64_t seed) {
    return convert<Real>(normal(n, seed));
}

// Both passes of attention in the tiled or the linear form.
template <class Real>
void check_gated(const AttentionConfig& config, bool linear, int B, int T, int H, int D,
                 const Floats& log_f) {
    INFO(describe(config));
    CAPTURE(linear);
    CAPTURE(B);
    CAPTURE(T);
    CAPTURE(H);
    CAPTURE(D);
    const int C = H * D;
    const double tolerance = kIsBf16<Real> ? 1e-2 : 1e-5;
    // Numbers without a first row of x^2 about 1e-6, which `sum` divides by x^2 + 1e-6.
    const auto qkv = random_as<Real>((size_t)B * T * 3 * C, 4), dout = random_as<Real>((size_t)B * T * C, 2);
    const Attention y = attention_forward(to_double(qkv), to_double(log_f), config, B, T, H, D, true);
    const AttentionGradients d =
        attention_backward(to_double(dout), to_double(qkv), to_double(log_f), config, B, T, H, D, true);
    auto run = [&] {
        std::vector<Real> out((size_t)B * T * C, Real(NAN)), dqkv(qkv.size(), Real(NAN));
        Floats stats(cpu::stats_size<Real>(config, B, T, H, D), NAN), dlog_f(log_f.size(), NAN);
        const Decay decay = Decay::gate(log_f.data());
        (linear
             ? cpu::attention_linear_forward<Real>
             : cpu::attention_forward<Real>)(out.data(), stats.data(), qkv.data(), decay, config, B, T, H, D);
        CHECK(relative_error(to_double(out), y.out) < tolerance);
        (linear ? cpu::attention_linear_backward<Real>
                : cpu::attention_backward<Real>)(dqkv.data(), dlog_f.data(), dout.data(), out.data(),
                                                 stats.data(), qkv.data(), decay, config, B, T, H, D);
        for (int part = 0; part < 3 && T > 1; part++) {  // q, k, v
            CAPTURE(part);
            CHECK(relative_error(part_of(to_double(dqkv), part, C), part_of(d.dqkv, part, C),
                                 0.1 * norm(d.dqkv)) < tolerance);
        }
        CHECK(relative_error(to_double(dlog_f), d.ddecay) < tolerance);
        return std::make_tuple(out, dqkv, dlog_f);
    };
    for (int threads : {2, 5}) {  // more threads than heads cut a head into parts
        CAPTURE(threads);
        Threads scope(threads);
        auto first = run(), again = run();
        CHECK(same_bits(std::get<0>(first), std::get<0>(again)));
        CHECK(same_bits(std::get<1>(first), std::get<1>(again)));
        CHECK(same_bits(std::get<2>(first), std::get<2>(again)));
        if (kIsBf16<Real>) break;
    }
}

struct Size {
    int B, T, H, D;
};

template <class Real>
void check_kinds(const std::vector<Size>& sizes) {
    for (const AttentionConfig& config : every_config())
        for (const Size& s : sizes)
            for (bool linear : {false, true}) {
                if (linear && !has_linear_form(config, s.D)) continue;
                check_gated<Real>(config, linear, s.B, s.T, s.H, s.D, random_log_gates(s.B * s.H * s.T));
            }
}

}  // namespace

TEST_CASE("oracle: gates agree with finite differences") {
    const int B = 2, T = 5, H = 2, D = 3, C = H * D;
    for (const AttentionConfig& config : every_config()) {
        INFO(describe(config));
        Vector qkv = to_double(normal(B * T * 3 * C, 3)), log_f = to_double(normal(B * H * T, 5, 0.3, -0.7)),
               dout = to_double(normal(B * T * C, 2));
        auto loss = [&] { return dot(dout, attention_forward(qkv, log_f, config, B, T, H, D, true).out); };
        AttentionGradients d = attention_backward(dout, qkv, log_f, config, B, T, H, D, true);
        CHECK(relative_error(d.dqkv, finite_differences(qkv, loss, 1e-5)) < 1e-6);
        CHECK(relative_error(d.ddecay, finite_differences(log_f, loss, 1e-5)) < 1e-6);
    }
    Vector inp = to_double(normal(B * T * C, 1)), weight = to_double(normal(C * H, 2)),
           bias = to_double(normal(H, 3)), dlog_f = to_double(normal(B * H * T, 4));
    auto loss = [&] { return dot(dlog_f, decay_gate_forward(inp, weight, bias, B, T, C, H)); };
    MatmulGradients d = decay_gate_backward(dlog_f, inp, weight, bias, B, T, C, H);
    CHECK(relative_error(d.dinp, finite_differences(inp, loss)) < 1e-6);
    CHECK(relative_error(d.dweight, finite_differences(weight, loss)) < 1e-6);
    CHECK(relative_error(d.dbias, finite_differences(bias, loss)) < 1e-6);
}

TEST_CASE_TEMPLATE("decay gate: the layer", Real, float, bf16) {
    for (const Size& s : std::vector<Size>{{2, 1, 1, 8}, {2, 7, 3, 7}, {1, 65, 6, 8}, {1, 130, 5, 11}})
        for (bool accumulate : {false, true}) {
            const int B = s.B, T = s.T, H = s.H, C = s.H * s.D;
            CAPTURE(T);
            CAPTURE(accumulate);
            auto inp = random_as<Real>((size_t)B * T * C, 1), weight = random_as<Real>((size_t)C * H, 2),
                 before = random_as<Real>(inp.size(), 6);
            Floats bias = normal(H, 3, 5), dlog_f = normal((size_t)B * H * T, 4);
            Vector log_f = decay_gate_forward(to_double(inp), to_double(weight), to_double(bias), B, T, C, H);
            check_layer({inp, weight, bias}, {{"log_f", Output::overwritten, log_f}}, [&](auto& o) {
                cpu::decay_gate_forward<Real>(o["log_f"], inp.data(), weight.data(), bias.data(), B, T, C, H);
            });
            MatmulGradients d = decay_gate_backward(to_double(dlog_f), to_double(inp), to_double(weight),
                                                    to_double(bias), B, T, C, H);
            Vector dinp = d.dinp;  // on top of what is there
            for (size_t i = 0; i < dinp.size(); i++) dinp[i] += (double)(float)before[i];
            Floats float_log_f = to_float(log_f);
            check_layer({dlog_f, float_log_f, inp, weight},
                        {output<Real>("dinp", Output::in_place, dinp, stored<Real>(), before),
                         {"dweight", accumulate ? Output::added_to : Output::overwritten, d.dweight},
                         {"dbias", Output::added_to, d.dbias}},
                        [&](auto& o) {
                            cpu::decay_gate_backward<Real>(o["dinp"], o["dweight"], o["dbias"], dlog_f.data(),
                                                           float_log_f.data(), inp.data(), weight.data(),
                                                           accumulate, B, T, C, H);
                        });
        }
}

TEST_CASE("gated attention: every kind in every form, float32") {
    check_kinds<float>({{2, 1, 1, 8}, {2, 7, 3, 8}, {1, 65, 2, 32}, {2, 130, 3, 8}, {1, 200, 1, 7}});
}

TEST_CASE("gated attention: every kind in every form, bf16") {
    check_kinds<bf16>({{2, 1, 1, 8}, {1, 65, 2, 32}, {2, 130, 3, 8}});
}

TEST_CASE_TEMPLATE("gated attention: 2048 tokens", Real, float, bf16) {
    const int T = 2048;
    Floats log_f = random_log_gates(T);  // then a part that forgets nothing, and one that is nearly so
    for (int t = 300; t < 900; t++) log_f[t] = 0;
    for (int t = 900; t < 1500; t++) log_f[t] *= 1e-3f;
    std::vector<AttentionConfig> configs = {{.kind = AttentionKind::softmax},
                                            {.kind = AttentionKind::poly3},
                                            {.kind = AttentionKind::poly2},
                                            {.kind = AttentionKind::poly2, .scale = ScaleKind::sum}};
    if (thorough()) configs = every_config();
    for (const AttentionConfig& config : configs)
        for (bool linear : {false, true})
            if (!linear || has_linear_form(config, 8)) check_gated<Real>(config, linear, 1, T, 1, 8, log_f);
}

TEST_CASE("linear attention with gates in bf16: roundings do not add up in the gradient of the gates") {
    // The sum of all pairs over a gate is the difference of sums over all tokens to its right, which are
    // rounded differently. With these gates a pair reaches over about a chunk, so the difference is small.
    const Floats log_f(4096, -0.02f);
    for (AttentionKind kind : {AttentionKind::poly1, AttentionKind::poly2})
        check_gated<bf16>({.kind = kind}, true, 1, (int)log_f.size(), 1, 16, log_f);
}

TEST_CASE("gated attention: 16384 tokens") {
    // Only some queries have a gradient, so the oracle needs only their rows. What they see reaches back over
    // the whole text, because only a few tokens forget much.
    const int T = 16384, D = 8;
    Floats log_f = random_log_gates(T);
    for (int t = 0; t < T; t++) log_f[t] *= t % 3000 == 2999 ? 0.1f : 1e-6f;
    const Floats qkv = normal((size_t)T * 3 * D, 4);
    const Vector q = to_double(qkv);
    auto check = [&](const AttentionConfig& config, bool linear) {
        INFO(describe(config));
        CAPTURE(linear);
        Floats out((size_t)T * D), dout(out.size()), stats(T), dqkv(qkv.size()), dlog_f(T);
        Vector y, expected(T);  // the outputs of these queries, and the gradient of log f
        const Vector dO = to_double(normal(D, 2));
        std::vector<int> queries;
        for (int i = 63; i < T; i += 1019) {
            queries.push_back(i);
            std::copy(dO.begin(), dO.end(), dout.begin() + (size_t)i * D);
            Vector log_fade(i + 1), sums(D);
            for (int j = i - 1; j >= 0; j--) log_fade[j] = log_fade[j + 1] + log_f[j + 1];
            const AttentionRow row = attention_row(&q[(size_t)i * 3 * D], &q[D], log_fade, config, i, D, D);
            Vector g(i + 1);  // A_ij dA_ij
            double r = 0, total = 0;
            for (int j = 0; j <= i; j++)
                for (int d = 0; d < D; d++) {
                    const double a = row.A[j] * q[((size_t)j * 3 + 2) * D + d];
                    sums[d] += a;
                    g[j] += a * dO[d];
                    r += a * dO[d];
                }
            for (int j = 0; j < i; j++) {
                total += g[j] + (config.softmax() ? -row.A[j] : row.dlog_scale[j]) * r;
                expected[j + 1] += total;
            }
            y.insert(y.end(), sums.begin(), sums.end());
        }
        const Decay decay = Decay::gate(log_f.data());
        (linear ? cpu::attention_linear_forward<float>
                : cpu::attention_forward<float>)(out.data(), stats.data(), qkv.data(), decay, config, 1, T, 1,
                                                 D);
        (linear ? cpu::attention_linear_backward<float>
                : cpu::attention_backward<float>)(dqkv.data(), dlog_f.data(), dout.data(), out.data(),
                                                  stats.data(), qkv.data(), decay, config, 1, T, 1, D);
        Vector got;
        for (int i : queries)
            got.insert(got.end(), out.begin() + (size_t)i * D, out.begin() + (size_t)(i + 1) * D);
        CHECK(relative_error(got, y) < 1e-5);
        CHECK(relative_error(to_double(dlog_f), expected) < 1e-5);
    };
    check({.kind = AttentionKind::softmax}, false);
    check({.kind = AttentionKind::poly3}, false);
    check({.kind = AttentionKind::poly1}, true);
    check({.kind = AttentionKind::poly2, .scale = ScaleKind::sum}, true);
}

TEST_CASE_TEMPLATE("gated attention: gates that are 0 or 1", Real, float, bf16) {
    const int B = 1, T = 150, H = 2, D = 8;
    Floats log_f(H * T, 0.0f);  // 1 everywhere, except for some tokens
    for (int t : {0, 5, 64, 70, 71, 128}) log_f[t] = -100, log_f[T + t] = -1e30f;
    for (const AttentionConfig& config : every_config()) {
        // A key that a row of `sum` has alone weighs 1 or -1 with every score. In bf16, rounding is all that
        // there is of the gradient of the score.
        if (kIsBf16<Real> && config.has_row_sum()) continue;
        for (bool linear : {false, true})
            if (!linear || has_linear_form(config, D)) check_gated<Real>(config, linear, B, T, H, D, log_f);
    }
}

TEST_CASE("gated attention: the future does not leak, bit for bit") {
    const int T = 200, H = 2, D = 8, C = H * D;
    const Floats qkv = normal((size_t)T * 3 * C, 1), log_f = random_log_gates(H * T);
    for (const AttentionConfig& config : every_config())
        for (bool linear : {false, true}) {
            if (linear && !has_linear_form(config, D)) continue;
            INFO(describe(config));
            auto forward = [&](const Floats& x, const Floats& gates) {
                Floats out((size_t)T * C), stats(H * T);
                (linear ? cpu::attention_linear_forward<float>
                        : cpu::attention_forward<float>)(out.data(), stats.data(), x.data(),
                                                         Decay::gate(gates.data()), config, 1, T, H, D);
                return out;
            };
            const Floats out = forward(qkv, log_f);
            for (int t : {1, 63, 64, 65, 199}) {
                CAPTURE(t);
                Floats other = qkv, gates = log_f;
                for (int c = 0; c < 2 * C; c++) other[(size_t)t * 3 * C + C + c] *= -50;
                for (int h = 0; h < H; h++) gates[h * T + t] = gates[h * T + t] < -1 ? 0.0f : -2.0f;
                for (const Floats& changed : {forward(other, log_f), forward(qkv, gates)}) {
                    CHECK(std::equal(out.begin(), out.begin() + t * C, changed.begin()));
                    CHECK(
                        !std::equal(out.begin() + t * C, out.begin() + (t + 1) * C, changed.begin() + t * C));
                }
            }
        }
}

TEST_CASE("gated attention: one gate for all tokens is a decay by distance") {
    const int B = 2, T = 130, H = 2, D = 8;
    const Floats qkv = normal((size_t)B * T * 3 * H * D, 1), delta = {0.5f, 4.0f};
    Floats log_f;
    for (int bh = 0; bh < B * H; bh++) log_f.insert(log_f.end(), T, (float)log_sigmoid(delta[bh % H]));
    for (const AttentionConfig& config : every_config()) {
        INFO(describe(config));
        Floats gated((size_t)B * T * H * D), decayed(gated), stats(B * H * T);
        cpu::attention_forward(gated.data(), stats.data(), qkv.data(), Decay::gate(log_f.data()), config, B,
                               T, H, D);
        cpu::attention_forward(decayed.data(), stats.data(), qkv.data(), delta.data(), config, B, T, H, D);
        CHECK(relative_error(to_double(gated), to_double(decayed)) < 1e-5);
    }
}

TEST_CASE("gated attention: keys and values, and the state, give the outputs of attention in any pieces") {
    for (const Size& s : std::vector<Size>{{1, 1, 1, 8}, {1, 67, 3, 9}, {1, 130, 2, 32}})
        for (const AttentionConfig& config : every_config()) {
            INFO(describe(config));
            const int T = s.T, H = s.H, D = s.D, C = H * D;
            CAPTURE(T);
            const Floats qkv = normal((size_t)T * 3 * C, 1), log_f = random_log_gates(H * T);
            Floats rows, cache;  // log f (T,H), and k and v (T,2C)
            for (int t = 0; t < T; t++) {
                for (int h = 0; h < H; h++) rows.push_back(log_f[h * T + t]);
                cache.insert(cache.end(), &qkv[((size_t)t * 3 + 1) * C], &qkv[((size_t)t * 3 + 2) * C] + C);
            }
            const Vector y =
                attention_forward(to_double(qkv), to_double(log_f), config, 1, T, H, D, true).out;
            const bool has_state = has_linear_form(config, D);
            Floats cached((size_t)T * C, NAN), stated(cached),
                state(has_state ? H * cpu::state_size(config.power(), D) : 0);
            std::vector<double> row_lengths(H);
            for (int start = 0, n = 1; start < T; start += n, n = n % 5 + 1) {
                n = std::min(n, T - start);
                const float* x = &qkv[(size_t)start * 3 * C];
                cpu::attention_cached_forward(&cached[(size_t)start * C], x, cache.data(),
                                              Decay::gate(rows.data()), config, start, n, H, D);
                if (has_state)
                    cpu::attention_state_forward(&stated[(size_t)start * C], state.data(), row_lengths.data(),
                                                 x, Decay::gate(&rows[(size_t)start * H]), config, start, n,
                                                 H, D);
            }
            CHECK(relative_error(to_double(cached), y) < 1e-5);
            // The first rows of `sum` are divided by x^2, which may be tiny beside the features that it is a
            // sum of.
            if (has_state) CHECK(relative_error(to_double(stated), y) < (config.has_row_sum() ? 1e-4 : 1e-5));
        }
}

TEST_CASE("attention by a state keeps its digits over thousands of tokens that hardly fade") {
    // exp(log_f) and these decays are far from the nearest float, so the same rounding would be made in every
    // step.
    const int T = 4096, D = 8;
    for (const AttentionConfig& config : std::vector<AttentionConfig>{
             {.kind = AttentionKind::poly1}, {.kind = AttentionKind::poly2, .scale = ScaleKind::sum}})
        for (float log_f : {-1.1e-4f, -0.9e-5f})
            for (bool is_gate : {false, true}) {
                INFO(describe(config));
                CAPTURE(log_f);
                CAPTURE(is_gate);
                const Floats qkv = normal((size_t)T * 3 * D, 1),
                             delta = {(float)-std::log(std::expm1(-(double)log_f))};
                const Floats values = is_gate ? Floats(T, log_f) : delta;
                Floats out((size_t)T * D, NAN), state(cpu::state_size(config.power(), D));
                double row_length = 0;
                cpu::attention_state_forward(out.data(), state.data(), &row_length, qkv.data(),
                                             is_gate ? Decay::gate(values.data()) : Decay(values.data()),
                                             config, 0, T, 1, D);
                const Vector y =
                    attention_forward(to_double(qkv), to_double(values), config, 1, T, 1, D, is_gate).out;
                CHECK(relative_error(to_double(out), y) < 1e-5);
            }
}

TEST_CASE("gated attention: there are no subnormal fades, which are slow") {
    const int T = 192;
    const Floats log_f(T, -0.7f);
    const cpu::HeadFactors factors({.kind = AttentionKind::poly3}, Decay::gate(log_f.data()), 0, T, 8);
    alignas(64) float memory[cpu::kTile * cpu::kTile];
    for (int i0 = 0; i0 < T; i0 += cpu::kTile)
        for (int j0 = 0; j0 <= i0; j0 += cpu::kTile)
            for (bool of_keys : {false, true}) {
                of_keys ? factors.fades_of_keys(i0, j0, memory) : factors.fades_of_queries(i0, j0, memory);
                for (float fade : memory) CHECK((fade == 0 || std::isnormal(fade)));
            }
}

TEST_CASE("gated attention: the norms are those of their definitions, and the mean gate is logged") {
    const int B = 2, T = 130, H = 2, D = 8, C = H * D;
    const Floats qkv = normal((size_t)B * T * 3 * C, 1), log_f = random_log_gates(B * H * T);
    for (const AttentionConfig& config : every_config()) {
        INFO(describe(config));
        Floats out((size_t)B * T * C), stats(B * H * T);
        const Decay decay = Decay::gate(log_f.data());
        cpu::attention_forward(out.data(), stats.data(), qkv.data(), decay, config, B, T, H, D);
        std::vector<AttentionNorms> norms(H);
        cpu::attention_norms(norms.data(), qkv.data(), stats.data(), decay, config, B, T, H, D);
        for (int h = 0; h < H; h++) {
            double mean = 0;
            for (int b = 0; b < B; b++)
                for (int t = 0; t < T; t++) mean += std::exp((double)log_f[(b * H + h) * T + t]) / (B * T);
            CHECK(norms[h].mean_gate == doctest::Approx(mean));
            auto log_fade = [&](int b, int i) {
                Vector fade(i + 1);
                for (int j = i - 1; j >= 0; j--) fade[j] = fade[j + 1] + log_f[(b * H + h) * T + j + 1];
                return fade;
            };
            check_norms(norms[h], attention_norms(to_double(qkv), log_fade, config, h, B, T, H, D), 1e-5);
        }
        cpu::attention_norms(norms.data(), qkv.data(), stats.data(), nullptr, config, B, T, H, D);
        CHECK(norms[0].mean_gate == 0);
    }
}
