// llmc/sharding.h and llmc/data_parallel.h with ranks that are threads of this process, compared with one
// rank. A collective takes place as early as it may, when it is called, or as late, when a rank waits for it.
// And a part of a reduction that belongs to another rank becomes NaN, unless it is zero. So what is sent
// before it is complete, used before it is there, or overwritten while it is sent, gives other results.
#define LLMC_TESTING
#include "train_gpt.cpp"

#include <omp.h>

#include <barrier>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "llmc/data_parallel.h"
#include "llmc/rng.h"
#include "tests/helpers.h"

namespace {

// What the threads share. One of them runs at a time, because the matrix products are not made for several.
struct Meeting {
    explicit Meeting(int ranks) : barrier(ranks), places(ranks) {}
    std::barrier<> barrier;
    std::mutex turn;
    std::vector<void*> places;  // (ranks)

    void wait() {
        turn.unlock();
        barrier.arrive_and_wait();
        turn.lock();
    }
};

class Threads : public Communicator {
  public:
    Threads(int rank, int ranks, Meeting& meeting, bool late)
        : Communicator(rank, ranks), meeting_(meeting), late_(late) {}
    int64_t sent = 0;  // bytes, if each collective is done as well as possible

    void all_reduce(Span x) override {
        sent += 2 * (int64_t)(x.size * size_of(x.type)) * (ranks - 1) / ranks;
        queue([=, this] {
            if (x.type == Element::f64)
                sum((double*)x.data, {0, x.size});
            else
                sum((float*)x.data, {0, x.size});
        });
    }
    void reduce_scatter(Span x, const std::vector<Slice>& parts) override {
        for (int r = 0; r < ranks; r++)
            if (r != rank) sent += (int64_t)(parts[r].size() * size_of(x.type));
        queue([=, this] {
            float* values = (float*)x.data;
            sum(values, parts[rank]);
            for (size_t i = 0; i < x.size; i++)
                if ((i < parts[rank].begin || i >= parts[rank].end) && values[i] != 0) values[i] = NAN;
        });
    }
    void all_gather(Span x, const std::vector<Slice>& parts) override {
        sent += (ranks - 1) * (int64_t)(parts[rank].size() * size_of(x.type));
        queue([=, this] {
            std::vector<void*> places = meet(x.data);
            for (int r = 0; r < ranks; r++) {
                const size_t begin = parts[r].begin * size_of(x.type);
                if (r != rank)
                    std::memcpy(x.at(parts[r].begin), (char*)places[r] + begin,
                                parts[r].size() * size_of(x.type));
            }
            meeting_.wait();
        });
    }
    int64_t queued() const override { return done_ + (int64_t)queue_.size(); }
    void wait(int64_t n) override {
        for (; done_ < n; done_++) {
            queue_.front()();
            queue_.pop_front();
        }
    }
    double sum(double x) override {
        sum(&x, {0, 1});
        return x;
    }
    bool any(bool x) override { return sum(x) > 0; }

  private:
    Meeting& meeting_;
    const bool late_;
    std::deque<std::function<void()>> queue_;
    int64_t done_ = 0;

    void queue(std::function<void()> collective) {
        queue_.push_back(std::move(collective));
        if (!late_) join();
    }

    std::vector<void*> meet(void* mine) {
        meeting_.places[rank] = mine;
        meeting_.wait();
        return meeting_.places;
    }
    template <class T>
    void sum(T* x, Slice slice) {
        std::vector<void*> places = meet(x);
        std::vector<T> total(slice.size());
        for (void* place : places)
            for (size_t i = 0; i < total.size(); i++) total[i] += ((T*)place)[slice.begin + i];
        meeting_.wait();
        std::copy(total.begin(), total.end(), x + slice.begin);
        meeting_.wait();
    }
};

// Calls f(communicator) on as many threads.
template <class F>
void on_ranks(int ranks, bool late, F f) {
    Meeting meeting(ranks);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; rank++)
        threads.emplace_back([&, rank] {
            omp_set_num_threads(1);
            const std::lock_guard turn(meeting.turn);
            Threads communicator(rank, ranks, meeting, late);
            f(communicator);
        });
    for (std::thread& thread : threads) thread.join();
}

// For an optimizer that needs whole matrices: the parts begin where tensors begin.
std::vector<Slice> whole_tensors(const ParameterTable& table, Slice bucket, int ranks) {
    std::vector<Slice> parts;
    size_t begin = bucket.begin;
    for (int r = 0; r < ranks; r++) {
        const size_t wanted = bucket.begin + bucket.size() * (r + 1) / ranks;
        size_t end = r + 1 < ranks ? begin : bucket.end;
        for (const ParameterTensor& t : table.tensors)
            if (t.offset >= bucket.begin && t.offset <= wanted && t.offset > end && r + 1 < ranks)
                end = t.offset;
        parts.push_back({begin, end});
        begin = end;
    }
    return parts;
}

