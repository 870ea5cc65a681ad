// Data parallelism between processes with MPI.
#pragma once
#include <memory>

#include "llmc/communicator.h"
#include "llmc/launch.h"

namespace cpu {

// The communicator of all ranks that `launch` describes. MPI starts only if there is more than one.
//   timeout: seconds after which a rank that waits for the others gives up
// It is an error if this program was built without MPI, or if MPI sees other ranks than `launch`.
std::unique_ptr<Communicator> connect(const Launch& launch, int timeout);

// For --version: "Open MPI 4.1.4", or "no MPI".
std::string mpi_version();

}  // namespace cpu
