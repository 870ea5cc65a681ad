// Softmax cross-entropy over the vocabulary: the loss and, if wanted, its gradient.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

// losses = -log softmax(logits[:V])[target], and 0 where the target is -1. If dlogits is not null, it gets
// the gradient of dloss times the sum of the losses, with zeros in the padding V..Vp, and the logits are
// overwritten.
template <class Real>
inline void cross_entropy(float* losses,       // (N)
                          Real* dlogits,       // (N,Vp), or null: not wanted; may be logits
                          float* logits,       // (N,Vp)
                          const int* targets,  // (N)
                          float dloss, int N, int V, int Vp) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        float* row = logits + (size_t)n * Vp;
        if (targets[n] < 0) {
            losses[n] = 0;
            if (dlogits) std::fill_n(dlogits + (size_t)n * Vp, Vp, Real(0.0f));
            continue;
        }
        float largest = row[0];
        int v = 0;
        if (V >= kLanes) {
            vec maxima = load(row);
            for (v = kLanes; v + kLanes <= V; v += kLanes) maxima = max(maxima, load(row + v));
            for (int i = 0; i < kLanes; i++) largest = maxima[i] > largest ? maxima[i] : largest;
        }
        for (; v < V; v++) largest = row[v] > largest ? row[v] : largest;
        float target = row[targets[n]];
        // Partial sums of one vector are added in double, because V is large and the rounding of a float sum
        // would be visible in the loss.
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
