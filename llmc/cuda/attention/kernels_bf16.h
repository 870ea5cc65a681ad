// The attention kernels for bf16 on tensor cores. attention.h says how they go.
#pragma once
#include "llmc/cuda/attention/rows.h"
#include "llmc/cuda/attention/tiles_bf16.h"

namespace gpu {

// What the kernels whose rows are queries need of gates, in shared memory: two stages of the fades from a
// tile of keys to the beginning of the block's tile, and the prefixes of this tile; and `head` of the
// thread's two rows.
template <class A, bool = kGated<A>>
struct QueryGates {
    __device__ QueryGates(float*, const AttentionShape&, int, int) {}
    __device__ void load_keys(int, int) const {}
    template <bool>
    __device__ float fade(int, int, int, int) const {
        return 0;
    }
};
template <class A>
struct QueryGates<A, true> {
    float* key_fades;
    float2* prefixes;
    const GatedShape& shape;
    float head[2];

    //   shared: (4 kAttentionTile); row: the first of the thread's rows
    __device__ QueryGates(float* shared, const GatedShape& shape, int i0, int row)
        : key_fades(shared), prefixes(reinterpret_cast<float2*>(shared + 2 * kAttentionTile)), shape(shape) {
        const size_t at = (size_t)blockIdx.x * shape.T;
        for (int r = 0; r < 2; r++) head[r] = shape.gate.head[at + min(row + 8 * r, shape.T - 1)];
        const int n = threadIdx.x, i = i0 + n;
        if (n < kAttentionTile) prefixes[n] = i < shape.T ? shape.gate.prefix[at + i] : float2{0, 0};
    }
    // Makes the fades of tile j of keys in its stage, if it is earlier than `tile`.
    __device__ void load_keys(int tile, int j) const {
        const int n = threadIdx.x, key = j * kAttentionTile + n;
        if (n >= kAttentionTile || j == tile) return;
        const float tail = shape.gate.tail[(size_t)blockIdx.x * shape.T + key],
                    between = gate_between<A>(shape, tile, j, gridDim.y);
        key_fades[j % 2 * kAttentionTile + n] = join_fades<A>(tail, between);
    }
    // log2 F for softmax, F for every other activation: of row r of the thread, which is `query` in its tile,
    // and of key `key` of tile j.
    template <bool kDiagonal>
    __device__ float fade(int r, int query, int key, int j) const {
        if constexpr (kDiagonal) {
            return gate_inside<A>(prefixes[query], prefixes[key]);
        } else {
            return join_fades<A>(head[r], key_fades[j % 2 * kAttentionTile + key]);
        }
    }
};

// ------------------------------------------------------------------------------------------------ forward

// For softmax: turns scores into weights relative to the running maximum, and rescales o where that grows.
//   last: the last column, minus 2t, that rows g and g+8 see on the diagonal
//   slope: what q . k loses with each token of distance
//   distance: from row g to the key in column 2t
template <bool kDiagonal, int kD>
__device__ void online_weights(float (&s)[8][4], float (&o)[kD / 8][4], ForwardRows& rows,
                               const int (&last)[2], bool has_decay, float slope, int distance,
                               float qk_to_log2) {
    if (has_decay) {
        float base[2] = {distance * slope, (distance + 8) * slope};
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = fmaf(-(8 * n + e % 2), slope, s[n][e] + base[e / 2]);
    }
    float new_max[2] = {rows.running_max[0], rows.running_max[1]};
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (kDiagonal && 8 * n + e % 2 > last[e / 2]) s[n][e] = -INFINITY;
            new_max[e / 2] = fmaxf(new_max[e / 2], s[n][e]);
        }
    float scaled[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        new_max[r] = reduce_lanes<Max, 1, 2>(new_max[r]);
        float rescale = fast_exp2((rows.running_max[r] - new_max[r]) * qk_to_log2);
        rows.running_max[r] = new_max[r];
        rows.running_sum[r] *= rescale;
        scaled[r] = new_max[r] * qk_to_log2;
#pragma unroll
        for (int n = 0; n < kD / 8; n++) o[n][2 * r] *= rescale, o[n][2 * r + 1] *= rescale;
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[n][e] = fast_exp2(fmaf(s[n][e], qk_to_log2, -scaled[e / 2]));
            rows.running_sum[e / 2] += s[n][e];
        }
}

