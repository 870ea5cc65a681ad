// The program as its users see it: bad command lines, bad files, training that diverges, and the output of
// generate, eval and dump. tests/cli/resume.cpp tests checkpoints, kills and full disks.
#include <cmath>
#include <functional>
#include <limits>
#include <set>

#include "llmc/tokenizer.h"
#include "llmc/version.h"
#include "tests/cli/cli.h"

namespace {

using namespace cli;
namespace fs = std::filesystem;

// One dataset, and one model that was trained on it, for all tests. `data` has 4 training sequences of 16
// tokens.
struct Fixture {
    TempFolder folder;
    std::string data = folder / "data", model;
    const Tokens train = random_tokens(65, kTokenizerVocab, 1), val = random_tokens(81, kTokenizerVocab, 2);

    Fixture() {
        write_dataset(data, kTokenizerVocab, train, val);
        model = train_model(data, folder / "run", kSizes + " --batch 2 --sample-every 0");
    }
};

const Fixture& fixture() {
    static const Fixture fixture;
    return fixture;
}

// The commands that open a model, one for each way.
std::vector<std::string> commands_on(const std::string& model, const TempFolder& folder) {
    const std::string data = " --threads 2 --data " + fixture().data;
    return {"generate --tokens 1 --threads 2 --model " + model, "eval --model " + model + data,
            "dump --batch 2 --seq 8 --file " + (folder / "dump") + " --model " + model + data,
            "train --steps 1 --batch 2 --out " + (folder / "out") + " --init-from " + model + data};
}

Strings words_of(const std::string& line) {
    std::istringstream in(line);
    return {std::istream_iterator<std::string>(in), {}};
}

const std::map<std::string, Strings> kFlags = {
    {"train",
     words_of("--data --out --preset --layers --heads --channels --context --attention --softmax-every "
              "--attention-scale "
              "--positions --qk-norm --q-gain --decay --short-conv --output-gate --init-from --new-tokenizer "
              "--batch "
              "--seq --total-batch --steps --lr --attention-lr --schedule --warmup --final-lr-fraction "
              "--weight-decay --beta1 "
              "--beta2 --eps --grad-clip --seed --dtype --attention-kernel --recompute --gradients "
              "--stochastic-rounding --cuda-graph --threads --val-every --val-batches --sample-every "
              "--sample-tokens --norms-every --checkpoint-every "
              "--keep-checkpoints --resume")},
    {"generate",
     words_of(
         "--model --prompt --prompt-file --tokens --temperature --top-k --top-p --seed --cache --threads")},
    {"eval", words_of("--model --data --split --batches --batch --seq --dtype --attention-kernel --threads")},
    {"dump", words_of("--model --data --batch --seq --file --dtype --attention-kernel --threads")}};

}  // namespace

TEST_CASE("cli: help names every command and flag") {
    const Result top = train_gpt("--help");
    check_done(top);
    for (const auto& [command, flags] : kFlags) {
        CHECK(contains(top.out, "  " + command + " "));
        const Result help = train_gpt(command + " --help");
        check_done(help);
        for (const std::string& flag : flags) {
            CAPTURE(flag);
            CHECK((contains(help.out, "  " + flag + " ") || contains(help.out, "  " + flag + "\n")));
        }
    }
}

TEST_CASE("cli: --version names the program, its version and what it was built with") {
    CHECK(contains(train_gpt("--help").out, "  --version "));
    const Result result = train_gpt("--version");
    check_done(result);
    const Strings lines = lines_of(result.out);
    REQUIRE(lines.size() == 5);
    CHECK(lines[0].rfind(str("polygpt ", kVersion), 0) == 0);
    const Strings parts[] = {{"program ", " train_gpt"},
                             {"model ", " for CPUs with ", "; matrix products by "},
                             {"compiler "},
                             {"libraries ", " CLI11 2.", ", nlohmann-json 3.", ", zlib 1."}};
    for (int i = 0; i < 4; i++)
        for (const std::string& part : parts[i]) CHECK(contains(lines[i + 1], part));
}

