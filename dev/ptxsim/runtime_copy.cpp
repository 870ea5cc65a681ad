// Copies and fills, and the rules about when each kind of memory is read and written.
#include <cstdio>
#include <cstring>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/memory_host.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"
#include "dev/ptxsim/runtime.h"

namespace ptxsim {
namespace {

// The rows of bytes that a copy reads, or those that it writes.
struct Rows {
    uint64_t address;
    size_t pitch, width, height;
    uint64_t row(size_t i) const { return address + i * pitch; }
    size_t extent() const { return height ? pitch * (height - 1) + width : 0; }
    std::string what() const { return std::to_string(width * height) + " bytes"; }
};

// Memory of the host that the program neither allocated nor registered by CUDA is pageable.
bool is_pageable(uint64_t address) {
    return !memory::find(address) && !memory::is_device_address(address);
}

bool is_on_device(uint64_t address) {
    const Allocation* a = memory::find(address);
    return a ? a->kind != MemoryKind::pinned : memory::is_device_address(address);
}

// Reports rows that are not within one allocation.
bool check_rows(const char* call, const char* direction, const Rows& rows) {
    bool freed = memory::was_freed(rows.address);
    if (!freed && (is_pageable(rows.address) || memory::contains(rows.address, rows.extent()))) return true;
    Report r;
    r.fault = freed ? Fault::use_after_free : Fault::out_of_bounds;
    uint64_t bad = rows.address;
    if (const Allocation* a = memory::find(bad)) bad = a->address + a->bytes;
    r.text = std::string(call) + " " + direction + " " + rows.what() + " at " + hex(rows.address) +
             (rows.height > 1 ? " with a pitch of " + std::to_string(rows.pitch) : "") + "; " +
             (bad == rows.address ? "that is " : "the first byte outside is ") + memory::describe(bad);
    report(std::move(r));
    return false;
}

void note_use(Task* task, const Rows& rows, Use use) {
    if (!is_pageable(rows.address)) task->uses.push_back({rows.address, rows.extent(), use});
}

bool kind_fits(cudaMemcpyKind kind, uint64_t to, uint64_t from) {
    // The host and the device can both access pinned and registered memory.
    auto can_be_device = [](uint64_t address) { return !is_pageable(address); };
    auto can_be_host = [](uint64_t address) {
        const Allocation* a = memory::find(address);
        return a ? a->kind != MemoryKind::device : !memory::is_device_address(address);
    };
    switch (kind) {
        case cudaMemcpyHostToHost:
            return can_be_host(to) && can_be_host(from);
        case cudaMemcpyHostToDevice:
            return can_be_device(to) && can_be_host(from);
        case cudaMemcpyDeviceToHost:
            return can_be_host(to) && can_be_device(from);
        case cudaMemcpyDeviceToDevice:
            return can_be_device(to) && can_be_device(from);
        case cudaMemcpyDefault:
            return true;
    }
    return false;
}

cudaError_t copy_rows(const char* call, const Rows& to, const Rows& from) {
    // The rows are checked again when the copy runs, because they may have been freed since the call.
    if (!check_rows(call, "writes", to) || !check_rows(call, "reads", from)) return cudaErrorIllegalAddress;
    for (size_t i = 0; i < to.height; i++) memory::copy(to.row(i), from.row(i), to.width);
    return cudaSuccess;
}

cudaError_t copy(const char* call, Rows to, Rows from, cudaMemcpyKind kind, cudaStream_t handle,
                 bool blocking) {
    CUstream_st* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (to.width == 0 || to.height == 0) return cudaSuccess;
    if (!to.address || !from.address) return cudaErrorInvalidValue;
    if (to.height > 1 && (to.pitch < to.width || from.pitch < from.width)) return cudaErrorInvalidPitchValue;
    if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
    bool fits = check_rows(call, "writes", to);
    if (!check_rows(call, "reads", from) || !fits || !kind_fits(kind, to.address, from.address))
        return cudaErrorInvalidValue;

    Task task;
    task.what = std::string(call) + " of " + to.what();
    task.type = cudaGraphNodeTypeMemcpy;
    note_use(&task, from, Use::read);
    note_use(&task, to, Use::write);
    task.run = [=] { return copy_rows(call, to, from); };
    // A copy within the device does not make the host wait, not even a plain cudaMemcpy.
    bool to_device = is_on_device(to.address);
    if (to_device && is_on_device(from.address)) blocking = false;
    // The call itself reads pageable memory that goes to the device. (A plain cudaMemcpy also waits for the
    // device, as programs expect, although the documentation only promises that the source has been read.)
    if (options().lazy && !blocking && !stream->capture && is_pageable(from.address) && to_device) {
        auto bytes = std::make_shared<std::vector<std::byte>>(from.width * from.height);
        for (size_t i = 0; i < from.height; i++)
            std::memcpy(bytes->data() + i * from.width, (const void*)from.row(i), from.width);
        task.run = [=] {
            Rows source{(uint64_t)bytes->data(), from.width, from.width, from.height};
            return copy_rows(call, to, source);
        };
    } else if (is_pageable(to.address) || is_pageable(from.address)) {
        blocking = true;  // a copy to or from pageable memory returns when it is done
    }
    OperationRef op;
    if (cudaError_t e = enqueue(stream, std::move(task), &op)) return e;
    if (op && blocking) complete({op});
    return cudaSuccess;
}

Rows one_row(const void* address, size_t bytes) {
    return {(uint64_t)address, bytes, bytes, 1};
}

cudaError_t copy_1d(const char* call, void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                    cudaStream_t stream, bool blocking) {
    return api([&] { return copy(call, one_row(to, bytes), one_row(from, bytes), kind, stream, blocking); });
}

cudaError_t copy_2d(const char* call, void* to, size_t to_pitch, const void* from, size_t from_pitch,
                    size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t stream, bool blocking) {
    return api([&] {
        return copy(call, {(uint64_t)to, to_pitch, width, height},
                    {(uint64_t)from, from_pitch, width, height}, kind, stream, blocking);
    });
}

cudaError_t fill(const char* call, Rows to, int value, cudaStream_t handle, bool blocking) {
    CUstream_st* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (to.width == 0 || to.height == 0) return cudaSuccess;
    if (to.height > 1 && to.pitch < to.width) return cudaErrorInvalidPitchValue;
    if (!to.address || is_pageable(to.address) || !check_rows(call, "writes", to))
        return cudaErrorInvalidValue;
    Task task;
    task.what = std::string(call) + " of " + to.what();
    task.type = cudaGraphNodeTypeMemset;
    note_use(&task, to, Use::write);
    task.run = [=]() -> cudaError_t {
        if (!check_rows(call, "writes", to)) return cudaErrorIllegalAddress;
        for (size_t i = 0; i < to.height; i++) memory::fill(to.row(i), (uint8_t)value, to.width);
        return cudaSuccess;
    };
    // A fill makes the host wait only if it is of the host's memory.
    const Allocation* a = memory::find(to.address);
    if (a->kind == MemoryKind::device) blocking = false;
    OperationRef op;
    if (cudaError_t e = enqueue(stream, std::move(task), &op)) return e;
    if (op && blocking) complete({op});
    return cudaSuccess;
}

cudaError_t fill_rows(const char* call, Rows to, int value, cudaStream_t stream, bool blocking) {
    return api([&] { return fill(call, to, value, stream, blocking); });
}

cudaError_t copy_symbol(const char* call, const void* symbol, size_t offset, void* other, size_t bytes,
                        bool to_symbol, cudaMemcpyKind kind, cudaStream_t stream, bool blocking) {
    return api([&]() -> cudaError_t {
        VariableInfo variable;
        if (cudaError_t e = find_symbol(symbol, &variable)) return e;
        if (offset > variable.bytes || bytes > variable.bytes - offset) {
            Report r;
            r.fault = Fault::out_of_bounds;
            r.text = std::string(call) + " of " + std::to_string(bytes) + " bytes at " +
                     std::to_string(offset) + " of a variable of " + std::to_string(variable.bytes);
            report(std::move(r));
            return cudaErrorInvalidValue;
        }
        Rows inner{variable.address + offset, bytes, bytes, 1}, outer = one_row(other, bytes);
        return copy(call, to_symbol ? inner : outer, to_symbol ? outer : inner, kind, stream, blocking);
    });
}

}  // namespace
}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return copy_1d("cudaMemcpy", to, from, bytes, kind, nullptr, true);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return copy_1d("cudaMemcpyAsync", to, from, bytes, kind, stream, false);
}

cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t bytes) {
    return copy_1d("cudaMemcpyPeer", to, from, bytes, cudaMemcpyDeviceToDevice, nullptr, false);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
    return copy_1d("cudaMemcpyPeerAsync", to, from, bytes, cudaMemcpyDeviceToDevice, stream, false);
}

cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                         size_t height, cudaMemcpyKind kind) {
    return copy_2d("cudaMemcpy2D", to, to_pitch, from, from_pitch, width, height, kind, nullptr, true);
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
    return copy_2d("cudaMemcpy2DAsync", to, to_pitch, from, from_pitch, width, height, kind, stream, false);
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    return fill_rows("cudaMemset", one_row(to, bytes), value, nullptr, true);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    return fill_rows("cudaMemsetAsync", one_row(to, bytes), value, stream, false);
}

cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t height) {
    return fill_rows("cudaMemset2D", {(uint64_t)to, pitch, width, height}, value, nullptr, true);
}

cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t stream) {
    return fill_rows("cudaMemset2DAsync", {(uint64_t)to, pitch, width, height}, value, stream, false);
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               cudaMemcpyKind kind) {
    return copy_symbol("cudaMemcpyToSymbol", symbol, offset, (void*)from, bytes, true, kind, nullptr, true);
}

cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                    cudaMemcpyKind kind, cudaStream_t stream) {
    return copy_symbol("cudaMemcpyToSymbolAsync", symbol, offset, (void*)from, bytes, true, kind, stream,
                       false);
}

cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset,
                                 cudaMemcpyKind kind) {
    return copy_symbol("cudaMemcpyFromSymbol", symbol, offset, to, bytes, false, kind, nullptr, true);
}

cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t bytes, size_t offset,
                                      cudaMemcpyKind kind, cudaStream_t stream) {
    return copy_symbol("cudaMemcpyFromSymbolAsync", symbol, offset, to, bytes, false, kind, stream, false);
}

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
    return api([&] {
        VariableInfo variable;
        if (!address) return cudaErrorInvalidValue;
        if (cudaError_t e = find_symbol(symbol, &variable)) return e;
        *address = (void*)variable.address;
        return cudaSuccess;
    });
}

cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
    return api([&] {
        VariableInfo variable;
        if (!bytes) return cudaErrorInvalidValue;
        if (cudaError_t e = find_symbol(symbol, &variable)) return e;
        *bytes = variable.bytes;
        return cudaSuccess;
    });
}

}  // extern "C"
