#include "llmc/cuda/gelu.h"

#include "tests/cuda/helpers.h"

using namespace cuda_test;

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
    for (size_t i = 0; i < inp.size(); i++) {
        CAPTURE(inp[i]);
        double clamped = std::clamp((double)inp[i], -1e4, 1e4);
        CHECK(y[i] == doctest::Approx(inp[i] < -40 ? 0 : inp[i] > 40 ? inp[i] : reference::gelu(inp[i])));
        CHECK(dx[i] == doctest::Approx(clamped < -40  ? 0
                                       : clamped > 40 ? 1
                                                      : reference::gelu_derivative(clamped).value()));
    }
}
