// The features phi of polynomial attention at linear cost: (q . k)^p = phi(q) . phi(k). A feature is a
// product of p channels. Features come in tiles of 64, as in llmc/cpu/attention_linear.h: the channels are
// divided into blocks of 64 for p = 1, of 8 for p = 2 and of 4 for p = 3, and a tile has every product of one
// channel from each of its p blocks. Its blocks come in order (a <= b <= c), and its multiplicity says in how
// many orders they could come.
#pragma once
#include "llmc/cuda/attention/linear.h"
#include "llmc/cuda/vector.h"

namespace gpu {

template <int P>
struct FeatureTile {
    static_assert(P >= 1 && P <= 3);
    int a = 0, b = 0, c = 0;  // the numbers of its blocks

    __device__ static FeatureTile at(int index, int blocks) {
        FeatureTile tile;
        if constexpr (P == 3)
            for (int n = blocks; index >= n * (n + 1) / 2; n--, tile.a++) index -= n * (n + 1) / 2;
        if constexpr (P == 1) tile.a = index;
        if constexpr (P == 2) {
            for (; index >= blocks - tile.a; tile.a++) index -= blocks - tile.a;
            tile.b = tile.a + index;
        }
        if constexpr (P == 3) {
            for (tile.b = tile.a; index >= blocks - tile.b; tile.b++) index -= blocks - tile.b;
            tile.c = tile.b + index;
        }
        return tile;
    }
    __device__ void next(int blocks) {
        if constexpr (P == 1) a++;
        if constexpr (P == 2)
            if (++b == blocks) b = ++a;
        if constexpr (P == 3)
            if (++c == blocks) {
                if (++b == blocks) b = ++a;
                c = b;
            }
    }
    __device__ float multiplicity() const {
        if constexpr (P == 1) return 1;
        if constexpr (P == 2) return a == b ? 1 : 2;
        return a == c ? 1 : a == b || b == c ? 3 : 6;
    }
    // Feature f of the tile, where x(c) returns channel c.
    template <class X>
    __device__ float product(int f, X x) const {
        if constexpr (P == 1) return x(64 * a + f);
        if constexpr (P == 2) return x(8 * a + f / 8) * x(8 * b + f % 8);
        if constexpr (P == 3) return x(4 * a + f / 16) * x(4 * b + f / 4 % 4) * x(4 * c + f % 4);
    }
};

// Does what load_vec() does, into an array.
template <int kN, class Real>
__device__ void load_few(float (&x)[kN], const Real* at) {
    const Vec<kN> loaded = load_vec<kN>(at);
#pragma unroll
    for (int i = 0; i < kN; i++) x[i] = loaded[i];
}

// Makes 16 features of a tile, those from 16 quarter on, of a row of channels. row.load(x, c) fills the array
// x with the channels from c on; the row has Row::kChannels.
template <int P, class Row>
__device__ void build_features(float (&phi)[16], const Row& row, const FeatureTile<P>& tile, int quarter) {
    if constexpr (P == 1) {
        const int c = 64 * tile.a + 16 * quarter;
#pragma unroll
        for (int f = 0; f < 16; f++) phi[f] = 0;
        if (c < Row::kChannels) row.load(phi, c);
    }
    if constexpr (P == 2) {
        float left[2], right[8];
        row.load(left, 8 * tile.a + 2 * quarter);
        row.load(right, 8 * tile.b);
#pragma unroll
        for (int f = 0; f < 16; f++) phi[f] = left[f / 8] * right[f % 8];
    }
    if constexpr (P == 3) {
        float left[1], middle[4], right[4];
        row.load(left, 4 * tile.a + quarter);
        row.load(middle, 4 * tile.b);
        row.load(right, 4 * tile.c);
#pragma unroll
        for (int f = 0; f < 16; f++) phi[f] = left[0] * middle[f / 4] * right[f % 4];
    }
}

// Adds to dx the gradient of a row's channels, times factor, given the gradient g (64) of its features.
// kShares threads divide the channels of each block between them. Returns the thread's share of phi . g,
// times factor.
template <int P, int kShares, class Row>
__device__ float add_feature_gradients(float* dx /*(D)*/, const float* g, float factor, const Row& row,
                                       const FeatureTile<P>& tile, int share) {
    constexpr int kCount = feature_block(P) / kShares;  // the thread's channels of a block
    const int first = share * kCount;
    float total = 0;
    // Adds the gradients d of kN channels from c on. With `in_total` they count in phi . g, too.
    auto add = [&]<int kN>(int c, const float(&d)[kN], bool in_total = false) {
        float x[kN];
        row.load(x, c);
#pragma unroll
        for (int e = 0; e < kN; e++) {
            dx[c + e] += factor * d[e];
            if (in_total) total += x[e] * d[e];
        }
    };
    if constexpr (P == 1)
        for (int u = first; u < first + kCount; u += 4) {
            float d[4];
            load_few(d, g + u);
            if (64 * tile.a + u < Row::kChannels) add(64 * tile.a + u, d, true);
        }
    if constexpr (P == 2) {
        float left[8], right[8], da[kCount] = {}, db[kCount] = {};
        row.load(left, 8 * tile.a);
        row.load(right, 8 * tile.b);
#pragma unroll
        for (int u = 0; u < kCount; u++) {
            float d[8];
            load_few(d, g + (first + u) * 8);
#pragma unroll
            for (int j = 0; j < 8; j++) da[u] += d[j] * right[j];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float d[kCount];
            load_few(d, g + i * 8 + first);
#pragma unroll
            for (int u = 0; u < kCount; u++) db[u] += d[u] * left[i];
        }
        add(8 * tile.a + first, da, true);
        add(8 * tile.b + first, db);
    }
    if constexpr (P == 3) {
        float left[4], middle[4], right[4], da[kCount] = {}, db[kCount] = {}, dc[kCount] = {};
        row.load(left, 4 * tile.a);
        row.load(middle, 4 * tile.b);
        row.load(right, 4 * tile.c);
#pragma unroll
        for (int u = 0; u < kCount; u++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float d[4], dot = 0;
                load_few(d, g + (first + u) * 16 + n * 4);
#pragma unroll
                for (int k = 0; k < 4; k++) dot += d[k] * right[k];
                da[u] += dot * middle[n];
                load_few(d, g + n * 16 + (first + u) * 4);
                dot = 0;
#pragma unroll
                for (int k = 0; k < 4; k++) dot += d[k] * right[k];
                db[u] += dot * left[n];
            }
#pragma unroll
        for (int n = 0; n < 16; n++) {
            float d[kCount];
            load_few(d, g + n * 4 + first);
#pragma unroll
            for (int u = 0; u < kCount; u++) dc[u] += d[u] * (left[n / 4] * middle[n % 4]);
        }
        add(4 * tile.a + first, da, true);
        add(4 * tile.b + first, db);
        add(4 * tile.c + first, dc);
    }
    return factor * total;
}

}  // namespace gpu
