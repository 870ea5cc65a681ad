// Sixteen floats at a time, by the vector extension that g++ and clang share: it compiles to AVX-512, to
// pairs of AVX2 instructions, or to whatever the machine has, with no intrinsics. And the aligned memory to
// load them from.
#pragma once
#include <cstdint>
#include <cstring>

namespace cpu {

constexpr int kLanes = 16;

typedef float vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t vint __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t vuint __attribute__((vector_size(kLanes * sizeof(float))));  // may wrap around

inline vec load(const float* p) {
    vec v;
    memcpy(&v, p, sizeof(v));
    return v;
}

inline void store(float* p, vec v) {
    memcpy(p, &v, sizeof(v));
}

// The first n lanes, 0 < n <= kLanes; load fills the rest with zeros.
inline vec load(const float* p, int n) {
    if (n == kLanes) return load(p);
    vec v = {};
    memcpy(&v, p, sizeof(float) * n);
    return v;
}

inline void store(float* p, vec v, int n) {
    if (n == kLanes) return store(p, v);
    memcpy(p, &v, sizeof(float) * n);
}

inline vec broadcast(float x) {
    return vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

inline float sum(vec v) {
    float s[kLanes];
    store(s, v);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

inline vec max(vec a, vec b) {
    return a > b ? a : b;
}
inline vec abs(vec v) {
    return (vec)((vint)v & 0x7FFFFFFF);
}

// exp(x) to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, exp(x) = 2^n P(r), P the minimax polynomial of
// Cephes' expf. Results below 3.7e-38 are 0, those past the largest float Inf; NaN comes out as NaN.
inline vec exp(vec x) {
    const vec low = broadcast(-86.2f), high = broadcast(89.0f);
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    vec clamped = x < low ? low : x;  // a comparison with NaN is false, which keeps it
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
    // 2^(n-1) goes into the exponent's bits, the last factor 2 is a product: it overflows to Inf where it
    // must.
    vec result = (vec)((vuint)p + (((vuint)shifted - 1) << 23)) * 2.0f;
    result = x < low ? vec{} : result;
    return x != x ? x : result;
}

}  // namespace cpu
