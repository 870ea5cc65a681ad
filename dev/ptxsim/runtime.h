// What the files of the CUDA runtime share: errors, kernels and variables of the program, and work with its
// order.
//
// Work is a graph of operations. Each knows what it must come after: the one before it in its stream, the
// events its stream waits for, the legacy default stream's rules. Eager mode runs an operation when it is
// enqueued; lazy mode when something waits for it, after what it needs and no more.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dev/ptxsim/device.h"
#include "dev/ptxsim/options.h"

namespace ptxsim {

// Errors.

// What every later call returns once a kernel has failed, or cudaSuccess.
cudaError_t sticky_error();
void set_sticky_error(cudaError_t error);
void clear_errors();
// What cudaGetLastError returns next.
void set_last_error(cudaError_t error);
// Whether a host function in a stream is being called: it may not call CUDA.
bool in_host_function();

// Every call of the API goes through this.
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
    int max_dynamic_shared = 0;  // set by cudaFuncSetAttribute; 0: the 48 KiB that need no consent
    int carveout = -1;
    std::string title;  // demangled, without parameters
};
// By the address of the host's stub or by a cudaKernel_t. Its module is loaded. An error where there is none.
cudaError_t find_kernel_entry(const void* function, KernelEntry** out);
// By the address of the host's variable; of a managed one, by its address.
cudaError_t find_symbol(const void* symbol, VariableInfo* out);
void reset_kernel_attributes();

// Work (work.cpp).

// Memory that an operation is known to use. A kernel's pointers say only which allocations it may touch.
enum class Use : uint8_t { read, write, maybe, lifetime };  // lifetime: allocates or frees it
struct MemoryUse {
    uint64_t begin, bytes;
    Use use;
};

struct Task {
    std::string what;
    std::function<cudaError_t()> run;  // its error becomes sticky; null does nothing
    std::vector<MemoryUse> uses;
    cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
};

struct Operation;
using OperationRef = std::shared_ptr<Operation>;
struct Operation {
    Task task;
    std::vector<OperationRef> after;  // emptied when it has run
    bool done = false;
    double finished = 0;  // milliseconds, when it had run
    uint64_t visit = 0;   // marks of the walks over the graph
    size_t index = 0;
};

// Runs what is needed for these, and at most `limit` operations.
void complete(const std::vector<OperationRef>& targets, size_t limit = SIZE_MAX);
// Runs everything that is pending: what cudaDeviceSynchronize waits for.
void complete_all();
bool all_done(const std::vector<OperationRef>& targets);
// Makes an operation. In eager mode it has run on return.
OperationRef add_operation(Task task, std::vector<OperationRef> after);

// Streams (runtime_stream.cpp) and capture (runtime_graph.cpp).

// Null where the handle is none.
CUstream_st* find_stream(cudaStream_t handle);
CUstream_st* legacy_stream();
// All of them, the two default ones included.
const std::vector<CUstream_st*>& all_streams();
// What an operation that is enqueued now has to come after.
std::vector<OperationRef> before_next(CUstream_st* stream);
// Enqueues, or adds a node to the graph that the stream is captured into. *out is null for a node.
cudaError_t enqueue(CUstream_st* stream, Task task, OperationRef* out = nullptr);

struct Capture {
    std::unique_ptr<CUgraph_st> graph;
    CUstream_st* origin;
    cudaStreamCaptureMode mode;
    uint64_t id;
    bool invalid = false;
};
// The error of a call that a capture forbids (it is invalid from then on), or cudaSuccess. With
// cudaErrorStreamCaptureImplicit for calls that use the legacy stream.
cudaError_t forbidden_in_capture(cudaError_t error = cudaErrorStreamCaptureUnsupported);
cudaError_t capture_task(CUstream_st* stream, Task task);

// What is in the device (runtime_device.cpp).

constexpr int kMultiprocessors = 132;
constexpr int kMaxThreadsPerBlock = 1024;
constexpr size_t kSharedDefault = 48 << 10, kSharedOptIn = 227 << 10, kSharedPerMultiprocessor = 228 << 10;
constexpr size_t kSharedReserved = 1 << 10;  // of each block

// Blocks of a kernel that fit one multiprocessor; registers are not known and do not count.
int blocks_per_multiprocessor(const KernelInfo& kernel, int threads, size_t dynamic_shared);

}  // namespace ptxsim

struct CUstream_st {
    unsigned flags = 0;
    int priority = 0;
    uint64_t id = 0;
    std::vector<ptxsim::OperationRef> tail;  // what the next operation comes after
    std::shared_ptr<ptxsim::Capture> capture;
    std::vector<CUgraphNode_st*> capture_tail;
    bool blocking() const { return !(flags & cudaStreamNonBlocking); }
};

struct CUevent_st {
    unsigned flags = 0;
    ptxsim::OperationRef operation;            // the last record; null before
    std::shared_ptr<ptxsim::Capture> capture;  // of a record into a graph
    std::vector<CUgraphNode_st*> nodes;
};

struct CUgraphNode_st {
    ptxsim::Task task;
    std::vector<CUgraphNode_st*> after;
};

struct CUgraph_st {
    std::vector<std::unique_ptr<CUgraphNode_st>> nodes;
};
