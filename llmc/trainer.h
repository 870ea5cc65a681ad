// The training loop, written once for every backend (llmc/model.h).
//
// A step consumes total_batch tokens in micro-batches of batch x seq. Everything that its result depends on
// is in the checkpoint or follows from the step's number: the place in the data, the learning rate, the
// moments, and the random numbers, which are functions of seed and counter. So a resumed run computes the
// same bits as a run that was never stopped.
#pragma once
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "llmc/checkpoint.h"
#include "llmc/communicator.h"
#include "llmc/data_parallel.h"
#include "llmc/dataloader.h"
#include "llmc/inference.h"
#include "llmc/launch.h"
#include "llmc/metrics.h"
#include "llmc/model.h"
#include "llmc/norms.h"
#include "llmc/options.h"
#include "llmc/peak.h"
#include "llmc/recall.h"
#include "llmc/run_folder.h"
#include "llmc/schedule.h"
#include "llmc/tokenizer.h"

// The first Ctrl-C or SIGTERM sets this. A second one ends the program at once.
inline volatile sig_atomic_t g_stop_requested = 0;

inline void catch_stop_signals(bool mpirun) {
    struct sigaction action = {};
    action.sa_handler = [](int) { g_stop_requested = 1; };
    action.sa_flags = SA_RESETHAND | SA_RESTART;
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    if (!mpirun) return;
    // After Ctrl-C, mpirun sends SIGCONT at once, SIGTERM after a second and SIGKILL after another
    // (odls_base_sigkill_timeout). Meanwhile it reads nothing, so a rank that goes on printing soon blocks.
    // That is why its SIGCONT is the request to stop. A SIGCONT from anybody else is not.
    action.sa_sigaction = [](int, siginfo_t* info, void*) {
        if (info->si_pid == getppid()) g_stop_requested = 1;
    };
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigaction(SIGCONT, &action, nullptr);
}

// Operations of the forward and backward pass for one token. In the forward pass each weight of a matrix
// costs 2, and the two products of causal attention cost 2LCT, because a token sees half of the sequence on
// average. The backward pass costs twice as much.
inline double operations_per_token(const GPTConfig& config, int T) {
    double L = config.layers, C = config.channels;
    double block = C * ((config.output_gate ? 5 : 4) * C + 2.0 * config.mlp_width());  // weights
    return 3 * (2 * (L * block + config.vocab_size * C) + 2 * L * C * T);
}

inline std::string duration_text(double seconds) {
    int64_t s = (int64_t)std::llround(seconds);
    char text[64];
    if (s >= 3600) {
        snprintf(text, sizeof(text), "%lld:%02lld:%02lld", (long long)s / 3600, (long long)s / 60 % 60,
                 (long long)s % 60);
    } else {
        snprintf(text, sizeof(text), "%lld:%02lld", (long long)s / 60, (long long)s % 60);
    }
    return text;
}

class Trainer {
  public:
    Trainer(const Backend& backend, TrainOptions& options) : backend(backend), o(options) {}

    int run() {
        Launch launch = launch_from(environment_of(environ), isatty(STDIN_FILENO));
        comm = backend.connect(launch, o.comm_timeout);
        if (comm->ranks == 1) return train(launch);
        terminal = false;  // mpirun gives its ranks terminals, even if its own output goes to a file
        // Only rank 0 says what happens. An error that not all ranks know is said by the rank that has it.
        if (!is_root() && !freopen("/dev/null", "w", stdout)) fail("/dev/null: cannot open");
        g_warns = is_root();
        std::string what = "internal error";
        int status = kExitFailure;
        try {
            return train(launch);
        } catch (const AgreedError& e) {
            // It is printed before MPI ends, because mpirun kills the other ranks when one has ended with an
            // error.
            if (is_root()) fprintf(stderr, "%s: error: %s\n", backend.can.program, e.what());
            throw Error(e.status, "");
        } catch (const Error& e) {
            what = e.what(), status = e.status;
        } catch (const std::exception& e) {
            what = e.what();
        }
        if (!what.empty())  // otherwise another rank has said it
            fprintf(stderr, "%s: error: rank %d of %d, after step %d: %s\n", backend.can.program, comm->rank,
                    comm->ranks, state.step, printable(what).c_str());
        comm->abort(status);
        throw Error(status, "");
    }

