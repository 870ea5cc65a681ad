// The kernels of the linear form for bf16, on tensor cores. linear.h says how they go.
#pragma once
#include "llmc/cuda/attention/linear_rows.h"
#include "llmc/cuda/attention/tiles_bf16.h"

namespace gpu {

// A row of channels in a tile, in the form that the functions of features.h read.
template <int kD>
struct RowOfTile {
    static constexpr int kChannels = kD;
    const bf16* tile;
    int row;

    __device__ const bf16* at(int c) const { return tile + Tile<kD>::offset(row, c / 8) + c % 8; }
    __device__ float operator()(int c) const { return to_float(*at(c)); }
    template <int kN>
    __device__ void load(float (&x)[kN], int c) const {
        constexpr int kPiece = kN < 8 ? kN : 8;
#pragma unroll
        for (int i = 0; i < kN; i += kPiece) {
            float piece[kPiece];
            load_few(piece, at(c + i));
#pragma unroll
            for (int e = 0; e < kPiece; e++) x[i + e] = piece[e];
        }
    }
};

// Stores a thread's 16 features in bf16, from chunk `chunk` of a row of a tile on.
template <int kD>
__device__ void store_features(bf16* tile, int row, int chunk, const float (&phi)[16], float factor) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t pairs[4];
#pragma unroll
        for (int e = 0; e < 4; e++)
            pairs[e] = pack_bf16(phi[8 * half + 2 * e] * factor, phi[8 * half + 2 * e + 1] * factor);
        *reinterpret_cast<uint4*>(tile + Tile<kD>::offset(row, chunk + half)) = {pairs[0], pairs[1], pairs[2],
                                                                                 pairs[3]};
    }
}

// How many tiles of features a block makes at once, as many as the registers allow: it loads the rows once
// for all of them.
template <int P, int kD>
constexpr int kStateTiles = P == 1     ? (kD + 63) / 64
                            : kD <= 64 ? 4
                                       : 2;

// Computes the part of one segment: in the state of its boundary sum weight phi(x) y^T, times the
// multiplicity, and in z sum dot phi(x). A warp has 16 features of each tile. Blocks: (tiles of features,
// slots, B H).
template <int P, int kD, Rows kRows>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void linear_states_kernel(float* states,  // (B,H,slots,features,width)
                                                          float* z,       // (B,H,slots,features), or null
                                                          const bf16* qkv, const bf16* dout,
                                                          const float* stats, const float* dot,
                                                          LinearShape shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = Tile<kD>;
    using Phi = Tile<16>;
    constexpr int kTiles = kStateTiles<P, kD>;
    bf16* stages = reinterpret_cast<bf16*>(attention_shared);  // two stages of x and y
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    bf16* phi = stages + 4 * Tiles::size + warp * Phi::size;
    float* terms = reinterpret_cast<float*>(stages + 4 * Tiles::size +
                                            4 * Phi::size);  // two stages of weights and then dots

    const int bh = blockIdx.z, slot = blockIdx.y, boundary = shape.boundary(slot);
    const int begin = kRows == Rows::keys ? boundary - shape.segment : boundary;
    const int end = min(begin + shape.segment, shape.attention.T), D = shape.attention.D;
    const int width = shape.state_width();
    const LinearRows<bf16, kRows> rows(qkv, dout, shape, bh);
    auto load = [&](int i0) {
        const int stage = (i0 - begin) / kAttentionTile % 2;
        bf16* x = stages + stage * 2 * Tiles::size;
        load_tile<kD>(x, rows.x + i0 * rows.x_stride, rows.x_stride, end - i0, D);
        load_tile<kD>(x + Tiles::size, rows.y + i0 * rows.y_stride, rows.y_stride, end - i0, D);
        commit_copies();
        if (threadIdx.x >= kAttentionTile) return;
        RowTerms row = linear_terms<P, kRows>(stats, dot, shape, bh, i0 + threadIdx.x);
        terms[2 * stage * kAttentionTile + threadIdx.x] = row.weight;
        terms[(2 * stage + 1) * kAttentionTile + threadIdx.x] = row.dot;
    };
    load(begin);

    float s[kTiles][kD / 8][4] = {}, sums[kTiles] = {};
    const int first = blockIdx.x * kTiles;
    for (int i0 = begin; i0 < end; i0 += kAttentionTile) {
        wait_for_copies<0>();
        __syncthreads();  // all copies are there, and no warp still works on the tile before
        if (i0 + kAttentionTile < end) load(i0 + kAttentionTile);
        const int stage = (i0 - begin) / kAttentionTile % 2;
        const bf16 *x = stages + stage * 2 * Tiles::size, *y = x + Tiles::size;
        const float *weights = terms + 2 * stage * kAttentionTile, *dots = weights + kAttentionTile;
        auto tile = FeatureTile<P>::at(first, shape.blocks);
#pragma unroll
        for (int m = 0; m < kTiles; m++) {
            if (first + m == shape.tiles) break;
            __syncwarp();
#pragma unroll
            for (int token = lane; token < kAttentionTile; token += kWarp) {
                float features[16];
                build_features<P>(features, RowOfTile<kD>{x, token}, tile, warp);
                store_features<16>(phi, token, 0, features, weights[token]);
            }
            __syncwarp();
#pragma unroll
            for (int k = 0; k < kAttentionTile; k += 16) {
                FragmentA a = Phi::a_transposed(phi, k, 0);
#pragma unroll
                for (int d = 0; d < kD / 16; d++) mma(s[m][2 * d], s[m][2 * d + 1], a, Tiles::b(y, k, d));
            }
            if (P == 2 && z) sums[m] += sum_of_products<P, kAttentionTile>(RowOfTile<kD>{x, 0}, dots, tile);
            tile.next(shape.blocks);
        }
    }
    auto tile = FeatureTile<P>::at(first, shape.blocks);
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
        if (first + m == shape.tiles) break;
        const size_t row0 = shape.row(bh, slot) + (first + m) * kFeatures;
        const float factor = tile.multiplicity();
        store_sums<kD>(states + row0 * width, width, s[m], factor, factor, kFeatures, width);
        if (P == 2 && z) store_sum_of_products(z + row0, sums[m], factor);
        tile.next(shape.blocks);
    }
}

