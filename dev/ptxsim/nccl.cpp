// NCCL for a communicator of one rank, where every collective is a copy in the stream.
//
// To simulate several ranks, ncclComm would hold the connection to the other processes, and exchange(), which
// every collective calls, would use it.
#if __has_include(<nccl.h>)  // not every toolkit has this header, and without it no program can call NCCL
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/operand.h"
#include "dev/ptxsim/stream_work.h"

struct ncclComm {
    int ranks, rank, device;
};

namespace ptxsim {
namespace {

// Group calls: the work of this thread that the outermost ncclGroupEnd puts into the streams.
struct Transfer {
    ncclComm_t comm;
    uint64_t address;
    size_t count;
    ncclDataType_t type;
    cudaStream_t stream;
};
struct Group {
    int depth = 0;
    std::vector<std::function<void()>> calls;
    std::vector<Transfer> sent, received;
};
thread_local Group group;

size_t size_of(ncclDataType_t type) {
    switch (type) {
        case ncclInt8:
        case ncclUint8:
        case ncclFloat8e4m3:
        case ncclFloat8e5m2:
            return 1;
        case ncclFloat16:
        case ncclBfloat16:
            return 2;
        case ncclInt32:
        case ncclUint32:
        case ncclFloat32:
            return 4;
        case ncclInt64:
        case ncclUint64:
        case ncclFloat64:
            return 8;
        default:
            return 0;
    }
}

ncclResult_t check(const char* call, ncclComm_t comm, ncclDataType_t type, int root_or_peer) {
    if (!comm) return refuse(ncclInvalidArgument, call, "the communicator is null");
    if (!size_of(type))
        return refuse(ncclInvalidArgument, call, "data type " + std::to_string(type) + " is not simulated");
    if (root_or_peer < 0 || root_or_peer >= comm->ranks)
        return refuse(ncclInvalidArgument, call, "there is no rank " + std::to_string(root_or_peer));
    return ncclSuccess;
}

void copy(const char* call, uint64_t to, uint64_t from, size_t bytes, size_t alignment) {
    bool ok = check_range(call, "the send buffer", from, bytes, alignment);
    ok &= check_range(call, "the receive buffer", to, bytes, alignment);
    if (ok && to != from) memory::copy(to, from, bytes);
}

// The work of every collective: with one rank, the data that was sent is the data that is received.
ncclResult_t exchange(const char* call, const void* from, void* to, size_t count, ncclDataType_t type,
                      int root, ncclComm_t comm, cudaStream_t stream) {
    if (ncclResult_t r = check(call, comm, type, root)) return r;
    size_t alignment = size_of(type), bytes = count * alignment;
    auto work = [=] { copy(call, (uint64_t)to, (uint64_t)from, bytes, alignment); };
    if (group.depth) {
        group.calls.push_back([=] { enqueue(stream, work); });
    } else {
        enqueue(stream, work);
    }
    return ncclSuccess;
}

ncclResult_t reduce(const char* call, const void* from, void* to, size_t count, ncclDataType_t type,
                    ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream) {
    if (op < 0 || op >= ncclNumOps)
        return refuse(ncclInvalidArgument, call, "operation " + std::to_string(op) + " is not simulated");
    return exchange(call, from, to, count, type, root, comm, stream);
}

// Within a group, the first send belongs to the first receive, the second to the second, and so on.
ncclResult_t transfer(const char* call, bool send, const void* address, size_t count, ncclDataType_t type,
                      int peer, ncclComm_t comm, cudaStream_t stream) {
    if (ncclResult_t r = check(call, comm, type, peer)) return r;
    if (!group.depth)
        return refuse(ncclInvalidUsage, call,
                      "a send to or a receive from the own rank outside of a group would wait forever");
    (send ? group.sent : group.received).push_back({comm, (uint64_t)address, count, type, stream});
    return ncclSuccess;
}

ncclResult_t match_transfers(const Group& g) {
    const char* call = "ncclGroupEnd";
    bool fits = g.sent.size() == g.received.size();
    for (size_t i = 0; fits && i < g.sent.size(); i++) {
        const Transfer &s = g.sent[i], &r = g.received[i];
        fits = s.comm == r.comm && s.count == r.count && s.type == r.type;
        if (s.stream != r.stream)
            return refuse(ncclInvalidUsage, call,
                          "a send and its receive in different streams are not simulated");
    }
    if (!fits) return refuse(ncclInvalidUsage, call, "the sends and receives of the group do not match");
    for (size_t i = 0; i < g.sent.size(); i++) {
        size_t size = size_of(g.sent[i].type), bytes = g.sent[i].count * size;
        enqueue(g.received[i].stream, [=, to = g.received[i].address, from = g.sent[i].address] {
            copy("ncclSend", to, from, bytes, size);
        });
    }
    return ncclSuccess;
}

ncclResult_t create(const char* call, ncclComm_t* comm, int ranks, int rank, int device) {
    if (!comm || ranks < 1 || rank < 0 || rank >= ranks)
        return refuse(ncclInvalidArgument, call,
                      "there is no rank " + std::to_string(rank) + " of " + std::to_string(ranks) +
                          ", or a pointer is null");
    if (ranks > 1)
        return refuse(ncclInvalidUsage, call,
                      std::to_string(ranks) + " ranks are not simulated; a communicator can have one rank");
    *comm = new ncclComm{ranks, rank, device};
    return ncclSuccess;
}

ncclResult_t destroy(ncclComm_t comm) {
    delete comm;
    return ncclSuccess;
}

template <class T>
ncclResult_t query(ncclComm_t comm, T* out, T value) {
    if (!comm || !out) return ncclInvalidArgument;
    *out = value;
    return ncclSuccess;
}

}  // namespace
}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
    if (!version) return ncclInvalidArgument;
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    if (!id) return ncclInvalidArgument;
    std::random_device random;
    for (char& byte : id->internal) byte = (char)random();
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId, int rank) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return ncclUnhandledCudaError;
    return create("ncclCommInitRank", comm, ranks, rank, device);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t*) {
    return ncclCommInitRank(comm, ranks, id, rank);
}

