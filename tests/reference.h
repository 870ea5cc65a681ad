// The oracle of the tests: every layer in double precision, in plain loops straight from its formula, written
// without a look at the layers that it judges. Forward functions return their outputs, backward functions the
// gradients themselves, added to nothing. The backward passes are checked against finite differences of the
// forward passes where the layers are tested.
//
// Below the oracle stands check_layer(), which holds one call of a layer of floats or bf16 against it.
//
// What is no template is in reference.cpp, compiled once and with more optimisation than the tests.
#pragma once
#include <doctest/doctest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "llmc/config.h"
#include "llmc/cpu/bf16.h"

namespace reference {

using Vector = std::vector<double>;

// ---------------------------------------------------------------------------------------------- matmul

// (M,N) = op(a) op(b): a is (M,K), or (K,M) where trans_a; b is (K,N), or (N,K) where trans_b.
Vector matmul(const Vector& a, const Vector& b, int M, int N, int K, bool trans_a = false,
              bool trans_b = false);

// c (M,N) with bias (N) added to each row; an empty bias is none.
Vector add_bias(Vector c, const Vector& bias);

struct MatmulGradients {
    Vector dinp /*(N,IC)*/, dweight /*(IC,OC)*/, dbias /*(OC)*/;
};

// The gradients of out (N,OC) = inp (N,IC) weight (IC,OC) + bias.
MatmulGradients matmul_backward(const Vector& dout, const Vector& inp, const Vector& weight, int N, int IC,
                                int OC);

// ------------------------------------------------------------------------------------------- embedding

// An empty wpe is none.
Vector embedding_forward(const std::vector<int>& tokens /*(B,T)*/, const Vector& wte /*(V,C)*/,
                         const Vector& wpe /*(>=T,C)*/, int B, int T, int C);

struct EmbeddingGradients {
    Vector dwte /*(V,C)*/, dwpe /*(positions,C)*/;
};

EmbeddingGradients embedding_backward(const Vector& dout /*(B,T,C)*/, const std::vector<int>& tokens, int B,
                                      int T, int C, int V, int positions);

// ------------------------------------------------------------------------------------------- layernorm

struct LayerNorm {
    Vector out /*(N,C)*/, mean /*(N)*/, rstd /*(N)*/;
};

LayerNorm layernorm_forward(const Vector& inp /*(N,C)*/, const Vector& weight, const Vector& bias, int N,
                            int C);

struct LayerNormGradients {
    Vector dinp /*(N,C)*/, dweight /*(C)*/, dbias /*(C)*/;
};

// With xhat = (x - mean) rstd and g = dout weight: dx = rstd (g - mean(g) - xhat mean(g xhat)).
LayerNormGradients layernorm_backward(const Vector& dout, const Vector& inp, const Vector& weight, int N,
                                      int C);

// ------------------------------------------------------------------------------------------------ gelu

// 0.5 x (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), as x sigmoid(2u), which keeps its precision
// where tanh(u) is near -1.
double gelu(double x);

// The derivative as its two terms, which cancel at x = -0.75: sigmoid(2u), and x times the derivative of
// that.
struct GeluDerivative {
    double gate, slope;
    double value() const { return gate + slope; }
    double magnitude() const { return std::abs(gate) + std::abs(slope); }
};

GeluDerivative gelu_derivative(double x);

// ----------------------------------------------------------------------------------------- output_gate

// out = inp sigmoid(gate), number by number.
Vector output_gate_forward(const Vector& inp, const Vector& gate);

struct OutputGateGradients {
    Vector dinp, dgate;
};

OutputGateGradients output_gate_backward(const Vector& dout, const Vector& inp, const Vector& gate);

// ------------------------------------------------------------------------------------------ short_conv

// z_t = sum_{s<K} w_s z_{t-s}, zero before the first token of a sequence.
Vector short_conv_forward(const Vector& inp /*(B,T,W)*/, const Vector& weight /*(K,W)*/, int B, int T, int W,
                          int K);

struct ShortConvGradients {
    Vector dinp /*(B,T,W)*/, dweight /*(K,W)*/;
};

ShortConvGradients short_conv_backward(const Vector& dout, const Vector& inp, const Vector& weight, int B,
                                       int T, int W, int K);

// ---------------------------------------------------------------------------------------- qk_norm_rope

// The angle of channels i and i + D/2 at time t is t 10000^(-2i/D).
double rope_angle(int t, int i, int D);

struct QkNormRope {
    Vector out /*(B,T,3C)*/, rstd /*(B,T,2H)*/;
};

// An empty q_gain is no norm. For q and k: x -> R_t(gain x / sqrt(mean(x^2) + 1e-6)), R_t the rotation by the
// angles of time t; the gain is on q only. v is copied.
QkNormRope qk_norm_rope_forward(const Vector& inp /*(B,T,3C)*/, const Vector& q_gain /*(H)*/, bool rope,
                                int B, int T, int H, int D);

struct QkNormRopeGradients {
    Vector dinp /*(B,T,3C)*/, dq_gain /*(H)*/;
};

// The rotation back, then with xhat = x rstd: dgain = dy . xhat, dx = gain rstd (dy - xhat mean(dy xhat)).
QkNormRopeGradients qk_norm_rope_backward(const Vector& dout, const Vector& inp, const Vector& q_gain,
                                          bool rope, int B, int T, int H, int D);

// ------------------------------------------------------------------------------------------- attention

double power(double x, int p);

// One row of one head: for j <= i the scores x_ij, the matrix A_ij, and what else the two passes need of it.
struct AttentionRow {
    Vector x, A;
    Vector slope;       // dA_ij / dx_ij without what x_ij does to the row's normaliser
    double stat = 0;    // softmax: log-sum-exp of the logits; otherwise 1 / c_i
    Vector dlog_scale;  // d log c_i / d log F_ij; zeros for softmax
};

// log_fade (i+1) holds log F_ij.
AttentionRow attention_row(const double* q /*row i, (D)*/, const double* k /*row 0, rows 3C apart*/,
                           const Vector& log_fade, const AttentionConfig& config, int i, int C, int D);
// F_ij = gamma^(i-j); log_gamma 0: no decay.
AttentionRow attention_row(const double* q, const double* k, double log_gamma, const AttentionConfig& config,
                           int i, int C, int D);

// log sigmoid(delta), and its derivative 1 - sigmoid(delta).
double log_sigmoid(double delta);
double log_sigmoid_derivative(double delta);

struct Attention {
    Vector out /*(B,T,C)*/, stats /*(B,H,T)*/;
};

// decay (H) is delta; empty: none. With a gate it is log f (B,H,T), and log F_ij is its sum over j < t <= i.
Attention attention_forward(const Vector& qkv /*(B,T,3C)*/, const Vector& decay,
                            const AttentionConfig& config, int B, int T, int H, int D, bool gate = false);

struct AttentionGradients {
    Vector dqkv /*(B,T,3C)*/, ddecay /*as decay*/;
    double ddecay_terms = 0;  // the norm of the terms that ddecay sums up, which may cancel
};

// With r_i = sum_j A_ij dA_ij:
//   softmax      dx_ij = A_ij (dA_ij - r_i), and log F_ij has the same gradient
//   sum          dx_ij = F_ij p x_ij^(p-1) (dA_ij - sign(x_ij^p) r_i) / s_i
//   other scales dx_ij = c_i F_ij p x_ij^(p-1) dA_ij
//   sigmoid      dx_ij = F_ij sigmoid'(x_ij - log(i+1)) dA_ij
// and for all but softmax log F_ij has the gradient A_ij dA_ij + r_i d log c_i / d log F_ij. That of log
// gamma is (i-j) times this, summed over all pairs. That of log f_t is the sum over the pairs with j < t <=
// i.
AttentionGradients attention_backward(const Vector& dout /*(B,T,C)*/, const Vector& qkv /*(B,T,3C)*/,
                                      const Vector& decay, const AttentionConfig& config, int B, int T, int H,
                                      int D, bool gate = false);

// ------------------------------------------------------------------------------------------ decay_gate

// log f (B,H,T) with f = sigmoid(inp weight + bias).
Vector decay_gate_forward(const Vector& inp /*(B,T,C)*/, const Vector& weight /*(C,H)*/,
                          const Vector& bias /*(H)*/, int B, int T, int C, int H);

MatmulGradients decay_gate_backward(const Vector& dlog_f /*(B,H,T)*/, const Vector& inp, const Vector& weight,
                                    const Vector& bias, int B, int T, int C, int H);

// --------------------------------------------------------------------------------------- cross_entropy

struct CrossEntropy {
    Vector losses /*(N)*/, dlogits /*(N,Vp)*/;  // of the sum of the losses; 0 in the padding
};

// A row whose target is -1 has neither loss nor gradient.
CrossEntropy cross_entropy(const Vector& logits /*(N,Vp)*/, const std::vector<int>& targets /*(N)*/, int N,
                           int V, int Vp);

// ----------------------------------------------------------------------------------------------- adamw

struct AdamW {
    Vector param, m, v;

