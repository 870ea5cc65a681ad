// A whole GPT trainer in one file of plain loops: forward pass, backward pass and AdamW, with nothing but the
// standard library. It learns the bytes of a text file.
//
//   g++ -O2 docs/tiny.cpp -o tiny && ./tiny shakespeare.txt poly3
//   ./tiny FILE [softmax|poly3] [STEPS]
//
// It computes what `train_gpt train --positions learned` computes for softmax, and with `--qk-norm true` for
// poly3. tests/cpu/tiny.cpp holds its loss and gradients against the trainer's. Read it from top to bottom:
// each layer is a forward function with its backward function below. A backward function takes the gradient of
// the layer's output (dout) and *adds* the gradients of its inputs (dinp) and of its parameters.
//
// Sizes: B sequences of T tokens, C channels, H heads of D = C/H channels, L blocks, V = 256 bytes. N = B*T rows.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

using Floats = std::vector<float>;

// ---------------------------------------------------------------------------------------------- parameters

struct Parameter {
    std::string name;  // as in Hugging Face's GPT-2
    Floats value, gradient, m, v;
    bool is_matrix;  // weight decay applies to matrices and embeddings only

    Parameter(const std::string& name, size_t size, float std, float constant, std::mt19937& random)
        : name(name), value(size, constant), gradient(size), m(size), v(size), is_matrix(std > 0) {
        std::normal_distribution<float> normal(0, 1);
        for (float& x : value) x += std * normal(random);
    }
};

// ----------------------------------------------------------------------------------------------- the layers

// out (N,O) = inp (N,I) weight (I,O) + bias (O)
void linear_forward(Floats& out, const Floats& inp, const Parameter& weight, const Parameter& bias, int N, int I,
                    int O) {
    out.resize(N * O);
    for (int n = 0; n < N; n++) {
        for (int o = 0; o < O; o++) out[n * O + o] = bias.value[o];
        for (int i = 0; i < I; i++)
            for (int o = 0; o < O; o++) out[n * O + o] += inp[n * I + i] * weight.value[i * O + o];
    }
}

void linear_backward(Floats& dinp, Parameter& weight, Parameter& bias, const Floats& dout, const Floats& inp,
                     int N, int I, int O) {
    for (int n = 0; n < N; n++) {
        for (int o = 0; o < O; o++) bias.gradient[o] += dout[n * O + o];
        for (int i = 0; i < I; i++) {
            float sum = 0;
            for (int o = 0; o < O; o++) {
                sum += dout[n * O + o] * weight.value[i * O + o];
                weight.gradient[i * O + o] += inp[n * I + i] * dout[n * O + o];
            }
            dinp[n * I + i] += sum;
        }
    }
}

// Each row of C numbers is shifted and scaled to mean 0 and variance 1, then scaled by weight and shifted by bias.
struct RowStatistics {
    float mean, rstd;  // rstd = 1 / standard deviation
};
RowStatistics row_statistics(const float* x, int C) {
    float mean = 0, variance = 0;
    for (int c = 0; c < C; c++) mean += x[c] / C;
    for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / C;
    return {mean, 1 / std::sqrt(variance + 1e-5f)};
}

void layernorm_forward(Floats& out, const Floats& inp, const Parameter& weight, const Parameter& bias, int N,
                       int C) {
    out.resize(N * C);
    for (int n = 0; n < N; n++) {
        RowStatistics s = row_statistics(&inp[n * C], C);
        for (int c = 0; c < C; c++)
            out[n * C + c] = (inp[n * C + c] - s.mean) * s.rstd * weight.value[c] + bias.value[c];
    }
}

// With x^ = (x - mean) rstd and d = dout weight: dx = rstd (d - mean(d) - x^ mean(d x^)), because the mean and the
// standard deviation of the row depend on x too.
void layernorm_backward(Floats& dinp, Parameter& weight, Parameter& bias, const Floats& dout, const Floats& inp,
                        int N, int C) {
    for (int n = 0; n < N; n++) {
        RowStatistics s = row_statistics(&inp[n * C], C);
        float mean_d = 0, mean_dx = 0;
        for (int c = 0; c < C; c++) {
            float normed = (inp[n * C + c] - s.mean) * s.rstd, d = dout[n * C + c] * weight.value[c];
            mean_d += d / C;
            mean_dx += d * normed / C;
            weight.gradient[c] += dout[n * C + c] * normed;
            bias.gradient[c] += dout[n * C + c];
        }
        for (int c = 0; c < C; c++) {
            float normed = (inp[n * C + c] - s.mean) * s.rstd, d = dout[n * C + c] * weight.value[c];
            dinp[n * C + c] += s.rstd * (d - mean_d - normed * mean_dx);
        }
    }
}

