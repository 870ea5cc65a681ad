// The arrays of a model's parameters: weights, their copy in the type of the matrix products, and gradients.
//
// With sharding (llmc/sharding.h), some of them have only the pieces that this rank keeps. At level 2, the
// backward pass writes the gradients of a bucket into a buffer. There are three: two that the blocks take in
// turn, and one for the embeddings. The sums over all ranks and passes are in the array of what is kept.
#pragma once
#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "llmc/communicator.h"
#include "llmc/memory_plan.h"
#include "llmc/optimizer.h"
#include "llmc/parameters.h"
#include "llmc/sharding.h"

//   Memory: the memory of the backend, as in memory_plan.h
//   Real: the type of the matrix products
//   Gradient: the type in which the gradients of matrices and embeddings are added up. If it is not float,
//             the vectors' gradients are added up in a float array of their own.
template <class Memory, class Real, class Gradient = float>
class ParameterStore {
  public:
    static constexpr bool kCopies = !std::is_same_v<Real, float>;
    static constexpr bool kSmallGradients = !std::is_same_v<Gradient, float>;

    Tensors<float> weights;      // only vectors, if this rank keeps only pieces of the others
    Tensors<Real> weights_real;  // the weights in the type of the matrix products
    Tensors<Gradient, float> gradients;
    ParameterArrays<Real, Gradient> arrays{};
    float* small_gradients = nullptr;  // (vectors), if Gradient is not float

    // Both must outlive the store. Without `training` there are no gradients.
    ParameterStore(const ParameterTable& table, const Sharding& sharding, bool training)
        : table_(table), sharding_(sharding), training_(training) {
        arrays.weights_are_kept = kCopies && sharding.level > 0;
        arrays.gradients_are_kept = sharding.level > 1;
        weights_plan_.add(arrays.weights, weights_size());
        if (kCopies) weights_plan_.add(arrays.copy, table.size);
        if (arrays.weights_are_kept) weights_plan_.add(gathered_, kGathered);
        if (!training) return;
        gradients_plan_.add(arrays.gradients, gradients_size());
        if (kSmallGradients) gradients_plan_.add(small_gradients, table.vectors().size());
        if (!arrays.gradients_are_kept) return;
        for (int bucket = 0; bucket < table.bucket_of_vectors(); bucket++)  // all blocks are equal
            buffer_sizes_[sharding.buffer_of(bucket)] = sharding.buckets[bucket].size();
        for (int i : {0, 1, 2}) gradients_plan_.add(buffers_[i], buffer_sizes_[i]);
    }

    size_t weights_bytes() const { return weights_plan_.bytes(); }
    size_t gradients_bytes() const { return gradients_plan_.bytes(); }
    size_t bytes() const { return weights_bytes() + gradients_bytes(); }

    // Weights and gradients are zero after it.
    void allocate() {
        weights_plan_.allocate();
        Memory::zero(arrays.weights, weights_size());
        // The vectors are at the end of all arrays.
        auto weight_at = [&](const ParameterTensor& t) { return arrays.weights + t.offset; };
        auto vector_at = [&](const ParameterTensor& t) {
            return arrays.weights + weights_size() - (table_.size - t.offset);
        };
        auto nowhere = [](const ParameterTensor&) -> float* { return nullptr; };
        weights = arrays.weights_are_kept ? table_.view<float, float>(nowhere, vector_at)
                                          : table_.view<float, float>(weight_at, vector_at);
        if constexpr (kCopies) {
            Memory::zero(arrays.copy, table_.size);
            weights_real = table_.view(arrays.copy);
        } else {
            weights_real = weights;
        }
        if (!training_) return;
        gradients_plan_.allocate();
        Memory::zero(arrays.gradients, gradients_size());
        for (int i = 0; arrays.gradients_are_kept && i < 3; i++) Memory::zero(buffers_[i], buffer_sizes_[i]);
        gradients = table_.view<Gradient, float>(
            [&](const ParameterTensor& t) {
                int bucket = table_.bucket_of(t);
                return bucket_gradients(bucket) + (t.offset - sharding_.buckets[bucket].begin);
            },
            [&](const ParameterTensor& t) {
                return vector_gradients() + (t.offset - table_.vectors().begin);
            });
    }

    // The gradients of a bucket, and what is sent to other ranks if its weights have changed.
    Span gradients_span(int bucket) const {
        return {bucket_gradients(bucket), sharding_.buckets[bucket].size()};
    }
    Span weights_span(int bucket) const {
        Slice slice = sharding_.buckets[bucket];
        if constexpr (kCopies) return {arrays.copy + slice.begin, slice.size()};
        return {arrays.weights + slice.begin, slice.size()};
    }

    // For level 2: calls add(to, from, n) with the own part of a bucket's gradients and with its place in the
    // array of what is kept.
    template <class Add>
    void keep_gradients(int bucket, Add add) const {
        sharding_.kept.for_each(sharding_.own(bucket), [&](Slice piece, size_t place) {
            add(arrays.gradients + place,
                bucket_gradients(bucket) + (piece.begin - sharding_.buckets[bucket].begin), piece.size());
        });
    }

    // Calls f(x, n) for the gradients of a slice that this rank counts.
    template <class F>
    void for_gradients(Slice slice, F f) const {
        for (Slice counted : sharding_.counted)
            sharding_.kept.for_each(overlap(counted, slice), [&](Slice piece, size_t place) {
                f(arrays.gradients_at(piece.begin, place), piece.size());
            });
    }

