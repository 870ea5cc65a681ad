// What a model's folder may contain, and what it may not: shards with an index, tensors that do not fit,
// pipes, names and values that are not text. The folder is checked when it is opened, so most tests do not
// need the program.
#include "llmc/checkpoint.h"

#include <sys/stat.h>

#include <algorithm>
#include <functional>
#include <set>

#include "tests/cli/cli.h"

namespace {

using namespace cli;
namespace fs = std::filesystem;

struct Fixture {
    TempFolder folder;
    std::string data = folder / "data", run = folder / "run", checkpoint, model = folder / "model";

    Fixture() {
        write_dataset(data, kTokenizerVocab, random_tokens(65, kTokenizerVocab, 1),
                      random_tokens(33, kTokenizerVocab, 2));
        checkpoint = train_model(data, run, kSizes + " --batch 2 --sample-every 0");
        copy_model(checkpoint, model);
    }
};

const Fixture& fixture() {
    static const Fixture fixture;
    return fixture;
}

// The commands that open a model, one for each way.
Strings commands_on(const std::string& model, const TempFolder& folder) {
    const std::string data = " --threads 2 --data " + fixture().data;
    return {"generate --temperature 0 --tokens 5 --threads 2 --model " + model,
            "eval --model " + model + data,
            "dump --batch 2 --seq 8 --file " + (folder / "dump") + " --model " + model + data,
            "train --steps 1 --batch 2 --val-every 1 --sample-every 0 --out " + (folder / "out") +
                " --init-from " + model + data};
}

// A safetensors file with some of the tensors of another file.
Safetensors part_of(const Safetensors& whole, const std::function<bool(const std::string&)>& chosen) {
    Safetensors part = whole;
    part.header = Json::object(), part.data.clear();
    for (const auto& [name, entry] : whole.header.items()) {
        if (name == "__metadata__" || !chosen(name)) continue;
        const size_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1];
        part.header[name] = entry;
        part.header[name]["data_offsets"] = {part.data.size(), part.data.size() + end - begin};
        part.data += whole.data.substr(begin, end - begin);
    }
    return part;
}

// The file with one more tensor at its end, whose data is a copy of that of `like`.
Safetensors with_tensor(Safetensors file, const std::string& name, const std::string& like) {
    const Json entry = file.header[like];
    const size_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1], at = file.data.size();
    file.data += file.data.substr(begin, end - begin);
    file.header[name] = entry;
    file.header[name]["data_offsets"] = {at, at + end - begin};
    return file;
}

// A folder that has the fixture's model in two shards.
struct Sharded {
    std::string path, index_path = path + "/model.safetensors.index.json";
    const Safetensors whole{fixture().model + "/model.safetensors"};
    const Strings names = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"};
    Json index = {{"metadata", {{"total_size", 1}}}, {"weight_map", Json::object()}};

    explicit Sharded(const std::string& path) : path(path) {
        fs::copy(fixture().model, path);
        fs::remove(path + "/model.safetensors");
        for (int i : {0, 1}) {
            const Safetensors part =
                part_of(whole, [&](const std::string& name) { return place(name) == i; });
            for (const auto& [name, entry] : part.header.items()) index["weight_map"][name] = names[i];
            put_file(path + "/" + names[i], part.text());
        }
        put_file(index_path, index.dump());
    }
    static int place(const std::string& name) { return contains(name, "mlp"); }
    Json& map() { return index["weight_map"]; }
};

std::string open_error(const std::string& folder) {
    return error_of([&] { Checkpoint{folder}; });
}

void check_open_fails(const std::string& folder, std::initializer_list<std::string> parts) {
    check_error([&] { Checkpoint{folder}; }, parts);
}

// Writes trainer.json with the right checksum.
void put_trainer(const std::string& path, Json json) {
    json["crc32"] = checkpoint_detail::json_crc32(json);
    put_file(path, json.dump());
}

}  // namespace

