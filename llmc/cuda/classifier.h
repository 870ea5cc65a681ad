// The end of the model: output projection tied to the token embedding, and cross-entropy, in chunks of rows,
// so that the logits of a whole batch never exist.
#pragma once
#include <algorithm>
#include <cstddef>

#include "llmc/cuda/cross_entropy.h"
#include "llmc/cuda/matmul.h"

namespace gpu {

// Rows of logits at a time. Each chunk reads and writes all of dwte, which 128 Mi logits hide behind the
// product.
inline int classifier_rows(int N, int Vp) {
    return std::min(N, std::max(128, (128 << 20) / Vp / 128 * 128));
}

// losses of every row. Where dinp is wanted, also dinp and dwte: the gradient of the sum of the losses times
// dloss. A chunk is of `rows` rows.
template <class Real, class Gradient>
void classifier(float* losses,       // (N)
                Real* dinp,          // (N,C), or null: no gradient is wanted
                Gradient* dwte,      // (Vp,C) += or, where not `accumulate`, =
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
                Gradient* dwte,      // (Vp,C) += or, where not `accumulate`, =
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
