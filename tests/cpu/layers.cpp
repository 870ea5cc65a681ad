// Every layer of llmc/cpu except attention (in attention.cpp), compared with the double-precision oracle,
// in float and in bf16. The oracle gets the same rounded inputs as the layer, so that the difference is only
// the layer's own rounding.
#include "llmc/cpu/classifier.h"
#include "llmc/cpu/cross_entropy.h"
#include "llmc/cpu/embedding.h"
#include "llmc/cpu/gelu.h"
#include "llmc/cpu/layernorm.h"
#include "llmc/cpu/matmul.h"
#include "llmc/cpu/qk_norm_rope.h"
#include "llmc/cpu/short_conv.h"
#include "tests/reference.h"

using namespace reference;
using cpu::bf16;

namespace {

const float kNan = std::numeric_limits<float>::quiet_NaN();

Vector scaled(Vector x, double factor) {
    for (double& value : x) value *= factor;
    return x;
}

Vector sum(Vector a, const Vector& b) {
    for (size_t i = 0; i < a.size(); i++) a[i] += b[i];
    return a;
}

template <class Real>
bool all_nan(const Real* x, size_t n) {
    return std::all_of(x, x + n, [](Real value) { return is_nan(value); });
}
template <class Real>
bool none_nan(const Real* x, size_t n) {
    return std::none_of(x, x + n, [](Real value) { return is_nan(value); });
}

// normal(), rounded to Real.
template <class Real>
std::vector<Real> normal_as(size_t n, uint64_t seed, double scale = 1, double mean = 0) {
    return convert<Real>(normal(n, seed, scale, mean));
}

}  // namespace

// --------------------------------------------------------------------------------------------------------
// matmul

namespace {

template <class Result, class Factor>
void check_matmul(int M, int N, int K, bool trans_a, bool trans_b, bool accumulate, bool has_bias) {
    CAPTURE(M);
    CAPTURE(N);
    CAPTURE(K);
    CAPTURE(trans_a);
    CAPTURE(trans_b);
    CAPTURE(accumulate);
    CAPTURE(has_bias);
    auto a = normal_as<Factor>((size_t)M * K, 1), b = normal_as<Factor>((size_t)K * N, 2);
    Floats bias = normal(has_bias ? N : 0, 3);
    Vector c = add_bias(matmul(to_double(a), to_double(b), M, N, K, trans_a, trans_b), to_double(bias));
    const float* bias_or_null = has_bias ? bias.data() : nullptr;
    Output::Kind kind = accumulate ? Output::added_to : Output::overwritten;
    if constexpr (!kIsBf16<Result> && !kIsBf16<Factor>) {
        INFO("matmul_loops");
        check_layer({a, b, bias}, {{"c", kind, c}}, [&](auto& o) {
            cpu::matmul_loops(o["c"], a.data(), b.data(), M, N, K, trans_a, trans_b, accumulate,
                              bias_or_null);
        });
    }
    INFO("matmul");
    Output product = output<Result>("c", kind, c, stored<Result>());
    if (accumulate && kIsBf16<Result>) {  // it is rounded after the addition
        auto before = normal_as<Result>(c.size(), 4);
        product = output("c", Output::in_place, sum(to_double(before), c), stored<Result>(), before);
    }
    check_layer({a, b, bias}, {product}, [&](auto& o) {
        cpu::matmul<Result, Factor>(o["c"], a.data(), b.data(), M, N, K, trans_a, trans_b, accumulate,
                                    bias_or_null);
    });
}

template <class Real>
void check_linear(int N, int IC, int OC, bool has_bias, bool wants_dinp) {
    CAPTURE(N);
    CAPTURE(IC);
    CAPTURE(OC);
    CAPTURE(has_bias);
    CAPTURE(wants_dinp);
    auto inp = normal_as<Real>((size_t)N * IC, 1), weight = normal_as<Real>((size_t)IC * OC, 2);
    Floats bias = normal(has_bias ? OC : 0, 3);
    auto dout = normal_as<Real>((size_t)N * OC, 4);
    Vector out = add_bias(matmul(to_double(inp), to_double(weight), N, OC, IC), to_double(bias));
    check_layer({inp, weight, bias}, {output<Real>("out", Output::overwritten, out, stored<Real>())},
                [&](auto& o) {
                    cpu::matmul_forward<Real>(o["out"], inp.data(), weight.data(),
                                              has_bias ? bias.data() : nullptr, N, IC, OC);
                });
    MatmulGradients d = matmul_backward(to_double(dout), to_double(inp), to_double(weight), N, IC, OC);
    for (bool accumulate : {false, true}) {
        CAPTURE(accumulate);
        std::vector<Output> outputs = {
            {"dweight", accumulate ? Output::added_to : Output::overwritten, d.dweight}};
        if (wants_dinp) outputs.push_back(output<Real>("dinp", Output::overwritten, d.dinp, stored<Real>()));
        if (has_bias) outputs.push_back({"dbias", Output::added_to, d.dbias});
        check_layer({dout, inp, weight}, outputs, [&](auto& o) {  // outputs that are not listed are null
            cpu::matmul_backward<Real>(o["dinp"], o["dweight"], o["dbias"], dout.data(), inp.data(),
                                       weight.data(), accumulate, N, IC, OC);
        });
        if (!wants_dinp) continue;
        auto before = normal_as<Real>(d.dinp.size(), 5);
        outputs[1] = output("dinp", Output::in_place, sum(to_double(before), d.dinp), stored<Real>(), before);
        check_layer({dout, inp, weight}, outputs, [&](auto& o) {
            cpu::matmul_backward<Real>(o["dinp"], o["dweight"], o["dbias"], dout.data(), inp.data(),
                                       weight.data(), accumulate, N, IC, OC, true);
        });
    }
}

}  // namespace