// For every other activation: turns scores into weights without the row factor.
//   fade_inside (64): gamma^n
//   fade_beyond: gamma^n at the distance from rows g and g+8 to the last key of the tile
//   row: the number of row g
//   gate: the fade of s[n][e], if there are gates
template <class A, bool kDiagonal, class Gate>
__device__ void plain_weights(float (&s)[8][4], ForwardRows& rows, const int (&last)[2], bool has_row_sum,
                              bool has_decay, const float* fade_inside, const float (&fade_beyond)[2],
                              int row, float qk_to_score, Gate gate) {
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[n][e] =
                A::value(activation_argument<A>(s[n][e], qk_to_score), row + e / 2 * 8 + 1.0f, DeviceMath());
            if (kDiagonal && 8 * n + e % 2 > last[e / 2]) s[n][e] = 0;
        }
    if constexpr (kGated<A>) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] *= gate(n, e);
    } else if (has_decay) {
        const float* from_last = fade_inside + kAttentionTile - 1 - threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[n][e] *= kDiagonal ? fade_inside[max(0, last[e / 2] - 8 * n - e % 2)]
                                     : from_last[-8 * n - e % 2] * fade_beyond[e / 2];
    }
    if (has_row_sum) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) rows.running_sum[e / 2] += fabsf(s[n][e]);
    }
}

