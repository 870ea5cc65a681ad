// Matrices in ptxsim's device memory, and calls of cublasLtMatmul with their expected results.
#pragma once
#include <cublasLt.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/report.h"

namespace ptxsim_libraries {

using ptxsim::Fault;
namespace memory = ptxsim::memory;

// x rounded to a significand of `bits` bits. Ties are rounded away from zero with `away`, else to even.
inline double rounded(double x, int bits, bool away = false) {
    int e;
    double f = std::ldexp(std::frexp(x, &e), bits);
    return std::ldexp(away ? std::round(f) : std::nearbyint(f), e - bits);
}

inline size_t size_of(cudaDataType type) {
    return type == CUDA_R_32F ? 4 : 2;
}

inline double rounded(double x, cudaDataType type) {
    return type == CUDA_R_32F ? (double)(float)x : rounded(x, type == CUDA_R_16BF ? 8 : 11);
}

inline void encode(std::byte* to, double x, cudaDataType type) {
    float f = (float)x;
    __half h = __float2half(f);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint16_t upper = (uint16_t)(bits >> 16);
    std::memcpy(to,
                type == CUDA_R_32F   ? (void*)&f
                : type == CUDA_R_16F ? (void*)&h
                                     : (void*)&upper,
                size_of(type));
}

inline double decode(const std::byte* from, cudaDataType type) {
    float f = 0;
    __half h;
    if (type == CUDA_R_16F) {
        std::memcpy(&h, from, 2);
        return __half2float(h);
    }
    std::memcpy((char*)&f + 4 - size_of(type), from, size_of(type));
    return f;
}

struct Buffer {
    uint64_t address;
    size_t bytes;
    explicit Buffer(size_t n)
        : address(memory::allocate(n, ptxsim::MemoryKind::device, "a test's buffer")), bytes(n) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { memory::free(address); }
    void* pointer() const { return (void*)address; }
};

// A batch of matrices in device memory, and the same values as doubles, rounded to the type.
struct Matrix {
    cudaDataType type;
    int rows, cols, ld, batches;
    bool row_major;
    int64_t stride;
    Buffer buffer;
    std::vector<double> values;  // (batches, rows, cols)

    Matrix(cudaDataType type, int rows, int cols, int pad = 0, int batches = 1, bool row_major = false)
        : type(type),
          rows(rows),
          cols(cols),
          ld((row_major ? cols : rows) + pad),
          batches(batches),
          row_major(row_major),
          stride((int64_t)ld * (row_major ? rows : cols) + pad),
          buffer(stride * batches * size_of(type)),
          values((size_t)rows * cols * batches) {}

    uint64_t at(int batch, int r, int c) const {
        int64_t index = batch * stride + (row_major ? (int64_t)r * ld + c : (int64_t)c * ld + r);
        return buffer.address + index * size_of(type);
    }
    double& value(int batch, int r, int c) { return values[((size_t)batch * rows + r) * cols + c]; }

    template <class F>
    void each(F f) {
        for (int b = 0; b < batches; b++)
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < cols; c++) f(value(b, r, c), at(b, r, c));
    }
    void fill(std::mt19937& random) {
        std::normal_distribution<double> normal;
        each([&](double& x, uint64_t address) {
            x = rounded(normal(random), type);
            encode(memory::view(address), x, type);
            memory::mark_written(address, size_of(type));
        });
    }
    // The relative norm of the difference to `values`. Also checks that all elements were marked as written,
    // and nothing else was.
    double difference() {
        double wrong = 0, norm = 0;
        size_t written = 0;
        each([&](double x, uint64_t address) {
            double d = decode(memory::view(address), type) - x;
            wrong += d * d;
            norm += x * x;
            for (size_t i = 0; i < size_of(type); i++) written += *memory::written(address + i);
        });
        CHECK(written == values.size() * size_of(type));
        for (size_t i = 0; i < buffer.bytes; i++) {
            bool is_written = *memory::written(buffer.address + i);
            if (!is_written && *memory::view(buffer.address + i) != std::byte{0xFF}) FAIL("wrote into a gap");
            written -= is_written;
        }
        CHECK(written == 0);
        return norm == 0 ? std::sqrt(wrong) : std::sqrt(wrong / norm);
    }
};

inline double tolerance(cudaDataType type) {
    return type == CUDA_R_32F ? 1e-5 : 1e-2;
}

