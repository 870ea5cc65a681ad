// ptxsim: f32 and f64 instructions against the host's IEEE arithmetic in every rounding mode, and the
// approximate ones against the errors that the PTX ISA states.
#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;

namespace {

// --------------------------------------------------------------------------------- IEEE, with rounding

#define OPS_OF_MODE(N, T, c, m, t)                                              \
    ASM2(Add##N, T, "=" c, T, c, T, c, "add." m "." t " %0, %1, %2;")           \
    ASM2(Sub##N, T, "=" c, T, c, T, c, "sub." m "." t " %0, %1, %2;")           \
    ASM2(Mul##N, T, "=" c, T, c, T, c, "mul." m "." t " %0, %1, %2;")           \
    ASM3(Fma##N, T, "=" c, T, c, T, c, T, c, "fma." m "." t " %0, %1, %2, %3;") \
    ASM2(Div##N, T, "=" c, T, c, T, c, "div." m "." t " %0, %1, %2;")           \
    ASM1(Rcp##N, T, "=" c, T, c, "rcp." m "." t " %0, %1;")                     \
    ASM1(Sqrt##N, T, "=" c, T, c, "sqrt." m "." t " %0, %1;")
OPS_OF_MODE(RnF, float, "f", "rn", "f32")
OPS_OF_MODE(RzF, float, "f", "rz", "f32")
OPS_OF_MODE(RmF, float, "f", "rm", "f32")
OPS_OF_MODE(RpF, float, "f", "rp", "f32")
OPS_OF_MODE(RnD, double, "d", "rn", "f64")
OPS_OF_MODE(RzD, double, "d", "rz", "f64")
OPS_OF_MODE(RmD, double, "d", "rm", "f64")
OPS_OF_MODE(RpD, double, "d", "rp", "f64")

#define CHECK_MODE(N, T, mode)                                                       \
    do {                                                                             \
        const auto a = inputs<T>(0, 2), b = inputs<T>(1, 2);                         \
        const auto x = inputs<T>(0, 3), y = inputs<T>(1, 3), z = inputs<T>(2, 3);    \
        check_op<Add##N>(                                                            \
            "add " #N,                                                               \
            [](T a, T b) {                                                           \
                return rounded<T>(                                                   \
                    mode, [](T a, T b, T) { return a + b; }, a, b);                  \
            },                                                                       \
            a, b);                                                                   \
        check_op<Sub##N>(                                                            \
            "sub " #N,                                                               \
            [](T a, T b) {                                                           \
                return rounded<T>(                                                   \
                    mode, [](T a, T b, T) { return a - b; }, a, b);                  \
            },                                                                       \
            a, b);                                                                   \
        check_op<Mul##N>(                                                            \
            "mul " #N,                                                               \
            [](T a, T b) {                                                           \
                return rounded<T>(                                                   \
                    mode, [](T a, T b, T) { return a * b; }, a, b);                  \
            },                                                                       \
            a, b);                                                                   \
        check_op<Fma##N>(                                                            \
            "fma " #N,                                                               \
            [](T a, T b, T c) {                                                      \
                return rounded<T>(                                                   \
                    mode, [](T a, T b, T c) { return std::fma(a, b, c); }, a, b, c); \
            },                                                                       \
            x, y, z);                                                                \
        check_op<Div##N>(                                                            \
            "div " #N,                                                               \
            [](T a, T b) {                                                           \
                return rounded<T>(                                                   \
                    mode, [](T a, T b, T) { return a / b; }, a, b);                  \
            },                                                                       \
            a, b);                                                                   \
        check_op<Rcp##N>(                                                            \
            "rcp " #N,                                                               \
            [](T a) {                                                                \
                return rounded<T>(                                                   \
                    mode, [](T a, T, T) { return 1 / a; }, a);                       \
            },                                                                       \
            a);                                                                      \
        check_op<Sqrt##N>(                                                           \
            "sqrt " #N,                                                              \
            [](T a) {                                                                \
                return rounded<T>(                                                   \
                    mode, [](T a, T, T) { return std::sqrt(a); }, a);                \
            },                                                                       \
            a);                                                                      \
    } while (0)

TEST_CASE("ptxsim: f32 arithmetic in every rounding mode") {
    CHECK_MODE(RnF, float, Round::nearest);
    CHECK_MODE(RzF, float, Round::zero);
    CHECK_MODE(RmF, float, Round::down);
    CHECK_MODE(RpF, float, Round::up);
}
TEST_CASE("ptxsim: f64 arithmetic in every rounding mode") {
    CHECK_MODE(RnD, double, Round::nearest);
    CHECK_MODE(RzD, double, Round::zero);
    CHECK_MODE(RmD, double, Round::down);
    CHECK_MODE(RpD, double, Round::up);
}

// ---------------------------------------------------------------------------------------- .ftz and .sat

ASM2(AddFtz, float, "=f", float, "f", float, "f", "add.ftz.f32 %0, %1, %2;")
ASM2(SubFtz, float, "=f", float, "f", float, "f", "sub.ftz.f32 %0, %1, %2;")
ASM2(MulFtz, float, "=f", float, "f", float, "f", "mul.ftz.f32 %0, %1, %2;")
ASM3(FmaFtz, float, "=f", float, "f", float, "f", float, "f", "fma.rn.ftz.f32 %0, %1, %2, %3;")
ASM2(DivFtz, float, "=f", float, "f", float, "f", "div.rn.ftz.f32 %0, %1, %2;")
ASM2(MinFtz, float, "=f", float, "f", float, "f", "min.ftz.f32 %0, %1, %2;")
ASM2(MaxFtz, float, "=f", float, "f", float, "f", "max.ftz.f32 %0, %1, %2;")
ASM1(AbsFtz, float, "=f", float, "f", "abs.ftz.f32 %0, %1;")
ASM1(NegFtz, float, "=f", float, "f", "neg.ftz.f32 %0, %1;")
ASM2(AddSat, float, "=f", float, "f", float, "f", "add.sat.f32 %0, %1, %2;")
ASM2(SubSat, float, "=f", float, "f", float, "f", "sub.sat.f32 %0, %1, %2;")
ASM2(MulSat, float, "=f", float, "f", float, "f", "mul.sat.f32 %0, %1, %2;")
ASM3(FmaSat, float, "=f", float, "f", float, "f", float, "f", "fma.rn.sat.f32 %0, %1, %2, %3;")
ASM3(FmaFtzSat, float, "=f", float, "f", float, "f", float, "f", "fma.rn.ftz.sat.f32 %0, %1, %2, %3;")

float flushed(float x) {
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}
float clamped(float x) {
    return std::isnan(x) ? 0 : x <= 0 ? 0 : x >= 1 ? 1 : x;
}
// Either answer is right for a result that rounds up to the least normal number: flushed or not.
bool same_flushed(float got, float expected) {
    return same(got, expected) || (std::abs(expected) == std::numeric_limits<float>::min() && got == 0 &&
                                   std::signbit(got) == std::signbit(expected));
}
float pick(float a, float b, bool less) {  // min or max of the ISA: -0 < +0, and a number wins over a NaN
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) == less ? a : b;
    return (a < b) == less ? a : b;
}

