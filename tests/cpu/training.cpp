// A training run as a user starts it, compared with a run of the PyTorch twin and torch.optim.AdamW with the
// same flags (dev/reference/golden_run.py). This finds faults that the other tests miss, because they compare
// the program with itself.
#include <cmath>
#include <set>

#include "llmc/rng.h"
#include "llmc/sampler.h"
#include "llmc/tokenizer.h"
#include "tests/cli/cli.h"

namespace {

using namespace cli;
namespace fs = std::filesystem;

const std::string kRun = "tests/golden/run";

// ||a - b|| / ||b||
double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
    REQUIRE(a.size() == b.size());
    double difference = 0, squares = 0;
    for (size_t i = 0; i < a.size(); i++) {
        difference += std::pow((double)a[i] - b[i], 2);
        squares += (double)b[i] * b[i];
    }
    return std::sqrt(difference / squares);
}

// Whether the relative error is small. doctest::Approx would also allow an absolute error of its epsilon.
bool near(double value, double expected, double error) {
    return std::abs(value - expected) <= error * std::abs(expected);
}

// The lines of the log without the time of a step and the tokens per second, which depend on the clock.
// Checks these two.
std::vector<Json> checked_metrics(const std::string& folder) {
    std::vector<Json> lines = read_metrics(folder);
    for (Json& line : lines) {
        if (line.contains("ms")) {
            const double seconds = line.at("ms").get<double>() / 1000, rate = line.at("tokens_per_second");
            CHECK(near(seconds * rate * line.at("step").get<double>(), line.at("tokens"), 1e-9));
        }
        line.erase("ms"), line.erase("tokens_per_second");
    }
    return lines;
}

// A dataset of 4 training and 4 validation sequences of 16 tokens, and a model of it after one step.
struct Fixture {
    TempFolder folder;
    std::string data = folder / "data", model;

    Fixture() {
        write_dataset(data, kTokenizerVocab, random_tokens(65, kTokenizerVocab, 1),
                      random_tokens(65, kTokenizerVocab, 2));
        model = train_model(data, folder / "run", kSizes + " --batch 2 --val-every 0 --sample-every 0");
    }
};

const Fixture& fixture() {
    static const Fixture fixture;
    return fixture;
}

}  // namespace

