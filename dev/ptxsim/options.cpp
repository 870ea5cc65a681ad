#include "dev/ptxsim/options.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>

namespace ptxsim {
namespace {

const char kHelp[] =
    "PTXSIM=word,word,...  All checks are on unless a word switches them off.\n"
    "  nobounds           do not check that accesses are aligned and inside of allocations\n"
    "  nouninit           do not look for reads of memory that nobody has written\n"
    "  norace             do not look for races in shared and global memory\n"
    "  noleak             do not list the allocations that were never freed\n"
    "  nohost             let host code touch device memory\n"
    "  order=ORDER        run blocks and warps in this order: forward (the default), reversed or random\n"
    "  seed=N             the seed of order=random, which it implies, and of the order of lazy streams\n"
    "  lazy               run the work of streams as late as their rules allow\n"
    "  figures            print a table of figures of each kernel on stderr at exit\n"
    "  figures=FILE.json  write the same figures as JSON to a file\n"
    "  memory=BYTES       the size of the device's memory (K, M and G are units); 80G by default\n"
    "  devices=N          the number of devices, of which each process uses one; 1 by default, and then "
    "every process\n"
    "                     has a device of its own\n"
    "  nccl-timeout=N     how many seconds NCCL's calls wait for other ranks before this is reported; 300 by "
    "default\n"
    "  fail-allocation=N  let the N-th cudaMalloc fail\n"
    "  fail-launch=N      let the N-th launch of a kernel fail\n"
    "  fail-heuristic=N   let cuBLASLt find no algorithm when it is asked for the N-th time\n"
    "  fail-call=N        let the N-th call of the runtime and all later ones fail with an ECC error\n"
    "  help               print this and exit\n"
    "A word without its \"no\" (\"race\") switches a check on again. The last word wins.\n";

[[noreturn]] void unknown(const std::string& word, const std::string& why) {
    throw std::invalid_argument("'" + word + "' " + why + "; PTXSIM=help lists the options");
}

uint64_t number(const std::string& word, const std::string& value, bool with_unit) {
    size_t digits = 0;
    unsigned long long n = 0;
    try {
        if (!value.empty() && value[0] >= '0' && value[0] <= '9') n = std::stoull(value, &digits);
    } catch (const std::out_of_range&) {
        unknown(word, "is too large a number");
    }
    int shift = 0;
    std::string unit = value.substr(digits);
    if (with_unit && unit == "K")
        shift = 10;
    else if (with_unit && unit == "M")
        shift = 20;
    else if (with_unit && unit == "G")
        shift = 30;
    else if (!unit.empty())
        digits = 0;
    if (digits == 0)
        unknown(word, with_unit ? "needs a number, which may end in K, M or G" : "needs a number");
    if (n > (std::numeric_limits<uint64_t>::max() >> shift)) unknown(word, "is too large a number");
    return n << shift;
}

void parse_word(const std::string& word, Options* out) {
    bool on = word.rfind("no", 0) != 0;
    std::string bare = on ? word : word.substr(2);
    const struct {
        const char* name;
        bool Options::*flag;
    } flags[] = {{"bounds", &Options::bounds}, {"uninit", &Options::uninit}, {"race", &Options::race},
                 {"leak", &Options::leak},     {"host", &Options::host},     {"lazy", &Options::lazy}};
    for (const auto& f : flags)
        if (bare == f.name) {
            out->*f.flag = on;
            return;
        }
    size_t equals = word.find('=');
    std::string key = word.substr(0, equals);
    std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
    const struct {
        const char* name;
        int64_t Options::*left;
    } failures[] = {{"fail-allocation", &Options::fail_allocation},
                    {"fail-launch", &Options::fail_launch},
                    {"fail-heuristic", &Options::fail_heuristic},
                    {"fail-call", &Options::fail_call}};
    for (const auto& f : failures)
        if (key == f.name) {
            uint64_t n = number(word, value, false);
            if (n > (uint64_t)std::numeric_limits<int64_t>::max()) unknown(word, "is too large a number");
            out->*f.left = (int64_t)n;
            return;
        }
    if (key == "figures") {
        if (equals != std::string::npos && value.empty()) unknown(word, "needs a file name");
        out->figures = value.empty() ? "-" : value;
    } else if (key == "order") {
        if (value == "forward")
            out->order = Order::forward;
        else if (value == "reversed")
            out->order = Order::reversed;
        else if (value == "random")
            out->order = Order::random;
        else
            unknown(word, "is not an order: expected forward, reversed or random");
    } else if (key == "seed") {
        out->seed = number(word, value, false);
        out->order = Order::random;
    } else if (key == "memory") {
        out->memory = number(word, value, true);
    } else if (key == "devices") {
        out->devices = number(word, value, false);
        if (out->devices < 1 || out->devices > 1024) unknown(word, "has to be from 1 to 1024");
    } else if (key == "nccl-timeout") {
        out->nccl_timeout = number(word, value, false);
    } else {
        unknown(word, "is not an option");
    }
}

Options from_environment() {
    Options result;
    const char* text = std::getenv("PTXSIM");
    if (!text) return result;
    if (std::string(text) == "help") {
        std::fputs(kHelp, stdout);
        std::fflush(stdout);
        _exit(0);  // not exit(), because the functions that run at exit need the options
    }
    try {
        parse_options(text, &result);
    } catch (const std::invalid_argument& e) {
        std::fprintf(stderr, "ptxsim: PTXSIM: %s\n", e.what());
        _exit(2);
    }
    return result;
}

}  // namespace

Options& options() {
    static Options& current = *new Options(from_environment());
    return current;
}

void parse_options(const std::string& text, Options* out) {
    Options result = *out;
    for (size_t begin = 0; begin <= text.size();) {
        size_t end = std::min(text.find(',', begin), text.size());
        if (end > begin) parse_word(text.substr(begin, end - begin), &result);
        begin = end + 1;
    }
    *out = result;
}

}  // namespace ptxsim
