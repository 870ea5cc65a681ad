// ptxsim's cuBLASLt, cuBLAS and NCCL against products in double precision, and what they report and refuse.
#include <cublas_v2.h>
#if __has_include(<nccl.h>)
#include <nccl.h>
#endif

#include <utility>

#include "tests/ptxsim/libraries.h"

using namespace ptxsim_libraries;

namespace {

const int kSizes[] = {1, 3, 17, 64, 65, 130};
const uint32_t kEpilogues[] = {
    CUBLASLT_EPILOGUE_DEFAULT,     CUBLASLT_EPILOGUE_BIAS,          CUBLASLT_EPILOGUE_RELU,
    CUBLASLT_EPILOGUE_RELU_BIAS,   CUBLASLT_EPILOGUE_GELU,          CUBLASLT_EPILOGUE_GELU_BIAS,
    CUBLASLT_EPILOGUE_GELU_AUX,    CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU,
    CUBLASLT_EPILOGUE_DGELU_BGRAD, CUBLASLT_EPILOGUE_BGRADA,        CUBLASLT_EPILOGUE_BGRADB};
const std::pair<cudaDataType, cudaDataType> kTypes[] = {{CUDA_R_32F, CUDA_R_32F},
                                                        {CUDA_R_16BF, CUDA_R_16BF},
                                                        {CUDA_R_16BF, CUDA_R_32F},
                                                        {CUDA_R_16F, CUDA_R_16F},
                                                        {CUDA_R_16F, CUDA_R_32F}};

}  // namespace

TEST_CASE("ptxsim libraries: products of every size, type and transposition") {
    for (auto [in, out] : kTypes)
        for (int i = 0; i < 6; i++)
            for (int shift : {0, 1, 3})
                for (int trans = 0; trans < 4; trans++) {
                    Call x;
                    x.in = in;
                    x.out = out;
                    x.m = kSizes[i];
                    x.n = kSizes[(i + shift) % 6];
                    x.k = kSizes[(i + 2 * shift) % 6];
                    x.trans_a = trans & 1;
                    x.trans_b = trans & 2;
                    x.pad = (i + trans) % 3 * 5;
                    x.beta = (float)((i + shift) % 2);
                    x.alpha = trans == 3 ? -0.5f : 1;
                    x.check();
                }
}

TEST_CASE("ptxsim libraries: epilogues") {
    for (auto [in, out] : kTypes)
        for (uint32_t epilogue : kEpilogues)
            for (int i = 0; i < 6; i++) {
                Call x;
                x.in = in;
                x.out = out;
                x.epilogue = epilogue;
                x.m = kSizes[i];
                x.n = kSizes[(i + 2) % 6];
                x.k = kSizes[(i + 1) % 6];
                x.trans_a = i & 1;
                x.trans_b = i & 2;
                x.pad = i % 2 * 3;
                x.alpha = 0.25f;
                x.beta = i % 3 == 2 ? 1 : 0;
                x.check();
            }
}

TEST_CASE("ptxsim libraries: batches, row-major matrices, scalars on the device, reduced factors") {
    for (int bits = 0; bits < 32; bits++) {
        Call x;
        x.m = 17;
        x.n = 65;
        x.k = 33;
        x.batches = 3;
        x.row_a = bits & 1;
        x.row_b = bits & 2;
        x.row_d = bits & 4;
        x.trans_a = bits & 8;
        x.trans_b = bits & 16;
        x.pad = bits % 3;
        x.alpha = 2;
        x.beta = bits % 2 ? 0.5f : 0;
        x.device_scalars = bits % 4 == 1;
        x.check();
    }
    Call biases;
    biases.batches = 2;
    biases.epilogue = CUBLASLT_EPILOGUE_BIAS;
    biases.check();
    for (auto compute : {CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_COMPUTE_32F_FAST_16BF}) {
        Call x;
        x.m = 64;
        x.n = 65;
        x.k = 130;
        x.compute = compute;
        x.check();
    }
}

