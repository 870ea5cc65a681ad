// Turns a kernel's text into its program: calls are inlined, names become places in the registers, and labels
// become indices of instructions.
#include <cxxabi.h>

#include <algorithm>
#include <stdexcept>

#include "dev/ptxsim/program.h"

namespace ptxsim {

namespace {

const std::map<std::string, Special> kSpecials = {
    {"%tid.x", Special::tid_x},
    {"%tid.y", Special::tid_y},
    {"%tid.z", Special::tid_z},
    {"%ntid.x", Special::ntid_x},
    {"%ntid.y", Special::ntid_y},
    {"%ntid.z", Special::ntid_z},
    {"%ctaid.x", Special::ctaid_x},
    {"%ctaid.y", Special::ctaid_y},
    {"%ctaid.z", Special::ctaid_z},
    {"%nctaid.x", Special::nctaid_x},
    {"%nctaid.y", Special::nctaid_y},
    {"%nctaid.z", Special::nctaid_z},
    {"%laneid", Special::laneid},
    {"%warpid", Special::warpid},
    {"%nwarpid", Special::nwarpid},
    {"%smid", Special::smid},
    {"%nsmid", Special::nsmid},
    {"%gridid", Special::gridid},
    {"%lanemask_eq", Special::lanemask_eq},
    {"%lanemask_le", Special::lanemask_le},
    {"%lanemask_lt", Special::lanemask_lt},
    {"%lanemask_ge", Special::lanemask_ge},
    {"%lanemask_gt", Special::lanemask_gt},
    {"%clock", Special::clock},
    {"%clock_hi", Special::clock_hi},
    {"%clock64", Special::clock64},
    {"%globaltimer", Special::globaltimer},
    {"%dynamic_smem_size", Special::dynamic_smem_size},
    {"%total_smem_size", Special::total_smem_size},
    {"%envreg1", Special::grid_workspace_hi},
    {"%envreg2", Special::grid_workspace_lo},
};
bool is_clock(Special s) {
    return s == Special::clock || s == Special::clock_hi || s == Special::clock64 ||
           s == Special::globaltimer;
}

// What a name means in the PTX.
struct Binding {
    enum { reg, variable, label } kind;
    int32_t place = 0;
    int bytes = 0;  // reg: its width; 1 for a predicate. variable: -1 for dynamic shared memory
    Space space = Space::generic;
    uint64_t address = 0;  // variable
};

size_t align_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

class Decoder {
  public:
    Decoder(const Module& module, const FunctionText& entry)
        : module_(module), entry_(entry), kernel_(std::make_unique<Kernel>()) {}

    std::unique_ptr<Kernel> run() {
        Kernel& k = *kernel_;
        k.module = &module_;
        k.info.name = entry_.name;
        k.title = demangle(entry_.name);
        k.info.max_threads = entry_.max_threads ? entry_.max_threads : 1024;
        k.info.required_threads = entry_.required_threads;
        scopes_.emplace_back();
        size_t offset = 0;
        for (const VariableDeclaration& p : entry_.parameters) {
            size_t bytes = type_bytes(p.type) * (size_t)p.count,
                   align = p.align ? p.align : type_bytes(p.type);
            offset = align_up(offset, align);
            k.info.parameter_offsets.push_back(offset);
            k.info.parameter_sizes.push_back(bytes);
            bind_variable(p.name, Space::param, kParamWindow + offset);
            offset += bytes;
        }
        k.info.parameter_bytes = offset;
        declare_module_shared();
        function(entry_, true);
        k.info.static_shared = true_shared_bytes_;
        k.info.local_bytes = k.local_bytes;
        // Dynamic shared memory begins after all static variables and a gap.
        size_t dynamic = align_up(k.shared_bytes + (k.shared_bytes ? kGap : 0), 128);
        k.shared_bytes = dynamic;
        for (auto [place, at] : dynamic_shared_) {
            uint64_t address;
            memcpy(&address, &k.constants[at], 8);
            address = (address & kWindowMask) | dynamic;
            for (int i = 0; i < kWarpSize; i++) store_constant(at, i, place, address);
        }
        k.figures.warps.assign(k.code.size(), 0);
        k.figures.lanes.assign(k.code.size(), 0);
        return std::move(kernel_);
    }

