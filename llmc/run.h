// What main() of both trainers is: it runs the command, turns what goes wrong into one line on stderr and
// returns the exit status. Compiled once for both, as the libraries that it needs take long to build.
#pragma once
#include <string>

#include "llmc/model.h"

// describe_build: for --version, what the model was built for and with; needs no device.
// train_dtype: what `train` takes without --dtype.
int run(const char* program, Backend (*choose_backend)(), std::string (*describe_build)(),
        const char* train_dtype, int argc, char** argv);
