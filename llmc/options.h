// The command line, the same for every backend: one struct a command, parsed by CLI11 and checked. Every
// complaint is a usage Error that names the flag, the value and what is allowed.
#pragma once
#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "llmc/attention_linear_form.h"
#include "llmc/config_json.h"
#include "llmc/error.h"
#include "llmc/files.h"
#include "llmc/model.h"
#include "llmc/sampler.h"
#include "llmc/schedule.h"

// Model flags that were given; the others follow from the preset, the attention or a checkpoint.
struct ModelFlags {
    std::optional<std::string> preset, attention, attention_scale, positions, decay;
    std::optional<int> layers, heads, channels, context, short_conv;
    std::optional<bool> qk_norm;

    // The given flags put over `config`.
    GPTConfig over(GPTConfig config) const {
        if (preset) config = with_preset(config, *preset);
        if (layers) config.layers = *layers;
        if (heads) config.heads = *heads;
        if (channels) config.channels = *channels;
        if (context) config.context = *context;
        if (attention)
            config.attention_kind = (AttentionKind)index_of_name(*attention, kAttentionNames, "--attention");
        if (attention_scale) config.attention_scale = *attention_scale;
        if (positions)
            config.positions = (PositionKind)index_of_name(*positions, kPositionNames, "--positions");
        if (decay) config.decay = (DecayKind)index_of_name(*decay, kDecayNames, "--decay");
        if (qk_norm) config.qk_norm = *qk_norm;
        if (short_conv) config.short_conv = *short_conv;
        return config;
    }

    // A new model: GPT-2 where the attention is softmax. Every other kind has RoPE and qk-norm unless flags
    // say otherwise, because the size of its scores is that of its weights: it has no normaliser that makes
    // up for it.
    GPTConfig fresh(int vocab_size, int eot_token) const {
        GPTConfig config = with_preset(GPTConfig(), "nano");
        config.vocab_size = vocab_size;
        config.set_separator(eot_token);
        if (over(config).attention_kind != AttentionKind::softmax) {
            config.positions = PositionKind::rope;
            config.qk_norm = true;
        }
        return over(config);
    }

    // A model that exists, from `file`: flags that say something else are refused.
    void require_same(const GPTConfig& existing, const std::string& file) const {
        nlohmann::ordered_json wanted = config_to_json(over(existing)), found = config_to_json(existing);
        for (const auto& [key, value] : wanted.items())
            if (value != found[key])
                usage_error("the command line asks for ", key, " ", brief(value), ", but ", file, " has ",
                            brief(found[key]));
    }
};

// How a model is computed, whatever it is.
struct ComputeFlags {
    std::string dtype = "fp32", kernel = "auto";

    // For batches of up to B x T tokens.
    ModelOptions model_options(Purpose purpose, int B, int T) const {
        ModelOptions options{purpose, B, T};
        options.precision = (Precision)index_of_name(dtype, kPrecisionNames, "--dtype");
        options.kernel = (AttentionKernel)index_of_name(kernel, kKernelNames, "--attention-kernel");
        return options;
    }
};

struct TrainOptions {
    ModelFlags model;
    std::string data, out, init_from;
    bool new_tokenizer = false;  // the data's may be another than that of init_from
    int batch = 8;
    int seq = 0;              // 0: the context
    int64_t total_batch = 0;  // tokens a step; 0: one micro-batch
    int steps = 1000;
    double learning_rate = 6e-4, final_lr_fraction = 0.1, grad_clip = 1.0;
    std::string schedule = "cosine";
    int warmup = -1;  // -1: a tenth of the steps, at most 700
    AdamW adamw;
    uint64_t seed = 1;
    ComputeFlags compute;
    std::string recompute = "none", gradients = "fp32";
    bool cuda_graph = false, stochastic_rounding = false;
    int threads = 0;  // 0: all
    int val_every = 100, val_batches = 20, sample_every = 500, sample_tokens = 128, checkpoint_every = 500;
    int norms_every = 0;
    int keep_checkpoints = 3;
    bool resume = false;
    std::string resume_from;  // empty: the newest of `out`
    std::string program;      // program_version(), for checkpoints

