// What the checks find. A report is printed as one line on stderr when it is made, and is kept so that tests
// can look at it. A process with reports ends with the exit status kReportStatus.
#pragma once
#include <string>
#include <vector>

namespace ptxsim {

enum class Fault {
    out_of_bounds,   // an access outside of every allocation, variable and parameter
    misaligned,      // an address that is not a multiple of the size of the access
    uninitialized,   // a read of memory that nobody has written
    race,            // two accesses of the same bytes, one of them a write, that nothing orders
    barrier,         // threads of a block that do not meet at a barrier: divergence, early exit, deadlock
    warp_mask,       // shfl, vote, match, redux or bar.warp.sync with a mask that does not fit the lanes
    missing_wait,    // a read of shared memory that cp.async writes, before a wait for it
    trap,            // trap, or a failed assert
    launch,          // a launch outside the device's limits
    host_access,     // host code touched device memory, or a kernel touched the host's memory
    leak,            // an allocation that was never freed
    use_after_free,  // an access to freed memory, or a second free
    unordered_copy,  // work uses memory that unfinished work of another stream uses
    collective,      // calls of NCCL by several ranks that do not fit together, or that never end
};
const char* name(Fault fault);  // "out-of-bounds", ...

struct Report {
    Fault fault;
    std::string kernel;  // demangled, without parameters; empty outside of kernels
    std::string file;    // the CUDA source, from .loc; empty if unknown
    int line = 0;
    int other_line = 0;  // a second line that takes part; for a race, the line of the earlier access
    std::string text;    // the whole line that was printed
};

// Prints and keeps the report. Equal reports (fault, kernel, line, other line) are printed once and counted.
void report(Report report);

// Returns the reports since the last call, oldest first. They no longer count for the exit status.
std::vector<Report> take_reports();

std::string hex(uint64_t address);  // an address as reports show it: "0x7f3a00000200"

constexpr int kReportStatus = 86;

}  // namespace ptxsim
