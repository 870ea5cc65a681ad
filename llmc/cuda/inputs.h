// A batch on the device: its tokens, and the angles of RoPE for their positions.
#pragma once
#include <algorithm>
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

    Inputs() = default;
    Inputs(const Inputs&) = delete;
    Inputs& operator=(const Inputs&) = delete;
    ~Inputs() {
        for (Staged& staged : staged_) {
            if (staged.done) cudaEventDestroy(staged.done);
            cudaFreeHost(staged.host);
        }
    }

    // For batches of up to options.batch x options.seq. The plan sets the pointers.
    void add_to(MemoryPlan& plan, const GPTConfig& config, const ModelOptions& options) {
        config_ = config;
        size_ = (size_t)options.batch * options.seq;
        plan.add(tokens, size_);
        plan.add(targets, size_);
        if (config.rope()) plan.add(rope, (size_t)options.seq * config.head_size());
    }

    void place(const Batch& batch, cudaStream_t stream) {
        Staged& staged = staged_[turn_ ^= 1];
        if (staged.host) {
            wait_for(staged.done);
        } else {
            check(cudaMallocHost(&staged.host, 2 * size_ * sizeof(int)));
            check(cudaEventCreateWithFlags(&staged.done, cudaEventDisableTiming));
        }
        const size_t n = (size_t)batch.B * batch.T;
        std::copy_n(batch.inputs, n, staged.host);
        std::copy_n(batch.targets, n, staged.host + size_);
        copy_to_device(tokens, staged.host, n, stream);
        copy_to_device(targets, staged.host + size_, n, stream);
        check(cudaEventRecord(staged.done, stream));
        place_angles(0, batch.T, stream);
    }

    // Tokens (B,T) without targets; the first token of each row has the position `start`.
    void place(const int* from, int B, int T, int start, cudaStream_t stream) {
        copy_to_device(tokens, from, (size_t)B * T, stream);
        place_angles(start, T, stream);
    }

  private:
    // A batch on its way to the device. It is copied from pinned memory, because the driver may block a copy
    // from other memory until the work before it is done, and so the host would not run ahead. There are two,
    // for the batch that is computed and the next one.
    struct Staged {
        int* host = nullptr;  // (2,size_): tokens and targets
        cudaEvent_t done = nullptr;
    };

    GPTConfig config_;
    size_t size_ = 0;  // of the largest batch
    Staged staged_[2];
    int turn_ = 0;
    int rope_start_ = 0, rope_length_ = 0;  // `rope` holds these positions

    void place_angles(int start, int T, cudaStream_t stream) {
        if (!config_.rope() || (start == rope_start_ && T == rope_length_)) return;
        std::vector<float> angles = rope_table(config_, T, start);
        copy_to_device(rope, angles.data(), angles.size(), stream);
        wait_for(stream);  // before `angles` is freed
        rope_start_ = start, rope_length_ = T;
    }
};

}  // namespace gpu
