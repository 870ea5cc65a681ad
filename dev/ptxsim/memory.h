// The device's memory, and whether each byte of it has been written.
//
// A device address is a host address in a range that is mapped twice. The program sees the first mapping,
// where every access by the host is a fault; so host code that touches device memory is found. The simulator
// works in the second mapping, view(). Managed and pinned memory is mapped once, and view() of its address is
// that address.
//
// Fresh device memory is filled with 0xFF, which is a NaN in every float format, and counts as unwritten.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

namespace ptxsim {

enum class MemoryKind : uint8_t { device, managed, pinned };

struct Allocation {
    uint64_t address;
    size_t bytes;
    MemoryKind kind;
    std::string what;  // "cudaMalloc of 4096 bytes", "__device__ counter"
    uint64_t number;   // counts from 1
    bool is_variable;  // a module's variable: it is not a leak, and the program may not free it
};

namespace memory {

// An allocation of zero bytes also has an address of its own. Returns 0 if the device has too little memory
// left.
uint64_t allocate(size_t bytes, MemoryKind kind, const std::string& what, bool is_variable = false);
// Freed ranges are never used again, so that later accesses to them are found. False if no live allocation
// begins at address.
bool free(uint64_t address);
// The live allocation that holds address, or null.
const Allocation* find(uint64_t address);
// The live or freed allocation nearest to address, in words for a report: "8 bytes after cudaMalloc of 64
// bytes (allocation 3)", "inside cudaMalloc of 64 bytes (allocation 3), which was freed".
std::string describe(uint64_t address);
bool was_freed(uint64_t address);

// The address at which the simulator may read and write the memory at a device, managed or pinned address.
// Any other address of the host is returned as it is.
std::byte* view(uint64_t address);
inline std::byte* view(const void* address) {
    return view((uint64_t)address);
}
// Whether [address, address+bytes) lies within one live allocation.
bool contains(uint64_t address, size_t bytes);

// The shadow of device memory, one byte per byte: 1 if it was written, else 0. Null for memory of other
// kinds, which counts as written.
uint8_t* written(uint64_t address);
void mark_written(uint64_t address, size_t bytes);
// Copies bytes, and whether they were written. Both ranges may be any host memory, which counts as written,
// and they may overlap.
void copy(uint64_t to, uint64_t from, size_t bytes);
void fill(uint64_t to, uint8_t value, size_t bytes);

struct Usage {
    size_t used, total, peak;
};
Usage usage();

// Reports a Fault::leak for each live allocation except variables; called at exit.
void report_leaks();

}  // namespace memory
}  // namespace ptxsim
