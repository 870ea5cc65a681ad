// The CUDA trainer as a program, on dev/ptxsim. It has the same losses as the CPU trainer, and each of them
// continues from checkpoints of the other. If the device fails, it says so, and all checkpoints stay whole.
#include <algorithm>
#include <cmath>
#include <set>

#include "tests/cli/cli.h"

namespace {

using namespace cli;
namespace fs = std::filesystem;

// Switches the simulator's checks off, because the kernels' own tests have them on.
const std::string kQuick = "nobounds,nouninit,norace";

bool has_cuda() {
    if (getenv("LLMC_TRAIN_GPTCU")) return true;
    MESSAGE("skipped: LLMC_TRAIN_GPTCU is not set, as where there is no nvcc");
    return false;
}

Result train_gptcu(const std::string& line, const Strings& more = {}, const std::string& options = "") {
    return train_gpt(line, more,
                     {.environment = {"PTXSIM=" + kQuick + "," + options},
                      .program = environment("LLMC_TRAIN_GPTCU", "")});
}

// Words in an order that a model can learn, and the flags of a model for them.
struct Words {
    TempFolder folder;
    std::string data = folder / "data";

    Words() {
        Tokens train, val;
        for (int i = 0; i < 4000; i++) train.push_back((uint16_t)(1 + i * i % 97));
        for (int i = 0; i < 300; i++) val.push_back((uint16_t)(1 + (i + 7) * (i + 7) % 97));
        write_dataset(data, kTokenizerVocab, train, val);
    }
};

const Words& words() {
    static const Words words;
    return words;
}

// The part of the command line that all runs have in common.
std::string train(const std::string& out, const std::string& flags) {
    return "train --data " + words().data + " --out " + out + " --lr 3e-3 --val-batches 2 --sample-every 0" +
           (contains(flags, "--dtype") ? " " : " --dtype fp32 ") + flags;
}

const std::string kModel = " --layers 2 --heads 2 --channels 16 --context 16 --batch 2 ";

// The losses of each step; those of the validation have the key -1 - step.
std::map<int, double> losses(const std::string& out) {
    std::map<int, double> all;
    for (const Json& entry : read_metrics(out)) {
        if (entry.contains("loss")) all[entry.at("step")] = entry.at("loss");
        if (entry.contains("val_loss")) all[-1 - (int)entry.at("step")] = entry.at("val_loss");
    }
    return all;
}

void check_follows(const std::string& out, const std::string& other, size_t count) {
    const std::map<int, double> a = losses(out), b = losses(other);
    REQUIRE(a.size() == count);
    double largest = 0;
    for (const auto& [step, loss] : a) {
        REQUIRE(b.count(step) == 1);
        largest = std::max(largest, std::abs(loss - b.at(step)));
    }
    MESSAGE("largest difference of a loss: ", largest);
    CHECK(largest < 1e-4);
}

// Makes `to` a run that has come as far as step 70 of `out`.
void copy_half(const std::string& out, const std::string& to) {
    fs::create_directory(to);
    fs::copy(out + "/step_00000070", to + "/step_00000070");
    fs::copy(out + "/metrics.jsonl", to + "/metrics.jsonl");
}

}  // namespace

TEST_CASE("cuda cli: 100 steps follow the CPU's, and each goes on from the other's checkpoint") {
    if (!has_cuda()) return;
    const TempFolder folder;
    const std::string cpu = folder / "cpu", gpu = folder / "gpu";
    const std::string flags = kModel +
                              "--attention poly3 --decay learned --short-conv 3 --output-gate true "
                              "--attention-lr 0.5 --steps 100 --val-every 50 --checkpoint-every 70";
    check_done(train_gpt(train(cpu, flags)));
    check_done(train_gptcu(train(gpu, flags)));
    check_follows(gpu, cpu, 103);
    CHECK(losses(cpu).at(100) < 0.8 * losses(cpu).at(1));  // the model has learnt something

    const std::string from_cpu = folder / "from_cpu", from_gpu = folder / "from_gpu";
    copy_half(cpu, from_cpu), copy_half(gpu, from_gpu);
    check_done(train_gptcu("train --resume --out " + from_cpu));
    check_follows(from_cpu, cpu, 103);
    check_done(train_gpt("train --resume --out " + from_gpu));
    check_follows(from_gpu, gpu, 103);

    // From its own checkpoints it continues with the same bits, with CUDA graphs and without.
    const std::string graph = folder / "graph";
    copy_half(gpu, graph);
    check_done(train_gptcu("train --cuda-graph --resume --out " + graph));
    for (const char* file : {"model.safetensors", "optimizer.safetensors"})
        CHECK(get_file(graph + "/step_00000100/" + file) == get_file(gpu + "/step_00000100/" + file));
    CHECK(losses(graph) == losses(gpu));

    for (const char* prompt : {"", "the", "a longer beginning, of several words"}) {
        const std::string command = "generate --temperature 0 --tokens 20 --model " + cpu + "/step_00000100";
        const Result expected = train_gpt(command, {"--prompt", prompt});
        const Result found = train_gptcu(command, {"--prompt", prompt});
        check_done(expected), check_done(found);
        CHECK(expected.out.size() > 10);
        CHECK(found.out == expected.out);
    }
}