TEST_CASE("cli: numbers that are none or out of range are refused") {
    const TempFolder folder;
    const std::string out = folder / "out", file = folder / "file";
    const std::string data = " --data " + fixture().data, model = " --model " + fixture().model;
    struct Numbers {
        std::string command, integers, reals;
    };
    const Numbers table[] = {
        {"train --out " + out + data,
         "--layers --heads --channels --context --softmax-every --short-conv --batch --seq --total-batch "
         "--steps --warmup "
         "--seed "
         "--threads --val-every --val-batches --sample-every --sample-tokens --checkpoint-every "
         "--keep-checkpoints",
         "--lr --attention-lr --q-gain --final-lr-fraction --weight-decay --beta1 --beta2 --eps --grad-clip"},
        {"generate" + model, "--tokens --top-k --seed --threads", "--temperature --top-p"},
        {"eval" + model + data, "--batches --batch --seq --threads", ""},
        {"dump" + model + data + " --file " + file, "--batch --seq --threads", ""}};
    for (const auto& [command, integers, reals] : table) {
        auto check_refused = [&, command = command](const std::string& flag, const std::string& value) {
            check_failed(train_gpt(command, {flag, value}), 2, {flag, value});
        };
        for (const std::string& flag : words_of(integers + " " + reals))
            for (const char* value : {"x", "", "nan", "inf", "-7", "1e99", "5x"}) check_refused(flag, value);
        for (const std::string& flag : words_of(integers))
            for (const char* value : {"1.5", "99999999999999999999"}) check_refused(flag, value);
    }
    CHECK_FALSE(fs::exists(out));
    CHECK_FALSE(fs::exists(file));
}

TEST_CASE("cli: bad command lines are refused") {
    const TempFolder folder;
    const std::string out = folder / "out", data = " --data " + fixture().data;
    const std::string train = "train --out " + out + data + " ", sized = train + kSizes + " ";
    const std::string generate = "generate --model " + fixture().model + " ", file = folder / "a_file";
    put_file(file, "");
    struct Bad {
        std::string line;
        Strings parts;
        Strings more = {};
    };
    const Bad table[] = {
        {"", {"train", "generate", "eval", "dump"}},
        {"fly", {"fly"}},
        {"--fly", {"--fly"}},
        {"train --data x", {"--out"}},
        {"train --out " + out, {"--data"}},
        {"train" + data, {"--out"}, {"--out", ""}},
        {"train --out " + out, {"--data"}, {"--data", ""}},
        {"generate", {"--model"}},
        {"eval --model x", {"--data"}},
        {"dump --model x --data x", {"--file"}},
        {train + "--fly 1", {"--fly"}},
        {train + "stray", {"stray"}},
        {train + "--layers", {"--layers"}},
        {train + "--steps 1 --steps 2", {"--steps"}},
        {train + "--layers 0", {"--layers", "0", "1 to 1000"}},
        {train + "--heads 0", {"--heads", "0", "1 to 1024"}},
        {train + "--channels 0", {"--channels", "0", "1 to 65536"}},
        {train + "--context 0", {"--context", "0", "1 to "}},
        {train + "--batch 0", {"--batch", "0", "1 to "}},
        {train + "--steps 0", {"--steps", "0", "1 to "}},
        {train + "--eps 0", {"--eps", "0", "1e-30 to 1"}},
        {train + "--beta1 1", {"--beta1", "1", "0 to "}},
        {train + "--beta2 1", {"--beta2", "1", "0 to "}},
        {train + "--preset gpt3", {"--preset", "gpt3", "nano", "gpt2-xl", "gpt2-xl-poly4"}},
        {train + "--preset nano-poly5", {"--preset", "nano-poly5", "nano-poly1"}},
        {train + "--attention Poly3", {"--attention", "Poly3", "softmax", "poly1", "poly4"}},
        {train + "--softmax-every 4", {"--softmax-every", "--attention", "softmax"}},
        {train + "--softmax-every 1 --attention poly1",
         {"softmax_every is 1", "2 to the number of layers, 4"}},
        {train + "--softmax-every 5 --attention poly1",
         {"softmax_every is 5", "2 to the number of layers, 4"}},
        {train + "--attention-scale tall", {"--attention-scale", "tall", "row", "context", "mean", "sum"}},
        {train + "--attention-scale nan", {"--attention-scale", "nan"}},
        {train + "--attention-scale 0", {"--attention-scale", "0"}},
        {train + "--attention-scale 1e-300", {"--attention-scale", "1e-300", "a float"}},
        {train + "--attention-scale 1e300", {"--attention-scale", "1e300", "a float"}},
        {train + "--attention softmax --attention-scale sum", {"--attention-scale sum", "softmax", "number"}},
        {train + "--attention sigmoid --attention-scale row", {"--attention-scale row", "sigmoid", "number"}},
        {train + "--positions alibi", {"--positions", "alibi", "learned", "rope"}},
        {train + "--qk-norm maybe", {"--qk-norm", "maybe", "true", "false"}},
        {train + "--q-gain 0", {"--q-gain", "0.001 to 1000"}},
        {train + "--q-gain 0.5", {"--q-gain", "--qk-norm true"}},
        {train + "--output-gate ajar", {"--output-gate", "ajar", "true", "false"}},
        {train + "--decay slow", {"--decay", "slow", "none", "fixed", "learned"}},
        {train + "--schedule step", {"--schedule", "step", "cosine", "linear", "wsd", "constant"}},
        {train + "--dtype fp64", {"--dtype", "fp64", "fp32"}},
        {train + "--heads 3 --channels 16", {"3 heads", "16 channels"}},
        {train + "--heads 2 --channels 6 --positions rope", {"even", "6 channels", "2 heads"}},
        {sized + "--batch 2 --total-batch 48", {"--total-batch", "48", "32"}},
        {sized + "--batch 1 --total-batch 68719476736", {"--total-batch", "68719476736"}},
        {sized + "--seq 17", {"--seq", "17", "16"}},
        {train + "--batch 2 --init-from " + fixture().model + " --layers 2", {"1", "2", fixture().model}},
        {train + "--batch 2 --init-from " + fixture().model + " --attention poly3", {"softmax", "poly3"}},
        {"train --out " + parent_folder(fixture().model) + data, {"--out", "--resume"}},
        {"eval --split test --model " + fixture().model + data, {"--split", "test", "train", "val"}},
        {"eval --batch 0 --model " + fixture().model + data, {"--batch", "0", "1 to "}},
        {"dump --seq 0 --file " + out + " --model " + fixture().model + data, {"--seq", "0", "1 to "}},
        {"eval --seq 17 --model " + fixture().model + data, {"--seq", "17", "16"}},
        {"dump --seq 17 --file " + out + " --model " + fixture().model + data, {"--seq", "17", "16"}},
        {"dump --seq 16 --batch 5 --file " + out + " --model " + fixture().model + data,
         {"--batch", "5", "4"}},
        {generate + "--top-p 1.5", {"--top-p", "1.5", "0 to 1"}},
        {generate, {"--prompt", "UTF-8", "3"}, {"--prompt", "abc\xff"}},
        {generate, {"--prompt", "UTF-8"}, {"--prompt", "cut \xe2\x82"}},
        {generate + "--prompt x --prompt-file y", {"--prompt", "--prompt-file"}},
        {"generate --model= --tokens=1", {"--model", "\"\""}},
        {generate + "--prompt-file= --tokens=1", {"--prompt-file", "\"\""}},
        {sized + "--init-from= --batch=2", {"--init-from", "\"\""}},
        {"train --out= --data=x", {"--out", "\"\""}},
        {"eval --data= --batch=2 --model " + fixture().model, {"--data", "\"\""}},
        {"dump --file= --batch=2 --model " + fixture().model + data, {"--file", "\"\""}},
    };
    for (const Bad& bad : table) {
        CAPTURE(bad.line);
        const Result result = train_gpt(bad.line, bad.more);
        check_failed(result, 2, bad.parts);
        CHECK(result.out.empty());
        CHECK_FALSE(fs::exists(out));
        fs::remove_all(out);
    }
}

