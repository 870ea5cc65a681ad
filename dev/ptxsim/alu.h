// What alu.cpp and comparisons.cpp share: the table of instructions, and the functions that add to it.
#pragma once
#include <string>
#include <type_traits>
#include <unordered_map>

#include "dev/ptxsim/floats.h"
#include "dev/ptxsim/lanes.h"

namespace ptxsim {

inline std::unordered_map<std::string, AluEntry>& table() {
    static std::unordered_map<std::string, AluEntry> t;
    return t;
}

template <class D, class... S, class F>
void add(const std::string& mnemonic, F) {
    table()[mnemonic] = {&map_lanes<F, D, S...>, {sizeof(D), sizeof(S)...}};
}

// Calls f with `pattern` in which the type's name replaces "*".
template <class F>
void add_text(std::string pattern, const char* type, F f) {
    pattern.replace(pattern.find('*'), 1, type);
    f(pattern);
}
template <class... T, class F>
void for_types(const std::string& pattern, std::initializer_list<const char*> names, F f) {
    auto name = names.begin();
    (add_text(pattern, *name++, [&](const std::string& mnemonic) { f.template operator()<T>(mnemonic); }),
     ...);
}
template <class F>
void for_signed(const std::string& pattern, F f) {
    for_types<int16_t, int32_t, int64_t>(pattern, {"s16", "s32", "s64"}, f);
}
template <class F>
void for_unsigned(const std::string& pattern, F f) {
    for_types<uint16_t, uint32_t, uint64_t>(pattern, {"u16", "u32", "u64"}, f);
}
template <class F>
void for_integers(const std::string& pattern, F f) {
    for_signed(pattern, f);
    for_unsigned(pattern, f);
}
template <class F>
void for_bits(const std::string& pattern, F f) {
    for_types<uint16_t, uint32_t, uint64_t>(pattern, {"b16", "b32", "b64"}, f);
}

// Applies F to both halves of a pair.
template <class H, class F, class... S>
struct PairOp {
    uint32_t operator()(S... s) const {
        H low = F()(H{(uint16_t)s}...), high = F()(H{(uint16_t)(s >> 16)}...);
        return (uint32_t)high.bits << 16 | low.bits;
    }
};
void add_comparisons();  // comparisons.cpp: setp, set, selp, slct, mov, and the logic of predicates

}  // namespace ptxsim
