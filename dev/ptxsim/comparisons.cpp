// Comparisons, selections, moves, and the logic of predicates.
#include "dev/ptxsim/alu.h"

namespace ptxsim {

namespace {

// o[0] and o[1] are the two predicates that setp writes. o[4] is the predicate that the result is combined
// with; aux says how (1: and, 2: or, 3: xor), plus 8 if that predicate is negated.
template <class T, class C>
void compare(Warp& w, const Instruction& in, Mask lanes) {
    const T *a = w.src<T>(in.o[2]), *b = w.src<T>(in.o[3]);
    alignas(32) uint8_t bytes[kWarpSize];
    for (int i = 0; i < kWarpSize; i++) bytes[i] = C()(a[i], b[i]);
    Mask yes = pack(bytes), no = ~yes;
    if (in.aux) {  // the result is combined with another predicate
        Mask c = *w.src<Mask>(in.o[4]);
        if (in.aux & 8) c = ~c;
        int op = in.aux & 3;
        yes = op == 1 ? yes & c : op == 2 ? yes | c : yes ^ c;
        no = op == 1 ? no & c : op == 2 ? no | c : no ^ c;
    }
    put_predicate(w, in.o[1], no, lanes);
    put_predicate(w, in.o[0], yes, lanes);
}

template <class T, class C>
void add_compare(const std::string& name, const std::string& type, C) {
    uint8_t n = sizeof(T);
    if constexpr (std::is_arithmetic_v<T>) {
        auto ones = [](T a, T b) { return C()(a, b) ? ~0u : 0u; };
        add<uint32_t, T, T>("set." + name + ".u32." + type, ones);
        add<uint32_t, T, T>("set." + name + ".s32." + type, ones);
        add<float, T, T>("set." + name + ".f32." + type, [](T a, T b) { return C()(a, b) ? 1.0f : 0.0f; });
    }
    for (const char* middle : {"", ".and", ".or", ".xor"}) {
        table()["setp." + name + middle + "." + type] = {&compare<T, C>, {1, 1, n, n, 1}};
        if constexpr (std::is_same_v<T, float>) {
            auto flushed = [](T a, T b) { return C()(flush(a), flush(b)); };
            table()["setp." + name + middle + ".ftz." + type] = {&compare<T, decltype(flushed)>,
                                                                 {1, 1, n, n, 1}};
        }
    }
}

template <class T>
void add_type(const std::string& type) {
    auto op = [&]<class C>(const char* name, C c) { add_compare<T>(name, type, c); };
    op("eq", [](T a, T b) { return a == b; });
    op("ne", [](T a, T b) { return std::is_integral_v<T> ? a != b : a < b || a > b; });
    auto lt = [](T a, T b) { return a < b; };
    auto le = [](T a, T b) { return a <= b; };
    auto gt = [](T a, T b) { return a > b; };
    auto ge = [](T a, T b) { return a >= b; };
    op("lt", lt), op("le", le), op("gt", gt), op("ge", ge);
    if constexpr (std::is_integral_v<T>) {
        op("lo", lt), op("ls", le), op("hi", gt), op("hs", ge);
    } else {
        op("equ", [](T a, T b) { return !(a < b || a > b); });
        op("neu", [](T a, T b) { return !(a == b); });
        op("ltu", [](T a, T b) { return !(a >= b); });
        op("leu", [](T a, T b) { return !(a > b); });
        op("gtu", [](T a, T b) { return !(a <= b); });
        op("geu", [](T a, T b) { return !(a < b); });
        op("num", [](T a, T b) { return a == a && b == b; });
        op("nan", [](T a, T b) { return a != a || b != b; });
    }
}

template <class H>
void add_half_comparisons(const std::string& type) {
    auto op = [&]<class C>(const char* name, C) {
        add_compare<H>(name, type, [](H a, H b) { return C()(decode(a), decode(b)); });
        // With pairs, the first predicate compares the low halves and the second one the high halves.
        table()["setp." + std::string(name) + "." + type + "x2"] = {
            [](Warp& w, const Instruction& in, Mask lanes) {
                const uint32_t *a = w.src<uint32_t>(in.o[2]), *b = w.src<uint32_t>(in.o[3]);
                Mask low = 0, high = 0;
                for (int i = 0; i < kWarpSize; i++) {
                    low |= (Mask)C()(decode(H{(uint16_t)a[i]}), decode(H{(uint16_t)b[i]})) << i;
                    high |= (Mask)C()(decode(H{(uint16_t)(a[i] >> 16)}), decode(H{(uint16_t)(b[i] >> 16)}))
                            << i;
                }
                put_predicate(w, in.o[0], low, lanes);
                put_predicate(w, in.o[1], high, lanes);
            },
            {1, 1, 4, 4}};
        // Where the comparison holds, set writes 1.0 or all ones.
        std::string set = "set." + std::string(name);
        add<uint32_t, H, H>(set + ".u32." + type,
                            [](H a, H b) { return C()(decode(a), decode(b)) ? ~0u : 0u; });
        auto one = [](H a, H b) { return to_half<H>(C()(decode(a), decode(b)) ? 1.0 : 0.0); };
        auto ones = [](H a, H b) { return H{(uint16_t)(C()(decode(a), decode(b)) ? 0xFFFF : 0)}; };
        add<H, H, H>(set + "." + type + "." + type, one);
        add<uint32_t, uint32_t, uint32_t>(set + "." + type + "x2." + type + "x2",
                                          PairOp<H, decltype(one), uint32_t, uint32_t>());
        add<uint32_t, uint32_t, uint32_t>(set + ".u32." + type + "x2",
                                          PairOp<H, decltype(ones), uint32_t, uint32_t>());
    };
    using F = float;
    op("eq", [](F a, F b) { return a == b; });
    op("ne", [](F a, F b) { return a < b || a > b; });
    op("lt", [](F a, F b) { return a < b; });
    op("le", [](F a, F b) { return a <= b; });
    op("gt", [](F a, F b) { return a > b; });
    op("ge", [](F a, F b) { return a >= b; });
    op("equ", [](F a, F b) { return !(a < b || a > b); });
    op("neu", [](F a, F b) { return !(a == b); });
    op("ltu", [](F a, F b) { return !(a >= b); });
    op("leu", [](F a, F b) { return !(a > b); });
    op("gtu", [](F a, F b) { return !(a <= b); });
    op("geu", [](F a, F b) { return !(a < b); });
    op("num", [](F a, F b) { return a == a && b == b; });
    op("nan", [](F a, F b) { return a != a || b != b; });
}

template <class T>
void select(Warp& w, const Instruction& in, Mask lanes) {
    const T *a = w.src<T>(in.o[1]), *b = w.src<T>(in.o[2]);
    Mask p = *w.src<Mask>(in.o[3]);
    if (in.aux & 8) p = ~p;
    alignas(64) T values[kWarpSize];
    for (int i = 0; i < kWarpSize; i++) values[i] = p >> i & 1 ? a[i] : b[i];
    put(w.reg<T>(in.o[0]), values, lanes);
}

template <class F>
void combine(Warp& w, const Instruction& in, Mask lanes) {
    Mask a = *w.src<Mask>(in.o[1]), b = *w.src<Mask>(in.o[2]);
    if (in.aux & 2) a = ~a;
    if (in.aux & 4) b = ~b;
    put_predicate(w, in.o[0], F()(a, b), lanes);
}

void add_moves() {
    for (const char* type : {"b16", "u16", "s16", "f16", "bf16"}) {
        add<uint16_t, uint16_t>(std::string("mov.") + type, [](uint16_t a) { return a; });
        table()[std::string("selp.") + type] = {&select<uint16_t>, {2, 2, 2, 1}};
    }
    for (const char* type : {"b32", "u32", "s32", "f32", "f16x2", "bf16x2"}) {
        add<uint32_t, uint32_t>(std::string("mov.") + type, [](uint32_t a) { return a; });
        table()[std::string("selp.") + type] = {&select<uint32_t>, {4, 4, 4, 1}};
    }
    for (const char* type : {"b64", "u64", "s64", "f64"}) {
        add<uint64_t, uint64_t>(std::string("mov.") + type, [](uint64_t a) { return a; });
        table()[std::string("selp.") + type] = {&select<uint64_t>, {8, 8, 8, 1}};
    }
    for (const char* type : {"b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"}) {
        auto choose = [&]<class T>(T) {
            std::string op = std::string("slct.") + type, ftz = std::string("slct.ftz.") + type;
            add<T, T, T, int32_t>(op + ".s32", [](T a, T b, int32_t c) { return c >= 0 ? a : b; });
            add<T, T, T, float>(op + ".f32", [](T a, T b, float c) { return c >= 0 ? a : b; });
            add<T, T, T, float>(ftz + ".f32", [](T a, T b, float c) { return flush(c) >= 0 ? a : b; });
        };
        if (type_bytes(type) == 2) choose(uint16_t());
        if (type_bytes(type) == 4) choose(uint32_t());
        if (type_bytes(type) == 8) choose(uint64_t());
    }
    auto bits = [&]<class F>(const char* name, F) {
        table()[std::string(name) + ".pred"] = {&combine<F>, {1, 1, 1}};
    };
    bits("and", [](Mask a, Mask b) { return a & b; });
    bits("or", [](Mask a, Mask b) { return a | b; });
    bits("xor", [](Mask a, Mask b) { return a ^ b; });
    table()["not.pred"] = {[](Warp& w, const Instruction& in, Mask lanes) {
                               put_predicate(w, in.o[0], ~*w.src<Mask>(in.o[1]), lanes);
                           },
                           {1, 1}};
    table()["mov.pred"] = {[](Warp& w, const Instruction& in, Mask lanes) {
                               Mask a = *w.src<Mask>(in.o[1]);
                               put_predicate(w, in.o[0], in.aux & 2 ? ~a : a, lanes);
                           },
                           {1, 1}};
}

}  // namespace

void add_comparisons() {
    for_integers("*", []<class T>(auto& type) { add_type<T>(type); });
    for_bits("*", []<class T>(auto& type) { add_type<T>(type); });
    add_type<float>("f32");
    add_type<double>("f64");
    add_half_comparisons<f16>("f16");
    add_half_comparisons<bf16>("bf16");
    add_moves();
}

}  // namespace ptxsim
