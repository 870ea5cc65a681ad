// How the libraries (cublas.cpp, cublaslt.cpp, nccl.cpp) put host work on a stream.
#pragma once
#include <driver_types.h>

#include <functional>

namespace ptxsim {

// Runs `work` when a kernel launched here would run: lazy streams, events and graph capture apply to it. What
// it needs has to be captured by value, since it may run long after the call, and more than once in a graph.
void enqueue(cudaStream_t stream, std::function<void()> work);

}  // namespace ptxsim
