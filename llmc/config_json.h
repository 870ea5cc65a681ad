// Reads and writes a GPTConfig as config.json. Its keys are those of Hugging Face's GPT-2 plus `attention`,
// `softmax_every`, `attention_scale`, `positions`, `qk_norm`, `q_gain`, `decay`, `short_conv` and
// `output_gate`; without these the model is a plain GPT-2. This is not in config.h, because all layers
// include that and the JSON library compiles slowly.
#pragma once
#include <climits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "llmc/config.h"
#include "llmc/files.h"

inline nlohmann::ordered_json config_to_json(const GPTConfig& c) {
    nlohmann::ordered_json json = {{"model_type", "gpt2"},
                                   {"architectures", {"GPT2LMHeadModel"}},
                                   {"n_layer", c.layers},
                                   {"n_head", c.heads},
                                   {"n_embd", c.channels},
                                   {"n_inner", nullptr},
                                   {"n_positions", c.context},
                                   {"n_ctx", c.context},
                                   {"vocab_size", c.vocab_size},
                                   {"layer_norm_epsilon", 1e-5},
                                   {"activation_function", "gelu_new"},
                                   {"attention", kAttentionNames[(int)c.attention_kind]},
                                   {"softmax_every", c.softmax_every},
                                   {"attention_scale", c.attention_scale},
                                   {"positions", kPositionNames[(int)c.positions]},
                                   {"qk_norm", c.qk_norm},
                                   {"q_gain", c.q_gain},
                                   {"decay", kDecayNames[(int)c.decay]},
                                   {"short_conv", c.short_conv},
                                   {"output_gate", c.output_gate}};
    if (c.mlp_channels) json["n_inner"] = c.mlp_channels;
    // Unknown ids are written as null, because Hugging Face's GPT-2 reads a missing key as 50256.
    json["bos_token_id"] = json["eos_token_id"] = nullptr;
    if (c.bos_token >= 0) json["bos_token_id"] = c.bos_token;
    if (c.eos_tokens.size() == 1) json["eos_token_id"] = c.eos_tokens[0];
    if (c.eos_tokens.size() > 1) json["eos_token_id"] = c.eos_tokens;
    return json;
}

// Fails at a key with a wrong type or value. `where` is put in front of the message.
inline GPTConfig config_from_json(const nlohmann::json& json, const std::string& where) {
    if (!json.is_object()) fail(where, ": expected a JSON object");
    auto integer = [&](const char* key, int fallback) {
        if (!json.contains(key)) {
            if (fallback >= 0) return fallback;
            fail(where, ": \"", key, "\" is missing");
        }
        return (int)json_integer(json, key, INT_MIN, INT_MAX, where);
    };
    auto name = [&](const char* key, const auto& names) {
        if (!json.contains(key)) return 0;
        const auto& value = json.at(key);
        if (!value.is_string()) fail(where, ": \"", key, "\" is ", brief(value), ", expected a string");
        return index_of_name(value.get<std::string>(), names, str(where, ": \"", key, "\""));
    };
    auto fixed = [&](const char* key, const nlohmann::json& expected) {
        if (json.contains(key) && json.at(key) != expected)
            fail(where, ": \"", key, "\" is ", brief(json.at(key)), ", but this trainer supports only ",
                 brief(expected));
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
    // The value is an id, a list of ids, or null. An id outside of the vocabulary is ignored, because many
    // models with a smaller vocabulary still have the 50256 of Hugging Face's GPT2Config in their
    // config.json, and others have -1.
    auto token_ids = [&](const char* key) {
        std::vector<int> ids;
        const nlohmann::json value = json.value(key, nlohmann::json());
        for (const nlohmann::json& id : value.is_array() ? value : nlohmann::json::array({value})) {
            if (id.is_null() && !value.is_array()) continue;
            if (!id.is_number_integer())
                fail(where, ": \"", key, "\" is ", value.dump(),
                     ", expected an integer, a list of integers or null");
            if (id >= 0 && id < c.vocab_size) ids.push_back(id.get<int>());
        }
        return ids;
    };
    const std::vector<int> bos_tokens = token_ids("bos_token_id");
    if (!bos_tokens.empty()) c.bos_token = bos_tokens[0];
    c.eos_tokens = token_ids("eos_token_id");
    c.attention_kind = (AttentionKind)name("attention", kAttentionNames);
    c.softmax_every = integer("softmax_every", 0);
    c.positions = (PositionKind)name("positions", kPositionNames);
    c.decay = (DecayKind)name("decay", kDecayNames);
    c.short_conv = integer("short_conv", 0);
    if (json.contains("n_inner") && !json.at("n_inner").is_null()) {
        int width = integer("n_inner", -1);
        if (width < 1) fail(where, ": \"n_inner\" is ", width, ", expected a width of at least 1, or null");
        c.set_mlp_channels(width);
    }
    auto boolean = [&](const char* key) {
        if (!json.contains(key)) return false;
        if (!json.at(key).is_boolean())
            fail(where, ": \"", key, "\" is ", brief(json.at(key)), ", expected true or false");
        return json.at(key).get<bool>();
    };
    c.qk_norm = boolean("qk_norm");
    c.output_gate = boolean("output_gate");
    if (json.contains("q_gain")) {
        if (!json.at("q_gain").is_number())
            fail(where, ": \"q_gain\" is ", brief(json.at("q_gain")), ", expected a number");
        c.q_gain = json.at("q_gain").get<double>();
    }
    if (json.contains("attention_scale")) {
        const auto& scale = json.at("attention_scale");
        if (!scale.is_string() && !scale.is_number())
            fail(where, ": \"attention_scale\" is ", brief(scale), ", expected a string or a number");
        c.attention_scale = scale.is_string() ? scale.get<std::string>() : scale.dump();
    }
    c.validate(where);
    return c;
}