  private:
    int train(const Launch& launch) {
        std::optional<RunFolder> folder;
        together([&] {
            if (is_root()) folder.emplace(o.out);
        });
        if (comm->ranks > 1) require_shared_folder();
        std::optional<Checkpoint> resumed, initial;  // initial has the first weights; none for a new model
        std::optional<TokenDataset> train_data, val_data;
        together([&] {
            resumed = find_start();
            o.threads = backend.set_threads(threads_of_rank(launch));
            if (resumed) {
                initial = resumed;
            } else if (!o.init_from.empty()) {
                initial = open_model(o.init_from);
            }
            GPTConfig config = choose_model(initial, resumed.has_value());
            try {
                settle_sizes(config);
                ModelOptions model_options = o.model_options();
                model_options.sharding = {o.zero, comm->rank, comm->ranks};
                require_supported(backend, config, model_options);
                model = backend.make_model(config, model_options);
                optimizer = model->make_optimizer(o.adamw);
                parallel.emplace(*comm, *model, *optimizer);
            } catch (const Error& e) {
                if (!resumed || e.status != kExitUsage) throw;
                usage_error(e.what(), " (flags that are not given have the values in ",
                            join_path(resumed->folder, "trainer.json"), ")");
            }
            train_data.emplace(o.data, "train", config.vocab_size, o.seq);
            if (o.val_every > 0 && o.val_batches > 0)
                val_data.emplace(o.data, "val", config.vocab_size, o.seq);
        });
        DataLoader loader(*train_data, o.seed);
        inputs.resize((size_t)o.batch * o.seq);
        targets.resize((size_t)o.batch * o.seq);
        if (comm->ranks > 1) require_same_ranks(*train_data, val_data, initial);

        describe(*train_data, launch);
        together([&] {
            // The peak is measured before the model takes the memory.
            peak.emplace([&] { return backend.measured_peak(o.model_options().precision); });
            model->allocate(optimizer->bytes());
            optimizer->allocate();
            load_weights(initial, resumed.has_value());
        });
        if (comm->ranks > 1) alone_ms = parallel->measure(micro_batches());
        together([&] {
            if (!is_root()) return;
            if (o.resume) delete_leftovers(o.out);
            if (resumed) set_aside_later_checkpoints(o.out, state.step);
            metrics.emplace(join_path(o.out, "metrics.jsonl"), resumed ? state.step : -1);
            folder->keep();
        });

        catch_stop_signals(launch.launcher == "mpirun");
        if (state.step == 0 && val_data) validate(*val_data);
        while (state.step < o.steps && !comm->any(g_stop_requested)) {
            step(loader);
            bool last = state.step == o.steps;
            auto due = [&](int every) { return every > 0 && (last || state.step % every == 0); };
            bool validates = val_data && due(o.val_every);
            bool samples = tokenizer && o.sample_tokens > 0 && due(o.sample_every);
            bool saves = due(o.checkpoint_every);
            if (validates || samples || saves || last) parallel->settle();
            if (validates || samples || saves) check_finite();  // a finite loss can still make NaN weights
            if (validates) validate(*val_data);
            if (samples) sample();
            if (saves) checkpoint();
        }
        print_communication();
        if (state.step < o.steps) {
            parallel->settle();
            bool saved = last_checkpoint == join_path(o.out, checkpoint_name(state.step));
            if (o.checkpoint_every > 0 && state.step > 0 && !saved) {
                check_finite();
                checkpoint();
            }
            printf("stopped after step %d; %s\n", state.step,
                   o.checkpoint_every == 0 ? "no checkpoint was asked for"
                   : state.step == 0       ? "there is nothing to resume yet"
                                           : "continue with --resume");
            fflush(stdout);
            return kExitInterrupted;
        }
        return kExitDone;
    }

    const Backend& backend;
    TrainOptions& o;
    TrainerState state;
    std::unique_ptr<Communicator> comm;
    std::unique_ptr<Model> model;
    std::unique_ptr<Optimizer> optimizer;
    std::optional<DataParallel> parallel;
    double alone_ms = 0,
           exposed_ms = 0;  // the communication of a step on its own; what all steps waited for it
    std::optional<MetricsLog> metrics;  // only rank 0 has it
    std::string tokenizer_text;         // text of tokenizer.json, which every checkpoint gets a copy of
    std::optional<Tokenizer> tokenizer;
    DatasetInfo info;
    std::vector<int> inputs, targets;  // (B,T)
    std::string last_checkpoint;
    std::optional<Peak> peak;
    double seconds_a_step = 0;
    int measured_steps = 0;  // that exposed_ms is the sum of
    bool terminal = isatty(STDOUT_FILENO);

