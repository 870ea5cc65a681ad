// What host code needs of the CUDA runtime: errors, and waiting for the device.
#pragma once
#include <cuda_runtime_api.h>

#include "llmc/error.h"

namespace gpu {

// Fails with the text of the CUDA error and the place where it was seen. Not std::source_location, which
// clang 14 does not have.
inline void check(cudaError_t status, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (status == cudaSuccess) return;
    fail("CUDA: ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ", ", file, ":", line, ")");
}

// The stream of the model that trains. Collectives come after what is in it.
inline cudaStream_t model_stream = nullptr;

// Waits for the device in place of the driver if there are several ranks. The driver would wait for ever for
// a collective whose other ranks have ended.
class Waiter {
  public:
    virtual void await(cudaStream_t stream) = 0;
    virtual void await(cudaEvent_t event) = 0;
    virtual void await_all() = 0;

  protected:
    ~Waiter() = default;
};
inline Waiter* waiter = nullptr;  // null: there is one rank

// No other function of train_gptcu may wait for the device while a collective is in flight.
inline void wait_for(cudaStream_t stream, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (waiter) waiter->await(stream);
    check(cudaStreamSynchronize(stream), file, line);
}
inline void wait_for(cudaEvent_t event, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (waiter) waiter->await(event);
    check(cudaEventSynchronize(event), file, line);
}
inline void wait_for_device(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (waiter) waiter->await_all();
    check(cudaDeviceSynchronize(), file, line);
}

}  // namespace gpu
