// LLMC_HD marks functions that nvcc compiles for the processor and for kernels, so that a formula is written
// once.
#pragma once

#ifdef __CUDACC__
#define LLMC_HD __host__ __device__
#else
#define LLMC_HD
#endif
