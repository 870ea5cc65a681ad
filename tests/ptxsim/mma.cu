// ptxsim: mma.sync, ldmatrix and cp.async against a plain matrix product in double. The PTX ISA describes the
// layouts of fragments in its section on warp-level matrix instructions: g = lane / 4, t = lane % 4.
#include "tests/ptxsim/helpers.h"

using namespace ptxsim_test;

namespace {

enum class Type { f16, bf16, tf32 };

// The row and column in A (16,K), B (K,8) or C (16,8) of the element that a lane holds as its i-th.
struct Place {
    int row, column;
};
// 16-bit types. K = 16: a0,a1: (g, 2t); a2,a3: (g+8, 2t); a4,a5: (g, 2t+8); a6,a7: (g+8, 2t+8). K = 8 has
// only a0 to a3.
__host__ __device__ Place place_a16(int lane, int i) {
    return {lane / 4 + (i / 2 % 2) * 8, lane % 4 * 2 + i % 2 + (i / 4) * 8};
}
// b0,b1: (2t, g); b2,b3: (2t+8, g).
__host__ __device__ Place place_b16(int lane, int i) {
    return {lane % 4 * 2 + i % 2 + (i / 2) * 8, lane / 4};
}
// tf32. K = 8: a0 (g, t), a1 (g+8, t), a2 (g, t+4), a3 (g+8, t+4); K = 4 has only a0 and a1. b0 (t, g), b1
// (t+4, g).
__host__ __device__ Place place_a32(int lane, int i) {
    return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4};
}
__host__ __device__ Place place_b32(int lane, int i) {
    return {lane % 4 + i * 4, lane / 4};
}
// c0,c1: (g, 2t); c2,c3: (g+8, 2t).
__host__ __device__ Place place_c(int lane, int i) {
    return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

#define MMA_F32_A4B2(name, shape, type)                                                                 \
    struct name {                                                                                       \
        static constexpr int a = 4, b = 2;                                                              \
        __device__ static void at(float* d, const uint32_t* a, const uint32_t* b, const float* c) {     \
            asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                        \
                         ".f32 "                                                                        \
                         "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                    \
                         : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                               \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), \
                           "f"(c[1]), "f"(c[2]), "f"(c[3]));                                            \
        }                                                                                               \
    };
#define MMA_F32_A2B1(name, shape, type)                                                                  \
    struct name {                                                                                        \
        static constexpr int a = 2, b = 1;                                                               \
        __device__ static void at(float* d, const uint32_t* a, const uint32_t* b, const float* c) {      \
            asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                         \
                         ".f32 "                                                                         \
                         "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"                                 \
                         : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                \
                         : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])); \
        }                                                                                                \
    };
MMA_F32_A4B2(Bf16K16, "m16n8k16", "bf16")
MMA_F32_A4B2(F16K16, "m16n8k16", "f16")
MMA_F32_A4B2(Tf32K8, "m16n8k8", "tf32")
MMA_F32_A2B1(Bf16K8, "m16n8k8", "bf16")
MMA_F32_A2B1(F16K8, "m16n8k8", "f16")
MMA_F32_A2B1(Tf32K4, "m16n8k4", "tf32")

// Accumulators in f16. A register holds two: c0,c1 or c2,c3.
struct F16Sum16 {
    static constexpr int a = 4, b = 2;
    __device__ static void at(uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%9};"
            : "=r"(d[0]), "=r"(d[1])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]));
    }
};
struct F16Sum8 {
    static constexpr int a = 2, b = 1;
    __device__ static void at(uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%5,%6};"
                     : "=r"(d[0]), "=r"(d[1])
                     : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(c[0]), "r"(c[1]));
    }
};

