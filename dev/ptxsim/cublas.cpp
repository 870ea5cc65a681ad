// cuBLAS: the products and the few vector functions that trainers use. One template serves a function and its
// _64 twin, because the two differ only in the type of their sizes.
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "dev/ptxsim/gemm.h"
#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/stream_work.h"

struct cublasContext {
    cudaStream_t stream = nullptr;
    cublasPointerMode_t pointer_mode = CUBLAS_POINTER_MODE_HOST;
    cublasMath_t math = CUBLAS_DEFAULT_MATH;
    void* workspace = nullptr;
    size_t workspace_bytes = 0;
};

namespace ptxsim {
namespace {

constexpr cublasStatus_t kInvalid = CUBLAS_STATUS_INVALID_VALUE;

struct Matrix {
    const void* address;
    cudaDataType type;
    int64_t ld, stride;
};

struct Sizes {
    int64_t m, n, k, batches;
};

cublasStatus_t product(const char* call, cublasHandle_t handle, cublasOperation_t op_a,
                       cublasOperation_t op_b, Sizes size, const void* alpha, Matrix a, Matrix b,
                       const void* beta, Matrix c, cublasComputeType_t compute) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!alpha || !beta) return refuse(kInvalid, call, "alpha or beta is null");
    for (auto op : {op_a, op_b})
        if (op != CUBLAS_OP_N && op != CUBLAS_OP_T && op != CUBLAS_OP_C)
            return refuse(kInvalid, call, "unknown transposition " + std::to_string(op));
    auto [m, n, k, batches] = size;
    if (m < 0 || n < 0 || k < 0 || batches < 0) return refuse(kInvalid, call, "a size is negative");
    if (std::max({m, n, k}) > INT32_MAX)
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call, "sizes of 2^31 and more are not simulated");
    Gemm g;
    g.call = call;
    g.m = m;
    g.n = n;
    g.k = k;
    g.batches = batches;
    g.trans_a = op_a != CUBLAS_OP_N;
    g.trans_b = op_b != CUBLAS_OP_N;
    g.a = make_operand("A", a.address, a.type, g.trans_a ? k : m, g.trans_a ? m : k, a.ld, a.stride);
    g.b = make_operand("B", b.address, b.type, g.trans_b ? n : k, g.trans_b ? k : n, b.ld, b.stride);
    g.c = g.d = make_operand("C", c.address, c.type, m, n, c.ld, c.stride);
    for (const Operand* x : {&g.a, &g.b, &g.c})
        if (x->ld < std::max<int64_t>(1, x->inner))
            return refuse(kInvalid, call,
                          std::string(x->name) + " has ld " + std::to_string(x->ld) + ", but " +
                              std::to_string(x->inner) + " rows");
    if (cublasStatus_t s =
            check_types(call, compute, CUDA_R_32F, a.type, b.type, c.type, c.type, &g.precision))
        return s;
    if (handle->math == CUBLAS_TF32_TENSOR_OP_MATH && compute == CUBLAS_COMPUTE_32F && a.type == CUDA_R_32F)
        g.precision = Precision::tf32;
    if (m == 0 || n == 0 || batches == 0) return CUBLAS_STATUS_SUCCESS;
    if (handle->pointer_mode == CUBLAS_POINTER_MODE_HOST) {
        std::memcpy(&g.alpha, alpha, sizeof g.alpha);
        std::memcpy(&g.beta, beta, sizeof g.beta);
    } else {
        g.device_alpha = (uint64_t)alpha;
        g.device_beta = (uint64_t)beta;
    }
    g.workspace = (uint64_t)handle->workspace;
    g.workspace_bytes = handle->workspace_bytes;
    g.spoiled_bytes = std::min<size_t>(g.workspace_bytes, 64 << 10);  // filling a large one takes too long
    enqueue(handle->stream, g.call, uses_of(g), [g] { run_gemm(g); });
    return CUBLAS_STATUS_SUCCESS;
}

