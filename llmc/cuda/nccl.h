// Data parallelism between GPUs with NCCL. The communicator is in llmc/cuda/nccl_communicator.h.
#pragma once
#include <memory>
#include <string>

#include "llmc/communicator.h"
#include "llmc/launch.h"

namespace gpu {

// The communicator of all ranks that `launch` describes, each of which has a GPU of its own. NCCL starts only
// if there is more than one.
//   timeout: seconds after which a rank that waits for the others gives up
// It is an error if this program was built without NCCL.
std::unique_ptr<Communicator> connect(const Launch& launch, int timeout);

// For --version: "NCCL 2.28.9", or "no NCCL".
std::string nccl_version();

}  // namespace gpu
