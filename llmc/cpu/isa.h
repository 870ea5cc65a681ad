// The code in llmc/cpu, and the model that uses it, is compiled once for each instruction set (Makefile). The
// program chooses one of these copies when it starts. Each copy is in an inline namespace that has the name
// of its instruction set, so the linker cannot confuse functions of different copies.
#pragma once

#ifndef LLMC_ISA
#define LLMC_ISA native  // tests and benchmarks have a single copy, for the compiler's -march
#endif
