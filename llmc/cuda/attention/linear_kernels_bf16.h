// The kernels of linear.h for bf16, and what they share with those for float
// (linear_kernels_float.h).
#pragma once
#include "llmc/cuda/attention/features.h"
#include "llmc/cuda/attention/kernels_bf16.h"

namespace gpu {

// What the kernels of one call have in common.
struct LinearShape {
    AttentionShape attention;
    int segment;  // tokens
    int slots;    // boundaries between segments: one state each
    int tiles;    // of features
    int blocks;   // of channels
    int block;    // channels in one
    int width;    // of a row of the states: D, rounded up to 8

    int features() const { return tiles * kFeatures; }
    int size() const { return features() * width; }  // of a state
    // width for the kernels, whose rows of a state all begin at 16-byte addresses.
    __device__ int state_width() const {
        __builtin_assume(width % 8 == 0);
        return width;
    }
    __device__ int channels() const { return blocks * block; }
    // The first row of a state, of rows of `width` numbers; and its first number in z.
    __device__ size_t row(int bh, int slot) const { return ((size_t)bh * slots + slot) * tiles * kFeatures; }
    __device__ int boundary(int slot) const { return (slot + 1) * segment; }  // its token
};

// Whose features a kernel makes: of the keys, of the queries, or of the queries with c_i, for the gradients.
enum class Rows { keys, queries, gradients };

// Rows x, of which features are made, and rows y: v of a key, dO of a query. At a head's first token.
template <class Real, Rows kRows>
struct LinearRows {
    const Real *x, *y;
    size_t x_stride, y_stride;

