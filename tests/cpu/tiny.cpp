// docs/tiny.cpp, the whole trainer in plain loops, compared with train_gpt: the same weights and batch must
// give the same loss and the same gradient of every tensor.
#define main tiny_main
#include "docs/tiny.cpp"
#undef main

#include <sstream>

#include "tests/cli/cli.h"

using namespace cli;

TEST_CASE("tiny.cpp: loss and gradients are those of train_gpt's dump") {
    TempFolder folder;
    const std::string data = folder / "data", out = folder / "out", file = folder / "dump";
    write_dataset(data, 70, random_tokens(300, 70, 1), random_tokens(100, 70, 2));
    for (const std::string& kind : {std::string("softmax"), std::string("poly3")}) {
        CAPTURE(kind);
        // Some large steps make the weights differ from where they start.
        const std::string flags =
            " --layers 2 --heads 3 --channels 24 --context 20 --batch 2 --lr 0.05 "
            "--warmup 0 --positions learned --qk-norm true --decay none --output-gate false "
            "--short-conv 0 --attention " +
            kind;
        const std::string model = train_model(data, out + kind, flags, 4);
        check_done(
            train_gpt("dump --batch 2 --seq 20 --model " + model + " --data " + data + " --file " + file));
        const Safetensors dump(file);

        GPT tiny({.L = 2, .H = 3, .C = 24, .T = 20, .B = 2, .V = 70},
                 kind == "poly3" ? Attention::poly3 : Attention::softmax, 1);
        for (Parameter* p : tiny.parameters) {
            CAPTURE(p->name);
            std::vector<float> values = dump.values("param." + p->name);
            REQUIRE(values.size() == p->value.size());
            p->value = values;
        }
        CHECK(4 + 2 * tiny.parameters.size() == dump.header.size() - dump.header.count("__metadata__"));
        std::vector<int> tokens = dump.values<int>("input_ids"), targets = dump.values<int>("targets");
        float loss = 0;
        for (int b = 0; b < 2; b++) {
            std::vector<unsigned char> text(tokens.begin() + b * 20, tokens.begin() + (b + 1) * 20);
            text.push_back(targets[b * 20 + 19]);
            loss += tiny.forward(text.data()) / 2;
            tiny.backward(text.data());
        }
        CHECK(loss == doctest::Approx(dump.values("loss")[0]).epsilon(1e-5));
        double all = 0;
        for (Parameter* p : tiny.parameters)
            for (float g : p->gradient) all += (double)g * g;
        for (Parameter* p : tiny.parameters) {
            CAPTURE(p->name);
            std::vector<float> expected = dump.values("grad." + p->name);
            double difference = 0, norm = 0;
            for (size_t i = 0; i < expected.size(); i++) {
                difference += std::pow((double)p->gradient[i] - expected[i], 2);
                norm += (double)expected[i] * expected[i];
            }
            // Under softmax the biases of the keys have no gradient, so theirs consists of rounding errors.
            CHECK(std::sqrt(difference) < 1e-5 * std::sqrt(norm) + 1e-7 * std::sqrt(all));
        }
    }
}

TEST_CASE("tiny.cpp: a run on a text learns, and bad arguments are told") {
    TempFolder folder;
    std::string text;
    for (int i = 0; i < 200; i++) text += "to be or not to be ";
    put_file(folder / "text", text);
    auto run = [](std::vector<std::string> arguments) {
        std::vector<char*> argv;
        for (std::string& a : arguments) argv.push_back(a.data());
        return tiny_main((int)argv.size(), argv.data());
    };
    CHECK(run({"tiny"}) == 2);
    CHECK(run({"tiny", folder / "text", "poly4"}) == 2);
    CHECK(run({"tiny", folder / "text", "softmax", "0"}) == 2);
    CHECK(run({"tiny", folder / "absent"}) == 1);
    // 60 steps of AdamW, as main() takes them.
    GPT model({.L = 1, .H = 2, .C = 16, .T = 16, .B = 4}, Attention::poly3, 1);
    float loss = 0;
    for (int step = 1; step <= 60; step++) {
        loss = 0;
        for (int b = 0; b < 4; b++) {
            const unsigned char* sequence = (const unsigned char*)&text[step + b * 16];
            loss += model.forward(sequence) / 4;
            model.backward(sequence);
        }
        if (step == 1) CHECK(loss == doctest::Approx(std::log(256.0)).epsilon(0.05));
        model.update(1e-2f, step);
    }
    CHECK(loss < 1.5);
}
