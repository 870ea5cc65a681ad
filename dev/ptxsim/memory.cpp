#include "dev/ptxsim/memory.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>

#include "dev/ptxsim/memory_host.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"

namespace ptxsim::memory {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kAlign = 512;  // the alignment of allocations, and the least gap between two of them
constexpr uint64_t kMostReserved = 4ull << 40, kLeastReserved = 16ull << 30;

struct Record {
    Allocation allocation;
    bool live = true;
    bool registered = false;  // the program's own memory, which cudaHostRegister pinned
};

// Reserved address space. Every part of it is allocated only once, from the bottom up.
struct Range {
    uint64_t begin = 0, size = 0, used = 0;
    bool holds(uint64_t address) const { return address - begin < size; }
};

// Both ranges are outside of State, so that view() and written() need only arithmetic.
Range device, host;
uint64_t view_offset = 0;     // from a device address to its address in the simulator's mapping
uint64_t written_offset = 0;  // from a device address to its shadow byte
int device_file = -1;
struct sigaction old_action;

struct State {
    std::map<uint64_t, Record> records;  // by address; freed allocations stay
    uint64_t count = 0;
    size_t used = 0, peak = 0;
    // A cache of the live allocations found last, by page, because kernels use few arrays many times.
    const Record* recent[256] = {};
};

State& state() {
    static State& s = *new State;
    return s;
}

uint64_t round_up(uint64_t n, uint64_t to) {
    return (n + to - 1) / to * to;
}

void* reserve(uint64_t size, int protection, int flags, int file) {
    void* p = mmap(nullptr, size, protection, flags | MAP_NORESERVE, file, 0);
    return p == MAP_FAILED ? nullptr : p;
}

// The fault that host code commits when it touches this address.
Fault fault_at(uint64_t address) {
    if (was_freed(address)) return Fault::use_after_free;
    return device.holds(address) ? Fault::host_access : Fault::out_of_bounds;
}

void on_fault(int signal, siginfo_t* info, void* context) {
    uint64_t address = (uint64_t)info->si_addr;
    if (!device.holds(address) && !host.holds(address)) {
        // This address is not ours, so the handler before this one gets the signal. If that one passes it
        // back to us, nobody handles it, and the default action ends the process.
        static bool passed_on = false;
        if (passed_on) old_action = {};
        passed_on = true;
        if ((old_action.sa_flags & SA_SIGINFO) && old_action.sa_sigaction)
            return old_action.sa_sigaction(signal, info, context);
        sigaction(signal, &old_action, nullptr);
        return;
    }
    uint64_t code = (uint64_t)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
    char where[512], what[64];
    std::snprintf(what, sizeof what, " touched 0x%llx, ", (unsigned long long)address);
    std::snprintf(where, sizeof where, "host code");
    Dl_info module;
    if (dladdr((void*)code, &module) && module.dli_fname)
        std::snprintf(where, sizeof where, "host code at %s+0x%llx%s%s", module.dli_fname,
                      (unsigned long long)(code - (uint64_t)module.dli_fbase), module.dli_sname ? " in " : "",
                      module.dli_sname ? module.dli_sname : "");
    Report r;
    r.fault = fault_at(address);
    r.text = std::string(where) + what + describe(address);
    report(std::move(r));
    std::cout.flush();
    std::fflush(nullptr);
    _exit(kReportStatus);
}

[[noreturn]] void give_up(const char* what) {
    std::fprintf(stderr, "ptxsim: %s: %s\n", what, std::strerror(errno));
    std::exit(2);
}

// Installs the handler. Called often, because test frameworks replace it by their own.
void catch_faults() {
    struct sigaction action = {}, before;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before);
    if (before.sa_sigaction != on_fault) old_action = before;
}

