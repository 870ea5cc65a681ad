#include "llmc/cuda/adamw.h"

#include <limits>

#include "dev/ptxsim/report.h"
#include "llmc/cuda/gradients.h"
#include "tests/cuda/helpers.h"

using namespace cuda_test;

namespace {

struct Case {
    float learning_rate, beta1, beta2, eps, grad_scale;
    int step;
};

// The parameters are as small as the updates, and some eps are as large as the gradients, so that every term
// matters.
const Case kCases[] = {{0.01f, 0.9f, 0.95f, 1e-8f, 1.0f, 1},
                       {0.003f, 0.5f, 0.9f, 0.5f, 2.0f, 1},
                       {0.01f, 0.9f, 0.95f, 1e-8f, 0.7f, 1000}};

// The first `decayed` of n elements have weight decay.
template <class Real, class Gradient>
void check_adamw(size_t n, const Case& c, size_t decayed) {
    CAPTURE(n);
    CAPTURE(&c - kCases);
    CAPTURE(decayed);
    const float weight_decay = 10;
    decayed = std::min(n, decayed);
    Floats param = reference::normal(n, 1, 0.02), m = reference::normal(n, 2, c.step > 1 ? 0.1 : 0), v(n);
    for (size_t i = 0; i < n; i++) v[i] = m[i] * m[i] * 1.5f;
    auto grad = convert<Gradient>(reference::normal(n, 3, 0.5));
    reference::AdamW expected;
    for (Slice slice : {Slice{0, decayed}, Slice{decayed, n}}) {
        auto part = [&](const auto& x) {
            Vector y = to_double(x);
            return Vector(y.begin() + slice.begin, y.begin() + slice.end);
        };
        reference::AdamW some{part(param), part(m), part(v)};
        some.update(part(grad), c.learning_rate, c.beta1, c.beta2, c.eps,
                    slice.end == decayed ? weight_decay : 0, c.grad_scale, c.step);
        expected.param.insert(expected.param.end(), some.param.begin(), some.param.end());
        expected.m.insert(expected.m.end(), some.m.begin(), some.m.end());
        expected.v.insert(expected.v.end(), some.v.begin(), some.v.end());
    }
    Device<Gradient> grad_device(grad);
    Device<float> scale(Floats{c.grad_scale});
    std::vector<Expected> outputs = {expect<float>("param", expected.param), expect<float>("m", expected.m),
                                     expect<float>("v", expected.v)};
    if (!std::is_same_v<Real, float>) outputs.push_back(expect<Real>("copy", expected.param));
    for (bool stochastic : {false, true}) {
        if (stochastic && std::is_same_v<Real, float>) continue;
        CAPTURE(stochastic);
        check_layer(outputs, [&](auto& o) {
            size_t bytes = n * sizeof(float);
            gpu::check(cudaMemcpy(o["param"].data, param.data(), bytes, cudaMemcpyHostToDevice));
            gpu::check(cudaMemcpy(o["m"].data, m.data(), bytes, cudaMemcpyHostToDevice));
            gpu::check(cudaMemcpy(o["v"].data, v.data(), bytes, cudaMemcpyHostToDevice));
            gpu::adamw_update<Real, Gradient>(o["param"], o["copy"], grad_device.get(), o["m"], o["v"], n, 0,
                                              decayed, c.learning_rate, c.beta1, c.beta2, c.eps, weight_decay,
                                              scale.get(), c.step, stochastic, 1, 0);
        });
    }
}

}  // namespace

TEST_CASE_TEMPLATE("cuda adamw: sizes, steps, and where weight decay ends", Real, float, gpu::bf16) {
    for (const Case& c : kCases)
        for (size_t n : {1, 7, 64, 65, 9003})
            for (size_t decayed : {size_t(0), size_t(4), size_t(4100), n}) {
                if (decayed > n) continue;
                check_adamw<Real, float>(n, c, decayed);
                check_adamw<Real, gpu::bf16>(n, c, decayed);
            }
}

TEST_CASE("cuda adamw: a weight without a gradient only decays, and a NaN stays where it is") {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (bool stochastic : {false, true}) {
        Device<float> param(Floats{1, 2, 3}), grad(Floats{0, nan, 1}), m(Floats(3)), v(Floats(3)),
            scale(Floats{1});
        Device<gpu::bf16> copy(3);
        gpu::adamw_update(param.get(), copy.get(), grad.get(), m.get(), v.get(), 3, 0, 3, 0.1f, 0.9f, 0.95f,
                          1e-8f, 0.5f, scale.get(), 1, stochastic, 0, 0);
        Floats p = param.host(), c = convert<float>(copy.host());
        CHECK(p[0] == doctest::Approx(0.95));
        CHECK(reference::is_nan(p[1]));
        CHECK(reference::is_nan(c[1]));
        CHECK(p[2] == doctest::Approx(3 * 0.95 - 0.1));
    }
}

