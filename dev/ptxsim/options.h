// The options, from the environment variable PTXSIM: a list of words like "norace,seed=7,lazy". `PTXSIM=help`
// prints what they mean.
#pragma once
#include <cstdint>
#include <string>

namespace ptxsim {

enum class Order { forward, reversed, random };  // the order of blocks, of warps, and of their turns

struct Options {
    bool bounds = true;            // [no]bounds: check that accesses are aligned and inside of allocations
    bool uninit = true;            // [no]uninit: look for reads of memory that nobody has written
    bool race = true;              // [no]race
    bool leak = true;              // [no]leak: list the allocations that were never freed
    bool host = true;              // [no]host: look for host code that touches device memory
    Order order = Order::forward;  // order=forward, order=reversed, order=random; seed=N implies random
    uint64_t seed = 0;
    bool lazy = false;    // lazy: streams run as late as their rules allow, in an order that the seed decides
    std::string figures;  // figures, figures=FILE.json: what is written at exit; "-" is the table on stderr
    uint64_t devices = 1;           // devices=N: how many there are; a process uses one of them
    uint64_t nccl_timeout = 300;    // nccl-timeout=SECONDS: how long a collective waits for other ranks
    uint64_t memory = 80ull << 30;  // memory=BYTES (with K, M or G): the size of the device's memory
    // fail-...=N: the N-th call from now on fails; 0: no call fails.
    int64_t fail_allocation = 0;  // cudaMalloc returns cudaErrorMemoryAllocation
    int64_t fail_launch = 0;      // a launch returns cudaErrorLaunchOutOfResources
    int64_t fail_heuristic = 0;   // cublasLtMatmulAlgoGetHeuristic returns CUBLAS_STATUS_NOT_SUPPORTED
    int64_t fail_call = 0;        // this and all later calls of the runtime: cudaErrorECCUncorrectable
};

// Counts one of these down. True if this is the call that has to fail.
inline bool fails_now(int64_t& left) {
    return left > 0 && --left == 0;
}

// The options of this process. Tests may change them between launches.
Options& options();

// Sets *out from a list of words. Throws a std::invalid_argument that names the word that is wrong.
void parse_options(const std::string& text, Options* out);

}  // namespace ptxsim
