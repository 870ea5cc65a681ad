// bf16, and the vector functions, which softmax, GELU and the loss use, over the whole range of floats.
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "llmc/cpu/bf16.h"
#include "llmc/cpu/gelu.h"
#include "llmc/cpu/vector.h"

namespace {

// Calls f(x, lanes of exp(x), gelu(x), gelu'(x)) for vectors of neighbouring floats: for every `stride`-th
// block of 16 bit patterns, and for all blocks with `low` <= |x| <= `high`.
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

uint32_t bits_of(float x) {
    return std::bit_cast<uint32_t>(x);
}
float float_of(uint32_t bits) {
    return std::bit_cast<float>(bits);
}

// The number that the bits of a bf16, which is not NaN, stand for, by its definition. Infinity is 2^128, as
// in rounding.
double bf16_value(uint16_t bits) {
    int exponent = bits >> 7 & 0xFF, mantissa = bits & 0x7F;
    double magnitude =
        exponent == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, exponent - 134);
    return bits & 0x8000 ? -magnitude : magnitude;
}

// The nearest bf16. If two are equally near, the one whose last bit is 0.
uint16_t nearest_bf16(float x) {
    uint16_t down = (uint16_t)(bits_of(x) >> 16);  // towards zero
    if (std::isinf(x)) return down;
    uint16_t up = (uint16_t)(down + 1);
    double to_down = std::fabs(x - bf16_value(down)), to_up = std::fabs(bf16_value(up) - x);
    if (to_down == to_up) return down % 2 == 0 ? down : up;
    return to_down < to_up ? down : up;
}

// Floats of every kind: each upper half, with lower halves at, near and between the limits of rounding.
std::vector<float> floats_of_every_kind() {
    std::vector<float> x;
    for (uint32_t upper = 0; upper < 65536; upper++)
        for (uint32_t lower : {0u, 1u, 0x1234u, 0x7FFFu, 0x8000u, 0x8001u, 0xCAFEu, 0xFFFFu})
            x.push_back(float_of(upper << 16 | lower));
    return x;
}

// A vector store may flush denormals to zero, as AVX512_BF16 does.
bool same_or_flushed(float from, uint16_t stored, uint16_t expected) {
    bool tiny = std::fabs(from) < std::numeric_limits<float>::min();
    return stored == expected || (tiny && stored == (expected & 0x8000));
}

}  // namespace

TEST_CASE("bf16 rounds to nearest even, and a NaN stays one") {
    long wrong = 0;
    float wrong_at = 0;
    for (float x : floats_of_every_kind()) {
        cpu::bf16 y = x;
        bool fine = std::isnan(x) ? std::isnan((float)y) && (y.bits ^ bits_of(x) >> 16) < 0x8000
                                  : y.bits == nearest_bf16(x);
        if (!fine) wrong++, wrong_at = x;
    }
    CAPTURE(wrong_at);
    CHECK(wrong == 0);
    // A few cases by hand: halfway to even, in both directions, and beyond the largest number.
    CHECK(cpu::bf16(1.0f).bits == 0x3F80);
    CHECK(cpu::bf16(-2.5f).bits == 0xC020);
    CHECK(cpu::bf16(1.00390625f).bits == 0x3F80);
    CHECK(cpu::bf16(1.01171875f).bits == 0x3F82);
    CHECK(cpu::bf16(3.4e38f).bits == 0x7F80);
    CHECK(cpu::bf16(-3.38e38f).bits == 0xFF7E);
    CHECK(cpu::bf16(std::numeric_limits<float>::infinity()).bits == 0x7F80);
}

