// Vectors of sixteen floats. They use the vector extension of g++ and clang, which compiles to AVX-512, to
// pairs of AVX2 instructions, or to what else the machine has. In memory the numbers are float or bf16.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "llmc/cpu/bf16.h"
#include "llmc/cpu/isa.h"

namespace cpu::inline LLMC_ISA {

constexpr int kLanes = 16;

typedef float vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t vint __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t vuint __attribute__((vector_size(kLanes * sizeof(float))));  // may wrap around
typedef uint16_t vhalf __attribute__((vector_size(kLanes * sizeof(uint16_t))));

inline vec load(const float* p) {
    vec v;
    memcpy(&v, p, sizeof(v));
    return v;
}

inline void store(float* p, vec v) {
    memcpy(p, &v, sizeof(v));
}

inline vec load(const bf16* p) {
    vhalf h;
    memcpy(&h, p, sizeof(h));
    return (vec)(__builtin_convertvector(h, vuint) << 16);
}

// Rounds each lane to bf16, to nearest even. The result is in the upper half of the lane; the lower half is
// not cleared. NaN stays NaN.
inline vuint round_to_bf16(vec v) {
    vuint u = (vuint)v;
    return v != v ? u | 0x400000u : u + 0x7FFFu + (u >> 16 & 1u);
}

inline void store(bf16* p, vec v) {
#ifdef __AVX512BF16__
    auto h = _mm512_cvtneps_pbh((__m512)v);
#else
    vhalf h = __builtin_convertvector(round_to_bf16(v) >> 16, vhalf);
#endif
    memcpy((void*)p, &h, sizeof(h));
}

// load() and store() for the first n lanes, 0 < n <= kLanes. load() fills the rest with zeros.
template <class Real>
inline vec load(const Real* p, int n) {
    if (n == kLanes) return load(p);
    Real lanes[kLanes] = {};
    memcpy(lanes, p, sizeof(Real) * n);
    return load(lanes);
}

template <class Real>
inline void store(Real* p, vec v, int n) {
    if (n == kLanes) return store(p, v);
    Real lanes[kLanes];
    store(lanes, v);
    memcpy((void*)p, lanes, sizeof(Real) * n);
}

// Calls f(c, lanes) for each vector of C numbers. `lanes` is kLanes except for the last vector.
template <class F>
inline void for_vectors(int C, F f) {
    int c = 0;
    for (; c + kLanes <= C; c += kLanes) f(c, kLanes);
    if (c < C) f(c, C - c);
}

inline vec broadcast(float x) {
    return vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

inline vint lane_index() {
    return vint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

inline float sum(vec v) {
    typedef float half __attribute__((vector_size(8 * sizeof(float))));
    typedef float quarter __attribute__((vector_size(4 * sizeof(float))));
    half h[2];
    memcpy(h, &v, sizeof(v));
    h[0] += h[1];
    quarter q[2];
    memcpy(q, h, sizeof(q));
    q[0] += q[1];
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

inline vec max(vec a, vec b) {
    return a > b ? a : b;
}
inline vec abs(vec v) {
    return (vec)((vint)v & 0x7FFFFFFF);
}

// exp(x) to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, so exp(x) = 2^n P(r), where P is the minimax
// polynomial of Cephes' expf. Results below 3.7e-38 are 0, results beyond the largest float are Inf, and NaN
// gives NaN.
inline vec exp(vec x) {
    const vec low = broadcast(-86.2f), high = broadcast(89.0f);
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    vec clamped = x < low ? low : x;  // NaN stays, because a comparison with it is false
    clamped = clamped > high ? high : clamped;
    vec shifted = clamped * 1.44269504088896341f + magic;
    vec n = shifted - magic;
    vec r = clamped - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // n-1 is added to the bits of the exponent. The last factor 2 is a multiplication, because that overflows
    // to Inf correctly.
    vec result = (vec)((vuint)p + (((vuint)shifted - 1) << 23)) * 2.0f;
    result = x < low ? vec{} : result;
    return x != x ? x : result;
}

// What activations (llmc/activation.h) compute with.
struct VectorMath {
    vec exp(vec x) const { return cpu::exp(x); }
    vec reciprocal(vec x) const { return 1.0f / x; }
};

}  // namespace cpu
