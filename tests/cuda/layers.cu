// Every layer of llmc/cuda except attention and matrix products, against the oracle. One file, because nvcc
// takes seconds for the headers alone.
#include <limits>

#include "dev/ptxsim/report.h"
#include "llmc/cuda/classifier.h"
#include "llmc/cuda/embedding.h"
#include "llmc/cuda/gelu.h"
#include "llmc/cuda/layernorm.h"
#include "llmc/cuda/output_gate.h"
#include "llmc/cuda/qk_norm_rope.h"
#include "llmc/cuda/short_conv.h"
#include "tests/cuda/helpers.h"

using namespace cuda_test;
using gpu::bf16;

// ------------------------------------------------------------------------------------------------ embedding

namespace {

void check_embedding(int B, int T, int C, int V, const std::vector<int>& tokens) {
    CAPTURE(B);
    CAPTURE(T);
    CAPTURE(C);
    CAPTURE(V);
    int positions = T + 3;
    Floats wte = reference::normal((size_t)V * C, 1), wpe = reference::normal((size_t)positions * C, 2);
    Floats dout = reference::normal((size_t)B * T * C, 3);
    Device<int> tokens_device(tokens);
    Device<float> dout_device(dout);
    Device<float> scratch(gpu::embedding_backward_scratch(B, T, C));
    auto backward = reference::embedding_backward(to_double(dout), tokens, B, T, C, V, positions);
    for (bool learned : {true, false}) {
        CAPTURE(learned);
        auto check_forward = [&](auto type) {
            using Real = decltype(type);
            const auto rows = convert<Real>(wte), places = convert<Real>(wpe);
            Device<Real> wte_device(rows), wpe_device(places);
            Vector out = reference::embedding_forward(tokens, to_double(rows),
                                                      learned ? to_double(places) : Vector(), B, T, C);
            check_layer({expect<float>("out", out)}, [&](auto& o) {
                gpu::embedding_forward(o["out"], tokens_device.get(), wte_device.get(),
                                       learned ? wpe_device.get() : nullptr, B, T, C, 0);
            });
        };
        check_forward(float());
        if (T <= 1500 && V < 300) check_forward(gpu::bf16());
        auto check_backward = [&](auto type) {
            using Gradient = decltype(type);
            std::vector<Expected> outputs = {expect<Gradient>("dwte", backward.dwte, 0, true)};
            if (learned) outputs.push_back(expect<Gradient>("dwpe", backward.dwpe, 0, true));
            check_layer(outputs, [&](auto& o) {
                gpu::embedding_backward<Gradient>(o["dwte"], o["dwpe"], scratch.get(), dout_device.get(),
                                                  tokens_device.get(), B, T, C, V, 0);
            });
        };
        check_backward(float());
        if (T <= 1500 && V < 300) check_backward(gpu::bf16());
    }
}

}  // namespace

TEST_CASE("cuda embedding: shapes") {
    const int sizes[][3] = {{1, 1, 1},   {1, 7, 7},    {9, 8, 32},  {19, 2, 130}, {5, 13, 64},
                            {2, 32, 65}, {1, 64, 100}, {1, 7, 768}, {2, 3, 1030}};
    for (auto [B, T, C] : sizes)
        for (int V : {1, 5, 131}) check_embedding(B, T, C, V, reference::random_ints((size_t)B * T, V, 4));
}

