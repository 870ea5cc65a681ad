// Token embedding plus learned positions. The residual stream is float. Real and Gradient are float or bf16.
#pragma once
#include <algorithm>

#include "llmc/cuda/columns.h"

namespace gpu {

// A block is one warp and takes 128 columns, so that short inputs fill the card too.
constexpr int kEmbeddingColumns = 4 * kWarp;
constexpr int kEmbeddingBatch = 8;  // sequences that share one read of the positions

template <class Real, bool kPacked>
__global__ void __launch_bounds__(kWarp)
    embedding_forward_kernel(float* __restrict__ out, const int* __restrict__ tokens,
                             const Real* __restrict__ wte, const Real* __restrict__ wpe, int B, int T,
                             int C) {
    Columns<4, kPacked> columns{(int)threadIdx.x, kWarp, C};
    int t = blockIdx.x, tile = blockIdx.y, b0 = blockIdx.z * kEmbeddingBatch;
    Vec<4> position{};
    if (wpe) position = columns.load(wpe + (size_t)t * C, tile);
#pragma unroll
    for (int i = 0; i < kEmbeddingBatch; i++) {
        if (b0 + i >= B) break;
        size_t bt = (size_t)(b0 + i) * T + t;
        Vec<4> x = columns.load(wte + (size_t)tokens[bt] * C, tile);
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] += position[k];
        columns.store(out + bt * C, tile, x);
    }
}

template <class Real>
void embedding_forward(float* out,         // (B,T,C)
                       const int* tokens,  // (B,T)
                       const Real* wte,    // (V,C)
                       const Real* wpe,    // (at least T,C), or null: no position table
                       int B, int T, int C, cudaStream_t stream) {
    dim3 grid(T, ceil_div(C, kEmbeddingColumns), ceil_div(B, kEmbeddingBatch));
    auto kernel = C % 4 == 0 ? embedding_forward_kernel<Real, true> : embedding_forward_kernel<Real, false>;
    kernel<<<grid, kWarp, 0, stream>>>(out, tokens, wte, wpe, B, T, C);
    check_launch();
}

// ------------------------------------------------------------------------------------------------- backward

// The rows of dwte get their sums without float atomics, in an order that is always the same. The positions
// are sorted by token, the sorted list is cut into chunks of 32, and a warp sums the runs of equal tokens in
// its chunk. A run that lies in one chunk is added to dwte at once. A run that crosses chunks leaves a
// partial sum in each: as the head of a chunk if it began earlier, as its tail if it goes on. A second kernel
// adds these up. So even the most frequent token is summed by many warps.
constexpr int kChunk = kWarp;

constexpr int kSortThreads = 1024, kSortWarps = kSortThreads / kWarp, kDigits = 256;
constexpr int kSortBatch = 8;  // loads in flight

// Sorts the tokens (x) with their positions (y) by token and then by position into sorted (N). It is a stable
// radix sort by one block, with `passes` digits of 8 bits. Each warp has a stretch of the list.
static __global__ void __launch_bounds__(kSortThreads)
    sort_tokens_kernel(int2* sorted, int2* spare, const int* tokens, int N, int passes) {
    __shared__ int places[kSortWarps][kDigits], begins[kDigits], totals[kDigits / kWarp];
    int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
    int stretch = ceil_div(N, kSortThreads) * kWarp;
    int begin = min(warp * stretch, N), end = min(begin + stretch, N);
    for (int pass = 0; pass < passes; pass++) {
        int2* to = (passes - pass) % 2 ? sorted : spare;
        const int2* from = (passes - pass) % 2 ? spare : sorted;
        // Calls f(element, digit) for all elements of the stretch in order, a whole warp at a time. The digit
        // past the end is kDigits.
        auto for_stretch = [&](auto f) {
            for (int i0 = begin; i0 < end; i0 += kWarp * kSortBatch) {
                int2 elements[kSortBatch];
#pragma unroll
                for (int u = 0; u < kSortBatch; u++) {
                    int i = i0 + u * kWarp + lane;
                    if (i < end) elements[u] = pass == 0 ? make_int2(tokens[i], i) : from[i];
                }
#pragma unroll
                for (int u = 0; u < kSortBatch; u++) {
                    int i = i0 + u * kWarp + lane;
                    if (i0 + u * kWarp < end)
                        f(elements[u], i < end ? elements[u].x >> (8 * pass) & (kDigits - 1) : kDigits);
                }
            }
        };
        for (int i = thread; i < kSortWarps * kDigits; i += kSortThreads)
            places[i / kDigits][i % kDigits] = 0;
        __syncthreads();
        for_stretch([&](int2, int digit) {
            if (digit < kDigits) atomicAdd(&places[warp][digit], 1);
        });
        __syncthreads();
        // Finds the places of each warp's elements of each digit: after smaller digits and earlier warps.
        int total = 0, sum = 0;
        if (thread < kDigits) {
            for (int w = 0; w < kSortWarps; w++) {
                int count = places[w][thread];
                places[w][thread] = total;
                total += count;
            }
            sum = total;
            for (int offset = 1; offset < kWarp; offset *= 2) {
                int other = __shfl_up_sync(0xFFFFFFFFu, sum, offset);
                if (lane >= offset) sum += other;
            }
            if (lane == kWarp - 1) totals[warp] = sum;
        }
        __syncthreads();
        if (thread < kDigits) {
            for (int w = 0; w < warp; w++) sum += totals[w];
            begins[thread] = sum - total;
        }
        __syncthreads();
        for_stretch([&](int2 element, int digit) {
            uint32_t peers = __match_any_sync(0xFFFFFFFFu, digit);
            uint32_t before = peers & ((1u << lane) - 1);
            int place = digit < kDigits ? begins[digit] + places[warp][digit] + __popc(before) : 0;
            __syncwarp();
            if (digit < kDigits && !before) places[warp][digit] += __popc(peers);
            __syncwarp();
            if (digit < kDigits) to[place] = element;
        });
        __syncthreads();
    }
}

