// The whole model, compared with the golden files of the PyTorch twin and with itself (generation and
// accumulation).
#define LLMC_TESTING
#include "train_gpt.cpp"

#include <doctest/doctest.h>

#include <map>
#include <memory>
#include <random>

#include "llmc/checkpoint.h"
#include "llmc/options.h"
#include "llmc/safetensors.h"
#include "tests/attention_kinds.h"
#include "tests/helpers.h"

namespace {

const std::string kGolden = "tests/golden/";

double squares(const float* x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

// ||a - b|| / ||b||, or NaN if a or b has a NaN.
double relative_error(const float* a, const float* b, size_t n) {
    double difference = 0;
    for (size_t i = 0; i < n; i++) difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    return std::sqrt(difference / squares(b, n));
}

std::vector<float> floats(const TensorView& tensor) {
    std::vector<float> values(tensor.bytes / sizeof(float));
    memcpy(values.data(), tensor.data, tensor.bytes);
    return values;
}

std::vector<int> ints(const SafetensorsFile& file, const std::string& name) {
    const TensorView* tensor = file.find(name);
    REQUIRE(tensor);
    std::vector<int> values(tensor->bytes / sizeof(int));
    memcpy(values.data(), tensor->data, tensor->bytes);
    return values;
}

// A model with the golden parameters. A tensor takes the first elements of the stored tensor.
template <class Real = float>
std::unique_ptr<cpu::GPT<Real>> golden_model(const GPTConfig& config, const SafetensorsFile& params,
                                             const ModelOptions& options) {
    auto model = std::make_unique<cpu::GPT<Real>>(config, options);
    model->allocate();
    for (const ParameterTensor& t : model->table.tensors) {
        const TensorView* stored = params.find(t.name);
        REQUIRE(stored);
        REQUIRE(stored->bytes >= t.size * sizeof(float));
        model->write(Store::weights, t, floats(*stored).data());
    }
    return model;
}

struct GoldenCase {
    std::string name, file;
    GPTConfig config;
};

std::vector<GoldenCase> golden_cases() {
    std::vector<GoldenCase> cases;
    for (const auto& entry : read_json(kGolden + "cases.json"))
        cases.push_back({entry["name"], kGolden + entry["file"].get<std::string>(),
                         config_from_json(entry["config"], "cases.json")});
    return cases;
}

constexpr int kBatch = 2, kSeq = 13;  // the sizes in the golden files

}  // namespace

TEST_CASE("loss, logits and every gradient equal the PyTorch twin's") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    REQUIRE(inputs.size() == kBatch * kSeq);
    std::vector<GoldenCase> cases = golden_cases();
    REQUIRE(cases.size() >= 30);
    for (const GoldenCase& golden : cases) {
        CAPTURE(golden.name);
        SafetensorsFile expected(golden.file);
        auto model = golden_model(golden.config, params, {Purpose::training, kBatch, kSeq});
        std::vector<float> logits((size_t)kBatch * kSeq * model->V, NAN);
        model->all_logits(logits.data(), inputs.data(), kBatch, kSeq);
        CHECK(relative_error(logits.data(), floats(*expected.find("logits")).data(), logits.size()) < 1e-5);

        float loss = (float)model->loss({inputs.data(), targets.data(), kBatch, kSeq}, Pass::training());
        CHECK(relative_error(&loss, floats(*expected.find("loss")).data(), 1) < 1e-5);
        CHECK(expected.tensors().size() == model->table.tensors.size() + 2);
        double all_gradients = 0;  // the norm of all gradients together
        for (const TensorView& t : expected.tensors())
            if (t.name.starts_with("grad."))
                all_gradients += squares(floats(t).data(), t.bytes / sizeof(float));
        all_gradients = std::sqrt(all_gradients);
        for (const ParameterTensor& t : model->table.tensors) {
            CAPTURE(t.name);
            const TensorView* stored = expected.find("grad." + t.name);
            REQUIRE(stored);
            REQUIRE(stored->shape == t.shape);
            std::vector<float> gradient(t.size), wanted = floats(*stored);
            model->read(Store::gradients, t, gradient.data());
            // With scale `sum` and qk-norm, q_gain cancels, except for the 1e-6 in the normaliser. So its
            // gradient consists mostly of rounding errors.
            double norm = std::sqrt(squares(wanted.data(), t.size));
            bool rounding = norm < 1e-5 * all_gradients;
            bool cancels = t.name.ends_with("q_gain") && model->attention[t.layer].has_row_sum();
            double allowed = rounding || cancels ? std::max(1e-4 * norm, 1e-7 * all_gradients) : 1e-4 * norm;
            CHECK(relative_error(gradient.data(), wanted.data(), t.size) * norm < allowed);
        }
    }
}

