#include "dev/ptxsim/race.h"

#include <algorithm>

#include "dev/ptxsim/lanes.h"

namespace ptxsim {

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

void RaceClock::sync_lanes(uint32_t lanes, uint32_t all, uint64_t event) {
    if (lanes == all) {
        synced = event;
        return;
    }
    if (!pairs) pairs = std::make_unique<std::array<uint64_t, 32 * 32>>();
    for (int a = 0; a < 32; a++) {
        uint64_t* known = &(*pairs)[a * 32];  // the last event of lane a that each lane knows
        uint64_t most = lanes >> a & 1 ? event : 0;
        for (int b = 0; b < 32; b++)
            if (lanes >> b & 1) most = std::max(most, known[b]);
        for (int b = 0; b < 32; b++)
            if (lanes >> b & 1) known[b] = most;
    }
}

void SharedRaces::reset(size_t bytes) {
    records_.assign((bytes + AccessRecord::kBytes - 1) / AccessRecord::kBytes, AccessRecord());
}

AccessRecord* GlobalRaces::record(uint64_t address) {
    uint64_t page = address / kPage;
    if (page != last_page_) {
        auto& slot = pages_[page];
        if (!slot) slot = std::make_unique<std::array<AccessRecord, kPage / AccessRecord::kBytes>>();
        last_page_ = page;
        last_ = slot->data();
    }
    return last_ + address % kPage / AccessRecord::kBytes;
}

namespace {

// Whether an earlier access is ordered before what this lane does now. If not, *other is the lane of that
// access.
bool ordered(const Warp& w, int lane, const Access& earlier, const Event& event, int* other) {
    const RaceClock& clock = w.clock;
    *other = earlier.first;
    if (event.block != w.block->number) {
        if (clock.blocks.empty()) return false;
        auto it = clock.blocks.find(event.block);
        return it != clock.blocks.end() && earlier.event <= it->second[event.warp];
    }
    if (event.warp != w.index) return earlier.event <= clock.seen[event.warp];
    if (earlier.event <= clock.synced) return true;
    for (int by : {(int)earlier.first, (int)earlier.last}) {
        *other = by;
        if (by != lane && !(clock.pairs && earlier.event <= (*clock.pairs)[by * 32 + lane])) return false;
    }
    return true;
}

// Whether a races with every access of the same bytes with which b would race.
bool covers(const Access& a, const Access& b) {
    return a.write >= b.write && a.atomic <= b.atomic;
}

bool equal(const AccessRecord& a, const AccessRecord& b) {
    uint64_t x[AccessRecord::kKept], y[AccessRecord::kKept], differs = 0;
    memcpy(x, a.kept, sizeof x);
    memcpy(y, b.kept, sizeof y);
    for (int i = 0; i < AccessRecord::kKept; i++) differs |= x[i] ^ y[i];
    return !differs;
}

// Puts `now` in front. A full record forgets an access if two newer ones cover it: the newest that covers it,
// and one that has the same distance from the newest as it has (in the same warp, in another warp of the
// block, in another block). A barrier of a whole warp, block or grid that orders these two also orders the
// forgotten one.
void add(AccessRecord* r, const Access& now, const Events& events) {
    constexpr int n = AccessRecord::kKept;
    Access all[n + 1] = {now};
    std::copy(r->kept, r->kept + n, all + 1);
    if (!all[n].event) {
        std::copy(all, all + n, r->kept);
        return;
    }
    auto distance = [&](const Access& a, const Access& b) {
        const Event &x = events[a.event], &y = events[b.event];
        return x.block != y.block ? 2 : x.warp != y.warp ? 1 : 0;
    };
    auto is_superfluous = [&](int k) {
        const Access* newest = nullptr;
        for (int j = 0; j < k; j++) {
            if (!covers(all[j], all[k]) || all[k].bytes & ~all[j].bytes) continue;
            if (newest && distance(all[j], *newest) == distance(all[k], *newest)) return true;
            if (!newest) newest = &all[j];
        }
        return false;
    };
    Mask superfluous = 0;
    for (int k = 1; k <= n; k++) superfluous |= (Mask)is_superfluous(k) << k;
    for (int k = n; !superfluous; k--)  // if there is none, the oldest except for plain writes
        if (!all[k].write || all[k].atomic) superfluous = 1u << k;
    int kept = 0;
    for (int k = 0; k <= n; k++)
        if (!(superfluous >> k & 1)) r->kept[kept++] = all[k];
    std::fill(r->kept + kept, std::end(r->kept), Access());
}

// An atomic takes what earlier atomics at this address have handed on, and hands on what its warp knew at its
// last fence, or knows now if it `releases`.
//   address: for shared memory it contains the number of the block, because each block has its own
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

// Checks the access of one instruction, record by record.
struct Check {
    Warp& w;
    const Instruction& in;
    AccessKind kind;
    bool is_shared;
    uint64_t since;
    const Events& events;
    int lane = 0;
    Access now = {};
    bool told = false;  // whether a race of this lane has been reported
    Mask repeated = 0;

