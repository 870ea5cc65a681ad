// generate, and the samples of training: where texts start and end, prompts of every kind, and each token
// compared with the logits of dump.
#include <sys/stat.h>

#include <algorithm>
#include <set>
#include <thread>

#include "llmc/config_json.h"
#include "llmc/parameters.h"
#include "llmc/safetensors.h"
#include "llmc/tokenizer.h"
#include "tests/cli/cli.h"

namespace {

using namespace cli;
namespace fs = std::filesystem;

constexpr int kVocab = 257;  // one token for each byte, and one that ends a text
constexpr int kEnd = 256;

// A tokenizer whose ids 0 to 255 are the bytes themselves.
std::string byte_tokenizer(const std::string& end_token) {
    const Tokenizer golden(kTokenizer);
    Json json = Json::parse(get_file(kTokenizer)), vocabulary = {{end_token, kEnd}};
    for (const auto& [name, id] : json.at("model").at("vocab").items())
        if (const std::string& bytes = golden.decode(id.get<int>()); bytes.size() == 1)
            vocabulary[name] = (unsigned char)bytes[0];
    json["model"]["vocab"] = vocabulary;
    json["model"]["merges"] = Json::array();
    json["added_tokens"] = {{{"id", kEnd}, {"content", end_token}, {"normalized", false}}};
    return json.dump();
}

// Writes a small model with large random weights, in which the next token depends on all tokens before it. It
// writes only ASCII characters, so that the bytes of its text are its tokens. It ends a text only if `ends`.
void write_model(const std::string& folder, GPTConfig config, bool ends = false) {
    fs::create_directory(folder);
    config.layers = 1, config.heads = 2, config.channels = 16, config.context = 16,
    config.vocab_size = kVocab;
    put_file(folder + "/config.json", config_to_json(config).dump());
    put_file(folder + "/tokenizer.json", byte_tokenizer("<|endoftext|>"));
    const ParameterTable table(config, kVocab);
    std::vector<TensorSpec> specs;
    for (const ParameterTensor& t : table.tensors) specs.push_back({t.name, DType::F32, t.shape});
    FileWriter file(folder + "/model.safetensors");
    SafetensorsWriter writer(file, specs);
    for (const ParameterTensor& t : table.tensors) {
        std::vector<float> values(t.size);
        fill_normal(values.data(), t.size, 0.5f, 5, random_stream(t.name.c_str()));
        if (t.init == Init::ones || t.init == Init::constant)
            for (float& x : values) x += 1;
        if (t.name == "wte.weight")
            for (size_t i = 128 * 16; i < values.size(); i++)
                values[i] *= i < kEnd * 16 || !ends ? 0.0f : 1.5f;
        writer.append(values.data(), values.size() * sizeof(float));
    }
    writer.close();
}

GPTConfig rope_config() {
    GPTConfig config;
    config.positions = PositionKind::rope;
    return config;
}

// The text that generate writes with greedy sampling. There must be no warning.
std::string greedy(const std::string& model, int tokens, const Strings& more = {}, const Run& run = {}) {
    const Result result = train_gpt(
        str("generate --temperature 0 --threads 2 --model ", model, " --tokens ", tokens), more, run);
    check_done(result);
    CHECK(result.out.ends_with('\n'));
    return result.out.substr(0, result.out.size() - 1);
}

}  // namespace

