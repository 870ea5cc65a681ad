// The tokenizer.json of a dataset and that of a model: when they must be the same, which of them a checkpoint
// gets, and what still works if this program cannot encode with it.
#include "tests/cli/cli.h"

namespace {

using namespace cli;
namespace fs = std::filesystem;

const std::string kSmall = " --batch 2 --val-every 0 --sample-tokens 2 ",
                  kOneStep = kSmall + " --steps 1 --threads 2 ";

// A dataset, a run on it, and the dataset with other tokenizers: in `other` two tokens have changed places,
// `same` has the file that another program wrote when it saved that of `data`, and `none` has no
// tokenizer.json.
struct Fixture {
    TempFolder folder;
    const std::string data = folder / "data", other = folder / "other", same = folder / "same",
                      none = folder / "none", run = folder / "run", model = run + "/step_00000001";
    const std::string tokenizer = get_file(kTokenizer);

    Fixture() {
        const Tokens tokens = random_tokens(65, kTokenizerVocab, 1);
        for (const std::string& copy : {data, other, same, none})
            write_dataset(copy, kTokenizerVocab, tokens, tokens);
        Json json = Json::parse(tokenizer);
        std::swap(json["model"]["vocab"]["A"], json["model"]["vocab"]["B"]);
        put_file(other + "/tokenizer.json", json.dump());
        json = Json::parse(tokenizer);
        json["truncation"] = {{"max_length", 16}};
        json["post_processor"] = {{"type", "TemplateProcessing"},
                                  {"single", {{{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}}};
        put_file(same + "/tokenizer.json", json.dump());
        fs::remove(none + "/tokenizer.json");
        train_model(data, run, kSizes + kSmall);
    }
    std::string from_model(const std::string& data, const std::string& out) const {
        return "train --init-from " + model + " --data " + data + " --out " + out + kOneStep;
    }
    std::string eval(const std::string& data) const {
        return "eval --threads 2 --model " + model + " --data " + data;
    }
};

const Fixture& fixture() {
    static const Fixture fixture;
    return fixture;
}

}  // namespace

TEST_CASE("cli: a dataset with another tokenizer than the model's is refused") {
    const Fixture& f = fixture();
    const TempFolder folder;
    const std::string out = folder / "out", run = folder / "run";
    Strings parts = {f.other + "/tokenizer.json", f.model + "/tokenizer.json", "vocabulary"};
    check_failed(train_gpt(f.eval(f.other)), 1, parts);
    check_failed(train_gpt("dump --batch 2 --seq 8 --threads 2 --file " + out + " --model " + f.model +
                           " --data " + f.other),
                 1, parts);
    parts.push_back("--new-tokenizer");
    check_failed(train_gpt(f.from_model(f.other, out)), 1, parts);
    CHECK_FALSE(fs::exists(out));
    check_failed(train_gpt("train --new-tokenizer --data " + f.other + " --out " + out), 2,
                 {"--new-tokenizer", "--init-from"});

    fs::copy(f.run, run, fs::copy_options::recursive);
    const std::string resume = "train --resume --steps 2 --threads 2 --out " + run + " --data ";
    parts = {f.other + "/tokenizer.json", run + "/step_00000001/tokenizer.json", "vocabulary"};
    check_failed(train_gpt(resume + f.other), 1, parts);
    check_failed(train_gpt(resume + f.other + " --new-tokenizer --init-from " + f.model), 1, parts);
    CHECK_FALSE(fs::exists(run + "/step_00000002"));

    // With --new-tokenizer it is allowed. From then on the model has the new tokenizer.
    check_done(train_gpt(f.from_model(f.other, out) + " --new-tokenizer"));
    CHECK(get_file(out + "/step_00000001/tokenizer.json") == get_file(f.other + "/tokenizer.json"));
    check_done(train_gpt("train --resume --steps 2 --threads 2 --out " + out));
}

TEST_CASE("cli: a model keeps its tokenizer.json on data that has the same one, or none") {
    const Fixture& f = fixture();
    for (const std::string& data : {f.same, f.none}) {
        const TempFolder folder;
        const std::string out = folder / "out";
        const Result eval = train_gpt(f.eval(data));
        check_done(eval);
        CHECK(contains(eval.out, "bits per byte") == (data == f.same));
        const Result first = train_gpt(f.from_model(data, out));
        check_done(first);
        CHECK(contains(first.out, "--- a sample after step 1"));
        CHECK(get_file(out + "/step_00000001/tokenizer.json") == f.tokenizer);
        check_done(train_gpt("train --resume --steps 2 --threads 2 --out " + out));
        CHECK(get_file(out + "/step_00000002/tokenizer.json") == f.tokenizer);
        check_done(train_gpt("generate --tokens 1 --threads 2 --prompt A --model " + out));
    }
    const TempFolder folder;
    const std::string out = folder / "out";
    check_done(train_gpt(f.from_model(f.none, out) + " --new-tokenizer"));
    CHECK_FALSE(fs::exists(out + "/step_00000001/tokenizer.json"));
}

TEST_CASE("cli: train and eval need no tokenizer.json of the kind that is implemented") {
    const Fixture& f = fixture();
    const TempFolder folder;
    const std::string data = folder / "data", out = folder / "out";
    fs::copy(f.data, data);
    Json json = Json::parse(f.tokenizer);
    json["normalizer"] = {{"type", "NFC"}};
    put_file(data + "/tokenizer.json", json.dump());
    auto check_warned = [&](const Result& result, const std::string& without) {
        CAPTURE(result.err);
        CHECK(result.status == 0);
        CHECK(lines_of(result.err).size() == 1);
        CHECK(result.err.rfind("warning: ", 0) == 0);
        for (const std::string& part : {without, data + "/tokenizer.json", std::string("normalizer")})
            CHECK(contains(result.err, part));
    };
    const Result trained = train_gpt("train --data " + data + " --out " + out + kSizes + kOneStep);
    check_warned(trained, "samples");
    CHECK_FALSE(contains(trained.out, "a sample"));
    CHECK(get_file(out + "/step_00000001/tokenizer.json") == json.dump());
    const Result eval = train_gpt("eval --threads 2 --model " + out + " --data " + data);
    check_warned(eval, "bits per byte");
    CHECK(contains(eval.out, "perplexity"));
    CHECK_FALSE(contains(eval.out, "bits per byte"));
    check_failed(train_gpt("generate --threads 2 --model " + out), 1, {"tokenizer.json", "normalizer"});
    // The tokenizers are still compared.
    check_failed(train_gpt("eval --threads 2 --model " + out + " --data " + f.data), 1, {"normalizer"});
}
