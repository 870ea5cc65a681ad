// Launches of kernels, the device's limits on them, and the attributes of kernels.
#include <algorithm>
#include <cstring>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"
#include "dev/ptxsim/runtime.h"

namespace ptxsim {
namespace {

// The launch configuration that <<<>>> pushes and the kernel's stub pops.
struct CallConfiguration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
std::vector<CallConfiguration>& call_stack() {
    static auto& s = *new std::vector<CallConfiguration>;
    return s;
}

std::string in_words(dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
}

struct Refusal {
    cudaError_t error = cudaSuccess;
    std::string why;
};

Refusal check_limits(const KernelEntry& entry, const LaunchConfig& launch) {
    const KernelInfo& kernel = info(entry.kernel);
    const Dim3 &g = launch.grid, &b = launch.block;
    dim3 grid(g.x, g.y, g.z), block(b.x, b.y, b.z);
    uint64_t threads = b.count();
    size_t shared = kernel.static_shared + launch.dynamic_shared;
    auto configuration = [](std::string why) {
        return Refusal{cudaErrorInvalidConfiguration, std::move(why)};
    };
    if (g.count() == 0) return configuration("a grid of " + in_words(grid) + " blocks");
    if (threads == 0) return configuration("blocks of " + in_words(block) + " threads");
    if (threads > kMaxThreadsPerBlock || b.x > 1024 || b.y > 1024 || b.z > 64)
        return configuration("blocks of " + in_words(block) +
                             " threads; the limits are 1024 x 1024 x 64, and 1024 in all");
    if (g.x > 0x7FFFFFFFu || g.y > 65535 || g.z > 65535)
        return configuration("a grid of " + in_words(grid) +
                             " blocks; the limits are 2147483647 x 65535 x 65535");
    if (kernel.required_threads ? threads != (uint64_t)kernel.max_threads
                                : threads > (uint64_t)kernel.max_threads)
        return configuration(
            "blocks of " + std::to_string(threads) + " threads; the kernel was compiled for " +
            (kernel.required_threads ? "exactly " : "at most ") + std::to_string(kernel.max_threads));
    std::string sum = std::to_string(shared) + " bytes of shared memory (" +
                      std::to_string(kernel.static_shared) + " static, " +
                      std::to_string(launch.dynamic_shared) + " dynamic)";
    if (shared > kSharedOptIn)
        return {cudaErrorInvalidValue, sum + "; the limit is " + std::to_string(kSharedOptIn)};
    size_t allowed = std::max<size_t>(kSharedDefault - std::min(kSharedDefault, kernel.static_shared),
                                      (size_t)entry.max_dynamic_shared);
    if (launch.dynamic_shared > allowed)
        return {cudaErrorInvalidValue, sum + "; above " + std::to_string(kSharedDefault) +
                                           " cudaFuncAttributeMaxDynamicSharedMemorySize must allow it"};
    if (launch.cooperative) {
        uint64_t resident = (uint64_t)blocks_per_multiprocessor(kernel, (int)threads, launch.dynamic_shared) *
                            kMultiprocessors;
        if (g.count() > resident)
            return {cudaErrorCooperativeLaunchTooLarge, "a cooperative grid of " + std::to_string(g.count()) +
                                                            " blocks; " + std::to_string(resident) +
                                                            " are resident at once"};
    }
    return {};
}

// The device allocations that a kernel's parameters point to. Every 8 bytes that are an address in an
// allocation count as a pointer.
std::vector<MemoryUse> pointers_in(const std::vector<std::byte>& parameters) {
    std::vector<MemoryUse> uses;
    for (size_t i = 0; i + 8 <= parameters.size(); i += 8) {
        uint64_t value;
        std::memcpy(&value, &parameters[i], 8);
        if (const Allocation* a = memory::find(value)) uses.push_back({a->address, a->bytes, Use::maybe});
    }
    return uses;
}

cudaError_t error_of(LaunchResult result) {
    switch (result) {
        case LaunchResult::ok:
            return cudaSuccess;
        case LaunchResult::illegal_address:
            return cudaErrorIllegalAddress;
        case LaunchResult::misaligned_address:
            return cudaErrorMisalignedAddress;
        case LaunchResult::trap:
            return cudaErrorLaunchFailure;
        case LaunchResult::assert_failed:
            return cudaErrorAssert;
        case LaunchResult::deadlock:
            return cudaErrorLaunchTimeout;
        case LaunchResult::unsupported:
            return cudaErrorNotSupported;
    }
    return cudaErrorUnknown;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                   cudaStream_t handle, bool cooperative) {
    CUstream_st* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    KernelEntry* entry;
    if (cudaError_t e = find_kernel_entry(function, &entry)) return e;
    if (fails_now(options().fail_launch)) return cudaErrorLaunchOutOfResources;
    const KernelInfo& kernel = info(entry->kernel);

    LaunchConfig config;
    config.kernel = entry->kernel;
    config.grid = {grid.x, grid.y, grid.z};
    config.block = {block.x, block.y, block.z};
    config.dynamic_shared = shared;
    config.cooperative = cooperative;
    if (Refusal refusal = check_limits(*entry, config); refusal.error) {
        Report r;
        r.fault = Fault::launch;
        r.kernel = entry->title;
        r.text = "launched with " + refusal.why;
        report(std::move(r));
        return refusal.error;
    }
    config.parameters.resize(kernel.parameter_bytes);
    if (!arguments && !kernel.parameter_sizes.empty()) return cudaErrorInvalidValue;
    for (size_t i = 0; i < kernel.parameter_sizes.size(); i++)
        std::memcpy(&config.parameters[kernel.parameter_offsets[i]], arguments[i], kernel.parameter_sizes[i]);

    Task task;
    task.what = "kernel " + entry->title;
    task.type = cudaGraphNodeTypeKernel;
    if (options().lazy || any_pending()) task.uses = pointers_in(config.parameters);
    task.run = [config = std::move(config)] { return error_of(run(config)); };
    return enqueue(stream, std::move(task));
}

cudaError_t occupancy(int* blocks, const void* function, int threads, size_t dynamic_shared) {
    KernelEntry* entry;
    if (cudaError_t e = find_kernel_entry(function, &entry)) return e;
    if (!blocks || threads <= 0) return cudaErrorInvalidValue;
    *blocks = blocks_per_multiprocessor(info(entry->kernel), threads, dynamic_shared);
    return cudaSuccess;
}

cudaError_t set_attribute(KernelEntry* entry, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || (size_t)value + info(entry->kernel).static_shared > kSharedOptIn)
            return cudaErrorInvalidValue;
        entry->max_dynamic_shared = value;
        return cudaSuccess;
    }
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
        if (value < -1 || value > 100) return cudaErrorInvalidValue;
        entry->carveout = value;
        return cudaSuccess;
    }
    return cudaErrorNotSupported;
}

}  // namespace

