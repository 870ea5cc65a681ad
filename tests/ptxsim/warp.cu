// ptxsim: what the lanes of a warp and the threads of a block do together.
#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;

namespace {

// Runs a kernel of (const uint32_t* in, uint32_t* out) that writes `per` results per thread.
std::vector<uint32_t> launch(void (*kernel)(const uint32_t*, uint32_t*), const std::vector<uint32_t>& in,
                             int threads, int per) {
    Device<uint32_t> device_in(in), out(std::vector<uint32_t>(threads * per));
    kernel<<<1, threads>>>(device_in.get(), out.get());
    expect_success();
    return out.host();
}
std::vector<uint32_t> random_words(int n, uint32_t below = 0) {
    std::mt19937 random(n);
    std::vector<uint32_t> all(n);
    for (uint32_t& x : all) x = below ? random() % below : random();
    return all;
}

// ---------------------------------------------------------------------------------------------- shuffles

#define SHUFFLE(mode)                                                \
    asm volatile("{\n\t.reg .pred p;\n\tshfl.sync." mode             \
                 ".b32 %0|p, %2, %3, %4, %5;\n\t"                    \
                 "selp.u32 %1, 1, 0, p;\n\t}"                        \
                 : "=r"(value), "=r"(valid)                          \
                 : "r"(in[lane]), "r"(b), "r"(c), "r"(0xFFFFFFFFu)); \
    *out++ = value, *out++ = valid;

// Every lane has its own b and c: b is in[32 + lane], and c is in[64 + lane].
__global__ void shuffles(const uint32_t* in, uint32_t* out) {
    const int lane = threadIdx.x;
    out += 8 * lane;
    uint32_t value, valid, b = in[32 + lane], c = in[64 + lane];
    SHUFFLE("up")
    SHUFFLE("down")
    SHUFFLE("bfly")
    SHUFFLE("idx")
}

TEST_CASE("ptxsim: shfl.sync of every mode, with widths, clamps and the predicate") {
    int wrong = 0;
    for (int trial = 0; trial < 60; trial++) {
        std::mt19937 random(trial);
        std::vector<uint32_t> in(96);
        for (int i = 0; i < 96; i++) in[i] = random();
        for (int lane = 0; lane < 32; lane++) {
            in[32 + lane] = trial % 2 ? random() % 40 : trial / 2;  // b: only its low 5 bits count
            const uint32_t mask = (32 - (1u << random() % 6)) & 31, clamp = random() % 32;
            in[64 + lane] = trial < 20 ? (trial % 3 ? 0x1F : 0) : mask << 8 | clamp;
        }
        const auto got = launch(shuffles, in, 32, 8);
        for (int lane = 0; lane < 32; lane++)
            for (int mode = 0; mode < 4; mode++) {  // the pseudo code of the ISA
                const int b = in[32 + lane] & 31, cval = in[64 + lane] & 31, mask = in[64 + lane] >> 8 & 31;
                const int max_lane = (lane & mask) | (cval & ~mask), min_lane = lane & mask;
                int j;
                bool valid;
                switch (mode) {
                    case 0:
                        j = lane - b, valid = j >= max_lane;
                        break;
                    case 1:
                        j = lane + b, valid = j <= max_lane;
                        break;
                    case 2:
                        j = lane ^ b, valid = j <= max_lane;
                        break;
                    default:
                        j = min_lane | (b & ~mask), valid = j <= max_lane;
                        break;
                }
                if (!valid) j = lane;
                wrong += got[8 * lane + 2 * mode] != in[j] || got[8 * lane + 2 * mode + 1] != valid;
            }
    }
    CHECK(wrong == 0);
}

__global__ void shuffles_of_cuda(const uint32_t* in, uint32_t* out) {
    const int lane = threadIdx.x % 32;
    const uint32_t x = in[threadIdx.x];
    out += 8 * threadIdx.x;
    out[0] = __shfl_sync(0xFFFFFFFF, x, lane * 7 + 3);
    out[1] = __shfl_up_sync(0xFFFFFFFF, x, 3, 8);
    out[2] = __shfl_down_sync(0xFFFFFFFF, x, 5, 16);
    out[3] = __shfl_xor_sync(0xFFFFFFFF, x, 6, 4);
    const uint64_t wide = __shfl_xor_sync(0xFFFFFFFF, (unsigned long long)x << 20 | lane, 16);
    out[4] = (uint32_t)(wide ^ wide >> 32);
    out[5] = __float_as_uint(__shfl_sync(0xFFFFFFFF, __uint_as_float(x), 2, 8));
    out[6] = 0;
    if (lane % 3 == 0) out[6] = __shfl_sync(0x49249249, x, (lane + 3) % 33);  // lanes 0, 3, 6, ...
    out[7] = __shfl_up_sync(0xFFFFFFFF, x, 1);
}

TEST_CASE("ptxsim: CUDA's shuffles") {
    const auto in = random_words(64);
    const auto got = launch(shuffles_of_cuda, in, 64, 8);
    int wrong[8] = {};
    for (int t = 0; t < 64; t++) {
        const int lane = t % 32;
        const uint32_t* x = &in[t - lane];
        const uint32_t* out = &got[8 * t];
        wrong[0] += out[0] != x[(lane * 7 + 3) % 32];
        wrong[1] += out[1] != x[lane % 8 < 3 ? lane : lane - 3];
        wrong[2] += out[2] != x[lane % 16 + 5 < 16 ? lane + 5 : lane];
        // A lane cannot read from a later group of four lanes, but from an earlier group it can.
        wrong[3] += out[3] != x[(lane ^ 6) <= (lane | 3) ? lane ^ 6 : lane];
        const uint64_t wide = (uint64_t)x[lane ^ 16] << 20 | (lane ^ 16);
        wrong[4] += out[4] != (uint32_t)(wide ^ wide >> 32);
        wrong[5] += out[5] != x[lane / 8 * 8 + 2];
        wrong[6] += out[6] != (lane % 3 ? 0 : x[(lane + 3) % 33]);
        wrong[7] += out[7] != x[lane ? lane - 1 : 0];
    }
    for (int i = 0; i < 8; i++) CHECK_MESSAGE(wrong[i] == 0, i);
}

// ---------------------------------------------------------------------------------- votes, matches, sums

__global__ void votes(const uint32_t* in, uint32_t* out) {
    const int t = threadIdx.x, lane = t % 32;
    const uint32_t x = in[t];
    out += 16 * t;
    out[0] = __ballot_sync(0xFFFFFFFF, x & 1);
    out[1] = __any_sync(0xFFFFFFFF, x == 5) != 0;
    out[2] = __all_sync(0xFFFFFFFF, x < 30) != 0;
    asm volatile(
        "{\n\t.reg .pred p, q;\n\tsetp.lt.u32 p, %1, 32;\n\tvote.sync.uni.pred q, p, 0xffffffff;\n\t"
        "selp.u32 %0, 1, 0, q;\n\t}"
        : "=r"(out[3])
        : "r"(x));
    out[4] = __match_any_sync(0xFFFFFFFF, x);
    int all;
    out[5] = __match_all_sync(0xFFFFFFFF, x / 64, &all);
    out[6] = all;
    out[7] = __match_all_sync(0xFFFFFFFF, (unsigned long long)(x & 1) << 40, &all);
    out[8] = all;
    out[9] = (uint32_t)__match_any_sync(0xFFFFFFFF, (unsigned long long)(x % 4) << 33);
    out[10] = __reduce_add_sync(0xFFFFFFFF, x * 0x10000001u);
    out[11] = (uint32_t)__reduce_min_sync(0xFFFFFFFF, (int)x - 16);
    out[12] = __reduce_max_sync(0xFFFFFFFF, x - 16);
    out[13] = __reduce_and_sync(0xFFFFFFFF, x | 0xF0) << 16 | __reduce_or_sync(0xFFFFFFFF, x);
    out[14] = __reduce_xor_sync(0xFFFFFFFF, x);
    out[15] = 0;
    if (lane & 1)
        out[15] = __reduce_max_sync(0xAAAAAAAA, x) << 16 | (__ballot_sync(0xAAAAAAAA, x & 2) & 0xFFFF);
}

TEST_CASE("ptxsim: vote, match and redux") {
    for (uint32_t below : {2u, 6u, 30u, 33u, 40u}) {
        CAPTURE(below);
        std::vector<uint32_t> in = random_words(96, below);
        if (below == 2) std::fill(in.begin() + 32, in.begin() + 64, 1);
        const auto got = launch(votes, in, 96, 16);
        std::vector<int> wrong(16);
        for (int t = 0; t < 96; t++) {
            const uint32_t *x = &in[t / 32 * 32], *out = &got[16 * t];
            uint32_t e[16] = {}, land = ~0u, lor = 0, most = 0, odd = 0, umax = 0;
            int smin = INT32_MAX, small = 0;
            e[2] = 1;
            for (uint32_t i = 0; i < 32; i++) {
                e[0] |= (x[i] & 1) << i;
                e[1] |= x[i] == 5;
                e[2] &= x[i] < 30;
                small += x[i] < 32;
                e[4] |= (uint32_t)(x[i] == in[t]) << i;
                e[9] |= (uint32_t)(x[i] % 4 == in[t] % 4) << i;
                e[10] += x[i] * 0x10000001u;
                smin = std::min(smin, (int)x[i] - 16);
                umax = std::max(umax, x[i] - 16);
                land &= x[i] | 0xF0;
                lor |= x[i];
                e[14] ^= x[i];
                if (i & 1) most = std::max(most, x[i]), odd |= (x[i] >> 1 & 1) << i;
            }
            e[3] = small == 0 || small == 32;
            e[5] = ~0u, e[6] = 1;  // all are below 64
            e[8] = e[0] == 0 || e[0] == ~0u;
            e[7] = e[8] ? ~0u : 0;
            e[11] = (uint32_t)smin, e[12] = umax;
            e[13] = land << 16 | lor;
            e[15] = t & 1 ? most << 16 | (odd & 0xFFFF) : 0;
            for (int i = 0; i < 16; i++) wrong[i] += out[i] != e[i];
        }
        for (int i = 0; i < 16; i++) CHECK_MESSAGE(wrong[i] == 0, i);
    }
}

__global__ void lanes_of_branch(const uint32_t*, uint32_t* out) {  // activemask gives the lanes in the branch
    const int lane = threadIdx.x;
    uint32_t mask = 0;
    if (lane >= 5 && lane < 21) {
        mask = __activemask();
        const int leader = __ffs(mask) - 1;
        out[3 * lane + 1] = lane == leader;
        unsigned less, equal;
        asm volatile("mov.u32 %0, %%lanemask_lt;\n\tmov.u32 %1, %%lanemask_eq;" : "=r"(less), "=r"(equal));
        out[3 * lane + 2] = less * 2 + equal;
    }
    out[3 * lane] = mask;
}

TEST_CASE("ptxsim: activemask and lane masks in a branch") {
    const auto got = launch(lanes_of_branch, random_words(32), 32, 3);
    int wrong = 0;
    for (int lane = 0; lane < 32; lane++) {
        const bool in = lane >= 5 && lane < 21;
        // The hardware may choose which lanes of a branch are active together, but all of them took the
        // branch, and this lane is one of them.
        wrong += in ? (got[3 * lane] & ~0x1FFFE0u) != 0 || !(got[3 * lane] >> lane & 1) : got[3 * lane] != 0;
        if (in) wrong += got[3 * lane + 2] != ((1u << lane) - 1) * 2 + (1u << lane);
    }
    CHECK(wrong == 0);
    CHECK(got[3 * 5] == 0x1FFFE0u);  // in ptxsim all lanes of the branch are active together
    CHECK(got[3 * 5 + 1] == 1);
}

// --------------------------------------------------------------------------------------------- divergence

__global__ void divergence(const uint32_t* in, uint32_t* out) {
    const int t = threadIdx.x;
    const uint32_t x = in[t];
    uint32_t sum = 0;
    for (uint32_t i = 0; i < x % 23; i++) {  // each lane has its own number of iterations
        if (i % 2) {
            if (x & 4) {
                sum += i;
                continue;
            }
            sum ^= x >> i;
        } else if (i == 14) {
            break;
        } else {
            for (uint32_t j = i; j < (x >> 8) % 7; j++) sum = sum * 3 + j;
        }
    }
    if (x % 11 == 3) {
        out[t] = sum + 1;
        return;  // early, for some lanes
    }
    switch (x % 9) {
        case 0:
            sum += 5;
            break;
        case 1:
            sum *= 7;
            [[fallthrough]];
        case 2:
            sum ^= 0xFF;
            break;
        case 3:
            sum -= x;
            break;
        case 4:
            sum = ~sum;
            break;
        case 5:
            sum <<= 3;
            break;
        case 7:
            sum >>= 2;
            break;
        default:
            sum += 1000;
    }
    out[t] = sum;
}
uint32_t diverged(uint32_t x) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < x % 23; i++) {
        if (i % 2) {
            if (x & 4) {
                sum += i;
                continue;
            }
            sum ^= x >> i;
        } else if (i == 14) {
            break;
        } else {
            for (uint32_t j = i; j < (x >> 8) % 7; j++) sum = sum * 3 + j;
        }
    }
    if (x % 11 == 3) return sum + 1;
    switch (x % 9) {
        case 0:
            return sum + 5;
        case 1:
            return (sum * 7) ^ 0xFF;
        case 2:
            return sum ^ 0xFF;
        case 3:
            return sum - x;
        case 4:
            return ~sum;
        case 5:
            return sum << 3;
        case 7:
            return sum >> 2;
        default:
            return sum + 1000;
    }
}

