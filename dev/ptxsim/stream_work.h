// How the libraries (cublas.cpp, cublaslt.cpp, nccl.cpp) put host work on a stream.
#pragma once
#include <driver_types.h>

#include <functional>

namespace ptxsim {

// Runs `work` when a kernel that is launched here would run: lazy streams, events and graph capture apply to
// it. `work` has to hold what it needs by value, because it may run long after the call, and a graph may run
// it several times.
void enqueue(cudaStream_t stream, std::function<void()> work);

}  // namespace ptxsim
