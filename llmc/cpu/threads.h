// The number of threads. OpenMP may give a parallel region fewer threads than omp_get_max_threads() says. The
// environment variables OMP_THREAD_LIMIT and OMP_MAX_ACTIVE_LEVELS can cause this, and with OMP_DYNAMIC the
// number may even differ from region to region. Our loops are correct with any number, because OpenMP divides
// their work inside the region. But oneDNN divides a product into omp_get_max_threads() parts before it
// starts the threads, and the parts of missing threads would not be computed.
#pragma once
#include <omp.h>

#include <algorithm>

#include "llmc/cpu/isa.h"

namespace cpu::inline LLMC_ISA {

// Returns the number of threads that every parallel region has from now on, and makes omp_get_max_threads()
// return it, too. Must be called outside of parallel regions. Repeated calls are cheap, because only a
// changed number starts a region.
inline int settle_threads() {
    static int settled = 0;
    if (omp_get_max_threads() != settled || omp_get_dynamic()) {
        omp_set_dynamic(0);
        // LLVM's OpenMP prints a warning if a program asks for more threads than the limit allows.
        omp_set_num_threads(std::min(omp_get_max_threads(), omp_get_thread_limit()));
        int given = 1;
#pragma omp parallel
#pragma omp single
        given = omp_get_num_threads();
        omp_set_num_threads(given);
        settled = given;
    }
    return settled;
}

// Sets the number of threads (0: as many as there are cores) and returns it.
inline int set_threads(int threads) {
    if (threads > 0) omp_set_num_threads(threads);
    return settle_threads();
}

}  // namespace cpu
