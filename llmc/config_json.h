// GPTConfig as config.json, whose keys are those of Hugging Face's GPT-2 plus `attention`, `attention_scale`,
// `positions`, `qk_norm`, `decay` and `short_conv`; a config.json without ours is a plain GPT-2. Apart from
// config.h, which all layers include, for the JSON library takes long to build.
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
                                   {"n_positions", c.context},
                                   {"n_ctx", c.context},
                                   {"vocab_size", c.vocab_size},
                                   {"layer_norm_epsilon", 1e-5},
                                   {"activation_function", "gelu_new"},
                                   {"attention", kAttentionNames[(int)c.attention_kind]},
                                   {"attention_scale", c.attention_scale},
                                   {"positions", kPositionNames[(int)c.positions]},
                                   {"qk_norm", c.qk_norm},
                                   {"decay", kDecayNames[(int)c.decay]},
                                   {"short_conv", c.short_conv}};
    // What is not said is null, because Hugging Face's GPT-2 takes a key that is missing for 50256.
    json["bos_token_id"] = json["eos_token_id"] = nullptr;
    if (c.bos_token >= 0) json["bos_token_id"] = c.bos_token;
    if (c.eos_tokens.size() == 1) json["eos_token_id"] = c.eos_tokens[0];
    if (c.eos_tokens.size() > 1) json["eos_token_id"] = c.eos_tokens;
    return json;
}

// Fails, with `where` in front of the message, at a key of the wrong type or value.
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
            fail(where, ": \"", key, "\" is ", brief(json.at(key)), ", this trainer has only ",
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
    // One id, or a list, or null. An id that the vocabulary does not have says nothing: the 50256 of Hugging
    // Face's GPT2Config stays in the config.json of many models with a smaller vocabulary, and -1 in others.
    auto token_ids = [&](const char* key) {
        std::vector<int> ids;
        const nlohmann::json value = json.value(key, nlohmann::json());
        for (const nlohmann::json& id : value.is_array() ? value : nlohmann::json::array({value})) {
            if (id.is_null() && !value.is_array()) continue;
            if (!id.is_number_integer())
                fail(where, ": \"", key, "\" is ", value.dump(),
                     ", expected an integer, a list of them or null");
            if (id >= 0 && id < c.vocab_size) ids.push_back(id.get<int>());
        }
        return ids;
    };
    const std::vector<int> bos_tokens = token_ids("bos_token_id");
    if (!bos_tokens.empty()) c.bos_token = bos_tokens[0];
    c.eos_tokens = token_ids("eos_token_id");
    c.attention_kind = (AttentionKind)name("attention", kAttentionNames);
    c.positions = (PositionKind)name("positions", kPositionNames);
    c.decay = (DecayKind)name("decay", kDecayNames);
    c.short_conv = integer("short_conv", 0);
    if (json.contains("n_inner") && !json.at("n_inner").is_null() &&
        json.at("n_inner") != 4 * int64_t{c.channels})
        fail(where, ": \"n_inner\" is ", brief(json.at("n_inner")), ", this trainer has only 4 n_embd");
    if (json.contains("qk_norm")) {
        if (!json.at("qk_norm").is_boolean())
            fail(where, ": \"qk_norm\" is ", brief(json.at("qk_norm")), ", expected true or false");
        c.qk_norm = json.at("qk_norm").get<bool>();
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
