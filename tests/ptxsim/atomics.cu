// ptxsim: atom and red of every operation and type, in global and shared memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;

namespace {

// The atomic operations of a type. Each of the kOps operations has its own element. The final values that are
// checked do not depend on the order of the threads.
constexpr int kOps = 10;

template <class T>
__device__ void operate(T* place, T x, T* old) {
    // CUDA has some of them only for unsigned numbers.
    using P = std::conditional_t<sizeof(T) == 8, unsigned long long, T>;
    old[0] = atomicAdd((P*)place, (P)x);
    atomicMin(place + 1, x);
    atomicMax(place + 2, x);
    atomicAnd(place + 3, x | (T)0x5A);
    atomicOr(place + 4, x & (T)0xFFFFF00);
    atomicXor(place + 5, x);
    old[1] = atomicExch((P*)place + 6, (P)x);
    P before, seen = 0;  // a sum by compare and swap
    do {
        before = seen;
        seen = atomicCAS((P*)place + 7, before, before + (P)x);
    } while (seen != before);
    if constexpr (sizeof(T) == 4 && std::is_unsigned_v<T>) {
        old[2] = atomicInc(place + 8, 17);
        old[3] = atomicDec(place + 9, 17);
    }
}

template <class T>
__global__ void atomics_global(const T* in, T* places, T* old) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    operate(places, in[i], old + 4 * i);
}
template <class T>
__global__ void atomics_shared(const T* in, T* places, T* old) {
    __shared__ T shared[kOps];
    if (threadIdx.x < kOps) shared[threadIdx.x] = places[threadIdx.x];
    __syncthreads();
    operate(shared, in[threadIdx.x], old + 4 * threadIdx.x);
    __syncthreads();
    if (threadIdx.x < kOps) places[threadIdx.x] = shared[threadIdx.x];
}

template <class T>
void check_atomics(bool shared) {
    CAPTURE(shared);
    CAPTURE(sizeof(T));
    const int n = shared ? 160 : 640;
    std::vector<T> in = inputs<T>(1, 3, n), places(kOps), old(4 * n);
    places[1] = 50, places[2] = 50, places[3] = (T)-1, places[6] = 12345;
    Device<T> device_in(in), device_places(places), device_old(old);
    if (shared)
        atomics_shared<T><<<1, n>>>(device_in.get(), device_places.get(), device_old.get());
    else
        atomics_global<T><<<n / 128, 128>>>(device_in.get(), device_places.get(), device_old.get());
    expect_success();
    T sum = 0, least = 50, most = 50, all = (T)-1, any = 0, odd = 0;
    using U = std::make_unsigned_t<T>;
    for (T x : in) {
        sum = (T)((U)sum + (U)x);
        least = std::min(least, x), most = std::max(most, x);
        all &= x | (T)0x5A, any |= x & (T)0xFFFFF00, odd ^= x;
    }
    const auto got = device_places.host();
    old = device_old.host();
    const T expected[6] = {sum, least, most, all, any, odd};
    for (int i = 0; i < 6; i++) CHECK_MESSAGE(got[i] == expected[i], i);
    CHECK(got[7] == sum);
    // Exchanges lose no value: what came out, and the final value, is what went in, and the first value.
    std::vector<T> went_in = in, came_out = {got[6]};
    went_in.push_back(12345);
    for (int i = 0; i < n; i++) came_out.push_back(old[4 * i + 1]);
    std::sort(went_in.begin(), went_in.end());
    std::sort(came_out.begin(), came_out.end());
    CHECK(went_in == came_out);
    // An old sum plus what its thread added is the old sum of another thread, or the final sum.
    std::vector<U> before, after;
    for (int i = 0; i < n; i++) before.push_back(old[4 * i]), after.push_back((U)old[4 * i] + (U)in[i]);
    before.push_back(sum), after.push_back(0);
    std::sort(before.begin(), before.end());
    std::sort(after.begin(), after.end());
    CHECK(before == after);
    if constexpr (sizeof(T) == 4 && std::is_unsigned_v<T>) {
        std::vector<T> up(18), down(18);
        for (int i = 0; i < n; i++) {
            REQUIRE(old[4 * i + 2] < 18);
            REQUIRE(old[4 * i + 3] < 18);
            up[old[4 * i + 2]]++, down[old[4 * i + 3]]++;
        }
        CHECK(got[8] == (T)n % 18);              // 0, 1, ..., 17, 0, ...
        CHECK(got[9] == (18 - (T)n % 18) % 18);  // 0, 17, ..., 1, 0, ...
        for (int v = 0; v < 18; v++) CHECK(up[v] == (T)(n / 18 + (v < n % 18)));
        for (int v = 0; v < 18; v++) CHECK(down[v] == (T)(n / 18 + ((18 - v) % 18 < n % 18)));
    }
}

