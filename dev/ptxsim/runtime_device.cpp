// The one device, an H100 (SXM, 80 GB).
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/memory_host.h"
#include "dev/ptxsim/operand.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/runtime.h"

namespace ptxsim {
namespace {

constexpr char kPciBusId[] = "0000:01:00.0";

cudaDeviceProp properties() {
    cudaDeviceProp p = {};
    std::strcpy(p.name, "NVIDIA H100 80GB HBM3 (ptxsim)");
    std::memcpy(p.uuid.bytes, "ptxsim-device-0", 16);
    p.totalGlobalMem = options().memory;
    p.sharedMemPerBlock = kSharedDefault;
    p.sharedMemPerBlockOptin = kSharedOptIn;
    p.sharedMemPerMultiprocessor = kSharedPerMultiprocessor;
    p.reservedSharedMemPerBlock = kSharedReserved;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = 32;
    p.memPitch = 2147483647;
    p.maxThreadsPerBlock = kMaxThreadsPerBlock;
    p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
    p.maxThreadsDim[2] = 64;
    p.maxGridSize[0] = 2147483647;
    p.maxGridSize[1] = p.maxGridSize[2] = 65535;
    p.totalConstMem = 65536;
    p.major = 9;
    p.minor = 0;
    p.textureAlignment = p.surfaceAlignment = 512;
    p.texturePitchAlignment = 32;
    p.multiProcessorCount = kMultiprocessors;
    p.maxThreadsPerMultiProcessor = 2048;
    p.maxBlocksPerMultiProcessor = 32;
    p.canMapHostMemory = 1;
    p.concurrentKernels = 1;
    p.ECCEnabled = 1;
    p.pciBusID = 1;
    p.asyncEngineCount = 3;
    p.unifiedAddressing = 1;
    p.memoryBusWidth = 5120;
    p.l2CacheSize = 50 << 20;
    p.persistingL2CacheMaxSize = 32 << 20;
    p.accessPolicyMaxWindowSize = 134213632;
    p.streamPrioritiesSupported = 1;
    p.globalL1CacheSupported = p.localL1CacheSupported = 1;
    p.managedMemory = 1;
    p.concurrentManagedAccess = 1;
    p.computePreemptionSupported = 1;
    p.canUseHostPointerForRegisteredMem = 1;
    p.cooperativeLaunch = 1;
    p.hostRegisterSupported = 1;
    p.memoryPoolsSupported = 1;
    p.hostNumaId = -1;
    return p;
}

// Sets *value. Attributes that are also properties have the property's value. False if the attribute is not
// known.
bool attribute(cudaDeviceAttr which, int* value) {
    cudaDeviceProp p = properties();
    const struct {
        cudaDeviceAttr which;
        size_t value;
    } table[] = {
        {cudaDevAttrMaxThreadsPerBlock, (size_t)p.maxThreadsPerBlock},
        {cudaDevAttrMaxBlockDimX, (size_t)p.maxThreadsDim[0]},
        {cudaDevAttrMaxBlockDimY, (size_t)p.maxThreadsDim[1]},
        {cudaDevAttrMaxBlockDimZ, (size_t)p.maxThreadsDim[2]},
        {cudaDevAttrMaxGridDimX, (size_t)p.maxGridSize[0]},
        {cudaDevAttrMaxGridDimY, (size_t)p.maxGridSize[1]},
        {cudaDevAttrMaxGridDimZ, (size_t)p.maxGridSize[2]},
        {cudaDevAttrMaxSharedMemoryPerBlock, p.sharedMemPerBlock},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, p.sharedMemPerBlockOptin},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, p.sharedMemPerMultiprocessor},
        {cudaDevAttrReservedSharedMemoryPerBlock, p.reservedSharedMemPerBlock},
        {cudaDevAttrTotalConstantMemory, p.totalConstMem},
        {cudaDevAttrWarpSize, (size_t)p.warpSize},
        {cudaDevAttrMaxPitch, p.memPitch},
        {cudaDevAttrMaxRegistersPerBlock, (size_t)p.regsPerBlock},
        {cudaDevAttrMaxRegistersPerMultiprocessor, (size_t)p.regsPerMultiprocessor},
        {cudaDevAttrClockRate, 1980000},
        {cudaDevAttrMemoryClockRate, 2619000},
        {cudaDevAttrGlobalMemoryBusWidth, (size_t)p.memoryBusWidth},
        {cudaDevAttrTextureAlignment, p.textureAlignment},
        {cudaDevAttrTexturePitchAlignment, p.texturePitchAlignment},
        {cudaDevAttrSurfaceAlignment, p.surfaceAlignment},
        {cudaDevAttrGpuOverlap, 1},
        {cudaDevAttrMultiProcessorCount, (size_t)p.multiProcessorCount},
        {cudaDevAttrKernelExecTimeout, 0},
        {cudaDevAttrIntegrated, 0},
        {cudaDevAttrCanMapHostMemory, 1},
        {cudaDevAttrComputeMode, cudaComputeModeDefault},
        {cudaDevAttrConcurrentKernels, 1},
        {cudaDevAttrEccEnabled, 1},
        {cudaDevAttrPciBusId, (size_t)p.pciBusID},
        {cudaDevAttrPciDeviceId, 0},
        {cudaDevAttrPciDomainId, 0},
        {cudaDevAttrTccDriver, 0},
        {cudaDevAttrL2CacheSize, (size_t)p.l2CacheSize},
        {cudaDevAttrMaxPersistingL2CacheSize, (size_t)p.persistingL2CacheMaxSize},
        {cudaDevAttrMaxAccessPolicyWindowSize, (size_t)p.accessPolicyMaxWindowSize},
        {cudaDevAttrMaxThreadsPerMultiProcessor, (size_t)p.maxThreadsPerMultiProcessor},
        {cudaDevAttrMaxBlocksPerMultiprocessor, (size_t)p.maxBlocksPerMultiProcessor},
        {cudaDevAttrAsyncEngineCount, (size_t)p.asyncEngineCount},
        {cudaDevAttrUnifiedAddressing, 1},
        {cudaDevAttrComputeCapabilityMajor, (size_t)p.major},
        {cudaDevAttrComputeCapabilityMinor, (size_t)p.minor},
        {cudaDevAttrStreamPrioritiesSupported, 1},
        {cudaDevAttrGlobalL1CacheSupported, 1},
        {cudaDevAttrLocalL1CacheSupported, 1},
        {cudaDevAttrManagedMemory, 1},
        {cudaDevAttrIsMultiGpuBoard, 0},
        {cudaDevAttrHostNativeAtomicSupported, 0},
        {cudaDevAttrSingleToDoublePrecisionPerfRatio, 2},
        {cudaDevAttrPageableMemoryAccess, 0},
        {cudaDevAttrConcurrentManagedAccess, 1},
        {cudaDevAttrComputePreemptionSupported, 1},
        {cudaDevAttrCanUseHostPointerForRegisteredMem, 1},
        {cudaDevAttrCooperativeLaunch, 1},
        {cudaDevAttrHostRegisterSupported, 1},
        {cudaDevAttrPageableMemoryAccessUsesHostPageTables, 0},
        {cudaDevAttrDirectManagedMemAccessFromHost, 0},
        {cudaDevAttrMemoryPoolsSupported, 1},
        {cudaDevAttrGPUDirectRDMASupported, 0},
        {cudaDevAttrClusterLaunch, 0},  // ptxsim has no clusters
        {cudaDevAttrIpcEventSupport, 0},
        {cudaDevAttrMpsEnabled, 0},
    };
    for (const auto& row : table)
        if (row.which == which) {
            *value = (int)row.value;
            return true;
        }
    return false;
}