int blocks_per_multiprocessor(const KernelInfo& kernel, int threads, size_t dynamic_shared) {
    if (threads <= 0 || threads > kernel.max_threads) return 0;
    int warps = (threads + 31) / 32;
    int by_threads = std::min(32, 64 / warps);
    size_t shared = (kernel.static_shared + dynamic_shared + kSharedReserved + 127) / 128 * 128;
    return std::min(by_threads, (int)(kSharedPerMultiprocessor / shared));
}

}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
    call_stack().push_back({grid, block, shared, stream});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    if (call_stack().empty()) return cudaErrorMissingConfiguration;
    CallConfiguration top = call_stack().back();
    call_stack().pop_back();
    *grid = top.grid;
    *block = top.block;
    *shared = top.shared;
    *(cudaStream_t*)stream = top.stream;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
    return api([&] { return launch(function, grid, block, arguments, shared, stream, false); });
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
    return api([&] { return launch(kernel, grid, block, arguments, shared, stream, false); });
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                        size_t shared, cudaStream_t stream) {
    return api([&] { return launch(function, grid, block, arguments, shared, stream, true); });
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    return api([&]() -> cudaError_t {
        if (!config) return cudaErrorInvalidValue;
        bool cooperative = false;
        for (unsigned i = 0; i < config->numAttrs; i++) {
            const cudaLaunchAttribute& attribute = config->attrs[i];
            switch (attribute.id) {
                case cudaLaunchAttributeCooperative:
                    cooperative = attribute.val.cooperative;
                    break;
                case cudaLaunchAttributeClusterDimension: {
                    const auto& cluster = attribute.val.clusterDim;
                    if (cluster.x * cluster.y * cluster.z > 1) return cudaErrorNotSupported;
                    break;
                }
                // These are hints, or change only when work runs within the order that it has anyway.
                case cudaLaunchAttributeIgnore:
                case cudaLaunchAttributeAccessPolicyWindow:
                case cudaLaunchAttributeClusterSchedulingPolicyPreference:
                case cudaLaunchAttributeProgrammaticStreamSerialization:
                case cudaLaunchAttributePriority:
                case cudaLaunchAttributePreferredSharedMemoryCarveout:
                    break;
                default:
                    return cudaErrorNotSupported;
            }
        }
        return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                      config->stream, cooperative);
    });
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    return api([&] {
        KernelEntry* entry;
        if (cudaError_t e = find_kernel_entry(function, &entry)) return e;
        return set_attribute(entry, attribute, value);
    });
}

