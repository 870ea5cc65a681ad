// Training on several GPUs: train_gptcu on dev/ptxsim, whose ranks exchange data by its NCCL. One rank is
// what several are compared with.
#include <unistd.h>

#include <random>
#include <thread>

#include "llmc/rendezvous.h"
#include "tests/dist/ranks.h"

namespace {

using namespace cli;
namespace fs = std::filesystem;

std::string program() {
    return environment("LLMC_TRAIN_GPTCU", "");
}

bool has_nccl() {
    static const bool has = [] {
        const bool found = !program().empty() &&
                           !contains(train_gpt("--version", {}, {.program = program()}).out, "no NCCL");
        if (!found) MESSAGE("skipped: LLMC_TRAIN_GPTCU is not set, or it was built without nccl.h");
        return found;
    }();
    return has;
}

// Below the ports of outgoing connections.
int next_port() {
    static int port = 12000 + getpid() % 9000;
    return port++;
}

// Runs ranks as processes of their own, without a launcher. The shell does `what` while they run; $p0, $p1
// and so on are the processes. Result::out ends with a line of their exit statuses.
//   lines: the command lines; if there are more ranks than lines, they have the last one
//   devices, locals: GPUs and ranks of a machine
Result on_ranks(int ranks, const Strings& lines, const std::string& what = "", int devices = 3,
                int locals = 3) {
    // The simulator's checks are for the tests in tests/cuda. Here NCCL itself must never wait for long.
    std::string script = str("export WORLD_SIZE=", ranks, " MASTER_ADDR=localhost MASTER_PORT=", next_port(),
                             " PTXSIM=nobounds,nouninit,norace,nccl-timeout=30,devices=", devices, "\n",
                             "exec 3>&2 2>/dev/null\n");  // the shell would say which process was killed
    for (int r = 0; r < ranks; r++)
        script += str("RANK=", r, " LOCAL_RANK=", r % locals, " ", program(), " ",
                      lines[std::min<size_t>(r, lines.size() - 1)], " </dev/null 2>&3 & p", r, "=$!\n");
    script += what + "\n";
    for (int r = 0; r < ranks; r++) script += str("wait $p", r, "; s", r, "=$?\n");
    script += "echo";
    for (int r = 0; r < ranks; r++) script += str(" $s", r);
    return train_gpt("-c", {script}, {.program = "/bin/sh"});
}

// The exit statuses of the ranks.
std::string statuses(const Result& result) {
    const Strings lines = lines_of(result.out);
    return lines.empty() ? "" : lines.back();
}

void check_ranks_done(const Result& result) {
    CAPTURE(result.out);
    CHECK(result.err == "");
    CHECK(statuses(result).find_first_not_of("0 ") == std::string::npos);
}

// Checks that stderr has one line, with all parts.
void check_one_line(const Result& result, const std::string& expected_statuses, const Strings& parts) {
    CAPTURE(result.err);
    CHECK(statuses(result) == expected_statuses);
    CHECK(lines_of(result.err).size() == 1);
    for (const std::string& part : parts) {
        CAPTURE(part);
        CHECK(contains(result.err, part));
    }
}

const std::string kEnd = "/step_00000004";

// Sizes that the numbers of ranks do not divide.
struct Fixture {
    TempFolder folder;
    const std::string data = folder / "data", one = folder / "one";
    Fixture() {
        write_dataset(data, 61, random_tokens(500, 61, 1), random_tokens(61, 61, 2));
        check_done(train_gpt(train(one, 6), {}, {.program = program()}));
    }
    std::string train(const std::string& out, int batch, int steps = 4, int every = 2,
                      const std::string& more = "--dtype fp32") const {
        return str("train --data ", data, " --out ", out, " --batch ", batch, " --steps ", steps,
                   " --layers 2 --heads 2 --channels 20 --context 5 --total-batch 60 --lr 3e-3 --attention "
                   "poly3 --decay learned --val-batches 12 --val-every ",
                   every, " --checkpoint-every ", every, " ", more);
    }
};

const Fixture& fixture() {
    static const Fixture fixture;
    return fixture;
}

void check_like_one(const std::string& out, double tolerance) {
    ranks_test::check_metrics(out, fixture().one, tolerance);
    CHECK(ranks_test::weights_error(out + kEnd, fixture().one + kEnd) < tolerance);
}

}  // namespace

