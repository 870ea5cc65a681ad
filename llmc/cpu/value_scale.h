// Softmax and sigmoid attention with --attention-scale NUMBER: A is that many times as large. Multiplying the
// values does the same, and attention itself need not know.
#pragma once
#include <cstddef>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

// v *= factor in rows of q, k and v. The backward pass is the same function on the gradients.
template <class Real>
inline void scale_values(Real* qkv /*(N,3C)*/, float factor, int N, int C) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        Real* v = qkv + (size_t)n * 3 * C + 2 * C;
        for_vectors(C, [&](int c, int lanes) { store(v + c, load(v + c, lanes) * factor, lanes); });
    }
}

}  // namespace cpu
