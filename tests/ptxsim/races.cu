// ptxsim: which races it finds. Scripts of accesses and barriers run on the device. The same scripts go
// through a checker on the host that forgets nothing, and both must find the same.
#include <cooperative_groups.h>

#include <algorithm>
#include <array>
#include <memory>
#include <random>

#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;
using ptxsim::Fault;
using ptxsim::Report;

namespace {

enum Op {
    plain_read,
    plain_write,
    volatile_read,
    volatile_write,
    atomic,
    warp_barrier,   // for some lanes
    half_barrier,   // for warps 0 and 1 of a block
    block_barrier,  // in each block
    grid_barrier,
};

struct Step {
    Op op;
    int block = 0, warp = 0;
    unsigned lanes = 0;
    int offset = 0, bytes = 4;
};

constexpr int kBlocks = 2, kWarps = 3, kArena = 16;

// Plain accesses are written in PTX, because volatile in C++ would become .volatile in PTX.
template <int bytes>
__device__ void access(const Step& s, unsigned char* at) {
    unsigned a = 7, b, c, d;
    if (s.op == plain_read) {
        if (bytes == 1) asm volatile("ld.u8 %0, [%1];" : "=r"(a) : "l"(at) : "memory");
        if (bytes == 2) asm volatile("{.reg .u16 x; ld.u16 x, [%0];}" ::"l"(at) : "memory");
        if (bytes == 4) asm volatile("ld.u32 %0, [%1];" : "=r"(a) : "l"(at) : "memory");
        if (bytes == 16)
            asm volatile("ld.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                         : "l"(at)
                         : "memory");
    } else {
        if (bytes == 1) asm volatile("st.u8 [%1], %0;" ::"r"(a), "l"(at) : "memory");
        if (bytes == 2) asm volatile("{.reg .u16 x; mov.u16 x, 7; st.u16 [%0], x;}" ::"l"(at) : "memory");
        if (bytes == 4) asm volatile("st.u32 [%1], %0;" ::"r"(a), "l"(at) : "memory");
        if (bytes == 16) asm volatile("st.v4.u32 [%1], {%0,%0,%0,%0};" ::"r"(a), "l"(at) : "memory");
    }
}

__global__ void perform(const Step* steps, int n, unsigned char* global, bool in_shared) {
    __shared__ alignas(16) unsigned char shared[kArena];
    if (threadIdx.x == 0) *(int4*)shared = make_int4(0, 0, 0, 0);
    __syncthreads();
    unsigned char* arena = in_shared ? shared : global;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < n; i++) {
        const Step s = steps[i];
        const bool mine = (int)blockIdx.x == s.block && warp == s.warp && s.lanes >> lane & 1;
        unsigned char* at = arena + s.offset;
        if (s.op == grid_barrier) {
            cooperative_groups::this_grid().sync();
        } else if (s.op == block_barrier) {
            __syncthreads();
        } else if (s.op == half_barrier) {
            if ((int)blockIdx.x == s.block && warp < 2) asm volatile("bar.sync 1, 64;" ::: "memory");
        } else if (!mine) {
        } else if (s.op == warp_barrier) {
            __syncwarp(s.lanes);
        } else if (s.op == volatile_read) {
            (void)*(volatile int*)at;
        } else if (s.op == volatile_write) {
            *(volatile int*)at = 7;
        } else if (s.op == atomic) {
            atomicAdd((int*)at, 1);
        } else if (s.bytes == 1) {
            access<1>(s, at);
        } else if (s.bytes == 2) {
            access<2>(s, at);
        } else if (s.bytes == 4) {
            access<4>(s, at);
        } else {
            access<16>(s, at);
        }
    }
}

using Script = std::vector<Step>;

