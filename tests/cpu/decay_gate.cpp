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

// Both passes of attention in the tiled or the linear form. `tolerance` is that of floats.
template <class Real>
void check_gated(const AttentionConfig& config, bool linear, int B, int T, int H, int D, const Floats& log_f,
                 double tolerance = 1e-5) {
    INFO(describe(config));
    CAPTURE(linear);
    CAPTURE(B);
    CAPTURE(T);
    CAPTURE(H);
    CAPTURE(D);
    const int C = H * D;
    if (kIsBf16<Real>) tolerance = 1e-2;
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
            const auto [B, T, H, D] = s;
            const int C = H * D;
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
    for (const AttentionConfig& config : every_config()) {
        if (!(thorough() || one_of_each_scale({config, DecayKind::gate}))) continue;
        for (bool linear : {false, true})
            if (!linear || has_linear_form(config, 8))
                check_gated<Real>(config, linear, 1, T, 1, 8, log_f, 1e-5);
    }
}
