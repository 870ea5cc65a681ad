// What main() of both trainers is: it runs the command, turns what goes wrong into one line on stderr and
// returns the exit status. Compiled once for both, as the libraries that it needs take long to build.
#pragma once
#include "llmc/model.h"

// train_dtype: what `train` takes without --dtype.
int run(const char* program, Backend (*choose_backend)(), const char* train_dtype, int argc, char** argv);
