#include "tests/reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>

namespace reference {

// ---------------------------------------------------------------------------------------------- matmul

Vector matmul(const Vector& a, const Vector& b, int M, int N, int K, bool trans_a, bool trans_b) {
    Vector c((size_t)M * N);
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            for (int k = 0; k < K; k++)
                c[(size_t)m * N + n] += (trans_a ? a[(size_t)k * M + m] : a[(size_t)m * K + k]) *
                                        (trans_b ? b[(size_t)n * K + k] : b[(size_t)k * N + n]);
    return c;
}

Vector add_bias(Vector c, const Vector& bias) {
    for (size_t i = 0; i < c.size() && !bias.empty(); i++) c[i] += bias[i % bias.size()];
    return c;
}

MatmulGradients matmul_backward(const Vector& dout, const Vector& inp, const Vector& weight, int N, int IC,
                                int OC) {
    Vector ones(N, 1.0);
    return {matmul(dout, weight, N, IC, OC, false, true), matmul(inp, dout, IC, OC, N, true, false),
            matmul(ones, dout, 1, OC, N)};
}

// ------------------------------------------------------------------------------------------- embedding

Vector embedding_forward(const std::vector<int>& tokens /*(B,T)*/, const Vector& wte /*(V,C)*/,
                         const Vector& wpe /*(>=T,C)*/, int B, int T, int C) {
    Vector out((size_t)B * T * C);
    for (int n = 0; n < B * T; n++)
        for (int c = 0; c < C; c++)
            out[(size_t)n * C + c] =
                wte[(size_t)tokens[n] * C + c] + (wpe.empty() ? 0.0 : wpe[n % T * C + c]);
    return out;
}

EmbeddingGradients embedding_backward(const Vector& dout /*(B,T,C)*/, const std::vector<int>& tokens, int B,
                                      int T, int C, int V, int positions) {
    EmbeddingGradients g{Vector((size_t)V * C), Vector((size_t)positions * C)};
    for (int n = 0; n < B * T; n++)
        for (int c = 0; c < C; c++) {
            g.dwte[(size_t)tokens[n] * C + c] += dout[(size_t)n * C + c];
            g.dwpe[(size_t)(n % T) * C + c] += dout[(size_t)n * C + c];
        }
    return g;
}

// ------------------------------------------------------------------------------------------- layernorm

LayerNorm layernorm_forward(const Vector& inp /*(N,C)*/, const Vector& weight, const Vector& bias, int N,
                            int C) {
    LayerNorm y{Vector((size_t)N * C), Vector(N), Vector(N)};
    for (int n = 0; n < N; n++) {
        const double* x = &inp[(size_t)n * C];
        double mean = 0, variance = 0;
        for (int c = 0; c < C; c++) mean += x[c] / C;
        for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / C;
        y.mean[n] = mean;
        y.rstd[n] = 1 / std::sqrt(variance + 1e-5);
        for (int c = 0; c < C; c++)
            y.out[(size_t)n * C + c] = (x[c] - mean) * y.rstd[n] * weight[c] + bias[c];
    }
    return y;
}

LayerNormGradients layernorm_backward(const Vector& dout, const Vector& inp, const Vector& weight, int N,
                                      int C) {
    LayerNormGradients d{Vector((size_t)N * C), Vector(C), Vector(C)};
    LayerNorm y = layernorm_forward(inp, Vector(C, 1.0), Vector(C, 0.0), N, C);  // its out is xhat
    for (int n = 0; n < N; n++) {
        const double *xhat = &y.out[(size_t)n * C], *dy = &dout[(size_t)n * C];
        double mean_g = 0, mean_gx = 0;
        for (int c = 0; c < C; c++) {
            mean_g += dy[c] * weight[c] / C;
            mean_gx += dy[c] * weight[c] * xhat[c] / C;
            d.dweight[c] += dy[c] * xhat[c];
            d.dbias[c] += dy[c];
        }
        for (int c = 0; c < C; c++)
            d.dinp[(size_t)n * C + c] = y.rstd[n] * (dy[c] * weight[c] - mean_g - xhat[c] * mean_gx);
    }
    return d;
}

// ------------------------------------------------------------------------------------------------ gelu

double gelu(double x) {
    double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
    return x / (1 + std::exp(-2 * u));
}

GeluDerivative gelu_derivative(double x) {
    double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
    double du = std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
    return {1 / (1 + std::exp(-2 * u)), x * 2 * du / ((1 + std::exp(-2 * u)) * (1 + std::exp(2 * u)))};
}

// ----------------------------------------------------------------------------------------- output_gate

Vector output_gate_forward(const Vector& inp, const Vector& gate) {
    Vector out = inp;
    for (size_t i = 0; i < out.size(); i++) out[i] /= 1 + std::exp(-gate[i]);
    return out;
}

OutputGateGradients output_gate_backward(const Vector& dout, const Vector& inp, const Vector& gate) {
    OutputGateGradients d{dout, dout};
    for (size_t i = 0; i < dout.size(); i++) {
        d.dinp[i] /= 1 + std::exp(-gate[i]);
        d.dgate[i] *= inp[i] / ((1 + std::exp(-gate[i])) * (1 + std::exp(gate[i])));
    }
    return d;
}

// ------------------------------------------------------------------------------------------ short_conv

Vector short_conv_forward(const Vector& inp /*(B,T,W)*/, const Vector& weight /*(K,W)*/, int B, int T, int W,
                          int K) {
    Vector out((size_t)B * T * W);
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++)
            for (int s = 0; s < K && s <= t; s++)
                for (int w = 0; w < W; w++)
                    out[((size_t)b * T + t) * W + w] +=
                        weight[(size_t)s * W + w] * inp[((size_t)b * T + t - s) * W + w];
    return out;
}