TEST_CASE("ptxsim: f32 with .ftz and .sat") {
    const auto a = inputs<float>(0, 2), b = inputs<float>(1, 2);
    const auto x = inputs<float>(0, 3), y = inputs<float>(1, 3), z = inputs<float>(2, 3);
    auto f = flushed;
    check_op_by<AddFtz>(
        "add.ftz", same_flushed, [=](float a, float b) { return f(f(a) + f(b)); }, a, b);
    check_op_by<SubFtz>(
        "sub.ftz", same_flushed, [=](float a, float b) { return f(f(a) - f(b)); }, a, b);
    check_op_by<MulFtz>(
        "mul.ftz", same_flushed, [=](float a, float b) { return f(f(a) * f(b)); }, a, b);
    check_op_by<DivFtz>(
        "div.rn.ftz", same_flushed, [=](float a, float b) { return f(f(a) / f(b)); }, a, b);
    check_op_by<FmaFtz>(
        "fma.rn.ftz", same_flushed, [=](float a, float b, float c) { return f(std::fma(f(a), f(b), f(c))); },
        x, y, z);
    check_op<MinFtz>(
        "min.ftz", [=](float a, float b) { return pick(f(a), f(b), true); }, a, b);
    check_op<MaxFtz>(
        "max.ftz", [=](float a, float b) { return pick(f(a), f(b), false); }, a, b);
    check_op<AbsFtz>(
        "abs.ftz", [=](float a) { return std::abs(f(a)); }, a);
    check_op<NegFtz>(
        "neg.ftz", [=](float a) { return -f(a); }, a);
    auto equal = [](float a, float b) { return a == b; };  // either sign of zero is right
    check_op_by<AddSat>(
        "add.sat", equal, [](float a, float b) { return clamped(a + b); }, a, b);
    check_op_by<SubSat>(
        "sub.sat", equal, [](float a, float b) { return clamped(a - b); }, a, b);
    check_op_by<MulSat>(
        "mul.sat", equal, [](float a, float b) { return clamped(a * b); }, a, b);
    check_op_by<FmaSat>(
        "fma.sat", equal, [](float a, float b, float c) { return clamped(std::fma(a, b, c)); }, x, y, z);
    auto equal_or_flushed = [](float got, float expected) {
        return got == expected || (got == 0 && expected == std::numeric_limits<float>::min());
    };
    check_op_by<FmaFtzSat>(
        "fma.ftz.sat", equal_or_flushed,
        [=](float a, float b, float c) { return clamped(f(std::fma(f(a), f(b), f(c)))); }, x, y, z);
}

