// The functions of device memory that only the runtime needs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace ptxsim::memory {

// Records memory of the host that cudaHostRegister pins: find() finds it, and free() does not free it. False
// if it overlaps with pinned memory or device memory.
bool register_host(uint64_t address, size_t bytes);
bool unregister_host(uint64_t address);

// Whether address lies in the range of device memory, allocated or not.
bool is_device_address(uint64_t address);

// Frees everything except variables, for cudaDeviceReset.
void free_all();

}  // namespace ptxsim::memory
