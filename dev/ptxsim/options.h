// The modes, from the environment variable PTXSIM: a list like "norace,seed=7,lazy". `PTXSIM=help` prints it.
#pragma once
#include <cstdint>
#include <string>

namespace ptxsim {

enum class Order { forward, reversed, random };  // of blocks, warps and turns

struct Options {
    bool bounds = true;            // [no]bounds: accesses against allocations, alignment
    bool uninit = true;            // [no]uninit
    bool race = true;              // [no]race
    bool leak = true;              // [no]leak: at exit
    bool host = true;              // [no]host: host code that touches device memory
    Order order = Order::forward;  // order=forward|reversed, seed=N (random)
    uint64_t seed = 0;
    bool lazy = false;    // lazy: streams run as late as their rules allow, in an order given by the seed
    std::string figures;  // figures, figures=FILE.json: at exit, as a table on stderr, or as JSON
    uint64_t memory = 80ull << 30;  // memory=BYTES (with K, M or G): of the device
    // fail-...=N: the N-th from now fails; 0: none does
    int64_t fail_allocation = 0;  // of device memory, cudaErrorMemoryAllocation
    int64_t fail_launch = 0;      // of a kernel, cudaErrorLaunchOutOfResources
    int64_t fail_heuristic = 0;   // cublasLtMatmulAlgoGetHeuristic, CUBLAS_STATUS_NOT_SUPPORTED
    int64_t fail_call = 0;        // of the runtime, and from then on all: cudaErrorECCUncorrectable
};

// Counts down one of these, and says whether it is this time.
inline bool fails_now(int64_t& left) {
    return left > 0 && --left == 0;
}

// The options of this process. Tests may change them between launches.
Options& options();

// Sets *out from a list as in PTXSIM. Throws std::invalid_argument that names the word it does not know.
void parse_options(const std::string& text, Options* out);

}  // namespace ptxsim
