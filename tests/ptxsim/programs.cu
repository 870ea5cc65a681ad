// ptxsim: sample programs with CUB, cooperative groups, streams and graphs. They must give right results
// under every schedule.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "tests/ptxsim/helpers.h"
#include "tests/ptxsim/schedules.h"

using namespace ptxsim_test;
namespace cg = cooperative_groups;

namespace {

std::vector<float> small_numbers(int n) {  // numbers whose sums are exact
    std::mt19937 random(n);
    std::vector<float> all(n);
    for (float& x : all) x = (int)(random() % 201) - 100;
    return all;
}

// ------------------------------------------------------------------------------------------ block reductions

constexpr int kThreads = 256;

__global__ void cub_reduce(const float* in, int n, float* sum, float* most, int* scanned) {
    using Reduce = cub::BlockReduce<float, kThreads>;
    using Scan = cub::BlockScan<int, kThreads>;
    __shared__ union {
        typename Reduce::TempStorage reduce;
        typename Scan::TempStorage scan;
    } shared;
    float mine = 0, largest = -1e30f;
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) {
        mine += in[i];
        largest = fmaxf(largest, in[i]);
    }
    const float total = Reduce(shared.reduce).Sum(mine);
    __syncthreads();
    const float top = Reduce(shared.reduce).Reduce(largest, [](float a, float b) { return a < b ? b : a; });
    __syncthreads();
    int before;
    Scan(shared.scan).ExclusiveSum((int)threadIdx.x % 5, before);
    scanned[blockIdx.x * kThreads + threadIdx.x] = before;
    if (threadIdx.x == 0) {
        atomicAdd(sum, total);
        atomicMax((int*)most, (int)top);  // compares them as integers
    }
}