TEST_CASE("matmul: all transposes, overwriting, accumulating, with bias") {
    const int sizes[][3] = {{1, 1, 1},   {7, 5, 3},    {65, 257, 33}, {1, 130, 64},
                            {64, 1, 80}, {64, 96, 48}, {3, 5, 4099}};
    for (auto [M, N, K] : sizes)
        for (bool trans_a : {false, true})
            for (bool trans_b : {false, true}) {
                for (auto [accumulate, has_bias] : {std::pair(false, false), {true, false}, {false, true}}) {
                    check_matmul<float, float>(M, N, K, trans_a, trans_b, accumulate, has_bias);
                    check_matmul<float, bf16>(M, N, K, trans_a, trans_b, accumulate, has_bias);
                    check_matmul<bf16, bf16>(M, N, K, trans_a, trans_b, accumulate, has_bias);
                    check_matmul<bf16, float>(M, N, K, trans_a, trans_b, accumulate, has_bias);
                }
            }
}

TEST_CASE_TEMPLATE("matmul: the linear layer", Real, float, bf16) {
    const int sizes[][3] = {{1, 1, 1}, {7, 5, 3}, {130, 64, 192}, {14, 80, 33}};
    for (const auto& [N, IC, OC] : sizes)
        for (bool has_bias : {false, true})
            for (bool wants_dinp : {false, true}) check_linear<Real>(N, IC, OC, has_bias, wants_dinp);
}

// -----------------------------------------------------------------------------------------------------
// embedding

namespace {

template <class Real>
void check_embedding_forward(const std::vector<int>& tokens, const Floats& wte, const Floats& wpe, int B,
                             int T, int C) {
    const auto rows = convert<Real>(wte), places = convert<Real>(wpe);
    Vector out = embedding_forward(tokens, to_double(rows), to_double(places), B, T, C);
    check_layer({tokens, wte, wpe}, {{"out", Output::overwritten, out}}, [&](auto& o) {
        cpu::embedding_forward(o["out"], tokens.data(), rows.data(), wpe.empty() ? nullptr : places.data(), B,
                               T, C);
    });
}

void check_embedding(int T, int C, int V, bool has_wpe) {
    CAPTURE(T);
    CAPTURE(C);
    CAPTURE(V);
    CAPTURE(has_wpe);
    const int B = 2, positions = T + 3;  // the table may be longer than the sequence
    std::vector<int> tokens = random_ints(B * T, V, 1);
    tokens[0] = V - 1;
    Floats wte = normal((size_t)V * C, 2), wpe = normal(has_wpe ? positions * C : 0, 3);
    Floats dout = normal((size_t)B * T * C, 4);
    check_embedding_forward<float>(tokens, wte, wpe, B, T, C);
    check_embedding_forward<cpu::bf16>(tokens, wte, wpe, B, T, C);
    EmbeddingGradients d = embedding_backward(to_double(dout), tokens, B, T, C, V, positions);
    std::vector<Output> outputs = {{"dwte", Output::added_to, d.dwte}};
    if (has_wpe) outputs.push_back({"dwpe", Output::added_to, d.dwpe});
    check_layer({tokens, dout}, outputs, [&](auto& o) {
        cpu::embedding_backward(o["dwte"], o["dwpe"], dout.data(), tokens.data(), B, T, C);
    });
}

}  // namespace