// GELU, in the form with tanh: x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3).
const float kSqrt2OverPi = 0.7978845608f;

void gelu_forward(Floats& out, const Floats& inp) {
    out.resize(inp.size());
    for (size_t i = 0; i < inp.size(); i++) {
        float x = inp[i], u = kSqrt2OverPi * (x + 0.044715f * x * x * x);
        out[i] = 0.5f * x * (1 + std::tanh(u));
    }
}

void gelu_backward(Floats& dinp, const Floats& dout, const Floats& inp) {
    for (size_t i = 0; i < inp.size(); i++) {
        float x = inp[i], u = kSqrt2OverPi * (x + 0.044715f * x * x * x), t = std::tanh(u);
        float du = kSqrt2OverPi * (1 + 3 * 0.044715f * x * x);
        dinp[i] += dout[i] * (0.5f * (1 + t) + 0.5f * x * (1 - t * t) * du);
    }
}

// A polynomial needs scores of a known size, so for poly3 the queries and keys of each head are scaled to a mean
// square of 1, and queries also by a learned gain a head. Rows of qkv are q (H,D), k (H,D), v (H,D).
float head_rstd(const float* x, int D) {
    float squares = 0;
    for (int d = 0; d < D; d++) squares += x[d] * x[d] / D;
    return 1 / std::sqrt(squares + 1e-6f);
}

void qk_norm_forward(Floats& out, const Floats& inp, const Parameter& gain, int N, int H, int D) {
    out = inp;  // v passes through
    for (int n = 0; n < N; n++)
        for (int h = 0; h < 2 * H; h++) {
            int at = n * 3 * H * D + h * D;
            float scale = head_rstd(&inp[at], D) * (h < H ? gain.value[h] : 1);
            for (int d = 0; d < D; d++) out[at + d] = inp[at + d] * scale;
        }
}

void qk_norm_backward(Floats& dinp, Parameter& gain, const Floats& dout, const Floats& inp, int N, int H, int D) {
    for (int n = 0; n < N; n++)
        for (int h = 0; h < 3 * H; h++) {
            int at = n * 3 * H * D + h * D;
            if (h >= 2 * H) {
                for (int d = 0; d < D; d++) dinp[at + d] += dout[at + d];
                continue;
            }
            float rstd = head_rstd(&inp[at], D), g = h < H ? gain.value[h] : 1, mean_dx = 0;
            for (int d = 0; d < D; d++) mean_dx += dout[at + d] * inp[at + d] * rstd / D;
            if (h < H) gain.gradient[h] += mean_dx * D;
            for (int d = 0; d < D; d++)
                dinp[at + d] += g * rstd * (dout[at + d] - inp[at + d] * rstd * mean_dx);
        }
}

// Causal attention: the output of token i is the sum of v_j over all tokens j <= i, weighted by a_ij, a function
// of the scores x_ij = q_i . k_j / sqrt(D).
//
//   softmax: a_ij = exp(x_ij) / sum_j exp(x_ij)
//   poly3:   a_ij = c_i x_ij^3, with c_i = 1 / sqrt((i+1) m). m = E[x^6] for normal q and k, so that a row of
//            weights has a norm of about 1, as the rows of softmax have at most. See docs/attention.md.
//
// Neither stores a matrix of T x T numbers: a row of weights is made when it is needed.
enum class Attention { softmax, poly3 };

float poly3_row_scale(int i, int D) {
    double m = 1;
    for (int s = 0; s < 3; s++) m *= (2 * s + 1) * (1 + 2.0 * s / D);
    return (float)(1 / std::sqrt(m * (i + 1)));
}

// The scores x (i+1) and weights a (i+1) of token i. q and k are those of one head and one sequence; their rows are
// `stride` apart.
void attention_row(Floats& x, Floats& a, const float* q, const float* k, Attention kind, int i, int D, int stride) {
    float largest = -INFINITY, sum = 0;
    for (int j = 0; j <= i; j++) {
        x[j] = 0;
        for (int d = 0; d < D; d++) x[j] += q[i * stride + d] * k[j * stride + d];
        x[j] /= std::sqrt((float)D);
        largest = std::max(largest, x[j]);
    }
    for (int j = 0; j <= i; j++) {
        a[j] = kind == Attention::softmax ? std::exp(x[j] - largest) : x[j] * x[j] * x[j];
        sum += a[j];
    }
    float scale = kind == Attention::softmax ? 1 / sum : poly3_row_scale(i, D);
    for (int j = 0; j <= i; j++) a[j] *= scale;
}

