// The attention kernels with gates, for attention.cu.
#include "llmc/cuda/attention/launch.h"

namespace gpu {

template void launch_forward<true>(float*, float*, float*, const float*, const GatedShape&, AttentionKind,
                                   dim3, cudaStream_t);
template void launch_forward<true>(bf16*, float*, float*, const bf16*, const GatedShape&, AttentionKind, dim3,
                                   cudaStream_t);
template void launch_backward<true>(float*, double*, const float*, const float*, const float*, const float*,
                                    const GatedShape&, AttentionKind, dim3, cudaStream_t);
template void launch_backward<true>(bf16*, double*, const bf16*, const float*, const float*, const bf16*,
                                    const GatedShape&, AttentionKind, dim3, cudaStream_t);

}  // namespace gpu