TEST_CASE("nccl: 2 and 3 ranks at every level give the training of one rank, with the same bits every time") {
    if (!has_nccl()) return;
    struct Layout {
        int ranks, batch, devices;
        std::string flags;
    };
    // With one device, every process has one of its own.
    std::vector<Layout> layouts = {
        {2, 3, 3, ""}, {3, 2, 1, "--cuda-graph --zero 1"}, {2, 6, 3, "--zero 1"}, {3, 1, 3, "--zero 2"}};
    for (const Layout& layout : layouts) {
        CAPTURE(layout.ranks);
        CAPTURE(layout.batch);
        CAPTURE(layout.flags);
        const std::string out = fixture().folder / "many";
        fs::remove_all(out);
        Result result =
            on_ranks(layout.ranks, {fixture().train(out, layout.batch, 4, 2, "--dtype fp32 " + layout.flags)},
                     "", layout.devices);
        check_ranks_done(result);
        CHECK(contains(result.out, str("ranks      ", layout.ranks, ", started by RANK and WORLD_SIZE")));
        CHECK(contains(result.out, "% hidden"));
        check_like_one(out, 1e-5);
        CHECK(Json::parse(get_file(out + kEnd + "/trainer.json")).at("samples") == 4 * 12);
    }
    const std::string again = fixture().folder / "again", flags = "--dtype fp32 --zero 2";
    const std::string first = fixture().folder / "first", line = fixture().train(again, 3, 4, 2, flags);
    check_ranks_done(on_ranks(2, {fixture().train(first, 3, 4, 2, flags)}));
    if (fs::exists("/usr/bin/mpirun"))
        check_done(train_gpt("mpirun -q --oversubscribe -n 2 " + program() + " " + line, {},
                             {.environment = {"OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
                                              "PTXSIM=nobounds,nouninit,norace"},
                              .stdin_from = "/dev/null",
                              .program = "/usr/bin/env"}));
    else
        check_ranks_done(on_ranks(2, {line}));
    for (const std::string file : {"/model.safetensors", "/optimizer-00001-of-00002.safetensors",
                                   "/optimizer-00002-of-00002.safetensors"})
        CHECK((get_file(again + kEnd + file) == get_file(first + kEnd + file)));
    // One rank goes on from what two have written, and three from what that has written.
    for (const int ranks : {1, 3}) {
        fs::remove_all(again + kEnd);
        check_ranks_done(
            on_ranks(ranks, {str("train --resume --out ", again, " --batch 2 --zero ", ranks == 3 ? 1 : 0)}));
        check_like_one(again, 1e-5);
    }
}

TEST_CASE("nccl: every level, number of ranks and accumulation gives 20 steps of one rank") {
    if (!thorough() || !has_nccl()) return;
    auto line = [](const std::string& out, int batch, int zero) {
        return str("train --data ", fixture().data, " --out ", out, " --batch ", batch, " --zero ", zero,
                   " --steps 20 --layers 2 --heads 2 --channels 20 --context 5 --total-batch 120 --lr 1e-3 "
                   "--attention poly3 --decay learned --val-every 10 --val-batches 1 --dtype fp32");
    };
    const std::string one = fixture().folder / "20_steps", out = fixture().folder / "20_steps_many";
    const std::string last = "/step_00000020";
    check_done(train_gpt(line(one, 24, 0), {}, {.program = program()}));
    for (int ranks : {2, 3})
        for (int zero : {0, 1, 2})
            for (int passes : {1, 2, 4}) {
                CAPTURE(ranks);
                CAPTURE(zero);
                CAPTURE(passes);
                fs::remove_all(out);
                check_ranks_done(on_ranks(ranks, {line(out, 24 / ranks / passes, zero)}));
                ranks_test::check_metrics(out, one, 1e-5);
                CHECK(ranks_test::weights_error(out + last, one + last) < 1e-5);
            }
}

TEST_CASE("nccl: bf16 at every level, with gradients that are summed in bf16, too") {
    if (!has_nccl()) return;
    const std::string one = fixture().folder / "bf16_one";
    check_done(train_gpt(fixture().train(one, 6, 4, 2, ""), {}, {.program = program()}));
    for (const std::string flags :
         {"--gradients bf16", "--gradients bf16 --zero 2", "--zero 1 --stochastic-rounding"}) {
        CAPTURE(flags);
        const std::string out = fixture().folder / "bf16";
        fs::remove_all(out);
        check_ranks_done(on_ranks(2, {fixture().train(out, 3, 4, 2, flags)}));
        ranks_test::check_metrics(out, one, 0.1);
        const double error = ranks_test::weights_error(out + kEnd, one + kEnd);
        CHECK(error < 0.02);
        CHECK(error > 1e-5);
    }
    // The sums of two numbers have the same bits in any order, and the bits that round at random depend on
    // the place in the model. So two levels agree to the last bit.
    Strings weights;
    for (int zero : {0, 1}) {
        const std::string out = fixture().folder / str("rounded", zero);
        check_ranks_done(
            on_ranks(2, {fixture().train(out, 3, 4, 2, str("--stochastic-rounding --zero ", zero))}));
        weights.push_back(get_file(out + kEnd + "/model.safetensors"));
    }
    CHECK((weights[0] == weights[1]));
}

