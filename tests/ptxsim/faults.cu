// ptxsim: planted faults. Every kernel contains its repaired twin: `fixed` chooses. The line that a report
// should name ends in a comment "fault: ..." for which the test looks in this file. If a race has two lines,
// or a report may name either of two lines, both end in the comment.
#include <assert.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <functional>

#include "dev/ptxsim/memory.h"
#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;
using ptxsim::Fault;
using ptxsim::Report;

namespace faults {

// ------------------------------------------------------------------------------------------------ barriers

__global__ void sync_before(const int* in, int* out, bool fixed) {
    __shared__ int tile[64];
    const int t = threadIdx.x;
    tile[t] = 0;
    __syncthreads();
    tile[t] = in[t];  // fault: sync_before
    if (fixed) __syncthreads();
    out[t] = tile[63 - t];  // fault: sync_before
}

__global__ void sync_after(const int* in, int* out, bool fixed) {
    __shared__ int tile[64];
    const int t = threadIdx.x;
    int sum = 0;
#pragma unroll 1
    for (int i = 0; i < 3; i++) {
        tile[t] = in[t] + i;  // fault: sync_after
        __syncthreads();
        sum += tile[63 - t];  // fault: sync_after
        if (fixed) __syncthreads();
    }
    out[t] = sum;
}

__global__ void sync_warp(const int* in, int* out, bool fixed) {
    __shared__ int tile[32];
    const int t = threadIdx.x;
    tile[t] = 0;
    __syncwarp();
    tile[t] = in[t];  // fault: sync_warp
    if (fixed) __syncwarp();
    out[t] = tile[31 - t];  // fault: sync_warp
}

// The leader reads `count` again after all lanes have read it. This does not order its write after their
// reads.
__global__ void leader_updates(int* out, bool fixed) {
    __shared__ int count;
    const int t = threadIdx.x;
    if (t == 0) count = 0;
    __syncwarp();
    out[t] = count;  // fault: leader_updates
    if (fixed) __syncwarp();
    asm volatile("" ::: "memory");  // or the compiler would not read count again
    if (t == 0) count += 1;         // fault: leader_updates
}

// Lanes 0 and 1 write. Lane 0 has read `flag` itself, so only the write of lane 1 races with that read.
__global__ void leaders_write(int* out, bool fixed) {
    __shared__ int flag;
    const int t = threadIdx.x;
    if (t == 0) flag = 0;
    __syncwarp();
    if (t == 0) out[0] = flag;  // fault: leaders_write
    if (fixed) __syncwarp();
    if (t < 2) flag = 1;  // fault: leaders_write
}

__global__ void early_return(const int* in, int* out, bool fixed) {
    __shared__ int tile[64];
    const int t = threadIdx.x, n = 40;
    if (!fixed && t >= n) return;
    if (t < n) tile[t] = in[t];
    __syncthreads();  // fault: early_return
    if (t < n) out[t] = tile[n - 1 - t];
}

__global__ void early_return_of_a_warp(int* out, bool fixed) {
    const int t = threadIdx.x;
    if (!fixed && t >= 32) return;
    __syncthreads();  // fault: early_return_of_a_warp
    if (t < 32) out[t] = t;
}

__global__ void divergent_barrier(int* out, bool fixed) {
    const int t = threadIdx.x;
    if (fixed) {
        out[t] = t;
        __syncthreads();
    } else if (t % 2) {
        out[t] = 2 * t;
        __syncthreads();  // fault: divergent_barrier
        out[t] += 3;
    } else {
        out[t] = 5 * t;
        __syncthreads();  // fault: divergent_barrier
        out[t] *= 7;
    }
}

__global__ void barrier_for_some(int* out, bool fixed) {
    const int t = threadIdx.x;
    out[t] = 1;
    if (fixed || t < 16) __syncthreads();  // fault: barrier_for_some
    out[t] += 1;
}

__global__ void named_barriers(int* out, bool fixed) {
    const int t = threadIdx.x;
    if (fixed || t < 32) {
        asm volatile("bar.sync 1, 64;" ::: "memory");  // fault: named_barriers
        asm volatile("bar.sync 2, 64;" ::: "memory");
    } else {
        asm volatile("bar.sync 2, 64;" ::: "memory");  // fault: named_barriers
        asm volatile("bar.sync 1, 64;" ::: "memory");
    }
    out[t] = t;
}

// --------------------------------------------------------------------------------------------- global races

__global__ void blocks_write(int* out, bool fixed) {
    if (threadIdx.x == 0) out[fixed ? blockIdx.x : 0] = blockIdx.x;  // fault: blocks_write
}

__global__ void block_reads_another(int* data, int* out, bool fixed) {
    const int t = threadIdx.x, b = blockIdx.x, other = fixed ? b : (b + 1) % gridDim.x;
    data[b * 64 + t] = t;                    // fault: block_reads_another
    out[b * 64 + t] = data[other * 64 + t];  // fault: block_reads_another
}

__global__ void missing_atomic(int* sum, bool fixed) {
    if (fixed)
        atomicAdd(sum, 1);
    else
        *sum += 1;  // fault: missing_atomic
}

// An atomic in shared memory orders nothing between blocks.
__global__ void shared_atomics(int* sum, bool fixed) {
    __shared__ int turn;
    if (threadIdx.x == 0) turn = 0;
    __syncthreads();
    atomicAdd(&turn, 1);
    if (threadIdx.x == 0) sum[fixed ? blockIdx.x : 0] = blockIdx.x;  // fault: shared_atomics
    __threadfence();
    atomicAdd(&turn, 1);
}

__global__ void last_block(const int* in, int* partial, unsigned* count, int* out, bool fixed) {
    __shared__ bool is_last;
    const int t = threadIdx.x;
    if (t == 0) {
        partial[blockIdx.x] = in[blockIdx.x];  // fault: last_block
        if (fixed) __threadfence();
        is_last = atomicInc(count, gridDim.x) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last || t) return;
    if (fixed) __threadfence();
    int sum = 0;
#pragma unroll 1
    for (int i = 0; i < (int)gridDim.x; i++) {
        sum += partial[i];  // fault: last_block
    }
    *out = sum;
}

// --------------------------------------------------------------------------------- addresses and fresh
// memory

__global__ void shared_by_one(int* out, bool fixed) {
    __shared__ int tile[64];
    const int t = threadIdx.x;
    tile[t] = t;
    __syncthreads();
    out[t] = tile[fixed ? (t + 1) % 64 : t + 1];  // fault: shared_by_one
}

__global__ void dynamic_shared_by_one(int* out, bool fixed) {
    extern __shared__ int dynamic[];
    const int t = threadIdx.x;
    dynamic[fixed ? t : t + 1] = t;  // fault: dynamic_shared_by_one
    __syncthreads();
    out[t] = t;
}

__global__ void tail_read(const float* in, float* out, int n, bool fixed) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (fixed && i >= n) return;
    const float x = *(const volatile float*)(in + i);  // fault: tail_read
    if (i < n) out[i] = x;
}

