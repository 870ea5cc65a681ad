// Runs the trainer's program as a user does, on small datasets and models that are made here.
//
// LLMC_TRAIN_GPT names the program (default ./train_gpt), LLMC_TRAIN_GPTCU the CUDA trainer (its tests are
// skipped if this is not set), and LLMC_FAULT_PRELOAD the library of tests/cli/fault_preload.c
// (build/fault_preload.so).
#pragma once
#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "tests/helpers.h"

namespace cli {

using Strings = std::vector<std::string>;
using Json = nlohmann::json;

inline std::string environment(const char* name, const char* otherwise) {
    const char* value = getenv(name);
    return value ? value : otherwise;
}

inline bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

inline std::string get_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    REQUIRE_MESSAGE(file, path);
    return {std::istreambuf_iterator<char>(file), {}};
}

// The number that follows `label` in a program's output.
inline double number_after(const std::string& label, const std::string& text) {
    const size_t at = text.find(label);
    REQUIRE_MESSAGE(at != std::string::npos, label, " in ", text);
    return std::stod(text.substr(at + label.size()));
}

inline Strings lines_of(const std::string& text) {
    Strings lines;
    std::istringstream in(text);
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    return lines;
}

// The result of a run. `status` is its exit status, or minus the signal that ended it.
struct Result {
    int status = 0;
    std::string out, err;
};

struct Run {
    Strings environment = {};     // NAME=VALUE, in addition to the environment of this process
    double kill_after = 0;        // seconds until SIGKILL; 0: never
    std::string stdout_to = {};   // the file to which stdout goes, instead of Result::out
    std::string stdin_from = {};  // the file that is stdin; without one, stdin is closed
    std::string program = {};     // the program to run instead of train_gpt
    // Called when the program stops itself (SIGSTOP); then the program goes on.
    std::function<void()> when_stopped = {};
};

// Runs the program. Its arguments are the words of `line`, then `more`. A run that takes too long is an
// error.
inline Result train_gpt(const std::string& line, const Strings& more = {}, const Run& run = {}) {
    const double limit = 120;  // seconds
    Strings arguments = {run.program.empty() ? environment("LLMC_TRAIN_GPT", "./train_gpt") : run.program};
    std::istringstream words(line);
    for (std::string word; words >> word;) arguments.push_back(word);
    arguments.insert(arguments.end(), more.begin(), more.end());
    // Threads that wait in a loop make a run many times slower if the machine has other work.
    Strings variables = {"OMP_WAIT_POLICY=passive", "ASAN_OPTIONS=verify_asan_link_order=0"};
    variables.insert(variables.end(), run.environment.begin(), run.environment.end());
    std::vector<char*> argv, envp;
    for (std::string& text : arguments) argv.push_back(text.data());
    for (std::string& text : variables) envp.push_back(text.data());
    for (char** variable = environ; *variable; variable++) envp.push_back(*variable);
    argv.push_back(nullptr), envp.push_back(nullptr);

    FILE *out = tmpfile(), *err = tmpfile();
    REQUIRE(out);
    REQUIRE(err);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    if (run.stdin_from.empty())
        posix_spawn_file_actions_addclose(&actions, 0);
    else
        posix_spawn_file_actions_addopen(&actions, 0, run.stdin_from.c_str(), O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, fileno(out), 1);
    posix_spawn_file_actions_adddup2(&actions, fileno(err), 2);
    if (!run.stdout_to.empty())
        posix_spawn_file_actions_addopen(&actions, 1, run.stdout_to.c_str(), O_WRONLY, 0);
    pid_t pid = 0;
    const int error = posix_spawn(&pid, argv[0], &actions, nullptr, argv.data(), envp.data());
    posix_spawn_file_actions_destroy(&actions);
    REQUIRE_MESSAGE(error == 0, argv[0], ": ", strerror(error));

    using Clock = std::chrono::steady_clock;
    const Clock::time_point start = Clock::now();
    int status = 0;
    while (waitpid(pid, &status, WNOHANG | WUNTRACED) == 0 || WIFSTOPPED(status)) {
        if (std::exchange(status, 0) != 0) {
            if (run.when_stopped) run.when_stopped();
            kill(pid, SIGCONT);
        }
        const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        if (seconds > (run.kill_after > 0 ? run.kill_after : limit)) kill(pid, SIGKILL);
        if (seconds > limit) FAIL("no end after ", limit, " s: ", line);
        usleep(500);
    }
    auto text = [](FILE* file) {
        std::string all;
        rewind(file);
        for (int c; (c = fgetc(file)) != EOF;) all += (char)c;
        fclose(file);
        return all;
    };
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), text(out), text(err)};
}

inline void check_done(const Result& result) {
    CAPTURE(result.out);
    CAPTURE(result.err);
    CHECK(result.status == 0);
    CHECK(result.err == "");
}

// Checks that the run failed with `status`, and that stderr has warnings and one line of error, which
// contains every part.
inline void check_failed(const Result& result, int status, const Strings& parts,
                         const std::string& program = "train_gpt") {
    const std::string start = program + ": error: ";
    CAPTURE(result.err);
    CHECK(result.status == status);
    std::string error;
    int errors = 0, others = 0;
    for (const std::string& line : lines_of(result.err)) {
        if (line.rfind(start, 0) == 0)
            errors++, error = line.substr(start.size());
        else if (line.rfind("warning: ", 0) != 0)
            others++;
    }
    CHECK(errors == 1);
    CHECK(others == 0);
    for (const std::string& part : parts) {
        CAPTURE(part);
        CHECK(contains(error, part));
    }
}