ncclResult_t ncclCommInitAll(ncclComm_t* comm, int devices, const int* list) {
    return create("ncclCommInitAll", comm, devices, 0, list ? list[0] : 0);
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    return comm ? ncclSuccess : ncclInvalidArgument;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    return destroy(comm);
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    return destroy(comm);
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
    return query(comm, count, comm ? comm->ranks : 0);
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
    return query(comm, rank, comm ? comm->rank : 0);
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device) {
    return query(comm, device, comm ? comm->device : 0);
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    return query(comm, error, ncclSuccess);
}

const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
        case ncclSuccess:
            return "no error";
        case ncclUnhandledCudaError:
            return "unhandled cuda error";
        case ncclSystemError:
            return "unhandled system error";
        case ncclInternalError:
            return "internal error";
        case ncclInvalidArgument:
            return "invalid argument";
        case ncclInvalidUsage:
            return "invalid usage";
        case ncclRemoteError:
            return "remote process exited or there was a network error";
        case ncclInProgress:
            return "NCCL operation in progress";
        default:
            return "unknown result code";
    }
}

// Returns no text, because the errors have already been printed on stderr.
const char* ncclGetLastError(ncclComm_t) {
    return "";
}

ncclResult_t ncclGroupStart() {
    group.depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
    if (group.depth == 0) return refuse(ncclInvalidUsage, "ncclGroupEnd", "no ncclGroupStart came before it");
    if (--group.depth > 0) return ncclSuccess;
    Group all;
    std::swap(all, group);
    for (const auto& call : all.calls) call();
    return match_transfers(all);
}

ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t*, void*, ncclDataType_t, ncclScalarResidence_t,
                                      ncclComm_t) {
    return refuse(ncclInvalidUsage, "ncclRedOpCreatePreMulSum", "scaled sums are not simulated");
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
    return reduce("ncclAllReduce", from, to, count, type, op, 0, comm, stream);
}

ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                        int root, ncclComm_t comm, cudaStream_t stream) {
    return reduce("ncclReduce", from, to, count, type, op, root, comm, stream);
}

ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
    return reduce("ncclReduceScatter", from, to, count, type, op, 0, comm, stream);
}

ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    return exchange("ncclAllGather", from, to, count, type, 0, comm, stream);
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
    return exchange("ncclBroadcast", from, to, count, type, root, comm, stream);
}

ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                       cudaStream_t stream) {
    return exchange("ncclBcast", buffer, buffer, count, type, root, comm, stream);
}

ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return transfer("ncclSend", true, from, count, type, peer, comm, stream);
}

ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return transfer("ncclRecv", false, to, count, type, peer, comm, stream);
}

}  // extern "C"
#endif
