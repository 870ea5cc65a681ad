// Where the gradients of matrices and embeddings are bf16: those of the other tensors, which layers add up in
// float and which are rounded only then. Together with the others they are one array for AdamW and the norm.
#pragma once
#include <vector>

#include "llmc/cuda/memory.h"
#include "llmc/parameters.h"

namespace gpu {

struct SmallTensor {
    size_t from, to, size;  // its places among the small ones and among all
};

// Those of a table without weight decay, one after another as in the table.
inline std::vector<SmallTensor> small_tensors(const ParameterTable& table) {
    std::vector<SmallTensor> small;
    size_t from = 0;
    for (const ParameterTensor& t : table.tensors) {
        if (t.weight_decay) continue;
        small.push_back({from, t.offset, t.size});
        from += ceil_div<size_t>(t.size, 16) * 16;
    }
    return small;
}
inline size_t small_size(const ParameterTable& table) {
    std::vector<SmallTensor> small = small_tensors(table);
    return small.back().from + ceil_div<size_t>(small.back().size, 16) * 16;
}

constexpr int kRoundThreads = 256;

// A block a tensor.
static __global__ void __launch_bounds__(kRoundThreads)
    round_gradients_kernel(bf16* all, const float* small, const SmallTensor* tensors) {
    SmallTensor t = tensors[blockIdx.x];
    for (size_t i = threadIdx.x; i < t.size; i += kRoundThreads)
        all[t.to + i] = from_float<bf16>(small[t.from + i]);
}

inline void round_gradients(bf16* all, const float* small, const DeviceArray<SmallTensor>& tensors,
                            cudaStream_t stream) {
    round_gradients_kernel<<<(int)tensors.size(), kRoundThreads, 0, stream>>>(all, small, tensors.get());
    check_launch();
}

}  // namespace gpu