template <bool kPacked, class Gradient>
__global__ void __launch_bounds__(kWarp)
    sum_token_runs_kernel(Gradient* dwte, float* partial, const float* __restrict__ dout,
                          const int2* __restrict__ sorted, int N, int C) {
    int lane = threadIdx.x, chunk = blockIdx.x, tile = blockIdx.y, padded = padded_columns(C);
    Columns<4, kPacked> columns{lane, kWarp, C};
    int begin = chunk * kChunk, n = min(kChunk, N - begin);
    int2 entry = lane < n ? sorted[begin + lane] : make_int2(-1, -1);
    int before = begin > 0 ? sorted[begin - 1].x : -1, after = begin + n < N ? sorted[begin + n].x : -1;
    int next = __shfl_down_sync(0xFFFFFFFFu, entry.x, 1);
    uint32_t ends = __ballot_sync(0xFFFFFFFFu, lane < n && (lane == n - 1 || entry.x != next));
    // The entries at which the head and the tail end, or -1.
    int head = before == __shfl_sync(0xFFFFFFFFu, entry.x, 0) ? __ffs((int)ends) - 1 : -1;
    int tail = after == __shfl_sync(0xFFFFFFFFu, entry.x, n - 1) && head != n - 1 ? n - 1 : -1;
    float* partial_head = partial + (size_t)chunk * 2 * padded;

    constexpr int kBatch = 8;  // loads in flight
    Vec<4> sum{};
    for (int e0 = 0; e0 < n; e0 += kBatch) {
        Vec<4> d[kBatch] = {}, old[kBatch] = {};
        Gradient* rows[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; u++) {
            int e = e0 + u;
            int token = __shfl_sync(0xFFFFFFFFu, entry.x, e % kWarp);
            int position = __shfl_sync(0xFFFFFFFFu, entry.y, e % kWarp);
            if (e >= n) continue;
            d[u] = columns.load(dout + (size_t)position * C, tile);
            rows[u] = dwte + (size_t)token * C;
            if (ends >> e & 1 && e != head && e != tail) old[u] = columns.load(rows[u], tile);
        }
#pragma unroll
        for (int u = 0; u < kBatch; u++) {
            int e = e0 + u;
            if (e >= n) break;
#pragma unroll
            for (int k = 0; k < 4; k++) sum[k] += d[u][k];
            if (!(ends >> e & 1)) continue;
            if (e == tail) break;  // the last
            if (e == head) {
                columns.store(partial_head, tile, sum);
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++) old[u][k] += sum[k];
                columns.store(rows[u], tile, old[u]);
            }
            sum = {};
        }
    }
    if (tail >= 0) columns.store(partial_head + padded, tile, sum);
}

