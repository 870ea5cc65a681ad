// The cosines and sines of rotary positions, in the layout that the layers of both trainers read.
#pragma once
#include <cmath>
#include <cstddef>
#include <vector>

#include "llmc/config.h"

// Returns (T,D) for the positions from `first` on. The row of position t is cos(t w_i) for i < D/2, then
// sin(t w_i), with w_i = 10000^(-2i/D).
inline std::vector<float> rope_table(int T, int D, int first = 0) {
    std::vector<float> table((size_t)T * D);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < D / 2; i++) {
            double angle = (first + t) * std::pow(10000.0, -2.0 * i / D);
            table[(size_t)t * D + i] = (float)std::cos(angle);
            table[(size_t)t * D + D / 2 + i] = (float)std::sin(angle);
        }
    return table;
}

// The same for a model.
inline std::vector<float> rope_table(const GPTConfig& config, int T, int first) {
    return rope_table(T, config.head_size(), first);
}
