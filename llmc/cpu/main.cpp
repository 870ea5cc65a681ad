// The program around train_gpt.cpp, apart from it so that the libraries that this includes, which take long
// to build, are built once, for every processor, and with less optimisation.
#include "llmc/main.h"
#include "llmc/cpu/dispatch.h"

int main(int argc, char** argv) {
    return run("train_gpt", cpu::choose_backend, "fp32", argc, argv);
}