TEST_CASE("cli: folders and files that cannot be written") {
    const TempFolder folder;
    put_file(folder / "file", "text");
    for (const std::string& out : {folder / "file", folder / "file/below", std::string("/proc/llmc/out")}) {
        check_failed(train_gpt("train --steps 1 --data " + fixture().data + " --out " + out + kTiny), 1,
                     {out});
        check_failed(train_gpt("dump --batch 2 --seq 8 --file " + out + "/dump --threads 2 --model " +
                               fixture().model + " --data " + fixture().data),
                     1, {out});
    }
    CHECK(get_file(folder / "file") == "text");
    // If printed results are lost, the program must fail with a message.
    if (!fs::exists("/dev/full")) {
        MESSAGE("skipped: there is no /dev/full");
        return;
    }
    for (const std::string& command : {std::string("generate --tokens 3"), "eval --data " + fixture().data})
        check_failed(train_gpt(command + " --threads 2 --model " + fixture().model, {}, {{}, 0, "/dev/full"}),
                     1, {"stdout"});
}

#ifndef __SANITIZE_ADDRESS__  // it ends the program when an allocation fails
TEST_CASE("cli: a model too large for the memory is refused") {
    const TempFolder folder;
    check_failed(
        train_gpt("train --layers 1000 --heads 1 --channels 65536 --context 16 --batch 2 --threads 2 "
                  "--data " +
                  fixture().data + " --out " + (folder / "out")),
        1, {"memory"});
    CHECK_FALSE(fs::exists(folder / "out"));
}
#endif