// Each warp computes one product. The registers of one lane lie together.
template <class Mma, class Sum, int sums>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const Sum* c, Sum* d) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t ra[Mma::a], rb[Mma::b];
    Sum rc[sums], rd[sums];
    for (int i = 0; i < Mma::a; i++) ra[i] = a[thread * Mma::a + i];
    for (int i = 0; i < Mma::b; i++) rb[i] = b[thread * Mma::b + i];
    for (int i = 0; i < sums; i++) rc[i] = c[thread * sums + i];
    Mma::at(rd, ra, rb, rc);
    for (int i = 0; i < sums; i++) d[thread * sums + i] = rd[i];
}

double random_element(std::mt19937& random, Type type, bool exact) {
    if (exact) return (int)(random() % 17) - 8;
    const double x = ((int)(random() % 20001) - 10000) / 5000.0;
    return round_to(x, type == Type::f16 ? kF16 : type == Type::bf16 ? kBf16 : kTf32, Round::nearest);
}
uint32_t pair16(Type type, double low, double high) {
    const Format& format = type == Type::f16 ? kF16 : kBf16;
    return encode16(low, format) | (uint32_t)encode16(high, format) << 16;
}

// Products and sums of small integers must be exact in every type. Sums of other numbers must be near.
template <class Mma, class Sum>
void check_mma(const char* name, Type type, int K) {
    CAPTURE(name);
    constexpr bool half_sums = std::is_same_v<Sum, uint32_t>;
    constexpr int sums = half_sums ? 2 : 4, warps = 64;
    std::mt19937 random(K + (int)type);
    std::vector<uint32_t> a, b;
    std::vector<Sum> c;
    std::vector<double> expected;  // for each warp, lane and element
    for (int warp = 0; warp < warps; warp++) {
        const bool exact = warp % 2;
        std::vector<double> A(16 * K), B(K * 8), C(16 * 8);
        for (double& x : A) x = random_element(random, type, exact);
        for (double& x : B) x = random_element(random, type, exact);
        for (double& x : C) x = random_element(random, half_sums ? Type::f16 : type, exact);
        for (int lane = 0; lane < 32; lane++) {
            auto in_a = [&](Place p) { return A[p.row * K + p.column]; };
            auto in_b = [&](Place p) { return B[p.row * 8 + p.column]; };
            for (int i = 0; i < Mma::a; i++)
                a.push_back(type == Type::tf32 ? std::bit_cast<uint32_t>((float)in_a(place_a32(lane, i)))
                                               : pair16(type, in_a(place_a16(lane, 2 * i)),
                                                        in_a(place_a16(lane, 2 * i + 1))));
            for (int i = 0; i < Mma::b; i++)
                b.push_back(type == Type::tf32 ? std::bit_cast<uint32_t>((float)in_b(place_b32(lane, i)))
                                               : pair16(type, in_b(place_b16(lane, 2 * i)),
                                                        in_b(place_b16(lane, 2 * i + 1))));
            double of_c[4];
            for (int i = 0; i < 4; i++) {
                const Place p = place_c(lane, i);
                of_c[i] = C[p.row * 8 + p.column];
                double sum = of_c[i];
                for (int k = 0; k < K; k++) sum += A[p.row * K + k] * B[k * 8 + p.column];
                expected.push_back(sum);
            }
            if constexpr (half_sums)
                c.insert(c.end(), {pair16(Type::f16, of_c[0], of_c[1]), pair16(Type::f16, of_c[2], of_c[3])});
            else
                c.insert(c.end(), {(float)of_c[0], (float)of_c[1], (float)of_c[2], (float)of_c[3]});
        }
    }
    Device<uint32_t> da(a), db(b);
    Device<Sum> dc(c), dd(c.size());
    mma_kernel<Mma, Sum, sums><<<warps / 4, 128>>>(da.get(), db.get(), dc.get(), dd.get());
    expect_success();
    const std::vector<Sum> d = dd.host();
    int wrong = 0;
    double worst = 0;
    for (size_t n = 0; n < expected.size(); n++) {
        double got;
        if constexpr (half_sums)
            got = decode16((uint16_t)(d[n / 2] >> 16 * (n % 2)), kF16);
        else
            got = d[n];
        const bool exact = n / 128 % 2;
        const double error = std::abs(got - expected[n]);
        worst = std::max(worst, error);
        wrong += !(error <= (exact ? 0 : half_sums ? 0.05 : 4e-5));
    }
    CHECK_MESSAGE(wrong == 0, wrong << " wrong, worst error " << worst);
}

