// Defines the functions of norms.h. Sums over up to 64 keys are float, longer ones double. The order of
// additions is fixed.
#include "llmc/cuda/attention/norms.h"

#include "llmc/cuda/attention/rows.h"
#include "llmc/cuda/attention/tiles_bf16.h"
#include "llmc/cuda/attention/tiles_float.h"

namespace gpu {

constexpr int kFloatKeys = 64;  // over how many keys of a row a thread sums in float
constexpr int kNumbers = sizeof(NormSums) / sizeof(double), kMaxima = 2;

// Says how scores are made, and which of them a thread has: kKeys in each of two rows of a tile. Tiles have
// room for the largest heads; smaller heads waste only shared memory.
template <class Real>
struct NormTile;

// Multiply-adds (tiles_float.h).
template <>
struct NormTile<float> {
    using Tiles = FloatTile<128>;
    static constexpr int kRows = kFloatTile, kSize = Tiles::size, kKeys = 4;
    static constexpr int kLanes = 8;  // how many lanes share a row
    __device__ static int row(int r) { return threadIdx.x / 8 * 2 + r; }
    __device__ static int key(int m) { return threadIdx.x % 8 + 8 * m; }

    __device__ static void load(float* tile, const float* from, size_t stride, int rows, int D) {
        Tiles::load(tile, from, stride, rows, D);
    }
    __device__ static void scores(float (&s)[2][kKeys], const float* q, const float* k, int D) {
        Tiles::scores(s, q, k, D);
    }
};

// Tensor cores (tiles_bf16.h). Products of bf16 are exact, and their sums are float.
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

// The sums over the keys of a row i. A "rest" leaves out the row's largest weight. With the scale `sum` a is
// the weight |A|, which is the share of a key in its row, and w its derivative by |x|; s is the row's sum.
enum RowSum {
    kScore,        // x
    kScoreSquare,  // x^2
    kMoment,       // x^(2p)
    kAbsolute,     // |A|
    kNegative,     // |A| where A < 0
    kSquare,       // A^2
    kSlope,        // (w / kSlopeFactor)^2
    kEntropy,      // -A log A
    kRest,         // for softmax A; for `sum` a
    kRestSquare,   // A^2; a^2
    kRestCube,     // for softmax A^3
    kRestSlope,    // for `sum` (w / p)^2
    kRestOwn,      // for `sum` (w / p)^2 (1 - 2a)
    kRowSums
};

// Whether a kind of attention needs a sum.
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

// Adds a key to the sums of the rest. For softmax x is A; for `sum` x is |x| and factor 1 / s.
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

// What a thread has summed of one of its rows.
template <class A, bool kRowSum>
struct RowNorms {
    float recent[kRowSums] = {};  // over the keys since the last flush()
    double total[kRowSums] = {};
    float max_score = 0, max_weight = 0;  // |x|, |A|
    float largest = 0, largest_fade = 0;  // the key that the rest leaves out: for softmax A; for `sum` |x|
    float largest_share = 0;              // its a

    // Adds key j of row i.
    //   x: the score; fade: gamma^(i-j), for softmax (i-j) log gamma
    //   factor: for softmax the log-sum-exp, for `sum` 1 / s, otherwise c_i; keys: i + 1
    __device__ void add(float x, float fade, float factor, float keys) {
        float x2 = x * x, y = fabsf(x);
        recent[kScore] += x;
        recent[kScoreSquare] += x2;
        max_score = fmaxf(max_score, y);
        if constexpr (A::kOnline) {
            float log_a = x + fade - factor, a = expf(log_a);
            recent[kEntropy] -= a * log_a;
            add_to_rest<A>(recent, a > largest ? largest : a, 1.0f, 1.0f);
            largest = fmaxf(largest, a);
        } else {
            float a, da;
            A::weighted(a, da, x, fade * factor, keys, DeviceMath());
            if constexpr (A::kPower > 0) recent[kMoment] += A::value(x2, keys, DeviceMath());
            recent[kAbsolute] += fabsf(a);
            recent[kNegative] += fmaxf(-a, 0.0f);
            recent[kSquare] += a * a;
            max_weight = fmaxf(max_weight, fabsf(a));
            if constexpr (kRowSum) {
                bool larger = fabsf(a) > largest_share;
                add_to_rest<A>(recent, larger ? largest : y, larger ? largest_fade : fade, factor);
                if (larger) largest = y, largest_fade = fade, largest_share = fabsf(a);
            } else {
                recent[kSlope] += da * da;
            }
        }
    }

