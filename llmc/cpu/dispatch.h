// Chooses which copy of the CPU model (isa.h) the program runs: the best one that this machine can run, or
// the one that the environment variable LLMC_ISA names.
#pragma once
#include <cstdlib>
#include <string>

#include "llmc/error.h"
#include "llmc/model.h"

namespace cpu {

enum class Isa { native, avx2, avx512, avx512_bf16 };

// Each copy of train_gpt.cpp defines one specialisation.
template <Isa>
Backend backend();

#ifdef LLMC_DISPATCH  // the program has copies for x86-64: all three, or those that its processor can run
template <>
Backend backend<Isa::avx2>();
template <>
__attribute__((weak)) Backend backend<Isa::avx512>();
template <>
__attribute__((weak)) Backend backend<Isa::avx512_bf16>();

inline bool can_run(Isa isa) {
    bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
    return isa == Isa::avx512 ? avx512 : avx2;
}

struct Copy {
    const char* name;
    Isa isa;
    Backend (*backend)();
};
inline const Copy kCopies[] = {{"avx512_bf16", Isa::avx512_bf16, backend<Isa::avx512_bf16>},
                               {"avx512", Isa::avx512, backend<Isa::avx512>},
                               {"avx2", Isa::avx2, backend<Isa::avx2>}};

// The names of the instruction sets for which the program has copies.
inline std::string instruction_sets() {
    std::string names;
    for (const Copy& copy : kCopies)
        if (copy.backend) names += str(names.empty() ? "" : ", ", copy.name);
    return names;
}

inline Backend choose_backend() {
    const char* wanted = std::getenv("LLMC_ISA");
    for (const Copy& copy : kCopies) {
        if (wanted && std::string(wanted) != copy.name) continue;
        if (copy.backend && can_run(copy.isa)) {
            Backend backend = copy.backend();
            backend.name += str(", ", copy.name);
            return backend;
        }
        if (wanted) usage_error("LLMC_ISA=", wanted, ": this processor does not support it");
    }
    if (wanted) usage_error("LLMC_ISA=", wanted, ": expected avx512_bf16, avx512 or avx2");
    fail(
        "this program needs a processor with AVX2 (x86-64-v3); build it on this machine with make "
        "DISPATCH=0");
}
#else
template <>
Backend backend<Isa::native>();

inline std::string instruction_sets() {
    return "the instructions of the machine that built it";
}

inline Backend choose_backend() {
    return backend<Isa::native>();
}
#endif

}  // namespace cpu