ShortConvGradients short_conv_backward(const Vector& dout, const Vector& inp, const Vector& weight, int B,
                                       int T, int W, int K) {
    ShortConvGradients d{Vector((size_t)B * T * W), Vector((size_t)K * W)};
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++)
            for (int s = 0; s < K && s <= t; s++)
                for (int w = 0; w < W; w++) {
                    double dy = dout[((size_t)b * T + t) * W + w];
                    d.dinp[((size_t)b * T + t - s) * W + w] += weight[(size_t)s * W + w] * dy;
                    d.dweight[(size_t)s * W + w] += inp[((size_t)b * T + t - s) * W + w] * dy;
                }
    return d;
}

// ---------------------------------------------------------------------------------------- qk_norm_rope

double rope_angle(int t, int i, int D) {
    return t * std::pow(10000.0, -2.0 * i / D);
}

QkNormRope qk_norm_rope_forward(const Vector& inp /*(B,T,3C)*/, const Vector& q_gain /*(H)*/, bool rope,
                                int B, int T, int H, int D) {
    QkNormRope y{inp, Vector((size_t)B * T * 2 * H, 1.0)};
    for (int row = 0; row < B * T; row++)
        for (int h = 0; h < 2 * H; h++) {  // the heads of q, then those of k
            double* x = &y.out[((size_t)row * 3 * H + h) * D];
            if (!q_gain.empty()) {
                double mean = 0;
                for (int i = 0; i < D; i++) mean += x[i] * x[i] / D;
                double& rstd = y.rstd[(size_t)row * 2 * H + h];
                rstd = 1 / std::sqrt(mean + 1e-6);
                for (int i = 0; i < D; i++) x[i] *= rstd * (h < H ? q_gain[h] : 1.0);
            }
            for (int i = 0; i < D / 2 && rope; i++) {
                double c = std::cos(rope_angle(row % T, i, D)), s = std::sin(rope_angle(row % T, i, D));
                double x1 = x[i], x2 = x[i + D / 2];
                x[i] = x1 * c - x2 * s;
                x[i + D / 2] = x1 * s + x2 * c;
            }
        }
    return y;
}