    __device__ void flush() {
#pragma unroll
        for (int n = 0; n < kRowSums; n++) {
            total[n] += recent[n];
            recent[n] = 0;
        }
    }

    // Adds up what the lanes that share the row have summed. The first of them gets the result.
    __device__ void gather(int lanes, float factor) {
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
            auto other = [=](auto x) { return from_lane_xor(x, offset); };
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

// The gate of token i, which is row `row` of its tile.
__device__ inline double gate_of_row(const GatedShape& shape, int i, int row) {
    const float2* prefix = shape.gate.prefix + (size_t)blockIdx.x * shape.T + i;
    return exp2(row == 0 ? (double)prefix[0].x + prefix[0].y
                         : ((double)prefix[0].x - prefix[-1].x) + ((double)prefix[0].y - prefix[-1].y));
}

// Joins a number of two NormSums. Its numbers are sums, except the last ones, which are maxima.
__device__ inline double joined(int number, double a, double b) {
    return number < kNumbers - kMaxima ? a + b : fmax(a, b);
}

// Blocks: (B H, tiles of queries). The last tiles come first, because they take longest.
//   c_factor: the factor that turns a row factor into c_i
template <class Real, class A, bool kRowSum>
__global__ __launch_bounds__(kAttentionThreads,
                             3) void attention_norms_kernel(NormSums* parts /*(H,B,tiles)*/, const Real* qkv,
                                                            const float* stats, float c_factor,
                                                            ShapeOf<A> shape) {
    using Tiles = NormTile<Real>;
    __shared__ __align__(16) Real q[Tiles::kSize], k[Tiles::kSize];
    __shared__ double row_norms[Tiles::kRows][kNumbers];  // a NormSums for each row
    const int T = shape.T, D = shape.D, C = shape.C();
    const int b = blockIdx.x / shape.H, h = blockIdx.x % shape.H;
    const int tile = gridDim.y - 1 - blockIdx.y, i0 = tile * Tiles::kRows;
    const size_t stride = 3 * (size_t)C, table = shape.template table<A>(blockIdx.x, h);
    const Real* head = qkv + b * T * stride + h * D;
    const float log_gamma = A::kOnline && shape.has_decay ? shape.tables.log_gamma[h] : 0;

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
            factor[r] = shape.tables.row_factor[table + i] * c_factor;
        }
    }
    RowNorms<A, kRowSum> rows[2];
    for (int j0 = 0, keys = 0; j0 <= i0; j0 += Tiles::kRows) {
        __syncthreads();
        Tiles::load(k, head + j0 * stride + C, stride, T - j0, D);
        __syncthreads();
        float s[2][Tiles::kKeys];
        Tiles::scores(s, q, k, D);
        const TileGates<A> gates(shape, tile, j0 / Tiles::kRows);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int i = i0 + Tiles::row(r), nearest = i < T ? i - j0 : -1;  // the last key that it sees
#pragma unroll
            for (int m = 0; m < Tiles::kKeys; m++) {
                const int distance = nearest - Tiles::key(m);
                if (distance < 0) continue;
                float fade = A::kOnline        ? distance * log_gamma
                             : shape.has_decay ? shape.tables.fade[table + distance]
                                               : 1.0f;
                if constexpr (kGated<A>) {
                    fade = gates(i, i - distance);
                    if (A::kOnline) fade *= 1 / kLog2e;
                }
                rows[r].add(s[r][m] * shape.qk_to_score, fade, factor[r], i + 1.0f);
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
        if (threadIdx.x % Tiles::kLanes != 0) continue;
        const int row = Tiles::row(r), i = i0 + row;
        NormSums sums = i < T ? rows[r].finish(factor[r]) : NormSums();
        if constexpr (kGated<A>)
            if (i < T) sums.gate = gate_of_row(shape, i, row);
        *reinterpret_cast<NormSums*>(row_norms[row]) = sums;
    }
    __syncthreads();
    if (threadIdx.x >= kNumbers) return;
    double total = 0;
    for (const auto& row : row_norms) total = joined(threadIdx.x, total, row[threadIdx.x]);
    NormSums* part = parts + ((size_t)h * (gridDim.x / shape.H) + b) * gridDim.y + tile;
    reinterpret_cast<double*>(part)[threadIdx.x] = total;
}

// Adds up the parts of a head. Blocks: (numbers of NormSums, H), of one warp.
static __global__ void add_norms_kernel(NormSums* sums, const NormSums* parts /*(H,count)*/, int count) {
    const int number = blockIdx.x, h = blockIdx.y;
    const double* part = reinterpret_cast<const double*>(parts + (size_t)h * count);
    double total = 0;
    for (int i = threadIdx.x; i < count; i += kWarp)
        total = joined(number, total, part[(size_t)i * kNumbers + number]);
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        total = joined(number, total, from_lane_xor(total, offset));
    if (threadIdx.x == 0) reinterpret_cast<double*>(sums + h)[number] = total;
}

size_t attention_norms_scratch(int B, int T, int H, bool gates) {
    size_t tiles =
        (size_t)B * H * ceil_div(T, kFloatTile);  // of the two sizes of tiles the one that gives more
    return tiles * sizeof(NormSums) / sizeof(float) + LayerTables::size(T, H, gates ? B : 0);
}

template <class Real>
void attention_norms(NormSums* sums,      // (H)
                     float* scratch,      // (attention_norms_scratch)
                     const Real* qkv,     // (B,T,3C), as attention_forward read it
                     const float* stats,  // as attention_forward left them; may be null if stats_size is 0
                     const Decay& decay, const AttentionConfig& config, int B, int T, int H, int D,
                     cudaStream_t stream) {
    if (D > 128) fail("attention: head size ", D, ", the CUDA kernels go up to 128");
    int tiles = ceil_div(T, attention_tile<Real>);
    NormSums* parts = reinterpret_cast<NormSums*>(scratch);
    LayerTables tables(reinterpret_cast<float*>(parts + (size_t)B * H * tiles), decay, config, B, T, H,
                       attention_tile<Real>);
    make_tables(tables, decay, config, B, T, H, D, attention_tile<Real>, stream);
    const auto shape = attention_shape(config, decay, T, H, D, tables, {});
    float c_factor = (float)std::pow((double)D, 0.5 * config.power());
    auto launch = [&]<class A>(A) {
        auto* kernel = &attention_norms_kernel<Real, A, false>;
        if constexpr (A::kPower > 0)
            if (config.has_row_sum()) kernel = &attention_norms_kernel<Real, A, true>;
        kernel<<<dim3(B * H, tiles), kAttentionThreads, 0, stream>>>(parts, qkv, stats, c_factor, shape);
        check_launch();
    };
    if (decay.log_f) {
        with_activation<true>(config.kind, launch);
    } else {
        with_activation<false>(config.kind, launch);
    }
    add_norms_kernel<<<dim3(kNumbers, H), kWarp, 0, stream>>>(sums, parts, B * tiles);
    check_launch();
}

template void attention_norms(NormSums*, float*, const float*, const float*, const Decay&,
                              const AttentionConfig&, int, int, int, int, cudaStream_t);
template void attention_norms(NormSums*, float*, const bf16*, const float*, const Decay&,
                              const AttentionConfig&, int, int, int, int, cudaStream_t);

}  // namespace gpu