size_t limits[] = {1024, 1 << 20, 8 << 20, 2, 2048, 128, 0};  // by cudaLimit; the defaults of the hardware
static_assert(cudaLimitStackSize == 0 && cudaLimitPersistingL2CacheSize == 6);

cudaError_t check_device(int device) {
    return device >= 0 && (uint64_t)device < options().devices ? cudaSuccess : cudaErrorInvalidDevice;
}

int device_number = 0;

// A process has the memory of one device only, so it cannot go on with another one.
cudaError_t set_device(int device) {
    if (cudaError_t e = check_device(device)) return e;
    if (device != device_number && memory::usage().peak) {
        print_refusal("cudaSetDevice", "a process that has used one device cannot use another one here");
        return cudaErrorInvalidDevice;
    }
    device_number = device;
    return cudaSuccess;
}

}  // namespace

int current_device() {
    return device_number;
}

}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
    return api([&] {
        if (!count) return cudaErrorInvalidValue;
        *count = (int)options().devices;
        return cudaSuccess;
    });
}

cudaError_t cudaSetDevice(int device) {
    return api([&] { return set_device(device); });
}

cudaError_t cudaGetDevice(int* device) {
    return api([&] {
        if (!device) return cudaErrorInvalidValue;
        *device = device_number;
        return cudaSuccess;
    });
}

cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
    return api([&] { return check_device(device); });
}

cudaError_t cudaSetDeviceFlags(unsigned) {
    return api([] { return cudaSuccess; });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
    return api([&] {
        if (!out) return cudaErrorInvalidValue;
        *out = properties();
        // Devices have different ids. If every process has one of its own, that is another one, too.
        std::snprintf(out->uuid.bytes, sizeof out->uuid.bytes, "ptxsim-%x",
                      options().devices > 1 ? (unsigned)device : (unsigned)getpid());
        return check_device(device);
    });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
    return api([&] {
        if (cudaError_t e = check_device(device)) return e;
        if (!value) return cudaErrorInvalidValue;
        return attribute(which, value) ? cudaSuccess : cudaErrorNotSupported;
    });
}

cudaError_t cudaDeviceGetPCIBusId(char* out, int length, int device) {
    return api([&] {
        if (cudaError_t e = check_device(device)) return e;
        if (!out || length < (int)sizeof kPciBusId) return cudaErrorInvalidValue;
        std::strcpy(out, kPciBusId);
        return cudaSuccess;
    });
}

cudaError_t cudaDeviceGetByPCIBusId(int* device, const char* id) {
    return api([&] {
        if (!device || !id) return cudaErrorInvalidValue;
        *device = 0;
        return std::strcmp(id, kPciBusId) == 0 ? cudaSuccess : cudaErrorInvalidDevice;
    });
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
    return api([&] {
        if (!can) return cudaErrorInvalidValue;
        *can = 0;
        cudaError_t e = check_device(device);
        return e ? e : check_device(peer);
    });
}

cudaError_t cudaDeviceSynchronize() {
    return api([] {
        if (cudaError_t e = forbidden_in_capture()) return e;
        complete_all();
        return cudaSuccess;
    });
}

// Removes the error of a failed kernel, all memory and all pending work. Streams and modules stay.
cudaError_t cudaDeviceReset() {
    if (in_host_function()) return cudaErrorNotPermitted;
    complete_all();
    if (options().leak && !sticky_error()) memory::report_leaks();
    memory::free_all();
    reset_kernel_attributes();
    clear_errors();
    return cudaSuccess;
}

cudaError_t cudaDeviceSetLimit(cudaLimit limit, size_t value) {
    return api([&] {
        if ((size_t)limit >= std::size(limits)) return cudaErrorUnsupportedLimit;
        limits[limit] = value;
        return cudaSuccess;
    });
}

cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit limit) {
    return api([&] {
        if (!value) return cudaErrorInvalidValue;
        if ((size_t)limit >= std::size(limits)) return cudaErrorUnsupportedLimit;
        *value = limits[limit];
        return cudaSuccess;
    });
}

cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) {
    return api([] { return cudaSuccess; });
}

cudaError_t cudaCtxResetPersistingL2Cache() {
    return api([] { return cudaSuccess; });
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    return api([&] {
        if (!version) return cudaErrorInvalidValue;
        *version = CUDART_VERSION;
        return cudaSuccess;
    });
}

cudaError_t cudaDriverGetVersion(int* version) {
    return cudaRuntimeGetVersion(version);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    return api([&] {
        if (function) *function = nullptr;
        if (result) *result = cudaDriverEntryPointSymbolNotFound;
        return cudaErrorNotSupported;  // the simulator has no driver API
    });
}

// cuda_profiler_api.h declares these.
cudaError_t cudaProfilerStart() {
    return api([] { return cudaSuccess; });
}

cudaError_t cudaProfilerStop() {
    return api([] { return cudaSuccess; });
}

}  // extern "C"
