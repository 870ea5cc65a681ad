// Runs operations in an order that their dependencies allow, and the pending ones at the end of the process.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"
#include "dev/ptxsim/runtime.h"

namespace ptxsim {
namespace {

struct State {
    std::vector<OperationRef> pending;  // in the order in which they were enqueued
    // Those pending operations that have other uses than Use::maybe. A kernel conflicts only with these.
    std::vector<OperationRef> pending_exact;
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

// After a kernel has failed, no operation runs any more.
void run_operation(Operation* op) {
    if (op->task.run && !sticky_error()) {
        State& s = state();
        s.running = op->task.type == cudaGraphNodeTypeHost;
        cudaError_t e = op->task.run();
        s.running = false;
        if (e != cudaSuccess) set_sticky_error(e);
    }
    op->done = true;
    op->finished = now_ms();
    op->after.clear();
    op->task = Task();
}

// Whether `earlier` comes before an operation that comes directly after the operations `after`.
bool ordered(const Operation* earlier, const std::vector<OperationRef>& after) {
    uint64_t mark = ++state().visits;
    std::vector<Operation*> stack;
    for (const OperationRef& op : after) stack.push_back(op.get());
    while (!stack.empty()) {
        Operation* op = stack.back();
        stack.pop_back();
        if (op == earlier) return true;
        if (op->done || op->visit == mark) continue;
        op->visit = mark;
        for (const OperationRef& before : op->after) stack.push_back(before.get());
    }
    return false;
}

// A kernel's pointers tell only which allocations it may use. So a kernel conflicts with an operation that
// allocates or frees one of them, but not with a copy, which may use another part of the allocation.
bool conflict(const MemoryUse& a, const MemoryUse& b) {
    if (a.begin >= b.begin + b.bytes || b.begin >= a.begin + a.bytes) return false;
    if (a.use == Use::lifetime || b.use == Use::lifetime) return true;
    if (a.use == Use::maybe || b.use == Use::maybe) return false;
    return a.use == Use::write || b.use == Use::write;
}

bool is_exact(const Operation& op) {
    const auto& uses = op.task.uses;
    return std::any_of(uses.begin(), uses.end(), [](const MemoryUse& u) { return u.use != Use::maybe; });
}

void report_unordered(const Operation& op) {
    for (const OperationRef& earlier : is_exact(op) ? state().pending : state().pending_exact) {
        const MemoryUse* clash = nullptr;
        for (const MemoryUse& a : earlier->task.uses)
            for (const MemoryUse& b : op.task.uses)
                if (conflict(a, b)) clash = &b;
        if (!clash || ordered(earlier.get(), op.after)) continue;
        Report r;
        r.fault = Fault::unordered_copy;
        r.text = op.task.what + " uses memory that unfinished work of another stream uses (" +
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

// This function is in this file because every program links it. It runs after atexit's functions and the
// destructors of static objects, which may still free memory, and before set_exit_status().
__attribute__((destructor(102))) void at_end() {
    complete_all();
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

bool in_host_function() {
    return state().running;
}

void complete(const std::vector<OperationRef>& targets, size_t limit) {
    std::vector<OperationRef> needed = needed_for(targets);
    std::vector<size_t> missing(needed.size());
    std::vector<std::vector<size_t>> followers(needed.size());
    std::vector<size_t> ready;
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
        run_operation(needed[i].get());
        for (size_t f : followers[i])
            if (--missing[f] == 0) ready.push_back(f);
    }
    if (needed.empty()) return;
    for (auto* list : {&state().pending, &state().pending_exact})
        std::erase_if(*list, [](const OperationRef& op) { return op->done; });
}

void complete_all() {
    complete(std::vector<OperationRef>(state().pending));
}

bool all_done(const std::vector<OperationRef>& targets) {
    return std::all_of(targets.begin(), targets.end(), [](const OperationRef& op) { return op->done; });
}

OperationRef add_operation(Task task, std::vector<OperationRef> after) {
    auto op = std::make_shared<Operation>();
    op->task = std::move(task);
    op->after = std::move(after);
    std::erase_if(op->after, [](const OperationRef& before) { return before->done; });
    if (options().lazy) {
        if (!op->task.uses.empty()) report_unordered(*op);
        state().pending.push_back(op);
        if (is_exact(*op)) state().pending_exact.push_back(op);
    } else if (op->after.empty()) {
        run_operation(op.get());
    } else {
        complete({op});  // some operations before it are still pending from an earlier lazy mode
    }
    return op;
}

}  // namespace ptxsim
