// What kernels that pass over rows share: which columns of a row belong to which lane.
#pragma once
#include "llmc/cuda/vector.h"

namespace gpu {

// An H100 has so many. Grids that stride over their work are sized by this constant and not by the card's own
// number, so that the order of additions is the same on every card.
constexpr int kMultiprocessors = 132;

// Shares out a row of C columns among `width` lanes, in groups of width * N. If C is a multiple of N, the row
// is packed: a lane has N columns side by side, which it reads in one access. Otherwise they are `width`
// apart, so that neighbouring lanes still read neighbouring columns. Kernels that pass over arrays of float
// and of bf16 take N = 4, which is 16 bytes of float and 8 of bf16. With N = 8 a lane would need two accesses
// for its floats, with gaps between the lanes.
template <int N, bool kPacked>
struct Columns {
    int lane, width, C;

    __device__ int groups() const { return ceil_div(C, width * N); }
    // This lane's k-th column in group i.
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

// The length of a row of partial sums. Rows begin at 16-byte addresses and are written to their padded ends.
__host__ __device__ constexpr int padded_columns(int C) {
    return ceil_div(C, 4) * 4;
}

}  // namespace gpu