QkNormRopeGradients qk_norm_rope_backward(const Vector& dout, const Vector& inp, const Vector& q_gain,
                                          bool rope, int B, int T, int H, int D) {
    QkNormRopeGradients d{dout, Vector(q_gain.size())};
    Vector rstd = qk_norm_rope_forward(inp, q_gain, rope, B, T, H, D).rstd;
    for (int row = 0; row < B * T; row++)
        for (int h = 0; h < 2 * H; h++) {
            const double* x = &inp[((size_t)row * 3 * H + h) * D];
            double* dx = &d.dinp[((size_t)row * 3 * H + h) * D];
            for (int i = 0; i < D / 2 && rope; i++) {
                double c = std::cos(rope_angle(row % T, i, D)), s = std::sin(rope_angle(row % T, i, D));
                double dx1 = dx[i], dx2 = dx[i + D / 2];
                dx[i] = dx1 * c + dx2 * s;
                dx[i + D / 2] = -dx1 * s + dx2 * c;
            }
            if (q_gain.empty()) continue;
            double r = rstd[(size_t)row * 2 * H + h], gain = h < H ? q_gain[h] : 1.0, dot = 0;
            for (int i = 0; i < D; i++) dot += dx[i] * x[i] * r;
            if (h < H) d.dq_gain[h] += dot;
            for (int i = 0; i < D; i++) dx[i] = gain * r * (dx[i] - x[i] * r * dot / D);
        }
    return d;
}

// ------------------------------------------------------------------------------------------- attention

double power(double x, int p) {
    return p == 0 ? 1.0 : x * power(x, p - 1);
}

AttentionRow attention_row(const double* q /*row i, (D)*/, const double* k /*row 0, rows 3C apart*/,
                           const Vector& log_fade, const AttentionConfig& config, int i, int C, int D) {
    AttentionRow row{Vector(i + 1), Vector(i + 1), Vector(i + 1), 0, Vector(i + 1)};
    for (int j = 0; j <= i; j++) {
        for (int d = 0; d < D; d++) row.x[j] += q[d] * k[(size_t)j * 3 * C + d];
        row.x[j] /= std::sqrt(D);
    }
    if (config.softmax()) {
        double sum = 0, max = -std::numeric_limits<double>::infinity();
        for (int j = 0; j <= i; j++) max = std::max(max, row.x[j] + log_fade[j]);
        for (int j = 0; j <= i; j++) sum += row.A[j] = std::exp(row.x[j] + log_fade[j] - max);
        for (int j = 0; j <= i; j++) row.A[j] /= sum;
        row.slope = row.A;
        row.stat = max + std::log(sum);
        return row;
    }
    if (config.kind == AttentionKind::sigmoid) {
        for (int j = 0; j <= i; j++) {
            const double y = row.x[j] - std::log(i + 1.0), fade = std::exp(log_fade[j]);
            row.A[j] = fade / (1 + std::exp(-y));
            row.slope[j] = fade / (1 + std::exp(-y)) / (1 + std::exp(y));
        }
        row.stat = 1;
        return row;
    }
    const int p = config.power();
    double moment = 1;
    for (int s = 0; s < p; s++) moment *= (2 * s + 1) * (1 + 2.0 * s / D);
    switch (config.scale) {
        case ScaleKind::row: {
            double n = 0;  // n_i
            for (int j = 0; j <= i; j++) n -= row.dlog_scale[j] = -std::exp(2 * log_fade[j]);
            for (double& d : row.dlog_scale) d /= n;
            row.stat = std::sqrt(moment * n);
            break;
        }
        case ScaleKind::context:
            row.stat = std::sqrt(config.context);
            break;
        case ScaleKind::mean:
            row.stat = std::sqrt(moment) * (i + 1);
            break;
        case ScaleKind::sum:
            row.stat = 1e-6;
            for (int j = 0; j <= i; j++) {
                const double weight = std::abs(power(row.x[j], p)) * std::exp(log_fade[j]);
                row.stat += weight;
                row.dlog_scale[j] = -weight;
            }
            for (double& d : row.dlog_scale) d /= row.stat;
            break;
        case ScaleKind::constant:
            row.stat = 1 / config.constant;
            break;
    }
    for (int j = 0; j <= i; j++) {
        const double factor = std::exp(log_fade[j]) / row.stat;
        row.A[j] = power(row.x[j], p) * factor;
        row.slope[j] = p * power(row.x[j], p - 1) * factor;
    }
    return row;
}

AttentionRow attention_row(const double* q, const double* k, double log_gamma, const AttentionConfig& config,
                           int i, int C, int D) {
    Vector log_fade(i + 1);
    for (int j = 0; j <= i; j++) log_fade[j] = (i - j) * log_gamma;
    return attention_row(q, k, log_fade, config, i, C, D);
}

double log_sigmoid(double delta) {
    return std::min(delta, 0.0) - std::log1p(std::exp(-std::abs(delta)));
}

