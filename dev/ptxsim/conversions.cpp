// cvt, between all types and widths.
//
// A source register may be wider than the type it holds: the value is then in its low bits. A destination may
// be wider, too: the value is then extended by its sign or by zeros.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "dev/ptxsim/floats.h"
#include "dev/ptxsim/lanes.h"

namespace ptxsim {

namespace {

enum class Integral : uint8_t { none, nearest, zero, down, up };  // rni, rzi, rmi, rpi

struct Mode {
    Round round = Round::nearest;
    Integral integral = Integral::none;
    bool saturates = false, flushes = false, relu = false;
};

// Puts the mode into one number, for Instruction::aux.
int32_t pack_mode(const Mode& m) {
    return (int)m.round | (int)m.integral << 4 | m.saturates << 8 | m.flushes << 9 | m.relu << 10;
}
Mode unpack_mode(int32_t aux) {
    return {(Round)(aux & 15), (Integral)(aux >> 4 & 15), (aux >> 8 & 1) != 0, (aux >> 9 & 1) != 0,
            (aux >> 10 & 1) != 0};
}

template <class T>
constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T>
constexpr bool is_float = std::is_floating_point_v<T> || is_half<T>;

template <class F>
F to_integral(F x, Integral how) {
    switch (how) {
        case Integral::nearest:
            return std::nearbyint(x);
        case Integral::zero:
            return std::trunc(x);
        case Integral::down:
            return std::floor(x);
        case Integral::up:
            return std::ceil(x);
        case Integral::none:
            break;
    }
    return x;
}

template <class D>
D from_double(double x, Round round) {
    if constexpr (is_half<D>) return to_half<D>(x, round);
    if constexpr (std::is_same_v<D, float>) {
        if (round == Round::nearest) return (float)x;
        return rounded(
            round, [](double v) { return (float)v; }, x);
    }
    if constexpr (std::is_same_v<D, double>) return x;
}

// A float to an integer. Values out of range become the nearest integer of the type; NaN becomes what the ISA
// says.
template <class D>
D float_to_integer(double x, bool from_double) {
    if (std::isnan(x)) {
        bool zero = !from_double && sizeof(D) < 8;
        return zero ? D(0) : (D)(1ull << (8 * sizeof(D) - 1));
    }
    constexpr double kLow = (double)std::numeric_limits<D>::min();
    double above = std::ldexp(1.0, 8 * sizeof(D) - std::is_signed_v<D>);
    if (x <= kLow) return std::numeric_limits<D>::min();
    if (x >= above) return std::numeric_limits<D>::max();
    return (D)x;
}

template <class D, class S>
D convert(S x, const Mode& mode) {
    if constexpr (std::is_integral_v<D> && std::is_integral_v<S>) {
        if (!mode.saturates) return (D)x;
        __int128 low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
        return (D)std::clamp<__int128>(x, low, high);
    } else if constexpr (std::is_integral_v<D>) {
        double value;
        if constexpr (is_half<S>) {
            value = decode(x);
        } else {
            value = mode.flushes ? flush(x) : x;
        }
        Integral how = mode.integral == Integral::none ? Integral::zero : mode.integral;
        return float_to_integer<D>(to_integral(value, how), std::is_same_v<S, double>);
    } else if constexpr (std::is_integral_v<S>) {
        if constexpr (is_half<D>) {
            // Not every 64-bit integer is exact in double. Here it is rounded to odd, which cannot change the
            // result of the second rounding, to 16 bits.
            double value = (double)x;
            if constexpr (sizeof(S) == 8) {
                uint64_t magnitude = std::is_signed_v<S> && x < 0 ? 0 - (uint64_t)x : (uint64_t)x;
                if (magnitude >> 53) magnitude = (magnitude & ~0xFFFull) | ((magnitude & 0xFFF) ? 0x1000 : 0);
                value = std::is_signed_v<S> && x < 0 ? -(double)magnitude : (double)magnitude;
            }
            return to_half<D>(value, mode.round);
        } else {
            D result = mode.round == Round::nearest ? (D)x : [&] {
                fesetround(mode.round == Round::zero   ? FE_TOWARDZERO
                           : mode.round == Round::down ? FE_DOWNWARD
                                                       : FE_UPWARD);
                volatile S integer = x;
                D value = opaque((D)integer);
                fesetround(FE_TONEAREST);
                return value;
            }();
            return mode.saturates ? saturate(result) : result;
        }
    } else {
        double value;
        if constexpr (is_half<S>) {
            value = decode(x);
        } else {
            value = mode.flushes ? flush(x) : x;
        }
        if (mode.integral != Integral::none) value = to_integral(value, mode.integral);
        D result = from_double<D>(value, mode.round);
        if constexpr (is_half<D>) {
            if (mode.saturates) result = to_half<D>(saturate((double)decode(result)));
            if (mode.relu && !(decode(result) > 0) && decode(result) == decode(result)) result = D{0};
        } else {
            if (mode.saturates) result = saturate(result);
            if (mode.flushes) result = flush(result);
        }
        return result;
    }
}

// o[0] = o[1]. The width of the source register is in memory.bytes, that of the destination in
// memory.register_bytes.
template <class D, class S>
void run_conversion(Warp& w, const Instruction& in, Mask lanes) {
    Mode mode = unpack_mode(in.aux);
    const std::byte* from = w.src<std::byte>(in.o[1]);
    int stride = in.memory.bytes;
    alignas(64) D values[kWarpSize];
    if (stride == sizeof(S) && std::is_integral_v<D> && std::is_integral_v<S> && !mode.saturates) {
        for (int i = 0; i < kWarpSize; i++) values[i] = convert<D>(((const S*)from)[i], Mode());
    } else {
        for (int i = 0; i < kWarpSize; i++) {
            S s;
            memcpy(&s, from + i * stride, sizeof(S));
            values[i] = convert<D>(s, mode);
        }
    }
    if (in.memory.register_bytes == sizeof(D)) return put(w.reg<D>(in.o[0]), values, lanes);
    if constexpr (std::is_integral_v<D>) {
        std::byte* to = w.reg<std::byte>(in.o[0]);
        each(lanes, [&](int i) {
            int64_t wide = (int64_t)values[i];
            memcpy(to + i * in.memory.register_bytes, &wide, in.memory.register_bytes);
        });
    }
}

// cvt.rn.bf16x2.f32 d, a, b: a becomes the high half.
template <class H>
void run_pair(Warp& w, const Instruction& in, Mask lanes) {
    Mode mode = unpack_mode(in.aux);
    const float *high = w.src<float>(in.o[1]), *low = w.src<float>(in.o[2]);
    alignas(64) uint32_t values[kWarpSize];
    for (int i = 0; i < kWarpSize; i++)
        values[i] = (uint32_t)convert<H>(high[i], mode).bits << 16 | convert<H>(low[i], mode).bits;
    put(w.reg<uint32_t>(in.o[0]), values, lanes);
}

void run_tf32(Warp& w, const Instruction& in, Mask lanes) {
    Mode mode = unpack_mode(in.aux);
    const float* a = w.src<float>(in.o[1]);
    alignas(64) float values[kWarpSize];
    for (int i = 0; i < kWarpSize; i++) {
        values[i] = to_tf32(a[i], mode.round);
        if (mode.relu && !(values[i] > 0) && values[i] == values[i]) values[i] = 0;
    }
    put(w.reg<float>(in.o[0]), values, lanes);
}

template <class D>
Handler from(const std::string& s) {
    if (s == "u8") return &run_conversion<D, uint8_t>;
    if (s == "s8") return &run_conversion<D, int8_t>;
    if (s == "u16") return &run_conversion<D, uint16_t>;
    if (s == "s16") return &run_conversion<D, int16_t>;
    if (s == "u32") return &run_conversion<D, uint32_t>;
    if (s == "s32") return &run_conversion<D, int32_t>;
    if (s == "u64") return &run_conversion<D, uint64_t>;
    if (s == "s64") return &run_conversion<D, int64_t>;
    if (s == "f16") return &run_conversion<D, f16>;
    if (s == "bf16") return &run_conversion<D, bf16>;
    if (s == "f32") return &run_conversion<D, float>;
    if (s == "f64") return &run_conversion<D, double>;
    return nullptr;
}

}  // namespace

Handler find_conversion(const std::vector<std::string>& modifiers, Instruction* in, int from_bytes,
                        int to_bytes) {
    Mode mode;
    std::vector<std::string> types;
    for (const std::string& m : modifiers) {
        if (m == "rn")
            mode.round = Round::nearest;
        else if (m == "rz")
            mode.round = Round::zero;
        else if (m == "rm")
            mode.round = Round::down;
        else if (m == "rp")
            mode.round = Round::up;
        else if (m == "rna")
            mode.round = Round::away;
        else if (m == "rni")
            mode.integral = Integral::nearest;
        else if (m == "rzi")
            mode.integral = Integral::zero;
        else if (m == "rmi")
            mode.integral = Integral::down;
        else if (m == "rpi")
            mode.integral = Integral::up;
        else if (m == "sat")
            mode.saturates = true;
        else if (m == "ftz")
            mode.flushes = true;
        else if (m == "relu")
            mode.relu = true;
        else if (type_bytes(m))
            types.push_back(m);
        else
            return nullptr;
    }
    if (types.size() != 2) return nullptr;
    in->aux = pack_mode(mode);
    in->memory.bytes = (uint8_t)from_bytes;
    in->memory.register_bytes = (uint8_t)to_bytes;
    const std::string &to = types[0], &s = types[1];
    if (s == "f32" && to == "bf16x2") return &run_pair<bf16>;
    if (s == "f32" && to == "f16x2") return &run_pair<f16>;
    if (s == "f32" && to == "tf32") return &run_tf32;
    if (to == "u8") return from<uint8_t>(s);
    if (to == "s8") return from<int8_t>(s);
    if (to == "u16") return from<uint16_t>(s);
    if (to == "s16") return from<int16_t>(s);
    if (to == "u32") return from<uint32_t>(s);
    if (to == "s32") return from<int32_t>(s);
    if (to == "u64") return from<uint64_t>(s);
    if (to == "s64") return from<int64_t>(s);
    if (to == "f16") return from<f16>(s);
    if (to == "bf16") return from<bf16>(s);
    if (to == "f32") return from<float>(s);
    if (to == "f64") return from<double>(s);
    return nullptr;
}

}  // namespace ptxsim
