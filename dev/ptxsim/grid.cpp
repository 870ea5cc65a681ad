// Blocks and the grid: the order in which warps and blocks run, barriers, and reports that name a thread.
#include <algorithm>
#include <numeric>

#include "dev/ptxsim/lanes.h"
#include "dev/ptxsim/warp.h"
#include "llmc/error.h"

namespace ptxsim {

uint64_t next_random(uint64_t* state) {  // SplitMix64
    uint64_t z = *state += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

// ---- reports

std::string thread_name(const Warp& w, int lane) {
    const Dim3& size = w.block->grid->launch.block;
    const Dim3& b = w.block->index;
    auto triple = [](uint64_t x, uint64_t y, uint64_t z) { return str("(", x, ",", y, ",", z, ")"); };
    uint64_t t = (uint64_t)w.index * kWarpSize + (uint64_t)std::max(lane, 0);
    return "thread " + triple(t % size.x, t / size.x % size.y, t / size.x / size.y) + " of block " +
           triple(b.x, b.y, b.z);
}

void report_at(Fault fault, const Warp& w, const Instruction& in, int lane, const std::string& what,
               const Instruction* other) {
    const Kernel& kernel = w.block->grid->kernel;
    Report r;
    r.fault = fault;
    r.kernel = kernel.title;
    std::tie(r.file, r.line) = source_of(kernel, in);
    if (other) r.other_line = source_of(kernel, *other).second;
    r.text = thread_name(w, lane) + " " + what;
    if (r.line == 0)
        r.text +=
            " (line " + std::to_string(in.ptx_line) + " of the PTX of " + kernel.module->text.name + ")";
    report(std::move(r));
}

// ---- blocks

bool Block::finished() const {
    return exited == threads;
}

bool Block::turn() {
    const Options& o = options();
    std::array<int, kMaxWarps> order;
    int n = (int)warps.size();
    std::iota(order.begin(), order.begin() + n, 0);
    if (o.order == Order::reversed) std::reverse(order.begin(), order.begin() + n);
    bool moved = false;
    for (int k = 0; k < n && !grid->stopped(); k++) {
        int budget = 10000;
        if (o.order == Order::random) {
            std::swap(order[k], order[k + (int)(next_random(&random) % (uint64_t)(n - k))]);
            budget = 1 + (int)(next_random(&random) % 64);
        }
        Warp& w = warps[order[k]];
        if (!w.finished()) moved |= w.run(budget);
    }
    turns++;
    if (!moved && !finished() && !grid->stopped()) report_deadlock();
    return moved;
}

int Block::arrive(Warp& w, const Instruction& in, Mask lanes) {
    int lane = __builtin_ctz(lanes);
    int number = in.o[1] == kIgnored ? 0 : (int)(w.src<uint32_t>(in.o[1])[lane] & 15);
    Barrier& b = barriers[number];
    int count = in.o[2] == kIgnored ? 0 : (int)w.src<uint32_t>(in.o[2])[lane];
    const Kernel& kernel = grid->kernel;
    if (!b.first) {
        b.first = &in;
        b.expected = count;
    } else if (source_of(kernel, *b.first) != source_of(kernel, in) && count == 0) {
        report_at(Fault::barrier, w, in, lane,
                  "waits at a barrier while other threads of the block wait at another line", b.first);
    } else if (count != b.expected) {
        report_at(Fault::barrier, w, in, lane,
                  "comes to barrier " + std::to_string(number) + " for " + std::to_string(count) +
                      " threads, and others came to it for " + std::to_string(b.expected),
                  b.first);
    }
    if (count && (count % kWarpSize || count > (int)warps.size() * kWarpSize))
        report_at(Fault::barrier, w, in, lane,
                  "comes to barrier " + std::to_string(number) + " for " + std::to_string(count) +
                      " threads: expected a multiple of 32, and not more threads than the block has");
    // A barrier with a count of threads counts whole warps, even the last warp of a block that does not fill
    // it.
    b.arrived += count && lanes == w.live ? kWarpSize : __builtin_popcount(lanes);
    if (in.o[3] != kIgnored) {
        Mask p = *w.src<Mask>(in.o[3]);
        if (in.aux & 1 << 8) p = ~p;
        b.votes += __builtin_popcount(p & lanes);
        b.voters += __builtin_popcount(lanes);
    }
    b.clock.join(w.clock);
    b.clock.seen[w.index] = grid->races.events.last();
    check_barriers();
    return number;
}

void Block::check_barriers() {
    for (int i = 0; i < (int)barriers.size(); i++) {
        Barrier& b = barriers[i];
        int expected = b.expected ? b.expected : threads - exited;
        if (b.first && b.arrived >= expected) complete(i);
    }
}

void Block::complete(int number) {
    Barrier b = std::move(barriers[number]);
    barriers[number] = Barrier();
    bool told = false;
    for (Warp& w : warps) {
        Mask released = 0;
        for (size_t k = 0; k < w.splits.size();) {
            Split s = w.splits[k];
            if (s.state != Split::at_barrier || s.barrier != number) {
                k++;
                continue;
            }
            const Instruction& in = grid->kernel.code[s.pc];
            if (exited && !b.expected && !told) {
                told = true;
                report_at(Fault::barrier, w, in, __builtin_ctz(s.lanes),
                          "waits at a barrier, and " + std::to_string(exited) +
                              " threads of the block have returned without coming to it",
                          last_exit);
            }
            int kind = in.aux & 255;
            if (kind == 2) {
                uint32_t* d = w.reg<uint32_t>(in.o[0]);
                each(s.lanes, [&](int i) { d[i] = (uint32_t)b.votes; });
            } else if (kind >= 3) {
                bool yes = kind == 3 ? b.votes == b.voters : b.votes > 0;
                put_predicate(w, in.o[0], yes ? kAllLanes : 0, s.lanes);
            }
            w.splits.erase(w.splits.begin() + (ptrdiff_t)k);
            w.insert({s.pc + 1, s.lanes});
            released |= s.lanes;
            k = 0;
        }
        if (!released) continue;
        w.clock.join(b.clock);
        w.clock.sync_lanes(released, w.present, grid->races.events.last());
    }
}

void Block::report_deadlock() {
    for (Warp& w : warps)
        for (const Split& s : w.splits) {
            const Instruction& in = grid->kernel.code[s.pc];
            const Barrier& b = barriers[s.barrier < 0 ? 0 : s.barrier];
            report_at(Fault::barrier, w, in, __builtin_ctz(s.lanes),
                      "is in a deadlock: it waits at barrier " + std::to_string(s.barrier) + ", where " +
                          std::to_string(b.arrived) + " of " +
                          std::to_string(b.expected ? b.expected : threads - exited) +
                          " threads have arrived");
        }
    grid->result = LaunchResult::deadlock;
}

// ---- the grid

Grid::Grid(const LaunchConfig& config)
    : launch(config),
      kernel(*config.kernel),
      figures(config.kernel->figures),
      parameters(config.parameters),
      random(options().seed) {}

std::unique_ptr<Block> Grid::start(uint64_t number) {
    std::unique_ptr<Block> b;
    if (spare_.empty()) {
        b = std::make_unique<Block>();
    } else {
        b = std::move(spare_.back());
        spare_.pop_back();
    }
    b->grid = this;
    b->number = number;
    const Dim3 &g = launch.grid, &size = launch.block;
    b->index = {(unsigned)(number % g.x), (unsigned)(number / g.x % g.y), (unsigned)(number / g.x / g.y)};
    b->threads = (int)size.count();
    b->exited = 0;
    b->turns = 0;
    b->last_exit = nullptr;
    b->random = next_random(&random);
    for (Barrier& barrier : b->barriers) barrier = Barrier();
    size_t shared = kernel.shared_bytes + launch.dynamic_shared;
    b->shared.assign(shared, std::byte(0xFF));
    b->shared_known.assign(shared, kNoMemory);
    for (const Variable& v : kernel.shared)
        std::fill_n(&b->shared_known[v.offset], v.bytes, (uint8_t)kUnwritten);
    std::fill(b->shared_known.begin() + (ptrdiff_t)kernel.shared_bytes, b->shared_known.end(),
              (uint8_t)kUnwritten);
    if (options().race) b->shared_races.reset(shared);
    b->warps.resize((size_t)(b->threads + kWarpSize - 1) / kWarpSize);
    for (int i = 0; i < (int)b->warps.size(); i++) {
        Warp& w = b->warps[i];
        w.block = b.get();
        w.index = i;
        int threads = std::min(kWarpSize, b->threads - i * kWarpSize);
        w.present = w.live = threads == kWarpSize ? kAllLanes : (1u << threads) - 1;
        w.carry = 0;
        w.registers.resize(kernel.register_bytes + 64);
        w.regs = (std::byte*)(((uintptr_t)w.registers.data() + 63) / 64 * 64);
        w.constants = (const std::byte*)kernel.constants.data();
        w.local.assign(kernel.local_bytes * kWarpSize, std::byte(0xFF));
        w.local_known.assign(kernel.local_bytes * kWarpSize, kUnwritten);
        w.splits.assign(1, {0, w.live});
        w.clock = RaceClock();
        w.has_copies = 0;
        for (auto& c : w.copies) c.clear();
        w.copy_groups.fill(0);
        for (auto [special, place] : kernel.specials) {
            bool wide = place < 0;
            if (wide) place = -place - 1;
            for (int lane = 0; lane < kWarpSize; lane++) {
                unsigned t = (unsigned)(i * kWarpSize + lane);
                uint64_t value = 0;
                switch (special) {
                    case Special::tid_x:
                        value = t % size.x;
                        break;
                    case Special::tid_y:
                        value = t / size.x % size.y;
                        break;
                    case Special::tid_z:
                        value = t / size.x / size.y;
                        break;
                    case Special::ntid_x:
                        value = size.x;
                        break;
                    case Special::ntid_y:
                        value = size.y;
                        break;
                    case Special::ntid_z:
                        value = size.z;
                        break;
                    case Special::ctaid_x:
                        value = b->index.x;
                        break;
                    case Special::ctaid_y:
                        value = b->index.y;
                        break;
                    case Special::ctaid_z:
                        value = b->index.z;
                        break;
                    case Special::nctaid_x:
                        value = g.x;
                        break;
                    case Special::nctaid_y:
                        value = g.y;
                        break;
                    case Special::nctaid_z:
                        value = g.z;
                        break;
                    case Special::laneid:
                        value = (uint64_t)lane;
                        break;
                    case Special::warpid:
                        value = (uint64_t)i;
                        break;
                    case Special::nwarpid:
                        value = b->warps.size();
                        break;
                    case Special::smid:
                        value = number % 132;
                        break;
                    case Special::nsmid:
                        value = 132;
                        break;
                    case Special::gridid:
                        value = figures.launches;
                        break;
                    case Special::lanemask_eq:
                        value = 1u << lane;
                        break;
                    case Special::lanemask_le:
                        value = (2ull << lane) - 1;
                        break;
                    case Special::lanemask_lt:
                        value = (1ull << lane) - 1;
                        break;
                    case Special::lanemask_ge:
                        value = (uint32_t) ~((1ull << lane) - 1);
                        break;
                    case Special::lanemask_gt:
                        value = (uint32_t) ~((2ull << lane) - 1);
                        break;
                    case Special::dynamic_smem_size:
                        value = launch.dynamic_shared;
                        break;
                    case Special::total_smem_size:
                        value = kernel.info.static_shared + launch.dynamic_shared;
                        break;
                    case Special::grid_workspace_hi:
                        value = workspace ? workspace >> 32 : 0;
                        break;
                    case Special::grid_workspace_lo:
                        value = workspace ? (uint32_t)workspace : 0;
                        break;
                    default:
                        break;
                }
                if (wide) {
                    w.reg<uint64_t>(place)[lane] = value;
                } else {
                    w.reg<uint32_t>(place)[lane] = (uint32_t)value;
                }
            }
        }
    }
    return b;
}

void Grid::run() {
    const Options& o = options();
    uint64_t count = launch.grid.count(), admitted = 0;
    // A random order of the blocks that needs no table: block number i is (first + i * step) % count, where
    // step and count have no common factor.
    uint64_t step = 1, first = 0;
    if (o.order == Order::random && count > 2) {
        first = next_random(&random) % count;
        do step = 1 + next_random(&random) % (count - 1);
        while (std::gcd(step, count) != 1);
    }
    auto block_number = [&](uint64_t i) {
        return o.order == Order::reversed ? count - 1 - i
                                          : (first + (unsigned __int128)i * step % count) % count;
    };
    // Blocks run one after the other. Several run at a time if the order is random, if the launch is
    // cooperative, or if a block takes so many turns that it may be waiting for another block.
    constexpr int kPatience = 20;
    uint64_t resident = launch.cooperative ? count : o.order == Order::random ? 4 : 1;
    std::vector<std::unique_ptr<Block>> blocks;
    while ((admitted < count || !blocks.empty()) && !stopped()) {
        while (admitted < count && blocks.size() < resident)
            blocks.push_back(start(block_number(admitted++)));
        size_t k = o.order == Order::random ? next_random(&random) % blocks.size() : 0;
        for (size_t n = o.order == Order::random ? 1 : blocks.size(); n > 0 && !stopped(); n--, k++) {
            Block& b = *blocks[k];
            b.turn();
            if (b.turns > kPatience && resident < 132 && blocks.size() == resident)
                resident *= 2, b.turns = 0;
            if (!b.finished()) continue;
            spare_.push_back(std::move(blocks[k]));
            blocks.erase(blocks.begin() + (ptrdiff_t)k);
            k--;
        }
    }
}

LaunchResult run(const LaunchConfig& launch) {
    Grid grid(launch);
    grid.figures.launches++;
    uint64_t workspace = 0;
    if (launch.cooperative) {  // the grid barrier of cooperative_groups keeps its counters here
        workspace = memory::allocate(256, MemoryKind::device, "workspace of a cooperative launch", true);
        memory::fill(workspace, 0, 256);
        grid.workspace = workspace;
    }
    grid.run();
    if (workspace) memory::free(workspace);
    return grid.result;
}

}  // namespace ptxsim
