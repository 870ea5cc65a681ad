// The rest of memory.h that only the runtime needs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace ptxsim::memory {

// Memory of the host that cudaHostRegister pins: find() knows it, nobody frees it. False where it overlaps
// with memory that is pinned or of the device.
bool register_host(uint64_t address, size_t bytes);
bool unregister_host(uint64_t address);

// Whether address lies where device memory is handed out, allocated or not.
bool is_device_address(uint64_t address);

// Frees all but variables; for cudaDeviceReset.
void free_all();

}  // namespace ptxsim::memory
