// This is an object file of its own, so that a new commit rebuilds nothing else. The Makefile sets
// LLMC_COMMIT.
#include "llmc/version.h"

std::string program_version() {
    std::string commit = LLMC_COMMIT, version = std::string("polygpt ") + kVersion;
    return commit.empty() ? version : version + " (commit " + commit + ")";
}
