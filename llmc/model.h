// The interface through which the training loop and the commands use a model. Each backend implements it in
// its class `GPT` (train_gpt.cpp, train_gpt.cu), and a Backend says how to make one. All pointers here point
// to host memory. llmc/parameters.h defines the sizes and layouts of the tensors.
#pragma once
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "llmc/communicator.h"
#include "llmc/config.h"
#include "llmc/launch.h"
#include "llmc/optimizer.h"
#include "llmc/parameters.h"
#include "llmc/sharding.h"

struct AttentionNorms;  // llmc/norms.h

enum class Store { weights, gradients };

enum class Purpose { training, inference };

// The type of the matrix products and of most activations. Weights and moments are always float32, and so are
// gradients except with --gradients bf16.
enum class Precision { fp32, bf16, tf32 };

// What the backward pass computes again because the forward pass did not keep it: nothing; the outputs of the
// GELU and of the output gate; these and the LayerNorms' outputs; everything in a block except its input. The
// results are the same bits.
enum class Recompute { none, gelu, layernorm, block };

// How attention is computed: in tiles of all pairs, or as a recurrence over chunks, which exists only for
// poly1, for poly2 and for poly3 with small heads. Both give the same numbers except for rounding. automatic
// takes the one that needs fewer operations.
enum class AttentionKernel { automatic, tiled, linear };

// What generation keeps about the tokens so far: their keys and values, or the state of the same recurrence,
// whose size is fixed. automatic begins with keys and values, and changes to the state when it is smaller.
enum class CacheKind { automatic, kv, state };

inline constexpr const char* kPrecisionNames[] = {"fp32", "bf16", "tf32"};
inline constexpr const char* kGradientNames[] = {"fp32", "bf16"};
inline constexpr const char* kRecomputeNames[] = {"none", "gelu", "layernorm", "block"};
inline constexpr const char* kKernelNames[] = {"auto", "tiled", "linear"};
inline constexpr const char* kCacheNames[] = {"auto", "kv", "state"};

struct ModelOptions {
    Purpose purpose;
    int batch, seq;  // (B,T) of the largest batch
    Precision precision = Precision::fp32;
    Recompute recompute = Recompute::none;
    AttentionKernel kernel = AttentionKernel::automatic;
    CacheKind cache = CacheKind::automatic;
    Precision gradients = Precision::fp32;  // of matrices and embeddings: fp32 or bf16
    bool cuda_graph = false;                // launch forward and backward passes as graphs
    bool stochastic_rounding = false;       // round the bf16 copy of the weights at random
    uint64_t seed = 1;                      // for stochastic_rounding
    ShardOptions sharding = {};
};

// decode() takes a prompt in pieces of at most this many tokens.
constexpr int kPromptRows = 256;

struct MemoryGroup {
    std::string name;
    size_t bytes;
};

// Sequences of tokens; targets[i] is the token that follows inputs[i], or -1 if the loss leaves it out.
struct Batch {
    const int* inputs;   // (B,T)
    const int* targets;  // (B,T)
    int B, T;
    int counted = B * T;  // targets in the mean loss
};

// What one pass over a batch has to do. A step is a sequence of passes: the first one assigns the gradients,
// the others add to them, and after the last one they are complete.
struct Pass {
    bool backward = false;
    float loss_scale = 1;             // gradients are of loss_scale times the mean loss
    bool first = true, last = true;   // whether it is the first, or the last, pass of the step
    AttentionNorms* norms = nullptr;  // (L,H): receives measures of the attention; null: not wanted
    static Pass forward_only() { return {}; }
    static Pass training(float loss_scale = 1, bool first = true, bool last = true,
                         AttentionNorms* norms = nullptr) {
        return {true, loss_scale, first, last, norms};
    }
};

// What a pass calls for each bucket of ParameterTable::buckets(), with its index. Some may be empty.
using BucketHook = std::function<void(int bucket)>;
struct BucketHooks {
    BucketHook before_forward;   // before it reads the weights
    BucketHook before_backward;  // before it writes gradients
    BucketHook ready;            // when it has written them all; in the order of the buckets
};
inline void call(const BucketHook& hook, int bucket) {
    if (hook) hook(bucket);
}

class Model {
  public:
    const GPTConfig config;
    const ParameterTable table;
    const Sharding sharding;

