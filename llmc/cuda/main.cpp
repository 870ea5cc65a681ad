// The program around train_gpt.cu, apart from it because nvcc takes long over the libraries that this
// includes.
#include "llmc/main.h"

namespace gpu {
Backend backend();  // train_gpt.cu
}

int main(int argc, char** argv) {
    return run("train_gptcu", gpu::backend, "bf16", argc, argv);
}