TEST_CASE("cuda embedding: runs of one token over many chunks, vocabularies of one, two and three digits") {
    for (int V : {3, 100, 256, 257, 50257, 70001}) {
        int T = 1500;
        std::vector<int> tokens = reference::random_ints(T, V, 5);
        for (int i = 0; i < T; i++)
            if (i % 3) tokens[i] = V - 1;  // the same token 1000 times
        for (int C : {3, 4})
            if (C == 4 || V < 300) check_embedding(1, T, C, V, tokens);
    }
    int T = 2 * 32 * 33;  // one token has more chunks than a warp has lanes
    for (int C : {1, 4}) check_embedding(1, T, C, 3, std::vector<int>(T, 1));
    check_embedding(1, 8500, 1, 300,
                    reference::random_ints(8500, 300, 6));  // a warp loads more than one batch
    std::vector<int> ends_with_chunks(96);                  // runs of a token that begin and end with chunks
    for (int i = 0; i < 96; i++) ends_with_chunks[i] = i / 32 == 2 ? 5 : i / 32;
    check_embedding(1, 96, 8, 6, ends_with_chunks);
}

// ------------------------------------------------------------------------------------------------ layernorm

namespace {

template <class Real>
void check_layernorm(int N, int C) {
    CAPTURE(N);
    CAPTURE(C);
    size_t n = (size_t)N * C;
    Floats inp = reference::normal(n, 1, 2, 0.5), weight = reference::normal(C, 2, 0.5, 1);
    Floats bias = reference::normal(C, 3);
    auto delta = convert<Real>(reference::normal(n, 4)), dout = convert<Real>(reference::normal(n, 5));
    Device<float> inp_device(inp), weight_device(weight), bias_device(bias);
    Device<Real> delta_device(delta), dout_device(dout);

    auto forward = reference::layernorm_forward(to_double(inp), to_double(weight), to_double(bias), N, C);
    Device<float> mean(convert<float>(forward.mean)), rstd(convert<float>(forward.rstd));
    check_layer({expect<Real>("out", forward.out), expect<float>("mean", forward.mean),
                 expect<float>("rstd", forward.rstd)},
                [&](auto& o) {
                    gpu::layernorm_forward<Real>(o["out"], o["mean"], o["rstd"], inp_device.get(),
                                                 weight_device.get(), bias_device.get(), N, C, 0);
                });
    check_layer({expect<Real>("out", forward.out)}, [&](auto& o) {
        gpu::layernorm_recompute<Real>(o["out"], mean.get(), rstd.get(), inp_device.get(),
                                       weight_device.get(), bias_device.get(), N, C, 0);
    });

    Floats sum(n);
    for (size_t i = 0; i < n; i++) sum[i] = inp[i] + (float)delta[i];
    auto fused = reference::layernorm_forward(to_double(sum), to_double(weight), to_double(bias), N, C);
    for (bool in_place : {false, true}) {
        CAPTURE(in_place);
        check_layer({expect<float>("residual", to_double(sum)), expect<Real>("out", fused.out),
                     expect<float>("mean", fused.mean), expect<float>("rstd", fused.rstd)},
                    [&](auto& o) {
                        const float* from = in_place ? (const float*)o["residual"].data : inp_device.get();
                        if (in_place)
                            gpu::check(cudaMemcpy(o["residual"].data, inp_device.get(), n * sizeof(float),
                                                  cudaMemcpyDeviceToDevice));
                        gpu::residual_layernorm_forward<Real>(o["residual"], o["out"], o["mean"], o["rstd"],
                                                              from, delta_device.get(), weight_device.get(),
                                                              bias_device.get(), N, C, 0);
                    });
    }

    auto backward = reference::layernorm_backward(to_double(dout), to_double(inp), to_double(weight), N, C);
    Device<float> scratch(gpu::layernorm_backward_scratch(N, C));
    // With one or two channels the terms of dinp cancel, and the rounding of mean and rstd remains. So the
    // error is relative to the terms of dinp.
    Expected dinp = expect<float>("dinp", backward.dinp, 0, true);
    for (int i = 0; i < N; i++)
        for (int c = 0; c < C; c++)
            dinp.floor += std::pow(forward.rstd[i] * (double)(float)dout[(size_t)i * C + c], 2);
    dinp.floor = std::sqrt(dinp.floor);
    Expected dweight = expect<float>("dweight", backward.dweight, 0, true);
    dweight.floor = reference::norm(to_double(dout)) * 0.1;
    Expected dbias = expect<float>("dbias", backward.dbias, 0, true);
    std::vector<Expected> outputs = {dinp, dweight, dbias};
    if (!std::is_same_v<Real, float>) {
        outputs.push_back(expect<Real>("copy", backward.dinp, INFINITY));  // checked below
        outputs.back().floor = 1;
    }
    check_layer(outputs, [&](auto& o) {
        gpu::layernorm_backward<Real>(o["dinp"], o["copy"], o["dweight"], o["dbias"], scratch.get(),
                                      dout_device.get(), inp_device.get(), mean.get(), rstd.get(),
                                      weight_device.get(), N, C, 0);
        if (std::is_same_v<Real, float>) return;
        std::vector<Real> copy(n);
        Floats sums(n);
        gpu::check(cudaMemcpy(copy.data(), o["copy"].data, n * sizeof(Real), cudaMemcpyDeviceToHost));
        gpu::check(cudaMemcpy(sums.data(), o["dinp"].data, n * sizeof(float), cudaMemcpyDeviceToHost));
        CHECK(convert<float>(copy) == convert<float>(convert<Real>(sums)));
    });
}

}  // namespace

