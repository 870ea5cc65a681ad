// ptxsim: NCCL between processes. Each test starts this program once for every rank. A rank runs the scenario
// that the environment names, checks what it gets, and succeeds or not.
#if __has_include(<nccl.h>)
#include <fcntl.h>
#include <nccl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <thread>

#include "dev/ptxsim/stream_work.h"
#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;
using ptxsim::Fault;

#define NCCL_OK(call) CHECK_MESSAGE((call) == ncclSuccess, #call)

namespace {

int number(const char* name) {
    const char* text = std::getenv(name);
    return text ? std::atoi(text) : 0;
}

struct World {
    const int rank = number("NCCL_TEST_RANK"), ranks = number("NCCL_TEST_RANKS");
    cudaStream_t compute, communication;
    ncclComm_t comm = nullptr;

    World() {
        CUDA_OK(cudaStreamCreateWithFlags(&compute, cudaStreamNonBlocking));
        CUDA_OK(cudaStreamCreateWithFlags(&communication, cudaStreamNonBlocking));
    }
    // Every communicator of a scenario has another id.
    ncclUniqueId id(int which) const {
        ncclUniqueId id = {};
        const std::string text = std::getenv("NCCL_TEST_ID") + std::to_string(which);
        for (size_t i = 0; i < text.size(); i++)
            id.internal[i % 16] = (char)(id.internal[i % 16] * 31 + text[i]);
        return id;
    }
    void join(int which = 0) {
        NCCL_OK(ncclCommInitRank(&comm, ranks, id(which), rank));
        REQUIRE(comm);
    }
};

// ------------------------------------------------------------------------------------------- right programs

template <class T>
struct Type;
#define TYPE(T, N)                                \
    template <>                                   \
    struct Type<T> {                              \
        static constexpr ncclDataType_t nccl = N; \
    };
TYPE(float, ncclFloat32)
TYPE(double, ncclFloat64)
TYPE(__half, ncclFloat16)
TYPE(__nv_bfloat16, ncclBfloat16)
TYPE(int8_t, ncclInt8)
TYPE(uint8_t, ncclUint8)
TYPE(int32_t, ncclInt32)
TYPE(uint32_t, ncclUint32)
TYPE(int64_t, ncclInt64)
TYPE(uint64_t, ncclUint64)
#undef TYPE

template <class T>
double wide(T x) {
    if constexpr (sizeof(T) == 2)
        return (double)(float)x;
    else
        return (double)x;
}

// Small numbers, which no type rounds.
double value(int rank, size_t i) {
    return (double)((i * 7 + rank * 3) % 5 + 1);
}

double reduced(int ranks, size_t i, ncclRedOp_t op) {
    double x = value(0, i);
    for (int r = 1; r < ranks; r++) {
        const double y = value(r, i);
        x = op == ncclProd ? x * y : op == ncclMax ? std::max(x, y) : op == ncclMin ? std::min(x, y) : x + y;
    }
    return op == ncclAvg ? x / ranks : x;
}

template <class T>
struct Buffers {
    World& w;
    Device<T> in, out;
    size_t count;  // elements of `out`

