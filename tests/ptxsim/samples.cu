// ptxsim: a tiled matrix product like that of many CUDA programs, under every schedule; and figures, which
// are compared with figures that were counted by hand. More sample programs are in programs.cu.
#include <cuda_bf16.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "dev/ptxsim/device.h"
#include "tests/ptxsim/helpers.h"
#include "tests/ptxsim/schedules.h"

using namespace ptxsim_test;

namespace samples {

// ---------------------------------------------------------------------------------------- matrix product

constexpr int kTile = 64, kDepth = 32, kPad = 8;

__device__ unsigned shared_address(const void* pointer) {
    return (unsigned)__cvta_generic_to_shared(pointer);
}
// Copies 16 bytes if they are present; else writes zeros.
__device__ void copy_async(void* to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(present ? 16 : 0)
                 : "memory");
}

// c (M,N) = a (M,K) b (K,N); K and N are multiples of 8. A block of four warps computes a tile of 64 x 64, a
// warp 32 x 32 of it.
__global__ __launch_bounds__(128) void matmul(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int M,
                                              int N, int K) {
    __shared__ alignas(16) __nv_bfloat16 tile_a[2][kTile][kDepth + kPad], tile_b[2][kDepth][kTile + kPad];
    const int t = threadIdx.x, warp = t / 32, lane = t % 32;
    const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
    const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
    auto load = [&](int stage, int k0) {
        for (int i = t; i < kTile * kDepth / 8; i += 128) {
            const int r = i / (kDepth / 8), k = i % (kDepth / 8) * 8;
            const bool present = row0 + r < M && k0 + k < K;
            copy_async(&tile_a[stage][r][k], a + (present ? (size_t)(row0 + r) * K + k0 + k : 0), present);
        }
        for (int i = t; i < kDepth * kTile / 8; i += 128) {
            const int k = i / (kTile / 8), n = i % (kTile / 8) * 8;
            const bool present = k0 + k < K && column0 + n < N;
            copy_async(&tile_b[stage][k][n], b + (present ? (size_t)(k0 + k) * N + column0 + n : 0), present);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    float sums[2][4][4] = {};
    const int tiles = (K + kDepth - 1) / kDepth;
    load(0, 0);
    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) {
            load((tile + 1) % 2, (tile + 1) * kDepth);
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        __syncthreads();
        for (int k = 0; k < kDepth; k += 16) {
            unsigned ra[2][4], rb[4][2];
            for (int i = 0; i < 2; i++)
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(ra[i][0]), "=r"(ra[i][1]), "=r"(ra[i][2]), "=r"(ra[i][3])
                             : "r"(shared_address(
                                 &tile_a[tile % 2][warp_row + 16 * i + lane % 16][k + lane / 16 * 8])));
            for (int j = 0; j < 4; j++)
                asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                             : "=r"(rb[j][0]), "=r"(rb[j][1])
                             : "r"(shared_address(&tile_b[tile % 2][k + lane % 16][warp_column + 8 * j])));
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++) {
                    float* d = sums[i][j];
                    asm volatile(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                        : "r"(ra[i][0]), "r"(ra[i][1]), "r"(ra[i][2]), "r"(ra[i][3]), "r"(rb[j][0]),
                          "r"(rb[j][1]));
                }
        }
        __syncthreads();
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int half = 0; half < 2; half++) {
                const int row = row0 + warp_row + 16 * i + lane / 4 + 8 * half;
                const int column = column0 + warp_column + 8 * j + lane % 4 * 2;
                if (row < M && column < N)
                    *(float2*)(c + (size_t)row * N + column) =
                        make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
            }
}

// ---------------------------------------------------------------------------------------------- for figures

__global__ void copy_float(const float* in, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = in[i];
}
__global__ void copy_float4(const float4* in, float4* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = in[i];
}
__global__ void copy_stride2(const float* in, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = in[2 * i];
}
__global__ void copy_shifted(const float* in, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = in[i + 1];
}
__global__ void copy_half(const float* in, float* out) {  // half of the lanes of each warp copy
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (threadIdx.x % 32 < 16) out[i] = in[i];
}
__global__ void copy_if(const float* in, float* out, bool wanted) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (wanted) out[i] = in[i];
}

// 32 writes without conflicts, then 32 reads of columns.
template <int stride>
__device__ void columns(const float* in, float* out) {
    __shared__ float tile[32 * stride];
    const int t = threadIdx.x;
#pragma unroll 1
    for (int i = 0; i < 32; i++) tile[i * stride + t] = in[i * 32 + t];
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < 32; i++) out[i * 32 + t] = tile[t * stride + i];
}
__global__ void columns_of_32(const float* in, float* out) {
    columns<32>(in, out);
}
__global__ void columns_of_33(const float* in, float* out) {
    columns<33>(in, out);
}

