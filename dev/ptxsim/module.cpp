// Modules. A module's text is parsed when it is loaded; the body of a kernel is parsed and decoded when the
// kernel is first asked for.
#include <algorithm>
#include <stdexcept>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/program.h"

namespace ptxsim {

namespace {

std::vector<std::unique_ptr<Module>>& modules() {
    static auto& all =
        *new std::vector<std::unique_ptr<Module>>;  // never destroyed: the figures at exit need them
    return all;
}

void initialize(const Module& m, const VariableDeclaration& v, const VariableInfo& at) {
    std::byte* to = memory::view(at.address);
    size_t width = (size_t)type_bytes(v.type);
    // Elements without an initialiser are zero, as in C.
    std::fill_n(to, at.bytes, std::byte(0));
    memory::mark_written(at.address, at.bytes);
    for (size_t i = 0; i < v.values.size(); i++) {
        const VariableDeclaration::Value& value = v.values[i];
        uint64_t bits = value.bits;
        if (!value.symbol.empty()) {
            auto it = m.variables.find(value.symbol);
            if (m.text.functions.count(value.symbol)) continue;  // decode() refuses calls through pointers
            if (it == m.variables.end())
                throw std::runtime_error(m.text.name + ": " + v.name + " is initialised with unknown " +
                                         value.symbol);
            bits += it->second.address;
            if (value.mask_shift >= 0) bits >>= value.mask_shift;
        }
        if ((i + 1) * width > at.bytes)
            throw std::runtime_error(m.text.name + ": too many values for " + v.name);
        memcpy(to + i * width, &bits, width);
    }
}

}  // namespace

Module* load_module(const std::string& ptx, const std::string& name) {
    auto m = std::make_unique<Module>();
    m->ptx = ptx;
    m->text = parse(m->ptx, name);
    auto is_memory = [](const VariableDeclaration& v) {
        return v.space == Space::global || v.space == Space::constant;
    };
    for (const VariableDeclaration& v : m->text.variables) {
        if (!is_memory(v)) continue;
        if (v.is_extern)
            throw std::runtime_error(name + ": extern variable " + v.name +
                                     ": separate compilation (-rdc=true) is not supported");
        size_t bytes = (size_t)type_bytes(v.type) * (size_t)v.count;
        const char* kind = v.space == Space::constant ? "__constant__ " : "__device__ ";
        uint64_t address =
            memory::allocate(std::max<size_t>(bytes, 1),
                             v.is_managed ? MemoryKind::managed : MemoryKind::device, kind + v.name, true);
        if (!address) throw std::runtime_error(name + ": no memory for variable " + v.name);
        m->variables[v.name] = {address, bytes};
    }
    for (const VariableDeclaration& v : m->text.variables)
        if (is_memory(v)) initialize(*m, v, m->variables[v.name]);
    modules().push_back(std::move(m));
    return modules().back().get();
}

const Kernel* find_kernel(const Module* module, const std::string& mangled) {
    Module* m = const_cast<Module*>(module);
    auto it = m->text.functions.find(mangled);
    if (it == m->text.functions.end() || !it->second.is_entry) return nullptr;
    std::unique_ptr<Kernel>& slot = m->kernels[mangled];
    if (!slot) {
        parse_body(m->text, &it->second);
        slot = decode(*m, it->second);
    }
    return slot.get();
}

const VariableInfo* find_variable(const Module* module, const std::string& mangled) {
    auto it = module->variables.find(mangled);
    return it == module->variables.end() ? nullptr : &it->second;
}

const KernelInfo& info(const Kernel* kernel) {
    return kernel->info;
}

std::vector<const Kernel*> launched_kernels() {
    std::vector<const Kernel*> all;
    for (auto& m : modules())
        for (auto& [name, k] : m->kernels)
            if (k && k->figures.launches) all.push_back(k.get());
    return all;
}

}  // namespace ptxsim