TEST_CASE("a narrow MLP is the usual one without the channels whose weights are 0") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    GPTConfig config = golden_cases()[1].config;
    config.output_gate = true;  // its gradient shares memory with the MLP's
    GPTConfig narrow_config = config;
    const int kept = config.channels / 2 - 1, width = config.mlp_width();
    narrow_config.set_mlp_channels(kept);
    auto wide = golden_model(config, params, {Purpose::training, kBatch, kSeq});
    cpu::GPT<float> narrow(narrow_config, {Purpose::training, kBatch, kSeq});
    narrow.allocate();
    // Calls f(tensor of the wide model, of the narrow one, their elements that mean the same).
    auto each = [&](auto f) {
        for (size_t i = 0; i < wide->table.tensors.size(); i++) {
            const ParameterTensor &from = wide->table.tensors[i], &to = narrow.table.tensors[i];
            std::vector<std::pair<size_t, size_t>> same;
            for (size_t j = 0; j < to.size; j++) {
                bool rows_are_shorter = to.shape.back() == kept;  // otherwise there are fewer of them
                same.push_back(
                    {rows_are_shorter && from.size > to.size ? j / kept * width + j % kept : j, j});
            }
            f(from, to, same);
        }
    };
    each([&](const ParameterTensor& from, const ParameterTensor& to, const auto& same) {
        std::vector<float> values(from.size), zeroed(from.size), few(to.size);
        wide->read(Store::weights, from, values.data());
        for (auto [w, n] : same) zeroed[w] = few[n] = values[w];
        wide->write(Store::weights, from, zeroed.data());
        narrow.write(Store::weights, to, few.data());
    });
    const Batch batch{inputs.data(), targets.data(), kBatch, kSeq};
    double loss = wide->loss(batch, Pass::training());
    CHECK(std::abs(narrow.loss(batch, Pass::training()) - loss) < 1e-6 * loss);
    each([&](const ParameterTensor& from, const ParameterTensor& to, const auto& same) {
        CAPTURE(to.name);
        std::vector<float> all(from.size), found(to.size, NAN), expected(to.size);
        wide->read(Store::gradients, from, all.data());
        narrow.read(Store::gradients, to, found.data());
        for (auto [w, n] : same) expected[n] = all[w];
        CHECK(relative_error(found.data(), expected.data(), to.size) < 1e-5);
    });
}

TEST_CASE("a number as the scale of softmax and sigmoid is that of larger values") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    const Batch batch{inputs.data(), targets.data(), kBatch, kSeq};
    int cases = 0;
    for (const GoldenCase& golden : golden_cases()) {
        if (golden.config.attention().polynomial()) continue;
        CAPTURE(golden.name);
        cases++;
        const float factor = -2.5f;
        GPTConfig config = golden.config;
        config.attention_scale = "-2.5";
        auto scaled = golden_model(config, params, {Purpose::training, kBatch, kSeq}),
             plain = golden_model(golden.config, params, {Purpose::training, kBatch, kSeq});
        const int C = config.channels;
        // Multiplies the part of c_attn's weight and bias that makes the values.
        auto larger = [&](const ParameterTensor& t, std::vector<float> values) {
            if (t.name.find("c_attn") != t.name.npos)
                for (size_t i = 0; i < t.size; i++)
                    if (i % (3 * C) >= size_t(2 * C)) values[i] *= factor;
            return values;
        };
        for (const ParameterTensor& t : plain->table.tensors) {
            std::vector<float> values(t.size);
            plain->read(Store::weights, t, values.data());
            plain->write(Store::weights, t, larger(t, values).data());
        }
        std::vector<AttentionNorms> norms(config.layers * config.heads), usual(norms.size());
        const double loss = plain->loss(batch, Pass::training(1, true, true, usual.data()));
        CHECK(scaled->loss(batch, Pass::training(1, true, true, norms.data())) ==
              doctest::Approx(loss).epsilon(1e-6));
        for (const ParameterTensor& t : plain->table.tensors) {
            CAPTURE(t.name);
            std::vector<float> found(t.size), expected(t.size);
            scaled->read(Store::gradients, t, found.data());
            plain->read(Store::gradients, t, expected.data());
            const double norm = std::sqrt(squares(expected.data(), t.size));
            if (norm < 1e-6) continue;  // that of a bias of k with softmax
            CHECK(relative_error(found.data(), larger(t, expected).data(), t.size) < 1e-4);
        }
        // The first block reads the same in both models.
        CHECK(norms[0].norm == doctest::Approx(2.5 * usual[0].norm).epsilon(1e-5));
        CHECK(norms[0].jacobian_norm == doctest::Approx(2.5 * usual[0].jacobian_norm).epsilon(1e-5));
        CHECK(norms[0].negative_mass == 1);
        std::vector<float> logits((size_t)kSeq * scaled->V);
        scaled->all_logits(logits.data(), inputs.data(), 1, kSeq);
        scaled->clear_cache();
        CHECK(relative_error(scaled->decode(inputs.data(), kSeq), &logits[(size_t)(kSeq - 1) * scaled->V],
                             scaled->V) < 1e-5);
    }
    CHECK(cases > 3);
}

