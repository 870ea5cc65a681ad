// What the checks find. A report is one line on stderr when it is made, and is kept for tests to look at. At
// the end of a process with reports its exit status is kReportStatus.
#pragma once
#include <string>
#include <vector>

namespace ptxsim {

enum class Fault {
    out_of_bounds,   // an access outside of every allocation, variable or parameter; also after free
    misaligned,      // an address that is no multiple of the access's size
    uninitialized,   // a read of memory that nobody has written
    race,            // two accesses of one word, one of them a write, that nothing orders
    barrier,         // threads of a block that wait for each other in vain: divergence, early exit, deadlock
    warp_mask,       // shfl, vote, match, redux or bar.warp.sync with a mask that does not fit the lanes
    missing_wait,    // a read of shared memory that cp.async has not been waited for
    trap,            // trap, or a failed assert
    launch,          // a launch outside the device's limits
    host_access,     // host code touched device memory, or device code memory of the host
    leak,            // an allocation that is there at exit
    use_after_free,  // an access to freed memory, or a second free
    unordered_copy,  // host or stream work that touched memory in use by unfinished work of another stream
};
const char* name(Fault fault);  // "out-of-bounds", ...

struct Report {
    Fault fault;
    std::string kernel;  // demangled, without parameters; empty outside of kernels
    std::string file;    // of the CUDA source, from .loc; empty where unknown
    int line = 0;
    int other_line = 0;  // race: that of the earlier access
    std::string text;    // the whole line that was printed
};

// Prints and keeps the report. Equal ones (fault, kernel, line, other line) are printed once and counted.
void report(Report report);

// The reports since the last call, oldest first; they no longer count for the exit status.
std::vector<Report> take_reports();

constexpr int kReportStatus = 86;

}  // namespace ptxsim
