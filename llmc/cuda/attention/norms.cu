// The kernels of norms.h. Sums are float over at most 64 keys, double beyond, and added in a fixed
// order.
#include "llmc/cuda/attention/norms.h"

#include "llmc/cuda/attention/kernels_float.h"

namespace gpu {

constexpr int kFloatKeys = 64;  // whose sums a thread keeps in float
constexpr int kNumbers = sizeof(NormSums) / sizeof(double), kMaxima = 2;

// How scores are made, and which of them a thread has: of two rows of a tile, kKeys each. Tiles have
// room for the largest heads; smaller heads waste only shared memory.
template <class Real>
struct NormTile;

// Multiply-adds (kernels_float.h).
template <>
struct NormTile<float> {
    using Tiles = FloatTile<128>;
    static constexpr int kRows = kFloatTile, kSize = Tiles::size, kKeys = 4;
    static constexpr int kLanes = 8;  // that share a row
    __device__ static int row(int r) { return threadIdx.x / 8 * 2 + r; }
    __device__ static int key(int m) { return threadIdx.x % 8 + 8 * m; }

    __device__ static void load(float* tile, const float* from, size_t stride, int rows, int D) {
        Tiles::load(tile, from, stride, rows, D);
    }
    __device__ static void scores(float (&s)[2][kKeys], const float* q, const float* k, int D) {
        Tiles::scores(s, q, k, D);
    }
};

// Tensor cores (tiles_bf16.h); the products of bf16 are exact, their sums are float.
template <>
struct NormTile<bf16> {
    using Tiles = Tile<128>;
    static constexpr int kRows = kAttentionTile, kSize = Tiles::size, kKeys = 16;
    static constexpr int kLanes = 4;
    __device__ static int row(int r) { return threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4 + 8 * r; }
    __device__ static int key(int m) { return m / 2 * 8 + threadIdx.x % 4 * 2 + m % 2; }

    __device__ static void load(bf16* tile, const bf16* from, size_t stride, int rows, int D) {
        load_tile<128>(tile, from, stride, rows, D);
        commit_copies();
        wait_for_copies<0>();
    }
    __device__ static void scores(float (&s)[2][kKeys], const bf16* q, const bf16* k, int D) {
        float products[8][4] = {};
        for (int d = 0; d < ceil_div(D, 16); d++) {
            const FragmentA a = Tiles::a(q, threadIdx.x / kWarp * 16, d);
#pragma unroll
            for (int n = 0; n < 4; n++)
                mma(products[2 * n], products[2 * n + 1], a, Tiles::b_transposed(k, 16 * n, d));
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int m = 0; m < kKeys; m++) s[r][m] = products[m / 2][2 * r + m % 2];
    }
};

// What is summed over the keys of a row. A "rest" leaves out the row's largest.
enum RowSum {
    kScore,        // x
    kScoreSquare,  // x^2
    kMoment,       // x^(2p)
    kAbsolute,     // |A|
    kNegative,     // |A| where A < 0
    kSquare,       // A^2
    kSlope,        // (w / kSlopeFactor)^2
    kEntropy,      // -A log A
    kRest,         // A of softmax; a of `sum`
    kRestSquare,   // A^2; a^2
    kRestCube,     // A^3 of softmax
    kRestSlope,    // (w / p)^2 of `sum`
    kRestOwn,      // that times 1 - 2a
    kRowSums
};

// Those that a kind of attention has.
template <class A, bool kRowSum>
__device__ constexpr bool has(int sum) {
    if (sum <= kScoreSquare) return true;
    if (sum == kMoment) return A::kPower > 0;
    if (sum <= kSquare) return !A::kOnline;
    if (sum == kSlope) return !A::kOnline && !kRowSum;
    if (sum == kEntropy || sum == kRestCube) return A::kOnline;
    if (sum <= kRestSquare) return A::kOnline || kRowSum;
    return kRowSum;
}

// Adds to the rest: A of softmax; |x|, g = fade of `sum`, whose 1 / s is `factor`.
template <class A, class Number>
__device__ void add_to_rest(Number (&sum)[kRowSums], Number x, Number fade, Number factor) {
    if constexpr (A::kOnline) {
        sum[kRest] += x;
        sum[kRestSquare] += x * x;
        sum[kRestCube] += x * x * x;
    } else {
        Number share, w;
        A::weighted(share, w, x, fade * factor, Number(), DeviceMath());
        sum[kRest] += share;
        sum[kRestSquare] += share * share;
        sum[kRestSlope] += x > 0 ? w * w : 0;  // |x| has no slope at 0
        sum[kRestOwn] += w * w * (1 - 2 * share);
    }
}

// What a thread knows of one of its rows.
template <class A, bool kRowSum>
struct RowNorms {
    float now[kRowSums] = {};
    double total[kRowSums] = {};
    float max_score = 0, max_weight = 0;  // |x|, |A|
    float largest = 0, largest_fade = 0;  // what is not in the rest: A of softmax; |x|, g of `sum`
    float largest_share = 0;              // a of it