TEST_CASE("targets of -1 do not count") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    const GPTConfig config = golden_cases()[1].config;
    auto masked = golden_model(config, params, {Purpose::training, kBatch, kSeq}),
         alone = golden_model(config, params, {Purpose::training, 1, kSeq});
    double loss = alone->loss({inputs.data(), targets.data(), 1, kSeq}, Pass::training());
    std::fill(targets.begin() + kSeq, targets.end(), -1);  // the second sequence
    CHECK(masked->loss({inputs.data(), targets.data(), kBatch, kSeq, kSeq}, Pass::training()) ==
          doctest::Approx(loss).epsilon(1e-6));
    for (const ParameterTensor& t : alone->table.tensors) {
        CAPTURE(t.name);
        std::vector<float> found(t.size, NAN), expected(t.size);
        masked->read(Store::gradients, t, found.data());
        alone->read(Store::gradients, t, expected.data());
        CHECK(relative_error(found.data(), expected.data(), t.size) < 1e-5);
    }
}

TEST_CASE("bf16: loss and gradients are those of float32 but for rounding") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    for (const GoldenCase& golden : golden_cases()) {
        CAPTURE(golden.name);
        SafetensorsFile expected(golden.file);
        auto model = golden_model<cpu::bf16>(golden.config, params, {Purpose::training, kBatch, kSeq});
        float loss = (float)model->loss({inputs.data(), targets.data(), kBatch, kSeq}, Pass::training());
        CHECK(relative_error(&loss, floats(*expected.find("loss")).data(), 1) < 1e-2);
        double difference = 0, norm = 0;  // the squares of all gradients together
        for (const ParameterTensor& t : model->table.tensors) {
            std::vector<float> gradient(t.size), wanted = floats(*expected.find("grad." + t.name));
            model->read(Store::gradients, t, gradient.data());
            for (size_t i = 0; i < t.size; i++) gradient[i] -= wanted[i];
            difference += squares(gradient.data(), t.size);
            norm += squares(wanted.data(), t.size);
        }
        // Most are under 1e-2. High powers raise what was rounded, which begins with the embedding; and `sum`
        // with a decay divides by a sum of a few scores, which rounding changes much where they are small.
        const bool few_terms =
            golden.config.attention().has_row_sum() && golden.config.decay != DecayKind::none;
        CHECK(std::sqrt(difference / norm) < (few_terms ? 0.13 : 0.1));
    }
}

TEST_CASE("recomputing less or more gives the same bits, in less memory") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    auto check = [&](auto real) {
        using Real = decltype(real);
        for (const GoldenCase& golden : golden_cases()) {
            CAPTURE(golden.name);
            std::vector<float> expected;
            size_t bytes = SIZE_MAX;
            for (Recompute recompute :
                 {Recompute::none, Recompute::gelu, Recompute::layernorm, Recompute::block}) {
                CAPTURE(kRecomputeNames[(int)recompute]);
                ModelOptions options{Purpose::training, kBatch, kSeq};
                options.recompute = recompute;
                auto model = golden_model<Real>(golden.config, params, options);
                std::vector<float> got;
                for (int micro_batch = 0; micro_batch < 2; micro_batch++) {
                    Pass pass = Pass::training(1, micro_batch == 0, micro_batch == 1);
                    got.push_back((float)model->loss({inputs.data(), targets.data(), kBatch, kSeq}, pass));
                }
                for (const ParameterTensor& t : model->table.tensors) {
                    got.resize(got.size() + t.size);
                    model->read(Store::gradients, t, &got[got.size() - t.size]);
                }
                if (recompute == Recompute::none) expected = got;
                CHECK(memcmp(got.data(), expected.data(), got.size() * sizeof(float)) == 0);
                CHECK(model->memory()[2].bytes < bytes);
                bytes = model->memory()[2].bytes;
            }
        }
    };
    check(float());
    check(cpu::bf16());
}

TEST_CASE("generation with the cache gives the logits of the training forward pass at every position") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids");
    for (const GoldenCase& golden : golden_cases()) {
        CAPTURE(golden.name);
        for (CacheKind cache : {CacheKind::kv, CacheKind::state}) {
            if (cache == CacheKind::state &&
                !has_linear_form(golden.config.attention(), golden.config.head_size()))
                continue;
            CAPTURE(kCacheNames[(int)cache]);
            ModelOptions options{Purpose::training, 1, kSeq};
            options.cache = cache;
            auto model = golden_model(golden.config, params, options);
            int V = model->V;
            std::vector<float> expected((size_t)kSeq * V, NAN);
            model->all_logits(expected.data(), inputs.data(), 1, kSeq);
            for (std::vector<int> pieces : {std::vector<int>(kSeq, 1), {5, 1, 7}, {kSeq}}) {
                model->clear_cache();
                int position = 0;
                for (int n : pieces) {
                    const float* logits = model->decode(inputs.data() + position, n);
                    position += n;
                    CAPTURE(position);
                    CHECK(relative_error(logits, expected.data() + (size_t)(position - 1) * V, V) < 1e-5);
                }
            }
            // Generation also leaves nothing that changes the next batch, such as the angles of later
            // positions.
            model->clear_cache();
            model->decode(inputs.data(), 2);
            model->decode(inputs.data(), kSeq);
            std::vector<float> again(expected.size());
            model->all_logits(again.data(), inputs.data(), 1, kSeq);
            CHECK(again == expected);
        }
    }
}

