// The table of parameter tensors. It has the name, kind, shape and place of each tensor, and how its first
// values are made. Names, shapes and orientation (in, out) are those of Hugging Face's GPT-2.
//
// All parameters lie in one array of table.size elements. Their copy in the type of the matrix products, the
// gradients and each moment of the optimizer lie in arrays of the same layout. A Tensors object gives the
// tensors of such an array by name. Tensors start at multiples of 16 elements, and the gaps are zero. The
// vocabulary is padded to Vp rows; the last Vp-V of them are zero and are never in a file.
//
// The array begins with the embeddings, then come the matrices of block 0, of block 1 and so on. All vectors
// are at its end: they are less than 1 % of the parameters, so ranks that share the rest all keep them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "llmc/attention_scale.h"
#include "llmc/config.h"
#include "llmc/rng.h"
#include "llmc/slice.h"

// The kind of a tensor. It decides how the tensor is treated. A matrix product assigns the gradient of a
// matrix or an embedding in the first backward pass of a step; layers add to all others, so those must be
// zero before that pass. Vectors have no weight decay, and with --gradients bf16 their gradients are still
// added up in float32.
enum class TensorKind {
    matrix,     // the weight of a linear layer
    embedding,  // wte, which is also the output projection
    position,   // wpe
    vector      // all others: biases, gains, LayerNorms' weights, decays, weights of the short convolution
};

// The tensors of one block, by name. A tensor that the model does not have is null. Vectors have a type of
// their own because --gradients bf16 keeps their gradients in float32.
template <class Matrix, class Vector = Matrix>
struct LayerTensors {
    Vector* ln_1_weight;        // (C)
    Vector* ln_1_bias;          // (C)
    Matrix* attn_weight;        // (C,3C): makes q, k, v
    Matrix* out_gate_weight;    // (C,C), with output_gate
    Vector* attn_bias;          // (3C)
    Vector* conv_weight;        // (K,3C), with a short convolution of width K
    Vector* q_gain;             // (H), with qk_norm
    Vector* decay;              // (H): delta, with --decay learned
    Matrix* decay_gate_weight;  // (C,H), with --decay gate
    Vector* decay_gate_bias;    // (H)
    Matrix* attn_proj_weight;   // (C,C)
    Vector* attn_proj_bias;     // (C)
    Vector* ln_2_weight;        // (C)
    Vector* ln_2_bias;          // (C)
    Matrix* fc_weight;          // (C,F)
    Vector* fc_bias;            // (F)
    Matrix* fc_proj_weight;     // (F,C)
    Vector* fc_proj_bias;       // (C)
};

template <class Matrix, class Vector = Matrix>
struct Tensors {
    Matrix* wte;                                  // (Vp,C), also the output projection
    Matrix* wpe;                                  // (context,C), with learned positions
    Vector* ln_f_weight;                          // (C)
    Vector* ln_f_bias;                            // (C)
    std::vector<LayerTensors<Matrix, Vector>> h;  // (L)
};

enum class Init { zeros, ones, constant, normal, identity_conv, decay };

// The learning rate of a tensor: that of the step, or that times --attention-lr.
enum class Rate { base, attention };

using Shape = std::vector<int64_t>;

struct ParameterTensor {
    std::string name;
    TensorKind kind;
    int layer;      // -1: belongs to no block
    Shape shape;    // as in a file, without padding
    size_t offset;  // elements from the start of the array
    size_t size;    // product of shape
    Init init;
    double value;  // for Init::constant; for Init::normal the standard deviation
    Rate rate;
    Slice slice() const { return {offset, offset + size}; }
};

struct ParameterTable {
    std::vector<ParameterTensor> tensors;
    size_t size = 0;   // elements of the whole array, padding included
    size_t count = 0;  // parameters of the model

    ParameterTable(const GPTConfig& config, int Vp) : config_(config), Vp_(Vp) {
        Tensors<float> unused;
        walk(unused, [&](auto*&, const std::string& name, TensorKind kind, int layer, const Shape& shape,
                         Init init, double value, Rate rate) {
            size_t elements = 1;
            for (int64_t s : shape) elements *= s;
            tensors.push_back({name, kind, layer, shape, 0, elements, init, value, rate});
            count += elements;
        });
        blocks_.resize(config.layers, {SIZE_MAX, 0});
        vectors_of_blocks_ = blocks_;
        place([](TensorKind kind) { return kind != TensorKind::vector; }, blocks_);
        vectors_.begin = size;
        place([](TensorKind kind) { return kind == TensorKind::vector; }, vectors_of_blocks_);
        vectors_.end = size;
    }

