#include "llmc/cpu/dispatch.h"
#include "llmc/run.h"

int main(int argc, char** argv) {
    return run("train_gpt", cpu::choose_backend, "fp32", argc, argv);
}
