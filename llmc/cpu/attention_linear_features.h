// The features of polynomial attention at linear cost, and their gradient.
//
//   (q.k)^p = phi(q) . phi(k), where phi holds the products of p channels (arXiv 2507.04239, "symmetric
//   power")
//
// The features come in tiles of at most 64 products, so that phi is built from whole vectors and the rest of
// the work is tile_product. A tile has the products of p blocks of channels: 8 x 8 channels for p = 2, 4 x 4 x
// 4 channels for p = 3. Only tiles with ordered blocks (A <= B <= C) exist. Their products are multiplied by
// the number of arrangements of the blocks, on the side of the queries. For p = 1 there are no tiles, because
// the features are the channels (attention_linear_poly1.h).
//
// A block of p = 2 with itself has every product of two different channels twice, so 40 of its 64 products
// are enough. They are x_i x_(i+s mod 8) for the steps s = 0 .. 4: those of s = 1, 2, 3 count twice, and s =
// 4 has its own products twice already.
//
// Phi of 64 tokens is stored in words (tile.h) for two uses. Pairs are of two neighbouring features in a sum
// over features, and of two neighbouring tokens in a sum over tokens.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/tile.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

struct FeatureTile {
    int block[3];        // the first channel of each block
    float multiplicity;  // number of arrangements of the blocks
    int row;             // row of the state with its first feature
    int features;        // at most 64, a multiple of kTileRows
};

constexpr int kBlock2 = 8;                   // channels in a block for p = 2
constexpr int kSteps2 = kBlock2 / 2 + 1;     // of a block with itself
constexpr int kSquare2 = kBlock2 * kSteps2;  // features of a block with itself

inline std::vector<FeatureTile> feature_tiles(int power, int D) {
    std::vector<FeatureTile> tiles;
    auto add = [&](int a, int b, int c, float multiplicity, int features) {
        int row = tiles.empty() ? 0 : tiles.back().row + tiles.back().features;
        tiles.push_back({{a, b, c}, multiplicity, row, features});
    };
    if (power == 2)
        for (int a = 0; a < D; a += kBlock2)
            for (int b = a; b < D; b += kBlock2) add(a, b, 0, a == b ? 1 : 2, a == b ? kSquare2 : kTile);
    if (power == 3)
        for (int a = 0; a < D; a += 4)
            for (int b = a; b < D; b += 4)
                for (int c = b; c < D; c += 4) add(a, b, c, a == c ? 1 : a == b || b == c ? 3 : 6, kTile);
    return tiles;
}

inline int feature_count(int power, int D) {
    if (power == 1) return padded(D);
    const FeatureTile last = feature_tiles(power, D).back();
    return last.row + last.features;
}

// How often the products of step s count.
inline float step_multiplicity(int step) {
    return step == 0 || step == kSteps2 - 1 ? 1.0f : 2.0f;
}

enum class PairsOf { features, tokens };

