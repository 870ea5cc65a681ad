// Token embedding plus learned positions.
#pragma once
#include <cstddef>

#include "llmc/cpu/isa.h"

namespace cpu::inline LLMC_ISA {

template <class Real>
inline void embedding_forward(float* out,         // (B,T,C)
                              const int* tokens,  // (B,T)
                              const Real* wte,    // (V,C)
                              const Real* wpe,    // (at least T,C), or null: no position table
                              int B, int T, int C) {
#pragma omp parallel for schedule(static)
    for (int bt = 0; bt < B * T; bt++) {
        float* o = out + (size_t)bt * C;
        const Real* token = wte + (size_t)tokens[bt] * C;
        if (wpe) {
            const Real* position = wpe + (size_t)(bt % T) * C;
            for (int c = 0; c < C; c++) o[c] = (float)token[c] + (float)position[c];
        } else {
            for (int c = 0; c < C; c++) o[c] = (float)token[c];
        }
    }
}

// Two positions may have the same token. So the channels, not the positions, are divided among the threads:
// no two threads write to the same place, and the order of the additions does not depend on their number.
inline void embedding_backward(float* dwte,        // (V,C) +=
                               float* dwpe,        // (at least T,C) +=, or null
                               const float* dout,  // (B,T,C)
                               const int* tokens,  // (B,T)
                               int B, int T, int C) {
    constexpr int kColumns = 64;
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < C; c0 += kColumns) {
        int c1 = c0 + kColumns < C ? c0 + kColumns : C;
        for (int bt = 0; bt < B * T; bt++) {
            const float* d = dout + (size_t)bt * C;
            float* token = dwte + (size_t)tokens[bt] * C;
            for (int c = c0; c < c1; c++) token[c] += d[c];
            if (!dwpe) continue;
            float* position = dwpe + (size_t)(bt % T) * C;
            for (int c = c0; c < c1; c++) position[c] += d[c];
        }
    }
}

}  // namespace cpu
