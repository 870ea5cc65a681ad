// ptxsim: integer instructions against plain C++ written from the PTX ISA.
#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;
using u128 = unsigned __int128;
using s128 = __int128;

namespace {

// ---------------------------------------------------------------------------------------- every width

#define OPS_OF_WIDTH(W, S, U, c)                                                  \
    ASM2(Add##W, U, "=" c, U, c, U, c, "add.u" #W " %0, %1, %2;")                 \
    ASM2(AddS##W, S, "=" c, S, c, S, c, "add.s" #W " %0, %1, %2;")                \
    ASM2(Sub##W, U, "=" c, U, c, U, c, "sub.u" #W " %0, %1, %2;")                 \
    ASM2(SubS##W, S, "=" c, S, c, S, c, "sub.s" #W " %0, %1, %2;")                \
    ASM2(MulLo##W, U, "=" c, U, c, U, c, "mul.lo.u" #W " %0, %1, %2;")            \
    ASM2(MulLoS##W, S, "=" c, S, c, S, c, "mul.lo.s" #W " %0, %1, %2;")           \
    ASM2(MulHi##W, U, "=" c, U, c, U, c, "mul.hi.u" #W " %0, %1, %2;")            \
    ASM2(MulHiS##W, S, "=" c, S, c, S, c, "mul.hi.s" #W " %0, %1, %2;")           \
    ASM3(MadLo##W, U, "=" c, U, c, U, c, U, c, "mad.lo.u" #W " %0, %1, %2, %3;")  \
    ASM3(MadHi##W, U, "=" c, U, c, U, c, U, c, "mad.hi.u" #W " %0, %1, %2, %3;")  \
    ASM3(MadHiS##W, S, "=" c, S, c, S, c, S, c, "mad.hi.s" #W " %0, %1, %2, %3;") \
    ASM3(Sad##W, U, "=" c, U, c, U, c, U, c, "sad.u" #W " %0, %1, %2, %3;")       \
    ASM3(SadS##W, S, "=" c, S, c, S, c, S, c, "sad.s" #W " %0, %1, %2, %3;")      \
    ASM2(Div##W, U, "=" c, U, c, U, c, "div.u" #W " %0, %1, %2;")                 \
    ASM2(DivS##W, S, "=" c, S, c, S, c, "div.s" #W " %0, %1, %2;")                \
    ASM2(Rem##W, U, "=" c, U, c, U, c, "rem.u" #W " %0, %1, %2;")                 \
    ASM2(RemS##W, S, "=" c, S, c, S, c, "rem.s" #W " %0, %1, %2;")                \
    ASM2(Min##W, U, "=" c, U, c, U, c, "min.u" #W " %0, %1, %2;")                 \
    ASM2(MinS##W, S, "=" c, S, c, S, c, "min.s" #W " %0, %1, %2;")                \
    ASM2(Max##W, U, "=" c, U, c, U, c, "max.u" #W " %0, %1, %2;")                 \
    ASM2(MaxS##W, S, "=" c, S, c, S, c, "max.s" #W " %0, %1, %2;")                \
    ASM1(AbsS##W, S, "=" c, S, c, "abs.s" #W " %0, %1;")                          \
    ASM1(NegS##W, S, "=" c, S, c, "neg.s" #W " %0, %1;")                          \
    ASM2(And##W, U, "=" c, U, c, U, c, "and.b" #W " %0, %1, %2;")                 \
    ASM2(Or##W, U, "=" c, U, c, U, c, "or.b" #W " %0, %1, %2;")                   \
    ASM2(Xor##W, U, "=" c, U, c, U, c, "xor.b" #W " %0, %1, %2;")                 \
    ASM1(Not##W, U, "=" c, U, c, "not.b" #W " %0, %1;")                           \
    ASM1(Cnot##W, U, "=" c, U, c, "cnot.b" #W " %0, %1;")                         \
    ASM2(Shl##W, U, "=" c, U, c, uint32_t, "r", "shl.b" #W " %0, %1, %2;")        \
    ASM2(Shr##W, U, "=" c, U, c, uint32_t, "r", "shr.u" #W " %0, %1, %2;")        \
    ASM2(ShrS##W, S, "=" c, S, c, uint32_t, "r", "shr.s" #W " %0, %1, %2;")

OPS_OF_WIDTH(16, int16_t, uint16_t, "h")
OPS_OF_WIDTH(32, int32_t, uint32_t, "r")
OPS_OF_WIDTH(64, int64_t, uint64_t, "l")

template <class T>
T shifted_right(T x, uint32_t n) {
    constexpr uint32_t width = 8 * sizeof(T);
    return (T)((s128)x >> std::min(n, width));
}

#define CHECK_WIDTH(W, S, U)                                                                              \
    do {                                                                                                  \
        const auto u0 = inputs<U>(0, 2), u1 = inputs<U>(1, 2);                                            \
        const auto s0 = inputs<S>(0, 2), s1 = inputs<S>(1, 2);                                            \
        const auto v0 = inputs<U>(0, 3), v1 = inputs<U>(1, 3), v2 = inputs<U>(2, 3);                      \
        const auto t0 = inputs<S>(0, 3), t1 = inputs<S>(1, 3), t2 = inputs<S>(2, 3);                      \
        check_op<Add##W>(                                                                                 \
            "add.u" #W, [](U a, U b) { return (U)((u128)a + b); }, u0, u1);                               \
        check_op<AddS##W>(                                                                                \
            "add.s" #W, [](S a, S b) { return (S)((s128)a + b); }, s0, s1);                               \
        check_op<Sub##W>(                                                                                 \
            "sub.u" #W, [](U a, U b) { return (U)((u128)a - b); }, u0, u1);                               \
        check_op<SubS##W>(                                                                                \
            "sub.s" #W, [](S a, S b) { return (S)((s128)a - b); }, s0, s1);                               \
        check_op<MulLo##W>(                                                                               \
            "mul.lo.u" #W, [](U a, U b) { return (U)((u128)a * b); }, u0, u1);                            \
        check_op<MulLoS##W>(                                                                              \
            "mul.lo.s" #W, [](S a, S b) { return (S)((s128)a * b); }, s0, s1);                            \
        check_op<MulHi##W>(                                                                               \
            "mul.hi.u" #W, [](U a, U b) { return (U)((u128)a * b >> W); }, u0, u1);                       \
        check_op<MulHiS##W>(                                                                              \
            "mul.hi.s" #W, [](S a, S b) { return (S)((s128)a * b >> W); }, s0, s1);                       \
        check_op<MadLo##W>(                                                                               \
            "mad.lo.u" #W, [](U a, U b, U c) { return (U)((u128)a * b + c); }, v0, v1, v2);               \
        check_op<MadHi##W>(                                                                               \
            "mad.hi.u" #W, [](U a, U b, U c) { return (U)(((u128)a * b >> W) + c); }, v0, v1, v2);        \
        check_op<MadHiS##W>(                                                                              \
            "mad.hi.s" #W, [](S a, S b, S c) { return (S)(((s128)a * b >> W) + c); }, t0, t1, t2);        \
        check_op<Sad##W>(                                                                                 \
            "sad.u" #W, [](U a, U b, U c) { return (U)(c + (a > b ? a - b : b - a)); }, v0, v1, v2);      \
        check_op<SadS##W>(                                                                                \
            "sad.s" #W,                                                                                   \
            [](S a, S b, S c) {                                                                           \
                const s128 d = (s128)a - b;                                                               \
                return (S)(c + (d < 0 ? -d : d));                                                         \
            },                                                                                            \
            t0, t1, t2);                                                                                  \
        auto d0 = u0, d1 = u1;                                                                            \
        auto e0 = s0, e1 = s1;                                                                            \
        for (U & x : d1) x += x == 0; /* division by zero, and of the least number by -1, is undefined */ \
        for (size_t i = 0; i < e1.size(); i++)                                                            \
            if (e1[i] == 0 || e1[i] == -1) e1[i] = 3;                                                     \
        check_op<Div##W>(                                                                                 \
            "div.u" #W, [](U a, U b) { return (U)(a / b); }, d0, d1);                                     \
        check_op<DivS##W>(                                                                                \
            "div.s" #W, [](S a, S b) { return (S)(a / b); }, e0, e1);                                     \
        check_op<Rem##W>(                                                                                 \
            "rem.u" #W, [](U a, U b) { return (U)(a % b); }, d0, d1);                                     \
        check_op<RemS##W>(                                                                                \
            "rem.s" #W, [](S a, S b) { return (S)(a % b); }, e0, e1);                                     \
        check_op<Min##W>(                                                                                 \
            "min.u" #W, [](U a, U b) { return a < b ? a : b; }, u0, u1);                                  \
        check_op<MinS##W>(                                                                                \
            "min.s" #W, [](S a, S b) { return a < b ? a : b; }, s0, s1);                                  \
        check_op<Max##W>(                                                                                 \
            "max.u" #W, [](U a, U b) { return a < b ? b : a; }, u0, u1);                                  \
        check_op<MaxS##W>(                                                                                \
            "max.s" #W, [](S a, S b) { return a < b ? b : a; }, s0, s1);                                  \
        check_op<AbsS##W>(                                                                                \
            "abs.s" #W, [](S a) { return a < 0 ? (S)(0 - (U)a) : a; }, s0);                               \
        check_op<NegS##W>(                                                                                \
            "neg.s" #W, [](S a) { return (S)(0 - (U)a); }, s0);                                           \
        check_op<And##W>(                                                                                 \
            "and.b" #W, [](U a, U b) { return (U)(a & b); }, u0, u1);                                     \
        check_op<Or##W>(                                                                                  \
            "or.b" #W, [](U a, U b) { return (U)(a | b); }, u0, u1);                                      \
        check_op<Xor##W>(                                                                                 \
            "xor.b" #W, [](U a, U b) { return (U)(a ^ b); }, u0, u1);                                     \
        check_op<Not##W>(                                                                                 \
            "not.b" #W, [](U a) { return (U)~a; }, u0);                                                   \
        check_op<Cnot##W>(                                                                                \
            "cnot.b" #W, [](U a) { return (U)(a == 0); }, u0);                                            \
        const auto n = inputs<uint32_t>(1, 2);                                                            \
        check_op<Shl##W>(                                                                                 \
            "shl.b" #W, [](U a, uint32_t n) { return n < W ? (U)((u128)a << n) : (U)0; }, u0, n);         \
        check_op<Shr##W>("shr.u" #W, shifted_right<U>, u0, n);                                            \
        check_op<ShrS##W>("shr.s" #W, shifted_right<S>, s0, n);                                           \
    } while (0)

TEST_CASE("ptxsim: 16-bit integer arithmetic") {
    CHECK_WIDTH(16, int16_t, uint16_t);
}
TEST_CASE("ptxsim: 32-bit integer arithmetic") {
    CHECK_WIDTH(32, int32_t, uint32_t);
}
TEST_CASE("ptxsim: 64-bit integer arithmetic") {
    CHECK_WIDTH(64, int64_t, uint64_t);
}

// ------------------------------------------------------------------------------- products of two widths

ASM2(WideU16, uint32_t, "=r", uint16_t, "h", uint16_t, "h", "mul.wide.u16 %0, %1, %2;")
ASM2(WideS16, int32_t, "=r", int16_t, "h", int16_t, "h", "mul.wide.s16 %0, %1, %2;")
ASM2(WideU32, uint64_t, "=l", uint32_t, "r", uint32_t, "r", "mul.wide.u32 %0, %1, %2;")
ASM2(WideS32, int64_t, "=l", int32_t, "r", int32_t, "r", "mul.wide.s32 %0, %1, %2;")
ASM3(MadWideU16, uint32_t, "=r", uint16_t, "h", uint16_t, "h", uint32_t, "r", "mad.wide.u16 %0, %1, %2, %3;")
ASM3(MadWideS32, int64_t, "=l", int32_t, "r", int32_t, "r", int64_t, "l", "mad.wide.s32 %0, %1, %2, %3;")
ASM3(MadWideU32, uint64_t, "=l", uint32_t, "r", uint32_t, "r", uint64_t, "l", "mad.wide.u32 %0, %1, %2, %3;")
ASM2(Mul24LoU, uint32_t, "=r", uint32_t, "r", uint32_t, "r", "mul24.lo.u32 %0, %1, %2;")
ASM2(Mul24LoS, int32_t, "=r", int32_t, "r", int32_t, "r", "mul24.lo.s32 %0, %1, %2;")
ASM2(Mul24HiU, uint32_t, "=r", uint32_t, "r", uint32_t, "r", "mul24.hi.u32 %0, %1, %2;")
ASM2(Mul24HiS, int32_t, "=r", int32_t, "r", int32_t, "r", "mul24.hi.s32 %0, %1, %2;")
ASM3(Mad24LoS, int32_t, "=r", int32_t, "r", int32_t, "r", int32_t, "r", "mad24.lo.s32 %0, %1, %2, %3;")
ASM2(AddSat, int32_t, "=r", int32_t, "r", int32_t, "r", "add.sat.s32 %0, %1, %2;")
ASM2(SubSat, int32_t, "=r", int32_t, "r", int32_t, "r", "sub.sat.s32 %0, %1, %2;")
ASM3(MadHiSat, int32_t, "=r", int32_t, "r", int32_t, "r", int32_t, "r", "mad.hi.sat.s32 %0, %1, %2, %3;")

int64_t low24(int32_t x) {
    return (int32_t)((uint32_t)x << 8) >> 8;
}
int32_t saturated(int64_t x) {
    return (int32_t)std::min<int64_t>(std::max<int64_t>(x, INT32_MIN), INT32_MAX);
}

TEST_CASE("ptxsim: wide, 24-bit and saturating integer arithmetic") {
    const auto u0 = inputs<uint32_t>(0, 2), u1 = inputs<uint32_t>(1, 2);
    const auto s0 = inputs<int32_t>(0, 2), s1 = inputs<int32_t>(1, 2), s2 = inputs<int32_t>(2, 3);
    const auto h0 = inputs<uint16_t>(0, 2), h1 = inputs<uint16_t>(1, 2);
    const auto i0 = inputs<int16_t>(0, 2), i1 = inputs<int16_t>(1, 2);
    using i32 = int32_t;
    using u32 = uint32_t;
    check_op<WideU16>(
        "mul.wide.u16", [](uint16_t a, uint16_t b) { return (u32)a * b; }, h0, h1);
    check_op<WideS16>(
        "mul.wide.s16", [](int16_t a, int16_t b) { return (i32)a * b; }, i0, i1);
    check_op<WideU32>(
        "mul.wide.u32", [](u32 a, u32 b) { return (uint64_t)a * b; }, u0, u1);
    check_op<WideS32>(
        "mul.wide.s32", [](i32 a, i32 b) { return (int64_t)a * b; }, s0, s1);
    check_op<MadWideU16>(
        "mad.wide.u16", [](uint16_t a, uint16_t b, u32 c) { return (u32)a * b + c; }, h0, h1, u1);
    check_op<MadWideU32>(
        "mad.wide.u32", [](u32 a, u32 b, uint64_t c) { return (uint64_t)a * b + c; }, u0, u1,
        inputs<uint64_t>(2, 3));
    check_op<MadWideS32>(
        "mad.wide.s32", [](i32 a, i32 b, int64_t c) { return (int64_t)((s128)a * b + c); }, s0, s1,
        inputs<int64_t>(2, 3));
    check_op<Mul24LoU>(
        "mul24.lo.u32", [](u32 a, u32 b) { return (u32)((uint64_t)(a & 0xFFFFFF) * (b & 0xFFFFFF)); }, u0,
        u1);
    check_op<Mul24HiU>(
        "mul24.hi.u32", [](u32 a, u32 b) { return (u32)((uint64_t)(a & 0xFFFFFF) * (b & 0xFFFFFF) >> 16); },
        u0, u1);
    check_op<Mul24LoS>(
        "mul24.lo.s32", [](i32 a, i32 b) { return (i32)(low24(a) * low24(b)); }, s0, s1);
    check_op<Mul24HiS>(
        "mul24.hi.s32", [](i32 a, i32 b) { return (i32)(low24(a) * low24(b) >> 16); }, s0, s1);
    check_op<Mad24LoS>(
        "mad24.lo.s32", [](i32 a, i32 b, i32 c) { return (i32)(low24(a) * low24(b) + c); }, s0, s1, s2);
    check_op<AddSat>(
        "add.sat.s32", [](i32 a, i32 b) { return saturated((int64_t)a + b); }, s0, s1);
    check_op<SubSat>(
        "sub.sat.s32", [](i32 a, i32 b) { return saturated((int64_t)a - b); }, s0, s1);
    check_op<MadHiSat>(
        "mad.hi.sat.s32", [](i32 a, i32 b, i32 c) { return saturated(((int64_t)a * b >> 32) + c); }, s0, s1,
        s2);
}

// --------------------------------------------------------------------------------------------- bit fields

ASM3(ShfLC, uint32_t, "=r", uint32_t, "r", uint32_t, "r", uint32_t, "r", "shf.l.clamp.b32 %0, %1, %2, %3;")
ASM3(ShfLW, uint32_t, "=r", uint32_t, "r", uint32_t, "r", uint32_t, "r", "shf.l.wrap.b32 %0, %1, %2, %3;")
ASM3(ShfRC, uint32_t, "=r", uint32_t, "r", uint32_t, "r", uint32_t, "r", "shf.r.clamp.b32 %0, %1, %2, %3;")
ASM3(ShfRW, uint32_t, "=r", uint32_t, "r", uint32_t, "r", uint32_t, "r", "shf.r.wrap.b32 %0, %1, %2, %3;")
ASM3(Prmt, uint32_t, "=r", uint32_t, "r", uint32_t, "r", uint32_t, "r", "prmt.b32 %0, %1, %2, %3;")
ASM3(PrmtF4e, uint32_t, "=r", uint32_t, "r", uint32_t, "r", uint32_t, "r", "prmt.b32.f4e %0, %1, %2, %3;")
ASM3(PrmtRc8, uint32_t, "=r", uint32_t, "r", uint32_t, "r", uint32_t, "r", "prmt.b32.rc8 %0, %1, %2, %3;")
ASM3(BfeU32, uint32_t, "=r", uint32_t, "r", uint32_t, "r", uint32_t, "r", "bfe.u32 %0, %1, %2, %3;")
ASM3(BfeS32, int32_t, "=r", int32_t, "r", uint32_t, "r", uint32_t, "r", "bfe.s32 %0, %1, %2, %3;")
ASM3(BfeU64, uint64_t, "=l", uint64_t, "l", uint32_t, "r", uint32_t, "r", "bfe.u64 %0, %1, %2, %3;")
ASM3(BfeS64, int64_t, "=l", int64_t, "l", uint32_t, "r", uint32_t, "r", "bfe.s64 %0, %1, %2, %3;")

struct Bfi32 {
    __device__ static uint32_t at(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
        uint32_t r;
        asm volatile("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "r"(d));
        return r;
    }
};
struct Bfi64 {
    __device__ static uint64_t at(uint64_t a, uint64_t b, uint32_t c, uint32_t d) {
        uint64_t r;
        asm volatile("bfi.b64 %0, %1, %2, %3, %4;" : "=l"(r) : "l"(a), "l"(b), "r"(c), "r"(d));
        return r;
    }
};

template <class T>
T bfe(T a, uint32_t b, uint32_t c) {
    const int pos = b & 255, len = c & 255, msb = 8 * sizeof(T) - 1;
    const int sign = std::is_unsigned_v<T> || !len ? 0 : (a >> std::min(pos + len - 1, msb)) & 1;
    std::make_unsigned_t<T> d = 0;
    for (int i = 0; i <= msb; i++)
        d |= (std::make_unsigned_t<T>)(i < len && pos + i <= msb ? (a >> (pos + i)) & 1 : sign) << i;
    return (T)d;
}
template <class T>
T bfi(T a, T b, uint32_t c, uint32_t d) {
    const int pos = c & 255, len = d & 255, msb = 8 * sizeof(T) - 1;
    T f = b;
    for (int i = 0; i < len && pos + i <= msb; i++)
        f = (f & ~((T)1 << (pos + i))) | ((a >> i & 1) << (pos + i));
    return f;
}
uint32_t byte_of(uint32_t a, uint32_t b, int i) {
    return (((uint64_t)b << 32 | a) >> 8 * i) & 255;
}

TEST_CASE("ptxsim: funnel shifts, byte permutes and bit fields") {
    using u32 = uint32_t;
    const auto a = inputs<u32>(0, 3), b = inputs<u32>(1, 3), c = inputs<u32>(2, 3);
    auto left = [](u32 a, u32 b, int n) { return (u32)(((uint64_t)b << 32 | a) << n >> 32); };
    auto right = [](u32 a, u32 b, int n) { return (u32)(((uint64_t)b << 32 | a) >> n); };
    check_op<ShfLC>(
        "shf.l.clamp", [=](u32 a, u32 b, u32 n) { return left(a, b, std::min(n, 32u)); }, a, b, c);
    check_op<ShfLW>(
        "shf.l.wrap", [=](u32 a, u32 b, u32 n) { return left(a, b, n & 31); }, a, b, c);
    check_op<ShfRC>(
        "shf.r.clamp", [=](u32 a, u32 b, u32 n) { return right(a, b, std::min(n, 32u)); }, a, b, c);
    check_op<ShfRW>(
        "shf.r.wrap", [=](u32 a, u32 b, u32 n) { return right(a, b, n & 31); }, a, b, c);
    check_op<Prmt>(
        "prmt",
        [](u32 a, u32 b, u32 selector) {
            u32 r = 0;
            for (int i = 0; i < 4; i++) {
                const int nibble = selector >> 4 * i & 15;
                u32 byte = byte_of(a, b, nibble & 7);
                if (nibble & 8) byte = byte & 128 ? 255 : 0;
                r |= byte << 8 * i;
            }
            return r;
        },
        a, b, c);
    check_op<PrmtF4e>(
        "prmt.f4e",
        [](u32 a, u32 b, u32 selector) {  // four bytes, beginning at byte c[1:0]
            return (u32)(((uint64_t)b << 32 | a) >> 8 * (selector & 3));
        },
        a, b, c);
    check_op<PrmtRc8>(
        "prmt.rc8", [](u32 a, u32 b, u32 selector) { return byte_of(a, b, selector & 3) * 0x01010101u; }, a,
        b, c);

    std::vector<u32> pos, len;
    std::mt19937 random(5);
    for (size_t i = 0; i < a.size(); i++) {
        const int top = random() % 3 == 0 ? 1024 : 70;  // only the low 8 bits count
        pos.push_back(random() % top);
        len.push_back(random() % top);
    }
    const auto s32 = inputs<int32_t>(0, 3);
    const auto u64 = inputs<uint64_t>(0, 3), v64 = inputs<uint64_t>(1, 3);
    const auto s64 = inputs<int64_t>(0, 3);
    check_op<BfeU32>("bfe.u32", bfe<u32>, a, pos, len);
    check_op<BfeS32>("bfe.s32", bfe<int32_t>, s32, pos, len);
    check_op<BfeU64>("bfe.u64", bfe<uint64_t>, u64, pos, len);
    check_op<BfeS64>("bfe.s64", bfe<int64_t>, s64, pos, len);
    check_op<Bfi32>("bfi.b32", bfi<u32>, a, b, pos, len);
    check_op<Bfi64>("bfi.b64", bfi<uint64_t>, u64, v64, pos, len);
}

ASM1(Popc32, uint32_t, "=r", uint32_t, "r", "popc.b32 %0, %1;")
ASM1(Popc64, uint32_t, "=r", uint64_t, "l", "popc.b64 %0, %1;")
ASM1(Clz32, uint32_t, "=r", uint32_t, "r", "clz.b32 %0, %1;")
ASM1(Clz64, uint32_t, "=r", uint64_t, "l", "clz.b64 %0, %1;")
ASM1(Brev32, uint32_t, "=r", uint32_t, "r", "brev.b32 %0, %1;")
ASM1(Brev64, uint64_t, "=l", uint64_t, "l", "brev.b64 %0, %1;")
ASM1(BfindU32, uint32_t, "=r", uint32_t, "r", "bfind.u32 %0, %1;")
ASM1(BfindS32, uint32_t, "=r", int32_t, "r", "bfind.s32 %0, %1;")
ASM1(BfindU64, uint32_t, "=r", uint64_t, "l", "bfind.u64 %0, %1;")
ASM1(BfindS64, uint32_t, "=r", int64_t, "l", "bfind.s64 %0, %1;")
ASM1(BfindShift, uint32_t, "=r", uint32_t, "r", "bfind.shiftamt.u32 %0, %1;")
struct Ffs {
    __device__ static int at(int a) { return __ffs(a); }
};

template <class T>
T reversed(T x) {
    T r = 0;
    for (size_t i = 0; i < 8 * sizeof(T); i++) r |= (x >> i & 1) << (8 * sizeof(T) - 1 - i);
    return r;
}
template <class T>
uint32_t bfind(T x) {
    if constexpr (std::is_signed_v<T>) x = x < 0 ? ~x : x;
    for (int i = 8 * sizeof(T) - 1; i >= 0; i--)
        if (x >> i & 1) return i;
    return ~0u;
}

TEST_CASE("ptxsim: bit counts") {
    const auto u32 = inputs<uint32_t>();
    const auto u64 = inputs<uint64_t>();
    check_op<Popc32>(
        "popc.b32", [](uint32_t a) { return (uint32_t)std::popcount(a); }, u32);
    check_op<Popc64>(
        "popc.b64", [](uint64_t a) { return (uint32_t)std::popcount(a); }, u64);
    check_op<Clz32>(
        "clz.b32", [](uint32_t a) { return (uint32_t)std::countl_zero(a); }, u32);
    check_op<Clz64>(
        "clz.b64", [](uint64_t a) { return (uint32_t)std::countl_zero(a); }, u64);
    check_op<Brev32>("brev.b32", reversed<uint32_t>, u32);
    check_op<Brev64>("brev.b64", reversed<uint64_t>, u64);
    check_op<BfindU32>("bfind.u32", bfind<uint32_t>, u32);
    check_op<BfindS32>("bfind.s32", bfind<int32_t>, inputs<int32_t>());
    check_op<BfindU64>("bfind.u64", bfind<uint64_t>, u64);
    check_op<BfindS64>("bfind.s64", bfind<int64_t>, inputs<int64_t>());
    check_op<BfindShift>(
        "bfind.shiftamt", [](uint32_t a) { return a ? (uint32_t)std::countl_zero(a) : ~0u; }, u32);
    check_op<Ffs>(
        "__ffs", [](int a) { return a ? std::countr_zero((uint32_t)a) + 1 : 0; }, inputs<int>());
}

template <int lut>
__device__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm volatile("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(lut));
    return r;
}
template <int... luts>
__device__ void every_lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t* out,
                           std::integer_sequence<int, luts...>) {
    ((out[luts] = lop3<luts>(a, b, c)), ...);
}
__global__ void lop3_kernel(const uint32_t* in, uint32_t* out) {
    const int i = threadIdx.x;
    every_lop3(in[3 * i], in[3 * i + 1], in[3 * i + 2], out + 256 * i,
               std::make_integer_sequence<int, 256>{});
}

TEST_CASE("ptxsim: lop3 with every table") {
    const auto in = inputs<uint32_t>(0, 1, 3 * 128);
    Device<uint32_t> out(256 * 128), device_in(in);
    lop3_kernel<<<1, 128>>>(device_in.get(), out.get());
    expect_success();
    const auto got = out.host();
    int wrong = 0;
    for (int i = 0; i < 128; i++)
        for (int lut = 0; lut < 256; lut++)
            for (int bit = 0; bit < 32; bit++) {
                auto of = [&](int k) { return in[3 * i + k] >> bit & 1; };
                wrong += (got[256 * i + lut] >> bit & 1) != (lut >> (4 * of(0) + 2 * of(1) + of(2)) & 1u);
            }
    CHECK(wrong == 0);
}

#define DOT(name, type, c) \
    ASM3(name, int32_t, "=r", uint32_t, "r", uint32_t, "r", int32_t, "r", type " %0, %1, %2, %3;")
DOT(Dp4aUU, "dp4a.u32.u32", )
DOT(Dp4aSS, "dp4a.s32.s32", )
DOT(Dp4aUS, "dp4a.u32.s32", )
DOT(Dp2aLoSS, "dp2a.lo.s32.s32", )
DOT(Dp2aHiUU, "dp2a.hi.u32.u32", )

int64_t part(uint32_t x, int i, int bits, bool is_signed) {
    const int64_t value = x >> bits * i & ((1u << bits) - 1);
    return is_signed && value >> (bits - 1) ? value - (1 << bits) : value;
}
template <bool signed_a, bool signed_b>
int32_t dp4a(uint32_t a, uint32_t b, int32_t c) {
    int64_t sum = c;
    for (int i = 0; i < 4; i++) sum += part(a, i, 8, signed_a) * part(b, i, 8, signed_b);
    return (int32_t)sum;
}
template <bool is_signed, int first>
int32_t dp2a(uint32_t a, uint32_t b, int32_t c) {
    int64_t sum = c;
    for (int i = 0; i < 2; i++) sum += part(a, i, 16, is_signed) * part(b, first + i, 8, is_signed);
    return (int32_t)sum;
}

TEST_CASE("ptxsim: dot products of bytes") {
    const auto a = inputs<uint32_t>(0, 3), b = inputs<uint32_t>(1, 3);
    const auto c = inputs<int32_t>(2, 3);
    check_op<Dp4aUU>("dp4a.u32.u32", dp4a<false, false>, a, b, c);
    check_op<Dp4aSS>("dp4a.s32.s32", dp4a<true, true>, a, b, c);
    check_op<Dp4aUS>("dp4a.u32.s32", dp4a<false, true>, a, b, c);
    check_op<Dp2aLoSS>("dp2a.lo.s32.s32", dp2a<true, 0>, a, b, c);
    check_op<Dp2aHiUU>("dp2a.hi.u32.u32", dp2a<false, 2>, a, b, c);
}

// ------------------------------------------------------------------------------------------------- carries

// A 128-bit sum, difference and product of 64-bit words with 32-bit carries, and a sum with 64-bit carries.
__global__ void carries(const uint64_t* in, uint64_t* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    uint32_t w[8], r[4];
    for (int k = 0; k < 8; k++) w[k] = (uint32_t)(in[4 * i + k / 2] >> 32 * (k % 2));
    asm volatile(
        "add.cc.u32 %0, %4, %8;\n\taddc.cc.u32 %1, %5, %9;\n\taddc.cc.u32 %2, %6, %10;\n\taddc.u32 %3, %7, "
        "%11;"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(w[4]), "r"(w[5]), "r"(w[6]), "r"(w[7]));
    uint64_t* o = out + 8 * i;
    o[0] = r[0] | (uint64_t)r[1] << 32, o[1] = r[2] | (uint64_t)r[3] << 32;
    asm volatile(
        "sub.cc.u32 %0, %4, %8;\n\tsubc.cc.u32 %1, %5, %9;\n\tsubc.cc.u32 %2, %6, %10;\n\tsubc.u32 %3, %7, "
        "%11;"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(w[4]), "r"(w[5]), "r"(w[6]), "r"(w[7]));
    o[2] = r[0] | (uint64_t)r[1] << 32, o[3] = r[2] | (uint64_t)r[3] << 32;
    asm volatile(
        "{\n\t"
        "mul.lo.u32 %0, %4, %6;\n\t"
        "mul.hi.u32 %1, %4, %6;\n\t"
        "mad.lo.cc.u32 %1, %4, %7, %1;\n\t"
        "madc.hi.u32 %2, %4, %7, 0;\n\t"
        "mad.lo.cc.u32 %1, %5, %6, %1;\n\t"
        "madc.hi.cc.u32 %2, %5, %6, %2;\n\t"
        "madc.hi.u32 %3, %5, %7, 0;\n\t"
        "mad.lo.cc.u32 %2, %5, %7, %2;\n\t"
        "addc.u32 %3, %3, 0;\n\t"
        "}"
        : "=&r"(r[0]), "=&r"(r[1]), "=&r"(r[2]), "=&r"(r[3])
        : "r"(w[0]), "r"(w[1]), "r"(w[4]), "r"(w[5]));
    o[4] = r[0] | (uint64_t)r[1] << 32, o[5] = r[2] | (uint64_t)r[3] << 32;
    asm volatile("add.cc.u64 %0, %2, %4;\n\taddc.u64 %1, %3, %5;"
                 : "=l"(o[6]), "=l"(o[7])
                 : "l"(in[4 * i]), "l"(in[4 * i + 1]), "l"(in[4 * i + 2]), "l"(in[4 * i + 3]));
}

TEST_CASE("ptxsim: carry chains") {
    const int n = 4000;
    const auto in = inputs<uint64_t>(0, 1, 4 * n);
    Device<uint64_t> device_in(in), out(8 * n);
    carries<<<(n + 127) / 128, 128>>>(device_in.get(), out.get(), n);
    expect_success();
    const auto got = out.host();
    int sums = 0, differences = 0, products = 0, sums64 = 0;
    for (int i = 0; i < n; i++) {
        auto of = [](const uint64_t* p) { return (u128)p[1] << 64 | p[0]; };
        const u128 a = of(&in[4 * i]), b = of(&in[4 * i + 2]);
        sums += of(&got[8 * i]) != a + b;
        differences += of(&got[8 * i + 2]) != a - b;
        products += of(&got[8 * i + 4]) != (u128)in[4 * i] * in[4 * i + 2];
        sums64 += of(&got[8 * i + 6]) != a + b;
    }
    CHECK(sums == 0);
    CHECK(differences == 0);
    CHECK(products == 0);
    CHECK(sums64 == 0);
}

}  // namespace
