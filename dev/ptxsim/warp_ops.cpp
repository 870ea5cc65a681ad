// Instructions in which lanes see each other (shfl, vote, match, redux, barriers), and a few that are neither
// arithmetic nor memory (printf, assert, clocks, packing).
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "dev/ptxsim/lanes.h"

namespace ptxsim {

namespace {

// ---- lanes

enum ShuffleMode { kUp, kDown, kButterfly, kIndex };

// The operands o are d, p, a, b, c. The value of a lane that does not take part is all ones.
template <ShuffleMode kMode>
void run_shuffle(Warp& w, const Instruction& in, Mask lanes) {
    const uint32_t *a = w.src<uint32_t>(in.o[2]), *b = w.src<uint32_t>(in.o[3]),
                   *c = w.src<uint32_t>(in.o[4]);
    uint32_t values[kWarpSize];
    Mask valid = 0;
    for (int lane = 0; lane < kWarpSize; lane++) {
        int distance = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
        int last = (lane & segment) | (clamp & ~segment), first = lane & segment, from = 0;
        bool ok;
        if (kMode == kUp) {
            from = lane - distance;
            ok = from >= last;
        } else {
            from = kMode == kDown        ? lane + distance
                   : kMode == kButterfly ? lane ^ distance
                                         : first | (distance & ~segment);
            ok = from <= last;
        }
        if (!ok) from = lane;
        valid |= (Mask)ok << lane;
        values[lane] = lanes >> from & 1 ? a[from] : ~0u;
    }
    put(w.reg<uint32_t>(in.o[0]), values, lanes);
    put_predicate(w, in.o[1], valid, lanes);
}

// The operands o are d, a.
template <int kWhat>  // 0: all, 1: any, 2: uni, 3: ballot
void run_vote(Warp& w, const Instruction& in, Mask lanes) {
    Mask a = *w.src<Mask>(in.o[1]);
    if (in.aux & 1 << 8) a = ~a;
    a &= lanes;
    if (kWhat == 3) {
        uint32_t* d = w.reg<uint32_t>(in.o[0]);
        each(lanes, [&](int i) { d[i] = a; });
    } else {
        bool yes = kWhat == 0 ? a == lanes : kWhat == 1 ? a != 0 : a == lanes || a == 0;
        put_predicate(w, in.o[0], yes ? kAllLanes : 0, lanes);
    }
}

// The operands o are d, p, a.
template <class T, bool kAll>
void run_match(Warp& w, const Instruction& in, Mask lanes) {
    const T* a = w.src<T>(in.o[2]);
    uint32_t values[kWarpSize] = {};
    bool alike = true;
    each(lanes, [&](int i) {
        each(lanes, [&](int j) { values[i] |= (uint32_t)(a[i] == a[j]) << j; });
        alike &= values[i] == lanes;
    });
    if (kAll) std::fill_n(values, kWarpSize, alike ? lanes : 0);
    put(w.reg<uint32_t>(in.o[0]), values, lanes);
    if (kAll) put_predicate(w, in.o[1], alike ? kAllLanes : 0, lanes);
}

template <class T, class F>
void run_reduce(Warp& w, const Instruction& in, Mask lanes) {
    const T* a = w.src<T>(in.o[1]);
    T total = a[__builtin_ctz(lanes)];
    each(lanes & (lanes - 1), [&](int i) { total = F()(total, a[i]); });
    T* d = w.reg<T>(in.o[0]);
    each(lanes, [&](int i) { d[i] = total; });
}

template <class T>
Handler find_reduce(const std::string& op) {
    auto run = []<class F>(F) -> Handler { return &run_reduce<T, F>; };
    if (op == "add") return run([](T a, T b) { return (T)((uint32_t)a + (uint32_t)b); });
    if (op == "min") return run([](T a, T b) { return std::min(a, b); });
    if (op == "max") return run([](T a, T b) { return std::max(a, b); });
    if (op == "and") return run([](T a, T b) { return a & b; });
    if (op == "or") return run([](T a, T b) { return a | b; });
    if (op == "xor") return run([](T a, T b) { return a ^ b; });
    return nullptr;
}

void run_active(Warp& w, const Instruction& in, Mask lanes) {
    uint32_t* d = w.reg<uint32_t>(in.o[0]);
    each(lanes, [&](int i) { d[i] = lanes; });
}

// The operands o are d, p. Elects the first lane.
void run_elect(Warp& w, const Instruction& in, Mask lanes) {
    if (in.o[0] != kIgnored) {
        uint32_t* d = w.reg<uint32_t>(in.o[0]);
        each(lanes, [&](int i) { d[i] = (uint32_t)__builtin_ctz(lanes); });
    }
    put_predicate(w, in.o[1], lanes & (0 - lanes), lanes);
}

void run_warp_barrier(Warp& w, const Instruction&, Mask lanes) {
    w.clock.sync_lanes(lanes, w.present, w.block->grid->races.events.last());
}

// ---- printf

// Reads a value of a thread at a generic address.
template <class T>
T fetch(Warp& w, int lane, uint64_t address) {
    T value = {};
    uint64_t window = address & kWindowMask;
    if (window == kLocalWindow) {
        size_t size = w.block->grid->kernel.local_bytes, offset = address - kLocalWindow;
        if (offset + sizeof(T) <= size) memcpy(&value, &w.local[lane * size + offset], sizeof(T));
    } else if (memory::contains(address, sizeof(T))) {
        memcpy(&value, memory::view(address), sizeof(T));
    }
    return value;
}

std::string fetch_text(Warp& w, int lane, uint64_t address) {
    std::string text;
    while (char c = fetch<char>(w, lane, address++)) text += c;
    return text;
}

template <class T>
std::string print(const std::string& spec, T value) {
    char text[512];
    snprintf(text, sizeof(text), spec.c_str(), value);
    return text;
}

std::string formatted(Warp& w, int lane, uint64_t format_address, uint64_t arguments) {
    std::string format = fetch_text(w, lane, format_address), out;
    auto take = [&]<class T>(T) {
        arguments = (arguments + sizeof(T) - 1) / sizeof(T) * sizeof(T);
        T value = fetch<T>(w, lane, arguments);
        arguments += sizeof(T);
        return value;
    };
    for (size_t i = 0; i < format.size(); i++) {
        if (format[i] != '%') {
            out += format[i];
            continue;
        }
        std::string spec = "%";
        bool is_long = false;
        for (i++; i < format.size() && !isalpha((unsigned char)format[i]) && format[i] != '%'; i++) {
            if (format[i] == '*') {
                spec += std::to_string(take(int()));
            } else {
                spec += format[i];
            }
        }
        for (; i < format.size() && strchr("hlzjt", format[i]); i++) is_long |= format[i] != 'h';
        char kind = i < format.size() ? format[i] : '%';
        if (kind == '%') {
            out += '%';
        } else if (strchr("fFeEgGaA", kind)) {
            out += print(spec + kind, take(double()));
        } else if (kind == 's') {
            out += print(spec + kind, fetch_text(w, lane, take(uint64_t())).c_str());
        } else if (kind == 'p') {
            out += print(spec + kind, (void*)take(uint64_t()));
        } else if (is_long) {
            out += print(spec + "ll" + kind, take((long long)0));
        } else {
            out += print(spec + kind, take(int()));
        }
    }
    return out;
}

uint64_t argument(Warp& w, const Instruction& in, int lane, int k, bool wide = true) {
    uint64_t address = kLocalWindow + (uint64_t)in.o[k];
    return wide ? fetch<uint64_t>(w, lane, address) : fetch<uint32_t>(w, lane, address);
}

}  // namespace

void run_printf(Warp& w, const Instruction& in, Mask lanes) {
    each(lanes, [&](int i) {
        std::string text = formatted(w, i, argument(w, in, i, 0), argument(w, in, i, 1));
        fwrite(text.data(), 1, text.size(), stdout);
        if (in.o[5] == kIgnored) return;
        size_t at = i * w.block->grid->kernel.local_bytes + in.o[5];
        int written = (int)text.size();
        memcpy(&w.local[at], &written, sizeof(written));
        std::fill_n(&w.local_known[at], sizeof(written), (uint8_t)kWritten);
    });
}

// __assertfail(message, file, line, function, character size)
void run_assert(Warp& w, const Instruction& in, Mask lanes) {
    int i = __builtin_ctz(lanes);
    std::string text = "fails the assertion `" + fetch_text(w, i, argument(w, in, i, 0)) + "' at " +
                       fetch_text(w, i, argument(w, in, i, 1)) + ":" +
                       std::to_string(argument(w, in, i, 2, false));
    report_at(Fault::trap, w, in, i, text);
    if (!w.block->grid->stopped()) w.block->grid->result = LaunchResult::assert_failed;
}

// The clock counts the instructions of all warps of the grid.
void run_clock(Warp& w, const Instruction& in, Mask lanes) {
    uint64_t now = w.block->grid->instructions;
    if ((Special)in.aux == Special::clock_hi) now >>= 32;
    if ((Special)in.aux == Special::globaltimer)
        now = (uint64_t)std::chrono::system_clock::now().time_since_epoch().count();
    if (in.memory.register_bytes == 8) {
        uint64_t* d = w.reg<uint64_t>(in.o[0]);
        each(lanes, [&](int i) { d[i] = now; });
    } else {
        uint32_t* d = w.reg<uint32_t>(in.o[0]);
        each(lanes, [&](int i) { d[i] = (uint32_t)now; });
    }
}

// o[0] is the whole value, and o[1], o[2], ... are its parts. The first part is in the low bits.
void run_pack(Warp& w, const Instruction& in, Mask lanes) {
    int whole = in.memory.register_bytes, part = in.memory.bytes;
    std::byte* d = w.reg<std::byte>(in.o[0]);
    for (int e = 0; e < in.memory.elements; e++) {
        const std::byte* s = w.src<std::byte>(in.o[1 + e]);
        each(lanes, [&](int i) { memcpy(d + i * whole + e * part, s + i * part, part); });
    }
}

void run_unpack(Warp& w, const Instruction& in, Mask lanes) {
    int whole = in.memory.register_bytes, part = in.memory.bytes;
    std::vector<std::byte> source(w.src<std::byte>(in.o[0]), w.src<std::byte>(in.o[0]) + whole * kWarpSize);
    for (int e = 0; e < in.memory.elements; e++) {
        if (in.o[1 + e] == kIgnored) continue;
        std::byte* d = w.reg<std::byte>(in.o[1 + e]);
        each(lanes, [&](int i) { memcpy(d + i * part, source.data() + i * whole + e * part, part); });
    }
}

void run_to_shared(Warp& w, const Instruction& in, Mask lanes) {
    const uint64_t* a = w.src<uint64_t>(in.o[1]);
    uint64_t values[kWarpSize];
    for (int i = 0; i < kWarpSize; i++)
        values[i] = (a[i] & kWindowMask) == kSharedWindow ? a[i] & ~kWindowMask : a[i];
    put(w.reg<uint64_t>(in.o[0]), values, lanes);
}

void run_from_shared(Warp& w, const Instruction& in, Mask lanes) {
    const uint64_t* a = w.src<uint64_t>(in.o[1]);
    uint64_t values[kWarpSize];
    for (int i = 0; i < kWarpSize; i++) values[i] = a[i] | kSharedWindow;
    put(w.reg<uint64_t>(in.o[0]), values, lanes);
}

void run_is_space(Warp& w, const Instruction& in, Mask lanes) {
    const uint64_t* a = w.src<uint64_t>(in.o[1]);
    Mask yes = 0;
    for (int i = 0; i < kWarpSize; i++) {
        uint64_t window = a[i] & kWindowMask;
        bool is = in.memory.space == Space::shared  ? window == kSharedWindow
                  : in.memory.space == Space::local ? window == kLocalWindow
                  : in.memory.space == Space::param ? window == kParamWindow
                                                    : window == 0;
        yes |= (Mask)is << i;
    }
    put_predicate(w, in.o[0], yes, lanes);
}

namespace {

bool has(const Statement& s, const char* modifier) {
    return std::find(s.modifiers.begin(), s.modifiers.end(), modifier) != s.modifiers.end();
}

// If the first operand is d without |p, inserts kIgnored for p, so that the other operands keep their places.
void split_pair(const Statement& s, Instruction* in) {
    if (s.operands.size() > 1 && s.operands[1].lane_predicate) return;
    for (int i = kAddress - 1; i > 1; i--) in->o[i] = in->o[i - 1];
    in->o[1] = kIgnored;
}

bool find_barrier(const Statement& s, Instruction* in) {
    in->flow = Flow::barrier;
    bool negated = in->aux & 1 << 8, aligned = s.op == "bar" || has(s, "aligned");
    int kind = has(s, "arrive") ? 1 : has(s, "popc") ? 2 : has(s, "and") ? 3 : has(s, "or") ? 4 : 0;
    int32_t d = kIgnored, vote = kIgnored;
    int n = (int)s.operands.size();
    std::vector<int32_t> places(in->o, in->o + n);
    if (kind >= 2) {
        d = places.front();
        vote = places.back();
        places = std::vector<int32_t>(places.begin() + 1, places.end() - 1);
    }
    in->o[0] = d;
    in->o[1] = places.empty() ? kIgnored : places[0];
    in->o[2] = places.size() > 1 ? places[1] : kIgnored;
    in->o[3] = vote;
    in->aux = kind | negated << 8 | aligned << 9;
    return true;
}

}  // namespace

bool find_warp(const Statement& s, Instruction* in) {
    auto sync = [&](Handler run, int32_t mask) {
        in->run = run;
        in->flow = Flow::sync;
        in->sync_mask = mask;
        return run != nullptr;
    };
    if (s.op == "mma") return find_mma(s, in);
    if (s.op == "shfl" && has(s, "sync")) {
        split_pair(s, in);
        Handler run = has(s, "up")     ? &run_shuffle<kUp>
                      : has(s, "down") ? &run_shuffle<kDown>
                      : has(s, "bfly") ? &run_shuffle<kButterfly>
                                       : &run_shuffle<kIndex>;
        return sync(run, in->o[5]);
    }
    if (s.op == "vote" && has(s, "sync"))
        return sync(has(s, "ballot") ? &run_vote<3>
                    : has(s, "all")  ? &run_vote<0>
                    : has(s, "any")  ? &run_vote<1>
                                     : &run_vote<2>,
                    in->o[2]);
    if (s.op == "match") {
        split_pair(s, in);
        bool wide = s.modifiers.back() == "b64";
        return sync(has(s, "all") ? (wide ? &run_match<uint64_t, true> : &run_match<uint32_t, true>)
                                  : (wide ? &run_match<uint64_t, false> : &run_match<uint32_t, false>),
                    in->o[3]);
    }
    if (s.op == "redux" && s.modifiers.size() == 3) {
        bool is_signed = s.modifiers[2] == "s32";
        return sync(is_signed ? find_reduce<int32_t>(s.modifiers[1]) : find_reduce<uint32_t>(s.modifiers[1]),
                    in->o[2]);
    }
    if (s.op == "elect") {
        split_pair(s, in);
        return sync(&run_elect, in->o[2]);
    }
    if (s.op == "activemask") {
        in->run = &run_active;
        return true;
    }
    if (s.op == "bar" && has(s, "warp")) return sync(&run_warp_barrier, in->o[0]);
    if (s.op == "bar" || s.op == "barrier") return !has(s, "cluster") && find_barrier(s, in);
    return false;
}

}  // namespace ptxsim
