// Stream capture and graphs.
#include <algorithm>
#include <map>
#include <set>

#include "dev/ptxsim/runtime.h"

using ptxsim::OperationRef;
using ptxsim::Task;

struct CUgraphExec_st {
    struct Node {
        Task task;
        std::vector<size_t> after;  // indices of earlier nodes in the list
    };
    std::vector<Node> nodes;
    OperationRef last;  // the end of its last launch, because two launches of a graph do not run at once
};

namespace ptxsim {
namespace {

struct State {
    std::set<CUgraph_st*> graphs;
    std::set<CUgraphExec_st*> executables;
    uint64_t captures = 0;
};

State& state() {
    static State& s = *new State;
    return s;
}

// A node is created after the nodes that it depends on, so a graph can run in the order of its list.
std::vector<CUgraphExec_st::Node> flatten(const CUgraph_st& graph) {
    std::map<const CUgraphNode_st*, size_t> index;
    std::vector<CUgraphExec_st::Node> nodes;
    for (const auto& node : graph.nodes) {
        CUgraphExec_st::Node flat{node->task, {}};
        for (const CUgraphNode_st* before : node->after) flat.after.push_back(index.at(before));
        index[node.get()] = nodes.size();
        nodes.push_back(std::move(flat));
    }
    return nodes;
}

CUgraphNode_st* add_node(Capture* capture, Task task, std::vector<CUgraphNode_st*> after) {
    auto node = std::make_unique<CUgraphNode_st>();
    node->task = std::move(task);
    node->after = std::move(after);
    capture->graph->nodes.push_back(std::move(node));
    return capture->graph->nodes.back().get();
}

void end_capture(const std::shared_ptr<Capture>& capture) {
    for (CUstream_st* s : all_streams()) {
        if (s->capture != capture) continue;
        s->capture = nullptr;
        s->capture_tail.clear();
    }
}

// Whether the next operation of the origin comes after everything that the other captured streams have done.
bool all_joined(const std::shared_ptr<Capture>& capture) {
    std::set<const CUgraphNode_st*> reached;
    std::vector<CUgraphNode_st*> stack = capture->origin->capture_tail;
    while (!stack.empty()) {
        CUgraphNode_st* node = stack.back();
        stack.pop_back();
        if (!reached.insert(node).second) continue;
        stack.insert(stack.end(), node->after.begin(), node->after.end());
    }
    for (CUstream_st* s : all_streams()) {
        if (s->capture != capture) continue;
        for (const CUgraphNode_st* node : s->capture_tail)
            if (!reached.count(node)) return false;
    }
    return true;
}

cudaError_t capture_graph(CUstream_st* stream, const CUgraphExec_st& executable) {
    Capture* capture = stream->capture.get();
    if (capture->invalid) return cudaErrorStreamCaptureInvalidated;
    std::vector<CUgraphNode_st*> added, leaves;
    std::set<size_t> inner;
    for (const auto& node : executable.nodes) {
        std::vector<CUgraphNode_st*> after;
        for (size_t i : node.after) {
            after.push_back(added[i]);
            inner.insert(i);
        }
        if (after.empty()) after = stream->capture_tail;
        added.push_back(add_node(capture, node.task, std::move(after)));
    }
    for (size_t i = 0; i < added.size(); i++)
        if (!inner.count(i)) leaves.push_back(added[i]);
    if (!leaves.empty()) stream->capture_tail = leaves;
    return cudaSuccess;
}

cudaError_t launch_graph(CUgraphExec_st* executable, CUstream_st* stream) {
    if (stream->capture) return capture_graph(stream, *executable);
    if (stream == legacy_stream())
        if (cudaError_t e = forbidden_in_capture(cudaErrorStreamCaptureImplicit)) return e;
    std::vector<OperationRef> before = before_next(stream);
    if (executable->last && !executable->last->done) before.push_back(executable->last);
    std::vector<OperationRef> operations;
    for (const auto& node : executable->nodes) {
        std::vector<OperationRef> after;
        for (size_t i : node.after) after.push_back(operations[i]);
        if (after.empty()) after = before;
        operations.push_back(add_operation(node.task, std::move(after)));
    }
    operations.insert(operations.end(), before.begin(), before.end());
    Task end;
    end.what = "the end of a graph";
    executable->last = add_operation(std::move(end), std::move(operations));
    stream->tail = {executable->last};
    return cudaSuccess;
}

cudaError_t instantiate(cudaGraphExec_t* out, cudaGraph_t graph) {
    if (!out || !state().graphs.count(graph)) return cudaErrorInvalidValue;
    *out = new CUgraphExec_st;
    (*out)->nodes = flatten(*graph);
    state().executables.insert(*out);
    return cudaSuccess;
}

// Fills the caller's array as far as it reaches. Without an array, only the number is returned.
template <typename T>
cudaError_t give_list(const std::vector<T>& all, T* out, size_t* count) {
    if (!count) return cudaErrorInvalidValue;
    if (out) {
        size_t n = std::min(*count, all.size());
        std::copy(all.begin(), all.begin() + n, out);
        std::fill(out + n, out + *count, nullptr);
        *count = n;
    } else {
        *count = all.size();
    }
    return cudaSuccess;
}

}  // namespace

cudaError_t forbidden_in_capture(cudaError_t error) {
    for (CUstream_st* s : all_streams()) {
        if (!s->capture) continue;
        // An implicit dependency is forbidden in every mode, but a non-blocking stream has none.
        bool allowed = error == cudaErrorStreamCaptureImplicit
                           ? !s->blocking()
                           : s->capture->mode == cudaStreamCaptureModeRelaxed;
        if (allowed) continue;
        s->capture->invalid = true;
        return error;
    }
    return cudaSuccess;
}

cudaError_t capture_task(CUstream_st* stream, Task task) {
    if (stream->capture->invalid) return cudaErrorStreamCaptureInvalidated;
    CUgraphNode_st* node = add_node(stream->capture.get(), std::move(task), stream->capture_tail);
    stream->capture_tail = {node};
    return cudaSuccess;
}

}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    return api([&] {
        CUstream_st* s = find_stream(handle);
        if (!s) return cudaErrorInvalidResourceHandle;
        if (s == legacy_stream()) return cudaErrorStreamCaptureUnsupported;
        if (s->capture) return cudaErrorIllegalState;
        s->capture = std::make_shared<Capture>();
        s->capture->graph = std::make_unique<CUgraph_st>();
        s->capture->origin = s;
        s->capture->mode = mode;
        s->capture->id = ++state().captures;
        s->capture_tail.clear();
        return cudaSuccess;
    });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
    return api([&] {
        CUstream_st* s = find_stream(handle);
        if (!s) return cudaErrorInvalidResourceHandle;
        if (!out) return cudaErrorInvalidValue;
        *out = nullptr;
        if (!s->capture) return cudaErrorIllegalState;
        std::shared_ptr<Capture> capture = s->capture;
        if (capture->origin != s) {
            capture->invalid = true;
            return cudaErrorStreamCaptureUnmatched;
        }
        cudaError_t error = capture->invalid      ? cudaErrorStreamCaptureInvalidated
                            : all_joined(capture) ? cudaSuccess
                                                  : cudaErrorStreamCaptureUnjoined;
        end_capture(capture);
        if (error == cudaSuccess) {
            *out = capture->graph.release();
            state().graphs.insert(*out);
        }
        capture->graph = nullptr;
        return error;
    });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    return cudaStreamGetCaptureInfo(handle, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                     size_t* count) {
    return api([&] {
        CUstream_st* s = find_stream(handle);
        if (!s) return cudaErrorInvalidResourceHandle;
        if (!status) return cudaErrorInvalidValue;
        *status = !s->capture           ? cudaStreamCaptureStatusNone
                  : s->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                        : cudaStreamCaptureStatusActive;
        if (*status != cudaStreamCaptureStatusActive) return cudaSuccess;
        if (id) *id = s->capture->id;
        if (graph) *graph = s->capture->graph.get();
        if (dependencies) *dependencies = s->capture_tail.data();
        if (edges) *edges = nullptr;
        if (count) *count = s->capture_tail.size();
        return cudaSuccess;
    });
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    // Every thread begins in global mode. The mode of a capture decides what it forbids, so this value is
    // only kept for the caller.
    static cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
    return api([&] {
        if (!mode) return cudaErrorInvalidValue;
        std::swap(current, *mode);
        return cudaSuccess;
    });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
    return api([&] { return instantiate(out, graph); });
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
    return api([&] { return instantiate(out, graph); });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
    return api([&] {
        CUstream_st* s = find_stream(handle);
        if (!s) return cudaErrorInvalidResourceHandle;
        if (!state().executables.count(executable)) return cudaErrorInvalidValue;
        return launch_graph(executable, s);
    });
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t) {
    return api([&] { return state().executables.count(executable) ? cudaSuccess : cudaErrorInvalidValue; });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    return api([&] {
        // A pending launch has copies of all it needs.
        if (!state().executables.erase(executable)) return cudaErrorInvalidValue;
        delete executable;
        return cudaSuccess;
    });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return api([&] {
        if (!state().graphs.erase(graph)) return cudaErrorInvalidValue;
        delete graph;
        return cudaSuccess;
    });
}