// y = alpha op(A) x + beta y, as the product y^T = x^T op(A)^T. x^T and y^T are column-major matrices of one
// row, so the steps of x and y are their leading dimensions.
cublasStatus_t matrix_vector(cublasHandle_t handle, cublasOperation_t op, int64_t m, int64_t n,
                             const float* alpha, const float* A, int64_t lda, const float* x, int64_t step_x,
                             const float* beta, float* y, int64_t step_y) {
    const char* call = "cublasSgemv";
    if (step_x < 1 || step_y < 1)
        return refuse(step_x && step_y ? CUBLAS_STATUS_NOT_SUPPORTED : kInvalid, call,
                      "steps below 1 are not simulated");
    bool transposed = op != CUBLAS_OP_N;
    Sizes size{1, transposed ? n : m, transposed ? m : n, 1};
    return product(call, handle, CUBLAS_OP_N, transposed ? CUBLAS_OP_N : CUBLAS_OP_T, size, alpha,
                   {x, CUDA_R_32F, step_x, 0}, {A, CUDA_R_32F, lda, 0}, beta, {y, CUDA_R_32F, step_y, 0},
                   CUBLAS_COMPUTE_32F);
}

// A strided vector of floats in device memory is an operand with n lines of one element.
Operand make_vector(const char* name, const void* address, int64_t n, int64_t step) {
    return {.name = name, .address = (uint64_t)address, .inner = 1, .outer = n, .ld = step};
}

float& at(const Operand& vector, int64_t i) {
    return *reinterpret_cast<float*>(memory::view(vector.line(0, i)));
}

bool readable(const char* call, const Operand& x) {
    if (!check_range(call, x, 1)) return false;
    check_written(call, x, 1);
    return true;
}

// The checks with which the vector functions begin. True if the call is refused and has to return *status.
bool refused(const char* call, cublasHandle_t handle, int64_t step_x, int64_t step_y,
             cublasStatus_t* status) {
    *status = CUBLAS_STATUS_SUCCESS;
    if (!handle)
        *status = CUBLAS_STATUS_NOT_INITIALIZED;
    else if (step_x < 1 || step_y < 1)
        *status = refuse(CUBLAS_STATUS_NOT_SUPPORTED, call, "steps below 1 are not simulated");
    return *status != CUBLAS_STATUS_SUCCESS;
}

// A scalar argument: its value, or its place in device memory, where it is read when the work runs.
struct Scalar {
    float value = 0;
    Operand on_device{.name = "alpha", .inner = 1};

    Scalar(cublasHandle_t handle, const float* from) {
        if (handle->pointer_mode == CUBLAS_POINTER_MODE_HOST)
            value = *from;
        else
            on_device.address = (uint64_t)from;
    }
    bool read(const char* call, float* out) const {
        *out = value;
        if (!on_device.address) return true;
        if (!readable(call, on_device)) return false;
        *out = at(on_device, 0);
        return true;
    }
};

cublasStatus_t scale(cublasHandle_t handle, int64_t n, const float* alpha, float* address, int64_t step) {
    const char* call = "cublasSscal";
    cublasStatus_t status;
    if (refused(call, handle, step, 1, &status)) return status;
    if (!alpha) return kInvalid;
    Operand x = make_vector("x", address, n, step);
    enqueue(handle->stream, call, {x.use(Use::write, 1)}, [=, alpha = Scalar(handle, alpha)] {
        float factor;
        if (!alpha.read(call, &factor) || !readable(call, x)) return;
        for (int64_t i = 0; i < n; i++) at(x, i) *= factor;
    });
    return status;
}

cublasStatus_t add_scaled(cublasHandle_t handle, int64_t n, const float* alpha, const float* from,
                          int64_t step_x, float* to, int64_t step_y) {
    const char* call = "cublasSaxpy";
    cublasStatus_t status;
    if (refused(call, handle, step_x, step_y, &status)) return status;
    if (!alpha) return kInvalid;
    Operand x = make_vector("x", from, n, step_x), y = make_vector("y", to, n, step_y);
    enqueue(handle->stream, call, {x.use(Use::read, 1), y.use(Use::write, 1)},
            [=, alpha = Scalar(handle, alpha)] {
                float factor;
                if (!alpha.read(call, &factor) || !readable(call, x) || !readable(call, y)) return;
                for (int64_t i = 0; i < n; i++) at(y, i) += factor * at(x, i);
            });
    return status;
}

