// The tables of numbers by which attention multiplies its rows and fades with distance, and the gradient of
// the decay. The kernels of every precision read them. delta (H) is called `decay` everywhere, as in the
// model: gamma = sigmoid(delta), and gamma^n is the fade at distance n.
#pragma once
#include <cmath>
#include <utility>

#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/cuda/attention/attention.h"
#include "llmc/cuda/attention/gates.h"
#include "llmc/cuda/reduce.h"

namespace gpu {

// With a decay every head has its own tables, otherwise one set serves all heads. With gates every head of
// every sequence has its own. A kernel fills them, because a learned decay is known only on the device.
struct AttentionTables {
    // (heads,T): c_i / sqrt(D)^p of a polynomial, or 1 / sqrt(D)^p with the scale `sum`, whose c_i depends on
    // the scores. It is 1 for every other kind of attention.
    float* row_factor = nullptr;
    float* fade = nullptr;  // (heads,T): gamma^n
    // (heads,T): e_i = -d log c_i / d log gamma. At distance e_i the change of gamma^(i-j) and that of c_i
    // cancel, so a term there adds nothing to the gradient of log gamma.
    float* neutral_distance = nullptr;
    float* log_gamma = nullptr;  // (heads)
    int stride = 0;              // from one head to the next: T, or 0 if all heads share one set
};

// Both kinds of tables, and where they lie in scratch.
struct LayerTables : AttentionTables {
    GateTables gate;  // with gates, in place of all but row_factor

    // gates: B if there are gates, otherwise 0.
    static size_t size(int T, int H, int gates) {
        if (gates) return GateTables::size(gates, T, H, kFloatTile) + (size_t)gates * T * H;
        return (3 * (size_t)T + 1) * H;
    }

