// Races: two accesses of the same bytes by different threads, of which at least one is a write and not both
// are atomic, and which nothing orders.
//
// Every instruction of a warp that touches memory is an event, and events have rising numbers. An access
// carries the number of its event. What orders two accesses depends on who made them:
//   two lanes of a warp       a bar.warp.sync or a barrier to which both came
//   two warps of a block      a barrier. Each warp has a clock: seen[w] is the last event of warp w that is
//                             ordered before what this warp does now
//   two blocks                an atomic after a fence, which hands on what its warp knows to the warps that
//                             later access the same address by an atomic
//
// An AccessRecord covers four bytes, with one bit per byte, and keeps the accesses with which a later access
// may race. A new access replaces an earlier one if it is ordered after it and would race with everything
// with which the earlier one would race. A plain write replaces all accesses, a read replaces only reads. If
// a thread reads again, the reads of other threads stay, because its own read says nothing about them.
//
// A record keeps six accesses. The last plain write always stays. A full record first forgets the accesses
// that no barrier of a whole warp, block or grid can tell from one that stays. For example, these reads stay:
// the newest one, and the newest by another lane of its warp, by another warp of its block, and by another
// block. If the record has to forget more than that, some races are missed; a race is never reported where
// there is none.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptxsim {

struct Warp;
struct Instruction;

// Ordered reads and writes are those of volatile, .acquire and .release. They do not race with each other or
// with atomics.
enum class AccessKind : uint8_t { read, write, atomic, ordered_read, ordered_write };
inline bool reads(AccessKind k) {
    return k != AccessKind::write && k != AccessKind::ordered_write;
}
inline bool writes(AccessKind k) {
    return k != AccessKind::read && k != AccessKind::ordered_read;
}
inline bool is_atomic(AccessKind k) {
    return k >= AccessKind::atomic;
}

constexpr int kMaxWarps = 32;  // per block

struct RaceClock {
    std::array<uint64_t, kMaxWarps> seen = {};                             // for each warp of this block
    std::unordered_map<uint64_t, std::array<uint64_t, kMaxWarps>> blocks;  // the same for other blocks
    uint64_t synced = 0;  // the last event before a bar.warp.sync of all lanes
    // The same for each two lanes (earlier, later), once a mask did not name all lanes.
    std::unique_ptr<std::array<uint64_t, 32 * 32>> pairs;
    std::array<uint64_t, kMaxWarps> at_fence = {};  // `seen` as it was at the last fence

    void join(const RaceClock& other);
    // The lanes `lanes` have met at a barrier. `all` are the lanes that the warp began with.
    void sync_lanes(uint32_t lanes, uint32_t all, uint64_t event);
};

struct Access {
    uint64_t event : 48;           // 0: there is no access
    uint64_t first : 5, last : 5;  // its lowest and highest lane; if both are ordered, all count as ordered
    uint64_t bytes : 4;
    uint64_t write : 1;
    uint64_t atomic : 1;
};
struct AccessRecord {
    static constexpr int kBytes = 4, kKept = 6;
    Access kept[kKept] = {};  // the newest first; unused ones at the end
};

// What is known about an event.
struct Event {
    uint64_t block;
    const Instruction* instruction;
    int warp;
};

// The events of a launch. The first one is number 1.
class Events {
  public:
    uint64_t add(uint64_t block, int warp, const Instruction* instruction) {
        events_.push_back({block, instruction, warp});
        return last();
    }
    const Event& operator[](uint64_t event) const { return events_[event - 1]; }
    uint64_t last() const { return events_.size(); }

  private:
    std::vector<Event> events_;
};

// The records of a block's shared memory.
class SharedRaces {
  public:
    void reset(size_t bytes);
    AccessRecord* record(uint64_t offset) { return &records_[offset / AccessRecord::kBytes]; }

  private:
    std::vector<AccessRecord> records_;
};

// The records of global memory, in pages that are made when they are first touched.
class GlobalRaces {
  public:
    Events events;
    AccessRecord* record(uint64_t address);
    // What atomics at an address hand on: for each block, the last event of each warp.
    std::unordered_map<uint64_t, std::unordered_map<uint64_t, std::array<uint64_t, kMaxWarps>>> released;

  private:
    static constexpr int kPage = 4096;
    std::unordered_map<uint64_t, std::unique_ptr<std::array<AccessRecord, kPage / AccessRecord::kBytes>>>
        pages_;
    uint64_t last_page_ = ~0ull;
    AccessRecord* last_ = nullptr;
};

// Checks an access by some lanes, reports races, and keeps the access. `event` is the event of the
// instruction. Returns the lanes that write bytes which an earlier lane writes in the same instruction; this
// is a race if the values differ.
//   since: the event at which an access in the background began. It races with all accesses after that event.
uint32_t check_races(Warp& warp, const Instruction& in, uint32_t lanes, const uint64_t* addresses, int bytes,
                     AccessKind kind, bool is_shared, uint64_t event, uint64_t since = ~0ull);

// Memory that an operation of another stream uses while a kernel may run, because nothing orders the two.
struct InFlight {
    uint64_t begin, bytes;
    bool write;
    std::string what;
};
// What there is beside the kernel that runs now (work.cpp).
const std::vector<InFlight>& in_flight();
// Reports accesses to it. Two reads are allowed.
void check_in_flight(const Warp& warp, const Instruction& in, uint32_t lanes, const uint64_t* addresses,
                     int bytes, AccessKind kind);

}  // namespace ptxsim
