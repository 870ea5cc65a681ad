// cuBLASLt: a heuristic that knows what the real one refuses, and cublasLtMatmul().
//
// Combinations that NVIDIA's documentation does not list are refused. So a program that runs here does not
// ask a GPU for a combination that no algorithm supports; which algorithm the GPU chooses may differ.
#include <cublasLt.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "dev/ptxsim/cublaslt_descriptors.h"
#include "dev/ptxsim/gemm.h"
#include "dev/ptxsim/runtime.h"
#include "dev/ptxsim/stream_work.h"

struct cublasLtContext {};

namespace ptxsim {
namespace {

// What the heuristic chooses for one problem. For another problem it is refused, because the real library's
// check of an algorithm refuses that, too.
struct Algorithm {
    uint64_t magic, workspace, problem;
    uint32_t alignment[4];  // the alignment of A, B, C and D that the algorithm relies on
};
constexpr uint64_t kMagic = 0x70747873696D4C74;

static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t));

struct Problem {
    Description description;
    Layout a, b, c, d;
};

Operand make_operand(const char* name, const Layout& x) {
    return ptxsim::make_operand(name, nullptr, (cudaDataType)x.type, (int64_t)x.rows, (int64_t)x.cols, x.ld,
                                x.stride, x.order == CUBLASLT_ORDER_ROW);
}

cublasStatus_t check_layout(const char* call, const Operand& x, const Layout& layout, int batches) {
    std::string name = x.name;
    if (layout.order != CUBLASLT_ORDER_COL && layout.order != CUBLASLT_ORDER_ROW)
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call,
                      name + " has order " + std::to_string(layout.order) + ", which is not simulated");
    if (layout.batch_mode != CUBLASLT_BATCH_MODE_STRIDED)
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call, "batches by arrays of pointers are not simulated");
    if (x.ld < x.inner || x.inner < 1 || x.outer < 1 || std::max({x.inner, x.outer, x.ld}) > INT32_MAX)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, call,
                      name + " has " + std::to_string(layout.rows) + " rows, " + std::to_string(layout.cols) +
                          " columns and ld " + std::to_string(x.ld) +
                          ": ld is too small, or one of them is not between 1 and 2^31 - 1");
    if (layout.batches != batches)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, call, name + " and D have different batch counts");
    return CUBLAS_STATUS_SUCCESS;
}

// Sets the activation, bias and aux of `g`.
cublasStatus_t set_epilogue(const char* call, const Description& x, Gemm* g) {
    bool bias_of_columns = false;
    switch (x.epilogue) {
        case CUBLASLT_EPILOGUE_DEFAULT:
            return CUBLAS_STATUS_SUCCESS;
        case CUBLASLT_EPILOGUE_BIAS:
            g->bias_use = Bias::add;
            break;
        case CUBLASLT_EPILOGUE_RELU_BIAS:
            g->bias_use = Bias::add;
            [[fallthrough]];
        case CUBLASLT_EPILOGUE_RELU:
            g->activation = Activation::relu;
            break;
        case CUBLASLT_EPILOGUE_GELU_BIAS:
            g->bias_use = Bias::add;
            [[fallthrough]];
        case CUBLASLT_EPILOGUE_GELU:
            g->activation = Activation::gelu;
            break;
        case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
            g->bias_use = Bias::add;
            [[fallthrough]];
        case CUBLASLT_EPILOGUE_GELU_AUX:
            g->activation = Activation::gelu;
            g->has_aux = true;
            break;
        case CUBLASLT_EPILOGUE_DGELU_BGRAD:
            g->bias_use = Bias::gradient_d;
            [[fallthrough]];
        case CUBLASLT_EPILOGUE_DGELU:
            g->activation = Activation::dgelu;
            g->has_aux = true;
            break;
        case CUBLASLT_EPILOGUE_BGRADA:
            g->bias_use = Bias::gradient_a;
            break;
        case CUBLASLT_EPILOGUE_BGRADB:
            g->bias_use = Bias::gradient_b;
            bias_of_columns = true;
            break;
        default:
            return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call,
                          "epilogue " + std::to_string(x.epilogue) + " is unknown or not simulated");
    }
    if (g->d.row_major)
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call, "an epilogue cannot have a row-major D");
    if (g->bias_use != Bias::none) {
        if (x.bias_type != -1 && x.bias_type != (int)g->d.type)
            return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call, "the bias has another type than D");
        g->bias.address = x.bias;
        g->bias.type = g->d.type;
        g->bias.inner = g->bias.ld = bias_of_columns ? g->n : g->m;
        g->bias.stride = x.bias_stride;
    }
    if (g->has_aux) {
        if (x.aux_type != -1 && x.aux_type != (int)g->d.type)
            return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call, "the aux buffer has another type than D");
        if (x.aux_ld % 8 || x.aux_ld < g->m || x.aux_stride % 8)
            return refuse(CUBLAS_STATUS_INVALID_VALUE, call,
                          "aux ld " + std::to_string(x.aux_ld) + " and batch stride " +
                              std::to_string(x.aux_stride) + " for " + std::to_string(g->m) +
                              " rows: both must be multiples of 8, and ld no less than the rows");
        g->aux.address = x.aux;
        g->aux.type = g->d.type;
        g->aux.inner = g->m;
        g->aux.outer = g->n;
        g->aux.ld = x.aux_ld;
        g->aux.stride = x.aux_stride;
    }
    return CUBLAS_STATUS_SUCCESS;
}

