// The oracle itself: its backward passes are compared with finite differences of its forward passes. That of
// attention is in attention.cpp.
#include "tests/reference.h"

using namespace reference;

namespace {

// Compares the oracle's gradient of dot(dout, output) in x with central differences.
template <class Loss>
void check_gradient(const std::string& name, Vector& x, const Vector& gradient, Loss loss) {
    INFO("gradient of ", name);
    CHECK(relative_error(gradient, finite_differences(x, loss)) < 1e-6);
}

Vector random_vector(size_t n, uint64_t seed) {
    return to_double(normal(n, seed));
}

}  // namespace

TEST_CASE("oracle: backward passes agree with finite differences") {
    SUBCASE("matmul") {
        int N = 3, IC = 4, OC = 5;
        Vector inp = random_vector(N * IC, 1), weight = random_vector(IC * OC, 2),
               bias = random_vector(OC, 3);
        Vector dout = random_vector(N * OC, 4);
        auto loss = [&] { return dot(dout, add_bias(matmul(inp, weight, N, OC, IC), bias)); };
        MatmulGradients d = matmul_backward(dout, inp, weight, N, IC, OC);
        check_gradient("inp", inp, d.dinp, loss);
        check_gradient("weight", weight, d.dweight, loss);
        check_gradient("bias", bias, d.dbias, loss);
    }
    SUBCASE("embedding") {
        int B = 2, T = 4, C = 3, V = 5;
        std::vector<int> tokens = {0, 3, 3, 1, 4, 0, 3, 1};
        Vector wte = random_vector(V * C, 1), wpe = random_vector((T + 1) * C, 2);
        Vector dout = random_vector(B * T * C, 3);
        auto loss = [&] { return dot(dout, embedding_forward(tokens, wte, wpe, B, T, C)); };
        EmbeddingGradients d = embedding_backward(dout, tokens, B, T, C, V, T + 1);
        check_gradient("wte", wte, d.dwte, loss);
        check_gradient("wpe", wpe, d.dwpe, loss);
    }
    SUBCASE("layernorm") {
        int N = 3, C = 7;
        Vector inp = random_vector(N * C, 1), weight = random_vector(C, 2), bias = random_vector(C, 3);
        Vector dout = random_vector(N * C, 4);
        auto loss = [&] { return dot(dout, layernorm_forward(inp, weight, bias, N, C).out); };
        LayerNormGradients d = layernorm_backward(dout, inp, weight, N, C);
        check_gradient("inp", inp, d.dinp, loss);
        check_gradient("weight", weight, d.dweight, loss);
        check_gradient("bias", bias, d.dbias, loss);
    }
    SUBCASE("gelu") {
        Vector x, gradient;
        for (double value = -6; value <= 6; value += 0.37) {
            x.push_back(value);
            gradient.push_back(gelu_derivative(value).value());
        }
        auto loss = [&] {
            double total = 0;
            for (double value : x) total += gelu(value);
            return total;
        };
        check_gradient("x", x, gradient, loss);
        for (double value : {-2.5, -1.0, -0.3, 0.0, 0.7, 1.9}) {  // the formula of GPT-2
            double u = std::sqrt(2 / M_PI) * (value + 0.044715 * std::pow(value, 3));
            CHECK(gelu(value) == doctest::Approx(0.5 * value * (1 + std::tanh(u))).epsilon(1e-12));
        }
    }
    SUBCASE("output_gate") {
        Vector inp = random_vector(20, 1), gate = random_vector(20, 2), dout = random_vector(20, 3);
        auto loss = [&] { return dot(dout, output_gate_forward(inp, gate)); };
        OutputGateGradients d = output_gate_backward(dout, inp, gate);
        check_gradient("inp", inp, d.dinp, loss);
        check_gradient("gate", gate, d.dgate, loss);
    }
    SUBCASE("short_conv") {
        for (int K : {1, 3, 6}) {
            CAPTURE(K);
            int B = 2, T = 4, W = 3;
            Vector inp = random_vector(B * T * W, 1), weight = random_vector(K * W, 2);
            Vector dout = random_vector(B * T * W, 3);
            auto loss = [&] { return dot(dout, short_conv_forward(inp, weight, B, T, W, K)); };
            ShortConvGradients d = short_conv_backward(dout, inp, weight, B, T, W, K);
            check_gradient("inp", inp, d.dinp, loss);
            check_gradient("weight", weight, d.dweight, loss);
        }
    }
    SUBCASE("qk_norm_rope") {
        for (bool norm : {false, true})
            for (bool rope : {false, true}) {
                CAPTURE(norm);
                CAPTURE(rope);
                int B = 2, T = 3, H = 2, D = 4;
                Vector inp = random_vector(B * T * 3 * H * D, 1), gain = random_vector(norm ? H : 0, 2);
                Vector dout = random_vector(inp.size(), 3);
                auto loss = [&] { return dot(dout, qk_norm_rope_forward(inp, gain, rope, B, T, H, D).out); };
                QkNormRopeGradients d = qk_norm_rope_backward(dout, inp, gain, rope, B, T, H, D);
                check_gradient("inp", inp, d.dinp, loss);
                check_gradient("q_gain", gain, d.dq_gain, loss);
            }
    }
    SUBCASE("cross_entropy") {
        int N = 3, V = 5, Vp = 8;
        std::vector<int> targets = {4, 0, 2};
        Vector logits = random_vector(N * Vp, 1);
        auto loss = [&] { return dot(cross_entropy(logits, targets, N, V, Vp).losses, Vector(N, 1.0)); };
        check_gradient("logits", logits, cross_entropy(logits, targets, N, V, Vp).dlogits, loss);
    }
}