    bool is_root() const { return comm->rank == 0; }

    // The micro-batches of a step, at each rank.
    int micro_batches() const { return (int)(o.total_batch / ((int64_t)o.batch * o.seq * comm->ranks)); }

    void log(const nlohmann::ordered_json& line) {
        if (metrics) metrics->write(line);
    }

    template <class F>
    void together(F f) {
        ::together(*comm, f);
    }

    // Ranks on one machine share its cores, unless the launcher has given cores to each of them.
    int threads_of_rank(const Launch& launch) const {
        if (o.threads > 0 || launch.local_ranks < 2 || getenv("OMP_NUM_THREADS")) return o.threads;
        cpu_set_t set;
        long cores = sysconf(_SC_NPROCESSORS_ONLN);
        long given = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : cores;
        return (int)(given < cores ? given : std::max(1L, cores / launch.local_ranks));
    }

    // An error if a rank has another folder at --out, because then no checkpoint could be written.
    void require_shared_folder() {
        const std::string mine = str("ranks_", getpid(), "_", time(nullptr), ".tmp");
        const std::string file = join_path(o.out, comm->gather(mine)[0]);
        struct Remover {
            const std::string file;  // empty: nothing
            ~Remover() { ::unlink(file.c_str()); }
        } remover{is_root() ? file : ""};
        together([&] {
            if (is_root()) FileWriter(file).close();
        });
        together([&] {
            for (int attempt = 0; !path_exists(file); attempt++) {  // a network may need a moment
                if (attempt == 10)
                    fail(o.out,
                         ": rank 0 has written to it, but this rank does not see it: expected --out in a "
                         "file system that all ranks share");
                usleep(100'000);
            }
        });
    }

    // The B sequences from `first` on.
    Batch read_batch(const DataLoader& loader, int64_t first, int B) {
        loader.batch(first, B, inputs.data(), targets.data());
        Batch batch{inputs.data(), targets.data(), B, o.seq};
        if (o.answers_only)
            batch.counted = std::max(1, keep_answers(info, inputs.data(), targets.data(), B, o.seq));
        return batch;
    }

    // A checksum of sequences from all over the dataset.
    uint32_t checksum(const TokenDataset& data) {
        std::string text = str(data.tokens());
        const int64_t n = data.sequences(), step = std::max<int64_t>(1, n / 64);
        for (int64_t i = 0; i < n; i += step) {
            data.read(i, inputs.data(), targets.data());
            text += str(" ", crc32_of((const std::byte*)inputs.data(), o.seq * sizeof(int)));
        }
        return crc32_of((const std::byte*)text.data(), text.size());
    }

    // An error if the ranks do not train the same model with the same data and flags.
    void require_same_ranks(const TokenDataset& train_data, const std::optional<TokenDataset>& val_data,
                            const std::optional<Checkpoint>& initial) {
        nlohmann::json mine = o.remembered();
        mine["the program"] = o.program;
        mine["the processor"] =
            backend.name;  // another instruction set rounds otherwise, and weights drift apart
        mine["--out"] = json_of_path(o.out);
        mine["the model's config"] = config_to_json(model->config).dump();
        mine["the step to start from"] = state.step;
        mine["the checksum of the training data"] = checksum(train_data);
        mine["the checksum of the validation data"] = val_data ? checksum(*val_data) : 0;
        mine["the checksum of the tokenizer"] =
            crc32_of((const std::byte*)tokenizer_text.data(), tokenizer_text.size());
        mine["the checksum of the first weights"] = initial ? initial->checksum() : 0;
        std::vector<std::string> texts = comm->gather(mine.dump());
        nlohmann::json first = nlohmann::json::parse(texts[0]);
        for (int rank = 1; rank < comm->ranks; rank++) {
            nlohmann::json other = nlohmann::json::parse(texts[rank]);
            for (const auto& [key, value] : first.items()) {
                if (other[key] == value) continue;
                throw AgreedError(kExitUsage, str("the ranks disagree on ", key, ": rank 0 has ",
                                                  brief(value), ", rank ", rank, " has ", brief(other[key])));
            }
        }
    }

    // Finds the checkpoint to resume from and takes over its options; none for a new run.
    std::optional<Checkpoint> find_start() {
        std::optional<Checkpoint> checkpoint;
        bool has_checkpoints = !checkpoint_steps(o.out).empty();
        std::error_code missing;
        bool has_metrics =
            std::filesystem::file_size(join_path(o.out, "metrics.jsonl"), missing) > 0 && !missing;
        if (!o.resume_from.empty()) {
            checkpoint = open_model(o.resume_from);
            if ((has_checkpoints || has_metrics) &&
                !std::filesystem::equivalent(parent_folder(checkpoint->folder), o.out, missing))
                usage_error("--resume ", o.resume_from, " belongs to another run than the one in --out ",
                            o.out);
            if (!checkpoint->trainer)
                fail(o.resume_from, ": trainer.json is missing, so it can only be given to --init-from");
        } else if (o.resume) {
            checkpoint = newest_checkpoint(o.out);
            if (!checkpoint)
                printf("nothing to resume in %s: starting from the beginning\n", printable(o.out).c_str());
        } else if (has_checkpoints) {
            usage_error("--out ", o.out,
                        " already holds a run: continue it with --resume, or choose another folder");
        } else if (has_metrics) {
            usage_error("--out ", o.out,
                        " holds the metrics of a run that wrote no checkpoint: add --resume to start from "
                        "the beginning and replace them, or choose another folder");
        }
        if (checkpoint) {
            std::string file = join_path(checkpoint->folder, "trainer.json");
            std::string changes = o.recall(checkpoint->trainer->options, file);
            state = *checkpoint->trainer;
            last_checkpoint = checkpoint->folder;
            printf("resuming from %s after step %d\n", printable(checkpoint->folder).c_str(), state.step);
            if (!state.program.empty() && state.program != o.program)
                printf("written by %s, continued by %s\n", printable(state.program, 100).c_str(),
                       o.program.c_str());
            if (!changes.empty()) printf("changed by the command line: %s\n", changes.c_str());
            if (state.step > o.steps)
                usage_error("--steps ", o.steps, ": ", file, " says that ", state.step,
                            " steps are done already");
        }
        if (o.data.empty() && o.resume)
            usage_error("--data is required: ", o.out,
                        " holds no checkpoint, so this run starts from the beginning");
        if (o.data.empty()) usage_error("--data is required");
        try {
            open_folder(o.data);
        } catch (const Error& e) {
            if (!checkpoint || o.given("--data")) throw;
            fail(e.what(), " (", join_path(checkpoint->folder, "trainer.json"),
                 " has this path: add --data if the folder is elsewhere)");
        }
        return checkpoint;
    }

    GPTConfig choose_model(const std::optional<Checkpoint>& initial, bool resumed) {
        info = read_dataset_info(o.data);
        if (o.answers_only && !info.recall)
            usage_error("--answers-only: ", o.data,
                        " has no answers; expected a dataset of data/prepare.py "
                        "recall");
        if (o.answers_only && o.cuda_graph)
            usage_error(
                "--answers-only: it does not work with --cuda-graph, because the number of answers in a "
                "batch may change");
        GPTConfig config;
        if (initial) {
            config = initial->config;
            o.model.require_same(config, join_path(initial->folder, "config.json"));
            if (info.vocab_size > config.vocab_size)
                fail(o.data, ": its vocabulary has ", info.vocab_size, " tokens, but that of ",
                     initial->folder, " has only ", config.vocab_size);
            if (info.described) config.set_separator(info.eot_token);
        } else {
            config = o.model.fresh(info.vocab_size, info.eot_token);
            try {
                config.validate("the model asked for");
            } catch (const Error& e) {
                usage_error(e.what());
            }
        }
        choose_tokenizer(initial, resumed, config);
        return config;
    }

    // Chooses the tokenizer of the model if it has one, otherwise that of the dataset. A dataset of llm.c's
    // shards has none.
    void choose_tokenizer(const std::optional<Checkpoint>& initial, bool resumed, const GPTConfig& config) {
        const std::optional<MappedFile> dataset_file = find_tokenizer(o.data);
        const MappedFile* file = dataset_file ? &*dataset_file : nullptr;
        const MappedFile* model_file = nullptr;
        if (initial && (resumed || !o.new_tokenizer)) model_file = initial->tokenizer();
        require_same_tokenizer(file, model_file, resumed ? "" : "; --new-tokenizer allows it");
        if (model_file) file = model_file;
        if (!file) return;
        tokenizer_text = file->text();
        tokenizer = open_if_supported(*file, "samples");
        if (tokenizer) check_tokenizer(*tokenizer, file->path(), config);
    }

    void settle_sizes(const GPTConfig& config) {
        if (o.seq == 0) o.seq = config.context;
        check_batch(config, o.batch, o.seq);
        // Then every sequence has the same number of answers, so that batches and ranks have equal weights.
        if (o.answers_only && (info.recall->seq == 0 || o.seq % info.recall->seq != 0))
            usage_error("--answers-only: --seq is ", o.seq, ", expected ",
                        info.recall->seq ? str(info.recall->seq, ", the length of the examples in ")
                                         : str("a \"seq\" in the meta.json of "),
                        o.data);
        int64_t micro_batch = (int64_t)o.batch * o.seq;
        std::string of_ranks = comm->ranks > 1 ? str(" x ", comm->ranks, " ranks") : "";
        micro_batch *= comm->ranks;
        if (o.total_batch == 0) o.total_batch = micro_batch;
        if (o.total_batch % micro_batch != 0)
            usage_error("--total-batch ", o.total_batch, ": expected a multiple of --batch ", o.batch,
                        " x --seq ", o.seq, of_ranks, " = ", micro_batch);
        if (o.total_batch / micro_batch > 1 << 30)
            usage_error("--total-batch ", o.total_batch, ": more than 2^30 micro-batches of ", micro_batch,
                        " tokens");
        if (o.warmup < 0) o.warmup = std::min(700, o.steps / 10);
    }

    void load_weights(const std::optional<Checkpoint>& initial, bool resumed) {
        if (initial) {
            initial->load_weights(*model);
            if (resumed) initial->load_optimizer(*model, *optimizer);
            initial->close();
            return;
        }
        initialize_weights(*model, o.seed);
    }

    void describe(const TokenDataset& data, const Launch& launch) const {
        const GPTConfig& config = model->config;
        int64_t steps_an_epoch = std::max<int64_t>(1, data.sequences() * o.seq / o.total_batch);
        std::string attention = kAttentionNames[(int)config.attention_kind];
        if (config.attention().polynomial() || config.attention().value_factor() != 1)
            attention += ", scale " + config.attention_scale;
        if (config.softmax_every) attention += str(", softmax every ", config.softmax_every, " blocks");
        attention +=
            str(", ", kPositionNames[(int)config.positions], " positions", config.qk_norm ? ", qk-norm" : "",
                config.qk_norm && config.q_gain != 1 ? str(" from ", config.q_gain) : "",
                config.decay != DecayKind::none ? str(", decay ", kDecayNames[(int)config.decay]) : "",
                config.short_conv ? str(", short conv ", config.short_conv) : "",
                config.output_gate ? ", output gate" : "");
        std::string mlp = config.mlp_channels ? str(", MLP ", config.mlp_channels) : "";
        printf("model      %d layers, %d heads, %d channels%s, context %d, vocabulary %d: %zu parameters\n",
               config.layers, config.heads, config.channels, mlp.c_str(), config.context, config.vocab_size,
               model->table.count);
        printf("attention  %s\n", attention.c_str());
        printf("data       %s: %lld tokens, %lld sequences of %d\n", printable(o.data).c_str(),
               (long long)data.tokens(), (long long)data.sequences(), o.seq);
        printf("batch      %lld tokens a step, in %lld micro-batches of %d x %d; %lld steps an epoch\n",
               (long long)o.total_batch, (long long)(o.total_batch / ((int64_t)o.batch * o.seq)), o.batch,
               o.seq, (long long)steps_an_epoch);
        if (comm->ranks > 1)
            printf("ranks      %d, started by %s; %d threads at rank 0; --zero %d; %.1f MB sent a step\n",
                   comm->ranks, launch.launcher.c_str(), o.threads, o.zero,
                   parallel->bytes_a_step(micro_batches()) / 1e6);
        printf("training   %d steps, %s schedule to %g after %d steps of warm-up, %s\n", o.steps,
               o.schedule.c_str(), o.learning_rate, o.warmup, o.compute.dtype.c_str());
        size_t total = 0;
        std::string groups;
        std::vector<MemoryGroup> memory = model->memory();
        memory.push_back({"optimizer", optimizer->bytes()});
        for (const MemoryGroup& group : memory) {
            total += group.bytes;
            groups += str(groups.empty() ? "" : ", ", group.name, " ", group.bytes >> 20);
        }
        printf("memory     %zu MiB on the %s (%s)\n", total >> 20, backend.name.c_str(), groups.c_str());
        fflush(stdout);
    }

    void step(DataLoader& loader) {
        auto start = std::chrono::steady_clock::now();
        int ranks = comm->ranks, passes = micro_batches();
        std::vector<AttentionNorms> norms;  // (L,H), of the first micro-batch; rank 0 has them, if wanted
        bool wants_norms = o.norms_every > 0 && (state.step == 0 || (state.step + 1) % o.norms_every == 0);
        if (is_root() && wants_norms) norms.resize((size_t)model->config.layers * model->config.heads);
        comm->set_step(state.step);
        for (int i = 0; i < passes; i++) {
            const int64_t first = state.samples + ((int64_t)i * ranks + comm->rank) * o.batch;
            Pass pass = Pass::training(1.0f / (passes * ranks), i == 0, i + 1 == passes,
                                       i == 0 && !norms.empty() ? norms.data() : nullptr);
            model->run(read_batch(loader, first, o.batch), pass, parallel->hooks(pass));
        }
        int step = state.step + 1;
        double rate =
            learning_rate_at(o.schedule, step, o.steps, o.warmup, o.learning_rate, o.final_lr_fraction);
        parallel->step(o.grad_clip, rate, step);
        double norm = model->clipped_norm(), loss = comm->sum(model->take_loss()) / (passes * ranks);
        if (!std::isfinite(loss)) diverged(step, str("the loss is ", loss));
        if (!std::isfinite(norm)) diverged(step, str("the gradient norm is ", norm));
        state.step = step;
        state.samples += (int64_t)passes * ranks * o.batch;

        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        double tokens_per_second = o.total_batch / seconds;
        nlohmann::ordered_json line = {{"step", step},
                                       {"loss", loss},
                                       {"lr", rate},
                                       {"grad_norm", norm},
                                       {"tokens", step * o.total_batch},
                                       {"ms", seconds * 1e3},
                                       {"tokens_per_second", tokens_per_second}};
        std::string communication;
        if (ranks > 1) {
            double exposed = comm->take_exposed_ms();
            exposed_ms += exposed, measured_steps++;
            line["exposed_comm_ms"] = exposed;
            char text[64];
            snprintf(text, sizeof text, " (%.1f waiting)", exposed);
            communication = text;
        }
        log(line);
        if (wants_norms) write_norms(norms);
        // A running mean, so that one slow step does not change the remaining time much.
        seconds_a_step = seconds_a_step == 0 ? seconds : 0.9 * seconds_a_step + 0.1 * seconds;
        double share = peak->share(operations_per_token(model->config, o.seq) * tokens_per_second / ranks);
        printf(
            "step %*d/%d | loss %s%.4f%s | norm %.3f | lr %.2e | %.1f ms%s | %.0f tok/s | %.0f%% of peak | "
            "%s "
            "left\n",
            (int)std::to_string(o.steps).size(), step, o.steps, terminal ? "\033[1m" : "", loss,
            terminal ? "\033[0m" : "", norm, rate, seconds * 1e3, communication.c_str(), tokens_per_second,
            100 * share, duration_text(seconds_a_step * (o.steps - step)).c_str());
        fflush(stdout);
    }

    // Says how much of the communication was hidden behind the computing.
    void print_communication() const {
        if (comm->ranks == 1 || measured_steps == 0) return;
        double exposed = exposed_ms / measured_steps;
        printf("communication  %.1f ms a step on its own, %.1f ms in the training: %.0f%% hidden\n", alone_ms,
               exposed, 100 * std::clamp(1 - exposed / alone_ms, 0.0, 1.0));
        fflush(stdout);
    }

    // Writes the norms of the step that was just done: a line for each head, and one for the gradient of each
    // layer. All ranks must call it; only rank 0 has the heads' norms.
    void write_norms(const std::vector<AttentionNorms>& norms) {
        const GPTConfig& config = model->config;
        const std::vector<AttentionConfig> attention = config.attention_of_blocks();
        for (int l = 0; l < config.layers; l++) {
            for (int h = 0; h < config.heads && is_root(); h++) {
                nlohmann::ordered_json line = {{"step", state.step}, {"layer", l}, {"head", h}};
                append_norms(line, norms[(size_t)l * config.heads + h], attention[l]);
                log(line);
            }
            double norm = std::hypot(parallel->gradient_norm(model->table.block(l)),
                                     parallel->gradient_norm(model->table.vectors_of(l)));
            log({{"step", state.step}, {"layer", l}, {"gradient_norm", norm}});
        }
    }

    // All ranks must call this, because a NaN may be at one of them only.
    [[noreturn]] void diverged(int step, const std::string& what) {
        parallel->settle();
        std::string tensor;
        std::vector<std::string> tensors = comm->gather(first_nonfinite());
        // A NaN in one rank's activations is in the gradients of all ranks. So the first kind counts.
        for (const std::string kind : {"weight ", "activation ", "gradient ", ""})
            for (int rank = 0; rank < comm->ranks && tensor.empty(); rank++)
                if (!tensors[rank].empty() && tensors[rank].starts_with(kind))
                    tensor = tensors[rank] + (comm->ranks > 1 ? str(" at rank ", rank) : "");
        throw AgreedError(kExitDiverged,
                          str("training diverged at step ", step, ": ", what, ", first in ",
                              tensor.empty() ? std::string("their sum") : tensor,
                              "; last checkpoint: ", last_checkpoint.empty() ? "none" : last_checkpoint));
    }

    std::string first_nonfinite() const {
        std::string tensor = model->first_nonfinite();
        return tensor.empty() ? optimizer->first_nonfinite() : tensor;
    }

    void check_finite() {
        if (comm->any(!first_nonfinite().empty())) diverged(state.step, "a value is not finite");
    }

    // The sequences do not depend on the number of ranks and on --batch. The ranks take turns with the
    // micro-batches, of which the last one may be smaller, and some ranks may have one less than others.
    void validate(const TokenDataset& data) {
        DataLoader loader(data, 0, /*shuffle=*/false);
        int64_t sequences = std::min(data.sequences(), o.val_batches * (o.total_batch / o.seq));
        double loss = 0;
        for (int64_t begin = (int64_t)comm->rank * o.batch; begin < sequences;
             begin += (int64_t)comm->ranks * o.batch) {
            int B = (int)std::min<int64_t>(o.batch, sequences - begin);
            loss += model->loss(read_batch(loader, begin, B)) * B / sequences;
        }
        loss = comm->sum(loss);
        if (!std::isfinite(loss)) diverged(state.step, str("the validation loss is ", loss));
        log({{"step", state.step}, {"val_loss", loss}});
        printf("step %d: validation loss %.4f over %lld tokens\n", state.step, loss,
               (long long)(sequences * o.seq));
        fflush(stdout);
    }

    void sample() {
        bool finite = true;
        std::string text;
        if (is_root()) finite = sample_text(text);
        if (comm->any(!finite)) diverged(state.step, "a logit of the sample is not finite");
        printf("--- a sample after step %d\n", state.step);
        fwrite(text.data(), 1, text.size(), stdout);  // it may hold a NUL
        printf("\n---\n");
        fflush(stdout);
    }

    // Returns false if a logit is not finite.
    bool sample_text(std::string& text) {
        std::vector<int> prompt = {start_token(model->config, *tokenizer)};
        if (prompt[0] < 0) prompt = tokenizer->encode("\n");
        SamplerOptions options;
        options.seed = o.seed + state.step;
        std::vector<int> tokens;
        try {
            generate_tokens(*model, prompt, o.sample_tokens, options, end_tokens(model->config, *tokenizer),
                            [&](int token) {
                                if (token < tokenizer->vocab_size()) tokens.push_back(token);
                            });
        } catch (const NonfiniteLogits&) {
            return false;
        }
        Utf8Stream stream;
        text = stream.push(tokenizer->decode(tokens));
        text += stream.finish();
        return true;
    }

    void checkpoint() {
        state.options = o.remembered();
        state.program = o.program;
        together([&] {
            if (metrics) metrics->sync();
        });
        last_checkpoint = write_checkpoint(o.out, *model, *optimizer, state, tokenizer_text, *comm);
        if (is_root()) delete_old_checkpoints(o.out, o.keep_checkpoints);
        printf("wrote %s\n", printable(last_checkpoint).c_str());
        fflush(stdout);
    }
};

inline int train(const Backend& backend, TrainOptions& options) {
    return Trainer(backend, options).run();
}