TEST_CASE("a prompt longer than the buffers goes through the cache in pieces") {
    GPTConfig config;
    config.layers = 2, config.heads = 2, config.channels = 16, config.context = 40, config.vocab_size = 50;
    config.attention_kind = AttentionKind::poly3, config.positions = PositionKind::rope,
    config.qk_norm = true, config.short_conv = 4;
    config.decay = DecayKind::learned;
    std::vector<int> tokens(33);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = (int)(i * i % 50);
    auto make = [&](int B, int T) {
        auto model = std::make_unique<cpu::GPT<float>>(config, ModelOptions{Purpose::inference, B, T});
        model->allocate();
        std::vector<float> values;
        for (const ParameterTensor& t : model->table.tensors) {
            values.resize(t.size);
            initialize_tensor(values.data(), t, 3);
            model->write(Store::weights, t, values.data());
        }
        model->clear_cache();
        return model;
    };
    auto small = make(1, 4), large = make(1, 33);
    std::vector<float> expected((size_t)33 * 50);
    large->all_logits(expected.data(), tokens.data(), 1, 33);
    CHECK(relative_error(small->decode(tokens.data(), 33), expected.data() + 32 * 50, 50) < 1e-5);
}

TEST_CASE("all_logits writes every row where the logits come in several chunks") {
    GPTConfig config;
    config.layers = 1, config.heads = 1, config.channels = 8, config.context = 130;
    config.vocab_size = 131080;  // 128 rows in a chunk; the width of a row in memory is not this
    const int T = 130;
    cpu::GPT<float> model(config, {Purpose::inference, 1, T});
    model.allocate();
    std::vector<float> values;
    for (const ParameterTensor& t : model.table.tensors) {
        values.resize(t.size);
        initialize_tensor(values.data(), t, 5);
        model.write(Store::weights, t, values.data());
    }
    std::vector<int> tokens(T);
    for (int i = 0; i < T; i++) tokens[i] = i * i;
    std::vector<float> logits((size_t)T * config.vocab_size, NAN);
    model.all_logits(logits.data(), tokens.data(), 1, T);
    model.clear_cache();
    const int first = 127;  // the last row of the first chunk
    const float* expected = model.decode(tokens.data(), first + 1);
    for (int t = first;; expected = model.decode(&tokens[++t], 1)) {
        CHECK(relative_error(&logits[(size_t)t * config.vocab_size], expected, config.vocab_size) < 1e-5);
        if (t == T - 1) break;
    }
}

// A model with initial weights, a kind of attention that has a linear form, and sequences of several chunks.
// With softmax_every 2 its second block has softmax.
struct LongCase {
    GPTConfig config;
    std::vector<int> tokens;

    LongCase(AttentionKind kind, DecayKind decay, int softmax_every, int length) : tokens(length) {
        config.layers = 2, config.heads = 2, config.channels = 16, config.context = 200,
        config.vocab_size = 50;
        config.attention_kind = kind, config.positions = PositionKind::rope, config.qk_norm = true,
        config.short_conv = 3;
        config.decay = decay, config.softmax_every = softmax_every;
        for (size_t i = 0; i < tokens.size(); i++) tokens[i] = (int)((i * i + i / 7) % 50);
    }
    std::unique_ptr<cpu::GPT<float>> make(const ModelOptions& options) const {
        auto model = std::make_unique<cpu::GPT<float>>(config, options);
        model->allocate();
        std::vector<float> values;
        for (const ParameterTensor& t : model->table.tensors) {
            values.resize(t.size);
            initialize_tensor(values.data(), t, 3);
            model->write(Store::weights, t, values.data());
        }
        model->clear_cache();
        return model;
    }
};

constexpr std::pair<DecayKind, int> kLongOptions[] = {{DecayKind::none, 0},
                                                      {DecayKind::learned, 0},
                                                      {DecayKind::gate, 0},
                                                      {DecayKind::learned, 2},
                                                      {DecayKind::gate, 2}};