// Blocks: (B H, tiles of queries). The last tiles come first, because they take longest.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void attention_forward_kernel(bf16* out, float* stats, float* exact,
                                                              const bf16* qkv, ShapeOf<A> shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = Tile<kD>;
    constexpr bool kSegments = kHasSegments<A, kD>;
    bf16* q_tile = reinterpret_cast<bf16*>(attention_shared);
    bf16* kv_tiles = q_tile + Tiles::size;  // two stages of k and v
    float* fade_inside = reinterpret_cast<float*>(kv_tiles + 4 * Tiles::size);

    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H;
    const int tile = gridDim.y - 1 - blockIdx.y, i0 = tile * kAttentionTile;
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const size_t stride = 3 * (size_t)C, table = (size_t)h * shape.tables.stride;
    const bf16* head = qkv + b * T * stride + h * D;
    const int row = i0 + 16 * warp + g;
    const int last[2] = {16 * warp + g - 2 * t, 16 * warp + g + 8 - 2 * t};
    const float qk_to_log2 = shape.qk_to_score * kLog2e;
    QueryGates<A> gates(fade_inside, shape, i0, row);

    auto load_keys = [&](int j) {
        bf16* stage = kv_tiles + j % 2 * 2 * Tiles::size;
        const bf16* keys = head + j * kAttentionTile * stride + C;
        load_tile<kD>(stage, keys, stride, T - j * kAttentionTile, D);
        load_tile<kD>(stage + Tiles::size, keys + C, stride, T - j * kAttentionTile, D);
        commit_copies();
        gates.load_keys(tile, j);
    };
    const int first = shape.template first_tile<kAttentionTile, kSegments>(tile);
    load_tile<kD>(q_tile, head + i0 * stride, stride, T - i0, D);
    load_keys(first);
    float slope = 0;
    if (!kGated<A> && shape.has_decay) {
        if constexpr (A::kOnline) slope = shape.tables.log_gamma[h] / shape.qk_to_score;
        if (!A::kOnline && threadIdx.x < kAttentionTile)
            fade_inside[threadIdx.x] = (int)threadIdx.x < T ? shape.tables.fade[table + threadIdx.x] : 0;
    }

    FragmentA q[kD / 16];
    float o[kD / 8][4] = {};
    ForwardRows rows;
    auto add_keys = [&](int j, auto is_diagonal) {
        constexpr bool kDiagonal = decltype(is_diagonal)::value;
        const bf16 *k = kv_tiles + j % 2 * 2 * Tiles::size, *v = k + Tiles::size;
        float s[8][4] = {};
#pragma unroll
        for (int d = 0; d < kD / 16; d++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                if (!kDiagonal || n <= warp)
                    mma(s[2 * n], s[2 * n + 1], q[d], Tiles::b_transposed(k, 16 * n, d));
        int distance = row - j * kAttentionTile;
        auto gate = [&](int n, int e) {
            return gates.template fade<kDiagonal>(e / 2, row - i0 + e / 2 * 8, 8 * n + 2 * t + e % 2, j);
        };
        if constexpr (A::kOnline) {
            if constexpr (kGated<A>) {
#pragma unroll
                for (int n = 0; n < 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[n][e] = fmaf(gate(n, e), 1 / qk_to_log2, s[n][e]);
            }
            online_weights<kDiagonal, kD>(s, o, rows, last, !kGated<A> && shape.has_decay, slope,
                                          distance - 2 * t, qk_to_log2);
        } else {
            float fade_beyond[2] = {0, 0};
            if (!kGated<A> && !kDiagonal && shape.has_decay) {
                const float* fade = shape.tables.fade + table;
                for (int r = 0; r < 2; r++)
                    fade_beyond[r] = fade[min(distance + 8 * r - (kAttentionTile - 1), T - 1)];
            }
            plain_weights<A, kDiagonal>(s, rows, last, shape.has_row_sum, shape.has_decay, fade_inside,
                                        fade_beyond, row, shape.qk_to_score, gate);
        }
#pragma unroll
        for (int n = 0; n < 4; n++)
            if (!kDiagonal || n <= warp) {
                FragmentA a = as_factor(s[2 * n], s[2 * n + 1]);
#pragma unroll
                for (int d = 0; d < kD / 16; d++) mma(o[2 * d], o[2 * d + 1], a, Tiles::b(v, 16 * n, d));
            }
    };
    for (int j = first; j <= tile; j++) {
        wait_for_copies<0>();
        __syncthreads();  // all copies are there, and no warp still works on the tile before
        if (j == first)
#pragma unroll
            for (int d = 0; d < kD / 16; d++) q[d] = Tiles::a(q_tile, 16 * warp, d);
        if (j < tile) {
            load_keys(j + 1);
            add_keys(j, std::false_type());
        } else {
            add_keys(j, std::true_type());
        }
    }

    const bool has_sums = kSegments && first > 0;
    if (has_sums) add_rows<kD>(o, shape.segments.sums + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int i = row + 8 * r;
        factor[r] = rows.finish<A, 1, 2>(stats, shape, r, h, i, t == 0, has_sums);
        if (A::kOnline || !shape.has_row_sum || i >= T) continue;
        float* to = exact + ((size_t)b * T + i) * C + h * D;
#pragma unroll
        for (int n = 0; n < kD / 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (8 * n + 2 * t + e < D) to[8 * n + 2 * t + e] = o[n][2 * r + e] * factor[r];
    }
    store_rows<kD>(out + ((size_t)b * T + i0) * C + h * D, C, q_tile, o, factor[0], factor[1], T - i0, D);
}

// ----------------------------------------------------------------------------------------------- backward

// How many rows or columns of scores a warp works on at once: as many as the registers allow.
template <int kD>
constexpr int kBackwardStep = kD <= 64 ? 64 : 32;

// Computes dk and dv. A warp has 16 keys. Its scores are transposed: their rows are keys and their columns
// queries. Blocks: (B H, tiles of keys). The first tiles come first, because they take longest.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void attention_backward_keys_kernel(bf16* dqkv, const bf16* dout,
                                                                    const float* stats, const float* dot,
                                                                    const bf16* qkv, ShapeOf<A> shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = Tile<kD>;
    constexpr bool kSegments = kHasSegments<A, kD>;
    constexpr int kStep = kD > 96 ? 16 : kBackwardStep<kD>;  // here dk and dv take many registers
    bf16 *k_tile = reinterpret_cast<bf16*>(attention_shared), *v_tile = k_tile + Tiles::size;
    bf16* query_tiles = v_tile + Tiles::size;  // two stages of q and dO
    float* fade_inside = reinterpret_cast<float*>(query_tiles + 4 * Tiles::size);
    float2* prefixes = reinterpret_cast<float2*>(fade_inside);          // with gates, of the block's keys
    float* terms = fade_inside + (kGated<A> ? 2 : 1) * kAttentionTile;  // two stages of weights and then dots

    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H;
    const int tile = blockIdx.y, j0 = tile * kAttentionTile;
    const int end = shape.template end_tile<kAttentionTile, kSegments>(tile, gridDim.y);
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const size_t stride = 3 * (size_t)C, head_at = b * T * stride + h * D;
    const bf16* head = qkv + head_at;
    const float* fade = shape.tables.fade + (size_t)h * shape.tables.stride;
    const int key = 16 * warp + g;
    float slope2 = 0;
    if (!kGated<A> && A::kOnline && shape.has_decay) slope2 = shape.tables.log_gamma[h] * kLog2e;
    const size_t gate_at = (size_t)blockIdx.x * T;  // of the head's first token
    float tail[2] = {0, 0}, gate_sums[2] = {0, 0};

    auto load_queries = [&](int i) {
        bf16* stage = query_tiles + i % 2 * 2 * Tiles::size;
        const int i0 = i * kAttentionTile;
        load_tile<kD>(stage, head + i0 * stride, stride, T - i0, D);
        load_tile<kD>(stage + Tiles::size, dout + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
        commit_copies();
        const int row = threadIdx.x;
        if (row >= kAttentionTile) return;
        RowTerms r = weighted_row_terms<A>(stats, dot, shape, blockIdx.x, i0 + row, h);
        if constexpr (kGated<A>) {
            if (i > tile && i0 + row < T) {
                const float fade = join_fades<A>(shape.gate.head[gate_at + i0 + row],
                                                 gate_between<A>(shape, i, tile, gridDim.y));
                r.weight = join_fades<A>(r.weight, fade);
                if (!A::kOnline) r.dot *= fade;
            }
        } else if (!A::kOnline && shape.has_decay && i > tile && i0 + row < T) {
            r.weight *= fade[row], r.dot *= fade[row];
        }
        terms[i % 2 * 2 * kAttentionTile + row] = r.weight;
        terms[(i % 2 * 2 + 1) * kAttentionTile + row] = r.dot;
    };
    const bf16* keys = head + j0 * stride + C;
    load_tile<kD>(k_tile, keys, stride, T - j0, D);
    load_tile<kD>(v_tile, keys + C, stride, T - j0, D);
    load_queries(tile);
    if constexpr (kGated<A>) {
        for (int r = 0; r < 2; r++) tail[r] = shape.gate.tail[gate_at + min(j0 + key + 8 * r, T - 1)];
        const int n = threadIdx.x;
        if (n < kAttentionTile) prefixes[n] = j0 + n < T ? shape.gate.prefix[gate_at + j0 + n] : float2{0, 0};
    } else if (!A::kOnline && shape.has_decay && threadIdx.x < kAttentionTile) {
        fade_inside[threadIdx.x] = (int)threadIdx.x < T ? fade[threadIdx.x] : 0;
    }

    float dk[kD / 8][4] = {}, dv[kD / 8][4] = {};
    auto add_queries = [&](int i, auto is_diagonal) {
        constexpr bool kDiagonal = decltype(is_diagonal)::value;
        const bf16 *q = query_tiles + i % 2 * 2 * Tiles::size, *d_o = q + Tiles::size;
        const float *weights = terms + i % 2 * 2 * kAttentionTile + 2 * t, *dots = weights + kAttentionTile;
        [[maybe_unused]] const int distance = i * kAttentionTile - j0 - key;  // from key g to the first query
        float fade_beyond[2] = {1, 1};
        if (!kGated<A> && !A::kOnline && !kDiagonal && shape.has_decay) {
            for (int r = 0; r < 2; r++) fade_beyond[r] = fade[distance - 8 * r];
        }
#pragma unroll 1
        for (int q0 = 0; q0 < kAttentionTile; q0 += kStep) {
            if (kDiagonal && q0 + kStep <= 16 * warp) continue;  // all these queries come before the keys
            if (kGated<A> && kD > 96) __syncwarp();  // otherwise ptxas unrolls this loop, and spills
            auto sees = [&](int n) { return !kDiagonal || q0 + 16 * n >= 16 * warp; };
            float s[kStep / 8][4] = {}, da[kStep / 8][4] = {};
#pragma unroll
            for (int d = 0; d < kD / 16; d++) {
                FragmentA k = Tiles::a(k_tile, 16 * warp, d), v = Tiles::a(v_tile, 16 * warp, d);
#pragma unroll
                for (int n = 0; n < kStep / 16; n++)
                    if (sees(n)) {
                        mma(s[2 * n], s[2 * n + 1], k, Tiles::b_transposed(q, q0 + 16 * n, d));
                        mma(da[2 * n], da[2 * n + 1], v, Tiles::b_transposed(d_o, q0 + 16 * n, d));
                    }
            }
            with_row_sum<A>(shape.has_row_sum, [&](auto row_sum) {
                constexpr bool kRowSum = decltype(row_sum)::value;
#pragma unroll
                for (int n = 0; n < kStep / 8; n++) {
                    const int column = q0 + 8 * n;
                    const float2 weight = *reinterpret_cast<const float2*>(weights + column);
                    float w[4] = {weight.x, weight.y, weight.x, weight.y}, row_dot[4] = {};
                    if (A::kOnline || kRowSum) {
                        const float2 both = *reinterpret_cast<const float2*>(dots + column);
                        row_dot[0] = row_dot[2] = both.x, row_dot[1] = row_dot[3] = both.y;
                    }
                    int rows[4];
                    bool visible[4];
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        rows[e] = i * kAttentionTile + column + 2 * t + e % 2;
                        visible[e] = !kDiagonal || column + 2 * t + e % 2 >= key + e / 2 * 8;
                    }
                    if constexpr (kGated<A>) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            const float by = kDiagonal ? gate_inside<A>(prefixes[column + 2 * t + e % 2],
                                                                        prefixes[key + e / 2 * 8])
                                                       : tail[e / 2];
                            w[e] = join_fades<A>(w[e], by);
                            if (!A::kOnline) row_dot[e] *= by;
                        }
                    } else if (shape.has_decay) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            int from_key = column + 2 * t + e % 2 - e / 2 * 8;  // is added to `distance`
                            if constexpr (A::kOnline) {
                                w[e] = fmaf(distance + from_key, slope2, w[e]);
                            } else {
                                const float by =
                                    kDiagonal ? fade_inside[max(0, from_key - key)] : fade_beyond[e / 2];
                                w[e] *= by, row_dot[e] *= by;
                            }
                        }
                    }
                    float pairs[4];
                    score_gradients<A, Leave::weights, kRowSum>(s[n], da[n], w, row_dot, rows, visible,
                                                                shape.qk_to_score, pairs);
                    if constexpr (kGated<A>) {
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (!kDiagonal || column + 2 * t + e % 2 != key + e / 2 * 8)
                                gate_sums[e / 2] += pairs[e];
                    }
                }
            });
