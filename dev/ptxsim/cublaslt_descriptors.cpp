#include "dev/ptxsim/cublaslt_descriptors.h"

#include <cstddef>
#include <string>

#include "dev/ptxsim/operand.h"

namespace ptxsim {
namespace {

template <class T, class Opaque>
cublasStatus_t init(Opaque* opaque, size_t size, const T& value) {
    if (!opaque || size < sizeof value) return CUBLAS_STATUS_INVALID_VALUE;
    std::memset((void*)opaque, 0, size);
    std::memcpy((void*)opaque, &value, sizeof value);
    return CUBLAS_STATUS_SUCCESS;
}

template <class T, class Opaque>
cublasStatus_t create(Opaque** out, const T& value) {
    if (!out) return CUBLAS_STATUS_INVALID_VALUE;
    *out = new Opaque;
    return init(*out, sizeof(Opaque), value);
}

struct Attribute {
    int id;
    size_t offset, size;
};

#define FIELD(type, member) offsetof(type, member), sizeof(type::member)
const Attribute kLayout[] = {{CUBLASLT_MATRIX_LAYOUT_TYPE, FIELD(Layout, type)},
                             {CUBLASLT_MATRIX_LAYOUT_ORDER, FIELD(Layout, order)},
                             {CUBLASLT_MATRIX_LAYOUT_ROWS, FIELD(Layout, rows)},
                             {CUBLASLT_MATRIX_LAYOUT_COLS, FIELD(Layout, cols)},
                             {CUBLASLT_MATRIX_LAYOUT_LD, FIELD(Layout, ld)},
                             {CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, FIELD(Layout, batches)},
                             {CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, FIELD(Layout, stride)},
                             {CUBLASLT_MATRIX_LAYOUT_BATCH_MODE, FIELD(Layout, batch_mode)}};

const Attribute kDescription[] = {
    {CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, FIELD(Description, compute)},
    {CUBLASLT_MATMUL_DESC_SCALE_TYPE, FIELD(Description, scale)},
    {CUBLASLT_MATMUL_DESC_POINTER_MODE, FIELD(Description, pointer_mode)},
    {CUBLASLT_MATMUL_DESC_TRANSA, FIELD(Description, trans_a)},
    {CUBLASLT_MATMUL_DESC_TRANSB, FIELD(Description, trans_b)},
    {CUBLASLT_MATMUL_DESC_TRANSC, FIELD(Description, trans_c)},
    {CUBLASLT_MATMUL_DESC_FILL_MODE, FIELD(Description, fill)},
    {CUBLASLT_MATMUL_DESC_EPILOGUE, FIELD(Description, epilogue)},
    {CUBLASLT_MATMUL_DESC_BIAS_POINTER, FIELD(Description, bias)},
    {CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, FIELD(Description, bias_stride)},
    {CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, FIELD(Description, bias_type)},
    {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, FIELD(Description, aux)},
    {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, FIELD(Description, aux_ld)},
    {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, FIELD(Description, aux_stride)},
    {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, FIELD(Description, aux_type)},
    {CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, FIELD(Description, multiprocessors)},
    {CUBLASLT_MATMUL_DESC_FAST_ACCUM, FIELD(Description, fast_accumulation)}};

const Attribute kPreference[] = {
    {CUBLASLT_MATMUL_PREF_SEARCH_MODE, FIELD(Preference, search)},
    {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, FIELD(Preference, workspace)},
    {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, FIELD(Preference, reductions)},
    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, FIELD(Preference, alignment[0])},
    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, FIELD(Preference, alignment[1])},
    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, FIELD(Preference, alignment[2])},
    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, FIELD(Preference, alignment[3])},
    {CUBLASLT_MATMUL_PREF_MAX_WAVES_COUNT, FIELD(Preference, waves)},
    {CUBLASLT_MATMUL_PREF_IMPL_MASK, FIELD(Preference, implementations)}};
#undef FIELD

template <size_t n>
const Attribute* find(const Attribute (&table)[n], int id, const char* call) {
    for (const Attribute& a : table)
        if (a.id == id) return &a;
    print_refusal(call, "attribute " + std::to_string(id) + " is unknown or not simulated");
    return nullptr;
}

template <size_t n>
cublasStatus_t set(const Attribute (&table)[n], void* opaque, int id, const void* from, size_t size,
                   const char* call) {
    if (!opaque || !from) return refuse(CUBLAS_STATUS_INVALID_VALUE, call, "a pointer is null");
    const Attribute* a = find(table, id, call);
    if (!a) return CUBLAS_STATUS_INVALID_VALUE;
    if (size != a->size)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, call,
                      "attribute " + std::to_string(id) + " has " + std::to_string(a->size) + " bytes, not " +
                          std::to_string(size));
    std::memcpy((char*)opaque + a->offset, from, size);
    return CUBLAS_STATUS_SUCCESS;
}

template <size_t n>
cublasStatus_t query(const Attribute (&table)[n], const void* opaque, int id, void* to, size_t size,
                     size_t* size_written, const char* call) {
    if (!opaque || (size == 0 ? !size_written : !to))
        return refuse(CUBLAS_STATUS_INVALID_VALUE, call, "a pointer is null");
    const Attribute* a = find(table, id, call);
    if (!a) return CUBLAS_STATUS_INVALID_VALUE;
    if (size_written) *size_written = a->size;
    if (size == 0) return CUBLAS_STATUS_SUCCESS;
    if (size != a->size)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, call, "wrong size of attribute " + std::to_string(id));
    std::memcpy(to, (const char*)opaque + a->offset, size);
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace
}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t size,
                                                 cudaDataType type, uint64_t rows, uint64_t cols,
                                                 int64_t ld) {
    return init(layout, size, Layout{.type = (uint32_t)type, .rows = rows, .cols = cols, .ld = ld});
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
    return create(layout, Layout{.type = (uint32_t)type, .rows = rows, .cols = cols, .ld = ld});
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t id, const void* from,
                                                size_t size) {
    return set(kLayout, layout, id, from, size, "cublasLtMatrixLayoutSetAttribute");
}

cublasStatus_t cublasLtMatrixLayoutGetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t id, void* to, size_t size,
                                                size_t* size_written) {
    return query(kLayout, layout, id, to, size, size_written, "cublasLtMatrixLayoutGetAttribute");
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t description, size_t size,
                                               cublasComputeType_t compute, cudaDataType scale) {
    return init(description, size, Description{.compute = compute, .scale = scale});
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* description, cublasComputeType_t compute,
                                        cudaDataType scale) {
    return create(description, Description{.compute = compute, .scale = scale});
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    delete description;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                              cublasLtMatmulDescAttributes_t id, const void* from,
                                              size_t size) {
    return set(kDescription, description, id, from, size, "cublasLtMatmulDescSetAttribute");
}

cublasStatus_t cublasLtMatmulDescGetAttribute(cublasLtMatmulDesc_t description,
                                              cublasLtMatmulDescAttributes_t id, void* to, size_t size,
                                              size_t* size_written) {
    return query(kDescription, description, id, to, size, size_written, "cublasLtMatmulDescGetAttribute");
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t preference, size_t size) {
    return init(preference, size, Preference{});
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    return create(preference, Preference{});
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t id, const void* from,
                                                    size_t size) {
    return set(kPreference, preference, id, from, size, "cublasLtMatmulPreferenceSetAttribute");
}

cublasStatus_t cublasLtMatmulPreferenceGetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t id, void* to,
                                                    size_t size, size_t* size_written) {
    return query(kPreference, preference, id, to, size, size_written, "cublasLtMatmulPreferenceGetAttribute");
}

}  // extern "C"