TEST_CASE("cli: greedy generation chooses the likeliest of dump's logits, within the context and past it") {
    const TempFolder folder;
    GPTConfig cubic = rope_config(), square = rope_config();
    cubic.attention_kind = AttentionKind::poly3, cubic.qk_norm = true, cubic.short_conv = 3;
    square.attention_kind = AttentionKind::poly2;
    const std::string prompts[] = {"Once", "A prompt longer than the context: "};
    struct Kind {
        GPTConfig config;
        std::string cache;
    };
    for (const Kind& kind : {Kind{GPTConfig(), "auto"}, Kind{cubic, "kv"}, Kind{square, "state"}}) {
        const GPTConfig& config = kind.config;
        CAPTURE(config_to_json(config).dump());
        const std::string model = folder / "model", data = folder / "data", dump = folder / "dump";
        fs::remove_all(model), fs::remove_all(data);
        write_model(model, config);
        fs::create_directory(data);
        put_file(data + "/meta.json", Json{{"vocab_size", kVocab}}.dump());
        // A row of dump is the part of a text that the model saw when it chose the tokens from number `first`
        // of the row on. Learned positions end at the context, 16; after it, a text continues from its last 8
        // tokens.
        struct Row {
            std::string text;
            int first;
        };
        std::vector<Row> rows;
        for (const std::string& prompt : prompts) {
            const Result result =
                train_gpt("generate --temperature 0 --threads 2 --tokens 48 --model " + model,
                          {"--prompt", prompt, "--cache", kind.cache});
            CHECK(result.status == 0);
            const std::string text = result.out.substr(0, prompt.size() + 48);
            CHECK(result.out == text + "\n");
            CHECK(text.starts_with(prompt));
            CHECK(std::set<char>(text.begin() + prompt.size(), text.end()).size() > 4);
            if (config.rope()) {
                rows.push_back({text, (int)prompt.size()});
                continue;
            }
            const size_t seen = std::min<size_t>(prompt.size(), 16);
            size_t begin = prompt.size() - seen;
            rows.push_back({text.substr(begin, 17), (int)seen});
            while ((begin += 9) + 17 <= text.size()) rows.push_back({text.substr(begin, 17), 8});
        }
        const size_t T = config.rope() ? rows.back().text.size() - 1 : 16;  // shorter rows are padded
        for (size_t b = 0; b < rows.size(); b++) {
            Tokens tokens(rows[b].text.begin(), rows[b].text.end());
            tokens.resize(T + 1);
            put_file(data + str("/train_", 10 + b, ".bin"), shard(tokens));
        }
        check_done(train_gpt(str("dump --threads 2 --batch ", rows.size(), " --seq ", T, " --data ", data,
                                 " --model ", model, " --file ", dump)));
        const std::vector<float> logits = Safetensors(dump).values("logits");
        for (size_t b = 0; b < rows.size(); b++)
            for (size_t t = rows[b].first; t < rows[b].text.size(); t++) {
                CAPTURE(b);
                CAPTURE(t);
                const float* row = &logits.at((b * T + t - 1) * kVocab);
                CHECK(row[(int)rows[b].text[t]] > *std::max_element(row, row + kVocab) - 1e-3);
            }
    }
}

TEST_CASE("cli: config.json says where texts start and end, and else the tokenizer") {
    const TempFolder folder;
    const std::string model = folder / "model", path = model + "/config.json";
    write_model(model, rope_config(), /*ends=*/true);
    const Json plain = Json::parse(get_file(path));
    auto say = [&](const Json& bos, const Json& eos) {
        Json config = plain;
        config["bos_token_id"] = bos, config["eos_token_id"] = eos;
        put_file(path, config.dump());
    };
    const int n = 60;
    auto started_by =
        [&](const std::string& token) {  // the text after this token, with no token that ends it
            say(nullptr, 200);
            return greedy(model, n, {"--prompt", token}).substr(token.size());
        };
    const std::string a = started_by("A"), b = started_by("B"), end = started_by("<|endoftext|>");
    auto before = [](const std::string& text, const std::string& token) {
        REQUIRE(contains(text, token));
        return text.substr(0, text.find(token));
    };
    REQUIRE((a != b && a != end && b != end));
    CHECK(a.size() >= n);

    say(65, 200);
    CHECK(greedy(model, n) == a);
    say(66, 200);
    CHECK(greedy(model, n) == b);
    const int x = a[3], y = a[8];
    say(65, x);
    CHECK(greedy(model, n) == before(a, {(char)x}));
    say(65, {y, x, 200});
    CHECK(greedy(model, n) == std::min(before(a, {(char)x}), before(a, {(char)y})));
    say(nullptr, {66, b[5]});  // the first of them starts a text, because nothing else is named
    CHECK(greedy(model, n) == before(b, {b[5]}));
    // If config.json names no token, or none that the vocabulary has, <|endoftext|> is used.
    for (const Json& nothing : {Json(), Json(50256), Json(-1), Json(Json::array())}) {
        say(nothing, nothing);
        CHECK(greedy(model, n) == before(end, "<|endoftext|>"));
    }
    put_file(path, plain.dump());
    CHECK(greedy(model, n) == before(end, "<|endoftext|>"));
    put_file(model + "/tokenizer.json", byte_tokenizer("</s>"));
    CHECK(contains(greedy(model, n, {"--prompt", "A"}), "</s>"));
    check_failed(train_gpt("generate --threads 2 --model " + model), 2, {"--prompt", "bos_token_id", model});
}

