// The learning rate at a step.
#pragma once
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "llmc/error.h"

inline const std::vector<std::string> kScheduleNames = {"cosine", "linear", "wsd", "constant"};

// Steps count from 1 to `steps`. The rate rises linearly over `warmup` steps and reaches `peak` at the last
// of them. `constant` stays there. The other schedules go down to final_fraction * peak, which they reach at
// step `steps`: `cosine` along half a cosine wave, `linear` along a line, and `wsd` (warm-up, stable, decay)
// stays at the peak until the last fifth of the run and then goes down along a line.
inline double learning_rate_at(const std::string& schedule, int64_t step, int64_t steps, int64_t warmup,
                               double peak, double final_fraction) {
    if (step <= warmup) return peak * step / warmup;
    if (schedule == "constant") return peak;
    int64_t start = schedule == "wsd" ? std::max(warmup, steps - steps / 5) : warmup;
    if (step <= start) return peak;
    double done = std::min(1.0, (double)(step - start) / std::max<int64_t>(1, steps - start));
    double height = schedule == "cosine" ? 0.5 * (1 + std::cos(3.14159265358979323846 * done)) : 1 - done;
    return peak * (final_fraction + (1 - final_fraction) * height);
}
