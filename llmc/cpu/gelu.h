// GELU in its tanh form, "gelu_new" (arXiv 1606.08415): gelu(x) = x/2 (1 + tanh(u)), u = sqrt(2/pi)(x +
// 0.044715 x^3). Computed as x sigmoid(2u), the same thing, which keeps its digits where 1 + tanh(u) would
// cancel.
#pragma once
#include <cstddef>

#include "llmc/cpu/vector.h"

namespace cpu {

constexpr float kGeluScale = 1.5957691216057308f;  // 2 sqrt(2/pi)
constexpr float kGeluCubic = 0.044715f;
constexpr size_t kGeluBlock = 4096;

inline vec gelu(vec x) {
    vec u2 = x * kGeluScale * (1.0f + kGeluCubic * x * x);
    return x / (1.0f + exp(-u2));
}

inline vec gelu_derivative(vec x) {
    const float far = 1e4f;  // it is 0 or 1 long before, while further out x^3 overflows
    x = x < -far ? broadcast(-far) : x > far ? broadcast(far) : x;
    vec u2 = x * kGeluScale * (1.0f + kGeluCubic * x * x);
    vec sigmoid = 1.0f / (1.0f + exp(-u2));
    vec du2 = kGeluScale * (1.0f + 3.0f * kGeluCubic * x * x);
    return sigmoid + x * sigmoid * (1.0f - sigmoid) * du2;
}

inline void gelu_forward(float* out,        // (n)
                         const float* inp,  // (n)
                         size_t n) {
#pragma omp parallel for schedule(static)
    for (size_t i0 = 0; i0 < n; i0 += kGeluBlock) {
        size_t end = i0 + kGeluBlock < n ? i0 + kGeluBlock : n;
        for (size_t i = i0; i < end; i += kLanes) {
            int lanes = end - i < (size_t)kLanes ? (int)(end - i) : kLanes;
            store(out + i, gelu(load(inp + i, lanes)), lanes);
        }
    }
}

inline void gelu_backward(float* dinp,        // (n), may be dout
                          const float* dout,  // (n)
                          const float* inp,   // (n)
                          size_t n) {
#pragma omp parallel for schedule(static)
    for (size_t i0 = 0; i0 < n; i0 += kGeluBlock) {
        size_t end = i0 + kGeluBlock < n ? i0 + kGeluBlock : n;
        for (size_t i = i0; i < end; i += kLanes) {
            int lanes = end - i < (size_t)kLanes ? (int)(end - i) : kLanes;
            store(dinp + i, load(dout + i, lanes) * gelu_derivative(load(inp + i, lanes)), lanes);
        }
    }
}

}  // namespace cpu
