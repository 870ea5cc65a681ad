// What ends a training on several ranks: flags, data and builds that differ, signals, ranks that die or hang.
// The tests that take long run with `make test-distributed`.
#include <csignal>
#include <thread>

#include "tests/dist/ranks.h"

namespace {

using namespace ranks_test;

TEST_CASE("ranks: what one rank cannot do ends all, with one line") {
    if (!has_mpi()) return;
    std::string out = fixture().folder / "refused", line = fixture().train(out, 6);
    check_failed(on_ranks(2, program() + " " + fixture().train(out, 5)), 2,
                 {"--total-batch 336", "x 2 ranks"});
    check_failed(on_ranks(2, program() + " train --data absent --out " + out), 1, {"absent"});
    CHECK(!fs::exists(out));
    // Two programs, separated by a colon: ranks with other flags.
    auto with = [&](const std::string& flag, const std::string& value) {
        std::string other = line;
        size_t begin = other.find(flag) + flag.size() + 1;
        other.replace(begin, other.find(' ', begin) - begin, value);
        return on_ranks(1, program() + " " + line + " : -n 1 " + program() + " " + other);
    };
    check_failed(with("--lr", "2"), 2, {"disagree on --lr", "rank 1 has 2.0"});
    check_failed(with("--channels", "30"), 2, {"disagree on the model's config"});
    check_failed(with("--data", "absent"), 1, {"rank 1", "absent"});
    std::string other = fixture().folder / "other_data";
    write_dataset(other, 257, random_tokens(900, 257, 3), random_tokens(183, 257, 2));
    check_failed(with("--data", other), 2, {"disagree on --data"});
    const std::string first = fixture().one + kFirst, last = fixture().one + kLast;
    check_failed(on_ranks(1, program() + " " + line + " --init-from " + first + " : -n 1 " + program() + " " +
                                 line + " --init-from " + last),
                 2, {"disagree on the checksum of the first weights"});
    check_failed(on_ranks(1, program() + " " + line + " : -n 1 " +
                                 environment("LLMC_TRAIN_GPT_OTHER", "build/train_gpt_other") + " " + line),
                 2, {"disagree on the program", "(commit another)"});
    CHECK(!fs::exists(out));
    check_failed(
        on_ranks(2, program() + " " + fixture().train(out, 6, 50, 50, "--weight-decay 1e6 --warmup 0")), 3,
        {"training diverged at step", "at rank 0"});
    fs::remove_all(out);
    check_failed(train_gpt(line, {},
                           {.environment = {"RANK=1", "WORLD_SIZE=2", "LOCAL_RANK=1", "MASTER_ADDR=localhost",
                                            "MASTER_PORT=29500"}}),
                 1, {"MPI says rank 0 of 1"});
}

// A script that runs the trainer, and before that does something else on some ranks, such as "0|2".
std::string script(const std::string& ranks, const std::string& what) {
    std::string file = fixture().folder / "rank.sh";
    put_file(file,
             "#!/bin/sh\ncase $OMPI_COMM_WORLD_RANK in\n" + ranks + ")\n" + what + "\nesac\nexec \"$@\"\n");
    fs::permissions(file, fs::perms::owner_all);
    return file + " " + program() + " ";
}

// Does something beside the trainer, `delay` seconds after its first line of metrics. There, $$ is the
// trainer, and $PPID mpirun.
std::string later(const std::string& out, double delay, const std::string& what) {
    return str("(until [ -s ", out, "/metrics.jsonl ]; do sleep 0.02; done; sleep ", delay, "; ", what,
               ") </dev/null >/dev/null 2>&1 &");
}

// All ranks ended, because a rank was lost, and one line says which and when.
void check_lost(const Result& result, const std::string& out, const std::string& lost) {
    CAPTURE(result.err);
    CHECK(result.status != 0);
    Strings errors;
    for (const std::string& line : lines_of(result.err))
        if (contains(line, "train_gpt: error: ")) errors.push_back(line);
    REQUIRE(errors.size() == 1);
    CHECK(contains(errors[0], ", after step "));
    CHECK(contains(errors[0], ": " + lost));
    // No process of this run is left.
    for (const auto& entry : fs::directory_iterator("/proc")) {
        std::ifstream file(entry.path() / "cmdline", std::ios::binary);
        const std::string line{std::istreambuf_iterator<char>(file), {}};
        CHECK_FALSE(contains(line, out));
    }
}

TEST_CASE("ranks: a signal at one rank or at mpirun, a killed rank, and one that hangs") {
    if (!has_mpi()) return;
    std::string out = fixture().folder / "stopped";
    auto ranks = [&](const std::string& what, const std::string& more = "") {
        fs::remove_all(out);
        return on_ranks(
            3, script("1", later(out, 0.2, what)) + fixture().train(out, 4, 1000000, 1000000, more), 1);
    };
    for (const char* what : {"kill -TERM $$", "kill -INT $PPID"}) {
        Result result = ranks(what);
        CAPTURE(what);
        CAPTURE(result.err);
        CHECK(result.status == (contains(what, "PPID") ? 1 : 130));  // mpirun has a status of its own
        CHECK(contains(result.out, "continue with --resume"));
        REQUIRE(fs::exists(out));
        CHECK(names_in(out).size() == 2);                  // metrics.jsonl and a checkpoint
        CHECK_FALSE(contains(result.err, "train_gpt: "));  // mpirun itself may warn of a lost connection
    }
    check_lost(ranks("kill -KILL $$"), out, "rank 1 has died");
    check_lost(ranks("kill -STOP $$", "--comm-timeout 2"), out,
               "rank 1 has not answered for 2 seconds (--comm-timeout)");
}

TEST_CASE("ranks: a NaN at one of them stops all, and is found there") {
    if (!has_mpi()) return;
    const TempFolder folder;
    const std::string data = folder / "data", model = folder / "model", out = folder / "out";
    // Token 256 occurs once, so one rank alone has it. The LayerNorm of its embedding is not finite.
    Tokens tokens = random_tokens(57, 256, 1);
    tokens[30] = 256;
    write_dataset(data, 257, tokens, tokens);
    copy_model(fixture().one + kLast, model);
    Safetensors weights(model + "/model.safetensors");
    weights.poke("wte.weight", 256 * 60, 3e38f);
    weights.poke("wte.weight", 256 * 60 + 1, -3e38f);
    put_file(model + "/model.safetensors", weights.text());
    for (int zero : {0, 2}) {
        const Result result = on_ranks(
            2,
            program() + str(" train --threads 1 --batch 1 --seq 7 --total-batch 56 --steps 3 --val-every 0 "
                            "--init-from ",
                            model, " --data ", data, " --out ", out, " --zero ", zero));
        check_failed(result, 3, {"training diverged at step 1", "first in activation", " at rank "});
    }
}

TEST_CASE("ranks: on two hosts, with MPI between them") {
    if (!has_mpi()) return;
    std::string out = fixture().folder / "two_hosts";
    const Result result = train_gpt(
        "",
        {str("mpirun -q --host 10.77.0.1,10.77.0.2 -n 2 --mca plm_rsh_agent \"$REMOTE_SHELL\" --mca "
             "oob_tcp_if_include 10.77.0.0/24 --mca btl_tcp_if_include 10.77.0.0/24 bash -c 'hostname; exec "
             "\"$@\"' rank ",
             fs::absolute(program()).string(), " ", fixture().train(out, 4)),
         ":"},
        mpi_run("tests/dist/two_hosts.sh", 0));
    if (result.status == 77) {
        MESSAGE(result.out);
        return;
    }
    check_done(result);
    for (const char* host : {"host1\n", "host2\n"}) CHECK(contains(result.out, host));
    check_like_one(out);
}

// ---- `make test-distributed` ----

// A longer run, of which a rank is lost.
const int kSteps = 600;
std::string longer(const std::string& out, int ranks, const std::string& more = "--checkpoint-every 10") {
    return str("train --data ", fixture().data, " --out ", out, " --batch ", 12 / ranks, " --steps ", kSteps,
               " --layers 2 --heads 3 --channels 60 --context 7 --total-batch 168 --threads 1 --lr 1e-4 "
               "--val-every 0 --comm-timeout 2 ",
               more);
}

// The metrics of such a run on one rank.
const std::vector<Json>& longer_metrics() {
    static const std::vector<Json> metrics = [] {
        std::string out = fixture().folder / "longer";
        check_done(train_gpt(longer(out, 1)));
        return timeless_metrics(out);
    }();
    return metrics;
}

// Resumes a run from its last checkpoint. The steps and their losses must be those of a run that was never
// stopped; one sample more or less would change them.
void check_goes_on(const Result& lost, const std::string& out, int ranks, int zero = 0) {
    const Result resumed = on_ranks(
        ranks, program() + " " + longer(out, ranks, str("--checkpoint-every 10 --resume --zero ", zero)));
    CAPTURE(resumed.err);
    CHECK(resumed.status == 0);
    // What a checkpoint said before the rank was lost is still true.
    const size_t wrote = lost.out.rfind("wrote ");
    if (wrote != std::string::npos) {
        const std::string step = "resuming from " + out + "/step_";
        REQUIRE(contains(resumed.out, step));
        CHECK(number_after(step, resumed.out) >= number_after(out + "/step_", lost.out.substr(wrote)));
    }
    const std::vector<Json>&expected = longer_metrics(), found = timeless_metrics(out);
    REQUIRE(found.size() == expected.size());
    double difference = 0;
    for (size_t i = 0; i < found.size(); i++) {
        CHECK(found[i].at("step") == expected[i].at("step"));
        const double x = expected[i].at("loss"), y = found[i].at("loss");
        difference = std::max(difference, std::abs(x - y) / x);
    }
    CHECK(difference < 1e-4);  // rounding grows from step to step
    char last[32];
    snprintf(last, sizeof last, "/step_%08d", kSteps);
    CHECK(Json::parse(get_file(out + last + "/trainer.json")).at("samples") == kSteps * 24);
    fs::remove_all(out);
}

TEST_CASE("ranks: other data at the same place are refused") {
    if (!thorough() || !has_mpi()) return;
    Run unshare;
    unshare.program = "/usr/bin/env";
    if (train_gpt("unshare --mount true", {}, unshare).status != 0) {
        MESSAGE("skipped: mounts of a rank's own are not allowed here");
        return;
    }
    const std::string other = fixture().folder / "other_place";
    write_dataset(other, 257, random_tokens(900, 257, 3), random_tokens(183, 257, 2));
    const std::string what = str("exec unshare --mount sh -c 'mount --bind ", other, " ", fixture().data,
                                 " && exec \"$@\"' rank \"$@\"");
    check_failed(on_ranks(2, script("1", what) + fixture().train(fixture().folder / "refused", 6)), 2,
                 {"disagree on the checksum of the training data"});
}

TEST_CASE("ranks: one is killed at a random moment, and the run goes on") {
    if (!thorough() || !has_mpi()) return;
    std::mt19937 random(1);
    for (int i = 0; i < 20; i++) {
        const int ranks = 2 + (int)(random() % 3);
        const bool writing = i % 2;
        const int zero = i / 2 % 3;
        const int victim = writing && zero == 0 ? 0 : (int)(random() % ranks);  // only rank 0 writes then
        const double delay = random() % 1000 * 0.6e-3;
        const int call = 1 + (int)(random() % (victim == 0 ? 400 : 100));
        const std::string out = fixture().folder / str("killed", i);
        std::string what = later(out, delay, "kill -KILL $$");
        if (writing) {
            what.clear();
            for (const std::string& variable : fault(out, call, "signal", SIGKILL).environment)
                what += "export " + variable + "\n";
        }
        CAPTURE(i);
        CAPTURE(ranks);
        CAPTURE(what);
        CAPTURE(zero);
        const std::string more = str("--checkpoint-every 10 --zero ", zero);
        const Result result = on_ranks(ranks, script(str(victim), what) + longer(out, ranks, more), 1);
        check_lost(result, out, str("rank ", victim, " has died"));
        check_goes_on(result, out, 1 + (int)(random() % 4), (int)(random() % 3));
    }
}

TEST_CASE("ranks: any rank that hangs is named, and the run goes on") {
    if (!thorough() || !has_mpi()) return;
    for (int rank : {0, 1, 2}) {
        const std::string out = fixture().folder / str("hangs", rank);
        const Result result =
            on_ranks(3, script(str(rank), later(out, 0.1, "kill -STOP $$")) + longer(out, 3), 1);
        check_lost(result, out, str("rank ", rank, " has not answered for 2 seconds (--comm-timeout)"));
        check_goes_on(result, out, 3);
    }
    const std::string out = fixture().folder / "hang";
    check_lost(on_ranks(4, script("0|2", later(out, 0.1, "kill -STOP $$")) + longer(out, 4), 1), out,
               "ranks 0, 2 have not answered for 2 seconds (--comm-timeout)");
    // Before MPI has started.
    const Result result = on_ranks(2, script("1", "exec sleep 100") + longer(out, 2, "--resume"));
    check_failed(result, 1, {"rank 0: MPI did not start within 10 seconds (--comm-timeout)"});
}

TEST_CASE("ranks: one that hangs while a checkpoint is written, or that sees another folder") {
    if (!thorough() || !has_mpi()) return;
    const std::string out = fixture().folder / "hangs_writing";
    for (const std::string dtype : {"fp32", "bf16"}) {
        std::string what;
        for (const std::string& variable : fault(out, 3, "signal", SIGSTOP).environment)
            what += "export " + variable + "\n";
        const std::string more = "--checkpoint-every 10 --zero 1 --dtype " + dtype;
        const auto start = std::chrono::steady_clock::now();
        check_lost(on_ranks(3, script("1", what) + longer(out, 3, more), 1), out,
                   "rank 1 has not answered for 2 seconds (--comm-timeout)");
        CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(8));
        fs::remove_all(out);
    }
    const std::string other = longer(fixture().folder / "elsewhere", 2);
    check_failed(on_ranks(1, program() + " " + longer(out, 2) + " : -n 1 " + program() + " " + other), 1,
                 {"rank 1: ", "elsewhere", "expected --out in a file system that all ranks share"});
    CHECK(!fs::exists(out));
}

TEST_CASE("ranks: a pause that is shorter than --comm-timeout changes nothing, SIGTERM at mpirun stops") {
    if (!thorough() || !has_mpi()) return;
    std::string out = fixture().folder / "pause";
    const std::string pause = later(out, 0.1, "kill -STOP $$; sleep 1.4; kill -CONT $$");
    check_done(on_ranks(3, script("1", pause) + longer(out, 3)));
    CHECK(timeless_metrics(out).size() == longer_metrics().size());
    fs::remove_all(out);
    const Result result = on_ranks(
        3, script("1", later(out, 0.1, "kill -TERM $PPID")) + longer(out, 3, "--checkpoint-every 1000"), 1);
    CHECK(contains(result.out, "continue with --resume"));
    CHECK(names_in(out).size() == 2);
}

}  // namespace
