// The attention kernels for float, for --dtype fp32: the same algorithm as in kernels_bf16.h, with the tiles
// of tiles_float.h.
#pragma once
#include "llmc/cuda/attention/rows.h"
#include "llmc/cuda/attention/tiles_float.h"

namespace gpu {

// The kernels for 64 channels serve all smaller heads, too.
template <class A, int kD>
constexpr bool kFloatHasSegments = kHasSegments<A, kD == 64 ? 1 : kD>;

// Blocks: (B H, tiles of queries). The last tiles come first, because they take longest.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void attention_forward_float_kernel(float* out, float* stats,
                                                                    const float* qkv, ShapeOf<A> shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = FloatTile<kD>;
    constexpr bool kSegments = kFloatHasSegments<A, kD>;
    float *q = reinterpret_cast<float*>(attention_shared), *k = q + Tiles::size, *v = k + Tiles::size;
    float* weights = v + Tiles::size;
    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H;
    const int tile = gridDim.y - 1 - blockIdx.y, i0 = tile * kFloatTile;
    const int first = shape.template first_tile<kFloatTile, kSegments>(tile);
    const int x = threadIdx.x % 8, row = i0 + threadIdx.x / 8 * 2;
    const size_t stride = 3 * (size_t)C, table = (size_t)h * shape.tables.stride;
    const float* head = qkv + b * T * stride + h * D;
    const float qk_to_log2 = shape.qk_to_score * kLog2e;
    const float slope = A::kOnline && shape.has_decay ? shape.tables.log_gamma[h] / shape.qk_to_score : 0;

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
        const TileGates<A> gates(shape, tile, j0 / kFloatTile);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if constexpr (A::kOnline) {
                float new_max = rows.running_max[r];
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    const int distance = row + r - j0 - x - 8 * m;
                    if constexpr (kGated<A>)
                        s[r][m] = fmaf(gates(row + r, row + r - distance), 1 / qk_to_log2, s[r][m]);
                    s[r][m] = distance >= 0 ? s[r][m] + distance * slope : -INFINITY;
                    new_max = fmaxf(new_max, s[r][m]);
                }
                new_max = reduce_lanes<Max, 4, 2, 1>(new_max);
                float rescale = fast_exp2((rows.running_max[r] - new_max) * qk_to_log2);
                rows.running_max[r] = new_max;
                rows.running_sum[r] *= rescale;
                o.scale(r, rescale);
#pragma unroll
                for (int m = 0; m < 4; m++)
                    rows.running_sum[r] += s[r][m] = fast_exp2((s[r][m] - new_max) * qk_to_log2);
            } else {
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    const int distance = row + r - j0 - x - 8 * m;
                    const float x = activation_argument<A>(s[r][m], shape.qk_to_score);
                    s[r][m] = distance >= 0 ? A::value(x, row + r + 1.0f, DeviceMath()) : 0;
                    if constexpr (kGated<A>) {
                        s[r][m] *= gates(row + r, row + r - distance);
                    } else if (shape.has_decay) {
                        s[r][m] *= shape.tables.fade[table + max(0, min(distance, T - 1))];
                    }
                    rows.running_sum[r] += fabsf(s[r][m]);
                }
            }
        }
        FloatWeights::store(weights, s);
        o.add(weights, v, D);
    }
    const bool has_sums = kSegments && first > 0;
    if (has_sums) o.add_rows(shape.segments.sums + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
#pragma unroll
    for (int r = 0; r < 2; r++)
        o.scale(r, rows.finish<A, 4, 2, 1>(stats, shape, r, h, row + r, x == 0, has_sums));
    o.store(out + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
}

// score_gradients() of a thread's 2 x 4 scores. Functions of the place (r, m) of a score give the number of
// its query, the distance from the query to the key, and the query's terms. gates gives the fade of a pair if
// there are gates, and pairs then receives what score_gradients() says.
template <class A, Leave kLeave, class Row, class Distance, class Terms>
__device__ void float_gradients(float (&s)[2][4], float (&da)[2][4], const AttentionShape& shape, int h,
                                float slope2, Row row_of, Distance distance_of, Terms terms,
                                const TileGates<A>& gates, float (&pairs)[2][4]) {
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
            const RowTerms row = terms(r, m);
            visible[m] = distance >= 0;
            w[m] = row.weight, dot[m] = row.dot;
            if constexpr (kGated<A>) {
                const float by = gates(rows[m], rows[m] - distance);
                if (A::kOnline) {
                    w[m] += by;
                } else {
                    w[m] *= by;
                    if (kLeave == Leave::weights) dot[m] *= by;
                }
            } else if constexpr (A::kOnline) {
                w[m] = fmaf(distance, slope2, w[m]);
            } else if (shape.has_decay) {
                const float by = fade[max(0, min(distance, shape.T - 1))];
                w[m] *= by;
                if (kLeave == Leave::weights) dot[m] *= by;
            }
        }
        with_row_sum<A>(shape.has_row_sum, [&](auto row_sum) {
            score_gradients<A, kLeave, decltype(row_sum)::value>(s[r], da[r], w, dot, rows, visible,
                                                                 shape.qk_to_score, pairs[r]);
        });
    }
}

