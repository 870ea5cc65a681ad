// A communicator, and the work of its calls in a stream.
#pragma once
#if __has_include(<nccl.h>)  // not every toolkit has this header, and without it no program can call NCCL
#include <nccl.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "dev/ptxsim/nccl_peers.h"
#include "dev/ptxsim/runtime.h"

namespace ptxsim {

struct NcclComm {
    std::unique_ptr<NcclPeers> peers;
    int device = 0;
    bool blocking = true, finalized = false, busy = false;
    // Another thread may abort the communicator while one waits for its work.
    std::atomic<bool> aborted = false;
    std::atomic<ncclResult_t> error = ncclSuccess;
    OperationRef last;  // its calls run in the order in which they were made
};

enum class NcclKind { all_reduce, reduce, reduce_scatter, all_gather, broadcast, send, receive };

// One call, or one of a group.
struct NcclPart {
    NcclKind kind;
    NcclCall call;
    uint64_t from = 0, to = 0;      // 0: this rank sends or receives nothing
    size_t sent = 0, received = 0;  // bytes
    int peer = -1;                  // of a send or receive
    cudaStream_t stream = nullptr;
    uint64_t number = 0;  // of its post; 0: not posted yet
    bool bad_target = false, matched = false, over = false;
};

size_t size_of(ncclDataType_t type);  // 0 where it is not simulated
bool can_reduce(ncclDataType_t type);
std::string in_words(const NcclCall& call);

// Puts calls into their streams as one operation, as a group does.
ncclResult_t enqueue(const std::shared_ptr<NcclComm>& comm, std::vector<NcclPart> parts);

}  // namespace ptxsim
#endif