TEST_CASE("cli: bad token shards are refused, with the file's name") {
    const TempFolder folder;
    const std::string data = folder / "data", shard_path = data + "/train_000000.bin";
    const std::string good = shard(fixture().train);
    auto with_int = [&](size_t index, int32_t value) {  // changes a number in the header
        std::string text = good;
        memcpy(&text[4 * index], &value, 4);
        return text;
    };
    auto with_token = [&](size_t index, uint16_t token) {
        Tokens tokens = fixture().train;
        tokens.at(index) = token;
        return shard(tokens);
    };
    std::string wide =
        with_int(0, 20240801).substr(0, 1024);  // a file of uint32 tokens that are all 2^32 - 1
    wide[4] = 7, wide += std::string(4 * fixture().train.size(), '\xff');
    struct Bad {
        std::string text;
        Strings parts;
    };
    const Bad table[] = {
        {"", {"0 bytes"}},
        {good.substr(0, 1000), {"1000 bytes", "1024"}},
        {good.substr(0, good.size() - 1), {"65 tokens"}},
        {good + "x", {"65 tokens"}},
        {with_int(0, 20240521), {"magic", "20240521", "20240520", "without a header", "data/prepare.py"}},
        {with_int(1, 2), {"version 2"}},
        {with_int(2, -1), {"-1 tokens"}},
        {with_int(2, 2147483647), {"2147483647 tokens"}},
        {shard(random_tokens(16, 900, 1)), {"16 tokens", "17"}},
        {with_token(0, 900), {"token 900", "byte 1024", "vocabulary has 900"}},
        {with_token(16, 65535), {"token 65535", "byte 1056"}},
        {wide, {"token 4294967295", "vocabulary has 900"}},
    };
    write_dataset(data, kTokenizerVocab, fixture().train, fixture().val);
    for (const Bad& bad : table) {
        put_file(shard_path, bad.text);
        Strings parts = bad.parts;
        parts.push_back(shard_path);
        const std::string out = folder / "out", model = " --threads 2 --model " + fixture().model;
        fs::remove_all(out);
        check_failed(train_gpt("train --batch 4 --data " + data + " --out " + out + kSizes), 1, parts);
        CHECK_FALSE(fs::exists(out + "/step_00000001"));
        check_failed(train_gpt("eval --split train --data " + data + model), 1, parts);
        check_failed(train_gpt("dump --seq 16 --batch 2 --file " + out + " --data " + data + model), 1,
                     parts);
    }
}

TEST_CASE("cli: dataset folders with missing or broken parts are refused") {
    const TempFolder folder;
    const std::string data = folder / "data", out = folder / "out";
    auto remove = [&](const char* name) { return [=] { fs::remove(data + "/" + name); }; };
    auto put = [&](const char* name, const std::string& text) {
        return [=] { put_file(data + "/" + name, text); };
    };
    struct Bad {
        std::function<void()> spoil;
        Strings parts;
    };
    const std::string tokenizer = get_file(kTokenizer);
    const Bad table[] = {
        {[&] { fs::remove_all(data); }, {data}},
        {[&] { fs::remove_all(data), put_file(data, ""); }, {data}},
        {remove("train_000000.bin"), {data, "train"}},
        {remove("val_000000.bin"), {data, "val"}},
        {put("meta.json", ""), {"meta.json"}},
        {put("meta.json", "{\"vocab_size\": 900"), {"meta.json"}},
        {put("meta.json", "[900]"), {"meta.json"}},
        {put("meta.json", "{}"), {"meta.json", "vocab_size"}},
        {put("meta.json", "{\"vocab_size\": 0}"), {"meta.json", "vocab_size", "0"}},
        {put("meta.json", "{\"vocab_size\": \"900\"}"), {"meta.json", "vocab_size", "\"900\""}},
        {put("meta.json", "{\"vocab_size\": 9e99}"), {"meta.json", "vocab_size"}},
        {put("meta.json", "{\"vocab_size\": 900, \"eot_token\": 900}"), {"meta.json", "eot_token", "900"}},
        {put("tokenizer.json", ""), {"tokenizer.json"}},
        {put("tokenizer.json", tokenizer.substr(0, tokenizer.size() / 2)), {"tokenizer.json"}},
        {put("tokenizer.json", "{}"), {"tokenizer.json"}},
    };
    for (const Bad& bad : table) {
        fs::remove_all(data);
        write_dataset(data, kTokenizerVocab, fixture().train, fixture().val);
        bad.spoil();
        check_failed(train_gpt("train --data " + data + " --out " + out + kTiny), 1, bad.parts);
        CHECK_FALSE(fs::exists(out));
    }
    fs::remove_all(data);  // a missing folder is not taken for one of llm.c, which has GPT-2's vocabulary
    const std::string on = " --batch 2 --threads 2 --data " + data, &model = fixture().model;
    for (const std::string& command :
         {"train --out " + out + " --init-from " + model, "eval --model " + model})
        check_failed(train_gpt(command + on), 1, {data + ": cannot read folder"});
}

