// llmc/rng.h on the device: the same bits.
#pragma once
#include <cstdint>

namespace gpu {

// Block `index` of a stream: 128 random bits (Philox4x32-10).
__device__ inline uint4 random_block(uint64_t seed, uint64_t stream, uint64_t index) {
    uint4 x = {(uint32_t)index, (uint32_t)(index >> 32), (uint32_t)stream, (uint32_t)(stream >> 32)};
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * x.x, b = (uint64_t)0xCD9E8D57u * x.z;
        x = {(uint32_t)(b >> 32) ^ x.y ^ key0, (uint32_t)b, (uint32_t)(a >> 32) ^ x.w ^ key1, (uint32_t)a};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return x;
}

}  // namespace gpu