// Computes what rows get from the state S of their boundary. Keys get dv = weight phi(x) S, and dk by way of
// phi's gradient weight y S^T - dot z. Queries get o and, for the scale `sum`, their totals. Gradients are
// dq. A warp has 16 rows. Blocks: (tiles of rows, B H).
template <int P, int kD, Rows kRows>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void linear_rows_kernel(float* sums,    // (B,T,C), or (B,T,3C) for gradients
                                                        float* totals,  // (B,H,T), or null
                                                        float* slopes,  // (B,H,T), or null
                                                        const bf16* states,  // (B,H,slots,features,width)
                                                        const float* z,      // (B,H,slots,features), or null
                                                        const bf16* qkv, const bf16* dout, const float* stats,
                                                        const float* dot, LinearShape shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = Tile<kD>;
    using Phi = Tile<kFeatures>;
    constexpr bool kOutput = kRows != Rows::gradients, kGradient = kRows != Rows::queries;
    constexpr bool kTotals = P == 2 && kRows == Rows::queries, kOneTile = P == 1 && kD <= kFeatures;
    constexpr int kStride = kFeatures + 4, kWidth = kD + 4;  // eight rows' packs are in different banks
    bf16* x_tile = reinterpret_cast<bf16*>(attention_shared);
    bf16* stages = x_tile + Tiles::size;  // two tiles of the state
    bf16* y_tile = stages + 2 * Tiles::size;
    float* warp_rows = reinterpret_cast<float*>(y_tile + (kGradient ? Tiles::size : 0));
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    // Each warp has its features, whose gradients later take their place, and the gradients of its rows.
    float* dphi = warp_rows + warp * 16 * kStride;
    bf16* phi = reinterpret_cast<bf16*>(dphi);
    float* dx = warp_rows + 4 * 16 * kStride + warp * 16 * kWidth;

    const RowWork<bf16, kRows> work(states, z, shape, kAttentionTile);
    const int bh = work.bh, i0 = work.i0, width = work.width;
    const int T = shape.attention.T, D = shape.attention.D, C = shape.attention.C();
    z = work.z;
    const LinearRows<bf16, kRows> rows(qkv, dout, shape, bh);
    auto load_state = [&](int tile) {
        load_tile<kD>(stages + tile % 2 * Tiles::size, work.state + (size_t)tile * kFeatures * width, width,
                      kFeatures, width);
        commit_copies();
    };
    load_tile<kD>(x_tile, rows.x + i0 * rows.x_stride, rows.x_stride, T - i0, D);
    if (kGradient) load_tile<kD>(y_tile, rows.y + i0 * rows.y_stride, rows.y_stride, T - i0, D);
    load_state(0);
    if (kGradient)
        for (int i = lane; i < 16 * kWidth; i += kWarp) dx[i] = 0;

    // A lane makes half of the features, and half of the gradients of the channels, of one row.
    const int row = lane % 16, half = lane / 16, i = i0 + 16 * warp + row;
    const RowOfTile<kD> channels{x_tile, 16 * warp + row};
    const RowTerms terms = linear_terms<P, kRows>(stats, dot, shape, bh, i);
    float o[kD / 8][4] = {}, total = 0, slope = 0;
    FeatureTile<P> tile;
    for (int n = 0; n < shape.tiles; n++, tile.next(shape.blocks)) {
        wait_for_copies<0>();
        __syncthreads();  // all copies are there, and no warp still works on the tile before
        if (!kOneTile && n + 1 < shape.tiles) load_state(n + 1);
        const bf16* s = stages + n % 2 * Tiles::size;
        if constexpr (kOutput) {
#pragma unroll 1  // both quarters at once do not fit into the registers
            for (int quarter = 2 * half; quarter < 2 * half + 2; quarter++) {
                float features[16];
                build_features<P>(features, channels, tile, quarter);
                store_features<kFeatures>(phi, row, 2 * quarter, features, 1);
                if (kTotals && totals) {
                    float z_features[16];
                    load_few(z_features, z + n * kFeatures + 16 * quarter);
#pragma unroll
                    for (int f = 0; f < 16; f++) total += features[f] * z_features[f];
                }
            }
            __syncwarp();
#pragma unroll
            for (int k = 0; k < kFeatures / 16; k++) {
                FragmentA a = Phi::a(phi, 0, k);
#pragma unroll
                for (int d = 0; d < kD / 16; d++) mma(o[2 * d], o[2 * d + 1], a, Tiles::b(s, 16 * k, d));
            }
            __syncwarp();
        }
        if constexpr (kGradient) {
            float ds[kFeatures / 8][4] = {};
#pragma unroll
            for (int d = 0; d < kD / 16; d++) {
                FragmentA a = Tiles::a(y_tile, 16 * warp, d);
#pragma unroll
                for (int f = 0; f < kFeatures / 16; f++)
                    mma(ds[2 * f], ds[2 * f + 1], a, Tiles::b_transposed(s, 16 * f, d));
            }
#pragma unroll
            for (int f = 0; f < kFeatures / 8; f++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    *reinterpret_cast<float2*>(dphi + (g + 8 * r) * kStride + 8 * f + 2 * t) = {
                        ds[f][2 * r], ds[f][2 * r + 1]};
            __syncwarp();
            float* to = dx + row * kWidth;
            slope +=
                add_feature_gradients<P, 2>(to, dphi + row * kStride, terms.weight, channels, tile, half);
            if (P == 2 && z)
                slope += add_feature_gradients<P, 2>(to, z + n * kFeatures, -terms.dot, channels, tile, half);
            __syncwarp();
        }
    }

    const size_t stride = work.out_stride;
    float* to = work.out(sums, shape);
    if constexpr (kOutput) {
        float factor[2];
        for (int r = 0; r < 2; r++) factor[r] = __shfl_sync(0xFFFFFFFFu, terms.weight, g + 8 * r);
        store_sums<kD>(kRows == Rows::keys ? to + 2 * C : to, stride, o, factor[0], factor[1], T - i0, D);
        if (kTotals && totals) {
            total = reduce_lanes<Sum, 16>(total);
            if (half == 0 && i < T) totals[(size_t)bh * T + i] = total * terms.weight;
        }
    }
    if constexpr (kGradient) {
        if (kRows == Rows::keys) to += C;
        for (int r = 0; r < 16 && i0 + 16 * warp + r < T; r++)
#pragma unroll
            for (int c = lane; c < kD; c += kWarp)
                if (c < D) to[(16 * warp + r) * stride + c] = dx[r * kWidth + c];
        work.template store_slope<16>(slopes, slope, shape, i);
    }
}

}  // namespace gpu