TEST_CASE("ptxsim: mma.sync of every shape and type") {
    check_mma<Bf16K16, float>("m16n8k16 bf16", Type::bf16, 16);
    check_mma<F16K16, float>("m16n8k16 f16", Type::f16, 16);
    check_mma<Bf16K8, float>("m16n8k8 bf16", Type::bf16, 8);
    check_mma<F16K8, float>("m16n8k8 f16", Type::f16, 8);
    check_mma<Tf32K8, float>("m16n8k8 tf32", Type::tf32, 8);
    check_mma<Tf32K4, float>("m16n8k4 tf32", Type::tf32, 4);
    check_mma<F16Sum16, uint32_t>("m16n8k16 f16 sums of f16", Type::f16, 16);
    check_mma<F16Sum8, uint32_t>("m16n8k8 f16 sums of f16", Type::f16, 8);
}

TEST_CASE("ptxsim: mma.sync keeps infinities, NaN and the range of bf16") {
    // Row 0 of A times column 0 of B. Each case has the first elements of A, B and C, and the expected first
    // element of the result.
    const double big = std::ldexp(1.5, 100);
    const double cases[][4] = {{INFINITY, 1, 0, INFINITY},
                               {INFINITY, 0, 0, NAN},
                               {1, NAN, 0, NAN},
                               {INFINITY, 1, -INFINITY, NAN},
                               {big, 2, 0, 2 * big},
                               {big, big, 0, INFINITY},
                               {0, 5, -INFINITY, -INFINITY},
                               {std::ldexp(1, -100), 1, 0, std::ldexp(1, -100)}};
    for (const double* one : cases) {
        std::vector<uint32_t> a(32 * 4), b(32 * 2);
        std::vector<float> c(32 * 4);
        a[0] = encode16(one[0], kBf16);
        b[0] = encode16(one[1], kBf16);
        c[0] = (float)one[2];
        Device<uint32_t> da(a), db(b);
        Device<float> dc(c), dd(c.size());
        mma_kernel<Bf16K16, float, 4><<<1, 32>>>(da.get(), db.get(), dc.get(), dd.get());
        expect_success();
        CHECK_MESSAGE(same(dd.host()[0], (float)one[3]), one[0] << " * " << one[1] << " + " << one[2]);
    }
}

// ----------------------------------------------------------------------------------------------- ldmatrix

// Loads 8x8 matrices of 16-bit numbers, whose rows are `stride` apart. Lane l gives the address of row l % 8
// of matrix l / 8.
template <int matrices, bool transposed>
__global__ void ldmatrix_kernel(uint32_t* out) {
    constexpr int stride = 24;
    __shared__ alignas(16) uint16_t tile[32 * stride];
    for (int i = threadIdx.x; i < 32 * stride; i += 32) tile[i] = (uint16_t)(i / stride * 100 + i % stride);
    __syncthreads();
    const int lane = threadIdx.x, shift = 8;  // columns 8 to 15
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(tile + lane * stride + shift);
    uint32_t r[4] = {};
    if constexpr (matrices == 1 && !transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address));
    if constexpr (matrices == 1 && transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(address));
    if constexpr (matrices == 2 && !transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address));
    if constexpr (matrices == 2 && transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address));
    if constexpr (matrices == 4 && !transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address));
    if constexpr (matrices == 4 && transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address));
    for (int i = 0; i < matrices; i++) out[lane * matrices + i] = r[i];
}