TEST_CASE("checkpoint: a model in shards is the same as in one file") {
    const TempFolder folder;
    const Sharded sharded(folder / "sharded");
    const Strings whole = commands_on(fixture().model, folder), parts = commands_on(sharded.path, folder);
    for (size_t i = 0; i < whole.size(); i++) {
        Result results[2];
        for (int in_shards : {0, 1}) {
            fs::remove_all(folder / "out");
            results[in_shards] = train_gpt(in_shards ? parts[i] : whole[i]);
            check_done(results[in_shards]);
        }
        if (contains(whole[i], "train --")) {
            CHECK(get_file(folder / "out/step_00000001/model.safetensors").size() > 1000);
        } else {
            CHECK(results[0].out == results[1].out);
        }
    }
    // Hugging Face has other names for the same tensors.
    Safetensors renamed = sharded.whole;
    renamed.header.clear();
    for (const auto& [name, entry] : sharded.whole.header.items())
        renamed.header[name == "__metadata__" ? name : "transformer." + name] = entry;
    const std::string prefixed = folder / "prefixed";
    fs::copy(fixture().model, prefixed);
    put_file(prefixed + "/model.safetensors", renamed.text());
    CHECK(open_error(prefixed) == "");
}

TEST_CASE("checkpoint: an index that is not right about its shards is refused") {
    const TempFolder folder;
    const Sharded good(folder / "good");
    const std::string path = folder / "bad", wte = "wte.weight", fc = "h.0.mlp.c_fc.weight";
    auto bad = [&](const std::function<void(Sharded&)>& spoil, std::initializer_list<std::string> parts) {
        fs::remove_all(path);
        Sharded sharded(path);
        spoil(sharded);
        put_file(sharded.index_path, sharded.index.dump());
        check_open_fails(path, parts);
    };
    const std::string index = "model.safetensors.index.json", first = good.names[0], second = good.names[1];
    bad([&](Sharded& s) { fs::remove(path + "/" + s.names[1]); }, {path + "/" + second, "No such file"});
    for (const Json& name : {Json("../good/" + first), Json("/etc/passwd"), Json(""), Json(".."), Json(7),
                             Json(nullptr), Json(std::string("model-00001-of-00002.safetensors\0x", 34))})
        bad([&](Sharded& s) { s.map()[wte] = name; }, {index, wte, "name of a file in the same folder"});
    bad([&](Sharded& s) { s.map()[wte] = second; }, {path + "/" + first, wte, second});
    bad([&](Sharded& s) { s.map()["h.1.ln_1.weight"] = second; },
        {path + "/" + second, "h.1.ln_1.weight", index});
    bad([&](Sharded& s) { s.map().erase(wte); }, {path + "/" + first, wte, "not in", index});
    bad([&](Sharded& s) { s.index["weight_map"] = Json::object(); }, {index, wte, "missing"});
    bad([&](Sharded& s) { s.index["weight_map"] = Json::array(); }, {index, "weight_map"});
    bad([&](Sharded& s) { s.index = Json::array(); }, {index, "weight_map"});
    bad(
        [&](Sharded&) {
            put_file(
                path + "/" + second,
                with_tensor(Safetensors(path + "/" + second), "ln_f.bias", "h.0.mlp.c_proj.bias").text());
        },
        {path + "/" + second, "ln_f.bias", first});
    bad(
        [&](Sharded&) {
            put_file(path + "/" + second, part_of(good.whole, [&](const std::string& name) {
                                              return contains(name, "mlp") && name != fc;
                                          }).text());
        },
        {path + "/" + second, fc, "not here", index});
    bad([&](Sharded&) { put_file(path + "/config.json", "{}"); }, {"config.json"});
    // A file with all tensors is preferred to an index.
    fs::copy(fixture().model + "/model.safetensors", path);
    fs::copy_file(fixture().model + "/config.json", path + "/config.json",
                  fs::copy_options::overwrite_existing);
    CHECK(open_error(path) == "");
    fs::remove(path + "/model.safetensors");
    fs::remove(path + "/" + index);
    check_open_fails(path, {path, "neither model.safetensors nor", index});
}

