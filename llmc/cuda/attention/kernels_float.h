// Attention in float32, for --dtype fp32: plain multiply-adds on tiles of 32 rows in shared memory. Goes as
// the kernels for bf16 do (attention.h), with the same activations.
//
// Eight threads have two rows: of 32 x 32 scores a thread has columns x, x+8, x+16 and x+24 of both, of a row
// of D results the four from 4 x on in every 32.
#pragma once
#include "llmc/cuda/attention/kernels_bf16.h"

namespace gpu {

// The kernels of 64 have all smaller heads.
template <class A, int kD>
constexpr bool kFloatHasSegments = kHasSegments<A, kD == 64 ? 1 : kD>;

// Rows are 4 floats longer than they need be, so that eight rows' packs of one column are in different banks.
template <int kD>
struct FloatTile {
    static constexpr int stride = kD + 4, size = kFloatTile * stride;

    // `rows` rows of D numbers, with zeros around them, up to column `width` where that is more.
    __device__ static void load(float* tile, const float* from, size_t from_stride, int rows, int D,
                                int width = 0) {
        const int packs = (max(D, width) + 3) / 4;
        for (int i = threadIdx.x; i < kFloatTile * packs; i += kAttentionThreads) {
            int row = i / packs, c = i % packs * 4;
            const float* at = from + row * from_stride + c;
            Pack<float> pack = {};
            if (row < rows && D % 4 == 0) {
                if (c < D) pack = load_pack(at);
            } else if (row < rows) {
                for (int e = 0; e < 4; e++) pack[e] = c + e < D ? at[e] : 0.0f;
            }
            store_pack(tile + row * stride + c, pack);
        }
    }

    // s = the products of rows of two tiles.
    __device__ static void scores(float (&s)[2][4], const float* a, const float* b, int D) {
        const int x = threadIdx.x % 8, row = threadIdx.x / 8 * 2;
#pragma unroll
        for (int m = 0; m < 4; m++) s[0][m] = s[1][m] = 0;
        for (int d = 0; d < D; d += 4) {
            Pack<float> left[2] = {load_pack(a + row * stride + d), load_pack(a + (row + 1) * stride + d)};
#pragma unroll
            for (int m = 0; m < 4; m++) {
                Pack<float> right = load_pack(b + (x + 8 * m) * stride + d);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[0][m] = fmaf(left[0][e], right[e], s[0][m]);
                    s[1][m] = fmaf(left[1][e], right[e], s[1][m]);
                }
            }
        }
    }
};

// A thread's two rows of 32 weights in shared memory, where the others of the eight read them.
struct FloatWeights {
    static constexpr int stride = kFloatTile + 4, size = kFloatTile * stride;

    __device__ static void store(float* weights, const float (&s)[2][4]) {
        const int x = threadIdx.x % 8, row = threadIdx.x / 8 * 2;
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int m = 0; m < 4; m++) weights[(row + r) * stride + x + 8 * m] = s[r][m];
        __syncwarp();
    }
};

// A thread's results: two rows of D sums.
template <int kD>
struct FloatSums {
    float sum[2][kD / 8] = {};

    // += weights tile
    __device__ void add(const float* weights, const float* tile, int D) {
        const int x = threadIdx.x % 8, row = threadIdx.x / 8 * 2;
        for (int j = 0; j < kFloatTile; j += 4) {
            Pack<float> left[2] = {load_pack(weights + row * FloatWeights::stride + j),
                                   load_pack(weights + (row + 1) * FloatWeights::stride + j)};
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int n = 0; n < kD / 32; n++) {
                    if (32 * n + 4 * x >= D) continue;
                    Pack<float> right = load_pack(tile + (j + k) * FloatTile<kD>::stride + 32 * n + 4 * x);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        sum[0][4 * n + e] = fmaf(left[0][k], right[e], sum[0][4 * n + e]);
                        sum[1][4 * n + e] = fmaf(left[1][k], right[e], sum[1][4 * n + e]);
                    }
                }
        }
    }
    __device__ void scale(int row, float by) {
#pragma unroll
        for (int d = 0; d < kD / 8; d++) sum[row][d] *= by;
    }
    // += rows as store() writes them
    __device__ void add_rows(const float* from, size_t stride, int rows, int D) {
        const int x = threadIdx.x % 8;
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < kD / 8; i++) {
                const int row = threadIdx.x / 8 * 2 + r, c = 32 * (i / 4) + 4 * x + i % 4;
                if (row < rows && c < D) sum[r][i] += from[row * stride + c];
            }
    }
    // to: the tile's first row, of `rows` that there are
    __device__ void store(float* to, size_t stride, int rows, int D) const {
        const int x = threadIdx.x % 8;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = threadIdx.x / 8 * 2 + r;
            if (row >= rows) continue;
#pragma unroll
            for (int n = 0; n < kD / 32; n++) {
                const int c = 32 * n + 4 * x;
                if (c >= D) continue;
                Pack<float> pack;
#pragma unroll
                for (int e = 0; e < 4; e++) pack[e] = sum[r][4 * n + e];
                if (D % 4 == 0) {
                    store_pack(to + row * stride + c, pack);
                } else {
                    for (int e = 0; e < 4 && c + e < D; e++) to[row * stride + c + e] = pack[e];
                }
            }
        }
    }
};