    // Calls zero(array, n) for the gradients that layers add to. The first pass of a step assigns all others.
    template <class Zero>
    void zero_added_gradients(bool first, Zero zero) const {
        for (const ParameterTensor& t : table_.tensors)
            if (t.kind == TensorKind::position && (first || arrays.gradients_are_kept))
                zero(gradients.wpe, t.size);
        if (first) zero(vector_gradients(), table_.vectors().size());
    }

    // read() copies a tensor to the host, write() copies one from there. The copy of the weights follows.
    // With sharding, only gather() can read the weights.
    void read(Store store, const ParameterTensor& t, float* out) const {
        if (store == Store::weights) return Memory::read(out, arrays.weights + t.offset, t.size);
        std::vector<Gradient> values(t.size);
        Memory::read(values.data(), arrays.gradients + t.offset, t.size);
        std::copy(values.begin(), values.end(), out);
    }
    void write(Store store, const ParameterTensor& t, const float* in) {
        if (store == Store::gradients) {
            std::vector<Gradient> values(in, in + t.size);
            return Memory::write(arrays.gradients + t.offset, values.data(), t.size);
        }
        sharding_.kept.for_each(
            arrays.weights_are_kept ? t.slice() : Slice{}, [&](Slice piece, size_t place) {
                Memory::write(arrays.weights + place, in + (piece.begin - t.offset), piece.size());
            });
        if (!arrays.weights_are_kept) Memory::write(arrays.weights + t.offset, in, t.size);
        if (!kCopies) return;
        std::vector<Real> rounded(in, in + t.size);
        Memory::write(arrays.copy + t.offset, rounded.data(), t.size);
    }

    // Copies a tensor of the weights to the host of every rank. All ranks must call it.
    void gather(Communicator& communicator, const ParameterTensor& t, float* out) const {
        if (!arrays.weights_are_kept || t.kind == TensorKind::vector) {
            const Slice all{t.offset, t.offset + t.size};
            const size_t begin = weights_size() - (table_.size - t.offset);
            return Memory::read(out, arrays.weights + (arrays.weights_are_kept ? begin : all.begin), t.size);
        }
        std::vector<float> values;
        for (size_t begin = t.offset; begin < t.offset + t.size; begin += kGathered) {
            const Slice some = overlap({begin, begin + kGathered}, t.slice());
            sharding_.kept.for_each(some, [&](Slice piece, size_t place) {
                values.resize(piece.size());
                Memory::read(values.data(), arrays.weights + place, piece.size());
                Memory::write(gathered_ + (piece.begin - begin), values.data(), piece.size());
            });
            communicator.all_gather({gathered_, some.size()}, sharding_.parts_of(table_.bucket_of(t), some));
            communicator.join();
            Memory::read(out + (begin - t.offset), gathered_, some.size());
        }
    }

    // Says where a NaN or Inf came from. Searches the weights, then the activations in the order of the
    // forward pass, then the gradients in the order of the backward pass. Returns "" if all are finite.
    std::string first_nonfinite(const MemoryPlan<Memory>& activations) const {
        auto finite = [&](const auto* array, bool is_kept, const ParameterTensor& t) {
            if (!is_kept) return Memory::finite(array + t.offset, t.size);
            bool finite = true;
            sharding_.kept.for_each(t.slice(), [&](Slice piece, size_t place) {
                finite = finite && Memory::finite(array + place, piece.size());
            });
            return finite;
        };
        for (const ParameterTensor& t : table_.tensors)
            if (!finite(arrays.weights, arrays.weights_are_kept, t)) return "weight " + t.name;
        std::string activation = activations.first_nonfinite();
        if (!activation.empty()) return "activation " + activation;
        for (size_t i = training_ ? table_.tensors.size() : 0; i-- > 0;) {
            const ParameterTensor& t = table_.tensors[i];
            if (!finite(arrays.gradients, arrays.gradients_are_kept, t)) return "gradient of " + t.name;
        }
        return "";
    }

  private:
    static constexpr size_t kGathered = 1 << 22;  // elements that gather() moves at once

    const ParameterTable& table_;
    const Sharding& sharding_;
    bool training_;
    MemoryPlan<Memory> weights_plan_, gradients_plan_;
    float* gathered_;       // (kGathered)
    Gradient* buffers_[3];  // at level 2
    size_t buffer_sizes_[3] = {};

    size_t weights_size() const { return arrays.weights_are_kept ? sharding_.kept.size() : table_.size; }
    size_t gradients_size() const { return arrays.gradients_are_kept ? sharding_.kept.size() : table_.size; }

    // Where the backward pass writes the gradients of a bucket.
    Gradient* bucket_gradients(int bucket) const {
        Slice slice = sharding_.buckets[bucket];
        if (arrays.gradients_are_kept && bucket != table_.bucket_of_vectors())
            return buffers_[sharding_.buffer_of(bucket)];
        return arrays.gradients + gradients_size() - (table_.size - slice.begin);
    }
    auto vector_gradients() const {
        if constexpr (kSmallGradients) {
            return small_gradients;
        } else {
            return bucket_gradients(table_.bucket_of_vectors());
        }
    }
};
