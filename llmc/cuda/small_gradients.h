// With --gradients bf16, vectors (biases, gains, LayerNorms' weights) still add up their gradients in
// float32, in an array of their own. They are rounded into the bf16 array, which the norm and the optimizer
// read, when their bucket is complete.
#pragma once
#include <algorithm>
#include <vector>

#include "llmc/cuda/memory.h"
#include "llmc/parameter_store.h"

namespace gpu {

constexpr int kRoundThreads = 256;

// Each block takes a tensor.
static __global__ void __launch_bounds__(kRoundThreads)
    round_gradients_kernel(bf16* all, const float* small, const SmallTensor* tensors) {
    SmallTensor t = tensors[blockIdx.x];
    for (size_t i = threadIdx.x; i < t.size; i += kRoundThreads)
        all[t.to + i] = from_float<bf16>(small[t.from + i]);
}

inline void round_gradients(bf16* all, const float* small, const SmallTensor* tensors, int count,
                            cudaStream_t stream) {
    if (count == 0) return;
    round_gradients_kernel<<<count, kRoundThreads, 0, stream>>>(all, small, tensors);
    check_launch();
}

// The small gradients of a model, on the device.
class SmallGradients {
  public:
    SmallGradients() = default;
    explicit SmallGradients(const ParameterTable& table)
        : tensors_(small_tensors(table)), places_(tensors_.size()) {
        DeviceMemory::write(places_.get(), tensors_.data(), tensors_.size());
    }

    // Rounds those of a slice from their own array into the one that has all gradients.
    void round(bf16* all, const float* small, Slice slice, cudaStream_t stream) const {
        auto before = [&](size_t offset) {
            return std::count_if(tensors_.begin(), tensors_.end(), [=](auto& t) { return t.to < offset; });
        };
        auto begin = before(slice.begin), end = before(slice.end);
        round_gradients(all, small, places_.get() + begin, (int)(end - begin), stream);
    }

  private:
    std::vector<SmallTensor> tensors_;
    DeviceArray<SmallTensor> places_;
};

}  // namespace gpu