double log_sigmoid_derivative(double delta) {
    return 1 / (1 + std::exp(delta));
}

// log F_ij (i+1) of row i of a head.
static Vector log_fades(const Vector& decay, bool gate, int bh, int i, int T, int H) {
    Vector log_fade(i + 1);
    const double log_gamma = gate || decay.empty() ? 0 : log_sigmoid(decay[bh % H]);
    for (int j = i - 1; j >= 0; j--)
        log_fade[j] = gate ? log_fade[j + 1] + decay[(size_t)bh * T + j + 1] : (i - j) * log_gamma;
    return log_fade;
}

Attention attention_forward(const Vector& qkv /*(B,T,3C)*/, const Vector& decay,
                            const AttentionConfig& config, int B, int T, int H, int D, bool gate) {
    int C = H * D;
    Attention y{Vector((size_t)B * T * C), Vector((size_t)B * H * T)};
#pragma omp parallel for schedule(dynamic)
    for (int bh = 0; bh < B * H; bh++) {
        int b = bh / H, h = bh % H;
        const double *q = &qkv[(size_t)b * T * 3 * C + h * D], *k = q + C, *v = k + C;
        for (int i = 0; i < T; i++) {
            AttentionRow row =
                attention_row(q + (size_t)i * 3 * C, k, log_fades(decay, gate, bh, i, T, H), config, i, C, D);
            y.stats[(size_t)bh * T + i] = row.stat;
            double* out = &y.out[((size_t)b * T + i) * C + h * D];
            for (int j = 0; j <= i; j++)
                for (int d = 0; d < D; d++) out[d] += row.A[j] * v[(size_t)j * 3 * C + d];
        }
    }
    return y;
}

AttentionGradients attention_backward(const Vector& dout /*(B,T,C)*/, const Vector& qkv /*(B,T,3C)*/,
                                      const Vector& decay, const AttentionConfig& config, int B, int T, int H,
                                      int D, bool gate) {
    int C = H * D, p = config.power();
    AttentionGradients grad{Vector((size_t)B * T * 3 * C), Vector(decay.size())};
    Vector dlog_gamma((size_t)B * H), squares((size_t)B * H);
    auto add_term = [&](int bh, double term) {
        dlog_gamma[bh] += term;
        squares[bh] += term * term;
    };
    auto add_gate_term = [&](int bh, int i, int j, double term) {  // as differences, which are added up below
        if (i == j) return;
        grad.ddecay[(size_t)bh * T + j + 1] += term;
        if (i + 1 < T) grad.ddecay[(size_t)bh * T + i + 1] -= term;
    };
#pragma omp parallel for schedule(dynamic)
    for (int bh = 0; bh < B * H; bh++) {
        int b = bh / H, h = bh % H;
        size_t head = (size_t)b * T * 3 * C + h * D;
        const double *q = &qkv[head], *k = q + C, *v = k + C;
        double *dq = &grad.dqkv[head], *dk = dq + C, *dv = dk + C;
        for (int i = 0; i < T; i++) {
            AttentionRow row =
                attention_row(q + (size_t)i * 3 * C, k, log_fades(decay, gate, bh, i, T, H), config, i, C, D);
            const double* dO = &dout[((size_t)b * T + i) * C + h * D];
            Vector dA(i + 1);
            double r = 0;
            for (int j = 0; j <= i; j++) {
                for (int d = 0; d < D; d++) {
                    dA[j] += dO[d] * v[(size_t)j * 3 * C + d];
                    dv[(size_t)j * 3 * C + d] += row.A[j] * dO[d];
                }
                r += row.A[j] * dA[j];
            }
            double dlog_scale = 0;  // d log c_i / d log gamma
            for (int j = 0; j <= i; j++) dlog_scale += (i - j) * row.dlog_scale[j];
            for (int j = 0; j <= i; j++) {
                double dx = row.slope[j] * dA[j];
                if (config.softmax()) {
                    dx -= row.slope[j] * r;
                    gate ? add_gate_term(bh, i, j, dx) : add_term(bh, dx * (i - j));
                } else {
                    double xp = power(row.x[j], p), sign = (xp > 0) - (xp < 0);
                    if (config.has_row_sum()) dx -= row.slope[j] * sign * r;
                    gate ? add_gate_term(bh, i, j, row.A[j] * dA[j] + r * row.dlog_scale[j])
                         : add_term(bh, row.A[j] * dA[j] * (i - j + dlog_scale));
                }
                for (int d = 0; d < D; d++) {
                    dq[(size_t)i * 3 * C + d] += dx * k[(size_t)j * 3 * C + d] / std::sqrt(D);
                    dk[(size_t)j * 3 * C + d] += dx * q[(size_t)i * 3 * C + d] / std::sqrt(D);
                }
            }
        }
    }
    for (size_t at = 0; gate && at < decay.size(); at++)
        if (at % T > 0) grad.ddecay[at] += grad.ddecay[at - 1];
    for (int bh = 0; bh < B * H && !decay.empty() && !gate; bh++) {
        const double slope = log_sigmoid_derivative(decay[bh % H]);
        grad.ddecay[bh % H] += dlog_gamma[bh] * slope;
        grad.ddecay_terms += squares[bh] * slope * slope;
    }
    grad.ddecay_terms = std::sqrt(grad.ddecay_terms);
    return grad;
}