TEST_CASE("checkpoint: shapes are compared before memory is taken") {
    const TempFolder folder;
    const std::string model = folder / "model";
    fs::copy(fixture().model, model);
    Json config = Json::parse(get_file(model + "/config.json"));
    config["n_layer"] = 1000, config["n_embd"] = 65536;  // 200 TB
    put_file(model + "/config.json", config.dump());
    for (const std::string& command : commands_on(model, folder)) {
        const Result result = train_gpt(command);
        check_failed(result, 1, {model + "/model.safetensors", "wte.weight", "(900, 16)", "(900, 65536)"});
        CHECK(result.out == "");
    }
    // The same for the moments.
    fs::remove_all(model);
    fs::copy(fixture().checkpoint, model);
    fs::remove(model + "/optimizer.safetensors");
    fs::copy(model + "/model.safetensors", model + "/optimizer.safetensors");
    Json trainer = Json::parse(get_file(model + "/trainer.json"));
    trainer["files"]["optimizer.safetensors"] = trainer["files"]["model.safetensors"];
    put_trainer(model + "/trainer.json", trainer);
    check_open_fails(model, {model + "/optimizer.safetensors", "m.wte.weight", "missing"});
}

TEST_CASE("checkpoint: a tensor that the model does not have is named, unless Hugging Face's files have it") {
    const TempFolder folder;
    const std::string model = folder / "model", path = model + "/model.safetensors";
    fs::copy(fixture().model, model);
    const Safetensors good(path);
    auto error_with = [&](const std::string& name, const std::string& like) {
        put_file(path, with_tensor(good, name, like).text());
        return open_error(model);
    };
    for (const char* name : {"h.0.attn.bias", "h.0.attn.masked_bias"})
        CHECK(error_with(name, "ln_f.bias") == "");
    CHECK(error_with("lm_head.weight", "wte.weight") == "");
    for (const char* name : {"h.1.ln_1.weight", "h.1.attn.bias", "h.0.attn.q_gain", "h.0.attn.bias2",
                             "h.00.attn.bias", "score.weight", "transformer.wte.weight"}) {
        const std::string error = error_with(name, "ln_f.bias");
        CHECK(contains(error, path + ": tensor \"" + name + "\" (16)"));
        CHECK(contains(error, model + "/config.json"));
    }
    CHECK(
        contains(error_with("lm_head.weight", "wpe.weight"), "lm_head.weight is not the same as wte.weight"));
    Safetensors untied = with_tensor(good, "lm_head.weight", "wte.weight");
    untied.poke("lm_head.weight", 5, 0.25f);
    put_file(path, untied.text());
    check_open_fails(model, {path, "lm_head.weight is not the same as wte.weight"});
}

TEST_CASE("checkpoint: each fault of trainer.json is one line of ours") {
    const TempFolder folder;
    const std::string copy = folder / "copy", path = copy + "/trainer.json";
    fs::copy(fixture().checkpoint, copy);
    const Json good = Json::parse(get_file(path));
    struct Bad {
        const char* key;
        Json value;
        std::string part;
    };
    const Json object = Json::object(), two_to_32 = uint64_t{1} << 32;
    const Bad table[] = {{"step", object, "\"step\" is {}, expected an integer from 0"},
                         {"step", -1, "\"step\" is -1"},
                         {"step", two_to_32, "\"step\" is 4294967296"},
                         {"step", 1.5, "\"step\" is 1.5"},
                         {"step", nullptr, "\"step\" is null"},
                         {"samples", "many", "\"samples\" is \"many\""},
                         {"samples", UINT64_MAX, "\"samples\" is 18446744073709551615"},
                         {"version", object, "\"version\" is {}"},
                         {"version", 2, "version 2, expected 1"},
                         {"files", 3, "\"files\" is 3, expected an object"},
                         {"files", {{"../config.json", object}}, "\"../config.json\""},
                         {"files", {{"config.json", 3}}, "\"config.json\": 3"},
                         {"files", {{"config.json", object}}, "\"size\" is missing"},
                         {"files", {{"config.json", {{"size", -1}}}}, "\"size\" is -1"},
                         {"files", {{"none", object}}, "No such file"}};
    for (const Bad& bad : table) {
        Json json = good;
        json[bad.key] = bad.value;
        put_trainer(path, json);
        const std::string error = open_error(copy);
        CAPTURE(error);
        CHECK(contains(error, bad.part));
        CHECK(contains(error, copy));
        CHECK_FALSE(contains(error, "exception"));
    }
    for (const char* key : {"version", "step", "samples", "files"}) {
        Json json = good;
        json.erase(key);
        put_trainer(path, json);
        check_open_fails(copy, {path, key});
    }
    put_file(path, good.dump() + std::string("\0x", 2));  // its checksum is right
    check_open_fails(copy, {path, "not valid JSON", "\\x00"});
    put_file(path, "[]");
    check_open_fails(copy, {path, "expected a JSON object"});
    put_file(path, R"({"version": 1, "crc32": {}})");
    check_open_fails(copy, {path, "\"crc32\" is {}"});
}

