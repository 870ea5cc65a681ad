// What the attention kernels for float and for bf16 share: the sizes of a call, what a row of scores begins
// with and ends with, and the gradients of scores. The kernels differ in how they make products, and in which
// rows and columns a thread has.
#pragma once
#include "llmc/activation.h"
#include "llmc/attention_linear_form.h"
#include "llmc/cuda/attention/attention.h"
#include "llmc/cuda/attention/tables.h"

namespace gpu {

// An activation with gates (gates.h). Its kernels are instances of their own, so that the others stay as they
// are.
template <class A>
struct Gated : A {
    static constexpr bool kIsGated = true;
};
template <class A>
constexpr bool kGated = requires {
    A::kIsGated;
};

// Calls f with the activation of this kind, which is Gated if there are gates.
template <bool kGates, class F>
void with_activation(AttentionKind kind, F f) {
    with_activation(kind, [&]<class A>(A) { f(std::conditional_t<kGates, Gated<A>, A>()); });
}

// Whether a kernel for heads of up to kD channels supports segments.
template <class A, int kD>
constexpr bool kHasSegments = has_linear_form(A::kPower, kD);
// Whether segments have totals.
template <class A>
constexpr bool kHasTotals = has_linear_sum(A::kPower);

// The sizes and tables of a call, for its kernels.
struct AttentionShape {
    int T, H, D;
    bool has_row_sum;   // the scale is `sum`
    bool has_decay;     // a factor for each head, not gates
    float qk_to_score;  // 1 / sqrt(D)
    AttentionTables tables;
    AttentionSegments segments;

    __device__ int C() const { return H * D; }
    // Where the tables of head h of the block's sequence begin.
    template <class A>
    __device__ size_t table(int bh, int h) const {
        return (size_t)(kGated<A> ? bh : h) * tables.stride;
    }
    // The first tile of the segment that `tile` is in, where tiles have kTile tokens.
    template <int kTile, bool kSegments>
    __device__ int first_tile(int tile) const {
        return kSegments && segments.length ? tile - tile % (segments.length / kTile) : 0;
    }
    // The first tile after that segment.
    template <int kTile, bool kSegments>
    __device__ int end_tile(int tile, int tiles) const {
        if (!kSegments || !segments.length) return tiles;
        return min(first_tile<kTile, kSegments>(tile) + segments.length / kTile, tiles);
    }
};

// The same with gates.
struct GatedShape : AttentionShape {
    GateTables gate;
};
template <class A>
using ShapeOf = std::conditional_t<kGated<A>, GatedShape, AttentionShape>;

inline GatedShape attention_shape(const AttentionConfig& config, const Decay& decay, int T, int H, int D,
                                  const LayerTables& tables, const AttentionSegments& segments) {
    return {
        {T, H, D, config.has_row_sum(), decay.delta != nullptr, 1 / std::sqrt((float)D), tables, segments},
        tables.gate};
}

// Launches with dynamic shared memory, of which a block may only have more than 48 KB if the kernel asks for
// it.
template <class Kernel, class... Args>
void launch_attention(Kernel* kernel, dim3 grid, size_t shared, cudaStream_t stream, Args... args) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<grid, kAttentionThreads, shared, stream>>>(args...);
    check_launch();
}

// log2 F for softmax, F for every other activation, over the whole tiles between one of queries and an
// earlier one of keys.
template <class A>
__device__ float gate_between(const GatedShape& shape, int query_tile, int key_tile, int tiles) {
    const double* before = shape.gate.before + (size_t)blockIdx.x * (tiles + 1);
    const float log2_f = (float)(before[query_tile] - before[key_tile + 1]);
    return A::kOnline ? log2_f : fast_exp2(log2_f);
}
// The same for a pair in one tile, given the prefixes of its query and of its key. It is that of no fade if
// the pair is not visible.
template <class A>
__device__ float gate_inside(float2 query, float2 key) {
    const float log2_f = fminf((query.x - key.x) + (query.y - key.y), 0);
    return A::kOnline ? log2_f : fast_exp2(log2_f);
}
// The fade over two stretches of tokens.
template <class A>
__device__ float join_fades(float x, float y) {
    return A::kOnline ? x + y : x * y;
}