TEST_CASE("the linear kernel gives the tiled one's loss and gradients") {
    for (AttentionKind kind : reference::linear_kinds())
        for (const auto& options_of_case : kLongOptions) {
            const DecayKind decay = options_of_case.first;
            const int softmax_every = options_of_case.second;
            CAPTURE((int)kind);
            CAPTURE(kDecayNames[(int)decay]);
            CAPTURE(softmax_every);
            const int T = 150;
            LongCase c(kind, decay, softmax_every, T + 1);
            std::vector<std::vector<float>> gradients;
            std::vector<double> losses;
            for (AttentionKernel kernel : {AttentionKernel::tiled, AttentionKernel::linear}) {
                ModelOptions options{Purpose::training, 1, T};
                options.kernel = kernel;
                auto model = c.make(options);
                losses.push_back(model->loss({c.tokens.data(), c.tokens.data() + 1, 1, T}, Pass::training()));
                std::vector<float>& all = gradients.emplace_back();
                for (const ParameterTensor& t : model->table.tensors) {
                    all.resize(all.size() + t.size);
                    model->read(Store::gradients, t, &all[all.size() - t.size]);
                }
            }
            CHECK(losses[1] == doctest::Approx(losses[0]).epsilon(1e-6));
            CHECK(relative_error(gradients[1].data(), gradients[0].data(), gradients[0].size()) < 1e-5);
            CHECK(gradients[1] != gradients[0]);  // different bits show that two different kernels ran
        }
}

TEST_CASE("generation goes over to the state without a change in the logits") {
    for (AttentionKind kind : reference::linear_kinds())
        for (const auto& options_of_case : kLongOptions) {
            const DecayKind decay = options_of_case.first;
            const int softmax_every = options_of_case.second;
            CAPTURE((int)kind);
            CAPTURE(kDecayNames[(int)decay]);
            CAPTURE(softmax_every);
            LongCase c(kind, decay, softmax_every, 200);
            ModelOptions options{Purpose::inference, 1, 1};
            options.cache = CacheKind::kv;
            auto kv = c.make(options);
            options.cache = CacheKind::automatic;
            auto automatic = c.make(options);
            for (int t = 0; t < 200; t++) {
                CAPTURE(t);
                const float* expected = kv->decode(&c.tokens[t], 1);
                CHECK(relative_error(automatic->decode(&c.tokens[t], 1), expected, 50) < 1e-5);
            }
            CHECK(automatic->cache.has_state(0));
            CHECK(automatic->cache.has_state(1) == (softmax_every == 0));
            CHECK(!kv->cache.has_state(0));
        }
}

TEST_CASE("a new model has RoPE and qk-norm, unless its attention is softmax or flags say otherwise") {
    for (AttentionKind kind : reference::every_kind()) {
        ModelFlags flags;
        flags.attention = kAttentionNames[(int)kind];
        CAPTURE(*flags.attention);
        const bool softmax = kind == AttentionKind::softmax;
        CHECK(flags.fresh(100, -1).attention_kind == kind);
        CHECK(flags.fresh(100, -1).rope() == !softmax);
        CHECK(flags.fresh(100, -1).qk_norm == !softmax);
        const bool polynomial = attention_power(kind) > 0;
        CHECK(flags.fresh(100, -1).decay == (polynomial ? DecayKind::gate : DecayKind::none));
        CHECK(flags.fresh(100, -1).output_gate == polynomial);
        CHECK(flags.fresh(100, -1).short_conv == (polynomial ? 4 : 0));
        flags.positions = "learned", flags.qk_norm = softmax;
        CHECK(!flags.fresh(100, -1).rope());
        CHECK(flags.fresh(100, -1).qk_norm == softmax);
        flags.q_gain = 0.5;  // it needs qk-norm
        double gain = 0;
        const std::string error = error_of([&] { gain = flags.fresh(100, -1).q_gain; });
        CHECK(gain == (softmax ? 0.5 : 0.0));
        CHECK(error == (softmax ? "" : "--q-gain: only a model with --qk-norm true has gains"));
    }
    ModelFlags flags;
    flags.softmax_every = 4;
    check_error([&] { flags.fresh(100, -1); }, {"--softmax-every", "--attention", "softmax"});
    flags.attention = "poly1";
    CHECK(flags.fresh(100, -1).softmax_every == 4);
}

TEST_CASE("blocks with softmax among others: which they are, and that their gains start at 1") {
    GPTConfig config;
    config.layers = 7, config.heads = 2, config.channels = 8;
    config.attention_kind = AttentionKind::poly1, config.qk_norm = true, config.q_gain = 0.25;
    for (auto [every, expected] :
         {std::pair(0, "ppppppp"), {1, "sssssss"}, {2, "pspspsp"}, {3, "ppsppsp"}, {8, "ppppppp"}}) {
        config.softmax_every = every;
        for (int l = 0; l < config.layers; l++) {
            const bool softmax = expected[l] == 's';
            CHECK(config.attention_of_blocks()[l].softmax() == softmax);
            for (const ParameterTensor& t : ParameterTable(config, 50272).tensors)
                if (t.name == str("h.", l, ".attn.q_gain")) CHECK(t.value == (softmax ? 1 : 0.25));
        }
    }
}

