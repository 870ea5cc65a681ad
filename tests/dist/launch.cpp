// What the environments of the launchers mean. They are those that the launchers really make, shortened to
// the variables that count.
#include "llmc/launch.h"

#include <doctest/doctest.h>

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "tests/helpers.h"

namespace {

const Environment kTorchrun = {{"RANK", "5"},
                               {"WORLD_SIZE", "8"},
                               {"LOCAL_RANK", "1"},
                               {"LOCAL_WORLD_SIZE", "4"},
                               {"MASTER_ADDR", "node01"},
                               {"MASTER_PORT", "29500"},
                               {"TORCHELASTIC_RUN_ID", "none"},
                               {"TORCHELASTIC_RESTART_COUNT", "2"},
                               {"TORCHELASTIC_USE_AGENT_STORE", "True"}};
const Environment kMpirun = {{"OMPI_COMM_WORLD_RANK", "3"},
                             {"OMPI_COMM_WORLD_SIZE", "4"},
                             {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                             {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                             {"PMIX_RANK", "3"},
                             {"PMIX_NAMESPACE", "2415853569"}};
const Environment kSrun = {{"SLURM_JOB_ID", "77"},
                           {"SLURM_STEP_ID", "0"},
                           {"SLURM_PROCID", "6"},
                           {"SLURM_LOCALID", "1"},
                           {"SLURM_NODEID", "3"},
                           {"SLURM_NTASKS", "7"},
                           {"SLURM_STEP_NUM_TASKS", "7"},
                           {"SLURM_STEP_TASKS_PER_NODE", "1,2(x3)"},
                           {"SLURM_STEP_NODELIST", "gpu[07-09,12]"},
                           {"SLURM_JOB_NODELIST", "gpu[01-12]"}};
// A script of `sbatch --ntasks 8`, and a shell of salloc.
const Environment kBatchScript = {{"SLURM_JOB_ID", "77"},
                                  {"SLURM_PROCID", "0"},
                                  {"SLURM_LOCALID", "0"},
                                  {"SLURM_NODEID", "0"},
                                  {"SLURM_NTASKS", "8"},
                                  {"SLURM_NPROCS", "8"},
                                  {"SLURM_NNODES", "2"},
                                  {"SLURM_JOB_NODELIST", "gpu[01-02]"},
                                  {"SLURM_TASKS_PER_NODE", "4(x2)"}};

// The environment with changes, where an empty value removes a variable.
Environment with(Environment environment, const Environment& changes) {
    for (const auto& [name, value] : changes) environment[name] = value;
    return environment;
}

Launch launched(const Environment& environment, const Environment& changes = {}) {
    return launch_from(with(environment, changes), false);
}

void check_place(const Launch& launch, const std::string& launcher, int rank, int ranks, int local_rank,
                 int local_ranks) {
    CHECK(launch.launcher == launcher);
    CHECK(launch.rank == rank);
    CHECK(launch.ranks == ranks);
    CHECK(launch.local_rank == local_rank);
    CHECK(launch.local_ranks == local_ranks);
}

void check_meeting(const Launch& launch, const std::string& master, int port, const std::string& run_id) {
    CHECK(launch.master == master);
    CHECK(launch.port == port);
    CHECK(launch.run_id == run_id);
}

void check_alone(const Launch& launch) {
    check_place(launch, "none", 0, 1, 0, 1);
    check_meeting(launch, "", 0, "");
}

void check_refused(const Environment& environment, const Environment& changes,
                   std::initializer_list<std::string> parts) {
    check_error([&] { launched(environment, changes); }, parts);
}

}  // namespace

TEST_CASE("launch: without a launcher the process is alone") {
    check_alone(launched({}));
    check_alone(launched({{"MASTER_ADDR", "node01"}, {"MASTER_PORT", "1234"}, {"LOCAL_RANK", "3"}}));
}

TEST_CASE("launch: torchrun") {
    const Launch launch = launched(kTorchrun);
    check_place(launch, "torchrun", 5, 8, 1, 4);
    check_meeting(launch, "node01", 29501, "none start 2");  // torchrun itself has port 29500
    CHECK(launch.text() == "rank 5 of 8, started by torchrun, local rank 1 of 4, meets at node01:29501");
    check_meeting(launched(kTorchrun, {{"TORCHELASTIC_USE_AGENT_STORE", "False"}}), "node01", 29500,
                  "none start 2");
    CHECK(launched(kTorchrun, {{"MASTER_PORT", "65535"}}).port == 65534);
    // One torchrun on each node, started by srun or mpirun: theirs are the numbers of the outer processes.
    for (const Environment& outer : {kSrun, kMpirun}) {
        const Launch inner = launched(with(outer, kTorchrun));
        check_place(inner, "torchrun", 5, 8, 1, 4);
        check_meeting(inner, "node01", 29501, "none start 2");
    }
}

TEST_CASE("launch: torchrun's variables set by hand") {
    const Environment by_hand = {{"RANK", "0"},
                                 {"WORLD_SIZE", "2"},
                                 {"LOCAL_RANK", "0"},
                                 {"MASTER_ADDR", "::1"},
                                 {"MASTER_PORT", "999"}};
    check_place(launched(by_hand), "RANK and WORLD_SIZE", 0, 2, 0, 0);
    check_meeting(launched(by_hand), "::1", 999, "");
    check_place(launched({{"RANK", "0"}, {"WORLD_SIZE", "1"}}), "RANK and WORLD_SIZE", 0, 1, 0, 1);
    // They must agree with the launcher.
    check_place(launched(kMpirun, with(by_hand, {{"RANK", "3"}, {"WORLD_SIZE", "4"}})), "RANK and WORLD_SIZE",
                3, 4, 0, 0);
    check_refused(kMpirun, with(by_hand, {{"WORLD_SIZE", "4"}}),
                  {"RANK is 0, but OMPI_COMM_WORLD_RANK is 3", "expected the same"});
    check_refused(kMpirun, with(by_hand, {{"RANK", "3"}, {"WORLD_SIZE", "8"}}),
                  {"WORLD_SIZE is 8, but OMPI_COMM_WORLD_SIZE is 4"});
    check_refused(kSrun, with(by_hand, {{"WORLD_SIZE", "7"}}), {"RANK is 0, but SLURM_PROCID is 6"});
    check_place(launched(kBatchScript, by_hand), "RANK and WORLD_SIZE", 0, 2, 0, 0);
}

TEST_CASE("launch: OpenMPI's mpirun") {
    const Launch launch = launched(kMpirun);
    check_place(launch, "mpirun", 3, 4, 1, 2);
    CHECK(launch.master == "");  // it does not say where rank 0 is
    CHECK(launch.run_id == "2415853569");
    check_meeting(launched(kMpirun, {{"MASTER_ADDR", "10.0.0.1"}, {"MASTER_PORT", "1234"}}), "10.0.0.1", 1234,
                  "2415853569");
    // All ranks on this machine meet there, at a port that another run does not have.
    const Launch local = launched(kMpirun, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}});
    CHECK(local.master == "localhost");
    CHECK(local.port >= 10000);
    CHECK(local.port < 30000);
    CHECK(local.port !=
          launched(kMpirun, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}, {"PMIX_NAMESPACE", "2415853570"}}).port);
    // mpirun starts a helper on each node with srun, and its ranks inherit the helper's variables.
    check_place(launched(with(kSrun, kMpirun)), "mpirun", 3, 4, 1, 2);
}

