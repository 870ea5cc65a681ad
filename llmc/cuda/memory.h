// The GPU memory of a MemoryPlan, and copies to and from it.
#pragma once
#include <algorithm>
#include <string>
#include <utility>

#include "llmc/cuda/common.h"
#include "llmc/memory_plan.h"

namespace gpu {

// Sets *found to 1 if a value is NaN or Inf.
template <class Real>
__global__ void find_nonfinite_kernel(int* found, const Real* x, size_t n) {
    bool any = false;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        any |= !isfinite(to_float(x[i]));
    if (__syncthreads_or(any) && threadIdx.x == 0) atomicExch(found, 1);
}

// Waits for all work before it.
template <class Real>
bool all_finite(const Real* x, size_t n);

struct MemoryInfo {
    size_t free, total;  // bytes
};
inline MemoryInfo memory_info() {
    MemoryInfo info;
    check(cudaMemGetInfo(&info.free, &info.total));
    return info;
}

// `advice` says what would need less.
[[noreturn]] inline void out_of_memory(size_t bytes, const MemoryInfo& info, const std::string& advice) {
    fail("out of GPU memory: ", (bytes >> 20) + 1, " MiB asked for, ", info.free >> 20, " of ",
         info.total >> 20, " MiB free: ", advice);
}

class DeviceMemory {
  public:
    static constexpr size_t kAlignment = 256;  // bytes: more than any load or cuBLASLt asks for

    DeviceMemory() = default;
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    ~DeviceMemory() { cudaFree(data_); }
    void swap(DeviceMemory& other) { std::swap(data_, other.data_); }

    char* allocate(size_t bytes) {
        MemoryInfo info = memory_info();
        cudaError_t status = cudaMalloc(&data_, bytes ? bytes : kAlignment);
        if (status == cudaErrorMemoryAllocation) {
            cudaGetLastError();  // so that no later check sees this error
            out_of_memory(bytes, info,
                          "expected a smaller --batch or --seq, --dtype bf16 or --recompute block");
        }
        check(status);
        return data_;
    }
    // These wait for all work before them, and their own work is done when they return.
    static bool finite(const auto* x, size_t n) { return all_finite(x, n); }
    static void zero(auto* x, size_t n) {
        wait_for_device();
        check(cudaMemset(x, 0, n * sizeof *x));
        wait_for_device();
    }
    static void read(auto* out, const auto* x, size_t n) {
        wait_for_device();
        check(cudaMemcpy(out, x, n * sizeof *x, cudaMemcpyDeviceToHost));
    }
    static void write(auto* x, const auto* in, size_t n) {
        wait_for_device();
        check(cudaMemcpy(x, in, n * sizeof *x, cudaMemcpyHostToDevice));
        wait_for_device();  // a copy from memory that is not pinned may still be on its way
    }

  private:
    char* data_ = nullptr;
};

template <class Real>
bool all_finite(const Real* x, size_t n) {
    DeviceMemory memory;
    int *found = (int*)memory.allocate(sizeof(int)), result = 0;
    wait_for_device();
    check(cudaMemset(found, 0, sizeof(int)));
    unsigned blocks = (unsigned)std::min<size_t>(ceil_div<size_t>(n, 256), 1024);
    if (n) find_nonfinite_kernel<<<blocks, 256>>>(found, x, n);
    check_launch();
    check(cudaMemcpy(&result, found, sizeof(int), cudaMemcpyDeviceToHost));
    return result == 0;
}

using MemoryPlan = ::MemoryPlan<DeviceMemory>;

// An array of n numbers. They begin with no particular value.
template <class T>
class DeviceArray {
  public:
    DeviceArray() = default;
    explicit DeviceArray(size_t n) : size_(n) {
        if (n) data_ = (T*)memory_.allocate(n * sizeof(T));
    }
    DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
    DeviceArray& operator=(DeviceArray&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        memory_.swap(other.memory_);
        return *this;
    }
    T* get() const { return data_; }
    size_t size() const { return size_; }

    // Makes room for n numbers and keeps those that are there. Waits for the stream if it has to move them.
    void grow(size_t n, cudaStream_t stream) {
        if (n <= size_) return;
        DeviceArray larger(std::max(n, 2 * size_));
        if (size_)
            check(cudaMemcpyAsync(larger.data_, data_, size_ * sizeof(T), cudaMemcpyDeviceToDevice, stream));
        wait_for(stream);
        *this = std::move(larger);
    }

  private:
    T* data_ = nullptr;
    size_t size_ = 0;
    DeviceMemory memory_;
};

template <class T>
inline void copy_to_device(T* to, const T* from, size_t n, cudaStream_t stream) {
    check(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyHostToDevice, stream));
}
// Waits for the stream.
template <class T>
inline void copy_to_host(T* to, const T* from, size_t n, cudaStream_t stream) {
    if (waiter) waiter->await(stream);  // because a copy to memory that is not pinned blocks in the driver
    check(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
}

}  // namespace gpu
