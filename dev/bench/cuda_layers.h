// The measurements that dev/bench/cuda_layers.cu makes and cuda_layers.cpp prints. These are two files,
// because nvcc compiles the libraries of the second one slowly.
#pragma once
#include <functional>
#include <string>
#include <vector>

namespace layers_bench {

struct Settings {
    int batch = 16, seq = 1024;  // sizes for the layers
    int layers = 12, heads = 12, channels = 768, vocab_size = 50257;
    std::vector<int> lengths = {1024, 2048, 4096, 8192, 16384, 32768};  // T for attention alone
    bool bf16 = true;
    bool attention_only = false;
    int repeat = 20;
    bool flushes_cache = true;                 // flush the L2 cache before each call
    size_t copied = (size_t)1 << 30;           // bytes in the copy that gives the ceiling of copies
    std::vector<int> products = {4096, 8192};  // sizes of the products that give their ceiling

    // For the simulator, where everything runs but the numbers mean nothing.
    static Settings quick() {
        Settings s;
        s.batch = 1, s.seq = 48, s.layers = 1, s.heads = 2, s.channels = 64, s.vocab_size = 300;
        s.lengths = {64, 128};
        s.repeat = 1, s.flushes_cache = false, s.copied = 1 << 16, s.products = {64};
        return s;
    }
};

struct Layer {
    std::string name;
    double bytes;       // the minimum to read and write: every input and output once
    double operations;  // of matrix products; a multiply-add counts 2
    double ms = 0;
    std::string error = "";  // the reason if there is no time
};

// One call of attention with one sequence length.
struct Attention {
    std::string attention, kernel;
    int B, T;
    Layer forward, backward;
};

struct Results {
    std::string device;
    double copy_rate = 0;     // bytes per second, read and written
    double product_rate = 0;  // operations per second
    std::vector<Layer> layers;
    std::vector<Attention> attention;
};

// Fills in `results` and calls changed() after each line.
void measure(const Settings& settings, Results& results, const std::function<void()>& changed);

}  // namespace layers_bench
