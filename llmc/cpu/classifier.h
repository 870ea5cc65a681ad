// The end of the model: output projection tied to the token embedding, and cross-entropy, in chunks of rows,
// so that the logits of a whole batch never exist.
#pragma once
#include <algorithm>
#include <cstddef>

#include "llmc/cpu/cross_entropy.h"
#include "llmc/cpu/isa.h"
#include "llmc/cpu/matmul.h"

namespace cpu::inline LLMC_ISA {

// Rows of logits at a time: at most 64 MiB of them, but enough for the matrix product to be efficient.
inline int classifier_rows(int N, int Vp) {
    return std::min(N, std::max(128, (16 << 20) / Vp));
}

// losses of every row. Where dinp is wanted, also dinp and dwte: the gradient of the sum of the losses times
// dloss.
template <class Real>
inline void classifier(float* losses,       // (N)
                       Real* dinp,          // (N,C), or null: no gradient is wanted
                       float* dwte,         // (Vp,C) += or, where not `accumulate`, =
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
