// Memory for floats: one aligned array, and a plan that lays many named buffers into one.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "llmc/error.h"

namespace cpu {

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

// Buffers are added with the pointer that will hold them, their number known and printed before anything is
// allocated; allocate() then sets the pointers. The pointers must not move in between.
class MemoryPlan {
  public:
    struct Buffer {
        std::string name;
        float** slot;
        size_t size, offset;  // floats
        bool kept;            // holds its value until the step ends, rather than being reused
    };

    void add(float*& slot, size_t size, const std::string& name, bool kept = true) {
        buffers_.push_back({name, &slot, size, size_, kept});
        size_ += (size + kAlignment / sizeof(float) - 1) / (kAlignment / sizeof(float)) *
                 (kAlignment / sizeof(float));
    }
    void allocate() {
        memory_ = Floats(size_);
        for (const Buffer& buffer : buffers_) *buffer.slot = memory_.get() + buffer.offset;
    }
    size_t bytes() const { return size_ * sizeof(float); }
    const std::vector<Buffer>& buffers() const { return buffers_; }

  private:
    std::vector<Buffer> buffers_;
    size_t size_ = 0;
    Floats memory_;
};

}  // namespace cpu