TEST_CASE("cli: a broken model.safetensors is refused, with its tensor") {
    const TempFolder folder;
    const std::string model = folder / "model", path = model + "/model.safetensors";
    copy_model(fixture().model, model);
    const Safetensors good(path);
    const std::string name = "h.0.attn.c_attn.weight";  // (16, 48)
    // The file, in which one key of the tensor's entry is changed.
    auto with = [&](const char* key, const Json& value) {
        Safetensors file = good;
        file.header[name][key] = value;
        return file.text();
    };
    auto with_header_size = [&](uint64_t size) {
        return std::string((const char*)&size, 8) + good.text().substr(8);
    };
    const int64_t begin = good.header[name]["data_offsets"][0], end = good.header[name]["data_offsets"][1];
    Safetensors missing = good;
    missing.header["other"] = missing.header[name];
    missing.header.erase(name);
    const std::string text = good.text();
    struct Bad {
        std::string text;
        Strings parts;
    };
    const Bad table[] = {
        {"", {}},
        {text.substr(0, 7), {}},
        {text.substr(0, 50), {"header"}},
        {text.substr(0, text.size() - 1), {"the end of the file is missing"}},
        {text + "x", {"1 bytes"}},
        {with_header_size(text.size() - 7), {"header"}},
        {with_header_size(uint64_t{1} << 40), {"header"}},
        {with_header_size(uint64_t{1} << 63), {"header"}},
        {with_header_size(~uint64_t{0}), {"header"}},
        {with_header_size(0), {"header"}},
        {std::string("\5\0\0\0\0\0\0\0{\"a\":", 13), {"JSON"}},
        {std::string("\2\0\0\0\0\0\0\0{}", 10), {"wte.weight", "missing"}},
        {with("data_offsets", {begin - 4, end - 4}), {name, "overlap"}},
        {with("data_offsets", {-4, end - begin - 4}), {name, "data_offsets"}},
        {with("data_offsets", {end, begin}), {name, "data_offsets"}},
        {with("data_offsets", {begin, end + (int64_t{1} << 62)}), {name}},
        {with("data_offsets", {uint64_t(begin), uint64_t{1} << 63}), {name, "data_offsets"}},
        {with("data_offsets", "all"), {name, "data_offsets"}},
        {with("dtype", "I32"), {name, "I32"}},
        {with("dtype", "F64"), {name}},
        {with("dtype", "F99"), {name, "F99"}},
        {with("dtype", 32), {name, "dtype"}},
        {with("shape", {48, 16}), {name, "(48, 16)", "(16, 48)"}},
        {with("shape", {768}), {name, "(768)", "(16, 48)"}},
        {with("shape", {-16, -48}), {name, "shape"}},
        {with("shape", {uint64_t{1} << 63, 2}), {name, "shape"}},
        {with("shape", {int64_t{1} << 62, int64_t{1} << 62}), {name, "shape"}},
        {missing.text(), {name, "missing"}},
    };
    for (const Bad& bad : table) {
        put_file(path, bad.text);
        Strings parts = bad.parts;
        parts.push_back(path);
        for (const std::string& command : commands_on(model, folder)) {
            CAPTURE(command);
            check_failed(train_gpt(command), 1, parts);
        }
        CHECK_FALSE(fs::exists(folder / "out"));
        CHECK_FALSE(fs::exists(folder / "dump"));
    }
}

