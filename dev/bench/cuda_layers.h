// What dev/bench/cuda_layers.cu measures and cuda_layers.cpp prints: two files, because nvcc takes long over
// the libraries of the second.
#pragma once
#include <functional>
#include <string>
#include <vector>

namespace layers_bench {

struct Settings {
    int batch = 16, seq = 1024;  // of the layers
    int layers = 12, heads = 12, channels = 768, vocab_size = 50257;
    std::vector<int> lengths = {1024, 2048, 4096, 8192, 16384, 32768};  // of attention alone
    bool bf16 = true;
    bool attention_only = false;
    int repeat = 20;
    bool flushes_cache = true;                 // the L2 cache, before each call
    size_t copied = (size_t)1 << 30;           // bytes, for the ceiling of copies
    std::vector<int> products = {4096, 8192};  // sizes, for that of matrix products

    // For the simulator, where all runs and no figure means anything.
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
    double bytes;       // the least that must be read and written: every input and output once
    double operations;  // of matrix products, 2 a multiply-add
    double ms = 0;
    std::string error = "";  // why there is no time
};

// One call of attention, at a sequence length.
struct Attention {
    std::string attention, kernel;
    int B, T;
    Layer forward, backward;
};

struct Results {
    std::string device;
    double copy_rate = 0;     // bytes a second, read and written
    double product_rate = 0;  // operations a second
    std::vector<Layer> layers;
    std::vector<Attention> attention;
};

// Calls changed() after each line of the results.
void measure(const Settings& settings, Results& results, const std::function<void()>& changed);

}  // namespace layers_bench
