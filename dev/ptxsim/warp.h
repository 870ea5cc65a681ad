// A grid that is running: its blocks, their warps, and what the lanes wait for.
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

// The lanes of a warp that are at the same instruction.
struct Split {
    uint32_t pc;
    Mask lanes;
    enum { ready, at_sync, at_barrier } state = ready;
    Mask wanted = 0;   // at_sync: the lanes that its mask names
    int barrier = -1;  // at_barrier: its number
};

// The state of a byte of shared or local memory. kPending: cp.async writes it, and no wait has come yet.
enum : uint8_t { kUnwritten = 0, kWritten = 1, kPending = 2, kNoMemory = 255 };

struct PendingCopy {  // a copy that a lane has begun with cp.async
    uint32_t to;
    uint64_t from;
    uint8_t bytes, source_bytes;
    uint32_t group;
    uint64_t event;  // the event of its cp.async
};

struct Warp {
    Block* block = nullptr;
    int index = 0;  // the number of the warp in its block
    std::byte* regs = nullptr;
    const std::byte* constants = nullptr;
    Mask present = 0;           // lanes that the block has threads for
    Mask live = 0;              // lanes that have not returned
    Mask carry = 0;             // the condition code that add.cc and similar instructions write
    std::vector<Split> splits;  // sorted by pc; no two ready ones have the same pc
    std::vector<std::byte> registers;
    std::vector<std::byte> local;      // (32,local_bytes)
    std::vector<uint8_t> local_known;  // (32,local_bytes)
    std::array<std::vector<PendingCopy>, kWarpSize> copies;
    std::array<uint32_t, kWarpSize> copy_groups = {};  // the number of committed groups
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

    // Runs at most `budget` instructions. False if no lane can go on.
    bool run(int budget);
    bool finished() const { return live == 0; }
    // Whether all live lanes wait at barriers.
    bool all_at_barrier() const;

    void insert(Split split);

  private:
    // Runs splits[k] until it meets another split, has to wait, or `budget` is used up.
    void run_split(size_t k, int* budget);
    // Runs an instruction with a mask of lanes for those groups of lanes that are complete. Returns the lanes
    // that have to wait, and in *wanted the lanes for which they wait.
    Mask run_sync(const Instruction& in, Mask active, Mask* wanted);
    // Called when no split is ready and not all are at barriers. Joins splits that belong together, or
    // reports the fault; then the warp can go on.
    void resolve();
    void leave(Mask lanes, const Instruction& in);
};

struct Barrier {
    int arrived = 0;                     // the number of threads that have arrived
    int expected = 0;                    // how many have to; 0: all of the block that have not returned
    int votes = 0, voters = 0;           // for bar.red
    const Instruction* first = nullptr;  // the instruction at which the first thread arrived
    RaceClock clock;                     // joins the clocks of all that have arrived
};

struct Block {
    Grid* grid = nullptr;
    Dim3 index;
    uint64_t number = 0;  // the index as one number
    int turns = 0;
    std::vector<Warp> warps;
    std::vector<std::byte> shared;
    std::vector<uint8_t> shared_known;
    std::array<Barrier, 16> barriers;
    int threads = 0, exited = 0;
    uint64_t random = 0;  // the state of the generator for the schedule
    const Instruction* last_exit = nullptr;
    SharedRaces shared_races;

    // Gives each warp a turn, in the order of the schedule. False if no warp can go on.
    bool turn();
    bool finished() const;
    // Called when lanes of a warp come to a barrier. Returns the number of the barrier.
    int arrive(Warp& warp, const Instruction& in, Mask lanes);
    // Releases the lanes at barriers at which all threads have arrived.
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
    uint64_t instructions = 0;  // the number of warp-instructions executed so far
    uint64_t random;
    const Allocation* last_allocation = nullptr;
    GlobalRaces races;
    uint64_t workspace = 0;  // in a cooperative launch, the address of the counters of grid.sync()

    explicit Grid(const LaunchConfig& launch);
    void run();
    bool stopped() const { return result != LaunchResult::ok; }

  private:
    std::vector<std::unique_ptr<Block>> spare_;
    std::unique_ptr<Block> start(uint64_t number);
};

uint64_t next_random(uint64_t* state);

// Reports a fault of a lane at an instruction. `other` is a second instruction that takes part in the fault.
void report_at(Fault fault, const Warp& warp, const Instruction& in, int lane, const std::string& what,
               const Instruction* other = nullptr);
// "thread (3,0,0) of block (1,0,0)"
std::string thread_name(const Warp& warp, int lane);

// Finishes the cp.async copies of a lane (memory_ops.cpp): all of them, or all except for the last `left`
// groups.
//   event: the event of the wait, or 0 to look for no races
void finish_copies(Warp& w, int lane, uint32_t left, bool all, uint64_t event);

}  // namespace ptxsim