  private:
    static constexpr size_t kGap = 128;  // between shared variables, so that accesses past the end are found

    const Module& module_;
    const FunctionText& entry_;
    std::unique_ptr<Kernel> kernel_;
    std::vector<std::map<std::string, Binding>> scopes_;
    std::vector<std::string> call_stack_;
    std::map<std::string, uint16_t> mnemonics_;
    std::map<std::pair<int, std::vector<uint8_t>>, int32_t> constants_;
    std::vector<std::pair<int, size_t>> dynamic_shared_;  // constants with its address: (bytes, offset)
    size_t true_shared_bytes_ = 0;
    int line_ = 0;

    [[noreturn]] void fail(const std::string& what) const {
        throw std::runtime_error(module_.text.name + ":" + std::to_string(line_) + ": " + what + " (in " +
                                 kernel_->title + ")");
    }

    static std::string demangle(const std::string& name) {
        int status;
        char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
        std::string result = status == 0 ? text : name;
        free(text);
        // Removes the parameters, and the result type that stands before the name of a template.
        int depth = 0;
        for (size_t i = result.size(); i-- > 0;) {
            if (result[i] == ')') depth++;
            if (result[i] == '(' && --depth == 0) {
                result.resize(i);
                break;
            }
        }
        depth = 0;
        for (size_t i = 0; i < result.size(); i++) {
            depth += result[i] == '<' ? 1 : result[i] == '>' ? -1 : 0;
            if (result[i] == ' ' && depth == 0 && result.compare(0, i, "void") == 0)
                return result.substr(i + 1);
        }
        return result;
    }

    // ---- names

    void bind_variable(const std::string& name, Space space, uint64_t address) {
        Binding b{Binding::variable, 0, 0, space, address};
        scopes_.back()[name] = b;
    }

    const Binding* find(const std::string& name) const {
        for (size_t i = scopes_.size(); i-- > 0;) {
            auto it = scopes_[i].find(name);
            if (it != scopes_[i].end()) return &it->second;
        }
        return nullptr;
    }

    int32_t new_register(int bytes) {
        size_t size = bytes == 1 ? sizeof(Mask) : (size_t)bytes * kWarpSize;
        size_t at = align_up(kernel_->register_bytes, std::min<size_t>(size, 64));
        kernel_->register_bytes = at + size;
        return (int32_t)at;
    }

    void declare_registers(const Statement& s) {
        int bytes = type_bytes(s.op);
        auto declare = [&](const std::string& name) {
            scopes_.back()[name] = {Binding::reg, new_register(bytes), bytes, Space::generic, 0};
        };
        const std::string& name = s.operands[0].text;
        if (s.count == 0) return declare(name);
        for (int i = 0; i < s.count; i++) declare(name + std::to_string(i));
    }

    void declare_module_shared() {
        for (const VariableDeclaration& v : module_.text.variables)
            if (v.space == Space::shared) declare_shared(v);
    }

    void declare_shared(const VariableDeclaration& v) {
        if (v.count == 0) {  // dynamic: run() knows where it begins when all static variables are declared
            scopes_.back()[v.name] = {Binding::variable, 0, -1, Space::shared, 0};
            return;
        }
        size_t bytes = type_bytes(v.type) * (size_t)v.count;
        size_t align = v.align ? v.align : type_bytes(v.type);
        true_shared_bytes_ = align_up(true_shared_bytes_, align) + bytes;
        size_t at = align_up(kernel_->shared_bytes + (kernel_->shared.empty() ? 0 : kGap),
                             std::max<size_t>(align, 128));
        kernel_->shared.push_back({v.name, at, bytes});
        kernel_->shared_bytes = at + bytes;
        bind_variable(v.name, Space::shared, at);
    }

    void declare_local(const VariableDeclaration& v) {
        size_t bytes = type_bytes(v.type) * (size_t)v.count;
        size_t at = align_up(kernel_->local_bytes, std::max(v.align, std::max(type_bytes(v.type), 8)));
        kernel_->local_bytes = at + bytes;
        bind_variable(v.name, Space::local, kLocalWindow + at);
    }

    // ---- constants

    void store_constant(size_t at, int lane, int bytes, uint64_t bits) {
        memcpy(&kernel_->constants[at + (size_t)lane * bytes], &bits, bytes);
    }