TEST_CASE("bf16: each of the 65536 comes back from a float, and from a vector") {
    long wrong = 0;
    for (int first = 0; first < 65536; first += cpu::kLanes) {
        cpu::bf16 x[cpu::kLanes], stored[cpu::kLanes];
        for (int i = 0; i < cpu::kLanes; i++) x[i].bits = (uint16_t)(first + i);
        cpu::vec v = cpu::load(x);
        cpu::store(stored, v);
        for (int i = 0; i < cpu::kLanes; i++) {
            float value = x[i];
            bool nan = (x[i].bits & 0x7FFF) > 0x7F80;
            uint16_t expected = nan ? x[i].bits | 0x40 : x[i].bits;  // a NaN becomes quiet
            wrong +=
                std::isnan(value) != nan || (!nan && !std::isinf(value) && value != bf16_value(x[i].bits));
            wrong += cpu::bf16(value).bits != expected;
            wrong += bits_of(v[i]) != bits_of(value);
            wrong += !same_or_flushed(value, stored[i].bits, expected);
        }
    }
    CHECK(wrong == 0);
}

TEST_CASE("bf16: a vector is stored as its lanes are converted, a denormal so or as zero") {
    const std::vector<float> all = floats_of_every_kind();
    long wrong = 0, wrong_round = 0;
    float wrong_at = 0;
    for (size_t first = 0; first < all.size(); first += cpu::kLanes) {
        cpu::vec v = cpu::load(&all[first]);
        cpu::bf16 stored[cpu::kLanes];
        cpu::store(stored, v);
        cpu::vuint rounded = cpu::round_to_bf16(v);
        for (int i = 0; i < cpu::kLanes; i++) {
            float x = all[first + i];
            wrong_round += rounded[i] >> 16 != cpu::bf16(x).bits;
            if (!same_or_flushed(x, stored[i].bits, cpu::bf16(x).bits)) wrong++, wrong_at = x;
        }
    }
    CAPTURE(wrong_at);
    CHECK(wrong == 0);
    CHECK(wrong_round == 0);
}

TEST_CASE_TEMPLATE("load and store of the first lanes: zeros beyond, and nothing touched", Real, float,
                   cpu::bf16) {
    for (int n = 1; n <= cpu::kLanes; n++) {
        CAPTURE(n);
        std::vector<Real> x(n);  // nothing follows the last lane
        for (int i = 0; i < n; i++) x[i] = i + 1.5f;
        cpu::vec v = cpu::load(x.data(), n);
        for (int i = 0; i < cpu::kLanes; i++) CHECK((float)v[i] == (i < n ? i + 1.5f : 0.0f));

        std::vector<Real> exact(n);
        cpu::store(exact.data(), v + 1.0f, n);
        std::vector<Real> guarded(cpu::kLanes + 3, 77.0f);
        cpu::store(guarded.data() + 1, v + 1.0f, n);
        for (int i = 0; i < n; i++) CHECK((float)exact[i] == i + 2.5f);
        for (int i = 0; i < cpu::kLanes + 3; i++)
            CHECK((float)guarded[i] == (i >= 1 && i <= n ? i + 1.5f : 77.0f));
    }
    for (int C : {1, 15, 16, 17, 33, 64}) {
        CAPTURE(C);
        int next = 0;
        cpu::for_vectors(C, [&](int c, int lanes) {
            CHECK(c == next);
            CHECK(lanes == std::min(cpu::kLanes, C - c));
            next += lanes;
        });
        CHECK(next == C);
    }
}

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
    // Computes x sigmoid(2u) in double, by its definition.
    double worst = 0;
    for (float x = -10.2f; x < -9.9f; x = std::nextafter(x, 0.0f)) {
        double u2 = x * 1.5957691216057308 * (1 + 0.044715 * x * x);
        double exact = x / (1 + std::exp(-u2));
        if (std::fabs(exact) < 1e-36) continue;  // exp is larger than the largest float
        worst = std::max(worst, std::fabs(cpu::gelu(cpu::broadcast(x))[0] - exact) / std::fabs(exact));
    }
    CHECK(worst < 5e-5);  // u2 itself is rounded, and exp multiplies that error by u2
}