// ------------------------------------------------------------------------------------------ decay_gate

// z (B,T,H) as out (B,H,T): out_bht = f(z_bth).
static Vector heads_first(const Vector& z, int B, int T, int H, double (*f)(double)) {
    Vector out(z.size());
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++)
            for (int h = 0; h < H; h++) out[((size_t)b * H + h) * T + t] = f(z[((size_t)b * T + t) * H + h]);
    return out;
}

Vector decay_gate_forward(const Vector& inp, const Vector& weight, const Vector& bias, int B, int T, int C,
                          int H) {
    return heads_first(add_bias(matmul(inp, weight, B * T, H, C), bias), B, T, H, log_sigmoid);
}

MatmulGradients decay_gate_backward(const Vector& dlog_f, const Vector& inp, const Vector& weight,
                                    const Vector& bias, int B, int T, int C, int H) {
    Vector dz =
        heads_first(add_bias(matmul(inp, weight, B * T, H, C), bias), B, T, H, log_sigmoid_derivative);
    for (size_t i = 0; i < dz.size(); i++) dz[i] *= dlog_f[i];
    // (B,H,T) to (B,T,H) is what heads_first() does with T and H exchanged.
    return matmul_backward(heads_first(dz, B, H, T, [](double x) { return x; }), inp, weight, B * T, C, H);
}

// --------------------------------------------------------------------------------------- cross_entropy

CrossEntropy cross_entropy(const Vector& logits /*(N,Vp)*/, const std::vector<int>& targets /*(N)*/, int N,
                           int V, int Vp) {
    CrossEntropy y{Vector(N), Vector((size_t)N * Vp)};
    for (int n = 0; n < N; n++) {
        if (targets[n] < 0) continue;
        const double* x = &logits[(size_t)n * Vp];
        double max = *std::max_element(x, x + V), sum = 0;
        for (int v = 0; v < V; v++) sum += std::exp(x[v] - max);
        y.losses[n] = max + std::log(sum) - x[targets[n]];
        for (int v = 0; v < V; v++)
            y.dlogits[(size_t)n * Vp + v] = std::exp(x[v] - max) / sum - (v == targets[n]);
    }
    return y;
}

// ----------------------------------------------------------------------------------------------- adamw

void AdamW::update(const Vector& grad, double learning_rate, double beta1, double beta2, double eps,
                   double weight_decay, double grad_scale, int step) {
    for (size_t i = 0; i < param.size(); i++) {
        double g = grad[i] * grad_scale;
        param[i] -= learning_rate * weight_decay * param[i];
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        double m_hat = m[i] / (1 - std::pow(beta1, step)), v_hat = v[i] / (1 - std::pow(beta2, step));
        param[i] -= learning_rate * m_hat / (std::sqrt(v_hat) + eps);
    }
}

// ------------------------------------------------------------------------- how a layer is held against it

Floats normal(size_t n, uint64_t seed, double scale, double mean) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> distribution(mean, scale);
    Floats x(n);
    for (float& value : x) value = (float)distribution(generator);
    return x;
}

std::vector<int> random_ints(size_t n, int below, uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::vector<int> x(n);
    for (int& value : x) value = (int)(generator() % below);
    return x;
}

Floats to_float(const Vector& x) {
    return convert<float>(x);
}

