// What the attention kernels for bf16 are made of: tiles of 64 rows in shared memory, which cp.async fills
// and ldmatrix reads, and their products by mma.sync.m16n8k16.
//
// A warp computes the products of 16 rows. Of the 16 x 8 results of one mma a lane has those in rows g and
// g+8 and columns 2t and 2t+1, where g = lane / 4 and t = lane % 4.
#pragma once
#include "llmc/cuda/attention/attention.h"
#include "llmc/cuda/vector.h"

namespace gpu {

// ---------------------------------------------------------------------------------------------- fragments

struct FragmentA {
    uint32_t r[4];  // 16 x 16
};
struct FragmentB {
    uint32_t r[4];  // 16 x 16: two of mma's 16 x 8
};

__device__ inline uint32_t shared_address(const void* pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

__device__ inline void ldmatrix(uint32_t (&r)[4], const bf16* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(at))
                 : "memory");
}
__device__ inline void ldmatrix_transposed(uint32_t (&r)[4], const bf16* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(at))
                 : "memory");
}

__device__ inline void mma(float (&c)[4], const FragmentA& a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
}
// The same for two neighbouring results of 16 x 8.
__device__ inline void mma(float (&left)[4], float (&right)[4], const FragmentA& a, const FragmentB& b) {
    mma(left, a, b.r[0], b.r[1]);
    mma(right, a, b.r[2], b.r[3]);
}

__device__ inline uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

// Turns the results of two products into the first factor of the next one. They already lie in the lanes that
// mma wants them in.
__device__ inline FragmentA as_factor(const float (&left)[4], const float (&right)[4]) {
    return {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]), pack_bf16(right[0], right[1]),
            pack_bf16(right[2], right[3])};
}

// -------------------------------------------------------------------------------------------------- tiles

// 64 rows of kD numbers in shared memory. The 16-byte chunks of a row are permuted by the row's number, so
// that in any eight consecutive rows the chunks of one column are in different banks.
template <int kD>
struct Tile {
    static constexpr int kChunks = kD / 8, size = kAttentionTile * kD;
    static_assert(kD % 16 == 0);

    __device__ static int permutation(int row) {
        return kChunks % 8 == 0 ? row & 7 : kChunks % 4 == 0 ? row >> 1 & 3 : row >> 2 & 1;
    }
    __device__ static int offset(int row, int chunk) {
        return (row * kChunks + (chunk ^ permutation(row))) * 8;
    }