TEST_CASE("embedding") {
    for (int T : {1, 7, 64, 65, 130})
        for (int C : {8, 33, 80})
            for (int V : {2, 50})
                for (bool has_wpe : {false, true}) check_embedding(T, C, V, has_wpe);
}

// -----------------------------------------------------------------------------------------------------
// layernorm

namespace {

template <class Real>
void check_layernorm(int N, int C, const Floats& inp, double tolerance) {
    CAPTURE(N);
    CAPTURE(C);
    auto delta = normal_as<Real>((size_t)N * C, 2), dout = normal_as<Real>((size_t)N * C, 5);
    Floats weight = normal(C, 3, 0.3, 1), bias = normal(C, 4);
    {
        LayerNorm y = layernorm_forward(to_double(inp), to_double(weight), to_double(bias), N, C);
        Output out = output<Real>("out", Output::overwritten, y.out, stored<Real>(tolerance));
        std::vector<Floats> first =
            check_layer({inp, weight, bias},
                        {out,
                         {"mean", Output::overwritten, y.mean, tolerance},
                         {"rstd", Output::overwritten, y.rstd, tolerance}},
                        [&](auto& o) {
                            cpu::layernorm_forward<Real>(o["out"], o["mean"], o["rstd"], inp.data(),
                                                         weight.data(), bias.data(), N, C);
                        });
        std::vector<Floats> again = check_layer({inp, first[1], first[2], weight, bias}, {out}, [&](auto& o) {
            cpu::layernorm_recompute<Real>(o["out"], first[1].data(), first[2].data(), inp.data(),
                                           weight.data(), bias.data(), N, C);
        });
        CHECK(same_bits(again[0], first[0]));

        LayerNormGradients d = layernorm_backward(to_double(dout), to_double(inp), to_double(weight), N, C);
        Floats mean = to_float(y.mean), rstd = to_float(y.rstd), residual = normal((size_t)N * C, 6);
        std::vector<Output> outputs = {{"dinp", Output::added_to, d.dinp, tolerance, residual},
                                       {"dweight", Output::added_to, d.dweight, tolerance},
                                       {"dbias", Output::added_to, d.dbias, tolerance}};
        if (kIsBf16<Real>)
            outputs.push_back(output<Real>("dinp_copy", Output::overwritten, sum(to_double(residual), d.dinp),
                                           stored<Real>(tolerance)));
        std::vector<Floats> got = check_layer({dout, inp, mean, rstd, weight}, outputs, [&](auto& o) {
            cpu::layernorm_backward<Real>(o["dinp"], o["dinp_copy"], o["dweight"], o["dbias"], dout.data(),
                                          inp.data(), mean.data(), rstd.data(), weight.data(), N, C);
        });
        if (kIsBf16<Real>) CHECK(same_bits(got[3], convert<float>(convert<Real>(got[0]))));
    }
    INFO("residual_layernorm");
    Floats residual = inp;
    for (size_t i = 0; i < inp.size(); i++) residual[i] += delta[i];
    LayerNorm y = layernorm_forward(to_double(residual), to_double(weight), to_double(bias), N, C);
    check_layer({inp, delta, weight, bias},
                {{"residual", Output::overwritten, sum(to_double(inp), to_double(delta)), 1e-7},
                 output<Real>("out", Output::overwritten, y.out, stored<Real>(tolerance)),
                 {"mean", Output::overwritten, y.mean, tolerance},
                 {"rstd", Output::overwritten, y.rstd, tolerance}},
                [&](auto& o) {
                    cpu::residual_layernorm_forward<Real>(o["residual"], o["out"], o["mean"], o["rstd"],
                                                          inp.data(), delta.data(), weight.data(),
                                                          bias.data(), N, C);
                });
}

}  // namespace

TEST_CASE_TEMPLATE("layernorm", Real, float, bf16) {
    for (int N : {1, 2, 14, 130})
        for (int C : {3, 8, 33, 64, 80, 240})
            check_layernorm<Real>(N, C, normal((size_t)N * C, 1, 1.5, 0.5), 1e-5);
}