// The maximum and the sum over the eight threads that share rows.
__device__ inline float max_of_row(float x) {
    return reduce_lanes<Max, 4, 2, 1>(x);
}
__device__ inline float sum_of_row(float x) {
    return reduce_lanes<Sum, 4, 2, 1>(x);
}

// Blocks: (B H, tiles of queries), the last, longest, first.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void attention_forward_float_kernel(float* out, float* stats,
                                                                    const float* qkv, AttentionShape shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = FloatTile<kD>;
    constexpr bool kSegments = kFloatHasSegments<A, kD>;
    float *q = reinterpret_cast<float*>(attention_shared), *k = q + Tiles::size, *v = k + Tiles::size;
    float* weights = v + Tiles::size;
    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H;
    const int tile = gridDim.y - 1 - blockIdx.y, i0 = tile * kFloatTile;
    const int first = shape.first_tile<kFloatTile, kSegments>(tile);
    const int x = threadIdx.x % 8, row = i0 + threadIdx.x / 8 * 2;
    const size_t stride = 3 * (size_t)C, table = (size_t)h * shape.tables.stride;
    const float* head = qkv + b * T * stride + h * D;
    const float scale2 = shape.scale * kLog2e;
    const float slope = A::kOnline && shape.decays ? shape.tables.log_gamma[h] / shape.scale : 0;

    Tiles::load(q, head + i0 * stride, stride, T - i0, D);
    FloatSums<kD> o;
    ForwardRows rows;
    for (int j0 = first * kFloatTile; j0 <= i0; j0 += kFloatTile) {
        __syncthreads();
        Tiles::load(k, head + j0 * stride + C, stride, T - j0, D);
        Tiles::load(v, head + j0 * stride + 2 * C, stride, T - j0, D);
        __syncthreads();
        float s[2][4];
        Tiles::scores(s, q, k, D);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if constexpr (A::kOnline) {
                float most = rows.largest[r];
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    const int distance = row + r - j0 - x - 8 * m;
                    s[r][m] = distance >= 0 ? s[r][m] + distance * slope : -INFINITY;
                    most = fmaxf(most, s[r][m]);
                }
                most = max_of_row(most);
                float rescale = fast_exp2((rows.largest[r] - most) * scale2);
                rows.largest[r] = most;
                rows.total[r] *= rescale;
                o.scale(r, rescale);
#pragma unroll
                for (int m = 0; m < 4; m++) rows.total[r] += s[r][m] = fast_exp2((s[r][m] - most) * scale2);
            } else {
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    const int distance = row + r - j0 - x - 8 * m;
                    const float x = activation_argument<A>(s[r][m], shape.scale);
                    s[r][m] = distance >= 0 ? A::value(x, row + r + 1.0f, DeviceMath()) : 0;
                    if (shape.decays) s[r][m] *= shape.tables.fade[table + max(0, min(distance, T - 1))];
                    rows.total[r] += fabsf(s[r][m]);
                }
            }
        }
        FloatWeights::store(weights, s);
        o.add(weights, v, D);
    }
    const bool has_sums = kSegments && first > 0;
    if (has_sums) o.add_rows(shape.segments.sums + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = sum_of_row(rows.total[r]);
        if (has_sums && kHasTotals<A> && shape.row_sum && row + r < T)
            total += shape.segments.totals[(size_t)blockIdx.x * T + row + r];
        float factor, stat;
        if constexpr (A::kOnline) {
            factor = 1 / total;
            stat = rows.largest[r] * shape.scale + logf(total);
        } else {
            factor = row + r < T ? shape.tables.c[table + row + r] : 0;
            stat = total * factor + (float)kRowSumEps;
            if (shape.row_sum) factor /= stat;
        }
        o.scale(r, factor);
        if ((A::kOnline || shape.row_sum) && x == 0 && row + r < T)
            stats[(size_t)blockIdx.x * T + row + r] = stat;
    }
    o.store(out + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
}

