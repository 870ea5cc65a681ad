// The kinds of attention: their names, and their activations, which turn a score x_ij into a weight A_ij.
// This is the only place for both, so a kind that is added here exists in the command line, in config.json
// and in the kernels of both backends.
//
// An activation is a struct of constants and, unless it is online, of functions of a single score:
//
//   kOnline   whether a row's weights depend on all of its scores, so that kernels need a running maximum and
//             sum
//   kPower    p if the activation is x^p, otherwise 0. Kernels give a power q . k instead of the score, and
//             multiply the factor c_i of the row by 1 / sqrt(D)^p
//   value     f(x)
//   slope     f'(x), given x and f(x)
//   weighted  w f(x) and w f'(x) / kSlopeFactor, in the fewest operations
//
// A Number is a float, a double, or on the CPU a vector of floats. `keys` is the number of keys that the row
// sees. Math has exp() and reciprocal() for a Number: ScalarMath here, VectorMath in llmc/cpu/vector.h, or
// DeviceMath in llmc/cuda/common.h. The CPU backend has a copy of its code for each instruction set
// (llmc/cpu/isa.h); because Math is a type of such a copy, the copies of these functions stay apart, too.
#pragma once
#include <cmath>

#include "llmc/error.h"
#include "llmc/host_device.h"

enum class AttentionKind { softmax, poly1, poly2, poly3, poly4, sigmoid };

// The values of --attention and of the key in config.json, in the order of the enumeration.
inline constexpr const char* kAttentionNames[] = {"softmax", "poly1", "poly2", "poly3", "poly4", "sigmoid"};

// Computes x^P by repeated squaring.
template <int P, class Number, class Math>
LLMC_HD inline Number integer_power(Number x, Math math) {
    static_assert(P >= 0);
    if constexpr (P == 0) return Number() + 1.0f;
    if constexpr (P == 1) return x;
    if constexpr (P >= 2) {
        const Number part = integer_power<(P % 2 ? P - 1 : P / 2)>(x, math);
        return part * (P % 2 ? x : part);
    }
}

struct ScalarMath {
    template <class Number>
    Number exp(Number x) const {
        return std::exp(x);
    }
    template <class Number>
    Number reciprocal(Number x) const {
        return 1 / x;
    }
};

// exp(x) in rows that sum to 1.
struct Softmax {
    static constexpr bool kOnline = true;
    static constexpr int kPower = 0;
};

// x^P.
template <int P>
struct Poly {
    static_assert(P >= 1);
    static constexpr bool kOnline = false;
    static constexpr int kPower = P, kSlopeFactor = P;

    template <class Number, class Math>
    LLMC_HD static Number value(Number x, Number /*keys*/, Math math) {
        return integer_power<P>(x, math);
    }
    template <class Number, class Math>
    LLMC_HD static Number slope(Number x, Number /*value*/, Math math) {
        return (float)P * integer_power<P - 1>(x, math);
    }
    template <class Number, class Math>
    LLMC_HD static void weighted(Number& value, Number& slope, Number x, Number w, Number /*keys*/,
                                 Math math) {
        slope = integer_power<P - 1>(x, math) * w;
        value = slope * x;
    }
};

// sigmoid(x - log(i+1)), computed as 1 / (1 + (i+1) exp(-x)), which is also right if exp(-x) overflows. The
// bias -log(i+1) takes the place of a normaliser: with scores of 0 a row adds up to (i+1) / (i+2).
struct Sigmoid {
    static constexpr bool kOnline = false;
    static constexpr int kPower = 0, kSlopeFactor = 1;

    template <class Number, class Math>
    LLMC_HD static Number value(Number x, Number keys, Math math) {
        return math.reciprocal(1.0f + keys * math.exp(-x));
    }
    template <class Number, class Math>
    LLMC_HD static Number slope(Number /*x*/, Number value, Math) {
        return value * (1.0f - value);
    }
    template <class Number, class Math>
    LLMC_HD static void weighted(Number& value, Number& slope, Number x, Number w, Number keys, Math math) {
        const Number unweighted = Sigmoid::value(x, keys, math);
        value = unweighted * w;
        slope = (1.0f - unweighted) * value;
    }
};

// Calls f with the activation of this kind as a type, so that inner loops contain no branch on the kind.
template <class F>
decltype(auto) with_activation(AttentionKind kind, F f) {
    switch (kind) {
        case AttentionKind::softmax:
            return f(Softmax());
        case AttentionKind::poly1:
            return f(Poly<1>());
        case AttentionKind::poly2:
            return f(Poly<2>());
        case AttentionKind::poly3:
            return f(Poly<3>());
        case AttentionKind::poly4:
            return f(Poly<4>());
        case AttentionKind::sigmoid:
            return f(Sigmoid());
    }
    fail("attention: ", (int)kind, " is no kind of attention");
}

// p if the activation is x^p, otherwise 0.
inline int attention_power(AttentionKind kind) {
    return with_activation(kind, []<class A>(A) { return A::kPower; });
}