// One call of cublasLtMatmul: all its arguments and its expected results.
struct Call {
    cudaDataType in = CUDA_R_32F, out = CUDA_R_32F;
    int m = 16, n = 16, k = 16, pad = 0, batches = 1;
    bool trans_a = false, trans_b = false, row_a = false, row_b = false, row_d = false;
    cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
    float alpha = 1, beta = 0;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    bool device_scalars = false;

    std::unique_ptr<Matrix> a, b, c, d, bias, aux;
    std::unique_ptr<Buffer> workspace = std::make_unique<Buffer>(1 << 20);
    std::mt19937 random{17};
    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDesc_t description = nullptr;
    cublasLtMatrixLayout_t layouts[4] = {};
    cublasLtMatmulPreference_t preference = nullptr;
    std::array<cublasLtMatmulHeuristicResult_t, 4> found = {};
    int algorithms = 0;

    bool has(int bit) const { return epilogue & bit; }
    bool dgelu() const { return has(64); }
    bool gradient_a() const { return epilogue == CUBLASLT_EPILOGUE_BGRADA; }
    bool gradient_b() const { return epilogue == CUBLASLT_EPILOGUE_BGRADB; }
    bool adds_bias() const { return has(CUBLASLT_EPILOGUE_BIAS); }
    bool has_bias() const { return adds_bias() || has(16) || gradient_a() || gradient_b(); }
    bool has_aux() const { return has(128); }

