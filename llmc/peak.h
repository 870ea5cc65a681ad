// The machine's peak, of which the log gives the share that a step reaches.
#pragma once
#include <algorithm>
#include <exception>
#include <functional>
#include <utility>

class Peak {
  public:
    // measure: operations a second of a large matrix product, now. It takes moments, and in such a moment the
    // machine may have been busy with something else.
    explicit Peak(std::function<double()> measure) : measure_(std::move(measure)), best_(measure_()) {}

    // Of `rate`, in operations a second: at most 1. A step that is faster than the peak shows that the peak
    // was measured in a bad moment, so it is measured again.
    double share(double rate) {
        if (rate > best_) {
            best_ = rate;
            try {
                best_ = std::max(best_, measure_());
            } catch (const std::exception&) {
                // There is no memory for it beside the model. A figure of the log must not end a run.
            }
        }
        return rate / best_;
    }

  private:
    std::function<double()> measure_;
    double best_;
};