GPTConfig odd_config(int layers = 3) {
    GPTConfig config;
    config.layers = layers, config.heads = 3, config.channels = 60, config.context = 7,
    config.vocab_size = 257;
    config.attention_kind = AttentionKind::poly3, config.qk_norm = true, config.decay = DecayKind::learned;
    config.output_gate = true;
    return config;
}

struct Result {
    std::vector<float> weights;         // all tensors, one after another
    std::vector<double> losses, norms;  // of each step
    std::vector<double> layer_norms;    // of the last step's gradients: (L)
    std::vector<MemoryGroup> memory;    // of rank 0
    size_t moments = 0;                 // bytes at rank 0
    int64_t sent = 0;                   // bytes by rank 0 in the last step
    double counted = 0;                 // the same, by DataParallel
};

constexpr int kSamples = 12, kSteps = 4;

// Trains with `passes` micro-batches a step at each rank.
template <class Real>
Result trained(const GPTConfig& config, int ranks, int level, int passes, CutPolicy cut = equal_parts,
               bool late = true) {
    const int T = config.context, B = kSamples / (ranks * passes);
    Result result;
    on_ranks(ranks, late, [&](Threads& communicator) {
        const int rank = communicator.rank;
        ModelOptions options{Purpose::training, B, T};
        if (!std::is_same_v<Real, float>) options.precision = Precision::bf16;
        options.sharding = {level, rank, ranks, cut};
        cpu::GPT<Real> model(config, options);
        std::unique_ptr<Optimizer> optimizer = model.make_optimizer({.attention_lr = 0.3});
        DataParallel parallel(communicator, model, *optimizer);
        model.allocate();
        optimizer->allocate();
        initialize_weights(model, 1);
        if (ranks > 1) parallel.measure(passes);
        for (int step = 1; step <= kSteps; step++) {
            const int64_t before = communicator.sent;
            for (int i = 0; i < passes; i++) {
                std::vector<int> inputs, targets;
                for (int b = 0; b < B; b++)
                    for (int t = 0; t < T; t++) {
                        const int sample = ((step * passes + i) * ranks + rank) * B + b;
                        auto token = [&](int t) { return (sample * 131 + t * t * 29) % config.vocab_size; };
                        inputs.push_back(token(t)), targets.push_back(token(t + 1));
                    }
                Pass pass = Pass::training(1.0f / (passes * ranks), i == 0, i + 1 == passes);
                model.run({inputs.data(), targets.data(), B, T}, pass, parallel.hooks(pass));
            }
            std::vector<double> layers;
            parallel.step(0.5, 1e-3, step);
            const double loss = communicator.sum(model.take_loss()) / (passes * ranks),
                         norm = model.clipped_norm();
            for (int l = 0; l < config.layers; l++)
                layers.push_back(std::hypot(parallel.gradient_norm(model.table.block(l)),
                                            parallel.gradient_norm(model.table.vectors_of(l))));
            if (rank != 0) continue;
            result.losses.push_back(loss), result.norms.push_back(norm), result.layer_norms = layers;
            result.sent = communicator.sent - before;
        }
        parallel.settle();
        for (const ParameterTensor& t : model.table.tensors) {
            std::vector<float> values(t.size, NAN);
            model.gather(communicator, t, values.data());
            if (rank == 0) result.weights.insert(result.weights.end(), values.begin(), values.end());
        }
        if (rank != 0) return;
        result.memory = model.memory();
        result.moments = optimizer->bytes();
        result.counted = parallel.bytes_a_step(passes);
    });
    return result;
}

template <class T>
double relative_error(const std::vector<T>& a, const std::vector<T>& b) {
    REQUIRE(a.size() == b.size());
    double difference = 0, squares = 0;
    for (size_t i = 0; i < a.size(); i++)
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]), squares += (double)b[i] * b[i];
    return std::sqrt(difference / squares);
}

}  // namespace