    void make() {
        auto matrix = [&](auto... x) { return std::make_unique<Matrix>(x...); };
        a = matrix(in, trans_a ? k : m, trans_a ? m : k, pad, batches, row_a);
        b = matrix(in, trans_b ? n : k, trans_b ? k : n, pad, batches, row_b);
        c = matrix(out, m, n, pad, batches, row_d);
        d = matrix(out, m, n, pad, batches, row_d);
        bias = matrix(out, gradient_b() ? n : m, 1, pad, batches);
        int aux_pad = (m + 7) / 8 * 8 + 8 - m;
        aux = matrix(out, m, n, aux_pad, 1);
        a->fill(random);
        b->fill(random);
        if (beta != 0) c->fill(random);  // else it stays NaN, as fresh memory is
        if (adds_bias()) bias->fill(random);
        if (dgelu()) aux->fill(random);

        cublasLtCreate(&handle);
        cublasLtMatmulDescCreate(&description, compute, CUDA_R_32F);
        auto set = [&](cublasLtMatmulDescAttributes_t id, auto x) {
            REQUIRE(cublasLtMatmulDescSetAttribute(description, id, &x, sizeof x) == CUBLAS_STATUS_SUCCESS);
        };
        set(CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)(trans_a ? CUBLAS_OP_T : CUBLAS_OP_N));
        set(CUBLASLT_MATMUL_DESC_TRANSB, (int32_t)(trans_b ? CUBLAS_OP_T : CUBLAS_OP_N));
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
        if (device_scalars) set(CUBLASLT_MATMUL_DESC_POINTER_MODE, (int32_t)CUBLASLT_POINTER_MODE_DEVICE);
        if (has_bias()) {
            set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias->buffer.pointer());
            set(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, bias->stride);
            set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, (int32_t)out);
        }
        if (has_aux()) {
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux->buffer.pointer());
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)aux->ld);
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, (int32_t)out);
        }
        Matrix* all[] = {a.get(), b.get(), c.get(), d.get()};
        for (int i = 0; i < 4; i++) {
            Matrix* x = all[i];
            cublasLtMatrixLayoutCreate(&layouts[i], x->type, x->rows, x->cols, x->ld);
            int32_t order = x->row_major ? CUBLASLT_ORDER_ROW : CUBLASLT_ORDER_COL;
            auto set_layout = [&](cublasLtMatrixLayoutAttribute_t id, auto v) {
                REQUIRE(cublasLtMatrixLayoutSetAttribute(layouts[i], id, &v, sizeof v) ==
                        CUBLAS_STATUS_SUCCESS);
            };
            set_layout(CUBLASLT_MATRIX_LAYOUT_ORDER, order);
            set_layout(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (int32_t)batches);
            set_layout(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, x->stride);
        }
        cublasLtMatmulPreferenceCreate(&preference);
        uint64_t bytes = workspace->bytes;
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, 8);
    }
    ~Call() {
        for (auto& x : layouts) cublasLtMatrixLayoutDestroy(x);
        cublasLtMatmulPreferenceDestroy(preference);
        cublasLtMatmulDescDestroy(description);
        cublasLtDestroy(handle);
    }

    cublasStatus_t choose() {
        return cublasLtMatmulAlgoGetHeuristic(handle, description, layouts[0], layouts[1], layouts[2],
                                              layouts[3], preference, 4, found.data(), &algorithms);
    }
    cublasStatus_t run(const cublasLtMatmulAlgo_t* algo, int64_t shift_a = 0) {
        const void *pa = &alpha, *pb = &beta;
        Buffer scalars(8);
        if (device_scalars) {
            std::memcpy(memory::view(scalars.address), &alpha, 4);
            std::memcpy(memory::view(scalars.address + 4), &beta, 4);
            memory::mark_written(scalars.address, 8);
            pa = scalars.pointer();
            pb = (const char*)pa + 4;
        }
        cublasStatus_t status = cublasLtMatmul(
            handle, description, pa, (char*)a->buffer.pointer() + shift_a, layouts[0], b->buffer.pointer(),
            layouts[1], pb, c->buffer.pointer(), layouts[2], d->buffer.pointer(), layouts[3], algo,
            workspace->pointer(), workspace->bytes, nullptr);
        cudaStreamSynchronize(nullptr);
        return status;
    }

    double factor(double x) const {
        if (compute == CUBLAS_COMPUTE_32F_FAST_TF32) return rounded(x, 11, true);
        if (compute == CUBLAS_COMPUTE_32F_FAST_16BF) return rounded(x, 8);
        return x;
    }

    // Computes the expected d, bias and aux.
    void expect() {
        if (has_bias() && !adds_bias()) std::fill(bias->values.begin(), bias->values.end(), 0.0);
        const double s = std::sqrt(2 / M_PI);
        for (int i = 0; i < batches; i++) {
            for (int r = 0; r < m; r++) {
                for (int col = 0; col < n; col++) {
                    double x = 0;
                    for (int j = 0; j < k; j++)
                        x += factor(trans_a ? a->value(i, j, r) : a->value(i, r, j)) *
                             factor(trans_b ? b->value(i, col, j) : b->value(i, j, col));
                    x *= alpha;
                    if (beta != 0) x += beta * c->value(i, r, col);
                    if (adds_bias()) x += bias->value(i, r, 0);
                    double h = dgelu() ? aux->value(0, r, col) : x;
                    double t = std::tanh(s * (h + 0.044715 * h * h * h));
                    if (has(CUBLASLT_EPILOGUE_RELU)) x = std::max(x, 0.0);
                    if (has_aux() && !dgelu()) aux->value(0, r, col) = x;
                    if (has(CUBLASLT_EPILOGUE_GELU)) x = 0.5 * h * (1 + t);
                    if (dgelu()) x *= 0.5 * (1 + t) + 0.5 * h * (1 - t * t) * s * (1 + 3 * 0.044715 * h * h);
                    if (has(16)) bias->value(i, r, 0) += x;
                    d->value(i, r, col) = x;
                }
            }
            if (gradient_a() || gradient_b()) {
                Matrix& x = gradient_a() ? *a : *b;
                bool first = gradient_a() ? !trans_a : trans_b;  // the rows are kept, the columns summed
                for (int r = 0; r < x.rows; r++)
                    for (int col = 0; col < x.cols; col++)
                        bias->value(i, first ? r : col, 0) += factor(x.value(i, r, col));
            }
        }
    }

    void check() {
        CAPTURE(m);
        CAPTURE(n);
        CAPTURE(k);
        CAPTURE(pad);
        CAPTURE(trans_a);
        CAPTURE(trans_b);
        CAPTURE((int)in);
        CAPTURE((int)out);
        CAPTURE(epilogue);
        CAPTURE(beta);
        make();
        REQUIRE(choose() == CUBLAS_STATUS_SUCCESS);
        REQUIRE(algorithms >= 1);
        REQUIRE(run(&found[0].algo) == CUBLAS_STATUS_SUCCESS);
        for (const auto& r : ptxsim::take_reports()) FAIL(r.text);
        expect();
        CHECK(d->difference() < tolerance(out));
        if (has_bias()) CHECK(bias->difference() < tolerance(out));
        if (has_aux()) CHECK(aux->difference() < tolerance(out));
    }
};

// There must be one report, and its text must contain the words.
inline void check_report(Fault fault, std::vector<std::string> words) {
    auto reports = ptxsim::take_reports();
    REQUIRE(reports.size() == 1);
    CHECK(reports[0].fault == fault);
    for (const auto& word : words)
        CHECK_MESSAGE(reports[0].text.find(word) != std::string::npos, reports[0].text);
}

}  // namespace ptxsim_libraries