void attention_forward(Floats& out, const Floats& qkv, Attention kind, int B, int T, int H, int D) {
    int C = H * D, stride = 3 * C;
    Floats x(T), a(T);
    out.assign(B * T * C, 0.0f);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++) {
            const float *q = &qkv[b * T * stride + h * D], *k = q + C, *v = k + C;
            for (int i = 0; i < T; i++) {
                attention_row(x, a, q, k, kind, i, D, stride);
                float* o = &out[(b * T + i) * C + h * D];
                for (int j = 0; j <= i; j++)
                    for (int d = 0; d < D; d++) o[d] += a[j] * v[j * stride + d];
            }
        }
}

// da_ij = dout_i . v_j. From there to the scores:
//   softmax: dx_ij = a_ij (da_ij - sum_j a_ij da_ij), because all scores of a row share the sum
//   poly3:   dx_ij = c_i 3 x_ij^2 da_ij
void attention_backward(Floats& dqkv, const Floats& dout, const Floats& qkv, Attention kind, int B, int T, int H,
                        int D) {
    int C = H * D, stride = 3 * C;
    Floats x(T), a(T), da(T);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++) {
            int at = b * T * stride + h * D;
            const float *q = &qkv[at], *k = q + C, *v = k + C;
            float *dq = &dqkv[at], *dk = dq + C, *dv = dk + C;
            for (int i = 0; i < T; i++) {
                attention_row(x, a, q, k, kind, i, D, stride);
                const float* d_o = &dout[(b * T + i) * C + h * D];
                float a_da = 0;
                for (int j = 0; j <= i; j++) {
                    da[j] = 0;
                    for (int d = 0; d < D; d++) {
                        da[j] += d_o[d] * v[j * stride + d];
                        dv[j * stride + d] += a[j] * d_o[d];
                    }
                    a_da += a[j] * da[j];
                }
                for (int j = 0; j <= i; j++) {
                    float dx = kind == Attention::softmax ? a[j] * (da[j] - a_da)
                                                          : poly3_row_scale(i, D) * 3 * x[j] * x[j] * da[j];
                    dx /= std::sqrt((float)D);
                    for (int d = 0; d < D; d++) {
                        dq[i * stride + d] += dx * k[j * stride + d];
                        dk[j * stride + d] += dx * q[i * stride + d];
                    }
                }
            }
        }
}

// ------------------------------------------------------------------------------------------------ the model

struct Sizes {
    int L = 2, H = 4, C = 64, T = 64, B = 8, V = 256;
};

struct Block {
    Parameter ln_1_weight, ln_1_bias, attn_weight, attn_bias, q_gain, attn_proj_weight, attn_proj_bias;
    Parameter ln_2_weight, ln_2_bias, fc_weight, fc_bias, fc_proj_weight, fc_proj_bias;
    // What the forward pass leaves for the backward pass:
    Floats ln_1, qkv, heads, attn, residual_attn, ln_2, fc, gelu, residual_mlp;

    Block(const std::string& h, int C, int H, float std, float residual_std, std::mt19937& random)
        : ln_1_weight(h + "ln_1.weight", C, 0, 1, random),
          ln_1_bias(h + "ln_1.bias", C, 0, 0, random),
          attn_weight(h + "attn.c_attn.weight", C * 3 * C, std, 0, random),
          attn_bias(h + "attn.c_attn.bias", 3 * C, 0, 0, random),
          q_gain(h + "attn.q_gain", H, 0, 1, random),
          attn_proj_weight(h + "attn.c_proj.weight", C * C, residual_std, 0, random),
          attn_proj_bias(h + "attn.c_proj.bias", C, 0, 0, random),
          ln_2_weight(h + "ln_2.weight", C, 0, 1, random),
          ln_2_bias(h + "ln_2.bias", C, 0, 0, random),
          fc_weight(h + "mlp.c_fc.weight", C * 4 * C, std, 0, random),
          fc_bias(h + "mlp.c_fc.bias", 4 * C, 0, 0, random),
          fc_proj_weight(h + "mlp.c_proj.weight", 4 * C * C, residual_std, 0, random),
          fc_proj_bias(h + "mlp.c_proj.bias", C, 0, 0, random) {}
};

struct GPT {
    Sizes s;
    Attention kind;
    std::mt19937 random;
    Parameter wte, wpe;
    std::vector<Block> blocks;
    Parameter ln_f_weight, ln_f_bias;
    std::vector<Parameter*> parameters;
    Floats embedded, ln_f, probabilities;

