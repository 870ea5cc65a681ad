// The matrix product behind cuBLAS and cuBLASLt: D = epilogue(alpha op(A) op(B) + beta C), computed in
// float32 by the project's CPU matmul (llmc/cpu/matmul.h).
#pragma once
#include <cublas_api.h>

#include "dev/ptxsim/operand.h"

namespace ptxsim {

enum class Precision : uint8_t { as_stored, tf32, bf16, f16 };  // the type to which A and B are rounded first

enum class Activation : uint8_t { none, relu, gelu, dgelu };
// What the bias vector is for: it is added to the product, or it receives a gradient of a bias.
enum class Bias : uint8_t {
    none,
    add,
    gradient_d,  // sums of D over its columns
    gradient_a,  // sums of op(A) over k
    gradient_b,  // sums of op(B) over k
};

struct Gemm {
    const char* call = "";  // for reports
    int64_t m = 0, n = 0, k = 0, batches = 1;
    Operand a{.name = "A"}, b{.name = "B"}, c{.name = "C"}, d{.name = "D"};
    bool trans_a = false, trans_b = false;
    Precision precision = Precision::as_stored;
    float alpha = 1, beta = 0;
    uint64_t device_alpha = 0, device_beta = 0;  // if not 0, alpha and beta are in device memory, there

    Activation activation = Activation::none;
    Bias bias_use = Bias::none;
    Operand bias{.name = "bias"};
    bool has_aux = false;  // aux holds the input of gelu: gelu writes it, dgelu reads it
    Operand aux{.name = "aux"};

    uint64_t workspace = 0;
    // The first spoiled_bytes of the workspace are filled with NaN and count as unwritten, because the real
    // library may overwrite them.
    size_t workspace_bytes = 0, spoiled_bytes = 0;
};

// All the memory that the product uses.
std::vector<MemoryUse> uses_of(const Gemm& gemm);

// Checks the operands, reports what is wrong with them, and computes the product if they are usable.
void run_gemm(Gemm gemm);

// Checks that the real libraries have a product of these types; if not, prints a line. Sets *precision by
// `compute`.
cublasStatus_t check_types(const char* call, cublasComputeType_t compute, cudaDataType scale, cudaDataType a,
                           cudaDataType b, cudaDataType c, cudaDataType d, Precision* precision);

// Makes the operand for a matrix of rows x cols in column-major or row-major order.
Operand make_operand(const char* name, const void* address, cudaDataType type, int64_t rows, int64_t cols,
                     int64_t ld, int64_t stride = 0, bool row_major = false);

}  // namespace ptxsim
