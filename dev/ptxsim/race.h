// Races: two accesses of the same bytes by different threads, one of them a write, not both atomic, that no
// barrier orders.
//
// An access is known by the number of its event: events count up, one for each instruction of a warp that
// touches memory. Within a warp, accesses of two lanes are ordered by a bar.warp.sync or barrier that both
// took part in; between warps of a block by barriers, which a clock a warp keeps account of: seen[w] is the
// last event of warp w that is ordered before what this warp does now. Between blocks only an atomic after a
// fence orders: it hands on what its thread knows to whoever reads that address by an atomic later.
//
// A record of memory covers two bytes (with a bit a byte) and holds the last write and two reads of different
// warps. Forgetting older reads loses races now and then, and invents none.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace ptxsim {

struct Warp;
struct Instruction;

// The last two are of volatile, .acquire and .release: no race with each other or with atomics.
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

constexpr int kMaxWarps = 32;  // of a block

struct RaceClock {
    std::array<uint64_t, kMaxWarps> seen = {};                             // by warp of this block
    std::unordered_map<uint64_t, std::array<uint64_t, kMaxWarps>> blocks;  // by other blocks
    uint64_t synced = 0;                                   // last event before a bar.warp.sync of all lanes
    std::unique_ptr<std::array<uint64_t, 32 * 32>> pairs;  // the same by two lanes, where masks were smaller
    std::array<uint64_t, kMaxWarps> at_fence = {};         // what fences have made visible to all

    void join(const RaceClock& other);
    void sync_lanes(uint32_t lanes, uint32_t live, uint64_t event);
};

struct Access {  // event 0: none
    uint64_t event : 48;
    uint64_t lane : 5;
    uint64_t bytes : 2;
    uint64_t atomic : 1;
    uint64_t many : 1;  // other lanes, too, in the same event
};
struct AccessRecord {
    Access write, reads[2];
};

// What an event was.
struct Event {
    uint64_t block;
    const Instruction* instruction;
    int warp;
};

// The events of a launch.
class Events {
  public:
    uint64_t add(uint64_t block, int warp, const Instruction* instruction);
    const Event& operator[](uint64_t event) const { return events_[event - first_]; }
    bool knows(uint64_t event) const { return event >= first_; }
    uint64_t last() const { return first_ + events_.size() - 1; }
    void clear();  // a new launch: all that was is ordered before it

  private:
    static uint64_t next_;
    uint64_t first_ = 1;
    std::vector<Event> events_;
};

// Records of a range of addresses, by pages that are made when they are touched.
class SharedRaces {
  public:
    void reset(size_t bytes);
    AccessRecord* record(uint64_t offset) { return &records_[offset / 2]; }

  private:
    std::vector<AccessRecord> records_;
};

class GlobalRaces {
  public:
    Events events;
    AccessRecord* record(uint64_t address);
    // What atomics at an address hand on.
    std::unordered_map<uint64_t, std::unordered_map<uint64_t, std::array<uint64_t, kMaxWarps>>> released;

  private:
    static constexpr int kPage = 4096;
    std::unordered_map<uint64_t, std::unique_ptr<std::array<AccessRecord, kPage / 2>>> pages_;
    uint64_t last_page_ = ~0ull;
    AccessRecord* last_ = nullptr;
};

// Looks at one lane's access and keeps it; reports a race. `event` is the warp's instruction's. True where
// another lane has written these bytes in this very instruction, which is a race if the values differ.
bool check_race(Warp& warp, const Instruction& in, int lane, uint64_t address, int bytes, AccessKind kind,
                bool is_shared, uint64_t event);

}  // namespace ptxsim