cudaError_t cudaGraphExecUpdate(cudaGraphExec_t executable, cudaGraph_t graph,
                                cudaGraphExecUpdateResultInfo* info) {
    return api([&] {
        if (!state().executables.count(executable) || !state().graphs.count(graph) || !info)
            return cudaErrorInvalidValue;
        *info = {};
        std::vector<CUgraphExec_st::Node> nodes = flatten(*graph);
        bool same = nodes.size() == executable->nodes.size();
        for (size_t i = 0; same && i < nodes.size(); i++) {
            same = nodes[i].after == executable->nodes[i].after;
            if (!same) break;
            if (nodes[i].task.type == executable->nodes[i].task.type) continue;
            info->result = cudaGraphExecUpdateErrorNodeTypeChanged;
            info->errorNode = graph->nodes[i].get();
            return cudaErrorGraphExecUpdateFailure;
        }
        if (!same) {
            info->result = cudaGraphExecUpdateErrorTopologyChanged;
            return cudaErrorGraphExecUpdateFailure;
        }
        info->result = cudaGraphExecUpdateSuccess;
        executable->nodes = std::move(nodes);
        return cudaSuccess;
    });
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    return api([&] {
        if (!state().graphs.count(graph)) return cudaErrorInvalidValue;
        std::vector<cudaGraphNode_t> all;
        for (const auto& node : graph->nodes) all.push_back(node.get());
        return give_list(all, nodes, count);
    });
}

