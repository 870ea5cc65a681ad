// Defines the functions of attention.h: they choose a kernel, its blocks and its shared memory.
#include "llmc/cuda/attention/attention.h"

#include "llmc/cuda/attention/launch.h"

namespace gpu {

// gated.cu defines these.
extern template void launch_forward<true>(float*, float*, float*, const float*, const GatedShape&,
                                          AttentionKind, dim3, cudaStream_t);
extern template void launch_forward<true>(bf16*, float*, float*, const bf16*, const GatedShape&,
                                          AttentionKind, dim3, cudaStream_t);
extern template void launch_backward<true>(float*, double*, const float*, const float*, const float*,
                                           const float*, const GatedShape&, AttentionKind, dim3,
                                           cudaStream_t);
extern template void launch_backward<true>(bf16*, double*, const bf16*, const float*, const float*,
                                           const bf16*, const GatedShape&, AttentionKind, dim3, cudaStream_t);

// Rounds up, so that doubles may follow.
static size_t even(size_t floats) {
    return floats + floats % 2;
}

size_t attention_forward_scratch(int T, int H, int gates) {
    return LayerTables::size(T, H, gates);
}

size_t attention_backward_scratch(int B, int T, int H, bool gates) {
    size_t tiles = ceil_div(T, kFloatTile);  // of the two sizes of tiles the one that gives more
    return even(2 * tiles * B * H + (size_t)T * B * H) + LayerTables::size(T, H, gates ? B : 0);
}

// Computes dO_i . O_i, which only softmax and the scale `sum` need. Eight lanes share a row.
template <class Real, class Out>
__global__ void attention_dots(float* dot,        // (B,H,T)
                               const Real* dout,  // (B,T,C)
                               const Out* out,    // (B,T,C)
                               int rows, int T, int H, int D) {
    int index = (blockIdx.x * blockDim.x + threadIdx.x) / 8;  // of dot, so that neighbours store side by side
    int bh = index / T, head = bh % H;
    const size_t row = (((size_t)(bh / H) * T + index % T) * H + head) * D;
    // 16 bytes of the wider type. With the scale `sum`, out lies behind the sums of the rows, at any 4-byte
    // address.
    constexpr int kWidth = 16 / (sizeof(Real) > sizeof(Out) ? sizeof(Real) : sizeof(Out));
    const bool packs = D % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    float sum = 0;
    for (int c = threadIdx.x % 8 * kWidth; index < rows && c < D; c += 8 * kWidth) {
        if (packs) {
            Vec<kWidth> x = load_vec<kWidth>(dout + row + c), y = load_vec<kWidth>(out + row + c);
#pragma unroll
            for (int e = 0; e < kWidth; e++) sum += x[e] * y[e];
        } else {
            for (int e = 0; e < kWidth && c + e < D; e++)
                sum += to_float(dout[row + c + e]) * to_float(out[row + c + e]);
        }
    }
    sum = reduce_lanes<Sum, 4, 2, 1>(sum);
    if (index < rows && threadIdx.x % 8 == 0) dot[index] = sum;
}

template <class Real>
void attention_forward(Real* out,        // (B,T,C)
                       float* stats,     // (stats_size)
                       float* scratch,   // (attention_forward_scratch)
                       const Real* qkv,  // (B,T,3C)
                       const Decay& decay, const AttentionConfig& config, int B, int T, int H, int D,
                       cudaStream_t stream, const AttentionSegments& segments) {
    constexpr int kTile = attention_tile<Real>;
    LayerTables tables(scratch, decay, config, B, T, H, kTile);
    if (!segments.length) make_tables(tables, decay, config, B, T, H, D, kTile, stream);
    const auto shape = attention_shape(config, decay, T, H, D, tables, segments);
    float* exact = keeps_exact_output<Real>(config) ? stats + (size_t)B * H * T : nullptr;
    dim3 grid(B * H, ceil_div(T, kTile));
    auto launch = decay.log_f ? launch_forward<true, Real> : launch_forward<false, Real>;
    launch(out, stats, exact, qkv, shape, config.kind, grid, stream);
}

// Divides scratch between them.
template <class Real>
AttentionBackwardTerms backward_terms(float* scratch, const Decay& decay, const AttentionConfig& config,
                                      int B, int T, int H) {
    constexpr int kTile = attention_tile<Real>;
    size_t shares = 2 * (size_t)ceil_div(T, kTile) * B * H, rows = (size_t)B * T * H;
    return {reinterpret_cast<double*>(scratch), scratch + shares,
            LayerTables(scratch + even(shares + rows), decay, config, B, T, H, kTile)};
}

template <class Real>
AttentionBackwardTerms attention_backward_terms(float* scratch,      // (attention_backward_scratch)
                                                const Real* dout,    // (B,T,C)
                                                const Real* out,     // (B,T,C)
                                                const float* stats,  // (stats_size)
                                                const Decay& decay, const AttentionConfig& config, int B,
                                                int T, int H, int D, cudaStream_t stream) {
    AttentionBackwardTerms terms = backward_terms<Real>(scratch, decay, config, B, T, H);
    make_tables(terms.tables, decay, config, B, T, H, D, attention_tile<Real>, stream);
    if (config.softmax() || config.has_row_sum()) {
        int rows = B * T * H, blocks = ceil_div(rows, 16);
        if (keeps_exact_output<Real>(config)) {
            attention_dots<<<blocks, 128, 0, stream>>>(terms.dot, dout, stats + rows, rows, T, H, D);
        } else {
            attention_dots<<<blocks, 128, 0, stream>>>(terms.dot, dout, out, rows, T, H, D);
        }
        check_launch();
    }
    return terms;
}

template <class Real>
void attention_backward(Real* dqkv,        // (B,T,3C)
                        float* ddecay,     // (H) +=, or null if it is not wanted; (B,H,T) of log f for gates
                        float* scratch,    // (attention_backward_scratch)
                        const Real* dout,  // (B,T,C)
                        const Real* out,   // (B,T,C)
                        const float* stats,  // (stats_size)
                        const Real* qkv,     // (B,T,3C)
                        const Decay& decay, const AttentionConfig& config, int B, int T, int H, int D,
                        cudaStream_t stream, const AttentionSegments& segments, const double* crossing) {
    AttentionBackwardTerms terms = backward_terms<Real>(scratch, decay, config, B, T, H);
    if (!segments.length)
        attention_backward_terms(scratch, dout, out, stats, decay, config, B, T, H, D, stream);
    double* dlog_gamma = ddecay && !decay.log_f ? terms.dlog_gamma : nullptr;
    const float* dot = terms.dot;
    const auto shape = attention_shape(config, decay, T, H, D, terms.tables, segments);
    int tiles = ceil_div(T, attention_tile<Real>);
    dim3 grid(B * H, tiles);
    auto launch = decay.log_f ? launch_backward<true, Real> : launch_backward<false, Real>;
    launch(dqkv, dlog_gamma, dout, stats, dot, qkv, shape, config.kind, grid, stream);
    if (dlog_gamma) add_decay_gradient(ddecay, dlog_gamma, decay.delta, B, tiles, H, stream);
    if (!decay.log_f) return;
    gate_gradient<><<<B * H, kGateThreads, 0, stream>>>(
        ddecay, shape.gate, decay.log_f, shape.tables.stride > 0, T, segments.length, crossing);
    check_launch();
}

template void attention_forward(float*, float*, float*, const float*, const Decay&, const AttentionConfig&,
                                int, int, int, int, cudaStream_t, const AttentionSegments&);
template void attention_forward(bf16*, float*, float*, const bf16*, const Decay&, const AttentionConfig&, int,
                                int, int, int, cudaStream_t, const AttentionSegments&);
template AttentionBackwardTerms attention_backward_terms(float*, const float*, const float*, const float*,
                                                         const Decay&, const AttentionConfig&, int, int, int,
                                                         int, cudaStream_t);
template AttentionBackwardTerms attention_backward_terms(float*, const bf16*, const bf16*, const float*,
                                                         const Decay&, const AttentionConfig&, int, int, int,
                                                         int, cudaStream_t);
template void attention_backward(float*, float*, float*, const float*, const float*, const float*,
                                 const float*, const Decay&, const AttentionConfig&, int, int, int, int,
                                 cudaStream_t, const AttentionSegments&, const double*);
template void attention_backward(bf16*, float*, float*, const bf16*, const bf16*, const float*, const bf16*,
                                 const Decay&, const AttentionConfig&, int, int, int, int, cudaStream_t,
                                 const AttentionSegments&, const double*);

}  // namespace gpu
