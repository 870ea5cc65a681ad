// The kernels of the linear form for float: the same algorithm as in linear_kernels_bf16.h, with the tiles of
// tiles_float.h.
#pragma once
#include "llmc/cuda/attention/linear_rows.h"
#include "llmc/cuda/attention/tiles_float.h"

namespace gpu {

// A row of channels in a tile, which has zeros from D to the end of the last block.
template <int kD>
struct RowOfFloatTile {
    static constexpr int kChannels = kD;
    const float* tile;
    int row;

    __device__ float operator()(int c) const { return tile[row * FloatTile<kD>::stride + c]; }
    template <int kN>
    __device__ void load(float (&x)[kN], int c) const {
        load_few(x, tile + row * FloatTile<kD>::stride + c);
    }
};

// A thread makes a quarter of the features of a token. For the rest see linear_states_kernel.
template <int P, int kD, Rows kRows>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void linear_states_float_kernel(float* states, float* z, const float* qkv,
                                                                const float* dout, const float* stats,
                                                                const float* dot, LinearShape shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = FloatTile<kD>;
    float *x = reinterpret_cast<float*>(attention_shared), *y = x + Tiles::size;
    float* phi = y + Tiles::size;  // (64 features,32 tokens), in rows of FloatWeights
    __shared__ RowTerms terms[kFloatTile];
    __shared__ float dots[kFloatTile];
    const int token = threadIdx.x % kFloatTile, quarter = threadIdx.x / kFloatTile;

    const int bh = blockIdx.z, slot = blockIdx.y, boundary = shape.boundary(slot);
    const int begin = kRows == Rows::keys ? boundary - shape.segment : boundary;
    const int end = min(begin + shape.segment, shape.attention.T), D = shape.attention.D;
    const int width = shape.state_width();
    const LinearRows<float, kRows> rows(qkv, dout, shape, bh);
    const auto tile = FeatureTile<P>::at(blockIdx.x, shape.blocks);
    FloatSums<kD> s[2];  // features 0 to 31, and the others
    float sum = 0;
    for (int i0 = begin; i0 < end; i0 += kFloatTile) {
        __syncthreads();
        Tiles::load(x, rows.x + i0 * rows.x_stride, rows.x_stride, end - i0, D, shape.channels());
        Tiles::load(y, rows.y + i0 * rows.y_stride, rows.y_stride, end - i0, D, width);
        if (threadIdx.x < kFloatTile) {
            terms[token] = linear_terms<P, kRows>(stats, dot, shape, bh, i0 + token);
            dots[token] = terms[token].dot;
        }
        __syncthreads();
        float features[16];
        build_features<P>(features, RowOfFloatTile<kD>{x, token}, tile, quarter);
#pragma unroll
        for (int f = 0; f < 16; f++)
            phi[(16 * quarter + f) * FloatWeights::stride + token] = features[f] * terms[token].weight;
        if (P == 2 && z) sum += sum_of_products<P, kFloatTile>(RowOfFloatTile<kD>{x, 0}, dots, tile);
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; half++) s[half].add(phi + half * FloatWeights::size, y, width);
    }
    const size_t row0 = shape.row(bh, slot) + blockIdx.x * kFeatures;
    const float factor = tile.multiplicity();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        s[half].scale(0, factor), s[half].scale(1, factor);
        s[half].store(states + (row0 + half * kFloatTile) * width, width, kFloatTile, width);
    }
    if (P == 2 && z) store_sum_of_products(z + row0, sum, factor);
}

