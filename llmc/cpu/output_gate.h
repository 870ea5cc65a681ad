// The gate on attention's output (arXiv 2505.06708): every channel is multiplied by the sigmoid of a number
// of its own. A linear layer makes these numbers from the input of the qkv projection.
#pragma once
#include <algorithm>
#include <cstddef>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

constexpr size_t kOutputGateBlock = 4096;

// sigmoid(z) and its derivative, both from exp(-|z|). 1 - sigmoid(z) would lose the digits of the derivative
// where z is large.
inline void sigmoid_and_slope(vec& sigmoid, vec& slope, vec z) {
    const vec e = exp(-abs(z)), reciprocal = 1.0f / (1.0f + e), far = e * reciprocal;
    sigmoid = z < 0.0f ? far : reciprocal;
    slope = far * reciprocal;
}

// Calls f(i, lanes) for each vector of n numbers, with all threads.
template <class F>
inline void for_gate_vectors(size_t n, F f) {
#pragma omp parallel for schedule(static)
    for (size_t i0 = 0; i0 < n; i0 += kOutputGateBlock)
        for_vectors((int)std::min(kOutputGateBlock, n - i0), [&](int i, int lanes) { f(i0 + i, lanes); });
}

// out = inp sigmoid(gate).
template <class Real>
inline void output_gate_forward(Real* out,         // (n)
                                const Real* inp,   // (n)
                                const Real* gate,  // (n)
                                size_t n) {
    for_gate_vectors(n, [&](size_t i, int lanes) {
        vec sigmoid, slope;
        sigmoid_and_slope(sigmoid, slope, load(gate + i, lanes));
        store(out + i, load(inp + i, lanes) * sigmoid, lanes);
    });
}

template <class Real>
inline void output_gate_backward(Real* dinp,        // (n), may be dout
                                 Real* dgate,       // (n)
                                 const Real* dout,  // (n)
                                 const Real* inp,   // (n)
                                 const Real* gate,  // (n)
                                 size_t n) {
    for_gate_vectors(n, [&](size_t i, int lanes) {
        vec sigmoid, slope, d = load(dout + i, lanes);
        sigmoid_and_slope(sigmoid, slope, load(gate + i, lanes));
        store(dgate + i, d * load(inp + i, lanes) * slope, lanes);
        store(dinp + i, d * sigmoid, lanes);
    });
}

}  // namespace cpu
