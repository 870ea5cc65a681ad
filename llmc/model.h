// What the training loop and the commands ask of a model. Each backend has a `GPT` that is one
// (train_gpt.cpp, train_gpt.cu), and says through a Backend how to make it. Pointers are to host memory;
// sizes and layouts of tensors are those of llmc/parameters.h.
#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "llmc/config.h"
#include "llmc/parameters.h"

struct AttentionNorms;  // llmc/norms.h

struct AdamW {
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
};

enum class Store { weights, gradients, m, v };  // m, v: AdamW's moments

enum class Purpose { training, inference };

// Of the matrix products and of most activations. Weights and moments are float32 with all of them, and so
// are gradients but for --gradients bf16.
enum class Precision { fp32, bf16, tf32 };

// What is not kept for the backward pass but computed again there: nothing; the GELU's output; that and the
// LayerNorms' outputs; all of a block but what goes into it. Results are the same bits.
enum class Recompute { none, gelu, layernorm, block };

// How attention is computed: in tiles of all pairs, or as a recurrence over chunks, which only poly1, poly2
// and small heads of poly3 can be. The same numbers but for rounding; automatic takes the fewer operations.
enum class AttentionKernel { automatic, tiled, linear };

// What generation keeps of the tokens so far: keys and values, or the state of fixed size of the same
// recurrence. automatic begins with the first and goes over to the second where that is smaller.
enum class CacheKind { automatic, kv, state };

inline constexpr const char* kPrecisionNames[] = {"fp32", "bf16", "tf32"};
inline constexpr const char* kGradientNames[] = {"fp32", "bf16"};
inline constexpr const char* kRecomputeNames[] = {"none", "gelu", "layernorm", "block"};
inline constexpr const char* kKernelNames[] = {"auto", "tiled", "linear"};
inline constexpr const char* kCacheNames[] = {"auto", "kv", "state"};

struct ModelOptions {
    Purpose purpose;
    int batch, seq;  // the largest batch: (B,T)
    Precision precision = Precision::fp32;
    Recompute recompute = Recompute::none;
    AttentionKernel kernel = AttentionKernel::automatic;
    CacheKind cache = CacheKind::automatic;
    Precision gradients = Precision::fp32;  // of matrices and embeddings: fp32 or bf16
    bool cuda_graph = false;                // launch forward and backward passes as graphs
    bool stochastic_rounding = false;       // of the weights' copy in bf16; with seed
    uint64_t seed = 1;
};

struct MemoryGroup {
    std::string name;
    size_t bytes;
};

class Model {
  public:
    const GPTConfig config;
    const ParameterTable table;

    virtual ~Model() = default;
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    // The constructor plans all memory and allocates nothing: memory() is what allocate() will allocate, at
    // once. Weights and moments are zero after it.
    virtual std::vector<MemoryGroup> memory() const = 0;
    virtual void allocate() = 0;

    // Of inputs and targets (B,T). dloss != 0: backward() follows, for the gradient of dloss * loss. norms
    // (L,H), or null: measures of the attention on the way. May return before the work is done, as
    // backward() may.
    virtual void start_forward(const int* inputs, const int* targets, int B, int T, float dloss,
                               AttentionNorms* norms = nullptr) = 0;
    // The sum of the mean losses of all forward passes since it was last asked for. Waits for them.
    virtual double take_loss() = 0;
    // One forward pass and its mean loss.
    double forward(const int* inputs, const int* targets, int B, int T, float dloss,
                   AttentionNorms* norms = nullptr) {
        start_forward(inputs, targets, B, T, dloss, norms);
        return take_loss();
    }
    // Adds the gradients of the last forward().
    virtual void backward(const int* inputs, int B, int T) = 0;
    virtual void zero_gradients() = 0;
    // Of the gradients of all tensors (-1), or of those of one layer.
    virtual double gradient_norm(int layer = -1) const = 0;
    // One AdamW step on the gradients, scaled so that their norm is at most max_norm (0: not scaled); step
    // counts from 1. Returns their norm before. Where that is not finite, weights and moments stay.
    virtual double update(const AdamW& adamw, double learning_rate, double max_norm, int step) = 0;

    // Copies a tensor of the table out, and in.
    virtual void read(Store store, const ParameterTensor& tensor, float* out) const = 0;
    virtual void write(Store store, const ParameterTensor& tensor, const float* in) = 0;

    // Logits (V) of the token after `tokens` (n), which follow those given since clear_cache().
    virtual const float* decode(const int* tokens, int n) = 0;
    virtual void clear_cache() = 0;
    // Logits (B,T,V) of every position.
    virtual void all_logits(float* out, const int* inputs, int B, int T) = 0;

    // Where a NaN or Inf came from: the first tensor with one in it; "" where all is finite.
    virtual std::string first_nonfinite() const = 0;

  protected:
    Model(const GPTConfig& config, int Vp) : config(config), table(config, Vp) {}
};

struct Backend {
    std::string name;  // "CPU"
    std::unique_ptr<Model> (*make_model)(const GPTConfig& config, const ModelOptions& options);
    // 0: as many as there are cores. Returns how many there will be.
    int (*set_threads)(int threads);
    // Operations a second of a large matrix product on this machine, now: what the log's share of the peak is
    // of.
    double (*measured_peak)(Precision precision);
};
