// The vector functions over the whole range of floats: they stand under softmax, GELU and the loss.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "llmc/cpu/gelu.h"
#include "llmc/cpu/vector.h"

namespace {

// Calls f(x, lanes of exp(x), gelu(x), gelu'(x)) for vectors of neighbouring floats: every `stride`-th block
// of 16 bit patterns, and all of them where `low` <= |x| <= `high`.
template <class F>
void for_floats(uint32_t stride, float low, float high, F f) {
    for (uint64_t bits = 0; bits < (1ull << 32); bits += 16) {
        float x[16], e[16], g[16], d[16];
        uint32_t first = (uint32_t)bits;
        memcpy(x, &first, 4);
        if (bits / 16 % stride != 0 && !(std::fabs(x[0]) >= low && std::fabs(x[0]) <= high)) continue;
        for (uint32_t i = 0; i < 16; i++) {
            uint32_t pattern = first + i;
            memcpy(x + i, &pattern, 4);
        }
        cpu::vec v = cpu::load(x);
        cpu::store(e, cpu::exp(v));
        cpu::store(g, cpu::gelu(v));
        cpu::store(d, cpu::gelu_derivative(v));
        for (int i = 0; i < 16; i++) f(x[i], e[i], g[i], d[i]);
    }
}

}  // namespace

TEST_CASE("exp, GELU and its derivative over all floats, those where exp overflows or vanishes one by one") {
    double worst = 0;
    long wrong = 0;
    float wrong_at = 0;
    for_floats(1009, 85.5f, 89.5f, [&](float x, float e, float g, float d) {
        bool fine;
        if (std::isnan(x)) {
            fine = std::isnan(e) && std::isnan(g) && std::isnan(d);
        } else if (x < -86.2f) {
            fine = e == 0;
        } else {
            double exact = std::exp((double)x);
            fine = exact > 3.4028235677973366e38 ? std::isinf(e) : std::isfinite(e);
            if (std::isfinite(e)) worst = std::max(worst, std::fabs(e - exact) / exact);
        }
        if (std::isfinite(x)) fine = fine && std::isfinite(g) && std::isfinite(d) && std::fabs(d) < 1.2f;
        if (!fine) wrong++, wrong_at = x;
    });
    CAPTURE(wrong_at);
    CHECK(wrong == 0);
    CHECK(worst < 2.5e-7);
}

TEST_CASE("GELU to the last digits where exp is hardest: every float from -10.2 to -9.9") {
    // x sigmoid(2u) in double, from its definition.
    double worst = 0;
    for (float x = -10.2f; x < -9.9f; x = std::nextafter(x, 0.0f)) {
        double u2 = x * 1.5957691216057308 * (1 + 0.044715 * x * x);
        double exact = x / (1 + std::exp(-u2));
        if (std::fabs(exact) < 1e-36) continue;  // exp has gone past the largest float
        worst = std::max(worst, std::fabs(cpu::gelu(cpu::broadcast(x))[0] - exact) / std::fabs(exact));
    }
    CHECK(worst < 5e-5);  // u2 itself is rounded, and exp multiplies that error by u2
}
