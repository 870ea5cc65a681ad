// Memory for floats: one aligned array, and a plan that lays many named buffers into one.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "llmc/cpu/isa.h"
#include "llmc/error.h"

namespace cpu::inline LLMC_ISA {

constexpr size_t kAlignment = 64;  // bytes: a cache line

// Uninitialised floats on a cache line's boundary; freed with the object.
class Floats {
  public:
    Floats() = default;
    explicit Floats(size_t n) {
        size_t bytes = (n * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
        data_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, bytes ? bytes : kAlignment)));
        if (!data_) fail("out of memory: ", bytes >> 20, " MiB asked for");
    }
    float* get() const { return data_.get(); }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float[], Free> data_;
};

template <class Real>
inline bool all_finite(const Real* x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!std::isfinite((float)x[i])) return false;
    return true;
}

// Buffers of floats and bf16 are added with the pointer that will hold them, their number known and printed
// before anything is allocated; allocate() then sets the pointers, which must not move in between. A buffer
// with a name holds its value until the step ends; one without is used again before.
class MemoryPlan {
  public:
    template <class Real>
    void add(Real*& slot, size_t size, const std::string& name = "") {
        size_t offset = bytes_;
        bytes_ += (size * sizeof(Real) + kAlignment - 1) / kAlignment * kAlignment;
        settings_.push_back([&slot, offset](char* memory) { slot = (Real*)(memory + offset); });
        if (!name.empty()) kept_.push_back({name, [&slot, size] { return all_finite(slot, size); }});
    }
    // `slot` will be where `other` is, which was added before.
    template <class Real>
    void alias(Real*& slot, Real*& other) {
        settings_.push_back([&slot, &other](char*) { slot = other; });
    }
    void allocate() {
        memory_ = Floats(bytes_ / sizeof(float));
        for (const auto& set : settings_) set((char*)memory_.get());
    }
    size_t bytes() const { return bytes_; }
    // The name of the first buffer that holds a NaN or Inf; "" where none does.
    std::string first_nonfinite() const {
        for (const Kept& buffer : kept_)
            if (!buffer.finite()) return buffer.name;
        return "";
    }

  private:
    struct Kept {
        std::string name;
        std::function<bool()> finite;
    };
    std::vector<std::function<void(char*)>> settings_;
    std::vector<Kept> kept_;
    size_t bytes_ = 0;
    Floats memory_;
};

}  // namespace cpu
