// Allocations, and the attributes of pointers.
#include <algorithm>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/memory_host.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"
#include "dev/ptxsim/runtime.h"

namespace ptxsim {
namespace {

std::string sized(const char* call, size_t bytes) {
    return std::string(call) + " of " + std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

cudaError_t allocate(const char* call, void** out, size_t bytes, MemoryKind kind) {
    if (!out) return cudaErrorInvalidValue;
    if (cudaError_t e = forbidden_in_capture()) return e;
    *out = nullptr;
    if (kind == MemoryKind::device && fails_now(options().fail_allocation)) return cudaErrorMemoryAllocation;
    if (bytes == 0) return kind == MemoryKind::managed ? cudaErrorInvalidValue : cudaSuccess;
    *out = (void*)memory::allocate(bytes, kind, sized(call, bytes));
    return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}

// Whether an allocation of the program begins at the pointer. Reports a second free.
bool can_free(const char* call, void* pointer, bool pinned) {
    uint64_t address = (uint64_t)pointer;
    const Allocation* a = memory::find(address);
    bool fits = a && a->address == address && !a->is_variable && (a->kind == MemoryKind::pinned) == pinned;
    if (fits) return true;
    if (!memory::was_freed(address)) return false;
    Report r;
    r.fault = Fault::use_after_free;
    r.text = std::string(call) + " of a pointer that is " + memory::describe(address);
    report(std::move(r));
    return false;
}

// cudaFree and cudaFreeHost wait for all work, because it may use the memory.
cudaError_t free_now(const char* call, void* pointer, bool pinned) {
    if (!pointer) return cudaSuccess;
    if (cudaError_t e = forbidden_in_capture()) return e;
    if (const Allocation* a = memory::find((uint64_t)pointer))
        report_freed_in_flight(call, a->address, a->bytes);
    complete_all();
    if (!can_free(call, pointer, pinned) || !memory::free((uint64_t)pointer)) return cudaErrorInvalidValue;
    return cudaSuccess;
}

cudaError_t allocate_async(void** out, size_t bytes, cudaStream_t handle) {
    CUstream_st* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream->capture) return cudaErrorNotSupported;  // graphs have no memory nodes here
    cudaError_t e = allocate("cudaMallocAsync", out, bytes, MemoryKind::device);
    if (e != cudaSuccess || !*out) return e;
    // The address is known at once, but only work that comes after this operation may use the memory.
    Task task;
    task.what = sized("cudaMallocAsync", bytes);
    task.uses = {{(uint64_t)*out, bytes, Use::lifetime}};
    return enqueue(stream, std::move(task));
}

cudaError_t free_async(void* pointer, cudaStream_t handle) {
    CUstream_st* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (!pointer) return cudaSuccess;
    if (stream->capture) return cudaErrorNotSupported;
    if (!can_free("cudaFreeAsync", pointer, false)) return cudaErrorInvalidValue;
    Task task;
    task.what = "cudaFreeAsync of " + memory::find((uint64_t)pointer)->what;
    task.uses = {{(uint64_t)pointer, memory::find((uint64_t)pointer)->bytes, Use::lifetime}};
    task.run = [=] {
        bool freed = can_free("cudaFreeAsync", pointer, false) && memory::free((uint64_t)pointer);
        return freed ? cudaSuccess : cudaErrorIllegalAddress;
    };
    return enqueue(stream, std::move(task));
}

// The device has one pool. Its handle only has to differ from others.
cudaMemPool_t default_pool() {
    static char pool;
    return (cudaMemPool_t)&pool;
}
uint64_t release_threshold = 0;

cudaError_t pool_attribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value, bool set) {
    if (pool != default_pool() || !value) return cudaErrorInvalidValue;
    memory::Usage usage = memory::usage();
    switch (attribute) {
        case cudaMemPoolReuseFollowEventDependencies:
        case cudaMemPoolReuseAllowOpportunistic:
        case cudaMemPoolReuseAllowInternalDependencies:
            if (!set) *(int*)value = 0;  // no reuse: freed memory is never used again
            return cudaSuccess;
        case cudaMemPoolAttrReleaseThreshold:
            (set ? release_threshold : *(uint64_t*)value) = set ? *(uint64_t*)value : release_threshold;
            return cudaSuccess;
        case cudaMemPoolAttrReservedMemCurrent:
        case cudaMemPoolAttrUsedMemCurrent:
            if (!set) *(uint64_t*)value = usage.used;
            return set ? cudaErrorInvalidValue : cudaSuccess;
        case cudaMemPoolAttrReservedMemHigh:
        case cudaMemPoolAttrUsedMemHigh:
            if (!set) *(uint64_t*)value = usage.peak;
            return cudaSuccess;
        default:
            return cudaErrorNotSupported;
    }
}

}  // namespace
}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

cudaError_t cudaMalloc(void** out, size_t bytes) {
    return api([&] { return allocate("cudaMalloc", out, bytes, MemoryKind::device); });
}

