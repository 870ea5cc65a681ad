// A few neighbouring numbers in the registers of a thread, as floats whatever they are in memory.
#pragma once
#include "llmc/cuda/common.h"

namespace gpu {

// One number, or as many as fill one or more packs of Real.
template <class Real, int kWidth>
__device__ void load_floats(float (&x)[kWidth], const Real* at) {
    if constexpr (kWidth == 1) {
        x[0] = to_float(*at);
    } else {
        constexpr int kPack = Pack<Real>::size;
        static_assert(kWidth % kPack == 0);
#pragma unroll
        for (int p = 0; p < kWidth; p += kPack) {
            Pack<Real> pack = load_pack(at + p);
#pragma unroll
            for (int i = 0; i < kPack; i++) x[p + i] = to_float(pack[i]);
        }
    }
}

template <class Real, int kWidth>
__device__ void store_floats(Real* at, const float (&x)[kWidth]) {
    if constexpr (kWidth == 1) {
        *at = from_float<Real>(x[0]);
    } else {
        constexpr int kPack = Pack<Real>::size;
        static_assert(kWidth % kPack == 0);
#pragma unroll
        for (int p = 0; p < kWidth; p += kPack) {
            Pack<Real> pack;
#pragma unroll
            for (int i = 0; i < kPack; i++) pack[i] = from_float<Real>(x[p + i]);
            store_pack(at + p, pack);
        }
    }
}

// Whether rows of n numbers, one after another from each of these addresses, can be read in packs.
template <class Real, class... Pointers>
bool in_packs(int n, const Pointers*... at) {
    return n % Pack<Real>::size == 0 && (((uintptr_t)at % 16 == 0) && ...);
}

}  // namespace gpu