TEST_CASE_TEMPLATE("cuda layernorm: shapes", Real, float, gpu::bf16) {
    for (int N : {1, 7, 65})
        for (int C : {1, 7, 64, 65, 100}) check_layernorm<Real>(N, C);
    check_layernorm<Real>(64, 32);
    check_layernorm<Real>(7, 384);
    check_layernorm<Real>(7, 768);
    check_layernorm<Real>(2, 250);
    check_layernorm<Real>(2, 1020);
    check_layernorm<Real>(3, 1030);
    check_layernorm<Real>(2, 2044);
    check_layernorm<Real>(2, 2308);
    check_layernorm<Real>(2, 5000);
    check_layernorm<Real>(1, 16384);
    check_layernorm<Real>(1, 16383);
}

TEST_CASE("cuda layernorm: more rows than a grid has warps") {
    check_layernorm<gpu::bf16>(8 * gpu::kNormBlocks + 3, 8);
}

// ------------------------------------------------------------------------- qk-norm, RoPE, short convolution

namespace {

template <class Real>
void check_heads(int B, int T, int H, int D, bool norm, bool rope) {
    CAPTURE(B);
    CAPTURE(T);
    CAPTURE(H);
    CAPTURE(D);
    CAPTURE(norm);
    CAPTURE(rope);
    size_t size = (size_t)B * T * 3 * H * D;
    auto inp = convert<Real>(reference::normal(size, 1)), dout = convert<Real>(reference::normal(size, 2));
    auto q_gain = norm ? reference::normal(H, 3, 0.2, 1) : Floats();
    Vector x = to_double(inp), gain(q_gain.begin(), q_gain.end());
    auto y = reference::qk_norm_rope_forward(x, gain, rope, B, T, H, D);
    Device<Real> x_device(inp), dout_device(dout);
    Device<float> gain_device(q_gain), table(rope_table(T, D)), rstd(convert<float>(y.rstd)),
        scratch(gpu::qk_norm_rope_scratch(B, T, H));
    const float* g = norm ? gain_device.get() : nullptr;
    const float* angles = rope ? table.get() : nullptr;

    std::vector<Expected> outputs{expect<Real>("out", y.out)};
    if (norm) outputs.push_back(expect<float>("rstd", y.rstd));
    check_layer(outputs, [&](auto& out) {
        gpu::qk_norm_rope_forward<Real>(out["out"], out["rstd"], x_device.get(), g, angles, B, T, H, D,
                                        nullptr);
    });

    auto d = reference::qk_norm_rope_backward(to_double(dout), x, gain, rope, B, T, H, D);
    outputs = {expect<Real>("dinp", d.dinp)};
    if (norm) {
        outputs.push_back(expect<float>("dq_gain", d.dq_gain, 0, true));
        outputs[1].floor = 0.1 * std::sqrt(B * T);  // sums of B T products of normal numbers may cancel
    }
    check_layer(outputs, [&](auto& out) {
        gpu::qk_norm_rope_backward<Real>(out["dinp"], out["dq_gain"], norm ? scratch.get() : nullptr,
                                         dout_device.get(), x_device.get(), rstd.get(), g, angles, B, T, H, D,
                                         nullptr);
    });
    check_layer(outputs, [&](auto& out) {  // in place
        Real* dinp = out["dinp"];
        gpu::check(cudaMemcpy(dinp, dout.data(), size * sizeof(Real), cudaMemcpyHostToDevice));
        gpu::qk_norm_rope_backward<Real>(dinp, out["dq_gain"], scratch.get(), dinp, x_device.get(),
                                         rstd.get(), g, angles, B, T, H, D, nullptr);
    });
}

template <class Real>
void check_all_heads() {
    int bits = 0;
    for (int D : {2, 4, 6, 8, 16, 30, 32, 64, 80, 96, 100, 128, 130}) {
        check_heads<Real>(2, 1 + bits % 4, 3, D, true, true);
        check_heads<Real>(1, 7, 1 + bits % 5, D, bits % 2, bits % 2 == 0);
        bits++;
    }
    for (int D : {1, 3, 7, 17, 65}) check_heads<Real>(1, 3, 5, D, true, false);
    check_heads<Real>(3, 17, 7, 32, true, true);
    check_heads<Real>(1, 65, 2, 16, true, true);
    check_heads<Real>(1, 1, 1, 2, true, true);
    for (int mode = 0; mode < 4; mode++) check_heads<Real>(1, 2, 7, 30, mode & 1, mode & 2);
    check_heads<Real>(1, 2, 1, 258, true, true);  // a lane has several channels
    for (int mode = 0; mode < 4; mode++)          // the heads are too wide for packs of floats
        check_heads<Real>(1, 2, 1, 1024, mode & 1, mode & 2);
    for (int D : {255, 1023}) check_heads<Real>(1, 2, 1, D, true, false);
}

template <class Real>
void check_conv(int B, int T, int W, int K) {
    CAPTURE(B);
    CAPTURE(T);
    CAPTURE(W);
    CAPTURE(K);
    size_t size = (size_t)B * T * W;
    auto inp = convert<Real>(reference::normal(size, 1)), dout = convert<Real>(reference::normal(size, 2));
    Floats weight = reference::normal((size_t)K * W, 3);
    Vector x = to_double(inp), w(weight.begin(), weight.end());
    Device<Real> x_device(inp), dout_device(dout);
    Device<float> w_device(weight), scratch(gpu::short_conv_scratch(B, T, W, K));
    check_layer({expect<Real>("out", reference::short_conv_forward(x, w, B, T, W, K))}, [&](auto& out) {
        gpu::short_conv_forward<Real>(out["out"], x_device.get(), w_device.get(), B, T, W, K, nullptr);
    });
    auto d = reference::short_conv_backward(to_double(dout), x, w, B, T, W, K);
    check_layer(
        {expect<Real>("dinp", d.dinp), expect<float>("dweight", d.dweight, 1e-5, true)}, [&](auto& out) {
            gpu::short_conv_backward<Real>(out["dinp"], out["dweight"], scratch.get(), dout_device.get(),
                                           x_device.get(), w_device.get(), B, T, W, K, nullptr);
        });
}

template <class Real>
void check_all_convs() {
    int K = 1;
    for (int W : {1, 3, 7, 17, 64, 65, 100, 130, 264})
        for (int T : {1, 3, 17}) {
            check_conv<Real>(T == 3 ? 2 : 1, T, W, K);
            K = K % 7 + 1;
        }
    for (int K : {1, 2, 3, 4, 5, 9}) check_conv<Real>(2, 65, 24, K);
    for (int K : {1, 2, 3, 4, 5})  // with more rows than one block has
        for (int W : {8, 3}) check_conv<Real>(1, 300, W, K);
    check_conv<Real>(1, 300, 3, 64);
}

}  // namespace