TEST_CASE("sharding: the parts of a bucket follow one another, and all ranks together keep everything") {
    for (CutPolicy cut : {equal_parts, whole_tensors})
        for (int ranks : {2, 3, 7, 40}) {
            CAPTURE(ranks);
            const GPTConfig config = odd_config();
            const ParameterTable table(config, 272);
            std::vector<int> kept(table.size), counted(table.size);
            for (int rank = 0; rank < ranks; rank++) {
                const Sharding sharding(table, {1, rank, ranks, cut});
                for (size_t b = 0; b + 1 < sharding.buckets.size(); b++) {
                    size_t end = sharding.buckets[b].begin;
                    for (Slice part : sharding.parts[b]) {
                        CHECK(part.begin == end);
                        CHECK(part.end >= part.begin);
                        end = part.end;
                    }
                    CHECK(end == sharding.buckets[b].end);
                }
                size_t place = 0;
                sharding.kept.for_each(table.all(), [&](Slice piece, size_t at) {
                    CHECK(at == place);
                    place += piece.size();
                    for (size_t i = piece.begin; i < piece.end; i++) kept[i]++;
                });
                CHECK(place == sharding.kept.size());
                for (Slice piece : sharding.counted)
                    for (size_t i = piece.begin; i < piece.end; i++) counted[i]++;
                if (cut == equal_parts &&
                    ranks < 8)  // all parts are equal except for 16 elements a rank and bucket
                    CHECK(std::abs((double)(sharding.kept.size() - table.vectors().size()) -
                                   (double)table.vectors().begin / ranks) <=
                          16.0 * ranks * sharding.buckets.size());
            }
            for (size_t i = 0; i < table.size; i++) {
                const bool is_vector = i >= table.vectors().begin;
                if (kept[i] != (is_vector ? ranks : 1) || counted[i] != 1) FAIL("element ", i);
            }
        }
    // A rank that is alone keeps everything.
    const GPTConfig config = odd_config();
    const ParameterTable table(config, 272);
    CHECK(Sharding(table, {2, 0, 1}).level == 0);
    CHECK(Sharding(table, {2, 0, 1}).kept.size() == table.size);
}

TEST_CASE_TEMPLATE("sharding: every level, number of ranks and of passes trains as one rank does", Real,
                   float, cpu::bf16) {
    // In bf16 the gradients of equal sums of products in other orders differ more.
    const double tolerance = std::is_same_v<Real, float> ? 1e-5 : 1e-2;
    struct Run {
        int layers, ranks, level, passes;
        CutPolicy cut = equal_parts;
        bool late = true;
    };
    std::vector<Run> runs = {{1, 2, 2, 2}};
    for (int ranks : {2, 3})
        for (int passes : {1, 2}) {
            runs.push_back({3, ranks, 0, passes});
            for (int level : {1, 2}) {
                runs.push_back({3, ranks, level, passes});
                runs.push_back({3, ranks, level, passes, whole_tensors, ranks == 3});
            }
            runs.push_back({3, ranks, 2, passes, equal_parts, false});
        }
    for (const Run& run : runs) {
        const GPTConfig config = odd_config(run.layers);
        const Result one = trained<Real>(config, 1, 0, 1);
        CAPTURE(run.layers);
        CAPTURE(run.ranks);
        CAPTURE(run.level);
        CAPTURE(run.passes);
        CAPTURE(run.late);
        CAPTURE((run.cut == equal_parts));
        const Result result = trained<Real>(config, run.ranks, run.level, run.passes, run.cut, run.late);
        CHECK(relative_error(result.losses, one.losses) < tolerance);
        CHECK(relative_error(result.norms, one.norms) < tolerance);
        CHECK(relative_error(result.layer_norms, one.layer_norms) < tolerance);
        CHECK(relative_error(result.weights, one.weights) < tolerance);
    }
}

TEST_CASE("sharding: memory falls as 1 / ranks, and the bytes sent are the fewest possible") {
    const GPTConfig config = odd_config();
    const double parameters = (double)ParameterTable(config, 272).vectors().begin;
    const ParameterTable table(config, 272);
    const double vectors = (double)table.vectors().size();
    for (int ranks : {2, 3}) {
        CAPTURE(ranks);
        const double kept = parameters / ranks + vectors, slack = 64.0 * ranks * table.buckets().size();
        for (int level : {0, 1, 2}) {
            CAPTURE(level);
            const Result in_float = trained<float>(config, ranks, level, 1);
            const Result in_bf16 = trained<cpu::bf16>(config, ranks, level, 1);
            auto near = [&](double bytes, double expected) {
                return std::abs(bytes - expected) <= 4 * slack;
            };
            const double all = parameters + vectors, shard = level > 0 ? kept : all;
            CHECK(near((double)in_float.moments, 8 * shard));
            CHECK(near((double)in_float.memory[0].bytes, 4 * all));
            const double gathered = level > 0 ? 4.0 * (1 << 22) : 0;
            CHECK(near((double)in_bf16.memory[0].bytes, 4 * shard + 2 * all + gathered));
            const double buffers = 2.0 * table.block(0).size() + table.embeddings().size();
            CHECK(near((double)in_float.memory[1].bytes, 4 * (level > 1 ? kept + buffers : all)));

            const double share = (ranks - 1.0) / ranks;
            CHECK(in_float.counted == doctest::Approx(4 * share * 2 * all).epsilon(1e-9));
            CHECK(in_bf16.counted ==
                  doctest::Approx(share * (level > 0 ? 6 * parameters + 8 * vectors : 8 * all)));
            // Beside these there is the norm, and ranks whose parts are a little larger send a little more.
            CHECK(std::abs(in_float.sent - in_float.counted) <= 4 * slack + 16);
        }
    }
}
