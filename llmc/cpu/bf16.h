// bfloat16 is the upper half of a float, rounded to nearest even. Arithmetic is done in float. Conversions
// are implicit, so a loop reads the same for either type.
#pragma once
#include <bit>
#include <cstdint>

#include "llmc/cpu/isa.h"

namespace cpu::inline LLMC_ISA {

struct bf16 {
    uint16_t bits;

    bf16() = default;
    bf16(float x) {
        uint32_t u = std::bit_cast<uint32_t>(x);
        uint32_t rounded = u + 0x7FFF + (u >> 16 & 1);
        bits = (uint16_t)((x != x ? u | 0x400000 : rounded) >> 16);  // a NaN stays a NaN
    }
    operator float() const { return std::bit_cast<float>((uint32_t)bits << 16); }
};

}  // namespace cpu
