// Many named buffers in one piece of memory, whose size is known and printed before anything is allocated.
//
// Memory is where it lies: a class with kAlignment (bytes), char* allocate(bytes) and, static, finite(x, n),
// zero(x, n), read(out, x, n) to the host and write(x, in, n) from there.
#pragma once
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

// Buffers are added with the pointer that will hold them; allocate() then sets the pointers, which must not
// move in between. A buffer with a name holds its value until the step ends; one without is used again
// before.
template <class Memory>
class MemoryPlan {
  public:
    template <class Real>
    void add(Real*& slot, size_t size, const std::string& name = "") {
        constexpr size_t kAlignment = Memory::kAlignment;
        size_t offset = bytes_;
        bytes_ += (size * sizeof(Real) + kAlignment - 1) / kAlignment * kAlignment;
        settings_.push_back([&slot, offset](char* memory) { slot = (Real*)(memory + offset); });
        if (!name.empty())
            kept_.push_back({name, [&slot, size] { return Memory::finite(slot, size); }});
    }
    // `slot` will be where `other` is, which was added before.
    template <class Real>
    void alias(Real*& slot, Real*& other) {
        settings_.push_back([&slot, &other](char*) { slot = other; });
    }
    void allocate() {
        char* memory = memory_.allocate(bytes_);
        for (const auto& set : settings_) set(memory);
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
    Memory memory_;
};
