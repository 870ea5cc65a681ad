// The commands that use a model: generate writes text, eval computes the loss on a dataset (and of a recall
// dataset also how many answers are right), and dump writes the results of one batch, to compare backends.
#pragma once
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "llmc/checkpoint.h"
#include "llmc/dataloader.h"
#include "llmc/error.h"
#include "llmc/model.h"
#include "llmc/options.h"
#include "llmc/recall.h"
#include "llmc/safetensors.h"
#include "llmc/sampler.h"
#include "llmc/tokenizer.h"

// The tokens at which a text starts and ends. As in generate() of transformers, config.json decides: a text
// starts with its bos_token_id, and any of its eos_token_id ends it. If config.json has none, transformers
// would refuse to start and would never stop; we use the tokenizer's <|endoftext|> then. transformers prefers
// generation_config.json to config.json; we do not read it, because that of GPT-2 has the same tokens.
inline int start_token(const GPTConfig& config, const Tokenizer& tokenizer) {  // -1: there is none
    if (config.bos_token >= 0) return config.bos_token;
    return config.eos_tokens.empty() ? tokenizer.eot_token() : config.eos_tokens[0];
}
inline std::vector<int> end_tokens(const GPTConfig& config, const Tokenizer& tokenizer) {
    if (!config.eos_tokens.empty() || tokenizer.eot_token() < 0) return config.eos_tokens;
    return {tokenizer.eot_token()};
}

// Draws n tokens after `prompt` (not empty) and calls emit(token) for each. It ends early at one of `ends`.
// Learned positions end at the context. When the text gets longer, the second half of the context becomes the
// new prompt, with positions from 0.
template <class Emit>
void generate_tokens(Model& model, std::vector<int> prompt, int n, const SamplerOptions& options,
                     const std::vector<int>& ends, Emit emit) {
    const int context = model.config.context;
    const bool bounded = !model.config.rope();
    auto keep_last = [&](int count) {
        if ((int)prompt.size() > count) prompt.erase(prompt.begin(), prompt.end() - count);
    };
    if (bounded) keep_last(context);
    model.clear_cache();
    std::vector<int> fresh = prompt;  // tokens that are not yet in the cache
    for (int i = 0; i < n; i++) {
        if (bounded && (int)prompt.size() > context) {
            keep_last(std::max(1, context / 2));
            model.clear_cache();
            fresh = prompt;
        }
        const float* logits = model.decode(fresh.data(), (int)fresh.size());
        int token = sample_token(logits, model.config.vocab_size, options, i);
        if (std::find(ends.begin(), ends.end(), token) != ends.end()) break;
        emit(token);
        if (bounded) prompt.push_back(token);
        fresh = {token};
    }
    model.clear_cache();
}

// Makes a model with the weights of a checkpoint.
inline std::unique_ptr<Model> load_model(const Backend& backend, const Checkpoint& checkpoint,
                                         const ModelOptions& options) {
    require_supported(backend, checkpoint.config, options);
    std::unique_ptr<Model> model = backend.make_model(checkpoint.config, options);
    model->allocate();
    checkpoint.load_weights(*model);
    return model;
}

inline Tokenizer open_tokenizer(const Checkpoint& checkpoint) {
    if (const MappedFile* file = checkpoint.tokenizer()) return Tokenizer(*file);
    return Tokenizer(join_path(checkpoint.folder, "tokenizer.json"));  // fails with the name of the file
}

// An error if a batch has more positions than the model, or too many tokens to count them with an int.
inline void check_batch(const GPTConfig& config, int B, int T) {
    if ((int64_t)B * T > 1 << 30) usage_error("--batch ", B, " x --seq ", T, ": more than 2^30 tokens");
    if (!config.rope() && T > config.context)
        usage_error("--seq ", T, ": the model's learned positions end at its context, ", config.context);
}

// An error if the tokenizer, which comes from `path`, has tokens that the model does not have.
inline void check_tokenizer(const Tokenizer& tokenizer, const std::string& path, const GPTConfig& config) {
    if (tokenizer.vocab_size() > config.vocab_size)
        fail(path, ": the tokenizer has ", tokenizer.vocab_size(), " tokens, but the model has ",
             config.vocab_size);
}

