// GELU in its tanh form, x sigmoid(u2): llmc/layer_constants.h has the formula.
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"
#include "llmc/layer_constants.h"

namespace cpu::inline LLMC_ISA {

constexpr size_t kGeluBlock = 4096;

inline vec gelu(vec x) {
    vec u2 = x * kGeluScale * (1.0f + kGeluCubic * x * x);
    return x / (1.0f + exp(-u2));
}

inline vec gelu_derivative(vec x) {
    x = x < -kGeluFar ? broadcast(-kGeluFar) : x > kGeluFar ? broadcast(kGeluFar) : x;
    vec u2 = x * kGeluScale * (1.0f + kGeluCubic * x * x);
    vec sigmoid = 1.0f / (1.0f + exp(-u2));
    vec du2 = kGeluScale * (1.0f + 3.0f * kGeluCubic * x * x);
    return sigmoid + x * sigmoid * (1.0f - sigmoid) * du2;
}

template <class Real>
inline void gelu_forward(Real* out,        // (n)
                         const Real* inp,  // (n)
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

// Also adds the sum of the rows of dinp to dbias, the gradient of the bias in front of the GELU, because the
// values are in registers here. Each block of rows is summed on its own and then the blocks in order, so the
// sums do not depend on the number of threads.
template <class Real>
inline void gelu_backward(Real* dinp,        // (N,C), may be dout
                          float* dbias,      // (C) +=
                          const Real* dout,  // (N,C)
                          const Real* inp,   // (N,C)
                          int N, int C) {
    constexpr int kRows = 64;
    int blocks = (N + kRows - 1) / kRows;
    std::vector<float> partial((size_t)blocks * C, 0.0f);  // (blocks,C)
#pragma omp parallel for schedule(static)
    for (int block = 0; block < blocks; block++) {
        float* sums = partial.data() + (size_t)block * C;
        int end = std::min(N, (block + 1) * kRows);
        for (int n = block * kRows; n < end; n++) {
            size_t row = (size_t)n * C;
            for (int c = 0; c < C; c += kLanes) {
                int lanes = std::min(kLanes, C - c);
                vec d = load(dout + row + c, lanes) * gelu_derivative(load(inp + row + c, lanes));
                store(dinp + row + c, d, lanes);
                store(sums + c, load(sums + c, lanes) + d, lanes);
            }
        }
    }
    for (int block = 0; block < blocks; block++)
        for (int c = 0; c < C; c++) dbias[c] += partial[(size_t)block * C + c];
}

}  // namespace cpu