TEST_CASE("checkpoint: a pipe or a folder in place of a file is refused at once") {
    const TempFolder folder;
    const std::string data = folder / "data", run = folder / "run", model = folder / "model";
    fs::copy(fixture().data, data);
    fs::copy(fixture().run, run, fs::copy_options::recursive);
    fs::copy(fixture().model, model);
    const std::string resume = "train --resume --steps 2 --threads 2 --out " + run,
                      generate = "generate --tokens 1 --threads 2 --model " + model,
                      eval = "eval --threads 2 --model " + model + " --data " + data;
    struct Place {
        std::string path, command;
    };
    const Place table[] = {
        {model + "/config.json", eval},
        {model + "/model.safetensors", eval},
        {model + "/tokenizer.json", generate},
        {data + "/meta.json", "train --out " + (folder / "new") + " --data " + data + kTiny},
        {data + "/tokenizer.json", eval},
        {data + "/val_000000.bin", eval},
        {run + "/metrics.jsonl", resume}};
    for (const Place& place : table) {
        CAPTURE(place.path);
        fs::rename(place.path, folder / "aside");
        REQUIRE(mkfifo(place.path.c_str(), 0600) == 0);
        Run limited;
        limited.kill_after = 10;
        check_failed(train_gpt(place.command, {}, limited), 1, {place.path, "expected a regular file"});
        fs::remove(place.path);
        fs::create_directory(place.path);
        check_failed(train_gpt(place.command), 1, {place.path, "is a directory"});
        fs::remove(place.path);
        fs::rename(folder / "aside", place.path);
    }
    check_done(train_gpt(eval));
    const std::string trainer = run + "/step_00000001/trainer.json";
    fs::remove(trainer);
    REQUIRE(mkfifo(trainer.c_str(), 0600) == 0);
    check_open_fails(run + "/step_00000001", {trainer, "expected a regular file"});
}

TEST_CASE("checkpoint: paths that are not UTF-8 are saved and found again") {
    const TempFolder folder;
    const std::string data = folder / "d\xe9\xff\u00e9 \"x\\\ny", out = folder / "out\x80";
    fs::copy(fixture().data, data);
    const std::string flags = "train --threads 2 --checkpoint-every 1 --steps ";
    const Result first = train_gpt(flags + "1" + kSizes + " --batch 2", {"--data", data, "--out", out});
    check_done(first);
    CHECK(contains(first.out, "data       " + (folder / "d\\xe9\\xff\u00e9 \"x\\\\ny: 65 tokens")));
    CHECK(contains(first.out, "wrote " + (folder / "out\\x80/step_00000001")));
    const Result on = train_gpt(flags + "2", {"--resume", "--out", out});
    check_done(on);
    CHECK(contains(on.out, "resuming from " + (folder / "out\\x80/step_00000001 after step 1")));
    CHECK(read_metrics(out).back().at("step") == 2);
    CHECK(Json::parse(get_file(out + "/step_00000002/trainer.json")).at("options").at("--data") ==
          Json::array({folder / "d", 0xe9, 0xff, "\u00e9 \"x\\\ny"}));
    check_done(train_gpt("generate --tokens 1 --threads 2", {"--model", out}));
    check_done(train_gpt("eval --threads 2", {"--model", out, "--data", data}));
    check_done(train_gpt("dump --batch 2 --seq 8 --threads 2",
                         {"--model", out, "--data", data, "--file", folder / "\xff"}));
    CHECK(fs::exists(folder / "\xff"));
    // If --data is another path than before, the program says so.
    const Result moved = train_gpt(flags + "3", {"--resume", "--out", out, "--data", fixture().data});
    CHECK(moved.status == 0);
    CHECK(contains(moved.out, "changed by the command line: --data \"" + fixture().data + "\" (was ["));
    CHECK_FALSE(contains(moved.out, "\xff"));
}

