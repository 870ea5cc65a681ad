// The command line, which is the same for every backend. CLI11 parses and checks it into one struct for each
// command. Every mistake is a usage Error that names the flag, the value and what is allowed.
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

// The model flags that were given. The values of the others follow from the preset, the kind of attention or
// a checkpoint.
struct ModelFlags {
    std::optional<std::string> preset, attention, attention_scale, positions, decay;
    std::optional<int> layers, heads, channels, mlp_channels, context, short_conv, softmax_every;
    std::optional<bool> qk_norm, output_gate;
    std::optional<double> q_gain;

    // Returns `config` with the given flags applied to it.
    GPTConfig over(GPTConfig config) const {
        if (preset) config = with_preset(config, *preset);
        if (layers) config.layers = *layers;
        if (heads) config.heads = *heads;
        if (channels) {  // a width that the preset gives to the MLP grows with it
            if (config.mlp_channels)
                config.mlp_channels = (int)((int64_t)config.mlp_channels * *channels / config.channels);
            config.channels = *channels;
        }
        if (mlp_channels) config.set_mlp_channels(*mlp_channels);
        if (context) config.context = *context;
        if (attention)
            config.attention_kind = (AttentionKind)index_of_name(*attention, kAttentionNames, "--attention");
        if (softmax_every) config.softmax_every = *softmax_every;
        if (attention_scale) config.attention_scale = *attention_scale;
        if (positions)
            config.positions = (PositionKind)index_of_name(*positions, kPositionNames, "--positions");
        if (decay) config.decay = (DecayKind)index_of_name(*decay, kDecayNames, "--decay");
        if (qk_norm) config.qk_norm = *qk_norm;
        if (q_gain) config.q_gain = *q_gain;
        if (short_conv) config.short_conv = *short_conv;
        if (output_gate) config.output_gate = *output_gate;
        return config;
    }

    // The configuration of a new model. With softmax the defaults are those of GPT-2. Every other attention
    // has RoPE and qk-norm, because it has no normaliser, so the size of its weights follows from the size of
    // its scores. A polynomial has both gates and a short convolution, too, with which it learns best:
    // docs/evidence.md.
    GPTConfig fresh(int vocab_size, int eot_token) const {
        GPTConfig config = with_preset(GPTConfig(), "nano");
        config.vocab_size = vocab_size;
        config.set_separator(eot_token);
        if (over(config).attention_kind != AttentionKind::softmax) {
            config.positions = PositionKind::rope;
            config.qk_norm = true;
        }
        if (over(config).attention().polynomial()) {
            config.decay = DecayKind::gate;
            config.output_gate = true;
            config.short_conv = 4;
        }
        config = over(config);
        if (config.qk_norm && !q_gain) config.q_gain = default_q_gain(config.attention_kind);
        if (q_gain && !config.qk_norm) usage_error("--q-gain: only a model with --qk-norm true has gains");
        if (config.softmax_every && config.attention_kind == AttentionKind::softmax)
            usage_error("--softmax-every: the other blocks need an --attention other than softmax");
        const AttentionConfig attention = config.attention();
        if (attention_scale && !attention.polynomial() && attention.scale != ScaleKind::constant)
            usage_error("--attention-scale ", *attention_scale, ": ",
                        kAttentionNames[(int)config.attention_kind],
                        " has no scale of its rows, expected a number");
        return config;
    }

    // A usage error if the flags ask for another model than the existing one, which comes from `file`.
    void require_same(const GPTConfig& existing, const std::string& file) const {
        nlohmann::ordered_json wanted = config_to_json(over(existing)), found = config_to_json(existing);
        for (const auto& [key, value] : wanted.items())
            if (value != found[key])
                usage_error("the command line asks for ", key, " ", brief(value), ", but ", file, " has ",
                            brief(found[key]));
    }
};

// Flags that say how any model is computed.
struct ComputeFlags {
    std::string dtype = "fp32", kernel = "auto";

