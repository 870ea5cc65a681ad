// llmc/norms.h and attention_norms of llmc/cpu against their definitions: dense rows of A in double, and for
// each the whole Jacobian matrix, which is held against finite differences.
#include "llmc/cpu/attention_norms.h"
#include "llmc/norms.h"
#include "tests/reference.h"

using namespace reference;

namespace {

struct Option {
    AttentionConfig config;
    bool decay;
};

// Softmax once and each polynomial with each scale, without and with decay.
std::vector<Option> all_options() {
    std::vector<Option> options;
    for (int power = 0; power <= 4; power++)
        for (ScaleKind scale :
             {ScaleKind::row, ScaleKind::context, ScaleKind::mean, ScaleKind::sum, ScaleKind::constant})
            for (bool decay : {false, true})
                if (power > 0 || scale == ScaleKind::row) {
                    AttentionConfig config;
                    config.power = power;
                    config.scale = scale;
                    config.constant = -0.35;
                    config.context = 300;  // longer than the sequences here, as a context may be
                    options.push_back({config, decay});
                }
    return options;
}

std::string describe(const Option& o) {
    std::string scale = o.config.scale == ScaleKind::constant ? "constant" : kScaleNames[(int)o.config.scale];
    return kAttentionNames[o.config.power] + (o.config.softmax() ? "" : ", scale " + scale) +
           (o.decay ? ", decay" : "");
}

Floats decay_of(const Option& option, int H) {
    Floats delta(option.decay ? H : 0);
    for (int h = 0; h < (int)delta.size(); h++) delta[h] = initial_decay(h, H);
    return delta;
}

// (n,n): dA_j / dx_k of a row of n keys.
Vector dense_jacobian(const AttentionRow& row, double log_gamma, const AttentionConfig& config) {
    int n = (int)row.x.size(), p = config.power;
    Vector J((size_t)n * n);
    for (int j = 0; j < n; j++)
        for (int k = 0; k < n; k++) {
            double& d = J[(size_t)j * n + k];
            if (config.softmax()) {
                d = row.A[j] * ((j == k) - row.A[k]);
                continue;
            }
            double x = row.x[k], xp = power(x, p), dxp = p * power(x, p - 1);
            if (j == k) d = dxp * std::exp((n - 1 - j) * log_gamma) / row.stat;
            // A_j = x_j^p g_j / s, ds / dx_k = sign(x_k^p) dxp
            if (config.has_row_sum()) d -= row.A[j] / row.stat * ((xp > 0) - (xp < 0)) * dxp;
        }
    return J;
}

// Of one head, as llmc/norms.h defines them.
AttentionNorms definition(const Vector& qkv /*(B,T,3C)*/, double log_gamma, const AttentionConfig& config,
                          int h, int B, int T, int H, int D) {
    int C = H * D;
    double square = 0, jacobian = 0, absolute = 0, negative = 0, moment = 0;
    AttentionNorms n = {};
    Vector scores;
    for (int b = 0; b < B; b++)
        for (int i = 0; i < T; i++) {
            const double* rows = &qkv[(size_t)b * T * 3 * C + h * D];
            AttentionRow row = attention_row(rows + (size_t)i * 3 * C, rows + C, log_gamma, config, i, C, D);
            double row_absolute = 0, row_square = 0;
            for (int j = 0; j <= i; j++) {
                double a = row.A[j];
                row_square += a * a;
                row_absolute += std::abs(a);
                if (a < 0) negative -= a;
                if (config.softmax() && a > 0) n.entropy -= a * std::log(a) / (B * T);
                n.max_weight = std::max(n.max_weight, std::abs(a));
                n.max_score = std::max(n.max_score, std::abs(row.x[j]));
                moment += power(row.x[j], 2 * config.power);
                scores.push_back(row.x[j]);
            }
            if (row_square > 0) n.effective_keys += row_absolute * row_absolute / row_square / (B * T);
            square += row_square;
            absolute += row_absolute;
            Vector J = dense_jacobian(row, log_gamma, config);
            jacobian += dot(J, J);
        }
    n.norm = std::sqrt(square / (B * T));
    n.jacobian_norm = std::sqrt(jacobian / (B * T));
    n.negative_mass = absolute > 0 ? negative / absolute : 0;
    double mean = dot(scores, Vector(scores.size(), 1.0)) / scores.size(), variance = 0;
    for (double x : scores) variance += (x - mean) * (x - mean) / scores.size();
    n.score_std = std::sqrt(variance);
    double m = 1;
    for (int s = 0; s < config.power; s++) m *= (2 * s + 1) * (1 + 2.0 * s / D);
    if (!config.softmax()) n.moment_excess = moment / scores.size() / m - 1;
    return n;
}

const float* or_null(const Floats& x) {
    return x.empty() ? nullptr : x.data();
}

// (H), with what attention_forward leaves in stats.
std::vector<AttentionNorms> measure(const Floats& qkv, const Floats& delta, const AttentionConfig& config,
                                    int B, int T, int H, int D) {
    Floats out((size_t)B * T * H * D), stats((size_t)B * H * T);
    cpu::attention_forward(out.data(), stats.data(), qkv.data(), or_null(delta), config, B, T, H, D);
    std::vector<AttentionNorms> norms(H);
    cpu::attention_norms(norms.data(), qkv.data(), stats.data(), or_null(delta), config, B, T, H, D);
    return norms;
}

// A number below `floor` is held to tolerance * floor.
void check_number(const std::string& name, double got, double expected, double tolerance, double floor = 0) {
    CAPTURE(name);
    CAPTURE(got);
    CAPTURE(expected);
    CHECK(std::abs(got - expected) <= tolerance * std::max(std::abs(expected), floor));
}

void check_norms(const Option& option, const Floats& qkv, int B, int T, int H, int D,
                 double tolerance = 1e-5) {
    INFO(describe(option));
    CAPTURE(B);
    CAPTURE(T);
    CAPTURE(H);
    CAPTURE(D);
    const Floats delta = decay_of(option, H), qkv_before = qkv;
    std::vector<AttentionNorms> norms = measure(qkv, delta, option.config, B, T, H, D);
    CHECK(same_bits(qkv, qkv_before));
    for (int h = 0; h < H; h++) {
        CAPTURE(h);
        double log_gamma = option.decay ? log_sigmoid(delta[h]) : 0;
        AttentionNorms expected = definition(to_double(qkv), log_gamma, option.config, h, B, T, H, D);
        const AttentionNorms& got = norms[h];
        check_number("norm", got.norm, expected.norm, tolerance);
        check_number("jacobian_norm", got.jacobian_norm, expected.jacobian_norm, tolerance);
        check_number("max_weight", got.max_weight, expected.max_weight, tolerance);
        check_number("negative_mass", got.negative_mass, expected.negative_mass, tolerance);
        check_number("effective_keys", got.effective_keys, expected.effective_keys, tolerance);
        check_number("entropy", got.entropy, expected.entropy, tolerance, 0.1);
        check_number("score_std", got.score_std, expected.score_std, tolerance);
        check_number("max_score", got.max_score, expected.max_score, tolerance);
        check_number("moment", 1 + got.moment_excess, 1 + expected.moment_excess, tolerance);
    }
}

Floats random_qkv(int B, int T, int C, double scale = 1) {
    return normal((size_t)B * T * 3 * C, 1, scale);
}

}  // namespace

