// Softmax and polynomial attention of llmc/cuda against the double precision oracle: every kind at small sizes,
// and sizes at the edges of tiles and of the kernels' head sizes.
#include "llmc/cuda/attention.h"
#include "tests/cuda_helpers.h"

using namespace cuda_test;
using reference::AttentionGradients;

namespace {

struct Size {
    int B, T, H, D;
};

struct Kind {
    AttentionConfig config;
    DecayKind decay;
};

std::vector<Kind> all_kinds() {
    std::vector<Kind> kinds;
    for (int power = 0; power <= 4; power++)
        for (ScaleKind scale :
             {ScaleKind::row, ScaleKind::context, ScaleKind::mean, ScaleKind::sum, ScaleKind::constant})
            for (DecayKind decay : {DecayKind::none, DecayKind::fixed, DecayKind::learned})
                if (power > 0 || scale == ScaleKind::row)
                    kinds.push_back({{.power = power, .scale = scale, .constant = -0.35, .context = 300}, decay});
    return kinds;
}

Floats decay_of(const Kind& kind, int H) {
    Floats delta(kind.decay == DecayKind::none ? 0 : H);
    for (int h = 0; h < (int)delta.size(); h++) delta[h] = initial_decay(h, H);
    return delta;
}

template <class Real>
void check_forward(const Kind& kind, const Size& size, const std::vector<Real>& qkv, const Floats& delta) {
    auto [B, T, H, D] = size;
    INFO("power ", kind.config.power, " scale ", (int)kind.config.scale, " decay ", (int)kind.decay, " B ", B,
         " T ", T, " H ", H, " D ", D);
    reference::Attention y = reference::attention_forward(to_double(qkv), to_double(delta), kind.config, B, T, H, D);
    std::vector<Expected> outputs = {expect<Real>("out", y.out)};
    Vector stats = y.stats;
    if (gpu::keeps_exact_output<Real>(kind.config)) stats.insert(stats.end(), y.out.begin(), y.out.end());
    stats.resize(gpu::stats_size<Real>(kind.config, B, T, H, D));
    outputs.push_back({"stats", stats, gpu::keeps_exact_output<Real>(kind.config) ? 1e-2 : 1e-5});
    Device<Real> device_qkv(qkv);
    Device<float> device_delta(delta);
    check_layer(outputs, [&](auto& out) {
        Device<float> scratch(gpu::attention_forward_scratch(T, H));
        gpu::attention_forward<Real>(out["out"], out["stats"], scratch.get(), device_qkv.get(),
                                     delta.empty() ? nullptr : device_delta.get(), kind.config, B, T, H, D, 0);
    });
}

Vector part_of(const Vector& qkv, int part, int C) {
    Vector x;
    for (size_t i = 0; i < qkv.size(); i++)
        if ((int)(i / C % 3) == part) x.push_back(qkv[i]);
    return x;
}

template <class Real>
void check_backward(const Kind& kind, const Size& size, const std::vector<Real>& qkv, const Floats& delta) {
    auto [B, T, H, D] = size;
    const int C = H * D;
    const AttentionConfig& config = kind.config;
    INFO("power ", kind.config.power, " scale ", (int)kind.config.scale, " decay ", (int)kind.decay, " B ", B,
         " T ", T, " H ", H, " D ", D);
    constexpr bool kBf16 = std::is_same_v<Real, gpu::bf16>;
    std::vector<Real> dout = convert<Real>(reference::normal((size_t)B * T * C, 5));
    reference::Attention y = reference::attention_forward(to_double(qkv), to_double(delta), config, B, T, H, D);
    std::vector<Real> rounded_out = convert<Real>(y.out);
    Vector stats = y.stats;
    if (gpu::keeps_exact_output<Real>(config)) stats.insert(stats.end(), y.out.begin(), y.out.end());
    stats.resize(gpu::stats_size<Real>(config, B, T, H, D));
    AttentionGradients d =
        reference::attention_backward(to_double(dout), to_double(qkv), to_double(delta), config, B, T, H, D);
    std::vector<Expected> outputs = {expect<Real>("dqkv", d.dqkv)};
    bool learned = kind.decay == DecayKind::learned;
    // its terms cancel; those of x^4 / sum x^4 most
    if (learned)
        outputs.push_back({"ddecay", d.ddecay,
                           !kBf16 ? 1e-4 : config.power == 4 && config.has_row_sum() ? 0.15 : 3e-2, true});
    Device<Real> device_qkv(qkv), device_dout(dout), device_out(rounded_out);
    Device<float> device_delta(delta), device_stats(convert<float>(stats));
    std::vector<Real> got((size_t)B * T * 3 * C);
    check_layer(outputs, [&](auto& out) {
        Device<float> scratch(gpu::attention_backward_scratch(B, T, H));
        gpu::attention_backward<Real>(out["dqkv"], learned ? (float*)out["ddecay"] : nullptr, scratch.get(),
                                      device_dout.get(), device_out.get(), device_stats.get(), device_qkv.get(),
                                      delta.empty() ? nullptr : device_delta.get(), config, B, T, H, D, 0);
        gpu::check(cudaMemcpy(got.data(), out["dqkv"], got.size() * sizeof(Real), cudaMemcpyDeviceToHost));
    });
    // Each part alone, for one may be much smaller than the others. Not with a single key, where the weights of
    // softmax and `sum` are constant and dq and dk nothing but rounding.
    for (int part = 0; part < 3 && T > 1; part++) {
        CAPTURE(part);
        CHECK(reference::relative_error(part_of(to_double(got), part, C), part_of(d.dqkv, part, C),
                                        0.1 * reference::norm(d.dqkv)) < (kBf16 ? 1e-2 : 1e-5));
    }
}

}  // namespace

TEST_CASE("cuda attention bf16") {
    for (const Kind& kind : all_kinds())
    for (Size size : std::vector<Size>{{1, 1, 1, 32}, {2, 7, 3, 32}, {1, 65, 1, 32}}) {
        auto qkv = convert<gpu::bf16>(reference::normal((size_t)size.B * size.T * 3 * size.H * size.D, 1));
        check_forward(kind, size, qkv, decay_of(kind, size.H));
        check_backward(kind, size, qkv, decay_of(kind, size.H));
    }
    auto kinds = all_kinds();
    int n = 0;
    for (Size size : std::vector<Size>{{1,64,2,64},{1,65,2,64},{1,130,1,80},{1,100,1,96},{1,129,1,128},{1,70,3,40},{1,33,1,7}}) {
        auto qkv = convert<gpu::bf16>(reference::normal((size_t)size.B * size.T * 3 * size.H * size.D, 1));
        for (int i = 0; i < 8; i++, n+= 7) {check_forward(kinds[n % kinds.size()], size, qkv, decay_of(kinds[n % kinds.size()], size.H)); check_backward(kinds[n % kinds.size()], size, qkv, decay_of(kinds[n % kinds.size()], size.H));}
    }
}
