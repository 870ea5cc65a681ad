// Decay gates in the attention kernels. With gates, A_ij fades by F_ij, the product of f_t over j < t <= i.
//
// F is never the quotient of two products over the whole sequence, because these underflow. Between two tiles
// it has three factors, none of them above 1: `head`, from the beginning of the query's tile to the query;
// the product of the whole tiles between; and `tail`, from the key to the end of its tile. So a pair of
// tiles needs no exponential for each pair of tokens. Inside a tile F is 2 to the power of a difference of
// prefix sums. They are pairs of floats, so that a gate near 0 costs no digits of the gates after it.
//
// The gradient of log f_t is the sum of A_ij dA_ij over the pairs with j < t <= i, which is the sum of
// R_i - C_i over i >= t, where R_i is the sum over row i and C_i that over column i. Pairs with i = j are in
// neither, because they would cancel. With the scale `row`, n_i = 1 + f_i^2 n_{i-1} adds
// (1 - n_t) U_t, where U_t = r_t / n_t + f_{t+1}^2 U_{t+1} and r_i is the sum over row i with its own pair.
//
// In the linear form (linear.h), R_i and C_i of a pair on two sides of a boundary come from different states,
// which are rounded. Their difference would be nothing but rounding after many segments. So the sum over
// i >= t ends at the end of the segment, and starts there with the product of the two states of that
// boundary.
#pragma once
#include <utility>

#include "llmc/cuda/reduce.h"

namespace gpu {

struct GateTables {
    // (B,H,tiles+1): log2 of the product of all tiles before this one. In double even a sum over the whole
    // sequence keeps the digits of a difference.
    double* before = nullptr;
    float2* prefix = nullptr;      // (B,H,T): log2 of the product from the tile's beginning to t, as a sum
    float* head = nullptr;         // (B,H,T): that product; for softmax its log2
    float* tail = nullptr;         // (B,H,T): the product after t in the tile; for softmax its log2
    float* row_length = nullptr;   // (B,H,T): n_i of the scale `row`
    float* row_sums = nullptr;     // (B,H,T): R_i, written by the backward pass
    float* own_terms = nullptr;    // (B,H,T): A_ii dA_ii, the same
    float* column_sums = nullptr;  // (B,H,T): C_i, the same

