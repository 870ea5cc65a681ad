#include "llmc/run.h"

namespace gpu {  // train_gpt.cu
Backend backend();
std::string describe_build();
}

int main(int argc, char** argv) {
    return run("train_gptcu", gpu::backend, gpu::describe_build, "bf16", argc, argv);
}
