// Defines the functions of state.h.
#include "llmc/cuda/attention/state.h"

#include "llmc/attention_scale.h"
#include "llmc/cuda/attention/features.h"
#include "llmc/cuda/reduce.h"

namespace gpu {

constexpr int kStateThreads = 128;
constexpr int kStateTokens = 16;  // whose outputs one launch computes, so that scratch has a fixed size

size_t attention_state_scratch(int power, int H, int D) {
    return (size_t)kStateTokens * H * feature_tiles(power, D) * (D + 1);
}

// A block keeps a tile of a head's state in registers while it goes through the tokens. A warp has 16
// features, and a lane their columns lane, lane + 32 and so on. Blocks: (tiles, H).
template <int P, int kD, class Real>
__global__ void attention_state_kernel(
    float* shares,       // (n,H,tiles,D+1): of o, and of the sum of the weights; or null
    float* state,        // (H,state_size)
    const Real* q,       // n rows; null if shares is null
    const Real* k,       // n rows; v follows at C
    const float* decay,  // (H), or null
    const float* log_f,  // of the first head's first token, or null; log_f_stride from one head to the next
    int log_f_stride, int stride, int n, int H, int D, int blocks) {
    constexpr int kWarps = kStateThreads / kWarp, kRows = kFeatures / kWarps, kColumns = kD / kWarp;
    __shared__ float channels[2][kStateThreads];  // of k and of q, followed by zeros
    __shared__ float phi[2][kFeatures];
    __shared__ float o_shares[kWarps][kD], totals[kFeatures];
    const int tiles = gridDim.x, h = blockIdx.y, thread = threadIdx.x, warp = thread / kWarp,
              lane = thread % kWarp;
    const auto tile = FeatureTile<P>::at(blockIdx.x, blocks);
    // The fade of one token in two parts. Over thousands of tokens with a fade near 1, what a float leaves
    // out of it would add up.
    float fade, fade_rest;
    auto set_fade = [&](double f) { fade = (float)f, fade_rest = (float)(f - fade); };
    set_fade(decay ? exp(log_gamma(decay[h])) : 1);
    float* s = state + ((size_t)h * tiles + blockIdx.x) * kFeatures * D + h * tiles * kFeatures;
    float* z = state + ((size_t)h * (D + 1) + D) * tiles * kFeatures + blockIdx.x * kFeatures;
    auto for_each_number = [&](auto f) {
#pragma unroll
        for (int i = 0; i < kRows; i++)
#pragma unroll
            for (int m = 0; m < kColumns; m++)
                if (lane + m * kWarp < D) f(i, m, (warp * kRows + i) * D + lane + m * kWarp);
    };
    float sums[kRows][kColumns] = {}, z_sum = thread < kFeatures ? z[thread] : 0;
    for_each_number([&](int i, int m, int at) { sums[i][m] = s[at]; });
    for (int t = 0; t < n; t++) {
        const size_t at = (size_t)t * stride + h * D + thread;
        channels[0][thread] = thread < D ? to_float(k[at]) : 0;
        channels[1][thread] = q && thread < D ? to_float(q[at]) * rsqrtf((float)D) : 0;
        __syncthreads();
        const int is_q = thread / kFeatures, f = thread % kFeatures;
        const float product = tile.product(f, [&](int c) { return channels[is_q][c]; });
        phi[is_q][f] = is_q ? product * tile.multiplicity() : product;
        __syncthreads();
        float o[kColumns] = {}, v[kColumns] = {};
        for (int m = 0; m < kColumns; m++)
            if (lane + m * kWarp < D)
                v[m] = to_float(k[(size_t)t * stride + H * D + h * D + lane + m * kWarp]);
        if (log_f) set_fade(exp((double)log_f[(size_t)h * log_f_stride + t]));
        for_each_number([&](int i, int m, int) {
            sums[i][m] = fade * sums[i][m] + (fade_rest * sums[i][m] + phi[0][warp * kRows + i] * v[m]);
            o[m] += phi[1][warp * kRows + i] * sums[i][m];
        });
        if (thread < kFeatures) z_sum = fade * z_sum + (fade_rest * z_sum + phi[0][thread]);
        if (!shares) continue;
        for (int m = 0; m < kColumns; m++) o_shares[warp][lane + m * kWarp] = o[m];
        if (thread < kFeatures) totals[thread] = phi[1][thread] * z_sum;
        __syncthreads();
        float* to = shares + (((size_t)t * H + h) * tiles + blockIdx.x) * (D + 1);
        float sum = 0;
        if (thread < D)
            for (int w = 0; w < kWarps; w++) sum += o_shares[w][thread];
        if (thread < D) to[thread] = sum;
        if (warp == 0) {
            sum = warp_sum(totals[lane] + totals[lane + kWarp]);
            if (lane == 0) to[D] = sum;
        }
    }
    for_each_number([&](int i, int m, int at) { s[at] = sums[i][m]; });
    if (thread < kFeatures) z[thread] = z_sum;
}

// Adds up the shares of the tiles. Blocks: (n,H).
template <class Real>
__global__ void attention_state_rows(Real* out, const float* shares, const float* row_scale, bool has_row_sum,
                                     int tiles, int H, int D) {
    const int t = blockIdx.x, h = blockIdx.y, d = threadIdx.x;
    const float* row = shares + ((size_t)t * H + h) * tiles * (D + 1);
    double total = 0;  // double, because it has thousands of terms, the largest first
    float o = 0;
    for (int tile = 0; tile < tiles; tile++) {
        if (d < D) o += row[tile * (D + 1) + d];
        if (has_row_sum) total += row[tile * (D + 1) + D];
    }
    float factor = has_row_sum ? (float)(1 / (total + kRowSumEps)) : row_scale[t * H + h];
    if (d < D) out[((size_t)t * H + h) * D + d] = from_float<Real>(o * factor);
}

template <class Real>
void launch_state_kernel(float* shares, float* state, const Real* q, const Real* k, const Decay& decay,
                         int log_f_stride, AttentionKind kind, int stride, int n, int H, int D,
                         cudaStream_t stream) {
    with_linear_power(kind, [&](auto power) {
        constexpr int P = power;
        auto *kernel = attention_state_kernel < P, P == 3 ? 32 : 64, Real > ;
        if constexpr (P < 3)
            if (D > 64) kernel = attention_state_kernel<P, 128, Real>;
        kernel<<<dim3(feature_tiles(P, D), H), kStateThreads, 0, stream>>>(
            shares, state, q, k, decay.delta, decay.log_f, log_f_stride, stride, n, H, D,
            ceil_div(D, feature_block(P)));
        check_launch();
    });
}

template <class Real>
void attention_state_forward(Real* out,        // (n,C)
                             float* state,     // (H,state_size)
                             float* scratch,   // (attention_state_scratch)
                             const Real* qkv,  // (n,3C)
                             const Decay& decay,
                             const float* row_scale,  // (n,H)
                             const AttentionConfig& config, int n, int H, int D, cudaStream_t stream) {
    const int C = H * D, tiles = feature_tiles(config.power(), D);
    for (int t = 0; t < n; t += kStateTokens) {
        int count = std::min(kStateTokens, n - t);
        const Real* rows = qkv + (size_t)t * 3 * C;
        Decay here = decay;
        if (decay.log_f) here.log_f += t;
        launch_state_kernel(scratch, state, rows, rows + C, here, n, config.kind, 3 * C, count, H, D, stream);
        attention_state_rows<<<dim3(count, H), kStateThreads, 0, stream>>>(
            out + (size_t)t * C, scratch, row_scale + (size_t)t * H, config.has_row_sum(), tiles, H, D);
        check_launch();
    }
}

template <class Real>
void attention_state_of_cache(float* state,       // (H,state_size)
                              const Real* cache,  // (n,2C)
                              const Decay& decay, const AttentionConfig& config, int n, int H, int D,
                              cudaStream_t stream) {
    launch_state_kernel<Real>(nullptr, state, nullptr, cache, decay, n, config.kind, 2 * H * D, n, H, D,
                              stream);
}

template void attention_state_forward(float*, float*, float*, const float*, const Decay&, const float*,
                                      const AttentionConfig&, int, int, int, cudaStream_t);
template void attention_state_forward(bf16*, float*, float*, const bf16*, const Decay&, const float*,
                                      const AttentionConfig&, int, int, int, cudaStream_t);
template void attention_state_of_cache(float*, const float*, const Decay&, const AttentionConfig&, int, int,
                                       int, cudaStream_t);
template void attention_state_of_cache(float*, const bf16*, const Decay&, const AttentionConfig&, int, int,
                                       int, cudaStream_t);

}  // namespace gpu
