// The CUDA model, executed by dev/ptxsim, against the CPU's: the same weights and batch must give the same
// loss and the same gradient of every tensor.
#define LLMC_TESTING
#include "dev/ptxsim/report.h"
#include "tests/reference.h"
#include "train_gpt.cpp"

namespace gpu {
Backend backend();  // train_gpt.cu
}

namespace {

using reference::Vector;

// LLMC_THOROUGH=1: every configuration, instead of a sample.
bool thorough() {
    return std::getenv("LLMC_THOROUGH") != nullptr;
}

std::string describe(const GPTConfig& c) {
    return str(kAttentionNames[c.power], ", scale ", c.attention_scale, ", ", c.rope() ? "rope" : "learned",
               c.qk_norm ? ", qk-norm" : "", ", decay ", (int)c.decay, ", conv ", c.short_conv);
}

// Weights like those after some training: noise on all that starts as zero or one.
void fill(Model& model) {
    uint64_t seed = 1;
    for (const ParameterTensor& t : model.table.tensors) {
        std::vector<float> values(t.size), noise = reference::normal(t.size, seed++, 0.05);
        initialize_tensor(values.data(), t, 7);
        for (size_t i = 0; i < t.size; i++) values[i] += noise[i];
        model.write(Store::weights, t, values.data());
    }
}

Vector gradient(const Model& model, const ParameterTensor& t) {
    std::vector<float> values(t.size);
    model.read(Store::gradients, t, values.data());
    return Vector(values.begin(), values.end());
}

// Two micro-batches through both models. In bf16 both round, each in its own places: single tensors may be
// further apart than all of them together.
void compare(const GPTConfig& config, ModelOptions options, double loss_tolerance,
             double gradient_tolerance) {
    INFO(describe(config));
    const int B = options.batch, T = options.seq;
    auto cpu = cpu::make_model(config, options), gpu = gpu::backend().make_model(config, options);
    for (Model* model : {cpu.get(), gpu.get()}) {
        model->allocate();
        fill(*model);
        model->zero_gradients();
    }
    for (int micro_batch = 0; micro_batch < 2; micro_batch++) {
        std::vector<int> inputs = reference::random_ints((size_t)B * T, config.vocab_size, 10 + micro_batch),
                         targets = reference::random_ints((size_t)B * T, config.vocab_size, 20 + micro_batch);
        double losses[2];
        for (Model* model : {cpu.get(), gpu.get()}) {
            losses[model == gpu.get()] = model->forward(inputs.data(), targets.data(), B, T, 0.5f);
            model->backward(inputs.data(), B, T);
        }
        CHECK(std::abs(losses[1] - losses[0]) < loss_tolerance * losses[0]);
    }
    CHECK(gpu->gradient_norm() == doctest::Approx(cpu->gradient_norm()).epsilon(gradient_tolerance));
    CHECK(gpu->gradient_norm(1) == doctest::Approx(cpu->gradient_norm(1)).epsilon(gradient_tolerance));
    double all = cpu->gradient_norm(), squares = 0;
    double tensor_tolerance =
        options.precision == Precision::bf16 ? 3 * gradient_tolerance : gradient_tolerance;
    for (const ParameterTensor& t : cpu->table.tensors) {
        INFO(t.name);
        Vector expected = gradient(*cpu, t);
        // A tensor whose gradient is next to nothing is held against a share of the whole.
        Vector got = gradient(*gpu, t);
        CHECK(reference::relative_error(got, expected, 1e-2 * all) < tensor_tolerance);
        for (size_t i = 0; i < got.size(); i++) squares += (got[i] - expected[i]) * (got[i] - expected[i]);
    }
    CHECK(std::sqrt(squares) < gradient_tolerance * all);
    for (int step = 1; step <= 2; step++)
        for (Model* model : {cpu.get(), gpu.get()}) model->update(AdamW(), 1e-3, 0.5, step);
    for (const ParameterTensor& t : cpu->table.tensors) {
        INFO(t.name);
        std::vector<float> got(t.size), expected(t.size);
        gpu->read(Store::weights, t, got.data());
        cpu->read(Store::weights, t, expected.data());
        CHECK(reference::relative_error(Vector(got.begin(), got.end()),
                                        Vector(expected.begin(), expected.end())) < 10 * gradient_tolerance);
    }
    CHECK(gpu->first_nonfinite() == "");
    gpu.reset();
    std::string reports;
    for (const ptxsim::Report& r : ptxsim::take_reports()) reports += r.text + "\n";
    CHECK_MESSAGE(reports.empty(), reports);
}

GPTConfig small() {
    GPTConfig c;
    c.layers = 2, c.heads = 2, c.channels = 32, c.context = 40, c.vocab_size = 50;
    return c;
}

// Every attention with positions and qk-norm, then every scale with every decay.
std::vector<GPTConfig> configs() {
    std::vector<GPTConfig> all;
    for (int power = 0; power <= 4; power++)
        for (PositionKind positions : {PositionKind::learned, PositionKind::rope})
            for (bool qk_norm : {false, true}) {
                GPTConfig c = small();
                c.power = power, c.positions = positions, c.qk_norm = qk_norm;
                c.short_conv = qk_norm ? 3 : 0;
                all.push_back(c);
            }
    for (int power = 0; power <= 4; power++)
        for (const char* scale : {"row", "context", "mean", "sum", "0.1"})
            for (DecayKind decay : {DecayKind::none, DecayKind::fixed, DecayKind::learned}) {
                if (power == 0 && scale != std::string("row")) continue;
                GPTConfig c = small();
                c.power = power, c.attention_scale = scale, c.decay = decay;
                c.positions = PositionKind::rope, c.qk_norm = true;
                all.push_back(c);
            }
    return all;
}

}  // namespace