// Makes the product for a problem, except for the addresses of its matrices.
cublasStatus_t make_gemm(const char* call, const Problem& p, Gemm* g) {
    const Description& x = p.description;
    g->call = call;
    g->a = make_operand("A", p.a);
    g->b = make_operand("B", p.b);
    g->c = make_operand("C", p.c);
    g->d = make_operand("D", p.d);
    if (cublasStatus_t s = check_types(call, (cublasComputeType_t)x.compute, (cudaDataType)x.scale, g->a.type,
                                       g->b.type, g->c.type, g->d.type, &g->precision))
        return s;
    g->batches = p.d.batches;
    if (g->batches < 1) return refuse(CUBLAS_STATUS_INVALID_VALUE, call, "the batch count is below 1");
    const std::pair<const Operand&, const Layout&> all[] = {
        {g->a, p.a}, {g->b, p.b}, {g->c, p.c}, {g->d, p.d}};
    for (auto [operand, layout] : all)
        if (cublasStatus_t s = check_layout(call, operand, layout, p.d.batches)) return s;
    for (int op : {x.trans_a, x.trans_b})
        if (op != CUBLAS_OP_N && op != CUBLAS_OP_T && op != CUBLAS_OP_C)
            return refuse(CUBLAS_STATUS_INVALID_VALUE, call, "unknown transposition " + std::to_string(op));
    if (x.trans_c != CUBLAS_OP_N || x.fill != CUBLAS_FILL_MODE_FULL)
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call, "a transposed C or a fill mode is not supported");
    if (x.pointer_mode != CUBLASLT_POINTER_MODE_HOST && x.pointer_mode != CUBLASLT_POINTER_MODE_DEVICE)
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call,
                      "pointer mode " + std::to_string(x.pointer_mode) + " is not simulated");
    if (p.c.order != p.d.order)
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call, "C and D have different orders");

    g->trans_a = x.trans_a != CUBLAS_OP_N;
    g->trans_b = x.trans_b != CUBLAS_OP_N;
    g->m = (int64_t)(g->trans_a ? p.a.cols : p.a.rows);
    g->k = (int64_t)(g->trans_a ? p.a.rows : p.a.cols);
    g->n = (int64_t)(g->trans_b ? p.b.rows : p.b.cols);
    int64_t b_k = (int64_t)(g->trans_b ? p.b.cols : p.b.rows);
    bool fits = b_k == g->k;
    for (const Layout* out : {&p.c, &p.d}) fits &= (int64_t)out->rows == g->m && (int64_t)out->cols == g->n;
    if (!fits) {
        std::string sizes;
        for (const Layout* l : {&p.a, &p.b, &p.c, &p.d})
            sizes += (l == &p.a ? "" : ", ") + std::to_string(l->rows) + " x " + std::to_string(l->cols);
        return refuse(CUBLAS_STATUS_INVALID_VALUE, call,
                      "A, B, C and D do not fit: " + sizes + (g->trans_a ? ", A transposed" : "") +
                          (g->trans_b ? ", B transposed" : ""));
    }
    return set_epilogue(call, x, g);
}