    Buffers(World& w, size_t sent, size_t received)
        : w(w), in(values(w.rank, sent)), out(received + 1), count(received) {}
    static std::vector<T> values(int rank, size_t n) {
        std::vector<T> all;
        for (size_t i = 0; i <= n; i++) all.push_back((T)(float)value(rank, i));
        return all;
    }
    // Waits, and compares `out` with expected(i). Nothing after it may have been written.
    template <class F>
    void check(const char* what, F expected) {
        CAPTURE(what);
        CAPTURE(count);
        CAPTURE(w.rank);
        CUDA_OK(cudaStreamSynchronize(w.communication));
        std::vector<T> got(count);
        if (count) CUDA_OK(cudaMemcpy(got.data(), out.get(), count * sizeof(T), cudaMemcpyDeviceToHost));
        size_t wrong = 0;
        for (size_t i = 0; i < count; i++) {
            double e = expected(i);
            if (std::is_integral_v<T>) e = std::floor(e);
            const double bound = e == std::floor(e) && sizeof(T) != 2 ? 1e-6 : sizeof(T) == 2 ? 1e-2 : 1e-6;
            wrong += !(std::fabs(wide(got[i]) - e) <= bound * std::fabs(e));
        }
        CHECK(wrong == 0);
    }
};

template <class T>
void all_collectives(World& w, size_t n) {
    const auto type = Type<T>::nccl;
    const int ranks = w.ranks, last = ranks - 1;
    for (ncclRedOp_t op : {ncclSum, ncclProd, ncclMax, ncclMin, ncclAvg}) {
        auto expected = [&](size_t i) { return reduced(ranks, i, op); };
        Buffers<T> all(w, n, n), one(w, n, w.rank == last ? n : 0), part(w, n * ranks, n);
        NCCL_OK(ncclAllReduce(all.in.get(), all.out.get(), n, type, op, w.comm, w.communication));
        NCCL_OK(ncclReduce(one.in.get(), one.out.get(), n, type, op, last, w.comm, w.communication));
        NCCL_OK(ncclReduceScatter(part.in.get(), part.out.get(), n, type, op, w.comm, w.communication));
        all.check("all-reduce", expected);
        one.check("reduce", expected);
        part.check("reduce-scatter", [&](size_t i) { return expected(w.rank * n + i); });
    }
    Buffers<T> gathered(w, n, n * ranks), sent(w, n, n), ring(w, n, n);
    NCCL_OK(ncclAllGather(gathered.in.get(), gathered.out.get(), n, type, w.comm, w.communication));
    NCCL_OK(ncclBroadcast(sent.in.get(), sent.out.get(), n, type, last, w.comm, w.communication));
    NCCL_OK(ncclGroupStart());
    NCCL_OK(ncclSend(ring.in.get(), n, type, (w.rank + 1) % ranks, w.comm, w.communication));
    NCCL_OK(ncclRecv(ring.out.get(), n, type, (w.rank + last) % ranks, w.comm, w.communication));
    NCCL_OK(ncclGroupEnd());
    gathered.check("all-gather", [&](size_t i) { return value((int)(i / n), i % n); });
    sent.check("broadcast", [&](size_t i) { return value(last, i); });
    ring.check("ring", [&](size_t i) { return value((w.rank + last) % ranks, i); });
}

void in_place_and_groups(World& w) {
    const size_t n = 5;
    const size_t mine = n * w.rank;
    Buffers<float> all(w, 0, n), scattered(w, 0, n * w.ranks), sent(w, 0, n);
    auto fill = [&](Buffers<float>& b) {
        const auto values = Buffers<float>::values(w.rank, b.count);
        CUDA_OK(cudaMemcpy(b.out.get(), values.data(), b.count * 4, cudaMemcpyHostToDevice));
    };
    fill(all), fill(scattered), fill(sent);
    float* x = scattered.out.get();
    NCCL_OK(ncclGroupStart());
    NCCL_OK(ncclAllReduce(all.out.get(), all.out.get(), n, ncclFloat, ncclSum, w.comm, w.communication));
    NCCL_OK(ncclReduceScatter(x, x + mine, n, ncclFloat, ncclSum, w.comm, w.compute));
    NCCL_OK(ncclBcast(sent.out.get(), n, ncclFloat, 0, w.comm, w.communication));
    NCCL_OK(ncclGroupEnd());
    // Both streams wait for all of the group.
    NCCL_OK(ncclAllGather(x + mine, x, n, ncclFloat, w.comm, w.communication));
    all.check("all-reduce in place", [&](size_t i) { return reduced(w.ranks, i, ncclSum); });
    scattered.check("reduce-scatter and all-gather in place",
                    [&](size_t i) { return reduced(w.ranks, i, ncclSum); });
    sent.check("broadcast in place", [&](size_t i) { return value(0, i); });
}

void collectives(World& w) {
    w.join();
    int count = 0, rank = -1, device = -1;
    NCCL_OK(ncclCommCount(w.comm, &count));
    NCCL_OK(ncclCommUserRank(w.comm, &rank));
    NCCL_OK(ncclCommCuDevice(w.comm, &device));
    CHECK(count == w.ranks);
    CHECK(rank == w.rank);
    CHECK(device == 0);
    for (bool lazy : {false, true}) {
        ptxsim::options().lazy = lazy;
        for (size_t n : {0, 1, 1001}) all_collectives<float>(w, n);
        all_collectives<double>(w, 7);
        all_collectives<__half>(w, 7);
        all_collectives<__nv_bfloat16>(w, 7);
        all_collectives<int8_t>(w, 7);
        all_collectives<uint8_t>(w, 7);
        all_collectives<int32_t>(w, 7);
        all_collectives<uint32_t>(w, 7);
        all_collectives<int64_t>(w, 7);
        all_collectives<uint64_t>(w, 7);
        in_place_and_groups(w);
    }
    expect_no_reports();
    // Calls of a group run at the same time, and only some overlaps of the two buffers are calls in place.
    Buffers<float> b(w, 20, 20);
    NCCL_OK(ncclGroupStart());
    NCCL_OK(ncclAllReduce(b.in.get(), b.out.get(), 20, ncclFloat, ncclSum, w.comm, w.communication));
    NCCL_OK(ncclBcast(b.out.get() + 19, 1, ncclFloat, 0, w.comm, w.communication));
    NCCL_OK(ncclGroupEnd());
    NCCL_OK(ncclAllReduce(b.out.get(), b.out.get() + 1, 19, ncclFloat, ncclSum, w.comm, w.communication));
    CUDA_OK(cudaStreamSynchronize(w.communication));
    const auto reports = ptxsim::take_reports();
    REQUIRE(reports.size() == 2);
    CHECK(reports[0].text.find("ncclBroadcast(1 float32, root 0) of the same group uses") !=
          std::string::npos);
    CHECK(reports[1].text.find("the send and the receive buffer overlap") != std::string::npos);
    // More calls than the ranks can have in flight, and more bytes than a page.
    Device<float> x(std::vector<float>(5000, 1));
    for (int i = 0; i < 600; i++)
        NCCL_OK(
            ncclAllReduce(x.get(), x.get(), i % 100 ? 1 : 5000, ncclFloat, ncclMax, w.comm, w.communication));
    CUDA_OK(cudaStreamSynchronize(w.communication));
    NCCL_OK(ncclCommFinalize(w.comm));
    NCCL_OK(ncclCommDestroy(w.comm));
    expect_no_reports();
}

// Each rank waits for its two communicators in another order. They cannot wait for each other, because the
// work of both is in the streams already.
void two_communicators(World& w) {
    w.join();
    World v;
    v.join(1);
    for (bool lazy : {false, true}) {
        ptxsim::options().lazy = lazy;
        Buffers<float> a(w, 10, 10), b(v, 10, 10);
        NCCL_OK(ncclAllReduce(a.in.get(), a.out.get(), 10, ncclFloat, ncclSum, w.comm, w.communication));
        NCCL_OK(ncclAllReduce(b.in.get(), b.out.get(), 10, ncclFloat, ncclSum, v.comm, v.communication));
        auto expected = [&](size_t i) { return reduced(w.ranks, i, ncclSum); };
        if (w.rank) a.check("first", expected);
        b.check("second", expected);
        a.check("first", expected);
    }
    NCCL_OK(ncclCommDestroy(w.comm));
    NCCL_OK(ncclCommDestroy(v.comm));
    expect_no_reports();
}

void not_blocking(World& w) {
    ptxsim::options().lazy = true;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    auto await = [&] {
        for (ncclResult_t state = ncclInProgress; state != ncclSuccess;) {
            NCCL_OK(ncclCommGetAsyncError(w.comm, &state));
            REQUIRE((state == ncclSuccess || state == ncclInProgress));
        }
    };
    CHECK(ncclCommInitRankConfig(&w.comm, w.ranks, w.id(0), w.rank, &config) == ncclInProgress);
    await();
    Buffers<float> b(w, 10, 10);
    CHECK(ncclAllReduce(b.in.get(), b.out.get(), 10, ncclFloat, ncclSum, w.comm, w.communication) ==
          ncclInProgress);
    CHECK(ncclAllReduce(b.in.get(), b.out.get(), 10, ncclFloat, ncclSum, w.comm, w.communication) ==
          ncclInvalidUsage);
    await();
    CHECK(ncclCommFinalize(w.comm) == ncclInProgress);
    await();
    b.check("all-reduce", [&](size_t i) { return reduced(w.ranks, i, ncclSum); });
    NCCL_OK(ncclCommDestroy(w.comm));
    expect_no_reports();
}

// -------------------------------------------------------------------------------- faults between streams

constexpr int kSize = 256;

__global__ void write(float* to, float value) {
    to[blockIdx.x * blockDim.x + threadIdx.x] = value;
}
__global__ void add(float* to, const float* from) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    to[i] += from[i];
}

