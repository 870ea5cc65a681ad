#include "llmc/cuda/layernorm.h"

#include "tests/cuda/helpers.h"

using namespace cuda_test;

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
