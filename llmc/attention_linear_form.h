// Which kinds of attention can be computed at linear cost, as a recurrence; shared by every backend.
#pragma once
#include "llmc/config.h"

// Whether attention of this kind has the linear form. For p = 3 the state of a head grows with D^4.
inline bool has_linear_form(const AttentionConfig& config, int D) {
    bool small = config.power == 1 || config.power == 2 || (config.power == 3 && D <= 32);
    return small && !(config.has_row_sum() && config.power % 2 == 1);
}