enum class Planted {
    nothing,
    serial,
    wrong_stream,
    overwritten,
    read_early,
    index_reset,
    freed,
    freed_async
};

// Two steps of a trainer: the backward pass fills a bucket, which is summed over the ranks while the pass
// fills the next one. The buckets are two buffers that take turns.
void train(World& w, Planted fault) {
    float *buckets[2], *sums;
    for (float*& bucket : buckets) CUDA_OK(cudaMalloc(&bucket, kSize * sizeof(float)));
    CUDA_OK(cudaMalloc(&sums, kSize * sizeof(float)));
    CUDA_OK(cudaMemsetAsync(sums, 0, kSize * sizeof(float), w.compute));
    cudaEvent_t filled, reduced[2];
    for (cudaEvent_t* e : {&filled, &reduced[0], &reduced[1]})
        CUDA_OK(cudaEventCreateWithFlags(e, cudaEventDisableTiming));
    for (int step = 0; step < 2; step++) {
        for (int i = 0; i < 2; i++) {
            const int b = fault == Planted::index_reset ? 0 : i;
            if (step && fault != Planted::overwritten) CUDA_OK(cudaStreamWaitEvent(w.compute, reduced[b]));
            write<<<kSize / 64, 64, 0, w.compute>>>(buckets[b], (float)(w.rank + step + i));
            CUDA_OK(cudaEventRecord(filled, fault == Planted::wrong_stream ? w.communication : w.compute));
            CUDA_OK(cudaStreamWaitEvent(w.communication, filled));
            NCCL_OK(
                ncclAllReduce(buckets[b], buckets[b], kSize, ncclFloat, ncclSum, w.comm, w.communication));
            CUDA_OK(cudaEventRecord(reduced[b], w.communication));
            if (fault == Planted::serial) CUDA_OK(cudaStreamWaitEvent(w.compute, reduced[b]));
        }
        for (int i = 0; i < 2; i++) {
            if (fault == Planted::overwritten || (step && fault == Planted::freed_async)) continue;
            if (fault != Planted::read_early) CUDA_OK(cudaStreamWaitEvent(w.compute, reduced[i]));
            add<<<kSize / 64, 64, 0, w.compute>>>(sums, buckets[i]);
        }
    }
    if (fault == Planted::freed_async) CUDA_OK(cudaFreeAsync(buckets[1], w.compute));
    if (fault != Planted::freed && fault != Planted::freed_async) CUDA_OK(cudaDeviceSynchronize());
    if (fault == Planted::nothing || fault == Planted::serial) {
        std::vector<float> got(kSize);
        CUDA_OK(cudaMemcpy(got.data(), sums, kSize * sizeof(float), cudaMemcpyDeviceToHost));
        const int n = w.ranks;
        CHECK(got == std::vector<float>(kSize, (float)(4 * n * (n - 1) / 2 + 4 * n)));
    }
    CUDA_OK(cudaFree(buckets[0]));
    CUDA_OK(cudaDeviceSynchronize());
    if (fault != Planted::freed_async) CUDA_OK(cudaFree(buckets[1]));
    CUDA_OK(cudaFree(sums));
    for (cudaEvent_t e : {filled, reduced[0], reduced[1]}) CUDA_OK(cudaEventDestroy(e));
}