TEST_CASE("a kind of attention without a linear form is refused where that is asked for") {
    GPTConfig config;
    config.layers = 1, config.heads = 2, config.channels = 128, config.context = 8, config.vocab_size = 10;
    const Backend backend{"CPU",        {.program = "train_gpt"}, cpu::make_model, cpu::set_threads,
                          cpu::connect, cpu::measured_peak};
    auto make = [&](AttentionKind kind, const char* scale, AttentionKernel kernel, CacheKind cache) {
        config.attention_kind = kind, config.attention_scale = scale;
        ModelOptions options{Purpose::inference, 1, 8};
        options.kernel = kernel, options.cache = cache;
        return error_of([&] { require_supported(backend, config, options); });
    };
    for (AttentionKind kind : {AttentionKind::softmax, AttentionKind::poly3, AttentionKind::poly4}) {
        CHECK(make(kind, "row", AttentionKernel::linear, CacheKind::kv).find("--attention-kernel linear") ==
              0);
        CHECK(make(kind, "row", AttentionKernel::tiled, CacheKind::state).find("--cache state") == 0);
        CHECK(make(kind, "row", AttentionKernel::automatic, CacheKind::automatic) == "");
    }
    CHECK(make(AttentionKind::poly1, "sum", AttentionKernel::linear, CacheKind::kv) != "");
    CHECK(make(AttentionKind::poly2, "sum", AttentionKernel::linear, CacheKind::state) == "");
    config.softmax_every = 2;  // the other blocks decide
    CHECK(make(AttentionKind::poly2, "row", AttentionKernel::linear, CacheKind::state) == "");
    CHECK(make(AttentionKind::poly4, "row", AttentionKernel::linear, CacheKind::kv) != "");
}

TEST_CASE("micro-batches add up to the gradient of the whole batch") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    GPTConfig config = golden_cases()[1].config;
    auto whole = golden_model(config, params, {Purpose::training, 2, kSeq}),
         halves = golden_model(config, params, {Purpose::training, 2, kSeq});
    // The first pass of a step does not add to what was there before.
    for (const ParameterTensor& t : halves->table.tensors)
        halves->write(Store::gradients, t, std::vector<float>(t.size, 7).data());
    double loss = whole->loss({inputs.data(), targets.data(), 2, kSeq}, Pass::training());
    double sum = 0;
    for (int b = 0; b < 2; b++)
        sum += halves->loss({inputs.data() + b * kSeq, targets.data() + b * kSeq, 1, kSeq},
                            Pass::training(0.5f, b == 0, b == 1)) /
               2;
    CHECK(sum == doctest::Approx(loss).epsilon(1e-6));
    for (const ParameterTensor& t : whole->table.tensors) {
        CAPTURE(t.name);
        std::vector<float> a(t.size), b(t.size);
        whole->read(Store::gradients, t, a.data());
        halves->read(Store::gradients, t, b.data());
        CHECK(relative_error(b.data(), a.data(), t.size) < 1e-5);
    }
}

TEST_CASE("validation leaves gradients alone, an inference model gives the same loss") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    GPTConfig config = golden_cases()[0].config;
    auto model = golden_model(config, params, {Purpose::training, kBatch, kSeq});
    double loss = model->loss({inputs.data(), targets.data(), kBatch, kSeq});
    CHECK(model->gradient_norm(model->table.all()) == 0);
    cpu::GPT<float> inference(config, {Purpose::inference, kBatch, kSeq});
    inference.allocate();
    for (const ParameterTensor& t : inference.table.tensors)
        inference.write(Store::weights, t, floats(*params.find(t.name)).data());
    CHECK(inference.loss({inputs.data(), targets.data(), kBatch, kSeq}) == loss);
    CHECK(inference.memory()[2].bytes < model->memory()[2].bytes);
}

TEST_CASE("the first tensor with a NaN is found where it arose") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    auto model = golden_model(golden_cases()[0].config, params, {Purpose::training, kBatch, kSeq});
    auto run = [&] { return model->loss({inputs.data(), targets.data(), kBatch, kSeq}, Pass::training()); };
    CHECK(std::isfinite(run()));
    CHECK(model->first_nonfinite() == "");
    float before = model->weights.h[1].fc_bias[3];
    model->weights.h[1].fc_bias[3] = INFINITY;
    run();
    CHECK(model->first_nonfinite() == "weight h.1.mlp.c_fc.bias");
    model->weights.h[1].fc_bias[3] = 3e38f;  // this is finite, but the output of the MLP is not
    model->weights.h[1].fc_proj_weight[3 * 12] = 3e38f;
    run();
    CHECK(model->first_nonfinite() == "activation h.1.mlp.residual");
    model->weights.h[1].fc_bias[3] = before;
}

