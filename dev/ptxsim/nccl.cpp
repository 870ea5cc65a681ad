// NCCL's calls: their checks, groups, and communicators. nccl_work.cpp does the work, nccl_peers.cpp connects
// the ranks.
#if __has_include(<nccl.h>)
#include <nccl.h>

#include <chrono>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dev/ptxsim/nccl_work.h"
#include "dev/ptxsim/operand.h"
#include "dev/ptxsim/report.h"

struct ncclComm {
    std::shared_ptr<ptxsim::NcclComm> state;
};

namespace ptxsim {
namespace {

using Shared = std::shared_ptr<NcclComm>;

// Group calls: what the outermost ncclGroupEnd of this thread does, for each communicator in the order of its
// first call.
struct Group {
    int depth = 0;
    std::vector<Shared> joining;
    std::vector<std::pair<Shared, std::vector<NcclPart>>> calls;
};
thread_local Group group;

ncclResult_t check(const char* call, ncclComm_t comm, ncclDataType_t type, int root_or_peer) {
    if (!comm) return refuse(ncclInvalidArgument, call, "the communicator is null");
    if (!size_of(type))
        return refuse(ncclInvalidArgument, call, "data type " + std::to_string(type) + " is not simulated");
    if (root_or_peer < 0 || root_or_peer >= comm->state->peers->ranks)
        return refuse(ncclInvalidArgument, call, "there is no rank " + std::to_string(root_or_peer));
    return ncclSuccess;
}

// Whether the communicator is ready for a call.
ncclResult_t check_ready(const char* call, const NcclComm& comm) {
    if (comm.finalized) return refuse(ncclInvalidUsage, call, "the communicator has been finalized");
    if (ncclResult_t error = comm.error) return refuse(error, call, "the communicator has failed before");
    if (!comm.peers->all_joined() || comm.busy)
        return refuse(
            ncclInvalidUsage, call,
            "the communicator is not blocking, and ncclCommGetAsyncError has not said that it is ready");
    return ncclSuccess;
}

// In the lazy mode, a communicator that is not blocking stays busy until the program asks whether it is.
ncclResult_t started(NcclComm* comm) {
    comm->busy = !comm->blocking && options().lazy;
    return comm->busy ? ncclInProgress : ncclSuccess;
}

ncclResult_t add(ncclComm_t comm, NcclPart part) {
    const Shared& state = comm->state;
    if (ncclResult_t r = check_ready(part.call.name, *state)) return r;
    if ((part.sent && !part.from) || (part.received && !part.to))
        return refuse(ncclInvalidArgument, part.call.name, "a buffer is null");
    if (!group.depth) {
        ncclResult_t r = enqueue(state, {std::move(part)});
        return r ? r : started(state.get());
    }
    for (auto& [other, parts] : group.calls)
        if (other == state) {
            parts.push_back(std::move(part));
            return ncclSuccess;
        }
    group.calls.push_back({state, {std::move(part)}});
    return ncclSuccess;
}

// A call of all ranks.
//   sends, receives: how often `count` this rank sends and receives
//   op, root: -1 if the call has none
ncclResult_t collective(NcclKind kind, const char* call, const void* from, int sends, void* to, int receives,
                        size_t count, ncclDataType_t type, int op, int root, ncclComm_t comm,
                        cudaStream_t stream) {
    if (ncclResult_t r = check(call, comm, type, root < 0 ? 0 : root)) return r;
    if (op >= (int)ncclNumOps || (op >= 0 && comm->state->peers->ranks > 1 && !can_reduce(type)))
        return refuse(ncclInvalidArgument, call,
                      op >= (int)ncclNumOps ? "operation " + std::to_string(op) + " is not simulated"
                                            : "sums of float8 are not simulated");
    NcclPart p;
    p.kind = kind;
    std::strncpy(p.call.name, call, sizeof p.call.name - 1);
    p.call.count = count, p.call.type = type, p.call.op = op, p.call.root = root;
    p.from = sends ? (uint64_t)from : 0, p.sent = (size_t)sends * count * size_of(type);
    p.to = receives ? (uint64_t)to : 0, p.received = (size_t)receives * count * size_of(type);
    p.stream = stream;
    return add(comm, std::move(p));
}

int ranks_of(ncclComm_t comm) {
    return comm ? comm->state->peers->ranks : 1;
}

bool is_rank(ncclComm_t comm, int rank) {
    return comm && comm->state->peers->rank == rank;
}

ncclResult_t transfer(const char* call, NcclKind kind, const void* address, size_t count, ncclDataType_t type,
                      int peer, ncclComm_t comm, cudaStream_t stream) {
    if (ncclResult_t r = check(call, comm, type, peer)) return r;
    if (!group.depth && is_rank(comm, peer))
        return refuse(ncclInvalidUsage, call,
                      "a send to or a receive from the own rank outside of a group would wait forever");
    NcclPart p;
    p.kind = kind;
    std::strncpy(p.call.name, call, sizeof p.call.name - 1);
    p.call.count = count, p.call.type = type;
    p.peer = peer;
    p.stream = stream;
    bool sends = kind == NcclKind::send;
    (sends ? p.from : p.to) = (uint64_t)address;
    (sends ? p.sent : p.received) = count * size_of(type);
    return add(comm, std::move(p));
}

// Within a group, a rank sends to itself as often as it receives from itself.
bool fits_itself(const Shared& comm, const std::vector<NcclPart>& parts) {
    int sends = 0;
    for (const NcclPart& p : parts)
        if (p.peer == comm->peers->rank) sends += p.kind == NcclKind::send ? 1 : -1;
    return sends == 0;
}

// Waits until all ranks have joined.
ncclResult_t await_ranks(const NcclComm& comm) {
    const char* call = "ncclCommInitRank";
    const NcclPeers& peers = *comm.peers;
    auto end = std::chrono::steady_clock::now() + std::chrono::seconds(options().nccl_timeout);
    while (!peers.all_joined()) {
        if (std::string lost = peers.lost(); !lost.empty()) return refuse(ncclRemoteError, call, lost);
        if (std::chrono::steady_clock::now() > end) {
            std::string missing;
            for (int r = 0; r < peers.ranks; r++)
                if (peers.state(r) == NcclPeers::absent) missing += " " + std::to_string(r);
            return refuse(ncclSystemError, call,
                          "rank " + std::to_string(peers.rank) + " has waited " +
                              std::to_string(options().nccl_timeout) + " s for these ranks:" + missing);
        }
        std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    return ncclSuccess;
}

ncclResult_t create(const char* call, ncclComm_t* comm, int ranks, const ncclUniqueId& id, int rank,
                    bool blocking) {
    if (!comm || ranks < 1 || rank < 0 || rank >= ranks)
        return refuse(ncclInvalidArgument, call,
                      "there is no rank " + std::to_string(rank) + " of " + std::to_string(ranks) +
                          ", or a pointer is null");
    *comm = nullptr;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return ncclUnhandledCudaError;
    std::string name, why;
    for (int i = 0; i < 16; i++) name += hex((unsigned char)id.internal[i] + 256).substr(3);
    auto state = std::make_shared<NcclComm>();
    state->device = device;
    state->blocking = blocking;
    state->peers = NcclPeers::join(name, ranks, rank, options().devices > 1 ? device : -1, &why);
    if (!state->peers) return refuse(ncclInvalidUsage, call, why);
    if (group.depth) {
        if (blocking) group.joining.push_back(state);
    } else if (blocking) {
        if (ncclResult_t r = await_ranks(*state)) return r;
    }
    *comm = new ncclComm{state};
    return blocking ? ncclSuccess : ncclInProgress;
}

// Waits for the communicator's work.
void finish(NcclComm* comm) {
    if (comm->last && !comm->aborted) complete({comm->last});
    comm->finalized = true;
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

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
    return create("ncclCommInitRank", comm, ranks, id, rank, true);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
    const char* call = "ncclCommInitRankConfig";
    ncclConfig_t initial = NCCL_CONFIG_INITIALIZER;
    if (config && config->magic != initial.magic)
        return refuse(ncclInvalidArgument, call, "the configuration was not set to NCCL_CONFIG_INITIALIZER");
    return create(call, comm, ranks, id, rank, !config || config->blocking != 0);
}

ncclResult_t ncclCommInitAll(ncclComm_t* comm, int devices, const int*) {
    const char* call = "ncclCommInitAll";
    if (devices > 1) return refuse(ncclInvalidUsage, call, "a process can have only one of the devices here");
    ncclUniqueId id;
    ncclGetUniqueId(&id);
    return create(call, comm, devices, id, 0, true);
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    if (!comm) return ncclInvalidArgument;
    if (ncclResult_t r = check_ready("ncclCommFinalize", *comm->state)) return r;
    if (comm->state->blocking) {
        finish(comm->state.get());
        return ncclSuccess;
    }
    comm->state->finalized = true;
    return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (!comm) return ncclSuccess;
    finish(comm->state.get());
    comm->state->peers->set_state(NcclPeers::left);
    delete comm;
    return ncclSuccess;
}

// Another thread may call this while one waits for work of the communicator, which then ends.
ncclResult_t ncclCommAbort(ncclComm_t comm) {
    if (!comm) return ncclSuccess;
    comm->state->aborted = true;
    comm->state->peers->set_state(NcclPeers::aborted);
    delete comm;
    return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
    return query(comm, count, ranks_of(comm));
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
    return query(comm, rank, comm ? comm->state->peers->rank : 0);
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device) {
    return query(comm, device, comm ? comm->state->device : 0);
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* out) {
    if (!comm || !out) return ncclInvalidArgument;
    NcclComm& c = *comm->state;
    *out = c.error;
    if (*out == ncclSuccess && !c.peers->lost().empty()) *out = c.error = ncclRemoteError;
    if (*out != ncclSuccess) return ncclSuccess;
    if (c.busy || !c.peers->all_joined()) {
        c.busy = false;
        *out = ncclInProgress;
    } else if (!c.blocking && c.finalized && c.last && !c.last->done) {
        complete({c.last}, 1);
        *out = ncclInProgress;
    }
    return ncclSuccess;
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
    for (const Shared& comm : all.joining)
        if (ncclResult_t r = await_ranks(*comm)) return r;
    ncclResult_t result = ncclSuccess;
    for (auto& [comm, parts] : all.calls) {
        if (!fits_itself(comm, parts))
            return refuse(ncclInvalidUsage, "ncclGroupEnd",
                          "the sends and receives of the group do not match");
        if (ncclResult_t r = enqueue(comm, std::move(parts))) return r;
        if (ncclResult_t r = started(comm.get())) result = r;
    }
    return result;
}

ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t*, void*, ncclDataType_t, ncclScalarResidence_t,
                                      ncclComm_t) {
    return refuse(ncclInvalidUsage, "ncclRedOpCreatePreMulSum", "scaled sums are not simulated");
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
    return collective(NcclKind::all_reduce, "ncclAllReduce", from, 1, to, 1, count, type, op, -1, comm,
                      stream);
}

ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                        int root, ncclComm_t comm, cudaStream_t stream) {
    return collective(NcclKind::reduce, "ncclReduce", from, 1, to, is_rank(comm, root), count, type, op, root,
                      comm, stream);
}

ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
    return collective(NcclKind::reduce_scatter, "ncclReduceScatter", from, ranks_of(comm), to, 1, count, type,
                      op, -1, comm, stream);
}

ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    return collective(NcclKind::all_gather, "ncclAllGather", from, 1, to, ranks_of(comm), count, type, -1, -1,
                      comm, stream);
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
    return collective(NcclKind::broadcast, "ncclBroadcast", from, is_rank(comm, root), to, 1, count, type, -1,
                      root, comm, stream);
}

ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                       cudaStream_t stream) {
    return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}

ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return transfer("ncclSend", NcclKind::send, from, count, type, peer, comm, stream);
}

ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return transfer("ncclRecv", NcclKind::receive, to, count, type, peer, comm, stream);
}

}  // extern "C"
#endif
