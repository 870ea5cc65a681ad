// A GPT trainer in one file of plain loops: forward pass, backward pass and AdamW, with nothing but the
// standard library. It learns the bytes of a text file and then continues the text.
//
//   g++ -O2 docs/tiny.cpp -o tiny && ./tiny FILE [softmax|poly3] [STEPS]
//
// Its loss and gradients are those of `train_gpt` with `--positions learned --qk-norm true`, and
// tests/cpu/tiny.cpp holds them to 1e-5. Read it from top to bottom: below each layer's forward function is
// its backward function, which takes the gradient of the layer's output (dout) and *adds* the gradients of
// its input (dinp) and parameters. We add because some of them have more than one use.
//
// Sizes: T tokens, C channels, H heads of D = C/H channels, L blocks, V = 256 bytes. The B sequences of a
// batch come one after the other, and their gradients add up.
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

struct Parameter {
    std::string name;  // as in Hugging Face's GPT-2
    bool decays;       // weight decay is for matrices and embeddings
    Floats value, gradient, m, v;
};

struct Layer {
    Parameter weight, bias;
};

// ----------------------------------------------------------------------------------------------- the layers

float dot(const float* x, const float* y, int size) {
    float sum = 0;
    for (int i = 0; i < size; i++) sum += x[i] * y[i];
    return sum;
}

void add_scaled(float* out, float scale, const float* x, int size) {
    for (int i = 0; i < size; i++) out[i] += scale * x[i];
}

// x becomes exp(x) / sum exp(x). We subtract the largest x first, because exp of a large number is infinite.
void softmax(float* x, int size) {
    float largest = *std::max_element(x, x + size), sum = 0;
    for (int i = 0; i < size; i++) x[i] = std::exp(x[i] - largest);
    for (int i = 0; i < size; i++) sum += x[i];
    for (int i = 0; i < size; i++) x[i] /= sum;
}

// out (T,O) = inp (T,I) weight (I,O) + bias (O)
void linear_forward(Floats& out, const Floats& inp, const Layer& layer, int T, int I, int O) {
    out.assign(T * O, 0);
    for (int t = 0; t < T; t++) {
        add_scaled(&out[t * O], 1, &layer.bias.value[0], O);
        for (int i = 0; i < I; i++) add_scaled(&out[t * O], inp[t * I + i], &layer.weight.value[i * O], O);
    }
}

// dinp = dout weight^T, dweight = inp^T dout, dbias = the sum of dout's rows
void linear_backward(Floats& dinp, Layer& layer, const Floats& dout, const Floats& inp, int T, int I, int O) {
    for (int t = 0; t < T; t++) {
        add_scaled(&layer.bias.gradient[0], 1, &dout[t * O], O);
        for (int i = 0; i < I; i++) {
            dinp[t * I + i] += dot(&dout[t * O], &layer.weight.value[i * O], O);
            add_scaled(&layer.weight.gradient[i * O], inp[t * I + i], &dout[t * O], O);
        }
    }
}

// x^ = (x - mean) rstd has mean 0 and variance 1. We return rstd = 1 / standard deviation.
float normalize(Floats& normed, const float* x, int C) {
    float mean = 0, variance = 0;
    for (int c = 0; c < C; c++) mean += x[c] / C;
    for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / C;
    float rstd = 1 / std::sqrt(variance + 1e-5f);
    for (int c = 0; c < C; c++) normed[c] = (x[c] - mean) * rstd;
    return rstd;
}

// out (T,C) = x^ weight (C) + bias (C) for each row x of inp (T,C)
void layernorm_forward(Floats& out, const Floats& inp, const Layer& layer, int T, int C) {
    Floats normed(C);
    out.resize(T * C);
    for (int t = 0; t < T; t++) {
        normalize(normed, &inp[t * C], C);
        for (int c = 0; c < C; c++) out[t * C + c] = normed[c] * layer.weight.value[c] + layer.bias.value[c];
    }
}

