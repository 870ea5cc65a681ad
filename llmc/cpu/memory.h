// Aligned memory for floats, and the memory of a MemoryPlan on the CPU.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "llmc/cpu/isa.h"
#include "llmc/error.h"
#include "llmc/memory_plan.h"

namespace cpu::inline LLMC_ISA {

constexpr size_t kAlignment = 64;  // bytes: a cache line

// AlignedArray without initial values that begin at the boundary of a cache line. The destructor frees them.
class AlignedArray {
  public:
    AlignedArray() = default;
    explicit AlignedArray(size_t n) {
        size_t bytes = (n * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
        data_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, bytes ? bytes : kAlignment)));
        if (!data_) fail("out of memory: cannot allocate ", bytes >> 20, " MiB");
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

struct HostMemory {
    static constexpr size_t kAlignment = cpu::kAlignment;
    AlignedArray floats;
    char* allocate(size_t bytes) {
        floats = AlignedArray(bytes / sizeof(float));
        return (char*)floats.get();
    }
    static bool finite(const auto* x, size_t n) { return all_finite(x, n); }
    static void zero(auto* x, size_t n) { std::fill_n(x, n, std::remove_reference_t<decltype(*x)>(0.0f)); }
    static void read(auto* out, const auto* x, size_t n) { std::copy_n(x, n, out); }
    static void write(auto* x, const auto* in, size_t n) { std::copy_n(in, n, x); }
};
using MemoryPlan = ::MemoryPlan<HostMemory>;

}  // namespace cpu