// Completes the runs of one token that cross chunks: adds up the tail of the chunk in which a run begins and
// the heads of those that follow.
template <bool kPacked, class Gradient>
__global__ void __launch_bounds__(kWarp)
    add_token_runs_kernel(Gradient* dwte, const float* __restrict__ partial, const int2* __restrict__ sorted,
                          int N, int C) {
    int chunk = blockIdx.x, tile = blockIdx.y, padded = padded_columns(C), chunks = ceil_div(N, kChunk);
    int begin = chunk * kChunk, end = begin + kChunk;
    if (end >= N) return;
    int token = sorted[end - 1].x;
    if (sorted[end].x != token || (begin > 0 && sorted[begin - 1].x == token)) return;
    int last = chunk;  // where the run ends
    for (int inside = kWarp; inside == kWarp; last += inside) {
        int next = last + 1 + (int)threadIdx.x;
        bool has = next < chunks && sorted[(size_t)next * kChunk].x == token;
        inside = __popc(__ballot_sync(0xFFFFFFFFu, has));
    }
    Columns<4, kPacked> columns{(int)threadIdx.x, kWarp, C};
    Vec<4> sum = columns.load(partial + ((size_t)chunk * 2 + 1) * padded, tile);
#pragma unroll 8
    for (int i = chunk + 1; i <= last; i++) {
        Vec<4> x = columns.load(partial + (size_t)i * 2 * padded, tile);
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += x[k];
    }
    Gradient* row = dwte + (size_t)token * C;
    Vec<4> x = columns.load(row, tile);
#pragma unroll
    for (int k = 0; k < 4; k++) x[k] += sum[k];
    columns.store(row, tile, x);
}

template <bool kPacked, class Gradient>
__global__ void __launch_bounds__(kWarp)
    sum_positions_kernel(Gradient* dwpe, const float* __restrict__ dout, int B, int T, int C) {
    Columns<4, kPacked> columns{(int)threadIdx.x, kWarp, C};
    int t = blockIdx.x, tile = blockIdx.y;
    Gradient* row = dwpe + (size_t)t * C;
    Vec<4> old = columns.load(row, tile), sum{};
#pragma unroll 8
    for (int b = 0; b < B; b++) {
        Vec<4> d = columns.load(dout + ((size_t)b * T + t) * C, tile);
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += d[k];
    }
#pragma unroll
    for (int k = 0; k < 4; k++) old[k] += sum[k];
    columns.store(row, tile, old);
}

// The number of floats of scratch that embedding_backward() needs.
inline size_t embedding_backward_scratch(int B, int T, int C) {
    size_t N = ceil_div((size_t)B * T, (size_t)kChunk) * kChunk;
    return 4 * N + N / kChunk * 2 * padded_columns(C);
}

template <class Gradient>
void embedding_backward(Gradient* dwte,     // (V,C) +=
                        Gradient* dwpe,     // (at least T,C) +=, or null
                        float* scratch,     // (embedding_backward_scratch(B, T, C))
                        const float* dout,  // (B,T,C)
                        const int* tokens,  // (B,T), below V
                        int B, int T, int C, int V, cudaStream_t stream) {
    int N = B * T, chunks = ceil_div(N, kChunk), tiles = ceil_div(C, kEmbeddingColumns), passes = 1;
    while (passes < 4 && (V - 1) >> (8 * passes)) passes++;
    int2* sorted = reinterpret_cast<int2*>(scratch);
    int2* spare = sorted + (size_t)chunks * kChunk;
    float* partial = scratch + 4 * (size_t)chunks * kChunk;
    bool packed = C % 4 == 0;

    sort_tokens_kernel<<<1, kSortThreads, 0, stream>>>(sorted, spare, tokens, N, passes);
    check_launch();
    auto sum_runs = packed ? sum_token_runs_kernel<true, Gradient> : sum_token_runs_kernel<false, Gradient>;
    sum_runs<<<dim3(chunks, tiles), kWarp, 0, stream>>>(dwte, partial, dout, sorted, N, C);
    check_launch();
    auto add_runs = packed ? add_token_runs_kernel<true, Gradient> : add_token_runs_kernel<false, Gradient>;
    add_runs<<<dim3(chunks, tiles), kWarp, 0, stream>>>(dwte, partial, sorted, N, C);
    check_launch();
    if (!dwpe) return;
    auto sum_positions =
        packed ? sum_positions_kernel<true, Gradient> : sum_positions_kernel<false, Gradient>;
    sum_positions<<<dim3(T, tiles), kWarp, 0, stream>>>(dwpe, dout, B, T, C);
    check_launch();
}

}  // namespace gpu