template <int matrices, bool transposed>
void check_ldmatrix() {
    CAPTURE(matrices);
    CAPTURE(transposed);
    Device<uint32_t> out(32 * matrices);
    ldmatrix_kernel<matrices, transposed><<<1, 32>>>(out.get());
    expect_success();
    const auto got = out.host();
    int wrong = 0;
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < matrices; m++)
            for (int half = 0; half < 2; half++) {
                int row = lane / 4, column = lane % 4 * 2 + half;
                if (transposed) std::swap(row, column);
                wrong +=
                    (got[lane * matrices + m] >> 16 * half & 0xFFFF) != (m * 8 + row) * 100u + 8 + column;
            }
    CHECK(wrong == 0);
}

TEST_CASE("ptxsim: ldmatrix") {
    check_ldmatrix<1, false>();
    check_ldmatrix<2, false>();
    check_ldmatrix<4, false>();
    check_ldmatrix<1, true>();
    check_ldmatrix<2, true>();
    check_ldmatrix<4, true>();
}

// ----------------------------------------------------------------------------------------------- cp.async

template <int bytes>
__global__ void cp_async_kernel(const uint8_t* in, uint8_t* out, int present) {
    __shared__ alignas(16) uint8_t tile[4][64 * 16];
    const int thread = threadIdx.x;
    auto copy = [&](int stage, int n) {
        const uint32_t to = (uint32_t)__cvta_generic_to_shared(tile[stage] + thread * bytes);
        const uint8_t* from = in + (stage * 64 + thread) * bytes;
        if constexpr (bytes == 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(n)
                         : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(bytes),
                         "r"(n)
                         : "memory");
    };
    for (int stage = 0; stage < 3; stage++) {
        copy(stage,
             stage == 1 ? present : bytes);  // the second copy reads only `present` bytes; the rest becomes 0
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    asm volatile("cp.async.wait_group 2;" ::: "memory");
    for (int i = 0; i < bytes; i++) out[thread * bytes + i] = tile[0][thread * bytes + i];
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    for (int i = 0; i < bytes; i++) out[(64 + thread) * bytes + i] = tile[1][thread * bytes + i];
    copy(3, bytes);  // no commit follows, so it is in no group
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    const int other = 63 - thread;
    for (int i = 0; i < bytes; i++) out[(128 + other) * bytes + i] = tile[2][other * bytes + i];
    for (int i = 0; i < bytes; i++) out[(192 + other) * bytes + i] = tile[3][other * bytes + i];
}

template <int bytes>
void check_cp_async(int present) {
    CAPTURE(bytes);
    CAPTURE(present);
    std::vector<uint8_t> in(4 * 64 * bytes);
    std::mt19937 random(bytes);
    for (uint8_t& x : in) x = random() | 1;
    Device<uint8_t> device_in(in), out(in.size());
    cp_async_kernel<bytes><<<1, 64>>>(device_in.get(), out.get(), present);
    expect_success();
    auto expected = in;
    for (int i = 64 * bytes; i < 128 * bytes; i++)
        if (i % bytes >= present) expected[i] = 0;
    CHECK(out.host() == expected);
}

TEST_CASE("ptxsim: cp.async with groups and zero fill") {
    for (int present : {0, 1, 4}) check_cp_async<4>(present);
    for (int present : {0, 3, 8}) check_cp_async<8>(present);
    for (int present : {0, 4, 15, 16}) check_cp_async<16>(present);
}

// If a copy asks for 0 bytes, the source is not touched, so its address may be outside of every allocation.
__global__ void cp_async_nothing(const float* in, float* out, int n) {
    __shared__ float4 tile[32];
    const int thread = threadIdx.x;
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(tile + thread);
    const float* from = in + 4 * thread;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(4 * thread < n ? 16 : 0)
                 : "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    ((float4*)out)[thread] = tile[thread];
}

TEST_CASE("ptxsim: cp.async of no bytes from beyond an array") {
    std::vector<float> in(64), expected(128);
    for (int i = 0; i < 64; i++) expected[i] = in[i] = i + 0.5f;
    Device<float> device_in(in), out(128);
    cp_async_nothing<<<1, 32>>>(device_in.get(), out.get(), 64);
    expect_success();
    CHECK(out.host() == expected);
}

}  // namespace