bool reported(const Script& script, bool in_shared) {
    ptxsim::take_reports();
    Device<Step> steps(script);
    Device<unsigned char> arena{std::vector<unsigned char>(kArena)};
    const Step* s = steps.get();
    int n = (int)script.size();
    unsigned char* a = arena.get();
    void* arguments[] = {&s, &n, &a, &in_shared};
    CUDA_OK(
        cudaLaunchCooperativeKernel((void*)perform, dim3(kBlocks), dim3(32 * kWarps), arguments, 0, nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    const std::vector<Report> reports = ptxsim::take_reports();
    for (const Report& report : reports) CHECK_MESSAGE(report.fault == Fault::race, report.text);
    return !reports.empty();
}

// Knows what happened before what, because every thread has a vector clock.
class Checker {
  public:
    explicit Checker(bool in_shared) : in_shared_(in_shared) {}

    // Whether the access of this step races with an earlier one.
    bool step(const Step& s) {
        bool found = false;
        const int now = (int)script_.size() + 1;
        if (s.op >= warp_barrier) {
            for (int b = 0; b < (s.op == block_barrier ? kBlocks : 1); b++) {
                std::array<int, kThreads> all = {};
                for (bool take : {true, false})
                    for (int t = 0; t < kThreads; t++) {
                        if (!takes_part(s, t) || (s.op == block_barrier && block(t) != b)) continue;
                        known_[t][t] = now;
                        for (int u = 0; u < kThreads; u++)
                            take ? all[u] = std::max(all[u], known_[t][u]) : known_[t][u] = all[u];
                    }
            }
        } else {
            for (int t = 0; t < kThreads; t++)
                if (takes_part(s, t))
                    for (int e = 0; e < now - 1; e++)
                        for (int u = 0; u < kThreads; u++)
                            found |= u != t && takes_part(script_[e], u) && conflict(script_[e], s) &&
                                     known_[t][u] <= e;
        }
        script_.push_back(s);
        return found;
    }

  private:
    static constexpr int kThreads = kBlocks * kWarps * 32;
    static int block(int t) { return t / 32 / kWarps; }
    static bool takes_part(const Step& s, int t) {
        const int warp = t / 32 % kWarps;
        if (s.op == grid_barrier || s.op == block_barrier) return true;
        if (block(t) != s.block) return false;
        return s.op == half_barrier ? warp < 2 : warp == s.warp && s.lanes >> t % 32 & 1;
    }
    bool conflict(const Step& a, const Step& b) const {
        if (a.op >= warp_barrier || (in_shared_ && a.block != b.block)) return false;
        if (a.offset >= b.offset + b.bytes || b.offset >= a.offset + a.bytes) return false;
        auto writes = [](const Step& s) { return s.op != plain_read && s.op != volatile_read; };
        return (writes(a) || writes(b)) && !(a.op >= volatile_read && b.op >= volatile_read);
    }

    bool in_shared_;
    Script script_;
    std::array<std::array<int, kThreads>, kThreads> known_ = {};  // [t][u]: the last step of u before t
};

bool has_race(const Script& script, bool in_shared) {
    auto checker = std::make_unique<Checker>(in_shared);
    bool found = false;
    for (const Step& s : script) found |= checker->step(s);
    return found;
}

std::string shown(const Script& script) {
    const char* names[] = {"read",         "write",        "volatile read", "volatile write", "atomic",
                           "warp barrier", "half barrier", "block barrier", "grid barrier"};
    std::string text;
    for (const Step& s : script) {
        char line[200];
        std::snprintf(line, sizeof line, "\n    %s block %d warp %d lanes %08x: %d bytes at %d", names[s.op],
                      s.block, s.warp, s.lanes, s.bytes, s.offset);
        text += line;
    }
    return text;
}

}  // namespace

// The random scripts have every pattern of reads and writes by one lane, by another lane, by another warp and
// by another block, in several widths. Each runs with the barriers that order it, and without one of them
// (which may have been superfluous). With other seeds a race in global memory may be missed, but rarely: a
// grid barrier is made of atomics, and a thread that leaves it late may see that others have already come to
// the next one, and is then ordered after them.
TEST_CASE("ptxsim: a race is reported where there is one, and nowhere else") {
    WithOptions restore;
    std::mt19937 random(3);
    auto one_of = [&](auto... values) {
        const std::common_type_t<decltype(values)...> all[] = {values...};
        return all[random() % std::size(all)];
    };
    int races = 0, clean = 0;
    auto compare = [&](const Script& script, bool in_shared) {
        const bool expected = has_race(script, in_shared);
        (expected ? races : clean)++;
        CHECK_MESSAGE(reported(script, in_shared) == expected,
                      (in_shared ? "shared memory:" : "global memory:"), shown(script));
    };
    // Lane 31 is ordered before lane 0, through the lanes that take part in both barriers.
    compare({{plain_write, 0, 0, 1u << 31},
             {warp_barrier, 0, 0, 0xFFFFFF00},
             {warp_barrier, 0, 0, 0xFFFF},
             {plain_read, 0, 0, 1}},
            true);
    for (int k = 0; k < 60; k++) {
        ptxsim::options().order =
            one_of(ptxsim::Order::forward, ptxsim::Order::reversed, ptxsim::Order::random);
        ptxsim::options().seed = k;
        const bool in_shared = random() % 2;
        Script script;
        for (int n = 3 + (int)(random() % 8); n > 0; n--) {
            Step s = {one_of(plain_read, plain_read, plain_write, plain_write, volatile_read, volatile_write,
                             atomic)};
            s.block = one_of(0, 0, 1), s.warp = one_of(0, 1, 2);
            s.lanes = one_of(1u, 1u << 5, 1u << 31, 0x21u, 0xFFFFu, ~0u);
            if (s.op <= plain_write) s.bytes = one_of(1, 2, 4, 16);
            s.offset = one_of(0, 0, (int)(random() % kArena)) / s.bytes * s.bytes;
            script.push_back(s);
            for (int tries = 0; has_race(script, in_shared); tries++) {
                Step barrier = {tries == 3 ? grid_barrier
                                           : one_of(warp_barrier, half_barrier, block_barrier, grid_barrier)};
                barrier.block = s.block, barrier.warp = s.warp,
                barrier.lanes = one_of(0xFFFFu, 0xFFFFFF00u, ~0u);
                script.insert(script.end() - 1, barrier);
            }
        }
        compare(script, in_shared);
        for (size_t i = 0; i < script.size(); i++) {
            if (script[i].op < warp_barrier) continue;
            Script without = script;
            without.erase(without.begin() + (ptrdiff_t)i);
            compare(without, in_shared);
        }
    }
    CHECK(races > 50);
    CHECK(clean > 50);
}

namespace {

__global__ void some_return(int* out, bool fixed) {
    __shared__ int flag;
    const int t = threadIdx.x;
    if (t == 0) flag = 0;
    __syncwarp();
    out[t] = flag;
    if (fixed) __syncwarp();
    if (t >= 16) return;
    __syncwarp(0xFFFF);
    if (t == 0) flag = 1;
}

}  // namespace

TEST_CASE("ptxsim: a lane that has returned came to no barrier") {
    Device<int> out(32);
    some_return<<<1, 32>>>(out.get(), true);
    expect_success();
    some_return<<<1, 32>>>(out.get(), false);
    CUDA_OK(cudaDeviceSynchronize());
    const std::vector<Report> reports = ptxsim::take_reports();
    REQUIRE(reports.size() == 1);
    CHECK(reports[0].fault == Fault::race);
}