TEST_CASE("ptxsim: nested divergence, loops of different length, switches and early exits") {
    const auto in = random_words(1000);
    const auto got = launch(divergence, in, 1000, 1);
    int wrong = 0;
    for (size_t i = 0; i < in.size(); i++) wrong += got[i] != diverged(in[i]);
    CHECK(wrong == 0);
}

// The halves of a warp take different branches. Within its half, each lane meets the others at bar.warp.sync
// and exchanges words with them.
__global__ void sync_in_branches(const uint32_t* in, uint32_t* out) {
    __shared__ uint32_t words[32];
    const int lane = threadIdx.x;
    words[lane] = in[lane];
    __syncwarp();
    uint32_t x = 0;
    if (lane < 16) {
        for (int step = 1; step < 16; step *= 2) {
            x += words[lane ^ step];
            __syncwarp(0xFFFF);
            words[lane] = x;
            __syncwarp(0xFFFF);
        }
    } else {
        x = words[47 - lane];
        __syncwarp(0xFFFF0000);
        words[lane] = x + 1;
        __syncwarp(0xFFFF0000);
        x = words[lane == 31 ? 16 : lane + 1];
    }
    __syncwarp();
    out[lane] = x + words[lane ^ 16];
}

TEST_CASE("ptxsim: bar.warp.sync in divergent code") {
    const auto in = random_words(32);
    const auto got = launch(sync_in_branches, in, 32, 1);
    std::vector<uint32_t> words = in, x(32);
    for (int step = 1; step < 16; step *= 2) {
        for (int l = 0; l < 16; l++) x[l] += words[l ^ step];
        for (int l = 0; l < 16; l++) words[l] = x[l];
    }
    for (int l = 16; l < 32; l++) words[l] = in[47 - l] + 1;
    for (int l = 16; l < 32; l++) x[l] = words[l == 31 ? 16 : l + 1];
    int wrong = 0;
    for (int l = 0; l < 32; l++) wrong += got[l] != x[l] + words[l ^ 16];
    CHECK(wrong == 0);
}

