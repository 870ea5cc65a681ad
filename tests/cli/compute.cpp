// The flags that say how a model is computed, as users see them: --dtype, --attention-kernel, --recompute,
// --cache and --norms-every; the choice of the instruction set, and what limits the number of threads.
#include <sched.h>
#include <algorithm>

#include <cmath>
#include <limits>
#include <set>

#include "tests/cli/cli.h"
#include "tests/reference.h"

namespace {

using namespace cli;
namespace fs = std::filesystem;

// Data from which a model can learn, with sequences of several chunks of 64 tokens.
struct Fixture {
    TempFolder folder;
    std::string data = folder / "data";

    Fixture() {
        Tokens train, val;
        for (int i = 0; i < 3000; i++) train.push_back((uint16_t)(i * i % 97));
        for (int i = 0; i < 500; i++) val.push_back((uint16_t)((i + 7) * (i + 7) % 97));
        write_dataset(data, kTokenizerVocab, train, val);
    }
};

const Fixture& fixture() {
    static const Fixture fixture;
    return fixture;
}

const std::string kLong = " --layers 2 --heads 2 --channels 16 --context 128 --batch 2 --lr 1e-2";

// The losses of a run with these flags, in the order of the steps.
std::vector<double> losses(const std::string& flags, const Strings& environment = {}, int steps = 12) {
    const TempFolder folder;
    check_done(train_gpt(str("train --data ", fixture().data, " --out ", folder / "run", kLong, " --steps ",
                             steps, " --sample-every 0 --checkpoint-every 0 ", flags),
                         {}, {environment}));
    std::vector<double> all;
    for (const Json& entry : read_metrics(folder / "run"))
        for (const char* key : {"loss", "val_loss"})
            if (entry.contains(key)) all.push_back(entry.at(key));
    REQUIRE(all.size() == (size_t)steps + 2);
    return all;
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
    REQUIRE(a.size() == b.size());
    double largest = 0;
    for (size_t i = 0; i < a.size(); i++) largest = std::max(largest, std::abs(a[i] - b[i]));
    return largest;
}

// LLMC_ISA=NAME for each instruction set that this processor has.
const Strings& instruction_sets() {
    static const Strings all = [] {
        Strings found;
        for (const char* isa : {"avx2", "avx512", "avx512_bf16"}) {
            const std::string variable = str("LLMC_ISA=", isa);
            const Result probe = train_gpt("eval --model none --data none", {}, {{variable}});
            if (!contains(probe.err, variable)) found.push_back(variable);  // else the program refused it
        }
        return found;
    }();
    return all;
}

// While an object of this type lives, this process and those that it starts run on one core, as under taskset
// or in a cpuset.
struct OnOneCore {
    cpu_set_t before;
    explicit OnOneCore(bool wanted) {
        REQUIRE(sched_getaffinity(0, sizeof(before), &before) == 0);
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(sched_getcpu(), &one);
        if (wanted) REQUIRE(sched_setaffinity(0, sizeof(one), &one) == 0);
    }
    ~OnOneCore() { sched_setaffinity(0, sizeof(before), &before); }
};

}  // namespace

TEST_CASE("cli: bf16 trains like float32, and is not it") {
    for (const char* attention : {"softmax", "poly3"}) {
        const std::string flags = str("--attention ", attention, " ");
        const double difference =
            largest_difference(losses(flags, {}, 40), losses(flags + "--dtype bf16", {}, 40));
        CHECK(difference < 0.05);
        CHECK(difference > 0);
    }
}

TEST_CASE("cli: recomputation changes no loss") {
    for (const char* dtype : {"fp32", "bf16"}) {
        const std::string flags = str("--attention poly3 --dtype ", dtype, " --recompute ");
        const std::vector<double> all = losses(flags + "none");
        for (const char* recompute : {"gelu", "layernorm", "block"}) CHECK(losses(flags + recompute) == all);
    }
    // Each of them also takes less memory than the one before.
    const TempFolder folder;
    int last = std::numeric_limits<int>::max();
    for (const std::string recompute : {"none", "gelu", "layernorm", "block"}) {
        CAPTURE(recompute);
        const Result result = train_gpt(
            str("train --layers 8 --heads 2 --channels 64 --context 128 --batch 8 --steps 1 --val-every 0 "
                "--sample-every 0 --checkpoint-every 0 --data ",
                fixture().data, " --out ", folder / recompute, " --recompute ", recompute));
        check_done(result);
        const std::string label = ", activations ";
        const size_t at = result.out.find(label);
        REQUIRE(at != std::string::npos);
        const int mebibytes = std::stoi(result.out.substr(at + label.size()));
        CHECK(mebibytes < last);
        last = mebibytes;
    }
}

