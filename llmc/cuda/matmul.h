// Matrix products of row-major matrices by cuBLASLt, and the linear layer on top of them. Factors are float
// or bf16, sums are float, and the product is stored as either. What follows a product element by element
// (bias, GELU, its derivative) is done in its epilogue, before the product is in memory.
#pragma once
#include <cublasLt.h>

#include <compare>
#include <map>
#include <string>
#include <utility>

#include "llmc/cuda/column_sums.h"
#include "llmc/cuda/common.h"

namespace gpu {

constexpr size_t kMatmulWorkspace = 32 << 20;  // bytes: what NVIDIA recommends for Hopper

// What is done to c = a b before it is stored. Vectors and matrices have the type of c, because cuBLASLt
// offers nothing else.
template <class Result>
struct Epilogue {
    const Result* bias = nullptr;   // (N): added to each row
    Result* pre_gelu = nullptr;     // (M,N): c = gelu(a b + bias), and a b + bias is left here
    const Result* dgelu = nullptr;  // (M,N): c = a b times the derivative of gelu here
};

// Whether rows of this many columns can have an epilogue with a GELU: cuBLASLt needs whole packs of 8 in its
// second matrix. Otherwise gelu_forward and gelu_backward follow the product.
inline bool gelu_fuses(int columns) {
    return columns % 8 == 0;
}

// cuBLASLt's handle, the workspace, and the algorithms found so far. All products go to one stream, because
// they share the workspace.
class MatmulContext {
  public:
    // tf32: products of floats may round their factors to 10 bits of mantissa.
    explicit MatmulContext(void* workspace /*(kMatmulWorkspace) bytes*/, bool tf32 = false)
        : workspace_(workspace), tf32_(tf32) {
        cublasStatus_t status = cublasLtCreate(&handle_);
        if (status != CUBLAS_STATUS_SUCCESS)
            fail("cuBLASLt: ", cublasLtGetStatusName(status), " at its start");
    }
    ~MatmulContext() { cublasLtDestroy(handle_); }
    MatmulContext(const MatmulContext&) = delete;

    // The workspace is free between products, and may be used as scratch for this many floats.
    template <size_t kFloats>
    float* scratch() const {
        static_assert(kFloats * sizeof(float) <= kMatmulWorkspace);
        return (float*)workspace_;
    }
    size_t algorithms() const { return plans_.size(); }