    // Reports a race with one of the kept accesses.
    void look(const AccessRecord& r) {
        for (const Access& e : r.kept) {
            if (!e.event) break;
            if (!(e.bytes & now.bytes) || e.event == now.event || !(e.write || now.write) ||
                (e.atomic && now.atomic))
                continue;
            int other;
            if (!ordered(w, lane, e, events[e.event], &other) || e.event > since) tell(e, other);
        }
    }

    void keep(AccessRecord* r) {
        for (Access& e : r->kept) {  // accesses of this instruction by earlier lanes
            if (e.event != now.event) break;
            repeated |= (Mask)(e.bytes & now.bytes && (int)e.last != lane) << lane;
            if (e.bytes != now.bytes) continue;
            e.last = now.last;
            return;
        }
        const bool plain_write = now.write && !now.atomic;
        int n = 0, kept = 0, other;
        for (; n < AccessRecord::kKept && r->kept[n].event; n++) {
            Access e = r->kept[n];
            // A plain write also replaces accesses that are not ordered before it: look() has reported those.
            if (e.bytes & now.bytes && e.event != now.event && covers(now, e) &&
                (plain_write || ordered(w, lane, e, events[e.event], &other)))
                e.bytes &= ~now.bytes;
            if (e.bytes) r->kept[kept++] = e;
        }
        while (n > kept) r->kept[--n] = Access();
        add(r, now, events);
    }

    void tell(const Access& earlier, int other) {
        if (told) return;
        told = true;
        const Event& e = events[earlier.event];
        std::string who = e.block != w.block->number ? "block " + std::to_string(e.block)
                          : e.warp != w.index        ? "warp " + std::to_string(e.warp)
                                                     : "lane " + std::to_string(other);
        const char* verb = !writes(kind) ? "reads" : kind == AccessKind::atomic ? "updates" : "writes";
        report_at(Fault::race, w, in, lane,
                  std::string(verb) + (is_shared ? " shared" : " global") + " memory that " + who +
                      " of the same " +
                      (e.block != w.block->number ? "grid"
                       : e.warp != w.index        ? "block"
                                                  : "warp") +
                      (earlier.write ? " wrote" : " read") + ", and nothing orders the two",
                  e.instruction);
    }
};

}  // namespace

Mask check_races(Warp& w, const Instruction& in, Mask lanes, const uint64_t* addresses, int bytes,
                 AccessKind kind, bool is_shared, uint64_t event, uint64_t since) {
    Grid& g = *w.block->grid;
    Check check{w, in, kind, is_shared, since, g.races.events};
    check.now.event = event, check.now.write = writes(kind);
    // CUDA's headers have loops around atom.cas that begin with a plain read, which counts as an atomic.
    check.now.atomic = is_atomic(kind) || (!writes(kind) && in.memory.of_toolkit);
    constexpr int kBytes = AccessRecord::kBytes;
    constexpr unsigned kWhole = (1 << kBytes) - 1;
    auto each_record = [&](int lane, auto f) {
        check.lane = lane, check.told = false;
        check.now.first = check.now.last = lane & 31;
        for (int k = 0; k < bytes;) {
            const uint64_t at = addresses[lane] + k;
            const int skipped = at % kBytes, n = std::min(bytes - k, kBytes - skipped);
            check.now.bytes = ((1u << n) - 1) << skipped & kWhole;
            k += n;
            f(is_shared ? w.block->shared_races.record(at) : g.races.record(at));
        }
    };
    if (check.now.write && !check.now.atomic) {
        // All lanes look before the first write is kept, because it replaces accesses with which the other
        // lanes may race.
        each(lanes, [&](int i) { each_record(i, [&](AccessRecord* r) { check.look(*r); }); });
        each(lanes, [&](int i) { each_record(i, [&](AccessRecord* r) { check.keep(r); }); });
        return check.repeated;
    }
    AccessRecord before, after;  // the record checked last; neighbouring records are mostly equal
    each(lanes, [&](int i) {
        if (is_atomic(kind)) {
            uint64_t of_block = is_shared ? 1ull << 63 | w.block->number << 20 : 0;
            synchronize(w, addresses[i] | of_block, event, in.memory.releases);
        }
        bool is_known = false;
        each_record(i, [&](AccessRecord* r) {
            const bool whole = check.now.bytes == kWhole && bytes > kBytes;
            if (whole && is_known && equal(*r, before)) {
                *r = after;
                return;
            }
            is_known = whole;
            if (whole) before = *r;
            check.look(*r);
            check.keep(r);
            if (whole) after = *r;
        });
    });
    return 0;
}

void check_in_flight(const Warp& w, const Instruction& in, uint32_t lanes, const uint64_t* addresses,
                     int bytes, AccessKind kind) {
    for (const InFlight& x : in_flight()) {
        if (!x.write && !writes(kind)) continue;
        each(lanes, [&](int i) {
            if (addresses[i] >= x.begin + x.bytes || addresses[i] + bytes <= x.begin) return;
            const char* verb = !writes(kind) ? "reads" : kind == AccessKind::atomic ? "updates" : "writes";
            report_at(Fault::race, w, in, i,
                      std::string(verb) + " global memory that " + x.what + " in another stream " +
                          (x.write ? "writes" : "reads") +
                          ", and no event or synchronisation orders the two");
        });
    }
}

}  // namespace ptxsim
