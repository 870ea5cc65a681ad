// What the ranks of a run do together in a training step: they add up their gradients, and each one does the
// optimizer's step for what it keeps (llmc/sharding.h).
//
// The gradients of a bucket are sent as soon as the backward pass has them, while it goes on with the next
// bucket. At level 0 and 1 this happens in the last pass of a step alone, because each rank adds up its
// passes itself. At level 2 it has no memory for that, so it happens in every pass. From level 1 on, a
// bucket's new weights are sent as soon as the optimizer has them, and the next forward pass waits for each
// bucket when it needs it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "llmc/communicator.h"
#include "llmc/model.h"
#include "llmc/optimizer.h"

class DataParallel {
  public:
    DataParallel(Communicator& communicator, Model& model, Optimizer& optimizer)
        : comm_(communicator),
          model_(model),
          optimizer_(optimizer),
          sharding_(model.sharding),
          gathered_(sharding_.buckets.size()) {}

    // For the pass of a training step. It must be one of all passes of that step.
    BucketHooks hooks(const Pass& pass) {
        if (comm_.ranks == 1) return {};
        BucketHooks hooks;
        if (sharding_.level > 0 && pass.first)
            hooks.before_forward = [this](int bucket) { comm_.wait(gathered_[bucket]); };
        if (sharding_.level > 1) hooks.before_backward = [this](int bucket) { settle_buffer(bucket); };
        hooks.ready = [this, pass](int bucket) {
            comm_.progress();
            reduce(bucket, pass);
        };
        return hooks;
    }

    // Clips the gradients and does the optimizer's step.
    void step(double max_norm, double learning_rate, int step) {
        for (int bucket = 0; bucket < buckets(); bucket++) settle_buffer(bucket);
        comm_.join();
        model_.clip_gradients(max_norm, comm_);
        if (sharding_.level == 0) return optimizer_.step(model_.table.all(), learning_rate, step);
        // In the order in which the next forward pass needs them.
        for (int bucket = buckets() - 1; bucket >= 0; bucket--) {
            optimizer_.step(sharding_.own(bucket), learning_rate, step);
            gather(bucket);
        }
    }

    // Waits for the new weights. Whatever reads them and is no pass of a training step needs this.
    void settle() { comm_.join(); }

    // The norm of all gradients of a slice. All ranks must call it.
    double gradient_norm(Slice slice) {
        double norm = model_.gradient_norm(slice);
        return sharding_.level > 0 ? std::sqrt(comm_.sum(norm * norm)) : norm;
    }

    // Bytes that each rank must send in a step with this many passes, if the sums and gathers are done as
    // well as possible: (ranks - 1) / ranks of the data for each reduction to parts and for each gathering.
    double bytes_a_step(int passes) const {
        double bytes = 0, share = (comm_.ranks - 1.0) / comm_.ranks;
        for (int bucket = 0; bucket < buckets(); bucket++) {
            Span gradients = model_.gradients_span(bucket), weights = model_.weights_span(bucket);
            const double reduced = share * gradients.size * size_of(gradients.type),
                         gathered = share * weights.size * size_of(weights.type);
            if (sharding_.level == 0 || is_whole(bucket))
                bytes += 2 * reduced;
            else
                bytes += gathered + reduced * (sharding_.level > 1 ? passes : 1);
        }
        return bytes;
    }

    // Milliseconds that the communication of a step takes on its own, measured now. It changes no weights.
    double measure(int passes) {
        double ms = 0;
        for (int repetition = 0; repetition < 2; repetition++) {  // the first one opens connections
            comm_.join();
            comm_.take_exposed_ms();
            for (int i = 0; i < passes; i++)
                for (int bucket = 0; bucket < buckets(); bucket++)
                    if (sharding_.level > 1 || i == 0)
                        reduce(bucket, Pass::training(1, false, i + 1 == passes));
            for (int bucket = 0; bucket < buckets(); bucket++) gather(bucket);
            comm_.join();
            ms = comm_.take_exposed_ms();
        }
        for (std::optional<Buffer>& buffer : buffers_) buffer.reset();
        return ms;
    }

  private:
    Communicator& comm_;
    Model& model_;
    Optimizer& optimizer_;
    const Sharding& sharding_;
    std::vector<int64_t> gathered_;  // (buckets): each one's place in the queue of collectives

    // What is in a buffer of gradients at level 2.
    struct Buffer {
        int bucket;
        int64_t sent;  // its place in the queue
        bool add;
    };
    std::optional<Buffer> buffers_[3];

    int buckets() const { return (int)sharding_.buckets.size(); }
    bool is_whole(int bucket) const { return bucket == model_.table.bucket_of_vectors(); }

    std::vector<Slice> parts(int bucket) const {
        return sharding_.parts_of(bucket, sharding_.buckets[bucket]);
    }

    void reduce(int bucket, const Pass& pass) {
        Span gradients = model_.gradients_span(bucket);
        if (sharding_.level < 2 || is_whole(bucket)) {
            if (!pass.last) return;
            if (sharding_.level == 0 || is_whole(bucket)) return comm_.all_reduce(gradients);
            return comm_.reduce_scatter(gradients, parts(bucket));
        }
        comm_.reduce_scatter(gradients, parts(bucket));
        buffers_[sharding_.buffer_of(bucket)] = {bucket, comm_.queued(), !pass.first};
    }

    void gather(int bucket) {
        if (sharding_.level == 0 || is_whole(bucket)) return;
        comm_.all_gather(model_.weights_span(bucket), parts(bucket));
        gathered_[bucket] = comm_.queued();
    }

    // Keeps what the buffer of this bucket still holds, so that it can be written again.
    void settle_buffer(int bucket) {
        if (sharding_.level < 2 || is_whole(bucket)) return;
        std::optional<Buffer>& buffer = buffers_[sharding_.buffer_of(bucket)];
        if (!buffer) return;
        comm_.wait(buffer->sent);
        model_.keep_gradients(buffer->bucket, buffer->add);
        buffer.reset();
    }
};
