// A batch on the device: its tokens, and the angles of RoPE for their positions.
#pragma once
#include <vector>

#include "llmc/config.h"
#include "llmc/cuda/memory.h"
#include "llmc/model.h"
#include "llmc/rope.h"

namespace gpu {

class Inputs {
  public:
    int* tokens;            // (B,T)
    int* targets;           // (B,T)
    float* rope = nullptr;  // (T,D); null without RoPE

    // For batches of up to options.batch x options.seq. The plan sets the pointers.
    void add_to(MemoryPlan& plan, const GPTConfig& config, const ModelOptions& options) {
        size_t B = options.batch, T = options.seq;
        config_ = config;
        plan.add(tokens, B * T);
        plan.add(targets, B * T);
        if (config.rope()) plan.add(rope, T * config.head_size());
    }

    void place(const Batch& batch, cudaStream_t stream) {
        // A copy from memory that is not pinned may block in the driver, behind a collective that never ends.
        if (waiter) waiter->await(stream);
        copy_to_device(targets, batch.targets, (size_t)batch.B * batch.T, stream);
        place(batch.inputs, batch.B, batch.T, 0, stream);
    }

    // Tokens (B,T) without targets; the first token of each row has the position `start`.
    void place(const int* from, int B, int T, int start, cudaStream_t stream) {
        copy_to_device(tokens, from, (size_t)B * T, stream);
        if (!config_.rope() || (start == rope_start_ && T == rope_length_)) return;
        std::vector<float> angles = rope_table(config_, T, start);
        copy_to_device(rope, angles.data(), angles.size(), stream);
        wait_for(stream);  // before `angles` is freed
        rope_start_ = start, rope_length_ = T;
    }

  private:
    GPTConfig config_;
    int rope_start_ = 0, rope_length_ = 0;  // `rope` holds these positions
};

}  // namespace gpu