TEST_CASE("norms: the dense Jacobian agrees with finite differences") {
    // With one channel and q = 1, k holds the scores.
    const double q = 1;
    for (const Option& option : all_options()) {
        INFO(describe(option));
        const int T = 6;
        const double log_gamma = option.decay ? -0.2 : 0;
        Vector k((size_t)T * 3), unit(T);
        for (int j = 0; j < T; j++) k[j * 3] = 0.3 + 0.4 * j * (j % 2 ? -1 : 1);
        auto row = [&] { return attention_row(&q, k.data(), log_gamma, option.config, T - 1, 1, 1); };
        Vector J = dense_jacobian(row(), log_gamma, option.config);
        for (int j = 0; j < T; j++) {
            Vector dk = finite_differences(
                k, [&] { return row().A[j]; }, 1e-5);
            for (int t = 0; t < T; t++) unit[t] = dk[t * 3];
            CHECK(relative_error(Vector(&J[(size_t)j * T], &J[(size_t)j * T] + T), unit) < 1e-7);
        }
    }
}

TEST_CASE("norms: every kind at every size, against the definitions") {
    for (const Option& option : all_options()) {
        check_norms(option, random_qkv(2, 1, 8), 2, 1, 1, 8);
        check_norms(option, random_qkv(2, 7, 24), 2, 7, 3, 8);
        check_norms(option, random_qkv(1, 65, 32), 1, 65, 1, 32);
        check_norms(option, random_qkv(2, 130, 128), 2, 130, 2, 64);
        check_norms(option, random_qkv(1, 130, 240), 1, 130, 3, 80);
        check_norms(option, random_qkv(2, 65, 21), 2, 65, 3, 7);
    }
}