#pragma unroll
            for (int n = 0; n < kStep / 16; n++)
                if (sees(n)) {
                    FragmentA a = as_factor(s[2 * n], s[2 * n + 1]), dx = as_factor(da[2 * n], da[2 * n + 1]);
#pragma unroll
                    for (int d = 0; d < kD / 16; d++) {
                        mma(dv[2 * d], dv[2 * d + 1], a, Tiles::b(d_o, q0 + 16 * n, d));
                        mma(dk[2 * d], dk[2 * d + 1], dx, Tiles::b(q, q0 + 16 * n, d));
                    }
                }
        }
    };
    if (!kSegments) __builtin_assume(tile < end);  // without it poly1 spills registers
    for (int i = tile; i < end; i++) {
        wait_for_copies<0>();
        __syncthreads();  // all copies are there, and no warp still works on the tile before
        if (i + 1 < end) load_queries(i + 1);
        if (i == tile) {
            add_queries(i, std::true_type());
        } else {
            add_queries(i, std::false_type());
        }
    }
    const float factor = gradient_factor<A>(shape);
    if (kSegments && end < (int)gridDim.y) {
        const float* sums = shape.segments.sums + head_at + j0 * stride + C;
        add_rows<kD>(dk, sums, stride, T - j0, D, 1 / factor);
        add_rows<kD>(dv, sums + C, stride, T - j0, D);
    }
    bf16* to = dqkv + head_at + j0 * stride + C;
    store_rows<kD>(to, stride, k_tile, dk, factor, factor, T - j0, D);
    store_rows<kD>(to + C, stride, v_tile, dv, 1.0f, 1.0f, T - j0, D);
    if constexpr (kGated<A>)
        for (int r = 0; r < 2; r++)
            store_gate_sum<1, 2>(shape.gate.column_sums, gate_sums[r], shape, j0 + key + 8 * r, t == 0,
                                 kSegments && end < (int)gridDim.y);
}

