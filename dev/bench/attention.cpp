// Times one attention kernel alone, forward and backward, from and to the layout of the qkv projection.
// Prints a JSON line for each sequence length: milliseconds of a call of each pass, medians, and the share of
// the matrix rate. This is the rate of the kernel's operations, forward and backward, divided by that of a
// matrix product of 1024^3, which runs before each call. The operations are those of the products that the
// form consists of, each once: a triangle of T by T scores, or a state of (features,D).
//
//   attention --attention softmax|poly1..poly4|sigmoid --kernel tiled|linear --dtype fp32|bf16 --heads H
//             --head-size D --seq T[,T...] [--gate]
//   attention --matmul N --dtype fp32|bf16     the rate of a matrix product of N^3 instead, the best of
//   `repeat`
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "llmc/config.h"
#include "llmc/cpu/attention.h"
#include "llmc/cpu/attention_linear.h"
#include "llmc/cpu/bf16.h"
#include "llmc/cpu/matmul.h"
#include "llmc/error.h"

namespace {

struct Settings {
    std::string attention = "softmax", kernel = "tiled", dtype = "fp32";
    int batch = 1, heads = 6, head_size = 64, repeat = 10, threads = 0, matmul = 0;
    std::vector<int> seq = {1024};
    bool gate = false;
};

double median(std::vector<double> values) {
    auto middle = values.begin() + values.size() / 2;
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
}

template <class F>
double milliseconds(F f) {
    auto start = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

// Different products of p of D channels.
double feature_count(int power, int D) {
    double count = 1;
    for (int i = 0; i < power; i++) count = count * (D + i) / (i + 1);
    return count;
}

// Times matrix products of n^3.
template <class Real>
class MatrixProduct {
  public:
    explicit MatrixProduct(int n) : n_(n), a_((size_t)n * n, Real(1.0f)), b_(a_), c_(a_) {}
    double operations() const { return 2.0 * n_ * n_ * n_; }
    double milliseconds() {
        return ::milliseconds(
            [&] { cpu::matmul(c_.data(), a_.data(), b_.data(), n_, n_, n_, false, false, false); });
    }

  private:
    int n_;
    std::vector<Real> a_, b_, c_;
};

template <class Real>
void measure(const Settings& settings, const AttentionConfig& config, int T) {
    int B = settings.batch, H = settings.heads, D = settings.head_size;
    bool linear = settings.kernel == "linear";
    size_t size = (size_t)B * T * H * D;
    std::vector<Real> qkv(3 * size), dqkv(3 * size);  // (B,T,3C)
    std::vector<Real> out(size), dout(size);          // (B,T,C)
    std::vector<float> stats((size_t)B * H * T);      // (B,H,T)
    std::vector<float> log_f(stats.size()), dlog_f(stats.size());
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (Real& x : qkv) x = normal(random);
    for (Real& x : dout) x = normal(random);
    for (float& x : log_f) x = -std::log1p(std::exp(-4 - normal(random)));
    const cpu::Decay decay = settings.gate ? cpu::Decay::gate(log_f.data()) : nullptr;
    float* ddecay = settings.gate ? dlog_f.data() : nullptr;

    std::vector<double> forward, backward, product;
    MatrixProduct<Real> matrix_product(1024);
    for (int i = 0; i <= settings.repeat; i++) {
        double product_ms = matrix_product.milliseconds();
        double forward_ms = milliseconds([&] {
            if (linear)
                cpu::attention_linear_forward(out.data(), stats.data(), qkv.data(), decay, config, B, T, H,
                                              D);
            else
                cpu::attention_forward(out.data(), stats.data(), qkv.data(), decay, config, B, T, H, D);
        });
        double backward_ms = milliseconds([&] {
            if (linear)
                cpu::attention_linear_backward(dqkv.data(), ddecay, dout.data(), out.data(), stats.data(),
                                               qkv.data(), decay, config, B, T, H, D);
            else
                cpu::attention_backward(dqkv.data(), ddecay, dout.data(), out.data(), stats.data(),
                                        qkv.data(), decay, config, B, T, H, D);
        });
        if (i == 0) continue;  // the first touches the memory
        forward.push_back(forward_ms);
        backward.push_back(backward_ms);
        product.push_back(product_ms);
    }
    const double width = linear ? feature_count(config.power(), D) : 0.5 * T;
    const double operations = 12.0 * B * T * H * D * width;  // 2 products forward, 4 backward
    const double gflops = matrix_product.operations() / median(product) / 1e6;
    const double ms = median(forward) + median(backward);
    nlohmann::ordered_json line = {{"attention", settings.attention},
                                   {"kernel", settings.kernel},
                                   {"dtype", settings.dtype},
                                   {"B", B},
                                   {"H", H},
                                   {"D", D},
                                   {"T", T},
                                   {"gate", settings.gate},
                                   {"forward_ms", median(forward)},
                                   {"backward_ms", median(backward)},
                                   {"matmul_gflops", gflops},
                                   {"share", operations / ms / 1e6 / gflops}};
    printf("%s\n", line.dump().c_str());
    fflush(stdout);
}

template <class Real>
void measure_matmul(int n, int repeat) {
    MatrixProduct<Real> product(n);
    double best = INFINITY;
    for (int i = 0; i <= repeat; i++) best = std::min(best, product.milliseconds());
    printf("%s\n", nlohmann::json{{"gflops", product.operations() / best / 1e6}}.dump().c_str());
}

void run(int argc, char** argv) {
    Settings settings;
    CLI::App app("Times one attention kernel, forward and backward.");
    std::vector<std::string> attentions(std::begin(kAttentionNames), std::end(kAttentionNames));
    app.option_defaults()->always_capture_default();
    app.add_option("--attention", settings.attention)->check(CLI::IsMember(attentions));
    app.add_option("--kernel", settings.kernel)
        ->check(CLI::IsMember(std::vector<std::string>{"tiled", "linear"}));
    app.add_option("--dtype", settings.dtype)->check(CLI::IsMember(std::vector<std::string>{"fp32", "bf16"}));
    app.add_option("--batch", settings.batch)->check(CLI::Range(1, 1024));
    app.add_option("--heads", settings.heads)->check(CLI::Range(1, 1024));
    app.add_option("--head-size", settings.head_size)->check(CLI::Range(1, 1024));
    app.add_option("--seq", settings.seq, "T[,T...]")->delimiter(',')->check(CLI::Range(1, 1 << 20));
    app.add_flag("--gate", settings.gate, "with a decay gate and its gradient");
    app.add_option("--matmul", settings.matmul)->check(CLI::Range(1, 1 << 14));
    app.add_option("--repeat", settings.repeat)->check(CLI::Range(1, 1000000));
    app.add_option("--threads", settings.threads, "0: all")->check(CLI::Range(0, 4096));
    try {
        app.parse(argc, argv);
    } catch (const CLI::Success& help) {
        app.exit(help);
        return;
    } catch (const CLI::ParseError& e) {
        usage_error(e.what());
    }
    AttentionConfig config;
    config.kind = (AttentionKind)index_of_name(settings.attention, kAttentionNames, "--attention");
    config.context = *std::max_element(settings.seq.begin(), settings.seq.end());
    if (settings.kernel == "linear" && !config.polynomial())
        usage_error("--kernel linear: ", settings.attention, " has no such form");
    if (settings.threads > 0) omp_set_num_threads(settings.threads);
    if (settings.matmul > 0)
        return settings.dtype == "bf16" ? measure_matmul<cpu::bf16>(settings.matmul, settings.repeat)
                                        : measure_matmul<float>(settings.matmul, settings.repeat);
    for (int T : settings.seq)
        if (settings.dtype == "bf16")
            measure<cpu::bf16>(settings, config, T);
        else
            measure<float>(settings, config, T);
}

}  // namespace

int main(int argc, char** argv) {
    try {
        run(argc, argv);
    } catch (const Error& e) {
        fprintf(stderr, "attention: error: %s\n", e.what());
        return e.status;
    } catch (const std::exception& e) {
        fprintf(stderr, "attention: error: %s\n", e.what());
        return kExitFailure;
    }
}