void overlap(World& w) {
    const struct {
        Planted fault;
        bool seen_eager;  // lazy streams show every one
        Fault report;
        const char *first, *second;  // in one of the reports
    } all[] = {
        {Planted::wrong_stream, false, Fault::race, "::write:", "ncclAllReduce(256 float32, sum)"},
        {Planted::overwritten, true, Fault::race, "::write:", "ncclAllReduce"},
        {Planted::read_early, true, Fault::race, "::add:", "ncclAllReduce"},
        {Planted::index_reset, true, Fault::race, "::write:", "ncclAllReduce"},
        {Planted::freed, true, Fault::use_after_free, "cudaFree of cudaMalloc of 1024 bytes",
         "ncclAllReduce"},
        {Planted::freed_async, true, Fault::unordered_copy, "cudaFreeAsync of cudaMalloc", "ncclAllReduce"},
    };
    w.join();
    for (bool lazy : {false, true})
        for (uint64_t seed = 0; seed < 3; seed++) {
            ptxsim::options().lazy = lazy;
            ptxsim::options().seed = seed;
            CAPTURE(lazy);
            CAPTURE(seed);
            // The second bucket is filled while the first one is summed, if the program does not wait for
            // each sum.
            for (Planted fault : {Planted::nothing, Planted::serial}) {
                ptxsim::take_overlaps();
                train(w, fault);
                expect_no_reports();
                const auto overlaps = ptxsim::take_overlaps();
                REQUIRE(overlaps.size() == 4);
                CHECK(overlaps[0].what == "ncclAllReduce(256 float32, sum)");
                CHECK(overlaps[0].calls == (fault == Planted::nothing ? 1 : 0));
            }
            for (const auto& planted : all) {
                CAPTURE((int)planted.fault);
                train(w, planted.fault);
                bool seen = false;
                for (const auto& report : ptxsim::take_reports())
                    seen |= report.fault == planted.report &&
                            report.text.find(planted.first) != std::string::npos &&
                            report.text.find(planted.second) != std::string::npos;
                CHECK((seen || !(lazy || planted.seen_eager)));
            }
        }
    NCCL_OK(ncclCommDestroy(w.comm));
}

