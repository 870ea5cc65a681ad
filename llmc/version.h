// The name and version of this program, which --version prints and checkpoints record.
#pragma once
#include <string>

inline constexpr const char* kVersion = "0.1.0";

// "polygpt 0.1.0 (commit 0123456789ab)". The commit ends with "-dirty" where files had changed since, and is
// left out where the program was built without git.
std::string program_version();