TEST_CASE("norms: rows that one key has nearly to itself") {
    // The Jacobian's square is then some 1e-8 of the terms that the plain formula takes from each other. The
    // scores of such a row are large, and a float's rounding of them what is left of error.
    const int B = 1, T = 70, H = 2, D = 8, C = H * D;
    Floats qkv = normal((size_t)T * 3 * C, 4, 0.05);
    for (int t = 0; t < T; t++)
        for (int h = 0; h < H; h++) {
            qkv[(size_t)t * 3 * C + h * D] = 8;
            qkv[(size_t)t * 3 * C + C + h * D] = t == 0 ? 4 : 0;  // keys that come later have no part in it
        }
    for (const Option& option : all_options()) {
        if (!option.config.softmax() && !option.config.has_row_sum()) continue;
        check_norms(option, qkv, B, T, H, D, 3e-5);
    }
}

TEST_CASE("norms: equal scores, and rows of zeros") {
    const int B = 2, T = 67, H = 2, D = 8, C = H * D;
    Floats qkv = random_qkv(B, T, C);
    for (size_t i = 0; i < qkv.size(); i++)
        if (i / C % 3 == 0) qkv[i] = 0;
    AttentionConfig config;
    double square = 0, entropy = 0;
    for (int i = 0; i < T; i++) square += 1.0 / (i + 1) / T, entropy += std::log(i + 1.0) / T;
    for (const AttentionNorms& n : measure(qkv, {}, config, B, T, H, D)) {
        CHECK(n.norm == doctest::Approx(std::sqrt(square)).epsilon(1e-5));
        CHECK(n.effective_keys == doctest::Approx((T + 1) / 2.0).epsilon(1e-5));
        CHECK(n.entropy == doctest::Approx(entropy).epsilon(1e-5));
        CHECK(n.max_weight == doctest::Approx(1.0).epsilon(1e-6));
        CHECK(n.score_std == 0);
        CHECK(n.max_score == 0);
    }
    // All zeros for a polynomial, whose slope there is not zero where p is 1.
    for (const Option& option : all_options()) {
        if (option.config.softmax()) continue;
        check_norms(option, qkv, B, T, H, D);
        for (const AttentionNorms& n : measure(qkv, decay_of(option, H), option.config, B, T, H, D)) {
            CHECK(n.norm == 0);
            CHECK(n.effective_keys == 0);
            CHECK(n.negative_mass == 0);
            CHECK(n.moment_excess == -1);
        }
    }
    // Some keys of zeros, and some queries.
    qkv = random_qkv(B, T, C);
    auto clear = [&](int b, int t, int part) {
        float* row = &qkv[((size_t)(b * T + t) * 3 + part) * C];
        std::fill(row, row + C, 0.0f);
    };
    for (int t : {3, 64, 65}) clear(1, t, 1);
    for (int t : {0, 3, 64, 66}) clear(0, t, 0), clear(1, t, 0);
    for (const Option& option : all_options()) check_norms(option, qkv, B, T, H, D);
}

TEST_CASE("norms: the same bits from run to run and for every number of threads") {
    const int B = 3, T = 130, H = 2, D = 16;
    Floats qkv = random_qkv(B, T, H * D);
    for (const Option& option : all_options()) {
        INFO(describe(option));
        auto run = [&](int threads) {
            Threads scope(threads);
            return measure(qkv, decay_of(option, H), option.config, B, T, H, D);
        };
        std::vector<AttentionNorms> one = run(1);
        for (int threads : {2, 2, 3}) CHECK(same_bits(run(threads), one));
    }
}