__global__ void tail_write(float* out, int n, bool fixed) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (fixed && i >= n) return;
    out[i] = 1;  // fault: tail_write
}

__global__ void before_the_start(const float* in, float* out, bool fixed) {
    const int t = threadIdx.x;
    out[t] = in[fixed ? max(t - 1, 0) : t - 1];  // fault: before_the_start
}

__global__ void null_pointer(const float* in, float* out) {
    out[threadIdx.x] = in[threadIdx.x];  // fault: null_pointer
}

__global__ void misaligned(const float* in, float4* out, int offset) {
    out[threadIdx.x] = *(const float4*)(in + 4 * threadIdx.x + offset);  // fault: misaligned
}

__global__ void fresh_shared(int* out, int written) {
    __shared__ int tile[64];
    const int t = threadIdx.x;
    if (t < written) tile[t] = t;
    __syncthreads();
    out[t] = tile[63 - t];  // fault: fresh_shared
}

__global__ void fresh_global(const int* in, int* out) {
    out[threadIdx.x] = in[threadIdx.x];  // fault: fresh_global
}

__global__ void fresh_local(int* out, int written, int index) {
    int array[32];
#pragma unroll 1
    for (int i = 0; i < written; i++) array[i] = i * i;
    out[threadIdx.x] = array[index];  // fault: fresh_local
}

