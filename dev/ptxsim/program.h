// What is executed: a kernel in which every call is inlined. An operand is a place in a warp's registers, and
// an instruction is a handler that runs over the 32 lanes of a warp.
//
// A register has 32 lanes of its width (16, 32, 64 or 128 bits); a predicate is a Mask. Constants are also
// registers, in memory that all warps share.
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
using Mask = uint32_t;  // one bit per lane
constexpr Mask kAllLanes = ~0u;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, Mask lanes);

// The bases of the windows of generic addresses. An address below them is global.
constexpr uint64_t kSharedWindow = 0x7000'0000'0000'0000, kLocalWindow = 0x7100'0000'0000'0000,
                   kParamWindow = 0x7200'0000'0000'0000, kWindowMask = 0xFF00'0000'0000'0000;

// What Warp::run_split() does with an instruction.
enum class Flow : uint8_t {
    plain,    // calls the handler
    sync,     // calls the handler when the lanes that the mask at sync_mask names are there
    branch,   // goes to imm
    table,    // goes to targets[o[0]]
    barrier,  // bar.sync, bar.red, bar.arrive
    exit,
    trap,
};

struct MemoryAccess {
    Space space = Space::generic;
    uint8_t bytes = 4;     // the size of an element
    uint8_t elements = 1;  // the length of a vector
    bool is_signed = false;
    bool ordered = false;     // volatile, .acquire or .release: two such accesses do not race
    bool releases = false;    // .release or .acq_rel: acts as if a fence came before it
    bool of_toolkit = false;  // comes from CUDA's own headers
    uint8_t register_bytes = 4;
    uint8_t address_bytes = 8;  // the widths of the registers of the first and the second address
    uint8_t second_address_bytes = 8;
};

struct Instruction {
    Handler run = nullptr;
    Flow flow = Flow::plain;
    bool guard_negated = false;
    int32_t guard = -1;     // the place of the predicate, or -1
    int32_t sync_mask = 0;  // the place of the mask of lanes; kConvergedLanes for all live lanes (.aligned)
    // The places of the operands, with vectors flattened. The first address is o[kAddress] plus imm, the
    // second one o[kAddress + 1] plus aux. A place is the offset of a register, or ~offset of a constant, or
    // kIgnored for "_".
    int32_t o[16] = {};
    int64_t imm = 0;  // the offset of an address, the target of a branch, ...
    int32_t aux = 0;
    MemoryAccess memory;
    const std::vector<int32_t>* targets = nullptr;
    SourceLine source;
    int ptx_line = 0;
    uint16_t mnemonic = 0;  // the index in Kernel::mnemonics
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

// What a kernel did: each instruction, and all of them together.
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
    size_t register_bytes = 0;     // per warp
    std::vector<Variable> shared;  // static variables
    size_t shared_bytes = 0;       // all static variables, with the gaps between and after them
    size_t local_bytes = 0;        // per thread
    // Special values and the places of the registers that hold them from the start. A place below 0 stands
    // for the register of 8 bytes at -place - 1.
    std::vector<std::pair<Special, int32_t>> specials;
    std::vector<std::unique_ptr<std::vector<int32_t>>> tables;
    mutable Figures figures;
};

struct Module {
    std::string ptx;
    ModuleText text;
    std::map<std::string, std::unique_ptr<Kernel>> kernels;
    std::map<std::string, VariableInfo> variables;
};

// Throws a std::runtime_error that names the line.
std::unique_ptr<Kernel> decode(const Module& module, const FunctionText& entry);

// What an instruction does that touches neither memory nor other lanes nor control flow (alu.cpp,
// comparisons.cpp). `widths` are the bytes of its operands, 1 for a predicate; a 0 ends the list.
struct AluEntry {
    Handler run = nullptr;
    uint8_t widths[6] = {};
};
const AluEntry* find_alu(const std::string& mnemonic);  // null if there is none
// Finds cvt. The widths of its registers may be larger than those of its types. Null if there is none.
Handler find_conversion(const std::vector<std::string>& modifiers, Instruction* in, int from_bytes,
                        int to_bytes);

// Each sets run, flow and memory of an instruction whose operands have their places: find_memory() if it
// touches memory (memory_ops.cpp), find_warp() if it touches other lanes (warp_ops.cpp), find_mma() if it is
// mma.sync (mma.cpp). False if there is no such instruction.
bool find_memory(const Statement& s, Instruction* in);
bool find_warp(const Statement& s, Instruction* in);
bool find_mma(const Statement& s, Instruction* in);

// Handlers of warp_ops.cpp that decode() chooses itself.
void run_printf(Warp&, const Instruction&, Mask lanes);
void run_assert(Warp&, const Instruction&, Mask lanes);
void run_clock(Warp&, const Instruction&, Mask lanes);
void run_pack(Warp&, const Instruction&, Mask lanes);
void run_unpack(Warp&, const Instruction&, Mask lanes);
void run_to_shared(Warp&, const Instruction&, Mask lanes);
void run_from_shared(Warp&, const Instruction&, Mask lanes);
void run_is_space(Warp&, const Instruction&, Mask lanes);

std::vector<const Kernel*> launched_kernels();  // of all modules (module.cpp)

bool is_toolkit_file(const std::string& name);  // CUDA's own headers
// The file and line that reports name for an instruction: those of the call if it was inlined from one of
// CUDA's headers.
std::pair<std::string, int> source_of(const Kernel& kernel, const Instruction& in);

}  // namespace ptxsim