// ------------------------------------------------------------------------- minimum, signs, comparisons

ASM2(MinF, float, "=f", float, "f", float, "f", "min.f32 %0, %1, %2;")
ASM2(MaxF, float, "=f", float, "f", float, "f", "max.f32 %0, %1, %2;")
ASM2(MinNanF, float, "=f", float, "f", float, "f", "min.NaN.f32 %0, %1, %2;")
ASM2(MaxNanF, float, "=f", float, "f", float, "f", "max.NaN.f32 %0, %1, %2;")
ASM2(MinD, double, "=d", double, "d", double, "d", "min.f64 %0, %1, %2;")
ASM2(MaxD, double, "=d", double, "d", double, "d", "max.f64 %0, %1, %2;")
ASM1(AbsF, float, "=f", float, "f", "abs.f32 %0, %1;")
ASM1(NegF, float, "=f", float, "f", "neg.f32 %0, %1;")
ASM1(AbsD, double, "=d", double, "d", "abs.f64 %0, %1;")
ASM1(NegD, double, "=d", double, "d", "neg.f64 %0, %1;")
ASM2(CopysignF, float, "=f", float, "f", float, "f", "copysign.f32 %0, %1, %2;")
ASM2(CopysignD, double, "=d", double, "d", double, "d", "copysign.f64 %0, %1, %2;")

#define TEST_PROPERTY(bit, property, t, c)                                                     \
    asm volatile("{\n\t.reg .pred p;\n\ttestp." property "." t " p, %1;\n\tselp.u32 %0, " #bit \
                 ", 0, p;\n\t}"                                                                \
                 : "=r"(one)                                                                   \
                 : c(a));                                                                      \
    r |= one;
#define PROPERTIES(name, T, t, c)                \
    struct name {                                \
        __device__ static uint32_t at(T a) {     \
            uint32_t r = 0, one;                 \
            TEST_PROPERTY(1, "finite", t, c)     \
            TEST_PROPERTY(2, "infinite", t, c)   \
            TEST_PROPERTY(4, "number", t, c)     \
            TEST_PROPERTY(8, "notanumber", t, c) \
            TEST_PROPERTY(16, "normal", t, c)    \
            TEST_PROPERTY(32, "subnormal", t, c) \
            return r;                            \
        }                                        \
    };
PROPERTIES(PropertiesF, float, "f32", "f")
PROPERTIES(PropertiesD, double, "f64", "d")

template <class T>
uint32_t properties(T x) {
    return std::isfinite(x) | std::isinf(x) << 1 | !std::isnan(x) << 2 | std::isnan(x) << 3 |
           std::isnormal(x) << 4 | (std::fpclassify(x) == FP_SUBNORMAL) << 5;
}

#define COMPARE(bit, op, t, c)                                                                             \
    asm volatile("{\n\t.reg .pred p;\n\tsetp." op "." t " p, %1, %2;\n\tselp.u32 %0, " #bit ", 0, p;\n\t}" \
                 : "=r"(one)                                                                               \
                 : c(a), c(b));                                                                            \
    r |= one;