    static size_t size(int B, int T, int H, int tile) {
        return ((size_t)2 * (ceil_div(T, tile) + 1) + (size_t)8 * T) * B * H;
    }
    // Returns the end of the tables.
    float* place(float* scratch /*(size), at an 8-byte address*/, int B, int T, int H, int tile) {
        const size_t heads = (size_t)B * H, n = heads * T, starts = heads * (ceil_div(T, tile) + 1);
        before = reinterpret_cast<double*>(std::exchange(scratch, scratch + 2 * starts));
        prefix = reinterpret_cast<float2*>(std::exchange(scratch, scratch + 2 * n));
        for (float** table : {&head, &tail, &row_length, &row_sums, &own_terms, &column_sums})
            *table = std::exchange(scratch, scratch + n);
        return scratch;
    }
};

constexpr int kGateThreads = 128;

// Blocks: (tiles, B H), with a thread for each token of a tile. Leaves log2 of the product of each tile in
// `before` at the next one.
//   logs: whether head and tail are logarithms
template <int kTile>
__global__ void gate_tile_tables(GateTables gate, const float* log_f /*(B,H,T)*/, bool logs, int T) {
    __shared__ double log2_f[kTile];
    const int n = threadIdx.x, t = blockIdx.x * kTile + n;
    const size_t at = (size_t)blockIdx.y * T + t;
    log2_f[n] = t < T ? (double)log_f[at] * 1.4426950408889634 : 0;
    __syncthreads();
    double head = 0, tail = 0;
    for (int k = 0; k <= n; k++) head += log2_f[k];
    for (int k = n + 1; k < kTile; k++) tail += log2_f[k];
    if (n == kTile - 1) gate.before[(size_t)blockIdx.y * (gridDim.x + 1) + blockIdx.x + 1] = head;
    if (t >= T) return;
    gate.prefix[at] = {(float)head, (float)(head - (float)head)};
    gate.head[at] = (float)(logs ? head : exp2(head));
    gate.tail[at] = (float)(logs ? tail : exp2(tail));
}

// A recurrence x = a x + b over a stretch of tokens that a thread has taken. The threads of a block take the
// stretches of a sequence, in the direction of the recurrence.
struct GateRecurrence {
    double a = 1, b = 0;
    __device__ void add(double factor, double term) {
        a *= factor;
        b = b * factor + term;
    }
    // Returns what x is before the thread's stretch. All threads of the block call it.
    __device__ double start() const {
        __shared__ double factors[kGateThreads], terms[kGateThreads];
        __syncthreads();
        factors[threadIdx.x] = a, terms[threadIdx.x] = b;
        __syncthreads();
        double x = 0;
        for (int thread = 0; thread < (int)threadIdx.x; thread++) x = x * factors[thread] + terms[thread];
        return x;
    }
};

// f_t^2, by which n_{t-1} is multiplied. The first token's is never used.
__device__ inline double squared_gate(const float* log_f, int t) {
    return t > 0 ? exp(2 * (double)log_f[t]) : 0;
}

// Adds up `before`. With row_factor (B,H,T) it also makes the numbers of the scale `row`: row_length, and
// factor / sqrt(n_i). Blocks: B H.
template <int kThreads = kGateThreads>
__global__ void gate_row_tables(GateTables gate, const float* log_f /*(B,H,T)*/, float* row_factor,
                                double factor, int T, int tiles) {
    const size_t at = (size_t)blockIdx.x * T;
    if (threadIdx.x == 0) {
        double* before = gate.before + (size_t)blockIdx.x * (tiles + 1);
        double sum = before[0] = 0;
        for (int tile = 1; tile <= tiles; tile++) before[tile] = sum += before[tile];
    }
    if (!row_factor) return;
    log_f += at;
    const int stretch = ceil_div(T, kThreads), begin = threadIdx.x * stretch, end = min(T, begin + stretch);
    GateRecurrence recurrence;
    for (int t = begin; t < end; t++) recurrence.add(squared_gate(log_f, t), 1);
    double n = recurrence.start();
    for (int t = begin; t < end; t++) {
        n = n * squared_gate(log_f, t) + 1;
        gate.row_length[at + t] = (float)n;
        row_factor[at + t] = (float)(factor / sqrt(n));
    }
}

// Makes the products of f between the tokens and the boundaries of segments, for the linear form: over j < t
// before the end of its segment for a key j, over t <= i from the beginning of its segment on for a query i,
// and over each segment that has boundaries at both ends. Blocks: (tokens, B H).
//   tile: tokens in a tile of the tables, which divides a segment
template <int kThreads = kGateThreads>
__global__ void gate_segment_tables(float* key_fades /*(B,H,T)*/, float* query_fades /*(B,H,T)*/,
                                    float* segment_fades /*(B,H,segments)*/, GateTables gate, int segment,
                                    int tile, int T) {
    const int t = blockIdx.x * kThreads + threadIdx.x;
    if (t >= T) return;
    const size_t at = (size_t)blockIdx.y * T + t;
    const double* before = gate.before + (size_t)blockIdx.y * (ceil_div(T, tile) + 1);
    const int begin = t / segment * (segment / tile), end = min(begin + segment / tile, ceil_div(T, tile));
    key_fades[at] = gate.tail[at] * exp2f((float)(before[end] - before[t / tile + 1]));
    query_fades[at] = gate.head[at] * exp2f((float)(before[t / tile] - before[begin]));
    if (t % segment == 0)
        segment_fades[(size_t)blockIdx.y * ceil_div(T, segment) + t / segment] =
            (float)exp2(before[end] - before[begin]);
}

// Makes the gradient of log f from the sums of rows and columns. Blocks: B H.
//   segment: the length of segments, or 0; crossing as in AttentionSegments
template <int kThreads = kGateThreads>
__global__ void gate_gradient(float* dlog_f /*(B,H,T)*/, GateTables gate, const float* log_f, bool scale_row,
                              int T, int segment, const double* crossing) {
    const size_t at = (size_t)blockIdx.x * T;
    const int stretch = ceil_div(T, kThreads), end = T - threadIdx.x * stretch;
    const int begin = max(0, end - stretch);
    auto difference = [&](int t) { return (double)gate.row_sums[at + t] - gate.column_sums[at + t]; };
    auto row_term = [&](int t) {
        return ((double)gate.row_sums[at + t] + gate.own_terms[at + t]) / gate.row_length[at + t];
    };
    auto next_square = [&](int t) { return t + 1 < T ? squared_gate(log_f + at, t + 1) : 0; };
    auto ends_segment = [&](int t) { return segment && t + 1 < T && (t + 1) % segment == 0; };
    auto start_of = [&](int t) { return crossing[blockIdx.x * (ceil_div(T, segment) - 1) + t / segment]; };
    GateRecurrence pairs, rows;
    for (int t = end - 1; t >= begin; t--) {
        if (ends_segment(t)) {
            pairs.add(0, start_of(t) + difference(t));
        } else {
            pairs.add(1, difference(t));
        }
        if (scale_row) rows.add(next_square(t), row_term(t));
    }
    double sum = pairs.start(), u = scale_row ? rows.start() : 0;
    for (int t = end - 1; t >= begin; t--) {
        if (ends_segment(t)) sum = start_of(t);
        sum += difference(t);
        double gradient = sum;
        if (scale_row) {
            u = u * next_square(t) + row_term(t);
            const double more = t > 0 ? squared_gate(log_f + at, t) * gate.row_length[at + t - 1] : 0;
            gradient -= more * u;  // n_t - 1, without its loss of digits
        }
        dlog_f[at + t] = t > 0 ? (float)gradient : 0;
    }
}

}  // namespace gpu