// The sizes of the models in these tests, with two threads.
inline const std::string kSizes = " --layers 1 --heads 2 --channels 16 --context 16";
inline const std::string kTiny = kSizes + " --batch 2 --threads 2";
inline const std::string kTokenizer = "tests/golden/tokenizer.json";
constexpr int kTokenizerVocab = 900;

using Tokens = std::vector<uint16_t>;

// Random tokens that are the same on every machine.
inline Tokens random_tokens(int count, int vocab_size, int seed) {
    std::mt19937 random(seed);
    Tokens tokens;
    for (int i = 0; i < count; i++) tokens.push_back((uint16_t)(random() % vocab_size));
    return tokens;
}

inline std::string shard(const Tokens& tokens) {
    std::vector<int32_t> header(256);
    header[0] = 20240520, header[1] = 1, header[2] = (int32_t)tokens.size();
    return std::string((const char*)header.data(), 1024) +
           std::string((const char*)tokens.data(), 2 * tokens.size());
}

// Writes a dataset folder, with tokenizer.json if the vocabulary has the size of the golden tokenizer's.
inline void write_dataset(const std::string& folder, int vocab_size, const Tokens& train, const Tokens& val) {
    std::filesystem::create_directory(folder);
    put_file(folder + "/train_000000.bin", shard(train));
    put_file(folder + "/val_000000.bin", shard(val));
    put_file(folder + "/meta.json", Json{{"vocab_size", vocab_size}}.dump());
    if (vocab_size == kTokenizerVocab) put_file(folder + "/tokenizer.json", get_file(kTokenizer));
}

// Trains a model, and returns the last checkpoint.
inline std::string train_model(const std::string& data, const std::string& out, const std::string& flags,
                               int steps = 1) {
    check_done(
        train_gpt(str("train --data ", data, " --out ", out, " --threads 2 --steps ", steps, " ", flags)));
    char name[32];
    snprintf(name, sizeof(name), "/step_%08d", steps);
    REQUIRE(std::filesystem::exists(out + name));
    return out + name;
}

// A safetensors file as header and data, which can be read and damaged.
struct Safetensors {
    Json header;
    std::string data;

    explicit Safetensors(const std::string& path) {
        const std::string text = get_file(path);
        uint64_t size = 0;
        REQUIRE(text.size() > 8);
        memcpy(&size, text.data(), 8);
        REQUIRE(size <= text.size() - 8);
        header = Json::parse(text.substr(8, size));
        data = text.substr(8 + size);
    }
    std::string text() const {
        const std::string json = header.dump();
        const uint64_t size = json.size();
        return std::string((const char*)&size, 8) + json + data;
    }
    // The elements of a tensor whose elements have 4 bytes.
    template <class T = float>
    std::vector<T> values(const std::string& name) const {
        static_assert(sizeof(T) == 4);
        const size_t begin = header.at(name).at("data_offsets").at(0),
                     end = header.at(name).at("data_offsets").at(1);
        REQUIRE(begin <= end);
        REQUIRE(end <= data.size());
        std::vector<T> out((end - begin) / 4);
        memcpy(out.data(), data.data() + begin, end - begin);
        return out;
    }
    // Sets one element.
    void poke(const std::string& name, size_t index, float value) {
        const size_t begin = header.at(name).at("data_offsets").at(0);
        memcpy(&data.at(begin + 4 * index), &value, 4);
    }
};

// Copies a checkpoint as a model only, without trainer.json, so that its files can be changed.
inline void copy_model(const std::string& checkpoint, const std::string& folder) {
    std::filesystem::remove_all(folder);
    std::filesystem::copy(checkpoint, folder);
    std::filesystem::remove(folder + "/trainer.json");
    std::filesystem::remove(folder + "/optimizer.safetensors");
}

// The lines of metrics.jsonl, every one of which must be an object of finite numbers.
inline std::vector<Json> read_metrics(const std::string& out) {
    std::vector<Json> entries;
    for (const std::string& line : lines_of(get_file(out + "/metrics.jsonl"))) {
        CAPTURE(line);
        const Json entry = Json::parse(line, nullptr, false);
        REQUIRE(entry.is_object());
        for (const Json& value : entry) CHECK(value.is_number());
        entries.push_back(entry);
    }
    return entries;
}

// The metrics without the values that depend on the clock.
inline std::vector<Json> timeless_metrics(const std::string& out) {
    std::vector<Json> entries = read_metrics(out);
    for (Json& entry : entries)
        for (const char* key : {"ms", "tokens_per_second", "exposed_comm_ms"}) entry.erase(key);
    return entries;
}

inline std::set<std::string> names_in(const std::string& folder) {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder))
        names.insert(entry.path().filename().string());
    return names;
}

// Makes a run in which tests/cli/fault_preload.c does `what` at the n-th change below `folder`.
inline Run fault(const std::string& folder, int n, const std::string& what, int value = 0,
                 const std::string& log = "") {
    return {
        {"LD_PRELOAD=" +
             std::filesystem::absolute(environment("LLMC_FAULT_PRELOAD", "build/fault_preload.so")).string(),
         "FAULT_FOLDER=" + folder, str("FAULT_AT=", n), "FAULT_DO=" + what, str("FAULT_VALUE=", value),
         "FAULT_LOG=" + log}};
}

}  // namespace cli
