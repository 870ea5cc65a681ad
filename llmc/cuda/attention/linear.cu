// Defines the functions of linear.h: the order of the kernels, and the memory between them.
#include "llmc/cuda/attention/linear.h"

#include "llmc/cuda/attention/linear_kernels_bf16.h"
#include "llmc/cuda/attention/linear_kernels_float.h"

namespace gpu {

namespace {

LinearShape linear_shape(const AttentionConfig& config, int T, int D, int segment) {
    LinearShape shape{};
    shape.segment = segment ? segment : linear_segment(config.power(), D);
    shape.slots = ceil_div(T, shape.segment) - 1;
    shape.tiles = feature_tiles(config.power(), D);
    shape.block = feature_block(config.power());
    shape.blocks = ceil_div(D, shape.block);
    shape.width = ceil_div(D, 8) * 8;
    return shape;
}

// The number of tiles of the rows that have a boundary: queries one before them, keys one after them.
template <class Real>
int row_tiles(Rows rows, const LinearShape& shape, int T) {
    int tokens = rows == Rows::keys ? shape.slots * shape.segment : T - shape.segment;
    return ceil_div(tokens, attention_tile<Real>);
}

constexpr int kScanBlock = kAttentionThreads * 4;  // how many numbers of a state a block scans
constexpr int kShareBlock = kAttentionThreads;     // tokens of a block that makes shares of their slopes

// What lies in scratch after that of the tiles.
template <class Real>
struct LinearBuffers {
    float* sums;                 // forward (B,T,C), backward (B,T,3C)
    float* totals;               // (B,H,T), for `sum`
    float* parts[2];             // (B,H,slots,size): of the segments' keys, and of their queries
    Real* states[2];             // (B,H,slots,size); in float they take the place of parts
    float* z[2];                 // (B,H,slots,features), for `sum`
    LinearFades fades;           // of the decay, or of gates
    float* slopes[2] = {};       // (B,H,T): of the queries and of the keys; with gates they lie elsewhere
    double* dlog_gamma[3] = {};  // shares of the rows, of the states' scan and of z's
    double* crossing = nullptr;  // with gates: (B,H,slots)
    size_t size;                 // floats in all of scratch

    LinearBuffers(float* scratch, bool backward, bool gates, const LinearShape& shape,
                  const AttentionConfig& config, int B, int T, int H, int D) {
        size = backward ? attention_backward_scratch(B, T, H, gates)
                        : attention_forward_scratch(T, H, gates ? B : 0);
        if (shape.slots == 0) return;
        auto floats = [&](size_t n) {
            size_t at = ceil_div<size_t>(size, 4) * 4;
            size = at + n;
            return scratch ? scratch + at : nullptr;
        };
        const size_t heads = (size_t)B * H, states_size = heads * shape.slots * shape.size();
        sums = floats(heads * T * D * (backward ? 3 : 1));
        totals = config.has_row_sum() ? floats(heads * T) : nullptr;
        for (int i = 0; i < (backward ? 2 : 1); i++) {
            z[i] = config.has_row_sum() ? floats(heads * shape.slots * shape.tiles * kFeatures) : nullptr;
            if constexpr (std::is_same_v<Real, float>) {
                states[i] = parts[i] = floats(states_size);
            } else {
                parts[i] = i == 0 ? floats(states_size) : parts[0];  // the keys' parts are used up by then
                states[i] = reinterpret_cast<Real*>(floats(states_size / 2));
            }
        }
        const size_t fade_heads = gates ? heads : H;
        fades = {floats(fade_heads * T), floats(fade_heads * T), floats(fade_heads * (shape.slots + 1))};
        if (!backward) return;
        auto doubles = [&](size_t n) { return reinterpret_cast<double*>(floats(2 * heads * n)); };
        if (gates) {
            crossing = doubles(shape.slots);
            return;
        }
        for (float*& of_rows : slopes) of_rows = floats(heads * T);
        dlog_gamma[0] = doubles(ceil_div(T, kShareBlock));
        dlog_gamma[1] = doubles(ceil_div(shape.size(), kScanBlock));
        dlog_gamma[2] = config.has_row_sum() ? doubles(ceil_div(shape.features(), kScanBlock)) : nullptr;
    }
};

// Launches the kernels of one call.
template <class Real, int P, int kD>
struct LinearKernels {
    static constexpr bool kIsFloat = std::is_same_v<Real, float>;
    LinearShape shape;
    LinearFades fades;
    int heads;  // B H
    const Real *qkv, *dout;
    const float *stats, *dot;
    cudaStream_t stream;