#define COMPARISONS(name, T, t, c)                \
    struct name {                                 \
        __device__ static uint32_t at(T a, T b) { \
            uint32_t r = 0, one;                  \
            COMPARE(1, "eq", t, c)                \
            COMPARE(2, "ne", t, c)                \
            COMPARE(4, "lt", t, c)                \
            COMPARE(8, "le", t, c)                \
            COMPARE(16, "gt", t, c)               \
            COMPARE(32, "ge", t, c)               \
            COMPARE(64, "equ", t, c)              \
            COMPARE(128, "neu", t, c)             \
            COMPARE(256, "ltu", t, c)             \
            COMPARE(512, "leu", t, c)             \
            COMPARE(1024, "gtu", t, c)            \
            COMPARE(2048, "geu", t, c)            \
            COMPARE(4096, "num", t, c)            \
            COMPARE(8192, "nan", t, c)            \
            return r;                             \
        }                                         \
    };
COMPARISONS(CompareF, float, "f32", "f")
COMPARISONS(CompareD, double, "f64", "d")
COMPARISONS(CompareFtz, float, "ftz.f32", "f")

template <class T>
uint32_t compared(T a, T b) {
    const bool nan = std::isnan(a) || std::isnan(b);
    const uint32_t ordered[] = {a == b, !nan && a != b, a<b, a <= b, a> b, a >= b};
    uint32_t r = !nan << 12 | nan << 13;
    for (int i = 0; i < 6; i++) r |= ordered[i] << i | (ordered[i] | nan) << (6 + i);
    return r;
}
double pick_double(double a, double b, bool less) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) == less ? a : b;
    return (a < b) == less ? a : b;
}

TEST_CASE("ptxsim: minimum, maximum, signs and comparisons of floats") {
    auto a = inputs<float>(0, 2), b = inputs<float>(1, 2);
    auto c = inputs<double>(0, 2), d = inputs<double>(1, 2);
    for (size_t i = 0; i < a.size(); i += 7) b[i] = a[i], d[i] = c[i];
    auto with_nan = [](bool less) {
        return [less](float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : pick(a, b, less); };
    };
    check_op<MinF>(
        "min.f32", [](float a, float b) { return pick(a, b, true); }, a, b);
    check_op<MaxF>(
        "max.f32", [](float a, float b) { return pick(a, b, false); }, a, b);
    check_op<MinNanF>("min.NaN.f32", with_nan(true), a, b);
    check_op<MaxNanF>("max.NaN.f32", with_nan(false), a, b);
    check_op<MinD>(
        "min.f64", [](double a, double b) { return pick_double(a, b, true); }, c, d);
    check_op<MaxD>(
        "max.f64", [](double a, double b) { return pick_double(a, b, false); }, c, d);
    check_op<AbsF>(
        "abs.f32", [](float a) { return std::abs(a); }, a);
    check_op<NegF>(
        "neg.f32", [](float a) { return -a; }, a);
    check_op<AbsD>(
        "abs.f64", [](double a) { return std::abs(a); }, c);
    check_op<NegD>(
        "neg.f64", [](double a) { return -a; }, c);
    check_op<CopysignF>(
        "copysign.f32", [](float a, float b) { return std::copysign(b, a); }, a, b);
    check_op<CopysignD>(
        "copysign.f64", [](double a, double b) { return std::copysign(b, a); }, c, d);
    check_op<PropertiesF>("testp.f32", properties<float>, a);
    check_op<PropertiesD>("testp.f64", properties<double>, c);
    check_op<CompareF>("setp.f32", compared<float>, a, b);
    check_op<CompareD>("setp.f64", compared<double>, c, d);
    check_op<CompareFtz>(
        "setp.ftz.f32", [](float a, float b) { return compared(flushed(a), flushed(b)); }, a, b);
}

// -------------------------------------------------------------------------------------- approximations

ASM1(Ex2, float, "=f", float, "f", "ex2.approx.f32 %0, %1;")
ASM1(Ex2Ftz, float, "=f", float, "f", "ex2.approx.ftz.f32 %0, %1;")
ASM1(Lg2, float, "=f", float, "f", "lg2.approx.f32 %0, %1;")
ASM1(Rcp, float, "=f", float, "f", "rcp.approx.f32 %0, %1;")
ASM1(RcpFtz, float, "=f", float, "f", "rcp.approx.ftz.f32 %0, %1;")
ASM1(Rsqrt, float, "=f", float, "f", "rsqrt.approx.f32 %0, %1;")
ASM1(RsqrtFtz, float, "=f", float, "f", "rsqrt.approx.ftz.f32 %0, %1;")
ASM1(Sqrt, float, "=f", float, "f", "sqrt.approx.f32 %0, %1;")
ASM1(Sin, float, "=f", float, "f", "sin.approx.f32 %0, %1;")
ASM1(Cos, float, "=f", float, "f", "cos.approx.f32 %0, %1;")
ASM1(Tanh, float, "=f", float, "f", "tanh.approx.f32 %0, %1;")
ASM2(DivApprox, float, "=f", float, "f", float, "f", "div.approx.f32 %0, %1, %2;")
ASM2(DivFull, float, "=f", float, "f", float, "f", "div.full.f32 %0, %1, %2;")

