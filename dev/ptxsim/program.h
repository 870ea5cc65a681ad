// What is executed: kernels with every call inlined, operands as places in a warp's registers, an instruction
// as a handler that runs over the 32 lanes of a warp.
//
// A register is 32 lanes of its width (16, 32, 64 or 128 bits); a predicate is a Mask. Constants are
// registers, too, in memory that all warps share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "dev/ptxsim/device.h"
#include "dev/ptxsim/ptx.h"

namespace ptxsim {

constexpr int kWarpSize = 32;
using Mask = uint32_t;  // a bit a lane
constexpr Mask kAllLanes = ~0u;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, Mask lanes);

// Bases of generic addresses; whatever lies below is global.
constexpr uint64_t kSharedWindow = 0x7000'0000'0000'0000, kLocalWindow = 0x7100'0000'0000'0000,
                   kParamWindow = 0x7200'0000'0000'0000, kWindowMask = 0xFF00'0000'0000'0000;

// How the warp's loop treats an instruction.
enum class Flow : uint8_t {
    plain,    // the handler does all
    sync,     // first the lanes that its mask names have to be there (o[sync_mask])
    branch,   // to imm
    table,    // to targets[o[0]]
    barrier,  // bar.sync, bar.red, bar.arrive
    exit,
    trap,
};

struct MemoryAccess {
    Space space = Space::generic;
    uint8_t bytes = 4;     // of an element
    uint8_t elements = 1;  // of a vector
    bool is_signed = false;
    bool ordered = false;     // volatile, or .acquire, .release: no race with another such
    bool releases = false;    // as if a fence were before it
    bool of_toolkit = false;  // of CUDA's own headers
    uint8_t register_bytes = 4;
    uint8_t address_bytes = 8;  // of the registers that hold the first and the second address
    uint8_t second_address_bytes = 8;
};

struct Instruction {
    Handler run = nullptr;
    Flow flow = Flow::plain;
    bool guard_negated = false;
    int32_t guard = -1;     // place of the predicate
    int32_t sync_mask = 0;  // place of the membership mask; kConvergedLanes for .aligned ones
    // Places of registers and immediate values, vectors flattened; addresses are at kAddress and kAddress +
    // 1, plus imm and aux. A place is the offset of a register, or ~offset of a constant; kIgnored for "_".
    int32_t o[16] = {};
    int64_t imm = 0;  // offset of an address, target of a branch, ...
    int32_t aux = 0;
    MemoryAccess memory;
    const std::vector<int32_t>* targets = nullptr;
    SourceLine source;
    int ptx_line = 0;
    uint16_t mnemonic = 0;  // of Kernel::mnemonics
};
constexpr int kAddress = 14;
constexpr int32_t kIgnored = INT32_MIN, kConvergedLanes = INT32_MIN + 1;

enum class Special : uint8_t {
    tid_x,
    tid_y,
    tid_z,
    ntid_x,
    ntid_y,
    ntid_z,
    ctaid_x,
    ctaid_y,
    ctaid_z,
    nctaid_x,
    nctaid_y,
    nctaid_z,
    laneid,
    warpid,
    nwarpid,
    smid,
    nsmid,
    gridid,
    lanemask_eq,
    lanemask_le,
    lanemask_lt,
    lanemask_ge,
    lanemask_gt,
    clock,
    clock_hi,
    clock64,
    globaltimer,
    dynamic_smem_size,
    total_smem_size,
    grid_workspace_hi,
    grid_workspace_lo,
    zero,
};

struct Variable {
    std::string name;
    uint64_t offset;
    size_t bytes;
};

// What a kernel did, by instruction and in all.
struct Figures {
    uint64_t launches = 0;
    std::vector<uint64_t> warps, lanes;  // executions of each instruction
    uint64_t mma = 0, tensor_flops = 0;
    uint64_t load_bytes = 0, store_bytes = 0, load_sectors = 0, store_sectors = 0;
    uint64_t shared_accesses = 0, bank_conflicts = 0;
    uint64_t branches = 0, divergent_branches = 0;
};

struct Kernel {
    KernelInfo info;
    std::string title;  // demangled, without parameters
    const Module* module;
    std::vector<Instruction> code;
    std::vector<std::string> mnemonics;
    std::vector<std::byte> constants;
    size_t register_bytes = 0;                          // a warp
    std::vector<Variable> shared;                       // static
    size_t shared_bytes = 0;                            // static ones with the gaps between them
    size_t local_bytes = 0;                             // a thread
    std::vector<std::pair<Special, int32_t>> specials;  // registers that hold one from the start
    std::vector<std::unique_ptr<std::vector<int32_t>>> tables;
    mutable Figures figures;
};

struct Module {
    std::string ptx;
    ModuleText text;
    std::map<std::string, std::unique_ptr<Kernel>> kernels;
    std::map<std::string, VariableInfo> variables;
};

// Throws std::runtime_error that names the line.
std::unique_ptr<Kernel> decode(const Module& module, const FunctionText& entry);

// What an instruction without memory, control flow or other lanes does (alu.cpp, conversions.cpp). widths are
// those of its operands in bytes, 1 for a predicate; 0 ends them.
struct AluEntry {
    Handler run = nullptr;
    uint8_t widths[6] = {};
};
const AluEntry* find_alu(const std::string& mnemonic);  // null where there is none
// cvt with the widths of its registers in bytes, which may be more than those of its types.
Handler find_conversion(const std::vector<std::string>& modifiers, Instruction* in, int from_bytes,
                        int to_bytes);

// Sets run, flow and memory of an instruction that touches memory or other lanes, its operands being in
// place. False where there is no such instruction.
bool find_memory(const Statement& s, Instruction* in);
bool find_warp(const Statement& s, Instruction* in);

bool is_toolkit_file(const std::string& name);  // CUDA's own headers
// The file and line of an instruction for people: the innermost that is not of the toolkit's headers.
std::pair<std::string, int> source_of(const Kernel& kernel, const Instruction& in);

}  // namespace ptxsim
