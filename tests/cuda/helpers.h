// For the tests of llmc/cuda: device arrays, and a check that compares one call of a layer with the
// double-precision oracle (tests/reference.h), under every schedule of the simulator with all its checks on.
// On hardware there is only one schedule.
#pragma once
#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "llmc/cuda/common.h"
#include "tests/helpers.h"
#include "tests/reference.h"

namespace cuda_test {

using reference::convert;
using reference::Floats;
using reference::to_double;
using reference::Vector;

template <class T>
class Device {
  public:
    Device() = default;
    explicit Device(size_t n) : size_(n) {
        gpu::check(cudaMalloc(&data_, std::max<size_t>(n, 1) * sizeof(T)));
    }
    explicit Device(const std::vector<T>& x) : Device(x.size()) {
        gpu::check(cudaMemcpy(data_, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    Device(Device&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
    ~Device() { cudaFree(data_); }
    T* get() const { return data_; }
    size_t size() const { return size_; }
    std::vector<T> host() const {
        std::vector<T> x(size_);
        gpu::check(cudaMemcpy(x.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
        return x;
    }

  private:
    T* data_ = nullptr;
    size_t size_ = 0;
};

// Calls f() under the schedules forward, reversed and three seeds. Without LLMC_THOROUGH=schedules, only
// under forward and one of the others, which changes from call to call.
void under_every_schedule(const std::function<void()>& f);

// What a call must write to one of its outputs, which is an array of T in device memory.
struct Expected {
    std::string name;
    Vector values;
    double tolerance = 1e-5;  // for the relative norm error
    bool added = false;       // +=: the output holds random numbers before, to which the values are added
    bool is_bf16 = false;
    double floor = 0;  // the least norm to which the error is relative
};
template <class Real>
Expected expect(const std::string& name, const Vector& values, double tolerance = 0, bool added = false) {
    bool is_bf16 = std::is_same_v<Real, gpu::bf16>;
    return {name, values, tolerance ? tolerance : is_bf16 ? 1e-2 : 1e-5, added, is_bf16};
}

struct Pointer {
    void* data = nullptr;
    template <class T>
    operator T*() const {
        return (T*)data;
    }
};

// call(out) runs the layer, whose outputs are out["name"]. Outputs that it overwrites hold NaN before. The
// results must be within the tolerances and have the same bits under every schedule. Nothing after the end of
// an output may be touched (the simulator checks that), and no check may report anything.
void check_layer(const std::vector<Expected>& outputs,
                 const std::function<void(std::map<std::string, Pointer>&)>& call);

}  // namespace cuda_test
