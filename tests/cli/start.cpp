// How a run starts: its folder, which only one run may write to, and the options that it takes from a
// checkpoint's trainer.json.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <set>
#include <thread>

#include "llmc/checkpoint.h"
#include "llmc/run_folder.h"
#include "tests/cli/cli.h"

namespace {

using namespace cli;
namespace fs = std::filesystem;

// A run of 6 steps that nothing disturbs, and the number of the call that gives its last checkpoint its final
// name.
struct Fixture {
    TempFolder folder;
    const std::string data = folder / "data", whole = folder / "whole";
    int last_rename = 0;

    Fixture() {
        write_dataset(data, kTokenizerVocab, random_tokens(65, kTokenizerVocab, 1),
                      random_tokens(33, kTokenizerVocab, 2));
        const std::string log = folder / "log";
        check_done(train_gpt(train(whole), {}, fault(whole, 0, "", 0, log)));
        const Strings calls = lines_of(get_file(log));
        for (size_t n = 0; n < calls.size(); n++)
            if (calls[n] == "rename " + whole + "/step_00000006") last_rename = (int)n + 1;
        REQUIRE(last_rename > 0);
    }
    std::string train(const std::string& out) const {
        return "train --steps 6 --checkpoint-every 2 --keep-checkpoints 2 --data " + data + kTiny +
               " --out " + out;
    }
};

const Fixture& fixture() {
    static const Fixture fixture;
    return fixture;
}

// Checks that the folder has the same log and the same last checkpoint, and nothing else.
void check_same_run(const std::string& out) {
    CHECK(names_in(out) == names_in(fixture().whole));
    CHECK(timeless_metrics(out) == timeless_metrics(fixture().whole));
    for (const char* file : {"/step_00000006/model.safetensors", "/step_00000006/optimizer.safetensors"})
        CHECK((get_file(out + file) == get_file(fixture().whole + file)));
}

void check_locked(const std::string& line) {
    check_failed(train_gpt(line), 1, {"another train_gpt is training in this folder"});
}

// Changes an option in a checkpoint's trainer.json, as if a program of another version had written it.
void set_option(const std::string& checkpoint, const std::string& flag, const Json& value) {
    Json trainer = Json::parse(get_file(checkpoint + "/trainer.json"));
    trainer["options"][flag] = value;
    trainer["crc32"] = checkpoint_detail::json_crc32(trainer);
    put_file(checkpoint + "/trainer.json", trainer.dump(2) + "\n");
}

}  // namespace

TEST_CASE("start: beside a run that trains in the folder, no other starts") {
    const TempFolder folder;
    const std::string out = folder / "out";
    bool overlapped = false;
    Run run = fault(out, fixture().last_rename, "signal", SIGSTOP);
    run.when_stopped = [&] {
        const auto names = names_in(out);
        const std::string log = get_file(out + "/metrics.jsonl");
        for (const std::string& flags :
             {std::string(), std::string(" --resume"), std::string(" --resume --steps 9"),
              " --resume " + out + "/step_00000002"})
            check_locked("train --threads 2 --out " + out +
                         (flags.empty() ? " --data " + fixture().data : flags));
        CHECK(names_in(out) == names);
        CHECK(get_file(out + "/metrics.jsonl") == log);
        overlapped = true;
    };
    check_done(train_gpt(fixture().train(out), {}, run));
    CHECK(overlapped);
    check_same_run(out);
}

