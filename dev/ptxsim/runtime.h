// What the files of the CUDA runtime share: errors, the program's kernels and variables, and work and its
// order.
//
// Work is a graph of operations. Each operation knows the operations that must come before it: the previous
// one in its stream, the events that its stream waits for, and those that the rules of the legacy default
// stream name. In eager mode an operation runs when it is enqueued. In lazy mode it runs when something waits
// for it, and only the operations that it needs run before it. Work in which other processes take part begins
// in eager mode when it is enqueued, and in both modes ends only when something waits for it, so that what
// the program does in the meantime is compared with it whether the other processes are fast or slow.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dev/ptxsim/device.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/race.h"
#include "dev/ptxsim/stream_work.h"

namespace ptxsim {

// Errors.

// The error that every call returns after a kernel has failed, or cudaSuccess.
cudaError_t sticky_error();
void set_sticky_error(cudaError_t error);
void clear_errors();
// Sets the error that cudaGetLastError returns next.
void set_last_error(cudaError_t error);
// Whether a host function of a stream is running. Such a function may not call CUDA.
bool in_host_function();

// The body of every call of the API runs in this function.
template <typename Body>
cudaError_t api(Body&& body) {
    if (in_host_function()) return cudaErrorNotPermitted;
    if (fails_now(options().fail_call)) set_sticky_error(cudaErrorECCUncorrectable);
    if (cudaError_t e = sticky_error()) return e;
    cudaError_t e = body();
    if (cudaError_t failed = sticky_error()) return failed;
    if (e != cudaSuccess && e != cudaErrorNotReady) set_last_error(e);
    return e;
}

// The program's kernels and variables (fatbin.cpp).

struct KernelEntry {
    const Kernel* kernel = nullptr;
    int max_dynamic_shared = 0;  // set by cudaFuncSetAttribute; 0: the 48 KiB that are always allowed
    int carveout = -1;
    std::string title;  // demangled, without parameters
};
// Finds a kernel by the address of the host's stub or by its cudaKernel_t, and loads its module. An error if
// there is none.
cudaError_t find_kernel_entry(const void* function, KernelEntry** out);
// Finds a variable by the address of the host's variable, or a managed variable by its own address.
cudaError_t find_symbol(const void* symbol, VariableInfo* out);
void reset_kernel_attributes();

// Work (work.cpp).

struct Task {
    std::string what;
    std::function<cudaError_t()> run;  // its error becomes sticky; null if there is nothing to do
    // For work in which other processes take part. run() begins it, and this returns its error, or
    // cudaSuccess, as soon as it is over.
    std::function<std::optional<cudaError_t>()> over;
    std::shared_ptr<const std::atomic<bool>> given_up;  // whether such work no longer uses memory
    std::vector<MemoryUse> uses;
    cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
};

struct Operation;
using OperationRef = std::shared_ptr<Operation>;
struct Operation {
    Task task;
    std::vector<OperationRef> after;  // the operations before it; emptied when it has run
    std::vector<InFlight> beside;     // for a kernel: what it must not touch
    size_t overlapped = 0;            // for work with other processes: see Overlap
    bool begun = false, done = false;
    double finished = 0;  // the time at which it had run, in milliseconds
    uint64_t visit = 0;   // the last walk over the graph that visited it
    size_t index = 0;
};

// Runs the targets and the operations that they need, but at most `limit` operations.
void complete(const std::vector<OperationRef>& targets, size_t limit = SIZE_MAX);
// Runs all pending operations, as cudaDeviceSynchronize does.
void complete_all();
bool all_done(const std::vector<OperationRef>& targets);
// Whether there are operations that have not run.
bool any_pending();
// Reports that a call frees memory that work in which other processes take part still uses.
void report_freed_in_flight(const char* call, uint64_t address, size_t bytes);
// Makes an operation. In eager mode it has run when this returns.
OperationRef add_operation(Task task, std::vector<OperationRef> after);

// Streams (runtime_stream.cpp) and capture (runtime_graph.cpp).

// Null if the handle is not one of a stream.
CUstream_st* find_stream(cudaStream_t handle);
CUstream_st* legacy_stream();
// All streams, with the two default streams.
const std::vector<CUstream_st*>& all_streams();
// The operations before one that is enqueued in the stream now.
std::vector<OperationRef> before_next(CUstream_st* stream);
// Enqueues an operation. If the stream is being captured, adds a node to the graph instead, and *out is null.
cudaError_t enqueue(CUstream_st* stream, Task task, OperationRef* out = nullptr);
// Enqueues an operation that comes after `also` and after the earlier work of all these streams, whose later
// work comes after it.
cudaError_t enqueue(const std::vector<CUstream_st*>& streams, Task task, std::vector<OperationRef> also,
                    OperationRef* out);

struct Capture {
    std::unique_ptr<CUgraph_st> graph;
    CUstream_st* origin;
    cudaStreamCaptureMode mode;
    uint64_t id;
    bool invalid = false;
};
// Called by calls that a capture forbids. If one is in progress it becomes invalid, and `error` is returned;
// else cudaSuccess. Calls that use the legacy stream pass cudaErrorStreamCaptureImplicit.
cudaError_t forbidden_in_capture(cudaError_t error = cudaErrorStreamCaptureUnsupported);
cudaError_t capture_task(CUstream_st* stream, Task task);

// The resources of the device (runtime_device.cpp).

// The number of the one device that this process uses.
int current_device();

constexpr int kMultiprocessors = 132;
constexpr int kMaxThreadsPerBlock = 1024;
constexpr size_t kSharedDefault = 48 << 10, kSharedOptIn = 227 << 10, kSharedPerMultiprocessor = 228 << 10;
constexpr size_t kSharedReserved = 1 << 10;  // what CUDA itself uses for each block

// How many blocks of a kernel fit on one multiprocessor. Registers are not known, so they do not count.
int blocks_per_multiprocessor(const KernelInfo& kernel, int threads, size_t dynamic_shared);

}  // namespace ptxsim

struct CUstream_st {
    unsigned flags = 0;
    int priority = 0;
    uint64_t id = 0;
    std::vector<ptxsim::OperationRef> tail;  // the operations that come before the next one
    std::shared_ptr<ptxsim::Capture> capture;
    std::vector<CUgraphNode_st*> capture_tail;
    bool blocking() const { return !(flags & cudaStreamNonBlocking); }
};

struct CUevent_st {
    unsigned flags = 0;
    ptxsim::OperationRef operation;            // the last record; null if there was none
    std::shared_ptr<ptxsim::Capture> capture;  // the capture in which it was recorded, or null
    std::vector<CUgraphNode_st*> nodes;
};

struct CUgraphNode_st {
    ptxsim::Task task;
    std::vector<CUgraphNode_st*> after;
};

struct CUgraph_st {
    std::vector<std::unique_ptr<CUgraphNode_st>> nodes;
};
