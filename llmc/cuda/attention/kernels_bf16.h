// The attention kernels for bf16 on tensor cores (attention.h says how they go).
#pragma once
#include "llmc/activation.h"
#include "llmc/attention_linear_form.h"
#include "llmc/cuda/attention/tiles_bf16.h"
#include "llmc/cuda/columns.h"

namespace gpu {

// Whether a kernel for heads of up to kD has segments to look after.
template <class A, int kD>
constexpr bool kHasSegments = has_linear_form(A::kPower, kD);
// Whether they have totals.
template <class A>
constexpr bool kHasTotals = has_linear_sum(A::kPower);

// What the kernels of one call have in common.
struct AttentionShape {
    int T, H, D;
    bool row_sum;  // scale `sum`
    bool decays;
    float scale;  // 1 / sqrt(D)
    AttentionTables tables;
    AttentionSegments segments;

    __device__ int C() const { return H * D; }
    // The first tile of a tile's segment, and the first of the next, of tiles of kTile tokens.
    template <int kTile, bool kSegments>
    __device__ int first_tile(int tile) const {
        return kSegments && segments.length ? tile - tile % (segments.length / kTile) : 0;
    }
    template <int kTile, bool kSegments>
    __device__ int end_tile(int tile, int tiles) const {
        if (!kSegments || !segments.length) return tiles;
        return min(first_tile<kTile, kSegments>(tile) + segments.length / kTile, tiles);
    }
};

inline AttentionShape attention_shape(const AttentionConfig& config, const float* decay, int T, int H, int D,
                                      const AttentionTables& tables, const AttentionSegments& segments) {
    return {T, H, D, config.has_row_sum(), decay != nullptr, 1 / std::sqrt((float)D), tables, segments};
}

// What an activation takes: q . k for a power, otherwise the score.
template <class A>
__device__ float activation_argument(float qk, float scale) {
    return A::kPower > 0 ? qk : qk * scale;
}

// ------------------------------------------------------------------------------------------------ forward

// What a lane knows of its rows g and g+8 while it goes through the keys.
struct ForwardRows {
    float largest[2] = {-INFINITY, -INFINITY};  // softmax's running maximum, of scores not yet scaled
    float total[2] = {0, 0};                    // the lane's share of the running sum
};

// Softmax: scores become weights relative to the maximum so far; o is rescaled where that grows.
//   last: the last column, less 2t, that rows g and g+8 see on the diagonal
//   slope: what a score loses with each token of distance; distance: that of column 2t
template <bool kDiagonal, int kD>
__device__ void online_weights(float (&s)[8][4], float (&o)[kD / 8][4], ForwardRows& rows,
                               const int (&last)[2], bool decays, float slope, int distance, float scale2) {
    if (decays) {
        float base[2] = {distance * slope, (distance + 8) * slope};
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = fmaf(-(8 * n + e % 2), slope, s[n][e] + base[e / 2]);
    }
    float most[2] = {rows.largest[0], rows.largest[1]};
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (kDiagonal && 8 * n + e % 2 > last[e / 2]) s[n][e] = -INFINITY;
            most[e / 2] = fmaxf(most[e / 2], s[n][e]);
        }
    float scaled[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        most[r] = reduce_lanes<Max, 1, 2>(most[r]);
        float rescale = fast_exp2((rows.largest[r] - most[r]) * scale2);
        rows.largest[r] = most[r];
        rows.total[r] *= rescale;
        scaled[r] = most[r] * scale2;
#pragma unroll
        for (int n = 0; n < kD / 8; n++) o[n][2 * r] *= rescale, o[n][2 * r + 1] *= rescale;
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[n][e] = fast_exp2(fmaf(s[n][e], scale2, -scaled[e / 2]));
            rows.total[e / 2] += s[n][e];
        }
}