TEST_CASE("cuda heads: qk-norm and RoPE, float") {
    check_all_heads<float>();
}

TEST_CASE("cuda heads: qk-norm and RoPE, bf16") {
    check_all_heads<bf16>();
}

TEST_CASE("cuda heads: heads that are too wide are refused") {
    CHECK_THROWS_AS(
        gpu::qk_norm_rope_forward<float>(nullptr, nullptr, nullptr, nullptr, nullptr, 1, 1, 1, 2000, nullptr),
        Error);
}

TEST_CASE("cuda heads: short convolution, float") {
    check_all_convs<float>();
}

TEST_CASE("cuda heads: short convolution, bf16") {
    check_all_convs<bf16>();
}

// ----------------------------------------------------------------------------------------------------- gelu

namespace {

template <class Real>
void check_gelu(int N, int C) {
    CAPTURE(N);
    CAPTURE(C);
    size_t n = (size_t)N * C;
    auto inp = convert<Real>(reference::normal(n, 1, 2)), dout = convert<Real>(reference::normal(n, 2));
    Vector x = to_double(inp), dy = to_double(dout), out(n), dinp(n), dbias(C);
    double magnitude = 0;  // the sum of the squares of the terms of dbias, which may cancel
    for (size_t i = 0; i < n; i++) {
        out[i] = reference::gelu(x[i]);
        dinp[i] = dy[i] * reference::gelu_derivative(x[i]).value();
        dbias[i % C] += dinp[i];
    }
    for (double d : dinp) magnitude += d * d;
    Device<Real> inp_device(inp), dout_device(dout);
    Device<float> scratch(gpu::gelu_backward_scratch(N, C));
    check_layer({expect<Real>("out", out)},
                [&](auto& o) { gpu::gelu_forward<Real>(o["out"], inp_device.get(), n, 0); });
    Expected bias = expect<float>("dbias", dbias, 0, true);
    bias.floor = std::sqrt(magnitude);
    check_layer({expect<Real>("dinp", dinp), bias}, [&](auto& o) {
        gpu::gelu_backward<Real>(o["dinp"], o["dbias"], scratch.get(), dout_device.get(), inp_device.get(), N,
                                 C, 0);
    });
    check_layer({expect<Real>("dinp", dinp), bias}, [&](auto& o) {  // in place
        gpu::check(cudaMemcpy(o["dinp"].data, dout_device.get(), n * sizeof(Real), cudaMemcpyDeviceToDevice));
        gpu::gelu_backward<Real>(o["dinp"], o["dbias"], scratch.get(), o["dinp"], inp_device.get(), N, C, 0);
    });
}

}  // namespace

