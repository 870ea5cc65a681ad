#include "dev/ptxsim/gemm.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "dev/ptxsim/floats.h"
#include "dev/ptxsim/memory.h"
#include "llmc/cpu/bf16.h"
#include "llmc/cpu/matmul.h"

namespace ptxsim {
namespace {

// A float16 of our own, because not every compiler has _Float16 on every processor.
struct Half {
    f16 x = {};
    Half() = default;
    explicit Half(float value) : x(to_half<f16>(value)) {}
    operator float() const { return decode(x); }
};

template <class T>
void load(float* out, const std::byte* from, int64_t n, Precision precision) {
    for (int64_t i = 0; i < n; i++) {
        T x;
        std::memcpy(&x, from + i * sizeof(T), sizeof(T));
        out[i] = (float)x;
    }
    if constexpr (sizeof(T) == 4) {
        if (precision == Precision::tf32)
            for (int64_t i = 0; i < n; i++)
                out[i] = to_tf32(out[i], Round::away);  // as the libraries' kernels do
        if (precision == Precision::bf16)
            for (int64_t i = 0; i < n; i++) out[i] = cpu::bf16(out[i]);
        if (precision == Precision::f16)
            for (int64_t i = 0; i < n; i++) out[i] = Half(out[i]);
    }
}

void load_line(float* out, const Operand& x, int64_t batch, int64_t line,
               Precision precision = Precision::as_stored) {
    const std::byte* from = memory::view(x.line(batch, line));
    if (x.type == CUDA_R_32F) load<float>(out, from, x.inner, precision);
    if (x.type == CUDA_R_16BF) load<cpu::bf16>(out, from, x.inner, precision);
    if (x.type == CUDA_R_16F) load<Half>(out, from, x.inner, precision);
}

template <class T>
void store(std::byte* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        T x = (T)from[i];
        std::memcpy(to + i * sizeof(T), &x, sizeof(T));
    }
}

void store_line(const Operand& x, int64_t batch, int64_t line, const float* from) {
    std::byte* to = memory::view(x.line(batch, line));
    if (x.type == CUDA_R_32F) store<float>(to, from, x.inner);
    if (x.type == CUDA_R_16BF) store<cpu::bf16>(to, from, x.inner);
    if (x.type == CUDA_R_16F) store<Half>(to, from, x.inner);
}

// The matrix as floats without gaps between its lines. Converts it into `memory` unless it already lies so.
const float* dense(const Operand& x, int64_t batch, Precision precision, std::vector<float>* memory) {
    bool is_float = x.type == CUDA_R_32F && precision == Precision::as_stored;
    if (is_float && (x.ld == x.inner || x.outer == 1))
        return reinterpret_cast<const float*>(memory::view(x.line(batch, 0)));
    memory->resize((size_t)x.inner * x.outer);
#pragma omp parallel for schedule(static)
    for (int64_t o = 0; o < x.outer; o++) load_line(memory->data() + o * x.inner, x, batch, o, precision);
    return memory->data();
}

constexpr float kGeluScale = 0.7978845608f;  // sqrt(2/pi)

float gelu(float x) {
    return 0.5f * x * (1 + std::tanh(kGeluScale * (x + 0.044715f * x * x * x)));
}

float gelu_derivative(float x) {
    float t = std::tanh(kGeluScale * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * kGeluScale * (1 + 3 * 0.044715f * x * x);
}

// The sums of a matrix (outer, inner) over its lines, or the sum of each line.
std::vector<float> sums(const float* x, int64_t outer, int64_t inner, bool over_lines) {
    std::vector<double> sum(over_lines ? inner : outer);
    for (int64_t o = 0; o < outer; o++)
        for (int64_t i = 0; i < inner; i++) sum[over_lines ? i : o] += x[o * inner + i];
    return {sum.begin(), sum.end()};
}

// Computes one call whose memory has been checked.
class Product {
  public:
    explicit Product(const Gemm& gemm) : g(gemm) {}

    void run() {
        for (int64_t batch = 0; batch < g.batches; batch++) {
            multiply(batch);
            finish(batch);
        }
    }

  private:
    const Gemm& g;
    std::vector<float> memory_a, memory_b, product;

    void multiply(int64_t batch) {
        product.assign((size_t)g.d.inner * g.d.outer, 0);
        bool gradient = g.bias_use == Bias::gradient_a || g.bias_use == Bias::gradient_b;
        if (g.k == 0 || (g.alpha == 0 && !gradient)) {
            if (gradient) store_line(g.bias, batch, 0, std::vector<float>(g.bias.inner).data());
            return;
        }
        const float* a = dense(g.a, batch, g.precision, &memory_a);
        const float* b = dense(g.b, batch, g.precision, &memory_b);
        // Whether all elements of one line have the same index of k.
        bool a_along_k = g.trans_a != g.a.row_major, b_along_k = g.trans_b == g.b.row_major;
        // matmul() is row-major, so a column-major D is computed as D^T = op(B)^T op(A)^T.
        int m = (int)g.m, n = (int)g.n, k = (int)g.k;
        if (g.d.row_major) {
            cpu::matmul(product.data(), a, b, m, n, k, !a_along_k, b_along_k, false);
        } else {
            cpu::matmul(product.data(), b, a, n, m, k, !b_along_k, a_along_k, false);
        }
        if (gradient) {
            bool of_a = g.bias_use == Bias::gradient_a;
            const Operand& x = of_a ? g.a : g.b;
            bool along_k = of_a ? a_along_k : b_along_k;
            store_line(g.bias, batch, 0, sums(of_a ? a : b, x.outer, x.inner, !along_k).data());
        }
    }

    void finish(int64_t batch) {
        int64_t inner = g.d.inner, outer = g.d.outer;
        std::vector<float> bias(inner);
        if (g.bias_use == Bias::add) load_line(bias.data(), g.bias, batch, 0);
#pragma omp parallel
        {
            std::vector<float> other(inner);
#pragma omp for schedule(static)
            for (int64_t o = 0; o < outer; o++) {
                float* x = product.data() + o * inner;
                if (g.alpha != 1)
                    for (int64_t i = 0; i < inner; i++) x[i] *= g.alpha;
                if (g.beta != 0) {
                    load_line(other.data(), g.c, batch, o);
                    for (int64_t i = 0; i < inner; i++) x[i] += g.beta * other[i];
                }
                if (g.bias_use == Bias::add)
                    for (int64_t i = 0; i < inner; i++) x[i] += bias[i];
                activate(x, other.data(), batch, o);
                store_line(g.d, batch, o, x);
            }
        }
        if (g.bias_use == Bias::gradient_d)
            store_line(g.bias, batch, 0, sums(product.data(), outer, inner, true).data());
    }

    void activate(float* x, float* other, int64_t batch, int64_t line) {
        switch (g.activation) {
            case Activation::none:
                break;
            case Activation::relu:
                for (int64_t i = 0; i < g.d.inner; i++) x[i] = x[i] < 0 ? 0 : x[i];
                break;
            case Activation::gelu:
                if (g.has_aux) store_line(g.aux, batch, line, x);
                for (int64_t i = 0; i < g.d.inner; i++) x[i] = gelu(x[i]);
                break;
            case Activation::dgelu:
                load_line(other, g.aux, batch, line);
                for (int64_t i = 0; i < g.d.inner; i++) x[i] *= gelu_derivative(other[i]);
                break;
        }
    }
};

bool read_scalar(const char* call, const char* name, uint64_t address, float* out) {
    if (!address) return true;
    Operand scalar{.name = name, .address = address, .inner = 1};
    if (!check_range(call, scalar, 1)) return false;
    check_written(call, scalar, 1);
    std::memcpy(out, memory::view(address), sizeof *out);
    return true;
}

void spoil_workspace(const Gemm& g) {
    if (!g.spoiled_bytes) return;
    std::memset(memory::view(g.workspace), 0xFF, g.spoiled_bytes);
    if (uint8_t* written = memory::written(g.workspace)) std::memset(written, 0, g.spoiled_bytes);
}

}  // namespace

void run_gemm(Gemm g) {
    if (!read_scalar(g.call, "alpha", g.device_alpha, &g.alpha)) return;
    if (!read_scalar(g.call, "beta", g.device_beta, &g.beta)) return;
    bool reads_bias = g.bias_use == Bias::add, writes_bias = g.bias_use != Bias::none && !reads_bias;
    bool of_factor = g.bias_use == Bias::gradient_a || g.bias_use == Bias::gradient_b;
    bool reads_factors = (g.alpha != 0 || of_factor) && g.k > 0,
         reads_aux = g.activation == Activation::dgelu;

    struct Check {
        const Operand& operand;
        bool reads, writes;
    };
    const Check checks[] = {{g.a, reads_factors, false},
                            {g.b, reads_factors, false},
                            {g.c, g.beta != 0, false},
                            {g.bias, reads_bias, writes_bias},
                            {g.aux, reads_aux, g.has_aux && !reads_aux},
                            {g.d, false, true}};
    // The workspace is checked even if it is not needed here, because the real library may write to it.
    bool ok = check_range(g.call, "the workspace", g.workspace, g.workspace_bytes, 256);
    for (const Check& check : checks)
        if (check.reads || check.writes) ok &= check_range(g.call, check.operand, g.batches);
    if (!ok) return;
    for (const Check& check : checks)
        if (check.reads) check_written(g.call, check.operand, g.batches);
    spoil_workspace(g);
    {
        static std::mutex one_at_a_time;  // only one thread at a time may call matmul()
        std::lock_guard lock(one_at_a_time);
        Product(g).run();
    }
    for (const Check& check : checks)
        if (check.writes) mark_written(check.operand, g.batches);
}

std::vector<MemoryUse> uses_of(const Gemm& g) {
    std::vector<MemoryUse> uses = {g.a.use(Use::read, g.batches), g.b.use(Use::read, g.batches),
                                   g.d.use(Use::write, g.batches)};
    if (g.beta != 0 || g.device_beta) uses.push_back(g.c.use(Use::read, g.batches));
    if (g.bias_use != Bias::none)
        uses.push_back(g.bias.use(g.bias_use == Bias::add ? Use::read : Use::write, g.batches));
    if (g.has_aux)
        uses.push_back(g.aux.use(g.activation == Activation::dgelu ? Use::read : Use::write, g.batches));
    if (g.workspace) uses.push_back({g.workspace, g.spoiled_bytes, Use::write});
    for (uint64_t scalar : {g.device_alpha, g.device_beta})
        if (scalar) uses.push_back({scalar, sizeof(float), Use::read});
    std::erase_if(uses, [](const MemoryUse& u) { return u.bytes == 0; });
    return uses;
}

cublasStatus_t check_types(const char* call, cublasComputeType_t compute, cudaDataType scale, cudaDataType a,
                           cudaDataType b, cudaDataType c, cudaDataType d, Precision* precision) {
    bool fast = true;
    switch (compute) {
        case CUBLAS_COMPUTE_32F:
        case CUBLAS_COMPUTE_32F_PEDANTIC:
            *precision = Precision::as_stored;
            fast = false;
            break;
        case CUBLAS_COMPUTE_32F_FAST_TF32:
            *precision = Precision::tf32;
            break;
        case CUBLAS_COMPUTE_32F_FAST_16BF:
            *precision = Precision::bf16;
            break;
        case CUBLAS_COMPUTE_32F_FAST_16F:
            *precision = Precision::f16;
            break;
        default:
            return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call,
                          "compute type " + std::to_string(compute) + " is not simulated");
    }
    if (scale != CUDA_R_32F)
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call,
                      "scale type " + std::to_string(scale) + " does not go with a compute type of float32");
    bool half = a == CUDA_R_16BF || a == CUDA_R_16F;
    bool known = size_of(a) && a == b && c == d && (d == CUDA_R_32F || (half && d == a)) && !(fast && half);
    if (known) return CUBLAS_STATUS_SUCCESS;
    auto text = [](cudaDataType type) {
        return size_of(type) ? std::string(name_of(type)) : "cudaDataType " + std::to_string(type);
    };
    return refuse(CUBLAS_STATUS_NOT_SUPPORTED, call,
                  "there is no product of the types A " + text(a) + ", B " + text(b) + ", C " + text(c) +
                      ", D " + text(d) + " with compute type " + std::to_string(compute));
}

Operand make_operand(const char* name, const void* address, cudaDataType type, int64_t rows, int64_t cols,
                     int64_t ld, int64_t stride, bool row_major) {
    return {.name = name,
            .address = (uint64_t)address,
            .type = type,
            .row_major = row_major,
            .inner = row_major ? cols : rows,
            .outer = row_major ? rows : cols,
            .ld = ld,
            .stride = stride};
}

}  // namespace ptxsim