__device__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xFFFFFFFF, x, offset);
    return x;
}
__global__ void warp_reduce(const float* in, int n, float* sums) {
    __shared__ float partial[32];
    const int t = threadIdx.x, warp = t / 32, lane = t % 32;
    float x = 0;
    for (int i = blockIdx.x * blockDim.x + t; i < n; i += gridDim.x * blockDim.x) x += in[i];
    x = warp_sum(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    if (warp == 0) {
        x = lane < (int)blockDim.x / 32 ? partial[lane] : 0;
        x = warp_sum(x);
        if (lane == 0) sums[blockIdx.x] = x;
    }
}

TEST_CASE("ptxsim: block reductions with CUB and with warps under every schedule") {
    const int n = 5000, blocks = 5;
    const auto in = small_numbers(n);
    double sum = 0;
    float most = -1e30f;
    for (float x : in) sum += x, most = std::max(most, x);
    every_schedule([&] {
        Device<float> device_in(in), out(std::vector<float>(2)), sums(blocks);
        Device<int> scanned(blocks * kThreads);
        cub_reduce<<<blocks, kThreads>>>(device_in.get(), n, out.get(), out.get() + 1, scanned.get());
        warp_reduce<<<blocks, kThreads>>>(device_in.get(), n, sums.get());
        expect_success();
        const auto got = out.host(), by_warps = sums.host();
        CHECK(got[0] == sum);
        CHECK(std::bit_cast<int>(got[1]) == (int)most);
        double total = 0;
        for (float x : by_warps) total += x;
        CHECK(total == sum);
        const auto before = scanned.host();
        int wrong = 0;
        for (int b = 0; b < blocks; b++)
            for (int t = 0, running = 0; t < kThreads; running += t % 5, t++)
                wrong += before[b * kThreads + t] != running;
        CHECK(wrong == 0);
    });
}

// ---------------------------------------------------------------------------------------- cooperative groups

template <int size>
__device__ void tile_results(const cg::thread_block& block, int x, int* out) {
    auto tile = cg::tiled_partition<size>(block);
    out[0] = cg::reduce(tile, x, cg::plus<int>());
    out[1] = cg::reduce(tile, x, cg::less<int>());  // the smallest
    out[2] = tile.shfl(x, 1) - tile.shfl_xor(x, 2);
    out[3] = (int)tile.ballot(x & 1);
    out[4] = tile.any(x > 95) * 2 + tile.all(x > -95);
    out[5] = tile.thread_rank() * 1000 + tile.meta_group_rank();
    tile.sync();
}

__global__ void groups(const int* in, int* out, int* count) {
    const cg::thread_block block = cg::this_thread_block();
    const int t = block.thread_rank(), x = in[t];
    int* o = out + 20 * t;
    tile_results<32>(block, x, o);
    tile_results<8>(block, x, o + 6);
    tile_results<4>(block, x, o + 12);
    o[18] = o[19] = 0;
    if (x % 3 == 0) {  // one atomic for all threads that are here at the same time
        const cg::coalesced_group active = cg::coalesced_threads();
        int first = 0;
        if (active.thread_rank() == 0) first = atomicAdd(count, (int)active.size());
        first = active.shfl(first, 0);
        o[18] = 1 + first + active.thread_rank();
    }
    block.sync();
    if (t < 40) o[19] = cg::reduce(cg::coalesced_threads(), x, cg::plus<int>());
}

void check_tiles(const std::vector<int>& in, const int* out, int t, int size) {
    const int* x = &in[t / size * size];
    const int rank = t % size;
    int sum = 0, least = x[0], votes = 0, any = 0, all = 1;
    for (int i = 0; i < size; i++) {
        sum += x[i];
        least = std::min(least, x[i]);
        votes |= (int)((unsigned)(x[i] & 1) << i);
        any |= x[i] > 95;
        all &= x[i] > -95;
    }
    const int expected[6] = {sum, least, x[1] - x[rank ^ 2], votes, any * 2 + all, rank * 1000 + t / size};
    for (int i = 0; i < 6; i++) CHECK_MESSAGE(out[i] == expected[i], size << " " << t << " " << i);
}

TEST_CASE("ptxsim: cooperative groups under every schedule") {
    const int threads = 128;
    std::mt19937 random(9);
    std::vector<int> in(threads);
    for (int& x : in) x = (int)(random() % 201) - 100;
    every_schedule([&] {
        Device<int> device_in(in), out(20 * threads), count(std::vector<int>(1));
        groups<<<1, threads>>>(device_in.get(), out.get(), count.get());
        expect_success();
        const auto got = out.host();
        std::vector<int> seen;
        int sum32 = 0, sum8 = 0;
        for (int t = 0; t < 40; t++) (t < 32 ? sum32 : sum8) += in[t];
        for (int t = 0; t < threads; t++) {
            check_tiles(in, &got[20 * t], t, 32);
            check_tiles(in, &got[20 * t + 6], t, 8);
            check_tiles(in, &got[20 * t + 12], t, 4);
            if (in[t] % 3 == 0) seen.push_back(got[20 * t + 18]);
            CHECK(got[20 * t + 19] == (t < 32 ? sum32 : t < 40 ? sum8 : 0));
        }
        std::sort(seen.begin(), seen.end());  // every place was given out once
        for (size_t i = 0; i < seen.size(); i++) CHECK(seen[i] == (int)i + 1);
        CHECK(count.host()[0] == (int)seen.size());
    });
}

__global__ void grid_steps(int* data, int n) {  // a step needs the previous step of all blocks
    const cg::grid_group grid = cg::this_grid();
    const int i = (int)grid.thread_rank();
    for (int step = 1; step < n; step *= 2) {
        const int x = data[(i + step) % n];
        grid.sync();
        data[i] += x;
        grid.sync();
    }
}

TEST_CASE("ptxsim: a grid-wide barrier under every schedule") {
    int n = 256;
    std::vector<int> in(n);
    for (int i = 0; i < n; i++) in[i] = i * i % 100;
    int sum = 0;
    for (int x : in) sum += x;
    every_schedule([&] {
        Device<int> data(in);
        int* pointer = data.get();
        void* arguments[] = {&pointer, &n};
        CUDA_OK(
            cudaLaunchCooperativeKernel((const void*)grid_steps, dim3(4), dim3(64), arguments, 0, nullptr));
        expect_success();
        CHECK(data.host() == std::vector<int>(n, sum));
    });
}

// ---------------------------------------------------------------------------------------- pipeline and graph

constexpr int kChunk = 512, kChunks = 4;

__global__ void scale(const float* in, float* out, float factor) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = in[i] * factor;
}
__global__ void sum_chunks(const float* in, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0;
    for (int chunk = 0; chunk < kChunks; chunk++) sum += in[chunk * kChunk + i];
    out[i] = sum;
}

struct Pipeline {
    cudaStream_t streams[kChunks];
    cudaEvent_t start, done[kChunks];
    float *in, *out;  // pinned
    Device<float> device_in{kChunk * kChunks}, scaled{kChunk * kChunks}, sums{kChunk};

