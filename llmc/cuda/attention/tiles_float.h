// What the attention kernels for float are made of: tiles of 32 rows in shared memory, and their products by
// plain multiply-adds.
//
// Eight threads share two rows. Of 32 x 32 scores a thread has columns x, x+8, x+16 and x+24 of both rows,
// and of every 32 columns of a result the four that begin at 4x, where x = thread % 8.
#pragma once
#include "llmc/cuda/attention/attention.h"
#include "llmc/cuda/vector.h"

namespace gpu {

// Rows are 4 floats longer than necessary, so that in eight rows the packs of one column are in different
// banks.
template <int kD>
struct FloatTile {
    static constexpr int stride = kD + 4, size = kFloatTile * stride;

    // Loads `rows` rows of D numbers. The other rows get zeros, and so do columns up to `width` if D is
    // smaller.
    __device__ static void load(float* tile, const float* from, size_t from_stride, int rows, int D,
                                int width = 0) {
        const int packs = (max(D, width) + 3) / 4;
        for (int i = threadIdx.x; i < kFloatTile * packs; i += kAttentionThreads) {
            int row = i / packs, c = i % packs * 4;
            const float* at = from + row * from_stride + c;
            Pack<float> pack = {};
            if (row < rows && D % 4 == 0) {
                if (c < D) pack = load_pack(at);
            } else if (row < rows) {
                for (int e = 0; e < 4; e++) pack[e] = c + e < D ? at[e] : 0.0f;
            }
            store_pack(tile + row * stride + c, pack);
        }
    }

    // Sets s to the products of the thread's two rows of a and four rows of b.
    __device__ static void scores(float (&s)[2][4], const float* a, const float* b, int D) {
        const int x = threadIdx.x % 8, row = threadIdx.x / 8 * 2;
#pragma unroll
        for (int m = 0; m < 4; m++) s[0][m] = s[1][m] = 0;
        for (int d = 0; d < D; d += 4) {
            Pack<float> left[2] = {load_pack(a + row * stride + d), load_pack(a + (row + 1) * stride + d)};
#pragma unroll
            for (int m = 0; m < 4; m++) {
                Pack<float> right = load_pack(b + (x + 8 * m) * stride + d);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[0][m] = fmaf(left[0][e], right[e], s[0][m]);
                    s[1][m] = fmaf(left[1][e], right[e], s[1][m]);
                }
            }
        }
    }
};

// The weights of a tile in shared memory, where the eight threads that share two rows read each other's.
struct FloatWeights {
    static constexpr int stride = kFloatTile + 4, size = kFloatTile * stride;

    __device__ static void store(float* weights, const float (&s)[2][4]) {
        const int x = threadIdx.x % 8, row = threadIdx.x / 8 * 2;
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int m = 0; m < 4; m++) weights[(row + r) * stride + x + 8 * m] = s[r][m];
        __syncwarp();
    }
};

// A thread's results in its two rows of D sums.
template <int kD>
struct FloatSums {
    float sum[2][kD / 8] = {};

    // Adds the product of weights and a tile.
    __device__ void add(const float* weights, const float* tile, int D) {
        const int x = threadIdx.x % 8, row = threadIdx.x / 8 * 2;
        for (int j = 0; j < kFloatTile; j += 4) {
            Pack<float> left[2] = {load_pack(weights + row * FloatWeights::stride + j),
                                   load_pack(weights + (row + 1) * FloatWeights::stride + j)};
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int n = 0; n < kD / 32; n++) {
                    if (32 * n + 4 * x >= D) continue;
                    Pack<float> right = load_pack(tile + (j + k) * FloatTile<kD>::stride + 32 * n + 4 * x);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        sum[0][4 * n + e] = fmaf(left[0][k], right[e], sum[0][4 * n + e]);
                        sum[1][4 * n + e] = fmaf(left[1][k], right[e], sum[1][4 * n + e]);
                    }
                }
        }
    }
    __device__ void scale(int row, float by) {
#pragma unroll
        for (int d = 0; d < kD / 8; d++) sum[row][d] *= by;
    }
    // Adds rows of float, in the layout that store() writes.
    __device__ void add_rows(const float* from, size_t stride, int rows, int D) {
        const int x = threadIdx.x % 8;
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < kD / 8; i++) {
                const int row = threadIdx.x / 8 * 2 + r, c = 32 * (i / 4) + 4 * x + i % 4;
                if (row < rows && c < D) sum[r][i] += from[row * stride + c];
            }
    }
    // to: the first row of the tile, of which `rows` exist
    __device__ void store(float* to, size_t stride, int rows, int D) const {
        const int x = threadIdx.x % 8;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = threadIdx.x / 8 * 2 + r;
            if (row >= rows) continue;
#pragma unroll
            for (int n = 0; n < kD / 32; n++) {
                const int c = 32 * n + 4 * x;
                if (c >= D) continue;
                Pack<float> pack;
#pragma unroll
                for (int e = 0; e < 4; e++) pack[e] = sum[r][4 * n + e];
                if (D % 4 == 0) {
                    store_pack(to + row * stride + c, pack);
                } else {
                    for (int e = 0; e < 4 && c + e < D; e++) to[row * stride + c + e] = pack[e];
                }
            }
        }
    }
};

}  // namespace gpu
