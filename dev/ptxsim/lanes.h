// Registers of a warp as arrays of 32 lanes, and loops over them that the compiler vectorises.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "dev/ptxsim/warp.h"

namespace ptxsim {

// Writes `values` to d in the lanes of `lanes`. `values` may have been computed from d.
template <class T>
inline void put(T* d, const T* values, Mask lanes) {
    if (lanes == kAllLanes) {
        memcpy(d, values, sizeof(T) * kWarpSize);
    } else {
        for (Mask rest = lanes; rest; rest &= rest - 1) {
            int i = __builtin_ctz(rest);
            d[i] = values[i];
        }
    }
}

// Makes a predicate from 32 bytes, one per lane, each of which is 0 or 1.
inline Mask pack(const uint8_t* bytes) {
    return (Mask)_mm256_movemask_epi8(_mm256_slli_epi16(_mm256_loadu_si256((const __m256i*)bytes), 7));
}

inline void put_predicate(Warp& w, int32_t place, Mask value, Mask lanes) {
    if (place == kIgnored) return;
    Mask* d = w.reg<Mask>(place);
    *d = (*d & ~lanes) | (value & lanes);
}

template <class F>
inline void each(Mask lanes, F f) {
    for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

// D = F(S...) lane by lane. F is also called for lanes that are not active; its result is then dropped.
template <class F, class D, class... S>
void map_lanes(Warp& w, const Instruction& in, Mask lanes) {
    [&]<size_t... k>(std::index_sequence<k...>) {
        alignas(64) D values[kWarpSize];
        auto run = [&](const S* __restrict... s) {
            for (int i = 0; i < kWarpSize; i++) values[i] = F()(s[i]...);
        };
        run(w.src<S>(in.o[1 + k])...);
        put(w.reg<D>(in.o[0]), values, lanes);
    }
    (std::index_sequence_for<S...>());
}

}  // namespace ptxsim