// Computes dq and, if it is wanted, each block's share of the gradient of log gamma. Blocks: (B H, tiles of
// queries). The last tiles come first, because they take longest.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads, 2) void attention_backward_queries_kernel(
    bf16* dqkv, double* dlog_gamma /*(B,H,tiles), or null*/, const bf16* dout, const float* stats,
    const float* dot, const bf16* qkv, ShapeOf<A> shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = Tile<kD>;
    constexpr bool kSegments = kHasSegments<A, kD>;
    constexpr int kStep = kBackwardStep<kD>;
    bf16 *q_tile = reinterpret_cast<bf16*>(attention_shared), *d_o_tile = q_tile + Tiles::size;
    bf16* kv_tiles = d_o_tile + Tiles::size;  // two stages of k and v
    float* fade_inside = reinterpret_cast<float*>(kv_tiles + 4 * Tiles::size);

    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H;
    const int tile = gridDim.y - 1 - blockIdx.y, i0 = tile * kAttentionTile;
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const size_t stride = 3 * (size_t)C, head_at = b * T * stride + h * D,
                 table = (size_t)h * shape.tables.stride;
    const bf16* head = qkv + head_at;
    const float* fade = shape.tables.fade + table;
    const int query = 16 * warp + g;
    float slope2 = 0;
    if (!kGated<A> && A::kOnline && shape.has_decay) slope2 = shape.tables.log_gamma[h] * kLog2e;
    QueryGates<A> gates(fade_inside, shape, i0, i0 + query);
    float gate_sums[2] = {0, 0}, own_terms[2] = {0, 0};

    auto load_keys = [&](int j) {
        bf16* stage = kv_tiles + j % 2 * 2 * Tiles::size;
        const bf16* keys = head + j * kAttentionTile * stride + C;
        load_tile<kD>(stage, keys, stride, T - j * kAttentionTile, D);
        load_tile<kD>(stage + Tiles::size, keys + C, stride, T - j * kAttentionTile, D);
        commit_copies();
        gates.load_keys(tile, j);
    };
    load_tile<kD>(q_tile, head + i0 * stride, stride, T - i0, D);
    load_tile<kD>(d_o_tile, dout + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
    const int first = shape.template first_tile<kAttentionTile, kSegments>(tile);
    load_keys(first);
    if (!kGated<A> && !A::kOnline && shape.has_decay && threadIdx.x < kAttentionTile)
        fade_inside[threadIdx.x] = (int)threadIdx.x < T ? fade[threadIdx.x] : 0;
    QueryRows rows;
    for (int r = 0; r < 2; r++)
        rows.load<A>(r, stats, dot, shape, h, i0 + query + 8 * r, dlog_gamma != nullptr);

    float dq[kD / 8][4] = {};
    double dlog_gamma_share = 0;
    auto add_keys = [&](int j, auto is_diagonal) {
        constexpr bool kDiagonal = decltype(is_diagonal)::value;
        const bf16 *k = kv_tiles + j % 2 * 2 * Tiles::size, *v = k + Tiles::size;
        const int distance = i0 + query - j * kAttentionTile;  // of row g to the tile's first key
        float fade_beyond[2] = {1, 1}, tile_share[2] = {0, 0};
        if (!kGated<A> && !A::kOnline && !kDiagonal && shape.has_decay)
            for (int r = 0; r < 2; r++)
                fade_beyond[r] = fade[min(distance + 8 * r - (kAttentionTile - 1), T - 1)];
#pragma unroll 1
        for (int k0 = 0; k0 < kAttentionTile; k0 += kStep) {
            if (kDiagonal && k0 >= 16 * (warp + 1)) break;  // all these keys come after the queries
            auto seen = [&](int n) { return !kDiagonal || k0 + 16 * n <= 16 * warp; };
            float s[kStep / 8][4] = {}, da[kStep / 8][4] = {};
#pragma unroll
            for (int d = 0; d < kD / 16; d++) {
                FragmentA q = Tiles::a(q_tile, 16 * warp, d), d_o = Tiles::a(d_o_tile, 16 * warp, d);
#pragma unroll
                for (int n = 0; n < kStep / 16; n++)
                    if (seen(n)) {
                        mma(s[2 * n], s[2 * n + 1], q, Tiles::b_transposed(k, k0 + 16 * n, d));
                        mma(da[2 * n], da[2 * n + 1], d_o, Tiles::b_transposed(v, k0 + 16 * n, d));
                    }
            }
            auto make_gradients = [&](auto row_sum, auto has_decay) {
                constexpr bool kRowSum = decltype(row_sum)::value, kHasDecay = decltype(has_decay)::value;
#pragma unroll
                for (int n = 0; n < kStep / 8; n++) {
                    const int column = k0 + 8 * n + 2 * t;
                    float w[4], row_dot[4];
                    int row_numbers[4];
                    bool visible[4];
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        w[e] = rows.terms[e / 2].weight, row_dot[e] = rows.terms[e / 2].dot;
                        row_numbers[e] = i0 + query + e / 2 * 8;
                        visible[e] = !kDiagonal || column + e % 2 <= query + e / 2 * 8;
                    }
                    if constexpr (kGated<A>) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            const float by =
                                gates.template fade<kDiagonal>(e / 2, query + e / 2 * 8, column + e % 2, j);
                            w[e] = A::kOnline ? w[e] + by : by;
                        }
                    } else if constexpr (kHasDecay) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            int key = column + e % 2;
                            if constexpr (A::kOnline) {
                                w[e] = fmaf(distance + e / 2 * 8 - key, slope2, w[e]);
                            } else if constexpr (kDiagonal) {
                                w[e] = fade_inside[max(0, query + e / 2 * 8 - key)];
                            } else {
                                w[e] = fade_beyond[e / 2] * fade_inside[kAttentionTile - 1 - key];
                            }
                        }
                    }
                    score_gradients<A, Leave::decay_terms, kRowSum>(s[n], da[n], w, row_dot, row_numbers,
                                                                    visible, shape.qk_to_score);
                    if constexpr (kGated<A>) {
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (kDiagonal && column + e % 2 == query + e / 2 * 8) {
                                own_terms[e / 2] = s[n][e];
                            } else {
                                gate_sums[e / 2] += s[n][e];
                            }
                    }
                    if (kHasDecay && dlog_gamma) {
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            tile_share[e / 2] += s[n][e] * (distance + e / 2 * 8 - column - e % 2 -
                                                            rows.neutral_distance[e / 2]);
                    }
                }
            };
            with_row_sum<A>(shape.has_row_sum, [&](auto row_sum) {
                with_constant(!kGated<A> && shape.has_decay,
                              [&](auto has_decay) { make_gradients(row_sum, has_decay); });
            });