    // Options for batches of up to B x T tokens.
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
    bool new_tokenizer = false;  // the tokenizer of the data may differ from that of init_from
    int batch = 8;
    int seq = 0;              // 0: the context
    int64_t total_batch = 0;  // tokens in a step; 0: one micro-batch
    int steps = 1000;
    double learning_rate = 6e-4, final_lr_fraction = 0.1, grad_clip = 1.0;
    std::string schedule = "cosine";
    int warmup = -1;  // -1: a tenth of the steps, at most 700
    AdamW adamw;
    uint64_t seed = 1;
    ComputeFlags compute;
    std::string recompute = "none", gradients = "fp32";
    bool cuda_graph = false, stochastic_rounding = false, answers_only = false;
    int threads = 0;         // 0: all
    int zero = 0;            // what ranks divide among them: Sharding::level
    int comm_timeout = 600;  // seconds
    int val_every = 100, val_batches = 20, sample_every = 500, sample_tokens = 128, checkpoint_every = 500;
    int norms_every = 0;
    int keep_checkpoints = 3;
    bool resume = false;
    std::string resume_from;  // empty: the newest checkpoint of `out`
    std::string program;      // program_version(), which checkpoints record

    ModelOptions model_options() const {
        ModelOptions options = compute.model_options(Purpose::training, batch, seq);
        options.recompute = (Recompute)index_of_name(recompute, kRecomputeNames, "--recompute");
        options.gradients = (Precision)index_of_name(gradients, kGradientNames, "--gradients");
        options.cuda_graph = cuda_graph;
        options.stochastic_rounding = stochastic_rounding;
        options.seed = seed;
        return options;
    }

    // A setting that a checkpoint remembers, so that --resume needs no other flag than --out.
    struct Setting {
        std::string flag;
        bool fixed;          // a resumed run cannot change it
        bool given = false;  // it is on the command line
        CLI::Validator allowed;
        std::function<nlohmann::json()> get;
        std::function<void(const nlohmann::json&)> set;

        // Checks a value of trainer.json as if it were typed after the flag. Returns "", or what is wrong
        // with it.
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
    TrainOptions(const TrainOptions&) = delete;  // because settings point into this object
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