TEST_CASE_TEMPLATE("cuda gelu: shapes", Real, float, gpu::bf16) {
    for (int N : {1, 7, 65})
        for (int C : {1, 7, 64, 65, 100}) check_gelu<Real>(N, C);
    check_gelu<Real>(64, 32);
    check_gelu<Real>(7, 384);
    check_gelu<Real>(3, 768);
    check_gelu<Real>(2, 1030);
    check_gelu<Real>(2200, 8);  // there are more blocks of rows than slots for their sums
}

TEST_CASE("cuda gelu: far out") {
    Floats inp = {-1e30f, -1e5f, -50, -10, 0, 10, 50, 1e5f, 1e30f, -0.75179f}, ones(inp.size(), 1.0f);
    Device<float> x(inp), d(ones), out(inp.size()), dinp(inp.size()),
        scratch(gpu::gelu_backward_scratch(1, 10));
    Device<float> dbias(Floats(inp.size(), 0.0f));
    gpu::gelu_forward(out.get(), x.get(), inp.size(), 0);
    gpu::gelu_backward(dinp.get(), dbias.get(), scratch.get(), d.get(), x.get(), 1, 10, 0);
    Floats y = out.host(), dx = dinp.host();
    Vector near, near_slope, expected, expected_slope;  // where GELU is not yet 0 or x
    for (size_t i = 0; i < inp.size(); i++) {
        CAPTURE(inp[i]);
        if (std::abs(inp[i]) < 40) {
            near.push_back(y[i]), near_slope.push_back(dx[i]);
            expected.push_back(reference::gelu(inp[i]));
            expected_slope.push_back(reference::gelu_derivative((double)inp[i]).value());
        } else {
            CHECK(y[i] == std::max(inp[i], 0.0f));
            CHECK(dx[i] == (inp[i] > 0));
        }
    }
    CHECK(reference::relative_error(near, expected) < 1e-5);
    CHECK(reference::relative_error(near_slope, expected_slope) < 1e-5);
}