    // The place of a constant that has the same value in all lanes. `bytes` is 1 for a predicate.
    int32_t constant(uint64_t bits, int bytes) {
        std::vector<uint8_t> key((uint8_t*)&bits, (uint8_t*)&bits + 8);
        auto [it, is_new] = constants_.try_emplace({bytes, key}, 0);
        if (!is_new) return it->second;
        return it->second = new_constant(bits, bytes);
    }
    int32_t new_constant(uint64_t bits, int bytes) {
        size_t at = align_up(kernel_->constants.size(), 64);
        if (bytes == 1) {
            kernel_->constants.resize(at + 64);
            Mask mask = bits ? kAllLanes : 0;
            memcpy(&kernel_->constants[at], &mask, sizeof(mask));
        } else {
            kernel_->constants.resize(at + (size_t)bytes * kWarpSize);
            for (int i = 0; i < kWarpSize; i++) store_constant(at, i, bytes, bits);
        }
        return ~(int32_t)at;
    }

    // The address of a variable, as a constant.
    int32_t address_constant(const std::string& name, int64_t offset, int bytes, bool* found) {
        *found = true;
        if (const Binding* b = find(name); b && b->kind == Binding::variable) {
            if (b->space == Space::shared && b->bytes == -1) {
                int32_t place = new_constant((uint64_t)offset, bytes);
                if (offset) fail("an operand with an offset to dynamic shared memory is not supported");
                dynamic_shared_.emplace_back(bytes, (size_t)~place);
                return place;
            }
            return constant(b->address + (uint64_t)offset, bytes);
        }
        auto it = module_.variables.find(name);
        if (it != module_.variables.end()) return constant(it->second.address + (uint64_t)offset, bytes);
        *found = false;
        return 0;
    }

    // ---- operands

    // The place of an operand. The instruction reads `bytes` of it; 0: the width of its register.
    int32_t place(const Operand& o, int bytes) {
        switch (o.kind) {
            case Operand::ignored:
                return kIgnored;
            case Operand::integer:
                return constant((uint64_t)o.value, bytes ? bytes : 8);
            case Operand::float32:
                if (bytes == 8) {
                    uint32_t bits = (uint32_t)o.value;
                    float f;
                    memcpy(&f, &bits, 4);
                    double d = f;
                    uint64_t wide;
                    memcpy(&wide, &d, 8);
                    return constant(wide, 8);
                }
                return constant((uint64_t)o.value, bytes ? bytes : 4);
            case Operand::float64:
                if (bytes == 4) {
                    double d;
                    memcpy(&d, &o.value, 8);
                    float f = (float)d;
                    uint32_t bits;
                    memcpy(&bits, &f, 4);
                    return constant(bits, 4);
                }
                return constant((uint64_t)o.value, 8);
            case Operand::name:
                break;
            default:
                fail("an operand of a kind that this instruction cannot have");
        }
        if (const Binding* b = find(o.text); b && b->kind == Binding::reg) {
            if (bytes && b->bytes != bytes && !(bytes > 1 && b->bytes > 1))
                fail("operand " + o.text + " has another width than the instruction");
            if (bytes && b->bytes < bytes) fail("operand " + o.text + " is too narrow");
            return b->place;
        }
        if (o.text == "WARP_SZ") return constant(kWarpSize, bytes ? bytes : 4);
        auto special = kSpecials.find(o.text);
        if (special != kSpecials.end()) return special_register(special->second, bytes ? bytes : 4);
        bool found;
        int32_t p = address_constant(o.text, o.value, bytes ? bytes : 8, &found);
        if (!found) fail("unknown name " + o.text);
        return p;
    }

    int width(const Operand& o, int otherwise) const {
        const Binding* b = o.kind == Operand::name ? find(o.text) : nullptr;
        return b && b->kind == Binding::reg ? b->bytes : otherwise;
    }

    int32_t special_register(Special s, int bytes) {
        std::string name = "special " + std::to_string((int)s) + " " + std::to_string(bytes);
        auto it = scopes_[0].find(name);
        if (it != scopes_[0].end()) return it->second.place;
        int32_t p = new_register(bytes);
        scopes_[0][name] = {Binding::reg, p, bytes, Space::generic, 0};
        kernel_->specials.emplace_back(s, bytes == 8 ? -p - 1 : p);
        return p;
    }

