// What the attention kernels for bf16 are made of: tiles of 64 rows in shared memory, copied there by
// cp.async and read by ldmatrix, and products of them by mma.sync.m16n8k16. And the tables of numbers by
// which attention scales its rows and fades with distance, which all precisions share.
//
// A warp's products have 16 rows; of a fragment's 16 x 8 results a lane has those in rows g and g+8, columns
// 2t and 2t+1, where g = lane / 4 and t = lane % 4.
#pragma once
#include <cmath>
#include <utility>

#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/cuda/common.h"
#include "llmc/cuda/reduce.h"
#include "llmc/cuda/vector.h"

namespace gpu {

constexpr int kAttentionTile = 64;      // queries, and keys
constexpr int kFloatTile = 32;          // the same of float's kernels
constexpr int kAttentionThreads = 128;  // four warps of 16 rows each

template <class Real>
constexpr int attention_tile = std::is_same_v<Real, float> ? kFloatTile : kAttentionTile;

// Blocks may have more than 48 KB of shared memory where they ask for it.
template <class Kernel, class... Args>
void launch_attention(Kernel* kernel, dim3 grid, size_t shared, cudaStream_t stream, Args... args) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<grid, kAttentionThreads, shared, stream>>>(args...);
    check_launch();
}

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
// Two neighbouring results of 16 x 8.
__device__ inline void mma(float (&left)[4], float (&right)[4], const FragmentA& a, const FragmentB& b) {
    mma(left, a, b.r[0], b.r[1]);
    mma(right, a, b.r[2], b.r[3]);
}

__device__ inline uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

// Results of two products as the factor of the next: they lie in a lane's registers as mma wants them.
__device__ inline FragmentA as_factor(const float (&left)[4], const float (&right)[4]) {
    return {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]), pack_bf16(right[0], right[1]),
            pack_bf16(right[2], right[3])};
}

// -------------------------------------------------------------------------------------------------- tiles

// 64 rows of kD numbers in shared memory. The chunks of 16 bytes of a row are permuted by the row's number,
// so that any eight rows that follow each other have their chunks of one column in different banks.
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

    // Rows `row`.. +15, a multiple of 16, and columns 16 k.. +15, as the first factor.
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

// 16 bytes, or zeros.
__device__ inline void copy_async(bf16* to, const bf16* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(present ? 16 : 0)
                 : "memory");
}
__device__ inline void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all but the `kLeft` latest groups of this thread are there.
template <int kLeft>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Starts the copy of `rows` rows of D numbers, with zeros around them. Where D is no multiple of 8, rows do
// not begin at 16-byte addresses and go element by element.
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
    } else if constexpr (kAttentionThreads % Tile<kD>::kChunks == 0) {  // a thread's chunks are in one column
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

// Writes a warp's 16 rows of results, by way of its own rows of a tile that nothing else needs any more, so
// that stores are of 16 bytes.
//   rows: how many of the tile's 64 there are; factor: of rows g and g+8
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

// Calls f(pair, at, n) for each pair of neighbouring results of a warp's 16 rows that exists: its first
// number's address in rows of floats, and how many of the two there are.
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
        if (D % 2 == 0) {  // so all are at multiples of 8 bytes
            const float2 values = *reinterpret_cast<const float2*>(at);
            to[0] = fmaf(values.x, weight, to[0]), to[1] = fmaf(values.y, weight, to[1]);
        } else {
            to[0] = fmaf(at[0], weight, to[0]);
            if (n == 2) to[1] = fmaf(at[1], weight, to[1]);
        }
    });
}

// Writes a warp's results, times the rows' factors, in float.
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

// ------------------------------------------------------------------------------------------------- tables

// One for all heads where there is no decay, one a head otherwise. Filled on the device, for a learned decay
// is known nowhere else.
struct AttentionTables {
    float* c = nullptr;     // (heads,T): c_i / sqrt(D)^p of a polynomial; without c_i for `sum`; otherwise 1
    float* fade = nullptr;  // (heads,T): gamma^n
    // (heads,T): e_i = -d log c_i / d log gamma. At distance e_i the change of gamma^(i-j) and that of c_i
    // cancel, so a term there adds nothing to the gradient of log gamma.
    float* neutral = nullptr;
    float* log_gamma = nullptr;  // (heads)
    int stride = 0;              // from one head to the next: T, or 0

    static size_t size(int T, int H) { return (3 * (size_t)T + 1) * H; }

    AttentionTables() = default;
    AttentionTables(float* scratch /*(size)*/, bool decays, int T, int H) : stride(decays ? T : 0) {
        size_t n = (size_t)T * (decays ? H : 1);
        c = std::exchange(scratch, scratch + n);
        if (!decays) return;
        fade = std::exchange(scratch, scratch + n);
        neutral = std::exchange(scratch, scratch + n);
        log_gamma = scratch;
    }
};

