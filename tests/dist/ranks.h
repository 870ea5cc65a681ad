// For tests that start several ranks: `mpirun -n N train_gpt`. One rank is what several are compared with.
#pragma once
#include <cmath>

#include "tests/cli/cli.h"

namespace ranks_test {

using namespace cli;
namespace fs = std::filesystem;

inline bool find_mpi() {
    Run run;
    run.program = "/usr/bin/env";
    bool found =
        train_gpt("mpirun --version", {}, run).status == 0 && !contains(train_gpt("--version").out, "no MPI");
    if (!found) MESSAGE("skipped: there is no mpirun, or train_gpt has no MPI");
    return found;
}

inline bool has_mpi() {
    static const bool has = find_mpi();
    return has;
}

inline std::string program() {
    return environment("LLMC_TRAIN_GPT", "./train_gpt");
}

inline Run mpi_run(const std::string& program, int sigkill_timeout) {
    Run run;
    run.program = program;
    run.stdin_from = "/dev/null";
    run.environment = {"OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
                       "OMPI_MCA_hwloc_base_binding_policy=none",
                       str("OMPI_MCA_odls_base_sigkill_timeout=", sigkill_timeout)};
    return run;
}

// `line` is what mpirun runs on every rank. A colon in it begins another program, for other ranks.
// If one rank ends, mpirun gives the others twice sigkill_timeout. Its own default is one second.
inline Result on_ranks(int ranks, const std::string& line, int sigkill_timeout = 0) {
    const Run run = mpi_run("/usr/bin/env", sigkill_timeout);
    return train_gpt(str("mpirun -q --oversubscribe -n ", ranks, " ", line), {}, run);
}

inline const std::string kLast = "/step_00000020", kFirst = "/step_00000010";  // the checkpoints of a run

// Sizes that the numbers of ranks do not divide, 48 sequences a step, and 26 for validation, which no batch
// divides. The learning rate is one at which rounding does not grow.
struct Fixture {
    TempFolder folder;
    const std::string data = folder / "data", one = folder / "one";
    Fixture() {
        write_dataset(data, 257, random_tokens(900, 257, 1), random_tokens(183, 257, 2));
        check_done(train_gpt(train(one, 48)));
    }
    std::string train(const std::string& out, int batch, int steps = 20, int every = 10,
                      const std::string& more = "") const {
        return str("train --data ", data, " --out ", out, " --batch ", batch, " --steps ", steps,
                   " --layers 2 --heads 3 --channels 60 --context 7 --total-batch 336 --threads 1 --lr 1e-3 "
                   "--attention poly3 --decay gate --val-batches 2 --val-every ",
                   every, " --checkpoint-every ", every, " ", more);
    }
};

inline const Fixture& fixture() {
    static const Fixture fixture;
    return fixture;
}

// ||weights - those of the other checkpoint|| / ||those||
inline double weights_error(const std::string& checkpoint, const std::string& other) {
    const Safetensors found(checkpoint + "/model.safetensors"), expected(other + "/model.safetensors");
    double difference = 0, norm = 0;
    for (const auto& [name, tensor] : expected.header.items()) {
        if (name == "__metadata__") continue;
        const std::vector<float> x = expected.values(name), y = found.values(name);
        REQUIRE(x.size() == y.size());
        for (size_t i = 0; i < x.size(); i++)
            difference += std::pow((double)x[i] - y[i], 2), norm += (double)x[i] * x[i];
    }
    return std::sqrt(difference / norm);
}

// Compares the losses and norms of two runs. The tolerance is relative.
inline void check_metrics(const std::string& out, const std::string& other, double tolerance) {
    const std::vector<Json> found = timeless_metrics(out), expected = timeless_metrics(other);
    REQUIRE(found.size() == expected.size());
    for (size_t i = 0; i < found.size(); i++)
        for (const std::string key : {"loss", "val_loss", "grad_norm"})
            if (expected[i].contains(key)) {
                CAPTURE(i);
                CAPTURE(key);
                const double is = found[i].at(key), should_be = expected[i].at(key);
                CHECK(std::abs(is - should_be) < tolerance * should_be);
            }
}

// Compares the log, and the last checkpoint's weights, with those of one rank.
inline void check_like_one(const std::string& out) {
    check_metrics(out, fixture().one, 1e-5);
    CHECK(weights_error(out + kLast, fixture().one + kLast) < 1e-5);
}

}  // namespace ranks_test