    int32_t guard(const std::string& name) {
        const Binding* b = find(name);
        if (!b || b->kind != Binding::reg || b->bytes != 1) fail("unknown predicate " + name);
        return b->place;
    }

    // ---- functions and statements

    struct Frame {
        // A label belongs to its block: "/2/5:name" is a label in the sixth block, which is in the third.
        std::string block;
        int blocks = 0;
        std::map<std::string, int32_t> labels;
        std::string in_block(const std::string& label) const { return block + ":" + label; }
        std::vector<std::pair<size_t, std::string>> branches;  // instruction, label
        std::vector<std::pair<std::vector<int32_t>*, std::string>> table_entries;
        std::map<std::string, std::vector<std::string>> targets;
        std::vector<size_t> returns;
    };

    void function(const FunctionText& f, bool is_entry) {
        if (std::find(call_stack_.begin(), call_stack_.end(), f.name) != call_stack_.end())
            fail("a recursive call of " + f.name + " cannot be inlined");
        call_stack_.push_back(f.name);
        Frame frame;
        size_t depth = scopes_.size();
        for (const Statement& s : f.body) {
            line_ = s.ptx_line;
            switch (s.kind) {
                case Statement::open:
                    scopes_.emplace_back();
                    frame.block += "/" + std::to_string(frame.blocks++);
                    break;
                case Statement::close:
                    if (scopes_.size() <= depth) fail("'}' without '{'");
                    scopes_.pop_back();
                    frame.block.resize(frame.block.rfind('/'));
                    break;
                case Statement::registers:
                    declare_registers(s);
                    break;
                case Statement::variable:
                    if (s.declaration.space == Space::shared) {
                        declare_shared(s.declaration);
                    } else if (s.declaration.space == Space::local || s.declaration.space == Space::param) {
                        declare_local(s.declaration);
                    } else {
                        fail("a function cannot have a variable in this state space");
                    }
                    break;
                case Statement::label:
                    frame.labels[frame.in_block(s.op)] = (int32_t)kernel_->code.size();
                    break;
                case Statement::targets:
                    for (const Operand& o : s.operands) frame.targets[s.op].push_back(frame.in_block(o.text));
                    break;
                case Statement::instruction:
                    instruction(s, frame, is_entry);
                    break;
            }
        }
        scopes_.resize(depth);
        if (is_entry) {  // a kernel also returns at the end of its text
            Instruction in;
            in.flow = Flow::exit;
            in.ptx_line = line_;
            in.mnemonic = mnemonic("ret");
            if (!f.body.empty()) in.source = f.body.back().source;
            bool ends = !kernel_->code.empty() && kernel_->code.back().flow == Flow::exit &&
                        kernel_->code.back().guard < 0;
            bool labelled = std::any_of(frame.labels.begin(), frame.labels.end(),
                                        [&](auto& l) { return l.second == (int32_t)kernel_->code.size(); });
            if (!ends || labelled) kernel_->code.push_back(in);
        }
        auto target = [&](std::string label) {  // looks in the branch's block, then in those around it
            for (;;) {
                auto it = frame.labels.find(label);
                if (it != frame.labels.end()) return it->second;
                size_t end = label.find(':');
                if (end == 0) fail("unknown label " + label.substr(1));
                label.erase(label.rfind('/', end), end - label.rfind('/', end));
            }
        };
        for (auto& [at, label] : frame.branches) kernel_->code[at].imm = target(label);
        for (auto& [table, label] : frame.table_entries) table->push_back(target(label));
        for (size_t at : frame.returns) kernel_->code[at].imm = (int64_t)kernel_->code.size();
        call_stack_.pop_back();
    }

    uint16_t mnemonic(const std::string& text) {
        auto [it, is_new] = mnemonics_.try_emplace(text, (uint16_t)kernel_->mnemonics.size());
        if (is_new) kernel_->mnemonics.push_back(text);
        return it->second;
    }

    static std::string full_name(const Statement& s) {
        std::string name = s.op;
        for (const std::string& m : s.modifiers) name += "." + m;
        return name;
    }
    static bool has(const Statement& s, const char* modifier) {
        return std::find(s.modifiers.begin(), s.modifiers.end(), modifier) != s.modifiers.end();
    }