TEST_CASE("cli: a broken config.json is refused, with its key") {
    const TempFolder folder;
    const std::string model = folder / "model", path = model + "/config.json";
    copy_model(fixture().model, model);
    const Json good = Json::parse(get_file(path));
    struct Bad {
        const char* key;
        Json value;  // null: the key is removed
        Strings parts;
    };
    const Bad table[] = {
        {"n_head", 3, {"3 heads", "16 channels"}},
        {"n_head", 0, {"n_head", "0"}},
        {"n_layer", 0, {"n_layer", "0"}},
        {"n_layer", 1.5, {"n_layer", "1.5"}},
        {"n_layer", int64_t{1} << 40, {"n_layer"}},
        {"n_layer", 2, {"h.1."}},  // model.safetensors does not have this layer
        {"n_embd", "16", {"n_embd", "\"16\""}},
        {"n_embd", nullptr, {"n_embd", "missing"}},
        {"n_positions", -16, {"n_positions", "-16"}},
        {"n_positions", 32, {"wpe.weight", "(16, 16)", "(32, 16)"}},
        {"vocab_size", 0, {"vocab_size", "0"}},
        {"vocab_size", 901, {"wte.weight", "900", "901"}},
        {"attention", "poly9", {"attention", "poly9", "softmax", "poly4"}},
        {"attention", 3, {"attention", "3"}},
        {"attention_scale", "tall", {"attention_scale", "tall"}},
        {"attention_scale", true, {"attention_scale", "true"}},
        {"positions", "alibi", {"positions", "alibi", "rope"}},
        {"decay", "slow", {"decay", "slow", "learned"}},
        {"qk_norm", "yes", {"qk_norm", "yes"}},
        {"short_conv", 65, {"short_conv", "65"}},
        {"model_type", "llama", {"model_type", "llama", "gpt2"}},
        {"layer_norm_epsilon", 1e-6, {"layer_norm_epsilon"}},
        {"activation_function", "relu", {"activation_function", "relu"}},
    };
    for (const Bad& bad : table) {
        CAPTURE(bad.key);
        Json config = good;
        if (bad.value.is_null())
            config.erase(bad.key);
        else
            config[bad.key] = bad.value;
        put_file(path, config.dump());
        for (const std::string& command : commands_on(model, folder)) {
            CAPTURE(command);
            Strings parts = bad.parts;
            parts.push_back(model);
            check_failed(train_gpt(command), 1, parts);
        }
    }
    for (const std::string& text : {std::string(), std::string("{"), good.dump() + "}", std::string("[1]")}) {
        put_file(path, text);
        for (const std::string& command : commands_on(model, folder))
            check_failed(train_gpt(command), 1, {path});
    }
    fs::remove(path);
    for (const std::string& command : commands_on(model, folder))
        check_failed(train_gpt(command), 1, {model});
    fs::remove_all(model);
    for (const std::string& command : commands_on(model, folder))
        check_failed(train_gpt(command), 1, {model});
    CHECK_FALSE(fs::exists(folder / "out"));
    CHECK_FALSE(fs::exists(folder / "dump"));
}

TEST_CASE("cli: generate needs the model's tokenizer") {
    const TempFolder folder;
    const std::string model = folder / "model", path = model + "/tokenizer.json";
    copy_model(fixture().model, model);
    Json larger = Json::parse(get_file(path));
    larger["model"]["vocab"]["one_more"] = kTokenizerVocab;
    for (const std::string& text : {std::string(), std::string("{}"), larger.dump()}) {
        put_file(path, text);
        check_failed(train_gpt("generate --threads 2 --model " + model), 1, {model, "tokenizer.json"});
    }
    fs::remove(path);
    check_failed(train_gpt("generate --threads 2 --model " + model), 1, {path});
}

TEST_CASE("cli: training that diverges stops with status 3 and keeps the last checkpoint") {
    const TempFolder folder;
    const std::string data = " --data " + fixture().data, flags = " --batch 2 --threads 2 --sample-every 0 ";
    SUBCASE("weights that are not finite from the start") {
        const std::string model = folder / "model", path = model + "/model.safetensors";
        copy_model(fixture().model, model);
        const Safetensors good(path);
        for (const char* name : {"wpe.weight", "h.0.mlp.c_fc.weight", "ln_f.bias"}) {
            for (float value : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
                Safetensors bad = good;
                bad.poke(name, 1, value);
                put_file(path, bad.text());
                check_failed(train_gpt("generate --tokens 2 --threads 2 --model " + model), 1,
                             {"not finite"});
                for (const char* validation : {"--val-every 0", "--val-every 1"}) {
                    const std::string out = folder / "out";
                    fs::remove_all(out);
                    const Result result =
                        train_gpt("train --init-from " + model + " --out " + out + data + flags + validation);
                    check_failed(result, 3, {"diverged", "step", name, "last checkpoint: none"});
                    read_metrics(out);
                    CHECK_FALSE(fs::exists(out + "/step_00000001"));
                }
            }
        }
        // No sequence reaches this position, so the NaN is in no loss, but it must not get into a checkpoint.
        Safetensors bad = good;
        bad.poke("wpe.weight", 15 * 16, std::nanf(""));
        put_file(path, bad.text());
        const std::string out = folder / "out";
        fs::remove_all(out);
        check_failed(train_gpt("train --steps 1 --seq 8 --val-every 0 --init-from " + model + " --out " +
                               out + data + flags),
                     3, {"diverged", "wpe.weight", "last checkpoint: none"});
        CHECK_FALSE(fs::exists(out + "/step_00000001"));
    }
    SUBCASE("a learning rate that is far too large, after good steps") {
        const std::string out = folder / "out";
        const std::string last = train_model(fixture().data, out, kSizes + " --batch 2 --sample-every 0", 4);
        auto files = [&] {
            std::map<std::string, std::string> texts;
            for (const auto& entry : fs::directory_iterator(last))
                texts[entry.path().filename().string()] = get_file(entry.path().string());
            return texts;
        };
        const auto whole = files();
        CHECK(whole.size() == 5);
        const Result result =
            train_gpt("train --resume --steps 20 --schedule constant --lr 1e30 --threads 2 --out " + out);
        check_failed(result, 3, {"diverged", "step 6", " first in ", "h.0.", "last checkpoint: " + last});
        CHECK(files() == whole);
        CHECK(read_metrics(out).back().at("step") == 5);
        check_done(train_gpt("train --resume --steps 6 --threads 2 --out " + out));
        CHECK(read_metrics(out).back().at("step") == 6);
    }
    SUBCASE("in the last step: no checkpoint of it, whether validation finds it or the sample") {
        for (const char* validation : {" --val-every 1", " --val-every 0"}) {
            const std::string out = folder / "out";
            fs::remove_all(out);
            const Result result =
                train_gpt("train --steps 1 --warmup 0 --lr 1e30 --out " + out + data + kTiny + validation);
            check_failed(result, 3, {"diverged", "step 1", " first in ", "last checkpoint: none"});
            read_metrics(out);
            CHECK_FALSE(fs::exists(out + "/step_00000001"));
        }
    }
}