cudaError_t cudaGraphGetRootNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    return api([&] {
        if (!state().graphs.count(graph)) return cudaErrorInvalidValue;
        std::vector<cudaGraphNode_t> roots;
        for (const auto& node : graph->nodes)
            if (node->after.empty()) roots.push_back(node.get());
        return give_list(roots, nodes, count);
    });
}

cudaError_t cudaGraphGetEdges(cudaGraph_t graph, cudaGraphNode_t* from, cudaGraphNode_t* to,
                              cudaGraphEdgeData* data, size_t* count) {
    return api([&] {
        if (!state().graphs.count(graph) || !count || !from != !to) return cudaErrorInvalidValue;
        std::vector<cudaGraphNode_t> sources, targets;
        for (const auto& node : graph->nodes)
            for (CUgraphNode_st* before : node->after) {
                sources.push_back(before);
                targets.push_back(node.get());
            }
        size_t room = *count;
        if (data) std::fill(data, data + (from ? room : 0), cudaGraphEdgeData{});
        give_list(sources, from, &room);
        return give_list(targets, to, count);
    });
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
    return api([&] {
        if (!node || !type) return cudaErrorInvalidValue;
        *type = node->task.type;
        return cudaSuccess;
    });
}

cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) {
    return api([] { return cudaErrorNotSupported; });
}

}  // extern "C"
