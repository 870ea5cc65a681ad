// What kernels share that pass over rows: which columns of a row a lane has in hand, and sums of columns over
// rows whose order of additions is fixed.
#pragma once
#include "llmc/cuda/common.h"

namespace gpu {

// H100's. Grids that stride over their work are sized by it and not by the card's own number, so that the
// order of additions is the same on every card.
constexpr int kMultiprocessors = 132;

template <int N>
struct Floats {
    float values[N] = {};
    __device__ float& operator[](int i) { return values[i]; }
    __device__ const float& operator[](int i) const { return values[i]; }
};

// The first `count` (or all) of N numbers; the rest are 0. One access where all are there: `at` is aligned to
// it.
template <int N, class T>
__device__ Floats<N> load_floats(const T* at, size_t count = N) {
    static_assert(N * sizeof(T) == 16 || N * sizeof(T) == 8);
    using Bits = std::conditional_t<N * sizeof(T) == 16, uint4, uint2>;
    Floats<N> x;
    if (count >= N) {
        Bits bits = *reinterpret_cast<const Bits*>(at);
#pragma unroll
        for (int k = 0; k < N; k++) x[k] = to_float(reinterpret_cast<const T*>(&bits)[k]);
    } else {
#pragma unroll
        for (int k = 0; k < N; k++) x[k] = k < count ? to_float(at[k]) : 0.0f;
    }
    return x;
}
template <int N, class T>
__device__ void store_floats(T* at, const Floats<N>& x, size_t count = N) {
    using Bits = std::conditional_t<N * sizeof(T) == 16, uint4, uint2>;
    if (count >= N) {
        Bits bits;
#pragma unroll
        for (int k = 0; k < N; k++) reinterpret_cast<T*>(&bits)[k] = from_float<T>(x[k]);
        *reinterpret_cast<Bits*>(at) = bits;
    } else {
#pragma unroll
        for (int k = 0; k < N; k++)
            if (k < count) at[k] = from_float<T>(x[k]);
    }
}

// A row of C columns shared out among `width` lanes in groups of width * N. Packed, where C is a multiple of
// N: a lane has N side by side, which are one access. Not packed: they are `width` apart, so that neighbours
// still read neighbours. Kernels that pass over arrays of float and of bf16 take N = 4, 16 bytes of float and
// 8 of bf16: with 8 of each, a lane's floats would be two accesses that leave gaps between the lanes.
template <int N, bool kPacked>
struct Columns {
    int lane, width, C;

    __device__ int groups() const { return ceil_div(C, width * N); }
    // The k-th of this lane's in group i.
    __device__ int at(int i, int k) const {
        return i * width * N + (kPacked ? lane * N + k : k * width + lane);
    }
    __device__ bool has(int i, int k) const { return at(i, kPacked ? 0 : k) < C; }

    // Columns past the end are 0.
    template <class T>
    __device__ Floats<N> load(const T* row, int i) const {
        Floats<N> x;
        if constexpr (kPacked) {
            if (has(i, 0)) x = load_floats<N>(row + at(i, 0));
        } else {
#pragma unroll
            for (int k = 0; k < N; k++)
                if (has(i, k)) x[k] = to_float(row[at(i, k)]);
        }
        return x;
    }
    template <class T>
    __device__ void store(T* row, int i, const Floats<N>& x) const {
        if constexpr (kPacked) {
            if (has(i, 0)) store_floats<N>(row + at(i, 0), x);
        } else {
#pragma unroll
            for (int k = 0; k < N; k++)
                if (has(i, k)) row[at(i, k)] = from_float<T>(x[k]);
        }
    }
};

// Rows of partial sums begin at 16-byte addresses and are written to their padded ends.
__host__ __device__ constexpr int padded_columns(int C) {
    return ceil_div(C, 4) * 4;
}

// outs[blockIdx.y] (C) += the sum of partial (parts, gridDim.y, padded C) over the parts. A block takes 32
// columns; 32 slots sum every 32nd part, then the slots are summed in order.
struct ColumnSums {
    float* outs[2];
};
constexpr int kSumColumns = 32, kSumSlots = 32, kSumThreads = kSumColumns / 4 * kSumSlots;

static __global__ void __launch_bounds__(kSumThreads)
    add_partial_sums_kernel(ColumnSums to, const float* __restrict__ partial, int parts, int C) {
    __shared__ alignas(16) float slots[kSumSlots][kSumColumns];
    int padded = padded_columns(C), slot = threadIdx.x / (kSumColumns / 4);
    int c = threadIdx.x % (kSumColumns / 4) * 4, begin = blockIdx.x * kSumColumns;
    Floats<4> sum;
    if (begin + c < padded) {
        const float* from = partial + (size_t)blockIdx.y * padded + begin + c;
#pragma unroll 4
        for (int part = slot; part < parts; part += kSumSlots) {
            Floats<4> x = load_floats<4>(from + (size_t)part * gridDim.y * padded);
#pragma unroll
            for (int k = 0; k < 4; k++) sum[k] += x[k];
        }
    }
    store_floats<4>(&slots[slot][c], sum);
    __syncthreads();
    if (threadIdx.x >= kSumColumns || begin + (int)threadIdx.x >= C) return;
    float total = 0;
#pragma unroll
    for (int s = 0; s < kSumSlots; s++) total += slots[s][threadIdx.x];
    to.outs[blockIdx.y][begin + threadIdx.x] += total;
}

// first (C), and second (C) unless it is null, += the sum of partial (parts, one or two, padded C) over the
// parts.
inline void add_partial_sums(float* first, float* second, const float* partial, int parts, int C,
                             cudaStream_t stream) {
    dim3 grid(ceil_div(C, kSumColumns), second ? 2 : 1);
    add_partial_sums_kernel<<<grid, kSumThreads, 0, stream>>>({{first, second}}, partial, parts, C);
    check_launch();
}

}  // namespace gpu
