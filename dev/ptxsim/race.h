// Races: two accesses of the same bytes by different threads, one of them a write, not both atomic, that no
// barrier orders.
//
// An access is known by the number of its event: events count up, one for each instruction of a warp that
// touches memory. Within a warp, accesses of two lanes are ordered by a bar.warp.sync or barrier that both
// took part in; between warps of a block by barriers, which a clock a warp keeps account of: seen[w] is the
// last event of warp w that is ordered before what this warp does now. Between blocks only an atomic after a
// fence orders: it hands on what its thread knows to whoever reads that address by an atomic later.
//
// A record of memory covers four bytes (with a bit a byte) and holds the accesses that a later one may race
// with. An access makes an earlier one superfluous where it follows it and races with all that the earlier
// one would race with: a plain write does so for everything, a read only for reads. So a thread that reads
// again leaves the reads of other threads in place, about which its own says nothing.
//
// The last plain write always stays; six accesses do, in all. Where there are more, those go first that no
// barrier of a whole warp, block or grid can tell from one that stays: of the reads, say, there stay the
// newest, and the newest by other lanes of its warp, by another warp of its block, and by another block.
// Forgetting more than that loses races now and then, and invents none.
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
    // A barrier of `lanes`; `all` are those that the warp began with.
    void sync_lanes(uint32_t lanes, uint32_t all, uint64_t event);
};

struct Access {  // event 0: none
    uint64_t event : 48;
    uint64_t first : 5, last : 5;  // the outermost of its lanes: where both are ordered, all are taken to be
    uint64_t bytes : 4;
    uint64_t write : 1;
    uint64_t atomic : 1;
};
struct AccessRecord {
    static constexpr int kBytes = 4, kKept = 6;
    Access kept[kKept] = {};  // the newest first, what is not used at the end
};

// What an event was.
struct Event {
    uint64_t block;
    const Instruction* instruction;
    int warp;
};

// The events of a launch, which count from 1.
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

// Records of a range of addresses, by pages that are made when they are touched.
class SharedRaces {
  public:
    void reset(size_t bytes);
    AccessRecord* record(uint64_t offset) { return &records_[offset / AccessRecord::kBytes]; }

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
    std::unordered_map<uint64_t, std::unique_ptr<std::array<AccessRecord, kPage / AccessRecord::kBytes>>>
        pages_;
    uint64_t last_page_ = ~0ull;
    AccessRecord* last_ = nullptr;
};

// Looks at an access of some lanes and keeps it; reports races. `event` is the instruction's. Returns the
// lanes that write bytes which a lane before them writes in this very instruction: a race if the values
// differ.
//   since: an access that goes on in the background since this event; nothing orders what came in between
uint32_t check_races(Warp& warp, const Instruction& in, uint32_t lanes, const uint64_t* addresses, int bytes,
                     AccessKind kind, bool is_shared, uint64_t event, uint64_t since = ~0ull);

}  // namespace ptxsim