// Reserves as much address space as the system allows; sanitizers and limits leave less of it.
void initialize() {
    if (device.size) return;
    device_file = memfd_create("ptxsim", MFD_CLOEXEC);
    if (device_file < 0) give_up("memfd_create");
    for (uint64_t size = kMostReserved; size >= kLeastReserved; size /= 2) {
        if (ftruncate(device_file, (off_t)size) != 0) continue;
        void* outer = reserve(size, PROT_NONE, MAP_SHARED, device_file);
        void* inner = reserve(size, PROT_READ | PROT_WRITE, MAP_SHARED, device_file);
        void* shadow = reserve(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
        void* pinned = reserve(size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
        if (outer && inner && shadow && pinned) {
            // The first page stays unused, so that the byte before the first allocation belongs to none.
            device = {(uint64_t)outer, size, kPage};
            host = {(uint64_t)pinned, size, kPage};
            view_offset = (uint64_t)inner - device.begin;
            written_offset = (uint64_t)shadow - device.begin;
            return;
        }
        for (void* p : {outer, inner, shadow, pinned})
            if (p) munmap(p, size);
    }
    give_up("cannot reserve address space for the device's memory");
}

// The last record that begins at or before address.
std::map<uint64_t, Record>::iterator at_or_before(uint64_t address) {
    auto& records = state().records;
    auto it = records.upper_bound(address);
    return it == records.begin() ? records.end() : std::prev(it);
}

bool within(const Record& r, uint64_t address) {
    return address - r.allocation.address < r.allocation.bytes;
}

// Gives the system the pages back that lie wholly within a freed allocation.
void give_back(const Allocation& a) {
    uint64_t begin = round_up(a.address, kPage);
    uint64_t end = (a.address + a.bytes) / kPage * kPage;
    if (a.kind != MemoryKind::device) {
        end = round_up(a.address + a.bytes, kPage);
        if (begin >= end) return;
        madvise((void*)begin, end - begin, MADV_DONTNEED);
        mprotect((void*)begin, end - begin, PROT_NONE);
        return;
    }
    uint8_t* shadow = (uint8_t*)(a.address + written_offset);
    if (begin >= end) {
        std::memset(shadow, 0, a.bytes);
        return;
    }
    // The parts of the shadow that share a page with other allocations have to be cleared by hand.
    std::memset(shadow, 0, begin - a.address);
    std::memset((void*)(end + written_offset), 0, a.address + a.bytes - end);
    fallocate(device_file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(begin - device.begin),
              (off_t)(end - begin));
    madvise((void*)(begin + written_offset), end - begin, MADV_DONTNEED);
    mprotect((void*)begin, end - begin, PROT_NONE);
}

void retire(Record* r) {
    r->live = false;
    std::memset(state().recent, 0, sizeof state().recent);
    if (r->allocation.kind != MemoryKind::pinned) state().used -= r->allocation.bytes;
    if (!r->registered) give_back(r->allocation);
}

std::string in_words(const Record& r) {
    return r.allocation.what + " (allocation " + std::to_string(r.allocation.number) + ")" +
           (r.live ? "" : ", which was freed");
}

std::string bytes_in_words(uint64_t n) {
    return std::to_string(n) + (n == 1 ? " byte" : " bytes");
}

}  // namespace

uint64_t allocate(size_t bytes, MemoryKind kind, const std::string& what, bool is_variable) {
    initialize();
    State& s = state();
    bool counts = kind != MemoryKind::pinned;
    if (counts && (s.used > options().memory || bytes > options().memory - s.used)) return 0;
    bool on_device = kind == MemoryKind::device;
    Range& range = on_device ? device : host;
    uint64_t align = on_device ? kAlign : kPage;
    if (bytes > range.size) return 0;
    uint64_t step = round_up(bytes, align) + align;
    if (step > range.size - range.used) return 0;
    uint64_t address = range.begin + range.used;
    if (on_device) {
        if (!options().host) {
            uint64_t begin = address / kPage * kPage;
            mprotect((void*)begin, round_up(address + bytes, kPage) - begin, PROT_READ | PROT_WRITE);
        }
        std::memset((void*)(address + view_offset), 0xFF, bytes);
    } else if (bytes) {
        if (mprotect((void*)address, round_up(bytes, kPage), PROT_READ | PROT_WRITE) != 0) return 0;
        std::memset((void*)address, 0xFF, bytes);
    }
    catch_faults();
    range.used += step;
    if (counts) s.used += bytes;
    s.peak = std::max(s.peak, s.used);
    s.records[address].allocation = {address, bytes, kind, what, ++s.count, is_variable};
    return address;
}

bool free(uint64_t address) {
    auto it = state().records.find(address);
    if (it == state().records.end() || !it->second.live || it->second.registered) return false;
    retire(&it->second);
    return true;
}

bool register_host(uint64_t address, size_t bytes) {
    initialize();
    State& s = state();
    if (bytes == 0 || is_device_address(address) || host.holds(address)) return false;
    auto before = at_or_before(address + bytes - 1);
    if (before != s.records.end()) {
        const Allocation& a = before->second.allocation;
        if (before->second.live && a.address + a.bytes > address) return false;
    }
    Record& r = s.records[address];
    r.allocation = {address,   bytes, MemoryKind::pinned, "cudaHostRegister of " + bytes_in_words(bytes),
                    ++s.count, false};
    r.registered = true;
    return true;
}

bool unregister_host(uint64_t address) {
    auto it = state().records.find(address);
    if (it == state().records.end() || !it->second.registered) return false;
    retire(&it->second);
    state().records.erase(it);
    return true;
}

bool is_device_address(uint64_t address) {
    return device.holds(address);
}

void free_all() {
    for (auto it = state().records.begin(); it != state().records.end();) {
        Record& r = it->second;
        if (r.live && !r.allocation.is_variable) retire(&r);
        it = r.registered ? state().records.erase(it) : std::next(it);
    }
}

const Allocation* find(uint64_t address) {
    const Record*& recent = state().recent[address / kPage % 256];
    if (recent && within(*recent, address)) return &recent->allocation;
    auto it = at_or_before(address);
    if (it == state().records.end() || !it->second.live || !within(it->second, address)) return nullptr;
    recent = &it->second;
    return &recent->allocation;
}

bool was_freed(uint64_t address) {
    auto it = at_or_before(address);
    if (it == state().records.end() || it->second.live) return false;
    const Allocation& a = it->second.allocation;
    return within(it->second, address) || address == a.address;  // also an allocation of zero bytes
}

std::string describe(uint64_t address) {
    State& s = state();
    auto before = at_or_before(address);
    auto after = s.records.upper_bound(address);
    uint64_t past_end = UINT64_MAX, ahead = UINT64_MAX;
    if (before != s.records.end()) {
        const Allocation& a = before->second.allocation;
        if (within(before->second, address)) return "inside " + in_words(before->second);
        past_end = address - (a.address + a.bytes);
    }
    if (after != s.records.end()) ahead = after->first - address;
    if (past_end == UINT64_MAX && ahead == UINT64_MAX) return "where nothing was ever allocated";
    // If the address is far from every allocation, naming the nearest one would explain nothing.
    if (std::min(past_end, ahead) > (1ull << 32)) return "far from every allocation";
    if (past_end <= ahead)
        return (past_end ? bytes_in_words(past_end) + " after the end of " : "at the end of ") +
               in_words(before->second);
    return bytes_in_words(ahead) + " before " + in_words(after->second);
}

std::byte* view(uint64_t address) {
    return (std::byte*)(device.holds(address) ? address + view_offset : address);
}

bool contains(uint64_t address, size_t bytes) {
    const Allocation* a = find(address);
    return a && bytes <= a->bytes - (address - a->address);
}

uint8_t* written(uint64_t address) {
    return device.holds(address) ? (uint8_t*)(address + written_offset) : nullptr;
}

void mark_written(uint64_t address, size_t bytes) {
    if (uint8_t* w = written(address)) std::memset(w, 1, bytes);
}

void copy(uint64_t to, uint64_t from, size_t bytes) {
    if (bytes == 0) return;
    std::memmove(view(to), view(from), bytes);
    const uint8_t* source = written(from);
    if (!source)
        mark_written(to, bytes);
    else if (uint8_t* target = written(to))
        std::memmove(target, source, bytes);
}

void fill(uint64_t to, uint8_t value, size_t bytes) {
    if (bytes == 0) return;
    std::memset(view(to), value, bytes);
    mark_written(to, bytes);
}

Usage usage() {
    return {state().used, options().memory, state().peak};
}

void report_leaks() {
    for (const auto& [address, record] : state().records) {
        if (!record.live || record.registered || record.allocation.is_variable) continue;
        Report r;
        r.fault = Fault::leak;
        r.text = in_words(record) + " was never freed";
        report(std::move(r));
    }
}

}  // namespace ptxsim::memory