    // One step as torch.optim.AdamW takes it; step counts from 1.
    void update(const Vector& grad, double learning_rate, double beta1, double beta2, double eps,
                double weight_decay, double grad_scale, int step);
};

// ------------------------------------------------------------------------- how a layer is held against it

using Floats = std::vector<float>;

Floats normal(size_t n, uint64_t seed, double scale = 1, double mean = 0);

// An optional input of a layer.
inline const float* or_null(const Floats& x) {
    return x.empty() ? nullptr : x.data();
}

std::vector<int> random_ints(size_t n, int below, uint64_t seed);

// The numbers as Real, rounded where that is bf16.
template <class Real, class T>
std::vector<Real> convert(const std::vector<T>& x) {
    std::vector<Real> y(x.size());
    for (size_t i = 0; i < x.size(); i++) y[i] = Real((float)x[i]);
    return y;
}
// From float or a type of bf16.
template <class T>
Vector to_double(const std::vector<T>& x) {
    Vector y(x.size());
    for (size_t i = 0; i < x.size(); i++) y[i] = (double)(float)x[i];
    return y;
}
Floats to_float(const Vector& x);

template <class Real>
constexpr bool kIsBf16 = std::is_same_v<Real, cpu::bf16>;

// The relative error of an output that is computed in float and stored as Real: rounding to bf16 alone is off
// by up to 2^-8.
template <class Real>
double stored(double tolerance = 1e-5) {
    return kIsBf16<Real> ? 0x1p-8 + tolerance : tolerance;
}

// The rows of q (part 0), k (1) or v (2) of qkv (B,T,3C).
Vector part_of(const Vector& qkv, int part, int C);

double dot(const Vector& a, const Vector& b);
double norm(const Vector& x);

// ||a - b|| / ||b||, where ||b|| counts as at least `floor`.
double relative_error(Vector a, const Vector& b, double floor = 0);

// From the bits, because -ffast-math, against which it stands guard, would take std::isnan away.
bool is_nan(float x);

bool is_nan(cpu::bf16 x);

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Central differences of loss() in each of x.
template <class Loss>
Vector finite_differences(Vector& x, Loss loss, double step = 1e-4) {
    Vector gradient(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        double saved = x[i];
        x[i] = saved + step;
        double above = loss();
        x[i] = saved - step;
        gradient[i] = (above - loss()) / (2 * step);
        x[i] = saved;
    }
    return gradient;
}

// The number of OpenMP threads while it lives.
struct Threads {
    int before = omp_get_max_threads();
    explicit Threads(int n) { omp_set_num_threads(n); }
    ~Threads() { omp_set_num_threads(before); }
};

// What a call must leave in one of its outputs.
struct Output {
    enum Kind { overwritten, added_to, in_place };
    std::string name;
    Kind kind;
    Vector expected;          // added_to: what must have been added
    double tolerance = 1e-5;  // of the relative norm error
    Floats initial = {};      // what stands there before the call; added_to: random numbers where empty
    bool is_bf16 = false;
    double floor = 0;  // of the norm that the error is relative to
};

// One that the layer writes as Real.
template <class Real>
Output output(const std::string& name, Output::Kind kind, const Vector& expected, double tolerance = 1e-5,
              const std::vector<Real>& initial = {}) {
    return {name, kind, expected, tolerance, convert<float>(initial), kIsBf16<Real>};
}

// Where an output is written to; null where the call does not list it.
struct OutputPointer {
    void* data = nullptr;
    bool is_bf16 = false;
    template <class Real>
    operator Real*() const {
        REQUIRE((!data || is_bf16 == kIsBf16<std::remove_const_t<Real>>));
        return (Real*)data;
    }
};

// An input of the call, which it must leave alone.
struct Input {
    const char* data;
    size_t bytes;
    template <class T>
    Input(const std::vector<T>& x) : data((const char*)x.data()), bytes(x.size() * sizeof(T)) {}
    std::vector<char> copy() const { return std::vector<char>(data, data + bytes); }
};

// Calls a layer with fresh outputs: call(out) finds the one of Output::name at out[name]. Overwritten outputs
// hold NaN before, the ones added to random numbers. Each lies between guards, at an address that is aligned
// to no more than its type. It is called twice with two threads, which must give the same bits, and once with
// one, which must agree to 1e-6, or where a bf16 may round the other way to 1e-3. Returns the outputs of the
// first call.
std::vector<Floats> check_layer(const std::vector<Input>& inputs, const std::vector<Output>& outputs,
                                const std::function<void(std::map<std::string, OutputPointer>&)>& call);

}  // namespace reference
