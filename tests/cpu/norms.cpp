// llmc/norms.h and attention_norms of llmc/cpu against their definitions (tests/norms.h), whose Jacobian is
// held against finite differences.
#include "llmc/cpu/attention_norms.h"
#include "tests/norms.h"

using namespace reference;

namespace {

// (H), with what attention_forward leaves in stats.
std::vector<AttentionNorms> measure(const Floats& qkv, const Floats& delta, const AttentionConfig& config,
                                    int B, int T, int H, int D) {
    Floats out((size_t)B * T * H * D), stats((size_t)B * H * T);
    cpu::attention_forward(out.data(), stats.data(), qkv.data(), or_null(delta), config, B, T, H, D);
    std::vector<AttentionNorms> norms(H);
    cpu::attention_norms(norms.data(), qkv.data(), stats.data(), or_null(delta), config, B, T, H, D);
    return norms;
}

void check_norms(const AttentionOption& option, const Floats& qkv, int B, int T, int H, int D,
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
        double log_gamma = delta.empty() ? 0 : log_sigmoid(delta[h]);
        AttentionNorms expected = attention_norms(to_double(qkv), log_gamma, option.config, h, B, T, H, D);
        reference::check_norms(norms[h], expected, tolerance);
    }
}

Floats random_qkv(int B, int T, int C, double scale = 1) {
    return normal((size_t)B * T * 3 * C, 1, scale);
}

}  // namespace

TEST_CASE("norms: the dense Jacobian agrees with finite differences") {
    // With one channel and q = 1, k holds the scores.
    const double q = 1;
    for (const AttentionOption& option : norms_options()) {
        INFO(describe(option));
        const int T = 6;
        const double log_gamma = option.decay == DecayKind::none ? 0 : -0.2;
        Vector k((size_t)T * 3), unit(T);
        for (int j = 0; j < T; j++) k[j * 3] = 0.3 + 0.4 * j * (j % 2 ? -1 : 1);
        auto row = [&] { return attention_row(&q, k.data(), log_gamma, option.config, T - 1, 1, 1); };
        Vector J = dense_jacobian(row(), option.config);
        for (int j = 0; j < T; j++) {
            Vector dk = finite_differences(
                k, [&] { return row().A[j]; }, 1e-5);
            for (int t = 0; t < T; t++) unit[t] = dk[t * 3];
            CHECK(relative_error(Vector(&J[(size_t)j * T], &J[(size_t)j * T] + T), unit) < 1e-7);
        }
    }
}

TEST_CASE("norms: every kind at every size, against the definitions") {
    for (const AttentionOption& option : norms_options()) {
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
    for (const AttentionOption& option : norms_options()) {
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
    for (const AttentionOption& option : norms_options()) {
        if (!option.config.polynomial()) continue;
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
    for (const AttentionOption& option : norms_options()) check_norms(option, qkv, B, T, H, D);
}

TEST_CASE("norms: the same bits from run to run and for every number of threads") {
    const int B = 3, T = 130, H = 2, D = 16;
    Floats qkv = random_qkv(B, T, H * D);
    for (const AttentionOption& option : norms_options()) {
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
    for (const AttentionOption& option : norms_options()) {
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
    for (const AttentionOption& option : norms_options()) {
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
    for (const AttentionOption& option : norms_options())
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
    for (const AttentionOption& option : norms_options()) {
        INFO(describe(option));
        const AttentionConfig& config = option.config;
        Floats delta = decay_of(option, H);
        std::vector<AttentionNorms> norms = measure(qkv, delta, config, B, T, H, D);
        for (int h = 0; h < H; h++) {
            auto predicted = gaussian_norms(config, D, T, delta.empty() ? 0 : log_gamma(delta[h]));
            CHECK(predicted.has_value() == (config.polynomial() && !config.has_row_sum()));
            if (!predicted || config.power() > 3) continue;  // x^8 has too heavy tails for so few scores
            CAPTURE(h);
            CHECK(norms[h].norm == doctest::Approx(predicted->norm).epsilon(0.1).scale(0));
            CHECK(norms[h].jacobian_norm == doctest::Approx(predicted->jacobian_norm).epsilon(0.06).scale(0));
            CHECK(std::abs(norms[h].moment_excess) < 0.25);
        }
    }
    AttentionConfig cubic;  // scale row: p / sqrt((2p-1) (1 + 2 (p-1) / D)), for any T
    cubic.kind = AttentionKind::poly3;
    CHECK(gaussian_norms(cubic, 64, 1000, 0)->norm == doctest::Approx(1.0));
    CHECK(gaussian_norms(cubic, 64, 1000, -0.1)->jacobian_norm ==
          doctest::Approx(3 / std::sqrt(5 * (1 + 4.0 / 64))));
}
