// What defines a model: its sizes and its kind of attention. config_json.h reads and writes it.
#pragma once
#include <charconv>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <string>
#include <vector>

#include "llmc/activation.h"
#include "llmc/error.h"

enum class ScaleKind { row, context, mean, sum, constant };
enum class DecayKind { none, fixed, learned, gate };
enum class PositionKind { learned, rope };

// The values of a flag or of a key in config.json, in the order of the enumeration.
inline constexpr const char* kScaleNames[] = {"row", "context", "mean", "sum"};  // or a number
inline constexpr const char* kDecayNames[] = {"none", "fixed", "learned", "gate"};
inline constexpr const char* kPositionNames[] = {"learned", "rope"};

// Returns the index of `name` in `names`. If it is not there, the error starts with `where` and lists what is
// allowed.
template <class Names>
int index_of_name(const std::string& name, const Names& names, const std::string& where) {
    std::string allowed;
    int i = 0;
    for (const auto& candidate : names) {
        if (name == candidate) return i;
        allowed += str(i++ ? ", " : "", candidate);
    }
    fail(where, ": ", shown(name), " is not one of ", allowed);
}

// How q k^T / sqrt(D) becomes A. Only polynomials have a scale for each row.
struct AttentionConfig {
    AttentionKind kind = AttentionKind::softmax;
    ScaleKind scale = ScaleKind::row;
    double constant = 1.0;  // for ScaleKind::constant
    int context = 1024;     // the model's context, for ScaleKind::context

    bool softmax() const { return kind == AttentionKind::softmax; }
    int power() const { return attention_power(kind); }
    bool polynomial() const { return power() > 0; }
    // By how much a constant scale multiplies the weights of a kind without row scales.
    double value_factor() const { return !polynomial() && scale == ScaleKind::constant ? constant : 1; }
    bool has_row_sum() const { return polynomial() && scale == ScaleKind::sum; }
};

// m_p = prod_{s<p} (2s+1)(1+2s/D) = E[x^(2p)] for q, k ~ N(0, I_D) and x = q.k/sqrt(D). With c_i =
// 1 / sqrt(m_p n_i) the rows of A have unit norm (the bound of arXiv 2410.18613 with its constant worked
// out).
inline double gaussian_moment(int power, int D) {
    double m = 1.0;
    for (int s = 0; s < power; s++) m *= (2 * s + 1) * (1 + 2.0 * s / D);
    return m;
}

constexpr double kLeastQGain = 0.001, kMostQGain = 1000;

// What q_gain starts at in a new model of this kind without --q-gain. A polynomial learns best if its scores
// start small. A lower degree needs smaller ones. dev/experiments/gain.yaml has the measurements.
inline double default_q_gain(AttentionKind kind) {
    switch (attention_power(kind)) {
        case 1:
        case 2:
            return 0.25;
        case 3:
        case 4:
            return 0.5;
        default:
            return 1;
    }
}

struct GPTConfig {
    int layers = 12;
    int heads = 12;
    int channels = 768;
    int mlp_channels = 0;  // width of the MLP's hidden layer; 0: 4 channels
    int context = 1024;    // longest training sequence, and the length of the table of learned positions
    int vocab_size = 50257;
    int bos_token = -1;           // starts a text; -1: config.json does not say it
    std::vector<int> eos_tokens;  // each of them ends a text; empty: config.json does not say it
    AttentionKind attention_kind = AttentionKind::softmax;
    int softmax_every = 0;  // N: blocks N, 2N, ..., counted from 1, have softmax instead; 0: none
    std::string attention_scale = "row";
    PositionKind positions = PositionKind::learned;
    bool qk_norm = false;
    double q_gain = 1;  // what the gains of qk-norm start at in a new model; 1 in softmax_every's blocks
    DecayKind decay = DecayKind::none;
    int short_conv = 0;  // width of the causal convolution on the qkv projection; 0: none
    bool output_gate = false;

    bool operator==(const GPTConfig&) const = default;

    int head_size() const { return channels / heads; }
    int mlp_width() const { return mlp_channels ? mlp_channels : 4 * channels; }
    // 0 stands for the usual width, so that equal models have equal configurations.
    void set_mlp_channels(int64_t width) { mlp_channels = width == 4 * int64_t{channels} ? 0 : (int)width; }
    bool rope() const { return positions == PositionKind::rope; }

    // `token` stands between the documents of a dataset. It is -1 if the dataset does not say it.
    void set_separator(int token) {
        if (token >= 0) bos_token = token, eos_tokens = {token};
    }

    // Whether softmax_every gives block `layer` softmax in place of attention_kind.
    bool has_softmax_instead(int layer) const {
        return softmax_every > 0 && (layer + 1) % softmax_every == 0;
    }