TEST_CASE("nccl: ranks without a GPU of their own, with other options or of another build do not start") {
    if (!has_nccl()) return;
    const std::string out = fixture().folder / "refused", line = fixture().train(out, 2);
    check_one_line(on_ranks(3, {line}, "", 2), "1 1 1",
                   {"rank 2: ", "local rank 2", "only 2 GPUs", "expected a GPU for each rank"});
    // The second rank is the first one of its machine, as it says.
    check_one_line(on_ranks(2, {line}, "", 3, 1), "1 1", {"ranks 0 and 1 have the same GPU"});
    check_one_line(on_ranks(2, {line, fixture().train(out, 2, 5)}), "2 2",
                   {"disagree on --steps", "rank 1 has 5"});
    CHECK(!fs::exists(out));

    const int port = next_port();
    std::string refusal;
    std::thread foreign([&] {
        Launch launch;
        launch.launcher = "a test", launch.run_id = "7 start 0";
        launch.rank = 1, launch.ranks = 2, launch.master = "localhost", launch.port = port;
        refusal = error_of([&] { Rendezvous(launch, "train_gptcu of yesterday", {.timeout = 20}); });
    });
    const Result result =
        train_gpt(line, {},
                  {.environment = {"RANK=0", "WORLD_SIZE=2", "LOCAL_RANK=0", "MASTER_ADDR=localhost",
                                   str("MASTER_PORT=", port), "TORCHELASTIC_RUN_ID=7"},
                   .program = program()});
    foreign.join();
    check_failed(result, 1, {"train_gptcu of yesterday", "rank 0 is \"train_gptcu of polygpt"},
                 "train_gptcu");
    CHECK(contains(refusal, "refuses this rank"));
}

TEST_CASE("nccl: a signal at one rank, a killed rank, and one that hangs") {
    if (!has_nccl()) return;
    auto run = [](const std::string& name, const std::string& what, const std::string& more = "") {
        const std::string out = fixture().folder / name;
        const std::string started =
            str("until [ -s ", out, "/metrics.jsonl ]; do sleep 0.05; done; sleep 0.1\n");
        return on_ranks(3, {fixture().train(out, 2, 1000000, 1000000, "--dtype fp32 " + more)},
                        started + what);
    };
    Result result = run("terminated", "kill -TERM $p1");
    CHECK(statuses(result) == "130 130 130");
    CHECK(result.err == "");
    CHECK(contains(result.out, "continue with --resume"));
    CHECK(names_in(fixture().folder / "terminated").size() == 2);  // the metrics and a checkpoint

    check_one_line(run("killed", "kill -KILL $p2"), "1 1 137",
                   {"rank 0 of 3, after step", "rank 2 has ended"});
    result = run("killed_first", "kill -KILL $p0");
    CHECK(statuses(result) == "137 1 1");
    CAPTURE(result.err);
    CHECK(lines_of(result.err).size() == 1);  // of rank 1, because rank 2 is on the same machine
    CHECK(contains(result.err, "rank 1 of 3, after step"));
    CHECK(contains(result.err, "rank 0 has ended"));

    // The stopped rank goes on when the others have ended, and then it ends, too.
    check_one_line(run("stopped", "kill -STOP $p1; wait $p0; s=$?; kill -CONT $p1", "--comm-timeout 1"),
                   "1 1 1", {"rank 0 of 3", "rank 1 has not answered for 1 seconds (--comm-timeout)"});
}

TEST_CASE("nccl: one is killed at a random moment, and the run goes on") {
    if (!thorough() || !has_nccl()) return;
    std::mt19937 random(2);
    for (int i = 0; i < 10; i++) {
        const int ranks = 2 + i % 2, zero = i % 3, victim = (int)(random() % ranks);
        const std::string out = fixture().folder / str("killed", i);
        const double delay = random() % 1000 * 1e-3;
        CAPTURE(i);
        CAPTURE(delay);
        const Result result =
            on_ranks(ranks, {fixture().train(out, 12 / ranks, 1000000, 2, str("--dtype fp32 --zero ", zero))},
                     str("until [ -s ", out, "/metrics.jsonl ]; do sleep 0.05; done; sleep ", delay,
                         "; kill -KILL $p", victim));
        CAPTURE(result.err);
        for (const std::string& error : lines_of(result.err))
            CHECK(contains(error, str("rank ", victim, " has ended")));
        CHECK(lines_of(result.err).size() >= 1);
        // The steps so far, and one more. The warm-up and the schedule do not depend on the number of steps.
        const std::vector<Json> before = read_metrics(out);
        const int steps = before.empty() ? 4 : before.back().at("step").get<int>() + 4;
        const std::string tail = str(" --steps ", steps, " --schedule constant --warmup 0 --val-every 0");
        const int now = 1 + i % 3;
        const Result resumed = on_ranks(
            now, {str("train --resume --out ", out, " --batch ", 12 / now, tail, " --zero ", (i + 1) % 3)});
        CAPTURE(resumed.err);
        CHECK(statuses(resumed).find_first_not_of("0 ") == std::string::npos);
        int64_t samples = 0;
        for (const auto& entry : fs::directory_iterator(out)) {
            CHECK(entry.path().extension() != ".tmp");
            if (fs::exists(entry.path() / "trainer.json"))
                samples = std::max(
                    samples,
                    Json::parse(get_file(entry.path() / "trainer.json")).at("samples").get<int64_t>());
        }
        CHECK(samples == 12 * steps);
    }
}
