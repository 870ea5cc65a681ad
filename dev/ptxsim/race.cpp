#include "dev/ptxsim/race.h"

#include <algorithm>

#include "dev/ptxsim/warp.h"

namespace ptxsim {

uint64_t Events::next_ = 1;

uint64_t Events::add(uint64_t block, int warp, const Instruction* instruction) {
    if (events_.empty()) first_ = next_;
    events_.push_back({block, instruction, warp});
    return next_++;
}

void Events::clear() {
    events_.clear();
    first_ = next_;
}

void RaceClock::join(const RaceClock& other) {
    for (int i = 0; i < kMaxWarps; i++) {
        seen[i] = std::max(seen[i], other.seen[i]);
        at_fence[i] = std::max(at_fence[i], other.at_fence[i]);
    }
    for (auto& [block, known] : other.blocks) {
        auto& mine = blocks[block];
        for (int i = 0; i < kMaxWarps; i++) mine[i] = std::max(mine[i], known[i]);
    }
}

void RaceClock::sync_lanes(uint32_t lanes, uint32_t live, uint64_t event) {
    if ((lanes & live) == live) {
        synced = event;
        return;
    }
    if (!pairs) pairs = std::make_unique<std::array<uint64_t, 32 * 32>>();
    for (int a = 0; a < 32; a++)
        for (int b = 0; b < 32; b++)
            if (lanes >> a & lanes >> b & 1) (*pairs)[a * 32 + b] = event;
}

void SharedRaces::reset(size_t bytes) {
    records_.assign((bytes + 1) / 2, AccessRecord());
}

AccessRecord* GlobalRaces::record(uint64_t address) {
    uint64_t page = address / kPage;
    if (page != last_page_) {
        auto& slot = pages_[page];
        if (!slot) slot = std::make_unique<std::array<AccessRecord, kPage / 2>>();
        last_page_ = page;
        last_ = slot->data();
    }
    return last_ + address % kPage / 2;
}

namespace {

bool of_toolkit(const Grid& g, const Instruction& in) {
    auto it = g.kernel.module->text.files.find(in.source.file);
    return it != g.kernel.module->text.files.end() && is_toolkit_file(it->second);
}

// Whether an earlier access is ordered before what this lane does now.
bool ordered(const Warp& w, int lane, const Access& earlier, const Event& event) {
    const RaceClock& clock = w.clock;
    if (event.block != w.block->number) {
        auto it = clock.blocks.find(event.block);
        return it != clock.blocks.end() && earlier.event <= it->second[event.warp];
    }
    if (event.warp != w.index) return earlier.event <= clock.seen[event.warp];
    if (((int)earlier.lane == lane && !earlier.many) || earlier.event <= clock.synced) return true;
    return clock.pairs && earlier.event <= (*clock.pairs)[earlier.lane * 32 + lane];
}

// After a fence an atomic hands on what its lane's warp and block know; any atomic takes what was handed on.
//   address: in shared memory with the block's number above it, for each block has its own
void synchronize(Warp& w, uint64_t address, uint64_t event, bool releases) {
    auto& races = w.block->grid->races;
    auto it = races.released.find(address);
    if (it != races.released.end())
        for (auto& [block, known] : it->second) {
            auto& mine = block == w.block->number ? w.clock.seen : w.clock.blocks[block];
            for (int i = 0; i < kMaxWarps; i++) mine[i] = std::max(mine[i], known[i]);
        }
    auto& at = races.released[address];
    auto put = [&](uint64_t block, const std::array<uint64_t, kMaxWarps>& known) {
        auto& there = at[block];
        for (int i = 0; i < kMaxWarps; i++) there[i] = std::max(there[i], known[i]);
    };
    std::array<uint64_t, kMaxWarps> mine = releases ? w.clock.seen : w.clock.at_fence;
    if (releases) mine[w.index] = event - 1;
    put(w.block->number, mine);
    for (auto& [block, known] : w.clock.blocks) put(block, known);
}

}  // namespace

bool check_race(Warp& w, const Instruction& in, int lane, uint64_t address, int bytes, AccessKind kind,
                bool is_shared, uint64_t event) {
    Grid& g = *w.block->grid;
    bool repeated = false, found = false;
    if (is_atomic(kind)) {
        uint64_t of_block = is_shared ? 1ull << 63 | w.block->number << 20 : 0;
        synchronize(w, address | of_block, event, in.memory.releases);
    }
    auto conflict = [&](const Access& earlier, unsigned part, bool is_read) {
        if (earlier.event == 0 || !g.races.events.knows(earlier.event) || !(earlier.bytes & part))
            return false;
        if (earlier.atomic && is_atomic(kind)) return false;
        // The toolkit's own loops around atom.cas begin with a plain read.
        if (is_atomic(kind) && is_read && of_toolkit(g, *g.races.events[earlier.event].instruction))
            return false;
        if (!writes(kind) && earlier.atomic && of_toolkit(g, in)) return false;
        if (earlier.event == event) {
            repeated |= (int)earlier.lane != lane && kind == AccessKind::write;
            return false;
        }
        return !ordered(w, lane, earlier, g.races.events[earlier.event]);
    };
    auto tell = [&](const Access& earlier, bool earlier_writes) {
        if (found) return;
        found = true;
        const Event& e = g.races.events[earlier.event];
        std::string who = e.block != w.block->number ? "block " + std::to_string(e.block)
                          : e.warp != w.index        ? "warp " + std::to_string(e.warp)
                                                     : "lane " + std::to_string(earlier.lane);
        const char* now = !writes(kind) ? "reads" : kind == AccessKind::atomic ? "updates" : "writes";
        report_at(Fault::race, w, in, lane,
                  std::string(now) + (is_shared ? " shared" : " global") + " memory that " + who +
                      " of the same " +
                      (e.block != w.block->number ? "grid"
                       : e.warp != w.index        ? "block"
                                                  : "warp") +
                      (earlier_writes ? " wrote" : " read") + ", and nothing orders the two",
                  e.instruction);
    };
    for (int k = 0; k < bytes;) {
        uint64_t at = address + k;
        unsigned part = at & 1 ? 2 : bytes - k >= 2 ? 3 : 1;
        k += part == 3 ? 2 : 1;
        AccessRecord* r = is_shared ? w.block->shared_races.record(at) : g.races.record(at);
        if (conflict(r->write, part, false)) tell(r->write, true);
        Access now;
        now.event = event, now.lane = lane & 31, now.bytes = part & 3, now.atomic = is_atomic(kind),
        now.many = 0;
        if (!writes(kind)) {
            // Keep reads of two different warps, the newest of each.
            Access& first = r->reads[0];
            bool same = first.event && g.races.events.knows(first.event) &&
                        g.races.events[first.event].warp == w.index &&
                        g.races.events[first.event].block == w.block->number;
            if (!same) r->reads[1] = first;
            if (!(same && first.event == event)) first = now;
            if (same && first.event == event) {
                first.bytes |= part & 3;
                first.many |= (int)first.lane != lane;
            }
        } else {
            for (const Access& read : r->reads)
                if (conflict(read, part, true)) tell(read, false);
            r->write = now;
        }
    }
    return repeated;
}

}  // namespace ptxsim
