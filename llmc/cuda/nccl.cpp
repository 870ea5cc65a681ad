#include "llmc/cuda/nccl.h"

#include "llmc/error.h"

#if __has_include(<nccl.h>) && !defined(LLMC_NO_NCCL)
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "llmc/cuda/nccl_communicator.h"
#include "llmc/rendezvous.h"
#include "llmc/version.h"

namespace gpu {
namespace {

// Chooses the GPU of this rank and returns a name for it that no other GPU has.
std::string choose_device(const Launch& launch) {
    int devices;
    check(cudaGetDeviceCount(&devices));
    // A launcher may show each of its processes only the GPU that it gives to it.
    const int device = devices == 1 ? 0 : launch.local_rank;
    if (device >= devices)
        fail("this is local rank ", launch.local_rank, ", but this machine has only ", devices,
             " GPUs that can be seen: expected a GPU for each rank");
    check(cudaSetDevice(device));
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device));
    char host[256] = "";
    ::gethostname(host, sizeof host - 1);
    return str(host, "/", std::string(properties.uuid.bytes, sizeof properties.uuid.bytes));
}

// Fails at all ranks if one of them has no GPU of its own. Rank 0 says why.
//   device, error: of this rank
void agree_on_devices(Links& links, const Launch& launch, const std::string& device,
                      const std::string& error) {
    const std::vector<std::string> errors = links.gather(error), devices = links.gather(device);
    for (int rank = 0; rank < launch.ranks; rank++) {
        const int first = (int)(std::find(devices.begin(), devices.end(), devices[rank]) - devices.begin());
        std::string fault;
        if (!errors[rank].empty())
            fault = str("rank ", rank, ": ", errors[rank]);
        else if (first < rank)
            fault = str("ranks ", first, " and ", rank, " have the same GPU: expected a GPU for each rank");
        if (fault.empty()) continue;
        if (launch.rank == 0) fprintf(stderr, "train_gptcu: error: %s\n", printable(fault).c_str());
        links.leave();
        throw Error(kExitFailure, "");
    }
}

}  // namespace

std::unique_ptr<Communicator> connect(const Launch& launch, int timeout) {
    if (launch.ranks == 1) return std::make_unique<Communicator>();
    std::string device, error;
    try {
        device = choose_device(launch);
    } catch (const Error& e) {  // the other ranks must know of it
        error = e.what();
    }
    Rendezvous meeting(launch, str("train_gptcu of ", program_version(), " with ", nccl_version()),
                       {.timeout = (double)timeout});
    ncclUniqueId id;
    const std::string bytes = meeting.broadcast([&] {
        if (ncclGetUniqueId(&id) != ncclSuccess) fail("NCCL: ", ncclGetLastError(nullptr));
        return std::string(id.internal, sizeof id.internal);
    });
    if (bytes.size() != sizeof id.internal) fail("rank 0 sent an id of NCCL that cannot be read");
    std::memcpy(id.internal, bytes.data(), sizeof id.internal);
    // One rank of each machine, because rank 0 may be lost with its machine.
    const bool speaks = launch.rank == 1 || launch.local_rank == 0;
    Links links(launch.rank, meeting.take_connections(), timeout, speaks);
    agree_on_devices(links, launch, device, error);
    auto communicator = std::make_unique<Nccl>(launch.rank, launch.ranks, std::move(links));
    try {
        communicator->start(id);
    } catch (const Error& e) {
        communicator->abort(e.status);
        throw;
    }
    return communicator;
}

std::string nccl_version() {
    int version = 0;
    ncclGetVersion(&version);
    return str("NCCL ", version / 10000, ".", version / 100 % 100, ".", version % 100);
}

}  // namespace gpu

#else

namespace gpu {

std::unique_ptr<Communicator> connect(const Launch& launch, int) {
    if (launch.ranks > 1)
        refuse_ranks(launch,
                     "this train_gptcu was built without NCCL: expected nccl.h and libnccl, and a new build");
    return std::make_unique<Communicator>();
}

std::string nccl_version() {
    return "no NCCL";
}

}  // namespace gpu
#endif
