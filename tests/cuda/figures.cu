// What the kernels of llmc/cuda move and compute, by the simulator's figures, compared with the least
// possible: the bytes of memory-bound kernels, the tensor-core products of attention, bank conflicts, and the
// arithmetic of attention other than its products.
#include <nlohmann/json.hpp>

#include "dev/ptxsim/device.h"
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"
#include "llmc/cuda/adamw.h"
#include "llmc/cuda/attention/linear.h"
#include "llmc/cuda/classifier.h"
#include "llmc/cuda/embedding.h"
#include "llmc/cuda/gelu.h"
#include "llmc/cuda/layernorm.h"
#include "llmc/cuda/output_gate.h"
#include "llmc/cuda/qk_norm_rope.h"
#include "llmc/cuda/short_conv.h"
#include "tests/attention_kinds.h"
#include "tests/cuda/helpers.h"

using namespace cuda_test;

namespace {

using Json = nlohmann::json;

// Switches the checks off, because the kernels' own tests have them, and keeps only the figures.
struct OnlyFigures {
    const ptxsim::Options before = ptxsim::options();
    OnlyFigures() {
        ptxsim::Options& o = ptxsim::options();
        o.bounds = o.uninit = o.race = false;
        o.figures = "figures";
    }
    ~OnlyFigures() { ptxsim::options() = before; }
};

// The figures of the kernels that f launches and that have `part` in their names.
template <class F>
std::vector<Json> figures_of(F f, const std::string& part = "") {
    ptxsim::clear_figures();
    f();
    gpu::check(cudaDeviceSynchronize());
    std::vector<Json> figures;
    const Json all = Json::parse(ptxsim::figures_json());
    for (const Json& kernel : all["kernels"])
        if (kernel["launches"] > 0 && kernel["name"].get<std::string>().find(part) != std::string::npos)
            figures.push_back(kernel);
    REQUIRE(!figures.empty());
    return figures;
}

double sum_of(const std::vector<Json>& figures, std::initializer_list<const char*> names) {
    double sum = 0;
    for (const Json& kernel : figures)
        for (const char* name : names) sum += kernel[name].get<double>();
    return sum;
}

// A device array of n zeros.
template <class T>
struct Zeros : Device<T> {
    explicit Zeros(size_t n) : Device<T>(n) { gpu::check(cudaMemset(this->get(), 0, n * sizeof(T))); }
};

// Checks that f moves at most 1.1 times `least` bytes, in sectors of 32 bytes.
template <class F>
void check_moved(const char* name, double least, F f, const std::string& part = "") {
    double moved = 32 * sum_of(figures_of(f, part), {"global_load_sectors", "global_store_sectors"});
    CHECK_MESSAGE(moved / least < 1.1, std::string(name)
                                           << ": " << moved << " bytes, " << least << " at least");
    CHECK_MESSAGE(moved / least > 0.99, std::string(name)
                                            << ": " << moved << " bytes, " << least << " at least");
}

// Rows as in training: at these sizes the data that each block reads again (weights, sums of blocks) is
// small.
template <class Real>
void check_bytes() {
    const OnlyFigures only;
    const double R = sizeof(Real), copies = std::is_same_v<Real, float> ? 0 : R;
    INFO("bytes a number: ", R);
    {
        const int N = 16384, C = 256;
        Zeros<float> inp(N * C), residual(N * C), mean(N), rstd(N), weight(C), bias(C), dweight(C), dbias(C);
        Zeros<float> scratch(gpu::layernorm_backward_scratch(N, C));
        Zeros<Real> out(N * C), delta(N * C);
        const double values = (double)N * C, statistics = 8.0 * N + 8 * C;
        check_moved("layernorm_forward", values * (4 + R) + statistics, [&] {
            gpu::layernorm_forward(out.get(), mean.get(), rstd.get(), inp.get(), weight.get(), bias.get(), N,
                                   C, nullptr);
        });
        check_moved("layernorm_recompute", values * (4 + R) + statistics, [&] {
            gpu::layernorm_recompute(out.get(), mean.get(), rstd.get(), inp.get(), weight.get(), bias.get(),
                                     N, C, nullptr);
        });
        check_moved("residual_layernorm_forward", values * (8 + 2 * R) + statistics, [&] {
            gpu::residual_layernorm_forward(residual.get(), out.get(), mean.get(), rstd.get(), inp.get(),
                                            delta.get(), weight.get(), bias.get(), N, C, nullptr);
        });
        check_moved("layernorm_backward", values * (R + 12 + copies) + statistics + 12 * C, [&] {
            gpu::layernorm_backward(residual.get(), copies > 0 ? out.get() : nullptr, dweight.get(),
                                    dbias.get(), scratch.get(), delta.get(), inp.get(), mean.get(),
                                    rstd.get(), weight.get(), N, C, nullptr);
        });
    }
    {
        const int N = 256, C = 3072;
        Zeros<Real> out(N * C), inp(N * C);
        Zeros<float> bias(C), scratch(gpu::gelu_backward_scratch(N, C));
        check_moved("gelu_forward", 2 * R * N * C,
                    [&] { gpu::gelu_forward(out.get(), inp.get(), (size_t)N * C, nullptr); });
        check_moved("gelu_backward", 3 * R * N * C + 8 * C, [&] {
            gpu::gelu_backward(out.get(), bias.get(), scratch.get(), out.get(), inp.get(), N, C, nullptr);
        });
    }
    {
        const int B = 1, T = 256, H = 12, D = 64, C = H * D, N = B * T;
        Zeros<Real> out(N * 3 * C), inp(N * 3 * C);
        Zeros<float> rstd(N * 2 * H), gain(H), dgain(H), rope(T * D);
        Zeros<float> scratch(gpu::qk_norm_rope_scratch(B, T, H));
        const double small = 8.0 * N * H + 4.0 * T * D;
        check_moved("qk_norm_rope_forward", 6 * R * N * C + small + 4 * H, [&] {
            gpu::qk_norm_rope_forward(out.get(), rstd.get(), inp.get(), gain.get(), rope.get(), B, T, H, D,
                                      nullptr);
        });
        check_moved("qk_norm_rope_backward", 6 * R * N * C + small + 12 * H, [&] {
            gpu::qk_norm_rope_backward(out.get(), dgain.get(), scratch.get(), out.get(), inp.get(),
                                       rstd.get(), gain.get(), rope.get(), B, T, H, D, nullptr);
        });
        Zeros<Real> gate(N * C), gated(N * C), dgate(N * C);
        check_moved("output_gate_forward", 3 * R * N * C, [&] {
            gpu::output_gate_forward(gated.get(), inp.get(), gate.get(), (size_t)N * C, nullptr);
        });
        check_moved("output_gate_backward", 5 * R * N * C, [&] {
            gpu::output_gate_backward(gated.get(), dgate.get(), gated.get(), inp.get(), gate.get(),
                                      (size_t)N * C, nullptr);
        });
        const int K = 4, W = 3 * C;
        Zeros<float> taps(K * W), dtaps(K * W), sums(gpu::short_conv_scratch(B, T, W, K));
        Zeros<Real> dinp(N * W);
        check_moved("short_conv_forward", 2 * R * N * W + 4 * K * W,
                    [&] { gpu::short_conv_forward(out.get(), inp.get(), taps.get(), B, T, W, K, nullptr); });
        check_moved("short_conv_backward", 3 * R * N * W + 12 * K * W, [&] {
            gpu::short_conv_backward(dinp.get(), dtaps.get(), sums.get(), out.get(), inp.get(), taps.get(), B,
                                     T, W, K, nullptr);
        });
        // The dot products dO . O that the backward pass of softmax needs.
        Zeros<Real> o(N * C), d_o(N * C);
        Zeros<float> stats(N * H), room(gpu::attention_backward_scratch(B, T, H));
        check_moved(
            "attention_dots", 2 * R * N * C + 4 * N * H,
            [&] {
                gpu::attention_backward<Real>(out.get(), nullptr, room.get(), d_o.get(), o.get(), stats.get(),
                                              inp.get(), nullptr, {}, B, T, H, D, nullptr);
            },
            "attention_dots");
    }
    {
        const int N = 16, V = 50257, Vp = 50272;
        Zeros<Real> logits(N * Vp);
        Zeros<float> losses(N);
        Zeros<int> targets(N);
        check_moved("cross_entropy", 2 * R * N * Vp + 8 * N, [&] {
            gpu::cross_entropy(losses.get(), logits.get(), logits.get(), targets.get(), 1.0f, N, V, Vp,
                               nullptr);
        });
    }
    {
        const size_t n = 1 << 20;
        Zeros<float> param(n), grad(n), m(n), v(n), scale(1);
        Zeros<Real> copy(n);
        Zeros<double> squares(1 + gpu::kSquaresBlocks);
        check_moved("sum_of_squares", 4.0 * n + 8,
                    [&] { gpu::sum_of_squares(squares.get(), squares.get() + 1, grad.get(), n, nullptr); });
        check_moved("adamw_update", (7 * 4 + copies) * n, [&] {
            gpu::adamw_update(param.get(), copies > 0 ? copy.get() : nullptr, grad.get(), m.get(), v.get(), n,
                              0, n / 2, 1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, scale.get(), 1, false, 1, nullptr);
        });
    }
}

TEST_CASE("cuda figures: kernels of bf16 move little more than they must") {
    check_bytes<gpu::bf16>();
}
TEST_CASE("cuda figures: kernels of float move little more than they must") {
    check_bytes<float>();
}

TEST_CASE("cuda figures: the embedding moves little more than it must") {
    const OnlyFigures only;
    const int B = 8, T = 64, C = 768, N = B * T, V = 1000;
    std::vector<int> shuffled(N);  // all different, so that no row of the table is read twice
    for (int i = 0; i < N; i++) shuffled[i] = i * 7 % V;
    const Device<int> tokens(shuffled);
    Zeros<float> wte(V * C), wpe(T * C), out(N * C), scratch(gpu::embedding_backward_scratch(B, T, C));
    const double row = 4.0 * C;
    check_moved("embedding_forward", 4 * N + (2 * N + T) * row, [&] {
        gpu::embedding_forward(out.get(), tokens.get(), wte.get(), wpe.get(), B, T, C, nullptr);
    });
    auto backward = [&] {
        gpu::embedding_backward(wte.get(), wpe.get(), scratch.get(), out.get(), tokens.get(), B, T, C, V,
                                nullptr);
    };
    check_moved("embedding_backward, tokens", 8 * N + 3 * N * row, backward, "sum_token_runs");
    check_moved("embedding_backward, positions", (N + 2 * T) * row, backward, "sum_positions");
    // The sort has 8 bytes per token, and moves most of them twice.
    const double all = 32 * sum_of(figures_of(backward), {"global_load_sectors", "global_store_sectors"});
    CHECK(all < 1.1 * (4 * N + (4 * N + 2 * T) * row));
}

// -------------------------------------------------------------------------------------------- attention

// Attention of one head, forward and backward, in bf16.
std::vector<Json> attention_figures(AttentionKind kind, int T, int D, const std::string& part) {
    Zeros<gpu::bf16> qkv((size_t)T * 3 * D), dqkv((size_t)T * 3 * D), out((size_t)T * D), dout((size_t)T * D);
    const AttentionConfig config{.kind = kind, .context = T};
    Zeros<float> stats(T), scratch(gpu::attention_forward_scratch(T, 1)),
        scratch_backward(gpu::attention_backward_scratch(1, T, 1));
    return figures_of(
        [&] {
            gpu::attention_forward(out.get(), stats.get(), scratch.get(), qkv.get(), nullptr, config, 1, T, 1,
                                   D, nullptr);
            gpu::attention_backward<gpu::bf16>(dqkv.get(), nullptr, scratch_backward.get(), dout.get(),
                                               out.get(), stats.get(), qkv.get(), nullptr, config, 1, T, 1, D,
                                               nullptr);
        },
        part);
}

TEST_CASE("cuda figures: a kernel that two objects have is one") {
    const OnlyFigures only;
    const int T = 66, D = 8;  // tables are made in attention.o, and in linear.o
    const AttentionConfig config{.kind = AttentionKind::poly2};
    Zeros<float> qkv(T * 3 * D), out(T * D),
        scratch(gpu::attention_linear_forward_scratch<float>(config, 1, T, 1, D, 64));
    const std::vector<Json> figures = figures_of(
        [&] {
            gpu::attention_forward(out.get(), nullptr, scratch.get(), qkv.get(), nullptr, config, 1, T, 1, D,
                                   nullptr);
            gpu::attention_linear_forward(out.get(), nullptr, scratch.get(), qkv.get(), nullptr, config, 1, T,
                                          1, D, nullptr, 64);
        },
        "attention_tables");
    REQUIRE(figures.size() == 1);
    CHECK(figures[0]["launches"] == 2);
}

// The number of blocks of 16 x 16 scores of a causal head with T tokens: those below the diagonal and those
// on it.
double score_blocks(int T) {
    double rows = T / 16;
    return rows * (rows + 1) / 2;
}

TEST_CASE("cuda figures: attention has no product too many and no bank conflict") {
    const OnlyFigures only;
    const int T = 256;
    for (AttentionKind kind : reference::every_kind())
        for (int D : {64, 128})
            for (auto [kernel, products] : {std::pair("attention_forward_kernel", 2),
                                            {"attention_backward_keys_kernel", 4},
                                            {"attention_backward_queries_kernel", 3}}) {
                CAPTURE((int)kind);
                CAPTURE(D);
                CAPTURE(kernel);
                const std::vector<Json> figures = attention_figures(kind, T, D, kernel);
                REQUIRE(figures.size() == 1);
                // A product of 16 x 16 x 16 is two of mma.m16n8k16.
                CHECK(figures[0]["mma"] == products * score_blocks(T) * (D / 16) * 2);
                CHECK(figures[0]["shared_bank_conflicts"] == 0);
            }
}

// What a kernel does with numbers, for each score: not the products and what brings their factors to them.
double arithmetic_per_score(AttentionKind kind, int T, int D, const std::string& kernel) {
    const std::vector<Json> figures = attention_figures(kind, T, D, kernel);
    REQUIRE(figures.size() == 1);
    double instructions = 0;
    for (const auto& [mnemonic, count] : figures[0]["by_kind"].items()) {
        const std::string& name = mnemonic;
        auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
        if (has("mma") || has("mov") || has("ld.") || has("st.")) continue;
        if (has("f32") || has("bf16x2") || has("shfl")) instructions += count.get<double>();
    }
    return instructions / (score_blocks(T) * 256 / 32);
}

TEST_CASE("cuda figures: what attention does beside its products") {
    const OnlyFigures only;
    const int T = 512, D = 64;
    // As shares of softmax's. Its backward pass has the rows' maxima and sums from the forward pass, and four
    // instructions a score are left; a polynomial has powers to compute, and c_i, which dq alone takes at the
    // end.
    constexpr AttentionKind kKinds[] = {AttentionKind::softmax, AttentionKind::poly1, AttentionKind::poly2,
                                        AttentionKind::poly3,   AttentionKind::poly4, AttentionKind::sigmoid};
    const struct {
        const char* kernel;
        double most[sizeof kKinds / sizeof *kKinds];
    } table[] = {{"attention_forward_kernel", {1, 0.16, 0.3, 0.45, 0.45, 0.95}},
                 {"attention_backward_keys_kernel", {1, 0.7, 0.9, 1.1, 1.3, 2.4}},
                 {"attention_backward_queries_kernel", {1, 0.27, 0.48, 0.7, 0.92, 2.1}}};
    for (const auto& row : table) {
        std::string text = row.kernel;
        double softmax = 0;
        for (size_t i = 0; i < std::size(kKinds); i++) {
            const double n = arithmetic_per_score(kKinds[i], T, D, row.kernel);
            if (i == 0) softmax = n;
            text += str(i == 0 ? ", instructions a score: " : ", ", kAttentionNames[(int)kKinds[i]], " ",
                        std::round(100 * n) / 100);
            CHECK_MESSAGE(n <= row.most[i] * softmax, text);
        }
        MESSAGE(text);
    }
}

}  // namespace