    GPT(const Sizes& s, Attention kind, int seed)
        : s(s),
          kind(kind),
          random(seed),
          wte("wte.weight", s.V * s.C, 0.02f, 0, random),
          wpe("wpe.weight", s.T * s.C, 0.02f, 0, random),
          ln_f_weight("ln_f.weight", s.C, 0, 1, random),
          ln_f_bias("ln_f.bias", s.C, 0, 0, random) {
        for (int l = 0; l < s.L; l++)
            blocks.emplace_back("h." + std::to_string(l) + ".", s.C, s.H, 0.02f, 0.02f / std::sqrt(2.0f * s.L),
                                random);
        parameters = {&wte, &wpe, &ln_f_weight, &ln_f_bias};
        for (Block& b : blocks)
            for (Parameter* p : {&b.ln_1_weight, &b.ln_1_bias, &b.attn_weight, &b.attn_bias, &b.q_gain,
                                 &b.attn_proj_weight, &b.attn_proj_bias, &b.ln_2_weight, &b.ln_2_bias,
                                 &b.fc_weight, &b.fc_bias, &b.fc_proj_weight, &b.fc_proj_bias})
                parameters.push_back(p);
    }

    // Tokens (B,T) to the mean loss of predicting targets (B,T).
    float forward(const std::vector<int>& tokens, const std::vector<int>& targets) {
        int N = s.B * s.T, C = s.C, V = s.V;
        embedded.resize(N * C);
        probabilities.resize(N * V);
        for (int n = 0; n < N; n++)
            for (int c = 0; c < C; c++)
                embedded[n * C + c] = wte.value[tokens[n] * C + c] + wpe.value[n % s.T * C + c];
        const Floats* residual = &embedded;
        for (Block& b : blocks) {
            layernorm_forward(b.ln_1, *residual, b.ln_1_weight, b.ln_1_bias, N, C);
            linear_forward(b.qkv, b.ln_1, b.attn_weight, b.attn_bias, N, C, 3 * C);
            b.heads = b.qkv;
            if (kind == Attention::poly3) qk_norm_forward(b.heads, b.qkv, b.q_gain, N, s.H, C / s.H);
            attention_forward(b.attn, b.heads, kind, s.B, s.T, s.H, C / s.H);
            linear_forward(b.residual_attn, b.attn, b.attn_proj_weight, b.attn_proj_bias, N, C, C);
            for (int i = 0; i < N * C; i++) b.residual_attn[i] += (*residual)[i];
            layernorm_forward(b.ln_2, b.residual_attn, b.ln_2_weight, b.ln_2_bias, N, C);
            linear_forward(b.fc, b.ln_2, b.fc_weight, b.fc_bias, N, C, 4 * C);
            gelu_forward(b.gelu, b.fc);
            linear_forward(b.residual_mlp, b.gelu, b.fc_proj_weight, b.fc_proj_bias, N, 4 * C, C);
            for (int i = 0; i < N * C; i++) b.residual_mlp[i] += b.residual_attn[i];
            residual = &b.residual_mlp;
        }
        layernorm_forward(ln_f, *residual, ln_f_weight, ln_f_bias, N, C);
        // The output projection is the token embedding once more. Logits become probabilities in place.
        double loss = 0;
        for (int n = 0; n < N; n++) {
            float *row = &probabilities[n * V], largest = -INFINITY, sum = 0;
            for (int v = 0; v < V; v++) {
                row[v] = 0;
                for (int c = 0; c < C; c++) row[v] += ln_f[n * C + c] * wte.value[v * C + c];
                largest = std::max(largest, row[v]);
            }
            for (int v = 0; v < V; v++) sum += row[v] = std::exp(row[v] - largest);
            for (int v = 0; v < V; v++) row[v] /= sum;
            loss -= std::log(row[targets[n]]) / N;
        }
        return (float)loss;
    }

