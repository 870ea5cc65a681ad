// A training run as a user starts it, against the run that the PyTorch twin and torch.optim.AdamW made of the
// same flags (dev/reference/golden_run.py): what the other tests, which hold the program against itself,
// would not see.
#include <cmath>

#include "tests/cli.h"

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

// The lines of the log without what the clock decides and without the attention's norms.
std::vector<Json> golden_metrics(const std::string& folder) {
    std::vector<Json> lines;
    for (Json& line : read_metrics(folder)) {
        if (line.contains("head")) continue;
        line.erase("ms"), line.erase("tokens_per_second");
        lines.push_back(line);
    }
    return lines;
}

}  // namespace

TEST_CASE("cli: a run's losses, rates, norms, weights and moments equal those of the PyTorch twin") {
    const TempFolder folder;
    const std::string out = folder / "out";
    check_done(train_gpt("train --threads 2 --checkpoint-every 5 --keep-checkpoints 0 --init-from " + kRun +
                         "/initial --data " + kRun + "/data --out " + out + " " +
                         get_file(kRun + "/flags.txt")));
    const std::vector<Json> lines = golden_metrics(out), expected = golden_metrics(kRun);
    REQUIRE(lines.size() == expected.size());
    for (size_t i = 0; i < lines.size(); i++) {
        CAPTURE(expected[i]);
        CAPTURE(lines[i]);
        REQUIRE(lines[i].size() == expected[i].size());
        for (const auto& [key, value] : expected[i].items())
            CHECK(lines[i].value(key, NAN) == doctest::Approx(value.get<double>()).epsilon(2e-6));
    }
    const std::string end = "/step_00000008";
    const Safetensors last(kRun + "/last.safetensors"), weights(out + end + "/model.safetensors"),
        moments(out + end + "/optimizer.safetensors");
    size_t compared = 0;
    for (const Safetensors* file : {&weights, &moments})
        for (const auto& [name, entry] : file->header.items()) {
            if (name == "__metadata__") continue;
            CAPTURE(name);
            CHECK(entry.at("shape") == last.header.at(name).at("shape"));
            CHECK(relative_error(file->values(name), last.values(name)) < 1e-5);
            compared++;
        }
    CHECK(compared == last.header.size());

    // From the middle it goes on with the flags that it had: none of them may be forgotten.
    const std::string again = folder / "again";
    fs::create_directory(again);
    fs::copy(out + "/step_00000005", again + "/step_00000005");
    check_done(train_gpt("train --resume --threads 2 --out " + again));
    const std::vector<Json> rest = golden_metrics(again);
    REQUIRE(rest.size() < lines.size());
    CHECK(rest == std::vector<Json>(lines.end() - rest.size(), lines.end()));
    CHECK(rest.front().at("step") == 6);
    for (const char* file : {"/model.safetensors", "/optimizer.safetensors"})
        CHECK((get_file(again + end + file) == get_file(out + end + file)));
}