    // The attention of every block (L).
    std::vector<AttentionConfig> attention_of_blocks() const {
        std::vector<AttentionConfig> blocks(layers, attention());
        for (int l = 0; l < layers; l++)
            if (has_softmax_instead(l))
                blocks[l].kind = AttentionKind::softmax, blocks[l].scale = ScaleKind::row;  // of the others
        return blocks;
    }

    // The parsed form of attention_kind and attention_scale, without softmax_every. It is an error if
    // attention_scale is not a scale.
    AttentionConfig attention() const {
        AttentionConfig a;
        a.kind = attention_kind;
        a.context = context;
        for (size_t i = 0; i < std::size(kScaleNames); i++) {
            if (attention_scale == kScaleNames[i]) return a.scale = (ScaleKind)i, a;
        }
        const char* end = attention_scale.data() + attention_scale.size();
        auto [stop, error] = std::from_chars(attention_scale.data(), end, a.constant);
        const bool is_number = error == std::errc() && stop == end;
        if (!is_number || !std::isnormal((float)a.constant))
            fail("attention_scale: ", shown(attention_scale),
                 " is not row, context, mean, sum or a number other than 0 that a float can hold");
        a.scale = ScaleKind::constant;
        return a;
    }

    // It is an error if no model can have these sizes. `where` (a file or "command line") starts the message.
    void validate(const std::string& where) const {
        auto in_range = [&](const char* name, int64_t value, int64_t low, int64_t high) {
            if (value < low || value > high)
                fail(where, ": ", name, " is ", value, ", expected ", low, " to ", high);
        };
        in_range("layers (n_layer)", layers, 1, 1000);
        in_range("heads (n_head)", heads, 1, 1024);
        in_range("channels (n_embd)", channels, 1, 65536);
        in_range("mlp_channels (n_inner)", mlp_channels, 0, 1 << 18);
        in_range("context (n_positions)", context, 1, 1 << 24);
        in_range("vocab_size", vocab_size, 2, 1 << 24);
        in_range("short_conv", short_conv, 0, 64);
        if (softmax_every != 0 && (softmax_every < 2 || softmax_every > layers))
            fail(where, ": softmax_every is ", softmax_every, ", expected 0, or 2 to the number of layers, ",
                 layers);
        if (softmax_every > 0 && attention_kind == AttentionKind::softmax)
            fail(where, ": softmax_every is ", softmax_every, ", but attention is softmax, for all blocks");
        if (!(q_gain >= kLeastQGain && q_gain <= kMostQGain))
            fail(where, ": q_gain is ", q_gain, ", expected ", kLeastQGain, " to ", kMostQGain);
        if (channels % heads != 0) fail(where, ": ", heads, " heads do not divide ", channels, " channels");
        if (rope() && head_size() % 2 != 0)
            fail(where, ": RoPE needs an even head size, found ", channels, " channels / ", heads,
                 " heads = ", head_size());
        try {
            attention();
        } catch (const Error& e) {
            fail(where, ": ", e.what());
        }
    }
};

struct Preset {
    const char* name;
    int layers, heads, channels, context;
};

// GPT-2's four sizes, and one that learns Shakespeare on two cores in a few minutes.
inline constexpr Preset kPresets[] = {{"nano", 4, 4, 128, 256},
                                      {"gpt2", 12, 12, 768, 1024},
                                      {"gpt2-medium", 24, 16, 1024, 1024},
                                      {"gpt2-large", 36, 20, 1280, 1024},
                                      {"gpt2-xl", 48, 25, 1600, 1024}};

// The kind of attention at the end of the name of a preset, as in "nano-poly3"; softmax if there is none.
inline AttentionKind attention_of_preset(const std::string& name) {
    for (AttentionKind kind :
         {AttentionKind::poly1, AttentionKind::poly2, AttentionKind::poly3, AttentionKind::poly4})
        if (name.ends_with(str("-", kAttentionNames[(int)kind]))) return kind;
    return AttentionKind::softmax;
}

// Returns `config` with the sizes of a preset: one of kPresets, or one of them with a polynomial, as in
// "nano-poly3". Those have that kind of attention, and an MLP as much narrower as an output gate has weights,
// so that the model keeps its number of parameters.
inline GPTConfig with_preset(GPTConfig config, const std::string& name) {
    const AttentionKind kind = attention_of_preset(name);
    const bool polynomial = kind != AttentionKind::softmax;
    for (const Preset& p : kPresets) {
        if (name != (polynomial ? str(p.name, "-", kAttentionNames[(int)kind]) : p.name)) continue;
        config.layers = p.layers, config.heads = p.heads, config.channels = p.channels,
        config.context = p.context;
        if (polynomial) config.attention_kind = kind, config.set_mlp_channels(7 * p.channels / 2);
        return config;
    }
    fail("unknown preset \"", name, "\"");
}