TEST_CASE("cli: training starts and ends its samples, and its checkpoints' texts, as the dataset does") {
    const TempFolder folder;
    const std::string model = folder / "model", data = folder / "data";
    GPTConfig config = rope_config();
    config.set_separator('A');
    write_model(model, config, /*ends=*/true);
    const Tokens tokens = random_tokens(40, 128, 1);
    write_dataset(data, kVocab, tokens, tokens);
    put_file(data + "/tokenizer.json", byte_tokenizer("</s>"));
    put_file(data + "/meta.json", Json{{"vocab_size", kVocab}, {"eot_token", kEnd}}.dump());
    const Result result = train_gpt(
        "train --steps 1 --batch 1 --lr 1e-9 --seed 6 --sample-tokens 200 --threads 2 --new-tokenizer "
        "--init-from " +
        model + " --data " + data + " --out " + (folder / "out"));
    check_done(result);
    const std::string checkpoint = folder / "out/step_00000001", start = "--- a sample after step 1\n";
    const Json written = Json::parse(get_file(checkpoint + "/config.json"));
    CHECK(written.at("bos_token_id") == kEnd);
    CHECK(written.at("eos_token_id") == kEnd);
    // The sample is the text that generate writes with the seed that the sampler has in this step.
    const Result generated = train_gpt("generate --tokens 200 --threads 2 --seed 7 --model " + checkpoint);
    check_done(generated);
    CHECK(contains(result.out, start + generated.out + "---\n"));
    CHECK(generated.out.size() < 200);
    CHECK_FALSE(contains(generated.out, "</s>"));
}

