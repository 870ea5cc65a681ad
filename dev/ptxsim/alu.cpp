// Arithmetic and logic: instructions in which no lane sees another one. The table has one entry for each
// instruction, under the name that nvcc writes.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "dev/ptxsim/alu.h"

namespace ptxsim {

namespace {

template <class T>
using Twice = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T>
T low_product(T a, T b) {
    return (T)((Twice<Unsigned<T>>)(Unsigned<T>)a * (Unsigned<T>)b);
}
template <class T>
T high_product(T a, T b) {
    return (T)((Twice<T>)a * (Twice<T>)b >> (8 * sizeof(T)));
}

template <class T>
T shift_left(T x, uint32_t n) {
    return n < 8 * sizeof(T) ? (T)((uint64_t)x << n) : T(0);
}
template <class T>
T shift_right(T x, uint32_t n) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    if constexpr (std::is_signed_v<T>) return x >> (n < kBits ? n : kBits - 1);
    return n < kBits ? x >> n : T(0);
}

void add_integers() {
    for_integers("add.*", []<class T>(auto& m) {
        add<T, T, T>(m, [](T a, T b) { return (T)((Unsigned<T>)a + (Unsigned<T>)b); });
    });
    for_integers("sub.*", []<class T>(auto& m) {
        add<T, T, T>(m, [](T a, T b) { return (T)((Unsigned<T>)a - (Unsigned<T>)b); });
    });
    for_types<int32_t>("add.sat.*", {"s32"}, []<class T>(auto& m) {
        add<T, T, T>(m,
                     [](T a, T b) { return (T)std::clamp<int64_t>((int64_t)a + b, INT32_MIN, INT32_MAX); });
    });
    for_types<int32_t>("sub.sat.*", {"s32"}, []<class T>(auto& m) {
        add<T, T, T>(m,
                     [](T a, T b) { return (T)std::clamp<int64_t>((int64_t)a - b, INT32_MIN, INT32_MAX); });
    });
    for_integers("mul.lo.*",
                 []<class T>(auto& m) { add<T, T, T>(m, [](T a, T b) { return low_product(a, b); }); });
    for_integers("mul.hi.*",
                 []<class T>(auto& m) { add<T, T, T>(m, [](T a, T b) { return high_product(a, b); }); });
    for_integers("mad.lo.*", []<class T>(auto& m) {
        add<T, T, T, T>(m,
                        [](T a, T b, T c) { return (T)((Unsigned<T>)low_product(a, b) + (Unsigned<T>)c); });
    });
    for_integers("mad.hi.*", []<class T>(auto& m) {
        add<T, T, T, T>(m,
                        [](T a, T b, T c) { return (T)((Unsigned<T>)high_product(a, b) + (Unsigned<T>)c); });
    });
    add<int32_t, int32_t, int32_t, int32_t>("mad.hi.sat.s32", [](int32_t a, int32_t b, int32_t c) {
        return (int32_t)std::clamp<int64_t>((int64_t)high_product(a, b) + c, INT32_MIN, INT32_MAX);
    });
    auto wide = []<class T>(auto& m) {
        using W = Twice<T>;
        if (m[1] == 'u') {
            add<W, T, T>(m, [](T a, T b) { return (W)((W)a * (W)b); });
        } else {
            add<W, T, T, W>(m,
                            [](T a, T b, W c) { return (W)((Unsigned<W>)((W)a * (W)b) + (Unsigned<W>)c); });
        }
    };
    for (const char* pattern : {"mul.wide.*", "mad.wide.*"})
        for_types<int16_t, int32_t, uint16_t, uint32_t>(pattern, {"s16", "s32", "u16", "u32"}, wide);
    for_types<int32_t, uint32_t>("mul24.lo.*", {"s32", "u32"}, []<class T>(auto& m) {
        add<T, T, T>(m, [](T a, T b) {
            return (T)(((int64_t)(T)((uint32_t)a << 8) >> 8) * ((int64_t)(T)((uint32_t)b << 8) >> 8));
        });
    });
    for_types<int32_t, uint32_t>("mul24.hi.*", {"s32", "u32"}, []<class T>(auto& m) {
        add<T, T, T>(m, [](T a, T b) {
            return (T)(((int64_t)(T)((uint32_t)a << 8) >> 8) * ((int64_t)(T)((uint32_t)b << 8) >> 8) >> 16);
        });
    });
    for_types<int32_t, uint32_t>("mad24.lo.*", {"s32", "u32"}, []<class T>(auto& m) {
        add<T, T, T, T>(m, [](T a, T b, T c) {
            return (T)(((int64_t)(T)((uint32_t)a << 8) >> 8) * ((int64_t)(T)((uint32_t)b << 8) >> 8) +
                       (int64_t)c);
        });
    });
    // The ISA leaves division by zero undefined. Hardware gives a quotient of all ones, and the dividend as
    // the remainder.
    for_unsigned("div.*", []<class T>(auto& m) {
        add<T, T, T>(m, [](T a, T b) { return b ? (T)(a / b) : (T)~T(0); });
    });
    for_unsigned("rem.*",
                 []<class T>(auto& m) { add<T, T, T>(m, [](T a, T b) { return b ? (T)(a % b) : a; }); });
    for_signed("div.*", []<class T>(auto& m) {
        add<T, T, T>(m, [](T a, T b) {
            return b == 0 ? T(-1) : b == -1 ? (T)(0 - (Unsigned<T>)a) : (T)(a / b);
        });
    });
    for_signed("rem.*", []<class T>(auto& m) {
        add<T, T, T>(m, [](T a, T b) { return b == 0 ? a : b == -1 ? T(0) : (T)(a % b); });
    });
    for_integers("min.*", []<class T>(auto& m) { add<T, T, T>(m, [](T a, T b) { return a < b ? a : b; }); });
    for_integers("max.*", []<class T>(auto& m) { add<T, T, T>(m, [](T a, T b) { return a > b ? a : b; }); });
    for_types<int32_t>("min.relu.*", {"s32"}, []<class T>(auto& m) {
        add<T, T, T>(m, [](T a, T b) { return std::max(T(0), std::min(a, b)); });
    });
    for_types<int32_t>("max.relu.*", {"s32"}, []<class T>(auto& m) {
        add<T, T, T>(m, [](T a, T b) { return std::max(T(0), std::max(a, b)); });
    });
    for_signed("abs.*", []<class T>(auto& m) {
        add<T, T>(m, [](T a) { return a < 0 ? (T)(0 - (Unsigned<T>)a) : a; });
    });
    for_signed("neg.*", []<class T>(auto& m) { add<T, T>(m, [](T a) { return (T)(0 - (Unsigned<T>)a); }); });
    for_integers("sad.*", []<class T>(auto& m) {
        add<T, T, T, T>(m, [](T a, T b, T c) {
            return (T)((Unsigned<T>)c +
                       (a < b ? (Unsigned<T>)b - (Unsigned<T>)a : (Unsigned<T>)a - (Unsigned<T>)b));
        });
    });

    for_bits("and.*", []<class T>(auto& m) { add<T, T, T>(m, [](T a, T b) { return (T)(a & b); }); });
    for_bits("or.*", []<class T>(auto& m) { add<T, T, T>(m, [](T a, T b) { return (T)(a | b); }); });
    for_bits("xor.*", []<class T>(auto& m) { add<T, T, T>(m, [](T a, T b) { return (T)(a ^ b); }); });
    for_bits("not.*", []<class T>(auto& m) { add<T, T>(m, [](T a) { return (T)~a; }); });
    for_bits("cnot.*", []<class T>(auto& m) { add<T, T>(m, [](T a) { return (T)(a == 0); }); });
    for_bits("shl.*", []<class T>(auto& m) {
        add<T, T, uint32_t>(m, [](T a, uint32_t n) { return shift_left(a, n); });
    });
    for_bits("shr.*", []<class T>(auto& m) {
        add<T, T, uint32_t>(m, [](T a, uint32_t n) { return shift_right(a, n); });
    });
    for_integers("shr.*", []<class T>(auto& m) {
        add<T, T, uint32_t>(m, [](T a, uint32_t n) { return shift_right(a, n); });
    });
    using U = uint32_t;
    add<U, U, U, U>("shf.l.wrap.b32",
                    [](U a, U b, U c) { return (U)((((uint64_t)b << 32 | a) << (c & 31)) >> 32); });
    add<U, U, U, U>("shf.r.wrap.b32", [](U a, U b, U c) { return (U)(((uint64_t)b << 32 | a) >> (c & 31)); });
    add<U, U, U, U>("shf.l.clamp.b32",
                    [](U a, U b, U c) { return (U)((((uint64_t)b << 32 | a) << (c < 32 ? c : 32)) >> 32); });
    add<U, U, U, U>("shf.r.clamp.b32",
                    [](U a, U b, U c) { return (U)(((uint64_t)b << 32 | a) >> (c < 32 ? c : 32)); });
    add<U, U, U, U, U>("lop3.b32", [](U a, U b, U c, U f) {
        U result = 0;
        for (U k = 0; k < 8; k++)
            result |= (0 - (f >> k & 1)) & (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
        return result;
    });
    auto permute = [](U a, U b, U selector) {
        uint64_t bytes = (uint64_t)b << 32 | a;
        U result = 0;
        for (U k = 0; k < 4; k++) {
            U s = selector >> (4 * k) & 15, byte = (U)(bytes >> (8 * (s & 7))) & 255;
            if (s & 8) byte = byte & 128 ? 255 : 0;
            result |= byte << (8 * k);
        }
        return result;
    };
    add<U, U, U, U>("prmt.b32", permute);
    // With a mode, prmt chooses the bytes by the low two bits of the selector only.
    auto mode = [&]<class F>(const char* name, F) {
        add<U, U, U, U>(std::string("prmt.b32.") + name, [](U a, U b, U selector) {
            uint64_t bytes = (uint64_t)b << 32 | a;
            U result = 0;
            for (U k = 0; k < 4; k++)
                result |= ((U)(bytes >> (8 * (F()(selector & 3, k) & 7))) & 255) << (8 * k);
            return result;
        });
    };
    mode("f4e", [](U n, U k) { return n + k; });
    mode("b4e", [](U n, U k) { return n - k; });
    mode("rc8", [](U n, U) { return n; });
    mode("ecl", [](U n, U k) { return k > n ? k : n; });
    mode("ecr", [](U n, U k) { return k < n ? k : n; });
    mode("rc16", [](U n, U k) { return (n & 1) * 2 + (k & 1); });

    add<U, U>("popc.b32", [](U a) { return (U)__builtin_popcount(a); });
    add<U, uint64_t>("popc.b64", [](uint64_t a) { return (U)__builtin_popcountll(a); });
    add<U, U>("clz.b32", [](U a) { return a ? (U)__builtin_clz(a) : 32u; });
    add<U, uint64_t>("clz.b64", [](uint64_t a) { return a ? (U)__builtin_clzll(a) : 64u; });
    auto reverse = [](auto a) {
        decltype(a) result = 0;
        for (size_t i = 0; i < 8 * sizeof(a); i++) result |= (a >> i & 1) << (8 * sizeof(a) - 1 - i);
        return result;
    };
    add<U, U>("brev.b32", reverse);
    add<uint64_t, uint64_t>("brev.b64", reverse);
    auto find = []<class T>(auto& m) {
        bool shift = m.find("shiftamt") != m.npos;
        auto position = [](T a) {
            if (std::is_signed_v<T> && a < 0) a = ~a;
            uint64_t x = (Unsigned<T>)a;
            return x ? (U)(63 - __builtin_clzll(x)) : ~0u;
        };
        if (shift) {
            add<U, T>(m, [](T a) {
                U at = decltype(position)()(a);
                return at == ~0u ? at : (U)(8 * sizeof(T) - 1) - at;
            });
        } else {
            add<U, T>(m, position);
        }
    };
    for (const char* pattern : {"bfind.*", "bfind.shiftamt.*"})
        for_types<int32_t, uint32_t, int64_t, uint64_t>(pattern, {"s32", "u32", "s64", "u64"}, find);
    for_types<int32_t, uint32_t, int64_t, uint64_t>(
        "bfe.*", {"s32", "u32", "s64", "u64"}, []<class T>(auto& m) {
            add<T, T, U, U>(m, [](T a, U position, U length) {
                constexpr U kBits = 8 * sizeof(T);
                position &= 255, length &= 255;
                bool fill = std::is_signed_v<T> && length &&
                            ((uint64_t)a >> std::min(position + length - 1, kBits - 1) & 1);
                Unsigned<T> field = position < kBits ? (Unsigned<T>)a >> position : 0;
                if (length < kBits) field &= ((Unsigned<T>)1 << length) - 1;
                if (fill && length < kBits) field |= ~(((Unsigned<T>)1 << length) - 1);
                if (fill && position + length > kBits && position < kBits && position)
                    field |= ~((~(Unsigned<T>)0) >> position);
                if (fill && position >= kBits) field = ~(Unsigned<T>)0;
                return (T)field;
            });
        });
    for_types<uint32_t, uint64_t>("bfi.*", {"b32", "b64"}, []<class T>(auto& m) {
        add<T, T, T, U, U>(m, [](T a, T b, U position, U length) {
            constexpr U kBits = 8 * sizeof(T);
            position &= 255, length &= 255;
            if (position >= kBits) return b;
            T mask = length < kBits ? (((T)1 << length) - 1) : ~(T)0;
            mask <<= position;
            return (T)((b & ~mask) | (a << position & mask));
        });
    });
    for_types<uint32_t>("bmsk.clamp.*", {"b32"}, []<class T>(auto& m) {
        add<U, U, U>(m, [](U position, U length) {
            if (position >= 32) return 0u;
            U mask = length < 32 ? (1u << length) - 1 : ~0u;
            return mask << position;
        });
    });
    auto dot = [&]<class A, class B>(const char* name) {
        using D = std::conditional_t<std::is_signed_v<A> || std::is_signed_v<B>, int32_t, uint32_t>;
        add<D, U, U, D>(std::string("dp4a.") + name, [](U a, U b, D c) {
            int64_t total = c;
            for (int k = 0; k < 4; k++) total += (int64_t)(A)(a >> 8 * k) * (B)(b >> 8 * k);
            return (D)total;
        });
    };
    auto dot2 = [&]<class A, class B>(const char* name) {  // two words of 16 bits with two bytes
        using D = std::conditional_t<std::is_signed_v<A> || std::is_signed_v<B>, int32_t, uint32_t>;
        using Word = std::conditional_t<std::is_signed_v<A>, int16_t, uint16_t>;
        add<D, U, U, D>(std::string("dp2a.lo.") + name, [](U a, U b, D c) {
            return (D)((int64_t)c + (int64_t)(Word)a * (B)b + (int64_t)(Word)(a >> 16) * (B)(b >> 8));
        });
        add<D, U, U, D>(std::string("dp2a.hi.") + name, [](U a, U b, D c) {
            return (D)((int64_t)c + (int64_t)(Word)a * (B)(b >> 16) +
                       (int64_t)(Word)(a >> 16) * (B)(b >> 24));
        });
    };
    dot2.template operator()<uint8_t, uint8_t>("u32.u32");
    dot2.template operator()<int8_t, int8_t>("s32.s32");
    dot2.template operator()<uint8_t, int8_t>("u32.s32");
    dot2.template operator()<int8_t, uint8_t>("s32.u32");
    dot.template operator()<uint8_t, uint8_t>("u32.u32");
    dot.template operator()<int8_t, int8_t>("s32.s32");
    dot.template operator()<uint8_t, int8_t>("u32.s32");
    dot.template operator()<int8_t, uint8_t>("s32.u32");
}

// Additions and subtractions that read or write the condition code: add.cc, addc, sub.cc, subc.
template <class T, bool kSubtract, bool kCarryIn, bool kCarryOut>
void add_carry(Warp& w, const Instruction& in, Mask lanes) {
    T *d = w.reg<T>(in.o[0]), values[kWarpSize];
    const T *a = w.src<T>(in.o[1]), *b = w.src<T>(in.o[2]);
    Mask carry = 0;
    for (int i = 0; i < kWarpSize; i++) {
        unsigned __int128 in_carry = kCarryIn ? w.carry >> i & 1 : 0, sum;
        if (kSubtract) {
            sum = (unsigned __int128)a[i] - b[i] - in_carry;  // the carry is a borrow
        } else {
            sum = (unsigned __int128)a[i] + b[i] + in_carry;
        }
        values[i] = (T)sum;
        carry |= (Mask)(sum >> (8 * sizeof(T)) & 1) << i;
    }
    put(d, values, lanes);
    if (kCarryOut) w.carry = (w.carry & ~lanes) | (carry & lanes);
}

template <class T, bool kHigh, bool kCarryIn, bool kCarryOut>
void mad_carry(Warp& w, const Instruction& in, Mask lanes) {
    T *d = w.reg<T>(in.o[0]), values[kWarpSize];
    const T *a = w.src<T>(in.o[1]), *b = w.src<T>(in.o[2]), *c = w.src<T>(in.o[3]);
    using W = Twice<T>;
    Mask carry = 0;
    for (int i = 0; i < kWarpSize; i++) {
        W product = (W)a[i] * b[i];
        T part = kHigh ? (T)(product >> (8 * sizeof(T))) : (T)product;
        unsigned __int128 sum =
            (unsigned __int128)(Unsigned<T>)part + (Unsigned<T>)c[i] + (kCarryIn ? w.carry >> i & 1 : 0);
        values[i] = (T)sum;
        carry |= (Mask)(sum >> (8 * sizeof(T)) & 1) << i;
    }
    put(d, values, lanes);
    if (kCarryOut) w.carry = (w.carry & ~lanes) | (carry & lanes);
}

void add_carries() {
    auto chain = [&]<class T>(auto& type) {
        uint8_t n = sizeof(T);
        AluEntry two = {nullptr, {n, n, n}}, three = {nullptr, {n, n, n, n}};
        auto put2 = [&](std::string name, Handler run) {
            table()[name + "." + type] = two, table()[name + "." + type].run = run;
        };
        auto put3 = [&](std::string name, Handler run) {
            table()[name + "." + type] = three, table()[name + "." + type].run = run;
        };
        using V = Unsigned<T>;
        put2("add.cc", add_carry<V, false, false, true>);
        put2("addc", add_carry<V, false, true, false>);
        put2("addc.cc", add_carry<V, false, true, true>);
        put2("sub.cc", add_carry<V, true, false, true>);
        put2("subc", add_carry<V, true, true, false>);
        put2("subc.cc", add_carry<V, true, true, true>);
        put3("mad.lo.cc", mad_carry<T, false, false, true>);
        put3("mad.hi.cc", mad_carry<T, true, false, true>);
        put3("madc.lo", mad_carry<T, false, true, false>);
        put3("madc.hi", mad_carry<T, true, true, false>);
        put3("madc.lo.cc", mad_carry<T, false, true, true>);
        put3("madc.hi.cc", mad_carry<T, true, true, true>);
    };
    for_types<uint32_t, int32_t, uint64_t, int64_t>("*", {"u32", "s32", "u64", "s64"}, chain);
}

// ---- floats

// The larger or the smaller of a and b, where -0 < 0. If one of them is NaN the result is the other one, or
// NaN with kNan.
template <bool kMax, bool kNan, class T>
T extreme(T a, T b) {
    if (std::isnan(a) || std::isnan(b)) {
        if (kNan || (std::isnan(a) && std::isnan(b))) return std::numeric_limits<T>::quiet_NaN();
        return std::isnan(a) ? b : a;
    }
    if (a == b) return kMax == std::signbit(a) ? b : a;
    return kMax == (a > b) ? a : b;
}

// Computes f for one form of an instruction: with or without .ftz, with or without .sat.
template <bool kFlush, bool kSaturate, class T, class F, class... S>
T finish(F f, S... s) {
    T result = kFlush ? f(flush(s)...) : f(s...);
    if (kFlush) result = flush(result);
    if (kSaturate) result = saturate(result);
    return result;
}

template <class... S, class F>
void add_float_forms(const std::string& op, F) {
    using T = float;
    add<T, S...>(op + ".f32", F());
    add<T, S...>(op + ".ftz.f32", [](S... s) { return finish<true, false, T>(F(), s...); });
    add<T, S...>(op + ".sat.f32", [](S... s) { return finish<false, true, T>(F(), s...); });
    add<T, S...>(op + ".ftz.sat.f32", [](S... s) { return finish<true, true, T>(F(), s...); });
}

// Arithmetic that rounds. The processor's vector instructions round to nearest; the other modes are computed
// lane by lane.
template <class... S, class F>
void add_rounding(const std::string& op, bool nearest_is_default, F f) {
    auto mode = [&]<Round round>(const char* name) {
        std::string m = op + name;
        add_float_forms<S...>(m, [](S... s) { return rounded(round, F(), s...); });
    };
    add_float_forms<S...>(op + ".rn", f);
    if (nearest_is_default) add_float_forms<S...>(op, f);
    mode.template operator()<Round::zero>(".rz");
    mode.template operator()<Round::down>(".rm");
    mode.template operator()<Round::up>(".rp");
}
template <class... S, class F>
void add_rounding64(const std::string& op, bool nearest_is_default, F f) {
    auto mode = [&]<Round round>(const char* name) {
        add<double, S...>(op + name + ".f64", [](S... s) { return rounded(round, F(), s...); });
    };
    add<double, S...>(op + ".rn.f64", f);
    if (nearest_is_default) add<double, S...>(op + ".f64", f);
    mode.template operator()<Round::zero>(".rz");
    mode.template operator()<Round::down>(".rm");
    mode.template operator()<Round::up>(".rp");
}

void add_floats() {
    using F = float;
    using D = double;
    add_rounding<F, F>("add", true, [](F a, F b) { return a + b; });
    add_rounding<F, F>("sub", true, [](F a, F b) { return a - b; });
    add_rounding<F, F>("mul", true, [](F a, F b) { return a * b; });
    add_rounding<F, F, F>("fma", false, [](F a, F b, F c) { return __builtin_fmaf(a, b, c); });
    add_rounding<F, F, F>("mad", false, [](F a, F b, F c) { return __builtin_fmaf(a, b, c); });
    add_rounding<F, F>("div", false, [](F a, F b) { return a / b; });
    add_rounding<F>("rcp", false, [](F a) { return 1.0f / a; });
    add_rounding<F>("sqrt", false, [](F a) { return __builtin_sqrtf(a); });
    add_rounding64<D, D>("add", true, [](D a, D b) { return a + b; });
    add_rounding64<D, D>("sub", true, [](D a, D b) { return a - b; });
    add_rounding64<D, D>("mul", true, [](D a, D b) { return a * b; });
    add_rounding64<D, D, D>("fma", false, [](D a, D b, D c) { return __builtin_fma(a, b, c); });
    add_rounding64<D, D, D>("mad", false, [](D a, D b, D c) { return __builtin_fma(a, b, c); });
    add_rounding64<D, D>("div", false, [](D a, D b) { return a / b; });
    add_rounding64<D>("rcp", false, [](D a) { return 1.0 / a; });
    add_rounding64<D>("sqrt", false, [](D a) { return __builtin_sqrt(a); });

    // The approximations are more exact than the ISA asks for. Denormals are kept unless .ftz is given.
    auto approx = [&](const char* name, auto f) { add_float_forms<F>(std::string(name) + ".approx", f); };
    approx("rcp", [](F a) { return 1.0f / a; });
    approx("sqrt", [](F a) { return __builtin_sqrtf(a); });
    approx("rsqrt", [](F a) { return (F)(1.0 / std::sqrt((D)a)); });
    approx("ex2", [](F a) { return std::exp2(a); });
    approx("lg2", [](F a) { return std::log2(a); });
    approx("sin", [](F a) { return std::sin(a); });
    approx("cos", [](F a) { return std::cos(a); });
    approx("tanh", [](F a) { return std::tanh(a); });
    add_float_forms<F, F>("div.approx", [](F a, F b) { return a / b; });
    add_float_forms<F, F>("div.full", [](F a, F b) { return a / b; });
    add<D, D>("rcp.approx.ftz.f64", [](D a) { return 1.0 / a; });
    add<D, D>("rsqrt.approx.f64", [](D a) { return 1.0 / std::sqrt(a); });
    add<D, D>("rsqrt.approx.ftz.f64", [](D a) { return 1.0 / std::sqrt(a); });

    add_float_forms<F>("abs", [](F a) { return std::fabs(a); });
    add_float_forms<F>("neg", [](F a) { return -a; });
    add<D, D>("abs.f64", [](D a) { return std::fabs(a); });
    add<D, D>("neg.f64", [](D a) { return -a; });
    add<F, F, F>("copysign.f32", [](F a, F b) { return std::copysign(b, a); });
    add<D, D, D>("copysign.f64", [](D a, D b) { return std::copysign(b, a); });
    add_float_forms<F, F>("min", [](F a, F b) { return extreme<false, false>(a, b); });
    add_float_forms<F, F>("max", [](F a, F b) { return extreme<true, false>(a, b); });
    add<F, F, F>("min.NaN.f32", [](F a, F b) { return extreme<false, true>(a, b); });
    add<F, F, F>("max.NaN.f32", [](F a, F b) { return extreme<true, true>(a, b); });
    add<F, F, F>("min.ftz.NaN.f32", [](F a, F b) { return flush(extreme<false, true>(flush(a), flush(b))); });
    add<F, F, F>("max.ftz.NaN.f32", [](F a, F b) { return flush(extreme<true, true>(flush(a), flush(b))); });
    add<D, D, D>("min.f64", [](D a, D b) { return extreme<false, false>(a, b); });
    add<D, D, D>("max.f64", [](D a, D b) { return extreme<true, false>(a, b); });
    auto test = [&]<class P>(const char* name, P) {
        table()[std::string("testp.") + name + ".f32"] = {[](Warp& w, const Instruction& in, Mask lanes) {
                                                              Mask result = 0;
                                                              const F* a = w.src<F>(in.o[1]);
                                                              for (int i = 0; i < kWarpSize; i++)
                                                                  result |= (Mask)(bool)P()(a[i]) << i;
                                                              put_predicate(w, in.o[0], result, lanes);
                                                          },
                                                          {1, 4}};
        table()[std::string("testp.") + name + ".f64"] = {[](Warp& w, const Instruction& in, Mask lanes) {
                                                              Mask result = 0;
                                                              const D* a = w.src<D>(in.o[1]);
                                                              for (int i = 0; i < kWarpSize; i++)
                                                                  result |= (Mask)(bool)P()(a[i]) << i;
                                                              put_predicate(w, in.o[0], result, lanes);
                                                          },
                                                          {1, 8}};
    };
    test("finite", [](auto x) { return std::isfinite(x); });
    test("infinite", [](auto x) { return std::isinf(x); });
    test("number", [](auto x) { return !std::isnan(x); });
    test("notanumber", [](auto x) { return std::isnan(x); });
    test("normal", [](auto x) { return std::isnormal(x); });
    test("subnormal", [](auto x) { return std::fpclassify(x) == FP_SUBNORMAL; });
}

// ---- 16-bit floats, alone and in pairs

template <class H, class F, class... S>
struct HalfOp {  // computes in double, whose own rounding cannot change the rounded result
    H operator()(S... s) const { return to_half<H>(F()((double)decode(s)...)); }
};
template <class T, class>
using Same = T;

template <class H, class... S, class F>
void add_half(const std::string& op, const char* type, F) {
    add<H, S...>(op + "." + type, F());
    add<uint32_t, Same<uint32_t, S>...>(op + "." + type + "x2", PairOp<H, F, Same<uint32_t, S>...>());
}

template <class H>
void add_halves(const char* type) {
    using D = double;
    auto number = [&]<class... S, class F>(const char* op, F, S...) {
        add_half<H, S...>(op, type, HalfOp<H, F, S...>());
        auto relu = [](S... s) {
            H r = HalfOp<H, F, S...>()(s...);
            return std::isnan(decode(r)) ? r : decode(r) > 0 ? r : H{0};
        };
        add_half<H, S...>(std::string(op) + ".relu", type, relu);
        auto sat = [](S... s) { return to_half<H>(saturate((double)decode(HalfOp<H, F, S...>()(s...)))); };
        add_half<H, S...>(std::string(op) + ".sat", type, sat);
        auto ftz = [](S... s) {
            auto tiny = [](H x) { return x.bits & 0x7C00 ? x : H{(uint16_t)(x.bits & 0x8000)}; };
            return tiny(HalfOp<H, F, S...>()(tiny(s)...));
        };
        if (std::is_same_v<H, f16>) add_half<H, S...>(std::string(op) + ".ftz", type, ftz);
    };
    auto plus = [](D a, D b) { return a + b; };
    auto minus = [](D a, D b) { return a - b; };
    auto times = [](D a, D b) { return a * b; };
    // Rounds the sum to odd: when it is not exact, its last bit becomes 1, so that the second rounding, to 16
    // bits, never takes it for a tie.
    auto fma = [](D a, D b, D c) {
        D product = a * b, sum = product + c, rest = sum - product;
        D error = (product - (sum - rest)) + (c - rest);
        uint64_t bits = std::bit_cast<uint64_t>(sum);
        if (error != 0 && std::isfinite(sum) && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1 : -1;
        return std::bit_cast<D>(bits);
    };
    for (const char* rounding : {"", ".rn"}) {
        number((std::string("add") + rounding).c_str(), plus, H(), H());
        number((std::string("sub") + rounding).c_str(), minus, H(), H());
        number((std::string("mul") + rounding).c_str(), times, H(), H());
    }
    number("fma.rn", fma, H(), H(), H());
    number(
        "min", [](D a, D b) { return extreme<false, false>(a, b); }, H(), H());
    number(
        "max", [](D a, D b) { return extreme<true, false>(a, b); }, H(), H());
    number(
        "min.NaN", [](D a, D b) { return extreme<false, true>(a, b); }, H(), H());
    number(
        "max.NaN", [](D a, D b) { return extreme<true, true>(a, b); }, H(), H());
    number(
        "ex2.approx", [](D a) { return std::exp2(a); }, H());
    number(
        "ex2.approx.ftz", [](D a) { return std::exp2(a); }, H());
    number(
        "tanh.approx", [](D a) { return std::tanh(a); }, H());
    auto negative = [](H a) { return H{(uint16_t)(a.bits ^ 0x8000)}; };
    auto absolute = [](H a) { return H{(uint16_t)(a.bits & 0x7FFF)}; };
    add_half<H, H>("neg", type, negative);
    add_half<H, H>("abs", type, absolute);
}

}  // namespace

const AluEntry* find_alu(const std::string& mnemonic) {
    if (table().empty()) {
        add_integers();
        add_carries();
        add_floats();
        add_halves<f16>("f16");
        add_halves<bf16>("bf16");
        add_comparisons();
    }
    auto it = table().find(mnemonic);
    return it == table().end() ? nullptr : &it->second;
}

}  // namespace ptxsim