// Reads all of a file, of a FIFO or, if path is "-", of stdin. While nothing comes it says that it waits,
// because otherwise it would look as if the program hangs.
inline std::string read_prompt(const std::string& path) {
    const bool standard = path == "-";
    const std::string name = standard ? "stdin" : path;
    // O_NONBLOCK, because otherwise open() would wait silently for the writer of a FIFO.
    const Descriptor opened(standard ? -1 : ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    const int fd = standard ? STDIN_FILENO : opened.fd;
    if (fd < 0) fail_errno(name, "cannot open");
    std::string text;
    std::vector<char> buffer(1 << 16);
    for (int patience = 500;;) {  // milliseconds until the message; -1: it has been printed
        pollfd input = {fd, POLLIN, 0};
        if (::poll(&input, 1, patience) == 0) {
            fprintf(stderr, "waiting for the prompt from %s\n", printable(name).c_str());
            patience = -1;
            continue;
        }
        const ssize_t count = ::read(fd, buffer.data(), buffer.size());
        if (count == 0) break;
        if (count > 0) {
            text.append(buffer.data(), count);
        } else if (errno != EINTR && errno != EAGAIN) {
            fail_errno(name, "cannot read");
        }
        if (text.size() > INT32_MAX) fail(name, ": more than ", INT32_MAX, " bytes, too long for a prompt");
    }
    if (text.starts_with("\xef\xbb\xbf")) text.erase(0, 3);  // a byte order mark is not a part of the text
    return text;
}

inline void generate(const Backend& backend, const GenerateOptions& options) {
    Checkpoint checkpoint = open_model(options.model);
    Tokenizer tokenizer = open_tokenizer(checkpoint);
    check_tokenizer(tokenizer, join_path(checkpoint.folder, "tokenizer.json"), checkpoint.config);
    const bool from_file = !options.prompt_file.empty();
    const std::string prompt_text = from_file ? read_prompt(options.prompt_file) : options.prompt;
    std::vector<int> prompt;
    try {
        prompt = tokenizer.encode(prompt_text);
    } catch (const Error& e) {
        if (from_file) fail(options.prompt_file == "-" ? "stdin" : options.prompt_file, ": ", e.what());
        usage_error("--prompt: ", e.what());
    }
    const GPTConfig& config = checkpoint.config;
    if (prompt.empty()) {
        const int start = start_token(config, tokenizer);
        if (start < 0)
            usage_error("--prompt: expected a text, because ", checkpoint.folder,
                        " has neither a bos_token_id in config.json nor a token <|endoftext|>");
        prompt = {start};
    }
    if (!config.rope() && (int64_t)prompt.size() > config.context)
        warn("the prompt has ", prompt.size(), " tokens, but only the last ", config.context,
             " are used: the model's learned positions end at its context");
    ModelOptions model_options{Purpose::inference, 1, std::min(256, (int)prompt.size())};
    model_options.cache = (CacheKind)index_of_name(options.cache, kCacheNames, "--cache");
    auto model = load_model(backend, checkpoint, model_options);
    Utf8Stream text;
    auto write = [&](const std::string& piece) {
        if (fwrite(piece.data(), 1, piece.size(), stdout) != piece.size() || fflush(stdout) != 0)
            fail_errno("stdout", "cannot write");
    };
    write(prompt_text);
    generate_tokens(*model, prompt, options.tokens, options.sampler, end_tokens(config, tokenizer),
                    [&](int token) {
                        if (token < tokenizer.vocab_size()) write(text.push(tokenizer.decode(token)));
                    });
    write(text.finish() + "\n");
}

inline void evaluate(const Backend& backend, const EvalOptions& options) {
    Checkpoint checkpoint = open_model(options.model);
    const GPTConfig& config = checkpoint.config;
    int T = options.seq ? options.seq : config.context;
    check_batch(config, options.batch, T);
    TokenDataset dataset(options.data, options.split, config.vocab_size, T);
    DataLoader loader(dataset, 0, /*shuffle=*/false);
    int64_t sequences = dataset.sequences();
    if (options.batches > 0) sequences = std::min(sequences, (int64_t)options.batches * options.batch);
    int B = (int)std::min<int64_t>(options.batch, sequences);
    const std::optional<MappedFile> file = find_tokenizer(options.data);
    require_same_tokenizer(file ? &*file : nullptr, checkpoint.tokenizer());
    const DatasetInfo info = read_dataset_info(options.data);
    const int separator = info.described ? info.eot_token : -1;  // it ends a document and is not text
    std::optional<Tokenizer> tokenizer;  // gives the number of bytes of the predicted text
    if (file) tokenizer = open_if_supported(*file, "bits per byte");
    auto model = load_model(backend, checkpoint, options.compute.model_options(Purpose::inference, B, T));
    std::vector<int> inputs((size_t)B * T), targets((size_t)B * T);
    std::vector<float> logits(info.recall ? (size_t)B * T * config.vocab_size : 0);
    double total = 0;
    int64_t bytes = 0;
    RecallScore score;
    for (int64_t done = 0; done < sequences; done += B) {
        int count = (int)std::min<int64_t>(B, sequences - done);
        loader.batch(done, count, inputs.data(), targets.data());
        total += model->loss({inputs.data(), targets.data(), count, T}) * count * T;
        for (int i = 0; tokenizer && i < count * T; i++)
            if (targets[i] != separator && targets[i] != tokenizer->eot_token() &&
                targets[i] < tokenizer->vocab_size())
                bytes += tokenizer->decode(targets[i]).size();
        if (!info.recall) continue;
        model->all_logits(logits.data(), inputs.data(), count, T);
        for (int n = 0; n < count * T; n += T)
            for (int t : answer_positions(info, inputs.data() + n, targets.data() + n, T))
                score.add(logits.data() + (size_t)(n + t) * config.vocab_size, config.vocab_size,
                          targets[n + t]);
    }
    double loss = total / (sequences * T);
    printf("%s, %s: %lld tokens in %lld sequences of %d\n", printable(options.data).c_str(),
           options.split.c_str(), (long long)(sequences * T), (long long)sequences, T);
    printf("loss %.6f | perplexity %.4f", loss, std::exp(loss));
    if (bytes > 0) printf(" | bits per byte %.4f", total / std::log(2.0) / bytes);
    printf("\n");
    if (score.answers > 0)
        printf("%lld answers: accuracy %.4f | loss %.6f\n", (long long)score.answers,
               (double)score.right / score.answers, score.loss / score.answers);
}

inline void dump(const Backend& backend, const DumpOptions& options) {
    Checkpoint checkpoint = open_model(options.model);
    int B = options.batch, T = options.seq, V = checkpoint.config.vocab_size;
    check_batch(checkpoint.config, B, T);
    TokenDataset dataset(options.data, "train", V, T);
    if (dataset.sequences() < B)
        usage_error("--batch ", B, ": ", options.data, " has ", dataset.sequences(), " sequences of ", T,
                    " tokens");
    const std::optional<MappedFile> file = find_tokenizer(options.data);
    require_same_tokenizer(file ? &*file : nullptr, checkpoint.tokenizer());
    std::vector<int> inputs((size_t)B * T), targets((size_t)B * T);
    DataLoader(dataset, 0, /*shuffle=*/false).batch(0, B, inputs.data(), targets.data());
    auto model = load_model(backend, checkpoint, options.compute.model_options(Purpose::training, B, T));
    std::vector<float> logits((size_t)B * T * V);
    model->all_logits(logits.data(), inputs.data(), B, T);
    float loss = (float)model->loss({inputs.data(), targets.data(), B, T}, Pass::training());

    std::vector<TensorSpec> specs = {{"input_ids", DType::I32, {B, T}},
                                     {"targets", DType::I32, {B, T}},
                                     {"logits", DType::F32, {B, T, V}},
                                     {"loss", DType::F32, {}}};
    for (const char* prefix : {"param.", "grad."})
        for (const ParameterTensor& t : model->table.tensors)
            specs.push_back({prefix + t.name, DType::F32, t.shape});
    std::vector<float> values;
    write_file_atomically(options.file, [&](FileWriter& file) {
        SafetensorsWriter writer(file, specs);
        writer.append(inputs.data(), inputs.size() * sizeof(int));
        writer.append(targets.data(), targets.size() * sizeof(int));
        writer.append(logits.data(), logits.size() * sizeof(float));
        writer.append(&loss, sizeof(loss));
        for (Store store : {Store::weights, Store::gradients})
            for (const ParameterTensor& t : model->table.tensors) {
                values.resize(t.size);
                model->read(store, t, values.data());
                writer.append(values.data(), values.size() * sizeof(float));
            }
        writer.close();
    });
    printf("loss %.6f; wrote %s\n", loss, printable(options.file).c_str());
}
