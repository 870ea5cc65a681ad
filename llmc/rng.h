// Random numbers without state. Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011) maps (seed, stream, index) to bits, so every number is the same on any machine, with any number of
// threads and on every backend.
#pragma once
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

using PhiloxBlock = std::array<uint32_t, 4>;

inline PhiloxBlock philox(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        uint64_t a = 0xD2511F53ull * counter[0], b = 0xCD9E8D57ull * counter[2];
        counter = {(uint32_t)(b >> 32) ^ counter[1] ^ key0, (uint32_t)b,
                   (uint32_t)(a >> 32) ^ counter[3] ^ key1, (uint32_t)a};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// Block `index` of a stream: 128 random bits.
inline PhiloxBlock random_block(uint64_t seed, uint64_t stream, uint64_t index) {
    return philox({(uint32_t)index, (uint32_t)(index >> 32), (uint32_t)stream, (uint32_t)(stream >> 32)},
                  (uint32_t)seed, (uint32_t)(seed >> 32));
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