TEST_CASE("cli: prompts from a file, from stdin and from a pipe that is slow") {
    const TempFolder folder;
    const std::string model = folder / "model", file = folder / "file", pipe = folder / "pipe";
    write_model(model, rope_config());
    const std::string text("a\0b\r\ncaf\u00e9\n", 12);
    put_file(file, text);
    const std::string expected = greedy(model, 5, {"--prompt-file", file});
    CHECK(expected.starts_with(text));
    CHECK(expected.size() == text.size() + 5);
    put_file(file, "\xef\xbb\xbf" + text);  // a byte order mark does not belong to the prompt
    CHECK(greedy(model, 5, {"--prompt-file", file}) == expected);
    Run from_file;
    from_file.stdin_from = file;
    CHECK(greedy(model, 5, {"--prompt-file", "-"}, from_file) == expected);
    CHECK(greedy(model, 5, {"--prompt-file", "/dev/null"}) == greedy(model, 5));

    // The writer waits until the program reads, and then long enough that the program must say that it waits.
    REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
    std::thread writer([&] {
        const int fd = open(pipe.c_str(), O_WRONLY);
        usleep(600'000);
        bool written = write(fd, text.data(), 5) == 5;
        usleep(1000);
        written &= write(fd, text.data() + 5, text.size() - 5) == (ssize_t)text.size() - 5;
        if (!written) put_file(file, "the pipe was not read");
        close(fd);
    });
    const Result slow = train_gpt("generate --temperature 0 --threads 2 --tokens 5 --model " + model,
                                  {"--prompt-file", pipe});
    const int released =
        open(pipe.c_str(), O_RDONLY | O_NONBLOCK);  // releases a writer that waits for a reader
    writer.join();
    close(released);
    CHECK(slow.status == 0);
    CHECK(slow.out == expected + "\n");
    CHECK(slow.err == "waiting for the prompt from " + pipe + "\n");

    const std::string command = "generate --threads 2 --model " + model;
    put_file(file, "abc\xff");
    check_failed(train_gpt(command, {"--prompt-file", file}), 1, {file, "UTF-8", "3"});
    check_failed(train_gpt(command, {"--prompt-file", "-"}, from_file), 1, {"stdin", "UTF-8", "3"});
    check_failed(train_gpt(command, {"--prompt-file", "-"}), 1, {"stdin", "cannot read"});  // stdin is closed
    check_failed(train_gpt(command, {"--prompt-file", folder / "none"}), 1,
                 {folder / "none", "No such file"});
    check_failed(train_gpt(command, {"--prompt-file", model}), 1, {model, "directory"});
}

TEST_CASE(
    "cli: a prompt that learned positions cut is told; an empty one, and one like a flag, are taken as they "
    "are") {
    const TempFolder folder;
    const std::string learned = folder / "learned", rope = folder / "rope";
    write_model(learned, GPTConfig());
    write_model(rope, rope_config());
    auto run = [](const std::string& model, int length) {
        return train_gpt("generate --threads 2 --tokens 1 --model " + model,
                         {"--prompt", std::string(length, 'x')});
    };
    check_done(run(learned, 16));
    check_done(run(rope, 17));
    const Result cut = run(learned, 17);
    CHECK(cut.status == 0);
    CHECK(lines_of(cut.err).size() == 1);
    CHECK(contains(cut.err, "warning: the prompt has 17 tokens, but only the last 16 are used"));

    const std::string command = "generate --threads 2 --tokens 5 --model " + rope;
    const Result empty = train_gpt(command + " --prompt= --temperature=0");
    check_done(empty);
    CHECK(empty.out == greedy(rope, 5) + "\n");
    for (const std::string prompt : {"--temperature=", "--cache=", "="}) {
        CHECK(greedy(rope, 1, {"--prompt", prompt}).starts_with(prompt));
        CHECK(greedy(rope, 1, {"--prompt=" + prompt}).starts_with(prompt));
    }
    check_failed(train_gpt(command + " --top-k= 5"), 2, {"--top-k", "\"\""});
    check_failed(train_gpt(command + " --fly= 5"), 2, {"--fly="});
}

TEST_CASE("cli: a model learns a sentence by heart and says it past its context") {
    // The tokens of the sentence are all different, so each token determines the next one.
    const std::string sentence = "0,1;2.3:4!5?6-7(8)9\n";
    const Tokenizer tokenizer(kTokenizer);
    const std::vector<int> ids = tokenizer.encode(sentence);
    CHECK(std::set<int>(ids.begin(), ids.end()).size() == ids.size());
    REQUIRE(ids.size() > 16);  // the sentence is longer than the context
    const TempFolder folder;
    Tokens tokens;
    std::string text;
    for (int i = 0; i < 20; i++) tokens.insert(tokens.end(), ids.begin(), ids.end()), text += sentence;
    write_dataset(folder / "data", kTokenizerVocab, tokens, tokens);
    const std::string flags =
        "--layers 1 --heads 2 --channels 64 --context 16 --batch 8 --lr 1e-2 --val-every 0 --sample-every 0 ";
    const std::string kinds[] = {"--positions learned", "--positions rope",
                                 "--attention poly3 --attention-scale mean"};
    for (int kind = 0; kind < 3; kind++) {
        CAPTURE(kinds[kind]);
        const std::string out = folder / std::to_string(kind);
        const std::string model = train_model(folder / "data", out, flags + kinds[kind], 150);
        CHECK(read_metrics(out).back().at("loss") < 0.01);
        // One prompt is shorter and one longer than the context of 16 tokens.
        for (size_t begins : {size_t{4}, 2 * sentence.size()}) {
            const Result result =
                train_gpt("generate --temperature 0 --tokens 50 --threads 2 --model " + model,
                          {"--prompt", text.substr(0, begins)});
            CHECK(result.status == 0);
            CHECK(contains(result.err, "warning: the prompt has ") == (kind == 0 && begins > 4));
            CHECK(result.out == text.substr(0, begins + 50) + "\n");
        }
    }
}