    // Key j of row i: their score, gamma^(i-j) of a polynomial and (i-j) log gamma of softmax.
    //   factor: the log-sum-exp of softmax, c_i, or 1 / s; keys: i + 1
    __device__ void add(float x, float fade, float factor, float keys) {
        float x2 = x * x, y = fabsf(x);
        now[kScore] += x;
        now[kScoreSquare] += x2;
        max_score = fmaxf(max_score, y);
        if constexpr (A::kOnline) {
            float log_a = x + fade - factor, a = expf(log_a);
            now[kEntropy] -= a * log_a;
            add_to_rest<A>(now, a > largest ? largest : a, 1.0f, 1.0f);
            largest = fmaxf(largest, a);
        } else {
            float a, da;
            A::weighted(a, da, x, fade * factor, keys, DeviceMath());
            if constexpr (A::kPower > 0) now[kMoment] += A::value(x2, keys, DeviceMath());
            now[kAbsolute] += fabsf(a);
            now[kNegative] += fmaxf(-a, 0.0f);
            now[kSquare] += a * a;
            max_weight = fmaxf(max_weight, fabsf(a));
            if constexpr (kRowSum) {
                bool larger = fabsf(a) > largest_share;
                add_to_rest<A>(now, larger ? largest : y, larger ? largest_fade : fade, factor);
                if (larger) largest = y, largest_fade = fade, largest_share = fabsf(a);
            } else {
                now[kSlope] += da * da;
            }
        }
    }

    __device__ void flush() {
#pragma unroll
        for (int n = 0; n < kRowSums; n++) {
            total[n] += now[n];
            now[n] = 0;
        }
    }

    // Adds up what the threads that share the row have. The first of them gets the result.
    __device__ void gather(int lanes, float factor) {
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
            auto other = [=](auto x) { return __shfl_xor_sync(0xFFFFFFFFu, x, offset); };
#pragma unroll
            for (int n = 0; n < kRowSums; n++)
                if (has<A, kRowSum>(n)) total[n] += other(total[n]);
            max_score = fmaxf(max_score, other(max_score));
            if constexpr (!A::kOnline) max_weight = fmaxf(max_weight, other(max_weight));
            if constexpr (A::kOnline || kRowSum) {
                float x = other(largest), fade = other(largest_fade), share = other(largest_share);
                bool larger = kRowSum ? share > largest_share : x > largest;
                add_to_rest<A, double>(total, larger ? largest : x, larger ? largest_fade : fade, factor);
                if (larger) largest = x, largest_fade = fade, largest_share = share;
            }
        }
    }

    __device__ NormSums finish(double c) const {
        NormSums row;
        row.score = total[kScore];
        row.score_square = total[kScoreSquare];
        row.max_score = max_score;
        double R1 = total[kRest], R2 = total[kRestSquare];
        if constexpr (A::kOnline) {
            double a = largest, a2 = a * a;
            row.absolute = R1 + a;
            row.square = R2 + a2;
            row.jacobian = a2 * (R1 * R1 + R2) + R2 * (1 + a2 + R2) - 2 * total[kRestCube];
            row.max_weight = a;
            row.entropy = total[kEntropy];
        } else {
            row.absolute = total[kAbsolute];
            row.negative = total[kNegative];
            row.square = total[kSquare];
            row.max_weight = max_weight;
            row.moment = total[kMoment];
            row.jacobian = total[kSlope];
            if constexpr (kRowSum) {
                double a, w, without = R1 + kRowSumEps * c;  // 1 - a_m
                A::weighted(a, w, (double)largest, largest_fade * c, 0.0, DeviceMath());
                row.jacobian =
                    w * w * (without * without + R2) + total[kRestOwn] + (a * a + R2) * total[kRestSlope];
            }
            row.jacobian *= A::kSlopeFactor * A::kSlopeFactor;
        }
        if (row.square != 0) row.effective_keys = row.absolute * row.absolute / row.square;
        return row;
    }
};

// One of the numbers of NormSums, of two parts: sums, and behind them maxima.
__device__ inline double joined(int number, double a, double b) {
    return number < kNumbers - kMaxima ? a + b : fmax(a, b);
}