#define COPY_ASYNC(to, from) \
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory")

__global__ void missing_wait(const int4* in, int4* out, bool fixed) {
    __shared__ int4 tile[64];
    const int t = threadIdx.x;
    tile[t] = make_int4(0, 0, 0, 0);
    __syncthreads();
    const unsigned to = (unsigned)__cvta_generic_to_shared(tile + t);
    COPY_ASYNC(to, in + t);
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (fixed) asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    out[t] = tile[63 - t];  // fault: missing_wait
}

// The copy may overwrite data that other warps still read, although a barrier comes before its wait.
__global__ void early_copy(const int4* in, int4* out, bool fixed) {
    __shared__ int4 tile[64];
    const int t = threadIdx.x;
    tile[t] = in[t];
    __syncthreads();
    int4 before = tile[63 - t];  // fault: early_copy
    if (fixed) __syncthreads();
    const unsigned to = (unsigned)__cvta_generic_to_shared(tile + t);
    COPY_ASYNC(to, in + t);  // fault: early_copy
    asm volatile("cp.async.commit_group;" ::: "memory");
    __syncthreads();
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    out[t] = make_int4(before.x, before.y, tile[63 - t].z, tile[63 - t].w);
}

// A thread that writes to the source or the target of a copy must have waited for the copy. A barrier alone
// does not wait for it.
__global__ void source_written(int4* in, int4* out, bool fixed) {
    __shared__ int4 tile[64];
    const int t = threadIdx.x;
    const unsigned to = (unsigned)__cvta_generic_to_shared(tile + t);
    COPY_ASYNC(to, in + t);  // fault: source_written
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (fixed) asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    in[63 - t] = make_int4(1, 2, 3, 4);  // fault: source_written
    __syncthreads();
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    out[t] = tile[t];
}

__global__ void target_written(const int4* in, int4* out, bool fixed) {
    __shared__ int4 tile[64];
    const int t = threadIdx.x;
    const unsigned to = (unsigned)__cvta_generic_to_shared(tile + t);
    COPY_ASYNC(to, in + t);  // fault: target_written
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (fixed) asm volatile("cp.async.wait_group 0;" ::: "memory");
    tile[t] = make_int4(1, 2, 3, 4);  // fault: target_written
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    out[t] = tile[t];
}

__global__ void host_pointer(const int* in, int* out) {
    out[threadIdx.x] = in[threadIdx.x];  // fault: host_pointer
}

__global__ void freed(const int* in, int* out) {
    out[threadIdx.x] = in[threadIdx.x];  // fault: freed
}

// ------------------------------------------------------------------------------------------ masks and traps

__global__ void exited_lane(int* out, bool fixed) {
    const int t = threadIdx.x;
    if (t >= 16) return;
    if (fixed)
        out[t] = __shfl_xor_sync(0xFFFF, t, 1);
    else
        out[t] = __shfl_xor_sync(0xFFFFFFFF, t, 1);  // fault: exited_lane
}

__global__ void caller_not_in_mask(int* out, bool fixed) {
    const int t = threadIdx.x;
    const unsigned mask = fixed ? 0xFFFFFFFF : 0xFFFF;
    out[t] = __shfl_xor_sync(mask, t, 1);  // fault: caller_not_in_mask
}

__global__ void different_masks(int* out, bool fixed) {
    const int t = threadIdx.x;
    const unsigned mask = t < 16 ? 0xFFFF : fixed ? 0xFFFF0000 : 0xFFFFFFFF;
    out[t] = __shfl_xor_sync(mask, t, 1);  // fault: different_masks
}

__global__ void vote_in_a_branch(int* out, bool fixed) {
    const int t = threadIdx.x;
    int votes = 0;
    if (t < 8) {
        if (fixed)
            votes = __ballot_sync(0xFF, t % 2);
        else
            votes = __ballot_sync(0xFFFFFFFF, t % 2);  // fault: vote_in_a_branch
    }
    out[t] = votes;
}

