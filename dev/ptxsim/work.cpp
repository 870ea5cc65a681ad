// Runs operations in an order that their dependencies allow, and the pending ones at the end of the process.
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>
#include <utility>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"
#include "dev/ptxsim/runtime.h"

namespace ptxsim {
namespace {

constexpr double kPatience = 100;  // milliseconds

struct State {
    std::vector<OperationRef> pending;  // in the order in which they were enqueued
    // Those pending operations that have other uses than Use::maybe. A kernel conflicts only with these.
    std::vector<OperationRef> pending_exact;
    std::vector<InFlight> beside;  // the operation that runs now
    std::vector<Overlap> overlaps;
    uint64_t visits = 0;
    uint64_t seed = 0, random = 0;
    bool running = false;
};

State& state() {
    static State& s = *new State;
    return s;
}

// SplitMix64. It starts again when a test sets another seed.
uint64_t next_random() {
    State& s = state();
    if (s.seed != options().seed) s.random = s.seed = options().seed;
    uint64_t z = s.random += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

double now_ms() {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::milli>(now).count();
}

// Begins an operation or goes on with it. False if it is not over, because other processes are late. After a
// kernel has failed, no operation runs any more.
bool run_operation(Operation* op) {
    if (op->task.run && !sticky_error()) {
        State& s = state();
        cudaError_t e = cudaSuccess;
        if (!op->begun) {
            s.running = op->task.type == cudaGraphNodeTypeHost;
            s.beside = std::move(op->beside);
            e = op->task.run();
            s.beside.clear();
            s.running = false;
            op->begun = true;
            if (op->task.over && e == cudaSuccess) return false;
        }
        if (op->task.over && e == cudaSuccess) {
            std::optional<cudaError_t> end = op->task.over();
            if (!end) return false;
            e = *end;
            s.overlaps.push_back({op->task.what, op->overlapped});
        }
        if (e != cudaSuccess) set_sticky_error(e);
    }
    op->done = true;
    op->finished = now_ms();
    op->after.clear();
    op->task = Task();
    return true;
}

// Marks the operations that come before one that comes directly after the operations `after`: their `visit`
// is the result.
uint64_t mark_earlier(const std::vector<OperationRef>& after) {
    uint64_t mark = ++state().visits;
    std::vector<Operation*> stack;
    for (const OperationRef& op : after) stack.push_back(op.get());
    while (!stack.empty()) {
        Operation* op = stack.back();
        stack.pop_back();
        if (op->done || op->visit == mark) continue;
        op->visit = mark;
        for (const OperationRef& before : op->after) stack.push_back(before.get());
    }
    return mark;
}

bool overlap(const MemoryUse& a, const MemoryUse& b) {
    return a.begin < b.begin + b.bytes && b.begin < a.begin + a.bytes;
}

// A kernel's pointers tell only which allocations it may use. So a kernel conflicts with an operation that
// allocates or frees one of them, but not with a copy, which may use another part of the allocation. Whether
// it does is found when the kernel runs (note_beside).
bool conflict(const MemoryUse& a, const MemoryUse& b) {
    if (!overlap(a, b)) return false;
    if (a.use == Use::lifetime || b.use == Use::lifetime) return true;
    if (a.use == Use::maybe || b.use == Use::maybe) return false;
    return a.use == Use::write || b.use == Use::write;
}

bool is_exact(const Operation& op) {
    const auto& uses = op.task.uses;
    return std::any_of(uses.begin(), uses.end(), [](const MemoryUse& u) { return u.use != Use::maybe; });
}

bool is_given_up(const Operation& op) {
    return op.task.given_up && *op.task.given_up;
}

// If one of the two is a kernel that has not run, it must not touch what the other one uses.
void note_beside(Operation* kernel, const Operation& other) {
    for (const MemoryUse& b : other.task.uses) {
        if (b.use != Use::read && b.use != Use::write) continue;
        for (const MemoryUse& a : kernel->task.uses)
            if (a.use == Use::maybe && overlap(a, b)) {
                kernel->beside.push_back({b.begin, b.bytes, b.use == Use::write, other.task.what});
                break;
            }
    }
}

// Compares an operation with the pending ones that nothing orders before it.
void find_unordered(Operation* op) {
    const auto& others = is_exact(*op) ? state().pending : state().pending_exact;
    if (others.empty()) return;
    uint64_t mark = mark_earlier(op->after);
    for (const OperationRef& earlier : others) {
        if (earlier->done || earlier->visit == mark || is_given_up(*earlier)) continue;
        earlier->overlapped += op->task.type == cudaGraphNodeTypeKernel && !op->task.over;
        bool clash = false;
        for (const MemoryUse& a : earlier->task.uses)
            for (const MemoryUse& b : op->task.uses) clash |= conflict(a, b);
        note_beside(op, *earlier);
        note_beside(earlier.get(), *op);
        if (!clash) continue;
        Report r;
        r.fault = Fault::unordered_copy;
        r.text = op->task.what + " uses memory that unfinished work of another stream uses (" +
                 earlier->task.what + "), and no event or synchronisation orders them";
        report(std::move(r));
    }
}

// The targets and all pending operations that they need. Sets the index of each.
std::vector<OperationRef> needed_for(const std::vector<OperationRef>& targets) {
    uint64_t mark = ++state().visits;
    std::vector<OperationRef> found;
    auto add = [&](const OperationRef& op) {
        if (op->done || op->visit == mark) return;
        op->visit = mark;
        op->index = found.size();
        found.push_back(op);
    };
    for (const OperationRef& op : targets) add(op);
    for (size_t i = 0; i < found.size(); i++) {
        OperationRef op = found[i];
        for (const OperationRef& before : op->after) add(before);
    }
    return found;
}

}  // namespace

bool in_host_function() {
    return state().running;
}

namespace {

// Runs at most `limit` operations of those that the targets need. False if none began or was over.
bool advance(const std::vector<OperationRef>& targets, size_t limit) {
    std::vector<OperationRef> needed = needed_for(targets);
    std::vector<size_t> missing(needed.size());
    std::vector<std::vector<size_t>> followers(needed.size());
    std::vector<size_t> ready;
    bool any = false;
    for (size_t i = 0; i < needed.size(); i++) {
        for (const OperationRef& before : needed[i]->after) {
            if (before->done) continue;
            missing[i]++;
            followers[before->index].push_back(i);
        }
        if (missing[i] == 0) ready.push_back(i);
    }
    for (size_t ran = 0; !ready.empty() && ran < limit; ran++) {
        std::swap(ready[next_random() % ready.size()], ready.back());
        size_t i = ready.back();
        ready.pop_back();
        bool begun = needed[i]->begun, over = run_operation(needed[i].get());
        any |= over || !begun;
        if (!over) continue;
        for (size_t f : followers[i])
            if (--missing[f] == 0) ready.push_back(f);
    }
    if (!any) return false;
    for (auto* list : {&state().pending, &state().pending_exact})
        std::erase_if(*list, [](const OperationRef& op) { return op->done; });
    return true;
}

// Whether an operation is, or needs, work in which other processes take part.
bool waits_for_others(const OperationRef& op) {
    const std::vector<OperationRef> needed = needed_for({op});
    return std::any_of(needed.begin(), needed.end(), [](const OperationRef& o) { return !!o->task.over; });
}

// Runs what can run without other processes, and drops the rest, as the end of a process does on hardware.
void finish_or_drop() {
    while (advance(std::vector<OperationRef>(state().pending), SIZE_MAX)) continue;
    state().pending.clear();
    state().pending_exact.clear();
}

// This function is in this file because every program links it. It runs after atexit's functions and the
// destructors of static objects, which may still free memory, and before set_exit_status().
__attribute__((destructor(102))) void at_end() {
    finish_or_drop();
    if (options().leak && !sticky_error()) memory::report_leaks();
    if (options().figures == "-") {
        std::fputs(figures_table().c_str(), stderr);
    } else if (!options().figures.empty()) {
        std::string json = figures_json();
        FILE* file = std::fopen(options().figures.c_str(), "w");
        bool written = file && std::fwrite(json.data(), 1, json.size(), file) == json.size();
        if (file && std::fclose(file) != 0) written = false;
        if (!written) std::fprintf(stderr, "ptxsim: cannot write %s\n", options().figures.c_str());
    }
}

}  // namespace

void complete(const std::vector<OperationRef>& targets, size_t limit) {
    if (limit != SIZE_MAX) {
        if (!advance(targets, limit)) sched_yield();
        return;
    }
    double since = 0;  // the time from which on other processes have been late
    while (!all_done(targets)) {
        if (advance(targets, limit)) {
            since = 0;
            continue;
        }
        double now = now_ms();
        if (since == 0) since = now;
        // The other processes may wait for work of this one that the targets do not need.
        if (now - since > kPatience) advance(std::vector<OperationRef>(state().pending), 1);
        std::this_thread::sleep_for(std::chrono::microseconds(now - since < 2 ? 20 : 200));
    }
}

void complete_all() {
    complete(std::vector<OperationRef>(state().pending));
}

bool all_done(const std::vector<OperationRef>& targets) {
    return std::all_of(targets.begin(), targets.end(), [](const OperationRef& op) { return op->done; });
}

bool any_pending() {
    return !state().pending.empty();
}

std::vector<Overlap> take_overlaps() {
    return std::exchange(state().overlaps, {});
}

const std::vector<InFlight>& in_flight() {
    return state().beside;
}

void report_freed_in_flight(const char* call, uint64_t address, size_t bytes) {
    for (const OperationRef& op : state().pending) {
        if (!op->task.over || is_given_up(*op)) continue;
        bool used = false;
        for (const MemoryUse& u : op->task.uses) used |= overlap(u, {address, bytes, Use::lifetime});
        if (!used) continue;
        Report r;
        r.fault = Fault::use_after_free;
        r.text = std::string(call) + " of " + memory::find(address)->what + " that " + op->task.what +
                 " still uses, and nothing has waited for it";
        report(std::move(r));
    }
}

OperationRef add_operation(Task task, std::vector<OperationRef> after) {
    auto op = std::make_shared<Operation>();
    op->task = std::move(task);
    op->after = std::move(after);
    std::erase_if(op->after, [](const OperationRef& before) { return before->done; });
    bool exact = is_exact(*op);
    if (!op->task.uses.empty()) find_unordered(op.get());
    if (!options().lazy) {
        if (op->after.empty()) {
            if (run_operation(op.get())) return op;
        } else if (!waits_for_others(op)) {
            complete({op});  // some operations before it are still pending from an earlier lazy mode
            return op;
        }
    }
    state().pending.push_back(op);
    if (exact) state().pending_exact.push_back(op);
    return op;
}

}  // namespace ptxsim