TEST_CASE("launch: srun") {
    const Launch launch = launched(kSrun);
    check_place(launch, "srun", 6, 7, 1, 2);
    CHECK(launch.master == "gpu07");
    CHECK(launch.run_id == "slurm 77.0 start 0");
    CHECK(launched(kSrun, {{"SLURM_STEP_NODELIST", ""}}).master == "gpu01");
    CHECK(launched(kSrun, {{"SLURM_RESTART_COUNT", "1"}}).run_id == "slurm 77.0 start 1");
    check_meeting(launched(kSrun, {{"MASTER_ADDR", "fe80::1"}, {"MASTER_PORT", "1"}}), "fe80::1", 1,
                  "slurm 77.0 start 0");
    // PMIx and PMI2 of Slurm say the same.
    check_place(launched(kSrun, {{"PMIX_RANK", "6"}, {"PMIX_NAMESPACE", "slurm.pmix.77.0"}}), "srun", 6, 7, 1,
                2);
    check_place(launched(kSrun, {{"PMI_RANK", "6"}, {"PMI_SIZE", "7"}}), "srun", 6, 7, 1, 2);
    check_refused(kSrun, {{"PMIX_RANK", "5"}}, {"PMIX_RANK is 5, but SLURM_PROCID is 6"});
    check_refused(kSrun, {{"PMI_RANK", "6"}, {"PMI_SIZE", "6"}},
                  {"PMI_SIZE is 6, but SLURM_STEP_NUM_TASKS is 7"});
}

TEST_CASE("launch: Slurm without srun is one process") {
    check_alone(launched(kBatchScript));
    check_alone(launch_from(kBatchScript, true));
    // A shell of `srun --pty bash`, with the variables of Slurm's PMI plugins, too.
    const Environment shell = with(kSrun, {{"SLURM_PROCID", "0"}, {"PMI_RANK", "0"}, {"PMIX_RANK", "0"}});
    check_alone(launch_from(shell, true));
    CHECK(launch_from(shell, false).ranks == 7);
    const Launch one =
        launched({{"SLURM_STEP_NUM_TASKS", "1"}, {"SLURM_PROCID", "0"}, {"SLURM_LOCALID", "0"}});
    CHECK(one.ranks == 1);
    CHECK(one.master == "");
}

