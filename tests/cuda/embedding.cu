#include "llmc/cuda/embedding.h"

#include "tests/cuda/helpers.h"

using namespace cuda_test;

namespace {

void check_embedding(int B, int T, int C, int V, const std::vector<int>& tokens) {
    CAPTURE(B);
    CAPTURE(T);
    CAPTURE(C);
    CAPTURE(V);
    int positions = T + 3;
    Floats wte = reference::normal((size_t)V * C, 1), wpe = reference::normal((size_t)positions * C, 2);
    Floats dout = reference::normal((size_t)B * T * C, 3);
    Device<int> tokens_device(tokens);
    Device<float> wte_device(wte), wpe_device(wpe), dout_device(dout);
    Device<float> scratch(gpu::embedding_backward_scratch(B, T, C));
    auto backward = reference::embedding_backward(to_double(dout), tokens, B, T, C, V, positions);
    for (bool learned : {true, false}) {
        CAPTURE(learned);
        Vector out = reference::embedding_forward(tokens, to_double(wte), learned ? to_double(wpe) : Vector(),
                                                  B, T, C);
        check_layer({expect<float>("out", out)}, [&](auto& o) {
            gpu::embedding_forward(o["out"], tokens_device.get(), wte_device.get(),
                                   learned ? wpe_device.get() : nullptr, B, T, C, 0);
        });
        auto check_backward = [&](auto type) {
            using Gradient = decltype(type);
            std::vector<Expected> outputs = {expect<Gradient>("dwte", backward.dwte, 0, true)};
            if (learned) outputs.push_back(expect<Gradient>("dwpe", backward.dwpe, 0, true));
            check_layer(outputs, [&](auto& o) {
                gpu::embedding_backward<Gradient>(o["dwte"], o["dwpe"], scratch.get(), dout_device.get(),
                                                  tokens_device.get(), B, T, C, V, 0);
            });
        };
        check_backward(float());
        if (T <= 1500 && V < 300) check_backward(gpu::bf16());
    }
}

}  // namespace

TEST_CASE("cuda embedding: shapes") {
    const int sizes[][3] = {{1, 1, 1},   {1, 7, 7},    {9, 8, 32},  {19, 2, 130}, {5, 13, 64},
                            {2, 32, 65}, {1, 64, 100}, {1, 7, 768}, {2, 3, 1030}};
    for (auto [B, T, C] : sizes)
        for (int V : {1, 5, 131}) check_embedding(B, T, C, V, reference::random_ints((size_t)B * T, V, 4));
}

TEST_CASE("cuda embedding: runs of one token over many chunks, vocabularies of one, two and three digits") {
    for (int V : {3, 100, 256, 257, 50257, 70001}) {
        int T = 1500;
        std::vector<int> tokens = reference::random_ints(T, V, 5);
        for (int i = 0; i < T; i++)
            if (i % 3) tokens[i] = V - 1;  // the same token 1000 times
        for (int C : {3, 4})
            if (C == 4 || V < 300) check_embedding(1, T, C, V, tokens);
    }
    int T = 2 * 32 * 33;  // one token has more chunks than a warp has lanes
    for (int C : {1, 4}) check_embedding(1, T, C, 3, std::vector<int>(T, 1));
    check_embedding(1, 8500, 1, 300,
                    reference::random_ints(8500, 300, 6));  // a warp loads more than one batch
    std::vector<int> ends_with_chunks(96);                  // runs of a token that begin and end with chunks
    for (int i = 0; i < 96; i++) ends_with_chunks[i] = i / 32 == 2 ? 5 : i / 32;
    check_embedding(1, 96, 8, 6, ends_with_chunks);
}