// The gates of pairs in a tile of queries and one of keys, for kernels that take each pair alone.
template <class A, bool = kGated<A>>
struct TileGates {
    __device__ TileGates(const AttentionShape&, int, int) {}
};
template <class A>
struct TileGates<A, true> {
    const GateTables& tables;
    size_t at;  // of the head's first token
    int last;   // the last token
    bool is_diagonal;
    float between;

    __device__ TileGates(const GatedShape& shape, int query_tile, int key_tile)
        : tables(shape.gate),
          at((size_t)blockIdx.x * shape.T),
          last(shape.T - 1),
          is_diagonal(query_tile == key_tile),
          between(is_diagonal ? 0 : gate_between<A>(shape, query_tile, key_tile, gridDim.y)) {}

    // log2 F_ij for softmax, F_ij for every other activation.
    __device__ float operator()(int i, int j) const {
        const size_t query = at + min(i, last), key = at + min(j, last);
        if (is_diagonal) return gate_inside<A>(tables.prefix[query], tables.prefix[key]);
        return join_fades<A>(tables.head[query], join_fades<A>(tables.tail[key], between));
    }
};

// The argument of an activation: q . k if it is a power, otherwise the score.
template <class A>
__device__ float activation_argument(float qk, float qk_to_score) {
    return A::kPower > 0 ? qk : qk * qk_to_score;
}

// ------------------------------------------------------------------------------------------------ forward

// What a thread knows of its two rows while it goes through the keys.
struct ForwardRows {
    float running_max[2] = {-INFINITY, -INFINITY};  // for softmax: of q . k, with the decay's term
    float running_sum[2] = {0, 0};                  // of the weights that this thread has

    // Returns the factor of the output of row i of head h, which is the thread's row r, and writes its stats.
    //   kBits: the bits in which the lanes that share the row differ; one of them has is_writer
    //   has_sums: whether earlier segments contribute to the row
    template <class A, int... kBits>
    __device__ float finish(float* stats, const AttentionShape& shape, int r, int h, int i, bool is_writer,
                            bool has_sums) const {
        const size_t row = (size_t)blockIdx.x * shape.T + i;
        float total = running_sum[r];
        if (A::kOnline || shape.has_row_sum) total = reduce_lanes<Sum, kBits...>(total);
        const bool exists = i < shape.T;
        if (has_sums && kHasTotals<A> && shape.has_row_sum && exists) total += shape.segments.totals[row];
        float factor, stat;
        if constexpr (A::kOnline) {
            factor = 1 / total;
            stat = running_max[r] * shape.qk_to_score + logf(total);
        } else {
            factor = exists ? shape.tables.row_factor[shape.table<A>(blockIdx.x, h) + i] : 0;
            stat = total * factor + (float)kRowSumEps;
            if (shape.has_row_sum) factor /= stat;
        }
        if ((A::kOnline || shape.has_row_sum) && is_writer && exists) stats[row] = stat;
        return factor;
    }
};

// ----------------------------------------------------------------------------------------------- backward

// The inputs of the backward pass that belong to a row i of head h.
struct RowTerms {
    float weight = 0;  // the row factor; for softmax minus log2(e) times the log-sum-exp, which is a summand
    float dot = 0;     // dO_i . O_i
};
template <class A>
__device__ RowTerms row_terms(const float* stats, const float* dot, const AttentionShape& shape, int bh,
                              int i, int h) {
    RowTerms terms;
    if (i >= shape.T) return terms;
    size_t at = (size_t)bh * shape.T + i;
    if constexpr (A::kOnline) {
        terms.weight = -stats[at] * kLog2e;
        terms.dot = dot[at];
    } else {
        terms.weight = shape.tables.row_factor[shape.table<A>(bh, h) + i];
        if (shape.has_row_sum) {
            terms.weight /= stats[at];
            terms.dot = dot[at];
        }
    }
    return terms;
}
// The same with dot times the row factor, for kernels that multiply every pair by the row factor.
template <class A>
__device__ RowTerms weighted_row_terms(const float* stats, const float* dot, const AttentionShape& shape,
                                       int bh, int i, int h) {
    RowTerms terms = row_terms<A>(stats, dot, shape, bh, i, h);
    if (!A::kOnline) terms.dot *= terms.weight;
    return terms;
}

// What a thread of the kernels for dq knows of its two rows. These kernels multiply by the row factor at the
// end, so terms[r].weight is 1 for every activation except softmax.
struct QueryRows {
    RowTerms terms[2];
    float row_factor[2] = {1, 1};  // for softmax it stays 1
    float neutral_distance[2] = {0, 0};