// Checks results against exact values in double, within a relative and an absolute error. Infinities and NaN
// must be equal. The result of the operation is a float, so the exact value goes to the comparison as two
// floats.
template <class Op, int operands = 1>
void check_near(const char* name, double (*exact)(double, double), double relative, double absolute,
                const std::vector<float>& a, const std::vector<float>& b, bool (*in_range)(float, float)) {
    std::vector<float> got;
    if constexpr (operands == 2)
        got = on_device<Op, float>(a, b);
    else
        got = on_device<Op, float>(a);
    int wrong = 0;
    std::string first;
    for (size_t i = 0; i < a.size(); i++) {
        if (!in_range(a[i], b[i])) continue;
        const double y = exact(a[i], b[i]);
        bool good;
        if (std::isnan(y))
            good = std::isnan(got[i]);
        else if (std::isinf(y))
            good = got[i] == y;
        else if (y == 0)
            good = std::abs(got[i]) <= absolute && (got[i] != 0 || std::signbit(got[i]) == std::signbit(y));
        else if (std::abs(y) > std::numeric_limits<float>::max() * (1 - relative))
            good = std::abs(got[i]) >= std::numeric_limits<float>::max() * (1 - 2 * relative) &&
                   std::signbit(got[i]) == std::signbit(y);
        else
            good = std::abs(got[i] - y) <= relative * std::abs(y) + absolute;
        if (!good && wrong++ == 0)
            first = shown(a[i]) + " " + shown(b[i]) + " gives " + shown(got[i]) + ", not " + shown(y);
    }
    CHECK_MESSAGE(wrong == 0, name << ": " << wrong << " wrong, first " << first);
}
bool always(float, float) {
    return true;
}

TEST_CASE("ptxsim: approximate functions are within the stated errors") {
    auto a = inputs<float>(0, 2, 20000), b = inputs<float>(1, 2, 20000);
    for (size_t i = 5000; i < a.size(); i += 2)
        a[i] = (float)((int)(i % 6000) - 3000) / 19;  // where the functions are curved
    const double least = std::numeric_limits<float>::denorm_min(), normal = std::numeric_limits<float>::min();
    check_near<Ex2>(
        "ex2.approx", [](double x, double) { return std::exp2(x); }, 0x1p-22, 2 * least, a, b, always);
    check_near<Ex2Ftz>(
        "ex2.approx.ftz", [](double x, double) { return std::exp2(x); }, 0x1p-22, normal, a, b, always);
    check_near<Lg2>(
        "lg2.approx near 1", [](double x, double) { return std::log2(x); }, 0, 0x1p-22, a, b,
        [](float x, float) { return x > 0.5f && x < 2; });
    check_near<Lg2>(
        "lg2.approx", [](double x, double) { return x < 0 ? NAN : std::log2(x); }, 0x1p-22, 0, a, b,
        [](float x, float) { return !(x > 0.5f && x < 2); });
    check_near<Rcp>(
        "rcp.approx", [](double x, double) { return 1 / x; }, 0x1p-22, least, a, b, always);
    check_near<RcpFtz>(
        "rcp.approx.ftz", [](double x, double) { return 1 / x; }, 0x1p-22, normal, a, b,
        [](float x, float) { return std::fpclassify(x) != FP_SUBNORMAL; });
    check_near<Rsqrt>(
        "rsqrt.approx", [](double x, double) { return x < 0 ? NAN : 1 / std::sqrt(x); }, 0x1p-22, 0, a, b,
        always);
    check_near<RsqrtFtz>(
        "rsqrt.approx.ftz", [](double x, double) { return x < 0 ? NAN : 1 / std::sqrt(x); }, 0x1p-22, 0, a, b,
        [](float x, float) { return std::fpclassify(x) != FP_SUBNORMAL; });
    check_near<Sqrt>(
        "sqrt.approx", [](double x, double) { return std::sqrt(x); }, 0x1p-22, least, a, b, always);
    const auto tau = [](float x, float) { return std::abs(x) <= 6.28318f || std::isinf(x) || std::isnan(x); };
    check_near<Sin>(
        "sin.approx", [](double x, double) { return std::sin(x); }, 0, 0x1p-20, a, b, tau);
    check_near<Cos>(
        "cos.approx", [](double x, double) { return std::cos(x); }, 0, 0x1p-20, a, b, tau);
    check_near<Tanh>(
        "tanh.approx", [](double x, double) { return std::tanh(x); }, 0x1p-10, 0, a, b, always);
    const auto moderate = [](float, float y) {  // for larger divisors the result may be 0
        return !std::isfinite(y) || y == 0 || (std::abs(y) >= 0x1p-126f && std::abs(y) <= 0x1p126f);
    };
    check_near<DivApprox, 2>(
        "div.approx", [](double x, double y) { return x / y; }, 0x1p-21, 2 * least, a, b, moderate);
    check_near<DivFull, 2>(
        "div.full", [](double x, double y) { return x / y; }, 0x1p-21, 2 * least, a, b, moderate);
}

