// eval on data that data/prepare.py recall makes: the accuracy and the loss of the answers.
// tests/cli/train_gpt.cpp tests what eval says about every dataset.
#include <algorithm>
#include <cmath>

#include "tests/cli/cli.h"

namespace {

using namespace cli;

constexpr int kVocabulary = 10, kSeq = 16;  // keys 0 to 3, values 4 to 7, blank 8, end 9
const Tokens kExample = {9, 0, 4, 1, 5, 2, 6, 8, 1, 5, 8, 0, 4, 2, 6, 8};
const std::vector<int> kAnswers = {8, 11, 13};  // positions of the keys that come before them

void write_recall(const std::string& folder, int examples) {
    Tokens tokens;
    for (int i = 0; i < examples; i++)
        for (uint16_t token : kExample)  // in each example other values have the keys
            tokens.push_back(token >= 4 && token < 8 ? 4 + (token + i) % 4 : token);
    tokens.push_back(9);
    write_dataset(folder, kVocabulary, tokens, tokens);
    const Json recall = {{"keys", {0, 4}}, {"values", {4, 8}}, {"seq", kSeq}};
    put_file(folder + "/meta.json",
             Json{{"vocab_size", kVocabulary}, {"eot_token", 9}, {"recall", recall}}.dump());
}

}  // namespace

TEST_CASE("cli: eval of recall data scores the answers, and only these") {
    const TempFolder folder;
    const std::string data = folder / "data";
    write_recall(data, 7);
    const std::string model = train_model(data, folder / "run", kSizes + " --batch 2 --lr 1e-2", 30);
    const std::string on = " --threads 2 --data " + data + " --model " + model;
    check_done(train_gpt("dump --batch 7 --seq 16 --file " + (folder / "dump") + on));
    const Safetensors dump(folder / "dump");
    const std::vector<float> logits = dump.values("logits");
    const std::vector<int> targets = dump.values<int>("targets");
    double loss = 0, all = 0;
    int right = 0;
    for (int n = 0; n < 7 * kSeq; n++) {
        const float* row = logits.data() + n * kVocabulary;
        double sum = 0;
        for (int i = 0; i < kVocabulary; i++) sum += std::exp((double)row[i]);
        const double mine = std::log(sum) - row[targets[n]];
        all += mine;
        if (std::find(kAnswers.begin(), kAnswers.end(), n % kSeq) == kAnswers.end()) continue;
        loss += mine;
        right += std::max_element(row, row + kVocabulary) == row + targets[n];
    }
    CHECK(right > 0);
    CHECK(right < 21);
    for (const char* batch : {"1", "3", "7", "100"}) {
        const Result result = train_gpt(str("eval --batch ", batch, on));
        check_done(result);
        CHECK(number_after("loss ", result.out) == doctest::Approx(all / (7 * kSeq)).epsilon(1e-5));
        const std::string scored = result.out.substr(result.out.find("21 answers: "));
        CHECK(number_after("accuracy ", scored) == doctest::Approx(right / 21.0).epsilon(1e-3));
        CHECK(number_after("loss ", scored) == doctest::Approx(loss / 21).epsilon(1e-5));
    }
    // A training that counts the answers alone validates on them, too, and learns them.
    const std::string run = folder / "answers",
                      flags = kSizes + " --batch 2 --lr 1e-2 --steps 400 --answers-only";
    const Result trained = train_gpt("train --val-every 400 --val-batches 9 --sample-every 0 --data " + data +
                                     " --out " + run + " " + flags);
    check_done(trained);
    const Result known = train_gpt("eval --data " + data + " --model " + run);
    check_done(known);
    CHECK(number_after("accuracy ", known.out) == 1);
    CHECK(
        number_after("step 400: validation loss ", trained.out) ==
        doctest::Approx(number_after("loss ", known.out.substr(known.out.find("answers: ")))).epsilon(1e-3));
    write_dataset(folder / "text", kVocabulary, Tokens(100, 3), Tokens(100, 3));
    check_failed(train_gpt("train --data " + (folder / "text") + " --out " + (folder / "no") + " " + flags),
                 2, {"--answers-only", folder / "text", "recall"});
    // In pieces of examples, some have more answers than others, and some none.
    check_failed(train_gpt("train --seq 4 --data " + data + " --out " + (folder / "no") + " " + flags), 2,
                 {"--answers-only", "--seq is 4", "expected 16", data});
    if (getenv("LLMC_TRAIN_GPTCU")) {
        const Run simulated{.environment = {"PTXSIM=nobounds,nouninit,norace"},
                            .program = environment("LLMC_TRAIN_GPTCU", "")};
        const Result scored = train_gpt("eval --dtype fp32 --batch 7" + on, {}, simulated);
        check_done(scored);
        const std::string of_answers = scored.out.substr(scored.out.find("21 answers: "));
        CHECK(number_after("accuracy ", of_answers) == doctest::Approx(right / 21.0).epsilon(1e-3));
        CHECK(number_after("loss ", of_answers) == doctest::Approx(loss / 21).epsilon(1e-5));
        auto validation = [&](const std::string& out, const Run& run) {
            const Result trained = train_gpt(
                "train --dtype fp32 --val-every 3 --val-batches 9 --sample-every 0 "
                "--checkpoint-every 0 --data " +
                    data + " --out " + out + " " + kSizes +
                    " --batch 2 --total-batch 64 --lr 1e-2 --steps 3 --answers-only",
                {}, run);
            check_done(trained);
            return number_after("step 3: validation loss ", trained.out);
        };
        CHECK(validation(folder / "gpu", simulated) ==
              doctest::Approx(validation(folder / "cpu", {})).epsilon(1e-4));
    }
    // No key comes twice in a sequence of 8 tokens.
    CHECK_FALSE(contains(train_gpt("eval --seq 8" + on).out, "answers"));
}
