// Defines the function of cached.h.
#include "llmc/cuda/attention/cached.h"

#include "llmc/attention_scale.h"
#include "llmc/cuda/reduce.h"

namespace gpu {

// A block takes a query and head. The scores go through global memory, because a row may have any length.
template <class A, class Real>
__global__ void attention_cached_kernel(Real* out, float* scores, const Real* qkv, const Real* cache,
                                        const float* decay, const double* gate_sums, const float* row_scale,
                                        bool has_row_sum, int start, int length, int H, int D) {
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
        float x = dot * qk_to_score, log_fade = (float)(i - j) * log_g;
        if (gate_sums) log_fade = (float)(gate_sums[(size_t)i * H + h] - gate_sums[(size_t)j * H + h]);
        if constexpr (A::kOnline) {
            x += log_fade;
            largest = fmaxf(largest, x);
        } else {
            x = A::value(x, i + 1.0f, DeviceMath());
            x *= expf(log_fade);
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

// A thread takes a head.
//   factor: the part of c_i that all rows share; kind: how c_i depends on the row
template <int kThreads = kWarp>
__global__ void cached_gates_kernel(double* gate_sums, double* row_lengths, float* row_scale,
                                    const float* log_f, ScaleKind kind, double factor, int start, int n,
                                    int H) {
    const int h = blockIdx.x * kThreads + threadIdx.x;
    if (h >= H) return;
    double sum = gate_sums && start > 0 ? gate_sums[(size_t)(start - 1) * H + h] : 0;
    double length = start > 0 ? row_lengths[h] : 0;
    for (int t = 0; t < n; t++) {
        const double log_gate = log_f[(size_t)h * n + t];
        if (gate_sums) gate_sums[(size_t)(start + t) * H + h] = sum += log_gate;
        length = 1 + exp(2 * log_gate) * length;
        row_scale[(size_t)t * H + h] = (float)(kind == ScaleKind::row    ? factor / sqrt(length)
                                               : kind == ScaleKind::mean ? factor / (start + t + 1)
                                                                         : factor);
    }
    row_lengths[h] = length;
}

void cached_gates(double* gate_sums,    // (start+n,H), or null
                  double* row_lengths,  // (H)
                  float* row_scales,    // (n,H)
                  const float* log_f,   // (H,n)
                  const AttentionConfig& config, int start, int n, int H, int D, cudaStream_t stream) {
    const bool by_row =
        config.polynomial() && (config.scale == ScaleKind::row || config.scale == ScaleKind::mean);
    // The factor is c_0.
    cached_gates_kernel<><<<ceil_div(H, kWarp), kWarp, 0, stream>>>(
        gate_sums, row_lengths, row_scales, log_f, by_row ? config.scale : ScaleKind::constant,
        row_scale(config, 0, 0, D), start, n, H);
    check_launch();
}

template <int kThreads = 128>
__global__ void gates_of_sums_kernel(float* log_f, const double* gate_sums, int n, int H) {
    const int t = blockIdx.x * kThreads + threadIdx.x, h = blockIdx.y;
    if (t >= n) return;
    const double* sum = gate_sums + (size_t)t * H + h;
    log_f[(size_t)h * n + t] = (float)(t > 0 ? *sum - *(sum - H) : *sum);
}

void gates_of_sums(float* log_f, const double* gate_sums, int n, int H, cudaStream_t stream) {
    gates_of_sums_kernel<><<<dim3(ceil_div(n, 128), H), 128, 0, stream>>>(log_f, gate_sums, n, H);
    check_launch();
}

template <class Real>
void attention_cached_forward(Real* out,               // (n,C)
                              float* scores,           // (n,H,start+n), scratch
                              const Real* qkv,         // (n,3C)
                              const Real* cache,       // (start+n,2C)
                              const float* decay,      // (H): delta, or null
                              const float* row_scale,  // (n,H)
                              const AttentionConfig& config, int start, int n, int H, int D,
                              cudaStream_t stream, const double* gate_sums) {
    with_activation(config.kind, [&]<class A>(A) {
        attention_cached_kernel<A><<<dim3(n, H), 128, 0, stream>>>(out, scores, qkv, cache, decay, gate_sums,
                                                                   row_scale, config.has_row_sum(), start,
                                                                   start + n, H, D);
        check_launch();
    });
}

template void attention_cached_forward(float*, float*, const float*, const float*, const float*, const float*,
                                       const AttentionConfig&, int, int, int, int, cudaStream_t,
                                       const double*);
template void attention_cached_forward(bf16*, float*, const bf16*, const bf16*, const float*, const float*,
                                       const AttentionConfig&, int, int, int, int, cudaStream_t,
                                       const double*);

}  // namespace gpu