TEST_CASE("the gradient is clipped to the norm that is given, and by 0 not at all") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    for (double max_norm : {0.0, 0.5, 1e9}) {
        CAPTURE(max_norm);
        auto model = golden_model(golden_cases()[0].config, params, {Purpose::training, kBatch, kSeq});
        AdamW adamw;
        adamw.beta1 = 0.75;
        auto optimizer = model->make_optimizer(adamw);
        optimizer->allocate();
        model->loss({inputs.data(), targets.data(), kBatch, kSeq}, Pass::training());
        model->clip_gradients(max_norm);
        optimizer->step(model->table.all(), 1e-3, 1);
        double norm = model->clipped_norm(), moment = 0;
        CHECK(norm > 1);
        for (const ParameterTensor& t : model->table.tensors) {
            std::vector<float> m(t.size);
            optimizer->read(0, t.slice(), m.data());
            moment += squares(m.data(), t.size);
        }
        double expected = 0.25 * (max_norm == 0.5 ? 0.5 : norm);
        CHECK(std::abs(std::sqrt(moment) - expected) < 1e-5 * expected);
    }
}

TEST_CASE("training learns a repeated sequence, for every attention") {
    for (AttentionKind kind : reference::every_kind()) {
        CAPTURE((int)kind);
        GPTConfig config;
        config.layers = 1, config.heads = 2, config.channels = 32, config.context = 16,
        config.vocab_size = 11;
        const bool softmax = kind == AttentionKind::softmax;
        config.attention_kind = kind, config.qk_norm = !softmax;
        config.positions = !softmax ? PositionKind::rope : PositionKind::learned;
        cpu::GPT<float> model(config, {Purpose::training, 2, 16});
        model.allocate();
        auto optimizer = model.make_optimizer(AdamW());
        optimizer->allocate();
        initialize_weights(model, 1);
        std::vector<int> tokens(33);
        for (size_t i = 0; i < tokens.size(); i++) tokens[i] = (int)(i * i % 11);
        double loss = 0;
        for (int step = 1; step <= 60; step++) {
            loss = model.loss({tokens.data(), tokens.data() + 1, 2, 16}, Pass::training());
            if (step == 1) CHECK(loss == doctest::Approx(std::log(11.0)).epsilon(0.05));
            model.clip_gradients(1.0);
            optimizer->step(model.table.all(), 1e-2, step);
        }
        CHECK(loss < 0.1);
    }
}

TEST_CASE("hooks of buckets: in order, before weights are read, before gradients are written, and after") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    auto model = golden_model(golden_cases()[1].config, params, {Purpose::training, kBatch, kSeq});
    const ParameterTable& table = model->table;
    const std::vector<Slice> buckets = table.buckets();
    const int L = model->L, embeddings = table.bucket_of_embeddings(), vectors = table.bucket_of_vectors();
    // The buckets cover the array: the blocks from its middle to its start, the embeddings, the vectors.
    REQUIRE((int)buckets.size() == L + 2);
    CHECK(buckets[embeddings].begin == 0);
    CHECK(buckets[embeddings].end == buckets[L - 1].begin);
    for (int l = 0; l < L; l++) {
        CHECK(table.block(l).begin == buckets[table.bucket_of_block(l)].begin);
        CHECK(table.block(l).end == (l + 1 < L ? table.block(l + 1) : table.vectors()).begin);
    }
    CHECK(buckets[vectors].end == table.size);

    auto gradients = [&](const Slice& slice) {
        std::vector<float> all;
        for (const ParameterTensor& t : model->table.tensors) {
            if (t.offset < slice.begin || t.offset >= slice.end) continue;
            all.resize(all.size() + t.size);
            model->read(Store::gradients, t, &all[all.size() - t.size]);
        }
        return all;
    };
    std::vector<std::string> calls;
    std::vector<std::vector<float>> announced(buckets.size()), before(buckets.size());
    BucketHooks hooks;
    hooks.before_forward = [&](int bucket) { calls.push_back(str("forward ", bucket)); };
    hooks.before_backward = [&](int bucket) {
        calls.push_back(str("backward ", bucket));
        before[bucket] = gradients(buckets[bucket]);
    };
    hooks.ready = [&](int bucket) {
        calls.push_back(str("ready ", bucket));
        announced[bucket] = gradients(buckets[bucket]);
    };
    Batch batch{inputs.data(), targets.data(), kBatch, kSeq};
    REQUIRE(L == 2);
    model->run(batch, Pass::forward_only(), hooks);
    CHECK(calls == std::vector<std::string>{"forward 2", "forward 1", "forward 0"});
    for (bool first : {true, false}) {
        std::vector<std::vector<float>> earlier;
        for (const Slice& bucket : buckets) earlier.push_back(gradients(bucket));
        calls.clear();
        model->run(batch, Pass::training(0.5f, first, !first), hooks);
        CHECK(calls == std::vector<std::string>{"forward 2", "forward 1", "forward 0", "backward 2",
                                                "backward 0", "ready 0", "backward 1", "ready 1", "ready 2",
                                                "ready 3"});
        for (int bucket = 0; bucket <= vectors; bucket++) {
            CAPTURE(bucket);
            if (bucket != vectors) CHECK(before[bucket] == earlier[bucket]);  // nothing was written before
            CHECK(announced[bucket] == gradients(buckets[bucket]));           // nothing has changed since
            CHECK(announced[bucket] != earlier[bucket]);
        }
    }
}

