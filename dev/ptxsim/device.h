// What the runtime asks of the executor: modules of PTX, their kernels and variables, and launches.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ptxsim {

struct Kernel;  // an entry, decoded (program.h)
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
    size_t static_shared, local_bytes;  // bytes a block, a thread
    int max_threads;                    // .maxntid, or 1024
    bool required_threads;              // .reqntid: exactly these
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

// Parses and decodes PTX text; its variables are allocated and initialised. Throws std::runtime_error that
// names the line of PTX and what was not understood. The module lives until the process ends.
Module* load_module(const std::string& ptx, const std::string& name);

// Null where the module has no such entry or variable.
const Kernel* find_kernel(const Module* module, const std::string& mangled);
struct VariableInfo {
    uint64_t address;
    size_t bytes;
};
const VariableInfo* find_variable(const Module* module, const std::string& mangled);
const KernelInfo& info(const Kernel* kernel);

// Runs the whole grid and returns. Whatever the checks find is reported; the result is what the hardware
// would have said. The limits of the device were checked by the caller.
LaunchResult run(const LaunchConfig& launch);

// Figures by kernel (options().figures): a table for people, and JSON.
std::string figures_table();
std::string figures_json();
void clear_figures();

}  // namespace ptxsim
