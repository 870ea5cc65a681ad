// What the kernels of the linear form share for float and bf16: the sizes of a call, the factors of its rows,
// the sums for `sum`, and the scan. linear.h says how they go.
#pragma once
#include "llmc/cuda/attention/features.h"
#include "llmc/cuda/attention/rows.h"

namespace gpu {

// The sizes of a call, for its kernels. attention.has_decay also stands for gates, and attention.tables.fade
// has what a kernel needs of LinearFades.
struct LinearShape {
    AttentionShape attention;
    int segment;     // tokens in a segment
    int slots;       // boundaries between segments, each of which has a state
    int tiles;       // of features
    int blocks;      // of channels
    int block;       // channels in a block
    int width;       // numbers in a row of a state: D, rounded up to 8
    int fade_heads;  // how many heads have fades of their own: H with a decay, B H with gates

    int features() const { return tiles * kFeatures; }
    int size() const { return features() * width; }  // numbers in a state
    // The width as kernels read it: it tells the compiler that all rows begin at 16-byte addresses.
    __device__ int state_width() const {
        __builtin_assume(width % 8 == 0);
        return width;
    }
    __device__ int channels() const { return blocks * block; }
    // The number of a state's first row among the rows of all states, which is also its first number in z.
    __device__ size_t row(int bh, int slot) const { return ((size_t)bh * slots + slot) * tiles * kFeatures; }
    // The token that follows the boundary.
    __device__ int boundary(int slot) const { return (slot + 1) * segment; }
};

// Whose features a kernel makes: those of the keys; of the queries; or, for gradients, of the queries with
// their row factors.
enum class Rows { keys, queries, gradients };

// Pointers to the first token of a head: rows x, from which features are made, and the rows y that belong to
// them, which are v of a key and dO of a query.
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

// The factors of row i: `weight` of its term in the state of its boundary, and `dot` of its term in z. Both
// are the fade between row and boundary. For gradients both include the row factor, and dot also dO_i . O_i.
template <int P, Rows kRows>
__device__ RowTerms linear_terms(const float* stats, const float* dot, const LinearShape& shape, int bh,
                                 int i) {
    const AttentionShape& attention = shape.attention;
    RowTerms terms;
    if (i >= attention.T) return terms;
    if (kRows == Rows::gradients) {
        if (!kHasTotals<Poly<P>>) __builtin_assume(!attention.has_row_sum);
        terms = weighted_row_terms<Poly<P>>(stats, dot, attention, bh, i, bh % shape.fade_heads);
    } else {
        terms.weight = terms.dot = 1;
    }
    if (attention.has_decay) {
        const float fade = attention.tables.fade[(size_t)(bh % shape.fade_heads) * attention.T + i];
        terms.weight *= fade, terms.dot *= fade;
    }
    return terms;
}

// What a block of a rows kernel works on: the rows from i0 on, which take from the state of a boundary. All
// of them belong to the same boundary, because a segment is a multiple of a block's rows.
template <class Real, Rows kRows>
struct RowWork {
    int bh = blockIdx.y, i0, width;
    const Real* state;  // (features,width)
    const float* z;     // (features), or null
    size_t out_stride;  // between the rows of the result