TEST_CASE("ptxsim libraries: what nobody wrote is reported") {
    auto unwrite = [](const Matrix& x, int r, int c) { *memory::written(x.at(0, r, c)) = 0; };
    Call a, c, bias, aux;
    a.make();
    unwrite(*a.a, 5, 7);
    CHECK(a.run(nullptr) == CUBLAS_STATUS_SUCCESS);
    check_report(Fault::uninitialized, {"cublasLtMatmul", "A (16 x 16 float32", "row 5, column 7"});
    c.beta = 1;
    c.pad = 3;
    c.make();
    unwrite(*c.c, 0, 15);
    CHECK(c.run(nullptr) == CUBLAS_STATUS_SUCCESS);
    check_report(Fault::uninitialized, {"C (16 x 16", "row 0, column 15"});
    bias.epilogue = CUBLASLT_EPILOGUE_BIAS;
    bias.make();
    unwrite(*bias.bias, 3, 0);
    CHECK(bias.run(nullptr) == CUBLAS_STATUS_SUCCESS);
    check_report(Fault::uninitialized, {"bias (16 float32)", "element 3"});
    aux.epilogue = CUBLASLT_EPILOGUE_DGELU;
    aux.make();
    unwrite(*aux.aux, 2, 9);
    CHECK(aux.run(nullptr) == CUBLAS_STATUS_SUCCESS);
    check_report(Fault::uninitialized, {"aux (16 x 16", "row 2, column 9"});
}

TEST_CASE("ptxsim libraries: memory outside of allocations is reported and left alone") {
    Call shifted;
    shifted.make();
    CHECK(shifted.run(nullptr, 16) == CUBLAS_STATUS_SUCCESS);
    check_report(Fault::out_of_bounds, {"cublasLtMatmul", "A (16 x 16 float32, ld 16)", "1024 bytes"});
    CHECK(*memory::view(shifted.d->at(0, 0, 0)) == std::byte{0xFF});

    Call host;
    host.make();
    float here[256] = {};
    CHECK(host.run(nullptr, (char*)here - (char*)host.a->buffer.pointer()) == CUBLAS_STATUS_SUCCESS);
    check_report(Fault::out_of_bounds, {"A (16 x 16"});

    Call freed;
    freed.make();
    memory::free(freed.d->buffer.address);
    CHECK(freed.run(nullptr) == CUBLAS_STATUS_SUCCESS);
    check_report(Fault::use_after_free, {"D (16 x 16"});
    freed.d = std::make_unique<Matrix>(CUDA_R_32F, 16, 16);
    ptxsim::take_reports();  // drops the report of the second free
}