TEST_CASE_TEMPLATE("layernorm: rows of mean 1000 and deviation 1 need the variance in two passes", Real,
                   float, bf16) {
    // If 768 such floats are summed one by one, the sum is wrong by up to 0.5, and the mean by 6e-4. E[x^2] -
    // mean^2 in float is wrong by 0.06.
    for (int C : {33, 64, 768}) check_layernorm<Real>(3, C, normal((size_t)3 * C, 1, 1, 1000), 1e-3);
}

TEST_CASE("layernorm: constant rows and rows of zeros") {
    int N = 2, C = 40;
    Floats inp(N * C, 0.0f), weight = normal(C, 1), bias = normal(C, 2), out(N * C, kNan), mean(N), rstd(N);
    std::fill(inp.begin() + C, inp.end(), 3.0f);
    cpu::layernorm_forward(out.data(), mean.data(), rstd.data(), inp.data(), weight.data(), bias.data(), N,
                           C);
    for (int i = 0; i < N * C; i++) CHECK(std::abs(out[i] - bias[i % C]) < 1e-3);
    for (float r : rstd) CHECK(r == doctest::Approx(1 / std::sqrt(1e-5)).epsilon(1e-4));
}

TEST_CASE_TEMPLATE("layernorm: a NaN comes out as NaN", Real, float, bf16) {
    int N = 3, C = 37;
    Floats weight = normal(C, 2), bias = normal(C, 3);
    for (int c = 0; c < C; c++) {
        CAPTURE(c);
        Floats inp = normal(N * C, 1), mean(N), rstd(N), residual(N * C), dinp(N * C), dweight(C), dbias(C);
        auto delta = normal_as<Real>(N * C, 4), dout = normal_as<Real>(N * C, 5);
        std::vector<Real> out(N * C), copy(N * C);
        cpu::layernorm_forward(out.data(), mean.data(), rstd.data(), inp.data(), weight.data(), bias.data(),
                               N, C);
        dout[C + c] = kNan;
        cpu::layernorm_backward(dinp.data(), kIsBf16<Real> ? copy.data() : nullptr, dweight.data(),
                                dbias.data(), dout.data(), inp.data(), mean.data(), rstd.data(),
                                weight.data(), N, C);
        CHECK(none_nan(&dinp[0], C));
        CHECK(all_nan(&dinp[C], C));
        CHECK(none_nan(&dinp[2 * C], C));
        if (kIsBf16<Real>) CHECK(all_nan(&copy[C], C));
        CHECK(is_nan(dweight[c]));
        CHECK(is_nan(dbias[c]));

        Floats nan_inp = inp;
        nan_inp[C + c] = kNan;
        cpu::layernorm_forward(out.data(), mean.data(), rstd.data(), nan_inp.data(), weight.data(),
                               bias.data(), N, C);
        CHECK(none_nan(&out[0], C));
        CHECK(all_nan(&out[C], C));
        CHECK(none_nan(&out[2 * C], C));
        CHECK(is_nan(mean[1]));
        CHECK(is_nan(rstd[1]));
        delta[C + c] = kNan;
        cpu::residual_layernorm_forward(residual.data(), out.data(), mean.data(), rstd.data(), inp.data(),
                                        delta.data(), weight.data(), bias.data(), N, C);
        CHECK(all_nan(&out[C], C));
        CHECK(none_nan(&out[2 * C], C));
    }
}

// ----------------------------------------------------------------------------------------------------------
// gelu

TEST_CASE("gelu: every value over [-30, 30]") {
    // The error is relative to the value down to x = -10, where the value is below a float's smallest normal
    // number. e^(-2u) multiplies the rounding error of u by |2u|, so the tolerance is more than 1e-6. The two
    // terms of the derivative cancel near x = -0.75.
    const double kTolerance = 2e-5, kSmallest = 1e-36;
    Floats x;
    for (double value = -30; value <= 30; value += 1.0 / 512) x.push_back((float)value);
    x.push_back(1e-30f);
    x.push_back(-1e-4f);
    Floats dout = normal(x.size(), 1), out(x.size(), kNan), dinp(x.size(), kNan);
    cpu::gelu_forward(out.data(), x.data(), x.size());
    Floats dbias(x.size());
    cpu::gelu_backward(dinp.data(), dbias.data(), dout.data(), x.data(), 1, (int)x.size());
    CHECK(dbias == dinp);
    for (size_t i = 0; i < x.size(); i++) {
        double y = gelu(x[i]), dx = dout[i] * gelu_derivative(x[i]).value();
        double y_error = kTolerance * std::abs(y) + kSmallest;
        double dx_error = std::abs(dout[i]) * (kTolerance * gelu_derivative(x[i]).magnitude() + kSmallest);
        CAPTURE(x[i]);
        CAPTURE(y);
        CAPTURE(dx);
        CHECK(std::abs(out[i] - y) <= y_error);
        CHECK(std::abs(dinp[i] - dx) <= dx_error);
    }
}

