// ptxsim: integer comparisons, selections and narrow types against plain C++ written from the PTX ISA.
#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;

namespace {

// -------------------------------------------------------------------------------------------- comparisons

// Each comparison sets one bit.
#define COMPARE(bit, op, type, c)                                                              \
    asm volatile("{\n\t.reg .pred p;\n\tsetp." op "." type " p, %1, %2;\n\tselp.u32 %0, " #bit \
                 ", 0, p;\n\t}"                                                                \
                 : "=r"(one)                                                                   \
                 : c(a), c(b));                                                                \
    r |= one;
#define COMPARISONS(name, T, s, c)                \
    struct name {                                 \
        __device__ static uint32_t at(T a, T b) { \
            uint32_t r = 0, one;                  \
            COMPARE(1, "eq", s, c)                \
            COMPARE(2, "ne", s, c)                \
            COMPARE(4, "lt", s, c)                \
            COMPARE(8, "le", s, c)                \
            COMPARE(16, "gt", s, c)               \
            COMPARE(32, "ge", s, c)               \
            return r;                             \
        }                                         \
    };
COMPARISONS(CompareS16, int16_t, "s16", "h")
COMPARISONS(CompareU16, uint16_t, "u16", "h")
COMPARISONS(CompareS32, int32_t, "s32", "r")
COMPARISONS(CompareU32, uint32_t, "u32", "r")
COMPARISONS(CompareS64, int64_t, "s64", "l")
COMPARISONS(CompareU64, uint64_t, "u64", "l")

struct CompareNamed {  // lo, ls, hi, hs; and both outputs of setp, combined with a predicate
    __device__ static uint32_t at(uint32_t a, uint32_t b) {
        uint32_t r = 0, one;
        COMPARE(1, "lo", "u32", "r")
        COMPARE(2, "ls", "u32", "r")
        COMPARE(4, "hi", "u32", "r")
        COMPARE(8, "hs", "u32", "r")
        asm volatile(
            "{\n\t.reg .pred odd, p, q;\n\t.reg .u32 x, y;\n\tand.b32 x, %1, 1;\n\tsetp.ne.u32 odd, x, 0;\n\t"
            "setp.lt.and.u32 p|q, %1, %2, odd;\n\tselp.u32 x, 16, 0, p;\n\tselp.u32 y, 32, 0, q;\n\t"
            "add.u32 %0, x, y;\n\t"
            "setp.lt.xor.u32 p|q, %1, %2, !odd;\n\tselp.u32 x, 64, 0, p;\n\tselp.u32 y, 128, 0, q;\n\t"
            "add.u32 %0, %0, x;\n\tadd.u32 %0, %0, y;\n\t"
            "setp.eq.or.u32 p, %1, %2, odd;\n\tnot.pred q, p;\n\tselp.u32 x, 256, 0, q;\n\tadd.u32 %0, %0, "
            "x;\n\t}"
            : "=&r"(one)
            : "r"(a), "r"(b));
        return r | one;
    }
};
ASM3(Slct, uint32_t, "=r", uint32_t, "r", uint32_t, "r", int32_t, "r", "slct.u32.s32 %0, %1, %2, %3;")
ASM3(SlctF, uint64_t, "=l", uint64_t, "l", uint64_t, "l", float, "f", "slct.b64.f32 %0, %1, %2, %3;")
ASM2(SetU32, uint32_t, "=r", int32_t, "r", int32_t, "r", "set.lt.u32.s32 %0, %1, %2;")
ASM2(SetF32, float, "=f", int32_t, "r", int32_t, "r", "set.ge.f32.s32 %0, %1, %2;")

template <class T>
uint32_t compared(T a, T b) {
    return (a == b) | (a != b) << 1 | (a < b) << 2 | (a <= b) << 3 | (a > b) << 4 | (a >= b) << 5;
}
template <class Op, class T>
void check_comparisons(const char* name) {
    auto a = inputs<T>(0, 2), b = inputs<T>(1, 2);
    for (size_t i = 0; i < a.size(); i += 9) b[i] = a[i];
    check_op<Op>(name, compared<T>, a, b);
}

TEST_CASE("ptxsim: integer comparisons and selections") {
    check_comparisons<CompareS16, int16_t>("setp.s16");
    check_comparisons<CompareU16, uint16_t>("setp.u16");
    check_comparisons<CompareS32, int32_t>("setp.s32");
    check_comparisons<CompareU32, uint32_t>("setp.u32");
    check_comparisons<CompareS64, int64_t>("setp.s64");
    check_comparisons<CompareU64, uint64_t>("setp.u64");
    const auto a = inputs<uint32_t>(0, 2), b = inputs<uint32_t>(1, 2);
    const auto s = inputs<int32_t>(0, 2), t = inputs<int32_t>(1, 2);
    check_op<CompareNamed>(
        "setp with names",
        [](uint32_t a, uint32_t b) {
            const uint32_t odd = a & 1, less = a < b;
            return less | (a <= b) << 1 | (a > b) << 2 | (a >= b) << 3 | (less & odd) << 4 |
                   ((less ^ 1) & odd) << 5 | (less ^ odd ^ 1) << 6 | (less ^ odd) << 7 |
                   (a != b && !odd) << 8;
        },
        a, b);
    check_op<Slct>(
        "slct.u32.s32", [](uint32_t a, uint32_t b, int32_t c) { return c >= 0 ? a : b; }, a, b, s);
    check_op<SlctF>(
        "slct.b64.f32", [](uint64_t a, uint64_t b, float c) { return c >= 0 ? a : b; },
        inputs<uint64_t>(0, 3), inputs<uint64_t>(1, 3), inputs<float>(2, 3));
    check_op<SetU32>(
        "set.lt.u32.s32", [](int32_t a, int32_t b) { return a < b ? ~0u : 0u; }, s, t);
    check_op<SetF32>(
        "set.ge.f32.s32", [](int32_t a, int32_t b) { return a >= b ? 1.0f : 0.0f; }, s, t);
}

// Narrow types, which nvcc compiles to wider instructions.
struct Bytes {
    __device__ static int at(int8_t a, uint8_t b, int16_t c) {
        int8_t x = (int8_t)(a + b);
        uint8_t y = (uint8_t)(b >> (a & 7));
        x = x > a ? (int8_t)(x * 3) : (int8_t)~x;
        return x * 1000 + y + (int16_t)(c * a) + (uint8_t)(c / 3) + (a < c) + (int8_t)(b << 1);
    }
    static int host(int8_t a, uint8_t b, int16_t c) {
        int8_t x = (int8_t)(a + b);
        uint8_t y = (uint8_t)(b >> (a & 7));
        x = x > a ? (int8_t)(x * 3) : (int8_t)~x;
        return x * 1000 + y + (int16_t)(c * a) + (uint8_t)(c / 3) + (a < c) + (int8_t)(b << 1);
    }
};

TEST_CASE("ptxsim: arithmetic of bytes and shorts as nvcc compiles it") {
    check_op<Bytes>("bytes", Bytes::host, inputs<int8_t>(0, 3), inputs<uint8_t>(1, 3), inputs<int16_t>(2, 3));
}

}  // namespace
