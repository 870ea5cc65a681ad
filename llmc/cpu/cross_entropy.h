// Softmax cross-entropy over the vocabulary, loss and gradient in one pass.
#pragma once
#include <cmath>
#include <cstddef>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

// losses = -log softmax(logits[:V])[target]. Where dlogits is wanted, it is the gradient times dloss, zero in
// the padding V..Vp, and the logits are lost.
template <class Real>
inline void cross_entropy(float* losses,       // (N)
                          Real* dlogits,       // (N,Vp), or null: not wanted; may be logits
                          float* logits,       // (N,Vp)
                          const int* targets,  // (N)
                          float dloss, int N, int V, int Vp) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        float* row = logits + (size_t)n * Vp;
        float largest = row[0];
        int v = 0;
        if (V >= kLanes) {
            vec most = load(row);
            for (v = kLanes; v + kLanes <= V; v += kLanes) most = max(most, load(row + v));
            for (int i = 0; i < kLanes; i++) largest = most[i] > largest ? most[i] : largest;
        }
        for (; v < V; v++) largest = row[v] > largest ? row[v] : largest;
        float target = row[targets[n]];
        // The sum is in double over partial sums of one vector: V is large, and its rounding would show in
        // the loss.
        double total = 0;
        for (v = 0; v < V; v += kLanes) {
            int lanes = V - v < kLanes ? V - v : kLanes;
            vec e = exp(load(row + v, lanes) - largest);
            if (lanes == kLanes) {
                total += sum(e);
            } else {
                for (int i = 0; i < lanes; i++) total += e[i];
            }
            if (dlogits) store(row + v, e, lanes);
        }
        losses[n] = (float)(std::log(total) + (largest - target));
        if (!dlogits) continue;
        float factor = (float)(dloss / total);
        Real* d = dlogits + (size_t)n * Vp;
        float probability = row[targets[n]] * factor;
        for (v = 0; v < V; v += kLanes) {
            int lanes = V - v < kLanes ? V - v : kLanes;
            store(d + v, load(row + v, lanes) * factor, lanes);
        }
        d[targets[n]] = probability - dloss;
        for (v = V; v < Vp; v++) d[v] = 0;
    }
}

}  // namespace cpu