cudaError_t cudaFuncSetCacheConfig(const void* function, cudaFuncCache) {
    return api([&] {
        KernelEntry* entry;
        return find_kernel_entry(function, &entry);
    });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
    return api([&] {
        KernelEntry* entry;
        if (cudaError_t e = find_kernel_entry(function, &entry)) return e;
        if (!out) return cudaErrorInvalidValue;
        const KernelInfo& kernel = info(entry->kernel);
        *out = {};  // numRegs stays 0, because PTX does not say how many registers the hardware needs
        out->sharedSizeBytes = kernel.static_shared;
        out->localSizeBytes = kernel.local_bytes;
        out->maxThreadsPerBlock = kernel.max_threads;
        out->ptxVersion = 80;
        out->binaryVersion = 90;
        size_t left = kSharedDefault - std::min(kSharedDefault, kernel.static_shared);
        out->maxDynamicSharedSizeBytes = std::max((int)left, entry->max_dynamic_shared);
        out->preferredShmemCarveout = entry->carveout;
        return cudaSuccess;
    });
}

cudaError_t cudaFuncGetName(const char** name, const void* function) {
    return api([&] {
        KernelEntry* entry;
        if (cudaError_t e = find_kernel_entry(function, &entry)) return e;
        if (!name) return cudaErrorInvalidValue;
        *name = info(entry->kernel).name.c_str();
        return cudaSuccess;
    });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t dynamic_shared) {
    return api([&] { return occupancy(blocks, function, threads, dynamic_shared); });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function,
                                                                   int threads, size_t dynamic_shared,
                                                                   unsigned) {
    return api([&] { return occupancy(blocks, function, threads, dynamic_shared); });
}

cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* function, int blocks,
                                                      int threads) {
    return api([&] {
        KernelEntry* entry;
        if (cudaError_t e = find_kernel_entry(function, &entry)) return e;
        if (!bytes || blocks <= 0 || threads <= 0) return cudaErrorInvalidValue;
        size_t taken = info(entry->kernel).static_shared + kSharedReserved;
        size_t share = kSharedPerMultiprocessor / (size_t)blocks / 128 * 128;
        *bytes = share > taken ? share - taken : 0;
        return cudaSuccess;
    });
}

}  // extern "C"