    Slice all() const { return {0, size}; }
    Slice embeddings() const { return {0, blocks_[0].begin}; }
    Slice block(int layer) const { return blocks_[layer]; }  // its matrices
    Slice vectors() const { return vectors_; }               // of the whole model
    Slice vectors_of(int layer) const { return vectors_of_blocks_[layer]; }

    // Cuts the array into buckets, in the order in which the backward pass finishes them: the last block, the
    // other blocks down to block 0, the embeddings, the vectors.
    std::vector<Slice> buckets() const {
        std::vector<Slice> slices(blocks_.rbegin(), blocks_.rend());
        slices.push_back(embeddings());
        slices.push_back(vectors());
        return slices;
    }
    int bucket_of_block(int layer) const { return (int)blocks_.size() - 1 - layer; }
    int bucket_of_embeddings() const { return (int)blocks_.size(); }
    int bucket_of_vectors() const { return (int)blocks_.size() + 1; }
    int bucket_of(const ParameterTensor& t) const {
        if (t.kind == TensorKind::vector) return bucket_of_vectors();
        return t.layer < 0 ? bucket_of_embeddings() : bucket_of_block(t.layer);
    }

    // The tensors of an array of `size` elements that has the layout of this table.
    template <class T>
    Tensors<T> view(T* array) const {
        auto at = [&](const ParameterTensor& t) { return array + t.offset; };
        return view<T, T>(at, at);
    }
    // The same for tensors that lie elsewhere: vector_at(ParameterTensor) says where a vector is, and
    // matrix_at(ParameterTensor) where any other tensor is.
    template <class Matrix, class Vector, class MatrixAt, class VectorAt>
    Tensors<Matrix, Vector> view(MatrixAt matrix_at, VectorAt vector_at) const {
        Tensors<Matrix, Vector> view = {};
        auto next = tensors.begin();
        walk(view, [&]<class T>(T*& slot, auto&&...) {
            const ParameterTensor& t = *next++;
            if (t.kind == TensorKind::vector) {
                if constexpr (std::is_same_v<T, Vector>) slot = vector_at(t);
            } else {
                if constexpr (std::is_same_v<T, Matrix>) slot = matrix_at(t);
            }
        });
        return view;
    }

  private:
    GPTConfig config_;
    int Vp_;
    std::vector<Slice> blocks_, vectors_of_blocks_;  // (L)
    Slice vectors_;

    // Gives the tensors of the chosen kinds their places, at the end of what has been placed, and notes which
    // elements each block has.
    template <class Chosen>
    void place(Chosen chosen, std::vector<Slice>& of_blocks) {
        for (ParameterTensor& t : tensors) {
            if (!chosen(t.kind)) continue;
            t.offset = size;
            size += padded_size(t.kind, t.size);
            if (t.layer < 0) continue;
            Slice& block = of_blocks[t.layer];
            block.begin = std::min(block.begin, t.offset);
            block.end = size;
        }
    }

    size_t padded_size(TensorKind kind, size_t elements) const {
        if (kind == TensorKind::embedding) elements = (size_t)Vp_ * config_.channels;
        return (elements + 15) / 16 * 16;
    }

