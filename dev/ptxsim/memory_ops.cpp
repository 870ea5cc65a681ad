// Loads, stores, atomics, cp.async and ldmatrix: finds the memory at an address, and checks and counts the
// access.
#include <algorithm>
#include "dev/ptxsim/floats.h"
#include "dev/ptxsim/lanes.h"
#include "dev/ptxsim/memory_host.h"

namespace ptxsim {

namespace {

constexpr uint64_t kFirstHostPage = 1 << 16;  // an address below it is a null pointer plus an offset

const char* verb(AccessKind kind) {
    return !writes(kind) ? "reads" : kind == AccessKind::atomic ? "updates" : "writes";
}

void stop(Warp& w, LaunchResult result) {
    LaunchResult& r = w.block->grid->result;
    if (r == LaunchResult::ok) r = result;
}

// Reports an access that the hardware would refuse, and stops the grid.
void refuse(Warp& w, const Instruction& in, int lane, uint64_t address, int bytes, AccessKind kind,
            bool alignment, const std::string& where) {
    Fault fault = alignment ? Fault::misaligned : Fault::out_of_bounds;
    if (!alignment && memory::was_freed(address)) fault = Fault::use_after_free;
    bool of_host = !alignment && address >= kFirstHostPage && !(address & kWindowMask) &&
                   !memory::is_device_address(address) && where.find("llocation ") == where.npos;
    if (of_host) fault = Fault::host_access;
    report_at(
        fault, w, in, lane,
        std::string(verb(kind)) + " " + std::to_string(bytes) + " bytes at " + hex(address) + ", " + where);
    stop(w, alignment ? LaunchResult::misaligned_address : LaunchResult::illegal_address);
}

// ---- figures

void count_global(Warp& w, const Instruction&, Mask lanes, const uint64_t* a, int bytes, AccessKind kind) {
    Figures& f = w.block->grid->figures;
    uint64_t sectors[kWarpSize * 2];
    int n = 0;
    uint64_t last = ~0ull;
    each(lanes, [&](int i) {
        for (uint64_t s = a[i] / 32; s <= (a[i] + bytes - 1) / 32; s++)
            if (s != last && n < (int)std::size(sectors)) sectors[n++] = last = s;
    });
    if (!std::is_sorted(sectors, sectors + n)) std::sort(sectors, sectors + n);
    n = (int)(std::unique(sectors, sectors + n) - sectors);
    uint64_t asked = (uint64_t)__builtin_popcount(lanes) * bytes;
    if (!writes(kind)) {
        f.load_bytes += asked, f.load_sectors += n;
    } else {
        f.store_bytes += asked, f.store_sectors += n;
    }
}

// Counts the extra wavefronts: lanes access shared memory in groups of 128 bytes, and different words of one
// bank need one wavefront each.
void count_shared(Warp& w, Mask lanes, const uint64_t* a, int bytes) {
    Figures& f = w.block->grid->figures;
    f.shared_accesses++;
    int group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    for (int first = 0; first < kWarpSize; first += group) {
        Mask part = lanes & (group == 32 ? kAllLanes : ((1u << group) - 1) << first);
        if (!part) continue;
        uint32_t words[64];
        int n = 0;
        uint8_t depth[32] = {};
        each(part, [&](int i) {
            for (uint32_t word = (uint32_t)(a[i] / 4); word <= (a[i] + bytes - 1) / 4 && n < 64; word++)
                words[n++] = word;
        });
        std::sort(words, words + n);
        n = (int)(std::unique(words, words + n) - words);
        int most = 1;
        for (int i = 0; i < n; i++) most = std::max<int>(most, ++depth[words[i] % 32]);
        f.bank_conflicts += most - 1;
    }
}

// ---- places

// The lanes whose bytes may be accessed, and where the bytes are. `repeated` are the lanes that write bytes
// which an earlier lane writes in the same instruction.
struct Located {
    Mask lanes = 0, repeated = 0;
    std::byte* at[kWarpSize];
};

bool aligned(Warp& w, const Instruction& in, int lane, uint64_t address, int bytes, AccessKind kind) {
    if (address % bytes == 0) return true;
    refuse(w, in, lane, address, bytes, kind, true, "which is not a multiple of " + std::to_string(bytes));
    return false;
}

void report_known(Warp& w, const Instruction& in, int lane, uint64_t address, int bytes, const uint8_t* known,
                  const char* space) {
    const uint8_t* end = known + bytes;
    if (std::find(known, end, kPending) != end) {
        report_at(Fault::missing_wait, w, in, lane,
                  std::string("reads ") + std::to_string(bytes) + " bytes at " + space + " " + hex(address) +
                      ", which cp.async writes, before a wait for the copy");
    } else {
        report_at(Fault::uninitialized, w, in, lane,
                  std::string("reads ") + std::to_string(bytes) + " bytes at " + space + " " + hex(address) +
                      ", which nobody has written");
    }
}

bool all_written(const uint8_t* known, int bytes) {
    uint64_t word;
    switch (bytes) {
        case 4: {
            uint32_t half;
            memcpy(&half, known, 4);
            return half == 0x01010101u;
        }
        case 8:
            memcpy(&word, known, 8);
            return word == 0x0101010101010101ull;
        case 16:
            return all_written(known, 8) && all_written(known + 8, 8);
        default:
            return std::all_of(known, known + bytes, [](uint8_t k) { return k == kWritten; });
    }
}

std::string shared_place(const Warp& w, uint64_t offset) {
    const Kernel& k = w.block->grid->kernel;
    const Variable* nearest = nullptr;
    uint64_t distance = ~0ull;
    for (const Variable& v : k.shared) {
        uint64_t d = offset < v.offset              ? v.offset - offset
                     : offset >= v.offset + v.bytes ? offset - v.offset - v.bytes
                                                    : 0;
        if (d < distance) distance = d, nearest = &v;
    }
    size_t dynamic = w.block->grid->launch.dynamic_shared;
    uint64_t from_dynamic = offset >= k.shared_bytes + dynamic ? offset - k.shared_bytes - dynamic
                            : offset < k.shared_bytes          ? k.shared_bytes - offset
                                                               : 0;
    if (dynamic && from_dynamic < distance)
        return std::to_string(from_dynamic) + " bytes away from the " + std::to_string(dynamic) +
               " bytes of dynamic shared memory";
    if (!nearest) return "but the block has no shared memory";
    return std::to_string(distance) +
           (offset >= nearest->offset + nearest->bytes ? " bytes after " : " bytes before ") + "shared " +
           nearest->name + " of " + std::to_string(nearest->bytes) + " bytes";
}

void locate_shared(Warp& w, const Instruction& in, Mask lanes, const uint64_t* a, int bytes, AccessKind kind,
                   Located* out) {
    Block& b = *w.block;
    const Options& o = options();
    Mask good = 0;
    each(lanes, [&](int i) {
        if (!aligned(w, in, i, a[i], bytes, kind)) return;
        bool inside = a[i] + bytes <= b.shared.size() && b.shared_known[a[i]] != kNoMemory &&
                      b.shared_known[a[i] + bytes - 1] != kNoMemory;
        if (!inside) return refuse(w, in, i, a[i], bytes, kind, false, shared_place(w, a[i]));
        out->at[i] = b.shared.data() + a[i];
        good |= 1u << i;
    });
    count_shared(w, good, a, bytes);
    if (o.uninit && reads(kind))
        each(good, [&](int i) {
            uint8_t* known = &b.shared_known[a[i]];
            if (all_written(known, bytes)) return;
            report_known(w, in, i, a[i], bytes, known, "shared");
            std::fill_n(known, bytes, (uint8_t)kWritten);
        });
    if (writes(kind))
        each(good, [&](int i) { std::fill_n(&b.shared_known[a[i]], bytes, (uint8_t)kWritten); });
    if (o.race && b.warps.size() * kWarpSize > 1) {
        uint64_t event = b.grid->races.events.add(b.number, w.index, &in);
        out->repeated |= check_races(w, in, good, a, bytes, kind, true, event);
    }
    out->lanes |= good;
}

void locate_global(Warp& w, const Instruction& in, Mask lanes, const uint64_t* a, int bytes, AccessKind kind,
                   Located* out) {
    Grid& g = *w.block->grid;
    const Options& o = options();
    Mask good = 0;
    each(lanes, [&](int i) {
        if (!aligned(w, in, i, a[i], bytes, kind)) return;
        const Allocation* m = g.last_allocation;
        if (!m || a[i] < m->address || a[i] + bytes > m->address + m->bytes) {
            m = memory::find(a[i]);
            if (m && a[i] + bytes > m->address + m->bytes) m = nullptr;
            if (!m) return refuse(w, in, i, a[i], bytes, kind, false, memory::describe(a[i]));
            g.last_allocation = m;
        }
        out->at[i] = memory::view(a[i]);
        good |= 1u << i;
    });
    count_global(w, in, good, a, bytes, kind);
    each(good, [&](int i) {
        uint8_t* known = memory::written(a[i]);
        if (!known) return;
        if (o.uninit && reads(kind) && !all_written(known, bytes)) {
            report_known(w, in, i, a[i], bytes, known, "global");
            memory::mark_written(a[i], bytes);
        }
        if (writes(kind)) memset(known, kWritten, bytes);
    });
    if (o.race) {
        uint64_t event = g.races.events.add(w.block->number, w.index, &in);
        out->repeated |= check_races(w, in, good, a, bytes, kind, false, event);
        if (!in_flight().empty()) check_in_flight(w, in, good, a, bytes, kind);
    }
    out->lanes |= good;
}

void locate_local(Warp& w, const Instruction& in, Mask lanes, const uint64_t* a, int bytes, AccessKind kind,
                  Located* out) {
    size_t size = w.block->grid->kernel.local_bytes;
    each(lanes, [&](int i) {
        uint64_t offset = a[i] - kLocalWindow;
        if (!aligned(w, in, i, offset, bytes, kind)) return;
        if (offset + bytes > size)
            return refuse(w, in, i, offset, bytes, kind, false,
                          "but local memory has " + std::to_string(size) + " bytes");
        size_t at = (size_t)i * size + offset;
        uint8_t* known = &w.local_known[at];
        if (!reads(kind)) {
            std::fill_n(known, bytes, (uint8_t)kWritten);
        } else if (options().uninit && !all_written(known, bytes)) {
            report_known(w, in, i, offset, bytes, known, "local");
            std::fill_n(known, bytes, (uint8_t)kWritten);
        }
        out->at[i] = &w.local[at];
        out->lanes |= 1u << i;
    });
}

void locate_parameter(Warp& w, const Instruction& in, Mask lanes, const uint64_t* a, int bytes,
                      AccessKind kind, Located* out) {
    std::vector<std::byte>& p = w.block->grid->parameters;
    each(lanes, [&](int i) {
        uint64_t offset = a[i] - kParamWindow;
        if (!aligned(w, in, i, offset, bytes, kind)) return;
        if (offset + bytes > p.size() || writes(kind))
            return refuse(
                w, in, i, offset, bytes, kind, false,
                "but the kernel's parameters are " + std::to_string(p.size()) + " bytes, read-only");
        out->at[i] = &p[offset];
        out->lanes |= 1u << i;
    });
}

Located locate(Warp& w, const Instruction& in, Mask lanes, Space space, uint64_t* a, int bytes,
               AccessKind kind) {
    Located out;
    if (space == Space::shared) {
        each(lanes, [&](int i) {
            if ((a[i] & kWindowMask) == kSharedWindow) a[i] &= ~kWindowMask;
        });
        locate_shared(w, in, lanes, a, bytes, kind, &out);
        return out;
    }
    Mask shared = 0, local = 0, parameter = 0;
    each(lanes, [&](int i) {
        uint64_t window = a[i] & kWindowMask;
        if (window == kSharedWindow) shared |= 1u << i, a[i] &= ~kWindowMask;
        if (window == kLocalWindow) local |= 1u << i;
        if (window == kParamWindow) parameter |= 1u << i;
    });
    Mask global = lanes & ~(shared | local | parameter);
    if (shared) locate_shared(w, in, shared, a, bytes, kind, &out);
    if (local) locate_local(w, in, local, a, bytes, kind, &out);
    if (parameter) locate_parameter(w, in, parameter, a, bytes, kind, &out);
    if (global) locate_global(w, in, global, a, bytes, kind, &out);
    return out;
}

void addresses(Warp& w, int32_t place, int bytes, int64_t offset, uint64_t* a) {
    if (bytes == 4) {
        const uint32_t* base = w.src<uint32_t>(place);
        for (int i = 0; i < kWarpSize; i++) a[i] = (uint64_t)base[i] + (uint64_t)offset;
    } else {
        const uint64_t* base = w.src<uint64_t>(place);
        for (int i = 0; i < kWarpSize; i++) a[i] = base[i] + (uint64_t)offset;
    }
}

Located locate(Warp& w, const Instruction& in, Mask lanes, int bytes, AccessKind kind) {
    uint64_t a[kWarpSize];
    addresses(w, in.o[kAddress], in.memory.address_bytes, in.imm, a);
    return locate(w, in, lanes, in.memory.space, a, bytes, kind);
}

// ---- loads and stores

template <class T, class R>
void load(Warp& w, const Instruction& in, Mask lanes) {
    AccessKind kind = in.memory.ordered ? AccessKind::ordered_read : AccessKind::read;
    Located l = locate(w, in, lanes, (int)sizeof(T) * in.memory.elements, kind);
    for (int e = 0; e < in.memory.elements; e++) {
        if (in.o[e] == kIgnored) continue;
        R* d = w.reg<R>(in.o[e]);
        each(l.lanes, [&](int i) {
            T value;
            memcpy(&value, l.at[i] + e * sizeof(T), sizeof(T));
            d[i] = (R)value;
        });
    }
}

template <class T, class R>
void store(Warp& w, const Instruction& in, Mask lanes) {
    AccessKind kind = in.memory.ordered ? AccessKind::ordered_write : AccessKind::write;
    Located l = locate(w, in, lanes, (int)sizeof(T) * in.memory.elements, kind);
    for (int e = 0; e < in.memory.elements; e++) {
        const R* s = w.src<R>(in.o[e]);
        each(l.lanes, [&](int i) {
            T value = (T)s[i];
            std::byte* to = l.at[i] + e * sizeof(T);
            if (l.repeated >> i & 1 && memcmp(to, &value, sizeof(T)) != 0)
                report_at(Fault::race, w, in, i,
                          "writes another value than another lane in the same instruction", &in);
            memcpy(to, &value, sizeof(T));
        });
    }
}

template <template <class, class> class Run>
Handler by_type(const MemoryAccess& m) {
    auto to = [&]<class T>() -> Handler {
        switch (m.register_bytes) {
            case 2:
                if constexpr (sizeof(T) <= 2) return Run<T, uint16_t>::handler;
                return nullptr;
            case 4:
                if constexpr (sizeof(T) <= 4) return Run<T, uint32_t>::handler;
                return nullptr;
            case 8:
                return Run<T, uint64_t>::handler;
        }
        return nullptr;
    };
    switch (m.bytes) {
        case 1:
            return m.is_signed ? to.template operator()<int8_t>() : to.template operator()<uint8_t>();
        case 2:
            return m.is_signed ? to.template operator()<int16_t>() : to.template operator()<uint16_t>();
        case 4:
            return m.is_signed ? to.template operator()<int32_t>() : to.template operator()<uint32_t>();
        case 8:
            return to.template operator()<uint64_t>();
    }
    return nullptr;
}
template <class T, class R>
struct Load {
    static constexpr Handler handler = &load<T, R>;
};
template <class T, class R>
struct Store {
    static constexpr Handler handler = &store<T, R>;
};

// ---- atomics, where f(old, b, c) is the new value

template <class T, class F>
void atomic(Warp& w, const Instruction& in, Mask lanes, F f) {
    Located l = locate(w, in, lanes, sizeof(T), AccessKind::atomic);
    bool returns = in.memory.elements == 1;  // atom returns the old value, red returns nothing
    const T* b = w.src<T>(in.o[returns]);
    const T* c = in.o[returns + 1] == kIgnored ? b : w.src<T>(in.o[returns + 1]);
    T results[kWarpSize];
    each(l.lanes, [&](int i) {
        T old;
        memcpy(&old, l.at[i], sizeof(T));
        T value = f(old, b[i], c[i]);
        memcpy(l.at[i], &value, sizeof(T));
        results[i] = old;
    });
    if (returns && in.o[0] != kIgnored) put(w.reg<T>(in.o[0]), results, l.lanes);
}

template <class T, class F>
void run_atomic(Warp& w, const Instruction& in, Mask lanes) {
    atomic<T>(w, in, lanes, F());
}
template <class T, class F>
Handler make_atomic(F) {
    return &run_atomic<T, F>;
}

template <class T>
Handler integer_atomic(const std::string& op) {
    using U = std::make_unsigned_t<T>;
    if (op == "add") return make_atomic<T>([](T a, T b, T) { return (T)((U)a + (U)b); });
    if (op == "min") return make_atomic<T>([](T a, T b, T) { return std::min(a, b); });
    if (op == "max") return make_atomic<T>([](T a, T b, T) { return std::max(a, b); });
    if (op == "and") return make_atomic<T>([](T a, T b, T) { return (T)(a & b); });
    if (op == "or") return make_atomic<T>([](T a, T b, T) { return (T)(a | b); });
    if (op == "xor") return make_atomic<T>([](T a, T b, T) { return (T)(a ^ b); });
    if (op == "exch") return make_atomic<T>([](T, T b, T) { return b; });
    if (op == "cas") return make_atomic<T>([](T a, T b, T c) { return a == b ? c : a; });
    if (op == "inc") return make_atomic<T>([](T a, T b, T) { return (T)(a >= b ? 0 : a + 1); });
    if (op == "dec") return make_atomic<T>([](T a, T b, T) { return (T)(a == 0 || a > b ? b : a - 1); });
    return nullptr;
}
template <class T>
Handler float_atomic(const std::string& op) {
    if (op == "add") return make_atomic<T>([](T a, T b, T) { return a + b; });
    if (op == "min") return make_atomic<T>([](T a, T b, T) { return std::fmin(a, b); });
    if (op == "max") return make_atomic<T>([](T a, T b, T) { return std::fmax(a, b); });
    return nullptr;
}
template <class H>
Handler half_atomic(const std::string& op) {
    if (op == "add")
        return make_atomic<H>([](H a, H b, H) { return to_half<H>((double)decode(a) + decode(b)); });
    if (op == "min")
        return make_atomic<H>([](H a, H b, H) { return to_half<H>(std::fmin(decode(a), decode(b))); });
    if (op == "max")
        return make_atomic<H>([](H a, H b, H) { return to_half<H>(std::fmax(decode(a), decode(b))); });
    return nullptr;
}
template <class H>
struct Pair {
    H low, high;
};
template <class H>
Handler pair_atomic(const std::string& op) {
    auto both = []<class F>(F) {
        return make_atomic<Pair<H>>([](Pair<H> a, Pair<H> b, Pair<H>) {
            return Pair<H>{to_half<H>(F()((double)decode(a.low), (double)decode(b.low))),
                           to_half<H>(F()((double)decode(a.high), (double)decode(b.high)))};
        });
    };
    if (op == "add") return both([](double a, double b) { return a + b; });
    if (op == "min") return both([](double a, double b) { return std::fmin(a, b); });
    if (op == "max") return both([](double a, double b) { return std::fmax(a, b); });
    return nullptr;
}

Handler find_atomic(const std::string& op, const std::string& type) {
    if (type == "u32" || type == "b32") return integer_atomic<uint32_t>(op);
    if (type == "s32") return integer_atomic<int32_t>(op);
    if (type == "u64" || type == "b64") return integer_atomic<uint64_t>(op);
    if (type == "s64") return integer_atomic<int64_t>(op);
    if (type == "b16") return integer_atomic<uint16_t>(op);
    if (type == "f32") return float_atomic<float>(op);
    if (type == "f64") return float_atomic<double>(op);
    if (type == "f16") return half_atomic<f16>(op);
    if (type == "bf16") return half_atomic<bf16>(op);
    if (type == "f16x2") return pair_atomic<f16>(op);
    if (type == "bf16x2") return pair_atomic<bf16>(op);
    return nullptr;
}

// ---- cp.async

void run_copy(Warp& w, const Instruction& in, Mask lanes) {
    uint64_t to[kWarpSize], from[kWarpSize];
    addresses(w, in.o[kAddress], in.memory.address_bytes, in.imm, to);
    addresses(w, in.o[kAddress + 1], in.memory.second_address_bytes, in.aux, from);
    int bytes = (int)*w.src<uint32_t>(in.o[0]);
    const uint32_t* source_bytes = in.o[1] == kIgnored ? nullptr : w.src<uint32_t>(in.o[1]);
    Block& b = *w.block;
    // The copy may read and write at any time from this event until the wait, which is another event.
    uint64_t event = options().race ? b.grid->races.events.add(b.number, w.index, &in) : 0;
    Mask good = 0;
    each(lanes, [&](int i) {
        if ((to[i] & kWindowMask) == kSharedWindow) to[i] &= ~kWindowMask;
        if (!aligned(w, in, i, to[i], bytes, AccessKind::write)) return;
        bool inside = to[i] + bytes <= b.shared.size() && b.shared_known[to[i]] != kNoMemory &&
                      b.shared_known[to[i] + bytes - 1] != kNoMemory;
        if (!inside) return refuse(w, in, i, to[i], bytes, AccessKind::write, false, shared_place(w, to[i]));
        int n = source_bytes ? (int)std::min<uint32_t>(source_bytes[i], (uint32_t)bytes) : bytes;
        std::fill_n(&b.shared_known[to[i]], bytes, (uint8_t)kPending);
        w.copies[i].push_back(
            {(uint32_t)to[i], from[i], (uint8_t)bytes, (uint8_t)n, w.copy_groups[i], event});
        w.has_copies |= 1u << i;
        good |= 1u << i;
    });
    if (event) check_races(w, in, good, to, bytes, AccessKind::write, true, event);
    count_shared(w, lanes, to, bytes);
    // Checks what is read from global memory, together for all lanes that read the same number of bytes.
    for (Mask rest = lanes; rest && !b.grid->stopped();) {
        int n = source_bytes ? (int)std::min<uint32_t>(source_bytes[__builtin_ctz(rest)], (uint32_t)bytes)
                             : bytes;
        Mask same = 0;
        each(rest, [&](int i) {
            int other = source_bytes ? (int)std::min<uint32_t>(source_bytes[i], (uint32_t)bytes) : bytes;
            if (other == n) same |= 1u << i;
        });
        rest &= ~same;
        if (n == bytes) {
            locate(w, in, same, Space::global, from, n, AccessKind::read);
        } else {
            for (int k = 0; k < n; k++) {  // byte by byte, because n need not be a power of two
                uint64_t one[kWarpSize];
                each(same, [&](int i) { one[i] = from[i] + k; });
                locate(w, in, same, Space::global, one, 1, AccessKind::read);
            }
        }
    }
}

void run_commit(Warp& w, const Instruction&, Mask lanes) {
    each(lanes, [&](int i) { w.copy_groups[i]++; });
}

void run_wait(Warp& w, const Instruction& in, Mask lanes) {
    uint32_t left = in.o[0] == kIgnored ? 0 : *w.src<uint32_t>(in.o[0]);
    Mask waiting = lanes & w.has_copies;
    uint64_t event =
        waiting && options().race ? w.block->grid->races.events.add(w.block->number, w.index, &in) : 0;
    each(waiting, [&](int i) { finish_copies(w, i, left, in.o[0] == kIgnored, event); });
}

// ---- ldmatrix, stmatrix

// Loads or stores matrices of 8 x 8 words of 16 bits. Lane 8 m + r has the address of row r of matrix m.
template <bool kStore>
void run_matrix(Warp& w, const Instruction& in, Mask lanes) {
    int matrices = in.memory.elements;
    bool transposed = in.memory.is_signed;
    Mask rows = matrices == 4 ? kAllLanes : (1u << (8 * matrices)) - 1;
    Located l = locate(w, in, rows & lanes, 16, kStore ? AccessKind::write : AccessKind::read);
    if ((l.lanes & rows) != (rows & lanes)) return;
    for (int m = 0; m < matrices; m++) {
        uint32_t values[kWarpSize];
        const uint32_t* fragment = kStore ? w.src<uint32_t>(in.o[m]) : nullptr;
        for (int i = 0; i < kWarpSize; i++) {
            uint16_t halves[2];
            if (kStore) memcpy(halves, fragment + i, 4);
            for (int k = 0; k < 2; k++) {
                int row = transposed ? 2 * (i % 4) + k : i / 4, column = transposed ? i / 4 : 2 * (i % 4) + k;
                std::byte* at = l.at[8 * m + row] + 2 * column;
                if (kStore) {
                    memcpy(at, halves + k, 2);
                } else {
                    memcpy(halves + k, at, 2);
                }
            }
            memcpy(values + i, halves, 4);
        }
        if (!kStore) put(w.reg<uint32_t>(in.o[m]), values, lanes);
    }
}

// __threadfence(): the next atomic hands on what the lanes have written so far.
void run_fence(Warp& w, const Instruction&, Mask) {
    for (int i = 0; i < kMaxWarps; i++) w.clock.at_fence[i] = std::max(w.clock.at_fence[i], w.clock.seen[i]);
    w.clock.at_fence[w.index] = w.block->grid->races.events.last();
}

bool is_one_of(const std::string& m, std::initializer_list<const char*> names) {
    return std::any_of(names.begin(), names.end(), [&](const char* n) { return m == n; });
}

bool space_of(const std::string& m, Space* space) {
    if (m == "global")
        *space = Space::global;
    else if (m == "shared" || m == "shared::cta")
        *space = Space::shared;
    else if (m == "local")
        *space = Space::local;
    else if (m == "const")
        *space = Space::constant;
    else if (m.substr(0, 5) == "param")
        *space = *space == Space::local ? Space::local : Space::param;
    else
        return false;
    return true;
}

bool find_copy(const Statement& s, Instruction* in) {
    if (s.modifiers.empty() || s.modifiers[0] != "async") return false;
    if (s.modifiers.size() == 2 && s.modifiers[1] == "commit_group")
        in->run = &run_commit;
    else if (s.modifiers.size() == 2 && s.modifiers[1] == "wait_group")
        in->run = &run_wait;
    else if (s.modifiers.size() == 2 && s.modifiers[1] == "wait_all")
        in->run = &run_wait;
    else if (is_one_of(s.modifiers.at(1), {"ca", "cg"}))
        in->run = &run_copy;
    return in->run != nullptr;
}

}  // namespace

void finish_copies(Warp& w, int lane, uint32_t left, bool all, uint64_t event) {
    std::vector<PendingCopy>& copies = w.copies[lane];
    Block& b = *w.block;
    size_t kept = 0;
    for (const PendingCopy& c : copies) {
        bool due = all || c.group + left < w.copy_groups[lane];
        if (!due) {
            copies[kept++] = c;
            continue;
        }
        std::fill_n(&b.shared[c.to], c.bytes, std::byte(0));
        if (c.source_bytes && memory::contains(c.from, c.source_bytes))
            memcpy(&b.shared[c.to], memory::view(c.from), c.source_bytes);
        std::fill_n(&b.shared_known[c.to], c.bytes, (uint8_t)kWritten);
        if (!event) continue;
        const Instruction& copy = *b.grid->races.events[c.event].instruction;
        uint64_t at[kWarpSize];
        at[lane] = c.to;
        check_races(w, copy, 1u << lane, at, c.bytes, AccessKind::write, true, event, c.event);
        at[lane] = c.from;
        check_races(w, copy, 1u << lane, at, c.source_bytes, AccessKind::read, false, event, c.event);
    }
    copies.resize(kept);
    if (!kept) w.has_copies &= ~(1u << lane);
}

bool find_memory(const Statement& s, Instruction* in) {
    MemoryAccess& m = in->memory;
    if (s.op == "membar" || s.op == "fence") {
        in->run = &run_fence;
        return true;
    }
    if (s.op == "cp") return find_copy(s, in);
    if (s.op == "ldmatrix" || s.op == "stmatrix") {
        for (const std::string& x : s.modifiers) {
            if (x == "x1")
                m.elements = 1;
            else if (x == "x2")
                m.elements = 2;
            else if (x == "x4")
                m.elements = 4;
            else if (x == "trans")
                m.is_signed = true;
            else if (!is_one_of(x, {"sync", "aligned", "m8n8", "shared", "shared::cta", "b16"}))
                return false;
        }
        m.space = Space::shared;
        in->flow = Flow::sync;
        in->sync_mask = kConvergedLanes;
        in->run = s.op[0] == 'l' ? &run_matrix<false> : &run_matrix<true>;
        return true;
    }
    bool atomic_op = s.op == "atom" || s.op == "red";
    if (!atomic_op && s.op != "ld" && s.op != "ldu" && s.op != "st") return false;
    std::string type, operation;
    Space symbol_space = m.space;
    m.space = symbol_space == Space::local ? Space::local : Space::generic;
    for (const std::string& x : s.modifiers) {
        if (space_of(x, &m.space)) continue;
        if (type_bytes(x))
            type = x;
        else if (x == "v2" || x == "v4" || x == "v8")
            m.elements = (uint8_t)(x[1] - '0');
        else if (is_one_of(x, {"volatile", "acquire", "release", "relaxed", "acq_rel", "mmio"}))
            m.ordered = true, m.releases |= x == "release" || x == "acq_rel";
        else if (atomic_op &&
                 is_one_of(x, {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"}))
            operation = x;
        else if (!is_one_of(x, {"nc",
                                "ca",
                                "cg",
                                "cs",
                                "lu",
                                "cv",
                                "wb",
                                "wt",
                                "weak",
                                "cta",
                                "gpu",
                                "sys",
                                "cluster",
                                "noftz",
                                "L1::evict_normal",
                                "L1::evict_first",
                                "L1::evict_last",
                                "L1::no_allocate",
                                "L1::evict_unchanged",
                                "L2::64B",
                                "L2::128B",
                                "L2::256B",
                                "L2::evict_first",
                                "L2::evict_last",
                                "L2::evict_normal",
                                "L2::cache_hint"}))
            return false;
    }
    if (m.space == Space::generic && symbol_space != Space::generic) m.space = symbol_space;
    if (type == "pred" || type.empty()) return false;
    m.bytes = (uint8_t)type_bytes(type);
    m.is_signed = type[0] == 's' && s.op != "st";
    if (atomic_op) {
        m.elements = s.op == "atom";
        in->run = find_atomic(operation, type);
    } else {
        in->run = s.op == "st" ? by_type<Store>(m) : by_type<Load>(m);
    }
    return in->run != nullptr;
}

}  // namespace ptxsim