// Computes dk and dv. Blocks: (B H, tiles of keys). The first tiles come first, because they take longest.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void attention_backward_keys_float_kernel(float* dqkv, const float* dout,
                                                                          const float* stats,
                                                                          const float* dot, const float* qkv,
                                                                          ShapeOf<A> shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = FloatTile<kD>;
    constexpr bool kSegments = kFloatHasSegments<A, kD>;
    float *k = reinterpret_cast<float*>(attention_shared), *v = k + Tiles::size;
    float *q = v + Tiles::size, *d_o = q + Tiles::size, *weights = d_o + Tiles::size;
    __shared__ RowTerms rows[kFloatTile];
    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H, j0 = blockIdx.y * kFloatTile;
    const int end = shape.template end_tile<kFloatTile, kSegments>(blockIdx.y, gridDim.y);
    const int x = threadIdx.x % 8, key = j0 + threadIdx.x / 8 * 2;
    const size_t stride = 3 * (size_t)C, head_at = b * T * stride + h * D;
    const float* head = qkv + head_at;
    const float slope2 = A::kOnline && shape.has_decay ? shape.tables.log_gamma[h] * kLog2e : 0;

    Tiles::load(k, head + j0 * stride + C, stride, T - j0, D);
    Tiles::load(v, head + j0 * stride + 2 * C, stride, T - j0, D);
    FloatSums<kD> dk, dv;
    double gate_sums[2] = {0, 0};
    __builtin_assume(j0 < end * kFloatTile);
    for (int i0 = j0; i0 < end * kFloatTile; i0 += kFloatTile) {
        __syncthreads();
        Tiles::load(q, head + i0 * stride, stride, T - i0, D);
        Tiles::load(d_o, dout + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
        if (threadIdx.x < kFloatTile)
            rows[threadIdx.x] = weighted_row_terms<A>(stats, dot, shape, blockIdx.x, i0 + threadIdx.x, h);
        __syncthreads();
        float s[2][4], da[2][4];
        Tiles::scores(s, k, q, D);
        Tiles::scores(da, v, d_o, D);
        auto distance = [&](int r, int m) { return i0 + x + 8 * m - key - r; };
        float pairs[2][4];
        float_gradients<A, Leave::weights>(
            s, da, shape, h, slope2, [&](int, int m) { return i0 + x + 8 * m; }, distance,
            [&](int, int m) { return rows[x + 8 * m]; }, TileGates<A>(shape, i0 / kFloatTile, blockIdx.y),
            pairs);
        if constexpr (kGated<A>) {
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int m = 0; m < 4; m++)
                    if (distance(r, m) != 0) gate_sums[r] += pairs[r][m];
        }
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
    if constexpr (kGated<A>)
        for (int r = 0; r < 2; r++)
            store_gate_sum<4, 2, 1>(shape.gate.column_sums, gate_sums[r], shape, key + r, x == 0,
                                    kSegments && end < (int)gridDim.y);
}

// Computes dq and, if it is wanted, each block's share of the gradient of log gamma. Blocks: (B H, tiles of
// queries). The last tiles come first, because they take longest.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads, 2) void attention_backward_queries_float_kernel(
    float* dqkv, double* dlog_gamma /*(B,H,tiles), or null*/, const float* dout, const float* stats,
    const float* dot, const float* qkv, ShapeOf<A> shape) {
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
    const float slope2 = A::kOnline && shape.has_decay ? shape.tables.log_gamma[h] * kLog2e : 0;

    Tiles::load(q, head + i0 * stride, stride, T - i0, D);
    Tiles::load(d_o, dout + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
    QueryRows rows;
    for (int r = 0; r < 2; r++) rows.load<A>(r, stats, dot, shape, h, row + r, dlog_gamma != nullptr);
    FloatSums<kD> dq;
    double dlog_gamma_share = 0, gate_sums[2] = {0, 0};
    float own_terms[2] = {0, 0};
    const int first = shape.template first_tile<kFloatTile, kSegments>(tile);
    for (int j0 = first * kFloatTile; j0 <= i0; j0 += kFloatTile) {
        __syncthreads();
        Tiles::load(k, head + j0 * stride + C, stride, T - j0, D);
        Tiles::load(v, head + j0 * stride + 2 * C, stride, T - j0, D);
        __syncthreads();
        float s[2][4], da[2][4];
        Tiles::scores(s, q, k, D);
        Tiles::scores(da, d_o, v, D);
        auto distance = [&](int r, int m) { return row + r - j0 - x - 8 * m; };
        float unused[2][4];
        float_gradients<A, Leave::decay_terms>(
            s, da, shape, h, slope2, [&](int r, int) { return row + r; }, distance,
            [&](int r, int) { return rows.terms[r]; }, TileGates<A>(shape, tile, j0 / kFloatTile), unused);
        if constexpr (kGated<A>) {
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int m = 0; m < 4; m++)
                    if (distance(r, m) == 0) {
                        own_terms[r] = s[r][m];
                    } else {
                        gate_sums[r] += s[r][m];
                    }
        }
        if (dlog_gamma) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float tile_share = 0;
#pragma unroll
                for (int m = 0; m < 4; m++)
                    tile_share += s[r][m] * (distance(r, m) - rows.neutral_distance[r]);
                dlog_gamma_share += rows.row_factor[r] * tile_share;
            }
        }
        FloatWeights::store(weights, da);
        dq.add(weights, k, D);
    }
    for (int r = 0; r < 2; r++) dq.scale(r, rows.row_factor[r] * gradient_factor<A>(shape));
    if (kSegments && first > 0) dq.add_rows(shape.segments.sums + head_at + i0 * stride, stride, T - i0, D);
    dq.store(dqkv + head_at + i0 * stride, stride, T - i0, D);
    if (dlog_gamma) store_share(dlog_gamma + (size_t)blockIdx.x * gridDim.y + tile, dlog_gamma_share);
    if constexpr (kGated<A>)
        for (int r = 0; r < 2; r++) {
            const float factor = rows.row_factor[r];
            store_gate_sum<4, 2, 1>(shape.gate.row_sums, gate_sums[r] * factor, shape, row + r, x == 0,
                                    kSegments && first > 0);
            store_gate_sum<4, 2, 1>(shape.gate.own_terms, own_terms[r] * factor, shape, row + r, x == 0);
        }
}

}  // namespace gpu
