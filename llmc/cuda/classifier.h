// The end of the model: the output projection, tied to the token embedding, and cross-entropy. They go
// through chunks of rows, so that the logits of a whole batch never exist at once.
#pragma once
#include <algorithm>
#include <cstddef>

#include "llmc/cuda/cross_entropy.h"
#include "llmc/cuda/matmul.h"

namespace gpu {

// The number of rows in a chunk. Each chunk reads and writes all of dwte; with 128 Mi logits in a chunk the
// product takes so much longer that this does not count.
inline int classifier_rows(int N, int Vp) {
    return std::min(N, std::max(128, (128 << 20) / Vp / 128 * 128));
}

// Writes the loss of every row. If dinp is wanted, also makes dinp and dwte, the gradients of dloss times the
// sum of the losses. A chunk has `rows` rows.
template <class Real, class Gradient>
void classifier(float* losses,       // (N)
                Real* dinp,          // (N,C), or null: no gradient is wanted
                Gradient* dwte,      // (Vp,C) +=, or = without `accumulate`
                Real* logits,        // (rows,Vp), scratch
                const Real* inp,     // (N,C)
                const Real* wte,     // (Vp,C)
                const int* targets,  // (N)
                float dloss, bool accumulate, int rows, int N, int C, int V, int Vp, MatmulContext& context,
                cudaStream_t stream) {
    for (int n0 = 0; n0 < N; n0 += rows) {
        int n = std::min(rows, N - n0);
        const Real* x = inp + (size_t)n0 * C;
        matmul(logits, x, wte, n, Vp, C, false, true, false, {}, context, stream);
        cross_entropy(losses + n0, dinp ? logits : nullptr, logits, targets + n0, dloss, n, V, Vp, stream);
        if (!dinp) continue;
        matmul(dinp + (size_t)n0 * C, logits, wte, n, C, Vp, false, false, false, {}, context, stream);
        matmul(dwte, logits, x, Vp, C, n, true, false, accumulate || n0 > 0, {}, context, stream);
    }
}

template <class Real, class Gradient>
void classifier(float* losses,       // (N)
                Real* dinp,          // (N,C), or null: no gradient is wanted
                Gradient* dwte,      // (Vp,C) +=, or = without `accumulate`
                Real* logits,        // (classifier_rows(N,Vp),Vp), scratch
                const Real* inp,     // (N,C)
                const Real* wte,     // (Vp,C)
                const int* targets,  // (N)
                float dloss, bool accumulate, int N, int C, int V, int Vp, MatmulContext& context,
                cudaStream_t stream) {
    classifier(losses, dinp, dwte, logits, inp, wte, targets, dloss, accumulate, classifier_rows(N, Vp), N, C,
               V, Vp, context, stream);
}

}  // namespace gpu