// --------------------------------------------------------------------------- calls that do not fit together

// Runs a program that ends with one report, whose text contains the words, and with an error of its stream.
void expect_report(World& w, int which, const std::function<void(float*)>& program,
                   std::vector<std::string> words) {
    w.join(which);
    float* x;
    CUDA_OK(cudaMalloc(&x, 4096));
    CUDA_OK(cudaMemset(x, 0, 4096));
    program(x);
    CHECK(cudaStreamSynchronize(w.communication) != cudaSuccess);
    const auto reports = ptxsim::take_reports();
    REQUIRE(reports.size() == 1);
    CHECK(reports[0].fault == Fault::collective);
    for (const auto& word : words)
        CHECK_MESSAGE(reports[0].text.find(word) != std::string::npos, reports[0].text << " lacks " << word);
    ncclResult_t error = ncclSuccess;
    NCCL_OK(ncclCommGetAsyncError(w.comm, &error));
    CHECK(error != ncclSuccess);
    NCCL_OK(ncclCommAbort(w.comm));
    CUDA_OK(cudaDeviceReset());
    ptxsim::take_reports();  // the reset finds the leak
}

void mismatches(World& w) {
    const bool odd = w.rank == 1;
    ncclComm_t& c = w.comm;
    cudaStream_t s = w.communication;
    const std::string me = "rank " + std::to_string(w.rank) + " calls this",
                      other = "but rank " + std::to_string(1 - w.rank);
    const std::vector<std::string> place = {me + " as collective 1 of the communicator", other};
    auto with = [](std::vector<std::string> a, std::vector<std::string> b) {
        a.insert(a.end(), b.begin(), b.end());
        return a;
    };
    expect_report(
        w, 1, [&](float* x) { ncclAllReduce(x, x, 10 + odd, ncclFloat, ncclSum, c, s); },
        with(place, {"ncclAllReduce(10 float32, sum)", "ncclAllReduce(11 float32, sum)"}));
    expect_report(
        w, 2, [&](float* x) { ncclAllReduce(x, x, 10, odd ? ncclFloat : ncclInt32, ncclSum, c, s); },
        with(place, {"10 float32", "10 int32"}));
    expect_report(
        w, 3, [&](float* x) { ncclAllReduce(x, x, 10, ncclFloat, odd ? ncclMax : ncclSum, c, s); },
        with(place, {"float32, max", "float32, sum"}));
    expect_report(
        w, 4, [&](float* x) { ncclBcast(x, 10, ncclFloat, odd, c, s); }, with(place, {"root 0", "root 1"}));
    expect_report(
        w, 5,
        [&](float* x) {
            odd ? ncclBcast(x, 10, ncclFloat, 0, c, s) : ncclAllReduce(x, x, 10, ncclFloat, ncclSum, c, s);
        },
        with(place, {"ncclBroadcast(10 float32, root 0)", "ncclAllReduce(10"}));
    expect_report(
        w, 6,
        [&](float* x) { odd ? ncclSend(x, 9, ncclFloat, 0, c, s) : ncclRecv(x, 10, ncclFloat, 1, c, s); },
        {"ncclSend(9 float32)", "ncclRecv(10 float32)", me + (odd ? " to rank 0" : " from rank 1")});
    // Two sends, each of which waits for the receive that comes after the other one.
    ptxsim::options().nccl_timeout = 1;
    expect_report(w, 7,
                  [&](float* x) {
                      ncclSend(x, 9, ncclFloat, !w.rank, c, s);
                      ncclRecv(x, 9, ncclFloat, !w.rank, c, s);
                  },
                  {"ncclSend(9 float32)", "waits for this to rank", "since 1 s, but rank"});
    // One rank has left without its last call.
    w.join(8);
    if (odd) {
        NCCL_OK(ncclCommDestroy(c));
        return;
    }
    float* x;
    CUDA_OK(cudaMalloc(&x, 16));
    NCCL_OK(ncclAllReduce(x, x, 4, ncclFloat, ncclSum, c, s));
    CHECK(cudaStreamSynchronize(s) != cudaSuccess);
    const auto reports = ptxsim::take_reports();
    REQUIRE(reports.size() == 1);
    CHECK(reports[0].text.find("rank 1 has destroyed its communicator") != std::string::npos);
    CUDA_OK(cudaDeviceReset());
    ptxsim::take_reports();
}