    // For every flag that was not given, takes the value in `saved`, which comes from `file`. A given flag
    // that differs is an error if its setting is fixed. The other differences are returned as a text for the
    // user.
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

// A usage error if the options ask for something that the backend, or the kind of attention, does not have.
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
        usage_error("--stochastic-rounding: it works only with --dtype bf16");
    if (options.gradients == Precision::bf16 && options.precision != Precision::bf16)
        usage_error("--gradients bf16: it works only with --dtype bf16");
    if (options.cuda_graph && options.sharding.level == 2 && options.sharding.ranks > 1)
        usage_error("--zero 2: it does not work with --cuda-graph, because it sends gradients during a pass");
    if (config.head_size() > can.largest_head)
        usage_error("heads of ", config.head_size(), " channels: ", can.program, " has kernels for at most ",
                    can.largest_head);
    auto require_linear_form = [&](bool wanted, const char* flag) {
        if (wanted && !has_linear_form(config.attention(), config.head_size()))
            usage_error(flag, ": ", kAttentionNames[(int)config.attention_kind], ", scale ",
                        config.attention_scale, ", heads of ", config.head_size(),
                        ": expected poly1, poly2, or poly3 with heads of at most 32, and with odd powers a "
                        "scale other than sum");
    };
    require_linear_form(options.kernel == AttentionKernel::linear, "--attention-kernel linear");
    require_linear_form(options.cache == CacheKind::state, "--cache state");
}

// CLI11 has checks of its own, but they accept NaN and integers that overflow.
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

// Checks a path. It must not be empty: --model=$FOLDER is empty if that variable is not set, and an empty
// path would mean the working directory.
inline CLI::Validator path_value() {
    auto check = [](std::string& text) -> std::string {
        return text.empty() ? "\"\" is not the name of a file or folder" : "";
    };
    return CLI::Validator(check, "");
}

// Checks a value of --attention-scale: row, context, mean, sum or a number.
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

inline CLI::Validator preset_value() {
    std::vector<std::string> sizes, names;
    for (const Preset& p : kPresets) sizes.push_back(p.name), names.push_back(p.name);
    for (const std::string& size : sizes)
        for (int p = 1; p <= 4; p++) names.push_back(str(size, "-poly", p));
    return one_of(names).description(one_of(sizes).get_description());
}

namespace options_detail {

constexpr int kMostInt = std::numeric_limits<int>::max();

inline void add_compute(CLI::App& app, ComputeFlags& o, const std::string& group) {
    app.add_option("--dtype", o.dtype,
                   "type of the matrix products and most activations (tf32 only in train_gptcu)")
        ->group(group)
        ->capture_default_str()
        ->check(one_of(kPrecisionNames));
    app.add_option("--attention-kernel", o.kernel,
                   "method for attention: tiles of all pairs, or chunks at linear cost (poly1, poly2, poly3 "
                   "with small heads)")
        ->group(group)
        ->capture_default_str()
        ->check(one_of(kKernelNames));
}

inline void add_train(CLI::App& app, TrainOptions& o) {
    auto remember = [&](CLI::Option* option, auto& value, bool fixed) {
        constexpr bool is_text = std::is_same_v<decltype(value), std::string&>;  // it may be a path
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
    model("--preset", o.model.preset,
          "sizes of the model (default nano); with -poly1 to -poly4 at the end, as in nano-poly3, also its "
          "attention")
        ->check(preset_value());
    model("--layers", o.model.layers, "number of blocks")->check(integer_in(1, 1000));
    model("--heads", o.model.heads, "number of attention heads in a block")->check(integer_in(1, 1024));
    model("--channels", o.model.channels, "width of the residual stream")->check(integer_in(1, 65536));
    model("--mlp-channels", o.model.mlp_channels,
          "width of the MLP's hidden layer (default 4 times --channels)")
        ->check(integer_in(1, 1 << 18));
    model("--context", o.model.context, "length of the longest sequence")->check(integer_in(1, 1 << 24));
    model("--attention", o.model.attention, "function that turns scores into weights (default softmax)")
        ->check(one_of(kAttentionNames));
    model("--softmax-every", o.model.softmax_every,
          "use softmax in every N-th block, the others have --attention; 0: in none (default 0)")
        ->check(integer_in(0, 1000));
    model("--attention-scale", o.model.attention_scale,
          "scale of polynomial attention (default row); a number multiplies the weights of any attention")
        ->check(attention_scale_value());
    model("--positions", o.model.positions,
          "kind of positions (default: learned with softmax, otherwise rope)")
        ->check(one_of(kPositionNames));
    model("--qk-norm", o.model.qk_norm,
          "RMS-normalise q and k: true or false (default: false with softmax, otherwise true)")
        ->check(one_of({"true", "false"}));
    model("--q-gain", o.model.q_gain,
          "gain that q starts with in a new model with qk-norm (default: 0.25 with poly1 and poly2, 0.5 with "
          "poly3 and poly4, otherwise 1)")
        ->check(number_in(kLeastQGain, kMostQGain));
    model("--decay", o.model.decay,
          "how attention fades with distance (default: gate with a polynomial, otherwise none)")
        ->check(one_of(kDecayNames));
    model("--short-conv", o.model.short_conv,
          "width of a causal convolution on q, k and v; 0: no convolution (default: 4 with a polynomial, "
          "otherwise 0)")
        ->check(integer_in(0, 64));
    model(
        "--output-gate", o.model.output_gate,
        "multiply attention's output by a sigmoid gate for each channel: true or false (default: true with a "
        "polynomial, otherwise false)")
        ->check(one_of({"true", "false"}));
    CLI::Option* init_from =
        model("--init-from", o.init_from,
              "start from the weights of a checkpoint or of a GPT-2 folder of Hugging Face")
            ->check(path_value());
    app.add_flag("--new-tokenizer", o.new_tokenizer,
                 "allow data with another tokenizer than the model's; its token numbers mean other texts")
        ->group("Model")
        ->needs(init_from);

    auto batch = [&](const char* flag, auto& value, bool fixed, const char* help) {
        return remember(app.add_option(flag, value, help)->group("Batch")->capture_default_str(), value,
                        fixed);
    };
    remember(app.add_option("--data", o.data, "dataset folder, with train*.bin and val*.bin")
                 ->group("Run")
                 ->check(path_value()),
             o.data, false);
    // Checkpoints remember the absolute path. With a relative one, a run that is resumed from another working
    // directory could silently continue with other data.
    o.settings.back().get = [&o]() -> nlohmann::json {
        std::error_code error;
        std::string path = std::filesystem::absolute(o.data, error).string();
        return json_of_path(error ? o.data : path);
    };
    app.add_option("--out", o.out, "folder for checkpoints and metrics.jsonl")
        ->group("Run")
        ->required()
        ->check(path_value());
    batch("--batch", o.batch, false, "sequences in a micro-batch")->check(integer_in(1, 1 << 20));
    batch("--seq", o.seq, true, "tokens in a sequence; 0: the context")->check(integer_in(0, 1 << 24));
    batch("--total-batch", o.total_batch, true,
          "tokens in a step, a multiple of batch x seq x ranks; 0: one micro-batch a rank")
        ->check(integer_in(0, int64_t{1} << 50));

    auto optimise = [&](const char* flag, auto& value, bool fixed, const char* help) {
        return remember(app.add_option(flag, value, help)->group("Optimise")->capture_default_str(), value,
                        fixed);
    };
    optimise("--steps", o.steps, false, "number of optimizer steps in all")->check(integer_in(1, kMostInt));
    optimise("--lr", o.learning_rate, false, "peak learning rate")->check(number_in(0, 1e30));
    optimise("--attention-lr", o.adamw.attention_lr, false,
             "factor of the learning rate for q, k, v (c_attn), q's gains and both gates")
        ->check(number_in(0, 1e6));
    optimise("--schedule", o.schedule, false, "schedule of the learning rate")->check(one_of(kScheduleNames));
    optimise("--warmup", o.warmup, false, "steps of warm-up; -1: a tenth of --steps, at most 700")
        ->check(integer_in(-1, kMostInt));
    optimise("--final-lr-fraction", o.final_lr_fraction, false,
             "learning rate at the last step, as a fraction of --lr")
        ->check(number_in(0, 1));
    optimise("--weight-decay", o.adamw.weight_decay, false,
             "weight decay of matrices, embeddings and positions")
        ->check(number_in(0, 1e6));
    optimise("--beta1", o.adamw.beta1, false, "AdamW's decay rate of the mean gradient")
        ->check(number_in(0, 0.999999));
    optimise("--beta2", o.adamw.beta2, false, "AdamW's decay rate of the mean squared gradient")
        ->check(number_in(0, 0.999999));
    optimise("--eps", o.adamw.eps, false, "number that AdamW adds to the denominator")
        ->check(number_in(1e-30, 1));
    optimise("--grad-clip", o.grad_clip, false, "largest norm of the gradient; 0: no limit")
        ->check(number_in(0, 1e30));
    remember(app.add_flag("--answers-only", o.answers_only,
                          "train on the answers in a dataset of data/prepare.py recall, and on nothing else")
                 ->group("Optimise")
                 ->check(one_of({"true", "false"}).description("")),
             o.answers_only, false);
    optimise("--seed", o.seed, true, "seed of the weights, of the order of the data and of the samples")
        ->check(in_range<uint64_t>(0, UINT64_MAX));
    add_compute(app, o.compute, "Compute");
    remember(app.get_option("--dtype"), o.compute.dtype, true);
    remember(app.get_option("--attention-kernel"), o.compute.kernel, false);
    remember(app.add_option("--recompute", o.recompute,
                            "activations that the backward pass computes again, to save memory")
                 ->group("Compute")
                 ->capture_default_str()
                 ->check(one_of(kRecomputeNames)),
             o.recompute, false);
    remember(
        app.add_option("--gradients", o.gradients,
                       "type in which the gradients of matrices and embeddings are added up; bf16 takes half "
                       "the memory (train_gptcu, with --dtype bf16)")
            ->group("Compute")
            ->capture_default_str()
            ->check(one_of(kGradientNames)),
        o.gradients, false);
    remember(app.add_flag("--stochastic-rounding", o.stochastic_rounding,
                          "round weights to bf16 at random instead of to the nearest (train_gptcu)")
                 ->group("Compute")
                 ->check(one_of({"true", "false"}).description("")),
             o.stochastic_rounding, false);
    app.add_flag("--cuda-graph", o.cuda_graph,
                 "launch forward and backward passes as CUDA graphs (train_gptcu)")
        ->group("Compute");
    app.add_option("--threads", o.threads, "number of threads; 0: one for each core")
        ->group("Run")
        ->capture_default_str()
        ->check(integer_in(0, 4096));

    remember(
        app.add_option("--zero", o.zero,
                       "what ranks divide among them instead of keeping it all (with several ranks); 0: "
                       "nothing, 1: the optimizer's moments, and the float32 weights with --dtype bf16, 2: "
                       "also the gradients")
            ->group("Run")
            ->capture_default_str()
            ->check(integer_in(0, 2)),
        o.zero, false);
    app.add_option("--comm-timeout", o.comm_timeout,
                   "seconds after which a rank that waits for the others gives up (with several ranks)")
        ->group("Run")
        ->capture_default_str()
        ->check(integer_in(1, 1000000));

    auto loop = [&](const char* flag, auto& value, const char* help) {
        return remember(app.add_option(flag, value, help)->group("Loop")->capture_default_str(), value, false)
            ->check(integer_in(0, kMostInt));
    };
    loop("--val-every", o.val_every, "steps between validations; 0: never");
    loop("--val-batches", o.val_batches,
         "the tokens of a validation, in batches of --total-batch; the same ones every time");
    loop("--sample-every", o.sample_every, "steps between samples of text; 0: never");
    loop("--sample-tokens", o.sample_tokens, "tokens in a sample");
    loop("--norms-every", o.norms_every, "steps between measurements of the attention matrices; 0: never");
    loop("--checkpoint-every", o.checkpoint_every, "steps between checkpoints; 0: never");
    loop("--keep-checkpoints", o.keep_checkpoints, "number of newest checkpoints to keep; 0: all");
    app.add_option("--resume", o.resume_from,
                   "continue from the newest checkpoint of --out, or from the checkpoint DIR")
        ->group("Run")
        ->expected(0, 1)
        ->type_name("[DIR]");
}

inline void add_threads(CLI::App& app, int& threads) {
    app.add_option("--threads", threads, "number of threads; 0: one for each core")
        ->capture_default_str()
        ->check(integer_in(0, 4096));
}

inline void add_generate(CLI::App& app, GenerateOptions& o) {
    app.add_option("--model", o.model, "a checkpoint, or the --out folder of a run")
        ->required()
        ->check(path_value());
    CLI::Option* prompt =
        app.add_option("--prompt", o.prompt, "text to continue (default: the start of a document)");
    app.add_option("--prompt-file", o.prompt_file, "file with the text to continue; -: stdin")
        ->check(path_value())
        ->excludes(prompt);
    app.add_option("--tokens", o.tokens, "number of tokens to generate")
        ->capture_default_str()
        ->check(integer_in(0, 1000000000));
    app.add_option("--temperature", o.sampler.temperature,
                   "randomness of the choice; 0: always the most likely token")
        ->capture_default_str()
        ->check(number_in(0, 1e6));
    app.add_option("--top-k", o.sampler.top_k, "choose among the k most likely tokens; 0: among all")
        ->capture_default_str()
        ->check(integer_in(0, 1000000000));
    app.add_option("--top-p", o.sampler.top_p,
                   "choose among the most likely tokens that together reach this probability")
        ->capture_default_str()
        ->check(number_in(0, 1));
    app.add_option("--seed", o.sampler.seed, "seed of the choices")
        ->capture_default_str()
        ->check(in_range<uint64_t>(0, UINT64_MAX));
    app.add_option(
           "--cache", o.cache,
           "what is kept about earlier tokens: keys and values, or a state of fixed size (for the same "
           "attention as --attention-kernel linear)")
        ->capture_default_str()
        ->check(one_of(kCacheNames));
    add_threads(app, o.threads);
}

inline void add_eval(CLI::App& app, EvalOptions& o) {
    app.add_option("--model", o.model, "a checkpoint, or the --out folder of a run")
        ->required()
        ->check(path_value());
    app.add_option("--data", o.data, "dataset folder")->required()->check(path_value());
    app.add_option("--split", o.split, "part of the dataset")
        ->capture_default_str()
        ->check(one_of({"train", "val"}));
    app.add_option("--batches", o.batches, "number of batches; 0: the whole split")
        ->capture_default_str()
        ->check(integer_in(0, 1000000000));
    app.add_option("--batch", o.batch, "sequences in a batch")
        ->capture_default_str()
        ->check(integer_in(1, 1 << 20));
    app.add_option("--seq", o.seq, "tokens in a sequence; 0: the context")
        ->capture_default_str()
        ->check(integer_in(0, 1 << 24));
    add_compute(app, o.compute, app.option_defaults()->get_group());
    add_threads(app, o.threads);
}

inline void add_dump(CLI::App& app, DumpOptions& o) {
    app.add_option("--model", o.model, "a checkpoint, or the --out folder of a run")
        ->required()
        ->check(path_value());
    app.add_option("--data", o.data, "dataset folder")->required()->check(path_value());
    app.add_option("--file", o.file, "file to write (.safetensors)")->required()->check(path_value());
    app.add_option("--batch", o.batch, "sequences in the batch")
        ->capture_default_str()
        ->check(integer_in(1, 1 << 20));
    app.add_option("--seq", o.seq, "tokens in a sequence")
        ->capture_default_str()
        ->check(integer_in(1, 1 << 24));
    add_compute(app, o.compute, app.option_defaults()->get_group());
    add_threads(app, o.threads);
}

// Replaces each argument "--flag=" of the command by two, "--flag" and an empty one, because CLI11 would take
// the next argument as the value.
inline std::vector<std::string> separate_empty_values(const CLI::App& command,
                                                      const std::vector<std::string>& arguments) {
    std::vector<std::string> separated;
    bool is_value = false;  // whether the argument is the value of the flag before it
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

// Fills `options`. Returns false if help or the version was asked for; that has been printed then, and there
// is nothing else to do.
inline bool parse_options(int argc, char** argv, const char* program,
                          const std::function<std::string()>& version, const char* train_dtype,
                          Options& options) {
    options.train.compute.dtype = train_dtype;
    CLI::App app("Trains GPT models, with softmax, polynomial or sigmoid attention.", program);
    app.require_subcommand(1);
    app.set_version_flag("--version", version, "print the version and what it was built with, and exit");
    CLI::App* train = app.add_subcommand("train", "train a model");
    CLI::App* generate = app.add_subcommand("generate", "write text with a trained model");
    CLI::App* eval = app.add_subcommand(
        "eval", "compute loss, perplexity and bits per byte on a dataset, and the accuracy on recall data");
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
        std::reverse(arguments.begin(), arguments.end());  // parse() expects the last one first
        app.parse(arguments);
    } catch (const CLI::Success& asked) {
        app.exit(asked);
        return false;
    } catch (const CLI::ExtrasError&) {
        usage_error("unexpected argument ", shown(app.remaining(true).front()), " (see --help)");
    } catch (const CLI::ArgumentMismatch& e) {
        usage_error(options_detail::first_flag(e.what()), ": expected one value, given once");
    } catch (const CLI::ConversionError& e) {  // not a bad number, because in_range() checked all of those
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