    template <class Result, class Factor>
    void multiply(Result* c, const Factor* a, const Factor* b, int M, int N, int K, bool trans_a,
                  bool trans_b, bool accumulate, const Epilogue<Result>& epilogue, cudaStream_t stream) {
        // cuBLASLt has epilogues only for matrices stored by columns, so it computes c^T = b^T a^T.
        Problem p{.m = N,
                  .n = M,
                  .k = K,
                  .trans_a = trans_b,
                  .trans_b = trans_a,
                  .factor = type<Factor>(),
                  .result = type<Result>(),
                  .epilogue = kind(epilogue),
                  .alignment_a = alignment(b),
                  .alignment_b = alignment(a),
                  .alignment_d = alignment(c)};
        if ((epilogue.pre_gelu || epilogue.dgelu) && !gelu_fuses(N))
            fail("cuBLASLt: ", text(p), ": a GELU in the epilogue needs a multiple of 8 columns");
        auto found = plans_.find(p);
        if (found == plans_.end()) found = plans_.emplace(p, make_plan(p)).first;
        Plan& plan = found->second;
        if (epilogue.bias)
            set(p, plan.description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, (const void*)epilogue.bias);
        const void* aux = epilogue.pre_gelu ? epilogue.pre_gelu : epilogue.dgelu;
        if (aux) set(p, plan.description, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
        float alpha = 1, beta = accumulate ? 1 : 0;
        check(p, "the product",
              cublasLtMatmul(handle_, &plan.description, &alpha, b, &plan.a, a, &plan.b, &beta, c, &plan.d, c,
                             &plan.d, &plan.algorithm, workspace_, kMatmulWorkspace, stream));
    }

  private:
    // In cuBLASLt's terms: D (m,n) = op(A) (m,k) op(B) (k,n), by columns.
    struct Problem {
        int m, n, k;
        bool trans_a, trans_b;
        cudaDataType factor, result;
        cublasLtEpilogue_t epilogue;
        uint32_t alignment_a, alignment_b, alignment_d;  // of the addresses, in bytes
        auto operator<=>(const Problem&) const = default;
    };

    struct Plan {
        cublasLtMatmulDescOpaque_t description;
        cublasLtMatrixLayoutOpaque_t a, b, d;
        cublasLtMatmulAlgo_t algorithm;
    };

    cublasLtHandle_t handle_ = nullptr;
    void* workspace_;
    bool tf32_;
    std::map<Problem, Plan> plans_;

    template <class T>
    static cudaDataType type() {
        return std::is_same_v<T, bf16> ? CUDA_R_16BF : CUDA_R_32F;
    }

    // No kernel asks for more than 16 bytes.
    static uint32_t alignment(const void* at) {
        uintptr_t bits = (uintptr_t)at | 16;
        return (uint32_t)(bits & -bits);
    }

    template <class Result>
    static cublasLtEpilogue_t kind(const Epilogue<Result>& e) {
        if (e.dgelu) return CUBLASLT_EPILOGUE_DGELU;
        if (e.pre_gelu) return e.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
        return e.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    }

    // The product in the words of the caller, for whom matrices are stored by rows.
    static std::string text(const Problem& p) {
        auto name = [](cudaDataType type) { return type == CUDA_R_16BF ? "bf16" : "float"; };
        const char* epilogue = p.epilogue == CUBLASLT_EPILOGUE_DGELU           ? "dGELU"
                               : p.epilogue == CUBLASLT_EPILOGUE_GELU_AUX      ? "GELU"
                               : p.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS ? "bias and GELU"
                               : p.epilogue == CUBLASLT_EPILOGUE_BIAS          ? "bias"
                                                                               : "none";
        return str("product (", p.n, ",", p.m, ") = (", p.n, ",", p.k, ")", p.trans_b ? " transposed" : "",
                   " times (", p.k, ",", p.m, ")", p.trans_a ? " transposed" : "", ", ", name(p.factor),
                   " to ", name(p.result), ", epilogue ", epilogue);
    }

    static void check(const Problem& p, const char* what, cublasStatus_t status) {
        if (status == CUBLAS_STATUS_SUCCESS) return;
        cudaError_t cause = cudaPeekAtLastError();  // it may come from work before the product
        fail("cuBLASLt: ", what, " failed with ", cublasLtGetStatusName(status), ": ", text(p),
             cause == cudaSuccess ? "" : str("; CUDA: ", cudaGetErrorString(cause)));
    }

    template <class Value>
    static void set(const Problem& p, cublasLtMatmulDescOpaque_t& description,
                    cublasLtMatmulDescAttributes_t attribute, const Value& value) {
        check(p, "an attribute",
              cublasLtMatmulDescSetAttribute(&description, attribute, &value, sizeof value));
    }

    Plan make_plan(const Problem& p) {
        Plan plan{};
        bool rounds = tf32_ && p.factor == CUDA_R_32F;
        check(p, "the description",
              cublasLtMatmulDescInit(&plan.description,
                                     rounds ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F));
        set(p, plan.description, CUBLASLT_MATMUL_DESC_TRANSA, p.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(p, plan.description, CUBLASLT_MATMUL_DESC_TRANSB, p.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(p, plan.description, CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue);
        if (p.epilogue != CUBLASLT_EPILOGUE_DEFAULT && p.epilogue != CUBLASLT_EPILOGUE_BIAS)
            set(p, plan.description, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)p.m);
        auto layout = [&](cublasLtMatrixLayoutOpaque_t& to, cudaDataType type, bool trans, int rows,
                          int columns) {
            if (trans) std::swap(rows, columns);
            check(p, "a layout", cublasLtMatrixLayoutInit(&to, type, rows, columns, rows));
        };
        layout(plan.a, p.factor, p.trans_a, p.m, p.k);
        layout(plan.b, p.factor, p.trans_b, p.k, p.n);
        layout(plan.d, p.result, false, p.m, p.n);

        cublasLtMatmulPreferenceOpaque_t preference;
        auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
            check(p, "a preference",
                  cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value));
        };
        check(p, "the preference", cublasLtMatmulPreferenceInit(&preference));
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kMatmulWorkspace);
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, p.alignment_a);
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, p.alignment_b);
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, p.alignment_d);
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, p.alignment_d);
        cublasLtMatmulHeuristicResult_t result{};
        int count = 0;
        cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
            handle_, &plan.description, &plan.a, &plan.b, &plan.d, &plan.d, &preference, 1, &result, &count);
        if (status == CUBLAS_STATUS_SUCCESS && count > 0) status = result.state;
        if (status != CUBLAS_STATUS_SUCCESS || count == 0)
            fail("cuBLASLt finds no algorithm (", cublasLtGetStatusName(status), ") for the ", text(p));
        plan.algorithm = result.algo;
        return plan;
    }
};

