// Attention of a new token to all before it through a state of fixed size: the twin of
// llmc/cpu/attention_state.h. It is float32 whatever the model computes in, for its sums grow with the text.
//
// The features are those of linear.h, in tiles of 64. The state of a head: sum_j gamma^(i-j)
// phi(k_j) v_j^T (features,D), then, for `sum`, sum_j gamma^(i-j) phi(k_j) (features). A block has a tile of
// a head, in its registers while it goes through the tokens.
#pragma once
#include "llmc/attention_linear_form.h"
#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/cuda/attention/features.h"
#include "llmc/cuda/reduce.h"

namespace gpu {

inline size_t state_size(int power, int D) {  // floats a head
    return (size_t)feature_tiles(power, D) * kFeatures * (D + 1);
}

// The tokens at which a state is smaller than keys and values, and its update cheaper than a pass over them.
inline int state_pays_from(int power, int D) {
    return feature_tiles(power, D) * kFeatures;
}

constexpr int kStateThreads = 128;
constexpr int kStateTokens = 16;  // between two passes over the state in memory

// Floats in the scratch buffer of attention_state_forward.
inline size_t attention_state_scratch(int power, int H, int D) {
    return (size_t)kStateTokens * H * feature_tiles(power, D) * (D + 1);
}

// A warp has 16 features, a lane columns lane, lane + 32 and so on of them. Blocks: (tiles, H).
template <int P, int kD, class Real>
__global__ void attention_state_kernel(float* shares,       // (n,H,tiles,D+1): of o and of the total; or null
                                       float* state,        // (H,state_size)
                                       const Real* q,       // n rows; null without shares
                                       const Real* k,       // n rows; v is C further on
                                       const float* decay,  // (H), or null
                                       int stride, int n, int H, int D, int blocks) {
    constexpr int kWarps = kStateThreads / kWarp, kOwn = kFeatures / kWarps, kColumns = kD / kWarp;
    __shared__ float channels[2][kStateThreads];  // of k and of q, with zeros behind them
    __shared__ float phi[2][kFeatures];
    __shared__ float o_of_warps[kWarps][kD], totals[kFeatures];
    const int tiles = gridDim.x, h = blockIdx.y, thread = threadIdx.x, warp = thread / kWarp,
              lane = thread % kWarp;
    const auto tile = FeatureTile<P>::at(blockIdx.x, blocks);
    const float gamma = decay ? (float)(1 / (1 + exp(-(double)decay[h]))) : 1;
    float* s = state + ((size_t)h * tiles + blockIdx.x) * kFeatures * D + h * tiles * kFeatures;
    float* z = state + ((size_t)h * (D + 1) + D) * tiles * kFeatures + blockIdx.x * kFeatures;
    auto for_own = [&](auto f) {
#pragma unroll
        for (int i = 0; i < kOwn; i++)
#pragma unroll
            for (int m = 0; m < kColumns; m++)
                if (lane + m * kWarp < D) f(i, m, (warp * kOwn + i) * D + lane + m * kWarp);
    };
    float sums[kOwn][kColumns] = {}, z_sum = thread < kFeatures ? z[thread] : 0;
    for_own([&](int i, int m, int at) { sums[i][m] = s[at]; });
    for (int t = 0; t < n; t++) {
        const size_t at = (size_t)t * stride + h * D + thread;
        channels[0][thread] = thread < D ? to_float(k[at]) : 0;
        channels[1][thread] = q && thread < D ? to_float(q[at]) * rsqrtf((float)D) : 0;
        __syncthreads();
        const int of_q = thread / kFeatures, f = thread % kFeatures;
        const float product = tile.product(f, [&](int c) { return channels[of_q][c]; });
        phi[of_q][f] = of_q ? product * tile.multiplicity() : product;
        __syncthreads();
        float o[kColumns] = {}, v[kColumns] = {};
        for (int m = 0; m < kColumns; m++)
            if (lane + m * kWarp < D)
                v[m] = to_float(k[(size_t)t * stride + H * D + h * D + lane + m * kWarp]);
        for_own([&](int i, int m, int) {
            sums[i][m] = gamma * sums[i][m] + phi[0][warp * kOwn + i] * v[m];
            o[m] += phi[1][warp * kOwn + i] * sums[i][m];
        });
        if (thread < kFeatures) z_sum = gamma * z_sum + phi[0][thread];
        if (!shares) continue;
        for (int m = 0; m < kColumns; m++) o_of_warps[warp][lane + m * kWarp] = o[m];
        if (thread < kFeatures) totals[thread] = phi[1][thread] * z_sum;
        __syncthreads();
        float* to = shares + (((size_t)t * H + h) * tiles + blockIdx.x) * (D + 1);
        float sum = 0;
        if (thread < D)
            for (int w = 0; w < kWarps; w++) sum += o_of_warps[w][thread];
        if (thread < D) to[thread] = sum;
        if (warp == 0) {
            sum = warp_sum(totals[lane] + totals[lane + kWarp]);
            if (lane == 0) to[D] = sum;
        }
    }
    for_own([&](int i, int m, int at) { s[at] = sums[i][m]; });
    if (thread < kFeatures) z[thread] = z_sum;
}

// Adds up what the tiles gave. Blocks: (n,H).
template <class Real>
__global__ void attention_state_rows(Real* out, const float* shares, const float* row_scale, bool row_sum,
                                     int tiles, int H, int D) {
    const int t = blockIdx.x, h = blockIdx.y, d = threadIdx.x;
    const float* of_row = shares + ((size_t)t * H + h) * tiles * (D + 1);
    double total = 0;  // of thousands of terms, whose largest come first
    float o = 0;
    for (int tile = 0; tile < tiles; tile++) {
        if (d < D) o += of_row[tile * (D + 1) + d];
        if (row_sum) total += of_row[tile * (D + 1) + D];
    }
    float scale = row_sum ? (float)(1 / (total + kRowSumEps)) : row_scale[t * H + h];
    if (d < D) out[((size_t)t * H + h) * D + d] = from_float<Real>(o * scale);
}

template <class Real>
inline void launch_state_kernel(float* shares, float* state, const Real* q, const Real* k, const float* decay,
                                AttentionKind kind, int stride, int n, int H, int D, cudaStream_t stream) {
    with_linear_power(kind, [&](auto power) {
        constexpr int P = power;
        auto *kernel = attention_state_kernel < P, P == 3 ? 32 : 64, Real > ;
        if constexpr (P < 3)
            if (D > 64) kernel = attention_state_kernel<P, 128, Real>;
        kernel<<<dim3(feature_tiles(P, D), H), kStateThreads, 0, stream>>>(
            shares, state, q, k, decay, stride, n, H, D, ceil_div(D, feature_block(P)));
        check_launch();
    });
}

// Tokens start .. start+n-1, which go into the state and see each other through it. Kinds of attention:
// has_linear_form(). row_scale (n,H): c_i of the new rows; `sum` does not read it.
template <class Real>
inline void attention_state_forward(Real* out,               // (n,C)
                                    float* state,            // (H,state_size)
                                    float* scratch,          // (attention_state_scratch)
                                    const Real* qkv,         // (n,3C)
                                    const float* decay,      // (H), or null
                                    const float* row_scale,  // (n,H)
                                    const AttentionConfig& config, int n, int H, int D, cudaStream_t stream) {
    const int C = H * D, tiles = feature_tiles(config.power(), D);
    for (int t = 0; t < n; t += kStateTokens) {
        int count = std::min(kStateTokens, n - t);
        const Real* rows = qkv + (size_t)t * 3 * C;
        launch_state_kernel(scratch, state, rows, rows + C, decay, config.kind, 3 * C, count, H, D, stream);
        attention_state_rows<<<dim3(count, H), kStateThreads, 0, stream>>>(
            out + (size_t)t * C, scratch, row_scale + (size_t)t * H, config.has_row_sum(), tiles, H, D);
        check_launch();
    }
}

// The same for tokens whose outputs nobody wants, from the keys and values that were kept of them.
template <class Real>
inline void attention_state_of_cache(float* state,        // (H,state_size)
                                     const Real* cache,   // (n,2C)
                                     const float* decay,  // (H), or null
                                     const AttentionConfig& config, int n, int H, int D,
                                     cudaStream_t stream) {
    launch_state_kernel<Real>(nullptr, state, nullptr, cache, decay, config.kind, 2 * H * D, n, H, D, stream);
}

}  // namespace gpu