Vector part_of(const Vector& qkv, int part, int C) {
    Vector x;
    for (size_t i = 0; i < qkv.size(); i++)
        if ((int)(i / C % 3) == part) x.push_back(qkv[i]);
    return x;
}

double dot(const Vector& a, const Vector& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); i++) sum += a[i] * b[i];
    return sum;
}

double norm(const Vector& x) {
    return std::sqrt(dot(x, x));
}

double relative_error(Vector a, const Vector& b, double floor) {
    if (a == b) return 0;
    for (size_t i = 0; i < a.size(); i++) a[i] -= b[i];
    return norm(a) / std::max(norm(b), floor);
}

bool is_nan(float x) {
    return (std::bit_cast<uint32_t>(x) & 0x7fffffff) > 0x7f800000;
}

bool is_nan(cpu::bf16 x) {
    return (x.bits & 0x7fff) > 0x7f80;
}

std::vector<Floats> check_layer(const std::vector<Input>& inputs, const std::vector<Output>& outputs,
                                const std::function<void(std::map<std::string, OutputPointer>&)>& call) {
    constexpr size_t kGuard = 17;
    const float kNan = std::numeric_limits<float>::quiet_NaN();
    const Floats guard = convert<float>(convert<cpu::bf16>(normal(kGuard, 1234)));

    std::vector<Floats> initial;
    for (size_t o = 0; o < outputs.size(); o++) {
        size_t n = outputs[o].expected.size();
        double rms = norm(outputs[o].expected) / std::sqrt((double)std::max<size_t>(n, 1));
        initial.push_back(outputs[o].initial);
        if (outputs[o].kind == Output::overwritten) initial[o].assign(n, kNan);
        if (outputs[o].kind == Output::added_to && initial[o].empty())
            initial[o] = normal(n, 77 + o, rms > 0 ? rms : 1);
        REQUIRE(initial[o].size() == n);
    }
    auto run = [&](int threads) {
        Threads scope(threads);
        std::vector<Floats> buffers;
        std::vector<std::vector<cpu::bf16>> halves(outputs.size());  // what the layer sees of a bf16 output
        std::map<std::string, OutputPointer> out;
        for (size_t o = 0; o < outputs.size(); o++) {
            bool is_bf16 = outputs[o].is_bf16;
            buffers.push_back(guard);
            buffers[o].insert(buffers[o].end(), initial[o].begin(), initial[o].end());
            buffers[o].insert(buffers[o].end(), guard.begin(), guard.end());
            if (is_bf16) halves[o] = convert<cpu::bf16>(buffers[o]);
            out[outputs[o].name] = {is_bf16 ? (void*)(halves[o].data() + kGuard) : buffers[o].data() + kGuard,
                                    is_bf16};
        }
        call(out);
        for (size_t o = 0; o < outputs.size(); o++) {
            Floats& x = buffers[o];
            if (outputs[o].is_bf16) x = convert<float>(halves[o]);
            INFO("written outside of ", outputs[o].name);
            CHECK(same_bits(Floats(x.begin(), x.begin() + kGuard), guard));
            CHECK(same_bits(Floats(x.end() - kGuard, x.end()), guard));
            x = Floats(x.begin() + kGuard, x.end() - kGuard);
        }
        return buffers;
    };
    std::vector<std::vector<char>> inputs_before;
    for (const Input& x : inputs) inputs_before.push_back(x.copy());

    std::vector<Floats> first = run(2), again = run(2), one_thread = run(1);
    for (size_t o = 0; o < outputs.size(); o++) {
        INFO("output ", outputs[o].name);
        Vector got = to_double(first[o]);
        for (size_t i = 0; i < got.size() && outputs[o].kind == Output::added_to; i++)
            got[i] -= initial[o][i];
        CHECK(relative_error(got, outputs[o].expected, outputs[o].floor) < outputs[o].tolerance);
        CHECK(same_bits(first[o], again[o]));
        CHECK(relative_error(to_double(one_thread[o]), to_double(first[o])) <
              (outputs[o].is_bf16 ? 1e-3 : 1e-6));
    }
    for (size_t i = 0; i < inputs.size(); i++) {
        INFO("input ", i, " was written to");
        CHECK(same_bits(inputs[i].copy(), inputs_before[i]));
    }
    return first;
}

}  // namespace reference
