// The device's memory, and what is known of each byte of it.
//
// A device address is a host address in a range that is mapped twice: host code gets the first mapping, where
// any access is a fault (so that host code that touches device memory is found), the simulator works through
// the second, view(). Managed and pinned memory is mapped once, and its view is itself.
//
// Fresh device memory is filled with 0xFF, a NaN in every float format, and is not `written`.
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
    bool is_variable;  // of a module: no leak, and not to be freed
};

namespace memory {

// Zero bytes give a unique address, too. Returns 0 where the device has not that much left.
uint64_t allocate(size_t bytes, MemoryKind kind, const std::string& what, bool is_variable = false);
// Freed ranges are never used again, so that later accesses are found. False where no allocation begins at
// address.
bool free(uint64_t address);
// The live allocation that holds address, or null.
const Allocation* find(uint64_t address);
// The live or freed allocation nearest to address, in words for a report: "8 bytes after cudaMalloc of 64
// bytes (allocation 3)", "inside cudaMalloc of 64 bytes (allocation 3), which was freed".
std::string describe(uint64_t address);
bool was_freed(uint64_t address);

// Where the simulator may read and write what is at a device, managed or pinned address, or at any other
// address of the host, which is returned as it is.
std::byte* view(uint64_t address);
inline std::byte* view(const void* address) {
    return view((uint64_t)address);
}
// Whether [address, address+bytes) lies within one live allocation.
bool contains(uint64_t address, size_t bytes);

// One byte of knowledge a byte of device memory: 1 where it was written. Null for memory of other kinds,
// which counts as written.
uint8_t* written(uint64_t address);
void mark_written(uint64_t address, size_t bytes);
// Bytes and what is known of them; either may be any host memory, which counts as written. They may overlap.
void copy(uint64_t to, uint64_t from, size_t bytes);
void fill(uint64_t to, uint8_t value, size_t bytes);

struct Usage {
    size_t used, total, peak;
};
Usage usage();

// A Fault::leak for each allocation that is there but variables; called at exit.
void report_leaks();

}  // namespace memory
}  // namespace ptxsim