TEST_CASE_TEMPLATE("gelu: sizes, and backward in place", Real, float, bf16) {
    const int sizes[][2] = {{1, 1}, {1, 7}, {16, 1}, {3, 16}, {64, 33}, {65, 80}, {1, 70001}, {300, 239}};
    for (const auto& size : sizes) {
        const int N = size[0], C = size[1];
        CAPTURE(N);
        CAPTURE(C);
        size_t n = (size_t)N * C;
        auto x = normal_as<Real>(n, 1, 2), dout = normal_as<Real>(n, 2);
        Vector y(n), dx(n), dbias(C);
        for (size_t i = 0; i < n; i++) {
            y[i] = gelu(x[i]);
            dx[i] = dout[i] * gelu_derivative(x[i]).value();
            dbias[i % C] += dx[i];  // sums the gradients before they are rounded
        }
        double tolerance = stored<Real>();
        check_layer({x}, {output<Real>("out", Output::overwritten, y, tolerance)},
                    [&](auto& o) { cpu::gelu_forward<Real>(o["out"], x.data(), n); });
        Output bias{"dbias", Output::added_to, dbias};
        check_layer(
            {x, dout}, {output<Real>("dinp", Output::overwritten, dx, tolerance), bias},
            [&](auto& o) { cpu::gelu_backward<Real>(o["dinp"], o["dbias"], dout.data(), x.data(), N, C); });
        check_layer({x}, {output("dinp", Output::in_place, dx, tolerance, dout), bias}, [&](auto& o) {
            cpu::gelu_backward<Real>(o["dinp"], o["dbias"], o["dinp"], x.data(), N, C);
        });
    }
}

TEST_CASE_TEMPLATE("gelu: NaN and infinity", Real, float, bf16) {
    for (int at = 0; at < 37; at++) {
        auto x = normal_as<Real>(37, 1);
        std::vector<Real> out(37), dinp(37), dout(37, 1.0f);
        Floats dbias(37);
        x[at] = kNan;
        x[(at + 5) % 37] = INFINITY;
        x[(at + 9) % 37] = -INFINITY;
        cpu::gelu_forward(out.data(), x.data(), x.size());
        cpu::gelu_backward(dinp.data(), dbias.data(), dout.data(), x.data(), 1, 37);
        for (int i = 0; i < 37; i++) {
            if (is_nan(x[i]) || x[i] != -INFINITY) CHECK(is_nan(out[i]) == (i == at));
            CHECK(is_nan(dinp[i]) == (i == at));
            CHECK(is_nan(dbias[i]) == (i == at));
        }
    }
}

// ----------------------------------------------------------------------------------------------------
// short_conv

namespace {

template <class Real>
void check_short_conv(int T, int W, int K) {
    CAPTURE(T);
    CAPTURE(W);
    CAPTURE(K);
    const int B = 2;
    auto inp = normal_as<Real>((size_t)B * T * W, 1), dout = normal_as<Real>((size_t)B * T * W, 3);
    Floats weight = normal((size_t)K * W, 2);
    Vector out = short_conv_forward(to_double(inp), to_double(weight), B, T, W, K);
    check_layer({inp, weight}, {output<Real>("out", Output::overwritten, out, stored<Real>())}, [&](auto& o) {
        cpu::short_conv_forward<Real>(o["out"], inp.data(), weight.data(), B, T, W, K);
    });
    ShortConvGradients d =
        short_conv_backward(to_double(dout), to_double(inp), to_double(weight), B, T, W, K);
    check_layer({dout, inp, weight},
                {output<Real>("dinp", Output::overwritten, d.dinp, stored<Real>()),
                 {"dweight", Output::added_to, d.dweight}},
                [&](auto& o) {
                    cpu::short_conv_backward<Real>(o["dinp"], o["dweight"], dout.data(), inp.data(),
                                                   weight.data(), B, T, W, K);
                });
}

}  // namespace

