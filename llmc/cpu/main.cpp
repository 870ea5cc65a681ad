#ifdef LLMC_ONEDNN
#include <oneapi/dnnl/dnnl.h>
#endif

#include <string>

#include "llmc/cpu/dispatch.h"
#include "llmc/cpu/mpi.h"
#include "llmc/run.h"

namespace {

std::string describe_build() {
#ifdef LLMC_ONEDNN
    const dnnl_version_t* v = dnnl_version();
    std::string products = str("oneDNN ", v->major, ".", v->minor, ".", v->patch);
#else
    std::string products = "loops, without oneDNN";
#endif
    return str("for CPUs with ", cpu::instruction_sets(), "; matrix products by ", products, "; ", cpu::mpi_version());
}

}  // namespace

int main(int argc, char** argv) {
    return run("train_gpt", cpu::choose_backend, describe_build, "fp32", argc, argv);
}
