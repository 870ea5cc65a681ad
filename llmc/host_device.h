// For formulas that stand once, for the processor and for kernels: nvcc compiles them for both.
#pragma once

#ifdef __CUDACC__
#define LLMC_HD __host__ __device__
#else
#define LLMC_HD
#endif
