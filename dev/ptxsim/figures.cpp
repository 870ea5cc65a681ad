// Figures of each kernel: what ran, how many bytes it moved, and the least time that an H100 would take.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "dev/ptxsim/program.h"

namespace ptxsim {

namespace {

// What an H100 SXM does per second (NVIDIA H100 Tensor Core GPU architecture, table 3): bytes of HBM3, dense
// bf16 operations of the tensor cores, lane-instructions (132 SMs, 128 lanes, 1.83 GHz).
constexpr double kBandwidth = 3.35e12, kTensorRate = 989e12, kLaneRate = 132 * 128 * 1.83e9;

struct Summary {
    uint64_t warps = 0, lanes = 0, instructions = 0, executed = 0;
    double bound_us = 0;
    const char* limit = "";
    std::map<std::string, uint64_t> kinds;   // warp-instructions by mnemonic
    std::map<std::string, uint64_t> missed;  // instructions that never ran, by source line
};

struct Entry {
    const Kernel* kernel;
    Figures figures;
};

// An instance of a template that is in several object files counts as one kernel.
bool same_code(const Kernel& a, const Kernel& b) {
    if (a.title != b.title || a.code.size() != b.code.size()) return false;
    for (size_t i = 0; i < a.code.size(); i++)
        if (a.mnemonics[a.code[i].mnemonic] != b.mnemonics[b.code[i].mnemonic]) return false;
    return true;
}

void add(Figures& to, const Figures& from) {
    for (size_t i = 0; i < to.warps.size(); i++) {
        to.warps[i] += from.warps[i];
        to.lanes[i] += from.lanes[i];
    }
    to.launches += from.launches;
    to.mma += from.mma;
    to.tensor_flops += from.tensor_flops;
    to.load_bytes += from.load_bytes;
    to.store_bytes += from.store_bytes;
    to.load_sectors += from.load_sectors;
    to.store_sectors += from.store_sectors;
    to.shared_accesses += from.shared_accesses;
    to.bank_conflicts += from.bank_conflicts;
    to.branches += from.branches;
    to.divergent_branches += from.divergent_branches;
}

std::vector<Entry> entries() {
    std::vector<Entry> all;
    std::map<std::string, std::vector<size_t>> by_title;
    for (const Kernel* k : launched_kernels()) {
        std::vector<size_t>& titled = by_title[k->title];
        auto same = std::find_if(titled.begin(), titled.end(),
                                 [&](size_t i) { return same_code(*all[i].kernel, *k); });
        if (same != titled.end()) {
            add(all[*same].figures, k->figures);
        } else {
            titled.push_back(all.size());
            all.push_back({k, k->figures});
        }
    }
    return all;
}

Summary summarize(const Entry& entry) {
    const Kernel& k = *entry.kernel;
    const Figures& f = entry.figures;
    Summary s;
    for (size_t i = 0; i < k.code.size(); i++) {
        s.warps += f.warps[i];
        s.lanes += f.lanes[i];
        s.instructions++;
        // A branch has also run if no lane took it.
        const bool ran = f.lanes[i] > 0 || (k.code[i].flow == Flow::branch && f.warps[i] > 0);
        s.executed += ran;
        s.kinds[k.mnemonics[k.code[i].mnemonic]] += f.warps[i];
        if (ran) continue;
        const auto [file, line] = source_of(k, k.code[i]);
        s.missed[file + ":" + std::to_string(line)]++;
    }
    double memory = 32.0 * (double)(f.load_sectors + f.store_sectors) / kBandwidth;
    double tensor = (double)f.tensor_flops / kTensorRate, issue = (double)s.lanes / kLaneRate;
    double bound = std::max({memory, tensor, issue});
    s.bound_us = bound * 1e6;
    s.limit = bound == memory ? "bytes" : bound == tensor ? "tensor cores" : "instructions";
    return s;
}

}  // namespace

std::string figures_json() {
    nlohmann::ordered_json all;
    all["kernels"] = nlohmann::ordered_json::array();
    for (const Entry& entry : entries()) {
        const Figures& f = entry.figures;
        Summary s = summarize(entry);
        nlohmann::ordered_json j;
        j["name"] = entry.kernel->title;
        j["launches"] = f.launches;
        j["warp_instructions"] = s.warps;
        j["lane_instructions"] = s.lanes;
        j["mma"] = f.mma;
        j["tensor_flops"] = f.tensor_flops;
        j["global_load_bytes"] = f.load_bytes;
        j["global_store_bytes"] = f.store_bytes;
        j["global_load_sectors"] = f.load_sectors;
        j["global_store_sectors"] = f.store_sectors;
        j["shared_accesses"] = f.shared_accesses;
        j["shared_bank_conflicts"] = f.bank_conflicts;
        j["branches"] = f.branches;
        j["divergent_branches"] = f.divergent_branches;
        j["instructions"] = s.instructions;
        j["executed"] = s.executed;
        j["bound_us"] = s.bound_us;
        j["bound_by"] = s.limit;
        j["by_kind"] = s.kinds;
        j["not_executed"] = s.missed;
        all["kernels"].push_back(std::move(j));
    }
    return all.dump(2);
}

std::string figures_table() {
    std::string text =
        "kernel                                   launches  warp instr  lanes  mma      MB read  MB written"
        "  sectors/ideal  conflicts  divergent  coverage  bound us (at least; by)\n";
    for (const Entry& entry : entries()) {
        const Figures& f = entry.figures;
        Summary s = summarize(entry);
        uint64_t sectors = f.load_sectors + f.store_sectors;
        double ideal = (double)(f.load_bytes + f.store_bytes) / 32;
        char line[512];
        snprintf(
            line, sizeof(line),
            "%-40.40s %8llu %11llu %6.1f %8llu %8.3f %11.3f %14.2f %10llu %10llu %8.1f%%  %.2f (%s)\n",
            entry.kernel->title.c_str(), (unsigned long long)f.launches, (unsigned long long)s.warps,
            s.warps ? (double)s.lanes / (double)s.warps : 0, (unsigned long long)f.mma,
            (double)f.load_bytes / 1e6, (double)f.store_bytes / 1e6, ideal > 0 ? (double)sectors / ideal : 0,
            (unsigned long long)f.bank_conflicts, (unsigned long long)f.divergent_branches,
            s.instructions ? 100.0 * (double)s.executed / (double)s.instructions : 0, s.bound_us, s.limit);
        text += line;
    }
    return text +
           "A bound is the least time that the bytes, tensor cores and issue slots of an H100 allow; real "
           "kernels take longer.\n";
}

void clear_figures() {
    for (const Kernel* k : launched_kernels()) {
        k->figures = Figures();
        k->figures.warps.assign(k->code.size(), 0);
        k->figures.lanes.assign(k->code.size(), 0);
    }
}

}  // namespace ptxsim
