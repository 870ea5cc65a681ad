// What the environment says about this process: which rank it is, of how many, and where all ranks meet.
//
// The first of these that is there decides:
// 1. RANK and WORLD_SIZE, of torchrun or set by hand, with LOCAL_RANK, MASTER_ADDR and MASTER_PORT. If
//    torchrun has not set them (no TORCHELASTIC_RUN_ID), they must agree with what 2 to 4 say.
// 2. OMPI_COMM_WORLD_RANK and _SIZE, of OpenMPI's mpirun. It starts helpers with srun, so Slurm's variables
//    may be those of a helper.
// 3. SLURM_STEP_NUM_TASKS and SLURM_PROCID, of srun. PMI_RANK or PMIX_RANK of its plugins must agree.
// 4. PMI_RANK and PMI_SIZE, of the mpiexec of MPICH or Intel MPI.
// Otherwise the process is alone.
//
// A batch script and an interactive allocation of Slurm have SLURM_NTASKS and SLURM_PROCID = 0 too, although
// they are one process. Only srun sets SLURM_STEP_NUM_TASKS. A shell of `srun --ntasks 4 --pty bash` has it
// as well; but that shell has a terminal as its stdin, and a task of srun without --pty never has one.
//
// MASTER_ADDR and MASTER_PORT count for every launcher. An empty variable counts as one that is not set.
#pragma once
#include <charconv>
#include <climits>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "llmc/error.h"

using Environment = std::map<std::string, std::string>;

inline Environment environment_of(char** variables /*ends with nullptr*/) {
    Environment environment;
    for (; *variables; variables++) {
        const std::string_view variable = *variables;
        const size_t equals = variable.find('=');
        if (equals != variable.npos)
            environment.emplace(variable.substr(0, equals), variable.substr(equals + 1));
    }
    return environment;
}

struct Launch {
    std::string launcher = "none";  // "torchrun", "RANK and WORLD_SIZE", "mpirun", "srun" or "mpiexec"
    int rank = 0, ranks = 1;
    int local_rank = 0, local_ranks = 1;  // on this machine; local_ranks is 0 if the environment does not say
    std::string master;                   // the host of rank 0; empty if the environment does not say
    int port = 0;                         // where rank 0 listens
    std::string run_id;  // all ranks of one start have the same; empty if the environment does not say

    // A line for the start, such as "rank 3 of 8, started by srun, local rank 1 of 2, meets at node01:12345".
    std::string text() const {
        std::string text =
            str("rank ", rank, " of ", ranks, ", started by ", launcher, ", local rank ", local_rank);
        if (local_ranks > 0) text += str(" of ", local_ranks);
        if (!master.empty()) text += str(", meets at ", master, ":", port);
        return text;
    }
};

namespace launch_detail {

class Reader {
  public:
    explicit Reader(const Environment& environment) : environment(environment) {}

    // The value of a variable; empty if it is not set.
    std::string text(const std::string& name) const {
        const auto found = environment.find(name);
        return found == environment.end() ? "" : found->second;
    }
    bool has(const std::string& name) const { return !text(name).empty(); }

    // The value of a variable that must be set, an integer from low to high. `why` says what needs it.
    int integer(const std::string& name, int low, int high, const std::string& why) const {
        const std::string value = text(name);
        if (value.empty()) fail(name, " is not set: expected an integer, because ", why);
        int number = 0;
        const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
        if (error != std::errc() || end != value.data() + value.size() || number < low || number > high)
            fail(name, " is ", shown(value), ": expected an integer from ", low, " to ", high);
        return number;
    }
    // The same if it is set.
    std::optional<int> optional_integer(const std::string& name, int low, int high) const {
        if (!has(name)) return {};
        return integer(name, low, high, "");
    }

    // Refuses two variables that say different things about the same number.
    void require_same(const std::string& name, int value, const std::string& other, int other_value) const {
        if (value != other_value)
            fail(name, " is ", value, ", but ", other, " is ", other_value,
                 ": expected the same; unset the variables of the launcher that is not meant");
    }