    ModelOptions model_options() const {
        ModelOptions options = compute.model_options(Purpose::training, batch, seq);
        options.recompute = (Recompute)index_of_name(recompute, kRecomputeNames, "--recompute");
        options.gradients = (Precision)index_of_name(gradients, kGradientNames, "--gradients");
        options.cuda_graph = cuda_graph;
        options.stochastic_rounding = stochastic_rounding;
        options.seed = seed;
        return options;
    }

    // The settings that a checkpoint remembers, so that --resume needs no flags but --out.
    struct Setting {
        std::string flag;
        bool fixed;          // changing it would make another run
        bool given = false;  // on the command line
        CLI::Validator allowed;
        std::function<nlohmann::json()> get;
        std::function<void(const nlohmann::json&)> set;

        // What is wrong with a value of trainer.json, by the check of what is typed after the flag; "" where
        // nothing is.
        std::string complaint(const nlohmann::json& value) const {
            const bool is_text = get().is_string() || get().is_array();  // see json_of_path
            if (is_text)
                if (std::optional<std::string> text = path_of_json(value)) return allowed(*text);
            std::string typed = value.dump(), found = allowed(typed);
            return found.empty() && is_text ? brief(value) + " is not a text" : found;
        }
    };
    std::vector<Setting> settings;

    TrainOptions() = default;
    TrainOptions(const TrainOptions&) = delete;  // settings point into it
    TrainOptions& operator=(const TrainOptions&) = delete;

    bool given(const std::string& flag) const {
        for (const Setting& s : settings)
            if (s.flag == flag) return s.given;
        return false;
    }

    nlohmann::json remembered() const {
        nlohmann::json json;
        for (const Setting& s : settings) json[s.flag] = s.get();
        return json;
    }

    // Takes what `saved` (from `file`) remembers for every flag that was not given. A given flag that would
    // make another run of it is refused; other changes are returned, to be told to the user.
    std::string recall(const nlohmann::json& saved, const std::string& file) {
        std::string changes;
        for (const Setting& s : settings) {
            if (!saved.is_object() || !saved.contains(s.flag))
                fail(file, ": no ", s.flag, " among its options");
            const nlohmann::json& value = saved.at(s.flag);
            if (!s.given) {
                std::string complaint = s.complaint(value);
                if (!complaint.empty()) fail(file, ": ", s.flag, ": ", complaint);
                s.set(value);
            } else if (s.get() != value) {
                if (s.fixed)
                    usage_error(s.flag, " ", brief(s.get()), " contradicts ", file, ", which has ",
                                brief(value));
                changes += str(changes.empty() ? "" : ", ", s.flag, " ", brief(s.get()), " (was ",
                               brief(value), ")");
            }
        }
        return changes;
    }
};

struct GenerateOptions {
    std::string model, prompt, prompt_file;
    int tokens = 256;
    SamplerOptions sampler;
    std::string cache = "auto";
    int threads = 0;
};

struct EvalOptions {
    std::string model, data, split = "val";
    int batches = 0;  // 0: all
    int batch = 8;
    int seq = 0;  // 0: the context
    ComputeFlags compute;
    int threads = 0;
};

struct DumpOptions {
    std::string model, data, file;
    int batch = 4, seq = 64;
    ComputeFlags compute;
    int threads = 0;
};

enum class Command { train, generate, eval, dump };

struct Options {
    Command command;
    TrainOptions train;
    GenerateOptions generate;
    EvalOptions eval;
    DumpOptions dump;
};