TEST_CASE("cli: the linear kernel follows the tiled one") {
    for (const char* kind : {"--attention poly1 --decay learned", "--attention poly2 --attention-scale sum",
                             "--attention poly3 --short-conv 3"}) {
        const std::string flags = str(kind, " --attention-kernel ");
        const std::vector<double> tiled = losses(flags + "tiled"), linear = losses(flags + "linear");
        CHECK(largest_difference(tiled, linear) < 1e-4);
        CHECK(tiled != linear);  // different bits show that another kernel ran
    }
}

TEST_CASE("cli: every instruction set of this processor trains alike") {
    for (const char* dtype : {"fp32", "bf16"}) {
        const std::string flags = str("--attention poly3 --output-gate true --dtype ", dtype);
        const std::vector<double> best = losses(flags);
        for (const std::string& isa : instruction_sets())
            CHECK(largest_difference(losses(flags, {isa}), best) < (dtype[0] == 'f' ? 1e-4 : 2e-2));
    }
    MESSAGE("instruction sets that were run: ", instruction_sets().size());
}

TEST_CASE("cli: whatever limits OpenMP's threads, logits, loss, gradients and text are the same") {
    const TempFolder folder;
    const std::string model = train_model(fixture().data, folder / "run",
                                          kLong + " --sample-every 0 --attention poly3 --decay learned", 12);
    const auto text = [&](const Strings& environment) {
        const Result result = train_gpt("generate --temperature 0 --tokens 40 --model " + model,
                                        {"--prompt", "The king"}, {environment});
        check_done(result);
        return result.out;
    };
    const auto numbers = [&](const char* dtype, const Strings& environment) {
        check_done(train_gpt(str("dump --data ", fixture().data, " --model ", model,
                                 " --batch 2 --seq 128 --dtype ", dtype, " --file ", folder / "dump"),
                             {}, {environment}));
        return Safetensors(folder / "dump");
    };
    const Strings limits = {"OMP_THREAD_LIMIT=3", "OMP_MAX_ACTIVE_LEVELS=0", "OMP_DYNAMIC=true", "one core"};
    for (const std::string& isa : instruction_sets()) {
        CAPTURE(isa);
        const Strings free = {isa, "OMP_NUM_THREADS=4"};
        const std::string expected_text = text(free);
        const Safetensors fp32 = numbers("fp32", free), bf16 = numbers("bf16", free);
        for (const std::string& limit : limits) {
            CAPTURE(limit);
            const bool one_core = limit == "one core";
            const OnOneCore scope(one_core);
            const Strings limited = one_core ? Strings{isa} : Strings{isa, "OMP_NUM_THREADS=4", limit};
            CHECK(text(limited) == expected_text);
            for (const char* dtype : {"fp32", "bf16"}) {
                CAPTURE(dtype);
                const bool is_bf16 = dtype[0] == 'b';
                const Safetensors &expected = is_bf16 ? bf16 : fp32, got = numbers(dtype, limited);
                for (const auto& entry : expected.header.items()) {
                    const std::string& name = entry.key();
                    if (name == "__metadata__") continue;
                    CAPTURE(name);
                    const double error = reference::relative_error(
                        reference::to_double(got.values(name)), reference::to_double(expected.values(name)));
                    CHECK(error < (is_bf16 ? 1e-2 : 1e-5));
                }
            }
        }
    }
}

TEST_CASE("matmul: right where OpenMP gives fewer threads, without a program that has set their number") {
    const std::string tests = fs::read_symlink("/proc/self/exe");
    const Result result = train_gpt("--no-colors", {"--test-case=matmul: the linear layer*"},
                                    {.environment = {"OMP_THREAD_LIMIT=1"}, .program = tests});
    CAPTURE(result.out);
    CHECK(result.status == 0);
    CHECK(contains(result.out, "2 passed | 0 failed"));
}