TEST_CASE("norms: stats are read where attention_forward leaves them, and only there") {
    const int B = 1, T = 9, H = 2, D = 8;
    Floats qkv = random_qkv(B, T, H * D), stats((size_t)H * T, std::numeric_limits<float>::quiet_NaN());
    for (const Option& option : all_options()) {
        INFO(describe(option));
        Floats delta = decay_of(option, H);
        std::vector<AttentionNorms> norms(H), expected = measure(qkv, delta, option.config, B, T, H, D);
        bool needed = option.config.softmax() || option.config.has_row_sum();
        cpu::attention_norms(norms.data(), qkv.data(), needed ? stats.data() : nullptr, or_null(delta),
                             option.config, B, T, H, D);
        CHECK(std::isnan(norms[1].norm) == needed);
        CHECK(same_bits(norms, expected) != needed);
    }
}

TEST_CASE("norms: of bf16, as of the floats that it stands for") {
    const int B = 2, T = 70, H = 3, D = 7;
    Floats qkv = random_qkv(B, T, H * D), stats((size_t)B * H * T), out((size_t)B * T * H * D);
    std::vector<cpu::bf16> half(qkv.size());
    for (size_t i = 0; i < qkv.size(); i++) qkv[i] = half[i] = qkv[i];
    for (const Option& option : all_options()) {
        INFO(describe(option));
        Floats delta = decay_of(option, H);
        cpu::attention_forward(out.data(), stats.data(), qkv.data(), or_null(delta), option.config, B, T, H,
                               D);
        std::vector<AttentionNorms> norms(H);
        cpu::attention_norms(norms.data(), half.data(), stats.data(), or_null(delta), option.config, B, T, H,
                             D);
        CHECK(same_bits(norms, measure(qkv, delta, option.config, B, T, H, D)));
    }
}

TEST_CASE("norms: a NaN shows in its head, and in no other") {
    const int B = 2, T = 70, H = 2, D = 8, C = H * D;
    for (const Option& option : all_options())
        for (int part : {0, 1}) {
            INFO(describe(option));
            CAPTURE(part);
            Floats qkv = random_qkv(B, T, C), delta = decay_of(option, H);
            qkv[((size_t)(T + 17) * 3 + part) * C + D + 3] = std::numeric_limits<float>::quiet_NaN();
            std::vector<AttentionNorms> norms = measure(qkv, delta, option.config, B, T, H, D);
            CHECK(std::isfinite(norms[0].norm));
            CHECK(std::isnan(norms[1].norm));
            CHECK(std::isnan(norms[1].score_std));
        }
}

TEST_CASE("norms: the prediction for Gaussian q and k") {
    const int B = 600, T = 12, H = 2, D = 16;
    Floats qkv = random_qkv(B, T, H * D);
    for (const Option& option : all_options()) {
        INFO(describe(option));
        const AttentionConfig& config = option.config;
        Floats delta = decay_of(option, H);
        std::vector<AttentionNorms> norms = measure(qkv, delta, config, B, T, H, D);
        for (int h = 0; h < H; h++) {
            auto predicted = gaussian_norms(config, D, T, option.decay ? log_gamma(delta[h]) : 0);
            CHECK(predicted.has_value() == (!config.softmax() && !config.has_row_sum()));
            if (!predicted || config.power > 3) continue;  // x^8 has too heavy tails for so few scores
            CAPTURE(h);
            CHECK(norms[h].norm == doctest::Approx(predicted->norm).epsilon(0.1));
            CHECK(norms[h].jacobian_norm == doctest::Approx(predicted->jacobian_norm).epsilon(0.06));
            CHECK(std::abs(norms[h].moment_excess) < 0.25);
        }
    }
    AttentionConfig cubic;  // scale row: p / sqrt((2p-1) (1 + 2 (p-1) / D)), for any T
    cubic.power = 3;
    CHECK(gaussian_norms(cubic, 64, 1000, 0)->norm == doctest::Approx(1.0));
    CHECK(gaussian_norms(cubic, 64, 1000, -0.1)->jacobian_norm ==
          doctest::Approx(3 / std::sqrt(5 * (1 + 4.0 / 64))));
}
