// Defines the function of cached.h.
#include "llmc/cuda/attention/cached.h"

#include "llmc/attention_scale.h"
#include "llmc/cuda/reduce.h"

namespace gpu {

// A block takes a query and head. The scores go through global memory, because a row may have any length.
template <class A, class Real>
__global__ void attention_cached_kernel(Real* out, float* scores, const Real* qkv, const Real* cache,
                                        const float* decay, const float* row_scale, bool has_row_sum,
                                        int start, int length, int H, int D) {
    __shared__ float warp_results[kWarp];
    int t = blockIdx.x, h = blockIdx.y, C = H * D, i = start + t, thread = threadIdx.x;
    float* a = scores + ((size_t)t * H + h) * length;
    const Real* q = qkv + (size_t)t * 3 * C + h * D;
    float qk_to_score = rsqrtf((float)D);
    float log_g = decay ? (float)log_gamma(decay[h]) : 0.0f;
    float largest = -INFINITY, total = 0;
    for (int j = thread; j <= i; j += blockDim.x) {
        const Real* k = cache + (size_t)j * 2 * C + h * D;
        float dot = 0;
        for (int d = 0; d < D; d++) dot += to_float(q[d]) * to_float(k[d]);
        float x = dot * qk_to_score, distance = (float)(i - j);
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
        largest = block_max(largest, warp_results);
        __syncthreads();
        for (int j = thread; j <= i; j += blockDim.x) total += a[j] = expf(a[j] - largest);
    }
    total = block_sum(total, warp_results);  // its barrier also makes the scores visible to all threads
    float factor = A::kOnline    ? 1.0f / total
                   : has_row_sum ? 1.0f / (total + (float)kRowSumEps)
                                 : row_scale[t * H + h];
    for (int d = thread; d < D; d += blockDim.x) {
        float sum = 0;
        for (int j = 0; j <= i; j++) sum += a[j] * to_float(cache[(size_t)j * 2 * C + C + h * D + d]);
        out[(size_t)t * C + h * D + d] = from_float<Real>(sum * factor);
    }
}

template <class Real>
void attention_cached_forward(Real* out,               // (n,C)
                              float* scores,           // (n,H,start+n), scratch
                              const Real* qkv,         // (n,3C)
                              const Real* cache,       // (start+n,2C)
                              const float* decay,      // (H): delta, or null
                              const float* row_scale,  // (n,H)
                              const AttentionConfig& config, int start, int n, int H, int D,
                              cudaStream_t stream) {
    with_activation(config.kind, [&]<class A>(A) {
        attention_cached_kernel<A><<<dim3(n, H), 128, 0, stream>>>(
            out, scores, qkv, cache, decay, row_scale, config.has_row_sum(), start, start + n, H, D);
        check_launch();
    });
}

template void attention_cached_forward(float*, float*, const float*, const float*, const float*, const float*,
                                       const AttentionConfig&, int, int, int, int, cudaStream_t);
template void attention_cached_forward(bf16*, float*, const bf16*, const bf16*, const float*, const float*,
                                       const AttentionConfig&, int, int, int, int, cudaStream_t);

}  // namespace gpu
