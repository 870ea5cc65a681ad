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
          sent_(sharding_.buckets.size()) {}

    // The hooks that a pass of a training step needs.
    BucketHooks hooks(const Pass& pass) {
        if (comm_.ranks == 1) return {};
        BucketHooks hooks;
        if (sharding_.level > 0 && pass.first)
            hooks.before_forward = [this](int bucket) { comm_.wait(sent_[bucket]); };
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

    // Waits for the new weights. Call it before anything except a training step reads them.
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
            const double elements = share * sharding_.buckets[bucket].size();
            const double reduced = elements * size_of(model_.element_of(Store::gradients)),
                         gathered = elements * size_of(model_.element_of(Store::weights));
            if (is_cut(bucket))
                bytes += gathered + reduced * (is_buffered(bucket) ? passes : 1);
            else
                bytes += 2 * reduced;
        }
        return bytes;
    }

    // Milliseconds that the communication of a step takes on its own, measured now. It changes no weights,
    // and gradients must be zero.
    double measure(int passes) {
        double reduced = 0, gathered = 0;
        for (int repetition = 0; repetition < 2; repetition++) {  // the first one opens connections
            comm_.join();
            comm_.take_exposed_ms();
            for (int bucket = 0; bucket < buckets(); bucket++) {
                settle_buffer(bucket);
                reduce(bucket, Pass::training(1, false, true));
            }
            for (int bucket = 0; bucket < buckets(); bucket++) settle_buffer(bucket);
            comm_.join();
            reduced = comm_.take_exposed_ms();
            for (int bucket = 0; bucket < buckets(); bucket++) gather(bucket);
            comm_.join();
            gathered = comm_.take_exposed_ms();
        }
        return reduced * (sharding_.level > 1 ? passes : 1) + gathered;
    }

  private:
    Communicator& comm_;
    Model& model_;
    Optimizer& optimizer_;
    const Sharding& sharding_;
    std::vector<int64_t> sent_;  // (buckets): where the sending of new weights is in the queue

    // What is in a buffer of gradients at level 2.
    struct Buffer {
        int bucket;
        int64_t sent;  // its place in the queue
        bool add;
    };
    std::optional<Buffer> buffers_[3];

    int buckets() const { return (int)sharding_.buckets.size(); }
    // Whether its parts are at different ranks, and whether its gradients go through a buffer in every pass.
    bool is_cut(int bucket) const {
        return sharding_.level > 0 && bucket != model_.table.bucket_of_vectors();
    }
    bool is_buffered(int bucket) const { return sharding_.level > 1 && is_cut(bucket); }

    std::vector<Slice> parts(int bucket) const {
        return sharding_.parts_of(bucket, sharding_.buckets[bucket]);
    }

    void reduce(int bucket, const Pass& pass) {
        if (!pass.last && !is_buffered(bucket)) return;
        const Span gradients = model_.gradients_span(bucket);
        if (!is_cut(bucket)) return comm_.all_reduce(gradients);
        comm_.reduce_scatter(gradients, parts(bucket));
        if (is_buffered(bucket))
            buffers_[sharding_.buffer_of(bucket)] = {bucket, comm_.queued(), !pass.first};
    }

    void gather(int bucket) {
        if (!is_cut(bucket)) return;
        comm_.all_gather(model_.weights_span(bucket), parts(bucket));
        sent_[bucket] = comm_.queued();
    }

    // Keeps what the buffer of this bucket still holds, so that it can be written again.
    void settle_buffer(int bucket) {
        if (!is_buffered(bucket)) return;
        std::optional<Buffer>& buffer = buffers_[sharding_.buffer_of(bucket)];
        if (!buffer) return;
        comm_.wait(buffer->sent);
        model_.keep_gradients(buffer->bucket, buffer->add);
        buffer.reset();
    }
};