TEST_CASE_TEMPLATE("short_conv", Real, float, bf16) {
    for (int T : {1, 7, 64, 65, 130})
        for (int W : {3, 24, 99, 240})
            for (int K : {1, 2, 4, T + 3}) check_short_conv<Real>(T, W, K);
}

TEST_CASE_TEMPLATE("short_conv: the identity kernel changes no bit", Real, float, bf16) {
    int B = 2, T = 9, W = 21, K = 4;
    auto inp = normal_as<Real>(B * T * W, 1);
    Floats weight(K * W);
    std::vector<Real> out(B * T * W, kNan);
    std::fill(weight.begin(), weight.begin() + W, 1.0f);
    cpu::short_conv_forward(out.data(), inp.data(), weight.data(), B, T, W, K);
    CHECK(same_bits(out, inp));
}

// --------------------------------------------------------------------------------------------------
// qk_norm_rope

TEST_CASE("rope_table: good to the last bits of a float, at late positions too") {
    for (int D : {2, 8, 64, 80}) {
        int T = 2048;
        Floats table = cpu::rope_table(T, D);
        REQUIRE(table.size() == (size_t)T * D);
        double worst = 0;
        for (int t = 0; t < T; t++)
            for (int i = 0; i < D / 2; i++) {
                double angle = rope_angle(t, i, D);
                worst = std::max(worst, std::abs(table[(size_t)t * D + i] - std::cos(angle)));
                worst = std::max(worst, std::abs(table[(size_t)t * D + D / 2 + i] - std::sin(angle)));
            }
        CAPTURE(D);
        CHECK(worst < 1e-7);
    }
}

namespace {

template <class Real>
void check_qk_norm_rope(int T, int H, int D, bool norm, bool rope) {
    CAPTURE(T);
    CAPTURE(H);
    CAPTURE(D);
    CAPTURE(norm);
    CAPTURE(rope);
    const int B = 2;
    const size_t n = (size_t)B * T * 3 * H * D;
    auto inp = normal_as<Real>(n, 1, 2), dout = normal_as<Real>(n, 3);
    Floats gain = normal(norm ? H : 0, 2, 0.5, 1);
    Floats table = rope ? cpu::rope_table(T, D) : Floats();
    const float* gain_or_null = norm ? gain.data() : nullptr;
    const float* table_or_null = rope ? table.data() : nullptr;

    QkNormRope y = qk_norm_rope_forward(to_double(inp), to_double(gain), rope, B, T, H, D);
    const double tolerance = stored<Real>();
    std::vector<Output> outputs = {output<Real>("out", Output::overwritten, y.out, tolerance)};
    if (norm) outputs.push_back({"rstd", Output::overwritten, y.rstd});  // without norm, rstd may be null
    std::vector<Floats> result = check_layer({inp, gain, table}, outputs, [&](auto& o) {
        cpu::qk_norm_rope_forward<Real>(o["out"], o["rstd"], inp.data(), gain_or_null, table_or_null, B, T, H,
                                        D);
    });
    bool v_is_copied = true;
    for (size_t i = 0; i < n; i++) v_is_copied &= i / (H * D) % 3 != 2 || result[0][i] == inp[i];
    CHECK(v_is_copied);

    QkNormRopeGradients d =
        qk_norm_rope_backward(to_double(dout), to_double(inp), to_double(gain), rope, B, T, H, D);
    Floats rstd = norm ? to_float(y.rstd) : Floats(y.rstd.size(), kNan);
    for (bool in_place : {false, true}) {
        CAPTURE(in_place);
        outputs = {in_place ? output("dinp", Output::in_place, d.dinp, tolerance, dout)
                            : output<Real>("dinp", Output::overwritten, d.dinp, tolerance)};
        if (norm) outputs.push_back({"dq_gain", Output::added_to, d.dq_gain});
        check_layer({dout, inp, rstd, gain, table}, outputs, [&](auto& o) {
            cpu::qk_norm_rope_backward<Real>(o["dinp"], o["dq_gain"],
                                             in_place ? (Real*)o["dinp"] : dout.data(), inp.data(),
                                             rstd.data(), gain_or_null, table_or_null, B, T, H, D);
        });
    }
}

}  // namespace

TEST_CASE_TEMPLATE("qk_norm_rope", Real, float, bf16) {
    for (int T : {1, 7, 64, 65, 130})
        for (int D : {2, 8, 32, 64, 80})
            for (int H : {1, 3})
                for (bool norm : {false, true})
                    for (bool rope : {false, true}) check_qk_norm_rope<Real>(T, H, D, norm, rope);
}