TEST_CASE("cli: the best instruction set runs where none is asked for") {
    const TempFolder folder;
    const Result result = train_gpt(str("train --steps 1 --val-every 0 --sample-every 0 --data ",
                                        fixture().data, " --out ", folder / "run", kLong));
    check_done(result);
    const Strings sets = instruction_sets();
    const bool has_choice = !contains(result.out, "on the CPU (");
    for (const char* isa : {"avx512_bf16", "avx512", "avx2"})
        if (has_choice && std::count(sets.begin(), sets.end(), str("LLMC_ISA=", isa))) {
            CHECK(contains(result.out, str("on the CPU, ", isa, " (")));
            break;
        }
}

TEST_CASE("cli: what oneDNN cannot multiply is one line of ours") {
    const TempFolder folder;
    const Result result = train_gpt(
        "train --dtype bf16 --steps 1 --val-every 0 --sample-every 0 --checkpoint-every 0 "
        "--data " +
            fixture().data + " --out " + (folder / "run") + kLong,
        {}, {{"ONEDNN_MAX_CPU_ISA=SSE41"}});
    // Without AVX-512 BF16, or without oneDNN, the program does not ask oneDNN for products in bf16.
    if (result.status != 0)
        check_failed(result, 1, {"oneDNN cannot multiply (", "in bf16", "ONEDNN_MAX_CPU_ISA"});
}

TEST_CASE("cli: LLMC_ISA with a name that is none is refused") {
    const Result result = train_gpt("eval --model none --data none", {}, {{"LLMC_ISA=mmx"}});
    // A program that was built for one processor (make DISPATCH=0) has only one instruction set.
    if (contains(result.err, "none: ")) return;
    check_failed(result, 2, {"LLMC_ISA=mmx", "avx512_bf16", "avx512", "avx2"});
}

TEST_CASE("cli: flags that a kind of attention has no kernel for are refused, and leave nothing behind") {
    const TempFolder folder;
    const std::string out = folder / "out", data = " --data " + fixture().data;
    const std::string model =
        train_model(fixture().data, folder / "softmax", kSizes + " --batch 2 --sample-every 0");
    struct Bad {
        std::string line;
        Strings parts;
    };
    const std::string train = "train --steps 1 --out " + out + data + kLong;
    const Bad table[] = {
        {train + " --attention-kernel linear", {"--attention-kernel linear", "softmax", "poly1"}},
        {train + " --attention poly4 --attention-kernel linear", {"--attention-kernel linear", "poly4"}},
        {train + " --attention sigmoid --attention-kernel linear", {"--attention-kernel linear", "sigmoid"}},
        {train + " --attention poly1 --attention-scale sum --attention-kernel linear", {"poly1", "sum"}},
        {train + " --attention-kernel fast", {"--attention-kernel", "fast", "auto", "tiled", "linear"}},
        {train + " --dtype fp16", {"--dtype", "fp16", "fp32", "bf16"}},
        {train + " --recompute all", {"--recompute", "all", "none", "gelu", "layernorm", "block"}},
        {train + " --gradients tf32", {"--gradients", "tf32", "fp32", "bf16"}},
        {train + " --dtype bf16 --gradients bf16", {"--gradients bf16", "train_gptcu"}},
        {train + " --dtype tf32", {"--dtype tf32", "train_gptcu"}},
        {train + " --cuda-graph", {"--cuda-graph", "train_gptcu"}},
        {train + " --dtype bf16 --stochastic-rounding", {"--stochastic-rounding", "train_gptcu"}},
        {train + " --norms-every -1", {"--norms-every", "-1"}},
        {"generate --cache state --prompt x --model " + model, {"--cache state", "softmax"}},
        {"generate --cache none --prompt x --model " + model, {"--cache", "none", "auto", "kv", "state"}},
        {"eval --attention-kernel linear --model " + model + data, {"--attention-kernel linear", "softmax"}},
    };
    for (const Bad& bad : table) {
        CAPTURE(bad.line);
        check_failed(train_gpt(bad.line), 2, bad.parts);
        CHECK_FALSE(fs::exists(out));
    }
}

TEST_CASE("cli: generation says the same from keys and values and from the state") {
    for (const char* kind : {"poly1", "poly2 --decay learned", "poly3 --attention-scale mean"}) {
        CAPTURE(kind);
        const TempFolder folder;
        const std::string model = train_model(fixture().data, folder / "run",
                                              str(kLong, " --sample-every 0 --attention ", kind), 12);
        std::set<std::string> texts;
        for (const char* cache : {"kv", "state", "auto"}) {
            const Result result = train_gpt(
                str("generate --temperature 0 --tokens 300 --model ", model, " --threads 2 --cache ", cache),
                {"--prompt", "The king"});
            check_done(result);
            texts.insert(result.out);
        }
        CHECK(texts.size() == 1);
    }
}

