// ptxsim: streams that run late. A missing synchronisation gives wrong data for some seed; its repaired twin
// gives right data for all seeds.
#include <algorithm>

#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;

namespace {

constexpr int kSize = 256;

__global__ void fill(int* data, int value) {
    data[blockIdx.x * blockDim.x + threadIdx.x] = value;
}
__global__ void add(const int* in, int* out, int value) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = in[i] + value;
}

struct Streams {
    cudaStream_t one, two;
    explicit Streams(unsigned flags = cudaStreamNonBlocking) {
        CUDA_OK(cudaStreamCreateWithFlags(&one, flags));
        CUDA_OK(cudaStreamCreateWithFlags(&two, flags));
    }
    ~Streams() {
        cudaStreamDestroy(one);
        cudaStreamDestroy(two);
    }
};

struct Pinned {
    int* data;
    Pinned() {
        CUDA_OK(cudaMallocHost(&data, kSize * sizeof(int)));
        std::fill(data, data + kSize, 0);
    }
    ~Pinned() { cudaFreeHost(data); }
    bool all(int value) const { return std::count(data, data + kSize, value) == kSize; }
};

Device<int> zeros() {
    return Device<int>(std::vector<int>(kSize));
}

// Each function returns whether the data was right.

bool copy_to_host(bool fixed) {
    Streams streams;
    Pinned host;
    Device<int> data = zeros();
    fill<<<kSize / 64, 64, 0, streams.one>>>(data.get(), 7);
    CUDA_OK(cudaMemcpyAsync(host.data, data.get(), kSize * sizeof(int), cudaMemcpyDeviceToHost, streams.one));
    CUDA_OK(cudaStreamSynchronize(fixed ? streams.one : streams.two));
    const bool good = host.all(7);
    CUDA_OK(cudaDeviceSynchronize());
    return good;
}

bool reuse_of_source(bool fixed) {
    Streams streams;
    Pinned host;
    Device<int> data = zeros();
    std::fill(host.data, host.data + kSize, 5);
    CUDA_OK(cudaMemcpyAsync(data.get(), host.data, kSize * sizeof(int), cudaMemcpyHostToDevice, streams.one));
    if (fixed) CUDA_OK(cudaStreamSynchronize(streams.one));
    std::fill(host.data, host.data + kSize, 6);
    CUDA_OK(cudaDeviceSynchronize());
    const auto got = data.host();
    return std::count(got.begin(), got.end(), 5) == kSize;
}

