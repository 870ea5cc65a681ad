// main() of both trainers: runs the command and turns what goes wrong into one line on stderr and an exit
// status.
#pragma once
#include <cstdio>
#include <exception>
#include <new>

#include "llmc/error.h"
#include "llmc/inference.h"
#include "llmc/options.h"
#include "llmc/trainer.h"

template <class Model>
int run(const char* program, int argc, char** argv) {
    try {
        Options options;
        bool help = !parse_options(argc, argv, program, options);
        int status = kExitDone;
        if (!help) switch (options.command) {
                case Command::train:
                    status = train<Model>(options.train);
                    break;
                case Command::generate:
                    Model::set_threads(options.generate.threads);
                    generate<Model>(options.generate);
                    break;
                case Command::eval:
                    Model::set_threads(options.eval.threads);
                    evaluate<Model>(options.eval);
                    break;
                case Command::dump:
                    Model::set_threads(options.dump.threads);
                    dump<Model>(options.dump);
                    break;
            }
        if (fflush(stdout) != 0 || ferror(stdout)) fail("stdout: cannot write all of the output");
        return status;
    } catch (const Error& e) {
        fprintf(stderr, "%s: error: %s\n", program, e.what());
        return e.status;
    } catch (const std::bad_alloc&) {
        fprintf(stderr, "%s: error: out of memory\n", program);
    } catch (const std::exception& e) {  // of a library
        fprintf(stderr, "%s: error: %s\n", program, e.what());
    }
    return kExitFailure;
}
