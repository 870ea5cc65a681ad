#include "llmc/run.h"

#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>

#include "llmc/error.h"
#include "llmc/inference.h"
#include "llmc/options.h"
#include "llmc/trainer.h"

namespace {

// Returns the exit status.
int run_command(Options& options, const Backend& backend) {
    switch (options.command) {
        case Command::train:
            return train(backend, options.train);
        case Command::generate:
            backend.set_threads(options.generate.threads);
            generate(backend, options.generate);
            break;
        case Command::eval:
            backend.set_threads(options.eval.threads);
            evaluate(backend, options.eval);
            break;
        case Command::dump:
            backend.set_threads(options.dump.threads);
            dump(backend, options.dump);
            break;
    }
    return kExitDone;
}

}  // namespace

int run(const char* program, Backend (*choose_backend)(), const char* train_dtype, int argc, char** argv) {
    try {
        Options options;
        bool help = !parse_options(argc, argv, program, train_dtype, options);
        int status = help ? kExitDone : run_command(options, choose_backend());
        if (fflush(stdout) != 0 || ferror(stdout)) fail("stdout: cannot write all of the output");
        return status;
    } catch (const Error& e) {
        fprintf(stderr, "%s: error: %s\n", program, e.what());
        return e.status;
    } catch (const std::bad_alloc&) {
        fprintf(stderr, "%s: error: out of memory\n", program);
    } catch (const std::length_error&) {  // more elements than a vector can ever have
        fprintf(stderr, "%s: error: out of memory\n", program);
    } catch (const std::exception& e) {
        // A mistake of ours: what libraries throw is to be caught where they are called.
        fprintf(stderr, "%s: error: internal error, please report it: %s\n", program,
                printable(e.what()).c_str());
    }
    return kExitFailure;
}
