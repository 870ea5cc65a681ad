// The functions that nvcc's host code calls at start-up to register the program's PTX, kernels and variables.
// PTX is parsed when one of its kernels or variables is first used.
#include <cxxabi.h>
#include <fatbinary_section.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"
#include "dev/ptxsim/runtime.h"

namespace ptxsim {
namespace {

constexpr char kFlags[] =
    "compile with nvcc -gencode arch=compute_80,code=compute_80 -Xfatbin -compress=false";

struct FatBinary {
    const __fatBinC_Wrapper_t* wrapper;
    Module* module = nullptr;
    std::string error;                                    // why the module could not be loaded
    std::vector<std::pair<void**, std::string>> managed;  // the host's pointers to managed variables
};

struct Symbol {
    FatBinary* binary;
    std::string name;
};

struct Function {
    Symbol symbol;
    KernelEntry entry;
};

struct State {
    // The key is the address of the host's stub or variable. `handles` points into these maps, whose nodes do
    // not move.
    std::map<const void*, Function> functions;
    std::map<const void*, Function*> handles;  // the key is the cudaKernel_t: the address of the KernelEntry
    std::map<const void*, Symbol> variables;
};

State& state() {
    static State& s = *new State;
    return s;
}

// The two headers in a fatbinary: one of the whole file, and one of each entry.
struct FileHeader {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;  // the size of all entries
};
struct EntryHeader {
    uint16_t kind, version;
    uint32_t header_bytes;
    uint64_t bytes;  // the size of the payload
    uint32_t compressed_bytes, unknown;
    uint16_t minor, major;
    uint32_t architecture;
    uint32_t name_offset, name_bytes;
    uint64_t flags;
};
static_assert(sizeof(FileHeader) == 16 && sizeof(EntryHeader) == 48);
constexpr uint32_t kFileMagic = 0xBA55ED50;
constexpr uint16_t kKindPtx = 1;
constexpr uint32_t kBestArchitecture = 90;  // the architecture of the simulated device

struct Ptx {
    std::string text, name;
    uint32_t architecture = 0;
};

Ptx find_ptx(const void* data) {
    FileHeader file;
    std::memcpy(&file, data, sizeof file);
    if (file.magic != kFileMagic) throw std::runtime_error("this is not a fatbinary of nvcc");
    const char* at = (const char*)data + file.header_bytes;
    const char* end = at + file.bytes;
    Ptx best;
    bool compressed = false;
    while (at + sizeof(EntryHeader) <= end) {
        EntryHeader entry;
        std::memcpy(&entry, at, sizeof entry);
        const char* payload = at + entry.header_bytes;
        if (entry.kind == kKindPtx && entry.architecture <= kBestArchitecture) {
            if (entry.compressed_bytes) {
                compressed = true;
            } else if (entry.architecture >= best.architecture) {
                best.text.assign(payload, strnlen(payload, entry.bytes));
                if (entry.name_offset) best.name.assign(at + entry.name_offset, entry.name_bytes);
                best.architecture = entry.architecture;
            }
        }
        at = payload + entry.bytes;
    }
    if (best.text.empty())
        throw std::runtime_error(std::string(compressed ? "its PTX is compressed; " : "it holds no PTX; ") +
                                 kFlags);
    return best;
}

// Loads the module. If that is impossible, reports the reason once.
void load(FatBinary* b) {
    if (b->module || !b->error.empty()) return;
    std::string name = "a CUDA object";
    try {
        Ptx ptx = find_ptx(b->wrapper->data);
        if (!ptx.name.empty()) name = ptx.name.c_str();
        b->module = load_module(ptx.text, name);
    } catch (const std::runtime_error& e) {
        b->error = e.what();
        Report r;
        r.fault = Fault::launch;
        r.text = "cannot load " + name + ": " + b->error;
        report(std::move(r));
        return;
    }
    for (const auto& [pointer, variable] : b->managed)
        if (const VariableInfo* v = find_variable(b->module, variable)) *pointer = (void*)v->address;
}

// "void gelu<float>(float*)" becomes "gelu<float>".
std::string title_of(const std::string& mangled) {
    int status = 0;
    char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
    if (status != 0 || !text) return mangled;
    std::string name = text;
    std::free(text);
    // The parameters are in the last parentheses outside of <>. The result type of a template stands before
    // the name.
    int depth = 0;
    size_t end = name.rfind(')');
    if (end == std::string::npos) return name;
    for (size_t i = end + 1; i-- > 0;) {
        if (name[i] == ')') depth++;
        if (name[i] == '(' && --depth == 0) {
            name.resize(i);
            break;
        }
    }
    return name.rfind("void ", 0) == 0 ? name.substr(5) : name;
}

cudaError_t load_function(Function* f) {
    if (f->entry.kernel) return cudaSuccess;
    load(f->symbol.binary);
    if (!f->symbol.binary->module) return cudaErrorInvalidKernelImage;
    f->entry.kernel = find_kernel(f->symbol.binary->module, f->symbol.name);
    f->entry.title = title_of(f->symbol.name);
    return f->entry.kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

}  // namespace

cudaError_t find_kernel_entry(const void* function, KernelEntry** out) {
    auto it = state().functions.find(function);
    Function* f = it == state().functions.end() ? nullptr : &it->second;
    if (auto handle = state().handles.find(function); handle != state().handles.end()) f = handle->second;
    if (!f) return cudaErrorInvalidDeviceFunction;
    if (cudaError_t e = load_function(f)) return e;
    *out = &f->entry;
    return cudaSuccess;
}

cudaError_t find_symbol(const void* symbol, VariableInfo* out) {
    auto it = state().variables.find(symbol);
    if (it != state().variables.end()) {
        load(it->second.binary);
        if (!it->second.binary->module) return cudaErrorInvalidKernelImage;
        const VariableInfo* v = find_variable(it->second.binary->module, it->second.name);
        if (!v) return cudaErrorInvalidSymbol;
        *out = *v;
        return cudaSuccess;
    }
    const Allocation* a = memory::find((uint64_t)symbol);
    if (!a || !a->is_variable || a->kind != MemoryKind::managed) return cudaErrorInvalidSymbol;
    *out = {a->address, a->bytes};
    return cudaSuccess;
}

void reset_kernel_attributes() {
    for (auto& [stub, f] : state().functions) {
        f.entry.max_dynamic_shared = 0;
        f.entry.carveout = -1;
    }
}

}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

void** __cudaRegisterFatBinary(void* data) {
    options();  // ends the process if PTXSIM is "help" or has a wrong option
    auto* binary = new FatBinary;
    binary->wrapper = (const __fatBinC_Wrapper_t*)data;
    return (void**)binary;
}

void __cudaRegisterFatBinaryEnd(void**) {}

// Called at exit. Nothing is unloaded, because static objects of the program may still free memory after it.
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void** handle, const char* host_function, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
    // Several object files may contain the same instance of a template; the first one is used.
    auto [it, added] = state().functions.try_emplace(host_function);
    if (!added) return;
    it->second.symbol = {(FatBinary*)handle, name};
    state().handles[&it->second.entry] = &it->second;
}

void __cudaRegisterVar(void** handle, char* host_variable, char*, const char* name, int, size_t, int, int) {
    state().variables.try_emplace(host_variable, Symbol{(FatBinary*)handle, name});
}

void __cudaRegisterManagedVar(void** handle, void** host_pointer, char*, const char* name, int, size_t, int,
                              int) {
    ((FatBinary*)handle)->managed.push_back({host_pointer, name});
    state().variables.try_emplace(host_pointer, Symbol{(FatBinary*)handle, name});
}

// Called before the host first touches a managed variable.
char __cudaInitModule(void** handle) {
    load((FatBinary*)handle);
    return 1;
}

cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* host_function) {
    auto it = state().functions.find(host_function);
    if (it == state().functions.end()) return cudaErrorInvalidDeviceFunction;
    *out = (cudaKernel_t)&it->second.entry;
    return cudaSuccess;
}

cudaError_t cudaGetKernel(cudaKernel_t* out, const void* host_function) {
    return api([&] { return out ? __cudaGetKernel(out, host_function) : cudaErrorInvalidValue; });
}

}  // extern "C"