TEST_CASE("the CUDA model against the CPU's: losses, gradients and updates, float32") {
    int number = 0;
    for (const GPTConfig& config : configs())
        if (thorough() || number++ % 2 == 0)
            compare(config, {Purpose::training, 2, 23, Precision::fp32}, 1e-6, 1e-4);
}

TEST_CASE("the CUDA model against the CPU's: losses, gradients and updates, bf16") {
    int number = 0;
    for (const GPTConfig& config : configs())
        if (thorough() || number++ % 6 == 0)
            compare(config, {Purpose::training, 2, 23, Precision::bf16}, 3e-3, 5e-2);
}

TEST_CASE("the CUDA model against the CPU's: what is computed again in the backward pass is the same") {
    for (Recompute recompute : {Recompute::gelu, Recompute::layernorm, Recompute::block})
        for (Precision precision : {Precision::fp32, Precision::bf16}) {
            GPTConfig config = small();
            config.power = 3, config.qk_norm = true, config.positions = PositionKind::rope;
            bool exact = precision == Precision::fp32;
            compare(config, {Purpose::training, 2, 23, precision, recompute}, exact ? 1e-6 : 3e-3,
                    exact ? 1e-4 : 5e-2);
        }
}

TEST_CASE("the CUDA model against the CPU's: tokens one after another from a cache") {
    for (int power : {0, 3}) {
        GPTConfig config = small();
        config.power = power, config.positions = PositionKind::rope, config.qk_norm = true,
        config.short_conv = 3;
        config.decay = DecayKind::learned;
        ModelOptions options{Purpose::inference, 1, 8};
        auto cpu = cpu::make_model(config, options), gpu = gpu::backend().make_model(config, options);
        std::vector<int> tokens = reference::random_ints(30, config.vocab_size, 3);
        for (Model* model : {cpu.get(), gpu.get()}) {
            model->allocate();
            fill(*model);
            model->clear_cache();
        }
        for (size_t at = 0; at < tokens.size();) {
            CAPTURE(at);
            int n = at == 0 ? 11 : 1;  // a prompt that is longer than the model takes at once
            const float* logits[2];
            for (Model* model : {cpu.get(), gpu.get()})
                logits[model == gpu.get()] = model->decode(&tokens[at], n);
            Vector expected(logits[0], logits[0] + config.vocab_size),
                got(logits[1], logits[1] + config.vocab_size);
            CHECK(reference::relative_error(got, expected) < 1e-5);
            at += n;
        }
        gpu.reset();
        CHECK(ptxsim::take_reports().empty());
    }
}