// ------------------------------------------------------------------------------------------------- lost
// ranks

// The last rank dies. The others see it, and the abort ends their work. Then the device is as usable as
// before.
void killed(World& w) {
    ptxsim::options().lazy = number("NCCL_TEST_LAZY");
    w.join();
    if (w.rank == w.ranks - 1) raise(SIGKILL);
    Buffers<float> b(w, 10, 10);
    NCCL_OK(ncclAllReduce(b.in.get(), b.out.get(), 10, ncclFloat, ncclSum, w.comm, w.communication));
    ncclResult_t error = ncclSuccess;
    while (error == ncclSuccess) {
        CHECK(cudaStreamQuery(w.communication) == cudaErrorNotReady);
        NCCL_OK(ncclCommGetAsyncError(w.comm, &error));
    }
    CHECK(error == ncclRemoteError);
    CHECK(ncclAllReduce(b.in.get(), b.out.get(), 10, ncclFloat, ncclSum, w.comm, w.communication) ==
          ncclRemoteError);
    NCCL_OK(ncclCommAbort(w.comm));
    CUDA_OK(cudaStreamSynchronize(w.communication));
    expect_no_reports();
}

// A thread that watches aborts the communicator while the program waits for the stream.
void aborted_by_a_thread(World& w) {
    w.join();
    if (w.rank) {
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        NCCL_OK(ncclCommAbort(w.comm));
        return;
    }
    Buffers<float> b(w, 10, 10);
    NCCL_OK(ncclAllReduce(b.in.get(), b.out.get(), 10, ncclFloat, ncclSum, w.comm, w.communication));
    ncclResult_t error = ncclSuccess;
    std::thread watch([&] {
        while (error == ncclSuccess) ncclCommGetAsyncError(w.comm, &error);
        ncclCommAbort(w.comm);
    });
    CUDA_OK(cudaStreamSynchronize(w.communication));
    watch.join();
    CHECK(error == ncclRemoteError);
    expect_no_reports();
}

// Two processes with the same device, too few ranks, two numbers of ranks, and a rank that comes twice.
void bad_starts(World& w) {
    ptxsim::options().nccl_timeout = 1;
    ncclComm_t comm;
    CHECK(cudaSetDevice(1) == cudaErrorInvalidDevice);
    if (w.rank == 0) CHECK(ncclCommInitRank(&comm, 2, w.id(1), 0) == ncclSystemError);
    ptxsim::options().nccl_timeout = 20;
    auto start = [&](int which, int ranks, int rank) {
        return ncclCommInitRank(&comm, ranks, w.id(which), rank);
    };
    auto fails = [](ncclResult_t r) { CHECK((r == ncclInvalidUsage || r == ncclRemoteError)); };
    fails(start(2, 2 + w.rank, w.rank));
    fails(start(3, 2, 0));
    ptxsim::options().devices = 2;
    fails(start(4, 2, w.rank));
    CUDA_OK(cudaSetDevice(w.rank));
    NCCL_OK(start(5, 2, w.rank));
    int device = -1;
    NCCL_OK(ncclCommCuDevice(comm, &device));
    CHECK(device == w.rank);
    NCCL_OK(ncclCommDestroy(comm));
    expect_no_reports();
}

