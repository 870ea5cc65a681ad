// How many threads compute. OpenMP may give a parallel region fewer threads than omp_get_max_threads() says:
// OMP_THREAD_LIMIT and OMP_MAX_ACTIVE_LEVELS in the environment do that, and OMP_DYNAMIC does it anew for
// each region. The loops here are right with any number, because OpenMP shares out their work inside the
// region, but oneDNN cuts a product for omp_get_max_threads() before it starts them, and the parts of threads
// that do not come stay uncomputed.
#pragma once
#include <omp.h>

#include <algorithm>

#include "llmc/cpu/isa.h"

namespace cpu::inline LLMC_ISA {

// Returns how many threads every parallel region has from here on, which omp_get_max_threads() then says too.
// Called outside of parallel regions, as often as is liked: it starts one only where the number was changed.
inline int settle_threads() {
    static int settled = 0;
    if (omp_get_max_threads() != settled || omp_get_dynamic()) {
        omp_set_dynamic(0);
        // LLVM's OpenMP prints a warning where more are asked for than the limit allows.
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

}  // namespace cpu
