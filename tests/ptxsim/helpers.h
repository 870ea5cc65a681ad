// What the tests of dev/ptxsim share: arrays on the device, kernels that apply one operation to arrays, exact
// rounding on the host, and inputs with every kind of number.
#pragma once
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"

#define CUDA_OK(call)                                                                          \
    do {                                                                                       \
        const cudaError_t status_ = (call);                                                    \
        REQUIRE_MESSAGE(status_ == cudaSuccess, #call << ": " << cudaGetErrorString(status_)); \
    } while (0)

namespace ptxsim_test {

template <class T>
class Device {
  public:
    explicit Device(size_t n) : n_(n) { CUDA_OK(cudaMalloc(&data_, n * sizeof(T))); }
    explicit Device(const std::vector<T>& host) : Device(host.size()) {
        CUDA_OK(cudaMemcpy(data_, host.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~Device() { cudaFree(data_); }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    T* get() const { return data_; }
    std::vector<T> host() const {
        std::vector<T> host(n_);
        CUDA_OK(cudaMemcpy(host.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
        return host;
    }

  private:
    size_t n_;
    T* data_ = nullptr;
};

inline void expect_no_reports() {
    std::string all;
    for (const ptxsim::Report& report : ptxsim::take_reports()) all += report.text + "\n";
    CHECK_MESSAGE(all.empty(), all);
}

// Checks that a launch has succeeded.
inline void expect_success() {
    CUDA_OK(cudaGetLastError());
    CUDA_OK(cudaDeviceSynchronize());
    expect_no_reports();
}

// Restores the options at the end of its scope.
struct WithOptions {
    ptxsim::Options saved = ptxsim::options();
    ~WithOptions() { ptxsim::options() = saved; }
};

// ------------------------------------------------------------------------------------ operations on arrays

// Applies Op::at(), a static __device__ function, to arrays.
template <class Op, class R, class... A>
__global__ void apply(int n, R* out, const A*... in) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = Op::at(in[i]...);
}

template <class Op, class R, class... A>
std::vector<R> on_device(const std::vector<A>&... in) {
    int n = 0;
    ((n = (int)in.size()), ...);
    auto launch = [&](const auto&... arrays) {
        Device<R> out(n);
        apply<Op, R, A...><<<(n + 127) / 128, 128>>>(n, out.get(), arrays.get()...);
        expect_success();
        return out.host();
    };
    return launch(Device<A>(in)...);
}

template <class T>
std::string shown(T x) {
    if constexpr (std::is_floating_point_v<T>) {
        char text[64];
        std::snprintf(text, sizeof text, "%a", (double)x);
        return text;
    } else {
        return std::to_string(x);
    }
}

// Whether the bits are the same, or both are NaN.
template <class T>
bool same(T a, T b) {
    if constexpr (std::is_floating_point_v<T>)
        if (std::isnan(a) && std::isnan(b)) return true;
    return !std::memcmp(&a, &b, sizeof a);
}

// Compares Op with host(in...) by equal(got, expected).
template <class Op, class Host, class Equal, class... A>
void check_op_by(const char* name, Equal equal, Host host, const std::vector<A>&... in) {
    using R = decltype(host(in[0]...));
    const std::vector<R> got = on_device<Op, R>(in...);
    int wrong = 0;
    std::string first;
    for (size_t i = 0; i < got.size(); i++) {
        const R expected = host(in[i]...);
        if (equal(got[i], expected)) continue;
        if (wrong++) continue;
        first = std::string(name) + ": ";
        ((first += shown(in[i]) + " "), ...);
        first += "gives " + shown(got[i]) + ", not " + shown(expected);
    }
    CHECK_MESSAGE(wrong == 0, wrong << " of " << got.size() << " wrong, first " << first);
}
template <class Op, class Host, class... A>
void check_op(const char* name, Host host, const std::vector<A>&... in) {
    check_op_by<Op>(
        name, [](auto a, auto b) { return same(a, b); }, host, in...);
}

// Define operations of one piece of PTX. The arguments are the type and the constraint of the result, then
// those of the operands.
#define ASM1(name, R, rc, A, ac, text)          \
    struct name {                               \
        __device__ static R at(A a) {           \
            R r;                                \
            asm volatile(text : rc(r) : ac(a)); \
            return r;                           \
        }                                       \
    };
#define ASM2(name, R, rc, A, ac, B, bc, text)          \
    struct name {                                      \
        __device__ static R at(A a, B b) {             \
            R r;                                       \
            asm volatile(text : rc(r) : ac(a), bc(b)); \
            return r;                                  \
        }                                              \
    };
#define ASM3(name, R, rc, A, ac, B, bc, C, cc, text)          \
    struct name {                                             \
        __device__ static R at(A a, B b, C c) {               \
            R r;                                              \
            asm volatile(text : rc(r) : ac(a), bc(b), cc(c)); \
            return r;                                         \
        }                                                     \
    };

// ------------------------------------------------------------------------------------------- host rounding

enum class Round { nearest, zero, down, up, away };  // away: to nearest, ties away from zero

struct Format {
    int bits;          // of the significand, with the hidden bit
    int min_exponent;  // the exponent of the smallest normal number
    double max;
};
constexpr Format kF16{11, -14, 65504.0}, kBf16{8, -126, 0x1.fep127}, kTf32{11, -126, 0x1.ffcp127},
    kF32{24, -126, 0x1.fffffep127};

inline double round_integral(double x, Round mode) {
    switch (mode) {
        case Round::nearest:
            return std::nearbyint(x);
        case Round::zero:
            return std::trunc(x);
        case Round::down:
            return std::floor(x);
        case Round::up:
            return std::ceil(x);
        default:
            return std::round(x);
    }
}

inline double round_to(double x, const Format& format, Round mode) {
    if (!std::isfinite(x) || x == 0) return x;
    const int step = std::max(std::ilogb(x), format.min_exponent) - (format.bits - 1);
    const double r = std::scalbn(round_integral(std::scalbn(x, -step), mode), step);
    if (std::abs(r) <= format.max) return std::copysign(r, x);
    const bool to_infinity = mode == Round::nearest || mode == Round::away || (mode == Round::up && x > 0) ||
                             (mode == Round::down && x < 0);
    return std::copysign(to_infinity ? INFINITY : format.max, x);
}

// 16-bit formats: converts a number that the format can hold to its bits, and back.
inline uint16_t encode16(double x, const Format& format) {
    const int fraction = format.bits - 1, exponent_bits = 15 - fraction;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0, ones = ((1 << exponent_bits) - 1) << fraction;
    if (std::isnan(x)) return 0x7FFF;
    if (std::isinf(x)) return sign | ones;
    x = std::abs(x);
    const int e = x == 0 ? format.min_exponent : std::max(std::ilogb(x), format.min_exponent);
    const int steps = (int)std::scalbn(x, fraction - e);  // with the hidden bit
    return sign | (steps + ((e - format.min_exponent) << fraction));
}
inline double decode16(uint16_t bits, const Format& format) {
    const int fraction = format.bits - 1, exponent_bits = 15 - fraction;
    const int e = bits >> fraction & ((1 << exponent_bits) - 1), f = bits & ((1 << fraction) - 1);
    double x;
    if (e == (1 << exponent_bits) - 1)
        x = f ? NAN : INFINITY;
    else
        x = std::scalbn(f + (e ? 1 << fraction : 0), std::max(e, 1) - 1 + format.min_exponent - fraction);
    return bits & 0x8000 ? -x : x;
}

inline int fenv_of(Round mode) {
    return mode == Round::zero   ? FE_TOWARDZERO
           : mode == Round::down ? FE_DOWNWARD
           : mode == Round::up   ? FE_UPWARD
                                 : FE_TONEAREST;
}

// f(x, y, z) in a rounding mode. The values go through volatile variables, so that the compiler computes f
// between the changes of the mode.
template <class T, class F>
T rounded(Round mode, F f, T x, T y = 0, T z = 0) {
    std::fesetround(fenv_of(mode));
    volatile T a = x, b = y, c = z;
    volatile T r = f(a, b, c);
    std::fesetround(FE_TONEAREST);
    return r;
}

// x y + z, rounded to odd: the last bit is 1 if the sum is not exact, so that another rounding to fewer bits
// is right.
inline double fma_odd(double x, double y, double z) {
    std::fesetround(FE_TOWARDZERO);
    std::feclearexcept(FE_ALL_EXCEPT);
    volatile double a = x, b = y, c = z;
    volatile double r = std::fma(a, b, c);
    const bool inexact = std::fetestexcept(FE_INEXACT);
    std::fesetround(FE_TONEAREST);
    if (inexact) r = std::bit_cast<double>(std::bit_cast<uint64_t>((double)r) | 1);
    // A sum of opposite numbers is +0 in all modes except down.
    return r;
}

// -------------------------------------------------------------------------------------------------- inputs

template <class T>
std::vector<T> integer_specials() {
    using L = std::numeric_limits<T>;
    return {0,
            1,
            2,
            3,
            7,
            8,
            31,
            32,
            33,
            63,
            64,
            100,
            (T)-1,
            (T)-2,
            (T)-7,
            L::max(),
            L::min(),
            (T)(L::max() - 1),
            (T)(L::min() + 1),
            (T)(L::max() / 2),
            (T)(L::max() / 2 + 1)};
}
inline std::vector<float> float_specials() {
    using L = std::numeric_limits<float>;
    std::vector<float> all;
    for (float x : {0.0f,
                    L::denorm_min(),
                    0x1.8p-130f,
                    L::min(),
                    0x1.fffffcp-127f,
                    1e-20f,
                    0.25f,
                    0.5f,
                    0.75f,
                    1.0f,
                    1.5f,
                    2.5f,
                    0x1.fffffep0f,
                    3.0f,
                    127.5f,
                    128.0f,
                    255.5f,
                    256.0f,
                    32767.5f,
                    65503.0f,
                    65519.9f,
                    65520.0f,
                    0x1p24f,
                    0x1.fffffep30f,
                    0x1p31f,
                    0x1p32f,
                    0x1p63f,
                    0x1p64f,
                    1e20f,
                    L::max(),
                    L::infinity(),
                    L::quiet_NaN()})
        all.insert(all.end(), {x, -x});
    return all;
}

// The special values of type T.
template <class T>
std::vector<T> specials() {
    if constexpr (std::is_integral_v<T>) {
        return integer_specials<T>();
    } else if constexpr (std::is_same_v<T, float>) {
        return float_specials();
    } else {
        std::vector<double> all;
        for (float x : float_specials()) all.push_back(x);
        for (double x :
             {5e-324, 0x1p-1022, 0x1.fffffffffffffp-1023, 0x1.8p-1040, 1e300, 0x1.fffffffffffffp1023,
              0x1.fffffefp127, 0x1.ffffffp127, 0x1.0000010000001p0, 0x1.000001p0, 0x1.000003p0, 0x1p-150,
              0x1.0000000000001p-150, 4503599627370496.5, 9223372036854774784.0})
            all.insert(all.end(), {x, -x});
        return all;
    }
}

// A number of any kind: random bits, or a number of moderate size.
template <class T>
T any_number(std::mt19937_64& random) {
    const uint64_t bits = random();
    const int kind = random() % 4;
    if constexpr (std::is_integral_v<T>) {
        return kind == 0 ? (T)(bits % 64) : (T)(bits >> (random() % 64));
    } else {
        if (kind == 0) return (T)((int64_t)(bits % 2001) - 1000) / 4;
        if (kind == 1) return std::ldexp((T)(int32_t)bits, (int)(random() % 64) - 48);
        if constexpr (sizeof(T) == 8)
            return std::bit_cast<T>(bits);
        else
            return std::bit_cast<T>((uint32_t)bits);
    }
}

// Input number `which` of `of` inputs: first all tuples of special values (random tuples for three inputs),
// then random numbers.
template <class T>
std::vector<T> inputs(int which = 0, int of = 1, size_t n = 6000) {
    const std::vector<T> special = specials<T>();
    const size_t m = special.size();
    std::mt19937_64 random(97 * which + 13 * of + sizeof(T));
    std::vector<T> all;
    const size_t tuples = of == 1 ? m : of == 2 ? m * m : 4000;
    for (size_t i = 0; i < tuples; i++)
        all.push_back(special[of == 1 ? i : of == 2 ? (which ? i / m : i % m) : random() % m]);
    all.resize(std::min(all.size(), n));
    while (all.size() < n) all.push_back(any_number<T>(random));
    return all;
}

// 16-bit inputs: all bit patterns for one input, else random ones with many special values.
inline std::vector<uint16_t> inputs16(const Format& format, int which = 0, int of = 1) {
    std::vector<uint16_t> all;
    std::mt19937 random(which + 7);
    if (of == 1) {
        for (int i = 0; i < 65536; i++) all.push_back(i);
        return all;
    }
    const std::vector<double> special = {0,
                                         std::scalbn(1, format.min_exponent - format.bits + 1),
                                         std::scalbn(1, format.min_exponent),
                                         0.5,
                                         1,
                                         1.5,
                                         3,
                                         format.max,
                                         format.max / 2,
                                         INFINITY,
                                         NAN};
    for (int i = 0; i < 20000; i++) {
        uint16_t bits = random();
        const int kind = random() % 4;
        if (kind == 0) bits = encode16(special[random() % special.size()], format) | (random() % 2 << 15);
        if (kind == 1)
            bits = encode16(round_to((int)(random() % 4001 - 2000) / 16.0, format, Round::nearest), format);
        all.push_back(bits);
    }
    return all;
}
inline std::vector<uint32_t> inputs16x2(const Format& format, int which, int of) {
    const std::vector<uint16_t> low = inputs16(format, which, of),
                                high = inputs16(format, which + of, of + 1);
    std::vector<uint32_t> all;
    for (size_t i = 0; i < std::min(low.size(), (size_t)20000); i++)
        all.push_back(low[i] | (uint32_t)high[i] << 16);
    return all;
}

inline bool is_nan16(uint16_t bits, const Format& format) {
    return std::isnan(decode16(bits, format));
}

}  // namespace ptxsim_test