TEST_CASE("start: a reader that has the lock for a moment does not stop a run, another run does") {
    const TempFolder folder;
    const std::string out = folder / "out";
    fs::create_directory(out);
    const Descriptor reader(::open(out.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    REQUIRE(::flock(reader.fd, LOCK_SH) == 0);
    CHECK(contains(error_of([&] { RunFolder run(out); }), "another train_gpt is training in this folder"));
    std::thread leaves([&] {
        usleep(20000);
        ::flock(reader.fd, LOCK_UN);
    });
    CHECK(error_of([&] { RunFolder run(out); }) == "");
    leaves.join();
    CHECK(fs::exists(out));
}

TEST_CASE("start: a run that another one overtakes finds what that has done") {
    const TempFolder folder;
    const std::string out = folder / "out";
    Run run = fault(folder.path(), 1, "signal", SIGSTOP);  // the program stops before it makes the folder
    run.when_stopped = [&] { check_done(train_gpt(fixture().train(out))); };
    check_failed(train_gpt(fixture().train(out), {}, run), 2, {out, "already holds a run"});
    check_same_run(out);
    fs::remove_all(out);
    check_done(train_gpt(fixture().train(out) + " --resume", {}, run));
    check_same_run(out);

    // The program stops after it has made the folder. Meanwhile another run has locked or removed the folder.
    run = fault(folder.path(), 2, "signal", SIGSTOP);
    fs::remove_all(out);
    int held = -1;
    run.when_stopped = [&] {
        held = ::open(out.c_str(), O_RDONLY | O_DIRECTORY);
        REQUIRE(::flock(held, LOCK_EX) == 0);
    };
    check_failed(train_gpt(fixture().train(out), {}, run), 1, {"another train_gpt"});
    CHECK(fs::exists(out));
    check_locked(fixture().train(out) + " --resume " + fixture().whole + "/step_00000006");
    ::close(held);
    fs::remove(out);
    run.when_stopped = [&] { fs::remove(out); };
    check_done(train_gpt(fixture().train(out), {}, run));
    check_same_run(out);
}

TEST_CASE("start: one that fails leaves the folders that were there, and no other") {
    const TempFolder folder;
    const std::string deep = folder / "a/b/", empty = folder / "empty", no_data = " --data " + folder.path();
    fs::create_directory(empty);
    for (const std::string& out : {deep, empty})
        for (const std::string& flags : {no_data, no_data + " --resume", std::string(" --resume --steps 3")})
            CHECK(train_gpt("train --threads 2 --out " + out + flags).status > 0);
    CHECK(names_in(folder.path()) == std::set<std::string>{"empty"});
    // The lock lasts until the folder has been removed.
    const std::string out = folder / "out";
    Run run = fault(out, 2, "signal", SIGSTOP);
    run.when_stopped = [&] { check_locked(fixture().train(out)); };
    check_failed(train_gpt("train --threads 2 --out " + out + no_data, {}, run), 1, {folder.path()});
    CHECK_FALSE(fs::exists(out));
    // A folder whose log has no line is not a run.
    put_file(empty + "/metrics.jsonl", "");
    check_done(train_gpt(fixture().train(empty)));
    check_same_run(empty);
}

TEST_CASE("start: from another working directory, and with data that are elsewhere by now") {
    const TempFolder folder;
    const std::string out = folder / "out", data = folder / "data", moved = folder / "moved";
    fs::copy(fixture().data, data);
    const std::string program = fs::absolute(environment("LLMC_TRAIN_GPT", "./train_gpt")).string();
    check_done(
        train_gpt("-C " + folder.path() + " " + program + " train --steps 1 --data data --out out" + kTiny,
                  {}, {.program = "/usr/bin/env"}));
    const std::string resume = "train --resume --threads 2 --out " + out;
    check_done(train_gpt(resume));
    fs::rename(data, moved);
    check_failed(train_gpt(resume), 1,
                 {data + ": cannot read folder", out + "/step_00000001/trainer.json", "--data"});
    const Result lost = train_gpt(resume + " --data " + (folder / "lost"));
    check_failed(lost, 1, {folder / "lost: cannot read folder"});
    CHECK_FALSE(contains(lost.err, "trainer.json"));
    CHECK(train_gpt(resume + " --steps 2 --data " + moved).status == 0);
    check_done(train_gpt(resume));
}

TEST_CASE("start: what a checkpoint says of an option is checked as what is typed") {
    const TempFolder folder;
    const std::string out = folder / "out", last = out + "/step_00000006", file = last + "/trainer.json";
    fs::create_directory(out);
    fs::copy(fixture().whole + "/step_00000006", last);
    const std::string start = "train_gpt: error: ", resume = "train --resume --out " + out;
    const Json options = Json::parse(get_file(file)).at("options");
    CHECK(options.size() == 30);
    for (const auto& option : options.items()) {
        const std::string flag = option.key();
        const Json good = option.value();
        std::vector<Json> bad = {nullptr, {good}};
        if (good.is_string()) bad.insert(bad.end(), {"", 9});
        if (good.is_string() && flag != "--data") bad.push_back("poly9");
        if (good.is_boolean()) bad.insert(bad.end(), {1, "true"});
        if (good.is_number()) bad.insert(bad.end(), {-2, 1e99, good.dump()});
        if (good.is_number_integer()) bad.push_back(8.5);
        if (good.is_number_integer() && flag != "--seed" && flag != "--total-batch")
            bad.push_back(uint64_t{1} << 32);
        if (flag == "--batch" || flag == "--steps") bad.push_back(0);
        for (const Json& value : bad) {
            CAPTURE(flag);
            CAPTURE(value.dump());
            set_option(last, flag, value);
            const Result saved = train_gpt(resume);
            check_failed(saved, 1, {file + ": " + flag + ": "});
            // The message is the same as for the flag, if the value can be typed on a command line.
            if (good.is_boolean() || value.is_string() != good.is_string()) continue;
            const std::string text = good.is_string() ? value.get<std::string>() : value.dump();
            const Result typed = train_gpt("train --out " + out, {flag, text});
            CHECK(typed.status == 2);
            CHECK(saved.err == start + file + ": " + typed.err.substr(start.size()));
        }
        set_option(last, flag, good);
    }
    // Each option is valid alone, but not together with the others.
    set_option(last, "--total-batch", 48);
    check_failed(train_gpt(resume), 2, {"--total-batch 48", "--batch 2 x --seq 16", file});
    CHECK(names_in(out) == std::set<std::string>{"step_00000006"});
}
