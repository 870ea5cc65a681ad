// The matrix rate of this processor.
#pragma once
#include <algorithm>
#include <chrono>
#include <vector>

#include "llmc/cpu/matmul.h"
#include "llmc/model.h"

namespace cpu::inline LLMC_ISA {

// FLOP/s of a matrix product whose matrices fit into the cache.
inline double measured_peak(Precision precision) {
    auto measure = [](auto type) {
        using Real = decltype(type);
        constexpr int n = 512;
        std::vector<Real> a(n * n, Real(1.0f)), b(n * n, Real(1.0f));
        std::vector<float> c(n * n);
        double best = 0;
        for (int repetition = 0; repetition < 8; repetition++) {  // the first one creates the primitive
            auto start = std::chrono::steady_clock::now();
            matmul(c.data(), a.data(), b.data(), n, n, n, false, false, false);
            std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            best = std::max(best, 2.0 * n * n * n / seconds.count());
        }
        return best;
    };
    return precision == Precision::bf16 ? measure(bf16()) : measure(float());
}

}  // namespace cpu