    virtual ~Model() = default;
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    // The constructor plans all memory and allocates nothing. memory() says what allocate() will take at
    // once. allocate() fails if `more` bytes, which others will take later, would not fit as well. Weights
    // and gradients are zero after it.
    virtual std::vector<MemoryGroup> memory() const = 0;
    virtual void allocate(size_t more = 0) = 0;

    // Runs a forward pass, and a backward pass if pass.backward is set. It may return before the work is
    // done.
    virtual void run(const Batch& batch, const Pass& pass, const BucketHooks& hooks = {}) = 0;
    // Waits for all passes and returns the sum of their mean losses since the last call.
    virtual double take_loss() = 0;
    double loss(const Batch& batch, const Pass& pass = {}) {
        run(batch, pass);
        return take_loss();
    }

    // Where a pass writes the gradients of a bucket, and what other ranks need if its weights have changed.
    // They are in the memory of the backend, for a Communicator.
    virtual Span gradients_span(int bucket) const = 0;
    virtual Span weights_span(int bucket) const = 0;
    virtual Element element_of(Store store) const = 0;  // their type
    // For level 2 of sharding: keeps this rank's part of the gradients of a bucket. `add` says whether they
    // are added to what is kept already.
    virtual void keep_gradients(int bucket, bool add) = 0;

    // The norm of the gradients of a slice. With sharding it is that of the ones that this rank counts.
    virtual double gradient_norm(Slice slice) const = 0;
    // Sets the factor by which the optimizer multiplies the gradients, so that the norm of all of them is at
    // most max_norm (0: no limit). The factor is NaN if the norm is not finite.
    virtual void clip_gradients(double max_norm, Communicator& communicator) = 0;
    void clip_gradients(double max_norm) {
        Communicator alone;
        clip_gradients(max_norm, alone);
    }
    // The norm that clip_gradients() found. Waits for it, and for an optimizer's step after it.
    virtual double clipped_norm() = 0;
    // Makes an optimizer for this model's weights and gradients. The model must outlive it.
    virtual std::unique_ptr<Optimizer> make_optimizer(const AdamW& adamw) = 0;

    // read() copies a tensor of the table to the host, write() copies one from there. With sharding, only
    // gather() can read weights, all ranks must call it, and gradients cannot be read.
    virtual void read(Store store, const ParameterTensor& tensor, float* out) const = 0;
    virtual void write(Store store, const ParameterTensor& tensor, const float* in) = 0;
    virtual void gather(Communicator& communicator, const ParameterTensor& tensor, float* out) const = 0;

    // Returns the logits (V) of the token after `tokens` (n). `tokens` continue what earlier calls since
    // clear_cache() were given.
    virtual const float* decode(const int* tokens, int n) = 0;
    virtual void clear_cache() = 0;
    // Writes the logits (B,T,V) of every position.
    virtual void all_logits(float* out, const int* inputs, int B, int T) = 0;

    // Says where a NaN or Inf came from: the name of the first tensor that has one; "" if all are finite.
    virtual std::string first_nonfinite() const = 0;

  protected:
    Model(const GPTConfig& config, int Vp, const ShardOptions& sharding)
        : config(config), table(config, Vp), sharding(table, sharding) {}
};

// Gives a new model its first weights. A seed gives the same ones on every machine and backend.
inline void initialize_weights(Model& model, uint64_t seed) {
    std::vector<float> values;
    for (const ParameterTensor& t : model.table.tensors) {
        values.resize(t.size);
        initialize_tensor(values.data(), t, seed);
        model.write(Store::weights, t, values.data());
    }
}

// What a backend has beyond what all backends have. options.h refuses flags that ask for anything else.
struct Capabilities {
    const char* program;  // for messages
    bool tf32 = false, bf16_gradients = false, stochastic_rounding = false, cuda_graph = false;
    int largest_head = 1 << 20;
};

struct Backend {
    std::string name;  // "CPU"
    Capabilities can;
    std::unique_ptr<Model> (*make_model)(const GPTConfig& config, const ModelOptions& options);
    // Sets the number of threads (0: as many as there are cores) and returns it.
    int (*set_threads)(int threads);
    // Connects this process with the other ranks. See llmc/cpu/mpi.h.
    std::unique_ptr<Communicator> (*connect)(const Launch& launch, int timeout);
    // FLOP/s of a large matrix product on this machine, measured now. The log's "% of peak" refers to it.
    double (*measured_peak)(Precision precision);
};