// The weights and gradients of scores that are given by functions of their place in registers: the number of
// the query, its distance to the key, and the query's terms.
template <class A, Leave kLeave, class Row, class Distance, class Terms>
__device__ void float_gradients(float (&s)[2][4], float (&da)[2][4], const AttentionShape& shape, int h,
                                float slope2, Row row_of, Distance distance_of, Terms terms) {
    const float* fade = shape.tables.fade + (size_t)h * shape.tables.stride;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float w[4], dot[4];
        int rows[4];
        bool visible[4];
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const int distance = distance_of(r, m);
            rows[m] = row_of(r, m);
            const RowTerms of_row = terms(r, m);
            visible[m] = distance >= 0;
            w[m] = of_row.weight, dot[m] = of_row.dot;
            if constexpr (A::kOnline) {
                w[m] = fmaf(distance, slope2, w[m]);
            } else if (shape.decays) {
                const float by = fade[max(0, min(distance, shape.T - 1))];
                w[m] *= by;
                if (kLeave == Leave::weights) dot[m] *= by;
            }
        }
        with_row_sum<A>(shape.row_sum, [&](auto row_sum) {
            score_gradients<A, kLeave, decltype(row_sum)::value>(s[r], da[r], w, dot, rows, visible,
                                                                 shape.scale);
        });
    }
}

// dk and dv. Blocks: (B H, tiles of keys), the first, longest, first.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void attention_backward_keys_float_kernel(float* dqkv, const float* dout,
                                                                          const float* stats,
                                                                          const float* dot, const float* qkv,
                                                                          AttentionShape shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = FloatTile<kD>;
    constexpr bool kSegments = kFloatHasSegments<A, kD>;
    float *k = reinterpret_cast<float*>(attention_shared), *v = k + Tiles::size;
    float *q = v + Tiles::size, *d_o = q + Tiles::size, *weights = d_o + Tiles::size;
    __shared__ RowTerms of_rows[kFloatTile];
    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H, j0 = blockIdx.y * kFloatTile;
    const int end = shape.end_tile<kFloatTile, kSegments>(blockIdx.y, gridDim.y);
    const int x = threadIdx.x % 8, key = j0 + threadIdx.x / 8 * 2;
    const size_t stride = 3 * (size_t)C, head_at = b * T * stride + h * D;
    const float* head = qkv + head_at;
    const float slope2 = A::kOnline && shape.decays ? shape.tables.log_gamma[h] * kLog2e : 0;

    Tiles::load(k, head + j0 * stride + C, stride, T - j0, D);
    Tiles::load(v, head + j0 * stride + 2 * C, stride, T - j0, D);
    FloatSums<kD> dk, dv;
    __builtin_assume(j0 < end * kFloatTile);
    for (int i0 = j0; i0 < end * kFloatTile; i0 += kFloatTile) {
        __syncthreads();
        Tiles::load(q, head + i0 * stride, stride, T - i0, D);
        Tiles::load(d_o, dout + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
        if (threadIdx.x < kFloatTile)
            of_rows[threadIdx.x] = row_terms<A>(stats, dot, shape, blockIdx.x, i0 + threadIdx.x);
        __syncthreads();
        float s[2][4], da[2][4];
        Tiles::scores(s, k, q, D);
        Tiles::scores(da, v, d_o, D);
        float_gradients<A, Leave::weights>(
            s, da, shape, h, slope2, [&](int, int m) { return i0 + x + 8 * m; },
            [&](int r, int m) { return i0 + x + 8 * m - key - r; },
            [&](int, int m) { return of_rows[x + 8 * m]; });
        FloatWeights::store(weights, s);
        dv.add(weights, d_o, D);
        FloatWeights::store(weights, da);
        dk.add(weights, q, D);
    }
    const float factor = gradient_factor<A>(shape);
    dk.scale(0, factor), dk.scale(1, factor);
    if (kSegments && end < (int)gridDim.y) {
        const float* sums = shape.segments.sums + head_at + j0 * stride + C;
        dk.add_rows(sums, stride, T - j0, D);
        dv.add_rows(sums + C, stride, T - j0, D);
    }
    float* to = dqkv + head_at + j0 * stride + C;
    dk.store(to, stride, T - j0, D);
    dv.store(to + C, stride, T - j0, D);
}

