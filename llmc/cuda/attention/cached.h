// Attention of a few new tokens to all before them, whose keys and values are kept: generation. The formulas
// are those of attention.h; a token costs O(T), and its output is that of attention_forward to rounding.
#pragma once
#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/cuda/reduce.h"

namespace gpu {

// A block a query and head. Scores go through global memory, because a row may be of any length.
template <class A, class Real>
__global__ void attention_cached_kernel(Real* out, float* scores, const Real* qkv, const Real* cache,
                                        const float* decay, const float* row_scale, bool row_sum, int start,
                                        int length, int H, int D) {
    __shared__ float shared[kWarp];
    int t = blockIdx.x, h = blockIdx.y, C = H * D, i = start + t, thread = threadIdx.x;
    float* a = scores + ((size_t)t * H + h) * length;
    const Real* q = qkv + (size_t)t * 3 * C + h * D;
    float inverse_sqrt = rsqrtf((float)D);
    float log_g = decay ? (float)log_gamma(decay[h]) : 0.0f;
    float largest = -INFINITY, total = 0;
    for (int j = thread; j <= i; j += blockDim.x) {
        const Real* k = cache + (size_t)j * 2 * C + h * D;
        float dot = 0;
        for (int d = 0; d < D; d++) dot += to_float(q[d]) * to_float(k[d]);
        float x = dot * inverse_sqrt, distance = (float)(i - j);
        if constexpr (A::kOnline) {
            x += distance * log_g;
            largest = fmaxf(largest, x);
        } else {
            x = A::value(x, i + 1.0f, DeviceMath());
            x *= expf(distance * log_g);
            total += fabsf(x);
        }
        a[j] = x;
    }
    if (A::kOnline) {
        largest = block_max(largest, shared);
        __syncthreads();
        for (int j = thread; j <= i; j += blockDim.x) total += a[j] = expf(a[j] - largest);
    }
    total = block_sum(total, shared);  // whose barrier is also between the scores and those who read them
    float scale = A::kOnline ? 1.0f / total
                  : row_sum  ? 1.0f / (total + (float)kRowSumEps)
                             : row_scale[t * H + h];
    for (int d = thread; d < D; d += blockDim.x) {
        float sum = 0;
        for (int j = 0; j <= i; j++) sum += a[j] * to_float(cache[(size_t)j * 2 * C + C + h * D + d]);
        out[(size_t)t * C + h * D + d] = from_float<Real>(sum * scale);
    }
}

// scores (n,H,start+n) is scratch. row_scale (n,H): c_i of the new rows, read only for the scales row,
// context, mean and a constant.
template <class Real>
inline void attention_cached_forward(Real* out,        // (n,C)
                                     float* scores,    // (n,H,start+n)
                                     const Real* qkv,  // (n,3C): of tokens start .. start+n-1; only q is read
                                     const Real* cache,       // (start+n,2C): k and v of every token so far
                                     const float* decay,      // (H), or null
                                     const float* row_scale,  // (n,H)
                                     const AttentionConfig& config, int start, int n, int H, int D,
                                     cudaStream_t stream) {
    with_activation(config.kind, [&]<class A>(A) {
        attention_cached_kernel<A><<<dim3(n, H), 128, 0, stream>>>(
            out, scores, qkv, cache, decay, row_scale, config.has_row_sum(), start, start + n, H, D);
        check_launch();
    });
}

}  // namespace gpu