// A spin lock for each lane. It ends only if the lane that holds the lock goes on while others of its warp
// wait.
__global__ void lock_by_lane(uint32_t* lock, uint32_t* counter) {
    bool done = false;
    while (!done) {
        if (atomicCAS(lock, 0, 1) == 0) {
            __threadfence();
            *(volatile uint32_t*)counter = *(volatile uint32_t*)counter + 1;
            __threadfence();
            atomicExch(lock, 0);
            done = true;
        }
    }
}

TEST_CASE("ptxsim: a spin lock within and between warps") {
    Device<uint32_t> memory(std::vector<uint32_t>(2));
    lock_by_lane<<<2, 96>>>(memory.get(), memory.get() + 1);
    expect_success();
    CHECK(memory.host()[1] == 192);
    CHECK(memory.host()[0] == 0);
}

// ------------------------------------------------------------------------------------------ block barriers

__global__ void block_votes(const uint32_t* in, uint32_t* out) {
    const int t = threadIdx.x;
    const uint32_t x = in[t];
    out[3 * t] = __syncthreads_count(x % 3 == 0);
    out[3 * t + 1] = __syncthreads_and(x < 1000) != 0;
    out[3 * t + 2] = __syncthreads_or(x == 77) != 0;
}

TEST_CASE("ptxsim: bar.red") {
    for (uint32_t below : {1000u, 1010u}) {
        const auto in = random_words(200, below);  // the last warp is not full
        const auto got = launch(block_votes, in, 200, 3);
        uint32_t count = 0, all = 1, any = 0;
        for (uint32_t x : in) count += x % 3 == 0, all &= x < 1000, any |= x == 77;
        int wrong = 0;
        for (int t = 0; t < 200; t++)
            wrong += got[3 * t] != count || got[3 * t + 1] != all || got[3 * t + 2] != any;
        CHECK(wrong == 0);
    }
}

