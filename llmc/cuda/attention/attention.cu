// The functions of attention.h: which kernel, with how many threads and how much shared memory.
#include "llmc/cuda/attention/attention.h"

#include "llmc/cuda/attention/kernels_float.h"
#include "llmc/cuda/attention/kernels_bf16.h"

namespace gpu {

// Calls f with the kernels' head size.
template <class Real, class F>
void with_head_size(int D, F f) {
    if constexpr (std::is_same_v<Real, float>) {
        if (D <= 64) return f(std::integral_constant<int, 64>());
        if (D <= 128) return f(std::integral_constant<int, 128>());
    } else {
        if (D <= 32) return f(std::integral_constant<int, 32>());
        if (D <= 64) return f(std::integral_constant<int, 64>());
        if (D <= 80) return f(std::integral_constant<int, 80>());
        if (D <= 96) return f(std::integral_constant<int, 96>());
        if (D <= 128) return f(std::integral_constant<int, 128>());
    }
    fail("attention: head size ", D, ", the CUDA kernels go up to 128");
}
template <class Real>
void attention_forward(Real* out,           // (B,T,C)
                       float* stats,        // (stats_size)
                       float* scratch,      // (attention_forward_scratch)
                       const Real* qkv,     // (B,T,3C)
                       const float* decay,  // (H), or null
                       const AttentionConfig& config, int B, int T, int H, int D, cudaStream_t stream,
                       const AttentionSegments& segments) {
    AttentionTables tables(scratch, decay != nullptr, T, H);
    if (!segments.length) make_tables(tables, decay, config, T, H, D, stream);
    AttentionShape shape = attention_shape(config, decay, T, H, D, tables, segments);
    float* exact = keeps_exact_output<Real>(config) ? stats + (size_t)B * H * T : nullptr;
    dim3 grid(B * H, ceil_div(T, attention_tile<Real>));
    with_activation(config.kind, [&]<class A>(A) {
        with_head_size<Real>(D, [&](auto size) {
            constexpr int kD = size;
            if constexpr (std::is_same_v<Real, float>) {
                size_t shared = (3 * FloatTile<kD>::size + FloatWeights::size) * sizeof(float);
                launch_attention(attention_forward_float_kernel<A, kD>, grid, shared, stream, out, stats, qkv,
                                 shape);
            } else {
                size_t shared = 5 * Tile<kD>::size * sizeof(bf16) + kAttentionTile * sizeof(float);
                launch_attention(attention_forward_kernel<A, kD>, grid, shared, stream, out, stats, exact,
                                 qkv, shape);
            }
        });
    });
}

// The part of scratch that is for each of them.
template <class Real>
AttentionBackwardTerms backward_terms(float* scratch, bool decays, int B, int T, int H) {
    size_t of_tiles = 2 * (size_t)ceil_div(T, attention_tile<Real>) * B * H, rows = (size_t)B * T * H;
    return {reinterpret_cast<double*>(scratch), scratch + of_tiles,
            AttentionTables(scratch + of_tiles + rows, decays, T, H)};
}

template <class Real>
AttentionBackwardTerms attention_backward_terms(float* scratch,      // (attention_backward_scratch)
                                                const Real* dout,    // (B,T,C)
                                                const Real* out,     // (B,T,C)
                                                const float* stats,  // (stats_size)
                                                const float* decay,  // (H), or null
                                                const AttentionConfig& config, int B, int T, int H, int D,
                                                cudaStream_t stream) {
    AttentionBackwardTerms terms = backward_terms<Real>(scratch, decay != nullptr, B, T, H);
    make_tables(terms.tables, decay, config, T, H, D, stream);
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
void attention_backward(Real* dqkv,          // (B,T,3C)
                        float* ddecay,       // (H) +=, or null: not wanted
                        float* scratch,      // (attention_backward_scratch)
                        const Real* dout,    // (B,T,C)
                        const Real* out,     // (B,T,C)
                        const float* stats,  // (stats_size)
                        const Real* qkv,     // (B,T,3C)
                        const float* decay,  // (H), or null
                        const AttentionConfig& config, int B, int T, int H, int D, cudaStream_t stream,
                        const AttentionSegments& segments) {
    AttentionBackwardTerms terms = backward_terms<Real>(scratch, decay != nullptr, B, T, H);
    if (!segments.length)
        attention_backward_terms(scratch, dout, out, stats, decay, config, B, T, H, D, stream);
    double* dlog_gamma = ddecay ? terms.dlog_gamma : nullptr;
    const float* dot = terms.dot;
    AttentionShape shape = attention_shape(config, decay, T, H, D, terms.tables, segments);
    int tiles = ceil_div(T, attention_tile<Real>);
    dim3 grid(B * H, tiles);
    with_activation(config.kind, [&]<class A>(A) {
        with_head_size<Real>(D, [&](auto size) {
            constexpr int kD = size;
            if constexpr (std::is_same_v<Real, float>) {
                size_t shared = (4 * FloatTile<kD>::size + FloatWeights::size) * sizeof(float);
                launch_attention(attention_backward_keys_float_kernel<A, kD>, grid, shared, stream, dqkv,
                                 dout, stats, dot, qkv, shape);
                launch_attention(attention_backward_queries_float_kernel<A, kD>, grid, shared, stream, dqkv,
                                 dlog_gamma, dout, stats, dot, qkv, shape);
            } else {
                size_t shared = 6 * Tile<kD>::size * sizeof(bf16), floats = kAttentionTile * sizeof(float);
                launch_attention(attention_backward_keys_kernel<A, kD>, grid, shared + 5 * floats, stream,
                                 dqkv, dout, stats, dot, qkv, shape);
                launch_attention(attention_backward_queries_kernel<A, kD>, grid, shared + floats, stream,
                                 dqkv, dlog_gamma, dout, stats, dot, qkv, shape);
            }
        });
    });
    if (ddecay) add_decay_gradient(ddecay, dlog_gamma, decay, B, tiles, H, stream);
}

template void attention_forward(float*, float*, float*, const float*, const float*, const AttentionConfig&,
                                int, int, int, int, cudaStream_t, const AttentionSegments&);
template void attention_forward(bf16*, float*, float*, const bf16*, const float*, const AttentionConfig&, int,
                                int, int, int, cudaStream_t, const AttentionSegments&);
template AttentionBackwardTerms attention_backward_terms(float*, const float*, const float*, const float*,
                                                         const float*, const AttentionConfig&, int, int, int,
                                                         int, cudaStream_t);
template AttentionBackwardTerms attention_backward_terms(float*, const bf16*, const bf16*, const float*,
                                                         const float*, const AttentionConfig&, int, int, int,
                                                         int, cudaStream_t);
template void attention_backward(float*, float*, float*, const float*, const float*, const float*,
                                 const float*, const float*, const AttentionConfig&, int, int, int, int,
                                 cudaStream_t, const AttentionSegments&);
template void attention_backward(bf16*, float*, float*, const bf16*, const bf16*, const float*, const bf16*,
                                 const float*, const AttentionConfig&, int, int, int, int, cudaStream_t,
                                 const AttentionSegments&);

}  // namespace gpu
