// A grid in execution: blocks, their warps, and what lanes wait for.
#pragma once
#include <array>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/program.h"
#include "dev/ptxsim/race.h"
#include "dev/ptxsim/report.h"

namespace ptxsim {

struct Block;
struct Grid;

// Lanes of a warp at the same instruction.
struct Split {
    uint32_t pc;
    Mask lanes;
    enum { ready, at_sync, at_barrier } state = ready;
    Mask wanted = 0;   // at_sync: the lanes that its mask names
    int barrier = -1;  // at_barrier: its number
};

// What is known of a byte of shared or local memory.
enum : uint8_t { kUnwritten = 0, kWritten = 1, kPending = 2 /* cp.async */, kNoMemory = 255 };

struct PendingCopy {  // of cp.async, by one lane
    uint32_t to;
    uint64_t from;
    uint8_t bytes, source_bytes;
    uint32_t group;
    uint64_t event;  // that it began with
};

struct Warp {
    Block* block = nullptr;
    int index = 0;  // in the block
    std::byte* regs = nullptr;
    const std::byte* constants = nullptr;
    Mask present = 0;           // lanes that the block has threads for
    Mask live = 0;              // those that have not returned
    Mask carry = 0;             // the condition code of add.cc and its like
    std::vector<Split> splits;  // by pc, no two alike while ready
    std::vector<std::byte> registers;
    std::vector<std::byte> local;      // (32,local_bytes)
    std::vector<uint8_t> local_known;  // (32,local_bytes)
    std::array<std::vector<PendingCopy>, kWarpSize> copies;
    std::array<uint32_t, kWarpSize> copy_groups = {};  // committed
    Mask has_copies = 0;
    RaceClock clock;

    template <class T>
    T* reg(int32_t place) {
        return (T*)(regs + place);
    }
    template <class T>
    const T* src(int32_t place) const {
        return (const T*)(place >= 0 ? regs + place : constants + ~place);
    }

    // Runs at most `budget` instructions. False where no lane can go on.
    bool run(int budget);
    bool finished() const { return live == 0; }
    // Whether all live lanes wait at barriers.
    bool all_at_barrier() const;

    void insert(Split split);

  private:
    // Goes on with splits[k] until it meets another, waits, or `budget` is used up.
    void run_split(size_t k, int* budget);
    // An instruction whose mask names lanes: runs it for the groups of lanes that are complete. Returns the
    // lanes that have to wait for others, and in *wanted those that they wait for.
    Mask run_sync(const Instruction& in, Mask active, Mask* wanted);
    // No split is ready, and not all are at barriers. Finds the fault, or what goes together, and goes on.
    void resolve();
    void leave(Mask lanes, const Instruction& in);
};

struct Barrier {
    int arrived = 0;                     // threads
    int expected = 0;                    // threads; 0: all of the block that have not returned
    int votes = 0, voters = 0;           // bar.red
    const Instruction* first = nullptr;  // that someone arrived at
    RaceClock clock;                     // of all that have arrived
};

struct Block {
    Grid* grid = nullptr;
    Dim3 index;
    uint64_t number = 0;  // linear
    int turns = 0;
    std::vector<Warp> warps;
    std::vector<std::byte> shared;
    std::vector<uint8_t> shared_known;
    std::array<Barrier, 16> barriers;
    int threads = 0, exited = 0;
    uint64_t random = 0;  // the schedule's
    const Instruction* last_exit = nullptr;
    SharedRaces shared_races;

    // One turn of each warp, in the order of the schedule. False where none can go on.
    bool turn();
    bool finished() const;
    // Lanes of a warp have come to a barrier. Returns its number.
    int arrive(Warp& warp, const Instruction& in, Mask lanes);
    // Lets those go on who wait at a barrier that all have arrived at.
    void check_barriers();

  private:
    void complete(int number);
    void report_deadlock();
};

struct Grid {
    const LaunchConfig& launch;
    const Kernel& kernel;
    Figures& figures;
    std::vector<std::byte> parameters;
    LaunchResult result = LaunchResult::ok;
    uint64_t instructions = 0;  // of warps, executed so far
    uint64_t random;
    const Allocation* last_allocation = nullptr;
    GlobalRaces races;
    uint64_t workspace = 0;  // of a cooperative launch: the address of grid.sync()'s counters

    explicit Grid(const LaunchConfig& launch);
    void run();
    bool stopped() const { return result != LaunchResult::ok; }

  private:
    std::vector<std::unique_ptr<Block>> spare_;
    std::unique_ptr<Block> start(uint64_t number);
};

uint64_t next_random(uint64_t* state);

// Reports a fault of lane `lane` (-1: none in particular) at an instruction.
void report_at(Fault fault, const Warp& warp, const Instruction& in, int lane, const std::string& what,
               const Instruction* other = nullptr);
// "thread (3,0,0) of block (1,0,0)"
std::string thread_name(const Warp& warp, int lane);

// memory_ops.cpp: the cp.async copies of a lane that are due when `left` of its groups may stay open, or all.
// event: of the wait, for the races; 0: not looked for.
void finish_copies(Warp& w, int lane, uint32_t left, bool all, uint64_t event);

}  // namespace ptxsim
