// main() of both trainers calls this. It runs the command, turns every failure into one line on stderr and
// returns the exit status. It is compiled once for both trainers, because its libraries compile slowly.
#pragma once
#include <string>

#include "llmc/model.h"

// describe_build: says for --version how the model was built; it needs no device.
// train_dtype: the default of --dtype for the command train.
int run(const char* program, Backend (*choose_backend)(), std::string (*describe_build)(),
        const char* train_dtype, int argc, char** argv);