    // The shape for a kernel that reads these fades.
    LinearShape with(float* fade) const {
        LinearShape with_fade = shape;
        with_fade.attention.tables.fade = fade;
        return with_fade;
    }
    template <Rows kRows>
    float* fades_of() const {
        return kRows == Rows::keys ? fades.keys : fades.queries;
    }

    template <Rows kRows>
    void states(float* parts, float* z) const {
        auto launch = [&](auto kernel, int at_once, size_t shared) {
            launch_attention(kernel, dim3(ceil_div(shape.tiles, at_once), shape.slots, heads), shared, stream,
                             parts, z, qkv, dout, stats, dot, with(fades_of<kRows>()));
        };
        if constexpr (kIsFloat) {
            launch(linear_states_float_kernel<P, kD, kRows>, 1,
                   2 * (FloatTile<kD>::size + FloatWeights::size) * sizeof(float));
        } else {
            launch(linear_states_kernel<P, kD, kRows>, kStateTiles<P, kD>,
                   4 * ((Tile<kD>::size + Tile<16>::size) * sizeof(bf16) + kAttentionTile * sizeof(float)));
        }
    }

    // others: the keys' states, if the shares of both in the gradient of log gamma are wanted.
    template <class Number>
    void scan(Number* states, const float* parts, const Number* others, double* dlog_gamma, int width,
              float sign, bool from_right) const {
        linear_scan_kernel<P>
            <<<dim3(ceil_div(shape.features() * width, kScanBlock), heads), kAttentionThreads, 0, stream>>>(
                states, parts, others, dlog_gamma, width, sign, from_right, with(fades.segments));
        check_launch();
    }
    void scan_states(Real* states, const float* parts, const Real* others, double* dlog_gamma,
                     bool from_right) const {
        scan(states, parts, others, dlog_gamma, shape.width, 1, from_right);
    }
    // The gradient of log gamma by way of the normaliser of `sum` has the opposite sign.
    void scan_z(float* z, const float* others, double* dlog_gamma, bool from_right) const {
        if (z) scan(z, z, others, dlog_gamma, 1, -1, from_right);
    }

    void crossing(double* to, const Real* keys, const Real* queries, const float* keys_z,
                  const float* queries_z) const {
        linear_crossing_kernel<P>
            <<<dim3(shape.slots, heads), 256, 0, stream>>>(to, keys, queries, keys_z, queries_z, shape);
        check_launch();
    }

