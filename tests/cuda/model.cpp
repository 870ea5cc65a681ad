// The CUDA model, executed by dev/ptxsim, compared with the CPU's: the same weights and batch must give the
// same loss and the same gradient of every tensor.
#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"
#include "llmc/cpu/dispatch.h"
#include "llmc/cuda/runtime.h"
#include "llmc/options.h"
#include "llmc/parameters.h"
#include "tests/helpers.h"
#include "tests/norms.h"
#include "tests/reference.h"

namespace gpu {
Backend backend();  // train_gpt.cu
}

namespace {

using reference::Vector;

std::string describe(const GPTConfig& c) {
    return str(kAttentionNames[(int)c.attention_kind], ", scale ", c.attention_scale, ", ",
               c.softmax_every ? str("softmax every ", c.softmax_every, ", ") : "",
               c.rope() ? "rope" : "learned", c.qk_norm ? ", qk-norm" : "", ", decay ", (int)c.decay,
               ", conv ", c.short_conv, c.output_gate ? ", output gate" : "", ", MLP ", c.mlp_width());
}

// Fills the weights as after some training: also those that start as zero or one get noise.
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

// The distance between the gradients of two models: of all gradients together, and of each tensor. A tensor
// with a very small gradient is compared relative to a fraction of the whole.
struct Distance {
    double all = 0;
    std::map<std::string, double> tensors;
    double worst() const {
        double most = 0;
        for (auto& [name, distance] : tensors) most = std::max(most, distance);
        return most;
    }
};
Distance distance(const Model& model, const Model& from) {
    double norm = from.gradient_norm(from.table.all()), squares = 0;
    Distance d;
    for (const ParameterTensor& t : from.table.tensors) {
        Vector got = gradient(model, t), expected = gradient(from, t);
        for (size_t i = 0; i < got.size(); i++) squares += (got[i] - expected[i]) * (got[i] - expected[i]);
        d.tensors[t.name] = reference::relative_error(got, expected, 1e-2 * norm);
    }
    d.all = std::sqrt(squares) / norm;
    return d;
}

// Makes one step of AdamW with the gradients clipped to a norm of 0.5. Returns their norm before clipping.
double update(Model& model, Optimizer& optimizer, int step) {
    model.clip_gradients(0.5);
    optimizer.step(model.table.all(), 1e-3, step);
    return model.clipped_norm();
}

struct Means {
    double cpu = 0, gpu = 0;  // sums of the distances
    int count = 0;
};

// Runs two micro-batches and two updates. In float32 the CUDA model is compared with the CPU's. In bf16 the
// two models round in different places, and high powers increase the errors, so both are compared with the
// CPU model in float32: the CUDA model must be within the bound, or at most twice as far off as the CPU's.
// For a gradient of a few numbers (q_gain, decay) that depends too much on chance, so means_of_few sums how
// far off each model is.
void compare(const GPTConfig& config, ModelOptions options, Means* means_of_few = nullptr) {
    INFO(describe(config));
    const int B = options.batch, T = options.seq;
    const bool is_bf16 = options.precision == Precision::bf16;
    const double loss_bound = is_bf16 ? 3e-3 : 1e-6, gradient_bound = is_bf16 ? 1e-2 : 1e-5,
                 tensor_bound = is_bf16 ? 1e-2 : 3e-5;  // a tensor may be small beside the whole
    ModelOptions cpu_options = options, exact_options;
    cpu_options.gradients = Precision::fp32;
    exact_options = cpu_options;
    exact_options.precision = Precision::fp32;
    auto exact = cpu::choose_backend().make_model(config, exact_options),
         gpu = gpu::backend().make_model(config, options);
    auto cpu = is_bf16 ? cpu::choose_backend().make_model(config, cpu_options) : nullptr;
    std::vector<Model*> models = {exact.get(), gpu.get()};
    if (is_bf16) models.push_back(cpu.get());
    std::vector<std::unique_ptr<Optimizer>> optimizers;
    for (Model* model : models) {
        model->allocate();
        fill(*model);
        optimizers.push_back(model->make_optimizer({.attention_lr = 0.3}));
        optimizers.back()->allocate();
    }
    for (int micro_batch = 0; micro_batch < 2; micro_batch++) {
        std::vector<int> inputs = reference::random_ints((size_t)B * T, config.vocab_size, 10 + micro_batch),
                         targets = reference::random_ints((size_t)B * T, config.vocab_size, 20 + micro_batch);
        std::vector<double> losses;
        std::vector<std::vector<AttentionNorms>> norms;
        for (Model* model : models) {
            norms.emplace_back(config.layers * config.heads);
            losses.push_back(model->loss({inputs.data(), targets.data(), B, T},
                                         Pass::training(0.5f, micro_batch == 0, micro_batch == 1,
                                                        micro_batch == 0 ? norms.back().data() : nullptr)));
        }
        CHECK(std::abs(losses[1] - losses[0]) < loss_bound * losses[0]);
        for (size_t head = 0; head < norms[0].size() && micro_batch == 0; head++) {
            CAPTURE(head);
            if (is_bf16) {
                reference::check_number("norm", norms[1][head].norm, norms[0][head].norm, 3e-2);
            } else {
                reference::check_norms(norms[1][head], norms[0][head], 1e-4);
            }
        }
    }
    Distance got = distance(*gpu, *exact), usual;
    if (is_bf16) usual = distance(*cpu, *exact);
    CHECK(got.all < std::max(gradient_bound, 2 * usual.all));
    for (const ParameterTensor& t : exact->table.tensors) {
        INFO(t.name);
        double error = got.tensors[t.name];
        if (is_bf16 && (int)t.size == config.heads) {
            if (!means_of_few) continue;
            means_of_few->cpu += usual.tensors[t.name];
            means_of_few->gpu += error;
            means_of_few->count++;
        } else {
            CHECK(error < std::max(tensor_bound, 2 * usual.worst()));
        }
    }
    if (!is_bf16) {
        for (const Slice& slice : {exact->table.all(), exact->table.block(1), exact->table.vectors_of(1)})
            reference::check_number("gradient norm", gpu->gradient_norm(slice), exact->gradient_norm(slice),
                                    1e-5);
    }
    for (const Slice& slice : {gpu->table.all(), gpu->table.block(1), gpu->table.vectors_of(1)}) {
        double squares = 0;
        for (const ParameterTensor& t : gpu->table.tensors)
            if (t.offset >= slice.begin && t.offset < slice.end) {
                Vector d = gradient(*gpu, t);
                squares += reference::dot(d, d);
            }
        reference::check_number("gradient norm", gpu->gradient_norm(slice), std::sqrt(squares), 1e-6);
    }
    // The first steps of AdamW have the same size for every gradient: a tensor moves by the signs of its
    // gradient.
    for (int step = 1; step <= 2; step++)
        for (size_t i = 0; i < models.size(); i++) update(*models[i], *optimizers[i], step);
    for (const ParameterTensor& t : exact->table.tensors) {
        INFO(t.name);
        std::vector<float> updated(t.size), expected(t.size);
        gpu->read(Store::weights, t, updated.data());
        exact->read(Store::weights, t, expected.data());
        CHECK(reference::relative_error(Vector(updated.begin(), updated.end()),
                                        Vector(expected.begin(), expected.end())) < (is_bf16 ? 3e-2 : 1e-3));
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

// Every kind of attention with positions and qk-norm, then every scale with every decay. If the test is not
// thorough, positions and qk-norm change together, and most kinds have only the scales `row` and `sum`.
std::vector<GPTConfig> configs() {
    std::vector<GPTConfig> all;
    for (AttentionKind kind : reference::every_kind())
        for (PositionKind positions : {PositionKind::learned, PositionKind::rope})
            for (bool qk_norm : {false, true}) {
                if (!thorough() && qk_norm != (positions == PositionKind::rope)) continue;
                GPTConfig c = small();
                c.attention_kind = kind, c.positions = positions, c.qk_norm = qk_norm;
                c.short_conv = qk_norm ? 3 : 0, c.output_gate = !qk_norm;
                c.mlp_channels = qk_norm ? 0 : 13;  // fewer than channels, and odd
                if (attention_power(kind) == 0) c.attention_scale = "-1.5";
                all.push_back(c);
            }
    for (AttentionKind kind : reference::every_kind())
        for (const char* scale : {"row", "context", "mean", "sum", "0.1"})
            for (DecayKind decay : {DecayKind::none, DecayKind::fixed, DecayKind::learned, DecayKind::gate}) {
                const bool row = scale == std::string("row"), sum = scale == std::string("sum");
                if (attention_power(kind) == 0 && !row) continue;
                if (!thorough() && !row && !sum &&
                    (kind != AttentionKind::poly3 || decay == DecayKind::fixed))
                    continue;
                GPTConfig c = small();
                c.attention_kind = kind, c.attention_scale = scale, c.decay = decay;
                c.positions = PositionKind::rope, c.qk_norm = true;
                c.output_gate = decay == DecayKind::learned;
                all.push_back(c);
                // Hybrids: one without and one with statistics in the blocks that have no softmax.
                if (kind != AttentionKind::poly3 || !(row || sum)) continue;
                if (decay != (row ? DecayKind::gate : DecayKind::learned)) continue;
                c.softmax_every = 2;
                all.push_back(c);
            }
    return all;
}

}  // namespace

TEST_CASE("the CUDA model against the CPU's: losses, gradients and updates, float32") {
    for (const GPTConfig& config : configs()) compare(config, {Purpose::training, 2, 23, Precision::fp32});
}

TEST_CASE("the CUDA model against the CPU's: losses, gradients and updates, bf16") {
    Means few;
    for (const GPTConfig& config : configs())
        compare(config, {Purpose::training, 2, 23, Precision::bf16}, &few);
    REQUIRE(few.count > 20);
    CHECK(few.gpu < 1.5 * few.cpu);
    CHECK(few.gpu / few.count < 3e-2);
}

TEST_CASE("the CUDA model against the CPU's: attention at linear cost") {
    for (AttentionKind kind : reference::linear_kinds())
        for (auto [precision, decay] : {std::pair(Precision::fp32, DecayKind::learned),
                                        {Precision::bf16, DecayKind::learned},
                                        {Precision::fp32, DecayKind::gate},
                                        {Precision::bf16, DecayKind::gate}}) {
            const int power = attention_power(kind);
            if (precision == Precision::bf16 && power != 2) continue;
            GPTConfig config = small();
            config.channels = 16, config.context = 150;  // two segments
            config.attention_kind = kind, config.qk_norm = true, config.positions = PositionKind::rope;
            config.attention_scale = power == 2 ? "sum" : "row";
            config.decay = power == 3 && decay == DecayKind::learned ? DecayKind::none : decay;
            config.softmax_every = decay == DecayKind::gate && power != 3 ? 2 : 0;
            ModelOptions options{Purpose::training, 1, 150, precision};
            options.kernel = AttentionKernel::linear;
            compare(config, options);
        }
}

TEST_CASE("the CUDA model against the CPU's: what is computed again in the backward pass is the same") {
    for (Recompute recompute : {Recompute::gelu, Recompute::layernorm, Recompute::block})
        for (Precision precision : {Precision::fp32, Precision::bf16}) {
            GPTConfig config = small();
            config.attention_kind = AttentionKind::poly3, config.qk_norm = true,
            config.positions = PositionKind::rope, config.output_gate = true;
            config.decay = DecayKind::gate, config.softmax_every = 2;
            compare(config, {Purpose::training, 2, 23, precision, recompute});
        }
}

TEST_CASE("the CUDA model against the CPU's: gradients added up in bf16") {
    for (AttentionKind kind : {AttentionKind::softmax, AttentionKind::poly3})
        for (PositionKind positions : {PositionKind::learned, PositionKind::rope}) {
            GPTConfig config = small();
            config.attention_kind = kind, config.positions = positions, config.qk_norm = true;
            config.short_conv = 3, config.output_gate = true;
            config.decay = kind == AttentionKind::softmax ? DecayKind::learned : DecayKind::gate;
            ModelOptions options{Purpose::training, 2, 23, Precision::bf16};
            options.gradients = Precision::bf16;
            compare(config, options);
        }
    ModelOptions options{Purpose::training, 2, 23, Precision::fp32};
    options.gradients = Precision::bf16;
    CHECK_THROWS_AS(require_supported(gpu::backend(), small(), options), Error);
}

TEST_CASE("the CUDA model: gradients in bf16 beside those in float32") {
    const int B = 2, T = 23;
    GPTConfig config = small();
    std::vector<std::unique_ptr<Model>> models;  // in float32 and in bf16
    std::vector<std::unique_ptr<Optimizer>> optimizers;
    std::vector<int> tokens = reference::random_ints((size_t)B * T, config.vocab_size, 10);
    for (Precision gradients : {Precision::fp32, Precision::bf16}) {
        ModelOptions options{Purpose::training, B, T, Precision::bf16};
        options.gradients = gradients;
        models.push_back(gpu::backend().make_model(config, options));
        models.back()->allocate();
        fill(*models.back());
        optimizers.push_back(models.back()->make_optimizer(AdamW()));
        optimizers.back()->allocate();
    }
    CHECK(models[0]->memory()[1].bytes - models[1]->memory()[1].bytes > 1.8 * models[0]->table.size);
    const Batch batch{tokens.data(), tokens.data(), B, T};
    for (int step = 1; step <= 2; step++) {
        for (auto& model : models)
            for (int i = 0; i < 4; i++) model->run(batch, Pass::training(0.25f, i == 0, i == 3));
        Distance d = distance(*models[1], *models[0]);
        CHECK(d.all > 1e-4);
        CHECK(d.worst() < 1e-2);
        for (size_t i = 0; i < models.size(); i++) update(*models[i], *optimizers[i], step);
    }
    // A step whose gradient is not finite changes nothing, and the message says where the NaN comes from.
    for (size_t i = 0; i < models.size(); i++) {
        Model* model = models[i].get();
        const ParameterTensor& t = model->table.tensors[0];
        std::vector<float> before(t.size), after(t.size);
        model->read(Store::weights, t, before.data());
        model->run(batch, Pass::training(std::numeric_limits<float>::quiet_NaN()));
        CHECK(std::isnan(update(*model, *optimizers[i], 3)));
        CHECK(model->first_nonfinite() == "gradient of ln_f.bias");
        model->read(Store::weights, t, after.data());
        CHECK(before == after);
    }
    models.clear();
    CHECK(ptxsim::take_reports().empty());
}

TEST_CASE("the CUDA model against the CPU's: tokens one after another from a cache") {
    // poly1 goes over from keys and values to the state after 64 tokens.
    struct Case {
        AttentionKind attention;
        CacheKind kind;
        DecayKind decay;
        int softmax_every = 0;
    };
    std::vector<Case> cases;
    for (DecayKind decay : {DecayKind::learned, DecayKind::gate})
        cases.insert(cases.end(), {{AttentionKind::softmax, CacheKind::kv, decay},
                                   {AttentionKind::poly3, CacheKind::kv, decay},
                                   {AttentionKind::poly2, CacheKind::state, decay},
                                   {AttentionKind::poly1, CacheKind::automatic, decay},
                                   {AttentionKind::poly1, CacheKind::automatic, decay, 2}});
    for (const Case& c : cases) {
        const CacheKind kind = c.kind;
        GPTConfig config = small();
        config.attention_kind = c.attention, config.positions = PositionKind::rope, config.qk_norm = true,
        config.short_conv = 3, config.output_gate = true;
        config.decay = c.decay, config.softmax_every = c.softmax_every;
        CAPTURE((int)c.attention);
        CAPTURE(c.softmax_every);
        ModelOptions options{Purpose::inference, 1, 8};
        options.cache = CacheKind::kv;
        auto cpu = cpu::choose_backend().make_model(config, options);
        options.cache = kind;
        auto gpu = gpu::backend().make_model(config, options);
        std::vector<int> tokens =
            reference::random_ints(kind == CacheKind::automatic ? 70 : 30, config.vocab_size, 3);
        for (Model* model : {cpu.get(), gpu.get()}) {
            model->allocate();
            fill(*model);
            model->clear_cache();
        }
        for (size_t at = 0; at < tokens.size();) {
            CAPTURE(at);
            int n = at == 0 ? 11 : 1;  // the prompt is longer than the model takes at once
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

TEST_CASE("the CUDA model refuses a linear form of attention that has none") {
    GPTConfig config = small();
    config.attention_kind = AttentionKind::poly4;
    auto error = [&](AttentionKernel kernel, CacheKind cache) {
        ModelOptions options{Purpose::inference, 1, 8};
        options.kernel = kernel, options.cache = cache;
        return error_of([&] { require_supported(gpu::backend(), config, options); });
    };
    CHECK(error(AttentionKernel::automatic, CacheKind::automatic) == "");
    CHECK(error(AttentionKernel::linear, CacheKind::kv).find("--attention-kernel linear") == 0);
    CHECK(error(AttentionKernel::tiled, CacheKind::state).find("--cache state") == 0);
}

TEST_CASE("the CUDA model: what --zero divides among ranks takes 1 / ranks of the memory") {
    GPTConfig config;
    config.layers = 3, config.heads = 2, config.channels = 64, config.context = 8, config.vocab_size = 257;
    const ParameterTable table(config, 272);
    const double vectors = (double)table.vectors().size(), cut = (double)table.vectors().begin;
    const double buffers = 2.0 * table.block(0).size() + table.embeddings().size();
    for (int ranks : {1, 2, 4, 8})
        for (int level : {0, 1, 2}) {
            CAPTURE(ranks);
            CAPTURE(level);
            ModelOptions options{Purpose::training, 1, 8, Precision::bf16};
            options.gradients = Precision::bf16;
            options.sharding = {level, ranks - 1, ranks};
            auto model = gpu::backend().make_model(config, options);
            auto optimizer = model->make_optimizer(AdamW());
            size_t free, total, now;
            gpu::check(cudaMemGetInfo(&free, &total));
            model->allocate();
            optimizer->allocate();
            gpu::check(cudaMemGetInfo(&now, &total));
            const std::vector<MemoryGroup> memory = model->memory();
            double planned = (double)optimizer->bytes();
            for (const MemoryGroup& group : memory) planned += (double)group.bytes;
            CHECK(std::abs((double)(free - now) - planned) < 1 << 16);  // and this is what is taken
            auto near = [&](double bytes, double expected) {
                return std::abs(bytes - expected) < 4096 + 64.0 * ranks * table.buckets().size();
            };
            const double all = cut + vectors, kept = cut / ranks + vectors;
            const bool is_cut = level > 0 && ranks > 1;
            CHECK(near((double)optimizer->bytes(), 8 * (is_cut ? kept : all)));
            const double gathered = is_cut ? 4.0 * (1 << 22) : 0;  // for checkpoints
            CHECK(near((double)memory[0].bytes, 2 * all + 4 * (is_cut ? kept : all) + gathered));
            CHECK(near((double)memory[1].bytes,
                       2 * (is_cut && level == 2 ? kept + buffers : all) + 4 * vectors));
        }
}

// With lazy streams a copy happens as late as it may. So a batch that is written too early gives another
// loss.
TEST_CASE("the CUDA model: a batch stays as it is until it has been copied to the GPU") {
    const bool was_lazy = ptxsim::options().lazy;
    for (bool lazy : {false, true}) {
        CAPTURE(lazy);
        ptxsim::options().lazy = lazy;
        const int B = 2, T = 9, passes = 5;
        auto model = gpu::backend().make_model(small(), {Purpose::inference, B, T});
        model->allocate();
        fill(*model);
        std::vector<std::vector<int>> tokens;
        double expected = 0;
        for (int i = 0; i < passes; i++) {
            tokens.push_back(reference::random_ints(B * T, small().vocab_size, 30 + i));
            expected += model->loss({tokens[i].data(), tokens[i].data(), B, T});
        }
        for (int i = 0; i < passes; i++) model->run({tokens[i].data(), tokens[i].data(), B, T}, Pass());
        CHECK(model->take_loss() == doctest::Approx(expected).epsilon(1e-12));
    }
    ptxsim::options().lazy = was_lazy;
    CHECK(ptxsim::take_reports().empty());
}