TEST_CASE("cuda adamw: stochastic rounding takes llmc/rng.h's bits and is right in the mean") {
    const size_t n = 4099;
    const uint64_t seed = 0x123456789ABCDEFull;
    Floats param(n, 1.0f + 0.3f / 128), zeros(n, 0.0f);
    param[n - 1] = -1.5f;  // this is a bf16 number, so rounding keeps it
    Device<float> grad(zeros), scale(Floats{1});
    const size_t index = 1 << 20;  // of the first element in the model
    std::vector<Floats> copies;
    for (int step : {1, 2}) {
        Device<float> p(param), m(zeros), v(zeros);
        Device<gpu::bf16> copy(n);
        gpu::adamw_update(p.get(), copy.get(), grad.get(), m.get(), v.get(), n, index, 0, 0.1f, 0.9f, 0.95f,
                          1e-8f, 0.5f, scale.get(), step, true, seed, 0);
        CHECK(p.host() == param);
        copies.push_back(convert<float>(copy.host()));
        double mean = 0;
        bool same = true;
        for (size_t i = 0; i < n; i++) {
            uint32_t bits =
                std::bit_cast<uint32_t>(param[i]) + (random_block(seed, step, (index + i) / 4)[i % 4] >> 16);
            same &= copies.back()[i] == std::bit_cast<float>(bits & 0xFFFF0000u);
            if (i + 1 < n) mean += copies.back()[i] / (n - 1);
        }
        CHECK(same);
        CHECK(std::abs(mean - param[0]) < 4 * 0.46 / 128 / std::sqrt((double)n));
        CHECK(copies.back()[n - 1] == -1.5f);
    }
    CHECK(copies[0] != copies[1]);
}

TEST_CASE_TEMPLATE("cuda sum_of_squares and clip_factor", Real, float, gpu::bf16) {
    for (size_t n : {0, 1, 7, 1027, 2051, 3075, 4097, 100003}) {
        CAPTURE(n);
        auto x = convert<Real>(reference::normal(n, 1, 1, 0.5));
        double expected = 0;
        for (double value : to_double(x)) expected += value * value;
        Device<Real> device(x);
        Device<double> scratch(gpu::kSquaresBlocks), sum(1);
        Device<float> scale(1);
        std::vector<double> sums;
        under_every_schedule([&] {
            const double before = 0.5;
            gpu::check(cudaMemcpy(sum.get(), &before, sizeof before, cudaMemcpyHostToDevice));
            gpu::sum_of_squares(sum.get(), scratch.get(), device.get(), n, 0);
            sums.push_back(sum.host()[0]);
            CHECK(sums.back() == sums[0]);
            CHECK(std::abs(sums.back() - (before + expected)) <= 1e-13 * (before + expected));
        });
        double norm = std::sqrt(0.5 + expected);
        for (double max_norm : {0.0, norm / 3, norm * 1.5}) {
            gpu::clip_factor(scale.get(), sum.get(), max_norm, 0);
            bool clipped = max_norm > 0 && max_norm < norm;
            CHECK(scale.host()[0] == doctest::Approx(clipped ? 1.0 / 3 : 1.0).epsilon(1e-6));
        }
    }
}

TEST_CASE("cuda adamw: a gradient whose norm is not finite changes nothing") {
    for (double norm : {(double)INFINITY, (double)NAN}) {
        const Device<double> sum(std::vector<double>{norm});
        const Device<float> scale(1);
        for (double max_norm : {0.0, 1.0}) {
            gpu::clip_factor(scale.get(), sum.get(), max_norm, 0);
            CHECK(reference::is_nan(scale.host()[0]));
        }
        Device<float> x(reference::normal(1000, 1)), m(reference::normal(1000, 2)),
            v(reference::normal(1000, 3, 1, 2)), grad(Floats(1000, NAN));
        Device<gpu::bf16> copy(convert<gpu::bf16>(reference::normal(1000, 4)));
        const Floats before[] = {x.host(), m.host(), v.host()};
        const Vector copy_before = to_double(copy.host());
        gpu::adamw_update(x.get(), copy.get(), grad.get(), m.get(), v.get(), 1000, 0, 1000, 0.1f, 0.9f, 0.95f,
                          1e-8f, 0.1f, scale.get(), 1, false, 0, nullptr);
        CHECK((x.host() == before[0] && m.host() == before[1] && v.host() == before[2]));
        CHECK(to_double(copy.host()) == copy_before);
    }
    CHECK(ptxsim::take_reports().empty());
}

// A float array is added to in its own type, and rounded to bf16.
TEST_CASE_TEMPLATE("cuda move_gradients", To, float, gpu::bf16) {
    for (size_t n : {0, 1, 3, 4, 1027}) {
        CAPTURE(n);
        const Floats from = reference::normal(n, 1),
                     before = convert<float>(convert<To>(reference::normal(n, 2)));
        const Device<float> from_device(from);
        for (bool add : {false, true}) {
            Vector expected = to_double(from);
            for (size_t i = 0; add && i < n; i++) expected[i] += before[i];
            check_layer({expect<To>("to", expected)}, [&](auto& o) {
                const std::vector<To> start = convert<To>(before);
                To* to = o["to"];
                if (add && n > 0)
                    gpu::check(cudaMemcpy(to, start.data(), n * sizeof(To), cudaMemcpyHostToDevice));
                gpu::move_gradients(to, from_device.get(), n, add, 0);
            });
        }
    }
}