const std::map<std::string, void (*)(World&)> kScenarios = {{"collectives", collectives},
                                                            {"two_communicators", two_communicators},
                                                            {"not_blocking", not_blocking},
                                                            {"overlap", overlap},
                                                            {"mismatches", mismatches},
                                                            {"killed", killed},
                                                            {"aborted_by_a_thread", aborted_by_a_thread},
                                                            {"bad_starts", bad_starts}};

// Starts the ranks, and waits for them. Returns their exit statuses as wait() gives them.
std::vector<int> start(const std::string& scenario, int ranks, const std::string& more = "") {
    const std::string id = std::to_string(getpid()) + scenario + more + std::to_string(ranks);
    const std::string file = "/tmp/ptxsim-nccl-test-" + id + "-";
    std::vector<pid_t> started;
    for (int rank = 0; rank < ranks; rank++) {
        const pid_t pid = fork();
        REQUIRE(pid >= 0);
        if (pid == 0) {
            setenv("NCCL_TEST_SCENARIO", scenario.c_str(), 1);
            setenv("NCCL_TEST_RANK", std::to_string(rank).c_str(), 1);
            setenv("NCCL_TEST_RANKS", std::to_string(ranks).c_str(), 1);
            setenv("NCCL_TEST_ID", id.c_str(), 1);
            if (!more.empty()) setenv(more.c_str(), "1", 1);
            setenv("OMP_NUM_THREADS", "1", 1);
            const int out = open((file + std::to_string(rank)).c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
            if (dup2(out, 1) < 0 || dup2(out, 2) < 0) _exit(1);
            execl("/proc/self/exe", "tests", "--no-skip", "-tc=ptxsim NCCL: one rank of a scenario",
                  (char*)nullptr);
            _exit(1);
        }
        started.push_back(pid);
    }
    std::vector<int> statuses;
    for (int rank = 0; rank < ranks; rank++) {
        int status = -1;
        waitpid(started[rank], &status, 0);
        std::stringstream output;
        output << std::ifstream(file + std::to_string(rank)).rdbuf();
        std::remove((file + std::to_string(rank)).c_str());
        INFO(output.str());
        if (WIFEXITED(status)) CHECK_MESSAGE(status == 0, "rank " << rank << " of " << scenario);
        statuses.push_back(status);
    }
    return statuses;
}

}  // namespace

TEST_CASE("ptxsim NCCL: one rank of a scenario" * doctest::skip()) {
    const char* name = std::getenv("NCCL_TEST_SCENARIO");
    if (!name) return;
    WithOptions restore;
    ptxsim::options().nccl_timeout = 20;
    World world;
    kScenarios.at(name)(world);
}

TEST_CASE("ptxsim NCCL: every collective gives every rank what it should") {
    for (int ranks : {2, 3}) start("collectives", ranks);
}

TEST_CASE("ptxsim NCCL: several communicators, and ones that do not block") {
    start("two_communicators", 2);
    start("not_blocking", 3);
}

TEST_CASE("ptxsim NCCL: faults between streams are reported") {
    for (int ranks : {2, 3}) start("overlap", ranks);
}

TEST_CASE("ptxsim NCCL: calls that do not fit together are reported") {
    start("mismatches", 2);
}

TEST_CASE("ptxsim NCCL: ranks that die, abort or cannot join end the others' work") {
    for (const char* lazy : {"", "NCCL_TEST_LAZY"}) {
        const auto statuses = start("killed", 3, lazy);
        CHECK(WIFSIGNALED(statuses[2]));
        CHECK(statuses[0] == 0);
        CHECK(statuses[1] == 0);
    }
    start("aborted_by_a_thread", 2);
    start("bad_starts", 2);
}
#endif