// Blocks: (B H, tiles of queries), the last, longest, first.
//   c_factor: what makes c_i of a table's entry
template <class Real, class A, bool kRowSum>
__global__ __launch_bounds__(kAttentionThreads,
                             3) void attention_norms_kernel(NormSums* parts /*(H,B,tiles)*/, const Real* qkv,
                                                            const float* stats, float c_factor,
                                                            AttentionShape shape) {
    using Tiles = NormTile<Real>;
    __shared__ __align__(16) Real q[Tiles::kSize], k[Tiles::kSize];
    __shared__ double of_rows[Tiles::kRows][kNumbers];  // a NormSums each
    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H;
    const int tile = gridDim.y - 1 - blockIdx.y, i0 = tile * Tiles::kRows;
    const size_t stride = 3 * (size_t)C, table = (size_t)h * shape.tables.stride;
    const Real* head = qkv + b * T * stride + h * D;
    const float log_gamma = A::kOnline && shape.decays ? shape.tables.log_gamma[h] : 0;

    Tiles::load(q, head + i0 * stride, stride, T - i0, D);
    float factor[2] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int i = i0 + Tiles::row(r);
        if (i >= T) continue;
        if constexpr (A::kOnline || kRowSum) {
            const float stat = stats[(size_t)blockIdx.x * T + i];
            factor[r] = kRowSum ? 1 / stat : stat;
        } else {
            factor[r] = shape.tables.c[table + i] * c_factor;
        }
    }
    RowNorms<A, kRowSum> rows[2];
    for (int j0 = 0, keys = 0; j0 <= i0; j0 += Tiles::kRows) {
        __syncthreads();
        Tiles::load(k, head + j0 * stride + C, stride, T - j0, D);
        __syncthreads();
        float s[2][Tiles::kKeys];
        Tiles::scores(s, q, k, D);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int i = i0 + Tiles::row(r), nearest = i < T ? i - j0 : -1;  // the last key that it sees
#pragma unroll
            for (int m = 0; m < Tiles::kKeys; m++) {
                const int distance = nearest - Tiles::key(m);
                if (distance < 0) continue;
                const float fade = A::kOnline     ? distance * log_gamma
                                   : shape.decays ? shape.tables.fade[table + distance]
                                                  : 1.0f;
                rows[r].add(s[r][m] * shape.scale, fade, factor[r], i + 1.0f);
            }
        }
        keys += Tiles::kKeys;
        if (keys == kFloatKeys || j0 == i0) {
            rows[0].flush(), rows[1].flush();
            keys = 0;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        rows[r].gather(Tiles::kLanes, factor[r]);
        if (threadIdx.x % Tiles::kLanes == 0)
            *reinterpret_cast<NormSums*>(of_rows[Tiles::row(r)]) =
                i0 + Tiles::row(r) < T ? rows[r].finish(factor[r]) : NormSums();
    }
    __syncthreads();
    if (threadIdx.x >= kNumbers) return;
    double total = 0;
    for (const auto& of_row : of_rows) total = joined(threadIdx.x, total, of_row[threadIdx.x]);
    NormSums* part = parts + ((size_t)h * (gridDim.x / shape.H) + b) * gridDim.y + tile;
    reinterpret_cast<double*>(part)[threadIdx.x] = total;
}

// Blocks: (numbers of NormSums, H), a warp each.
static __global__ void add_norms_kernel(NormSums* sums, const NormSums* parts /*(H,count)*/, int count) {
    const int number = blockIdx.x, h = blockIdx.y;
    const double* part = reinterpret_cast<const double*>(parts + (size_t)h * count);
    double total = 0;
    for (int i = threadIdx.x; i < count; i += kWarp)
        total = joined(number, total, part[(size_t)i * kNumbers + number]);
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        total = joined(number, total, __shfl_xor_sync(0xFFFFFFFFu, total, offset));
    if (threadIdx.x == 0) reinterpret_cast<double*>(sums + h)[number] = total;
}

template <class Real>
void attention_norms(NormSums* sums,      // (H)
                     float* scratch,      // (attention_norms_scratch)
                     const Real* qkv,     // (B,T,3C): what attention_forward read
                     const float* stats,  // what attention_forward left; may be null where that is nothing
                     const float* decay,  // (H), or null
                     const AttentionConfig& config, int B, int T, int H, int D, cudaStream_t stream) {
    if (D > 128) fail("attention: head size ", D, ", the CUDA kernels go up to 128");
    int tiles = ceil_div(T, attention_tile<Real>);
    NormSums* parts = reinterpret_cast<NormSums*>(scratch);
    AttentionTables tables(reinterpret_cast<float*>(parts + (size_t)B * H * tiles), decay != nullptr, T, H);
    make_tables(tables, decay, config, T, H, D, stream);
    AttentionShape shape = attention_shape(config, decay, T, H, D, tables, {});
    float c_factor = (float)std::pow((double)D, 0.5 * config.power());
    with_activation(config.kind, [&]<class A>(A) {
        auto* kernel = &attention_norms_kernel<Real, A, false>;
        if constexpr (A::kPower > 0)
            if (config.has_row_sum()) kernel = &attention_norms_kernel<Real, A, true>;
        kernel<<<dim3(B * H, tiles), kAttentionThreads, 0, stream>>>(parts, qkv, stats, c_factor, shape);
        check_launch();
    });
    add_norms_kernel<<<dim3(kNumbers, H), kWarp, 0, stream>>>(sums, parts, B * tiles);
    check_launch();
}

template void attention_norms(NormSums*, float*, const float*, const float*, const float*,
                              const AttentionConfig&, int, int, int, int, cudaStream_t);
template void attention_norms(NormSums*, float*, const bf16*, const float*, const float*,
                              const AttentionConfig&, int, int, int, int, cudaStream_t);

}  // namespace gpu