    void instruction(const Statement& s, Frame& frame, bool is_entry) {
        std::string name = full_name(s);
        Instruction in;
        in.source = s.source;
        in.ptx_line = s.ptx_line;
        in.mnemonic = mnemonic(name);
        if (!s.guard.empty()) {
            in.guard = guard(s.guard);
            in.guard_negated = s.guard_negated;
        }
        std::fill_n(in.o, 16, kIgnored);
        auto emit = [&] { kernel_->code.push_back(in); };
        if (s.op == "bra") {
            in.flow = Flow::branch;
            frame.branches.emplace_back(kernel_->code.size(), frame.in_block(s.operands.at(0).text));
            return emit();
        }
        if (s.op == "brx") {
            in.flow = Flow::table;
            in.o[0] = place(s.operands.at(0), 4);
            kernel_->tables.push_back(std::make_unique<std::vector<int32_t>>());
            in.targets = kernel_->tables.back().get();
            auto it = frame.targets.find(s.operands.at(1).text);
            if (it == frame.targets.end()) fail("unknown list of targets " + s.operands[1].text);
            for (const std::string& label : it->second)
                frame.table_entries.emplace_back(kernel_->tables.back().get(), label);
            return emit();
        }
        if (s.op == "ret" && !is_entry) {
            in.flow = Flow::branch;
            frame.returns.push_back(kernel_->code.size());
            return emit();
        }
        if (s.op == "ret" || s.op == "exit") {
            in.flow = Flow::exit;
            return emit();
        }
        if (s.op == "trap" || s.op == "brkpt") {
            in.flow = Flow::trap;
            return emit();
        }
        if (s.op == "call") return call(s, in);
        if (s.op == "pragma" || s.op == "nanosleep" || s.op == "prefetch" || s.op == "prefetchu" ||
            s.op == "discard" || s.op == "applypriority" || s.op == "griddepcontrol") {
            in.run = [](Warp&, const Instruction&, Mask) {};
            return emit();
        }
        if (s.op == "mov" && special_move(s, in)) return emit();
        if (s.op == "mov" && vector_move(s, in)) return emit();
        if (s.op == "cvta") {
            bool to = has(s, "to");
            in.run = !has(s, "shared") ? find_alu("mov.b64")->run : to ? &run_to_shared : &run_from_shared;
            in.o[0] = place(s.operands.at(0), 8);
            in.o[1] = place(s.operands.at(1), 8);
            return emit();
        }
        if (s.op == "isspacep") {
            in.run = &run_is_space;
            in.memory.space = has(s, "global")   ? Space::global
                              : has(s, "shared") ? Space::shared
                              : has(s, "local")  ? Space::local
                              : has(s, "param")  ? Space::param
                                                 : Space::constant;
            in.o[0] = place(s.operands.at(0), 1);
            in.o[1] = place(s.operands.at(1), 8);
            return emit();
        }
        if (s.op == "cvt") {
            bool pair = s.operands.size() == 3;
            in.o[0] = place(s.operands.at(0), 0);
            std::string from = s.modifiers.back();
            for (size_t i = 1; i < s.operands.size(); i++)
                in.o[i] = place(s.operands[i], s.operands[i].kind == Operand::name ? 0 : type_bytes(from));
            in.run = find_conversion(s.modifiers, &in, width(s.operands.at(1), type_bytes(from)),
                                     width(s.operands[0], 4));
            if (!in.run || (pair && in.memory.bytes != 4)) fail("unknown instruction " + name);
            return emit();
        }
        if (const AluEntry* entry = alu(s, name)) {
            arithmetic(s, *entry, in);
            return emit();
        }
        // Instructions that touch memory or other lanes take their registers in order, with vectors
        // flattened. Their addresses have places of their own.
        places(s, in);
        auto file = module_.text.files.find(in.source.file);
        in.memory.of_toolkit = file != module_.text.files.end() && is_toolkit_file(file->second);
        if (find_memory(s, &in) || find_warp(s, &in)) return emit();
        fail("unknown instruction " + name);
    }

