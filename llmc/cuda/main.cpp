#include "llmc/run.h"

namespace gpu {
Backend backend();  // train_gpt.cu
}

int main(int argc, char** argv) {
    return run("train_gptcu", gpu::backend, "bf16", argc, argv);
}