// ---------------------------------------------------------------------------------------------- output gate

TEST_CASE_TEMPLATE("cuda output gate: sizes, and backward in place", Real, float, bf16) {
    for (size_t n : {1, 7, 64, 65, 2048, 4100, 70001}) {
        CAPTURE(n);
        auto inp = convert<Real>(reference::normal(n, 1)), gate = convert<Real>(reference::normal(n, 2, 3)),
             dout = convert<Real>(reference::normal(n, 3));
        Device<Real> x(inp), z(gate), dout_device(dout);
        check_layer({expect<Real>("out", reference::output_gate_forward(to_double(inp), to_double(gate)))},
                    [&](auto& o) { gpu::output_gate_forward<Real>(o["out"], x.get(), z.get(), n, 0); });
        auto d = reference::output_gate_backward(to_double(dout), to_double(inp), to_double(gate));
        for (bool in_place : {false, true})
            check_layer({expect<Real>("dinp", d.dinp), expect<Real>("dgate", d.dgate)}, [&](auto& o) {
                Real* dinp = o["dinp"];
                if (in_place)
                    gpu::check(cudaMemcpy(dinp, dout.data(), n * sizeof(Real), cudaMemcpyHostToDevice));
                gpu::output_gate_backward<Real>(dinp, o["dgate"], in_place ? dinp : dout_device.get(),
                                                x.get(), z.get(), n, 0);
            });
    }
}

TEST_CASE("cuda output gate: every gate keeps its digits, open or closed, and a NaN stays where it is") {
    const Floats gates = {-INFINITY, -1e30f, -80, -20,   -0.5f,    0,
                          0.5f,      20,     80,  1e30f, INFINITY, std::numeric_limits<float>::quiet_NaN()};
    const size_t n = gates.size();
    Device<float> z(gates), one(Floats(n, 1.0f)), out(n), dinp(n), dgate(n);
    gpu::output_gate_forward(out.get(), one.get(), z.get(), n, 0);
    gpu::output_gate_backward(dinp.get(), dgate.get(), one.get(), one.get(), z.get(), n, 0);
    const Floats y = out.host(), dx = dinp.host(), dz = dgate.host();
    for (size_t i = 0; i + 1 < n; i++) {
        CAPTURE(gates[i]);
        const auto d = reference::output_gate_backward({1.0}, {1.0}, {gates[i]});
        CHECK(std::abs(y[i] - d.dinp[0]) <= 2e-5 * d.dinp[0]);
        CHECK(y[i] == dx[i]);
        CHECK(std::abs(dz[i] - d.dgate[0]) <= 2e-5 * d.dgate[0]);
    }
    for (const Floats* x : {&y, &dx, &dz}) CHECK(reference::is_nan(x->back()));
}

// -------------------------------------------------------------------------------------- classifier and loss

