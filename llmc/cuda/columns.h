// What kernels share that pass over rows: which columns of a row a lane has in hand, and sums of columns over
// rows whose order of additions is fixed.
#pragma once
#include "llmc/cuda/vector.h"

namespace gpu {

// H100's. Grids that stride over their work are sized by it and not by the card's own number, so that the
// order of additions is the same on every card.
constexpr int kMultiprocessors = 132;

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
    __device__ Vec<N> load(const T* row, int i) const {
        Vec<N> x{};
        if constexpr (kPacked) {
            if (has(i, 0)) x = load_vec<N>(row + at(i, 0));
        } else {
#pragma unroll
            for (int k = 0; k < N; k++)
                if (has(i, k)) x[k] = to_float(row[at(i, k)]);
        }
        return x;
    }
    template <class T>
    __device__ void store(T* row, int i, const Vec<N>& x) const {
        if constexpr (kPacked) {
            if (has(i, 0)) store_vec(row + at(i, 0), x);
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

}  // namespace gpu
