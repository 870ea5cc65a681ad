// The speed of ptxsim: lane-instructions per second of a few kernels, without checks and with all of them.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>
#include <vector>

#include "dev/ptxsim/device.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"

namespace {

void check(cudaError_t status) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "bench: %s\n", cudaGetErrorString(status));
    std::exit(1);
}

__global__ void fma_loop(float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float x = i, y = 1, z = 2, w = 3;
    for (int k = 0; k < n; k++) {
        x = fmaf(x, 0.5f, y);
        y = fmaf(y, 0.25f, z);
        z = fmaf(z, 0.125f, w);
        w = fmaf(w, 0.75f, x);
    }
    out[i] = x + y + z + w;
}

__global__ void saxpy(int n, float a, const float* x, float* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}

__global__ void reduce(const float* in, float* out) {
    __shared__ float sums[256];
    const int t = threadIdx.x;
    sums[t] = in[blockIdx.x * 256 + t];
    __syncthreads();
    for (int stride = 128; stride > 0; stride /= 2) {
        if (t < stride) sums[t] += sums[t + stride];
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = sums[0];
}

__global__ void mma_loop(float* out, int n) {
    const unsigned a = 0x3F803F80, b = 0x3F003F00;  // 1 and 0.5 in bf16
    float d[4] = {};
    for (int k = 0; k < n; k++)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a), "r"(b));
    out[blockIdx.x * blockDim.x + threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}

// Millions of lane-instructions and of mma.sync per second.
struct Speed {
    double instructions, products;
};

Speed measure(const std::function<void()>& launch) {
    launch();  // the first launch decodes the kernel, so it is not timed
    check(cudaDeviceSynchronize());
    ptxsim::clear_figures();
    const auto start = std::chrono::steady_clock::now();
    double seconds;
    do {
        launch();
        check(cudaDeviceSynchronize());
        seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    } while (seconds < 0.5);
    double instructions = 0, products = 0;
    const nlohmann::json figures = nlohmann::json::parse(ptxsim::figures_json());
    for (const nlohmann::json& kernel : figures["kernels"]) {
        instructions += kernel["lane_instructions"].get<double>();
        products += kernel["mma"].get<double>();
    }
    return {instructions / seconds / 1e6, products / seconds / 1e6};
}

}  // namespace

int main() {
    const int n = 1 << 20;
    float *x, *y;
    check(cudaMalloc(&x, n * sizeof(float)));
    check(cudaMalloc(&y, n * sizeof(float)));
    check(cudaMemset(x, 0, n * sizeof(float)));
    check(cudaMemset(y, 0, n * sizeof(float)));
    const struct {
        const char* name;
        std::function<void()> launch;
    } kernels[] = {
        {"fma loop", [=] { fma_loop<<<64, 256>>>(y, 100); }},
        {"saxpy of 1M", [=] { saxpy<<<n / 256, 256>>>(n, 0.5f, x, y); }},
        {"shared reduction", [=] { reduce<<<1024, 256>>>(x, y); }},
        {"mma loop", [=] { mma_loop<<<16, 128>>>(y, 100); }},
    };
    ptxsim::options().figures = "figures";
    std::printf("%-18s %28s %28s\n", "", "without checks", "with all checks");
    std::printf("%-18s %14s %13s %14s %13s\n", "M a second", "lane-instr.", "mma", "lane-instr.", "mma");
    for (const auto& kernel : kernels) {
        std::printf("%-18s", kernel.name);
        for (bool checks : {false, true}) {
            ptxsim::Options& options = ptxsim::options();
            options.bounds = options.uninit = options.race = checks;
            const Speed speed = measure(kernel.launch);
            std::printf(" %14.1f %13.3f", speed.instructions, speed.products);
            std::fflush(stdout);
        }
        std::printf("\n");
    }
    check(cudaFree(x));
    check(cudaFree(y));
    ptxsim::options().figures.clear();
}