TEST_CASE_TEMPLATE("qk_norm_rope: odd heads without rotation, rows of zeros, NaN", Real, float, bf16) {
    int B = 2, T = 3, H = 3, D = 5, C = H * D;
    auto inp = normal_as<Real>(B * T * 3 * C, 1);
    std::vector<Real> out(inp.size(), kNan);
    Floats gain = normal(H, 2), rstd(B * T * 2 * H, kNan);
    std::fill(inp.begin(), inp.begin() + D, Real(0.0f));  // q of the first token and head
    inp[3 * C + C + 2 * D + 4] = kNan;                    // k of the second token and last head
    cpu::qk_norm_rope_forward(out.data(), rstd.data(), inp.data(), gain.data(), nullptr, B, T, H, D);
    Vector expected = qk_norm_rope_forward(to_double(inp), to_double(gain), false, B, T, H, D).out;
    for (size_t i = 0; i < out.size(); i++) {
        CAPTURE(i);
        bool in_nan_head = i >= size_t(4 * C + 2 * D) && i < size_t(4 * C + 3 * D);
        CHECK(is_nan(out[i]) == in_nan_head);
        if (!in_nan_head)
            CHECK(std::abs(out[i] - expected[i]) <= stored<Real>(1e-6) * (1 + std::abs(expected[i])));
    }
    CHECK(rstd[0] == doctest::Approx(1000.0));
}

// -------------------------------------------------------------------------------------------------
// cross_entropy

namespace {

// Checks dlogits apart from the logits, in both types; and in the place of the logits, in float.
void check_cross_entropy(int N, int V, int Vp, Floats logits /*(N,Vp)*/) {
    CAPTURE(N);
    CAPTURE(V);
    CAPTURE(Vp);
    for (int n = 0; n < N; n++) std::fill(&logits[(size_t)n * Vp] + V, &logits[(size_t)n * Vp] + Vp, kNan);
    std::vector<int> targets = random_ints(N, V, 2);
    targets[0] = V - 1;
    for (int n = 3; n < N; n += 3) targets[n] = -1;
    CrossEntropy y = cross_entropy(to_double(logits), targets, N, V, Vp);
    Output losses{"losses", Output::overwritten, y.losses};
    for (float dloss : {1.0f, 0.125f / N, -3.0f}) {
        CAPTURE(dloss);
        Vector dlogits = scaled(y.dlogits, dloss);
        check_layer({targets}, {losses, {"logits", Output::in_place, dlogits, 1e-5, logits}}, [&](auto& o) {
            cpu::cross_entropy<float>(o["losses"], o["logits"], o["logits"], targets.data(), dloss, N, V, Vp);
        });
        auto apart = [&]<class Real>(Real) {
            check_layer({targets},
                        {losses, output<Real>("dlogits", Output::overwritten, dlogits, stored<Real>())},
                        [&](auto& o) {
                            Floats lost = logits;
                            cpu::cross_entropy<Real>(o["losses"], o["dlogits"], lost.data(), targets.data(),
                                                     dloss, N, V, Vp);
                        });
        };
        apart(float());
        apart(bf16());
    }
    INFO("dloss 0");
    Floats untouched = logits;
    check_layer({targets}, {losses}, [&](auto& o) {
        cpu::cross_entropy<bf16>(o["losses"], nullptr, untouched.data(), targets.data(), 0.0f, N, V, Vp);
    });
    CHECK(same_bits(untouched, logits));
}

}  // namespace

TEST_CASE("cross_entropy") {
    const int sizes[][3] = {{1, 2, 2},   {5, 2, 16},     {7, 50, 64},  {14, 65, 128},
                            {2, 64, 64}, {3, 999, 1024}, {130, 33, 33}};
    for (auto [N, V, Vp] : sizes) check_cross_entropy(N, V, Vp, normal((size_t)N * Vp, 1, 2));
}

TEST_CASE("cross_entropy: large logits do not overflow") {
    int N = 6, V = 37, Vp = 48;
    Floats logits(N * Vp);
    for (int n = 0; n < N; n++)
        for (int v = 0; v < Vp; v++) logits[n * Vp + v] = (v * 7 + n) % 3 == 0 ? 80.0f : -80.0f;
    check_cross_entropy(N, V, Vp, logits);
    for (float& x : logits) x *= 100;
    check_cross_entropy(N, V, Vp, logits);
    std::fill(logits.begin(), logits.end(), -500.0f);
    check_cross_entropy(N, V, Vp, logits);
}

