// Streams and events.
#include <algorithm>
#include <set>

#include "dev/ptxsim/runtime.h"
#include "dev/ptxsim/stream_work.h"

namespace ptxsim {
namespace {

struct State {
    std::vector<CUstream_st*> streams;
    CUstream_st *legacy, *per_thread;
    // Pending work of destroyed blocking streams. The legacy stream still waits for it.
    std::vector<OperationRef> orphans;
    std::set<CUevent_st*> events;
    uint64_t ids = 0;
    State() {
        legacy = create(0, 0);
        per_thread = create(0, 0);
    }
    CUstream_st* create(unsigned flags, int priority) {
        auto* s = new CUstream_st;
        s->flags = flags;
        s->priority = priority;
        s->id = ++ids;
        streams.push_back(s);
        return s;
    }
};

State& state() {
    static State& s = *new State;
    return s;
}

void append_pending(std::vector<OperationRef>* to, std::vector<OperationRef>* from) {
    std::erase_if(*from, [](const OperationRef& op) { return op->done; });
    to->insert(to->end(), from->begin(), from->end());
}

constexpr int kGreatestPriority = -5;  // the least is 0

cudaError_t create_stream(cudaStream_t* out, unsigned flags, int priority) {
    if (!out || (flags & ~cudaStreamNonBlocking)) return cudaErrorInvalidValue;
    *out = state().create(flags, std::clamp(priority, kGreatestPriority, 0));
    return cudaSuccess;
}

bool is_event(cudaEvent_t event) {
    return state().events.count(event) > 0;
}

cudaError_t wait_event(CUstream_st* stream, CUevent_st* event) {
    if (event->capture) {
        if (stream == legacy_stream()) return cudaErrorStreamCaptureImplicit;
        if (event->capture->invalid) return cudaErrorStreamCaptureInvalidated;
        if (!event->capture->graph) return cudaErrorCapturedEvent;  // the event's capture has ended
        if (stream->capture && stream->capture != event->capture) return cudaErrorStreamCaptureMerge;
        if (!stream->capture) {
            stream->capture = event->capture;
            stream->capture_tail.clear();
        }
        auto& tail = stream->capture_tail;
        for (CUgraphNode_st* node : event->nodes)
            if (std::find(tail.begin(), tail.end(), node) == tail.end()) tail.push_back(node);
        return cudaSuccess;
    }
    if (stream->capture) {
        if (!event->operation) return cudaSuccess;
        stream->capture->invalid = true;
        return cudaErrorStreamCaptureIsolation;
    }
    if (!event->operation || event->operation->done) return cudaSuccess;
    // On the legacy stream a wait acts like an operation: later work of all blocking streams waits, too.
    if (stream == legacy_stream()) stream->tail = before_next(stream);
    stream->tail.push_back(event->operation);
    return cudaSuccess;
}

cudaError_t synchronize(CUstream_st* stream) {
    if (stream->capture) {
        stream->capture->invalid = true;
        return cudaErrorStreamCaptureUnsupported;
    }
    if (stream == legacy_stream())
        if (cudaError_t e = forbidden_in_capture(cudaErrorStreamCaptureImplicit)) return e;
    // Synchronising a blocking stream adds no operation to it, so it does not wait for the legacy stream.
    complete(stream == legacy_stream() ? before_next(stream) : stream->tail);
    return cudaSuccess;
}

// If not all targets have run, runs one operation and returns cudaErrorNotReady. So a loop that queries until
// it succeeds comes to an end.
cudaError_t query(const std::vector<OperationRef>& targets) {
    if (all_done(targets)) return cudaSuccess;
    complete(targets, 1);
    return cudaErrorNotReady;
}

template <typename Body>
cudaError_t with_stream(cudaStream_t handle, Body&& body) {
    return api([&]() -> cudaError_t {
        CUstream_st* stream = find_stream(handle);
        return stream ? body(stream) : cudaErrorInvalidResourceHandle;
    });
}

template <typename Body>
cudaError_t with_event(cudaEvent_t event, Body&& body) {
    return api([&]() -> cudaError_t { return is_event(event) ? body() : cudaErrorInvalidResourceHandle; });
}

}  // namespace

CUstream_st* legacy_stream() {
    return state().legacy;
}
const std::vector<CUstream_st*>& all_streams() {
    return state().streams;
}

CUstream_st* find_stream(cudaStream_t handle) {
    State& s = state();
    if (!handle || handle == cudaStreamLegacy) return s.legacy;
    if (handle == cudaStreamPerThread) return s.per_thread;
    auto it = std::find(s.streams.begin(), s.streams.end(), handle);
    return it == s.streams.end() ? nullptr : *it;
}

std::vector<OperationRef> before_next(CUstream_st* stream) {
    State& s = state();
    std::vector<OperationRef> result;
    append_pending(&result, &stream->tail);
    if (stream == s.legacy) {
        append_pending(&result, &s.orphans);
        for (CUstream_st* other : s.streams)
            if (other != stream && other->blocking()) append_pending(&result, &other->tail);
    } else if (stream->blocking()) {
        append_pending(&result, &s.legacy->tail);
    }
    return result;
}

cudaError_t enqueue(CUstream_st* stream, Task task, OperationRef* out) {
    if (out) *out = nullptr;
    if (stream->capture) return capture_task(stream, std::move(task));
    if (stream == legacy_stream())
        if (cudaError_t e = forbidden_in_capture(cudaErrorStreamCaptureImplicit)) return e;
    OperationRef op = add_operation(std::move(task), before_next(stream));
    stream->tail = {op};
    if (out) *out = op;
    return cudaSuccess;
}

cudaError_t enqueue(const std::vector<CUstream_st*>& streams, Task task, std::vector<OperationRef> also,
                    OperationRef* out) {
    if (streams.size() == 1 && streams[0]->capture) return enqueue(streams[0], std::move(task), out);
    for (CUstream_st* s : streams) {
        if (s->capture) return cudaErrorNotSupported;
        if (s == legacy_stream())
            if (cudaError_t e = forbidden_in_capture(cudaErrorStreamCaptureImplicit)) return e;
        std::vector<OperationRef> before = before_next(s);
        also.insert(also.end(), before.begin(), before.end());
    }
    *out = add_operation(std::move(task), std::move(also));
    for (CUstream_st* s : streams) s->tail = {*out};
    return cudaSuccess;
}

void enqueue(cudaStream_t handle, std::string what, std::vector<MemoryUse> uses, std::function<void()> work) {
    CUstream_st* stream = find_stream(handle);
    Task task;
    task.what = std::move(what);
    task.uses = std::move(uses);
    task.type = cudaGraphNodeTypeKernel;
    task.run = [work = std::move(work)] {
        work();
        return cudaSuccess;
    };
    cudaError_t e = stream ? enqueue(stream, std::move(task)) : cudaErrorInvalidResourceHandle;
    if (e != cudaSuccess) set_last_error(e);
}

}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

