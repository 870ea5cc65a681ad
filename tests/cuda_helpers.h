// For the tests of llmc/cuda: device arrays, and one call of a layer held against the double-precision oracle
// (tests/reference.h) under every schedule of the simulator with all its checks on. On hardware the schedules
// are one.
#pragma once
#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "llmc/cuda/common.h"
#include "tests/reference.h"

namespace cuda_test {

using reference::Floats;
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

// Real numbers, rounded to Real.
template <class Real, class T>
std::vector<Real> convert(const std::vector<T>& x) {
    std::vector<Real> y(x.size());
    for (size_t i = 0; i < x.size(); i++) y[i] = Real((float)x[i]);
    return y;
}
template <class Real>
Vector to_double(const std::vector<Real>& x) {
    Vector y(x.size());
    for (size_t i = 0; i < x.size(); i++) y[i] = (double)(float)x[i];
    return y;
}

// LLMC_THOROUGH=1: all that there is under every schedule, which takes an hour, instead of a sample;
// LLMC_THOROUGH=kinds: all kinds and sizes, under a sample of the schedules, in minutes.
bool thorough();
bool every_schedule();

// Calls f() in order, reversed and under three seeds; or in order and, from call to call, under one of the
// others.
void under_every_schedule(const std::function<void()>& f);

// What a call must leave in one of its outputs, which lies in device memory as T.
struct Expected {
    std::string name;
    Vector values;
    double tolerance = 1e-5;  // of the relative norm error
    bool added = false;       // += : the values are what is added to random numbers
    bool is_bf16 = false;
    double floor = 0;  // of the norm that the error is relative to
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

// call(out) runs the layer with out["name"] for its outputs; those that it overwrites hold NaN before. What
// it leaves must be within the tolerances, the same bits under every schedule, and nothing beyond an output's
// end may be touched (the simulator sees to that). No check may report anything.
void check_layer(const std::vector<Expected>& outputs,
                 const std::function<void(std::map<std::string, Pointer>&)>& call);

}  // namespace cuda_test