TEST_CASE("ptxsim: atomics of 32 and 64 bits") {
    for (bool shared : {false, true}) {
        check_atomics<int>(shared);
        check_atomics<unsigned>(shared);
        check_atomics<unsigned long long>(shared);
        check_atomics<long long>(shared);
    }
}

// The forms that PTX has of atom and red: with words for order and scope, and with generic addresses.
__global__ void forms(uint32_t* words, uint64_t* wide, int* out) {
    uint32_t* w = words;
    const uint32_t t = threadIdx.x;
    asm volatile("red.global.add.u32 [%0], %1;" ::"l"(w), "r"(t) : "memory");
    asm volatile("red.relaxed.gpu.global.max.u32 [%0], %1;" ::"l"(w + 1), "r"(t) : "memory");
    asm volatile("red.add.u32 [%0+8], %1;" ::"l"(w), "r"(1) : "memory");
    asm volatile("red.global.min.s32 [%0], %1;" ::"l"(w + 3), "r"((int)t - 50) : "memory");
    asm volatile("red.release.sys.global.or.b32 [%0], %1;" ::"l"(w + 4), "r"(1u << t % 32) : "memory");
    asm volatile("red.global.add.u64 [%0], %1;" ::"l"(wide), "l"((uint64_t)t << 32) : "memory");
    asm volatile("red.global.max.s64 [%0], %1;" ::"l"(wide + 1), "l"((int64_t)t - 1000) : "memory");
    uint32_t old;
    uint64_t old64;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(w + 5), "r"(2) : "memory");
    asm volatile("atom.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(old64)
                 : "l"(wide + 2), "l"((uint64_t)0), "l"((uint64_t)t + 1)
                 : "memory");
    asm volatile("fence.acq_rel.gpu;\n\tfence.sc.sys;\n\tmembar.cta;" ::: "memory");
    unsigned short before, one = 1;
    asm volatile("atom.global.cas.b16 %0, [%1], %2, %3;"
                 : "=h"(before)
                 : "l"((unsigned short*)(w + 6) + 1), "h"((unsigned short)0), "h"(one)
                 : "memory");
    out[t] = old % 2 == 0 && old < 128 && (before == 0 || before == 1) && (old64 == 0 || old64 <= 64);
}

TEST_CASE("ptxsim: forms of atom and red") {
    Device<uint32_t> words(std::vector<uint32_t>(8));
    Device<uint64_t> wide(std::vector<uint64_t>{0, (uint64_t)-5000, 0});
    Device<int> out(64);
    forms<<<1, 64>>>(words.get(), wide.get(), out.get());
    expect_success();
    const auto got = words.host();
    CHECK(got[0] == 64 * 63 / 2);
    CHECK(got[1] == 63);
    CHECK(got[2] == 64);
    CHECK((int)got[3] == -50);
    CHECK(got[4] == ~0u);
    CHECK(got[5] == 128);
    CHECK(got[6] == 0x10000);
    const auto got64 = wide.host();
    CHECK(got64[0] == (uint64_t)(64 * 63 / 2) << 32);
    CHECK((int64_t)got64[1] == 63 - 1000);
    CHECK(got64[2] >= 1);
    CHECK(got64[2] <= 64);
    CHECK(out.host() == std::vector<int>(64, 1));
}