// FNV-1a of everything except addresses.
uint64_t hash(const Problem& p) {
    uint64_t h = 0xCBF29CE484222325;
    auto add = [&](uint64_t x) { h = (h ^ x) * 0x100000001B3; };
    const Description& x = p.description;
    for (int64_t v : {x.compute, x.scale, x.trans_a, x.trans_b, (int)x.epilogue, x.pointer_mode})
        add((uint64_t)v);
    add((uint64_t)x.aux_ld);
    for (const Layout* l : {&p.a, &p.b, &p.c, &p.d})
        for (uint64_t v : {(uint64_t)l->type, (uint64_t)l->order, l->rows, l->cols, (uint64_t)l->ld,
                           (uint64_t)l->batches, (uint64_t)l->stride})
            add(v);
    return h;
}

// The alignment that all lines of the operand have. Tensor cores need no more than 16 bytes, so it is at most
// that.
uint32_t alignment(const Operand& x, uint64_t first, int64_t batches) {
    uint64_t all = first | 16 | (batches > 1 ? (uint64_t)x.stride * size_of(x.type) : 0);
    if (x.outer > 1) all |= (uint64_t)x.ld * size_of(x.type);
    return (uint32_t)(all & -all);
}

bool make_problem(cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                  cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, Problem* out) {
    if (!description || !a || !b || !c || !d) return false;
    *out = {get<Description>(description), get<Layout>(a), get<Layout>(b), get<Layout>(c), get<Layout>(d)};
    return true;
}

// An algorithm that sums over k in two halves keeps one of them in the workspace.
uint64_t workspace_for(const Gemm& g) {
    return ((uint64_t)g.m * g.n * g.batches * sizeof(float) + 255) / 256 * 256;
}

