// llmc/cpu/adamw.h: updates and the norm of gradients, compared with the double-precision oracle.
#include "llmc/cpu/adamw.h"

#include "tests/reference.h"

using namespace reference;
using cpu::bf16;

namespace {

const float kNan = std::numeric_limits<float>::quiet_NaN();

}  // namespace

TEST_CASE_TEMPLATE("adamw: several steps", Real, float, bf16) {
    struct Case {
        float learning_rate, beta1, beta2, eps, weight_decay, grad_scale;
        int first_step;
    };
    // The parameters are as small as the updates, and some eps are as large as the gradients, so that every
    // term matters.
    const Case cases[] = {
        {0.01f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f, 1},    {0.01f, 0.9f, 0.999f, 1e-2f, 0.0f, 0.3f, 1},
        {0.003f, 0.5f, 0.9f, 0.5f, 10.0f, 2.0f, 1},    {0.01f, 0.0f, 0.95f, 1e-8f, 1.0f, 1.0f, 1},
        {0.01f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.7f, 1000}, {0.0f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f, 1}};
    for (const Case& c : cases)
        for (size_t n : {1, 7, 33, 100003}) {
            CAPTURE(&c - cases);
            CAPTURE(n);
            Floats param = normal(n, 1, 0.02), m = normal(n, 2, c.first_step > 1 ? 0.1 : 0), v(n);
            for (size_t i = 0; i < n; i++) v[i] = m[i] * m[i] * 1.5f;
            reference::AdamW expected{to_double(param), to_double(m), to_double(v)};
            for (int step = c.first_step; step < c.first_step + 5; step++) {
                CAPTURE(step);
                Floats grad = normal(n, 100 + step, 0.5);
                grad[n / 2] = 0;
                expected.update(to_double(grad), c.learning_rate, c.beta1, c.beta2, c.eps, c.weight_decay,
                                c.grad_scale, step);
                std::vector<Output> outputs = {{"param", Output::in_place, expected.param, 1e-5, param},
                                               {"m", Output::in_place, expected.m, 1e-5, m},
                                               {"v", Output::in_place, expected.v, 1e-5, v}};
                if (kIsBf16<Real>)
                    outputs.push_back(
                        output<Real>("copy", Output::overwritten, expected.param, stored<Real>()));
                std::vector<Floats> after = check_layer({grad}, outputs, [&](auto& o) {
                    float *to = o["param"], *to_m = o["m"], *to_v = o["v"];
                    Real* copy = o["copy"];
#pragma omp parallel
                    cpu::adamw_update<Real>(to, copy, grad.data(), to_m, to_v, n, c.learning_rate, c.beta1,
                                            c.beta2, c.eps, c.weight_decay, c.grad_scale, step);
                });
                if (kIsBf16<Real>) CHECK(same_bits(after[3], convert<float>(convert<Real>(after[0]))));
                param = after[0], m = after[1], v = after[2];
            }
        }
}

TEST_CASE("adamw: a weight without a gradient only decays, and a NaN stays where it is") {
    Floats param = {1.0f, 2.0f, 3.0f}, grad = {0.0f, kNan, 1.0f}, m(3), v(3);
    std::vector<bf16> copy(3);
    for (Floats* x : {&param, &grad, &m, &v})
        x->reserve(16);  // or GCC warns of an overrun in a branch that is never taken
    copy.reserve(16);
    cpu::adamw_update(param.data(), copy.data(), grad.data(), m.data(), v.data(), 3, 0.1f, 0.9f, 0.95f, 1e-8f,
                      0.5f, 1.0f, 1);
    CHECK(param[0] == doctest::Approx(0.95));
    CHECK(is_nan(param[1]));
    CHECK(is_nan(copy[1]));
    CHECK(param[2] == doctest::Approx(3 * 0.95 - 0.1));
}

TEST_CASE("sum_of_squares: accurate, and the same bits whatever the number of threads") {
    for (size_t n : {0, 1, 7, 33, 4097, 100003, 10000000}) {
        CAPTURE(n);
        Floats x = normal(n, 1, 1, 0.5);
        double expected = 0;
        for (float value : x) expected += (double)value * value;
        double one, two, three;
        {
            Threads threads(1);
            one = cpu::sum_of_squares(x.data(), n);
        }
        {
            Threads threads(2);
            two = cpu::sum_of_squares(x.data(), n);
            CHECK(cpu::sum_of_squares(x.data(), n) == two);
        }
        {
            Threads threads(3);
            three = cpu::sum_of_squares(x.data(), n);
        }
        CHECK(std::abs(one - expected) <= 1e-9 * expected);
        CHECK(one == two);
        CHECK(one == three);
    }
}

TEST_CASE("sum_of_squares: squares beyond a float's range, NaN and infinity") {
    Floats x(1000, 1e-30f);
    CHECK(cpu::sum_of_squares(x.data(), x.size()) == doctest::Approx(1e-57).epsilon(1e-5).scale(0));
    x[3] = 1e30f;
    CHECK(cpu::sum_of_squares(x.data(), x.size()) == doctest::Approx(1e60).epsilon(1e-5));
    x[5] = std::numeric_limits<float>::infinity();
    CHECK(cpu::sum_of_squares(x.data(), x.size()) == std::numeric_limits<double>::infinity());
    for (size_t n : {1, 37, 100003})
        for (size_t at : {size_t(0), n / 3, n / 2, n - 1}) {
            CAPTURE(n);
            CAPTURE(at);
            x = normal(n, 1);
            x[at] = kNan;
            CHECK(is_nan((float)cpu::sum_of_squares(x.data(), n)));
        }
}
