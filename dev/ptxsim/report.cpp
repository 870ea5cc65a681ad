#include "dev/ptxsim/report.h"

#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <map>
#include <tuple>

namespace ptxsim {
namespace {

struct Key {
    Fault fault;
    std::string kernel;
    int line, other_line;
    std::string text;  // only for reports outside of kernels, which have no line that tells them apart
    auto operator<=>(const Key&) const = default;
};

struct State {
    std::vector<Report> unread;
    std::map<Key, size_t> seen;  // how often each was made since the last take_reports()
};

// The state is never destroyed, because reports are made until the very end of the process.
State& state() {
    static State& s = *new State;
    return s;
}

std::string whole_line(const Report& r) {
    std::string line = std::string("ptxsim: ") + name(r.fault) + ": ";
    if (!r.file.empty()) line += r.file + ":";
    if (r.line > 0) line += std::to_string(r.line) + ":";
    if (!r.file.empty() || r.line > 0) line += " ";
    if (!r.kernel.empty()) line += "in " + r.kernel + ": ";
    line += r.text;
    if (r.other_line > 0) line += " (the other line: " + std::to_string(r.other_line) + ")";
    return line;
}

void flush() {
    std::cout.flush();
    std::fflush(nullptr);
}

// Destructor functions run by falling priority, after atexit's functions and the destructors of static
// objects. This one is the last, so that reports that are made at exit count.
__attribute__((destructor(101))) void set_exit_status() {
    for (const auto& [key, count] : state().seen)
        if (count > 1)
            std::fprintf(stderr, "ptxsim: %s%s%s: %zu times\n", name(key.fault),
                         key.kernel.empty() ? "" : " in ", key.kernel.c_str(), count);
    if (state().unread.empty()) return;
    flush();
    _exit(kReportStatus);
}

}  // namespace

const char* name(Fault fault) {
    switch (fault) {
        case Fault::out_of_bounds:
            return "out-of-bounds";
        case Fault::misaligned:
            return "misaligned";
        case Fault::uninitialized:
            return "uninitialized";
        case Fault::race:
            return "race";
        case Fault::barrier:
            return "barrier";
        case Fault::warp_mask:
            return "warp-mask";
        case Fault::missing_wait:
            return "missing-wait";
        case Fault::trap:
            return "trap";
        case Fault::launch:
            return "launch";
        case Fault::host_access:
            return "host-access";
        case Fault::leak:
            return "leak";
        case Fault::use_after_free:
            return "use-after-free";
        case Fault::unordered_copy:
            return "unordered-copy";
        case Fault::collective:
            return "collective";
    }
    return "unknown";
}

void report(Report r) {
    Key key{r.fault, r.kernel, r.line, r.other_line, r.kernel.empty() ? r.text : ""};
    if (++state().seen[key] > 1) return;
    if (r.text.rfind("ptxsim: ", 0) != 0) r.text = whole_line(r);
    std::cout.flush();
    std::fflush(stdout);
    std::fprintf(stderr, "%s\n", r.text.c_str());
    state().unread.push_back(std::move(r));
}

std::string hex(uint64_t address) {
    char text[32];
    std::snprintf(text, sizeof text, "0x%llx", (unsigned long long)address);
    return text;
}

std::vector<Report> take_reports() {
    std::vector<Report> taken;
    taken.swap(state().unread);
    state().seen.clear();
    return taken;
}

}  // namespace ptxsim