TEST_CASE("--attention-lr multiplies the steps of c_attn, q_gain and the gates, and of nothing else") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    GPTConfig config = golden_cases()[1].config;
    config.output_gate = true, config.short_conv = 2, config.decay = DecayKind::gate;
    CHECK(rate_runs(ParameterTable(config, 32), 1).size() == 1);
    // How far each tensor moves in the first step, weight decay included.
    auto moves = [&](double attention_lr) {
        auto model = golden_model(config, params, {Purpose::training, kBatch, kSeq});
        auto optimizer = model->make_optimizer({.attention_lr = attention_lr});
        optimizer->allocate();
        model->loss({inputs.data(), targets.data(), kBatch, kSeq}, Pass::training());
        model->clip_gradients(1);
        optimizer->step(model->table.all(), 1e-2, 1);
        std::map<std::string, std::vector<float>> moves;
        for (const ParameterTensor& t : model->table.tensors) {
            std::vector<float>& move = moves[t.name];
            move.resize(t.size);
            model->read(Store::weights, t, move.data());
            const std::vector<float> before = floats(*params.find(t.name));
            for (size_t i = 0; i < t.size; i++) move[i] -= before[i];
        }
        return moves;
    };
    auto usual = moves(1), slower = moves(0.25);
    int slow = 0;
    for (auto& entry : usual) {
        const std::string& name = entry.first;
        std::vector<float>& expected = entry.second;
        CAPTURE(name);
        const bool attention =
            name.find("c_attn") != name.npos || name.ends_with("q_gain") || name.find("_gate.") != name.npos;
        CHECK(squares(expected.data(), expected.size()) > 0);
        if (attention) {
            for (float& x : expected) x *= 0.25f;
            CHECK(relative_error(slower[name].data(), expected.data(), expected.size()) < 1e-4);
        } else {
            CHECK(slower[name] == expected);
        }
        slow += attention;
    }
    CHECK(slow == 2 * 6);
}

TEST_CASE("an optimizer's step over slices is that over the whole, and not finite gradients change nothing") {
    SafetensorsFile params(kGolden + "params.safetensors");
    std::vector<int> inputs = ints(params, "input_ids"), targets = ints(params, "targets");
    auto trained = [&](bool in_slices) {
        auto model = golden_model(golden_cases()[1].config, params, {Purpose::training, kBatch, kSeq});
        auto optimizer = model->make_optimizer({.attention_lr = 0.3});
        optimizer->allocate();
        size_t size = model->table.size;
        std::vector<Slice> slices{{0, size}};
        // The slices are cut inside of tensors, at multiples of 16 and elsewhere, and one is empty.
        if (in_slices) slices = {{0, 16}, {16, 1000}, {1000, 1000}, {1000, 1007}, {1007, size}};
        for (int step = 1; step <= 2; step++) {
            model->loss({inputs.data(), targets.data(), kBatch, kSeq}, Pass::training());
            model->clip_gradients(0.1);
            for (const Slice& slice : slices) optimizer->step(slice, 1e-2, step);
        }
        model->loss({inputs.data(), targets.data(), kBatch, kSeq}, Pass::training(NAN));
        model->clip_gradients(0.1);
        optimizer->step({0, size}, 1e-2, 3);
        CHECK(std::isnan(model->clipped_norm()));
        CHECK(optimizer->first_nonfinite() == "");
        std::vector<float> all;
        for (const ParameterTensor& t : model->table.tensors) {
            all.resize(all.size() + 3 * t.size);
            model->read(Store::weights, t, &all[all.size() - 3 * t.size]);
            for (size_t array = 0; array < 2; array++)
                optimizer->read(array, t.slice(), &all[all.size() - (2 - array) * t.size]);
        }
        return all;
    };
    CHECK(relative_error(trained(true).data(), trained(false).data(), trained(false).size()) < 1e-7);
}

TEST_CASE("a NaN in the optimizer's arrays is found by name") {
    auto model = std::make_unique<cpu::GPT<float>>(golden_cases()[0].config,
                                                   ModelOptions{Purpose::training, kBatch, kSeq});
    model->allocate();
    auto optimizer = model->make_optimizer(AdamW());
    optimizer->allocate();
    CHECK(optimizer->first_nonfinite() == "");
    const ParameterTensor& t = model->table.tensors[3];
    std::vector<float> values(t.size, 1.0f);
    values.back() = NAN;
    optimizer->write(1, t.slice(), values.data());
    CHECK(optimizer->first_nonfinite() == "v of " + t.name);
}
