// An optimizer turns gradients into new weights. Each backend has the algorithm (llmc/cpu/adamw.h,
// llmc/cuda/adamw.h). This file has the interface through which the training loop and checkpoints use it.
//
// An optimizer keeps arrays of float32. Each one has the layout of the parameters (llmc/parameters.h). The
// name of an array is the prefix of its tensors in a checkpoint: the array "m" has "m.wte.weight" and so on.
#pragma once
#include <cstddef>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "llmc/memory_plan.h"
#include "llmc/parameters.h"

// Settings of AdamW (arXiv 1711.05101).
struct AdamW {
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
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

    // Does one step for the elements of a slice, whose gradients must be complete. It multiplies them by the
    // model's clip factor and changes nothing if that is NaN. `step` counts from 1. It may return before the
    // work is done.
    virtual void step(Slice slice, double learning_rate, int step) = 0;

    // read() copies a tensor of one of the arrays to the host, write() copies one from there.
    virtual void read(size_t array, const ParameterTensor& tensor, float* out) const = 0;
    virtual void write(size_t array, const ParameterTensor& tensor, const float* in) = 0;

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
};

// Keeps the arrays of an optimizer in the memory of a backend.
template <class Memory>
class OptimizerState : public Optimizer {
  public:
    OptimizerState(const ParameterTable& table, std::vector<std::string> names)
        : table_(table), names_(std::move(names)), values_(names_.size()) {
        for (float*& values : values_) plan_.add(values, table_.size);
    }

    const std::vector<std::string>& arrays() const override { return names_; }
    size_t bytes() const override { return plan_.bytes(); }
    void allocate() override {
        plan_.allocate();
        for (float* values : values_) Memory::zero(values, table_.size);
    }
    void read(size_t array, const ParameterTensor& tensor, float* out) const override {
        Memory::read(out, values_[array] + tensor.offset, tensor.size);
    }
    void write(size_t array, const ParameterTensor& tensor, const float* in) override {
        Memory::write(values_[array] + tensor.offset, in, tensor.size);
    }
    std::string first_nonfinite() const override {
        for (const ParameterTensor& t : table_.tensors)
            for (size_t i = 0; i < names_.size(); i++)
                if (!Memory::finite(values_[i] + t.offset, t.size)) return names_[i] + " of " + t.name;
        return "";
    }

  protected:
    const ParameterTable& table_;
    float* values(size_t array) const { return values_[array]; }  // (table.size)

  private:
    std::vector<std::string> names_;
    std::vector<float*> values_;
    ::MemoryPlan<Memory> plan_;
};