    // Follows forward(): the gradients of the loss in all parameters.
    void backward(const std::vector<int>& tokens, const std::vector<int>& targets) {
        int N = s.B * s.T, C = s.C, V = s.V;
        for (Parameter* p : parameters) p->gradient.assign(p->gradient.size(), 0.0f);
        Floats dln_f(N * C), dresidual(N * C);
        for (int n = 0; n < N; n++)
            for (int v = 0; v < V; v++) {
                float dlogit = (probabilities[n * V + v] - (v == targets[n])) / N;
                for (int c = 0; c < C; c++) {
                    dln_f[n * C + c] += dlogit * wte.value[v * C + c];
                    wte.gradient[v * C + c] += dlogit * ln_f[n * C + c];
                }
            }
        layernorm_backward(dresidual, ln_f_weight, ln_f_bias, dln_f, blocks.back().residual_mlp, N, C);
        for (int l = s.L - 1; l >= 0; l--) {
            Block& b = blocks[l];
            const Floats& residual = l > 0 ? blocks[l - 1].residual_mlp : embedded;
            // dresidual passes by the MLP and through it, and the two add up. The same holds for attention.
            Floats dgelu(N * 4 * C), dfc(N * 4 * C), dln_2(N * C), dattn(N * C), dheads(N * 3 * C),
                dqkv(N * 3 * C), dln_1(N * C);
            linear_backward(dgelu, b.fc_proj_weight, b.fc_proj_bias, dresidual, b.gelu, N, 4 * C, C);
            gelu_backward(dfc, dgelu, b.fc);
            linear_backward(dln_2, b.fc_weight, b.fc_bias, dfc, b.ln_2, N, C, 4 * C);
            layernorm_backward(dresidual, b.ln_2_weight, b.ln_2_bias, dln_2, b.residual_attn, N, C);
            linear_backward(dattn, b.attn_proj_weight, b.attn_proj_bias, dresidual, b.attn, N, C, C);
            attention_backward(dheads, dattn, b.heads, kind, s.B, s.T, s.H, C / s.H);
            if (kind == Attention::poly3)
                qk_norm_backward(dqkv, b.q_gain, dheads, b.qkv, N, s.H, C / s.H);
            else
                dqkv = dheads;
            linear_backward(dln_1, b.attn_weight, b.attn_bias, dqkv, b.ln_1, N, C, 3 * C);
            layernorm_backward(dresidual, b.ln_1_weight, b.ln_1_bias, dln_1, residual, N, C);
        }
        for (int n = 0; n < N; n++)
            for (int c = 0; c < C; c++) {
                wte.gradient[tokens[n] * C + c] += dresidual[n * C + c];
                wpe.gradient[n % s.T * C + c] += dresidual[n * C + c];
            }
    }

    // AdamW: m and v are moving averages of the gradient and of its square. A parameter moves by their ratio
    // m / sqrt(v), and matrices also shrink a little. `step` counts from 1.
    void update(float learning_rate, int step) {
        const float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f;
        double squares = 0;
        for (const Parameter* p : parameters)
            for (float g : p->gradient) squares += (double)g * g;
        float clip = squares > 1 ? (float)(1 / std::sqrt(squares)) : 1;  // to a norm of 1
        for (Parameter* p : parameters)
            for (size_t i = 0; i < p->value.size(); i++) {
                float g = p->gradient[i] * clip;
                p->m[i] = beta1 * p->m[i] + (1 - beta1) * g;
                p->v[i] = beta2 * p->v[i] + (1 - beta2) * g * g;
                float m = p->m[i] / (1 - std::pow(beta1, step)), v = p->v[i] / (1 - std::pow(beta2, step));
                if (p->is_matrix) p->value[i] -= learning_rate * weight_decay * p->value[i];
                p->value[i] -= learning_rate * m / (std::sqrt(v) + eps);
            }
    }
};

// ------------------------------------------------------------------------------------------------- training

int main(int argc, char** argv) {
    std::string kind = argc > 2 ? argv[2] : "poly3";
    int steps = argc > 3 ? std::atoi(argv[3]) : 500;
    if (argc < 2 || argc > 4 || (kind != "softmax" && kind != "poly3") || steps < 1) {
        std::fprintf(stderr, "usage: tiny FILE [softmax|poly3] [STEPS]\n");
        return 2;
    }
    std::ifstream file(argv[1], std::ios::binary);
    std::vector<unsigned char> text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    Sizes s;
    if (text.size() < (size_t)s.T + 2) {
        std::fprintf(stderr, "tiny: error: %s: expected a file of more than %d bytes\n", argv[1], s.T + 1);
        return 1;
    }
    GPT model(s, kind == "softmax" ? Attention::softmax : Attention::poly3, 1);
    std::mt19937 random(2);
    for (int step = 1; step <= steps; step++) {
        std::vector<int> tokens, targets;
        for (int b = 0; b < s.B; b++) {
            size_t start = random() % (text.size() - s.T);
            for (int t = 0; t < s.T; t++) {
                tokens.push_back(text[start + t]);
                targets.push_back(text[start + t + 1]);
            }
        }
        float loss = model.forward(tokens, targets);
        model.backward(tokens, targets);
        model.update(3e-3f * std::min(1.0f, step / 50.0f), step);
        if (step == 1 || step % 20 == 0) {
            std::printf("step %d | loss %.4f\n", step, loss);
            std::fflush(stdout);
        }
    }
    return 0;
}