    const AluEntry* alu(const Statement& s, const std::string& name) {
        const AluEntry* entry = find_alu(name);
        if (entry) return entry;
        // Shifts and logic of signed and unsigned types (shl.s32) are those of bits (shl.b32).
        if (s.op == "shl" || s.op == "not" || s.op == "and" || s.op == "or" || s.op == "xor") {
            std::string type = s.modifiers.empty() ? "" : s.modifiers.back();
            if (type.size() > 1 && (type[0] == 'u' || type[0] == 's'))
                return find_alu(s.op + ".b" + type.substr(1));
        }
        return nullptr;
    }

    void arithmetic(const Statement& s, const AluEntry& entry, Instruction& in) {
        in.run = entry.run;
        int n = 0;
        bool pair_of_predicates = s.op == "setp";
        for (size_t i = 0; i < s.operands.size(); i++) {
            const Operand& o = s.operands[i];
            // The second predicate of setp is optional.
            if (pair_of_predicates && i == 1 && !o.lane_predicate) n++;
            if (n >= 6 || !entry.widths[n]) fail("too many operands");
            if (o.negated) in.aux |= s.op == "setp" || s.op == "selp" ? 8 : 1 << n;
            in.o[n] = place(o, entry.widths[n]);
            n++;
        }
        if (s.op == "setp" && s.operands.back().kind == Operand::name && n == 5)
            in.aux |= has(s, "and") ? 1 : has(s, "or") ? 2 : 3;
    }

    bool special_move(const Statement& s, Instruction& in) {
        const Operand& o = s.operands.at(1);
        if (o.kind != Operand::name) return false;
        auto it = kSpecials.find(o.text);
        if (it == kSpecials.end() || !is_clock(it->second)) return false;
        in.run = &run_clock;
        in.aux = (int)it->second;
        in.o[0] = place(s.operands[0], 0);
        in.memory.register_bytes = (uint8_t)width(s.operands[0], 4);
        return true;
    }

    // mov.b64 {%r1,%r2}, %rd1 and mov.b64 %rd1, {%r1,%r2}.
    bool vector_move(const Statement& s, Instruction& in) {
        const Operand &d = s.operands.at(0), &a = s.operands.at(1);
        if (d.kind != Operand::vector && a.kind != Operand::vector) return false;
        const std::vector<Operand>& parts = d.kind == Operand::vector ? d.parts : a.parts;
        int whole = type_bytes(s.modifiers.back()), bytes = whole / (int)parts.size();
        in.memory.elements = (uint8_t)parts.size();
        in.memory.bytes = (uint8_t)bytes;
        in.memory.register_bytes = (uint8_t)whole;
        for (size_t i = 0; i < parts.size(); i++) in.o[1 + i] = place(parts[i], bytes);
        in.o[0] = place(d.kind == Operand::vector ? a : d, whole);
        in.run = d.kind == Operand::vector ? &run_unpack : &run_pack;
        return true;
    }

    void places(const Statement& s, Instruction& in) {
        int n = 0, addresses = 0;
        std::string type;
        for (const std::string& m : s.modifiers)
            if (type_bytes(m)) type = m;
        auto put = [&](const Operand& o) {
            if (n >= kAddress) fail("too many operands");
            if (o.negated) in.aux |= 1 << 8;
            bool is_value =
                o.kind == Operand::integer || o.kind == Operand::float32 || o.kind == Operand::float64;
            int bytes = 0;
            if (is_value) {  // as wide as the type in memory for st, atom and red; 4 bytes elsewhere
                bool typed = s.op == "st" || s.op == "atom" || s.op == "red";
                bytes = typed && !type.empty() ? std::max(2, type_bytes(type)) : 4;
            }
            if (o.kind == Operand::name && kSpecials.count(o.text)) bytes = 4;
            in.o[n++] = place(o, bytes);
        };
        int data_width = 0;
        for (const Operand& o : s.operands) {
            if (o.kind == Operand::address) {
                if (addresses == 2) fail("too many addresses");
                int bytes = 8;
                int32_t p;
                const Binding* b = o.text.empty() ? nullptr : find(o.text);
                if (o.text.empty()) {
                    p = constant(0, 8);
                } else if (b && b->kind == Binding::reg) {
                    p = b->place, bytes = b->bytes;
                } else {
                    bool found;
                    p = address_constant(o.text, 0, 8, &found);
                    if (!found) fail("unknown name " + o.text);
                    if (b && b->kind == Binding::variable && in.memory.space == Space::generic)
                        in.memory.space = b->space;
                }
                in.o[kAddress + addresses] = p;
                (addresses ? in.memory.second_address_bytes : in.memory.address_bytes) = (uint8_t)bytes;
                if (addresses) {
                    in.aux = (int32_t)o.value;
                } else {
                    in.imm = o.value;
                }
                addresses++;
            } else if (o.kind == Operand::vector) {
                for (const Operand& part : o.parts) {
                    put(part);
                    data_width = std::max(data_width, width(part, 0));
                }
            } else {
                put(o);
                if (!data_width) data_width = width(o, 0);
            }
        }
        if (data_width)
            in.memory.register_bytes = (uint8_t)data_width;
        else if (!type.empty())
            in.memory.register_bytes = (uint8_t)std::max(2, type_bytes(type));
    }