// A usage error where a backend, or a kind of attention, does not have what the options ask for.
inline void require_supported(const Backend& backend, const GPTConfig& config, const ModelOptions& options) {
    const Capabilities& can = backend.can;
    auto require = [&](bool has, const char* flag) {
        if (!has) usage_error(flag, ": only train_gptcu has it, not ", can.program);
    };
    require(can.tf32 || options.precision != Precision::tf32, "--dtype tf32");
    require(can.cuda_graph || !options.cuda_graph, "--cuda-graph");
    require(can.stochastic_rounding || !options.stochastic_rounding, "--stochastic-rounding");
    require(can.bf16_gradients || options.gradients != Precision::bf16, "--gradients bf16");
    if (options.stochastic_rounding && options.precision != Precision::bf16)
        usage_error("--stochastic-rounding: expected --dtype bf16 with it");
    if (options.gradients == Precision::bf16 && options.precision != Precision::bf16)
        usage_error("--gradients bf16: expected --dtype bf16 with it");
    if (config.head_size() > can.largest_head)
        usage_error("heads of ", config.head_size(), " channels: ", can.program, " has kernels for at most ",
                    can.largest_head);
    auto require_linear_form = [&](bool wanted, const char* flag) {
        if (wanted && !has_linear_form(config.attention(), config.head_size()))
            usage_error(flag, ": ", kAttentionNames[(int)config.attention_kind], ", scale ",
                        config.attention_scale, ", heads of ", config.head_size(),
                        ": expected poly1, poly2, or poly3 with heads of at most 32, and no scale sum with "
                        "odd powers");
    };
    require_linear_form(options.kernel == AttentionKernel::linear, "--attention-kernel linear");
    require_linear_form(options.cache == CacheKind::state, "--cache state");
}

// CLI11's own checks let NaN through, and integers that overflow.
template <class Number>
inline CLI::Validator in_range(Number low, Number high) {
    auto check = [=](std::string& text) -> std::string {
        Number value = 0;
        const char* end = text.data() + text.size();
        auto [stop, error] = std::from_chars(text.data(), end, value);
        if (error == std::errc() && stop == end && value >= low && value <= high) return "";
        return str(shown(text), " is not ", std::is_integral_v<Number> ? "an integer" : "a number", " from ",
                   low, " to ", high);
    };
    return CLI::Validator(check, "");
}

inline CLI::Validator integer_in(int64_t low, int64_t high) {
    return in_range<int64_t>(low, high);
}
inline CLI::Validator number_in(double low, double high) {
    return in_range<double>(low, high);
}

inline CLI::Validator one_of(const std::vector<std::string>& names) {
    auto check = [=](std::string& text) -> std::string {
        try {
            index_of_name(text, names, "");
            return "";
        } catch (const Error& e) {
            return std::string(e.what()).substr(2);
        }
    };
    std::string description;
    for (const std::string& name : names) description += (description.empty() ? "" : "|") + name;
    return CLI::Validator(check, description);
}

template <size_t N>
CLI::Validator one_of(const char* const (&names)[N]) {
    return one_of(std::vector<std::string>(names, names + N));
}

// A path. An empty one, which --model=$FOLDER is without that variable, would stand for the working
// directory.
inline CLI::Validator path_value() {
    auto check = [](std::string& text) -> std::string {
        return text.empty() ? "\"\" is not the name of a file or folder" : "";
    };
    return CLI::Validator(check, "");
}

// row, context, mean, sum or a number.
inline CLI::Validator attention_scale_value() {
    auto check = [](std::string& text) -> std::string {
        try {
            GPTConfig config;
            config.attention_scale = text;
            config.attention();
            return "";
        } catch (const Error& e) {
            return std::string(e.what()).substr(std::string("attention_scale: ").size());
        }
    };
    return CLI::Validator(check, "row|context|mean|sum|NUMBER");
}

