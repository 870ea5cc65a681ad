// What cuBLASLt's opaque descriptors hold. Their attributes are set and read in cublaslt_descriptors.cpp.
#pragma once
#include <cublasLt.h>

#include <cstdint>
#include <cstring>

namespace ptxsim {

struct Layout {
    uint32_t type;
    int32_t order = CUBLASLT_ORDER_COL;
    uint64_t rows, cols;
    int64_t ld;
    int32_t batches = 1;
    uint32_t batch_mode = CUBLASLT_BATCH_MODE_STRIDED;
    int64_t stride = 0;
};

struct Description {
    int32_t compute, scale, pointer_mode = CUBLASLT_POINTER_MODE_HOST;
    int32_t trans_a = CUBLAS_OP_N, trans_b = CUBLAS_OP_N, trans_c = CUBLAS_OP_N;
    int32_t fill = CUBLAS_FILL_MODE_FULL;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    uint64_t bias = 0, aux = 0;
    int64_t bias_stride = 0, aux_ld = 0, aux_stride = 0;
    int32_t bias_type = -1, aux_type = -1, multiprocessors = 0;
    int8_t fast_accumulation = 0;
};

struct Preference {
    uint64_t workspace = 0, implementations = ~0ull;
    uint32_t search = CUBLASLT_SEARCH_BEST_FIT, reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
    uint32_t alignment[4] = {256, 256, 256, 256};  // of A, B, C and D, in bytes
    float waves = 0;
};

static_assert(sizeof(Layout) <= sizeof(cublasLtMatrixLayoutOpaque_t));
static_assert(sizeof(Description) <= sizeof(cublasLtMatmulDescOpaque_t));
static_assert(sizeof(Preference) <= sizeof(cublasLtMatmulPreferenceOpaque_t));

template <class T, class Opaque>
T get(const Opaque* opaque) {
    T value;
    std::memcpy((void*)&value, opaque, sizeof value);
    return value;
}

}  // namespace ptxsim