    __device__ RowWork(const Real* states, const float* all_z, const LinearShape& shape, int rows_a_block)
        : i0(blockIdx.x * rows_a_block + (kRows == Rows::keys ? 0 : shape.segment)),
          width(shape.state_width()),
          out_stride((kRows == Rows::queries ? 1 : 3) * (size_t)shape.attention.C()) {
        const int slot = i0 / shape.segment - (kRows == Rows::keys ? 0 : 1);
        state = states + shape.row(bh, slot) * width;
        z = all_z ? all_z + shape.row(bh, slot) : nullptr;
    }
    // Where the result of row i0 begins in sums (B,T,C), or (B,T,3C) for gradients.
    __device__ float* out(float* sums, const LinearShape& shape) const {
        const int H = shape.attention.H;
        return sums + ((size_t)(bh / H) * shape.attention.T + i0) * out_stride + bh % H * shape.attention.D;
    }
    // Stores the sum of row i over the pairs across the boundary, for the gradient of the decay. slope: the
    // thread's share, whose other shares the lanes have that differ from it in kBits.
    template <int... kBits>
    __device__ void store_slope(float* slopes, float slope, const LinearShape& shape, int i) const {
        if (!slopes) return;
        slope = reduce_lanes<Sum, kBits...>(slope);
        if (i < shape.attention.T) slopes[(size_t)bh * shape.attention.T + i] = slope;
    }
};

// The thread's share of a feature of z: the sum of the products of channels over every other token. Two
// threads share a feature.
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

// Makes the states of the boundaries from the parts of the segments: running sums with the decay, from the
// left or from the right. With `others` it also writes shares of the gradient of log gamma, times `sign`:
// those of pairs of rows that lie one or more whole segments apart, because their distance includes these
// segments. A thread has four numbers of a state. Blocks: (numbers, B H).
//   width: how many numbers a feature has: those of a state's row, or 1 in z
template <int P, class Real>
__global__ void linear_scan_kernel(Real* states,        // (B,H,slots,size), may be `parts`
                                   const float* parts,  // (B,H,slots,size)
                                   const Real* others,  // (B,H,slots,size): the keys' states, or null
                                   double* dlog_gamma,  // (B,H,blocks): shares, written if others is given
                                   int width, float sign, bool from_right, LinearShape shape) {
    const int bh = blockIdx.y, at = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    const int size = shape.tiles * kFeatures * width;
    float fade = 1;
    float sum[4] = {};
    double total = 0;
    for (int n = 0; n < shape.slots && at < size; n++) {
        const int slot = from_right ? shape.slots - 1 - n : n;
        const size_t place = ((size_t)bh * shape.slots + slot) * size + at;
        float part[4], other[4] = {};
        load_few(part, parts + place);
        if (others) load_few(other, others + place);
        if (shape.attention.has_decay)  // of the segment between this boundary and the one before
            fade = shape.attention.tables
                       .fade[(size_t)(bh % shape.fade_heads) * (shape.slots + 1) + slot + from_right];
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
    const int tile =
        at / (kFeatures * width);  // both states include the multiplicity, so it counts once too often
    if (tile < shape.tiles)
        total *= sign * shape.segment / FeatureTile<P>::at(tile, shape.blocks).multiplicity();
    store_share(dlog_gamma + (size_t)bh * gridDim.x + blockIdx.x, total);
}

// The fades of a call: over the tokens between a key and the end of its segment, between the beginning of its
// segment and a query, and over each segment.
struct LinearFades {
    float *keys = nullptr, *queries = nullptr;  // (fade_heads,T)
    float* segments = nullptr;                  // (fade_heads,slots+1)
};

// Makes them of a decay, whose gamma^n is in tables.fade. Blocks: (tokens, H).
template <int kThreads = 128>
__global__ void linear_decay_fades(LinearFades fades, AttentionTables tables, int segment, int T) {
    const int t = blockIdx.x * kThreads + threadIdx.x, h = blockIdx.y;
    if (t >= T) return;
    const float* fade = tables.fade + (size_t)h * tables.stride;
    const size_t at = (size_t)h * T + t;
    fades.keys[at] = fade[min(segment - t % segment, T - 1)];
    fades.queries[at] = fade[t % segment];
    if (t % segment == 0)
        fades.segments[(size_t)h * ceil_div(T, segment) + t / segment] = fade[min(segment, T - 1)];
}

// Makes shares of the gradient of log gamma from the sums of the rows: a pair's distance is that of its query
// to the boundary and that of its key. Blocks: (tokens, B H).
template <int kThreads = 128>
__global__ void linear_decay_shares(double* dlog_gamma /*(B,H,blocks)*/,
                                    const float* query_slopes /*(B,H,T)*/,
                                    const float* key_slopes /*(B,H,T)*/, AttentionTables tables, int segment,
                                    int T, int H) {
    const int t = blockIdx.x * kThreads + threadIdx.x, bh = blockIdx.y;
    const size_t at = (size_t)bh * T + t;
    double share = 0;
    if (t < T && t >= segment)
        share += (double)query_slopes[at] *
                 (t % segment - tables.neutral_distance[(size_t)(bh % H) * tables.stride + t]);
    if (t < (T - 1) / segment * segment) share += (double)key_slopes[at] * (segment - t % segment);
    store_share(dlog_gamma + (size_t)bh * gridDim.x + blockIdx.x, share);
}

// Adds up the products of both states of each boundary: what pairs on its two sides add to the gradient of
// log f at the token that follows it. Blocks: (slots, B H).
template <int P, class Real, int kThreads = 256>
__global__ void linear_crossing_kernel(double* crossing /*(B,H,slots)*/, const Real* keys,
                                       const Real* queries, const float* keys_z, const float* queries_z,
                                       LinearShape shape) {
    __shared__ double warp_sums[kThreads / kWarp];
    const size_t row0 = shape.row(blockIdx.y, blockIdx.x);
    double total = 0;
    auto tile = FeatureTile<P>::at(0, shape.blocks);
    for (int n = 0; n < shape.tiles; n++, tile.next(shape.blocks)) {
        const size_t first = row0 + n * kFeatures, at = first * shape.width;
        float sum = 0;
        for (int i = threadIdx.x; i < kFeatures * shape.width; i += kThreads)
            sum += to_float(keys[at + i]) * to_float(queries[at + i]);
        if (keys_z && threadIdx.x < kFeatures)
            sum -= keys_z[first + threadIdx.x] * queries_z[first + threadIdx.x];
        total += sum / tile.multiplicity();  // both states include it, so it counts once too often
    }
    total = block_sum_in_order<kThreads>(total, warp_sums);
    if (threadIdx.x == 0) crossing[(size_t)blockIdx.y * shape.slots + blockIdx.x] = total;
}

}  // namespace gpu
