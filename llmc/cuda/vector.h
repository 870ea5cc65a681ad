// Vector loads: neighbouring numbers, up to 16 bytes in one access.
//
// Arrays that kernels read in this way begin at 16-byte addresses (all buffers of MemoryPlan do). If the
// length of a row is not a multiple of the access, kernels read it element by element.
#pragma once
#include "llmc/cuda/common.h"

namespace gpu {

// N numbers as they are in memory, which are read and written at once. They have 16 bytes unless N says less.
template <class T, int N = 16 / sizeof(T)>
struct alignas(N * sizeof(T)) Pack {
    static constexpr int size = N;
    T values[N];
    __device__ T& operator[](int i) { return values[i]; }
    __device__ const T& operator[](int i) const { return values[i]; }
};

template <class T>
__device__ Pack<T> load_pack(const T* at) {
    return *reinterpret_cast<const Pack<T>*>(at);
}
template <class T>
__device__ void store_pack(T* at, const Pack<T>& pack) {
    *reinterpret_cast<Pack<T>*>(at) = pack;
}

// N numbers in the registers of a thread. They are floats, whatever they are in memory. Vec<N>{} is zero; a
// Vec<N> without the braces begins with no particular value.
template <int N>
struct Vec {
    float values[N];
    __device__ float& operator[](int i) { return values[i]; }
    __device__ const float& operator[](int i) const { return values[i]; }
};

// What is read in one access of N numbers of T.
template <int N, class T>
using PackOf = Pack<T, (N * sizeof(T) <= 16 ? N : 16 / sizeof(T))>;
// The type for that access: a number or vector of the machine, because the compiler splits some accesses of
// structs, such as the store of four bf16.
template <class P>
using AccessOf = std::conditional_t<sizeof(P) == 16, uint4, std::conditional_t<sizeof(P) == 8, uint2, P>>;

// N numbers from an address that is a multiple of their size, or of 16 bytes if their size is larger.
template <int N, class T>
__device__ Vec<N> load_vec(const T* at) {
    using Part = PackOf<N, T>;
    static_assert(N % Part::size == 0);
    Vec<N> x{};
#pragma unroll
    for (int p = 0; p < N; p += Part::size) {
        auto bits = *reinterpret_cast<const AccessOf<Part>*>(at + p);
        const Part& pack = reinterpret_cast<const Part&>(bits);
#pragma unroll
        for (int i = 0; i < Part::size; i++) x[p + i] = to_float(pack[i]);
    }
    return x;
}
template <int N, class T>
__device__ void store_vec(T* at, const Vec<N>& x) {
    using Part = PackOf<N, T>;
    static_assert(N % Part::size == 0);
#pragma unroll
    for (int p = 0; p < N; p += Part::size) {
        AccessOf<Part> bits;
        Part& pack = reinterpret_cast<Part&>(bits);
#pragma unroll
        for (int i = 0; i < Part::size; i++) pack[i] = from_float<T>(x[p + i]);
        *reinterpret_cast<AccessOf<Part>*>(at + p) = bits;
    }
}

// The first `count` of N numbers, or all of them if there are more. The rest are 0.
template <int N, class T>
__device__ Vec<N> load_vec(const T* at, size_t count) {
    if (count >= N) return load_vec<N>(at);
    Vec<N> x{};
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = i < count ? to_float(at[i]) : 0.0f;
    return x;
}
template <int N, class T>
__device__ void store_vec(T* at, const Vec<N>& x, size_t count) {
    if (count >= N) return store_vec(at, x);
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < count) at[i] = from_float<T>(x[i]);
}

// Whether rows of n numbers, one after another from each of these addresses, can be read in packs.
template <class Real, class... Pointers>
bool in_packs(int n, const Pointers*... at) {
    return n % Pack<Real>::size == 0 && (((uintptr_t)at % 16 == 0) && ...);
}

}  // namespace gpu
