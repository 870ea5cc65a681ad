// What attention fades by. The functions of this folder take it in place of delta alone.
#pragma once
#include <cstddef>

namespace gpu {

// Nothing, or a factor for each head, or gates: a factor for each token and head.
struct Decay {
    const float* delta = nullptr;  // (H): gamma = sigmoid(delta)
    const float* log_f = nullptr;  // (B,H,T): logarithms of gates (decay_gate.h)

    Decay(const float* delta) : delta(delta) {}
    Decay(std::nullptr_t) {}
    static Decay gate(const float* log_f) {
        Decay decay(nullptr);
        decay.log_f = log_f;
        return decay;
    }
};

}  // namespace gpu
