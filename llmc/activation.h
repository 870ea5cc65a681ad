// The kinds of attention, in one place: their names and their activations, by which a score x_ij becomes a
// weight A_ij. A kind that is added here is there in the command line, in config.json and in the kernels of
// both backends.
//
// An activation is a struct of constants and, unless it is online, of functions of a single score:
//
//   kOnline   a row's weights depend on all of its scores; the kernels keep a running maximum and sum
//   kPower    p where the activation is x^p, otherwise 0. Kernels give a power q . k instead of the score and
//             put 1 / sqrt(D)^p into the factor c_i of the row
//   value     f(x)
//   slope     f'(x), from x and the value there
//   weighted  w f(x) and w f'(x) in the fewest operations, the latter without the factor kSlopeFactor
//
// A Number is a float or a double, or a vector of floats on the CPU; `keys` is the number of keys that the
// row sees. Math has exp() and reciprocal() for it: ScalarMath here, VectorMath in llmc/cpu/vector.h,
// DeviceMath in llmc/cuda/common.h. It also keeps the copies apart that the CPU backend has for different
// instruction sets (llmc/cpu/isa.h).
#pragma once
#include <cmath>

#include "llmc/error.h"
#include "llmc/host_device.h"

enum class AttentionKind { softmax, poly1, poly2, poly3, poly4, sigmoid };

// The values of --attention and of the key in config.json, in the order of the enumeration.
inline constexpr const char* kAttentionNames[] = {"softmax", "poly1", "poly2", "poly3", "poly4", "sigmoid"};

// x^P, by repeated squaring.
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

// sigmoid(x - log(i+1)), as 1 / (1 + (i+1) exp(-x)), which is right where exp(-x) overflows, too. The bias by
// the row makes up for the sum that is missing: with scores of 0 a row adds up to (i+1) / (i+2).
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

// Calls f with the activation of this kind: inner loops then hold no branch on it.
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

// p of x^p, 0 for what is no power.
inline int attention_power(AttentionKind kind) {
    return with_activation(kind, []<class A>(A) { return A::kPower; });
}