TEST_CASE("cuda cli: softmax and bf16 follow the CPU's float32") {
    if (!has_cuda()) return;
    const TempFolder folder;
    const std::string cpu = folder / "cpu", gpu = folder / "gpu", bf16 = folder / "bf16";
    // A step has four passes. The first assigns the gradients and the second adds to them, so they must have
    // different graphs.
    const std::string flags = kModel + "--steps 10 --val-every 10 --checkpoint-every 0 --total-batch 128";
    check_done(train_gpt(train(cpu, flags)));
    check_done(train_gptcu(train(gpu, flags + " --cuda-graph --recompute block")));
    check_follows(gpu, cpu, 12);
    std::string line = train(bf16, flags);
    line.erase(line.find("--dtype fp32"), 12);  // the default is bf16
    check_done(train_gptcu(line));
    for (const auto& [step, loss] : losses(bf16)) CHECK(std::abs(loss - losses(cpu).at(step)) < 0.05);
    CHECK(losses(bf16) != losses(gpu));
}

namespace {

// A run that is at step 1, and the same run at its end, step 2, if nothing fails.
struct Runs {
    TempFolder folder;
    const std::string begun = folder / "begun", whole = folder / "whole";

    Runs() {
        const std::string flags =
            " --layers 1 --heads 2 --channels 16 --context 16 --batch 2 --attention poly3 --decay learned "
            "--val-every 0 --checkpoint-every 1 --steps ";
        check_done(train_gptcu(train(begun, flags + "1")));
        fs::copy(begun, whole, fs::copy_options::recursive);
        check_done(train_gptcu(go_on(whole)));
    }
    static std::string go_on(const std::string& out) { return "train --resume --steps 2 --out " + out + " "; }
};

const Runs& runs() {
    static const Runs runs;
    return runs;
}

std::set<std::string> names_in(const std::string& folder) {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder)) names.insert(entry.path().filename().string());
    return names;
}

void check_same_folder(const std::string& found, const std::string& expected) {
    CHECK(names_in(found) == names_in(expected));
    for (const std::string& name : names_in(expected)) {
        CAPTURE(name);
        CHECK((get_file(found + "/" + name) == get_file(expected + "/" + name)));
    }
}

// Continues from step 1 with a simulator that fails as `failure` says, and then without the failure. Returns
// whether the run failed: if there are fewer than n calls, the n-th cannot fail.
bool check_failure(const std::string& failure, const Strings& parts) {
    CAPTURE(failure);
    const TempFolder folder;
    const std::string out = folder / "out", first = "step_00000001", second = "step_00000002";
    fs::copy(runs().begun, out, fs::copy_options::recursive);
    const Result result = train_gptcu(Runs::go_on(out), {}, failure);
    if (result.status == 0) {
        CHECK(result.err == "");
    } else {
        check_failed(result, 1, parts, "train_gptcu");
        CHECK(names_in(out) == std::set<std::string>{"metrics.jsonl", first});
        check_same_folder(out + "/" + first, runs().begun + "/" + first);
        if (contains(result.out, "step 2/2")) check_done(train_gptcu(Runs::go_on(out)));
    }
    if (fs::exists(out + "/" + second)) check_same_folder(out + "/" + second, runs().whole + "/" + second);
    return result.status != 0;
}

// Checks the first failures, those near the last one, and some in between.
void check_failures(const std::string& option, const Strings& parts) {
    auto fails = [&](int n) { return check_failure(str(option, "=", n), parts); };
    REQUIRE(fails(1));
    int last = 1, end = 4;
    for (; fails(end); end *= 4) last = end;
    while (end - last > std::max(1, last / 8)) {
        const int middle = (last + end) / 2;
        (fails(middle) ? last : end) = middle;
    }
    for (int back = 1 + last / 32; back < last; back *= 8) CHECK(fails(last - back));
}

}  // namespace