    // tile: the number of tokens in a tile of the kernels
    LayerTables(float* scratch /*(size), with gates at an 8-byte address*/, const Decay& decay,
                const AttentionConfig& config, int B, int T, int H, int tile) {
        if (decay.log_f) {
            row_factor = gate.place(scratch, B, T, H, tile);
            if (config.polynomial() && config.scale == ScaleKind::row) stride = T;
            return;
        }
        stride = decay.delta ? T : 0;
        size_t n = (size_t)T * (decay.delta ? H : 1);
        row_factor = std::exchange(scratch, scratch + n);
        if (!decay.delta) return;
        fade = std::exchange(scratch, scratch + n);
        neutral_distance = std::exchange(scratch, scratch + n);
        log_gamma = scratch;
    }
};

// What attention_backward has in its scratch buffer.
struct AttentionBackwardTerms {
    double* dlog_gamma;  // (B,H,tiles): the share of each tile of queries in the gradient of log gamma
    float* dot;          // (B,H,T): dO_i . O_i, only for softmax and the scale `sum`
    LayerTables tables;
};

// Computes dot and the tables. attention_backward begins with it, except when it gets segments: then the
// linear form has called it before, because its kernels need the same numbers.
template <class Real>
AttentionBackwardTerms attention_backward_terms(float* scratch,      // (attention_backward_scratch)
                                                const Real* dout,    // (B,T,C)
                                                const Real* out,     // (B,T,C)
                                                const float* stats,  // (stats_size)
                                                const Decay& decay, const AttentionConfig& config, int B,
                                                int T, int H, int D, cudaStream_t stream);

// 1 / (e^y - 1) - 1 / y, by its series where the difference would lose precision.
__device__ inline double smooth_part(double y) {
    if (y < 0.1) {
        double z = y * y;
        return -0.5 + y * (1.0 / 12 - z * (1.0 / 720 - z * (1.0 / 30240 - z * (1.0 / 1209600))));
    }
    return 1 / expm1(y) - 1 / y;
}

// A thread makes the entries of row i and of distance i. `factor` is the part of c_i that all rows share, and
// `kind` decides how c_i depends on the row.
template <int kThreads = 128>
__global__ void attention_tables(AttentionTables tables, const float* decay /*(H): delta, or null*/,
                                 ScaleKind kind, double factor, int T) {
    int i = blockIdx.x * kThreads + threadIdx.x, h = blockIdx.y;
    if (i >= T) return;
    double log_g = decay ? log_gamma(decay[h]) : 0;
    size_t at = (size_t)h * T + i;
    double c = kind == ScaleKind::row    ? factor / sqrt(effective_row_length(i, log_g))
               : kind == ScaleKind::mean ? factor / (i + 1)
                                         : factor;
    tables.row_factor[at] = (float)c;
    if (!decay) return;
    tables.fade[at] = (float)exp(i * log_g);
    // The derivative of log n_i by 2 log gamma, without the 1 / (2 log gamma) that its two terms share.
    tables.neutral_distance[at] =
        kind == ScaleKind::row
            ? (float)(smooth_part(-2 * log_g) - (i + 1) * smooth_part(-2 * (i + 1) * log_g))
            : 0.0f;
    if (i == 0) tables.log_gamma[h] = (float)log_g;
}

inline void make_gate_tables(const LayerTables& tables, const float* log_f, const AttentionConfig& config,
                             double factor, int B, int T, int H, int tile, cudaStream_t stream) {
    const dim3 grid(ceil_div(T, tile), B * H);
    if (tile == kFloatTile) {
        gate_tile_tables<kFloatTile>
            <<<grid, kFloatTile, 0, stream>>>(tables.gate, log_f, config.softmax(), T);
    } else {
        gate_tile_tables<kAttentionTile>
            <<<grid, kAttentionTile, 0, stream>>>(tables.gate, log_f, config.softmax(), T);
    }
    check_launch();
    gate_row_tables<><<<B * H, kGateThreads, 0, stream>>>(
        tables.gate, log_f, tables.stride ? tables.row_factor : nullptr, factor, T, grid.x);
    check_launch();
}

inline void make_tables(const LayerTables& tables, const Decay& decay, const AttentionConfig& config, int B,
                        int T, int H, int D, int tile, cudaStream_t stream) {
    if (config.softmax() && !decay.delta && !decay.log_f) return;
    ScaleKind kind = ScaleKind::constant;  // c_i is 1 if the activation is not a power
    double factor = 1;
    if (config.polynomial()) {
        kind = config.scale;
        factor = std::pow((double)D, -0.5 * config.power());
        double m = gaussian_moment(config.power(), D);
        if (kind == ScaleKind::row || kind == ScaleKind::mean) factor /= std::sqrt(m);
        if (kind == ScaleKind::context) factor /= std::sqrt((double)config.context);
        if (kind == ScaleKind::constant) factor *= config.constant;
    }
    if (decay.log_f) make_gate_tables(tables, decay.log_f, config, factor, B, T, H, tile, stream);
    if (decay.log_f && (config.softmax() || tables.stride)) return;  // these have all tables that they need
    attention_tables<><<<dim3(ceil_div(T, 128), decay.delta ? H : 1), 128, 0, stream>>>(tables, decay.delta,
                                                                                        kind, factor, T);
    check_launch();
}

// ---------------------------------------------------------------------------------- gradient of the decay

// Adds up the shares of a head, and makes the gradient of delta of that of log gamma. A warp takes a head.
template <int kLanes = kWarp>
__global__ void attention_decay_gradient(float* ddecay,             // (H) +=
                                         const double* dlog_gamma,  // (B,H,tiles): shares
                                         const float* decay,        // (H)
                                         int B, int tiles, int H) {
    int h = blockIdx.x;
    double total = 0;
    for (int i = threadIdx.x; i < B * tiles; i += kLanes)
        total += dlog_gamma[((size_t)(i / tiles) * H + h) * tiles + i % tiles];
    total = warp_sum(total);
    // d log sigmoid(delta) = 1 - sigmoid(delta)
    if (threadIdx.x == 0) ddecay[h] += (float)(total / (1 + exp((double)decay[h])));
}

inline void add_decay_gradient(float* ddecay, const double* dlog_gamma, const float* decay, int B, int tiles,
                               int H, cudaStream_t stream) {
    attention_decay_gradient<><<<H, kWarp, 0, stream>>>(ddecay, dlog_gamma, decay, B, tiles, H);
    check_launch();
}

}  // namespace gpu