#pragma unroll
            for (int n = 0; n < kStep / 16; n++)
                if (seen(n)) {
                    FragmentA dx = as_factor(da[2 * n], da[2 * n + 1]);
#pragma unroll
                    for (int d = 0; d < kD / 16; d++)
                        mma(dq[2 * d], dq[2 * d + 1], dx, Tiles::b(k, k0 + 16 * n, d));
                }
        }
        for (int r = 0; r < 2; r++) dlog_gamma_share += rows.row_factor[r] * tile_share[r];
    };
    for (int j = first; j <= tile; j++) {
        wait_for_copies<0>();
        __syncthreads();  // all copies are there, and no warp still works on the tile before
        if (j < tile) {
            load_keys(j + 1);
            add_keys(j, std::false_type());
        } else {
            add_keys(j, std::true_type());
        }
    }
#pragma unroll
    for (int n = 0; n < kD / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) dq[n][e] *= rows.row_factor[e / 2] * gradient_factor<A>(shape);
    if (kSegments && first > 0)
        add_rows<kD>(dq, shape.segments.sums + head_at + i0 * stride, stride, T - i0, D);
    store_rows<kD>(dqkv + head_at + i0 * stride, stride, q_tile, dq, 1.0f, 1.0f, T - i0, D);
    if (dlog_gamma) store_share(dlog_gamma + (size_t)blockIdx.x * gridDim.y + tile, dlog_gamma_share);
    if constexpr (kGated<A>)
        for (int r = 0; r < 2; r++) {
            const float factor = rows.row_factor[r];
            const int i = i0 + query + 8 * r;
            store_gate_sum<1, 2>(shape.gate.row_sums, gate_sums[r] * factor, shape, i, t == 0,
                                 kSegments && first > 0);
            store_gate_sum<1, 2>(shape.gate.own_terms, own_terms[r] * factor, shape, i, t == 0);
        }
}

}  // namespace gpu