// dq, and each block's share of the gradient of log gamma where it is wanted. Blocks: (B H, tiles of
// queries), the last, longest, first.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads, 2) void attention_backward_queries_float_kernel(
    float* dqkv, double* dlog_gamma /*(B,H,tiles), or null*/, const float* dout, const float* stats,
    const float* dot, const float* qkv, AttentionShape shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = FloatTile<kD>;
    constexpr bool kSegments = kFloatHasSegments<A, kD>;
    float *q = reinterpret_cast<float*>(attention_shared), *d_o = q + Tiles::size;
    float *k = d_o + Tiles::size, *v = k + Tiles::size, *weights = v + Tiles::size;
    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H;
    const int tile = gridDim.y - 1 - blockIdx.y, i0 = tile * kFloatTile;
    const int x = threadIdx.x % 8, row = i0 + threadIdx.x / 8 * 2;
    const size_t stride = 3 * (size_t)C, head_at = b * T * stride + h * D;
    const float* head = qkv + head_at;
    const float slope2 = A::kOnline && shape.decays ? shape.tables.log_gamma[h] * kLog2e : 0;

    Tiles::load(q, head + i0 * stride, stride, T - i0, D);
    Tiles::load(d_o, dout + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
    RowTerms of_rows[2];
    float c[2] = {1, 1}, neutral[2] = {0, 0};  // c: what is put in at the end
    for (int r = 0; r < 2; r++) {
        of_rows[r] = terms_apart<A>(stats, dot, shape, blockIdx.x, row + r);
        if (!A::kOnline) c[r] = of_rows[r].weight, of_rows[r].weight = 1;
        if (dlog_gamma && row + r < T)
            neutral[r] = shape.tables.neutral[(size_t)h * shape.tables.stride + row + r];
    }
    FloatSums<kD> dq;
    double ddecay = 0;
    const int first = shape.first_tile<kFloatTile, kSegments>(tile);
    for (int j0 = first * kFloatTile; j0 <= i0; j0 += kFloatTile) {
        __syncthreads();
        Tiles::load(k, head + j0 * stride + C, stride, T - j0, D);
        Tiles::load(v, head + j0 * stride + 2 * C, stride, T - j0, D);
        __syncthreads();
        float s[2][4], da[2][4];
        Tiles::scores(s, q, k, D);
        Tiles::scores(da, d_o, v, D);
        auto distance = [&](int r, int m) { return row + r - j0 - x - 8 * m; };
        float_gradients<A, Leave::decay_terms>(
            s, da, shape, h, slope2, [&](int r, int) { return row + r; }, distance,
            [&](int r, int) { return of_rows[r]; });
        if (dlog_gamma) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float tile_ddecay = 0;
#pragma unroll
                for (int m = 0; m < 4; m++) tile_ddecay += s[r][m] * (distance(r, m) - neutral[r]);
                ddecay += c[r] * tile_ddecay;
            }
        }
        FloatWeights::store(weights, da);
        dq.add(weights, k, D);
    }
    for (int r = 0; r < 2; r++) dq.scale(r, c[r] * gradient_factor<A>(shape));
    if (kSegments && first > 0) dq.add_rows(shape.segments.sums + head_at + i0 * stride, stride, T - i0, D);
    dq.store(dqkv + head_at + i0 * stride, stride, T - i0, D);
    if (!dlog_gamma) return;
    __shared__ double of_warps[kAttentionThreads / kWarp];
    block_total(ddecay, of_warps, dlog_gamma + (size_t)blockIdx.x * gridDim.y + tile);
}

}  // namespace gpu