// Warps 0 and 1 produce words, which warps 2 and 3 take. They use two barriers, full (1) and empty (2), with
// arrive and sync.
__global__ void producers(const uint32_t* in, uint32_t* out) {
    __shared__ uint32_t words[64];
    const int t = threadIdx.x;
    if (t < 64) {
        for (int i = 0; i < 5; i++) {
            if (i) asm volatile("bar.sync 2, 128;" ::: "memory");
            words[t] = in[t] * (i + 1);
            __threadfence_block();
            asm volatile("bar.arrive 1, 128;" ::: "memory");
        }
        out[t] = t;
    } else {
        uint32_t sum = 0;
        for (int i = 0; i < 5; i++) {
            asm volatile("bar.sync 1, 128;" ::: "memory");
            sum += words[127 - t] << i;
            if (i < 4) asm volatile("bar.arrive 2, 128;" ::: "memory");
        }
        asm volatile("barrier.sync %0, 64;" ::"r"(3) : "memory");  // only these two warps
        out[t] = sum;
    }
}

TEST_CASE("ptxsim: named barriers, arrive and sync") {
    const auto in = random_words(64);
    const auto got = launch(producers, in, 128, 1);
    int wrong = 0;
    for (int t = 0; t < 128; t++) {
        uint32_t expected = t;
        if (t >= 64) {
            expected = 0;
            for (int i = 0; i < 5; i++) expected += (in[127 - t] * (i + 1)) << i;
        }
        wrong += got[t] != expected;
    }
    CHECK(wrong == 0);
}

__global__ void indices(uint32_t* out) {
    const uint32_t t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const uint32_t b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    uint32_t lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    out[b * blockDim.x * blockDim.y * blockDim.z + t] = b << 16 | t << 5 | lane;
    if (lane != t % 32) out[0] = 0xFFFFFFFF;
}

TEST_CASE("ptxsim: three dimensions of blocks and threads") {
    const int threads = 5 * 7 * 3, blocks = 3 * 4 * 2;
    Device<uint32_t> out(threads * blocks);
    indices<<<dim3(3, 4, 2), dim3(5, 7, 3)>>>(out.get());
    expect_success();
    const auto got = out.host();
    int wrong = 0;
    for (int b = 0; b < blocks; b++)
        for (int t = 0; t < threads; t++)
            wrong += got[b * threads + t] != (uint32_t)(b << 16 | t << 5 | t % 32);
    CHECK(wrong == 0);
}

}  // namespace
