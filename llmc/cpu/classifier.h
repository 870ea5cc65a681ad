// The end of the model: the output projection, whose weights are the token embedding, and the cross-entropy.
// Both work on chunks of rows, so the logits of a whole batch never exist at the same time.
#pragma once
#include <algorithm>
#include <cstddef>

#include "llmc/cpu/cross_entropy.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/matmul.h"

namespace cpu::inline LLMC_ISA {

// Rows of logits in a chunk: at most 64 MiB, but at least 128 rows, so that the matrix product is efficient.
inline int classifier_rows(int N, int Vp) {
    return std::min(N, std::max(128, (16 << 20) / Vp));
}

// Computes the loss of every row. If dinp is not null, it also computes dinp and dwte, the gradients of dloss
// times the sum of the losses.
template <class Real>
inline void classifier(float* losses,       // (N)
                       Real* dinp,          // (N,C), or null: no gradient is wanted
                       float* dwte,         // (Vp,C) += if `accumulate`, otherwise =
                       float* logits,       // (classifier_rows(N,Vp),Vp), scratch
                       Real* dlogits,       // (classifier_rows(N,Vp),Vp), scratch; may be logits
                       const Real* inp,     // (N,C)
                       const Real* wte,     // (Vp,C)
                       const int* targets,  // (N)
                       float dloss, bool accumulate, int N, int C, int V, int Vp) {
    int chunk = classifier_rows(N, Vp);
    for (int n0 = 0; n0 < N; n0 += chunk) {
        int n = std::min(chunk, N - n0);
        const Real* x = inp + (size_t)n0 * C;
        matmul(logits, x, wte, n, Vp, C, false, true, false);
        cross_entropy(losses + n0, dinp ? dlogits : nullptr, logits, targets + n0, dloss, n, V, Vp);
        if (!dinp) continue;
        matmul(dinp + (size_t)n0 * C, dlogits, wte, n, C, Vp, false, false, false);
        matmul(dwte, dlogits, x, Vp, C, n, true, false, accumulate || n0 > 0);
    }
}

}  // namespace cpu
