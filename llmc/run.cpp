#include "llmc/run.h"

#include <zlib.h>

#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "llmc/error.h"
#include "llmc/inference.h"
#include "llmc/options.h"
#include "llmc/trainer.h"
#include "llmc/version.h"

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

// What --version prints.
std::string version_text(const char* program, const std::string& build) {
#ifdef __clang__
    const char* compiler = __VERSION__;
#else
    const char* compiler = "GCC " __VERSION__;
#endif
    return str(program_version(), "\nprogram    ", program, "\nmodel      ", build, "\ncompiler   ", compiler,
               "\nlibraries  CLI11 ", CLI11_VERSION, ", nlohmann-json ", NLOHMANN_JSON_VERSION_MAJOR, ".",
               NLOHMANN_JSON_VERSION_MINOR, ".", NLOHMANN_JSON_VERSION_PATCH, ", zlib ", zlibVersion());
}

}  // namespace

int run(const char* program, Backend (*choose_backend)(), std::string (*describe_build)(),
        const char* train_dtype, int argc, char** argv) {
    try {
        Options options;
        auto version = [&] { return version_text(program, describe_build()); };
        bool has_command = parse_options(argc, argv, program, version, train_dtype, options);
        options.train.program = program_version();
        int status = has_command ? run_command(options, choose_backend()) : kExitDone;
        if (fflush(stdout) != 0 || ferror(stdout)) fail("stdout: cannot write all of the output");
        return status;
    } catch (const Error& e) {
        // Without a text, another rank of a training has said it.
        if (*e.what()) fprintf(stderr, "%s: error: %s\n", program, e.what());
        return e.status;
    } catch (const std::bad_alloc&) {
        fprintf(stderr, "%s: error: out of memory\n", program);
    } catch (const std::length_error&) {  // thrown for more elements than a vector can ever have
        fprintf(stderr, "%s: error: out of memory\n", program);
    } catch (const std::exception& e) {
        // This is a mistake of ours, because exceptions of libraries must be caught where they are called.
        fprintf(stderr, "%s: error: internal error, please report it: %s\n", program,
                printable(e.what()).c_str());
    }
    return kExitFailure;
}