cudaError_t cudaStreamCreate(cudaStream_t* out) {
    return api([&] { return create_stream(out, 0, 0); });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
    return api([&] { return create_stream(out, flags, 0); });
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
    return api([&] { return create_stream(out, flags, priority); });
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    return with_stream(handle, [&](CUstream_st* s) {
        if (s == state().legacy || s == state().per_thread) return cudaErrorInvalidResourceHandle;
        if (s->capture) s->capture->invalid = true;
        // Pending work of the stream still runs, and later work of the legacy stream waits for it.
        if (s->blocking()) append_pending(&state().orphans, &s->tail);
        std::erase(state().streams, s);
        delete s;
        return cudaSuccess;
    });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    return with_stream(handle, synchronize);
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    return with_stream(handle, [](CUstream_st* s) {
        if (s->capture) {
            s->capture->invalid = true;
            return cudaErrorStreamCaptureUnsupported;
        }
        return query(s == legacy_stream() ? before_next(s) : s->tail);
    });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
    return with_stream(handle, [&](CUstream_st* s) {
        if (flags & ~cudaEventWaitExternal) return cudaErrorInvalidValue;
        return is_event(event) ? wait_event(s, event) : cudaErrorInvalidResourceHandle;
    });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
    return with_stream(handle, [&](CUstream_st* s) {
        if (!function) return cudaErrorInvalidValue;
        Task task;
        task.what = "a host function";
        task.type = cudaGraphNodeTypeHost;
        task.run = [=] {
            function(data);
            return cudaSuccess;
        };
        return enqueue(s, std::move(task));
    });
}

cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t callback, void* data,
                                  unsigned flags) {
    return with_stream(handle, [&](CUstream_st* s) {
        if (!callback || flags) return cudaErrorInvalidValue;
        if (s->capture) {
            s->capture->invalid = true;
            return cudaErrorStreamCaptureUnsupported;
        }
        Task task;
        task.what = "a stream callback";
        task.type = cudaGraphNodeTypeHost;
        task.run = [=] {
            callback(handle, cudaSuccess, data);
            return cudaSuccess;
        };
        return enqueue(s, std::move(task));
    });
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
    return with_stream(handle, [&](CUstream_st* s) {
        if (!priority) return cudaErrorInvalidValue;
        *priority = s->priority;
        return cudaSuccess;
    });
}

cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
    return with_stream(handle, [&](CUstream_st* s) {
        if (!flags) return cudaErrorInvalidValue;
        *flags = s->flags;
        return cudaSuccess;
    });
}

cudaError_t cudaStreamGetId(cudaStream_t handle, unsigned long long* id) {
    return with_stream(handle, [&](CUstream_st* s) {
        if (!id) return cudaErrorInvalidValue;
        *id = s->id;
        return cudaSuccess;
    });
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int* device) {
    return with_stream(handle, [&](CUstream_st*) {
        if (!device) return cudaErrorInvalidValue;
        *device = current_device();
        return cudaSuccess;
    });
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    return api([&] {
        if (least) *least = 0;
        if (greatest) *greatest = kGreatestPriority;
        return cudaSuccess;
    });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) {
    return api([&] {
        constexpr unsigned known = cudaEventBlockingSync | cudaEventDisableTiming;
        if (!out || (flags & ~known)) return cudaErrorInvalidValue;
        *out = new CUevent_st;
        (*out)->flags = flags;
        state().events.insert(*out);
        return cudaSuccess;
    });
}

cudaError_t cudaEventCreate(cudaEvent_t* out) {
    return cudaEventCreateWithFlags(out, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    return with_event(event, [&] {
        state().events.erase(event);
        delete event;
        return cudaSuccess;
    });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
    return with_stream(handle, [&](CUstream_st* s) {
        if (!is_event(event)) return cudaErrorInvalidResourceHandle;
        if (s->capture) {
            if (s->capture->invalid) return cudaErrorStreamCaptureInvalidated;
            event->capture = s->capture;
            event->nodes = s->capture_tail;
            return cudaSuccess;
        }
        Task task;
        task.what = "an event";
        OperationRef op;
        if (cudaError_t e = enqueue(s, std::move(task), &op)) return e;
        event->operation = op;
        event->capture = nullptr;
        event->nodes.clear();
        return cudaSuccess;
    });
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags) {
    if (flags) return api([] { return cudaErrorNotSupported; });
    return cudaEventRecord(event, handle);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return with_event(event, [&] {
        if (event->capture) {
            event->capture->invalid = true;
            return cudaErrorCapturedEvent;
        }
        if (event->operation) complete({event->operation});
        return cudaSuccess;
    });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    return with_event(event, [&] {
        if (event->capture) {
            event->capture->invalid = true;
            return cudaErrorCapturedEvent;
        }
        return event->operation ? query({event->operation}) : cudaSuccess;
    });
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    return with_event(start, [&] {
        if (!ms) return cudaErrorInvalidValue;
        if (!is_event(end) || !start->operation || !end->operation) return cudaErrorInvalidResourceHandle;
        if ((start->flags | end->flags) & cudaEventDisableTiming) return cudaErrorInvalidResourceHandle;
        if (!start->operation->done || !end->operation->done) return cudaErrorNotReady;
        *ms = (float)(end->operation->finished - start->operation->finished);
        return cudaSuccess;
    });
}

}  // extern "C"