  private:
    const Environment& environment;
};

// The numbers of one launcher, and the names of the variables that they are from.
struct Numbers {
    std::string rank_name, ranks_name;
    int rank, ranks;
};

inline Numbers read_numbers(const Reader& env, const std::string& rank_name, const std::string& ranks_name) {
    const int ranks = env.integer(ranks_name, 1, INT_MAX, rank_name + " is set");
    const int rank = env.integer(rank_name, 0, INT_MAX, ranks_name + " is set");
    if (rank >= ranks)
        fail(rank_name, " is ", rank, ", but ", ranks_name, " is ", ranks,
             ": expected a rank below the number of ranks");
    return {rank_name, ranks_name, rank, ranks};
}

// Reads the place on this machine. A variable that is not set leaves local_ranks unknown.
inline void read_local(const Reader& env, const std::string& rank_name, const std::string& ranks_name,
                       const std::string& why, Launch& launch) {
    launch.local_rank = env.integer(rank_name, 0, INT_MAX, why);
    launch.local_ranks = env.optional_integer(ranks_name, 1, INT_MAX).value_or(0);
    if (launch.local_ranks > 0 && launch.local_rank >= launch.local_ranks)
        fail(rank_name, " is ", launch.local_rank, ", but ", ranks_name, " is ", launch.local_ranks,
             ": expected a rank below the number of ranks");
    if (launch.local_ranks > launch.ranks)
        fail(ranks_name, " is ", launch.local_ranks, ", but there are ", launch.ranks,
             " ranks in all: expected at most as many");
}

// The first host of Slurm's list, such as node01 of "node[01-03,7],other" and rack1n3 of "rack[1-2]n[3,5]".
inline std::string first_host(const std::string& name, const std::string& list) {
    auto bad = [&]() {
        fail(name, " is ", shown(list), ": expected a list of hosts like node[01-03,7],other");
    };
    std::string host;
    for (size_t at = 0; at < list.size() && list[at] != ','; at++) {
        if (list[at] == ']') bad();
        if (list[at] != '[') {
            host += list[at];
            continue;
        }
        const size_t close = list.find(']', at);
        if (close == list.npos) bad();
        const std::string number = list.substr(at + 1, list.find_first_of(",-]", at) - at - 1);
        if (number.empty() || number.find_first_not_of("0123456789") != number.npos) bad();
        host += number;
        at = close;
    }
    if (host.empty()) bad();
    return host;
}

// How many tasks Slurm's list has on a node: "2(x3),1" is 2 on nodes 0 to 2, and 1 on node 3.
inline int tasks_on_node(const std::string& name, const std::string& list, int node) {
    auto bad = [&]() {
        fail(name, " is ", shown(list), ": expected tasks for each node like 4(x2),3, and node ", node,
             " among them");
    };
    const char *at = list.data(), *const end = at + list.size();
    for (int nodes = 0;;) {
        int tasks = 0, times = 1;
        auto number = std::from_chars(at, end, tasks);
        if (number.ec != std::errc() || tasks < 1) bad();
        at = number.ptr;
        if (end - at >= 2 && at[0] == '(' && at[1] == 'x') {
            number = std::from_chars(at + 2, end, times);
            if (number.ec != std::errc() || times < 1 || number.ptr == end || *number.ptr != ')') bad();
            at = number.ptr + 1;
        }
        if (node - nodes < times) return tasks;
        nodes += times;
        if (at == end || *at++ != ',') bad();
    }
}

// A port for a run that names none, below those that Linux gives to outgoing connections.
inline int port_of(const std::string& run_id) {
    uint32_t hash = 2166136261u;  // FNV-1a
    for (const char c : run_id) hash = (hash ^ (unsigned char)c) * 16777619u;
    return 10000 + (int)(hash % 20000);
}

}  // namespace launch_detail

