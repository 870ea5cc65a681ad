// Training on several ranks: `mpirun -n N train_gpt`. One rank is what several are compared with.
#include <cmath>
#include <csignal>
#include <thread>

#include "tests/cli/cli.h"

namespace {

using namespace cli;
namespace fs = std::filesystem;

bool find_mpi() {
    Run run;
    run.program = "/usr/bin/env";
    bool found =
        train_gpt("mpirun --version", {}, run).status == 0 && !contains(train_gpt("--version").out, "no MPI");
    if (!found) MESSAGE("skipped: there is no mpirun, or train_gpt has no MPI");
    return found;
}

bool has_mpi() {
    static const bool has = find_mpi();
    return has;
}

std::string program() {
    return environment("LLMC_TRAIN_GPT", "./train_gpt");
}

// `line` is what mpirun runs on every rank. A colon in it begins another program, for other ranks.
Result on_ranks(int ranks, const std::string& line) {
    Run run;
    run.program = "/usr/bin/env";
    run.stdin_from = "/dev/null";
    run.environment = {"OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
                       "OMPI_MCA_hwloc_base_binding_policy=none", "OMPI_MCA_odls_base_sigkill_timeout=0"};
    return train_gpt(str("mpirun -q --oversubscribe -n ", ranks, " ", line), {}, run);
}

// Sizes that the numbers of ranks do not divide.
struct Fixture {
    TempFolder folder;
    const std::string data = folder / "data", one = folder / "one";
    Fixture() {
        write_dataset(data, 257, random_tokens(900, 257, 1), random_tokens(90, 257, 2));
        check_done(train_gpt(train(one, 24)));
    }
    std::string train(const std::string& out, int batch, int steps = 8, int every = 4,
                      const std::string& more = "") const {
        return str("train --data ", data, " --out ", out, " --batch ", batch, " --steps ", steps,
                   " --layers 2 --heads 3 --channels 60 --context 7 --total-batch 168 --threads 1 --lr 3e-3 "
                   "--attention poly3 --decay learned --val-batches 12 --val-every ",
                   every, " --checkpoint-every ", every, " ", more);
    }
};

const Fixture& fixture() {
    static const Fixture fixture;
    return fixture;
}

// Compares losses, and the last checkpoint's weights and moments, with those of one rank.
void check_like_one(const std::string& out) {
    std::vector<Json> one = timeless_metrics(fixture().one), many = timeless_metrics(out);
    REQUIRE(one.size() == many.size());
    for (size_t i = 0; i < one.size(); i++)
        for (const char* key : {"loss", "val_loss", "grad_norm"})
            if (one[i].contains(key)) {
                CAPTURE(i);
                CAPTURE(key);
                double expected = one[i].at(key), found = many[i].at(key);
                CHECK(std::abs(found - expected) < 1e-5 * expected);
            }
    Safetensors expected(fixture().one + "/step_00000008/model.safetensors"),
        found(out + "/step_00000008/model.safetensors");
    double difference = 0, norm = 0;
    for (const auto& [name, tensor] : expected.header.items()) {
        if (name == "__metadata__") continue;
        std::vector<float> x = expected.values(name), y = found.values(name);
        REQUIRE(x.size() == y.size());
        for (size_t i = 0; i < x.size(); i++) difference += std::pow(x[i] - y[i], 2), norm += x[i] * x[i];
    }
    CHECK(std::sqrt(difference / norm) < 1e-5);
}

TEST_CASE("ranks: any number, micro-batch and accumulation give the training of one rank") {
    if (!has_mpi()) return;
    struct Layout {
        int ranks, batch;
    };
    for (Layout layout : {Layout{2, 4}, Layout{2, 12}, Layout{3, 4}, Layout{3, 1}, Layout{4, 2}}) {
        CAPTURE(layout.ranks);
        CAPTURE(layout.batch);
        std::string out = fixture().folder / str("ranks", layout.ranks, "_", layout.batch);
        Result result = on_ranks(layout.ranks, program() + " " + fixture().train(out, layout.batch));
        check_done(result);
        CHECK(contains(result.out, str("ranks      ", layout.ranks, ", started by mpirun")));
        size_t last = result.out.find("step 8/8 | loss ");  // from one rank only
        CHECK(last != std::string::npos);
        CHECK(result.out.find("step 8/8 | loss ", last + 1) == std::string::npos);
        check_like_one(out);
    }
    std::string again = fixture().folder / "again";
    check_done(on_ranks(3, program() + " " + fixture().train(again, 1)));
    for (const char* file : {"/step_00000008/model.safetensors", "/step_00000008/optimizer.safetensors"})
        CHECK((get_file(again + file) == get_file(fixture().folder / "ranks3_1" + file)));
}

TEST_CASE("ranks: a run goes on with another number of ranks, at the very next sample") {
    if (!has_mpi()) return;
    std::string out = fixture().folder / "resumed";
    // As if the run had been stopped after step 4.
    check_done(on_ranks(4, program() + " " + fixture().train(out, 3)));
    fs::remove_all(out + "/step_00000008");
    check_done(on_ranks(3, program() + " train --resume --threads 1 --batch 2 --out " + out));
    CHECK(Json::parse(get_file(out + "/step_00000008/trainer.json")).at("samples") == 8 * 24);
    check_like_one(out);
    fs::remove_all(out + "/step_00000008");
    check_done(train_gpt("train --resume --threads 1 --batch 4 --out " + out));
    check_like_one(out);
}

TEST_CASE("ranks: what one rank cannot do ends all, with one line") {
    if (!has_mpi()) return;
    std::string out = fixture().folder / "refused", line = fixture().train(out, 6);
    check_failed(on_ranks(2, program() + " " + fixture().train(out, 5)), 2,
                 {"--total-batch 168", "x 2 ranks"});
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
    write_dataset(other, 257, random_tokens(900, 257, 3), random_tokens(90, 257, 2));
    check_failed(with("--data", other), 2, {"disagree on"});
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

TEST_CASE("ranks: a signal at one rank, a killed rank, and one that hangs") {
    if (!has_mpi()) return;
    std::string out = fixture().folder / "stopped";
    // Rank 1 is a shell that does something to the trainer that it has started.
    auto ranks = [&](const std::string& what, const std::string& more) {
        std::string script = fixture().folder / "rank1.sh";
        put_file(script, "#!/bin/sh\n\"$@\" &\npid=$!\n" + what + "\nwait $pid\nexit $?\n");
        fs::permissions(script, fs::perms::owner_all);
        std::string line = fixture().train(out, 6, 1000000, 1000000, more);
        return on_ranks(1, program() + " " + line + " : -n 1 " + script + " " + program() + " " + line);
    };
    const std::string started = str("until [ -s ", out, "/metrics.jsonl ]; do sleep 0.1; done\nsleep 0.2");
    Result result = ranks(started + "\nkill -TERM $pid", "");
    CHECK(result.status == 130);
    CHECK(contains(result.out, "continue with --resume"));
    REQUIRE(!names_in(out).empty());
    CHECK(result.err == "");
    fs::remove_all(out);

    CHECK(ranks(started + "\nkill -KILL $pid", "").status != 0);
    fs::remove_all(out);

    result = ranks(started + "\nkill -STOP $pid\n(sleep 5; kill -KILL $pid) >/dev/null 2>&1 &",
                   "--comm-timeout 1");
    CHECK(result.status != 0);
    CHECK(contains(result.err, "rank 0 of 2"));
    CHECK(contains(result.err, "has not answered for 1 seconds"));
}

}  // namespace
