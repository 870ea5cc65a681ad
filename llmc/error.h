// One exception type for everything a user can run into. main() prints its text as one line on stderr and
// exits with its status, so a message must name the file, flag or value at fault and what was expected.
#pragma once
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

enum ExitStatus : int {
    kExitDone = 0,
    kExitFailure = 1,       // a file, the disk, memory, ...
    kExitUsage = 2,         // bad flag or value on the command line
    kExitDiverged = 3,      // NaN or Inf in training
    kExitInterrupted = 130  // Ctrl-C or SIGTERM, after a checkpoint
};

struct Error : std::runtime_error {
    int status;
    Error(int status, const std::string& what) : std::runtime_error(what), status(status) {}
};

// str("a", 1, 2.5) is "a12.5".
template <class... Parts>
std::string str(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// fail("file.bin: expected ", a, ", found ", b): a run-time failure, exit status 1.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    throw Error(kExitFailure, str(parts...));
}

// The same for a bad command line, exit status 2.
template <class... Parts>
[[noreturn]] void usage_error(const Parts&... parts) {
    throw Error(kExitUsage, str(parts...));
}