// `terminal` says whether stdin is a terminal.
inline Launch launch_from(const Environment& environment, bool terminal) {
    using namespace launch_detail;
    const Reader env(environment);
    Launch launch;
    auto take = [&](const char* launcher, const Numbers& numbers) {
        launch.launcher = launcher;
        launch.rank = numbers.rank, launch.ranks = numbers.ranks;
    };

    // What the process managers below torchrun say.
    std::optional<Numbers> below;
    const bool pmi = env.has("PMI_RANK") || env.has("PMI_SIZE");
    if (env.has("OMPI_COMM_WORLD_RANK") || env.has("OMPI_COMM_WORLD_SIZE")) {
        below = read_numbers(env, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE");
        take("mpirun", *below);
        read_local(env, "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
                   "OMPI_COMM_WORLD_RANK is set", launch);
        launch.run_id = env.text("PMIX_NAMESPACE");
    } else if (env.has("SLURM_STEP_NUM_TASKS")) {
        if (!terminal) {
            below = read_numbers(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS");
            take("srun", *below);
            for (const char* name : {"PMIX_RANK", "PMI_RANK"})
                if (const auto rank = env.optional_integer(name, 0, INT_MAX))
                    env.require_same(name, *rank, "SLURM_PROCID", below->rank);
            if (const auto ranks = env.optional_integer("PMI_SIZE", 1, INT_MAX))
                env.require_same("PMI_SIZE", *ranks, "SLURM_STEP_NUM_TASKS", below->ranks);
            read_local(env, "SLURM_LOCALID", "", "SLURM_PROCID is set", launch);
            const std::string tasks = env.text("SLURM_STEP_TASKS_PER_NODE");
            if (!tasks.empty())
                launch.local_ranks =
                    tasks_on_node("SLURM_STEP_TASKS_PER_NODE", tasks,
                                  env.integer("SLURM_NODEID", 0, INT_MAX, "SLURM_PROCID is set"));
            launch.run_id = str("slurm ", env.text("SLURM_JOB_ID"), ".", env.text("SLURM_STEP_ID"), " start ",
                                env.optional_integer("SLURM_RESTART_COUNT", 0, INT_MAX).value_or(0));
            for (const char* name : {"SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"})
                if (launch.master.empty() && env.has(name)) launch.master = first_host(name, env.text(name));
        }
    } else if (pmi) {
        below = read_numbers(env, "PMI_RANK", "PMI_SIZE");
        take("mpiexec", *below);
        // MPICH and Intel MPI set both. Another mpiexec may not, and then every rank is its machine's first.
        if (env.has("MPI_LOCALRANKID"))
            read_local(env, "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "", launch);
        else
            launch.local_ranks = 0;
    } else if (env.has("PMIX_RANK") && !env.has("RANK")) {
        fail(
            "PMIX_RANK is set, but the number of ranks is not: expected OMPI_COMM_WORLD_SIZE (from mpirun) "
            "or "
            "SLURM_STEP_NUM_TASKS (from srun)");
    }

    if (env.has("RANK") || env.has("WORLD_SIZE")) {
        const Numbers numbers = read_numbers(env, "RANK", "WORLD_SIZE");
        const bool torchrun = env.has("TORCHELASTIC_RUN_ID");
        if (!torchrun && below) {
            env.require_same("RANK", numbers.rank, below->rank_name, below->rank);
            env.require_same("WORLD_SIZE", numbers.ranks, below->ranks_name, below->ranks);
        }
        launch = Launch();
        take(torchrun ? "torchrun" : "RANK and WORLD_SIZE", numbers);
        if (numbers.ranks > 1) {
            read_local(env, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK is set", launch);
            if (!env.has("MASTER_ADDR"))
                fail(
                    "MASTER_ADDR is not set: expected the name or the address of rank 0's machine, because "
                    "RANK is set");
            env.integer("MASTER_PORT", 1, 65535, "RANK is set");
        }
        if (torchrun)
            launch.run_id = str(env.text("TORCHELASTIC_RUN_ID"), " start ",
                                env.optional_integer("TORCHELASTIC_RESTART_COUNT", 0, INT_MAX).value_or(0));
    }

    if (launch.ranks == 1) return launch;
    // All ranks are on this machine, so its loopback leads to rank 0.
    if (launch.master.empty() && launch.local_ranks == launch.ranks) launch.master = "localhost";
    if (env.has("MASTER_ADDR")) launch.master = env.text("MASTER_ADDR");
    launch.port = env.optional_integer("MASTER_PORT", 1, 65535).value_or(port_of(launch.run_id));
    // Here torchrun itself listens at MASTER_PORT as long as the ranks run.
    if (launch.launcher == "torchrun" && env.text("TORCHELASTIC_USE_AGENT_STORE") == "True")
        launch.port += launch.port < 65535 ? 1 : -1;
    return launch;
}

// Ends a program that cannot be one of several ranks. Only rank 0 says why, because all others say the same.
[[noreturn]] inline void refuse_ranks(const Launch& launch, const std::string& why) {
    if (launch.rank > 0) throw Error(kExitFailure, "");
    fail(launch.launcher, " has started ", launch.ranks, " ranks, but ", why);
}
