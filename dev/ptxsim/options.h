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
    int64_t fail_allocation = 0;    // fail-allocation=N: the N-th cudaMalloc from now says out of memory
};

// The options of this process. Tests may change them between launches.
Options& options();

// Sets *out from a list as in PTXSIM. Throws std::invalid_argument that names the word it does not know.
void parse_options(const std::string& text, Options* out);

}  // namespace ptxsim
