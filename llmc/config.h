// What a model is: its sizes and its kind of attention. Read from and written to config.json, whose keys are
// those of Hugging Face's GPT-2 plus `attention`, `attention_scale`, `positions`, `qk_norm`, `decay` and
// `short_conv`; a config.json without ours is a plain GPT-2.
#pragma once
#include <charconv>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "llmc/error.h"

enum class ScaleKind { row, context, mean, sum, constant };
enum class DecayKind { none, fixed, learned };
enum class PositionKind { learned, rope };

// The values of a flag or of a key in config.json, in the order of the enumeration.
inline constexpr const char* kAttentionNames[] = {"softmax", "poly1", "poly2", "poly3", "poly4"};
inline constexpr const char* kScaleNames[] = {"row", "context", "mean", "sum"};  // or a number
inline constexpr const char* kDecayNames[] = {"none", "fixed", "learned"};
inline constexpr const char* kPositionNames[] = {"learned", "rope"};

// The index of `name` in `names`; an error that starts with `where` and lists what is allowed otherwise.
template <class Names>
int index_of_name(const std::string& name, const Names& names, const std::string& where) {
    std::string allowed;
    int i = 0;
    for (const auto& candidate : names) {
        if (name == candidate) return i;
        allowed += str(i++ ? ", " : "", candidate);
    }
    fail(where, ": \"", name, "\" is not one of ", allowed);
}

// How q k^T / sqrt(D) becomes A. `sum` and `constant` and the rest concern polynomials only.
struct AttentionConfig {
    int power = 0;  // 0: softmax; 1 to 4: A_ij = c_i x_ij^power
    ScaleKind scale = ScaleKind::row;
    double constant = 1.0;  // c_i for ScaleKind::constant
    int context = 1024;     // the model's context, for ScaleKind::context

    bool softmax() const { return power == 0; }
    bool has_row_sum() const { return power > 0 && scale == ScaleKind::sum; }
};

// m_p = prod_{s<p} (2s+1)(1+2s/D) = E[x^(2p)] for q, k ~ N(0, I_D) and x = q.k/sqrt(D): what x^p must be
// scaled by for attention rows of unit norm (the bound of arXiv 2410.18613 with its constant worked out).
inline double gaussian_moment(int power, int D) {
    double m = 1.0;
    for (int s = 0; s < power; s++) m *= (2 * s + 1) * (1 + 2.0 * s / D);
    return m;
}

struct GPTConfig {
    int layers = 12;
    int heads = 12;
    int channels = 768;
    int context =
        1024;  // longest training sequence; length of the position table where positions are learned
    int vocab_size = 50257;
    int eot_token = -1;  // ends a document; -1: there is none
    int power = 0;       // attention: 0 is softmax, p is poly<p>
    std::string attention_scale = "row";
    PositionKind positions = PositionKind::learned;
    bool qk_norm = false;
    DecayKind decay = DecayKind::none;
    int short_conv = 0;  // width of the causal convolution on the qkv projection; 0: none

    bool operator==(const GPTConfig&) const = default;

    int head_size() const { return channels / heads; }
    bool rope() const { return positions == PositionKind::rope; }

    // The parsed form of power and attention_scale; an error where attention_scale is no scale.
    AttentionConfig attention() const {
        AttentionConfig a;
        a.power = power;
        a.context = context;
        for (size_t i = 0; i < std::size(kScaleNames); i++) {
            if (attention_scale == kScaleNames[i]) return a.scale = (ScaleKind)i, a;
        }
        const char* end = attention_scale.data() + attention_scale.size();
        auto [stop, error] = std::from_chars(attention_scale.data(), end, a.constant);
        if (error != std::errc() || stop != end || !std::isfinite(a.constant) || a.constant == 0)
            fail("attention_scale: \"", attention_scale,
                 "\" is not row, context, mean, sum or a number other than 0");
        a.scale = ScaleKind::constant;
        return a;
    }