TEST_CASE("cli: a run's losses, rates, norms, weights and moments equal those of the PyTorch twin") {
    const TempFolder folder;
    const std::string out = folder / "out";
    const Result run =
        train_gpt("train --threads 2 --checkpoint-every 5 --keep-checkpoints 0 --init-from " + kRun +
                  "/initial --data " + kRun + "/data --out " + out + " " + get_file(kRun + "/flags.txt"));
    check_done(run);
    for (const char* part : {"173 tokens, 19 sequences of 9\n",
                             "36 tokens a step, in 2 micro-batches of 2 x 9; 4 steps an epoch\n",
                             "8 steps, linear schedule to 0.03 after 3 steps of warm-up, fp32\n",
                             "step 0: validation loss 3.4757 over 36 tokens\n"})
        CHECK(contains(run.out, part));
    const std::vector<Json> lines = checked_metrics(out), expected = timeless_metrics(kRun);
    REQUIRE(lines.size() == expected.size());
    for (size_t i = 0; i < lines.size(); i++) {
        CAPTURE(expected[i]);
        CAPTURE(lines[i]);
        if (!expected[i].contains("head")) CHECK(lines[i].size() == expected[i].size());
        for (const auto& [key, value] : expected[i].items())
            CHECK(near(lines[i].value(key, NAN), value, 2e-6));
    }
    const std::string end = "/step_00000008";
    const Safetensors last(kRun + "/last.safetensors"), weights(out + end + "/model.safetensors"),
        moments(out + end + "/optimizer.safetensors");
    CHECK(weights.header.at("__metadata__") == Json{{"format", "pt"}});  // transformers requires it
    size_t compared = 0;
    for (const Safetensors* file : {&weights, &moments})
        for (const auto& [key, entry] : file->header.items()) {
            const std::string name = key;
            if (name == "__metadata__") continue;
            CAPTURE(name);
            CHECK(entry.at("shape") == last.header.at(name).at("shape"));
            CHECK(relative_error(file->values(name), last.values(name)) < 1e-5);
            compared++;
        }
    CHECK(compared == last.header.size());

    // From the middle, the run continues with its own flags, so the checkpoint must have all of them.
    const Json remembered = Json::parse(get_file(out + end + "/trainer.json")).at("options");
    std::istringstream flags(
        "--data --batch --seq --total-batch --steps --lr --attention-lr --schedule --warmup "
        "--final-lr-fraction "
        "--weight-decay --beta1 --beta2 --eps --grad-clip --seed --dtype --attention-kernel --recompute "
        "--gradients --stochastic-rounding --val-every --val-batches --sample-every --sample-tokens "
        "--norms-every --checkpoint-every --keep-checkpoints");
    for (std::string flag; flags >> flag;) {
        CAPTURE(flag);
        CHECK(remembered.contains(flag));
    }
    const std::string again = folder / "again";
    fs::create_directory(again);
    fs::copy(out + "/step_00000005", again + "/step_00000005");
    check_done(train_gpt("train --resume --threads 2 --out " + again));
    const std::vector<Json> rest = checked_metrics(again);
    REQUIRE(rest.size() < lines.size());
    CHECK(rest == std::vector<Json>(lines.end() - rest.size(), lines.end()));
    CHECK(rest.front().at("step") == 6);
    for (const char* file : {"/model.safetensors", "/optimizer.safetensors"})
        CHECK((get_file(again + end + file) == get_file(out + end + file)));
}

TEST_CASE("cli: what a run is not told has its default") {
    const Json options = Json::parse(get_file(fixture().model + "/trainer.json")).at("options");
    const Json expected = {{"--lr", 6e-4},
                           {"--schedule", "cosine"},
                           {"--final-lr-fraction", 0.1},
                           {"--weight-decay", 0.1},
                           {"--beta1", 0.9},
                           {"--beta2", 0.95},
                           {"--eps", 1e-8},
                           {"--grad-clip", 1.0},
                           {"--seed", 1},
                           {"--dtype", "fp32"},
                           {"--attention-kernel", "auto"},
                           {"--recompute", "none"},
                           {"--val-batches", 20},
                           {"--norms-every", 0},
                           {"--checkpoint-every", 500},
                           {"--keep-checkpoints", 3},
                           {"--sample-tokens", 128}};
    for (const auto& [key, value] : expected.items()) {
        const std::string flag = key;
        CAPTURE(flag);
        CHECK(options.at(flag) == value);
    }
}

TEST_CASE("cli: weights follow the seed, samples the seed and the step") {
    const TempFolder folder;
    const std::string data = folder / "data", out = folder / "out";
    fs::copy(fixture().data, data);
    put_file(data + "/meta.json", Json{{"vocab_size", kTokenizerVocab}, {"eot_token", 0}}.dump());
    // With a learning rate of 0 the weights do not change.
    const uint64_t seed = (uint64_t{1} << 32) + 7;
    const Result run =
        train_gpt(str("train --lr 0 --steps 20 --checkpoint-every 10 --sample-every 10 --sample-tokens 20 "
                      "--attention poly3 --threads 2 --seed ",
                      seed, " --data ", data, " --out ", out, kSizes));
    check_done(run);
    CHECK(contains(
        run.out,
        "poly3, scale row, rope positions, qk-norm from 0.5, decay gate, short conv 4, output gate\n"));
    CHECK(contains(run.out, "20 steps, cosine schedule to 0 after 2 steps of warm-up, fp32\n"));
    CHECK(contains(run.out, " over 64 tokens\n"));  // these are all tokens, although a batch is larger
    const std::string last = out + "/step_00000020";
    CHECK(Json::parse(get_file(last + "/config.json")).value("eos_token_id", -1) == 0);
    const Safetensors weights(last + "/model.safetensors");
    for (const char* name : {"wte.weight", "h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight"}) {
        CAPTURE(name);
        const std::vector<float> values = weights.values(name);
        std::vector<float> expected(values.size());
        fill_normal(expected.data(), expected.size(), 0.02, seed, random_stream(name));
        CHECK(values == expected);
    }
    // A sample is the text that generate writes from the checkpoint.
    for (int step : {10, 20}) {
        const Result generated = train_gpt(str("generate --threads 2 --tokens 20 --seed ", seed + step,
                                               " --model ", out, "/step_000000", step));
        check_done(generated);
        CHECK(generated.out.size() > 20);
        CHECK(contains(run.out, str("--- a sample after step ", step, "\n", generated.out, "---\n")));
    }
}