// ------------------------------------------------------------------------- what CUDA's headers make of it

struct Functions {
    __device__ static float at(float x, int which) {
        switch (which) {
            case 0:
                return expf(x);
            case 1:
                return logf(fabsf(x));
            case 2:
                return tanhf(x);
            case 3:
                return erff(x);
            case 4:
                return sinf(x);
            case 5:
                return cosf(x);
            case 6:
                return powf(fabsf(x), 1.7f);
            case 7:
                return rsqrtf(fabsf(x));
            case 8:
                return log1pf(fabsf(x));
            case 9:
                return (float)exp((double)x);
            case 10:
                return (float)log(fabs((double)x));
            case 11:
                return (float)sin((double)x);
            case 12:
                return (float)pow(fabs((double)x), 0.3);
            case 13:
                return rintf(x) + truncf(x) / 2;
            case 14:
                return (float)sqrt(fabs((double)x)) + fmodf(x, 3);
            case 15:
                return (float)tanh((double)x);
            default:
                return floorf(x) - ceilf(x);
        }
    }
};
double function(double x, int which) {
    switch (which) {
        case 0:
        case 9:
            return std::exp(x);
        case 1:
        case 10:
            return std::log(std::abs(x));
        case 2:
        case 15:
            return std::tanh(x);
        case 3:
            return std::erf(x);
        case 4:
        case 11:
            return std::sin(x);
        case 5:
            return std::cos(x);
        case 6:
            return std::pow(std::abs(x), (double)1.7f);
        case 7:
            return 1 / std::sqrt(std::abs(x));
        case 8:
            return std::log1p(std::abs(x));
        case 12:
            return std::pow(std::abs(x), 0.3);
        case 13:
            return std::nearbyint(x) + std::trunc(x) / 2;
        case 14:
            return (float)std::sqrt(std::abs(x)) + (float)std::fmod(x, 3);
        default:
            return std::floor(x) - std::ceil(x);
    }
}

TEST_CASE("ptxsim: mathematical functions of CUDA's headers, a switch at a time") {
    std::vector<float> x;
    std::vector<int> which;
    std::mt19937 random(3);
    for (int i = 0; i < 17 * 600; i++) {
        const int scale = (int)(random() % 40) - 20;  // large arguments make sinf take its slow reduction
        x.push_back(std::ldexp((float)(random() % 2000) - 1000 + 0.3f, scale - 9));
        which.push_back(i % 17);
    }
    const auto got = on_device<Functions, float>(x, which);
    int wrong = 0;
    std::string first;
    for (size_t i = 0; i < x.size(); i++) {
        const double y = function(x[i], which[i]);
        const bool good =
            std::abs(y) > 3e38 ? std::abs(got[i]) > 3e38 : std::abs(got[i] - y) <= 1e-6 * std::abs(y) + 1e-40;
        if (!good && wrong++ == 0)
            first = std::to_string(which[i]) + " of " + shown(x[i]) + " gives " + shown(got[i]) + ", not " +
                    shown(y);
    }
    CHECK_MESSAGE(wrong == 0, wrong << " wrong, first " << first);
}

}  // namespace