TEST_CASE("checkpoint: whatever a flag, a name or a value holds, a message is one line that can be shown") {
    const TempFolder folder;
    const std::string model = folder / "model", path = model + "/config.json";
    const std::string nasty = "x\n\x1b[31m\r\x7f\xff\u0085\u202e", endless(5000, 'y');
    auto check_shown = [&](const std::string& line, const Strings& more) {
        const Result result = train_gpt(line, more);
        CAPTURE(result.err);
        CHECK(result.status != 0);
        CHECK(result.err.rfind("train_gpt: error: ", 0) == 0);
        CHECK(result.err.size() < 1100);
        REQUIRE(!result.err.empty());
        CHECK(std::none_of(result.err.begin(), result.err.end() - 1,
                           [](char c) { return (unsigned char)c < 0x20 || c == 0x7f; }));
        CHECK(result.err.back() == '\n');
        CHECK(first_bad_utf8(result.err) == result.err.size());
        CHECK_FALSE(contains(result.err, "\u202e"));
        CHECK_FALSE(contains(result.err, "filesystem error"));
        CHECK_FALSE(contains(result.err, "exception"));
    };
    const std::string generate = "generate --threads 2", data = " --data " + fixture().data;
    for (const std::string& value : {nasty, endless}) {
        check_shown(value, {});
        check_shown("", {value});
        check_shown("train", {value});
        check_shown("train --out x --data y", {"--lr", value});
        check_shown("train --out x --data y", {"--attention", value});
        check_shown("train --out x --data y", {"--attention-scale", value});
        check_shown("train --out x --data y", {"--" + value});
        check_shown("train --out x --data y", {"--cuda-graph=" + value});
        check_shown(generate, {"--model", value});
        check_shown("train --out " + (folder / "out"), {"--data", value});
        check_shown("train" + data, {"--out", "/dev/null/" + value});
        check_shown("train" + data, {"--out", folder / "out", "--init-from", value});
        check_shown("train" + data, {"--out", folder / "out", "--resume", value});
        check_shown("dump --batch 2 --seq 8 --model " + fixture().model + data,
                    {"--file", "/dev/null/" + value});
        const std::string text = value == nasty ? "x\n\x1b[31m\r\x7f\u0085\u202e" : value;  // JSON is UTF-8
        fs::remove_all(model);
        fs::copy(fixture().model, model);
        Json config = Json::parse(get_file(path));
        for (const char* key :
             {"attention", "attention_scale", "n_head", "model_type", "qk_norm", "q_gain"}) {
            Json bad = config;
            bad[key] = text;
            put_file(path, bad.dump());
            check_shown(generate, {"--model", model});
        }
        put_file(path, "{\"" + value + "\": 1, \"" + value + "\": 2}");
        check_shown(generate, {"--model", model});
        put_file(path, config.dump());
        Safetensors file(model + "/model.safetensors");
        file.header[text] = file.header["ln_f.bias"];
        file.header.erase("ln_f.bias");
        put_file(model + "/model.safetensors", file.text());
        check_shown(generate, {"--model", model});
        file.header[text]["dtype"] = text;
        put_file(model + "/model.safetensors", file.text());
        check_shown(generate, {"--model", model});
    }
}