// The dot product, or its square root, which is the norm. If the result is in host memory the call waits for
// it.
cublasStatus_t dot(const char* call, cublasHandle_t handle, int64_t n, const float* first, int64_t step_x,
                   const float* second, int64_t step_y, bool root, float* result) {
    cublasStatus_t status;
    if (refused(call, handle, step_x, step_y, &status)) return status;
    if (!result) return kInvalid;
    Operand x = make_vector("x", first, n, step_x), y = make_vector("y", second, n, step_y);
    bool on_host = handle->pointer_mode == CUBLAS_POINTER_MODE_HOST;
    std::vector<MemoryUse> uses = {x.use(Use::read, 1), y.use(Use::read, 1)};
    if (!on_host) uses.push_back({(uint64_t)result, sizeof *result, Use::write});
    enqueue(handle->stream, call, uses, [=] {
        Operand out = make_vector("the result", result, 1, 1);
        if (!readable(call, x) || !readable(call, y) || (!on_host && !check_range(call, out, 1))) return;
        double sum = 0;
        for (int64_t i = 0; i < n; i++) sum += (double)at(x, i) * at(y, i);
        float value = (float)(root ? std::sqrt(sum) : sum);
        if (on_host) {
            *result = value;
        } else {
            at(out, 0) = value;
            mark_written(out, 1);
        }
    });
    if (on_host && cudaStreamSynchronize(handle->stream) != cudaSuccess)
        return CUBLAS_STATUS_EXECUTION_FAILED;
    return status;
}

}  // namespace
}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    if (!handle) return kInvalid;
    *handle = new cublasContext;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetVersion_v2(cublasHandle_t, int* version) {
    if (!version) return kInvalid;
    *version = CUBLAS_VERSION;
    return CUBLAS_STATUS_SUCCESS;
}

// When the stream changes, the real library stops using the program's workspace and uses its own.
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    handle->stream = stream;
    handle->workspace = nullptr;
    handle->workspace_bytes = 0;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t* stream) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!stream) return kInvalid;
    *stream = handle->stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if ((uint64_t)workspace % 256)
        return refuse(kInvalid, "cublasSetWorkspace", "the workspace is not aligned to 256 bytes");
    handle->workspace = workspace;
    handle->workspace_bytes = workspace ? bytes : 0;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (mode != CUBLAS_POINTER_MODE_HOST && mode != CUBLAS_POINTER_MODE_DEVICE) return kInvalid;
    handle->pointer_mode = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t* mode) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!mode) return kInvalid;
    *mode = handle->pointer_mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    int base = mode & ~CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    if (base != CUBLAS_DEFAULT_MATH && base != CUBLAS_PEDANTIC_MATH && base != CUBLAS_TF32_TENSOR_OP_MATH)
        return refuse(kInvalid, "cublasSetMathMode", "mode " + std::to_string(mode) + " is not simulated");
    handle->math = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!mode) return kInvalid;
    *mode = handle->math;
    return CUBLAS_STATUS_SUCCESS;
}

const char* cublasGetStatusName(cublasStatus_t status) {
    switch (status) {
#define NAME(status) \
    case status:     \
        return #status;
        NAME(CUBLAS_STATUS_SUCCESS)
        NAME(CUBLAS_STATUS_NOT_INITIALIZED)
        NAME(CUBLAS_STATUS_ALLOC_FAILED)
        NAME(CUBLAS_STATUS_INVALID_VALUE)
        NAME(CUBLAS_STATUS_ARCH_MISMATCH)
        NAME(CUBLAS_STATUS_MAPPING_ERROR)
        NAME(CUBLAS_STATUS_EXECUTION_FAILED)
        NAME(CUBLAS_STATUS_INTERNAL_ERROR)
        NAME(CUBLAS_STATUS_NOT_SUPPORTED)
        NAME(CUBLAS_STATUS_LICENSE_ERROR)
#undef NAME
    }
    return "CUBLAS_STATUS_UNKNOWN";
}

const char* cublasGetStatusString(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS:
            return "success";
        case CUBLAS_STATUS_NOT_INITIALIZED:
            return "the library was not initialized";
        case CUBLAS_STATUS_ALLOC_FAILED:
            return "the resource allocation failed";
        case CUBLAS_STATUS_INVALID_VALUE:
            return "an unsupported value or parameter was passed to the function";
        case CUBLAS_STATUS_EXECUTION_FAILED:
            return "the function failed to launch on the GPU";
        case CUBLAS_STATUS_INTERNAL_ERROR:
            return "an internal operation failed";
        case CUBLAS_STATUS_NOT_SUPPORTED:
            return "the functionality requested is not supported";
        default:
            return cublasGetStatusName(status);
    }
}

#define OPS cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb
// Defines a function with 32-bit sizes and its twin with 64-bit sizes.
#define BOTH(name, twin, parameters, ...)                                                      \
    cublasStatus_t name parameters(int){__VA_ARGS__} cublasStatus_t twin parameters(int64_t) { \
        __VA_ARGS__                                                                            \
    }