// One write and one read without conflicts, of wide words, and one read of every other word.
template <class Word>
__device__ void wide_words(const Word* in, Word* out) {
    __shared__ Word tile[64];
    const int t = threadIdx.x;
    tile[t] = in[t];
    __syncthreads();
    if (t >= 32) return;
    out[t] = tile[t];
    out[t + 32] = tile[2 * t];
}
__global__ void wide_double(const double* in, double* out) {
    wide_words(in, out);
}
__global__ void wide_float4(const float4* in, float4* out) {
    wide_words(in, out);
}

__global__ void broadcast(const float* in, float* out) {
    __shared__ float tile[32];
    const int t = threadIdx.x;
    tile[t] = in[t];
    __syncwarp();
    out[t] = tile[(int)in[t]];  // zeros: all lanes read one word
}

__global__ void branch(int* out, bool by_lane) {
    const int t = threadIdx.x;
    if ((by_lane ? t % 32 < 16 : t < 32))
        atomicAdd(out, 3);
    else
        atomicMax(out + 1, t);
}

}  // namespace samples

namespace {

constexpr int kM = 100, kN = 88, kK = 72;

std::vector<__nv_bfloat16> random_bf16(size_t n, int seed) {
    std::mt19937 random(seed);
    std::vector<__nv_bfloat16> all(n);
    for (auto& x : all) x = __float2bfloat16((int)(random() % 2001 - 1000) / 500.0f);
    return all;
}

TEST_CASE("ptxsim: a tiled bf16 matrix product under every schedule") {
    const auto a = random_bf16(kM * kK, 1), b = random_bf16(kK * kN, 2);
    std::vector<double> expected(kM * kN);
    for (int m = 0; m < kM; m++)
        for (int n = 0; n < kN; n++)
            for (int k = 0; k < kK; k++)
                expected[m * kN + n] +=
                    (double)__bfloat162float(a[m * kK + k]) * __bfloat162float(b[k * kN + n]);
    every_schedule([&] {
        Device<__nv_bfloat16> da(a), db(b);
        Device<float> dc(kM * kN);
        samples::matmul<<<dim3((kN + 63) / 64, (kM + 63) / 64), 128>>>(da.get(), db.get(), dc.get(), kM, kN,
                                                                       kK);
        expect_success();
        const auto c = dc.host();
        double worst = 0;
        for (int i = 0; i < kM * kN; i++) worst = std::max(worst, std::abs(c[i] - expected[i]));
        CHECK(worst < 1e-4);
    });
}

nlohmann::json figures_of(const std::string& kernel, const std::function<void()>& launch) {
    ptxsim::clear_figures();
    launch();
    expect_success();
    const nlohmann::json all = nlohmann::json::parse(ptxsim::figures_json());
    for (const nlohmann::json& one : all["kernels"])
        if (one["name"] == "samples::" + kernel) {
            CHECK(one["launches"] == 1);
            return one;
        }
    FAIL("no figures of " << kernel << " in " << all.dump());
    return {};
}

#define CHECK_FIGURE(figures, name, expected) \
    CHECK_MESSAGE(figures[name] == expected, name << " " << figures.dump())

void check_global(const nlohmann::json& f, int load_bytes, int load_sectors, int store_bytes,
                  int store_sectors) {
    CHECK_FIGURE(f, "global_load_bytes", load_bytes);
    CHECK_FIGURE(f, "global_load_sectors", load_sectors);
    CHECK_FIGURE(f, "global_store_bytes", store_bytes);
    CHECK_FIGURE(f, "global_store_sectors", store_sectors);
}
void check_shared(const nlohmann::json& f, int accesses, int conflicts) {
    CHECK_FIGURE(f, "shared_accesses", accesses);
    CHECK_FIGURE(f, "shared_bank_conflicts", conflicts);
}

TEST_CASE("ptxsim: figures are those counted by hand") {
    using namespace samples;
    WithOptions restore;
    ptxsim::options().figures = "figures";
    Device<float> in(std::vector<float>(8192)), out(8192);
    const float* i = in.get();
    float* o = out.get();

    // 1,024 threads in 32 warps. A warp reads 4 sectors of float, or 16 of float4.
    auto f = figures_of("copy_float", [&] { copy_float<<<4, 256>>>(i, o); });
    check_global(f, 4096, 128, 4096, 128);
    CHECK_FIGURE(f, "divergent_branches", 0);
    CHECK_FIGURE(f, "lane_instructions", 32 * f["warp_instructions"].get<int64_t>());
    CHECK_FIGURE(f, "warp_instructions", 32 * f["executed"].get<int64_t>());  // straight code
    CHECK_FIGURE(f, "executed", f["instructions"]);
    CHECK_FIGURE(f, "mma", 0);
    CHECK_FIGURE(f, "shared_accesses", 0);
    check_global(figures_of("copy_float4", [&] { copy_float4<<<4, 256>>>((float4*)i, (float4*)o); }), 16384,
                 512, 16384, 512);
    check_global(figures_of("copy_stride2", [&] { copy_stride2<<<4, 256>>>(i, o); }), 4096, 256, 4096, 128);
    check_global(figures_of("copy_shifted", [&] { copy_shifted<<<4, 256>>>(i, o); }), 4096, 160, 4096, 128);
    f = figures_of("copy_half", [&] { copy_half<<<4, 256>>>(i, o); });
    check_global(f, 2048, 64, 2048, 64);
    CHECK(f["divergent_branches"] >= 1);

    // If the branch is not taken, all instructions run. If it is taken, those that it skips do not run, and
    // are counted by line.
    f = figures_of("copy_if", [&] { copy_if<<<1, 32>>>(i, o, true); });
    CHECK(f["branches"] == 1);
    CHECK_FIGURE(f, "executed", f["instructions"]);
    CHECK(f["not_executed"].empty());
    f = figures_of("copy_if", [&] { copy_if<<<1, 32>>>(i, o, false); });
    int left_out = 0;
    for (const auto& [line, instructions] : f["not_executed"].items()) {
        CHECK(line.find("ptxsim/samples.cu:") != std::string::npos);
        left_out += instructions.get<int>();
    }
    CHECK(left_out > 0);
    CHECK(left_out == f["instructions"].get<int>() - f["executed"].get<int>());

    // When columns are read, all 32 lanes use one bank: each of the 32 reads takes 31 more wavefronts.
    check_shared(figures_of("columns_of_32", [&] { columns_of_32<<<1, 32>>>(i, o); }), 64, 992);
    check_shared(figures_of("columns_of_33", [&] { columns_of_33<<<1, 32>>>(i, o); }), 64, 0);
    // Two warps write, and one reads twice. When it reads every other word, half a warp (doubles) or a
    // quarter of it (float4) uses each bank twice: one more wavefront in each of the 2 halves or the 4
    // quarters.
    check_shared(figures_of("wide_double", [&] { wide_double<<<1, 64>>>((double*)i, (double*)o); }), 4, 2);
    check_shared(figures_of("wide_float4", [&] { wide_float4<<<1, 64>>>((float4*)i, (float4*)o); }), 4, 4);
    check_shared(figures_of("broadcast", [&] { broadcast<<<1, 32>>>(i, o); }), 2, 0);

    Device<int> counters(std::vector<int>(2));
    f = figures_of("branch", [&] { branch<<<1, 64>>>(counters.get(), true); });
    CHECK(f["divergent_branches"] >= 1);
    CHECK(f["branches"] >= f["divergent_branches"]);
    f = figures_of("branch", [&] { branch<<<1, 64>>>(counters.get(), false); });
    CHECK_FIGURE(f, "divergent_branches", 0);
}

TEST_CASE("ptxsim: figures of the matrix product") {
    WithOptions restore;
    ptxsim::options().figures = "figures";
    Device<__nv_bfloat16> a(random_bf16(kM * kK, 1)), b(random_bf16(kK * kN, 2));
    Device<float> c(kM * kN);
    const auto f = figures_of(
        "matmul", [&] { samples::matmul<<<dim3(2, 2), 128>>>(a.get(), b.get(), c.get(), kM, kN, kK); });
    // 4 blocks of 4 warps. Each warp has 3 tiles of 2 steps, and a step has 2 x 4 products of 16 x 8 x 16.
    const int products = 4 * 4 * 3 * 2 * 8;
    CHECK_FIGURE(f, "mma", products);
    CHECK_FIGURE(f, "tensor_flops", products * 2 * 16 * 8 * 16);
    CHECK_FIGURE(f, "global_store_bytes", kM * kN * 4);
}

TEST_CASE("ptxsim: a process that ends writes its figures, reports its leaks and says so by its status") {
    const std::string path = "/tmp/ptxsim_figures_" + std::to_string(getpid()) + ".json";
    for (bool leaks : {false, true}) {
        const pid_t child = fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            if (!freopen("/dev/null", "w", stderr)) _exit(1);
            ptxsim::take_reports();
            ptxsim::options().figures = path;
            float* data;
            if (cudaMalloc(&data, 4096) != cudaSuccess || cudaMemset(data, 0, 4096) != cudaSuccess) _exit(1);
            samples::copy_float<<<2, 128>>>(data, data + 512);
            if (cudaDeviceSynchronize() != cudaSuccess) _exit(1);
            if (!leaks) cudaFree(data);
            exit(0);
        }
        int status;
        REQUIRE(waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status));
        CHECK(WEXITSTATUS(status) == (leaks ? ptxsim::kReportStatus : 0));
        std::ifstream file(path);
        const auto figures = nlohmann::json::parse(file, nullptr, false);
        REQUIRE(figures.is_object());
        CHECK(std::any_of(figures["kernels"].begin(), figures["kernels"].end(),
                          [](auto& kernel) { return kernel["name"] == "samples::copy_float"; }));
        unlink(path.c_str());
    }
}

}  // namespace