// Every other activation: the weights, without c_i.
//   near (64): gamma^n; far: gamma^n at the distance to the tile's last key, for rows g and g+8
//   row: the number of row g
template <class A, bool kDiagonal>
__device__ void plain_weights(float (&s)[8][4], ForwardRows& rows, const int (&last)[2], bool row_sum,
                              bool decays, const float* near, const float (&far)[2], int row, float scale) {
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[n][e] = A::value(activation_argument<A>(s[n][e], scale), row + e / 2 * 8 + 1.0f, DeviceMath());
            if (kDiagonal && 8 * n + e % 2 > last[e / 2]) s[n][e] = 0;
        }
    if (decays) {
        const float* from_last = near + kAttentionTile - 1 - threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[n][e] *= kDiagonal ? near[max(0, last[e / 2] - 8 * n - e % 2)]
                                     : from_last[-8 * n - e % 2] * far[e / 2];
    }
    if (row_sum) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) rows.total[e / 2] += fabsf(s[n][e]);
    }
}

// Blocks: (B H, tiles of queries), the last, longest, first.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void attention_forward_kernel(bf16* out, float* stats, float* exact,
                                                              const bf16* qkv, AttentionShape shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = Tile<kD>;
    constexpr bool kSegments = kHasSegments<A, kD>;
    bf16* q_tile = reinterpret_cast<bf16*>(attention_shared);
    bf16* kv_tiles = q_tile + Tiles::size;  // two stages of k and v
    float* near = reinterpret_cast<float*>(kv_tiles + 4 * Tiles::size);

    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H;
    const int tile = gridDim.y - 1 - blockIdx.y, i0 = tile * kAttentionTile;
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const size_t stride = 3 * (size_t)C, table = (size_t)h * shape.tables.stride;
    const bf16* head = qkv + b * T * stride + h * D;
    const int row = i0 + 16 * warp + g;
    const int last[2] = {16 * warp + g - 2 * t, 16 * warp + g + 8 - 2 * t};
    const float scale2 = shape.scale * kLog2e;

    auto load_keys = [&](int j) {
        bf16* stage = kv_tiles + j % 2 * 2 * Tiles::size;
        const bf16* keys = head + j * kAttentionTile * stride + C;
        load_tile<kD>(stage, keys, stride, T - j * kAttentionTile, D);
        load_tile<kD>(stage + Tiles::size, keys + C, stride, T - j * kAttentionTile, D);
        commit_copies();
    };
    const int first = shape.first_tile<kAttentionTile, kSegments>(tile);
    load_tile<kD>(q_tile, head + i0 * stride, stride, T - i0, D);
    load_keys(first);
    float slope = 0;
    if (shape.decays) {
        if constexpr (A::kOnline) slope = shape.tables.log_gamma[h] / shape.scale;
        if (!A::kOnline && threadIdx.x < kAttentionTile)
            near[threadIdx.x] = (int)threadIdx.x < T ? shape.tables.fade[table + threadIdx.x] : 0;
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
        if constexpr (A::kOnline) {
            online_weights<kDiagonal, kD>(s, o, rows, last, shape.decays, slope, distance - 2 * t, scale2);
        } else {
            float far[2] = {0, 0};
            if (!kDiagonal && shape.decays) {
                const float* fade = shape.tables.fade + table;
                for (int r = 0; r < 2; r++)
                    far[r] = fade[min(distance + 8 * r - (kAttentionTile - 1), T - 1)];
            }
            plain_weights<A, kDiagonal>(s, rows, last, shape.row_sum, shape.decays, near, far, row,
                                        shape.scale);
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
        __syncthreads();  // all copies are there, and nobody works on the tile before
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

    if (kSegments && first > 0)
        add_rows<kD>(o, shape.segments.sums + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int i = row + 8 * r;
        float total = rows.total[r];
        if (A::kOnline || shape.row_sum) total = reduce_lanes<Sum, 1, 2>(total);
        if (kSegments && kHasTotals<A> && shape.row_sum && first > 0 && i < T)
            total += shape.segments.totals[(size_t)blockIdx.x * T + i];
        float stat;
        if constexpr (A::kOnline) {
            factor[r] = 1 / total;
            stat = rows.largest[r] * shape.scale + logf(total);
        } else {
            factor[r] = i < T ? shape.tables.c[table + i] : 0;
            stat = total * factor[r] + (float)kRowSumEps;
            if (shape.row_sum) factor[r] /= stat;
        }
        if (i >= T) continue;
        if ((A::kOnline || shape.row_sum) && t == 0) stats[(size_t)blockIdx.x * T + i] = stat;
        if (!A::kOnline && shape.row_sum) {
            float* to = exact + ((size_t)b * T + i) * C + h * D;
#pragma unroll
            for (int n = 0; n < kD / 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (8 * n + 2 * t + e < D) to[8 * n + 2 * t + e] = o[n][2 * r + e] * factor[r];
        }
    }
    store_rows<kD>(out + ((size_t)b * T + i0) * C + h * D, C, q_tile, o, factor[0], factor[1], T - i0, D);
}

// ----------------------------------------------------------------------------------------------- backward

// dO_i . O_i, which the derivative of a normaliser needs: for softmax and `sum` alone. Eight lanes a row.
template <class Real, class Out>
__global__ void attention_dots(float* dot,        // (B,H,T)
                               const Real* dout,  // (B,T,C)
                               const Out* out,    // (B,T,C)
                               int rows, int T, int H, int D) {
    int index = (blockIdx.x * blockDim.x + threadIdx.x) / 8;  // of (B,H,T), so that stores are side by side
    int bh = index / T, head = bh % H;
    const size_t row = (((size_t)(bh / H) * T + index % T) * H + head) * D;
    // 16 bytes of the wider type. `sum` has its out behind the sums of the rows, so at any 4-byte address.
    constexpr int kWidth = 16 / (sizeof(Real) > sizeof(Out) ? sizeof(Real) : sizeof(Out));
    const bool packs = D % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    float sum = 0;
    for (int c = threadIdx.x % 8 * kWidth; index < rows && c < D; c += 8 * kWidth) {
        if (packs) {
            Vec<kWidth> x = load_vec<kWidth>(dout + row + c), y = load_vec<kWidth>(out + row + c);
#pragma unroll
            for (int e = 0; e < kWidth; e++) sum += x[e] * y[e];
        } else {
            for (int e = 0; e < kWidth && c + e < D; e++)
                sum += to_float(dout[row + c + e]) * to_float(out[row + c + e]);
        }
    }
    sum = reduce_lanes<Sum, 4, 2, 1>(sum);
    if (index < rows && threadIdx.x % 8 == 0) dot[index] = sum;
}

// The inputs of the backward pass that belong to a row.
struct RowTerms {
    float weight = 0;  // c_i / sqrt(D)^p; of softmax what is added to the scaled score: minus its log-sum-exp
    float dot = 0;     // dO_i . O_i, for `sum` times the weight
};
// Where the weight is put in at the end, dot is without it.
template <class A>
__device__ RowTerms terms_apart(const float* stats, const float* dot, const AttentionShape& shape, int bh,
                                int i) {
    RowTerms terms;
    if (i >= shape.T) return terms;
    size_t at = (size_t)bh * shape.T + i;
    if constexpr (A::kOnline) {
        terms.weight = -stats[at] * kLog2e;
        terms.dot = dot[at];
    } else {
        terms.weight = shape.tables.c[(size_t)(bh % shape.H) * shape.tables.stride + i];
        if (shape.row_sum) {
            terms.weight /= stats[at];
            terms.dot = dot[at];
        }
    }
    return terms;
}
template <class A>
__device__ RowTerms row_terms(const float* stats, const float* dot, const AttentionShape& shape, int bh,
                              int i) {
    RowTerms terms = terms_apart<A>(stats, dot, shape, bh, i);
    if (!A::kOnline) terms.dot *= terms.weight;
    return terms;
}

// What score_gradients() leaves in the place of the scores: the weights, for dv; or, for the gradient of log
// gamma, what each pair gives to it for a token of distance.
enum class Leave { weights, decay_terms };

// Replaces four dO V^T by the gradients of q . k, without gradient_factor(), and four q . k by what `kLeave`
// says.
//   w: the factors of their rows, with the decay; for Leave::decay_terms without c_i, as the results are then
//   dot: dO_i . O_i where there is a normaliser, for Leave::weights and `sum` times w
//   rows: the numbers of their rows
template <class A, Leave kLeave, bool kRowSum>
__device__ void score_gradients(float (&s)[4], float (&da)[4], const float (&w)[4], const float (&dot)[4],
                                const int (&rows)[4], const bool (&visible)[4], float scale) {
    constexpr bool kWeights = kLeave == Leave::weights;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float value, slope;
        if constexpr (A::kOnline) {
            value = visible[e] ? fast_exp2(fmaf(s[e], scale * kLog2e, w[e])) : 0;
            da[e] = value * (da[e] - dot[e]);
            s[e] = kWeights ? value : da[e];
        } else {
            const float x = activation_argument<A>(s[e], scale), keys = rows[e] + 1.0f;
            A::weighted(value, slope, x, w[e], keys, DeviceMath());
            if constexpr (kRowSum) {  // of |x^p|, whose derivative has the sign of x^p
                const float signed_dot = value > 0 ? dot[e] : value < 0 ? -dot[e] : 0;
                da[e] = kWeights ? da[e] * w[e] - signed_dot : da[e] - signed_dot;
            }
            s[e] = !visible[e] ? 0 : kWeights ? value : value * da[e];
            if (kRowSum && kWeights) A::weighted(value, slope, x, 1.0f, keys, DeviceMath());
            da[e] = visible[e] ? slope * da[e] : 0;
        }
    }
}

// Calls f with a compile-time constant, so that the branch that is not taken costs nothing.
template <class F>
__device__ void with_constant(bool value, F f) {
    if (value) {
        f(std::true_type());
    } else {
        f(std::false_type());
    }
}
// With whether the scale is `sum`.
template <class A, class F>
__device__ void with_row_sum(bool row_sum, F f) {
    with_constant(A::kPower > 0 && row_sum, f);
}

// What score_gradients() leaves out.
template <class A>
__device__ float gradient_factor(const AttentionShape& shape) {
    if constexpr (A::kPower > 0) {
        return A::kSlopeFactor;
    } else {
        return shape.scale;
    }
}

// Rows or columns of scores that are worked on at once: as many as registers allow.
template <int kD>
constexpr int kBackwardStep = kD <= 64 ? 64 : 32;

// dk and dv. A warp has 16 keys; its scores are transposed, their columns queries. Blocks: (B H, tiles of
// keys), the first, longest, first.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads,
                             2) void attention_backward_keys_kernel(bf16* dqkv, const bf16* dout,
                                                                    const float* stats, const float* dot,
                                                                    const bf16* qkv, AttentionShape shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = Tile<kD>;
    constexpr bool kSegments = kHasSegments<A, kD>;
    constexpr int kStep = kD > 96 ? 16 : kBackwardStep<kD>;  // here dk and dv take registers
    bf16 *k_tile = reinterpret_cast<bf16*>(attention_shared), *v_tile = k_tile + Tiles::size;
    bf16* query_tiles = v_tile + Tiles::size;  // two stages of q and dO
    float* near = reinterpret_cast<float*>(query_tiles + 4 * Tiles::size);
    float* terms = near + kAttentionTile;  // two stages of weights and dots

    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H;
    const int tile = blockIdx.y, j0 = tile * kAttentionTile;
    const int end = shape.end_tile<kAttentionTile, kSegments>(tile, gridDim.y);
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const size_t stride = 3 * (size_t)C, head_at = b * T * stride + h * D;
    const bf16* head = qkv + head_at;
    const float* fade = shape.tables.fade + (size_t)h * shape.tables.stride;
    const int key = 16 * warp + g;
    float slope2 = 0;
    if (A::kOnline && shape.decays) slope2 = shape.tables.log_gamma[h] * kLog2e;

    auto load_queries = [&](int i) {
        bf16* stage = query_tiles + i % 2 * 2 * Tiles::size;
        const int i0 = i * kAttentionTile;
        load_tile<kD>(stage, head + i0 * stride, stride, T - i0, D);
        load_tile<kD>(stage + Tiles::size, dout + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
        commit_copies();
        const int row = threadIdx.x;
        if (row >= kAttentionTile) return;
        RowTerms r = row_terms<A>(stats, dot, shape, blockIdx.x, i0 + row);
        if (!A::kOnline && shape.decays && i > tile && i0 + row < T)
            r.weight *= fade[row], r.dot *= fade[row];
        terms[i % 2 * 2 * kAttentionTile + row] = r.weight;
        terms[(i % 2 * 2 + 1) * kAttentionTile + row] = r.dot;
    };
    const bf16* keys = head + j0 * stride + C;
    load_tile<kD>(k_tile, keys, stride, T - j0, D);
    load_tile<kD>(v_tile, keys + C, stride, T - j0, D);
    load_queries(tile);
    if (!A::kOnline && shape.decays && threadIdx.x < kAttentionTile)
        near[threadIdx.x] = (int)threadIdx.x < T ? fade[threadIdx.x] : 0;

    float dk[kD / 8][4] = {}, dv[kD / 8][4] = {};
    auto add_queries = [&](int i, auto is_diagonal) {
        constexpr bool kDiagonal = decltype(is_diagonal)::value;
        const bf16 *q = query_tiles + i % 2 * 2 * Tiles::size, *d_o = q + Tiles::size;
        const float *weights = terms + i % 2 * 2 * kAttentionTile + 2 * t, *dots = weights + kAttentionTile;
        const int distance = i * kAttentionTile - j0 - key;  // from key g to the tile's first query
        float far[2] = {1, 1};
        if (!A::kOnline && !kDiagonal && shape.decays)
            for (int r = 0; r < 2; r++) far[r] = fade[distance - 8 * r];
#pragma unroll 1
        for (int q0 = 0; q0 < kAttentionTile; q0 += kStep) {
            if (kDiagonal && q0 + kStep <= 16 * warp) continue;  // all of them come before the keys
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
            with_row_sum<A>(shape.row_sum, [&](auto row_sum) {
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
                    if (shape.decays) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            int from_key = column + 2 * t + e % 2 - e / 2 * 8;  // beyond `distance`
                            if constexpr (A::kOnline) {
                                w[e] = fmaf(distance + from_key, slope2, w[e]);
                            } else {
                                const float by = kDiagonal ? near[max(0, from_key - key)] : far[e / 2];
                                w[e] *= by, row_dot[e] *= by;
                            }
                        }
                    }
                    score_gradients<A, Leave::weights, kRowSum>(s[n], da[n], w, row_dot, rows, visible,
                                                                shape.scale);
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
    if (!kSegments) __builtin_assume(tile < end);  // else it makes poly1 spill
    for (int i = tile; i < end; i++) {
        wait_for_copies<0>();
        __syncthreads();  // all copies are there, and nobody works on the tile before
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
}

// dq, and each block's share of the gradient of log gamma where it is wanted. Blocks: (B H, tiles of
// queries), the last, longest, first.
template <class A, int kD>
__global__ __launch_bounds__(kAttentionThreads, 2) void attention_backward_queries_kernel(
    bf16* dqkv, double* dlog_gamma /*(B,H,tiles), or null*/, const bf16* dout, const float* stats,
    const float* dot, const bf16* qkv, AttentionShape shape) {
    extern __shared__ uint4 attention_shared[];
    using Tiles = Tile<kD>;
    constexpr bool kSegments = kHasSegments<A, kD>;
    constexpr int kStep = kBackwardStep<kD>;
    bf16 *q_tile = reinterpret_cast<bf16*>(attention_shared), *d_o_tile = q_tile + Tiles::size;
    bf16* kv_tiles = d_o_tile + Tiles::size;  // two stages of k and v
    float* near = reinterpret_cast<float*>(kv_tiles + 4 * Tiles::size);

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
    if (A::kOnline && shape.decays) slope2 = shape.tables.log_gamma[h] * kLog2e;

    auto load_keys = [&](int j) {
        bf16* stage = kv_tiles + j % 2 * 2 * Tiles::size;
        const bf16* keys = head + j * kAttentionTile * stride + C;
        load_tile<kD>(stage, keys, stride, T - j * kAttentionTile, D);
        load_tile<kD>(stage + Tiles::size, keys + C, stride, T - j * kAttentionTile, D);
        commit_copies();
    };
    load_tile<kD>(q_tile, head + i0 * stride, stride, T - i0, D);
    load_tile<kD>(d_o_tile, dout + ((size_t)b * T + i0) * C + h * D, C, T - i0, D);
    const int first = shape.first_tile<kAttentionTile, kSegments>(tile);
    load_keys(first);
    if (!A::kOnline && shape.decays && threadIdx.x < kAttentionTile)
        near[threadIdx.x] = (int)threadIdx.x < T ? fade[threadIdx.x] : 0;
    RowTerms row[2];
    float c[2] = {1, 1}, neutral[2] = {0, 0};  // c: what is put in at the end
    for (int r = 0; r < 2; r++) {
        row[r] = terms_apart<A>(stats, dot, shape, blockIdx.x, i0 + query + 8 * r);
        if (!A::kOnline) c[r] = row[r].weight, row[r].weight = 1;
        if (dlog_gamma && i0 + query + 8 * r < T)
            neutral[r] = shape.tables.neutral[table + i0 + query + 8 * r];
    }

    float dq[kD / 8][4] = {};
    double ddecay = 0;
    auto add_keys = [&](int j, auto is_diagonal) {
        constexpr bool kDiagonal = decltype(is_diagonal)::value;
        const bf16 *k = kv_tiles + j % 2 * 2 * Tiles::size, *v = k + Tiles::size;
        const int distance = i0 + query - j * kAttentionTile;  // of row g to the tile's first key
        float far[2] = {1, 1}, tile_ddecay[2] = {0, 0};
        if (!A::kOnline && !kDiagonal && shape.decays)
            for (int r = 0; r < 2; r++) far[r] = fade[min(distance + 8 * r - (kAttentionTile - 1), T - 1)];
#pragma unroll 1
        for (int k0 = 0; k0 < kAttentionTile; k0 += kStep) {
            if (kDiagonal && k0 >= 16 * (warp + 1)) break;  // all of them come after the queries
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
            auto make_gradients = [&](auto row_sum, auto decays) {
                constexpr bool kRowSum = decltype(row_sum)::value, kDecays = decltype(decays)::value;
#pragma unroll
                for (int n = 0; n < kStep / 8; n++) {
                    const int column = k0 + 8 * n + 2 * t;
                    float w[4], row_dot[4];
                    int rows[4];
                    bool visible[4];
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        w[e] = row[e / 2].weight, row_dot[e] = row[e / 2].dot;
                        rows[e] = i0 + query + e / 2 * 8;
                        visible[e] = !kDiagonal || column + e % 2 <= query + e / 2 * 8;
                    }
                    if constexpr (kDecays) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            int key = column + e % 2;
                            if constexpr (A::kOnline) {
                                w[e] = fmaf(distance + e / 2 * 8 - key, slope2, w[e]);
                            } else if constexpr (kDiagonal) {
                                w[e] = near[max(0, query + e / 2 * 8 - key)];
                            } else {
                                w[e] = far[e / 2] * near[kAttentionTile - 1 - key];
                            }
                        }
                    }
                    score_gradients<A, Leave::decay_terms, kRowSum>(s[n], da[n], w, row_dot, rows, visible,
                                                                    shape.scale);
                    if (kDecays && dlog_gamma) {
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            tile_ddecay[e / 2] +=
                                s[n][e] * (distance + e / 2 * 8 - column - e % 2 - neutral[e / 2]);
                    }
                }
            };
            with_row_sum<A>(shape.row_sum, [&](auto row_sum) {
                with_constant(shape.decays, [&](auto decays) { make_gradients(row_sum, decays); });
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
        for (int r = 0; r < 2; r++) ddecay += c[r] * tile_ddecay[r];
    };
    for (int j = first; j <= tile; j++) {
        wait_for_copies<0>();
        __syncthreads();  // all copies are there, and nobody works on the tile before
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
        for (int e = 0; e < 4; e++) dq[n][e] *= c[e / 2] * gradient_factor<A>(shape);
    if (kSegments && first > 0)
        add_rows<kD>(dq, shape.segments.sums + head_at + i0 * stride, stride, T - i0, D);
    store_rows<kD>(dqkv + head_at + i0 * stride, stride, q_tile, dq, 1.0f, 1.0f, T - i0, D);
    if (!dlog_gamma) return;
    __shared__ double of_warps[kAttentionThreads / kWarp];
    block_total(ddecay, of_warps, dlog_gamma + (size_t)blockIdx.x * gridDim.y + tile);
}

}  // namespace gpu