TEST_CASE("cli: generate follows its seed, and is greedy where it must be") {
    const std::string command = "generate --threads 2 --tokens 24 --model " + fixture().model + " ";
    auto text = [&](const std::string& flags) {
        const Result result = train_gpt(command + flags, {"--prompt", "The king"});
        check_done(result);
        CHECK(result.out.rfind("The king", 0) == 0);
        CHECK(result.out.size() > 20);
        CHECK(result.out.back() == '\n');
        return result.out;
    };
    CHECK(text("--seed 7") == text("--seed 7"));
    CHECK(text("--seed 7") != text("--seed 8"));
    CHECK(text("--top-k 2 --seed 7") != text("--top-k 2 --seed 8"));
    const std::string greedy = text("--temperature 0 --seed 1");
    CHECK(greedy != text("--seed 1"));
    for (const char* flags : {"--temperature 0 --seed 2", "--top-k 1 --seed 3", "--top-p 1e-9 --seed 4",
                              "--temperature 1e-6 --seed 5"})
        CHECK(text(flags) == greedy);
    check_done(train_gpt(command));  // without a prompt the text begins like a document
    const Result empty = train_gpt("generate --threads 2 --tokens 0 --model " + fixture().model,
                                   {"--prompt", "caf\u00e9 \u4e2d"});
    check_done(empty);
    CHECK(empty.out == "caf\u00e9 \u4e2d\n");
}

TEST_CASE("cli: eval of a model of zeros finds every token equally likely") {
    const TempFolder folder;
    const std::string model = folder / "model", data = folder / "data";
    copy_model(fixture().model, model);
    Safetensors zeros(model + "/model.safetensors");
    zeros.data.assign(zeros.data.size(), 0);
    put_file(model + "/model.safetensors", zeros.text());
    const Json vocabulary = Json::parse(get_file(kTokenizer)).at("model").at("vocab");
    const uint16_t letter = vocabulary.at("A"), the = vocabulary.at("\u0120the"),
                   end = vocabulary.at("<|endoftext|>");
    struct Text {
        Tokens period;
        double bytes_a_token;
        int separator = -1;  // the separator that meta.json names
    };
    for (const Text& text : {Text{{letter}, 1}, Text{{the, letter}, 2.5}, Text{{letter, end}, 0.5},
                             Text{{letter, the}, 0.5, the}}) {
        Tokens tokens;
        for (int i = 0; i < 97; i++) tokens.push_back(text.period[i % text.period.size()]);
        write_dataset(data, kTokenizerVocab, tokens, tokens);
        put_file(data + "/meta.json",
                 Json{{"vocab_size", kTokenizerVocab}, {"eot_token", text.separator}}.dump());
        // 6 sequences make whole batches and a part of one.
        for (const char* batch : {"1", "4", "6", "100"}) {
            const Result result =
                train_gpt("eval --threads 2 --model " + model + " --data " + data + " --batch " + batch);
            check_done(result);
            CHECK(contains(result.out, "96 tokens in 6 sequences of 16"));
            CHECK(number_after("loss ", result.out) == doctest::Approx(std::log(900)).epsilon(1e-6));
            CHECK(number_after("perplexity ", result.out) == doctest::Approx(900).epsilon(1e-5));
            CHECK(number_after("bits per byte ", result.out) ==
                  doctest::Approx(std::log2(900) / text.bytes_a_token).epsilon(2e-5));
        }
    }
}