// The linear form (linear.h) cuts the sequence into segments: the tiles do the pairs within one,
// and add to them what the others give. length 0: there is but one.
struct AttentionSegments {
    int length = 0;                 // tokens, a multiple of 64
    const float* sums = nullptr;    // forward (B,T,C): o, before c_i; backward (B,T,3C): dq, dk and dv
    const float* totals = nullptr;  // (B,H,T), for `sum`: of gamma^(i-j) |x_ij^p|
};

// 1 / (e^y - 1) - 1 / y.
__device__ inline double smooth_part(double y) {
    if (y < 0.1) {
        double z = y * y;
        return -0.5 + y * (1.0 / 12 - z * (1.0 / 720 - z * (1.0 / 30240 - z * (1.0 / 1209600))));
    }
    return 1 / expm1(y) - 1 / y;
}

// By index of row and distance. factor: what c_i has for all rows; kind: the rest of it.
template <int kThreads = 128>
__global__ void attention_tables(AttentionTables tables, const float* decay /*(H), or null*/, ScaleKind kind,
                                 double factor, int T) {
    int i = blockIdx.x * kThreads + threadIdx.x, h = blockIdx.y;
    if (i >= T) return;
    double log_g = decay ? log_gamma(decay[h]) : 0;
    size_t at = (size_t)h * T + i;
    double length = i + 1;  // n_i
    if (kind == ScaleKind::row && log_g != 0) length = expm1(2 * length * log_g) / expm1(2 * log_g);
    double c = kind == ScaleKind::row    ? factor / sqrt(length)
               : kind == ScaleKind::mean ? factor / (i + 1)
                                         : factor;
    tables.c[at] = (float)c;
    if (!decay) return;
    tables.fade[at] = (float)exp(i * log_g);
    // The derivative of log n_i in 2 log gamma, without the 1 / (2 log gamma) that its two terms share.
    tables.neutral[at] = kind == ScaleKind::row
                             ? (float)(smooth_part(-2 * log_g) - (i + 1) * smooth_part(-2 * (i + 1) * log_g))
                             : 0.0f;
    if (i == 0) tables.log_gamma[h] = (float)log_g;
}

inline void make_tables(const AttentionTables& tables, const float* decay, const AttentionConfig& config,
                        int T, int H, int D, cudaStream_t stream) {
    if (config.softmax() && !decay) return;
    ScaleKind kind = ScaleKind::constant;  // c_i is 1 where there is no power
    double factor = 1;
    if (config.polynomial()) {
        kind = config.scale;
        factor = std::pow((double)D, -0.5 * config.power());
        double m = gaussian_moment(config.power(), D);
        if (kind == ScaleKind::row || kind == ScaleKind::mean) factor /= std::sqrt(m);
        if (kind == ScaleKind::context) factor /= std::sqrt((double)config.context);
        if (kind == ScaleKind::constant) factor *= config.constant;
    }
    attention_tables<>
        <<<dim3(ceil_div(T, 128), decay ? H : 1), 128, 0, stream>>>(tables, decay, kind, factor, T);
    check_launch();
}

// ---------------------------------------------------------------------------------- gradient of the decay

// *to = the sum over a block of kAttentionThreads.
__device__ inline void block_total(double x, double* of_warps /*(4)*/, double* to) {
    x = warp_sum(x);
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    if (threadIdx.x > 0) return;
    double total = 0;
    for (int warp = 0; warp < kAttentionThreads / kWarp; warp++) total += of_warps[warp];
    *to = total;
}

// One warp a head.
template <int kLanes = kWarp>
__global__ void attention_decay_gradient(float* ddecay,             // (H) +=
                                         const double* dlog_gamma,  // (B,H,tiles)
                                         const float* decay,        // (H)
                                         int B, int tiles, int H) {
    int h = blockIdx.x;
    double total = 0;
    for (int i = threadIdx.x; i < B * tiles; i += kLanes)
        total += dlog_gamma[((size_t)(i / tiles) * H + h) * tiles + i % tiles];
    total = warp_sum(total);
    // d log sigmoid(delta) = 1 - sigmoid(delta)
    if (threadIdx.x == 0) ddecay[h] += (float)(total / (1 + exp((double)decay[h])));
}

inline void add_decay_gradient(float* ddecay, const double* dlog_gamma, const float* decay, int B, int tiles,
                               int H, cudaStream_t stream) {
    attention_decay_gradient<><<<H, kWarp, 0, stream>>>(ddecay, dlog_gamma, decay, B, tiles, H);
    check_launch();
}

}  // namespace gpu