    // The 16 rows from `row` on, a multiple of 16, and the 16 columns from 16 k on, as the first factor.
    __device__ static FragmentA a(const bf16* tile, int row, int k) {
        int lane = threadIdx.x % kWarp;
        FragmentA f;
        ldmatrix(f.r, tile + row * kD + offset(lane & 15, 2 * k + (lane >> 4)));
        return f;
    }
    // The same rows and columns, transposed, as the first factor.
    __device__ static FragmentA a_transposed(const bf16* tile, int row, int k) {
        int lane = threadIdx.x % kWarp;
        FragmentA f;
        ldmatrix_transposed(f.r,
                            tile + row * kD + offset((lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
        return f;
    }
    // The same rows and columns, transposed, as the second factor.
    __device__ static FragmentB b_transposed(const bf16* tile, int row, int k) {
        int lane = threadIdx.x % kWarp;
        FragmentB f;
        ldmatrix(f.r, tile + row * kD + offset((lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
        return f;
    }
    // The same rows and columns as the second factor.
    __device__ static FragmentB b(const bf16* tile, int row, int k) {
        int lane = threadIdx.x % kWarp;
        FragmentB f;
        ldmatrix_transposed(f.r, tile + row * kD + offset(lane & 15, 2 * k + (lane >> 4)));
        return f;
    }
};

// Starts the copy of 16 bytes, or stores 16 zeros.
__device__ inline void copy_async(bf16* to, const bf16* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(present ? 16 : 0)
                 : "memory");
}
__device__ inline void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the `kLeft` latest groups of this thread's copies are under way.
template <int kLeft>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Starts the copy of `rows` rows of D numbers and fills the rest of the tile with zeros. If D is not a
// multiple of 8, rows do not begin at 16-byte addresses, so they are copied element by element.
template <int kD>
__device__ inline void load_tile(bf16* tile, const bf16* from, size_t stride, int rows, int D) {
    if (D % 8 != 0) {
        for (int i = threadIdx.x; i < Tile<kD>::size / 8; i += kAttentionThreads) {
            const int row = i / Tile<kD>::kChunks, chunk = i % Tile<kD>::kChunks;
            Pack<bf16> pack;
            for (int e = 0; e < 8; e++)
                pack[e] = row < rows && chunk * 8 + e < D ? from[row * stride + chunk * 8 + e]
                                                          : __float2bfloat16_rn(0);
            store_pack(tile + Tile<kD>::offset(row, chunk), pack);
        }
    } else if constexpr (kAttentionThreads % Tile<kD>::kChunks == 0) {  // each thread stays in one column
        constexpr int kStep = kAttentionThreads / Tile<kD>::kChunks;
        static_assert(kStep % 8 == 0);
        const int row0 = threadIdx.x / Tile<kD>::kChunks, column = threadIdx.x % Tile<kD>::kChunks * 8;
        const int present_rows = column < D ? rows - row0 : 0;
        bf16* to = tile + Tile<kD>::offset(row0, column / 8);
        const bf16* at = from + row0 * stride + column;
#pragma unroll
        for (int row = 0; row < kAttentionTile; row += kStep) {
            copy_async(to + row * kD, row < present_rows ? at : from, row < present_rows);
            at += kStep * stride;
        }
    } else {
        static_assert(Tile<kD>::size / 8 % kAttentionThreads == 0);
#pragma unroll
        for (int n = 0; n < Tile<kD>::size / 8 / kAttentionThreads; n++) {
            const int i = threadIdx.x + n * kAttentionThreads;
            const int row = i / Tile<kD>::kChunks, chunk = i % Tile<kD>::kChunks;
            const bool present = row < rows && chunk * 8 < D;
            copy_async(tile + Tile<kD>::offset(row, chunk), present ? from + row * stride + chunk * 8 : from,
                       present);
        }
    }
}

// Writes a warp's 16 rows of results, times the factors of rows g and g+8. They go through the warp's rows of
// a tile that is no longer needed, so that each store has 16 bytes.
//   rows: how many of the tile's 64 rows exist
template <int kD>
__device__ inline void store_rows(bf16* to, size_t stride, bf16* tile, const float (&x)[kD / 8][4],
                                  float factor0, float factor1, int rows, int D) {
    int lane = threadIdx.x % kWarp, row0 = threadIdx.x / kWarp * 16, g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kD / 8; n++) {
        auto put = [&](int row, uint32_t pair) {
            *reinterpret_cast<uint32_t*>(tile + Tile<kD>::offset(row, n) + 2 * t) = pair;
        };
        put(row0 + g, pack_bf16(x[n][0] * factor0, x[n][1] * factor0));
        put(row0 + g + 8, pack_bf16(x[n][2] * factor1, x[n][3] * factor1));
    }
    __syncwarp();
    for (int i = lane; i < 16 * Tile<kD>::kChunks; i += kWarp) {
        int row = row0 + i / Tile<kD>::kChunks, chunk = i % Tile<kD>::kChunks;
        if (row >= rows || chunk * 8 >= D) continue;
        Pack<bf16> pack = load_pack(tile + Tile<kD>::offset(row, chunk));
        bf16* at = to + row * stride + chunk * 8;
        if (D % 8 == 0) {
            store_pack(at, pack);
        } else {
            for (int e = 0; e < 8 && chunk * 8 + e < D; e++) at[e] = pack[e];
        }
    }
}

// Calls f(pair, at, n) for each pair of neighbouring results in a warp's 16 rows. `at` is the address of the
// first in rows of floats, and n how many of the two exist. Pairs that do not exist are left out.
template <int kD, class Float, class F>
__device__ inline void for_pairs(Float* rows_of_tile, size_t stride, int rows, int D, F f) {
    const int lane = threadIdx.x % kWarp, row0 = threadIdx.x / kWarp * 16 + lane / 4, c0 = lane % 4 * 2;
#pragma unroll
    for (int pair = 0; pair < kD / 4; pair++) {
        const int row = row0 + pair % 2 * 8, c = pair / 2 * 8 + c0;
        if (row < rows && c < D) f(pair, rows_of_tile + row * stride + c, min(2, D - c));
    }
}

// Adds a warp's 16 rows of numbers, times weight, to its results.
template <int kD>
__device__ inline void add_rows(float (&x)[kD / 8][4], const float* from, size_t stride, int rows, int D,
                                float weight = 1) {
    for_pairs<kD>(from, stride, rows, D, [&](int pair, const float* at, int n) {
        float* to = x[pair / 2] + pair % 2 * 2;
        if (D % 2 == 0) {  // so all pairs begin at 8-byte addresses
            const float2 values = *reinterpret_cast<const float2*>(at);
            to[0] = fmaf(values.x, weight, to[0]), to[1] = fmaf(values.y, weight, to[1]);
        } else {
            to[0] = fmaf(at[0], weight, to[0]);
            if (n == 2) to[1] = fmaf(at[1], weight, to[1]);
        }
    });
}

// Writes a warp's results in float, times the factors of rows g and g+8.
template <int kD>
__device__ inline void store_sums(float* to, size_t stride, const float (&x)[kD / 8][4], float factor0,
                                  float factor1, int rows, int D) {
    for_pairs<kD>(to, stride, rows, D, [&](int pair, float* at, int n) {
        const float* from = x[pair / 2] + pair % 2 * 2;
        const float factor = pair % 2 ? factor1 : factor0;
        if (D % 2 == 0) {
            *reinterpret_cast<float2*>(at) = {from[0] * factor, from[1] * factor};
        } else {
            at[0] = from[0] * factor;
            if (n == 2) at[1] = from[1] * factor;
        }
    });
}

}  // namespace gpu
