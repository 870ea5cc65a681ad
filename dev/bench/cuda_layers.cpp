// The command line, table and JSON of dev/bench/cuda_layers.cu.
//
//   build/cuda_layers [--batch 16] [--seq 1024] [--dtype bf16|fp32] [--json FILE]
//   build/cuda_layers --attention-only [--lengths 1024,2048,...]
//
// First it measures two ceilings of the GPU: a copy in its memory, and a large product by cuBLASLt. Then it
// measures each layer, and prints its time, its rates of bytes and of operations, and the shares of both
// ceilings that it reaches. build/cuda_layers_sim --quick runs the same code on dev/ptxsim, where the numbers
// mean nothing.
#include "dev/bench/cuda_layers.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "llmc/error.h"

namespace {

using namespace layers_bench;
using Json = nlohmann::ordered_json;

// Bytes and operations per second; 0 if there is no time.
double bytes_rate(const Layer& layer) {
    return layer.ms > 0 ? layer.bytes / layer.ms * 1e3 : 0;
}
double operations_rate(const Layer& layer) {
    return layer.ms > 0 ? layer.operations / layer.ms * 1e3 : 0;
}

Json to_json(const Layer& layer, const Results& results) {
    if (!layer.error.empty()) return {{"layer", layer.name}, {"error", layer.error}};
    return {{"layer", layer.name},
            {"ms", layer.ms},
            {"bytes", layer.bytes},
            {"operations", layer.operations},
            {"gb_s", bytes_rate(layer) / 1e9},
            {"tflop_s", operations_rate(layer) / 1e12},
            {"share_of_copy", bytes_rate(layer) / results.copy_rate},
            {"share_of_product", operations_rate(layer) / results.product_rate}};
}

Json to_json(const Settings& s, const Results& results) {
    Json layers = Json::array(), attention = Json::array();
    for (const Layer& layer : results.layers) layers.push_back(to_json(layer, results));
    for (const Attention& a : results.attention)
        attention.push_back({{"attention", a.attention},
                             {"kernel", a.kernel},
                             {"B", a.B},
                             {"T", a.T},
                             {"H", s.heads},
                             {"D", s.channels / s.heads},
                             {"forward", to_json(a.forward, results)},
                             {"backward", to_json(a.backward, results)}});
    return {{"device", results.device},
            {"dtype", s.bf16 ? "bf16" : "fp32"},
            {"batch", s.batch},
            {"seq", s.seq},
            {"channels", s.channels},
            {"heads", s.heads},
            {"vocab_size", s.vocab_size},
            {"copy_gb_s", results.copy_rate / 1e9},
            {"product_tflop_s", results.product_rate / 1e12},
            {"layers", layers},
            {"attention", attention}};
}

void print(const Layer& layer, const Results& results) {
    printf("%-38s ", layer.name.c_str());
    if (!layer.error.empty()) {
        printf("%s\n", layer.error.c_str());
        return;
    }
    printf("%9.4f %9.1f %9.1f %8.0f %8.1f %6.0f%% %8.0f%%\n", layer.ms, layer.bytes / 1e6,
           layer.operations / 1e9, bytes_rate(layer) / 1e9, operations_rate(layer) / 1e12,
           100 * bytes_rate(layer) / results.copy_rate, 100 * operations_rate(layer) / results.product_rate);
}

// Prints the new results and writes all of them to the file, so that a run that is stopped keeps what it has
// measured.
class Report {
  public:
    Report(const Settings& settings, const Results& results, const std::string& file)
        : settings_(settings), results_(results), file_(file) {}

    void update() {
        if (!headed_) {
            printf("%s: copies %.0f GB/s, products %.1f TFLOP/s in %s\n", results_.device.c_str(),
                   results_.copy_rate / 1e9, results_.product_rate / 1e12, settings_.bf16 ? "bf16" : "fp32");
            printf("%-38s %9s %9s %9s %8s %8s %7s %9s\n", "", "ms", "MB", "GFLOP", "GB/s", "TFLOP/s",
                   "of copy", "of product");
            headed_ = true;
        }
        for (; layers_ < results_.layers.size(); layers_++) print(results_.layers[layers_], results_);
        for (; attention_ < results_.attention.size(); attention_++) {
            const Attention& a = results_.attention[attention_];
            for (Layer layer : {a.forward, a.backward}) {
                layer.name += str(", T=", a.T);
                print(layer, results_);
            }
        }
        fflush(stdout);
        if (file_.empty()) return;
        std::ofstream out(file_);
        out << to_json(settings_, results_).dump(1) << "\n";
        if (!out.flush()) fail(file_, ": cannot write");
    }

  private:
    const Settings& settings_;
    const Results& results_;
    std::string file_;
    bool headed_ = false;
    size_t layers_ = 0, attention_ = 0;
};

int run(int argc, char** argv) {
    CLI::App app("Times every kernel of llmc/cuda alone, on this machine's GPU.");
    bool quick = false;
    for (int i = 1; i < argc; i++) quick |= argv[i] == std::string("--quick");
    Settings settings = quick ? Settings::quick() : Settings();
    std::string dtype = "bf16", json;
    app.option_defaults()->always_capture_default();
    app.add_option("--batch", settings.batch)->check(CLI::Range(1, 1024));
    app.add_option("--seq", settings.seq)->check(CLI::Range(1, 1 << 16));
    app.add_option("--dtype", dtype)->check(CLI::IsMember(std::vector<std::string>{"bf16", "fp32"}));
    app.add_option("--repeat", settings.repeat, "number of calls; the median counts")
        ->check(CLI::Range(1, 10000));
    app.add_option("--lengths", settings.lengths, "sequence lengths T[,T...] for --attention-only")
        ->delimiter(',')
        ->check(CLI::Range(1, 1 << 20));
    app.add_flag("--attention-only", settings.attention_only,
                 "measure only attention, at several sequence lengths");
    app.add_flag("--quick", quick, "use tiny sizes, for the simulator");
    app.add_option("--json", json, "file for the results");
    try {
        app.parse(argc, argv);
    } catch (const CLI::Success& help) {
        return app.exit(help);
    } catch (const CLI::ParseError& e) {
        usage_error(e.what());
    }
    settings.bf16 = dtype == "bf16";
    Results results;
    Report report(settings, results, json);
    measure(settings, results, [&] { report.update(); });
    bool failed = false;
    for (const Layer& layer : results.layers) failed |= !layer.error.empty();
    for (const Attention& a : results.attention) failed |= !(a.forward.error + a.backward.error).empty();
    return failed ? kExitFailure : kExitDone;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(argc, argv);
    } catch (const Error& e) {
        fprintf(stderr, "cuda_layers: error: %s\n", e.what());
        return e.status;
    } catch (const std::exception& e) {
        fprintf(stderr, "cuda_layers: error: %s\n", e.what());
    }
    return kExitFailure;
}
