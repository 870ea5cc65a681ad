// Sums of the rows of a matrix, which are the gradients of biases, gains and convolution weights. There are
// no atomics: blocks of rows are summed first, then their sums, so that the order of additions depends on the
// sizes alone.
#pragma once
#include <algorithm>

#include "llmc/cuda/columns.h"
#include "llmc/cuda/reduce.h"

namespace gpu {

constexpr int kColumnLanes = 8;     // threads along a row
constexpr int kColumnRows = 32;     // rows that a block reads at a time
constexpr int kColumnBlocks = 512;  // enough to fill a GPU
constexpr size_t kColumnSumsScratch = (size_t)kColumnBlocks * kColumnLanes * Pack<bf16>::size;

// Block (x, y) takes a few columns of `rows` rows from row y * rows on, and writes their sums to row y of
// out, or adds them to it.
template <class Real, int kWidth, bool kAdds>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows) column_sums_kernel(float* out,  // (gridDim.y,C)
                                                                                const Real* inp,  // (N,C)
                                                                                int rows, int N, int C) {
    constexpr int kWarps = kColumnLanes * kColumnRows / kWarp, kColumns = kColumnLanes * kWidth;
    // Element i of a lane is at i * kStride + lane. What a warp writes or reads at once lies in different
    // banks.
    constexpr int kStride = kWidth == 8 ? kColumnLanes + 4 : kColumnLanes;
    __shared__ float shared[kWarps][kWidth * kStride];
    int lane = threadIdx.x % kColumnLanes, c = blockIdx.x * kColumns + lane * kWidth;
    int begin = blockIdx.y * rows, end = min(N, begin + rows);
    Vec<kWidth> sum{};
    if (c < C) {
#pragma unroll 4
        for (int n = begin + threadIdx.x / kColumnLanes; n < end; n += kColumnRows) {
            Vec<kWidth> x = load_vec<kWidth>(inp + (size_t)n * C + c);
#pragma unroll
            for (int i = 0; i < kWidth; i++) sum[i] += x[i];
        }
    }
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
        sum[i] = reduce_lanes<Sum, kColumnLanes, 2 * kColumnLanes>(sum[i]);
        if (threadIdx.x % kWarp < kColumnLanes) shared[threadIdx.x / kWarp][i * kStride + lane] = sum[i];
    }
    __syncthreads();
    c = blockIdx.x * kColumns + threadIdx.x;
    if (threadIdx.x >= kColumns || c >= C) return;
    int at = threadIdx.x % kWidth * kStride + threadIdx.x / kWidth;
    float total = 0;
    for (int w = 0; w < kWarps; w++) total += shared[w][at];
    float& to = out[(size_t)blockIdx.y * C + c];
    to = kAdds ? to + total : total;
}

// Adds the sum of the rows of inp to out.
template <class Real>
void add_column_sums(float* out,       // (C) +=
                     float* scratch,   // (kColumnSumsScratch)
                     const Real* inp,  // (N,C)
                     int N, int C, cudaStream_t stream) {
    auto run = [&](auto width) {
        constexpr int kWidth = width();
        constexpr int kThreads = kColumnLanes * kColumnRows;
        int blocks = ceil_div(C, kColumnLanes * kWidth);
        int parts = std::clamp(kColumnBlocks / blocks, 1, ceil_div(N, 4 * kColumnRows));
        if (parts == 1) {
            column_sums_kernel<Real, kWidth, true><<<blocks, kThreads, 0, stream>>>(out, inp, N, N, C);
            return check_launch();
        }
        int rows = ceil_div(N, parts);
        column_sums_kernel<Real, kWidth, false>
            <<<dim3(blocks, parts), kThreads, 0, stream>>>(scratch, inp, rows, N, C);
        check_launch();
        column_sums_kernel<float, 1, true>
            <<<ceil_div(C, kColumnLanes), kThreads, 0, stream>>>(out, scratch, parts, parts, C);
        check_launch();
    };
    if (in_packs<Real>(C, inp)) {
        run(std::integral_constant<int, Pack<Real>::size>());
    } else {
        run(std::integral_constant<int, 1>());
    }
}

// Adds the sum over the parts of partial (parts, gridDim.y, padded C) to outs[blockIdx.y] (C). A block takes
// 32 columns. Each of 32 slots sums every 32nd part, then the slots are added in order.
struct ColumnSums {
    float* outs[2];
};
constexpr int kSumColumns = 32, kSumSlots = 32, kSumThreads = kSumColumns / 4 * kSumSlots;

static __global__ void __launch_bounds__(kSumThreads)
    add_partial_sums_kernel(ColumnSums to, const float* __restrict__ partial, int parts, int C) {
    __shared__ alignas(16) float slots[kSumSlots][kSumColumns];
    int padded = padded_columns(C), slot = threadIdx.x / (kSumColumns / 4);
    int c = threadIdx.x % (kSumColumns / 4) * 4, begin = blockIdx.x * kSumColumns;
    Vec<4> sum{};
    if (begin + c < padded) {
        const float* from = partial + (size_t)blockIdx.y * padded + begin + c;
#pragma unroll 4
        for (int part = slot; part < parts; part += kSumSlots) {
            Vec<4> x = load_vec<4>(from + (size_t)part * gridDim.y * padded);
#pragma unroll
            for (int k = 0; k < 4; k++) sum[k] += x[k];
        }
    }
    store_vec(&slots[slot][c], sum);
    __syncthreads();
    if (threadIdx.x >= kSumColumns || begin + (int)threadIdx.x >= C) return;
    float total = 0;
#pragma unroll
    for (int s = 0; s < kSumSlots; s++) total += slots[s][threadIdx.x];
    to.outs[blockIdx.y][begin + threadIdx.x] += total;
}

// Adds up the sums that blocks of rows have written to partial (parts, one or two, padded C): to first (C),
// and to second (C) unless it is null. It differs from add_column_sums() in that its rows are padded and may
// be two vectors side by side.
inline void add_partial_sums(float* first, float* second, const float* partial, int parts, int C,
                             cudaStream_t stream) {
    dim3 grid(ceil_div(C, kSumColumns), second ? 2 : 1);
    add_partial_sums_kernel<<<grid, kSumThreads, 0, stream>>>({{first, second}}, partial, parts, C);
    check_launch();
}

}  // namespace gpu