    // Calls f(member of `to`, name, kind, layer, shape, init, value, rate) for every tensor that the model
    // has, in the order of the array.
    template <class Matrix, class Vector, class Visit>
    void walk(Tensors<Matrix, Vector>& to, Visit f) const {
        int64_t C = config_.channels, F = config_.mlp_width(), H = config_.heads, L = config_.layers;
        double residual_std = 0.02 / std::sqrt(2.0 * L);
        to.h.resize(L);
        f(to.wte, "wte.weight", TensorKind::embedding, -1, Shape{config_.vocab_size, C}, Init::normal, 0.02,
          Rate::base);
        if (!config_.rope())
            f(to.wpe, "wpe.weight", TensorKind::position, -1, Shape{config_.context, C}, Init::normal, 0.02,
              Rate::base);
        for (int l = 0; l < L; l++) {
            LayerTensors<Matrix, Vector>& layer = to.h[l];
            auto matrix = [&](Matrix*& slot, const char* name, int64_t in, int64_t out, double std,
                              Rate rate = Rate::base) {
                f(slot, str("h.", l, ".", name), TensorKind::matrix, l, Shape{in, out}, Init::normal, std,
                  rate);
            };
            auto vector = [&](Vector*& slot, const char* name, const Shape& shape, Init init,
                              Rate rate = Rate::base, double value = 0) {
                f(slot, str("h.", l, ".", name), TensorKind::vector, l, shape, init, value, rate);
            };
            vector(layer.ln_1_weight, "ln_1.weight", {C}, Init::ones);
            vector(layer.ln_1_bias, "ln_1.bias", {C}, Init::zeros);
            matrix(layer.attn_weight, "attn.c_attn.weight", C, 3 * C, 0.02, Rate::attention);
            vector(layer.attn_bias, "attn.c_attn.bias", {3 * C}, Init::zeros, Rate::attention);
            if (config_.output_gate)
                matrix(layer.out_gate_weight, "attn.out_gate.weight", C, C, 0.02, Rate::attention);
            if (config_.short_conv)
                vector(layer.conv_weight, "attn.conv.weight", {config_.short_conv, 3 * C},
                       Init::identity_conv);
            if (config_.qk_norm)
                vector(layer.q_gain, "attn.q_gain", {H}, Init::constant, Rate::attention,
                       config_.has_softmax_instead(l) ? 1 : config_.q_gain);
            if (config_.decay == DecayKind::learned) vector(layer.decay, "attn.decay", {H}, Init::decay);
            if (config_.decay == DecayKind::gate) {
                matrix(layer.decay_gate_weight, "attn.decay_gate.weight", C, H, 0.02, Rate::attention);
                vector(layer.decay_gate_bias, "attn.decay_gate.bias", {H}, Init::decay, Rate::attention);
            }
            matrix(layer.attn_proj_weight, "attn.c_proj.weight", C, C, residual_std);
            vector(layer.attn_proj_bias, "attn.c_proj.bias", {C}, Init::zeros);
            vector(layer.ln_2_weight, "ln_2.weight", {C}, Init::ones);
            vector(layer.ln_2_bias, "ln_2.bias", {C}, Init::zeros);
            matrix(layer.fc_weight, "mlp.c_fc.weight", C, F, 0.02);
            vector(layer.fc_bias, "mlp.c_fc.bias", {F}, Init::zeros);
            matrix(layer.fc_proj_weight, "mlp.c_proj.weight", F, C, residual_std);
            vector(layer.fc_proj_bias, "mlp.c_proj.bias", {C}, Init::zeros);
        }
        f(to.ln_f_weight, "ln_f.weight", TensorKind::vector, -1, Shape{C}, Init::ones, 0.0, Rate::base);
        f(to.ln_f_bias, "ln_f.bias", TensorKind::vector, -1, Shape{C}, Init::zeros, 0.0, Rate::base);
    }
};

// Writes the first values of one tensor into out (tensor.size). A seed gives the same values on every machine
// and backend.
inline void initialize_tensor(float* out, const ParameterTensor& tensor, uint64_t seed) {
    size_t n = tensor.size;
    switch (tensor.init) {
        case Init::zeros:
        case Init::ones:
            for (size_t i = 0; i < n; i++) out[i] = tensor.init == Init::ones;
            break;
        case Init::constant:
            std::fill(out, out + n, (float)tensor.value);
            break;
        case Init::normal:
            fill_normal(out, n, tensor.value, seed, random_stream(tensor.name));
            break;
        case Init::identity_conv:  // w_0 = 1, the rest 0
            for (size_t i = 0; i < n; i++) out[i] = (int64_t)i < tensor.shape[1];
            break;
        case Init::decay:
            for (size_t i = 0; i < n; i++) out[i] = initial_decay((int)i, (int)n);
            break;
    }
}