    Pipeline() {
        for (cudaStream_t& stream : streams)
            CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CUDA_OK(cudaEventCreateWithFlags(&start, cudaEventDisableTiming));
        for (cudaEvent_t& event : done) CUDA_OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        CUDA_OK(cudaMallocHost(&in, kChunk * kChunks * sizeof(float)));
        CUDA_OK(cudaHostAlloc((void**)&out, kChunk * sizeof(float), cudaHostAllocDefault));
    }
    ~Pipeline() {
        for (cudaStream_t stream : streams) cudaStreamDestroy(stream);
        cudaEventDestroy(start);
        for (cudaEvent_t event : done) cudaEventDestroy(event);
        cudaFreeHost(in);
        cudaFreeHost(out);
    }
    // Each stream copies and scales one chunk. Then the first stream sums all chunks and copies the sum back.
    void enqueue() {
        CUDA_OK(cudaEventRecord(start, streams[0]));
        for (int c = 0; c < kChunks; c++) {
            const cudaStream_t stream = streams[c];
            const int at = c * kChunk;
            if (c) CUDA_OK(cudaStreamWaitEvent(stream, start));
            CUDA_OK(cudaMemcpyAsync(device_in.get() + at, in + at, kChunk * sizeof(float),
                                    cudaMemcpyHostToDevice, stream));
            scale<<<kChunk / 128, 128, 0, stream>>>(device_in.get() + at, scaled.get() + at, (float)(c + 2));
            CUDA_OK(cudaGetLastError());
            if (c) CUDA_OK(cudaEventRecord(done[c], stream));
        }
        for (int c = 1; c < kChunks; c++) CUDA_OK(cudaStreamWaitEvent(streams[0], done[c]));
        sum_chunks<<<kChunk / 128, 128, 0, streams[0]>>>(scaled.get(), sums.get());
        CUDA_OK(cudaGetLastError());
        CUDA_OK(cudaMemcpyAsync(out, sums.get(), kChunk * sizeof(float), cudaMemcpyDeviceToHost, streams[0]));
    }
    void set_input(int round) {
        for (int i = 0; i < kChunk * kChunks; i++) in[i] = (float)((i * 7 + round * 31) % 101);
    }
    int wrong() const {
        int wrong = 0;
        for (int i = 0; i < kChunk; i++) {
            float sum = 0;
            for (int c = 0; c < kChunks; c++) sum += in[c * kChunk + i] * (float)(c + 2);
            wrong += out[i] != sum;
        }
        return wrong;
    }
};

TEST_CASE("ptxsim: a multi-stream pipeline, and its graph, under every schedule") {
    every_schedule([&] {
        Pipeline pipeline;
        for (int round = 0; round < 2; round++) {
            pipeline.set_input(round);
            pipeline.enqueue();
            CUDA_OK(cudaStreamSynchronize(pipeline.streams[0]));
            CHECK(pipeline.wrong() == 0);
        }
        std::fill(pipeline.out, pipeline.out + kChunk, -1.0f);
        cudaGraph_t graph;
        cudaGraphExec_t executable;
        CUDA_OK(cudaStreamBeginCapture(pipeline.streams[0], cudaStreamCaptureModeGlobal));
        pipeline.enqueue();
        CUDA_OK(cudaStreamEndCapture(pipeline.streams[0], &graph));
        CHECK(pipeline.out[0] == -1.0f);  // capturing has run nothing
        size_t nodes = 0;
        CUDA_OK(cudaGraphGetNodes(graph, nullptr, &nodes));
        CHECK(nodes == 2 * kChunks + 2);
        CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
        CUDA_OK(cudaGraphDestroy(graph));
        for (int round = 2; round < 5; round++) {
            pipeline.set_input(round);
            CUDA_OK(cudaGraphLaunch(executable, pipeline.streams[round % 2]));
            CUDA_OK(cudaStreamSynchronize(pipeline.streams[round % 2]));
            CHECK(pipeline.wrong() == 0);
        }
        CUDA_OK(cudaGraphExecDestroy(executable));
    });
}

// Accesses that fences, flags and counters order do not race, neither within a block nor between blocks.
__global__ void flag_in_block(int* out) {
    __shared__ int data[32];
    __shared__ volatile int flag;
    if (threadIdx.x == 0) flag = 0;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        data[lane] = 3 * lane;
        __threadfence_block();
        __syncwarp();
        if (lane == 0) flag = 1;
    } else {
        while (flag == 0) {
        }
        __threadfence_block();
        out[lane] = data[lane];
    }
}
__device__ unsigned arrived;
__global__ void last_block(int* out, int* parts) {  // every thread has a fence, one thread counts
    __shared__ bool last;
    __shared__ int unrelated;
    parts[blockIdx.x * blockDim.x + threadIdx.x] = 1;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        unrelated = 1;
        last = atomicAdd(&arrived, unrelated) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    int sum = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) sum += parts[i];
    atomicAdd(out, sum);
}
__global__ void part_of_a_warp(int* out) {  // a named barrier counts whole warps
    __shared__ int data[48];
    data[threadIdx.x] = threadIdx.x;
    asm volatile("bar.sync 1, 64;" ::: "memory");
    out[threadIdx.x] = data[47 - threadIdx.x];
}

TEST_CASE("ptxsim: flags, fences and counters order what they should, under every schedule") {
    every_schedule([] {
        Device<int> out(std::vector<int>(64)), parts(20 * 64);
        flag_in_block<<<1, 64>>>(out.get());
        expect_success();
        for (int i = 0; i < 32; i++) CHECK(out.host()[i] == 3 * i);
        part_of_a_warp<<<1, 48>>>(out.get());
        expect_success();
        for (int i = 0; i < 48; i++) CHECK(out.host()[i] == 47 - i);
        const int zero = 0;
        CUDA_OK(cudaMemcpyToSymbol(arrived, &zero, sizeof zero));
        CUDA_OK(cudaMemset(out.get(), 0, 4));
        last_block<<<20, 64>>>(out.get(), parts.get());
        expect_success();
        CHECK(out.host()[0] == 20 * 64);
    });
}

}  // namespace
