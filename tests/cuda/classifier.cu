// llmc/cuda/classifier.h and cross_entropy.h against the oracle.
#include "llmc/cuda/classifier.h"

#include <limits>

#include "dev/ptxsim/report.h"
#include "tests/cuda/helpers.h"

using namespace cuda_test;
using gpu::bf16;

namespace {

template <class Real>
void check_cross_entropy(int N, int V, int Vp, double scale = 1) {
    CAPTURE(N);
    CAPTURE(V);
    CAPTURE(Vp);
    auto logits = cuda_test::convert<Real>(reference::normal((size_t)N * Vp, 1, scale));
    auto targets = reference::random_ints(N, V, 2);
    targets[0] = V - 1;
    const float dloss = 0.25f;
    auto y = reference::cross_entropy(cuda_test::to_double(logits), targets, N, V, Vp);
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
    auto inp = cuda_test::convert<Real>(reference::normal((size_t)N * C, 1));
    auto wte = cuda_test::convert<Real>(reference::normal((size_t)Vp * C, 2, 0.5 / std::sqrt(C)));
    for (size_t i = (size_t)V * C; i < wte.size(); i++) wte[i] = Real(0.0f);
    auto targets = reference::random_ints(N, V, 3);
    Vector x = cuda_test::to_double(inp), w = cuda_test::to_double(wte);
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
    CHECK(losses.host()[0] == doctest::Approx(std::log(1 + std::exp(-1.0))));
    CHECK(losses.host()[1] == doctest::Approx(std::log(1 + std::exp(2.0))));
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
            gpu::add_mean_loss(total.get(), x.get(), N, nullptr);
            CHECK(total.host()[0] == doctest::Approx(0.25 + sum / N).epsilon(1e-12));
        });
    }
    CHECK(ptxsim::take_reports().empty());
}
