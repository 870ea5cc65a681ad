// How the libraries (cublas.cpp, cublaslt.cpp, nccl.cpp) put host work on a stream, and say which memory it
// uses.
#pragma once
#include <driver_types.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace ptxsim {

// How an operation uses memory. maybe: a kernel has a pointer to the allocation. lifetime: the operation
// allocates or frees the memory.
enum class Use : uint8_t { read, write, maybe, lifetime };
struct MemoryUse {
    uint64_t begin, bytes;
    Use use;
};

// Runs `work` when a kernel that is launched here would run: lazy streams, events and graph capture apply to
// it. `work` has to hold what it needs by value, because it may run long after the call, and a graph may run
// it several times. `what` names it in reports, and `uses` is all the memory that it touches.
void enqueue(cudaStream_t stream, std::string what, std::vector<MemoryUse> uses, std::function<void()> work);

// Work with other processes that is over (a collective), and how many kernels and library calls were enqueued
// after it that did not wait for it. If there are none, nothing can hide its time.
struct Overlap {
    std::string what;
    size_t calls;
};
// Those since the last call, in the order in which they ended.
std::vector<Overlap> take_overlaps();

}  // namespace ptxsim