    // Throws where the sizes make no model. `where` (a file or "command line") starts the message.
    void validate(const std::string& where) const {
        auto in_range = [&](const char* name, int64_t value, int64_t low, int64_t high) {
            if (value < low || value > high)
                fail(where, ": ", name, " is ", value, ", expected ", low, " to ", high);
        };
        in_range("layers (n_layer)", layers, 1, 1000);
        in_range("heads (n_head)", heads, 1, 1024);
        in_range("channels (n_embd)", channels, 1, 65536);
        in_range("context (n_positions)", context, 1, 1 << 24);
        in_range("vocab_size", vocab_size, 2, 1 << 24);
        in_range("attention power", power, 0, 4);
        in_range("short_conv", short_conv, 0, 64);
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

    nlohmann::ordered_json to_json() const {
        nlohmann::ordered_json json = {{"model_type", "gpt2"},
                                       {"architectures", {"GPT2LMHeadModel"}},
                                       {"n_layer", layers},
                                       {"n_head", heads},
                                       {"n_embd", channels},
                                       {"n_positions", context},
                                       {"n_ctx", context},
                                       {"vocab_size", vocab_size},
                                       {"layer_norm_epsilon", 1e-5},
                                       {"activation_function", "gelu_new"},
                                       {"attention", kAttentionNames[power]},
                                       {"attention_scale", attention_scale},
                                       {"positions", kPositionNames[(int)positions]},
                                       {"qk_norm", qk_norm},
                                       {"decay", kDecayNames[(int)decay]},
                                       {"short_conv", short_conv}};
        if (eot_token >= 0) json["bos_token_id"] = json["eos_token_id"] = eot_token;
        return json;
    }

    static GPTConfig from_json(const nlohmann::json& json, const std::string& where) {
        if (!json.is_object()) fail(where, ": expected a JSON object");
        auto integer = [&](const char* key, int fallback) {
            if (!json.contains(key)) {
                if (fallback >= 0) return fallback;
                fail(where, ": \"", key, "\" is missing");
            }
            const auto& value = json.at(key);
            if (!value.is_number_integer() || value < -(int64_t{1} << 31) || value >= (int64_t{1} << 31))
                fail(where, ": \"", key, "\" is ", value.dump(), ", expected an integer");
            return value.get<int>();
        };
        auto name = [&](const char* key, const auto& names) {
            if (!json.contains(key)) return 0;
            const auto& value = json.at(key);
            if (!value.is_string()) fail(where, ": \"", key, "\" is ", value.dump(), ", expected a string");
            return index_of_name(value.get<std::string>(), names, str(where, ": \"", key, "\""));
        };
        auto fixed = [&](const char* key, const nlohmann::json& expected) {
            if (json.contains(key) && json.at(key) != expected)
                fail(where, ": \"", key, "\" is ", json.at(key).dump(), ", this trainer has only ",
                     expected.dump());
        };
        fixed("model_type", "gpt2");
        fixed("layer_norm_epsilon", 1e-5);
        fixed("activation_function", "gelu_new");
        fixed("scale_attn_weights", true);
        fixed("scale_attn_by_inverse_layer_idx", false);
        fixed("tie_word_embeddings", true);
        fixed("add_cross_attention", false);
        GPTConfig c;
        c.layers = integer("n_layer", -1);
        c.heads = integer("n_head", -1);
        c.channels = integer("n_embd", -1);
        c.context = integer("n_positions", -1);
        c.vocab_size = integer("vocab_size", -1);
        if (json.contains("eos_token_id") && !json.at("eos_token_id").is_null())
            c.eot_token = integer("eos_token_id", -1);
        c.power = name("attention", kAttentionNames);
        c.positions = (PositionKind)name("positions", kPositionNames);
        c.decay = (DecayKind)name("decay", kDecayNames);
        c.short_conv = integer("short_conv", 0);
        if (json.contains("n_inner") && !json.at("n_inner").is_null() &&
            json.at("n_inner") != 4 * int64_t{c.channels})
            fail(where, ": \"n_inner\" is ", json.at("n_inner").dump(), ", this trainer has only 4 n_embd");
        if (json.contains("qk_norm")) {
            if (!json.at("qk_norm").is_boolean())
                fail(where, ": \"qk_norm\" is ", json.at("qk_norm").dump(), ", expected true or false");
            c.qk_norm = json.at("qk_norm").get<bool>();
        }
        if (json.contains("attention_scale")) {
            const auto& scale = json.at("attention_scale");
            if (!scale.is_string() && !scale.is_number())
                fail(where, ": \"attention_scale\" is ", scale.dump(), ", expected a string or a number");
            c.attention_scale = scale.is_string() ? scale.get<std::string>() : scale.dump();
        }
        c.validate(where);
        return c;
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

// The sizes of a preset of kPresets put over `config`.
inline GPTConfig with_preset(GPTConfig config, const std::string& name) {
    for (const Preset& p : kPresets) {
        if (name != p.name) continue;
        config.layers = p.layers, config.heads = p.heads, config.channels = p.channels,
        config.context = p.context;
        return config;
    }
    fail("unknown preset \"", name, "\"");
}