// A warp has 8 rows. A thread makes a quarter of the features, and of the gradients of the channels, of one
// row. For the rest see linear_rows_kernel.
template <int P, int kD, Rows kRows>
__global__ __launch_bounds__(kAttentionThreads, 2) void linear_rows_float_kernel(
    float* sums, float* totals, float* slopes, const float* states, const float* z, const float* qkv,
    const float* dout, const float* stats, const float* dot, LinearShape shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = FloatTile<kD>;
    constexpr bool kOutput = kRows != Rows::gradients, kGradient = kRows != Rows::queries;
    constexpr bool kTotals = P == 2 && kRows == Rows::queries;
    constexpr int kStride = kFeatures + 4;
    float* x_tile = reinterpret_cast<float*>(attention_shared);
    float* s = x_tile + Tiles::size;   // (64 features,D): two tiles
    float* phi = s + 2 * Tiles::size;  // (32 tokens,64 features): two of FloatWeights
    float* dphi = phi;                 // (32 tokens,64 features), in rows of kStride
    float* y_tile = phi + kFloatTile * 2 * FloatWeights::stride;
    float* dx = y_tile + Tiles::size;  // (32 tokens,D), in the rows of a tile
    static_assert(kStride <= 2 * FloatWeights::stride);

    const RowWork<float, kRows> work(states, z, shape, kFloatTile);
    const int bh = work.bh, i0 = work.i0, width = work.width;
    const int T = shape.attention.T, D = shape.attention.D, C = shape.attention.C();
    z = work.z;
    const LinearRows<float, kRows> rows(qkv, dout, shape, bh);
    Tiles::load(x_tile, rows.x + i0 * rows.x_stride, rows.x_stride, T - i0, D, shape.channels());
    if (kGradient) {
        Tiles::load(y_tile, rows.y + i0 * rows.y_stride, rows.y_stride, T - i0, D, width);
        for (int i = threadIdx.x; i < Tiles::size; i += kAttentionThreads) dx[i] = 0;
    }

    const int row = threadIdx.x / kWarp * 8 + threadIdx.x % 8, quarter = threadIdx.x % kWarp / 8;
    const int i = i0 + row;
    const RowOfFloatTile<kD> channels{x_tile, row};
    const RowTerms terms = linear_terms<P, kRows>(stats, dot, shape, bh, i);
    FloatSums<kD> o;
    float total = 0, slope = 0;
    FeatureTile<P> tile;
    for (int n = 0; n < shape.tiles; n++, tile.next(shape.blocks)) {
        __syncthreads();
        for (int half = 0; half < 2; half++)
            Tiles::load(s + half * Tiles::size,
                        work.state + ((size_t)n * kFeatures + half * kFloatTile) * width, width, kFloatTile,
                        width);
        __syncthreads();
        if constexpr (kOutput) {
            float features[16];
            build_features<P>(features, channels, tile, quarter);
            float* to =
                phi + quarter / 2 * FloatWeights::size + row * FloatWeights::stride + quarter % 2 * 16;
#pragma unroll
            for (int f = 0; f < 16; f++) to[f] = features[f];
            if (kTotals && totals) {
                float z_features[16];
                load_few(z_features, z + n * kFeatures + 16 * quarter);
#pragma unroll
                for (int f = 0; f < 16; f++) total += features[f] * z_features[f];
            }
            __syncwarp();
            for (int half = 0; half < 2; half++)
                o.add(phi + half * FloatWeights::size, s + half * Tiles::size, width);
            if (kGradient) __syncthreads();  // dphi lies in the same place, in other rows
        }
        if constexpr (kGradient) {
            for (int half = 0; half < 2; half++) {
                float ds[2][4];
                Tiles::scores(ds, y_tile, s + half * Tiles::size, width);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int m = 0; m < 4; m++)
                        dphi[(threadIdx.x / 8 * 2 + r) * kStride + half * kFloatTile + threadIdx.x % 8 +
                             8 * m] = ds[r][m];
            }
            __syncwarp();
            float* to = dx + row * Tiles::stride;
            slope +=
                add_feature_gradients<P, 4>(to, dphi + row * kStride, terms.weight, channels, tile, quarter);
            if (P == 2 && z)
                slope +=
                    add_feature_gradients<P, 4>(to, z + n * kFeatures, -terms.dot, channels, tile, quarter);
            __syncwarp();
        }
    }

    const size_t stride = work.out_stride;
    float* to = work.out(sums, shape);
    if constexpr (kOutput) {
        const int first_row =
            threadIdx.x % kWarp / 8 * 2;  // among the warp's 8 rows, whose terms lanes 0 to 7 have
        for (int r = 0; r < 2; r++) o.scale(r, __shfl_sync(0xFFFFFFFFu, terms.weight, first_row + r));
        o.store(kRows == Rows::keys ? to + 2 * C : to, stride, T - i0, D);
        if (kTotals && totals) {
            total = reduce_lanes<Sum, 8, 16>(total);
            if (quarter == 0 && i < T) totals[(size_t)bh * T + i] = total * terms.weight;
        }
    }
    if constexpr (kGradient) {
        if (kRows == Rows::keys) to += C;
        for (int r = threadIdx.x / kWarp * 8; r < (int)threadIdx.x / kWarp * 8 + 8 && i0 + r < T; r++)
#pragma unroll
            for (int c = threadIdx.x % kWarp; c < kD; c += kWarp)
                if (c < D) to[r * stride + c] = dx[r * Tiles::stride + c];
        work.template store_slope<8, 16>(slopes, slope, shape, i);
    }
}

}  // namespace gpu