TEST_CASE("cli: eval and dump compute in bf16 where they are asked to") {
    const TempFolder folder;
    const std::string model = train_model(fixture().data, folder / "run", kLong + " --sample-every 0", 12);
    std::vector<double> losses;
    for (const char* dtype : {"fp32", "bf16"}) {
        const Result result =
            train_gpt(str("eval --data ", fixture().data, " --model ", model, " --dtype ", dtype));
        check_done(result);
        losses.push_back(std::stod(result.out.substr(result.out.find("loss ") + 5)));
        check_done(train_gpt(str("dump --data ", fixture().data, " --model ", model,
                                 " --batch 1 --seq 70 --dtype ", dtype, " --file ", folder / dtype)));
    }
    CHECK(losses[0] != losses[1]);
    CHECK(losses[1] == doctest::Approx(losses[0]).epsilon(1e-2));
    const auto gradient = [&](const char* dtype) {
        return Safetensors(get_file(folder / dtype).empty() ? "" : folder / dtype).values("grad.wte.weight");
    };
    CHECK(gradient("fp32") != gradient("bf16"));
}

TEST_CASE("cli: --norms-every logs every head and layer, and changes no loss") {
    const TempFolder folder;
    for (const bool hybrid : {false, true}) {  // the hybrid's second block has softmax
        const std::string out = folder / (hybrid ? "hybrid" : "softmax"),
                          flags = hybrid ? "--attention poly3 --softmax-every 2 " : "--attention softmax ";
        check_done(
            train_gpt(str("train --data ", fixture().data, " --out ", out, kLong,
                          " --steps 12 --sample-every 0 --checkpoint-every 0 --norms-every 5 ", flags)));
        std::set<int> steps;
        std::vector<double> all;
        int heads = 0, layers = 0;
        std::map<int, double> squares, norms;  // of the gradient, for each step
        for (const Json& entry : read_metrics(out)) {
            const int step = entry.at("step");
            for (const char* key : {"loss", "val_loss"})
                if (entry.contains(key)) all.push_back(entry.at(key));
            if (entry.contains("grad_norm")) norms[step] = entry.at("grad_norm");
            if (entry.contains("gradient_norm")) {
                squares[step] += std::pow(entry.at("gradient_norm").get<double>(), 2);
                layers++;
            }
            if (!entry.contains("head")) continue;
            heads++;
            steps.insert(step);
            for (const char* key : {"attention_norm", "jacobian_norm", "max_weight", "effective_keys",
                                    "score_std", "max_score"})
                CHECK(entry.at(key).get<double>() > 0);
            const bool softmax = !hybrid || entry.at("layer") == 1;
            CHECK((entry.at("negative_mass").get<double>() > 0) == !softmax);
            CHECK((entry.value("entropy", 0.0) > 0) == softmax);
            CHECK(entry.contains("moment_excess") == !softmax);
        }
        CHECK(steps == std::set<int>{1, 5, 10});
        CHECK(heads == 3 * 2 * 2);
        CHECK(layers == 3 * 2);
        for (const auto& [step, square] : squares) CHECK(std::sqrt(square) < norms.at(step));
        CHECK(all == losses(flags));
    }
}

TEST_CASE("resume: a bf16 run goes on bit for bit, with the flags it had") {
    const TempFolder folder;
    const std::string flags =
        str("train --data ", fixture().data, kLong,
            " --sample-every 0 --attention poly3 --dtype bf16 --recompute block --out ");
    check_done(
        train_gpt(flags + (folder / "whole") + " --steps 12 --checkpoint-every 6 --keep-checkpoints 0"));
    fs::create_directory(folder / "half");
    fs::copy(folder / "whole/step_00000006", folder / "half/step_00000006", fs::copy_options::recursive);
    check_done(train_gpt("train --resume --threads 2 --out " + (folder / "half")));
    for (const char* file : {"model.safetensors", "optimizer.safetensors"})
        CHECK((get_file(folder / ("whole/step_00000012/" + std::string(file))) ==
               get_file(folder / ("half/step_00000012/" + std::string(file)))));
    check_failed(train_gpt("train --resume --dtype fp32 --out " + (folder / "half")), 2,
                 {"--dtype", "fp32", "bf16", "trainer.json"});
}