namespace {

template <class Real>
void check_cross_entropy(int N, int V, int Vp, double scale = 1) {
    CAPTURE(N);
    CAPTURE(V);
    CAPTURE(Vp);
    auto logits = convert<Real>(reference::normal((size_t)N * Vp, 1, scale));
    auto targets = reference::random_ints(N, V, 2);
    targets[0] = V - 1;
    if (N > 1) targets[1] = -1;
    const float dloss = 0.25f;
    auto y = reference::cross_entropy(to_double(logits), targets, N, V, Vp);
    Vector dlogits = y.dlogits;
    for (double& d : dlogits) d *= dloss;
    Device<int> t(targets);
    // dlogits apart from the logits, and in their place. The loss of one row may be small compared with its
    // logits, so it has a looser tolerance.
    Expected losses = expect<float>("losses", y.losses, 1e-5);
    losses.floor = std::sqrt(N);
    Expected gradient = expect<Real>("dlogits", dlogits);
    gradient.floor = 1e-3 * dloss;
    Device<Real> x(logits);
    check_layer({losses, gradient}, [&](auto& out) {
        gpu::cross_entropy<Real>(out["losses"], out["dlogits"], x.get(), t.get(), dloss, N, V, Vp, nullptr);
    });
    check_layer({losses, gradient}, [&](auto& out) {
        Real* in_place = out["dlogits"];
        gpu::check(cudaMemcpy(in_place, logits.data(), logits.size() * sizeof(Real), cudaMemcpyHostToDevice));
        gpu::cross_entropy<Real>(out["losses"], in_place, in_place, t.get(), dloss, N, V, Vp, nullptr);
    });
    check_layer({losses}, [&](auto& out) {
        gpu::cross_entropy<Real>(out["losses"], nullptr, x.get(), t.get(), 0, N, V, Vp, nullptr);
    });
}

template <class Real>
void check_classifier(int N, int C, int V, int Vp, int rows, bool accumulate) {
    CAPTURE(N);
    CAPTURE(C);
    CAPTURE(V);
    CAPTURE(Vp);
    CAPTURE(rows);
    const float dloss = 1.0f / N;
    auto inp = convert<Real>(reference::normal((size_t)N * C, 1));
    auto wte = convert<Real>(reference::normal((size_t)Vp * C, 2, 0.5 / std::sqrt(C)));
    for (size_t i = (size_t)V * C; i < wte.size(); i++) wte[i] = Real(0.0f);
    auto targets = reference::random_ints(N, V, 3);
    Vector x = to_double(inp), w = to_double(wte);
    auto y = reference::cross_entropy(reference::matmul(x, w, N, Vp, C, false, true), targets, N, V, Vp);
    for (double& d : y.dlogits) d *= dloss;
    Vector dinp = reference::matmul(y.dlogits, w, N, C, Vp),
           dwte = reference::matmul(y.dlogits, x, Vp, C, N, true);

    Device<char> workspace(gpu::kMatmulWorkspace);
    gpu::MatmulContext context(workspace.get());
    Device<Real> inp_device(inp), wte_device(wte), logits((size_t)rows * Vp);
    Device<int> t(targets);
    double tolerance = std::is_same_v<Real, bf16> ? 1e-2 : 1e-5;
    std::vector<Expected> outputs{expect<float>("losses", y.losses, tolerance), expect<Real>("dinp", dinp),
                                  expect<float>("dwte", dwte, tolerance, accumulate)};
    if (V == 1)  // the result consists of rounding errors only
        for (Expected& e : outputs) e.floor = 1e-3;
    check_layer(outputs, [&](auto& out) {
        gpu::classifier<Real, float>(out["losses"], out["dinp"], out["dwte"], logits.get(), inp_device.get(),
                                     wte_device.get(), t.get(), dloss, accumulate, rows, N, C, V, Vp, context,
                                     nullptr);
    });
    outputs.resize(1);
    check_layer(outputs, [&](auto& out) {
        gpu::classifier<Real, float>(out["losses"], nullptr, nullptr, logits.get(), inp_device.get(),
                                     wte_device.get(), t.get(), 0, accumulate, rows, N, C, V, Vp, context,
                                     nullptr);
    });
}

template <class Real>
void check_all() {
    for (int V : {1, 3, 7, 17, 64, 65, 100, 130}) {
        check_cross_entropy<Real>(3, V, V);
        check_cross_entropy<Real>(5, V, (V + 15) / 16 * 16 + (V % 2 ? 16 : 0));
    }
    check_cross_entropy<Real>(2, 5000, 5008, 5);
    check_cross_entropy<Real>(1, 9001, 9001);
    check_classifier<Real>(1, 3, 7, 16, 1, false);
    check_classifier<Real>(7, 17, 65, 80, 3, true);
    check_classifier<Real>(65, 64, 130, 144, 65, false);
    check_classifier<Real>(100, 65, 100, 100, 17, false);
    check_classifier<Real>(17, 100, 17, 17, 16, true);
    check_classifier<Real>(130, 8, 1, 16, 64, true);
}

}  // namespace