#define SGEMM(Int)                                                                                   \
    (OPS, Int m, Int n, Int k, const float* alpha, const float* A, Int lda, const float* B, Int ldb, \
     const float* beta, float* C, Int ldc)
#define SGEMM_BATCHED(Int)                                                                                \
    (OPS, Int m, Int n, Int k, const float* alpha, const float* A, Int lda, long long sa, const float* B, \
     Int ldb, long long sb, const float* beta, float* C, Int ldc, long long sc, Int batches)
#define GEMM_EX(Int)                                                                                       \
    (OPS, Int m, Int n, Int k, const void* alpha, const void* A, cudaDataType type_a, Int lda,             \
     const void* B, cudaDataType type_b, Int ldb, const void* beta, void* C, cudaDataType type_c, Int ldc, \
     cublasComputeType_t compute, cublasGemmAlgo_t)
#define GEMM_EX_BATCHED(Int)                                                                                 \
    (OPS, Int m, Int n, Int k, const void* alpha, const void* A, cudaDataType type_a, Int lda, long long sa, \
     const void* B, cudaDataType type_b, Int ldb, long long sb, const void* beta, void* C,                   \
     cudaDataType type_c, Int ldc, long long sc, Int batches, cublasComputeType_t compute, cublasGemmAlgo_t)
#define SGEMV(Int)                                                                                           \
    (cublasHandle_t handle, cublasOperation_t op, Int m, Int n, const float* alpha, const float* A, Int lda, \
     const float* x, Int incx, const float* beta, float* y, Int incy)
#define SAXPY(Int) \
    (cublasHandle_t handle, Int n, const float* alpha, const float* x, Int incx, float* y, Int incy)
#define SSCAL(Int) (cublasHandle_t handle, Int n, const float* alpha, float* x, Int incx)
#define SDOT(Int) \
    (cublasHandle_t handle, Int n, const float* x, Int incx, const float* y, Int incy, float* result)
#define SNRM2(Int) (cublasHandle_t handle, Int n, const float* x, Int incx, float* result)

BOTH(cublasSgemm_v2, cublasSgemm_v2_64, SGEMM,
     return product("cublasSgemm", handle, ta, tb, {m, n, k, 1}, alpha, {A, CUDA_R_32F, lda, 0},
                    {B, CUDA_R_32F, ldb, 0}, beta, {C, CUDA_R_32F, ldc, 0}, CUBLAS_COMPUTE_32F);)
BOTH(cublasSgemmStridedBatched, cublasSgemmStridedBatched_64, SGEMM_BATCHED,
     return product("cublasSgemmStridedBatched", handle, ta, tb, {m, n, k, batches}, alpha,
                    {A, CUDA_R_32F, lda, sa}, {B, CUDA_R_32F, ldb, sb}, beta, {C, CUDA_R_32F, ldc, sc},
                    CUBLAS_COMPUTE_32F);)
BOTH(cublasGemmEx, cublasGemmEx_64, GEMM_EX,
     return product("cublasGemmEx", handle, ta, tb, {m, n, k, 1}, alpha, {A, type_a, lda, 0},
                    {B, type_b, ldb, 0}, beta, {C, type_c, ldc, 0}, compute);)
BOTH(cublasGemmStridedBatchedEx, cublasGemmStridedBatchedEx_64, GEMM_EX_BATCHED,
     return product("cublasGemmStridedBatchedEx", handle, ta, tb, {m, n, k, batches}, alpha,
                    {A, type_a, lda, sa}, {B, type_b, ldb, sb}, beta, {C, type_c, ldc, sc}, compute);)
BOTH(cublasSgemv_v2, cublasSgemv_v2_64, SGEMV,
     return matrix_vector(handle, op, m, n, alpha, A, lda, x, incx, beta, y, incy);)
BOTH(cublasSaxpy_v2, cublasSaxpy_v2_64, SAXPY, return add_scaled(handle, n, alpha, x, incx, y, incy);)
BOTH(cublasSscal_v2, cublasSscal_v2_64, SSCAL, return scale(handle, n, alpha, x, incx);)
BOTH(cublasSdot_v2, cublasSdot_v2_64, SDOT,
     return dot("cublasSdot", handle, n, x, incx, y, incy, false, result);)
BOTH(cublasSnrm2_v2, cublasSnrm2_v2_64, SNRM2,
     return dot("cublasSnrm2", handle, n, x, incx, x, incx, true, result);)

}  // extern "C"