__global__ void trapped(int* out, bool fixed) {
    out[threadIdx.x] = 1;
    if (!fixed && threadIdx.x == 3) __trap();  // fault: trapped
}

__global__ void asserted(int* out, bool fixed) {
    assert(fixed || threadIdx.x != 5);  // fault: asserted
    out[threadIdx.x] = 1;
}

__global__ void nothing(int* out) {
    if (threadIdx.x == 0) *out = 1;
}

}  // namespace faults

namespace {

// The numbers of the lines of this file that have the marker.
std::vector<int> lines_of(const std::string& marker) {
    std::ifstream file(__FILE__);
    REQUIRE_MESSAGE(file, __FILE__);
    std::vector<int> lines;
    std::string line;
    for (int n = 1; std::getline(file, line); n++)
        if (line.ends_with("// fault: " + marker)) lines.push_back(n);
    return lines;
}

std::string all_of(const std::vector<Report>& reports) {
    std::string all = "reports:";
    for (const Report& report : reports) all += "\n    " + report.text;
    return all;
}

// Checks that reports name a kernel's marked lines.
void expect_fault(const std::vector<Report>& reports, const std::string& kernel, Fault fault) {
    const std::vector<int> lines = lines_of(kernel);
    REQUIRE(!lines.empty());
    auto marked = [&](int line) { return std::count(lines.begin(), lines.end(), line) > 0; };
    CHECK_MESSAGE(!reports.empty(), "nothing was found");
    for (const Report& report : reports) {
        CHECK_MESSAGE(report.fault == fault, all_of(reports));
        CHECK_MESSAGE(report.kernel == "faults::" + kernel, all_of(reports));
        CHECK_MESSAGE(report.file.ends_with("ptxsim/faults.cu"), all_of(reports));
        CHECK_MESSAGE(marked(report.line), all_of(reports));
        if (fault == Fault::race) CHECK_MESSAGE(marked(report.other_line), all_of(reports));
    }
    if (fault == Fault::race && lines.size() == 2)  // one of the reports has both lines
        CHECK_MESSAGE(std::any_of(reports.begin(), reports.end(),
                                  [](const Report& report) { return report.line != report.other_line; }),
                      all_of(reports));
}

struct Buffers {
    std::vector<int> zeros = std::vector<int>(4096);
    Device<int> in{zeros}, out{zeros}, more{zeros};
};

struct Case {
    std::string kernel;
    Fault fault;
    std::function<void(Buffers&, bool fixed)> run;
};

using namespace faults;
float* floats(const Device<int>& device) {
    return (float*)device.get();
}

const std::vector<Case>& cases() {
    static const std::vector<Case> all = {
        {"sync_before", Fault::race,
         [](Buffers& b, bool fixed) { sync_before<<<1, 64>>>(b.in.get(), b.out.get(), fixed); }},
        {"sync_after", Fault::race,
         [](Buffers& b, bool fixed) { sync_after<<<1, 64>>>(b.in.get(), b.out.get(), fixed); }},
        {"sync_warp", Fault::race,
         [](Buffers& b, bool fixed) { sync_warp<<<1, 32>>>(b.in.get(), b.out.get(), fixed); }},
        {"leader_updates", Fault::race,
         [](Buffers& b, bool fixed) { leader_updates<<<1, 32>>>(b.out.get(), fixed); }},
        {"leaders_write", Fault::race,
         [](Buffers& b, bool fixed) { leaders_write<<<1, 32>>>(b.out.get(), fixed); }},
        {"early_return", Fault::barrier,
         [](Buffers& b, bool fixed) { early_return<<<1, 64>>>(b.in.get(), b.out.get(), fixed); }},
        {"early_return_of_a_warp", Fault::barrier,
         [](Buffers& b, bool fixed) { early_return_of_a_warp<<<1, 64>>>(b.out.get(), fixed); }},
        {"divergent_barrier", Fault::barrier,
         [](Buffers& b, bool fixed) { divergent_barrier<<<1, 64>>>(b.out.get(), fixed); }},
        {"barrier_for_some", Fault::barrier,
         [](Buffers& b, bool fixed) { barrier_for_some<<<1, 64>>>(b.out.get(), fixed); }},
        {"named_barriers", Fault::barrier,
         [](Buffers& b, bool fixed) { named_barriers<<<1, 64>>>(b.out.get(), fixed); }},
        {"blocks_write", Fault::race,
         [](Buffers& b, bool fixed) { blocks_write<<<8, 32>>>(b.out.get(), fixed); }},
        {"block_reads_another", Fault::race,
         [](Buffers& b, bool fixed) { block_reads_another<<<8, 64>>>(b.in.get(), b.out.get(), fixed); }},
        {"missing_atomic", Fault::race,
         [](Buffers& b, bool fixed) { missing_atomic<<<8, 64>>>(b.out.get(), fixed); }},
        {"shared_atomics", Fault::race,
         [](Buffers& b, bool fixed) { shared_atomics<<<8, 32>>>(b.out.get(), fixed); }},
        {"last_block", Fault::race,
         [](Buffers& b, bool fixed) {
             last_block<<<8, 32>>>(b.in.get(), b.more.get(), (unsigned*)b.more.get() + 100, b.out.get(),
                                   fixed);
         }},
        {"shared_by_one", Fault::out_of_bounds,
         [](Buffers& b, bool fixed) { shared_by_one<<<1, 64>>>(b.out.get(), fixed); }},
        {"dynamic_shared_by_one", Fault::out_of_bounds,
         [](Buffers& b, bool fixed) { dynamic_shared_by_one<<<1, 64, 256>>>(b.out.get(), fixed); }},
        {"tail_read", Fault::out_of_bounds,
         [](Buffers& b, bool fixed) { tail_read<<<33, 128>>>(floats(b.in), floats(b.out), 4096, fixed); }},
        {"tail_write", Fault::out_of_bounds,
         [](Buffers& b, bool fixed) { tail_write<<<33, 128>>>(floats(b.out), 4096, fixed); }},
        {"before_the_start", Fault::out_of_bounds,
         [](Buffers& b, bool fixed) { before_the_start<<<1, 64>>>(floats(b.in), floats(b.out), fixed); }},
        {"null_pointer", Fault::out_of_bounds,
         [](Buffers& b, bool fixed) {
             null_pointer<<<1, 64>>>(fixed ? floats(b.in) : nullptr, floats(b.out));
         }},
        {"misaligned", Fault::misaligned,
         [](Buffers& b, bool fixed) {
             misaligned<<<1, 64>>>(floats(b.in), (float4*)b.out.get(), fixed ? 4 : 1);
         }},
        {"fresh_shared", Fault::uninitialized,
         [](Buffers& b, bool fixed) { fresh_shared<<<1, 64>>>(b.out.get(), fixed ? 64 : 50); }},
        {"fresh_global", Fault::uninitialized,
         [](Buffers& b, bool fixed) {
             Device<int> in(64);
             if (fixed) CUDA_OK(cudaMemset(in.get(), 0, 256));
             fresh_global<<<1, 64>>>(in.get(), b.out.get());
             cudaDeviceSynchronize();
         }},
        {"fresh_local", Fault::uninitialized,
         [](Buffers& b, bool fixed) { fresh_local<<<1, 32>>>(b.out.get(), fixed ? 32 : 20, 25); }},
        {"missing_wait", Fault::missing_wait,
         [](Buffers& b, bool fixed) {
             missing_wait<<<1, 64>>>((int4*)b.in.get(), (int4*)b.out.get(), fixed);
         }},
        {"early_copy", Fault::race,
         [](Buffers& b, bool fixed) {
             ptxsim::options().uninit = false;  // reading after the copy has begun is a fault of another kind
             early_copy<<<1, 64>>>((int4*)b.in.get(), (int4*)b.out.get(), fixed);
             cudaDeviceSynchronize();
             ptxsim::options().uninit = true;
         }},
        {"source_written", Fault::race,
         [](Buffers& b, bool fixed) {
             source_written<<<1, 64>>>((int4*)b.in.get(), (int4*)b.out.get(), fixed);
         }},
        {"target_written", Fault::race,
         [](Buffers& b, bool fixed) {
             target_written<<<1, 64>>>((int4*)b.in.get(), (int4*)b.out.get(), fixed);
         }},
        {"host_pointer", Fault::host_access,
         [](Buffers& b, bool fixed) {
             std::vector<int> pageable(64);
             int* pinned;
             CUDA_OK(cudaMallocHost(&pinned, 256));
             std::fill(pinned, pinned + 64, 1);
             host_pointer<<<1, 64>>>(fixed ? pinned : pageable.data(), b.out.get());
             cudaDeviceSynchronize();
             cudaFreeHost(pinned);
         }},
        {"freed", Fault::use_after_free,
         [](Buffers& b, bool fixed) {
             int* data;
             CUDA_OK(cudaMalloc(&data, 256));
             CUDA_OK(cudaMemset(data, 0, 256));
             if (!fixed) CUDA_OK(cudaFree(data));
             freed<<<1, 64>>>(data, b.out.get());
             cudaDeviceSynchronize();
             if (fixed) CUDA_OK(cudaFree(data));
         }},
        {"exited_lane", Fault::warp_mask,
         [](Buffers& b, bool fixed) { exited_lane<<<1, 32>>>(b.out.get(), fixed); }},
        {"caller_not_in_mask", Fault::warp_mask,
         [](Buffers& b, bool fixed) { caller_not_in_mask<<<1, 32>>>(b.out.get(), fixed); }},
        {"different_masks", Fault::warp_mask,
         [](Buffers& b, bool fixed) { different_masks<<<1, 32>>>(b.out.get(), fixed); }},
        {"vote_in_a_branch", Fault::warp_mask,
         [](Buffers& b, bool fixed) { vote_in_a_branch<<<1, 32>>>(b.out.get(), fixed); }},
        {"trapped", Fault::trap, [](Buffers& b, bool fixed) { trapped<<<1, 32>>>(b.out.get(), fixed); }},
        {"asserted", Fault::trap, [](Buffers& b, bool fixed) { asserted<<<1, 32>>>(b.out.get(), fixed); }},
    };
    return all;
}

void set_order(int n) {
    ptxsim::Options& options = ptxsim::options();
    options.order = n == 0   ? ptxsim::Order::forward
                    : n == 1 ? ptxsim::Order::reversed
                             : ptxsim::Order::random;
    options.seed = n;
}

void reset() {
    CUDA_OK(cudaDeviceReset());
    ptxsim::take_reports();
}

}  // namespace

