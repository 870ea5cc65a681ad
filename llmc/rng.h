// Random numbers without state. Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011) maps (seed, stream, index) to bits, so every number is the same on any machine, with any number of
// threads and on every backend.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "llmc/host_device.h"

struct PhiloxBlock {
    uint32_t words[4];
    LLMC_HD uint32_t operator[](int i) const { return words[i]; }
    bool operator==(const PhiloxBlock&) const = default;
};

// Block `index` of a stream: 128 random bits.
LLMC_HD inline PhiloxBlock random_block(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t x0 = (uint32_t)index, x1 = (uint32_t)(index >> 32);
    uint32_t x2 = (uint32_t)stream, x3 = (uint32_t)(stream >> 32);
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * x0, b = (uint64_t)0xCD9E8D57u * x2;
        x0 = (uint32_t)(b >> 32) ^ x1 ^ key0;
        x1 = (uint32_t)b;
        x2 = (uint32_t)(a >> 32) ^ x3 ^ key1;
        x3 = (uint32_t)a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{x0, x1, x2, x3}};
}

// Uniform in [0, 1).
inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    PhiloxBlock bits = random_block(seed, stream, index);
    return ((((uint64_t)bits[1] << 32) | bits[0]) >> 11) * 0x1p-53;
}

// The number of the stream that has this name, such as the name of a tensor (FNV-1a).
inline uint64_t random_stream(std::string_view name) {
    uint64_t hash = 0xCBF29CE484222325ull;
    for (unsigned char c : name) hash = (hash ^ c) * 0x100000001B3ull;
    return hash;
}

// out (n) ~ N(0, std^2), by Box and Muller's method. It is computed in double, so that the last bits, in
// which math libraries differ, disappear when the result is rounded to float.
inline void fill_normal(float* out, size_t n, double std, uint64_t seed, uint64_t stream) {
#pragma omp parallel for schedule(static)
    for (size_t block = 0; block < (n + 3) / 4; block++) {
        PhiloxBlock bits = random_block(seed, stream, block);
        for (int pair = 0; pair < 2; pair++) {
            double radius = std * std::sqrt(-2 * std::log((bits[2 * pair] + 0.5) * 0x1p-32));
            double angle = 6.283185307179586477 * bits[2 * pair + 1] * 0x1p-32;
            size_t i = 4 * block + 2 * pair;
            if (i < n) out[i] = (float)(radius * std::cos(angle));
            if (i + 1 < n) out[i + 1] = (float)(radius * std::sin(angle));
        }
    }
}