TEST_CASE("cli: eval says the same whatever the batch, and what training said") {
    const std::string command =
        "eval --threads 2 --model " + fixture().model + " --data " + fixture().data + " ";
    auto loss = [&](const std::string& flags) {
        return number_after("loss ", train_gpt(command + flags).out);
    };
    const double whole = loss("");
    for (const char* flags : {"--batch 1", "--batch 2", "--batch 3", "--batch 5", "--batches 9"})
        CHECK(loss(flags) == doctest::Approx(whole).epsilon(1e-6));
    CHECK(std::abs(loss("--batches 1 --batch 1") - whole) > 1e-4);
    CHECK(std::abs(loss("--split train") - whole) > 1e-4);
    // Training validates on all 5 sequences, with a last micro-batch that is smaller.
    const std::string run = parent_folder(fixture().model);
    CHECK(read_metrics(run).back().at("val_loss").get<double>() == doctest::Approx(whole).epsilon(1e-6));
    // If --model is the folder of a run, its newest checkpoint is used.
    CHECK(number_after("loss ",
                       train_gpt("eval --threads 2 --model " + run + " --data " + fixture().data).out) ==
          whole);
}

TEST_CASE("cli: dump writes every tensor, and its loss is eval's") {
    const TempFolder folder;
    const int B = 2, T = 8, V = kTokenizerVocab;
    const std::string on =
        " --threads 2 --batch 2 --seq 8 --model " + fixture().model + " --data " + fixture().data;
    check_done(train_gpt("dump --file " + (folder / "dump") + on));
    const Safetensors dump(folder / "dump"), model(fixture().model + "/model.safetensors");
    const Result eval = train_gpt("eval --split train --batches 1" + on);

    std::map<std::string, Json> expected = {
        {"input_ids", {B, T}}, {"targets", {B, T}}, {"logits", {B, T, V}}, {"loss", Json::array()}};
    for (const auto& [name, entry] : model.header.items()) {
        if (name == "__metadata__") continue;
        expected["param." + name] = expected["grad." + name] = entry.at("shape");
        CHECK(dump.values("param." + name) == model.values(name));
        double largest = 0;
        for (float x : dump.values("grad." + name)) largest = std::max(largest, (double)std::abs(x));
        CHECK(largest > 0);
    }
    std::map<std::string, Json> found;
    for (const auto& [name, entry] : dump.header.items()) {
        if (name == "__metadata__") continue;
        found[name] = entry.at("shape");
        const bool integers = name == "input_ids" || name == "targets";
        CHECK(entry.at("dtype") == (integers ? "I32" : "F32"));
        for (float x : dump.values(integers ? "loss" : name)) CHECK(std::isfinite(x));
    }
    CHECK(found == expected);

    // Computes the loss from the logits, in double.
    const auto inputs = dump.values<int32_t>("input_ids"), targets = dump.values<int32_t>("targets");
    const std::vector<float> logits = dump.values("logits");
    double loss = 0;
    for (int n = 0; n < B * T; n++) {
        CHECK(inputs[n] == fixture().train[n]);
        CHECK(targets[n] == fixture().train[n + 1]);
        double sum = 0;
        for (int v = 0; v < V; v++) sum += std::exp((double)logits[n * V + v]);
        loss += (std::log(sum) - logits[n * V + targets[n]]) / (B * T);
    }
    CHECK(dump.values("loss")[0] == doctest::Approx(loss).epsilon(1e-6));
    CHECK(number_after("loss ", eval.out) == doctest::Approx(loss).epsilon(1e-6));
}

TEST_CASE("cli: the number of threads changes no loss") {
    const TempFolder folder;
    std::vector<Json> losses[2];
    for (int threads : {1, 2}) {
        const std::string out = folder / std::to_string(threads);
        check_done(train_gpt(
            str("train --attention poly3 --decay learned --short-conv 2 --steps 12 --batch 2 --threads ",
                threads, " --data ", fixture().data, " --out ", out, kSizes)));
        losses[threads - 1] = read_metrics(out);
    }
    REQUIRE(losses[0].size() == 14);  // 12 steps, and validations before the first and after the last one
    REQUIRE(losses[1].size() == 14);
    for (size_t i = 0; i < 14; i++)
        for (const char* key : {"loss", "val_loss", "grad_norm"})
            if (losses[0][i].contains(key))
                CHECK(losses[1][i].at(key).get<double>() ==
                      doctest::Approx(losses[0][i].at(key).get<double>()).epsilon(1e-5));
}