    // Reads what belongs to row i of head h, which is the thread's row r.
    template <class A>
    __device__ void load(int r, const float* stats, const float* dot, const AttentionShape& shape, int h,
                         int i, bool wants_decay) {
        terms[r] = row_terms<A>(stats, dot, shape, blockIdx.x, i, h);
        if (!A::kOnline) row_factor[r] = terms[r].weight, terms[r].weight = 1;
        if (wants_decay && i < shape.T)
            neutral_distance[r] = shape.tables.neutral_distance[(size_t)h * shape.tables.stride + i];
    }
};

// What score_gradients() leaves in the place of the scores: the weights, which dv needs; or, for the gradient
// of log gamma, what each pair contributes to it for each token of distance.
enum class Leave { weights, decay_terms };

// Replaces four dO V^T by the gradients of q . k, without gradient_factor(), and four q . k by what `kLeave`
// says.
//   w: the factor of each pair, which is the fade times the row factor
//      (with Leave::decay_terms it is the fade alone, and the results lack the row factor)
//   dot: dO_i . O_i, if there is a normaliser (with Leave::weights and the scale `sum`: times w)
//   rows: the number of each pair's row
//   pairs: with gates and Leave::weights it receives what Leave::decay_terms would leave, with the row factor
template <class A, Leave kLeave, bool kRowSum>
__device__ void score_gradients(float (&s)[4], float (&da)[4], const float (&w)[4], const float (&dot)[4],
                                const int (&rows)[4], const bool (&visible)[4], float qk_to_score,
                                float* pairs = nullptr) {
    constexpr bool kWeights = kLeave == Leave::weights;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float value, slope;
        if constexpr (A::kOnline) {
            value = visible[e] ? fast_exp2(fmaf(s[e], qk_to_score * kLog2e, w[e])) : 0;
            da[e] = value * (da[e] - dot[e]);
            s[e] = kWeights ? value : da[e];
            if constexpr (kGated<A> && kWeights) pairs[e] = da[e];
        } else {
            const float x = activation_argument<A>(s[e], qk_to_score), keys = rows[e] + 1.0f;
            A::weighted(value, slope, x, w[e], keys, DeviceMath());
            if constexpr (kRowSum) {  // the normaliser sums |x^p|, whose derivative has the sign of x^p
                const float signed_dot = value > 0 ? dot[e] : value < 0 ? -dot[e] : 0;
                da[e] = kWeights ? da[e] * w[e] - signed_dot : da[e] - signed_dot;
            }
            s[e] = !visible[e] ? 0 : kWeights ? value : value * da[e];
            if (kRowSum && kWeights) A::weighted(value, slope, x, 1.0f, keys, DeviceMath());
            if constexpr (kGated<A> && kWeights) pairs[e] = visible[e] ? value * da[e] : 0;
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
// The same for whether the scale is `sum`, which only powers have.
template <class A, class F>
__device__ void with_row_sum(bool has_row_sum, F f) {
    with_constant(A::kPower > 0 && has_row_sum, f);
}

// The factor that score_gradients() leaves out, because it is the same for all pairs.
template <class A>
__device__ float gradient_factor(const AttentionShape& shape) {
    if constexpr (A::kPower > 0) {
        return A::kSlopeFactor;
    } else {
        return shape.qk_to_score;
    }
}

// Adds up what the lanes that share a row have of it, and writes it to row i of a sequence. The lanes differ
// in kBits, and one of them has is_writer.
//   adds: whether the pairs outside of the segment are there already
template <int... kBits, class Number>
__device__ void store_gate_sum(float* to /*(B,H,T)*/, Number x, const AttentionShape& shape, int i,
                               bool is_writer, bool adds = false) {
    x = reduce_lanes<Sum, kBits...>(x);
    if (!is_writer || i >= shape.T) return;
    to += (size_t)blockIdx.x * shape.T + i;
    *to = (float)(adds ? *to + x : x);
}

// Writes the sum over a block of kAttentionThreads, its share in the gradient of log gamma.
__device__ inline void store_share(double* to, double x) {
    __shared__ double warp_sums[kAttentionThreads / kWarp];
    x = block_sum_in_order<kAttentionThreads>(x, warp_sums);
    if (threadIdx.x == 0) *to = x;
}

}  // namespace gpu
