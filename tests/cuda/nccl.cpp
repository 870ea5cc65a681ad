// The trainer's communicator for several GPUs (llmc/cuda/nccl_communicator.h) with its model, on dev/ptxsim:
// collectives of parts, that reductions overlap the backward pass, and that the simulator finds faults
// between the two streams. Every rank is a process, which runs this program.
#if __has_include(<nccl.h>)
#include "llmc/cuda/nccl_communicator.h"

#include <fcntl.h>
#include <sys/wait.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>

#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"
#include "dev/ptxsim/stream_work.h"
#include "llmc/data_parallel.h"
#include "llmc/model.h"
#include "llmc/rendezvous.h"
#include "tests/helpers.h"
#include "tests/reference.h"

namespace gpu {
Backend backend();  // train_gpt.cu
}

namespace {

int number(const char* name) {
    const char* text = std::getenv(name);
    return text ? std::atoi(text) : 0;
}

// The trainer's communicator, which can omit to wait for the model.
class Nccl : public gpu::Nccl {
  public:
    using gpu::Nccl::Nccl;
    bool follows = true;

  protected:
    void follow_model() override {
        if (follows) gpu::Nccl::follow_model();
    }
};

std::unique_ptr<Nccl> connect() {
    Launch launch;
    launch.launcher = "a test";
    launch.rank = number("NCCL_TEST_RANK"), launch.ranks = number("NCCL_TEST_RANKS");
    launch.master = "localhost", launch.port = number("NCCL_TEST_PORT");
    Rendezvous meeting(launch, "a test", {.timeout = 20});
    ncclUniqueId id;
    const std::string bytes = meeting.broadcast([&] {
        ncclGetUniqueId(&id);
        return std::string(id.internal, sizeof id.internal);
    });
    std::copy(bytes.begin(), bytes.end(), id.internal);
    auto comm =
        std::make_unique<Nccl>(launch.rank, launch.ranks, Links(launch.rank, meeting.take_connections(), 20));
    comm->start(id);
    return comm;
}

std::string reports() {
    std::string all;
    for (const ptxsim::Report& report : ptxsim::take_reports()) all += report.text + "\n";
    return all;
}

// ------------------------------------------------------------------------------------- collectives of parts

using Parts = std::vector<Slice>;

// x (n) of a rank, with numbers that no type rounds.
float element(int rank, size_t i) {
    return (float)((i * 7 + rank * 3) % 5 + 1);
}

template <class T>
void check_parts(Nccl& comm, const Parts& parts) {
    const size_t n = parts.back().end;
    const Slice own = parts[comm.rank];
    T* x;
    gpu::check(cudaMalloc(&x, n * sizeof(T)));
    std::vector<T> host(n);
    auto fill = [&](Slice slice) {
        for (size_t i = slice.begin; i < slice.end; i++) host[i] = (T)element(comm.rank, i);
        gpu::check(cudaMemcpy(x, host.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    };
    auto check = [&](const char* what, Slice slice, auto expected) {
        CAPTURE(what);
        comm.join();
        gpu::wait_for_device();
        gpu::check(cudaMemcpy(host.data(), x, n * sizeof(T), cudaMemcpyDeviceToHost));
        for (size_t i = slice.begin; i < slice.end; i++) CHECK((float)host[i] == expected(i));
    };
    auto sum = [&](size_t i) {
        float total = 0;
        for (int r = 0; r < comm.ranks; r++) total += element(r, i);
        return total;
    };
    fill({0, n});
    comm.reduce_scatter({x, n}, parts);
    check("reduce_scatter", own, sum);
    fill({0, n});
    comm.all_reduce({x, n});
    check("all_reduce", {0, n}, sum);
    std::fill(host.begin(), host.end(), T(0));
    fill(own);
    comm.all_gather({x, n}, parts);
    check("all_gather", {0, n}, [&](size_t i) {
        int owner = 0;
        while (i >= parts[owner].end) owner++;
        return element(owner, i);
    });
    gpu::check(cudaFree(x));
}

void parts() {
    auto comm = connect();
    REQUIRE(comm->ranks == 3);
    for (const Parts& cut :
         {Parts{{0, 5}, {5, 10}, {10, 15}}, Parts{{0, 5}, {5, 10}, {10, 17}},
          Parts{{0, 5}, {5, 10}, {10, 12}}, Parts{{0, 0}, {0, 7}, {7, 9}}, Parts{{0, 0}, {0, 0}, {0, 4}}}) {
        check_parts<float>(*comm, cut);
        check_parts<double>(*comm, cut);
    }
    CHECK(comm->sum(comm->rank + 0.5) == 4.5);
    CHECK(comm->any(comm->rank == 1));
    CHECK(!comm->any(false));
    CHECK((comm->gather(std::string(comm->rank, 'x')) == std::vector<std::string>{"", "x", "xx"}));
    CHECK(comm->take_exposed_ms() > 0);
    CHECK(comm->take_exposed_ms() == 0);
    comm.reset();
    CHECK(reports() == "");
}

// ------------------------------------------------------------------------------------------- the two streams

enum class Planted {
    nothing,
    serial,        // no fault, but each collective waits for the one before it
    wrong_stream,  // collectives do not wait for the model (DeepSpeed #7898)
    overwritten,   // the next pass writes gradients that are being sent (#5545)
    read_early,    // the norm does not wait for the sums
    other_buffer,  // a block waits for the buffer of its neighbour (#7805)
    stale_weights  // a forward pass does not wait for the weights of other ranks
};

constexpr int B = 2, T = 8;

// Steps of the trainer. Level 2 has two passes in a step.
void train(Nccl& comm, int level, int steps, Planted fault) {
    GPTConfig config;
    config.layers = 3, config.heads = 2, config.channels = 16, config.context = T, config.vocab_size = 50;
    ModelOptions options{.purpose = Purpose::training, .batch = B, .seq = T};
    options.sharding = {level, comm.rank, comm.ranks};
    auto model = gpu::backend().make_model(config, options);
    auto optimizer = model->make_optimizer(AdamW());
    DataParallel parallel(comm, *model, *optimizer);
    model->allocate();
    optimizer->allocate();
    initialize_weights(*model, 7);
    const std::vector<int> inputs = reference::random_ints(B * T, config.vocab_size, 10 + comm.rank),
                           targets = reference::random_ints(B * T, config.vocab_size, 20);
    auto run = [&](bool first, bool last) {
        const Pass pass = Pass::training(1, first, last);
        BucketHooks hooks = parallel.hooks(pass);
        if (fault == Planted::other_buffer)
            hooks.before_backward = [before = hooks.before_backward](int bucket) { before(bucket ^ 1); };
        if (fault == Planted::stale_weights) hooks.before_forward = {};
        if (fault == Planted::serial)
            hooks.ready = [&comm, ready = hooks.ready](int bucket) {
                ready(bucket);
                comm.join();
            };
        model->run({inputs.data(), targets.data(), B, T}, pass, hooks);
    };
    comm.follows = fault != Planted::wrong_stream;
    for (int step = 1; step <= steps; step++) {
        if (level > 1) run(true, false);
        run(level < 2, true);
        if (fault == Planted::overwritten) run(true, true);
        if (fault == Planted::read_early) {
            model->clip_gradients(1, comm);
            optimizer->step(model->table.all(), 1e-3, step);
        }
        parallel.step(1, 1e-3, step);
        model->clipped_norm();
    }
    parallel.settle();
    comm.follows = true;
    gpu::wait_for_device();
}

// A buffer that is freed while it is in flight (DeepSpeed #7965), or after that.
void free_buffer(Nccl& comm, bool waits) {
    float* x;
    gpu::check(cudaMalloc(&x, 1024));
    gpu::check(cudaMemset(x, 0, 1024));
    comm.all_reduce({x, 256});
    if (waits) {
        comm.join();
        gpu::wait_for_device();
    }
    gpu::check(cudaFree(x));
    comm.join();
    gpu::wait_for_device();
}

void streams() {
    const struct {
        Planted fault;
        int level;
        bool seen_eager;            // lazy streams show every one
        std::string first, second;  // in one of the reports
    } all[] = {
        {Planted::wrong_stream, 0, false, "ptxsim: race", "ncclAllReduce"},
        {Planted::overwritten, 0, true, "ptxsim: race", "ncclAllReduce"},
        {Planted::read_early, 0, true, "sum_of_squares", "ncclAllReduce"},
        {Planted::wrong_stream, 2, false, "ptxsim: race", "nccl"},
        {Planted::other_buffer, 2, true, "unordered-copy: cublasLtMatmul", "ncclReduceScatter"},
        {Planted::stale_weights, 1, false, "ptxsim: race", "nccl"},
    };
    auto comm = connect();
    for (bool lazy : {false, true}) {
        CAPTURE(lazy);
        ptxsim::options().lazy = lazy;
        for (int level : {0, 1, 2})
            for (Planted fault : {Planted::nothing, Planted::serial}) {
                CAPTURE(level);
                ptxsim::take_overlaps();
                train(*comm, level, level > 0 ? 2 : 1, fault);
                CHECK(reports() == "");
                // While the gradients of the last block are sent, those of the other blocks are computed,
                // which are more than 10 kernels (DeepSpeed #7804).
                const auto overlaps = ptxsim::take_overlaps();
                REQUIRE(overlaps.size() >= 5);  // three blocks, the embeddings and the vectors
                CAPTURE(overlaps[0].what);
                CHECK(overlaps[0].what.find(level > 0 ? "ncclReduce" : "ncclAllReduce") != std::string::npos);
                if (fault == Planted::nothing)
                    CHECK(overlaps[0].calls > 10);
                else
                    CHECK(overlaps[0].calls == 0);
            }
        for (const auto& planted : all) {
            CAPTURE((int)planted.fault);
            CAPTURE(planted.level);
            train(*comm, planted.level, 2, planted.fault);
            bool seen = false;
            std::string found;
            for (const ptxsim::Report& report : ptxsim::take_reports()) {
                seen |= report.text.find(planted.first) != std::string::npos &&
                        report.text.find(planted.second) != std::string::npos;
                found += report.text + "\n";
            }
            CAPTURE(found);
            CHECK((seen || !(lazy || planted.seen_eager)));
        }
        free_buffer(*comm, true);
        CHECK(reports() == "");
        free_buffer(*comm, false);
        CHECK(reports().find("cudaFree of cudaMalloc of 1024 bytes that ncclAllReduce") != std::string::npos);
    }
    comm.reset();
    CHECK(reports() == "");
}

// Starts the ranks, waits for them and checks that each has succeeded.
void start(const std::string& scenario, int ranks) {
    static int port = 21000 + getpid() % 9000;
    port++;
    const TempFolder folder;
    std::vector<pid_t> started;
    for (int rank = 0; rank < ranks; rank++) {
        const pid_t pid = fork();
        REQUIRE(pid >= 0);
        if (pid == 0) {
            setenv("NCCL_TEST_RANK", std::to_string(rank).c_str(), 1);
            setenv("NCCL_TEST_RANKS", std::to_string(ranks).c_str(), 1);
            setenv("NCCL_TEST_PORT", std::to_string(port).c_str(), 1);
            setenv("OMP_NUM_THREADS", "1", 1);
            const int out = open((folder / str(rank)).c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
            if (dup2(out, 1) < 0 || dup2(out, 2) < 0) _exit(1);
            execl("/proc/self/exe", "tests", "--no-skip", ("-tc=cuda nccl: a rank: " + scenario).c_str(),
                  (char*)nullptr);
            _exit(1);
        }
        started.push_back(pid);
    }
    for (int rank = 0; rank < ranks; rank++) {
        int status = -1;
        waitpid(started[rank], &status, 0);
        std::ifstream file(folder / str(rank));
        const std::string output((std::istreambuf_iterator<char>(file)), {});
        CHECK_MESSAGE((status == 0 && output.find(" 1 passed") != std::string::npos), "rank ", rank, " of ",
                      scenario, ":\n", output);
    }
}

// Runs a scenario if start() has started this process.
void run_rank(void (*scenario)()) {
    if (!std::getenv("NCCL_TEST_RANK")) return;
    const ptxsim::Options saved = ptxsim::options();
    ptxsim::options().nccl_timeout = 20;
    scenario();
    ptxsim::options() = saved;
}

}  // namespace

TEST_CASE("cuda nccl: a rank: parts" * doctest::skip()) {
    run_rank(parts);
}
TEST_CASE("cuda nccl: a rank: streams" * doctest::skip()) {
    run_rank(streams);
}

TEST_CASE("cuda nccl: collectives of equal and other parts, and what ranks say to each other") {
    start("parts", 3);
}

TEST_CASE("cuda nccl: reductions overlap the backward pass, and faults between the streams are found") {
    start("streams", 2);
}
#endif