namespace options_detail {

constexpr int kMostInt = std::numeric_limits<int>::max();

inline void add_compute(CLI::App& app, ComputeFlags& o, const std::string& group) {
    app.add_option("--dtype", o.dtype, "of the matrix products and most activations (tf32: train_gptcu)")
        ->group(group)
        ->capture_default_str()
        ->check(one_of(kPrecisionNames));
    app.add_option("--attention-kernel", o.kernel,
                   "tiles of all pairs, or chunks at linear cost (poly1, poly2, poly3 with small heads)")
        ->group(group)
        ->capture_default_str()
        ->check(one_of(kKernelNames));
}

inline void add_train(CLI::App& app, TrainOptions& o) {
    auto remember = [&](CLI::Option* option, auto& value, bool fixed) {
        constexpr bool is_text = std::is_same_v<decltype(value), std::string&>;  // which may be a path
        auto get = [&value] {
            if constexpr (is_text) return json_of_path(value);
            return nlohmann::json(value);
        };
        auto set = [&value](const nlohmann::json& json) {
            if constexpr (is_text)
                value = path_of_json(json).value();
            else
                json.get_to(value);
        };
        o.settings.push_back({option->get_name(), fixed, false, {}, get, set});
        return option;
    };
    auto model = [&](const char* flag, auto& value, const char* help) {
        return app.add_option(flag, value, help)->group("Model");
    };
    std::vector<std::string> presets;
    for (const Preset& p : kPresets) presets.push_back(p.name);
    model("--preset", o.model.preset, "sizes of the model (default nano)")->check(one_of(presets));
    model("--layers", o.model.layers, "number of blocks")->check(integer_in(1, 1000));
    model("--heads", o.model.heads, "attention heads a block")->check(integer_in(1, 1024));
    model("--channels", o.model.channels, "width of the residual stream")->check(integer_in(1, 65536));
    model("--context", o.model.context, "longest sequence")->check(integer_in(1, 1 << 24));
    model("--attention", o.model.attention, "activation of the scores (default softmax)")
        ->check(one_of(kAttentionNames));
    model("--attention-scale", o.model.attention_scale, "scale of polynomial attention (default row)")
        ->check(attention_scale_value());
    model("--positions", o.model.positions, "(default: learned for softmax, else rope)")
        ->check(one_of(kPositionNames));
    model("--qk-norm", o.model.qk_norm,
          "true or false: RMS-normalise q and k (default: false for softmax, else true)")
        ->check(one_of({"true", "false"}));
    model("--decay", o.model.decay, "fade attention with distance (default none)")
        ->check(one_of(kDecayNames));
    model("--short-conv", o.model.short_conv, "width of a causal convolution on q, k, v (default 0: none)")
        ->check(integer_in(0, 64));
    CLI::Option* init_from =
        model("--init-from", o.init_from, "start from a checkpoint or a GPT-2 folder of Hugging Face")
            ->check(path_value());
    app.add_flag("--new-tokenizer", o.new_tokenizer,
                 "train it although the data has another tokenizer, in which tokens have other numbers")
        ->group("Model")
        ->needs(init_from);

    auto batch = [&](const char* flag, auto& value, bool fixed, const char* help) {
        return remember(app.add_option(flag, value, help)->group("Batch")->capture_default_str(), value,
                        fixed);
    };
    remember(app.add_option("--data", o.data, "folder with train*.bin and val*.bin")
                 ->group("Run")
                 ->check(path_value()),
             o.data, false);
    // From any working directory the same folder is meant: by a name that is relative to another one, a run
    // could go on with other data without a word.
    o.settings.back().get = [&o]() -> nlohmann::json {
        std::error_code error;
        std::string path = std::filesystem::absolute(o.data, error).string();
        return json_of_path(error ? o.data : path);
    };
    app.add_option("--out", o.out, "folder for checkpoints and metrics.jsonl")
        ->group("Run")
        ->required()
        ->check(path_value());
    batch("--batch", o.batch, false, "sequences a micro-batch")->check(integer_in(1, 1 << 20));
    batch("--seq", o.seq, true, "tokens a sequence; 0: the context")->check(integer_in(0, 1 << 24));
    batch("--total-batch", o.total_batch, true,
          "tokens a step, a multiple of batch x seq; 0: one micro-batch")
        ->check(integer_in(0, int64_t{1} << 50));

    auto optimise = [&](const char* flag, auto& value, bool fixed, const char* help) {
        return remember(app.add_option(flag, value, help)->group("Optimise")->capture_default_str(), value,
                        fixed);
    };
    optimise("--steps", o.steps, false, "optimizer steps in all")->check(integer_in(1, kMostInt));
    optimise("--lr", o.learning_rate, false, "peak learning rate")->check(number_in(0, 1e30));
    optimise("--schedule", o.schedule, false, "of the learning rate")->check(one_of(kScheduleNames));
    optimise("--warmup", o.warmup, false, "steps; -1: a tenth of --steps, at most 700")
        ->check(integer_in(-1, kMostInt));
    optimise("--final-lr-fraction", o.final_lr_fraction, false, "of --lr, at the last step")
        ->check(number_in(0, 1));
    optimise("--weight-decay", o.adamw.weight_decay, false, "on matrices and embeddings")
        ->check(number_in(0, 1e6));
    optimise("--beta1", o.adamw.beta1, false, "AdamW's")->check(number_in(0, 0.999999));
    optimise("--beta2", o.adamw.beta2, false, "AdamW's")->check(number_in(0, 0.999999));
    optimise("--eps", o.adamw.eps, false, "AdamW's")->check(number_in(1e-30, 1));
    optimise("--grad-clip", o.grad_clip, false, "largest norm of the gradient; 0: no limit")
        ->check(number_in(0, 1e30));
    optimise("--seed", o.seed, true, "of the weights, the order of the data and the samples")
        ->check(in_range<uint64_t>(0, UINT64_MAX));
    add_compute(app, o.compute, "Compute");
    remember(app.get_option("--dtype"), o.compute.dtype, true);
    remember(app.get_option("--attention-kernel"), o.compute.kernel, false);
    remember(app.add_option("--recompute", o.recompute,
                            "what the backward pass computes again rather than reads, for less memory")
                 ->group("Compute")
                 ->capture_default_str()
                 ->check(one_of(kRecomputeNames)),
             o.recompute, false);
    remember(
        app.add_option("--gradients", o.gradients,
                       "what those of matrices and embeddings are added up in; bf16 takes half the memory "
                       "(train_gptcu, with --dtype bf16)")
            ->group("Compute")
            ->capture_default_str()
            ->check(one_of(kGradientNames)),
        o.gradients, false);
    remember(app.add_flag("--stochastic-rounding", o.stochastic_rounding,
                          "of the weights to bf16, rather than to the nearest (train_gptcu)")
                 ->group("Compute")
                 ->check(one_of({"true", "false"}).description("")),
             o.stochastic_rounding, false);
    app.add_flag("--cuda-graph", o.cuda_graph, "launch forward and backward passes as graphs (train_gptcu)")
        ->group("Compute");
    app.add_option("--threads", o.threads, "0: all")
        ->group("Run")
        ->capture_default_str()
        ->check(integer_in(0, 4096));

    auto loop = [&](const char* flag, auto& value, const char* help) {
        return remember(app.add_option(flag, value, help)->group("Loop")->capture_default_str(), value, false)
            ->check(integer_in(0, kMostInt));
    };
    loop("--val-every", o.val_every, "steps between validations; 0: never");
    loop("--val-batches", o.val_batches, "micro-batches a validation, the same every time");
    loop("--sample-every", o.sample_every, "steps between samples of text; 0: never");
    loop("--sample-tokens", o.sample_tokens, "tokens a sample");
    loop("--norms-every", o.norms_every, "steps between measures of the attention matrices; 0: never");
    loop("--checkpoint-every", o.checkpoint_every, "steps between checkpoints; 0: never");
    loop("--keep-checkpoints", o.keep_checkpoints, "the newest to keep; 0: all");
    app.add_option("--resume", o.resume_from, "go on from the newest checkpoint of --out, or from this one")
        ->group("Run")
        ->expected(0, 1)
        ->type_name("[DIR]");
}

inline void add_threads(CLI::App& app, int& threads) {
    app.add_option("--threads", threads, "0: all")->capture_default_str()->check(integer_in(0, 4096));
}

inline void add_generate(CLI::App& app, GenerateOptions& o) {
    app.add_option("--model", o.model, "a checkpoint, or the --out of a run")
        ->required()
        ->check(path_value());
    CLI::Option* prompt =
        app.add_option("--prompt", o.prompt, "text to go on from (default: the start of a document)");
    app.add_option("--prompt-file", o.prompt_file, "a file with this text; -: stdin")
        ->check(path_value())
        ->excludes(prompt);
    app.add_option("--tokens", o.tokens, "tokens to generate")
        ->capture_default_str()
        ->check(integer_in(0, 1000000000));
    app.add_option("--temperature", o.sampler.temperature, "0: always the likeliest token")
        ->capture_default_str()
        ->check(number_in(0, 1e6));
    app.add_option("--top-k", o.sampler.top_k, "choose among the k likeliest; 0: all")
        ->capture_default_str()
        ->check(integer_in(0, 1000000000));
    app.add_option("--top-p", o.sampler.top_p,
                   "choose among the likeliest that together reach this probability")
        ->capture_default_str()
        ->check(number_in(0, 1));
    app.add_option("--seed", o.sampler.seed, "of the choices")
        ->capture_default_str()
        ->check(in_range<uint64_t>(0, UINT64_MAX));
    app.add_option(
           "--cache", o.cache,
           "of the tokens so far: keys and values, or a state of fixed size (as --attention-kernel linear)")
        ->capture_default_str()
        ->check(one_of(kCacheNames));
    add_threads(app, o.threads);
}

inline void add_eval(CLI::App& app, EvalOptions& o) {
    app.add_option("--model", o.model, "a checkpoint, or the --out of a run")
        ->required()
        ->check(path_value());
    app.add_option("--data", o.data, "dataset folder")->required()->check(path_value());
    app.add_option("--split", o.split, "")->capture_default_str()->check(one_of({"train", "val"}));
    app.add_option("--batches", o.batches, "0: the whole split")
        ->capture_default_str()
        ->check(integer_in(0, 1000000000));
    app.add_option("--batch", o.batch, "sequences a batch")
        ->capture_default_str()
        ->check(integer_in(1, 1 << 20));
    app.add_option("--seq", o.seq, "tokens a sequence; 0: the context")
        ->capture_default_str()
        ->check(integer_in(0, 1 << 24));
    add_compute(app, o.compute, app.option_defaults()->get_group());
    add_threads(app, o.threads);
}

inline void add_dump(CLI::App& app, DumpOptions& o) {
    app.add_option("--model", o.model, "a checkpoint, or the --out of a run")
        ->required()
        ->check(path_value());
    app.add_option("--data", o.data, "dataset folder")->required()->check(path_value());
    app.add_option("--file", o.file, "where to write (.safetensors)")->required()->check(path_value());
    app.add_option("--batch", o.batch, "sequences")->capture_default_str()->check(integer_in(1, 1 << 20));
    app.add_option("--seq", o.seq, "tokens a sequence")->capture_default_str()->check(integer_in(1, 1 << 24));
    add_compute(app, o.compute, app.option_defaults()->get_group());
    add_threads(app, o.threads);
}

// The arguments with each "--flag=" of the command as two, "--flag" and an empty value: CLI11 would take the
// next argument for its value.
inline std::vector<std::string> separate_empty_values(const CLI::App& command,
                                                      const std::vector<std::string>& arguments) {
    std::vector<std::string> separated;
    bool is_value = false;  // of the flag before
    for (const std::string& argument : arguments) {
        const bool empty = !is_value && argument.ends_with('=');
        const std::string flag = argument.substr(0, argument.size() - empty);
        const CLI::Option* option = is_value ? nullptr : command.get_option_no_throw(flag);
        const bool separates = empty && option && option->get_items_expected_max() > 0;
        separated.push_back(separates ? flag : argument);
        if (separates) separated.push_back("");
        is_value = option && !empty && option->get_items_expected_min() > 0;
    }
    return separated;
}

// The flag that a message of CLI11 is about.
inline std::string first_flag(const std::string& message) {
    const size_t begin = message.find("--");
    return begin == message.npos ? message
                                 : message.substr(begin, message.find_first_of(" :=", begin) - begin);
}

}  // namespace options_detail

