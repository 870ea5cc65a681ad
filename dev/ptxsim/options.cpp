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
    "PTXSIM=word,word,...  Everything that is checked is checked unless it is switched off.\n"
    "  nobounds           do not check accesses against allocations, nor their alignment\n"
    "  nouninit           do not look for reads of memory that nobody has written\n"
    "  norace             do not look for races in shared and global memory\n"
    "  noleak             do not list the allocations that are there at exit\n"
    "  nohost             let host code touch device memory\n"
    "  order=ORDER        of blocks, warps and turns: forward (the default), reversed or random\n"
    "  seed=N             order=random, and the order of streams with lazy, by this seed\n"
    "  lazy               streams run as late as their rules allow\n"
    "  figures            at exit, a table of figures by kernel on stderr\n"
    "  figures=FILE.json  the same as JSON in a file\n"
    "  memory=BYTES       of the device, with K, M or G; 80G without\n"
    "  fail-allocation=N  the N-th cudaMalloc fails\n"
    "  fail-launch=N      the N-th launch of a kernel fails\n"
    "  fail-heuristic=N   the N-th time that cuBLASLt is asked for an algorithm it finds none\n"
    "  fail-call=N        from the N-th call of the runtime on all fail: an uncorrectable ECC error\n"
    "  help               print this and exit\n"
    "A switch without its \"no\" (\"race\") turns a check on again; the last word counts.\n";

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
    if (digits == 0) unknown(word, with_unit ? "wants a number, with K, M or G" : "wants a number");
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
        if (equals != std::string::npos && value.empty()) unknown(word, "wants a file name");
        out->figures = value.empty() ? "-" : value;
    } else if (key == "order") {
        if (value == "forward")
            out->order = Order::forward;
        else if (value == "reversed")
            out->order = Order::reversed;
        else if (value == "random")
            out->order = Order::random;
        else
            unknown(word, "is none of the orders forward, reversed and random");
    } else if (key == "seed") {
        out->seed = number(word, value, false);
        out->order = Order::random;
    } else if (key == "memory") {
        out->memory = number(word, value, true);
    } else {
        unknown(word, "is no option");
    }
}

Options from_environment() {
    Options result;
    const char* text = std::getenv("PTXSIM");
    if (!text) return result;
    if (std::string(text) == "help") {
        std::fputs(kHelp, stdout);
        std::fflush(stdout);
        _exit(0);  // as below, without the functions of the exit, which want options
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