// c (M,N) = a b, or c += a b with `accumulate`, and then the epilogue.
template <class Result, class Factor>
void matmul(Result* c,        // (M,N)
            const Factor* a,  // (M,K), or (K,M) with trans_a
            const Factor* b,  // (K,N), or (N,K) with trans_b
            int M, int N, int K, bool trans_a, bool trans_b, bool accumulate,
            const Epilogue<Result>& epilogue, MatmulContext& context, cudaStream_t stream) {
    context.multiply(c, a, b, M, N, K, trans_a, trans_b, accumulate, epilogue, stream);
}

// The linear layer: out = inp weight + bias.
template <class Real>
void matmul_forward(Real* out,           // (N,OC)
                    const Real* inp,     // (N,IC)
                    const Real* weight,  // (IC,OC)
                    const Real* bias,    // (OC), or null
                    int N, int IC, int OC, MatmulContext& context, cudaStream_t stream) {
    matmul(out, inp, weight, N, OC, IC, false, false, false, {.bias = bias}, context, stream);
}

// out = gelu(inp weight + bias). It needs gelu_fuses(OC).
template <class Real>
void matmul_gelu_forward(Real* out,           // (N,OC)
                         Real* pre_gelu,      // (N,OC): inp weight + bias
                         const Real* inp,     // (N,IC)
                         const Real* weight,  // (IC,OC)
                         const Real* bias,    // (OC), or null
                         int N, int IC, int OC, MatmulContext& context, cudaStream_t stream) {
    matmul(out, inp, weight, N, OC, IC, false, false, false, {.bias = bias, .pre_gelu = pre_gelu}, context,
           stream);
}

// The backward pass of a linear layer whose input is gelu(pre_gelu): dinp is the gradient of pre_gelu.
// Gradient is float or bf16.
template <class Real, class Gradient>
void matmul_gelu_backward(Real* dinp,            // (N,IC), or null: not wanted
                          Gradient* dweight,     // (IC,OC) +=, or = without `accumulate`
                          float* dbias,          // (OC) +=, or null
                          const Real* dout,      // (N,OC)
                          const Real* inp,       // (N,IC)
                          const Real* weight,    // (IC,OC)
                          const Real* pre_gelu,  // (N,IC), which needs gelu_fuses(IC); or null: no GELU
                          bool accumulate, int N, int IC, int OC, MatmulContext& context,
                          cudaStream_t stream) {
    if (dinp) matmul(dinp, dout, weight, N, IC, OC, false, true, false, {.dgelu = pre_gelu}, context, stream);
    matmul(dweight, inp, dout, IC, OC, N, true, false, accumulate, {}, context, stream);
    // This is not an epilogue, because those overwrite dbias and need it in the type of dweight.
    if (dbias) add_column_sums(dbias, context.scratch<kColumnSumsScratch>(), dout, N, OC, stream);
}

template <class Real, class Gradient>
void matmul_backward(Real* dinp,          // (N,IC) =, or += with `adds_dinp`; null: not wanted
                     Gradient* dweight,   // (IC,OC) +=, or = without `accumulate`
                     float* dbias,        // (OC) +=, or null
                     const Real* dout,    // (N,OC)
                     const Real* inp,     // (N,IC)
                     const Real* weight,  // (IC,OC)
                     bool accumulate, int N, int IC, int OC, MatmulContext& context, cudaStream_t stream,
                     bool adds_dinp = false) {
    if (dinp && adds_dinp) matmul(dinp, dout, weight, N, IC, OC, false, true, true, {}, context, stream);
    matmul_gelu_backward(adds_dinp ? nullptr : dinp, dweight, dbias, dout, inp, weight, (const Real*)nullptr,
                         accumulate, N, IC, OC, context, stream);
}

}  // namespace gpu
