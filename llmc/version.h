// The name and version of this program, which --version prints and checkpoints record.
#pragma once
#include <string>

inline constexpr const char* kVersion = "0.1.0";

// "polygpt 0.1.0 (commit 0123456789ab)". The commit ends with "-dirty" if files had changed since then. It is
// left out if the program was built without git.
std::string program_version();