    void call(const Statement& s, Instruction in) {
        size_t i = 0;
        std::vector<Operand> results, arguments;
        if (s.operands.at(0).kind == Operand::vector) results = s.operands[i++].parts;
        if (i >= s.operands.size() || s.operands[i].kind != Operand::name)
            fail("a call does not name a function");
        std::string name = s.operands[i++].text;
        if (i < s.operands.size() && s.operands[i].kind == Operand::vector) arguments = s.operands[i].parts;
        auto local = [&](const Operand& o) {
            const Binding* b = o.kind == Operand::name ? find(o.text) : nullptr;
            if (!b || b->kind != Binding::variable) fail("an argument is not a .param variable");
            return *b;
        };
        if (name == "vprintf" || name == "__assertfail") {
            in.run = name == "vprintf" ? &run_printf : &run_assert;
            for (size_t k = 0; k < arguments.size(); k++)
                in.o[k] = (int32_t)(local(arguments[k]).address - kLocalWindow);
            if (!results.empty()) in.o[5] = (int32_t)(local(results[0]).address - kLocalWindow);
            kernel_->code.push_back(in);
            return;
        }
        auto it = module_.text.functions.find(name);
        if (it == module_.text.functions.end())
            fail("a call of unknown function " + name + " (calls through pointers are not supported)");
        const FunctionText& f = it->second;
        if (f.is_declaration) fail("a call of " + name + ", which is declared but not defined");
        if (f.parameters.size() != arguments.size() || f.results.size() != results.size())
            fail("a call passes other parameters to " + name + " than it has");
        if (in.guard >= 0) {  // a guarded call becomes a branch around the inlined function
            Instruction around = in;
            around.flow = Flow::branch;
            around.guard_negated = !in.guard_negated;
            kernel_->code.push_back(around);
        }
        size_t start = kernel_->code.size();
        std::map<std::string, Binding> scope;  // the function sees its own names and those of the module
        for (size_t k = 0; k < arguments.size(); k++) scope[f.parameters[k].name] = local(arguments[k]);
        for (size_t k = 0; k < results.size(); k++) scope[f.results[k].name] = local(results[k]);
        scopes_.push_back(scope);
        int line = line_;
        function(f, false);
        line_ = line;
        scopes_.pop_back();
        if (in.guard >= 0) kernel_->code[start - 1].imm = (int64_t)kernel_->code.size();
    }
};

}  // namespace

std::unique_ptr<Kernel> decode(const Module& module, const FunctionText& entry) {
    return Decoder(module, entry).run();
}

bool is_toolkit_file(const std::string& name) {
    for (const char* part : {"/targets/", "/cuda/", "/nvidia/", "/include/"})
        if (name.find(part) != name.npos) return true;
    return false;
}

std::pair<std::string, int> source_of(const Kernel& kernel, const Instruction& in) {
    auto file = [&](int index) {
        auto it = kernel.module->text.files.find(index);
        return it == kernel.module->text.files.end() ? std::string() : it->second;
    };
    std::string inner = file(in.source.file), outer = file(in.source.caller_file);
    if (is_toolkit_file(inner) && !outer.empty()) return {outer, in.source.caller_line};
    return {inner, in.source.line};
}

}  // namespace ptxsim
