// A warp: which of its lanes run and which wait. The lanes at the lowest instruction run first, so that lanes
// that went different ways meet again.
#include "dev/ptxsim/warp.h"

#include <algorithm>

#include "dev/ptxsim/lanes.h"
#include "llmc/error.h"

namespace ptxsim {

namespace {

std::string lane_list(Mask lanes) {
    std::string text;
    each(lanes, [&](int i) { text += str(text.empty() ? "" : ",", i); });
    return (lanes & (lanes - 1) ? "lanes " : "lane ") + text;
}

}  // namespace

void Warp::insert(Split split) {
    if (!split.lanes) return;
    size_t k = 0;
    while (k < splits.size() && splits[k].pc < split.pc) k++;
    for (size_t i = k; i < splits.size() && splits[i].pc == split.pc; i++) {
        bool at_barrier = splits[i].state == Split::at_barrier;
        if (at_barrier != (split.state == Split::at_barrier)) continue;
        splits[i].lanes |= split.lanes;
        if (!at_barrier && split.state == Split::ready)
            splits[i].state = Split::ready;  // its mask has to be checked again
        return;
    }
    splits.insert(splits.begin() + k, split);
}

bool Warp::run(int budget) {
    Grid& g = *block->grid;
    bool moved = false;
    while (budget > 0 && live && !g.stopped()) {
        size_t k = 0;
        while (k < splits.size() && splits[k].state != Split::ready) k++;
        if (k < splits.size()) {
            run_split(k, &budget);
        } else {
            if (all_at_barrier()) return moved;
            resolve();
        }
        moved = true;
    }
    return moved;
}

bool Warp::all_at_barrier() const {
    return std::all_of(splits.begin(), splits.end(),
                       [](const Split& s) { return s.state == Split::at_barrier; });
}

void Warp::leave(Mask lanes, const Instruction& in) {
    live &= ~lanes;
    block->exited += __builtin_popcount(lanes);
    block->last_exit = &in;
    each(lanes & has_copies, [&](int i) { copies[i].clear(); });
    has_copies &= ~lanes;
    for (Split& s : splits)
        if (s.state == Split::at_sync) s.state = Split::ready;
    block->check_barriers();
}

void Warp::run_split(size_t k, int* budget) {
    Grid& g = *block->grid;
    Figures& f = g.figures;
    const Instruction* code = g.kernel.code.data();
    uint32_t pc = splits[k].pc;
    Mask lanes = splits[k].lanes;
    splits.erase(splits.begin() + k);
    // The next split that these lanes must not pass, because they have to join it. A split at a barrier is
    // not one of these, because its lanes have already arrived there.
    auto next_stop = [&] {
        for (const Split& s : splits)
            if (s.pc > pc && s.state != Split::at_barrier) return s.pc;
        return UINT32_MAX;
    };
    uint32_t stop = next_stop();
    while (true) {
        if (*budget <= 0 || g.stopped()) return insert({pc, lanes});
        --*budget;
        const Instruction& in = code[pc];
        Mask active = lanes;
        if (in.guard >= 0) {
            Mask p = *reg<Mask>(in.guard);
            active &= in.guard_negated ? ~p : p;
        }
        g.instructions++;
        f.warps[pc]++;
        f.lanes[pc] += (uint64_t)__builtin_popcount(active);
        switch (in.flow) {
            case Flow::plain:
                if (active) in.run(*this, in, active);
                pc++;
                break;
            case Flow::branch: {
                f.branches++;
                if (active == lanes) {
                    pc = (uint32_t)in.imm;
                    if (pc == stop) return insert({pc, lanes});
                    if (!splits.empty()) return insert({pc, lanes});
                } else if (active) {
                    f.divergent_branches++;
                    insert({(uint32_t)in.imm, active});
                    return insert({pc + 1, lanes & ~active});
                } else {
                    pc++;
                }
                break;
            }
            case Flow::table: {
                f.branches++;
                const uint32_t* index = src<uint32_t>(in.o[0]);
                insert({pc + 1, lanes & ~active});
                int ways = 0;
                for (Mask rest = active; rest; ways++) {
                    uint32_t i = index[__builtin_ctz(rest)];
                    Mask same = 0;
                    each(rest, [&](int lane) { same |= (Mask)(index[lane] == i) << lane; });
                    rest &= ~same;
                    if (i >= in.targets->size()) {
                        report_at(Fault::trap, *this, in, __builtin_ctz(same),
                                  "has an index for brx.idx that is beyond its targets");
                        g.result = LaunchResult::trap;
                    } else {
                        insert({(uint32_t)(*in.targets)[i], same});
                    }
                }
                f.divergent_branches += ways > 1;
                return;
            }
            case Flow::sync: {
                Mask wanted = 0, waiting = active ? run_sync(in, active, &wanted) : 0;
                if (waiting) {
                    Split s{pc, waiting};
                    s.state = Split::at_sync, s.wanted = wanted;
                    insert({pc + 1, lanes & ~waiting});
                    return insert(s);
                }
                pc++;
                break;
            }
            case Flow::barrier: {
                if (!active) {
                    pc++;
                    break;
                }
                insert({pc + 1, lanes & ~active});
                bool waits = (in.aux & 255) != 1;
                if (!waits) insert({pc + 1, active});
                Split s{pc, active};
                s.state = Split::at_barrier;
                s.barrier =
                    in.o[1] == kIgnored ? 0 : (int)(src<uint32_t>(in.o[1])[__builtin_ctz(active)] & 15);
                if (waits) insert(s);
                block->arrive(*this, in, active);
                return;
            }
            case Flow::exit:
                insert({pc + 1, lanes & ~active});
                if (active) leave(active, in);
                return;
            case Flow::trap:
                if (active) {
                    report_at(Fault::trap, *this, in, __builtin_ctz(active), "executes trap");
                    g.result = LaunchResult::trap;
                }
                pc++;
                break;
        }
        if (pc >= stop) return insert({pc, lanes});
    }
}

Mask Warp::run_sync(const Instruction& in, Mask active, Mask* wanted) {
    auto complain = [&](Mask lanes, const std::string& what) {
        report_at(Fault::warp_mask, *this, in, __builtin_ctz(lanes), what);
    };
    if (in.sync_mask == kConvergedLanes) {
        if (active != live) {
            *wanted = live;
            return active;
        }
        if (live != kAllLanes)
            complain(live, "comes to an instruction of the whole warp, but " + lane_list(present & ~live) +
                               " returned before");
        in.run(*this, in, active);
        return 0;
    }
    const uint32_t* masks = src<uint32_t>(in.sync_mask);
    Mask waiting = 0;
    for (Mask rest = active; rest;) {
        Mask mask = masks[__builtin_ctz(rest)] & present, group = 0;
        each(rest, [&](int i) { group |= (Mask)((masks[i] & present) == mask) << i; });
        rest &= ~group;
        if (group & ~mask) complain(group & ~mask, "passes a mask that does not name its own lane");
        Mask returned = mask & ~live, elsewhere = mask & ~group & live, others = elsewhere & active;
        if (returned) complain(group, "passes a mask that names " + lane_list(returned) + ", which returned");
        if (others)
            complain(group,
                     "passes a mask that names " + lane_list(others) + ", which came with another mask");
        if (elsewhere & ~others) {
            waiting |= group;
            *wanted |= mask;
        } else {
            in.run(*this, in, group);
        }
    }
    return waiting;
}

void Warp::resolve() {
    const std::vector<Instruction>& code = block->grid->kernel.code;
    // Several bar.warp.sync at different lines may be one barrier.
    size_t first = splits.size();
    for (size_t k = 0; k < splits.size(); k++)
        if (splits[k].state == Split::at_sync && first == splits.size()) first = k;
    const Instruction& in = code[splits[first].pc];
    Mask wanted = splits[first].wanted, together = 0;
    for (const Split& s : splits)
        if (s.state == Split::at_sync && code[s.pc].run == in.run &&
            code[s.pc].sync_mask != kConvergedLanes && s.wanted == wanted && in.o[0] == in.sync_mask)
            together |= s.lanes;
    if (in.o[0] == in.sync_mask && (wanted & live & ~together) == 0) {
        in.run(*this, in, together);
        std::vector<Split> old = std::move(splits);
        splits.clear();
        for (Split& s : old) {
            if (s.lanes & together) s = {s.pc + 1, s.lanes};
            insert(s);
        }
        return;
    }
    Split s = splits[first];
    const Split* other = nullptr;
    for (const Split& o : splits)
        if (o.lanes & wanted & ~s.lanes) other = &o;
    report_at(Fault::warp_mask, *this, in, __builtin_ctz(s.lanes),
              "waits for ever for " + lane_list(wanted & ~s.lanes & live) + ", which wait elsewhere",
              other ? &code[other->pc] : nullptr);
    in.run(*this, in, s.lanes);
    splits.erase(splits.begin() + (ptrdiff_t)first);
    insert({s.pc + 1, s.lanes});
}

}  // namespace ptxsim