TEST_CASE_TEMPLATE("cross_entropy: a NaN comes out as NaN", Real, float, bf16) {
    int N = 3, V = 37, Vp = 48;
    for (int v = 0; v < V; v++) {
        CAPTURE(v);
        Floats logits = normal(N * Vp, 1), losses(N);
        logits[Vp + v] = kNan;
        std::vector<int> targets = {0, 5, 36};
        std::vector<Real> dlogits(N * Vp);
        cpu::cross_entropy<Real>(losses.data(), nullptr, logits.data(), targets.data(), 0.0f, N, V, Vp);
        CHECK(is_nan(losses[1]));
        cpu::cross_entropy(losses.data(), dlogits.data(), logits.data(), targets.data(), 1.0f, N, V, Vp);
        CHECK(none_nan(&losses[0], 1));
        CHECK(is_nan(losses[1]));
        CHECK(none_nan(&losses[2], 1));
        CHECK(none_nan(&dlogits[0], Vp));
        CHECK(all_nan(&dlogits[Vp], V));
        CHECK(none_nan(&dlogits[2 * Vp], Vp));
    }
}

// -----------------------------------------------------------------------------------------------------
// classifier

namespace {

// Computes the loss and its gradients through the output projection, row by row.
template <class Real>
void check_classifier(int N, int C, int V, int Vp, float dloss, bool accumulate) {
    CAPTURE(N);
    CAPTURE(C);
    CAPTURE(V);
    CAPTURE(dloss);
    CAPTURE(accumulate);
    auto inp = normal_as<Real>((size_t)N * C, 1), wte = normal_as<Real>((size_t)Vp * C, 2);
    std::vector<int> targets = random_ints(N, V, 3);
    Vector losses, dinp, dwte((size_t)Vp * C), x = to_double(inp), w = to_double(wte);
    for (int n = 0; n < N; n++) {
        Vector row(x.begin() + (size_t)n * C, x.begin() + (size_t)(n + 1) * C);
        CrossEntropy y = cross_entropy(matmul(row, w, 1, Vp, C, false, true), {targets[n]}, 1, V, Vp);
        losses.push_back(y.losses[0]);
        Vector dlogits = scaled(y.dlogits, dloss), dx = matmul(dlogits, w, 1, C, Vp);
        dinp.insert(dinp.end(), dx.begin(), dx.end());
        dwte = sum(dwte, matmul(dlogits, row, Vp, C, 1));
    }
    std::vector<Output> outputs = {{"losses", Output::overwritten, losses}};
    if (dloss != 0) {  // the factors of both products are gradients that were already rounded to bf16
        double of_sums = Vp > 1000 ? 1e-4 : 1e-5;  // because matmul_loops() adds Vp floats one by one
        outputs.push_back(output<Real>("dinp", Output::overwritten, dinp, 2 * stored<Real>(of_sums)));
        outputs.push_back(
            {"dwte", accumulate ? Output::added_to : Output::overwritten, dwte, stored<Real>()});
    }
    size_t rows = cpu::classifier_rows(N, Vp);
    Floats logits(rows * Vp);
    std::vector<Real> dlogits(rows * Vp);
    check_layer({inp, wte, targets}, outputs, [&](auto& o) {
        Real* scratch = dlogits.data();
        if constexpr (!kIsBf16<Real>) scratch = logits.data();
        cpu::classifier<Real>(o["losses"], o["dinp"], o["dwte"], logits.data(), scratch, inp.data(),
                              wte.data(), targets.data(), dloss, accumulate, N, C, V, Vp);
    });
}

}  // namespace

TEST_CASE_TEMPLATE("classifier", Real, float, bf16) {
    for (int N : {1, 7, 65})
        for (int C : {3, 33, 80})
            for (float dloss : {0.0f, 0.25f})
                for (bool accumulate : {false, true}) check_classifier<Real>(N, C, 50, 64, dloss, accumulate);
}

TEST_CASE_TEMPLATE("classifier: more rows than the scratch holds", Real, float, bf16) {
    const int N = 131, V = 131071, Vp = 131072;
    REQUIRE(cpu::classifier_rows(N, Vp) == 128);
    for (bool accumulate : {false, true}) check_classifier<Real>(N, 2, V, Vp, 0.25f, accumulate);
}
