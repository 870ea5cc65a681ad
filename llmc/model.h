// What the training loop and the commands ask of a model. Each backend has a `GPT` that is one
// (train_gpt.cpp, train_gpt.cu), and says through a Backend how to make it. Pointers are to host memory;
// sizes and layouts of tensors are those of llmc/parameters.h.
#pragma once
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "llmc/config.h"
#include "llmc/optimizer.h"
#include "llmc/parameters.h"

struct AttentionNorms;  // llmc/norms.h

enum class Store { weights, gradients };

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

// Tokens of a prompt that go through decode() at a time.
constexpr int kPromptRows = 256;

struct MemoryGroup {
    std::string name;
    size_t bytes;
};

// Sequences of tokens and the tokens that follow each.
struct Batch {
    const int* inputs;   // (B,T)
    const int* targets;  // (B,T)
    int B, T;
};

// What one pass over a batch is for. A step is a sequence of passes: the first assigns the gradients, the
// others add to them, and after the last they are complete.
struct Pass {
    bool backward = false;
    float loss_scale = 1;             // the gradients are those of loss_scale * the mean loss
    bool first = true, last = true;   // of the step
    AttentionNorms* norms = nullptr;  // (L,H): measures of the attention on the way; null: not wanted
    static Pass forward_only() { return {}; }
    static Pass training(float loss_scale = 1, bool first = true, bool last = true,
                         AttentionNorms* norms = nullptr) {
        return {true, loss_scale, first, last, norms};
    }
};

// Told of each bucket of ParameterTable::buckets(), by its index and in that order, when its gradients are
// complete.
using ReadyFunction = std::function<void(int bucket)>;

class Model {
  public:
    const GPTConfig config;
    const ParameterTable table;

    virtual ~Model() = default;
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    // The constructor plans all memory and allocates nothing. memory() is what allocate() will take at once;
    // `more`: bytes that others will take after it. Weights and gradients are zero after it.
    virtual std::vector<MemoryGroup> memory() const = 0;
    virtual void allocate(size_t more = 0) = 0;

    // A forward pass, and a backward pass where it is asked for. May return before the work is done. In the
    // last pass of a step it calls ready.
    virtual void run(const Batch& batch, const Pass& pass, const ReadyFunction& ready = {}) = 0;
    // The sum of the mean losses of all passes since it was last asked for. Waits for them.
    virtual double take_loss() = 0;
    double loss(const Batch& batch, const Pass& pass = {}) {
        run(batch, pass);
        return take_loss();
    }

    // The norm of the gradients of a slice.
    virtual double gradient_norm(Slice slice) const = 0;
    // Sets the factor that the optimizer multiplies gradients by, so that their norm is at most max_norm (0:
    // no limit). It is NaN where the norm is not finite.
    virtual void clip_gradients(double max_norm) = 0;
    // The norm that clip_gradients() found. Waits for it, and for an optimizer's step after it.
    virtual double clipped_norm() = 0;
    // For these weights and gradients. The model must outlive it.
    virtual std::unique_ptr<Optimizer> make_optimizer(const AdamW& adamw) = 0;

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

// What a backend offers beyond what all have. options.h refuses the rest.
struct Capabilities {
    const char* program;  // for messages
    bool tf32 = false, bf16_gradients = false, stochastic_rounding = false, cuda_graph = false;
    int largest_head = 1 << 20;
};

struct Backend {
    std::string name;  // "CPU"
    Capabilities can;
    std::unique_ptr<Model> (*make_model)(const GPTConfig& config, const ModelOptions& options);
    // 0: as many as there are cores. Returns how many there will be.
    int (*set_threads)(int threads);
    // FLOP/s of a large matrix product on this machine, measured now. The log's "% of peak" refers to it.
    double (*measured_peak)(Precision precision);
};
