// The kinds of attention that the tests go through: all that llmc/activation.h has, polynomials with each
// scale, and each with each decay.
#pragma once
#include <iterator>
#include <string>
#include <vector>

#include "llmc/attention_linear_form.h"
#include "llmc/attention_scale.h"
#include "llmc/config.h"

namespace reference {

inline std::vector<AttentionKind> every_kind() {
    std::vector<AttentionKind> kinds;
    for (size_t i = 0; i < std::size(kAttentionNames); i++) kinds.push_back((AttentionKind)i);
    return kinds;
}

// Those that have the linear form for small heads.
inline std::vector<AttentionKind> linear_kinds() {
    std::vector<AttentionKind> kinds;
    for (AttentionKind kind : every_kind())
        if (has_linear_form(attention_power(kind), 1)) kinds.push_back(kind);
    return kinds;
}

inline std::vector<AttentionConfig> every_config() {
    std::vector<AttentionConfig> configs;
    for (AttentionKind kind : every_kind())
        for (ScaleKind scale :
             {ScaleKind::row, ScaleKind::context, ScaleKind::mean, ScaleKind::sum, ScaleKind::constant}) {
            // The context is longer than the sequences of the tests, as a context may be.
            const AttentionConfig config{.kind = kind, .scale = scale, .constant = -0.35, .context = 300};
            if (config.polynomial() || scale == ScaleKind::row) configs.push_back(config);
        }
    return configs;
}

struct AttentionOption {
    AttentionConfig config;
    DecayKind decay;
};

inline std::vector<AttentionOption> every_option(const std::vector<DecayKind>& decays = {
                                                     DecayKind::none, DecayKind::fixed, DecayKind::learned}) {
    std::vector<AttentionOption> options;
    for (const AttentionConfig& config : every_config())
        for (DecayKind decay : decays) options.push_back({config, decay});
    return options;
}

// Whether the scale is `row` or `sum`. The others multiply each row by a number that is known before, as
// `row` does, so a test that takes long leaves them to other tests.
inline bool one_of_each_scale(const AttentionOption& option) {
    return option.config.scale == ScaleKind::row || option.config.scale == ScaleKind::sum;
}

inline std::string describe(const AttentionConfig& config) {
    std::string text = kAttentionNames[(int)config.kind];
    if (!config.polynomial()) return text;
    return text + ", scale " +
           (config.scale == ScaleKind::constant ? "constant" : kScaleNames[(int)config.scale]);
}
inline std::string describe(const AttentionOption& option) {
    return describe(option.config) + ", decay " + kDecayNames[(int)option.decay];
}

// delta (H) as a model starts with it; empty without decay.
inline std::vector<float> decay_of(const AttentionOption& option, int H) {
    std::vector<float> delta(option.decay == DecayKind::none ? 0 : H);
    for (int h = 0; h < (int)delta.size(); h++) delta[h] = initial_decay(h, H);
    return delta;
}

}  // namespace reference
