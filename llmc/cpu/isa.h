// What is in llmc/cpu, and the model on top of it, is compiled once for each instruction set (Makefile), and
// the program chooses among the copies when it starts. Each lies in an inline namespace named after its
// instruction set, so that the linker never takes a function of one for that of another.
#pragma once

#ifndef LLMC_ISA
#define LLMC_ISA native  // tests and benchmarks: compiled once, for what the compiler was told
#endif