TEST_CASE("ptxsim libraries: workspaces are spoiled, and have to be as large as the algorithm says") {
    Call x;
    x.make();
    REQUIRE(x.choose() == CUBLAS_STATUS_SUCCESS);
    REQUIRE(x.algorithms == 2);
    REQUIRE(x.found[0].workspaceSize > 0);
    CHECK(x.found[1].workspaceSize == 0);
    std::memset(memory::view(x.workspace->address), 0, x.workspace->bytes);
    memory::mark_written(x.workspace->address, x.workspace->bytes);
    CHECK(x.run(&x.found[0].algo) == CUBLAS_STATUS_SUCCESS);
    CHECK(*memory::view(x.workspace->address) == std::byte{0xFF});
    CHECK(*memory::written(x.workspace->address) == 0);
    x.workspace = std::make_unique<Buffer>(x.found[0].workspaceSize - 1);
    CHECK(x.run(&x.found[0].algo) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(x.run(&x.found[1].algo) == CUBLAS_STATUS_SUCCESS);
    cublasLtMatmulHeuristicResult_t checked;
    auto check = [&](Call& y) {
        return cublasLtMatmulAlgoCheck(y.handle, y.description, y.layouts[0], y.layouts[1], y.layouts[2],
                                       y.layouts[3], &x.found[0].algo, &checked);
    };
    CHECK(check(x) == CUBLAS_STATUS_SUCCESS);
    CHECK(checked.workspaceSize == x.found[0].workspaceSize);
    Call other;
    other.m = 24;
    other.make();
    CHECK(check(other) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(other.run(&x.found[1].algo) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(ptxsim::take_reports().empty());
}

TEST_CASE("ptxsim libraries: what cuBLASLt refuses") {
    Call x;
    x.make();
    int32_t word = 0;
    auto set = [&](int id, size_t size) {
        return cublasLtMatmulDescSetAttribute(x.description, (cublasLtMatmulDescAttributes_t)id, &word, size);
    };
    CHECK(set(99, 4) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(set(CUBLASLT_MATMUL_DESC_AMAX_D_POINTER, 8) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(set(CUBLASLT_MATMUL_DESC_TRANSA, 8) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(cublasLtMatrixLayoutSetAttribute(x.layouts[0], (cublasLtMatrixLayoutAttribute_t)77, &word, 4) ==
          CUBLAS_STATUS_INVALID_VALUE);
    size_t written = 0;
    CHECK(cublasLtMatmulDescGetAttribute(x.description, CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, &word, 4,
                                         &written) == CUBLAS_STATUS_SUCCESS);
    CHECK(word == CUBLAS_COMPUTE_32F);
    CHECK(written == 4);

    auto refused = [](Call& y) {
        y.make();
        cublasStatus_t status = y.choose();
        CHECK(y.algorithms == 0);
        CHECK(y.run(nullptr) == status);
        return status;
    };
    Call epilogue, mixed, tf32_of_bf16, row_bias;
    epilogue.epilogue = CUBLASLT_EPILOGUE_DRELU;
    CHECK(refused(epilogue) == CUBLAS_STATUS_NOT_SUPPORTED);
    mixed.out = CUDA_R_16BF;
    CHECK(refused(mixed) == CUBLAS_STATUS_NOT_SUPPORTED);
    tf32_of_bf16.in = CUDA_R_16BF;
    tf32_of_bf16.compute = CUBLAS_COMPUTE_32F_FAST_TF32;
    CHECK(refused(tf32_of_bf16) == CUBLAS_STATUS_NOT_SUPPORTED);
    row_bias.epilogue = CUBLASLT_EPILOGUE_BIAS;
    row_bias.row_d = true;
    CHECK(refused(row_bias) == CUBLAS_STATUS_NOT_SUPPORTED);

    Call aux;
    aux.epilogue = CUBLASLT_EPILOGUE_GELU_AUX;
    aux.make();
    int64_t ld = 17;
    cublasLtMatmulDescSetAttribute(aux.description, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &ld, sizeof ld);
    CHECK(aux.choose() == CUBLAS_STATUS_INVALID_VALUE);

    // An algorithm that was chosen for aligned matrices is refused for others. One that was chosen for a
    // lower alignment is accepted.
    Call aligned;
    aligned.in = aligned.out = CUDA_R_16BF;
    aligned.make();
    REQUIRE(aligned.choose() == CUBLAS_STATUS_SUCCESS);
    CHECK(aligned.run(&aligned.found[0].algo, 2) == CUBLAS_STATUS_INVALID_VALUE);
    uint32_t two = 2;
    cublasLtMatmulPreferenceSetAttribute(aligned.preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &two,
                                         4);
    REQUIRE(aligned.choose() == CUBLAS_STATUS_SUCCESS);
    CHECK(aligned.run(&aligned.found[0].algo, 2) == CUBLAS_STATUS_SUCCESS);
    check_report(Fault::out_of_bounds, {"A (16 x 16 bf16"});
}

TEST_CASE("ptxsim libraries: cuBLAS") {
    cublasHandle_t handle;
    REQUIRE(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS);
    Call x;  // only its matrices and expected results are used
    x.m = 17;
    x.n = 9;
    x.k = 33;
    x.trans_a = true;
    x.beta = 1;
    x.pad = 2;
    x.batches = 2;
    x.make();
    x.d->values = x.c->values;
    x.expect();
    auto in_place = [&] { std::swap(x.c->values, x.d->values); };
    float one = 1, half = 0.5f, zero = 0;
    auto A = (float*)x.a->buffer.pointer(), B = (float*)x.b->buffer.pointer(),
         C = (float*)x.c->buffer.pointer();
    REQUIRE(cublasSgemmStridedBatched(handle, CUBLAS_OP_T, CUBLAS_OP_N, 17, 9, 33, &one, A, x.a->ld,
                                      x.a->stride, B, x.b->ld, x.b->stride, &one, C, x.c->ld, x.c->stride,
                                      2) == CUBLAS_STATUS_SUCCESS);
    cudaStreamSynchronize(nullptr);
    in_place();
    CHECK(x.c->difference() < 1e-5);

    // The other functions compute only the first matrix of the batch.
    Matrix d(CUDA_R_32F, 17, 9), y(CUDA_R_32F, 1, 17, 2);
    x.beta = 0;
    x.expect();
    for (int r = 0; r < 17; r++)
        for (int c = 0; c < 9; c++) d.value(0, r, c) = x.d->value(0, r, c);
    CHECK(cublasSgemm(handle, CUBLAS_OP_T, CUBLAS_OP_N, 17, 9, 33, &one, A, x.a->ld, B, x.b->ld, &zero,
                      (float*)d.buffer.pointer(), 17) == CUBLAS_STATUS_SUCCESS);
    cudaStreamSynchronize(nullptr);
    CHECK(d.difference() < 1e-5);
    CHECK(cublasGemmEx_64(handle, CUBLAS_OP_T, CUBLAS_OP_N, 17, 9, 33, &one, A, CUDA_R_32F, x.a->ld, B,
                          CUDA_R_32F, x.b->ld, &zero, d.buffer.pointer(), CUDA_R_32F, 17,
                          CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS);
    cudaStreamSynchronize(nullptr);
    CHECK(d.difference() < 1e-3);
    CHECK(d.difference() > 1e-6);
    CHECK(cublasSgemm(handle, CUBLAS_OP_T, CUBLAS_OP_N, 17, 9, 33, &one, A, 3, B, x.b->ld, &zero,
                      (float*)d.buffer.pointer(), 17) == CUBLAS_STATUS_INVALID_VALUE);

    // A^T times the first column of B, into a vector with a step of 3.
    for (int r = 0; r < 17; r++) y.value(0, 0, r) = d.value(0, r, 0);
    CHECK(cublasSgemv(handle, CUBLAS_OP_T, 33, 17, &one, A, x.a->ld, B, 1, &zero, (float*)y.buffer.pointer(),
                      y.ld) == CUBLAS_STATUS_SUCCESS);
    cudaStreamSynchronize(nullptr);
    CHECK(y.difference() < 1e-5);

    Matrix u(CUDA_R_32F, 130, 1), v(CUDA_R_32F, 130, 1);
    u.fill(x.random);
    v.fill(x.random);
    auto U = (float*)u.buffer.pointer(), V = (float*)v.buffer.pointer();
    double dot = 0, squares = 0;
    for (int i = 0; i < 130; i++) {
        v.values[i] = 0.5 * (v.values[i] + 0.5 * u.values[i]);
        dot += u.values[i] * v.values[i];
        squares += u.values[i] * u.values[i];
    }
    CHECK(cublasSaxpy(handle, 130, &half, U, 1, V, 1) == CUBLAS_STATUS_SUCCESS);
    CHECK(cublasSscal(handle, 130, &half, V, 1) == CUBLAS_STATUS_SUCCESS);
    float result = 0;
    CHECK(cublasSdot(handle, 130, U, 1, V, 1, &result) == CUBLAS_STATUS_SUCCESS);
    CHECK(result == doctest::Approx(dot).epsilon(1e-5));
    CHECK(cublasSnrm2(handle, 130, U, 1, &result) == CUBLAS_STATUS_SUCCESS);
    CHECK(result == doctest::Approx(std::sqrt(squares)).epsilon(1e-5));
    CHECK(v.difference() < 1e-6);
    CHECK(ptxsim::take_reports().empty());
    CHECK(cublasSscal(handle, 131, &half, V, 1) == CUBLAS_STATUS_SUCCESS);
    cudaStreamSynchronize(nullptr);
    check_report(Fault::out_of_bounds, {"cublasSscal", "524 bytes"});
    CHECK(cublasDestroy(handle) == CUBLAS_STATUS_SUCCESS);
}

#ifdef NCCL_VERSION_CODE
TEST_CASE("ptxsim libraries: NCCL with one rank") {
    ncclUniqueId id;
    REQUIRE(ncclGetUniqueId(&id) == ncclSuccess);
    ncclComm_t comm = nullptr, pair[2];
    CHECK(ncclCommInitAll(pair, 2, nullptr) == ncclInvalidUsage);
    REQUIRE(ncclCommInitRank(&comm, 1, id, 0) == ncclSuccess);
    int count = 0, rank = 7;
    CHECK(ncclCommCount(comm, &count) == ncclSuccess);
    CHECK(ncclCommUserRank(comm, &rank) == ncclSuccess);
    CHECK(count == 1);
    CHECK(rank == 0);

    std::mt19937 random(3);
    Matrix x(CUDA_R_32F, 100, 1);
    x.fill(random);
    auto check = [&](auto call) {
        Matrix y(CUDA_R_32F, 100, 1);
        y.values = x.values;
        CHECK(call(x.buffer.pointer(), y.buffer.pointer()) == ncclSuccess);
        cudaStreamSynchronize(nullptr);
        CHECK(y.difference() == 0);
        CHECK(call(y.buffer.pointer(), y.buffer.pointer()) == ncclSuccess);
        cudaStreamSynchronize(nullptr);
        CHECK(y.difference() == 0);
    };
    for (auto op : {ncclSum, ncclProd, ncclMax, ncclMin, ncclAvg}) {
        check([&](void* s, void* r) { return ncclAllReduce(s, r, 100, ncclFloat, op, comm, nullptr); });
        check(
            [&](void* s, void* r) { return ncclReduceScatter(s, r, 200, ncclBfloat16, op, comm, nullptr); });
        check([&](void* s, void* r) { return ncclReduce(s, r, 50, ncclInt64, op, 0, comm, nullptr); });
    }
    check([&](void* s, void* r) { return ncclAllGather(s, r, 400, ncclInt8, comm, nullptr); });
    check([&](void* s, void* r) { return ncclBroadcast(s, r, 100, ncclFloat, 0, comm, nullptr); });
    check([&](void* s, void* r) {
        ncclGroupStart();
        CHECK(ncclSend(s, 100, ncclFloat, 0, comm, nullptr) == ncclSuccess);
        CHECK(ncclRecv(r, 100, ncclFloat, 0, comm, nullptr) == ncclSuccess);
        return ncclGroupEnd();
    });
    CHECK(ptxsim::take_reports().empty());

    ncclRedOp_t scaled;
    CHECK(ncclRedOpCreatePreMulSum(&scaled, nullptr, ncclFloat, ncclScalarDevice, comm) == ncclInvalidUsage);
    CHECK(ncclSend(x.buffer.pointer(), 1, ncclFloat, 0, comm, nullptr) == ncclInvalidUsage);
    CHECK(ncclBroadcast(x.buffer.pointer(), x.buffer.pointer(), 1, ncclFloat, 1, comm, nullptr) ==
          ncclInvalidArgument);
    CHECK(ncclAllReduce(x.buffer.pointer(), x.buffer.pointer(), 101, ncclFloat, ncclSum, comm, nullptr) ==
          ncclSuccess);
    cudaStreamSynchronize(nullptr);
    auto reports = ptxsim::take_reports();
    REQUIRE(reports.size() == 2);
    for (const auto& r : reports) CHECK(r.fault == Fault::out_of_bounds);
    CHECK(ncclCommDestroy(comm) == ncclSuccess);
}
#endif
