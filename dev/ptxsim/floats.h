// 16-bit floats, tf32, and rounding modes for which the processor has no instruction.
#pragma once
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptxsim {

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

enum class Round : uint8_t { nearest, zero, down, up, away /* ties away from zero */ };

// x as a float with `exponent` and `mantissa` bits (IEEE 754, with denormals), in the low bits of the result.
// NaN becomes the canonical NaN.
inline uint32_t encode(double x, int exponent, int mantissa, Round round) {
    uint64_t bits = std::bit_cast<uint64_t>(x);
    uint32_t sign = (uint32_t)(bits >> 63), bias = (1u << (exponent - 1)) - 1, top = (1u << exponent) - 1;
    uint32_t high = sign << (exponent + mantissa);
    if (std::isnan(x)) return (1u << (exponent + mantissa)) - 1;
    if (std::isinf(x)) return high | top << mantissa;
    int e = (int)(bits >> 52 & 0x7FF) - 1023;
    uint64_t m = bits & ((1ull << 52) - 1);
    if (e == -1023) {
        if (m == 0) return high;
        e = -1022;
    } else {
        m |= 1ull << 52;
    }
    int drop = 52 - mantissa;      // bits of m that do not fit
    int smallest = 1 - (int)bias;  // exponent of the smallest normal number
    if (e < smallest) drop += smallest - e;
    uint64_t kept = drop > 63 ? 0 : m >> drop, rest = drop > 63 ? m : m & ((1ull << drop) - 1);
    uint64_t half = drop > 63 ? ~0ull : 1ull << (drop - 1);
    bool up = false;
    switch (round) {
        case Round::nearest:
            up = rest > half || (rest == half && (kept & 1));
            break;
        case Round::away:
            up = rest >= half;
            break;
        case Round::zero:
            break;
        case Round::down:
            up = sign && rest;
            break;
        case Round::up:
            up = !sign && rest;
            break;
    }
    kept += up;
    uint64_t value = e < smallest ? kept : kept + ((uint64_t)(e + (int)bias - 1) << mantissa);
    if (value >= (uint64_t)top << mantissa) {  // too large
        bool to_infinity = round == Round::nearest || round == Round::away || (round == Round::up && !sign) ||
                           (round == Round::down && sign);
        value = to_infinity ? (uint64_t)top << mantissa : ((uint64_t)top << mantissa) - 1;
    }
    return high | (uint32_t)value;
}

inline float decode(f16 x) {
    uint32_t exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    float value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                  : exponent == 0 ? std::ldexp((float)mantissa, -24)
                                  : std::bit_cast<float>((exponent + 112) << 23 | mantissa << 13);
    return x.bits >> 15 ? -value : value;
}
inline float decode(bf16 x) {
    return std::bit_cast<float>((uint32_t)x.bits << 16);
}
template <class T>
inline T to_half(double x, Round round = Round::nearest);
template <>
inline f16 to_half<f16>(double x, Round round) {
    return {(uint16_t)encode(x, 5, 10, round)};
}
template <>
inline bf16 to_half<bf16>(double x, Round round) {
    return {(uint16_t)encode(x, 8, 7, round)};
}

// x rounded to tf32, as a float: the tf32 number is in its upper 19 bits.
inline float to_tf32(float x, Round round) {
    return std::bit_cast<float>(encode(x, 8, 10, round) << 13);
}

// Returns x. The compiler may not move the computation of x across this call.
template <class T>
inline T opaque(T x) {
    asm volatile("" : "+x"(x)::"memory");
    return x;
}

// f(x...), computed by the processor in another rounding mode.
template <class F, class... X>
auto rounded(Round round, F f, X... x) {
    fesetround(round == Round::zero   ? FE_TOWARDZERO
               : round == Round::down ? FE_DOWNWARD
               : round == Round::up   ? FE_UPWARD
                                      : FE_TONEAREST);
    auto result = opaque(f(opaque(x)...));
    fesetround(FE_TONEAREST);
    return result;
}

inline float flush(float x) {  // .ftz
    return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x;
}
inline double flush(double x) {
    return x;
}

template <class T>
inline T saturate(T x) {  // .sat
    return x > T(0) ? (x < T(1) ? x : T(1)) : T(0);
}

}  // namespace ptxsim