    __device__ LinearRows(const Real* qkv, const Real* dout, const LinearShape& shape, int bh) {
        const int T = shape.attention.T, H = shape.attention.H, C = shape.attention.C();
        const size_t token = (size_t)(bh / H) * T, channel = bh % H * shape.attention.D;
        x_stride = 3 * (size_t)C;
        x = qkv + token * x_stride + channel + (kRows == Rows::keys ? C : 0);
        y_stride = kRows == Rows::keys ? x_stride : C;
        y = kRows == Rows::keys ? x + C : dout + token * C + channel;
    }
};

// The factors of row i: `weight` towards the state of its boundary, the fade from there with, for gradients,
// c_i; `dot` towards z, the same with, for gradients, dO_i . O_i.
template <int P, Rows kRows>
__device__ RowTerms linear_terms(const float* stats, const float* dot, const LinearShape& shape, int bh,
                                 int i, int boundary) {
    const AttentionShape& attention = shape.attention;
    RowTerms terms;
    if (i >= attention.T) return terms;
    if (kRows == Rows::gradients) {
        if (!kHasTotals<Poly<P>>) __builtin_assume(!attention.row_sum);
        terms = row_terms<Poly<P>>(stats, dot, attention, bh, i);
    } else {
        terms.weight = terms.dot = 1;
    }
    if (attention.decays) {
        const float fade =
            attention.tables
                .fade[(size_t)(bh % attention.H) * attention.tables.stride + std::abs(i - boundary)];
        terms.weight *= fade, terms.dot *= fade;
    }
    return terms;
}

// The factor of a row's term in the gradient of log gamma: the distance of the row to the boundary.
template <Rows kRows>
__device__ float linear_distance(const LinearShape& shape, int bh, int i, int boundary) {
    const AttentionTables& tables = shape.attention.tables;
    if (kRows == Rows::keys) return boundary - i;
    return i - boundary - tables.neutral[(size_t)(bh % shape.attention.H) * tables.stride + i];
}

// A row of channels in a tile.
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

// A thread's 16 features in bf16, from chunk `chunk` of a row of a tile on.
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

// Two threads a feature, with every other token each: the sum of the products of the tokens' channels in
// float, for z.
template <int P, int kTokens, class Row>
__device__ float sum_of_products(Row row /*of token 0*/, const float* weights /*(kTokens)*/,
                                 const FeatureTile<P>& tile) {
    float sum = 0;
    for (int token = threadIdx.x % 2; token < kTokens; token += 2) {
        row.row = token;
        sum += weights[token] * tile.product(threadIdx.x / 2, row);
    }
    return sum;
}
__device__ inline void store_sum_of_products(float* z, float sum, float factor) {
    sum = reduce_lanes<Sum, 1>(sum);
    if (threadIdx.x % 2 == 0) z[threadIdx.x / 2] = sum * factor;
}

// Tiles of features that a block makes at once, for rows are loaded once for all of them: as many as
// registers allow.
template <int P, int kD>
constexpr int kStateTiles = P == 1     ? (kD + 63) / 64
                            : kD <= 64 ? 4
                                       : 2;

// What the tokens of one segment give to the state of its boundary: sum weight phi(x) y^T, times the
// multiplicity; and to z. A warp has 16 features of each tile. Blocks: (tiles of features, slots, B H).
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
    bf16* stages = reinterpret_cast<bf16*>(attention_shared);  // two of x and y
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    bf16* phi = stages + 4 * Tiles::size + warp * Phi::size;
    float* terms = reinterpret_cast<float*>(stages + 4 * Tiles::size + 4 * Phi::size);  // of both stages

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
        RowTerms row = linear_terms<P, kRows>(stats, dot, shape, bh, i0 + threadIdx.x, boundary);
        terms[2 * stage * kAttentionTile + threadIdx.x] = row.weight;
        terms[(2 * stage + 1) * kAttentionTile + threadIdx.x] = row.dot;
    };
    load(begin);

    float s[kTiles][kD / 8][4] = {}, sums[kTiles] = {};
    const int first = blockIdx.x * kTiles;
    for (int i0 = begin; i0 < end; i0 += kAttentionTile) {
        wait_for_copies<0>();
        __syncthreads();  // all copies are there, and nobody works on the tile before
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

// What rows get from the state of their boundary. Keys: dv = weight phi(x) S, and dk by way of phi's gradient
// weight y S^T - dot z; queries: o and their share of `sum`'s totals; gradients: dq. A warp has 16 rows.
// Blocks: (tiles of rows, B H).
template <int P, int kD, Rows kRows>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void linear_rows_kernel(float* sums,    // (B,T,C), or (B,T,3C) for gradients
                                                        float* totals,  // (B,H,T), or null
                                                        double* dlog_gamma,  // (B,H,tiles of rows), or null
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
    float* of_warps = reinterpret_cast<float*>(y_tile + (kGradient ? Tiles::size : 0));
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    // A warp's features and, after them, their gradients; and the gradients of its rows.
    float* dphi = of_warps + warp * 16 * kStride;
    bf16* phi = reinterpret_cast<bf16*>(dphi);
    float* dx = of_warps + 4 * 16 * kStride + warp * 16 * kWidth;

    const int bh = blockIdx.y, T = shape.attention.T, D = shape.attention.D, C = shape.attention.C();
    const int i0 = blockIdx.x * kAttentionTile + (kRows == Rows::keys ? 0 : shape.segment);
    const int slot = i0 / shape.segment - (kRows == Rows::keys ? 0 : 1), boundary = shape.boundary(slot);
    const size_t row0 = shape.row(bh, slot);
    const int width = shape.state_width();
    const bf16* state = states + row0 * width;
    z = z ? z + row0 : nullptr;
    const LinearRows<bf16, kRows> rows(qkv, dout, shape, bh);
    auto load_state = [&](int tile) {
        load_tile<kD>(stages + tile % 2 * Tiles::size, state + (size_t)tile * kFeatures * width, width,
                      kFeatures, width);
        commit_copies();
    };
    load_tile<kD>(x_tile, rows.x + i0 * rows.x_stride, rows.x_stride, T - i0, D);
    if (kGradient) load_tile<kD>(y_tile, rows.y + i0 * rows.y_stride, rows.y_stride, T - i0, D);
    load_state(0);
    if (kGradient)
        for (int i = lane; i < 16 * kWidth; i += kWarp) dx[i] = 0;

    // Features, and the gradients of channels: a lane has half of those of one row.
    const int row = lane % 16, half = lane / 16, i = i0 + 16 * warp + row;
    const RowOfTile<kD> channels{x_tile, 16 * warp + row};
    const RowTerms terms = linear_terms<P, kRows>(stats, dot, shape, bh, i, boundary);
    float o[kD / 8][4] = {}, total = 0, slope = 0;
    FeatureTile<P> tile;
    for (int n = 0; n < shape.tiles; n++, tile.next(shape.blocks)) {
        wait_for_copies<0>();
        __syncthreads();  // all copies are there, and nobody works on the tile before
        if (!kOneTile && n + 1 < shape.tiles) load_state(n + 1);
        const bf16* s = stages + n % 2 * Tiles::size;
        if constexpr (kOutput) {
#pragma unroll 1  // both at once do not fit into the registers
            for (int quarter = 2 * half; quarter < 2 * half + 2; quarter++) {
                float features[16];
                build_features<P>(features, channels, tile, quarter);
                store_features<kFeatures>(phi, row, 2 * quarter, features, 1);
                if (kTotals && totals) {
                    float of_z[16];
                    load_few(of_z, z + n * kFeatures + 16 * quarter);
#pragma unroll
                    for (int f = 0; f < 16; f++) total += features[f] * of_z[f];
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

    const size_t stride = kRows == Rows::queries ? C : 3 * (size_t)C;
    float* to = sums + ((size_t)(bh / shape.attention.H) * T + i0) * stride + bh % shape.attention.H * D;
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
        if (!dlog_gamma) return;
        __shared__ double totals_of_warps[kAttentionThreads / kWarp];
        double ddecay = i < T ? (double)slope * linear_distance<kRows>(shape, bh, i, boundary) : 0;
        block_total(ddecay, totals_of_warps, dlog_gamma + (size_t)bh * gridDim.x + blockIdx.x);
    }
}

// The states of the boundaries, from what each segment gives to its own: their running sums with the decay,
// from the left or from the right. From the right, it also adds the gradient of log gamma, times `sign`, of
// pairs of rows that lie one or more whole segments apart, because their distance includes those segments.
// Blocks: (four numbers of a state a thread, B H).
//   width: numbers a feature, of a state or of z
template <int P, class Real>
__global__ void linear_scan_kernel(Real* states,        // (B,H,slots,size), which may be `parts`
                                   const float* parts,  // (B,H,slots,size)
                                   const Real* others,  // (B,H,slots,size): of the keys; or null
                                   double* dlog_gamma,  // (B,H,blocks), with others
                                   int width, float sign, bool from_right, LinearShape shape) {
    const AttentionTables& tables = shape.attention.tables;
    const int bh = blockIdx.y, at = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    const int size = shape.tiles * kFeatures * width;
    const float fade = shape.attention.decays
                           ? tables.fade[(size_t)(bh % shape.attention.H) * tables.stride + shape.segment]
                           : 1.0f;
    float sum[4] = {};
    double total = 0;
    for (int n = 0; n < shape.slots && at < size; n++) {
        const int slot = from_right ? shape.slots - 1 - n : n;
        const size_t place = ((size_t)bh * shape.slots + slot) * size + at;
        float part[4], other[4] = {};
        load_few(part, parts + place);
        if (others) load_few(other, others + place);
        float product = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float carried = fade * sum[e];
            product += other[e] * carried;
            sum[e] = part[e] + carried;
        }
        total += product;
        struct alignas(4 * sizeof(Real)) Four {
            Real values[4];
        } four;
#pragma unroll
        for (int e = 0; e < 4; e++) four.values[e] = from_float<Real>(sum[e]);
        *reinterpret_cast<Four*>(states + place) = four;
    }
    if (!others) return;
    const int tile = at / (kFeatures * width);  // both states have the multiplicity in them
    if (tile < shape.tiles)
        total *= sign * shape.segment / FeatureTile<P>::at(tile, shape.blocks).multiplicity();
    __shared__ double of_warps[kAttentionThreads / kWarp];
    block_total(total, of_warps, dlog_gamma + (size_t)bh * gridDim.x + blockIdx.x);
}

}  // namespace gpu