TEST_CASE("cuda classifier: float") {
    check_all<float>();
}

TEST_CASE("cuda classifier: bf16") {
    check_all<bf16>();
}

TEST_CASE("cuda classifier: rows that shared memory does not hold") {
    check_cross_entropy<float>(1, 59990, 60000);
    check_cross_entropy<bf16>(1, 119001, 119003);
}

TEST_CASE("cuda classifier: rows at a time") {
    CHECK(gpu::classifier_rows(10, 50304) == 10);
    CHECK(gpu::classifier_rows(65536, 50304) == 2560);
    CHECK(gpu::classifier_rows(65536, 1 << 25) == 128);
    std::vector<int> targets{1, 0};
    Device<int> t(targets);
    // classifier() itself computes all rows at once.
    Device<char> workspace(gpu::kMatmulWorkspace);
    gpu::MatmulContext context(workspace.get());
    Device<float> inp(Floats{1, 2}), wte(Floats{0, 1}), logits(4), losses(2);
    gpu::classifier<float, float>(losses.get(), nullptr, nullptr, logits.get(), inp.get(), wte.get(), t.get(),
                                  0, false, 2, 1, 2, 2, context, nullptr);
    CHECK(reference::relative_error(to_double(losses.host()),
                                    {std::log(1 + std::exp(-1.0)), std::log(1 + std::exp(2.0))}) < 1e-5);
}

TEST_CASE("cuda classifier: a NaN among the logits shows in the loss") {
    Floats logits(3 * 256, 1.0f);
    logits[70] = logits[256 + 255] = std::numeric_limits<float>::quiet_NaN();
    Device<float> x(logits), losses(3);
    Device<int> t(std::vector<int>{0, 1, 2});
    gpu::cross_entropy<float>(losses.get(), nullptr, x.get(), t.get(), 0, 3, 256, 256, nullptr);
    Floats got = losses.host();
    CHECK(reference::is_nan(got[0]));
    CHECK(reference::is_nan(got[1]));
    CHECK(got[2] == doctest::Approx(std::log(256.0)));
}

TEST_CASE("cuda classifier: the mean of the losses is added") {
    for (int N : {1, 3, 1000, 5000}) {
        Floats losses = reference::normal(N, 1, 1, 3);
        double sum = 0;
        for (float x : losses) sum += x;
        Device<float> x(losses);
        under_every_schedule([&] {
            Device<double> total(std::vector<double>{0.25});
            gpu::add_mean_loss(total.get(), x.get(), N, 2 * N, nullptr);
            CHECK(total.host()[0] == doctest::Approx(0.25 + sum / (2 * N)).epsilon(1e-12));
        });
    }
    CHECK(ptxsim::take_reports().empty());
}
