// The matrix product behind cuBLAS and cuBLASLt: D = epilogue(alpha op(A) op(B) + beta C), in float32 by the
// project's CPU matmul (llmc/cpu/matmul.h).
#pragma once
#include <cublas_api.h>

#include "dev/ptxsim/operand.h"

namespace ptxsim {

enum class Precision : uint8_t { as_stored, tf32, bf16, f16 };  // what factors are rounded to first

enum class Activation : uint8_t { none, relu, gelu, dgelu };
// Of a vector next to the product: added to it, or one of the gradients of such a vector.
enum class Bias : uint8_t {
    none,
    add,
    gradient_d,  // the sums of the columns of D
    gradient_a,  // of op(A) over k
    gradient_b,  // of op(B) over k
};

struct Gemm {
    const char* call = "";  // for reports
    int64_t m = 0, n = 0, k = 0, batches = 1;
    Operand a{.name = "A"}, b{.name = "B"}, c{.name = "C"}, d{.name = "D"};
    bool trans_a = false, trans_b = false;
    Precision precision = Precision::as_stored;
    float alpha = 1, beta = 0;
    uint64_t device_alpha = 0, device_beta = 0;  // where not 0, they are there

    Activation activation = Activation::none;
    Bias bias_use = Bias::none;
    Operand bias{.name = "bias"};
    bool has_aux = false;  // gelu writes what went into it there, dgelu reads it
    Operand aux{.name = "aux"};

    uint64_t workspace = 0;
    size_t workspace_bytes = 0, spoiled_bytes = 0;  // the first of them are lost: filled, and not written
};

// Checks the operands, reports what is wrong with them, and computes.
void run_gemm(Gemm gemm);

// Whether the real libraries have a product of these types; if not, says so. `compute` fixes the precision.
cublasStatus_t check_types(const char* call, cublasComputeType_t compute, cudaDataType scale, cudaDataType a,
                           cudaDataType b, cudaDataType c, cudaDataType d, Precision* precision);

// The operand that a matrix of rows x cols in column- or row-major order is.
Operand make_operand(const char* name, const void* address, cudaDataType type, int64_t rows, int64_t cols,
                     int64_t ld, int64_t stride = 0, bool row_major = false);

}  // namespace ptxsim
