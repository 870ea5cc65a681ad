// llmc/cuda/matmul.h and column_sums.h against the oracle.
#include "llmc/cuda/matmul.h"

#include <doctest/doctest.h>

#include "tests/cuda/helpers.h"

using namespace cuda_test;
using gpu::bf16;

namespace {

const int kSizes[] = {1, 3, 7, 17, 64, 65, 100, 130};

// A cuBLASLt context with its workspace.
struct Blas {
    Device<char> workspace{gpu::kMatmulWorkspace};
    gpu::MatmulContext context;
    explicit Blas(bool tf32 = false) : context(workspace.get(), tf32) {}
    operator gpu::MatmulContext&() { return context; }
};

// An input, on the device and as doubles.
template <class Real>
struct Input {
    Vector values;
    Device<Real> device;
    Input(size_t n, uint64_t seed, double scale = 1)
        : Input(cuda_test::convert<Real>(reference::normal(n, seed, scale))) {}
    explicit Input(const std::vector<Real>& x) : values(cuda_test::to_double(x)), device(x) {}
    operator const Real*() const { return device.get(); }
};

template <class Result, class Factor>
void check_products() {
    Blas blas;
    for (int i = 0; i < 8; i++)
        for (int bits = 0; bits < 8; bits++) {
            int M = kSizes[i], N = kSizes[(i + 1 + bits) % 8], K = kSizes[(i + 3 * bits) % 8];
            bool trans_a = bits & 1, trans_b = bits & 2, accumulate = bits & 4;
            CAPTURE(M);
            CAPTURE(N);
            CAPTURE(K);
            CAPTURE(bits);
            Input<Factor> a((size_t)M * K, 1), b((size_t)K * N, 2);
            Vector expected = reference::matmul(a.values, b.values, M, N, K, trans_a, trans_b);
            check_layer({expect<Result>("c", expected, 0, accumulate)}, [&](auto& out) {
                gpu::matmul<Result, Factor>(out["c"], a, b, M, N, K, trans_a, trans_b, accumulate, {}, blas,
                                            nullptr);
            });
        }
    CHECK(blas.context.algorithms() <= 64);
}

template <class Real>
void check_linear(int N, int IC, int OC, bool with_bias, bool accumulate) {
    CAPTURE(N);
    CAPTURE(IC);
    CAPTURE(OC);
    Blas blas;
    Input<Real> inp((size_t)N * IC, 1), weight((size_t)IC * OC, 2, 0.3), dout((size_t)N * OC, 3),
        pre_gelu((size_t)N * IC, 5), bias(OC, 4);
    const Real* no = nullptr;
    Vector out = reference::add_bias(reference::matmul(inp.values, weight.values, N, OC, IC),
                                     with_bias ? bias.values : Vector());
    check_layer({expect<Real>("out", out)}, [&](auto& o) {
        gpu::matmul_forward<Real>(o["out"], inp, weight, with_bias ? bias : no, N, IC, OC, blas, nullptr);
    });
    if (gpu::gelu_fuses(OC)) {
        Vector gelu = out;
        for (double& x : gelu) x = reference::gelu(x);
        check_layer({expect<Real>("out", gelu), expect<Real>("pre_gelu", out)}, [&](auto& o) {
            gpu::matmul_gelu_forward<Real>(o["out"], o["pre_gelu"], inp, weight, with_bias ? bias : no, N, IC,
                                           OC, blas, nullptr);
        });
    }
    auto d = reference::matmul_backward(dout.values, inp.values, weight.values, N, IC, OC);
    std::vector<Expected> outputs{expect<Real>("dinp", d.dinp),
                                  expect<float>("dweight", d.dweight, 0, accumulate)};
    if (with_bias) outputs.push_back(expect<float>("dbias", d.dbias, 0, true));
    check_layer(outputs, [&](auto& o) {
        gpu::matmul_backward<Real, float>(o["dinp"], o["dweight"], o["dbias"], dout, inp, weight, accumulate,
                                          N, IC, OC, blas, nullptr);
    });
    outputs[0] = expect<Real>("dinp", d.dinp, 0, true);
    check_layer(outputs, [&](auto& o) {
        gpu::matmul_backward<Real, float>(o["dinp"], o["dweight"], o["dbias"], dout, inp, weight, accumulate,
                                          N, IC, OC, blas, nullptr, true);
    });
    outputs[1] = expect<bf16>("dweight", d.dweight, 0, accumulate);
    if constexpr (std::is_same_v<Real, bf16>)
        check_layer({outputs[1]}, [&](auto& o) {
            gpu::matmul_backward<Real, bf16>(nullptr, o["dweight"], nullptr, dout, inp, weight, accumulate, N,
                                             IC, OC, blas, nullptr);
        });
    if (gpu::gelu_fuses(IC)) {
        for (size_t i = 0; i < d.dinp.size(); i++)
            d.dinp[i] *= reference::gelu_derivative(pre_gelu.values[i]).value();
        check_layer({expect<Real>("dinp", d.dinp), expect<float>("dweight", d.dweight)}, [&](auto& o) {
            gpu::matmul_gelu_backward<Real, float>(o["dinp"], o["dweight"], nullptr, dout, inp, weight,
                                                   pre_gelu, false, N, IC, OC, blas, nullptr);
        });
    }
}

template <class Real>
void check_linears() {
    for (int i = 0; i < 8; i++)
        check_linear<Real>(kSizes[i], kSizes[(i + 3) % 8], kSizes[(i + 5) % 8], i % 3 != 0, i % 2);
    check_linear<Real>(65, 64, 104, true, true);
    check_linear<Real>(7, 8, 16, false, false);
}

template <class Real>
void check_column_sums(int N, int C, int offset = 0) {
    CAPTURE(N);
    CAPTURE(C);
    CAPTURE(offset);
    Input<Real> inp((size_t)N * C + offset, 1);
    Vector x(inp.values.begin() + offset, inp.values.end());
    Device<float> scratch(gpu::kColumnSumsScratch);
    check_layer({expect<float>("out", reference::matmul(Vector(N, 1.0), x, 1, C, N), 1e-5, true)},
                [&](auto& out) {
                    gpu::add_column_sums<Real>(out["out"], scratch.get(), inp + offset, N, C, nullptr);
                });
}

std::string message(auto call) {
    try {
        call();
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}

}  // namespace

TEST_CASE("cuda matmul: products of every size and transposition") {
    check_products<float, float>();
    check_products<bf16, bf16>();
    check_products<float, bf16>();
}

TEST_CASE("cuda matmul: linear layers, forward and backward, with and without GELU") {
    check_linears<float>();
    check_linears<bf16>();
}

TEST_CASE("cuda matmul: TF32 on demand") {
    Input<float> a(65 * 130, 1), b(130 * 17, 2);
    Vector expected = reference::matmul(a.values, b.values, 65, 17, 130);
    for (bool tf32 : {false, true}) {
        Blas blas(tf32);
        Device<float> c(65 * 17);
        gpu::matmul(c.get(), (const float*)a, (const float*)b, 65, 17, 130, false, false, false, {}, blas,
                    nullptr);
        double error = reference::relative_error(cuda_test::to_double(c.host()), expected);
        CHECK(error < (tf32 ? 1e-3 : 1e-6));
        CHECK((error > 1e-5) == tf32);
    }
}

TEST_CASE("cuda matmul: algorithms are looked for once a shape") {
    Blas blas;
    Input<float> x(32 * 32, 1);
    Device<float> c(32 * 32);
    for (int M : {32, 16, 32, 16, 32})
        gpu::matmul(c.get(), (const float*)x, (const float*)x, M, 32, 32, false, false, false, {}, blas,
                    nullptr);
    CHECK(blas.context.algorithms() == 2);
}

TEST_CASE("cuda matmul: failures name the product") {
    Blas blas;
    Input<bf16> x(64 * 64, 1);
    Device<bf16> c(64 * 64);
    auto odd = (bf16*)((char*)c.get() + 1);  // no algorithm accepts this address
    std::string text = message([&] {
        gpu::matmul(odd, (const bf16*)x, (const bf16*)x, 3, 5, 7, true, false, false, {.bias = x}, blas,
                    nullptr);
    });
    CHECK(text.find("cuBLASLt finds no algorithm (CUBLAS_STATUS_NOT_SUPPORTED) for the product (3,5) = (3,7) "
                    "transposed times (7,5), bf16 to bf16, epilogue bias") == 0);
    text = message([&] {
        gpu::matmul((bf16*)nullptr, (const bf16*)x, (const bf16*)x, 3, 5, 7, false, true, false, {}, blas,
                    nullptr);
    });
    CHECK(text.find("the product failed with CUBLAS_STATUS_INVALID_VALUE: product (3,5) = (3,7) times (7,5) "
                    "transposed") != std::string::npos);
    text = message([&] {
        gpu::matmul(c.get(), (const bf16*)x, (const bf16*)x, 3, 5, 7, false, true, false,
                    {.pre_gelu = c.get()}, blas, nullptr);
    });
    CHECK(text.find("multiple of 8 columns") != std::string::npos);
}

TEST_CASE("cuda matmul: column sums") {
    for (int N : kSizes)
        for (int C : {1, 7, 64, 130}) {
            check_column_sums<float>(N, C);
            check_column_sums<bf16>(N, C);
        }
    check_column_sums<float>(1000, 8);
    check_column_sums<float>(1000, 9);
    check_column_sums<bf16>(1000, 72);
    check_column_sums<bf16>(300, 64, 1);  // the address does not allow packs
    check_column_sums<bf16>(3, 33000);    // there are more columns than blocks
}