TEST_CASE("cli: generate draws token after token by its seed, up to the end of the document") {
    const TempFolder folder;
    const std::string model = folder / "model";
    copy_model(fixture().model, model);
    Safetensors zeros(model + "/model.safetensors");  // with zeros, all tokens have the same probability
    zeros.data.assign(zeros.data.size(), 0);
    put_file(model + "/model.safetensors", zeros.text());
    const Tokenizer tokenizer(kTokenizer);
    const std::vector<float> logits(kTokenizerVocab);
    int ends = 0;
    for (int top_k : {0, 3})  // the first three are <|endoftext|> and two others
        for (uint64_t seed : {3, 4}) {
            CAPTURE(top_k);
            CAPTURE(seed);
            SamplerOptions options;
            options.top_k = top_k, options.seed = seed;
            std::string expected = "A";
            for (int i = 0; i < 12; i++) {
                const int token = sample_token(logits.data(), kTokenizerVocab, options, i);
                ends += token == tokenizer.eot_token();
                if (token == tokenizer.eot_token()) break;
                expected += tokenizer.decode(token);
            }
            Utf8Stream printable;
            expected = printable.push(expected);
            expected += printable.finish() + "\n";
            const Result result = train_gpt(str("generate --prompt A --tokens 12 --top-k ", top_k, " --seed ",
                                                seed, " --threads 2 --model ", model));
            check_done(result);
            CHECK(result.out == expected);
        }
    CHECK(ends == 2);
}

TEST_CASE("cli: --threads decides how many threads there are") {
    const TempFolder folder;
    // OpenMP prints a line for each thread that it starts.
    const Run naming = {{"OMP_DISPLAY_AFFINITY=true", "OMP_AFFINITY_FORMAT=thread %n"}};
    const std::string data = " --threads 3 --data " + fixture().data, model = " --model " + fixture().model;
    for (const std::string& command :
         {"train --steps 1 --val-every 0 --sample-every 0 --batch 2 --out " + (folder / "out") + data +
              kSizes,
          "eval" + model + data, "dump --batch 2 --seq 8 --file " + (folder / "dump") + model + data,
          "generate --tokens 1 --threads 3" + model}) {
        CAPTURE(command);
        const Result result = train_gpt(command, {}, naming);
        CHECK(result.status == 0);
        std::set<std::string> threads;
        for (const std::string& line : lines_of(result.err))
            if (line.rfind("thread ", 0) == 0) threads.insert(line);
        CHECK(threads == std::set<std::string>{"thread 0", "thread 1", "thread 2"});
    }
}

TEST_CASE("cli: data with more tokens than the model has are refused") {
    const TempFolder folder;
    const std::string data = folder / "data", out = folder / "out";
    write_dataset(data, kTokenizerVocab + 1, random_tokens(65, kTokenizerVocab, 1),
                  random_tokens(65, kTokenizerVocab, 2));
    check_failed(train_gpt("train --steps 1 --batch 2 --data " + data + " --out " + out + " --init-from " +
                           fixture().model),
                 1, {"901", "900"});
    CHECK_FALSE(fs::exists(out));
}
