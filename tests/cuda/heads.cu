// llmc/cuda/qk_norm_rope.h and short_conv.h against the oracle.
#include <doctest/doctest.h>

#include "llmc/cuda/qk_norm_rope.h"
#include "llmc/cuda/short_conv.h"
#include "tests/cuda/helpers.h"

using namespace cuda_test;
using gpu::bf16;

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
    auto inp = cuda_test::convert<Real>(reference::normal(size, 1)),
         dout = cuda_test::convert<Real>(reference::normal(size, 2));
    auto q_gain = norm ? reference::normal(H, 3, 0.2, 1) : Floats();
    Vector x = cuda_test::to_double(inp), gain(q_gain.begin(), q_gain.end());
    auto y = reference::qk_norm_rope_forward(x, gain, rope, B, T, H, D);
    Device<Real> x_device(inp), dout_device(dout);
    Device<float> gain_device(q_gain), table(rope_table(T, D)), rstd(cuda_test::convert<float>(y.rstd)),
        scratch(gpu::qk_norm_rope_scratch(B, T, H));
    const float* g = norm ? gain_device.get() : nullptr;
    const float* angles = rope ? table.get() : nullptr;

    std::vector<Expected> outputs{expect<Real>("out", y.out)};
    if (norm) outputs.push_back(expect<float>("rstd", y.rstd));
    check_layer(outputs, [&](auto& out) {
        gpu::qk_norm_rope_forward<Real>(out["out"], out["rstd"], x_device.get(), g, angles, B, T, H, D,
                                        nullptr);
    });

    auto d = reference::qk_norm_rope_backward(cuda_test::to_double(dout), x, gain, rope, B, T, H, D);
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
    auto inp = cuda_test::convert<Real>(reference::normal(size, 1)),
         dout = cuda_test::convert<Real>(reference::normal(size, 2));
    Floats weight = reference::normal((size_t)K * W, 3);
    Vector x = cuda_test::to_double(inp), w(weight.begin(), weight.end());
    Device<Real> x_device(inp), dout_device(dout);
    Device<float> w_device(weight), scratch(gpu::short_conv_scratch(B, T, W, K));
    check_layer({expect<Real>("out", reference::short_conv_forward(x, w, B, T, W, K))}, [&](auto& out) {
        gpu::short_conv_forward<Real>(out["out"], x_device.get(), w_device.get(), B, T, W, K, nullptr);
    });
    auto d = reference::short_conv_backward(cuda_test::to_double(dout), x, w, B, T, W, K);
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