TEST_CASE("cuda cli: an allocation that fails") {
    if (!has_cuda()) return;
    check_failures("fail-allocation", {"out of GPU memory: ", " MiB asked for, ", " MiB free: ", "--batch"});
}

TEST_CASE("cuda cli: a launch that fails") {
    if (!has_cuda()) return;
    const Strings parts = {"cudaErrorLaunchOutOfResources", "too many resources requested for launch", ".h:"};
    check_failures("fail-launch", parts);
    // A failure while a graph is captured, in the second step.
    const TempFolder folder;
    int captured = 0;
    for (int n : {40, 46, 52}) {
        const std::string flags = " --layers 1 --heads 2 --channels 16 --context 16 --batch 2 --cuda-graph ";
        const Result result =
            train_gptcu(train(folder / "out", flags + "--steps 3 --val-every 0 --checkpoint-every 0"), {},
                        str("fail-launch=", n));
        check_failed(result, 1, parts, "train_gptcu");
        captured += contains(result.out, "step 1/3") && !contains(result.out, "step 2/3");
        fs::remove_all(folder / "out");
    }
    CHECK(captured > 0);
}

TEST_CASE("cuda cli: cuBLASLt has no algorithm") {
    if (!has_cuda()) return;
    check_failures("fail-heuristic",
                   {"cuBLASLt finds no algorithm (CUBLAS_STATUS_NOT_SUPPORTED) for the product (",
                    "float to float, epilogue "});
}

TEST_CASE("cuda cli: an error of the device that stays") {
    if (!has_cuda()) return;
    check_failures("fail-call", {"uncorrectable ECC error encountered"});
    check_done(train_gptcu("train --help", {}, "fail-call=1"));
    const Result version = train_gptcu("--version", {}, "fail-call=1");
    check_done(version);
    for (const char* part : {"polygpt ", "train_gptcu", "for GPUs of sm_80", "nvcc 1", "cuBLASLt 1"})
        CHECK(contains(version.out, part));
}

TEST_CASE("cuda cli: a model too large for the device, and the flags with which it fits") {
    if (!has_cuda()) return;
    const TempFolder folder;
    const std::string out = folder / "out";
    auto run = [&](const std::string& memory, const std::string& flags) {
        fs::remove_all(out);
        const std::string batch = contains(flags, "--batch") ? "" : "--batch 8 ",
                          channels = contains(flags, "--channels") ? "" : "--channels 32 ";
        return train_gptcu(train(out,
                                 "--layers 3 --heads 2 --context 64 --val-every 0 --checkpoint-every 0 "
                                 "--steps 1 " +
                                     channels + batch + flags),
                           {}, "memory=" + memory);
    };
    // The model needs 38 MiB, of which 32 are cuBLASLt's workspace; the device has less.
    const Strings parts = {"out of GPU memory: ", " MiB asked for, ", " MiB free: "};
    std::set<std::string> advices;
    for (const char* memory : {"37M", "36M", "34M"}) {
        CAPTURE(memory);
        const Result result = run(memory, "");
        check_failed(result, 1, parts, "train_gptcu");
        CHECK_FALSE(fs::exists(out));
        const std::string start = "it fits with ";
        const size_t at = result.err.find(start);
        REQUIRE(at != std::string::npos);
        std::string flags = lines_of(result.err.substr(at + start.size()))[0];
        advices.insert(flags);
        check_done(run(memory, flags));
    }
    CHECK(advices.size() == 3);
    for (const char* flags : {"", "--dtype bf16 --gradients bf16"})
        check_failed(run("32M", flags), 1, {"out of GPU memory: ", "expected a shorter --seq"},
                     "train_gptcu");
    // The device has room for the model, but not for the optimizer's state of 3 MiB as well. The state is
    // allocated after the model, which must be refused all the same before anything is allocated.
    const std::string wide = "--channels 128 --batch 4 ";
    const Result refused = run("32M", wide);
    const int total = (int)number_after("\nmemory     ", refused.out);
    CHECK(number_after("optimizer ", refused.out) >= 3);
    const Result late = run(str(total - 1, "M"), wide);
    const std::string free = str(total - 1, " of ", total - 1, " MiB free: it fits with ");
    check_failed(late, 1, {str("out of GPU memory: ", total + 1, " MiB asked for, ", free)}, "train_gptcu");
}
