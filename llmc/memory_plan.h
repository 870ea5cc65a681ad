// Puts many named buffers into one piece of memory. Its size is known, and printed, before it is allocated.
//
// The class Memory says which memory that is. It has kAlignment (bytes), char* allocate(bytes), and the
// static functions finite(x, n), zero(x, n), read(out, x, n), which copies to the host, and write(x, in, n),
// which copies from the host.
#pragma once
#include <algorithm>
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

// A buffer is added together with the pointer that will point to it. allocate() sets all these pointers, so
// they must not move before it. A buffer with a name keeps its values until the step ends, so it can be
// searched for NaN; one without a name is overwritten earlier.
template <class Memory>
class MemoryPlan {
  public:
    template <class Real>
    void add(Real*& slot, size_t size, const std::string& name = "") {
        constexpr size_t kAlignment = Memory::kAlignment;
        size_t offset = bytes_;
        bytes_ += (size * sizeof(Real) + kAlignment - 1) / kAlignment * kAlignment;
        settings_.push_back([&slot, offset](char* memory) { slot = (Real*)(memory + offset); });
        if (!name.empty()) kept_.push_back({name, [&slot, size] { return Memory::finite(slot, size); }});
    }
    // `slot` will point to the same memory as `other`, which must have been added before.
    template <class Real>
    void alias(Real*& slot, Real*& other) {
        settings_.push_back([&slot, &other](char*) { slot = other; });
    }
    // Two buffers in the same memory, which has room for the larger one.
    template <class Real>
    void add_either(Real*& slot, size_t size, Real*& other, size_t other_size) {
        add(slot, std::max(size, other_size));
        alias(other, slot);
    }
    void allocate() {
        char* memory = memory_.allocate(bytes_);
        for (const auto& set : settings_) set(memory);
    }
    size_t bytes() const { return bytes_; }
    // The name of the first buffer with a NaN or Inf in it; "" if there is none.
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
    Memory memory_;
};
