// What the executor offers the runtime: modules of PTX, their kernels and variables, and launches.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ptxsim {

struct Kernel;  // a decoded entry (program.h)
struct Module;

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
    uint64_t count() const { return (uint64_t)x * y * z; }
};

struct KernelInfo {
    std::string name;                     // mangled
    std::vector<size_t> parameter_sizes;  // bytes
    std::vector<size_t> parameter_offsets;
    size_t parameter_bytes;
    size_t static_shared, local_bytes;  // bytes per block and per thread
    int max_threads;                    // .maxntid, or 1024
    bool required_threads;              // .reqntid: a block has exactly max_threads
};

struct LaunchConfig {
    const Kernel* kernel;
    Dim3 grid, block;
    size_t dynamic_shared = 0;
    std::vector<std::byte> parameters;  // laid out by parameter_offsets
    bool cooperative = false;           // all blocks are resident at once
};

enum class LaunchResult {
    ok,
    illegal_address,
    misaligned_address,
    trap,
    assert_failed,
    deadlock,
    unsupported
};

// Parses PTX text, and allocates and initialises its variables. Throws a std::runtime_error that names the
// line of PTX and what was not understood. The module lives until the process ends.
Module* load_module(const std::string& ptx, const std::string& name);

// Null if the module has no such entry or variable.
const Kernel* find_kernel(const Module* module, const std::string& mangled);
struct VariableInfo {
    uint64_t address;
    size_t bytes;
};
const VariableInfo* find_variable(const Module* module, const std::string& mangled);
const KernelInfo& info(const Kernel* kernel);

// Runs the whole grid before it returns. The checks report what they find; the result is what the hardware
// would have returned. The caller has checked the limits of the device.
LaunchResult run(const LaunchConfig& launch);

// Figures of each kernel (options().figures), as a table for people and as JSON.
std::string figures_table();
std::string figures_json();
void clear_figures();

}  // namespace ptxsim
