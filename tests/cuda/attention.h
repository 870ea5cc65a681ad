// What the tests of attention in tiles and of its linear form have in common: the kinds of attention, and a
// call of both passes held against the double precision oracle.
#pragma once
#include "llmc/cuda/attention/linear.h"
#include "tests/attention_kinds.h"
#include "tests/cuda/helpers.h"

namespace cuda_test {

using reference::AttentionGradients;
using reference::decay_of;
using reference::one_of_each_scale;
using reference::part_of;

struct Size {
    int B, T, H, D;
};

using Kind = reference::AttentionOption;

constexpr int kTiled = -1;  // segment: attention in tiles, not the linear form

// The passes of the form that `segment` says, with their scratch memory.
template <class Real>
void run_forward(Real* out, float* stats, const Real* qkv, const gpu::Decay& decay,
                 const AttentionConfig& config, const Size& size, int segment) {
    const auto& [B, T, H, D] = size;
    const bool gates = decay.log_f;
    if (segment == kTiled) {
        const Device<float> scratch(gpu::attention_forward_scratch(T, H, gates ? B : 0));
        gpu::attention_forward<Real>(out, stats, scratch.get(), qkv, decay, config, B, T, H, D, nullptr);
    } else {
        const Device<float> scratch(
            gpu::attention_linear_forward_scratch<Real>(config, B, T, H, D, segment, gates));
        gpu::attention_linear_forward<Real>(out, stats, scratch.get(), qkv, decay, config, B, T, H, D,
                                            nullptr, segment);
    }
}

template <class Real>
void run_backward(Real* dqkv, float* ddecay, const Real* dout, const Real* out, const float* stats,
                  const Real* qkv, const gpu::Decay& decay, const AttentionConfig& config, const Size& size,
                  int segment) {
    const auto& [B, T, H, D] = size;
    const bool gates = decay.log_f;
    if (segment == kTiled) {
        const Device<float> scratch(gpu::attention_backward_scratch(B, T, H, gates));
        gpu::attention_backward<Real>(dqkv, ddecay, scratch.get(), dout, out, stats, qkv, decay, config, B, T,
                                      H, D, nullptr);
    } else {
        const Device<float> scratch(
            gpu::attention_linear_backward_scratch<Real>(config, B, T, H, D, segment, gates));
        gpu::attention_linear_backward<Real>(dqkv, ddecay, scratch.get(), dout, out, stats, qkv, decay,
                                             config, B, T, H, D, nullptr, segment);
    }
}

// Both passes. The backward pass gets the oracle's out and stats, so that each is judged alone. `tolerance`
// is that of floats; `segment` that of the linear form.
template <class Real>
void check_attention(const Kind& kind, const Size& size, const std::vector<Real>& qkv, const Floats& delta,
                     double tolerance = 1e-5, int segment = kTiled) {
    const int B = size.B, T = size.T, H = size.H, D = size.D;
    const int C = H * D;
    const AttentionConfig& config = kind.config;
    INFO(reference::describe(kind), ", B ", B, ", T ", T, ", H ", H, ", D ", D, ", segment ", segment);
    constexpr bool kBf16 = std::is_same_v<Real, gpu::bf16>;
    const double dqkv_tolerance = kBf16 ? 1e-2 : tolerance;
    const bool learned = kind.decay == DecayKind::learned;
    const std::vector<Real> dout = convert<Real>(reference::normal((size_t)B * T * C, 5));
    const Device<Real> device_qkv(qkv), device_dout(dout);
    const Device<float> device_delta(delta);
    const float* decay = delta.empty() ? nullptr : device_delta.get();

    reference::Attention y =
        reference::attention_forward(to_double(qkv), to_double(delta), config, B, T, H, D);
    std::vector<Expected> outputs = {expect<Real>("out", y.out, dqkv_tolerance)};
    const bool has_stats = gpu::stats_size<Real>(config, B, T, H, D) > 0;
    Vector stats = y.stats;  // the sums of the rows, then, where it is kept, the output before it is rounded
    if (gpu::keeps_exact_output<Real>(config)) stats.insert(stats.end(), y.out.begin(), y.out.end());
    stats.resize(gpu::stats_size<Real>(config, B, T, H, D));
    if (has_stats) outputs.push_back(expect<float>("stats", stats, dqkv_tolerance));
    Vector sums;
    check_layer(outputs, [&](auto& out) {
        float* row_stats = has_stats ? (float*)out["stats"] : nullptr;
        run_forward<Real>(out["out"], row_stats, device_qkv.get(), decay, config, size, segment);
        if (!has_stats) return;
        Floats host(y.stats.size());
        gpu::check(cudaMemcpy(host.data(), row_stats, host.size() * sizeof(float), cudaMemcpyDeviceToHost));
        sums = to_double(host);
    });
    if (has_stats)
        CHECK(reference::relative_error(sums, y.stats) < tolerance);  // as good as floats in either case

    AttentionGradients d =
        reference::attention_backward(to_double(dout), to_double(qkv), to_double(delta), config, B, T, H, D);
    outputs = {expect<Real>("dqkv", d.dqkv, dqkv_tolerance)};
    if (learned) {
        outputs.push_back(
            expect<float>("ddecay", d.ddecay, kBf16 ? std::max(1e-2, 200 * tolerance) : tolerance, true));
        outputs.back().floor = d.ddecay_terms;
    }
    const Device<Real> device_out(convert<Real>(y.out));
    const Device<float> device_stats(convert<float>(stats));
    std::vector<Real> got(qkv.size());
    check_layer(outputs, [&](auto& out) {
        float* ddecay = learned ? (float*)out["ddecay"] : nullptr;
        run_backward<Real>(out["dqkv"], ddecay, device_dout.get(), device_out.get(), device_stats.get(),
                           device_qkv.get(), decay, config, size, segment);
        gpu::check(cudaMemcpy(got.data(), out["dqkv"], got.size() * sizeof(Real), cudaMemcpyDeviceToHost));
    });
    // Each part alone, for one may be much smaller than the others. Not with a single key, where the weights
    // of softmax and `sum` are constant and dq and dk nothing but rounding.
    for (int part = 0; part < 3 && T > 1; part++) {
        CAPTURE(part);
        CHECK(reference::relative_error(part_of(to_double(got), part, C), part_of(d.dqkv, part, C),
                                        0.1 * reference::norm(d.dqkv)) < dqkv_tolerance);
    }
}

template <class Real>
std::vector<Real> random_qkv(const Size& size) {
    return convert<Real>(reference::normal((size_t)size.B * size.T * 3 * size.H * size.D, 1));
}

template <class Real>
void check_attention(const Kind& kind, const Size& size) {
    check_attention(kind, size, random_qkv<Real>(size), decay_of(kind, size.H));
}

}  // namespace cuda_test