// With d = dout weight: dx = rstd (d - mean(d) - x^ mean(d x^)), because mean and rstd depend on x too
void layernorm_backward(Floats& dinp, Layer& layer, const Floats& dout, const Floats& inp, int T, int C) {
    Floats normed(C), d(C);
    for (int t = 0; t < T; t++) {
        float rstd = normalize(normed, &inp[t * C], C), mean_d = 0;
        for (int c = 0; c < C; c++) {
            layer.weight.gradient[c] += dout[t * C + c] * normed[c];
            layer.bias.gradient[c] += dout[t * C + c];
            d[c] = dout[t * C + c] * layer.weight.value[c];
            mean_d += d[c] / C;
        }
        float mean_dx = dot(d.data(), normed.data(), C) / C;
        for (int c = 0; c < C; c++) dinp[t * C + c] += rstd * (d[c] - mean_d - normed[c] * mean_dx);
    }
}

// GELU, a smooth max(x, 0): x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3). We keep the slope
// because the backward pass needs nothing else: dinp = dout slope.
void gelu_forward(Floats& out, Floats& slope, const Floats& inp) {
    const float a = 0.7978845608f, b = 0.044715f;
    out.resize(inp.size());
    slope.resize(inp.size());
    for (size_t i = 0; i < inp.size(); i++) {
        float x = inp[i], t = std::tanh(a * (x + b * x * x * x)), du = a * (1 + 3 * b * x * x);
        out[i] = 0.5f * x * (1 + t);
        slope[i] = 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * du;
    }
}

// A row of inp (T,3C) is q (H,D), k (H,D), v (H,D). We divide q and k of each head by their root mean square
// (rms), because a polynomial needs scores of a known size. A learned gain for each head then scales q.
void qknorm_forward(Floats& out, const Floats& inp, const Parameter& gain, int T, int H, int D) {
    out = inp;
    for (int t = 0; t < T; t++)
        for (int h = 0; h < 2 * H; h++) {
            float *x = &out[(t * 3 * H + h) * D], rrms = 1 / std::sqrt(dot(x, x, D) / D + 1e-6f);
            for (int d = 0; d < D; d++) x[d] *= rrms * (h < H ? gain.value[h] : 1);
        }
}

// With x^ = x rrms: dx = gain rrms (dout - x^ mean(dout x^)), and dgain = the sum of dout x^
void qknorm_backward(Floats& dinp, Parameter& gain, const Floats& dout, const Floats& inp, int T, int H,
                     int D) {
    dinp = dout;
    for (int t = 0; t < T; t++)
        for (int h = 0; h < 2 * H; h++) {
            const float* x = &inp[(t * 3 * H + h) * D];
            float *dx = &dinp[(t * 3 * H + h) * D], rrms = 1 / std::sqrt(dot(x, x, D) / D + 1e-6f);
            float sum = dot(dx, x, D) * rrms, g = h < H ? gain.value[h] : 1;
            if (h < H) gain.gradient[h] += sum;
            for (int d = 0; d < D; d++) dx[d] = g * rrms * (dx[d] - x[d] * rrms * sum / D);
        }
}

// Attention: token i takes a part of v_j from each token j <= i, as large as their score says.
//   score   x_ij = q_i . k_j / sqrt(D)
//   weight  a_ij = exp(x_ij) / sum_j exp(x_ij)    softmax
//           a_ij = c_i x_ij^3                     poly3
//   output  o_i = sum_j a_ij v_j
// c_i = 1 / sqrt((i+1) E[x^6]) for normal q and k, so that a row of i+1 weights has a norm of about 1.
enum class Attention { softmax, poly3 };

float poly3_scale(int i, int D) {
    return 1 / std::sqrt((i + 1) * 15 * (1 + 2.0f / D) * (1 + 4.0f / D));
}