TEST_CASE("launch: the mpiexec of MPICH") {
    const Environment mpiexec = {{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}};
    check_place(launched(mpiexec), "mpiexec", 1, 2, 0, 0);
    check_place(launched(mpiexec, {{"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}}), "mpiexec", 1, 2, 1,
                2);
    check_refused({{"PMIX_RANK", "0"}}, {},
                  {"PMIX_RANK is set", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"});
}

TEST_CASE("launch: a variable that is missing, malformed or contradictory is named") {
    for (const char* name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"})
        check_refused(kTorchrun, {{name, ""}}, {std::string(name) + " is not set: expected", "because"});
    for (const char* name : {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"})
        check_refused(kMpirun, {{name, ""}}, {std::string(name) + " is not set: expected an integer"});
    for (const char* name : {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"})
        check_refused(kSrun, {{name, ""}}, {std::string(name) + " is not set: expected an integer"});
    check_refused({{"PMI_SIZE", "2"}}, {}, {"PMI_RANK is not set"});

    for (const char* value : {"x", "-1", "1.5", "0x1", " 1", "1 ", "99999999999", "\n"}) {
        for (const char* name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT",
                                 "TORCHELASTIC_RESTART_COUNT"})
            check_refused(kTorchrun, {{name, value}},
                          {std::string(name) + " is \"", "expected an integer from"});
        check_refused(kSrun, {{"SLURM_PROCID", value}}, {"SLURM_PROCID is \"", "expected an integer from 0"});
    }
    check_refused(kTorchrun, {{"WORLD_SIZE", "0"}}, {"WORLD_SIZE is \"0\"", "from 1"});
    check_refused(kTorchrun, {{"MASTER_PORT", "65536"}}, {"MASTER_PORT is \"65536\"", "from 1 to 65535"});

    check_refused(kTorchrun, {{"RANK", "8"}}, {"RANK is 8, but WORLD_SIZE is 8"});
    check_refused(kTorchrun, {{"LOCAL_RANK", "4"}}, {"LOCAL_RANK is 4, but LOCAL_WORLD_SIZE is 4"});
    check_refused(kTorchrun, {{"LOCAL_WORLD_SIZE", "9"}}, {"LOCAL_WORLD_SIZE is 9, but there are 8 ranks"});
}

TEST_CASE("launch: Slurm's lists of hosts and of tasks") {
    using launch_detail::first_host;
    using launch_detail::tasks_on_node;
    const std::pair<const char*, const char*> lists[] = {{"node1", "node1"},
                                                         {"node[01-03,7],other", "node01"},
                                                         {"node[7,01-03]", "node7"},
                                                         {"a,b[1-2]", "a"},
                                                         {"rack[1-2]n[3,5]-ib", "rack1n3-ib"},
                                                         {"n[001].cluster.org,m", "n001.cluster.org"}};
    for (const auto& [list, first] : lists) CHECK(first_host("LIST", list) == first);
    for (const char* bad : {"node[", "node[1", "node[]", "node[-3]", "node[a-b]", "node]1", ",node", ""})
        check_error([&] { first_host("LIST", bad); }, {"LIST is \"", "expected a list of hosts"});

    for (int node = 0; node < 6; node++)
        CHECK(tasks_on_node("LIST", "4(x2),3,12(x3)", node) == (node < 2 ? 4 : node < 3 ? 3 : 12));
    for (const char* bad :
         {"", "x", "0", "4(x", "4(x2", "4(x0)", "4(2)", "4(x1)", "4;5", "4,", "99999999999"})
        check_error([&] { tasks_on_node("LIST", bad, 1); }, {"LIST is \"", "expected tasks for each node"});
}

TEST_CASE("launch: only rank 0 says why a program cannot be one of several ranks") {
    Launch launch;
    launch.launcher = "mpirun", launch.ranks = 2;
    check_error([&] { refuse_ranks(launch, "it has no MPI"); },
                {"mpirun has started 2 ranks, but it has no MPI"});
    launch.rank = 1;
    CHECK(error_of([&] { refuse_ranks(launch, "it has no MPI"); }) == "");
    CHECK_THROWS_AS(refuse_ranks(launch, ""), Error);
}

TEST_CASE("launch: the environment as a map") {
    std::string variables[] = {"RANK=1", "EMPTY=", "EQUALS=a=b", "odd", "RANK=2"};
    std::vector<char*> pointers;
    for (std::string& variable : variables) pointers.push_back(variable.data());
    pointers.push_back(nullptr);
    CHECK(environment_of(pointers.data()) == Environment{{"RANK", "1"}, {"EMPTY", ""}, {"EQUALS", "a=b"}});
}
