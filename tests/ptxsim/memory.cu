// ptxsim: loads and stores of every width and space, variables, parameters, calls and printf.
#include <unistd.h>

#include <cstdio>
#include <numeric>

#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;

namespace {

// -------------------------------------------------------------------------------- widths and cache operators

#define COPY1(name, T, c, load, store)                                       \
    struct name {                                                            \
        using Type = T;                                                      \
        static constexpr int words = 1;                                      \
        __device__ static void at(const T* in, T* out) {                     \
            T x;                                                             \
            asm volatile(load " %0, [%1];" : "=" c(x) : "l"(in) : "memory"); \
            asm volatile(store " [%0], %1;" ::"l"(out), c(x) : "memory");    \
        }                                                                    \
    };
#define COPY2(name, T, c, load, store)                                                      \
    struct name {                                                                           \
        using Type = T;                                                                     \
        static constexpr int words = 2;                                                     \
        __device__ static void at(const T* in, T* out) {                                    \
            T x, y;                                                                         \
            asm volatile(load " {%0,%1}, [%2];" : "=" c(x), "=" c(y) : "l"(in) : "memory"); \
            asm volatile(store " [%0], {%1,%2};" ::"l"(out), c(x), c(y) : "memory");        \
        }                                                                                   \
    };
#define COPY4(name, T, c, load, store)                                                                 \
    struct name {                                                                                      \
        using Type = T;                                                                                \
        static constexpr int words = 4;                                                                \
        __device__ static void at(const T* in, T* out) {                                               \
            T x, y, z, w;                                                                              \
            asm volatile(load " {%0,%1,%2,%3}, [%4];"                                                  \
                         : "=" c(x), "=" c(y), "=" c(z), "=" c(w)                                      \
                         : "l"(in)                                                                     \
                         : "memory");                                                                  \
            asm volatile(store " [%0], {%1,%2,%3,%4};" ::"l"(out), c(x), c(y), c(z), c(w) : "memory"); \
        }                                                                                              \
    };
COPY1(C16, uint16_t, "h", "ld.global.u16", "st.global.u16")
COPY1(C32, uint32_t, "r", "ld.global.u32", "st.global.u32")
COPY1(C64, uint64_t, "l", "ld.global.u64", "st.global.u64")
COPY1(CF32, float, "f", "ld.global.f32", "st.global.f32")
COPY1(CF64, double, "d", "ld.global.f64", "st.global.f64")
COPY1(CB32, uint32_t, "r", "ld.b32", "st.b32")
COPY1(CCa, uint32_t, "r", "ld.global.ca.u32", "st.global.wb.u32")
COPY1(CCg, uint32_t, "r", "ld.global.cg.u32", "st.global.cg.u32")
COPY1(CCs, uint32_t, "r", "ld.global.cs.u32", "st.global.cs.u32")
COPY1(CCv, uint32_t, "r", "ld.global.cv.u32", "st.global.wt.u32")
COPY1(CLu, uint32_t, "r", "ld.global.lu.u32", "st.volatile.global.u32")
COPY1(CVolatile, uint64_t, "l", "ld.volatile.global.u64", "st.volatile.u64")
COPY1(CNc, uint32_t, "r", "ld.global.nc.u32", "st.global.u32")
COPY1(CL2, uint32_t, "r", "ld.global.L2::128B.u32", "st.global.L1::no_allocate.u32")
COPY1(CEvict, uint32_t, "r", "ld.global.L1::evict_last.u32", "st.global.L1::evict_first.u32")
COPY1(CRelaxed, uint32_t, "r", "ld.relaxed.gpu.global.u32", "st.relaxed.gpu.global.u32")
COPY1(CAcquire, uint64_t, "l", "ld.acquire.gpu.global.u64", "st.release.sys.global.u64")
COPY1(CNcHint, uint64_t, "l", "ld.global.nc.L1::no_allocate.L2::256B.u64", "st.global.u64")
COPY2(C16x2, uint16_t, "h", "ld.global.v2.u16", "st.global.v2.u16")
COPY2(C32x2, uint32_t, "r", "ld.global.v2.u32", "st.global.v2.u32")
COPY2(C64x2, uint64_t, "l", "ld.global.v2.u64", "st.global.v2.u64")
COPY2(CF64x2, double, "d", "ld.global.nc.v2.f64", "st.global.cs.v2.f64")
COPY4(C16x4, uint16_t, "h", "ld.global.v4.u16", "st.global.v4.u16")
COPY4(C32x4, uint32_t, "r", "ld.global.v4.u32", "st.global.v4.u32")
COPY4(CF32x4, float, "f", "ld.global.cg.v4.f32", "st.global.cg.v4.f32")
COPY4(CNc4, uint32_t, "r", "ld.global.nc.L1::no_allocate.v4.u32", "st.v4.u32")

template <class Copy, class T>
__global__ void copies(const T* in, T* out) {
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * Copy::words;
    Copy::at(in + i, out + i);
}
template <class Copy>
void check_copy() {
    using T = typename Copy::Type;
    std::vector<T> in(256 * Copy::words);
    std::mt19937_64 random(1);
    for (T& x : in) {
        const uint64_t bits = random() >> 2;  // no NaN
        std::memcpy(&x, &bits, sizeof x);
    }
    Device<T> device_in(in), out(in.size());
    copies<Copy><<<2, 128>>>(device_in.get(), out.get());
    expect_success();
    CHECK(!std::memcmp(out.host().data(), in.data(), in.size() * sizeof(T)));
}
template <class... Copy>
void check_copies() {
    (check_copy<Copy>(), ...);
}

TEST_CASE("ptxsim: loads and stores of every width, with cache operators and hints") {
    check_copies<C16, C32, C64, CF32, CF64, CB32, CCa, CCg, CCs, CCv, CLu, CVolatile, CNc, CL2, CEvict,
                 CRelaxed, CAcquire, CNcHint, C16x2, C32x2, C64x2, CF64x2, C16x4, C32x4, CF32x4, CNc4>();
}

// Bytes and shorts in wider registers. Loads of u8, s8, u16 and s16 extend the value, stores take the low
// bits; and vectors of two and four bytes.
__global__ void narrow(const uint8_t* in, uint32_t* out, uint8_t* bytes) {
    const int t = threadIdx.x;
    const uint8_t* p = in + 4 * t;
    uint32_t r[12];
    uint64_t wide, signed_wide;
    asm volatile("ld.global.u8 %0, [%1+1];" : "=r"(r[0]) : "l"(p));
    asm volatile("ld.global.s8 %0, [%1+1];" : "=r"(r[1]) : "l"(p));
    asm volatile("ld.global.u16 %0, [%1+2];" : "=r"(r[2]) : "l"(p));
    asm volatile("ld.global.s16 %0, [%1+2];" : "=r"(r[3]) : "l"(p));
    asm volatile("ld.global.v2.u8 {%0,%1}, [%2];" : "=r"(r[4]), "=r"(r[5]) : "l"(p));
    asm volatile("ld.global.v4.s8 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[6]), "=r"(r[7]), "=r"(r[8]), "=r"(r[9])
                 : "l"(p));
    asm volatile("ld.global.u32 %0, [%1];" : "=l"(wide) : "l"(p));
    asm volatile("ld.global.s32 %0, [%1];" : "=l"(signed_wide) : "l"(p));
    r[10] = (uint32_t)(wide >> 32);
    r[11] = (uint32_t)(signed_wide >> 32);
    for (int i = 0; i < 12; i++) out[12 * t + i] = r[i];
    uint8_t* q = bytes + 8 * t;
    const uint32_t big = r[0] | 0xABCD00;
    asm volatile("st.global.u8 [%0], %1;" ::"l"(q), "r"(big) : "memory");
    asm volatile("st.global.s8 [%0+1], %1;" ::"l"(q), "r"(r[1]) : "memory");
    asm volatile("st.global.u16 [%0+2], %1;" ::"l"(q), "r"(big) : "memory");
    asm volatile("st.global.v4.u8 [%0+4], {%1,%2,%3,%4};" ::"l"(q), "r"(r[6]), "r"(r[7]), "r"(r[8]), "r"(r[9])
                 : "memory");
}

TEST_CASE("ptxsim: narrow loads extend and narrow stores cut") {
    std::vector<uint8_t> in(4 * 64);
    std::mt19937 random(2);
    for (uint8_t& x : in) x = random();
    Device<uint8_t> device_in(in), bytes(8 * 64);
    Device<uint32_t> out(12 * 64);
    narrow<<<1, 64>>>(device_in.get(), out.get(), bytes.get());
    expect_success();
    const auto got = out.host();
    const auto stored = bytes.host();
    int wrong = 0;
    for (int t = 0; t < 64; t++) {
        const uint8_t* p = &in[4 * t];
        const uint16_t half = p[2] | p[3] << 8;
        const uint32_t expected[12] = {p[1],
                                       (uint32_t)(int8_t)p[1],
                                       half,
                                       (uint32_t)(int16_t)half,
                                       p[0],
                                       p[1],
                                       (uint32_t)(int8_t)p[0],
                                       (uint32_t)(int8_t)p[1],
                                       (uint32_t)(int8_t)p[2],
                                       (uint32_t)(int8_t)p[3],
                                       0,
                                       p[3] & 128 ? ~0u : 0};
        for (int i = 0; i < 12; i++) wrong += got[12 * t + i] != expected[i];
        const uint8_t written[8] = {p[1], p[1], p[1], 0xCD, p[0], p[1], p[2], p[3]};
        wrong += std::memcmp(&stored[8 * t], written, 8) != 0;
    }
    CHECK(wrong == 0);
}

// ------------------------------------------------------------------------------------------------ variables

struct Entry {
    int8_t small;
    double number;
    const int* pointer;
};
__device__ int table[5] = {10, 20, 30, 40, 50};
__device__ int counter;
__device__ int* second = table + 1;
__constant__ float coefficients[8] = {1.5f, -2, 0.25f, 1e-40f, 3, 0, -0.5f, 8};
__constant__ Entry entries[2] = {{-3, 2.5, table + 3}, {7, -1e300, nullptr}};
__device__ const char* const words[3] = {"zero", "one", "two"};
__constant__ int settable[4];
__device__ __managed__ int managed = 5;

__global__ void variables(const int* index, double* out) {
    const int t = threadIdx.x;
    double* o = out + 8 * t;
    o[0] = table[index[t] % 5];
    o[1] = *second + second[index[t] % 4];
    o[2] = coefficients[index[t] % 8];
    const Entry& entry = entries[index[t] % 2];
    o[3] = entry.small + entry.number;
    o[4] = entry.pointer ? *entry.pointer : -1;
    o[5] = words[index[t] % 3][1];
    o[6] = settable[index[t] % 4];
    o[7] = managed;
    atomicAdd(&counter, index[t]);
}

TEST_CASE("ptxsim: variables with initialisers, pointers and symbols") {
    std::vector<int> index(64);
    for (int i = 0; i < 64; i++) index[i] = i * 7 % 41;
    const int set[4] = {9, 8, 7, 6}, zero = 0;
    CUDA_OK(cudaMemcpyToSymbol(settable, set, sizeof set));
    CUDA_OK(cudaMemcpyToSymbol(counter, &zero, sizeof zero));
    managed = 12;
    Device<int> device_index(index);
    Device<double> out(8 * 64);
    variables<<<1, 64>>>(device_index.get(), out.get());
    expect_success();
    const auto got = out.host();
    const float of_coefficients[8] = {1.5f, -2, 0.25f, 1e-40f, 3, 0, -0.5f, 8};
    int wrong = 0;
    for (int t = 0; t < 64; t++) {
        const int i = index[t];
        const double expected[8] = {
            i % 5 * 10.0 + 10, 20.0 + 20 + i % 4 * 10, of_coefficients[i % 8], i % 2 ? 7 - 1e300 : -0.5,
            i % 2 ? -1.0 : 40, (double)"enw"[i % 3],   (double)set[i % 4],     12};
        for (int k = 0; k < 8; k++) wrong += got[8 * t + k] != expected[k];
    }
    CHECK(wrong == 0);
    int count;
    CUDA_OK(cudaMemcpyFromSymbol(&count, counter, sizeof count));
    CHECK(count == std::accumulate(index.begin(), index.end(), 0));
    void* address;
    size_t bytes;
    CUDA_OK(cudaGetSymbolAddress(&address, table));
    CUDA_OK(cudaGetSymbolSize(&bytes, table));
    CHECK(bytes == 20);
    int third;
    CUDA_OK(cudaMemcpy(&third, (int*)address + 2, 4, cudaMemcpyDeviceToHost));
    CHECK(third == 30);
}

// ---------------------------------------------------------------------------------- spaces, parameters,
// calls

struct Parameters {
    int8_t a;
    int64_t b;
    float c[5];
    const int* data;
    struct {
        short x, y;
    } nested;
};

__device__ __noinline__ float called(Parameters p, int i, float* extra) {
    *extra += p.c[i % 5];
    return p.a + (float)p.b + p.data[i] * p.nested.y;
}
__device__ __noinline__ int next(int a, int b) {
    return a + b;
}
__device__ __noinline__ int fibonacci(int n) {  // a function that calls another function
    int a = 0, b = 1;
    for (; n > 0; n--) {
        const int c = next(a, b);
        a = b, b = c;
    }
    return a;
}
__device__ __noinline__ int read_any(const int* pointer, int i) {  // reads by a generic address
    return pointer[i];
}
__device__ __noinline__ int twice(int x) {
    return 2 * x;
}
__device__ __noinline__ int square(int x) {
    return x * x;
}

__global__ void spaces(Parameters p, double* out, int n) {
    extern __shared__ double dynamic[];
    float* upper = (float*)(dynamic + 64);
    __shared__ int fixed[64];
    int local[16];
    const int t = threadIdx.x;
    for (int i = 0; i < 16; i++) local[i] = i * t;
    fixed[t] = 1000 + t;
    dynamic[t] = t * 0.5;
    upper[t] = -t;
    __syncthreads();
    const int* pointer = t % 3 == 0 ? fixed : t % 3 == 1 ? local : p.data;
    local[(t + n) % 16] += 7;
    double* o = out + 8 * t;
    o[0] = read_any(pointer, (t + n) % 16);
    o[1] = dynamic[63 - t] + upper[(t + n) % 64];
    float extra = 1;
    o[2] = called(p, t % 16, &extra);
    o[3] = extra;
    o[4] = fibonacci(t % 10);
    o[5] = t % 2 ? square(t) : twice(t);
    unsigned is_shared, is_local, is_global;
    asm volatile(
        "{\n\t.reg .pred p;\n\tisspacep.shared p, %3;\n\tselp.u32 %0, 1, 0, p;\n\t"
        "isspacep.local p, %3;\n\tselp.u32 %1, 1, 0, p;\n\t"
        "isspacep.global p, %3;\n\tselp.u32 %2, 1, 0, p;\n\t}"
        : "=r"(is_shared), "=r"(is_local), "=r"(is_global)
        : "l"(pointer));
    o[6] = is_shared + 2 * is_local + 4 * is_global;
    const int x = p.data[t % 16] + t;
    double y;
    switch (x % 13) {  // becomes a table of branches
        case 0:
            y = x * 3;
            break;
        case 1:
            y = x - 10;
            break;
        case 2:
            y = sqrt((double)x);
            break;
        case 3:
            y = x & 21;
            break;
        case 4:
            y = -x;
            break;
        case 5:
            y = x / 7;
            break;
        case 6:
            y = x | 8;
            break;
        case 7:
            y = x << 2;
            break;
        case 8:
            y = 1.0 / x;
            break;
        default:
            y = 0;
    }
    o[7] = y;
}

TEST_CASE("ptxsim: generic pointers, dynamic shared memory, struct parameters, calls and switch tables") {
    std::vector<int> data(16);
    for (int i = 0; i < 16; i++) data[i] = 100 + i * i;
    Device<int> device_data(data);
    Device<double> out(8 * 64);
    Parameters p = {-5, (int64_t)1 << 20, {1, 2, 3, 4, 5}, device_data.get(), {1, 3}};
    const int n = 5;
    spaces<<<1, 64, 64 * sizeof(double) + 64 * sizeof(float)>>>(p, out.get(), n);
    expect_success();
    const auto got = out.host();
    const int fibonacci[10] = {0, 1, 1, 2, 3, 5, 8, 13, 21, 34};
    std::vector<int> wrong(8);
    for (int t = 0; t < 64; t++) {
        const int k = (t + n) % 16, x = data[t % 16] + t;
        const double of_x[13] = {x * 3.0,          x - 10.0,         std::sqrt((double)x),
                                 (double)(x & 21), (double)-x,       (double)(x / 7),
                                 (double)(x | 8),  (double)(x << 2), 1.0 / x};
        const double expected[8] = {t % 3 == 0   ? 1000.0 + k
                                    : t % 3 == 1 ? (double)k * t + 7
                                                 : (double)data[k],
                                    (63 - t) * 0.5 - (t + n) % 64,
                                    (float)(p.a + (float)p.b + data[t % 16] * 3),
                                    1.0 + p.c[t % 16 % 5],
                                    (double)fibonacci[t % 10],
                                    t % 2 ? (double)t * t : 2.0 * t,
                                    t % 3 == 0   ? 1.0
                                    : t % 3 == 1 ? 2.0
                                                 : 4.0,
                                    of_x[x % 13]};
        for (int i = 0; i < 8; i++) wrong[i] += got[8 * t + i] != expected[i];
    }
    for (int i = 0; i < 8; i++) CHECK_MESSAGE(wrong[i] == 0, i);
}

// ------------------------------------------------------------------------------------- PTX written by people

// Scopes that have their own registers and labels, directives without spaces, and comments of both kinds.
__global__ void inline_ptx(unsigned* out) {
    unsigned product, sum, triangle;
    asm("{.reg.b32 a,b;\n\tmov.b32 a,%1;/* a\n b */shl.b32 b,a,4; // to the end;\n\tadd.u32 %0,a,b;}"
        : "=r"(product)
        : "r"(threadIdx.x + 1));
    asm volatile(
        "{\n\t.reg .pred p; .reg.u32 n<3>; mov.u32 n1,0;mov.u32 n2, %1;\n"
        "LOOP: add.u32 n1,n1,n2;sub.u32 n2,n2,1; setp.ne.u32 p,n2,0;\n\t@p bra LOOP;\n\tmov.u32 %0,n1;}"
        : "=r"(triangle)
        : "r"(threadIdx.x + 2));
    asm volatile(
        "{\n\t.reg .pred p; .reg.s32 n; mov.s32 n,-7;\n"
        "LOOP: add.s32 n,n,3; setp.lt.s32 p,n,%1;\n\t@!p bra DONE;\n\tbra.uni LOOP;\nDONE: mov.s32 %0,n;}"
        : "=r"(sum)
        : "r"(threadIdx.x));
    out[3 * threadIdx.x] = product;
    out[3 * threadIdx.x + 1] = triangle;
    out[3 * threadIdx.x + 2] = sum;
}

TEST_CASE("ptxsim: inline PTX with scopes, labels and comments") {
    Device<unsigned> out(96);
    inline_ptx<<<1, 32>>>(out.get());
    expect_success();
    const auto got = out.host();
    for (unsigned t = 0; t < 32; t++) {
        CAPTURE(t);
        int n = -7;
        do n += 3;
        while (n < (int)t);
        CHECK(got[3 * t] == 17 * (t + 1));
        CHECK(got[3 * t + 1] == (t + 2) * (t + 3) / 2);
        CHECK((int)got[3 * t + 2] == n);
    }
}

// --------------------------------------------------------------------------------------------------- printf

__global__ void prints(int x) {
    const int t = threadIdx.x;
    if (t == 1)
        printf("int %d, unsigned %5u, hex %x, long %lld, %c%%\n", -x, 7u, 255, (long long)x << 40, 'c');
    __syncthreads();
    if (t == 0) printf("float %.3f, exp %e, string %s, narrow %-4d|\n", 1.5f, 1e10, "text", 3);
    __syncthreads();
    if (t == 2) printf("no arguments\n");
}

TEST_CASE("ptxsim: printf") {
    std::fflush(stdout);
    std::FILE* file = std::tmpfile();
    REQUIRE(file);
    const int saved = dup(1);
    dup2(fileno(file), 1);
    prints<<<1, 3>>>(12);
    const cudaError_t status = cudaDeviceSynchronize();
    std::fflush(stdout);
    dup2(saved, 1);
    close(saved);
    std::rewind(file);
    char text[1000] = {};
    const size_t n = std::fread(text, 1, sizeof text - 1, file);
    std::fclose(file);
    CHECK(status == cudaSuccess);
    expect_no_reports();
    CHECK(std::string(text, n) ==
          "int -12, unsigned     7, hex ff, long 13194139533312, c%\n"
          "float 1.500, exp 1.000000e+10, string text, narrow 3   |\n"
          "no arguments\n");
}

}  // namespace