TEST_CASE("ptxsim: planted faults are found, and their repaired twins are clean") {
    WithOptions restore;
    for (const Case& one : cases())
        for (int order : {0, 1, 2})
            for (bool fixed : {true, false}) {
                CAPTURE(one.kernel);
                CAPTURE(order);
                CAPTURE(fixed);
                reset();
                set_order(order);
                std::vector<Report> reports;
                cudaError_t status;
                {
                    Buffers buffers;
                    one.run(buffers, fixed);
                    status = cudaDeviceSynchronize();
                    reports = ptxsim::take_reports();
                }
                if (fixed) {
                    CHECK_MESSAGE(reports.empty(), all_of(reports));
                    CHECK(status == cudaSuccess);
                } else {
                    expect_fault(reports, one.kernel, one.fault);
                }
            }
    reset();
}

TEST_CASE("ptxsim: a fault's error sticks until the device is reset") {
    reset();
    {
        Buffers buffers;
        misaligned<<<1, 64>>>(floats(buffers.in), (float4*)buffers.out.get(), 1);
        CHECK(cudaDeviceSynchronize() == cudaErrorMisalignedAddress);
        CHECK(cudaGetLastError() == cudaErrorMisalignedAddress);
        CHECK(cudaDeviceSynchronize() == cudaErrorMisalignedAddress);
        void* data;
        CHECK(cudaMalloc(&data, 16) == cudaErrorMisalignedAddress);
    }
    reset();
    {
        Buffers buffers;
        tail_write<<<33, 128>>>(floats(buffers.out), 4096, false);
        CHECK(cudaDeviceSynchronize() == cudaErrorIllegalAddress);
    }
    reset();
    {
        Buffers buffers;
        asserted<<<1, 32>>>(buffers.out.get(), false);
        CHECK(cudaDeviceSynchronize() == cudaErrorAssert);
    }
    reset();
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
}

