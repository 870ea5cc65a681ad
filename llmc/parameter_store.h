// The parameters of a model in the memory of a backend: the weights, their copy in the type of the matrix
// products, and the gradients. Each is one array with the layout of the ParameterTable, and has a view that
// gives its tensors by name.
#pragma once
#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "llmc/memory_plan.h"
#include "llmc/model.h"
#include "llmc/optimizer.h"
#include "llmc/parameters.h"

// A small gradient (has_small_gradient) in the array that holds them alone, one after another as in the
// table.
struct SmallTensor {
    size_t from, to, size;  // its offsets in the small array and in the table
};

inline std::vector<SmallTensor> small_tensors(const ParameterTable& table) {
    std::vector<SmallTensor> small;
    size_t from = 0;
    for (const ParameterTensor& t : table.tensors) {
        if (!has_small_gradient(t.kind)) continue;
        small.push_back({from, t.offset, t.size});
        from += (t.size + 15) / 16 * 16;
    }
    return small;
}
inline size_t small_size(const ParameterTable& table) {
    SmallTensor last = small_tensors(table).back();
    return last.from + (last.size + 15) / 16 * 16;
}

//   Memory: the memory of the backend, as in memory_plan.h
//   Real: the type of the matrix products
//   Gradient: the type in which the gradients of matrices and embeddings are added up. If it is not float,
//             the vectors' gradients are added up in a float array of their own.
template <class Memory, class Real, class Gradient = float>
class ParameterStore {
  public:
    static constexpr bool kCopies = !std::is_same_v<Real, float>;
    static constexpr bool kSmallGradients = !std::is_same_v<Gradient, float>;

    Tensors<float> weights;
    Tensors<Real> weights_real;  // the weights in the type of the matrix products
    Tensors<Gradient, float> gradients;
    ParameterArrays<Real, Gradient> arrays{};  // (table.size) each
    float* small_gradients = nullptr;          // (small_size), if Gradient is not float

    // `table` must outlive the store. Without `training` there are no gradients.
    ParameterStore(const ParameterTable& table, bool training) : table_(table), training_(training) {
        plan_.add(arrays.weights, table.size);
        if (kCopies) plan_.add(arrays.copy, table.size);
        if (training) plan_.add(arrays.gradients, table.size);
        if (training && kSmallGradients) plan_.add(small_gradients, small_size(table));
    }

    size_t bytes() const { return plan_.bytes(); }

    // Weights and gradients are zero after it.
    void allocate() {
        plan_.allocate();
        Memory::zero(arrays.weights, table_.size);
        weights = table_.view(arrays.weights);
        if constexpr (kCopies) {
            Memory::zero(arrays.copy, table_.size);
            weights_real = table_.view(arrays.copy);
        } else {
            weights_real = weights;
        }
        if (!training_) return;
        Memory::zero(arrays.gradients, table_.size);
        if constexpr (kSmallGradients) {
            std::vector<SmallTensor> small = small_tensors(table_);
            auto next = small.begin();
            gradients = table_.view<Gradient, float>(
                arrays.gradients, [&](const ParameterTensor&) { return small_gradients + next++->from; });
        } else {
            gradients = table_.view(arrays.gradients);
        }
    }

    // Calls zero(array, n) for the gradients that layers add to. The first pass of a step assigns all others.
    template <class Zero>
    void zero_added_gradients(Zero zero) const {
        for (const ParameterTensor& t : table_.tensors)
            if (!gradient_is_assigned(t.kind) && !(kSmallGradients && has_small_gradient(t.kind)))
                zero(arrays.gradients + t.offset, t.size);
        if (kSmallGradients) zero(small_gradients, small_size(table_));
    }

    // read() copies a tensor to the host, write() copies one from there. The copy of the weights follows.
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
        Memory::write(arrays.weights + t.offset, in, t.size);
        if (!kCopies) return;
        std::vector<Real> rounded(in, in + t.size);
        Memory::write(arrays.copy + t.offset, rounded.data(), t.size);
    }

  private:
    const ParameterTable& table_;
    bool training_;
    MemoryPlan<Memory> plan_;
};