// phi = the products of one tile of features, times the weights of the tokens if there are any. Those of
// queries count as often as they have arrangements.
template <int kPower, PairsOf kPairs, class Word>
inline void build_features(Word* phi,  // (features/N,64 tokens), or (features,64/N) with pairs of tokens
                           const float* xt,  // (Dp,64 tokens)
                           const FeatureTile& tile,
                           const float* weights,  // (64 tokens), or null
                           bool of_queries) {
    static_assert(kPower == 2 || kPower == 3);
    const float *a = xt + tile.block[0] * kTile, *b = xt + tile.block[1] * kTile,
                *c = xt + tile.block[2] * kTile;
    const float factor = of_queries ? tile.multiplicity : 1.0f;
    for (int t = 0; t < kTile; t += kLanes) {
        const vec weight = weights ? load(weights + t) * factor : broadcast(factor);
        int f = 0;
        auto append = [&](vec first, vec second) {
            if constexpr (std::is_same_v<Word, float>) {
                store(phi + f * kTile + t, first);
                store(phi + (f + 1) * kTile + t, second);
            } else if constexpr (kPairs == PairsOf::features) {
                store_pairs(phi + f / 2 * kTile + t, first, second);
            } else {
                store((bf16*)phi + f * kTile + t, first);
                store((bf16*)phi + (f + 1) * kTile + t, second);
            }
            f += 2;
        };
        auto x = [&](const float* block, int i) { return load(block + i * kTile + t); };
        if constexpr (kPower == 2) {
            if (a == b) {
                for (int s = 0; s < kSteps2; s++) {
                    const vec step_weight = of_queries ? weight * step_multiplicity(s) : weight;
                    for (int i = 0; i < kBlock2; i += 2)
                        append(x(a, i) * step_weight * x(a, (i + s) % kBlock2),
                               x(a, i + 1) * step_weight * x(a, (i + 1 + s) % kBlock2));
                }
            } else {
                for (int i = 0; i < kBlock2; i++) {
                    const vec left = x(a, i) * weight;
                    for (int j = 0; j < kBlock2; j += 2) append(left * x(b, j), left * x(b, j + 1));
                }
            }
        }
        if constexpr (kPower == 3)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) {
                    const vec xy = x(a, i) * weight * x(b, j);
                    for (int k = 0; k < 4; k += 2) append(xy * x(c, k), xy * x(c, k + 1));
                }
    }
}

// Adds the gradient of x, which follows from dphi, without the weights of the tokens.
template <int kPower>
inline void feature_gradients(float* dxt,         // (Dp,64 tokens) +=
                              const float* dphi,  // (features,64 tokens)
                              const float* xt,    // (Dp,64 tokens)
                              const FeatureTile& tile, bool of_queries) {
    const int A = tile.block[0] * kTile, B = tile.block[1] * kTile, C = tile.block[2] * kTile;
    const float factor = of_queries ? tile.multiplicity : 1.0f;
    for (int t = 0; t < kTile; t += kLanes) {
        const float* d = dphi + t;
        auto next = [&] { return load(std::exchange(d, d + kTile)); };
        auto add = [&](int at, vec value) { store(dxt + at + t, load(dxt + at + t) + value); };
        auto x = [&](int at) { return load(xt + at + t); };
        if constexpr (kPower == 2) {
            vec right[kBlock2], dright[kBlock2] = {};  // these stay in registers
#pragma GCC unroll 8
            for (int j = 0; j < kBlock2; j++) right[j] = x(B + j * kTile);
            if (A == B) {
#pragma GCC unroll 8
                for (int s = 0; s < kSteps2; s++) {
                    const float multiplicity = of_queries ? step_multiplicity(s) : 1.0f;
#pragma GCC unroll 8
                    for (int i = 0; i < kBlock2; i++) {
                        const vec g = next() * multiplicity;
                        dright[i] += g * right[(i + s) % kBlock2];
                        dright[(i + s) % kBlock2] += g * right[i];
                    }
                }
            } else {
                for (int i = 0; i < kBlock2; i++) {
                    const vec left = x(A + i * kTile) * factor;
                    vec dleft = {};
#pragma GCC unroll 8
                    for (int j = 0; j < kBlock2; j++) {
                        const vec g = next();
                        dleft += g * right[j];
                        dright[j] += g * left;
                    }
                    add(A + i * kTile, dleft * factor);
                }
            }
#pragma GCC unroll 8
            for (int j = 0; j < kBlock2; j++) add(B + j * kTile, dright[j]);
        }
        if constexpr (kPower == 3)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) {
                    const vec left = x(A + i * kTile) * factor, middle = x(B + j * kTile);
                    const vec both = left * middle;
                    vec sum = {};
                    for (int k = 0; k < 4; k++) {
                        const vec g = next();
                        sum += g * x(C + k * kTile);
                        add(C + k * kTile, g * both);
                    }
                    add(A + i * kTile, sum * middle * factor);
                    add(B + j * kTile, sum * left);
                }
    }
}

}  // namespace cpu