cudaError_t cudaMallocPitch(void** out, size_t* pitch, size_t width, size_t height) {
    return api([&] {
        constexpr size_t align = 512;
        if (!pitch || width > SIZE_MAX - align) return cudaErrorInvalidValue;
        *pitch = (width + align - 1) / align * align;
        if (height && *pitch > SIZE_MAX / height) return cudaErrorMemoryAllocation;
        return allocate("cudaMallocPitch", out, *pitch * height, MemoryKind::device);
    });
}

cudaError_t cudaMallocHost(void** out, size_t bytes) {
    return api([&] { return allocate("cudaMallocHost", out, bytes, MemoryKind::pinned); });
}

cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned flags) {
    return api([&] {
        constexpr unsigned known = cudaHostAllocPortable | cudaHostAllocMapped | cudaHostAllocWriteCombined;
        if (flags & ~known) return cudaErrorInvalidValue;
        return allocate("cudaHostAlloc", out, bytes, MemoryKind::pinned);
    });
}

cudaError_t cudaMallocManaged(void** out, size_t bytes, unsigned flags) {
    return api([&] {
        if (flags != cudaMemAttachGlobal && flags != cudaMemAttachHost) return cudaErrorInvalidValue;
        return allocate("cudaMallocManaged", out, bytes, MemoryKind::managed);
    });
}

cudaError_t cudaFree(void* pointer) {
    return api([&] { return free_now("cudaFree", pointer, false); });
}

cudaError_t cudaFreeHost(void* pointer) {
    return api([&] { return free_now("cudaFreeHost", pointer, true); });
}

cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t stream) {
    return api([&] { return allocate_async(out, bytes, stream); });
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
    return api([&] { return free_async(pointer, stream); });
}

cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
    return api([&] {
        if (!pointer || bytes == 0) return cudaErrorInvalidValue;
        if (cudaError_t e = forbidden_in_capture()) return e;
        return memory::register_host((uint64_t)pointer, bytes) ? cudaSuccess
                                                               : cudaErrorHostMemoryAlreadyRegistered;
    });
}

cudaError_t cudaHostUnregister(void* pointer) {
    return api([&] {
        if (cudaError_t e = forbidden_in_capture()) return e;
        complete_all();
        return memory::unregister_host((uint64_t)pointer) ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
    });
}

cudaError_t cudaHostGetDevicePointer(void** out, void* pointer, unsigned flags) {
    return api([&] {
        const Allocation* a = memory::find((uint64_t)pointer);
        if (!out || flags || !a || a->kind == MemoryKind::device) return cudaErrorInvalidValue;
        *out = pointer;
        return cudaSuccess;
    });
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    return api([&] {
        if (!free || !total) return cudaErrorInvalidValue;
        memory::Usage usage = memory::usage();
        *total = usage.total;
        *free = usage.total - std::min(usage.total, usage.used);
        return cudaSuccess;
    });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
    return api([&] {
        if (!out) return cudaErrorInvalidValue;
        *out = {};
        const Allocation* a = memory::find((uint64_t)pointer);
        if (!a) {
            if (memory::is_device_address((uint64_t)pointer)) return cudaErrorInvalidValue;
            out->type = cudaMemoryTypeUnregistered;
            out->device = cudaInvalidDeviceId;
            out->hostPointer = (void*)pointer;
            return cudaSuccess;
        }
        out->type = a->kind == MemoryKind::device    ? cudaMemoryTypeDevice
                    : a->kind == MemoryKind::managed ? cudaMemoryTypeManaged
                                                     : cudaMemoryTypeHost;
        out->devicePointer = (void*)pointer;
        if (a->kind != MemoryKind::device) out->hostPointer = (void*)pointer;
        return cudaSuccess;
    });
}

cudaError_t cudaMemPrefetchAsync(const void* pointer, size_t bytes, cudaMemLocation, unsigned flags,
                                 cudaStream_t handle) {
    return api([&] {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        const Allocation* a = memory::find((uint64_t)pointer);
        if (flags || !a || a->kind != MemoryKind::managed || !memory::contains((uint64_t)pointer, bytes))
            return cudaErrorInvalidValue;
        Task task;
        task.what = "cudaMemPrefetchAsync";
        return enqueue(stream, std::move(task));
    });
}

cudaError_t cudaMemAdvise(const void* pointer, size_t bytes, cudaMemoryAdvise, cudaMemLocation) {
    return api([&] {
        const Allocation* a = memory::find((uint64_t)pointer);
        bool fits = a && a->kind == MemoryKind::managed && memory::contains((uint64_t)pointer, bytes);
        return fits ? cudaSuccess : cudaErrorInvalidValue;
    });
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
    return api([&] {
        if (!pool) return cudaErrorInvalidValue;
        if (device != current_device()) return cudaErrorInvalidDevice;
        *pool = default_pool();
        return cudaSuccess;
    });
}

cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int device) {
    return cudaDeviceGetDefaultMemPool(pool, device);
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
    return api([&] { return pool_attribute(pool, attribute, value, true); });
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
    return api([&] { return pool_attribute(pool, attribute, value, false); });
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t) {
    return api([&] { return pool == default_pool() ? cudaSuccess : cudaErrorInvalidValue; });
}

}  // extern "C"
