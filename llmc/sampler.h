// Chooses the next token from logits.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "llmc/error.h"
#include "llmc/rng.h"

struct SamplerOptions {
    double temperature = 1.0;  // 0: always the most likely token
    int top_k = 0;             // keep the k most likely; 0: all
    double top_p = 1.0;        // keep the fewest most likely tokens whose probabilities reach top_p
    uint64_t seed = 1;
};

struct NonfiniteLogits : Error {
    NonfiniteLogits() : Error(kExitFailure, "the model's logits are not finite: its weights have diverged") {}
};

// Draws token number `index` of a text from logits (V). First the temperature is applied, then top-k, then
// top-p. If two logits are equal, the lower token id comes first.
inline int sample_token(const float* logits, int V, const SamplerOptions& options, uint64_t index) {
    for (int v = 0; v < V; v++)
        if (!std::isfinite(logits[v])) throw NonfiniteLogits();
    if (options.temperature == 0) return (int)(std::max_element(logits, logits + V) - logits);
    std::vector<int> order(V);
    std::iota(order.begin(), order.end(), 0);
    auto likelier = [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    int kept = options.top_k > 0 ? std::min(options.top_k, V) : V;
    if (kept < V) {
        std::partial_sort(order.begin(), order.begin() + kept, order.end(), likelier);
    } else if (options.top_p < 1) {
        std::sort(order.begin(), order.end(), likelier);
    }
    double largest = *std::max_element(logits, logits + V), total = 0;
    std::vector<double> weights(kept);
    for (int i = 0; i < kept; i++)
        total += weights[i] = std::exp((logits[order[i]] - largest) / options.temperature);
    if (options.top_p < 1) {
        double limit = options.top_p * total, sum = 0;
        int n = 0;
        while (n < kept && sum < limit) sum += weights[n++];
        kept = std::max(n, 1);
        total = std::accumulate(weights.begin(), weights.begin() + kept, 0.0);
    }
    double draw = random_uniform(options.seed, random_stream("sampler"), index) * total;
    for (int i = 0; i < kept; i++) {
        draw -= weights[i];
        if (draw < 0) return order[i];
    }
    return order[kept - 1];
}