TEST_CASE("ptxsim: double free, leaks") {
    reset();
    int* data;
    CUDA_OK(cudaMalloc(&data, 64));
    CUDA_OK(cudaFree(data));
    expect_no_reports();
    CHECK(cudaFree(data) != cudaSuccess);
    const auto twice = ptxsim::take_reports();
    REQUIRE(twice.size() == 1);
    CHECK(twice[0].fault == Fault::use_after_free);
    CHECK(twice[0].kernel.empty());
    reset();

    ptxsim::memory::report_leaks();
    expect_no_reports();
    CUDA_OK(cudaMalloc(&data, 192));
    ptxsim::memory::report_leaks();
    const auto leaks = ptxsim::take_reports();
    REQUIRE(leaks.size() == 1);
    CHECK(leaks[0].fault == Fault::leak);
    CHECK(leaks[0].text.find("192") != std::string::npos);
    CUDA_OK(cudaFree(data));
    ptxsim::memory::report_leaks();
    expect_no_reports();
}

TEST_CASE("ptxsim: launches outside the device's limits") {
    reset();
    Device<int> out(1);
    auto expect_launch_fault = [](cudaError_t expected) {
        CHECK(cudaGetLastError() == expected);
        const auto reports = ptxsim::take_reports();
        REQUIRE(reports.size() == 1);
        CHECK(reports[0].fault == Fault::launch);
        CHECK(reports[0].kernel == "faults::nothing");
    };
    nothing<<<1, 2048>>>(out.get());
    expect_launch_fault(cudaErrorInvalidConfiguration);
    nothing<<<0, 32>>>(out.get());
    expect_launch_fault(cudaErrorInvalidConfiguration);
    nothing<<<dim3(1, 65536), 32>>>(out.get());
    expect_launch_fault(cudaErrorInvalidConfiguration);
    nothing<<<1, 32, 60000>>>(out.get());
    expect_launch_fault(cudaErrorInvalidValue);
    CUDA_OK(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 60000));
    nothing<<<1, 1024, 60000>>>(out.get());
    expect_success();
    CHECK(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 240000) != cudaSuccess);
    cudaGetLastError();
    ptxsim::take_reports();
}