// out (T,H,D), scores and weights (H,T,T) from qkv (T,3,H,D)
void attention_forward(Floats& out, Floats& scores, Floats& weights, const Floats& qkv, Attention kind, int T,
                       int H, int D) {
    int C = H * D;
    out.assign(T * C, 0);
    scores.resize(H * T * T);
    weights.resize(H * T * T);
    for (int h = 0; h < H; h++) {
        const float *q = &qkv[h * D], *k = q + C, *v = k + C;  // their rows are 3C apart
        for (int i = 0; i < T; i++) {
            float *x = &scores[(h * T + i) * T], *a = &weights[(h * T + i) * T], scale = poly3_scale(i, D);
            for (int j = 0; j <= i; j++) {
                x[j] = dot(q + i * 3 * C, k + j * 3 * C, D) / std::sqrt((float)D);
                a[j] = kind == Attention::softmax ? x[j] : scale * x[j] * x[j] * x[j];
            }
            if (kind == Attention::softmax) softmax(a, i + 1);
            for (int j = 0; j <= i; j++) add_scaled(&out[i * C + h * D], a[j], v + j * 3 * C, D);
        }
    }
}

// da_ij = do_i . v_j
// dx_ij = a_ij (da_ij - sum_j a_ij da_ij)    softmax, because all weights of a row share the sum of exp
// dx_ij = c_i 3 x_ij^2 da_ij                 poly3
void attention_backward(Floats& dqkv, const Floats& dout, const Floats& scores, const Floats& weights,
                        const Floats& qkv, Attention kind, int T, int H, int D) {
    int C = H * D;
    Floats da(T);
    for (int h = 0; h < H; h++) {
        const float *q = &qkv[h * D], *k = q + C, *v = k + C;
        float *dq = &dqkv[h * D], *dk = dq + C, *dv = dk + C;
        for (int i = 0; i < T; i++) {
            const float *x = &scores[(h * T + i) * T], *a = &weights[(h * T + i) * T];
            const float* d_o = &dout[i * C + h * D];
            for (int j = 0; j <= i; j++) {
                da[j] = dot(d_o, v + j * 3 * C, D);
                add_scaled(dv + j * 3 * C, a[j], d_o, D);
            }
            float sum = dot(a, da.data(), i + 1), slope = 3 * poly3_scale(i, D);
            for (int j = 0; j <= i; j++) {
                float dx = kind == Attention::softmax ? a[j] * (da[j] - sum) : slope * x[j] * x[j] * da[j];
                dx /= std::sqrt((float)D);
                add_scaled(dq + i * 3 * C, dx, k + j * 3 * C, D);
                add_scaled(dk + j * 3 * C, dx, q + i * 3 * C, D);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ the model

struct Sizes {
    int L = 2, H = 4, C = 64, T = 64, B = 8, V = 256;
};

struct Block {
    Layer ln_1, attn, attn_proj, ln_2, fc, fc_proj;
    Parameter q_gain;
    // What the forward pass leaves for the backward pass:
    Floats normed_1, qkv, heads, scores, weights, mixed, middle, normed_2, hidden, gelu, gelu_slope;
};

struct GPT {
    Sizes s;
    Attention kind;
    std::mt19937 random;
    Parameter wte, wpe;  // the embeddings of tokens (V,C) and positions (T,C)
    std::vector<Block> blocks;
    Layer ln_f;
    std::vector<Parameter*> parameters;  // all of them
    std::vector<Floats> residual;        // (T,C) before the first block and after each
    Floats normed_f, probabilities;      // (T,C), (T,V)

    GPT(const Sizes& sizes, Attention kind, int seed)
        : s(sizes), kind(kind), random(seed), blocks(s.L), residual(s.L + 1) {
        add(wte, "wte.weight", s.V * s.C, true, 0);
        add(wpe, "wpe.weight", s.T * s.C, true, 0);
        for (int l = 0; l < s.L; l++) {
            Block& b = blocks[l];
            std::string h = "h." + std::to_string(l) + ".";
            add(b.ln_1, h + "ln_1", 1, s.C);
            add(b.attn, h + "attn.c_attn", s.C, 3 * s.C);
            add(b.q_gain, h + "attn.q_gain", s.H, false, 1);
            add(b.attn_proj, h + "attn.c_proj", s.C, s.C);
            add(b.ln_2, h + "ln_2", 1, s.C);
            add(b.fc, h + "mlp.c_fc", s.C, 4 * s.C);
            add(b.fc_proj, h + "mlp.c_proj", 4 * s.C, s.C);
        }
        add(ln_f, "ln_f", 1, s.C);
    }
    GPT(const GPT&) = delete;  // because `parameters` of a copy would point into the original

    // Matrices and embeddings start at random with a standard deviation of 0.02, the others from `start`.
    void add(Parameter& p, const std::string& name, int size, bool is_matrix, float start) {
        p = {name, is_matrix, Floats(size, start), Floats(size), Floats(size), Floats(size)};
        std::normal_distribution<float> normal(0, 0.02f);
        for (float& x : p.value) x = is_matrix ? normal(random) : start;
        parameters.push_back(&p);
    }
    // The weight of a LayerNorm has only one row, and starts from 1.
    void add(Layer& layer, const std::string& name, int I, int O) {
        add(layer.weight, name + ".weight", I * O, I > 1, 1);
        add(layer.bias, name + ".bias", O, false, 0);
    }

    // From T tokens to the mean of -log(probability of the token that follows), which takes text[T] too
    float forward(const unsigned char* text) {
        int T = s.T, C = s.C, V = s.V;
        residual[0].assign(T * C, 0);
        for (int t = 0; t < T; t++) {
            add_scaled(&residual[0][t * C], 1, &wte.value[text[t] * C], C);
            add_scaled(&residual[0][t * C], 1, &wpe.value[t * C], C);
        }
        for (int l = 0; l < s.L; l++) {
            Block& b = blocks[l];
            layernorm_forward(b.normed_1, residual[l], b.ln_1, T, C);
            linear_forward(b.qkv, b.normed_1, b.attn, T, C, 3 * C);
            qknorm_forward(b.heads, b.qkv, b.q_gain, T, s.H, C / s.H);
            attention_forward(b.mixed, b.scores, b.weights, b.heads, kind, T, s.H, C / s.H);
            linear_forward(b.middle, b.mixed, b.attn_proj, T, C, C);
            add_scaled(&b.middle[0], 1, &residual[l][0], T * C);
            layernorm_forward(b.normed_2, b.middle, b.ln_2, T, C);
            linear_forward(b.hidden, b.normed_2, b.fc, T, C, 4 * C);
            gelu_forward(b.gelu, b.gelu_slope, b.hidden);
            linear_forward(residual[l + 1], b.gelu, b.fc_proj, T, 4 * C, C);
            add_scaled(&residual[l + 1][0], 1, &b.middle[0], T * C);
        }
        layernorm_forward(normed_f, residual[s.L], ln_f, T, C);
        // The logits are normed_f wte^T, so the embedding has a second use. Softmax makes them probabilities.
        probabilities.resize(T * V);
        float loss = 0;
        for (int t = 0; t < T; t++) {
            float* p = &probabilities[t * V];
            for (int v = 0; v < V; v++) p[v] = dot(&normed_f[t * C], &wte.value[v * C], C);
            softmax(p, V);
            loss -= std::log(p[text[t + 1]]) / T;
        }
        return loss;
    }

    // forward() from its last line to its first. The loss counts 1/B, because a batch has B sequences.
    void backward(const unsigned char* text) {
        int T = s.T, C = s.C, V = s.V;
        Floats dnormed_f(T * C), dresidual(T * C);
        for (int t = 0; t < T; t++)
            for (int v = 0; v < V; v++) {
                float dlogit = (probabilities[t * V + v] - (v == text[t + 1])) / (s.B * T);
                add_scaled(&dnormed_f[t * C], dlogit, &wte.value[v * C], C);
                add_scaled(&wte.gradient[v * C], dlogit, &normed_f[t * C], C);
            }
        layernorm_backward(dresidual, ln_f, dnormed_f, residual[s.L], T, C);
        for (int l = s.L - 1; l >= 0; l--) {
            Block& b = blocks[l];
            Floats dgelu(T * 4 * C), dhidden(T * 4 * C), dnormed_2(T * C);
            Floats dmixed(T * C), dheads(T * 3 * C), dqkv(T * 3 * C), dnormed_1(T * C);
            // dresidual goes past the MLP and also through it, and we add the two. Attention does the same.
            linear_backward(dgelu, b.fc_proj, dresidual, b.gelu, T, 4 * C, C);
            for (int i = 0; i < T * 4 * C; i++) dhidden[i] = dgelu[i] * b.gelu_slope[i];
            linear_backward(dnormed_2, b.fc, dhidden, b.normed_2, T, C, 4 * C);
            layernorm_backward(dresidual, b.ln_2, dnormed_2, b.middle, T, C);
            linear_backward(dmixed, b.attn_proj, dresidual, b.mixed, T, C, C);
            attention_backward(dheads, dmixed, b.scores, b.weights, b.heads, kind, T, s.H, C / s.H);
            qknorm_backward(dqkv, b.q_gain, dheads, b.qkv, T, s.H, C / s.H);
            linear_backward(dnormed_1, b.attn, dqkv, b.normed_1, T, C, 3 * C);
            layernorm_backward(dresidual, b.ln_1, dnormed_1, residual[l], T, C);
        }
        for (int t = 0; t < T; t++) {
            add_scaled(&wte.gradient[text[t] * C], 1, &dresidual[t * C], C);
            add_scaled(&wpe.gradient[t * C], 1, &dresidual[t * C], C);
        }
    }

    // AdamW: m and v are moving averages of the gradient and its square, and a parameter moves by m/sqrt(v).
    // Both start from 0, so we divide them by 1 - beta^step, where step counts from 1.
    void update(float learning_rate, int step) {
        const float beta1 = 0.9f, beta2 = 0.95f, epsilon = 1e-8f, weight_decay = 0.1f;
        float correction1 = 1 - std::pow(beta1, step), correction2 = 1 - std::pow(beta2, step), squares = 0;
        for (Parameter* p : parameters) squares += dot(&p->gradient[0], &p->gradient[0], p->gradient.size());
        float clip = 1 / std::max(1.0f, std::sqrt(squares));  // so that the gradient has a norm of 1 at most
        for (Parameter* p : parameters)
            for (size_t i = 0; i < p->value.size(); i++) {
                float g = p->gradient[i] * clip;
                p->m[i] = beta1 * p->m[i] + (1 - beta1) * g;
                p->v[i] = beta2 * p->v[i] + (1 - beta2) * g * g;
                float move = p->m[i] / correction1 / (std::sqrt(p->v[i] / correction2) + epsilon);
                if (p->decays) move += weight_decay * p->value[i];
                p->value[i] -= learning_rate * move;
                p->gradient[i] = 0;
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
    if (text.size() < (size_t)s.T + 1) {
        std::fprintf(stderr, "tiny: error: %s: expected a file of more than %d bytes\n", argv[1], s.T);
        return 1;
    }
    GPT model(s, kind == "softmax" ? Attention::softmax : Attention::poly3, 1);
    std::mt19937 random(2);
    for (int step = 1; step <= steps; step++) {
        float loss = 0;
        for (int b = 0; b < s.B; b++) {
            const unsigned char* sequence = &text[random() % (text.size() - s.T)];
            loss += model.forward(sequence) / s.B;
            model.backward(sequence);
        }
        model.update(3e-3f * std::min(1.0f, step / 50.0f), step);
        if (step == 1 || step % 20 == 0) std::printf("step %d | loss %.4f\n", step, loss);
        std::fflush(stdout);
    }
    // The model continues the file. We append a 0 first, because forward() reads the byte after the T too.
    for (int i = 0; i < 300; i++) {
        text.push_back(0);
        model.forward(&text[text.size() - 1 - s.T]);
        auto row = model.probabilities.end() - s.V;  // the last token's
        text.back() = std::discrete_distribution<int>(row, row + s.V)(random);
        std::putchar(text.back());
    }
    std::putchar('\n');
    return 0;
}
