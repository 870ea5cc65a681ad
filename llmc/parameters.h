// The one table of parameter tensors: name, shape, place, whether weight decay applies, and how each starts.
// Names, shapes and orientation (in, out) are those of Hugging Face's GPT-2.
//
// All parameters lie in one array of table.size floats, and so do gradients and each optimizer moment: a
// Tensors object gives the tensors of any such array by name. Tensors start at multiples of 64 bytes; the
// gaps are zero. The vocabulary is padded to Vp rows, of which the last Vp-V are zero and never in a file.
#pragma once
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/rng.h"

// One block's tensors; those that the model does not have are null.
struct LayerTensors {
    float* ln_1_weight;       // (C)
    float* ln_1_bias;         // (C)
    float* attn_weight;       // (C,3C): to q, k, v
    float* attn_bias;         // (3C)
    float* conv_weight;       // (K,3C), with short_conv K
    float* q_gain;            // (H), with qk_norm
    float* decay;             // (H): delta, with decay learned
    float* attn_proj_weight;  // (C,C)
    float* attn_proj_bias;    // (C)
    float* ln_2_weight;       // (C)
    float* ln_2_bias;         // (C)
    float* fc_weight;         // (C,4C)
    float* fc_bias;           // (4C)
    float* fc_proj_weight;    // (4C,C)
    float* fc_proj_bias;      // (C)
};

struct Tensors {
    float* wte;                   // (Vp,C), also the output projection
    float* wpe;                   // (context,C), where positions are learned
    float* ln_f_weight;           // (C)
    float* ln_f_bias;             // (C)
    std::vector<LayerTensors> h;  // (L)
};

enum class Init { zeros, ones, normal, identity_conv, decay };

struct ParameterTensor {
    std::string name;
    std::vector<int64_t> shape;  // as in a file
    size_t offset;               // floats from the start of the array
    size_t size;                 // product of shape
    bool weight_decay;
    Init init;
    double std;  // of Init::normal
};

struct ParameterTable {
    std::vector<ParameterTensor> tensors;
    size_t size = 0;   // floats of the whole array, padding included
    size_t count = 0;  // parameters of the model

    ParameterTable(const GPTConfig& config, int Vp) : config_(config), Vp_(Vp) {
        walk(nullptr,
             [&](float*&, const std::string& name, std::vector<int64_t> shape, Init init, double std) {
                 size_t elements = 1;
                 for (int64_t s : shape) elements *= s;
                 bool matrix = init == Init::normal;  // decay on matrices and embeddings only
                 tensors.push_back({name, shape, size, elements, matrix, init, std});
                 count += elements;
                 size += padded_size(name, elements);
             });
    }

    // The tensors of an array of `size` floats laid out by this table.
    Tensors view(float* array) const {
        return view_at([=](const ParameterTensor& t) { return array + t.offset; });
    }
    // Each where place(ParameterTensor) says.
    template <class F>
    Tensors view_at(F place) const {
        Tensors t = {};
        size_t index = 0;
        walk(&t, [&](float*& slot, const std::string&, const std::vector<int64_t>&, Init, double) {
            slot = place(tensors[index++]);
        });
        return t;
    }

  private:
    GPTConfig config_;
    int Vp_;

    size_t padded_size(const std::string& name, size_t elements) const {
        if (name == "wte.weight") elements = (size_t)Vp_ * config_.channels;
        return (elements + 15) / 16 * 16;
    }

    // Calls f(slot in `t`, name, shape, init, std) for every tensor the model has, in the order of the array.
    template <class F>
    void walk(Tensors* t, F f) const {
        int64_t C = config_.channels, H = config_.heads, L = config_.layers;
        double residual_std = 0.02 / std::sqrt(2.0 * L);
        Tensors unused = {};
        Tensors& to = t ? *t : unused;
        to.h.resize(L);
        f(to.wte, "wte.weight", {config_.vocab_size, C}, Init::normal, 0.02);
        if (!config_.rope()) f(to.wpe, "wpe.weight", {config_.context, C}, Init::normal, 0.02);
        for (int64_t l = 0; l < L; l++) {
            LayerTensors& layer = to.h[l];
            std::string h = str("h.", l, ".");
            f(layer.ln_1_weight, h + "ln_1.weight", {C}, Init::ones, 0);
            f(layer.ln_1_bias, h + "ln_1.bias", {C}, Init::zeros, 0);
            f(layer.attn_weight, h + "attn.c_attn.weight", {C, 3 * C}, Init::normal, 0.02);
            f(layer.attn_bias, h + "attn.c_attn.bias", {3 * C}, Init::zeros, 0);
            if (config_.short_conv)
                f(layer.conv_weight, h + "attn.conv.weight", {config_.short_conv, 3 * C}, Init::identity_conv,
                  0);
            if (config_.qk_norm) f(layer.q_gain, h + "attn.q_gain", {H}, Init::ones, 0);
            if (config_.decay == DecayKind::learned) f(layer.decay, h + "attn.decay", {H}, Init::decay, 0);
            f(layer.attn_proj_weight, h + "attn.c_proj.weight", {C, C}, Init::normal, residual_std);
            f(layer.attn_proj_bias, h + "attn.c_proj.bias", {C}, Init::zeros, 0);
            f(layer.ln_2_weight, h + "ln_2.weight", {C}, Init::ones, 0);
            f(layer.ln_2_bias, h + "ln_2.bias", {C}, Init::zeros, 0);
            f(layer.fc_weight, h + "mlp.c_fc.weight", {C, 4 * C}, Init::normal, 0.02);
            f(layer.fc_bias, h + "mlp.c_fc.bias", {4 * C}, Init::zeros, 0);
            f(layer.fc_proj_weight, h + "mlp.c_proj.weight", {4 * C, C}, Init::normal, residual_std);
            f(layer.fc_proj_bias, h + "mlp.c_proj.bias", {C}, Init::zeros, 0);
        }
        f(to.ln_f_weight, "ln_f.weight", {C}, Init::ones, 0);
        f(to.ln_f_bias, "ln_f.bias", {C}, Init::zeros, 0);
    }
};

// The first values of one tensor: out (tensor.size). The same for a seed on every machine and backend.
inline void initialize_tensor(float* out, const ParameterTensor& tensor, uint64_t seed) {
    size_t n = tensor.size;
    switch (tensor.init) {
        case Init::zeros:
        case Init::ones:
            for (size_t i = 0; i < n; i++) out[i] = tensor.init == Init::ones;
            break;
        case Init::normal:
            fill_normal(out, n, tensor.std, seed, random_stream(tensor.name));
            break;
        case Init::identity_conv:  // w_0 = 1, the rest 0
            for (size_t i = 0; i < n; i++) out[i] = (int64_t)i < tensor.shape[1];
            break;
        case Init::decay:
            for (size_t i = 0; i < n; i++) out[i] = initial_decay((int)i, (int)n);
            break;
    }
}
