// ptxsim: cvt between all types in every rounding mode, and arithmetic of f16, bf16 and their pairs, against
// exact values rounded on the host.
#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;

namespace {

// ------------------------------------------------------------------------------------ floats and integers

#define CVT(name, R, rc, A, ac, text) ASM1(name, R, "=" rc, A, ac, "cvt." text " %0, %1;")
#define TO_INTEGERS(N, A, ac, t)                      \
    CVT(S16##N, int16_t, "h", A, ac, "rzi.s16." t)    \
    CVT(U16##N, uint16_t, "h", A, ac, "rni.u16." t)   \
    CVT(S32Rn##N, int32_t, "r", A, ac, "rni.s32." t)  \
    CVT(S32Rz##N, int32_t, "r", A, ac, "rzi.s32." t)  \
    CVT(S32Rm##N, int32_t, "r", A, ac, "rmi.s32." t)  \
    CVT(S32Rp##N, int32_t, "r", A, ac, "rpi.s32." t)  \
    CVT(U32Rn##N, uint32_t, "r", A, ac, "rni.u32." t) \
    CVT(U32Rz##N, uint32_t, "r", A, ac, "rzi.u32." t) \
    CVT(U32Rm##N, uint32_t, "r", A, ac, "rmi.u32." t) \
    CVT(U32Rp##N, uint32_t, "r", A, ac, "rpi.u32." t) \
    CVT(S64Rn##N, int64_t, "l", A, ac, "rni.s64." t)  \
    CVT(S64Rz##N, int64_t, "l", A, ac, "rzi.s64." t)  \
    CVT(U64Rz##N, uint64_t, "l", A, ac, "rzi.u64." t) \
    CVT(U64Rp##N, uint64_t, "l", A, ac, "rpi.u64." t)
TO_INTEGERS(F, float, "f", "f32")
TO_INTEGERS(D, double, "d", "f64")

// Conversions to integers saturate. NaN is left out, because the ISA says 0, but hardware does not give 0 for
// every width.
template <class R>
R to_integer(double x, Round mode) {
    const double r = round_integral(x, mode);
    constexpr double top = std::is_signed_v<R> ? (double)((uint64_t)1 << (8 * sizeof(R) - 1))
                                               : 2 * (double)((uint64_t)1 << (8 * sizeof(R) - 1));
    if (r >= top) return std::numeric_limits<R>::max();
    if (r <= (std::is_signed_v<R> ? -top : 0)) return std::numeric_limits<R>::min();
    return (R)r;
}
template <class T>
std::vector<T> without_nan(std::vector<T> all) {
    for (T& x : all)
        if (std::isnan(x)) x = 0;
    return all;
}

#define CHECK_TO_INTEGERS(N, A)                                                         \
    do {                                                                                \
        const auto a = without_nan(inputs<A>());                                        \
        check_op<S16##N>(                                                               \
            "rzi.s16", [](A x) { return to_integer<int16_t>(x, Round::zero); }, a);     \
        check_op<U16##N>(                                                               \
            "rni.u16", [](A x) { return to_integer<uint16_t>(x, Round::nearest); }, a); \
        check_op<S32Rn##N>(                                                             \
            "rni.s32", [](A x) { return to_integer<int32_t>(x, Round::nearest); }, a);  \
        check_op<S32Rz##N>(                                                             \
            "rzi.s32", [](A x) { return to_integer<int32_t>(x, Round::zero); }, a);     \
        check_op<S32Rm##N>(                                                             \
            "rmi.s32", [](A x) { return to_integer<int32_t>(x, Round::down); }, a);     \
        check_op<S32Rp##N>(                                                             \
            "rpi.s32", [](A x) { return to_integer<int32_t>(x, Round::up); }, a);       \
        check_op<U32Rn##N>(                                                             \
            "rni.u32", [](A x) { return to_integer<uint32_t>(x, Round::nearest); }, a); \
        check_op<U32Rz##N>(                                                             \
            "rzi.u32", [](A x) { return to_integer<uint32_t>(x, Round::zero); }, a);    \
        check_op<U32Rm##N>(                                                             \
            "rmi.u32", [](A x) { return to_integer<uint32_t>(x, Round::down); }, a);    \
        check_op<U32Rp##N>(                                                             \
            "rpi.u32", [](A x) { return to_integer<uint32_t>(x, Round::up); }, a);      \
        check_op<S64Rn##N>(                                                             \
            "rni.s64", [](A x) { return to_integer<int64_t>(x, Round::nearest); }, a);  \
        check_op<S64Rz##N>(                                                             \
            "rzi.s64", [](A x) { return to_integer<int64_t>(x, Round::zero); }, a);     \
        check_op<U64Rz##N>(                                                             \
            "rzi.u64", [](A x) { return to_integer<uint64_t>(x, Round::zero); }, a);    \
        check_op<U64Rp##N>(                                                             \
            "rpi.u64", [](A x) { return to_integer<uint64_t>(x, Round::up); }, a);      \
    } while (0)

TEST_CASE("ptxsim: cvt from floats to integers") {
    CHECK_TO_INTEGERS(F, float);
    CHECK_TO_INTEGERS(D, double);
}

#define FROM_INTEGERS(M, m)                                \
    CVT(FS32##M, float, "f", int32_t, "r", m ".f32.s32")   \
    CVT(FU32##M, float, "f", uint32_t, "r", m ".f32.u32")  \
    CVT(FS64##M, float, "f", int64_t, "l", m ".f32.s64")   \
    CVT(FU64##M, float, "f", uint64_t, "l", m ".f32.u64")  \
    CVT(FS16##M, float, "f", int16_t, "h", m ".f32.s16")   \
    CVT(DS32##M, double, "d", int32_t, "r", m ".f64.s32")  \
    CVT(DU64##M, double, "d", uint64_t, "l", m ".f64.u64") \
    CVT(DS64##M, double, "d", int64_t, "l", m ".f64.s64")  \
    CVT(FD##M, float, "f", double, "d", m ".f32.f64")
FROM_INTEGERS(Rn, "rn")
FROM_INTEGERS(Rz, "rz")
FROM_INTEGERS(Rm, "rm")
FROM_INTEGERS(Rp, "rp")

// The host converts in the rounding mode that is set.
template <class R, class A>
auto host_conversion(Round mode) {
    return [mode](A x) {
        std::fesetround(fenv_of(mode));
        volatile A a = x;
        volatile R r;
        if constexpr (std::is_same_v<A,
                                     uint64_t>) {  // x86 cannot convert large ones: adds two exact halves
            const R high = (R)(uint32_t)(a >> 32) * (R)4294967296.0;
            if constexpr (sizeof(R) == 8) {
                r = high + (R)(uint32_t)a;
            } else {
                volatile long double sum = (long double)(uint32_t)(a >> 32) * 4294967296.0L + (uint32_t)a;
                r = (R)sum;
            }
        } else {
            r = (R)a;
        }
        std::fesetround(FE_TONEAREST);
        return (R)r;
    };
}

#define CHECK_FROM_INTEGERS(M, mode)                                                                       \
    do {                                                                                                   \
        check_op<FS32##M>(#M " f32.s32", host_conversion<float, int32_t>(mode), inputs<int32_t>());        \
        check_op<FU32##M>(                                                                                 \
            #M " f32.u32", [](uint32_t x) { return (float)round_to(x, kF32, mode); }, inputs<uint32_t>()); \
        check_op<FS64##M>(#M " f32.s64", host_conversion<float, int64_t>(mode), inputs<int64_t>());        \
        check_op<FU64##M>(#M " f32.u64", host_conversion<float, uint64_t>(mode), inputs<uint64_t>());      \
        check_op<FS16##M>(#M " f32.s16", host_conversion<float, int16_t>(mode), inputs<int16_t>());        \
        check_op<DS32##M>(#M " f64.s32", host_conversion<double, int32_t>(mode), inputs<int32_t>());       \
        check_op<DU64##M>(#M " f64.u64", host_conversion<double, uint64_t>(mode), inputs<uint64_t>());     \
        check_op<DS64##M>(#M " f64.s64", host_conversion<double, int64_t>(mode), inputs<int64_t>());       \
        check_op<FD##M>(                                                                                   \
            #M " f32.f64", [](double x) { return (float)round_to(x, kF32, mode); }, inputs<double>());     \
    } while (0)

TEST_CASE("ptxsim: cvt from integers and f64 to floats") {
    CHECK_FROM_INTEGERS(Rn, Round::nearest);
    CHECK_FROM_INTEGERS(Rz, Round::zero);
    CHECK_FROM_INTEGERS(Rm, Round::down);
    CHECK_FROM_INTEGERS(Rp, Round::up);
}

CVT(RniF, float, "f", float, "f", "rni.f32.f32")
CVT(RziF, float, "f", float, "f", "rzi.f32.f32")
CVT(RmiF, float, "f", float, "f", "rmi.f32.f32")
CVT(RpiF, float, "f", float, "f", "rpi.f32.f32")
CVT(RniD, double, "d", double, "d", "rni.f64.f64")
CVT(RmiD, double, "d", double, "d", "rmi.f64.f64")
CVT(DF, double, "d", float, "f", "f64.f32")
CVT(SatF, float, "f", float, "f", "sat.f32.f32")
CVT(Tf32, uint32_t, "r", float, "f", "rna.tf32.f32")
CVT(S64S32, int64_t, "l", int32_t, "r", "s64.s32")
CVT(U64U32, uint64_t, "l", uint32_t, "r", "u64.u32")
CVT(S32S16, int32_t, "r", int16_t, "h", "s32.s16")
CVT(S32S8, int32_t, "r", int32_t, "r", "s32.s8")
CVT(U32U8, uint32_t, "r", uint32_t, "r", "u32.u8")
CVT(U16U32, uint16_t, "h", uint32_t, "r", "u16.u32")
CVT(SatS8, int32_t, "r", int32_t, "r", "sat.s8.s32")
CVT(SatU8, int32_t, "r", int32_t, "r", "sat.u8.s32")
CVT(SatS16, int16_t, "h", int32_t, "r", "sat.s16.s32")
CVT(SatU32, uint32_t, "r", int64_t, "l", "sat.u32.s64")

TEST_CASE("ptxsim: cvt within floats and within integers") {
    auto integral = [](Round mode) {
        return [mode](auto x) { return (decltype(x))round_integral(x, mode); };
    };
    const auto f = inputs<float>();
    check_op<RniF>("rni.f32", integral(Round::nearest), f);
    check_op<RziF>("rzi.f32", integral(Round::zero), f);
    check_op<RmiF>("rmi.f32", integral(Round::down), f);
    check_op<RpiF>("rpi.f32", integral(Round::up), f);
    check_op<RniD>("rni.f64", integral(Round::nearest), inputs<double>());
    check_op<RmiD>("rmi.f64", integral(Round::down), inputs<double>());
    check_op<DF>(
        "f64.f32", [](float x) { return (double)x; }, f);
    check_op_by<SatF>(
        "sat.f32", [](float a, float b) { return a == b; },
        [](float x) { return !(x > 0) ? 0.0f
                             : x > 1  ? 1.0f
                                      : x; }, f);
    check_op_by<Tf32>(
        "rna.tf32",
        [](uint32_t got, uint32_t expected) {
            const float a = std::bit_cast<float>(got & ~0x1FFFu), b = std::bit_cast<float>(expected);
            return same(a, b) || (std::isnan(std::bit_cast<float>(got)) && std::isnan(b));
        },
        [](float x) { return std::bit_cast<uint32_t>((float)round_to(x, kTf32, Round::away)); }, f);
    const auto s = inputs<int32_t>();
    check_op<S64S32>(
        "s64.s32", [](int32_t x) { return (int64_t)x; }, s);
    check_op<U64U32>(
        "u64.u32", [](uint32_t x) { return (uint64_t)x; }, inputs<uint32_t>());
    check_op<S32S16>(
        "s32.s16", [](int16_t x) { return (int32_t)x; }, inputs<int16_t>());
    check_op<S32S8>(
        "s32.s8", [](int32_t x) { return (int32_t)(int8_t)x; }, s);
    check_op<U32U8>(
        "u32.u8", [](uint32_t x) { return x & 255; }, inputs<uint32_t>());
    check_op<U16U32>(
        "u16.u32", [](uint32_t x) { return (uint16_t)x; }, inputs<uint32_t>());
    auto clamp = [](int64_t low, int64_t high) {
        return [=](auto x) { return std::clamp<int64_t>(x, low, high); };
    };
    check_op<SatS8>(
        "sat.s8.s32", [=](int32_t x) { return (int32_t)clamp(-128, 127)(x); }, s);
    check_op<SatU8>(
        "sat.u8.s32", [=](int32_t x) { return (int32_t)clamp(0, 255)(x); }, s);
    check_op<SatS16>(
        "sat.s16.s32", [=](int32_t x) { return (int16_t)clamp(-32768, 32767)(x); }, s);
    check_op<SatU32>(
        "sat.u32.s64", [=](int64_t x) { return (uint32_t)clamp(0, 0xFFFFFFFF)(x); }, inputs<int64_t>());
}

// ------------------------------------------------------------------------------------------- 16-bit formats

using h = uint16_t;
using w = uint32_t;
CVT(HRn, h, "h", float, "f", "rn.f16.f32")
CVT(HRz, h, "h", float, "f", "rz.f16.f32")
CVT(HRm, h, "h", float, "f", "rm.f16.f32")
CVT(HRp, h, "h", float, "f", "rp.f16.f32")
CVT(HD, h, "h", double, "d", "rn.f16.f64")
CVT(FH, float, "f", h, "h", "f32.f16")
CVT(HS32, h, "h", int32_t, "r", "rn.f16.s32")
CVT(S32H, int32_t, "r", h, "h", "rzi.s32.f16")
CVT(BRn, h, "h", float, "f", "rn.bf16.f32")
CVT(BRz, h, "h", float, "f", "rz.bf16.f32")
CVT(BRelu, h, "h", float, "f", "rn.relu.bf16.f32")
ASM1(FB, float, "=f", h, "h", "{ mov.b32 %0, {0, %1}; }")
ASM2(BB, w, "=r", float, "f", float, "f", "cvt.rn.bf16x2.f32 %0, %1, %2;")
ASM2(BBz, w, "=r", float, "f", float, "f", "cvt.rz.bf16x2.f32 %0, %1, %2;")
ASM2(BBRelu, w, "=r", float, "f", float, "f", "cvt.rn.relu.bf16x2.f32 %0, %1, %2;")
ASM2(HH, w, "=r", float, "f", float, "f", "cvt.rn.f16x2.f32 %0, %1, %2;")

template <int bits>
bool same_of(uint32_t got, uint32_t expected, const Format& format) {
    for (int i = 0; i < bits; i += 16) {
        const h a = (h)(got >> i), b = (h)(expected >> i);
        if (a != b && !(is_nan16(a, format) && is_nan16(b, format))) return false;
    }
    return true;
}
template <int bits>
auto same_in(const Format& format) {
    return [format](uint32_t got, uint32_t expected) { return same_of<bits>(got, expected, format); };
}
// The ISA does not say which zero .relu returns for -0.
template <int bits>
auto same_but_zeros(const Format& format) {
    return [format](uint32_t got, uint32_t expected) {
        for (int i = 0; i < bits; i += 16)
            if ((got >> i & 0xFFFF) == 0x8000) got ^= 0x8000u << i;
        return same_of<bits>(got, expected, format);
    };
}
auto encoded(const Format& format, Round mode, bool relu = false) {
    return [=](double x) { return encode16(relu && x <= 0 ? 0.0 : round_to(x, format, mode), format); };
}
auto encoded_pair(const Format& format, Round mode,
                  bool relu = false) {  // the first operand is the upper half
    return [=](float x, float y) {
        const auto one = encoded(format, mode, relu);
        return (w)one(x) << 16 | one(y);
    };
}

TEST_CASE("ptxsim: cvt to and from f16 and bf16") {
    auto f = inputs<float>(0, 1, 30000), g = inputs<float>(1, 2, 30000);
    std::mt19937_64 random(4);
    for (size_t i = 5000; i < 15000; i++)  // ties and numbers next to them
        f[i] = (float)std::ldexp((double)(random() % 8192) + (random() % 3 - 1.0) / 1024,
                                 (int)(random() % 40) - 34);
    check_op_by<HRn>("rn.f16", same_in<16>(kF16), encoded(kF16, Round::nearest), f);
    check_op_by<HRz>("rz.f16", same_in<16>(kF16), encoded(kF16, Round::zero), f);
    check_op_by<HRm>("rm.f16", same_in<16>(kF16), encoded(kF16, Round::down), f);
    check_op_by<HRp>("rp.f16", same_in<16>(kF16), encoded(kF16, Round::up), f);
    check_op_by<HD>("rn.f16.f64", same_in<16>(kF16), encoded(kF16, Round::nearest), inputs<double>());
    check_op_by<BRn>("rn.bf16", same_in<16>(kBf16), encoded(kBf16, Round::nearest), f);
    check_op_by<BRz>("rz.bf16", same_in<16>(kBf16), encoded(kBf16, Round::zero), f);
    check_op_by<BRelu>("rn.relu.bf16", same_but_zeros<16>(kBf16), encoded(kBf16, Round::nearest, true), f);
    check_op_by<BB>("rn.bf16x2", same_in<32>(kBf16), encoded_pair(kBf16, Round::nearest), f, g);
    check_op_by<BBz>("rz.bf16x2", same_in<32>(kBf16), encoded_pair(kBf16, Round::zero), f, g);
    check_op_by<BBRelu>("rn.relu.bf16x2", same_but_zeros<32>(kBf16),
                        encoded_pair(kBf16, Round::nearest, true), f, g);
    check_op_by<HH>("rn.f16x2", same_in<32>(kF16), encoded_pair(kF16, Round::nearest), f, g);
    check_op<FH>(
        "f32.f16", [](h x) { return (float)decode16(x, kF16); }, inputs16(kF16));
    check_op<FB>(
        "bf16 to f32", [](h x) { return (float)decode16(x, kBf16); }, inputs16(kBf16));
    check_op_by<HS32>("rn.f16.s32", same_in<16>(kF16), encoded(kF16, Round::nearest), inputs<int32_t>());
    auto halves = inputs16(kF16);
    for (h& x : halves) x = is_nan16(x, kF16) ? 0 : x;
    check_op<S32H>(
        "rzi.s32.f16", [](h x) { return to_integer<int32_t>(decode16(x, kF16), Round::zero); }, halves);
}

// Each operation on one 16-bit number and on a pair.
#define HALF2(name, text, t)                                          \
    ASM2(name##H, h, "=h", h, "h", h, "h", text "." t " %0, %1, %2;") \
    ASM2(name##W, w, "=r", w, "r", w, "r", text "." t "x2 %0, %1, %2;")
#define HALF3(name, text, t)                                                      \
    ASM3(name##H, h, "=h", h, "h", h, "h", h, "h", text "." t " %0, %1, %2, %3;") \
    ASM3(name##W, w, "=r", w, "r", w, "r", w, "r", text "." t "x2 %0, %1, %2, %3;")
#define HALF1(name, text, t)                              \
    ASM1(name##H, h, "=h", h, "h", text "." t " %0, %1;") \
    ASM1(name##W, w, "=r", w, "r", text "." t "x2 %0, %1;")
#define BOTH_FORMATS(N, t)              \
    HALF3(Fma##N, "fma.rn", t)          \
    HALF3(FmaRelu##N, "fma.rn.relu", t) \
    HALF2(Min##N, "min", t)             \
    HALF2(Max##N, "max", t)             \
    HALF2(MinNan##N, "min.NaN", t)      \
    HALF2(MaxNan##N, "max.NaN", t)      \
    HALF1(Neg##N, "neg", t)             \
    HALF1(Abs##N, "abs", t)
BOTH_FORMATS(F16, "f16")
BOTH_FORMATS(Bf16, "bf16")
HALF2(AddF16, "add", "f16")
HALF2(SubF16, "sub", "f16")
HALF2(MulF16, "mul", "f16")

double pick(double a, double b, bool less) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) == less ? a : b;
    return (a < b) == less ? a : b;
}
double pick_nan(double a, double b, bool less) {
    return std::isnan(a) || std::isnan(b) ? NAN : pick(a, b, less);
}

// Makes f, a function of one number, a function of packed pairs.
template <class F, class... A>
w of_pair(F f, A... a) {
    return f((h)a...) | (w)f((h)(a >> 16)...) << 16;
}
template <class One, class Two, class F>
void check_half1(const char* name, const Format& format, F f) {
    auto one = [=](h a) { return encode16(f(decode16(a, format)), format); };
    check_op_by<One>(name, same_in<16>(format), one, inputs16(format));
    check_op_by<Two>(
        name, same_in<32>(format), [=](w a) { return of_pair(one, a); }, inputs16x2(format, 0, 2));
}
template <class One, class Two, class F>
void check_half2(const char* name, const Format& format, F f) {
    auto one = [=](h a, h b) {
        return encode16(round_to(f(decode16(a, format), decode16(b, format)), format, Round::nearest),
                        format);
    };
    check_op_by<One>(name, same_in<16>(format), one, inputs16(format, 0, 2), inputs16(format, 1, 2));
    check_op_by<Two>(
        name, same_in<32>(format), [=](w a, w b) { return of_pair(one, a, b); }, inputs16x2(format, 0, 2),
        inputs16x2(format, 1, 2));
}
template <class One, class Two, class F>
void check_half3(const char* name, const Format& format, F f, bool relu = false) {
    auto one = [=](h a, h b, h c) {
        const double x = f(decode16(a, format), decode16(b, format), decode16(c, format));
        return encode16(round_to(x, format, Round::nearest), format);
    };
    auto equal1 = [=](w a, w b) {
        return relu ? same_but_zeros<16>(format)(a, b) : same_of<16>(a, b, format);
    };
    auto equal2 = [=](w a, w b) {
        return relu ? same_but_zeros<32>(format)(a, b) : same_of<32>(a, b, format);
    };
    check_op_by<One>(name, equal1, one, inputs16(format, 0, 3), inputs16(format, 1, 3),
                     inputs16(format, 2, 3));
    check_op_by<Two>(
        name, equal2, [=](w a, w b, w c) { return of_pair(one, a, b, c); }, inputs16x2(format, 0, 3),
        inputs16x2(format, 1, 3), inputs16x2(format, 2, 3));
}

// A sum of zero has the sign that rounding to nearest gives; fma_odd() does not round to nearest.
double fused(double a, double b, double c) {
    const double exact = fma_odd(a, b, c);
    return exact == 0 ? std::fma(a, b, c) : exact;
}
double relu(double x) {
    return x <= 0 ? 0.0 : x;
}

#define CHECK_BOTH(N, format)                                                                             \
    check_half3<Fma##N##H, Fma##N##W>("fma " #N, format, fused);                                          \
    check_half3<FmaRelu##N##H, FmaRelu##N##W>(                                                            \
        "fma.relu " #N, format, [](double a, double b, double c) { return relu(fused(a, b, c)); }, true); \
    check_half2<Min##N##H, Min##N##W>("min " #N, format,                                                  \
                                      [](double a, double b) { return pick(a, b, true); });               \
    check_half2<Max##N##H, Max##N##W>("max " #N, format,                                                  \
                                      [](double a, double b) { return pick(a, b, false); });              \
    check_half2<MinNan##N##H, MinNan##N##W>("min.NaN " #N, format,                                        \
                                            [](double a, double b) { return pick_nan(a, b, true); });     \
    check_half2<MaxNan##N##H, MaxNan##N##W>("max.NaN " #N, format,                                        \
                                            [](double a, double b) { return pick_nan(a, b, false); });    \
    check_half1<Neg##N##H, Neg##N##W>("neg " #N, format, [](double a) { return -a; });                    \
    check_half1<Abs##N##H, Abs##N##W>("abs " #N, format, [](double a) { return std::abs(a); });

TEST_CASE("ptxsim: arithmetic of f16 and bf16, single and paired") {
    CHECK_BOTH(F16, kF16)
    CHECK_BOTH(Bf16, kBf16)
    check_half2<AddF16H, AddF16W>("add f16", kF16, [](double a, double b) { return a + b; });
    check_half2<SubF16H, SubF16W>("sub f16", kF16, [](double a, double b) { return a - b; });
    check_half2<MulF16H, MulF16W>("mul f16", kF16, [](double a, double b) { return a * b; });
}

#define COMPARE(bit, op, t)                                                                                \
    asm volatile("{\n\t.reg .pred p;\n\tsetp." op "." t " p, %1, %2;\n\tselp.u32 %0, " #bit ", 0, p;\n\t}" \
                 : "=r"(one)                                                                               \
                 : "h"(a), "h"(b));                                                                        \
    r |= one;
#define COMPARISONS(name, t)                      \
    struct name {                                 \
        __device__ static uint32_t at(h a, h b) { \
            uint32_t r = 0, one;                  \
            COMPARE(1, "eq", t)                   \
            COMPARE(2, "lt", t)                   \
            COMPARE(4, "ge", t)                   \
            COMPARE(8, "neu", t)                  \
            COMPARE(16, "gtu", t)                 \
            COMPARE(32, "num", t)                 \
            return r;                             \
        }                                         \
    };
COMPARISONS(CompareF16, "f16")  // comparisons of bf16 need sm_90
struct ComparePair {            // each half has its own predicate
    __device__ static uint32_t at(w a, w b) {
        w r;
        asm volatile(
            "{\n\t.reg .pred p, q;\n\t.reg .u32 x;\n\tsetp.lt.f16x2 p|q, %1, %2;\n\t"
            "selp.u32 %0, 1, 0, p;\n\tselp.u32 x, 2, 0, q;\n\tadd.u32 %0, %0, x;\n\t}"
            : "=&r"(r)
            : "r"(a), "r"(b));
        return r;
    }
};

auto compared(const Format& format) {
    return [format](h x, h y) {
        const double a = decode16(x, format), b = decode16(y, format);
        const bool nan = std::isnan(a) || std::isnan(b);
        return (w)((a == b) | (a < b) << 1 | (a >= b) << 2 | (a != b) << 3 | (nan || a > b) << 4 | !nan << 5);
    };
}

TEST_CASE("ptxsim: comparisons of f16") {
    check_op<CompareF16>("setp.f16", compared(kF16), inputs16(kF16, 0, 2), inputs16(kF16, 1, 2));
    check_op<ComparePair>(
        "setp.f16x2",
        [](w a, w b) {
            auto less = [&](int i) { return decode16((h)(a >> i), kF16) < decode16((h)(b >> i), kF16); };
            return (w)(less(0) | less(16) << 1);
        },
        inputs16x2(kF16, 0, 2), inputs16x2(kF16, 1, 2));
}

}  // namespace