// Fills `options`. Returns false where there is nothing to do, because help or the version was asked for and
// has been printed.
inline bool parse_options(int argc, char** argv, const char* program,
                          const std::function<std::string()>& version, const char* train_dtype,
                          Options& options) {
    options.train.compute.dtype = train_dtype;
    CLI::App app("Trains GPT models, with softmax, polynomial or sigmoid attention.", program);
    app.require_subcommand(1);
    app.set_version_flag("--version", version, "print the version and what it was built with, and exit");
    CLI::App* train = app.add_subcommand("train", "train a model");
    CLI::App* generate = app.add_subcommand("generate", "write text with a trained model");
    CLI::App* eval = app.add_subcommand("eval", "loss, perplexity and bits per byte of a model on a dataset");
    CLI::App* dump =
        app.add_subcommand("dump", "write logits, loss and gradients of one batch, to compare backends");
    options_detail::add_train(*train, options.train);
    options_detail::add_generate(*generate, options.generate);
    options_detail::add_eval(*eval, options.eval);
    options_detail::add_dump(*dump, options.dump);
    std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
    bool known = !arguments.empty() &&
                 (arguments[0] == "--help" || arguments[0] == "-h" || arguments[0] == "--version");
    for (const CLI::App* subcommand : {train, generate, eval, dump}) {
        if (arguments.empty() || !subcommand->check_name(arguments[0])) continue;
        known = true;
        arguments = options_detail::separate_empty_values(*subcommand, arguments);
    }
    if (!known)
        usage_error(arguments.empty() ? "no command" : str("unknown command ", shown(arguments[0])),
                    ": expected train, generate, eval or dump (see --help)");
    try {
        std::reverse(arguments.begin(), arguments.end());  // as parse() takes them
        app.parse(arguments);
    } catch (const CLI::Success& asked) {
        app.exit(asked);
        return false;
    } catch (const CLI::ExtrasError&) {
        usage_error("unexpected argument ", shown(app.remaining(true).front()), " (see --help)");
    } catch (const CLI::ArgumentMismatch& e) {
        usage_error(options_detail::first_flag(e.what()), ": expected one value, given once");
    } catch (const CLI::ConversionError& e) {  // numbers have been checked before
        usage_error(options_detail::first_flag(e.what()), ": expected no value");
    } catch (const CLI::ParseError& e) {
        usage_error(e.what());
    }
    for (auto [subcommand, command] :
         {std::pair(train, Command::train), std::pair(generate, Command::generate),
          std::pair(eval, Command::eval), std::pair(dump, Command::dump)})
        if (subcommand->parsed()) options.command = command;
    options.train.resume = train->count("--resume") > 0;
    for (TrainOptions::Setting& s : options.train.settings) {
        s.given = train->count(s.flag) > 0;
        s.allowed = *train->get_option(s.flag)->get_validator(0);
    }
    return true;
}
