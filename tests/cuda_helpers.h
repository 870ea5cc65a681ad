// For the tests of llmc/cuda: device arrays, and one call of a layer held against the double-precision oracle
// (tests/reference.h) under every schedule of the simulator with all its checks on. On hardware the schedules
// are one.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"
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
inline bool thorough() {
    return std::getenv("LLMC_THOROUGH") != nullptr;
}
inline bool every_schedule() {
    return thorough() && std::string(std::getenv("LLMC_THOROUGH")) != "kinds";
}

// Calls f() in order, reversed and under three seeds; or in order and, from call to call, under one of the
// others.
template <class F>
void under_every_schedule(F f) {
    static int calls = 0;
    const ptxsim::Options before = ptxsim::options();
    int other = 1 + calls++ % 4;
    for (int schedule = 0; schedule < 5; schedule++) {
        if (schedule > 0 && schedule != other && !every_schedule()) continue;
        CAPTURE(schedule);
        ptxsim::options().order = schedule == 0   ? ptxsim::Order::forward
                                  : schedule == 1 ? ptxsim::Order::reversed
                                                  : ptxsim::Order::random;
        ptxsim::options().seed = (uint64_t)schedule;
        f();
    }
    ptxsim::options() = before;
}

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
template <class Call>
void check_layer(const std::vector<Expected>& outputs, Call call) {
    std::vector<std::vector<char>> first;
    under_every_schedule([&] {
        std::vector<Device<float>> floats;
        std::vector<Device<gpu::bf16>> halves;
        floats.reserve(outputs.size()), halves.reserve(outputs.size());
        std::vector<Floats> initial;
        std::map<std::string, Pointer> out;
        for (size_t o = 0; o < outputs.size(); o++) {
            const Expected& e = outputs[o];
            size_t n = e.values.size();
            double rms = reference::norm(e.values) / std::sqrt((double)std::max<size_t>(n, 1));
            initial.push_back(e.added ? reference::normal(n, 77 + o, rms > 0 ? rms : 1)
                                      : Floats(n, std::numeric_limits<float>::quiet_NaN()));
            if (e.is_bf16) {
                halves.emplace_back(convert<gpu::bf16>(initial[o]));
                out[e.name] = {halves.back().get()};
            } else {
                floats.emplace_back(initial[o]);
                out[e.name] = {floats.back().get()};
            }
        }
        call(out);
        gpu::check(cudaDeviceSynchronize());
        std::string reports;
        for (const ptxsim::Report& r : ptxsim::take_reports()) reports += r.text + "\n";
        CHECK_MESSAGE(reports.empty(), reports);
        size_t f = 0, h = 0;
        for (size_t o = 0; o < outputs.size(); o++) {
            const Expected& e = outputs[o];
            INFO("output ", e.name);
            std::vector<char> bytes;
            Vector got;
            auto take = [&](const auto& x) {
                got = to_double(x);
                bytes.assign((const char*)x.data(), (const char*)(x.data() + x.size()));
            };
            if (e.is_bf16) {
                take(halves[h++].host());
            } else {
                take(floats[f++].host());
            }
            if (e.added)
                for (size_t i = 0; i < got.size(); i++) got[i] -= initial[o][i];
            CHECK(reference::relative_error(got, e.values, e.floor) < e.tolerance);
            if (first.size() == o) first.push_back(bytes);
            CHECK_MESSAGE(bytes == first[o], "other bits than under the first schedule");
        }
    });
}

}  // namespace cuda_test