cublasStatus_t check_algorithm(const char* call, const Algorithm& x, const Problem& problem) {
    if (x.magic != kMagic || x.problem != hash(problem))
        return refuse(CUBLAS_STATUS_INVALID_VALUE, call, "the algorithm was chosen for another problem");
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t matmul(const Problem& problem, const void* alpha, const void* beta, const void* A,
                      const void* B, const void* C, void* D, const cublasLtMatmulAlgo_t* algo,
                      void* workspace, size_t bytes, cudaStream_t stream) {
    const char* call = "cublasLtMatmul";
    constexpr cublasStatus_t invalid = CUBLAS_STATUS_INVALID_VALUE;
    if (sticky_error()) return CUBLAS_STATUS_EXECUTION_FAILED;
    Gemm g;
    if (cublasStatus_t s = make_gemm(call, problem, &g)) return s;
    const void* pointers[] = {A, B, C, D};
    Operand* operands[] = {&g.a, &g.b, &g.c, &g.d};
    for (int i = 0; i < 4; i++) operands[i]->address = (uint64_t)pointers[i];
    if (C == D && problem.c.ld != problem.d.ld) return refuse(invalid, call, "C is D, but with another ld");
    if ((g.bias_use != Bias::none && !g.bias.address) || (g.has_aux && !g.aux.address))
        return refuse(invalid, call, "the epilogue's bias or aux pointer is null");
    if (g.has_aux && g.aux.address % 16) return refuse(invalid, call, "aux is not aligned to 16 bytes");
    if ((uint64_t)workspace % 256) return refuse(invalid, call, "the workspace is not aligned to 256 bytes");

    if (algo) {
        Algorithm chosen = get<Algorithm>(algo);
        if (cublasStatus_t s = check_algorithm(call, chosen, problem)) return s;
        if (chosen.workspace > (workspace ? bytes : 0))
            return refuse(invalid, call,
                          "the algorithm needs a workspace of " + std::to_string(chosen.workspace) +
                              " bytes, but was given " + std::to_string(workspace ? bytes : 0));
        for (int i = 0; i < 4; i++)
            if ((uint64_t)pointers[i] % chosen.alignment[i])
                return refuse(invalid, call,
                              std::string(operands[i]->name) + " is not aligned to the " +
                                  std::to_string(chosen.alignment[i]) +
                                  " bytes that the algorithm relies on");
    }
    g.workspace = (uint64_t)workspace;
    g.workspace_bytes = g.spoiled_bytes = workspace ? bytes : 0;
    // An algorithm of the real library may overwrite the workspace that it asked for. Filling all of a larger
    // one takes too long.
    if (algo)
        g.spoiled_bytes = std::min(g.workspace_bytes, std::max(get<Algorithm>(algo).workspace, 64ul << 10));
    if (problem.description.pointer_mode == CUBLASLT_POINTER_MODE_HOST) {
        std::memcpy(&g.alpha, alpha, sizeof g.alpha);
        std::memcpy(&g.beta, beta, sizeof g.beta);
    } else {
        g.device_alpha = (uint64_t)alpha;
        g.device_beta = (uint64_t)beta;
    }
    enqueue(stream, g.call, uses_of(g), [g] { run_gemm(g); });
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace
}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    if (!handle) return CUBLAS_STATUS_INVALID_VALUE;
    *handle = new cublasLtContext;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion() {
    return CUBLAS_VERSION;
}

const char* cublasLtGetStatusName(cublasStatus_t status) {
    return cublasGetStatusName(status);
}

const char* cublasLtGetStatusString(cublasStatus_t status) {
    return cublasGetStatusString(status);
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int* returned) {
    const char* call = "cublasLtMatmulAlgoGetHeuristic";
    if (returned) *returned = 0;
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    Problem problem;
    if (!make_problem(description, a, b, c, d, &problem) || !preference || !results || !returned ||
        wanted < 1)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, call, "a pointer is null, or no algorithm is asked for");
    Gemm g;
    if (cublasStatus_t s = make_gemm(call, problem, &g)) return s;
    if (fails_now(options().fail_heuristic)) return CUBLAS_STATUS_NOT_SUPPORTED;
    Preference wishes = get<Preference>(preference);
    Algorithm algorithm{.magic = kMagic, .workspace = 0, .problem = hash(problem), .alignment = {}};
    const Operand* operands[] = {&g.a, &g.b, &g.c, &g.d};
    for (int i = 0; i < 4; i++) {
        if (wishes.alignment[i] < size_of(operands[i]->type) ||
            (wishes.alignment[i] & (wishes.alignment[i] - 1)))
            return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call,
                          std::string(operands[i]->name) + " cannot have an alignment of " +
                              std::to_string(wishes.alignment[i]) + " bytes");
        algorithm.alignment[i] = alignment(*operands[i], wishes.alignment[i], g.batches);
    }
    // The algorithm with a workspace comes first, because the heuristic lists the fastest one first.
    for (uint64_t workspace : {workspace_for(g), (uint64_t)0}) {
        if (workspace > wishes.workspace || *returned == wanted) continue;
        cublasLtMatmulHeuristicResult_t& result = results[(*returned)++];
        std::memset((void*)&result, 0, sizeof result);
        algorithm.workspace = workspace;
        std::memcpy((void*)&result.algo, &algorithm, sizeof algorithm);
        result.workspaceSize = workspace;
        result.state = CUBLAS_STATUS_SUCCESS;
        result.wavesCount = 1;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t* algo,
                                       cublasLtMatmulHeuristicResult_t* result) {
    const char* call = "cublasLtMatmulAlgoCheck";
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    Problem problem;
    if (!make_problem(description, a, b, c, d, &problem) || !algo || !result)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, call, "a pointer is null");
    Gemm g;
    if (cublasStatus_t s = make_gemm(call, problem, &g)) return s;
    if (cublasStatus_t s = check_algorithm(call, get<Algorithm>(algo), problem)) return s;
    std::memset((void*)result, 0, sizeof *result);
    result->algo = *algo;
    result->workspaceSize = get<Algorithm>(algo).workspace;
    result->wavesCount = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void* alpha,
                              const void* A, cublasLtMatrixLayout_t a, const void* B,
                              cublasLtMatrixLayout_t b, const void* beta, const void* C,
                              cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t* algo, void* workspace, size_t bytes,
                              cudaStream_t stream) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    Problem problem;
    if (!make_problem(description, a, b, c, d, &problem) || !alpha || !beta || !A || !B || !C || !D)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatmul", "a pointer is null");
    return matmul(problem, alpha, beta, A, B, C, D, algo, workspace, bytes, stream);
}

}  // extern "C"