// Sums of small integers are exact in every type and every order.
__global__ void float_atomics(float* f, double* d, __half2* hh, __nv_bfloat162* bb, __half* h,
                              __nv_bfloat16* b, float* olds) {
    __shared__ float shared_f;
    __shared__ double shared_d;
    __shared__ __nv_bfloat162 shared_bb;
    const int t = threadIdx.x, x = t % 3 + 1;
    if (t == 0) {
        shared_f = 0;
        shared_d = 0;
        shared_bb = __floats2bfloat162_rn(0, 0);
    }
    __syncthreads();
    olds[t] = atomicAdd(f, (float)x);
    atomicAdd(f + 1, -0.5f * x);  // red
    atomicAdd(d, x * 0.25);
    atomicAdd(&shared_f, (float)x);
    atomicAdd(&shared_d, (double)-x);
    atomicAdd(hh, __floats2half2_rn((float)x, -(float)x));
    atomicAdd(bb, __floats2bfloat162_rn((float)x, -(float)x));
    atomicAdd(&shared_bb, __floats2bfloat162_rn((float)(t % 2), 1));
    atomicAdd(h + 1, __float2half(1.0f));
    atomicAdd(b + 1, __float2bfloat16(1.0f));
    const uint32_t pair = 0x3C004000;  // 1 and 2 in f16
    asm volatile("red.global.add.noftz.f16x2 [%0], %1;" ::"l"(hh + 1), "r"(pair) : "memory");
    uint32_t old;
    asm volatile("atom.global.add.noftz.f16x2 %0, [%1], %2;" : "=r"(old) : "l"(hh + 1), "r"(pair) : "memory");
    olds[128 + t] = __half2float(__ushort_as_half((unsigned short)old));
    __syncthreads();
    if (t == 0) {
        f[2] = shared_f;
        d[1] = shared_d;
        bb[1] = shared_bb;
    }
}

TEST_CASE("ptxsim: atomic sums of floats, doubles, f16 and bf16") {
    const int n = 96;
    Device<float> f(std::vector<float>(3)), olds(256);
    Device<double> d(std::vector<double>(2));
    Device<__half2> hh(std::vector<__half2>(2));
    Device<__nv_bfloat162> bb(std::vector<__nv_bfloat162>(2));
    Device<__half> h(std::vector<__half>(2));
    Device<__nv_bfloat16> b(std::vector<__nv_bfloat16>(2));
    for (void* p : {(void*)hh.get(), (void*)bb.get()}) CUDA_OK(cudaMemset(p, 0, 8));
    for (void* p : {(void*)h.get(), (void*)b.get()}) CUDA_OK(cudaMemset(p, 0, 4));
    float_atomics<<<1, n>>>(f.get(), d.get(), hh.get(), bb.get(), h.get(), b.get(), olds.get());
    expect_success();
    const float sum = 32 * (1 + 2 + 3);
    CHECK(f.host() == std::vector<float>{sum, -sum / 2, sum});
    CHECK(d.host() == std::vector<double>{sum / 4, -sum});
    CHECK(__low2float(hh.host()[0]) == sum);
    CHECK(__high2float(hh.host()[0]) == -sum);
    CHECK(__low2float(bb.host()[0]) == sum);
    CHECK(__high2float(bb.host()[0]) == -sum);
    CHECK(__low2float(bb.host()[1]) == n / 2);
    CHECK(__high2float(bb.host()[1]) == n);
    CHECK(__low2float(hh.host()[1]) == 2 * 2 * n);
    CHECK(__high2float(hh.host()[1]) == 2 * n);
    CHECK(__half2float(h.host()[1]) == n);
    CHECK(__half2float(h.host()[0]) == 0);
    CHECK(__bfloat162float(b.host()[1]) == n);
    CHECK(__bfloat162float(b.host()[0]) == 0);
    const auto old = olds.host();
    for (int i = 0; i < n; i++) {
        CHECK(old[i] >= 0);
        CHECK(old[i] < sum);
        CHECK(std::fmod(old[128 + i], 2.0f) == 0);
    }
}

}  // namespace
