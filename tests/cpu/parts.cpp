// The small parts: random numbers, initial weights, schedules, the sampler, config.json and the metrics log.
#include <doctest/doctest.h>
#include <omp.h>

#include <cmath>
#include <map>
#include <set>
#include <vector>

#include "llmc/attention_scale.h"
#include "llmc/config_json.h"
#include "llmc/metrics.h"
#include "llmc/options.h"
#include "llmc/parameters.h"
#include "llmc/peak.h"
#include "llmc/rng.h"
#include "llmc/sampler.h"
#include "llmc/schedule.h"
#include "tests/attention_kinds.h"
#include "tests/helpers.h"

TEST_CASE("Philox4x32-10 gives its authors' known answers") {
    CHECK(random_block(0, 0, 0) == PhiloxBlock{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
    CHECK(random_block(~0ull, ~0ull, ~0ull) == PhiloxBlock{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
    CHECK(random_block(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88) ==
          PhiloxBlock{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

// If this changed, a seed would no longer give the same weights as before.
TEST_CASE("normal numbers are Box and Muller's of the blocks of a stream, from block 0 on") {
    float x[3];
    fill_normal(x, 3, 0.5, 0, 0);
    auto radius = [](uint32_t bits) { return 0.5 * std::sqrt(-2 * std::log((bits + 0.5) / 4294967296)); };
    const double turn = 2 * std::acos(-1.0) / 4294967296;
    CHECK(x[0] == doctest::Approx(radius(0x6627e8d5) * std::cos(turn * 0xe169c58d)).epsilon(1e-6));
    CHECK(x[1] == doctest::Approx(radius(0x6627e8d5) * std::sin(turn * 0xe169c58d)).epsilon(1e-6));
    CHECK(x[2] == doctest::Approx(radius(0xbc57ac4c) * std::cos(turn * 0x9b00dbd8)).epsilon(1e-6));
    CHECK(random_stream("a") == 0xaf63dc4c8601ec8c);  // a test vector of FNV-1a
}

TEST_CASE("normal numbers have the moments of a normal distribution, whatever the number of threads") {
    size_t n = 1 << 20;
    std::vector<float> x(n), y(n + 3);
    fill_normal(x.data(), n, 0.02, 7, random_stream("a"));
    double m1 = 0, m2 = 0, m3 = 0, m4 = 0;
    for (float value : x) {
        double z = value / 0.02;
        m1 += z / n, m2 += z * z / n, m3 += z * z * z / n, m4 += z * z * z * z / n;
    }
    CHECK(std::fabs(m1) < 0.005);
    CHECK(std::fabs(m2 - 1) < 0.01);
    CHECK(std::fabs(m3) < 0.02);
    CHECK(std::fabs(m4 - 3) < 0.05);
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    fill_normal(y.data(), n + 3, 0.02, 7,
                random_stream("a"));  // a longer tensor begins with the same numbers
    omp_set_num_threads(threads);
    CHECK(std::equal(x.begin(), x.end(), y.begin()));
    fill_normal(y.data(), n, 0.02, 7, random_stream("b"));
    CHECK(!std::equal(x.begin(), x.end(), y.begin()));
    fill_normal(y.data(), n, 0.02, 8, random_stream("a"));
    CHECK(!std::equal(x.begin(), x.end(), y.begin()));
}

TEST_CASE("the table has GPT-2's tensors and numbers of parameters") {
    auto count = [](const char* preset) {
        return ParameterTable(with_preset(GPTConfig(), preset), 50304).count;
    };
    CHECK(count("gpt2") == 124439808);
    CHECK(count("gpt2-medium") == 354823168);
    CHECK(count("gpt2-large") == 774030080);
    CHECK(count("gpt2-xl") == 1557611200);
    // With a polynomial, a model of this size has its recipe and as many parameters, but no table of
    // positions.
    for (const char* name : {"nano-poly3", "gpt2-poly1", "gpt2-medium-poly2", "gpt2-large-poly4"}) {
        CAPTURE(name);
        ModelFlags flags;
        flags.preset = name;
        const GPTConfig config = flags.fresh(50304, -1);
        CHECK(config.attention_kind == attention_of_preset(name));
        CHECK(config.decay == DecayKind::gate);
        CHECK((config.output_gate && config.qk_norm && config.rope()));
        const std::string size = std::string(name).substr(0, std::string(name).find("-poly"));
        const double usual = (double)count(size.c_str()) - (double)config.context * config.channels;
        CHECK(std::abs(ParameterTable(config, 50304).count / usual - 1) < 2.5e-3);
        // Given flags are stronger, and the MLP keeps its share of a given width.
        flags.channels = 2 * config.channels, flags.attention = "softmax", flags.decay = "none";
        const GPTConfig other = flags.fresh(50304, -1);
        CHECK(other.attention_kind == AttentionKind::softmax);
        CHECK(other.decay == DecayKind::none);
        CHECK(other.mlp_width() == 7 * config.channels);
        flags.mlp_channels = 9;
        CHECK(flags.fresh(50304, -1).mlp_width() == 9);
    }

    GPTConfig config;
    config.layers = 2, config.heads = 3, config.channels = 12, config.context = 9, config.vocab_size = 17;
    config.qk_norm = true, config.decay = DecayKind::learned, config.short_conv = 3;
    config.output_gate = true;
    SUBCASE("learned decay") {}
    SUBCASE("gate") {
        config.decay = DecayKind::gate;
    }
    ParameterTable table(config, 32);
    std::set<std::string> names;
    std::vector<Slice> slices;
    for (const ParameterTensor& t : table.tensors) {
        CAPTURE(t.name);
        CHECK(names.insert(t.name).second);
        CHECK(t.offset % 16 == 0);
        slices.push_back(t.slice());
        bool matrix = t.shape.size() == 2 && !t.name.ends_with("conv.weight");
        CHECK((t.kind != TensorKind::vector) == matrix);
        CHECK((t.offset < table.vectors().begin) == matrix);
        if (t.layer >= 0) {
            Slice of_layer = matrix ? table.block(t.layer) : table.vectors_of(t.layer);
            CHECK(overlap(t.slice(), of_layer).size() == t.size);
        }
    }
    std::sort(slices.begin(), slices.end(), [](Slice a, Slice b) { return a.begin < b.begin; });
    for (size_t i = 0; i < slices.size(); i++)
        CHECK(slices[i].end <= (i + 1 < slices.size() ? slices[i + 1].begin : table.size));
    std::vector<float> array(table.size);
    Tensors<float> view = table.view(array.data());
    for (const ParameterTensor& t : table.tensors) {
        if (t.name == "h.1.attn.q_gain") CHECK(view.h[1].q_gain == array.data() + t.offset);
        if (t.name == "ln_f.bias") CHECK(view.ln_f_bias == array.data() + t.offset);
        if (t.name == "wpe.weight") CHECK(t.offset >= 32 * 12);  // it comes after the padded vocabulary
    }
    const bool gate = config.decay == DecayKind::gate;
    CHECK(names.contains("h.0.attn.decay") == !gate);
    CHECK(names.contains("h.0.attn.decay_gate.weight") == gate);
    CHECK(names.contains("h.0.attn.decay_gate.bias") == gate);
}

TEST_CASE("tensors start as the design says") {
    GPTConfig config;
    config.layers = 8, config.heads = 4, config.channels = 64, config.vocab_size = 300;
    config.qk_norm = true, config.decay = DecayKind::learned, config.short_conv = 4;
    config.q_gain = 0.25, config.output_gate = true;
    SUBCASE("learned decay") {}
    SUBCASE("gate") {
        config.decay = DecayKind::gate;
    }
    ParameterTable table(config, 304);
    for (const ParameterTensor& t : table.tensors) {
        CAPTURE(t.name);
        std::vector<float> x(t.size, NAN);
        initialize_tensor(x.data(), t, 1);
        double squares = 0;
        for (float value : x) squares += (double)value * value;
        double rms = std::sqrt(squares / t.size);
        if (t.name.ends_with(".bias") && !t.name.ends_with("gate.bias")) CHECK(rms == 0);
        if (t.name.ends_with("c_proj.weight")) CHECK(rms == doctest::Approx(0.02 / 4).epsilon(0.05).scale(0));
        if (t.name.ends_with("c_attn.weight") || t.name.ends_with("c_fc.weight") ||
            t.name.ends_with("te.weight") || t.name.ends_with("out_gate.weight"))
            CHECK(rms == doctest::Approx(0.02).epsilon(0.05).scale(0));
        if (t.name.ends_with("gate.weight")) CHECK(rms == doctest::Approx(0.02).epsilon(0.15).scale(0));
        if (t.name.ends_with("q_gain")) CHECK(x == std::vector<float>(4, 0.25f));
        if (t.name.ends_with("attn.decay") || t.name.ends_with("gate.bias"))
            CHECK(x == std::vector<float>{1.0f, 2.5f, 4.0f, 5.5f});
        if (t.name.ends_with("conv.weight"))
            for (size_t i = 0; i < t.size; i++) CHECK(x[i] == (i < 3 * 64 ? 1.0f : 0.0f));
    }
}

TEST_CASE("learning rates") {
    auto rate = [](const char* schedule, int step) {
        return learning_rate_at(schedule, step, 100, 10, 2.0, 0.1);
    };
    for (const std::string& schedule : kScheduleNames) {
        CAPTURE(schedule);
        CHECK(rate(schedule.c_str(), 1) == doctest::Approx(0.2));
        CHECK(rate(schedule.c_str(), 10) == doctest::Approx(2.0));
        CHECK(rate(schedule.c_str(), 100) == doctest::Approx(schedule == "constant" ? 2.0 : 0.2));
        CHECK(rate(schedule.c_str(), 150) == doctest::Approx(schedule == "constant" ? 2.0 : 0.2));
        for (int step = 11; step <= 100; step++)
            CHECK(rate(schedule.c_str(), step) <= rate(schedule.c_str(), step - 1));
    }
    CHECK(rate("cosine", 55) == doctest::Approx(1.1));
    CHECK(rate("linear", 55) == doctest::Approx(1.1));
    CHECK(rate("cosine", 32) > rate("linear", 32));
    CHECK(rate("wsd", 80) == doctest::Approx(2.0));
    CHECK(rate("wsd", 90) == doctest::Approx(1.1));
    CHECK(learning_rate_at("cosine", 1, 1, 0, 2.0, 0.1) == doctest::Approx(0.2));   // a run of one step
    CHECK(learning_rate_at("cosine", 5, 5, 10, 2.0, 0.1) == doctest::Approx(1.0));  // it ends in the warm-up
}

TEST_CASE("the sampler draws from the distribution that its options leave") {
    const std::vector<float> logits = {std::log(0.4f), std::log(0.1f), std::log(0.3f), std::log(0.2f)};
    auto frequencies = [&](const SamplerOptions& options) {
        std::vector<double> f(4);
        for (int i = 0; i < 20000; i++) f[sample_token(logits.data(), 4, options, i)] += 1 / 20000.0;
        return f;
    };
    auto check = [&](const SamplerOptions& options, std::vector<double> expected) {
        std::vector<double> f = frequencies(options);
        for (int v = 0; v < 4; v++) {
            CAPTURE(v);
            CHECK(std::fabs(f[v] - expected[v]) < 0.015);
            if (expected[v] == 0) CHECK(f[v] == 0);
        }
    };
    check({}, {0.4, 0.1, 0.3, 0.2});
    check({.temperature = 0.5}, {0.16 / 0.3, 0.01 / 0.3, 0.09 / 0.3, 0.04 / 0.3});
    check({.top_k = 2}, {0.4 / 0.7, 0, 0.3 / 0.7, 0});
    check({.top_k = 9}, {0.4, 0.1, 0.3, 0.2});
    check({.top_p = 0.69}, {0.4 / 0.7, 0, 0.3 / 0.7, 0});
    check({.top_p = 0.85}, {0.4 / 0.9, 0, 0.3 / 0.9, 0.2 / 0.9});
    check({.top_p = 0.0}, {1, 0, 0, 0});
    // They apply in this order: temperature, top-k, top-p.
    check({.temperature = 0.5, .top_p = 0.8}, {0.64, 0, 0.36, 0});
    check({.top_k = 3, .top_p = 0.75}, {0.4 / 0.7, 0, 0.3 / 0.7, 0});
    check({.temperature = 0}, {1, 0, 0, 0});
    // If tokens are equal, the first ones stay. Two of four reach a half.
    const std::vector<float> equal(4);
    for (const SamplerOptions& options : {SamplerOptions{.top_k = 2}, SamplerOptions{.top_p = 0.5}}) {
        std::set<int> drawn;
        for (int i = 0; i < 100; i++) drawn.insert(sample_token(equal.data(), 4, options, i));
        CHECK(drawn == std::set<int>{0, 1});
    }
    CHECK(sample_token(equal.data(), 4, {.temperature = 0}, 0) == 0);
    CHECK(frequencies({.seed = 1}) == frequencies({.seed = 1}));
    CHECK(frequencies({.seed = 1}) != frequencies({.seed = 2}));
    std::vector<float> huge = {1e30f, -1e30f, 3e38f, 0};
    CHECK(sample_token(huge.data(), 4, {}, 0) == 2);
    huge[1] = NAN;
    check_error([&] { sample_token(huge.data(), 4, {}, 0); }, {"not finite"});
}

TEST_CASE("scales of the rows: moments and effective lengths against direct sums") {
    CHECK(gaussian_moment(1, 64) == 1);
    CHECK(gaussian_moment(3, 64) == doctest::Approx(3 * (1 + 2.0 / 64) * 5 * (1 + 4.0 / 64)));
    for (double delta : {-3.0, 0.0, 1.0, 5.5, 20.0}) {
        CAPTURE(delta);
        double log_g = log_gamma(delta), gamma = std::exp(log_g);
        CHECK(gamma == doctest::Approx(1 / (1 + std::exp(-delta))).epsilon(1e-12));
        std::vector<double> e = row_scale_log_derivatives(300, log_g);
        double n = 0, weighted = 0;
        for (int i = 0; i < 300; i++) {
            n += std::pow(gamma, 2.0 * i);
            weighted += i * std::pow(gamma, 2.0 * i);
            CHECK(effective_row_length(i, log_g) == doctest::Approx(n).epsilon(1e-9));
            CHECK(e[i] == doctest::Approx(weighted / n).epsilon(1e-9));
        }
    }
    CHECK(effective_row_length(41, 0) == 42);
    CHECK(log_gamma(-1000) == -1000);
    CHECK(log_gamma(1000) == 0);
}

TEST_CASE("activations: values, slopes by finite differences, and no kind but those that have a name") {
    const double keys = 12, w = -0.3, step = 1e-5;
    const ScalarMath math;
    for (AttentionKind kind : reference::every_kind()) {
        INFO(std::string(kAttentionNames[(int)kind]));
        with_activation(kind, [&]<class A>(A) {
            CHECK(attention_power(kind) == A::kPower);
            if constexpr (!A::kOnline)
                for (double x : {-2.5, -0.4, 0.7, 3.0}) {
                    CAPTURE(x);
                    const double value = A::value(x, keys, math), slope = A::slope(x, value, math);
                    CHECK(value == doctest::Approx(A::kPower > 0 ? std::pow(x, A::kPower)
                                                                 : 1 / (1 + std::exp(std::log(keys) - x))));
                    const double above = A::value(x + step, keys, math),
                                 below = A::value(x - step, keys, math);
                    CHECK(slope == doctest::Approx((above - below) / (2 * step)).epsilon(1e-6));
                    double weighted, weighted_slope;
                    A::weighted(weighted, weighted_slope, x, w, keys, math);
                    CHECK(weighted == doctest::Approx(w * value));
                    CHECK(weighted_slope * A::kSlopeFactor == doctest::Approx(w * slope));
                }
        });
    }
    const AttentionKind unknown = (AttentionKind)std::size(kAttentionNames);
    check_error([&] { with_activation(unknown, [](auto) {}); }, {"attention", "no kind"});
    check_error([&] { with_linear_power(AttentionKind::poly4, [](auto) {}); }, {"poly4", "linear"});
}

TEST_CASE("config.json goes out and comes back; what it may not say is refused") {
    GPTConfig config;
    config.layers = 3, config.heads = 2, config.channels = 20, config.context = 7, config.vocab_size = 99;
    config.attention_kind = AttentionKind::poly2, config.attention_scale = "0.125",
    config.positions = PositionKind::rope, config.softmax_every = 3;
    config.qk_norm = true, config.decay = DecayKind::gate, config.short_conv = 4;
    config.q_gain = 0.3, config.output_gate = true, config.mlp_channels = 7;
    for (const std::vector<int>& ends : {std::vector<int>(), {98}, {3, 0}}) {
        config.bos_token = ends.empty() ? -1 : ends[0], config.eos_tokens = ends;
        CHECK(config_from_json(nlohmann::json::parse(config_to_json(config).dump()), "f") == config);
    }
    CHECK(config_to_json(GPTConfig()).at("eos_token_id").is_null());
    // GPT-2's own width says the same as null, which other GPT-2s have.
    nlohmann::json usual = config_to_json(config);
    usual["n_inner"] = 80;
    CHECK(config_to_json(config_from_json(usual, "f")).at("n_inner").is_null());
    CHECK(config_from_json(usual, "f").mlp_width() == 80);
    const nlohmann::json good = config_to_json(config);
    auto refused = [&](const char* key, nlohmann::json value, std::initializer_list<std::string> parts) {
        CAPTURE(key);
        nlohmann::json bad = good;
        bad[key] = value;
        check_error([&] { config_from_json(bad, "the/file"); }, parts);
    };
    refused("n_head", 3, {"the/file", "3", "20"});
    refused("n_head", 20, {"the/file", "even"});  // the head size is 1, with RoPE
    refused("n_layer", 0, {"the/file", "n_layer", "0"});
    refused("n_layer", "two", {"the/file", "n_layer", "two"});
    refused("n_embd", 1e10, {"the/file", "n_embd"});
    refused("n_embd", -4, {"the/file", "n_embd"});
    refused("vocab_size", 1, {"the/file", "vocab_size"});
    refused("attention", "cosine", {"the/file", "cosine", "softmax, poly1"});
    refused("attention", 3, {"the/file", "attention"});
    refused("attention", "softmax", {"the/file", "softmax_every is 3", "softmax"});
    refused("softmax_every", 1, {"the/file", "softmax_every is 1", "the number of layers"});
    refused("softmax_every", 1001, {"the/file", "softmax_every is 1001", "the number of layers"});
    refused("softmax_every", "all", {"the/file", "softmax_every", "all"});
    refused("attention_scale", "big", {"the/file", "big"});
    refused("attention_scale", true, {"the/file", "attention_scale"});
    refused("attention_scale", "nan", {"the/file", "nan"});
    refused("decay", "slow", {"the/file", "slow"});
    refused("positions", "alibi", {"the/file", "alibi"});
    refused("qk_norm", 1, {"the/file", "qk_norm"});
    refused("short_conv", 65, {"the/file", "short_conv"});
    refused("q_gain", "large", {"the/file", "q_gain", "large"});
    refused("q_gain", 0, {"the/file", "q_gain", "0", "0.001 to 1000"});
    refused("output_gate", "open", {"the/file", "output_gate", "open", "true or false"});
    refused("model_type", "llama", {"the/file", "llama"});
    refused("activation_function", "relu", {"the/file", "relu"});
    for (int width : {0, -1, 1 << 19})
        refused("n_inner", width, {"the/file", "n_inner", std::to_string(width)});
    refused("n_inner", "wide", {"the/file", "n_inner", "wide"});
    for (const char* key : {"bos_token_id", "eos_token_id"})
        for (const nlohmann::json& value :
             {R"("</s>")"_json, "1.5"_json, "true"_json, "[1, null]"_json, "[[1]]"_json})
            refused(key, value, {"the/file", key, value.dump(), "integer"});
    nlohmann::json outside = good;
    outside["bos_token_id"] = 50256, outside["eos_token_id"] = {99, -1, 5, UINT64_MAX};
    CHECK(config_from_json(outside, "f").bos_token == -1);
    CHECK(config_from_json(outside, "f").eos_tokens == std::vector<int>{5});
    for (const char* key : {"n_layer", "n_head", "n_embd", "n_positions", "vocab_size"}) {
        nlohmann::json bad = good;
        bad.erase(key);
        check_error([&] { config_from_json(bad, "the/file"); }, {"the/file", key, "missing"});
    }
    check_error([] { config_from_json(nlohmann::json::array(), "the/file"); }, {"the/file", "object"});
    nlohmann::json number = good;
    number["attention_scale"] = 0.125;
    CHECK(config_from_json(number, "f").attention().constant == 0.125);
}

TEST_CASE("the metrics log drops what lies past the step it goes on from") {
    TempFolder folder;
    std::string path = folder / "metrics.jsonl";
    {
        MetricsLog log(path, 0);
        for (int step = 1; step <= 5; step++) log.write({{"step", step}, {"loss", 1.0 / step}});
    }
    put_file(path, read_text(path) +
                       std::string("{\"step\":3}\0\0\n", 13) +  // zeros, which a power cut may leave
                       "{\"step\":-1}\n{\"step\":{}}\n[3]\n" + "{\"step\": 6, \"lo");  // killed while writing
    MetricsLog(path, 3).write({{"step", 4}, {"loss", 9.0}});
    CHECK(read_text(path) ==
          "{\"step\":1,\"loss\":1.0}\n{\"step\":2,\"loss\":0.5}\n"
          "{\"step\":3,\"loss\":0.3333333333333333}\n{\"step\":4,\"loss\":9.0}\n");
    check_error([] { MetricsLog("/no/such/folder/metrics.jsonl", 0); }, {"/no/such/folder/metrics.jsonl"});
}

TEST_CASE("the line of a head's norms in metrics.jsonl") {
    AttentionNorms norms = {1.5, 2.5, 0.75, 0.25, 3.5, 0.5, 1.25, 4, std::nan("")};
    AttentionConfig config;
    nlohmann::ordered_json softmax = {{"step", 7}, {"layer", 1}, {"head", 2}}, cubic = softmax;
    append_norms(softmax, norms, config);
    CHECK(softmax.dump() ==
          R"({"step":7,"layer":1,"head":2,"attention_norm":1.5,"jacobian_norm":2.5,"max_weight":0.75,)"
          R"("negative_mass":0.25,"effective_keys":3.5,"entropy":0.5,"score_std":1.25,"max_score":4.0})");
    config.kind = AttentionKind::poly3;
    append_norms(cubic, norms, config);
    CHECK(cubic.dump() ==
          R"({"step":7,"layer":1,"head":2,"attention_norm":1.5,"jacobian_norm":2.5,"max_weight":0.75,)"
          R"("negative_mass":0.25,"effective_keys":3.5,"score_std":1.25,"max_score":4.0,)"
          R"("moment_excess":null})");
    norms.mean_gate = 0.875;
    append_norms(softmax, norms, config);
    CHECK(softmax.at("mean_gate") == 0.875);
}

TEST_CASE("a peak that was measured in a bad moment is measured again, and no step is above it") {
    std::vector<double> rates = {100, 800, 300};  // the results of the measurements, one after the other
    size_t measured = 0;
    Peak peak([&] {
        if (measured == rates.size()) fail("out of memory");
        return rates[measured++];
    });
    CHECK(peak.share(50) == 0.5);
    CHECK(peak.share(400) == 0.5);  // the peak is measured again, so the share is not 4
    CHECK(peak.share(800) == 1);
    CHECK(measured == 2);
    CHECK(peak.share(1000) == 1);  // the step is faster than the new measurement
    CHECK(peak.share(500) == 0.5);
    CHECK(measured == 3);
    CHECK(peak.share(2000) == 1);  // the measurement fails
    CHECK(peak.share(500) == 0.25);
}