bool produce_and_consume(bool fixed) {
    Streams streams;
    Device<int> data = zeros(), out = zeros();
    cudaEvent_t done;
    CUDA_OK(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
    fill<<<kSize / 64, 64, 0, streams.one>>>(data.get(), 30);
    CUDA_OK(cudaEventRecord(done, streams.one));
    if (fixed) CUDA_OK(cudaStreamWaitEvent(streams.two, done));
    add<<<kSize / 64, 64, 0, streams.two>>>(data.get(), out.get(), 4);
    CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(cudaEventDestroy(done));
    const auto got = out.host();
    return std::count(got.begin(), got.end(), 34) == kSize;
}

// An event that is recorded too early orders nothing.
bool early_event(bool fixed) {
    Streams streams;
    Device<int> data = zeros(), out = zeros();
    cudaEvent_t done;
    CUDA_OK(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
    if (!fixed) CUDA_OK(cudaEventRecord(done, streams.one));
    fill<<<kSize / 64, 64, 0, streams.one>>>(data.get(), 30);
    if (fixed) CUDA_OK(cudaEventRecord(done, streams.one));
    CUDA_OK(cudaStreamWaitEvent(streams.two, done));
    add<<<kSize / 64, 64, 0, streams.two>>>(data.get(), out.get(), 4);
    CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(cudaEventDestroy(done));
    const auto got = out.host();
    return std::count(got.begin(), got.end(), 34) == kSize;
}

// The default stream waits for blocking streams, and they wait for it. Non-blocking streams do not take part.
bool default_stream(bool fixed) {
    Streams streams(fixed ? cudaStreamDefault : cudaStreamNonBlocking);
    Device<int> data = zeros(), out = zeros();
    fill<<<kSize / 64, 64, 0, streams.one>>>(data.get(), 1);
    add<<<kSize / 64, 64>>>(data.get(), data.get(), 10);
    add<<<kSize / 64, 64, 0, streams.two>>>(data.get(), out.get(), 100);
    CUDA_OK(cudaDeviceSynchronize());
    const auto got = out.host();
    return std::count(got.begin(), got.end(), 111) == kSize;
}

// The next write to the memory may come before a slow reader has read it.
bool write_after_read(bool fixed) {
    Streams streams;
    Device<int> data = zeros(), out = zeros();
    cudaEvent_t done;
    CUDA_OK(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
    fill<<<kSize / 64, 64, 0, streams.one>>>(data.get(), 1);
    add<<<kSize / 64, 64, 0, streams.one>>>(data.get(), out.get(), 1);
    CUDA_OK(cudaEventRecord(done, streams.one));
    if (fixed) CUDA_OK(cudaStreamWaitEvent(streams.two, done));
    CUDA_OK(cudaMemsetAsync(data.get(), 0x11, kSize * sizeof(int), streams.two));
    CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(cudaEventDestroy(done));
    const auto got = out.host(), left = data.host();
    return std::count(got.begin(), got.end(), 2) == kSize &&
           std::count(left.begin(), left.end(), 0x11111111) == kSize;
}

}  // namespace

TEST_CASE("ptxsim: missing stream and event waits show") {
    WithOptions restore;
    const std::pair<const char*, bool (*)(bool)> cases[] = {{"copy_to_host", copy_to_host},
                                                            {"reuse_of_source", reuse_of_source},
                                                            {"produce_and_consume", produce_and_consume},
                                                            {"early_event", early_event},
                                                            {"default_stream", default_stream},
                                                            {"write_after_read", write_after_read}};
    for (const auto& planted : cases) {
        const auto run = planted.second;
        CAPTURE(planted.first);
        ptxsim::options().lazy = true;
        int wrong = 0;
        for (uint64_t seed = 0; seed < 8; seed++) {
            CAPTURE(seed);
            ptxsim::options().seed = seed;
            CHECK(run(true));
            expect_no_reports();
            wrong += !run(false);
            ptxsim::take_reports();  // an unordered-copy may be reported, but is not required
        }
        CHECK(wrong > 0);
        ptxsim::options().lazy = false;
        CHECK(run(true));
        expect_no_reports();
    }
}

// Queries, callbacks and blocking calls wait for the right operations of lazy streams.
TEST_CASE("ptxsim: lazy streams run when something waits for them") {
    WithOptions restore;
    ptxsim::options().lazy = true;
    for (uint64_t seed = 0; seed < 3; seed++) {
        ptxsim::options().seed = seed;
        Streams streams(cudaStreamDefault);
        Pinned host;
        Device<int> data = zeros();
        cudaEvent_t done;
        CUDA_OK(cudaEventCreate(&done));
        fill<<<kSize / 64, 64, 0, streams.one>>>(data.get(), 3);
        CUDA_OK(
            cudaMemcpyAsync(host.data, data.get(), kSize * sizeof(int), cudaMemcpyDeviceToHost, streams.one));
        CUDA_OK(cudaEventRecord(done, streams.one));
        int queries = 0;
        while (cudaEventQuery(done) == cudaErrorNotReady && queries < 1000000) queries++;
        CHECK(queries < 1000000);
        CHECK(host.all(3));
        fill<<<kSize / 64, 64, 0, streams.two>>>(data.get(), 4);
        CUDA_OK(cudaEventRecord(done, streams.two));
        CUDA_OK(cudaEventSynchronize(done));
        CHECK(data.host() == std::vector<int>(kSize, 4));
        fill<<<kSize / 64, 64, 0, streams.two>>>(data.get(), 5);
        CHECK(data.host() == std::vector<int>(kSize, 5));  // cudaMemcpy waits, because of the default stream
        fill<<<kSize / 64, 64, 0, streams.one>>>(data.get(), 6);
        CUDA_OK(
            cudaMemcpyAsync(host.data, data.get(), kSize * sizeof(int), cudaMemcpyDeviceToHost, streams.one));
        const auto called = [](void* seen) { *(int*)seen = 1; };
        static int seen;
        seen = 0;
        CUDA_OK(cudaLaunchHostFunc(streams.one, called, &seen));
        CUDA_OK(cudaStreamSynchronize(streams.one));
        CHECK(seen == 1);
        CHECK(host.all(6));
        CUDA_OK(cudaEventDestroy(done));
        expect_no_reports();
    }
}