    template <Rows kRows>
    void rows(float* sums, float* totals, float* slopes, const Real* states, const float* z) const {
        constexpr bool kGradient = kRows != Rows::queries;
        auto launch = [&](auto kernel, size_t shared) {
            launch_attention(kernel, dim3(row_tiles<Real>(kRows, shape, shape.attention.T), heads), shared,
                             stream, sums, totals, slopes, states, z, qkv, dout, stats, dot,
                             with(fades_of<kRows>()));
        };
        if constexpr (kIsFloat) {
            launch(linear_rows_float_kernel<P, kD, kRows>,
                   ((kGradient ? 5 : 3) * FloatTile<kD>::size + 2 * FloatWeights::size) * sizeof(float));
        } else {
            launch(linear_rows_kernel<P, kD, kRows>,
                   (kGradient ? 4 : 3) * Tile<kD>::size * sizeof(bf16) +
                       kAttentionTile * (kFeatures + 4 + (kGradient ? kD + 4 : 0)) * sizeof(float));
        }
    }
};

// Calls f with the kernels for heads of D channels.
template <class Real, class F>
void with_linear_kernels(const AttentionConfig& config, const LinearShape& shape, const LinearFades& fades,
                         int B, const Real* qkv, const Real* dout, const float* stats, const float* dot,
                         cudaStream_t stream, F f) {
    constexpr bool kIsFloat = std::is_same_v<Real, float>;
    const int D = shape.attention.D;
    auto with = [&]<int P, int kD>() {
        f(LinearKernels<Real, P, kD>{shape, fades, B * shape.attention.H, qkv, dout, stats, dot, stream});
    };
    with_linear_power(config.kind, [&](auto power) {
        constexpr int P = power;
        if constexpr (!kIsFloat)
            if (D <= 32) return with.template operator()<P, 32>();
        if constexpr (kIsFloat || P < 3)
            if (D <= 64) return with.template operator()<P, 64>();
        if constexpr (!kIsFloat && P < 3)
            if (D <= 96) return with.template operator()<P, 96>();
        if constexpr (P < 3)
            if (D <= 128) return with.template operator()<P, 128>();
        fail("attention: head size ", D, ", the CUDA kernels of the linear form go up to ", P < 3 ? 128 : 32);
    });
}

// Completes the shape, and makes the fades.
template <class Real>
void make_fades(LinearShape& shape, const LinearFades& fades, const Decay& decay, const LayerTables& tables,
                const AttentionConfig& config, int B, int T, int H, int D, cudaStream_t stream) {
    shape.attention = attention_shape(config, decay, T, H, D, tables, {});
    shape.attention.has_decay = decay.delta || decay.log_f;
    shape.fade_heads = decay.log_f ? B * H : H;
    if (decay.log_f) {
        gate_segment_tables<><<<dim3(ceil_div(T, kGateThreads), B * H), kGateThreads, 0, stream>>>(
            fades.keys, fades.queries, fades.segments, tables.gate, shape.segment, attention_tile<Real>, T);
        check_launch();
    } else if (decay.delta) {
        linear_decay_fades<><<<dim3(ceil_div(T, 128), H), 128, 0, stream>>>(fades, tables, shape.segment, T);
        check_launch();
    }
}

}  // namespace

template <class Real>
size_t attention_linear_forward_scratch(const AttentionConfig& config, int B, int T, int H, int D,
                                        int segment, bool gates) {
    return LinearBuffers<Real>(nullptr, false, gates, linear_shape(config, T, D, segment), config, B, T, H, D)
        .size;
}
template <class Real>
size_t attention_linear_backward_scratch(const AttentionConfig& config, int B, int T, int H, int D,
                                         int segment, bool gates) {
    return LinearBuffers<Real>(nullptr, true, gates, linear_shape(config, T, D, segment), config, B, T, H, D)
        .size;
}

template <class Real>
void attention_linear_forward(Real* out,        // (B,T,C)
                              float* stats,     // (stats_size)
                              float* scratch,   // (attention_linear_forward_scratch)
                              const Real* qkv,  // (B,T,3C)
                              const Decay& decay, const AttentionConfig& config, int B, int T, int H, int D,
                              cudaStream_t stream, int segment) {
    LinearShape shape = linear_shape(config, T, D, segment);
    if (shape.slots == 0)
        return attention_forward(out, stats, scratch, qkv, decay, config, B, T, H, D, stream);
    LayerTables tables(scratch, decay, config, B, T, H, attention_tile<Real>);
    make_tables(tables, decay, config, B, T, H, D, attention_tile<Real>, stream);
    LinearBuffers<Real> buffers(scratch, false, decay.log_f != nullptr, shape, config, B, T, H, D);
    make_fades<Real>(shape, buffers.fades, decay, tables, config, B, T, H, D, stream);
    with_linear_kernels<Real>(
        config, shape, buffers.fades, B, qkv, nullptr, nullptr, nullptr, stream, [&](const auto& kernels) {
            kernels.template states<Rows::keys>(buffers.parts[0], buffers.z[0]);
            kernels.scan_states(buffers.states[0], buffers.parts[0], nullptr, nullptr, false);
            kernels.scan_z(buffers.z[0], nullptr, nullptr, false);
            kernels.template rows<Rows::queries>(buffers.sums, buffers.totals, nullptr, buffers.states[0],
                                                 buffers.z[0]);
        });
    attention_forward(out, stats, scratch, qkv, decay, config, B, T, H, D, stream,
                      {shape.segment, buffers.sums, buffers.totals});
}

template <class Real>
void attention_linear_backward(Real* dqkv,          // (B,T,3C)
                               float* ddecay,       // as in attention_backward
                               float* scratch,      // (attention_linear_backward_scratch)
                               const Real* dout,    // (B,T,C)
                               const Real* out,     // (B,T,C)
                               const float* stats,  // (stats_size)
                               const Real* qkv,     // (B,T,3C)
                               const Decay& decay, const AttentionConfig& config, int B, int T, int H, int D,
                               cudaStream_t stream, int segment) {
    LinearShape shape = linear_shape(config, T, D, segment);
    if (shape.slots == 0)
        return attention_backward(dqkv, ddecay, scratch, dout, out, stats, qkv, decay, config, B, T, H, D,
                                  stream);
    AttentionBackwardTerms terms =
        attention_backward_terms(scratch, dout, out, stats, decay, config, B, T, H, D, stream);
    LinearBuffers<Real> buffers(scratch, true, decay.log_f != nullptr, shape, config, B, T, H, D);
    make_fades<Real>(shape, buffers.fades, decay, terms.tables, config, B, T, H, D, stream);
    const bool wants_shares = ddecay && decay.delta;
    double* dlog_gamma[3] = {};
    if (wants_shares) std::copy_n(buffers.dlog_gamma, 3, dlog_gamma);
    float *query_slopes = terms.tables.gate.row_sums, *key_slopes = terms.tables.gate.column_sums;
    if (wants_shares) query_slopes = buffers.slopes[0], key_slopes = buffers.slopes[1];
    with_linear_kernels<Real>(
        config, shape, buffers.fades, B, qkv, dout, stats, terms.dot, stream, [&](const auto& kernels) {
            auto& [sums, totals, parts, states, z, fades, slopes, shares, crossing, size] = buffers;
            kernels.template states<Rows::keys>(parts[0], z[0]);
            kernels.scan_states(states[0], parts[0], nullptr, nullptr, false);
            kernels.scan_z(z[0], nullptr, nullptr, false);
            kernels.template states<Rows::gradients>(parts[1], z[1]);
            kernels.scan_states(states[1], parts[1], wants_shares ? states[0] : nullptr, dlog_gamma[1], true);
            kernels.scan_z(z[1], wants_shares ? z[0] : nullptr, dlog_gamma[2], true);
            if (decay.log_f) kernels.crossing(crossing, states[0], states[1], z[0], z[1]);
            kernels.template rows<Rows::gradients>(sums, nullptr, query_slopes, states[0], z[0]);
            kernels.template rows<Rows::keys>(sums, nullptr, key_slopes, states[1], z[1]);
        });
    if (wants_shares) {
        int shares[3] = {ceil_div(T, kShareBlock), ceil_div(shape.size(), kScanBlock),
                         ceil_div(shape.features(), kScanBlock)};
        linear_decay_shares<><<<dim3(shares[0], B * H), kShareBlock, 0, stream>>>(
            dlog_gamma[0], query_slopes, key_slopes, terms.tables, shape.segment, T, H);
        check_launch();
        for (int i = 0; i < (config.has_row_sum() ? 3 : 2); i++)
            add_decay_gradient(ddecay, dlog_gamma[i], decay.delta, B, shares[i], H, stream);
    }
    attention_backward(dqkv, ddecay, scratch, dout, out, stats, qkv, decay, config, B, T, H, D, stream,
                       {shape.segment, buffers.sums, nullptr}, buffers.crossing);
}

template size_t attention_linear_forward_scratch<float>(const AttentionConfig&, int, int, int, int, int,
                                                        bool);
template size_t attention_linear_forward_scratch<bf16>(const AttentionConfig&, int, int, int, int, int, bool);
template size_t attention_linear_backward_scratch<float>(const AttentionConfig&, int, int, int, int, int,
                                                         bool);
template size_t attention_linear_backward_scratch<bf16>(const AttentionConfig&, int, int, int, int, int,
                                                        bool);
template void attention_linear_forward(float*, float*, float*, const float*, const Decay&,
                                       const AttentionConfig&, int, int, int, int, cudaStream_t, int);
template void attention_linear_forward(bf16*, float*, float*, const bf16*, const Decay&,
                                       const AttentionConfig&, int, int, int, int, cudaStream_t, int);
template void attention_linear_backward(float*, float*, float*, const float*, const float*, const float*,
                                        const float*, const Decay&, const AttentionConfig&, int, int, int,
                                        int, cudaStream_t, int);
template void attention_linear_backward(bf16*, float*, float*, const bf16*, const bf16*, const float*,
                                        const bf16*, const Decay&, const AttentionConfig&, int, int, int, int,
                                        cudaStream_t, int);

}  // namespace gpu