// Runs work in a child process. Returns its exit status, and in *message what it wrote to stderr.
int in_child(const std::function<void()>& work, std::string* message) {
    int pipes[2];
    REQUIRE(pipe(pipes) == 0);
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        dup2(pipes[1], 2);
        close(pipes[0]);
        work();
        _exit(0);
    }
    close(pipes[1]);
    char text[4096];
    for (ssize_t n; (n = read(pipes[0], text, sizeof text)) > 0;) message->append(text, n);
    close(pipes[0]);
    int status;
    REQUIRE(waitpid(child, &status, 0) == child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_CASE("ptxsim: host code that touches device memory") {
    reset();
    Device<int> data(16);
    CUDA_OK(cudaMemset(data.get(), 0, 64));
    int* managed;
    CUDA_OK(cudaMallocManaged(&managed, 64));
    std::string message;
    CHECK(in_child([&] { *(volatile int*)(data.get() + 3) = 1; }, &message) == ptxsim::kReportStatus);
    CHECK_MESSAGE(message.find(ptxsim::name(Fault::host_access)) != std::string::npos, message);
    message.clear();
    CHECK(in_child([&] { (void)*(volatile int*)data.get(); }, &message) == ptxsim::kReportStatus);
    CHECK_MESSAGE(message.find(ptxsim::name(Fault::host_access)) != std::string::npos, message);
    message.clear();
    CHECK(in_child([&] { *(volatile int*)(managed + 3) = 1; }, &message) == 0);
    CHECK_MESSAGE(message.empty(), message);
    CUDA_OK(cudaFree(managed));
}
