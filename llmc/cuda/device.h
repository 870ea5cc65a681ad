// What the program says about the GPU and about how it was built for it.
#pragma once
#include <algorithm>
#include <chrono>
#include <string>

#include "llmc/cuda/matmul.h"
#include "llmc/cuda/memory.h"
#include "llmc/cuda/nccl.h"
#include "llmc/model.h"

namespace gpu {

inline std::string device_name() {
    cudaDeviceProp properties;
    int device;
    check(cudaGetDevice(&device));
    check(cudaGetDeviceProperties(&properties, device));
    return properties.name;
}

// The host's threads only wait for the device, so one is enough.
inline int set_threads(int) {
    return 1;
}

// The text of --version about the build. The attribute is there because llmc/cuda/main.cpp, which is no CUDA
// code, calls this function, and nothing else does.
[[gnu::used]] inline std::string describe_build() {
    size_t cublas = cublasLtGetVersion();
    std::string architectures;
    for (int architecture : {__CUDA_ARCH_LIST__})
        architectures += str(architectures.empty() ? "" : ", ", "sm_", architecture / 10);
    return str("for GPUs of ", architectures, " and newer; nvcc ", __CUDACC_VER_MAJOR__, ".",
               __CUDACC_VER_MINOR__, ".", __CUDACC_VER_BUILD__, "; matrix products by cuBLASLt ",
               cublas / 10000, ".", cublas / 100 % 100, ".", cublas % 100, "; ", nccl_version());
}

// FLOP/s of a large matrix product. The matrices grow until a product takes a millisecond, so the simulator
// needs less than a second, too.
inline double measured_peak(Precision precision) {
    auto measure = [=](auto type) {
        using Real = decltype(type);
        DeviceArray<char> workspace(kMatmulWorkspace);
        MatmulContext context(workspace.get(), precision == Precision::tf32);
        double best = 0, seconds = 0;
        auto fits = [](size_t n) { return 3 * n * n * sizeof(Real) < memory_info().free; };
        for (int n = 512; n <= 8192 && seconds < 1e-3 && fits(n); n *= 2) {
            DeviceArray<Real> a((size_t)n * n), b((size_t)n * n), c((size_t)n * n);
            for (DeviceArray<Real>* x : {&a, &b}) check(cudaMemset(x->get(), 0, x->size() * sizeof(Real)));
            for (int repetition = 0; repetition < 5; repetition++) {  // the first one finds the algorithm
                check(cudaDeviceSynchronize());
                auto start = std::chrono::steady_clock::now();
                matmul(c.get(), a.get(), b.get(), n, n, n, false, false, false, {}, context, nullptr);
                check(cudaDeviceSynchronize());
                seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
                best = std::max(best, 2.0 * n * n * n / seconds);
            }
        }
        return best;
    };
    return precision == Precision::bf16 ? measure(bf16()) : measure(float());
}

}  // namespace gpu
