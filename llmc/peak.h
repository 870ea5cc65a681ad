// The peak of the machine. The log says which share of it a step reaches.
#pragma once
#include <algorithm>
#include <exception>
#include <functional>
#include <utility>

class Peak {
  public:
    // measure() returns the operations per second of a large matrix product, measured now. A measurement is
    // short, so its result may be too low if the machine is busy with something else just then.
    explicit Peak(std::function<double()> measure) : measure_(std::move(measure)), best_(measure_()) {}

    // The share of the peak that `rate` (operations per second) reaches, at most 1. If a step is faster than
    // the peak, that was measured in a bad moment, so it is measured again.
    double share(double rate) {
        if (rate > best_) {
            best_ = rate;
            try {
                best_ = std::max(best_, measure_());
            } catch (const std::exception&) {
                // There is no memory for it besides the model's. A number in the log must not end a run.
            }
        }
        return rate / best_;
    }

  private:
    std::function<double()> measure_;
    double best_;
};
