// An optimizer turns gradients into new weights. Each backend has the algorithm (llmc/cpu/adamw.h,
// llmc/cuda/adamw.h). This file has the interface through which the training loop and checkpoints use it.
//
// An optimizer keeps arrays of float32. Each one has the layout of the parameters (llmc/parameters.h), or of
// the pieces of them that this rank keeps (llmc/sharding.h). The name of an array is the prefix of its
// tensors in a checkpoint: the array "m" has "m.wte.weight" and so on.
#pragma once
#include <algorithm>
#include <cstddef>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "llmc/memory_plan.h"
#include "llmc/parameters.h"
#include "llmc/sharding.h"

// Settings of AdamW (arXiv 1711.05101). attention_lr is the factor of the learning rate for Rate::attention.
struct AdamW {
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, attention_lr = 1;
};

// The arrays of AdamW: the moving averages of the gradient and of its square.
inline constexpr const char* kAdamWArrays[] = {"m", "v"};

class Optimizer {
  public:
    virtual ~Optimizer() = default;
    Optimizer() = default;
    Optimizer(const Optimizer&) = delete;
    Optimizer& operator=(const Optimizer&) = delete;

    virtual const std::vector<std::string>& arrays() const = 0;  // names of the arrays
    virtual size_t bytes() const = 0;                            // size of what allocate() takes
    virtual void allocate() = 0;                                 // sets the arrays to zero

    // Does one step for the elements of a slice that are kept here. Their gradients must be complete. It
    // multiplies them by the model's clip factor and changes nothing if that is NaN. `step` counts from 1. It
    // may return before the work is done.
    virtual void step(Slice slice, double learning_rate, int step) = 0;

    // read() copies a slice of one of the arrays to the host, write() copies one from there. Both skip what
    // is not kept here.
    virtual void read(size_t array, Slice slice, float* out) const = 0;
    virtual void write(size_t array, Slice slice, const float* in) = 0;

    // The first tensor that has a NaN or Inf in one of the arrays, as "m of wte.weight"; "" if all are
    // finite.
    virtual std::string first_nonfinite() const = 0;
};

// The arrays that a model gives to its optimizer.
template <class Real, class Gradient>
struct ParameterArrays {
    float* weights;  // (table.size)
    Real* copy;      // (table.size): the weights in the type of the matrix products; null if that is float
    Gradient* gradients;       // (table.size)
    const float* clip_factor;  // (1)
    // Whether these arrays have only the pieces that this rank keeps.
    bool weights_are_kept = false, gradients_are_kept = false;

    // The address of element `begin` of the table, which is element `place` of an array of what is kept.
    float* weights_at(size_t begin, size_t place) const {
        return weights + (weights_are_kept ? place : begin);
    }
    Gradient* gradients_at(size_t begin, size_t place) const {
        return gradients + (gradients_are_kept ? place : begin);
    }
};

// Neighbouring elements of the table whose learning rate is the step's times the same factor.
struct RateRun {
    Slice slice;
    double factor;
};

// Cuts the table into such runs, as few as there can be: a single one if the factor is 1.
inline std::vector<RateRun> rate_runs(const ParameterTable& table, double attention_lr) {
    std::vector<const ParameterTensor*> tensors;  // in the order of the array
    for (const ParameterTensor& t : table.tensors) tensors.push_back(&t);
    std::sort(tensors.begin(), tensors.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
    std::vector<RateRun> runs;
    for (const ParameterTensor* t : tensors) {
        const double factor = t->rate == Rate::attention ? attention_lr : 1;
        if (!runs.empty() && runs.back().factor == factor) continue;
        if (!runs.empty()) runs.back().slice.end = t->offset;
        runs.push_back({{t->offset, table.size}, factor});
    }
    return runs;
}

// Keeps the arrays of an optimizer in the memory of a backend.
template <class Memory>
class OptimizerState : public Optimizer {
  public:
    OptimizerState(const ParameterTable& table, const Kept& kept, std::vector<std::string> names,
                   double attention_lr)
        : table_(table),
          kept_(kept),
          names_(std::move(names)),
          values_(names_.size()),
          rates_(rate_runs(table, attention_lr)) {
        for (float*& values : values_) plan_.add(values, kept.size());
    }

    const std::vector<std::string>& arrays() const override { return names_; }
    size_t bytes() const override { return plan_.bytes(); }
    void allocate() override {
        plan_.allocate();
        for (float* values : values_) Memory::zero(values, kept_.size());
    }
    void read(size_t array, Slice slice, float* out) const override {
        kept_.for_each(slice, [&](Slice piece, size_t place) {
            Memory::read(out + (piece.begin - slice.begin), values_[array] + place, piece.size());
        });
    }
    void write(size_t array, Slice slice, const float* in) override {
        kept_.for_each(slice, [&](Slice piece, size_t place) {
            Memory::write(values_[array] + place, in + (piece.begin - slice.begin), piece.size());
        });
    }
    std::string first_nonfinite() const override {
        for (const ParameterTensor& t : table_.tensors)
            for (size_t i = 0; i < names_.size(); i++) {
                bool finite = true;
                kept_.for_each(t.slice(), [&](Slice piece, size_t place) {
                    finite = finite && Memory::finite(values_[i] + place, piece.size());
                });
                if (!finite) return names_[i] + " of " + t.name;
            }
        return "";
    }

  protected:
    const ParameterTable& table_;
    const Kept& kept_;
    float* values(size_t array) const { return values_[array]; }  // (kept_.size())

    // Calls f(piece, place, factor) for the pieces of a slice that are kept (see Kept::for_each). `factor` is
    // that of the learning rate.
    template <class F>
    void for_each(Slice slice, F f) const {
        for (const RateRun& run : rates_)
            kept_.for_each(overlap(run.slice, slice),
                           [&](Slice piece, size_t place) { f(piece, place, run.factor); });
    }

  private:
    std::vector<std::string> names_;
    std::vector<float*> values_;
    std::vector<RateRun> rates_;
    ::MemoryPlan<Memory> plan_;
};
