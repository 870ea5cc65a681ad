// Says which kinds of attention can be computed at linear cost, as a recurrence. Every backend uses it.
#pragma once
#include <type_traits>

#include "llmc/config.h"

// Whether attention of this power has the linear form with some scale. The limit for p = 3 is there because
// the state of a head grows with D^4.
constexpr bool has_linear_form(int power, int D) {
    return power == 1 || power == 2 || (power == 3 && D <= 32);
}
// With an odd power, `sum` divides by absolute values, which are not a polynomial.
constexpr bool has_linear_sum(int power) {
    return power % 2 == 0;
}

// Whether attention of this kind has the linear form.
inline bool has_linear_form(const AttentionConfig& config, int D) {
    return has_linear_form(config.power(), D) && (!config.has_row_sum() || has_linear_sum(config.power()));
}

// Calls f with the power of a kind that has the linear form, as a compile-time constant.
template <class F>
void with_linear_power(AttentionKind kind, F f) {
    with_activation(kind, [&]<class A>(A) {
        if constexpr (has_linear_form(A::kPower, 1)) {
            f(std::integral_constant<int, A::kPower>());
        } else {
            fail("attention: ", kAttentionNames[(int)kind], " has no linear form");
        }
    });
}
