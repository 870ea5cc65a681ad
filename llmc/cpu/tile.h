// Small dense products of tiles that lie in cache, the inner loops of attention.
//
// Tiles are row-major, their sizes padded with zeros: rows to kTile, channels to a multiple of kLanes, so
// that the loops have no tails. Tiles lie in Floats memory: a load that straddles
// two cache lines would cost double.
#pragma once
#include <cstddef>

#include "llmc/cpu/vector.h"

namespace cpu {

constexpr int kTile = 64;     // rows of a tile: queries or keys
constexpr int kTileRows = 8;  // rows of a block of sums held in registers; divides kLanes and kTile

#ifdef __AVX512F__
constexpr int kTileVectors = 2;  // 8 x 2 sums of 16 floats, of 32 registers
#else
constexpr int kTileVectors = 1;
#endif

inline int padded(int channels) {
    return (channels + kLanes - 1) / kLanes * kLanes;
}

// tile (kTile,padded(D)) = scale row_factors[r] src[r], zero outside of (rows,D).
inline void load_tile(float* tile,
                      const float* src,  // `rows` rows of D floats, `stride` apart
                      int stride, int rows, int D, float scale, const float* row_factors = nullptr) {
    int Dp = padded(D);
    for (int r = 0; r < rows; r++) {
        float factor = row_factors ? scale * row_factors[r] : scale;
        for (int d = 0; d < Dp; d += kLanes) {
            int lanes = D - d < kLanes ? D - d : kLanes;
            store(tile + r * Dp + d, load(src + (size_t)r * stride + d, lanes) * factor);
        }
    }
    memset(tile + rows * Dp, 0, sizeof(float) * (kTile - rows) * Dp);
}

// The transpose: tile (padded(D),kTile).
inline void load_tile_transposed(float* tile, const float* src, int stride, int rows, int D, float scale) {
    for (int d = 0; d < D; d++)
        for (int r = 0; r < rows; r++) tile[d * kTile + r] = src[(size_t)r * stride + d] * scale;
    for (int d = 0; d < D; d++)
        for (int r = rows; r < kTile; r++) tile[d * kTile + r] = 0;
    memset(tile + D * kTile, 0, sizeof(float) * (padded(D) - D) * kTile);
}

// R rows and V vectors of c, their sums in registers all along.
template <int R, int V, bool kTransA, bool kAccumulate>
inline void block_product(float* c, int c_stride, const float* a, int a_stride, const float* b, int b_stride,
                          int K) {
    vec sums[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sums[r][v] = kAccumulate ? load(c + r * c_stride + v * kLanes) : vec{};
    for (int k = 0; k < K; k++) {
        vec bk[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) bk[v] = load(b + k * b_stride + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            float ark = kTransA ? a[k * a_stride + r] : a[r * a_stride + k];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sums[r][v] += ark * bk[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(c + r * c_stride + v * kLanes, sums[r][v]);
}

// c (kTileRows,N) = or += a (kTileRows,K) b (K,N), a stored as (K,kTileRows) where kTransA; N a multiple of
// kLanes.
template <bool kTransA, bool kAccumulate>
inline void tile_product(float* c, int c_stride, const float* a, int a_stride, const float* b, int b_stride,
                         int N, int K) {
    constexpr int kStep = kTileVectors * kLanes;
    int n = 0;
    for (; n + kStep <= N; n += kStep)
        block_product<kTileRows, kTileVectors, kTransA, kAccumulate>(c + n, c_stride, a, a_stride, b + n,
                                                                     b_stride, K);
    for (; n < N; n += kLanes)
        block_product<kTileRows, 1, kTransA, kAccumulate>(c + n, c_stride, a, a_stride, b + n, b_stride, K);
}

}  // namespace cpu
