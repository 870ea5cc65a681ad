// Checkpoints: a run that is killed or stopped or has no disk space left, at any moment, continues with
// --resume as if nothing had happened. tests/cli/fault_preload.c counts the calls by which the program
// changes the disk, and interferes at the n-th call. The disk changes at no other moment.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <set>

#include "tests/cli/cli.h"

namespace {

using namespace cli;
namespace fs = std::filesystem;

const std::string kFlags =
    kSizes +
    " --attention poly2 --batch 2 --total-batch 64 --lr 1e-2 --warmup 10 --val-every 25 "
    "--sample-every 25 --sample-tokens 4 --checkpoint-every 10 ";

// `whole` is a run of 50 steps without a stop: more than 8 epochs of 23 sequences, 2 micro-batches per step,
// and checkpoints at 10, 20, ..., 50. `begun` is the same run in the middle: it has the checkpoints of steps
// 10 and 20, a log that ends in a part of a line after step 27, and the rest of an unfinished checkpoint.
struct Runs {
    TempFolder folder;
    const std::string data = folder / "data", whole = folder / "whole", begun = folder / "begun";
    std::vector<Json> metrics;

    Runs();
    std::string train(const std::string& out) const {
        return "train --threads 2 --steps 50 --data " + data + " --out " + out + kFlags;
    }
};

std::string step_name(int step) {
    return str("step_000000", step < 10 ? "0" : "", step);
}

const Strings kModelFiles = {"config.json", "model.safetensors", "tokenizer.json", "optimizer.safetensors"};

Runs::Runs() {
    write_dataset(data, kTokenizerVocab, random_tokens(23 * 16 + 1, kTokenizerVocab, 1),
                  random_tokens(65, kTokenizerVocab, 2));
    check_done(train_gpt(train(whole) + " --keep-checkpoints 0"));
    metrics = timeless_metrics(whole);
    fs::create_directory(begun);
    for (int step : {10, 20}) fs::copy(whole + "/" + step_name(step), begun + "/" + step_name(step));
    const std::string log = get_file(whole + "/metrics.jsonl");
    put_file(begun + "/metrics.jsonl", log.substr(0, log.find("{\"step\":28") + 20));
    fs::create_directory(begun + "/step_00000030.tmp");
    put_file(begun + "/step_00000030.tmp/config.json", "{");
}

const Runs& runs() {
    static const Runs runs;
    return runs;
}

bool is_unfinished(const std::string& name) {
    return name.rfind("step_", 0) == 0 && contains(name, ".tmp");
}

// Checks that each step was logged once, with the same numbers.
void check_same_metrics(const std::vector<Json>& found, const std::vector<Json>& expected) {
    REQUIRE(found.size() == expected.size());
    for (size_t i = 0; i < found.size(); i++) CHECK(found[i] == expected[i]);
}

// Checks that every checkpoint with a final name has the right bytes.
void check_checkpoints(const std::string& out) {
    for (const std::string& name : names_in(out)) {
        if (name.rfind("step_", 0) != 0 || name.size() != step_name(10).size()) continue;
        CAPTURE(name);
        CHECK(names_in(out + "/" + name).size() == kModelFiles.size() + 1);
        if (!fs::exists(runs().whole + "/" + name)) continue;  // a signal came at this step
        for (const std::string& file : kModelFiles)
            CHECK((get_file(out + "/" + name + "/" + file) ==
                   get_file(runs().whole + "/" + name + "/" + file)));
    }
}

// Checks that the run ends as the one without a stop: with the same log and the same last checkpoint.
void check_same_end(const std::string& out) {
    check_same_metrics(timeless_metrics(out), runs().metrics);
    CHECK(names_in(out).count("step_00000050") == 1);
    check_checkpoints(out);
}

std::string resume(const std::string& out, const std::string& flags = "") {
    return "train --threads 2 --resume --out " + out + " --keep-checkpoints 2 " + flags;
}

void copy_begun(const std::string& out) {
    fs::remove_all(out);
    fs::copy(runs().begun, out, fs::copy_options::recursive);
}

struct Call {
    std::string name, path;  // the path is relative to the folder of the run

    bool operator==(const Call& other) const { return name == other.name && path == other.path; }
};

// The calls of a run that continues from `begun`, up to the first call after checkpoint 30 has been written
// and checkpoint 10 deleted.
const std::vector<Call>& calls() {
    static const std::vector<Call> calls = [] {
        const TempFolder folder;
        const std::string out = folder / "out", log = folder / "log";
        copy_begun(out);
        CHECK(train_gpt(resume(out), {}, fault(out, 0, "", 0, log)).status == 0);
        std::vector<Call> all;
        bool deleting = false, end = false;
        for (const std::string& line : lines_of(get_file(log))) {
            const size_t space = line.find(' ');
            const std::string path = line.substr(space + 1);
            const Call call = {line.substr(0, space), path == out ? "" : path.substr(out.size() + 1)};
            if (end) break;
            all.push_back(call);
            if (contains(call.path, "step_00000010.tmp")) deleting = true;
            end = deleting && call.path == "metrics.jsonl";
        }
        CHECK(end);
        return all;
    }();
    return calls;
}

// Whether call n, counted from 1, is in a row of equal calls, and neither the first nor the last of them.
bool repeated(int n) {
    return n > 1 && n < (int)calls().size() && calls()[n - 2] == calls()[n - 1] &&
           calls()[n] == calls()[n - 1];
}

int call_number(const Call& wanted) {
    const auto found = std::find(calls().begin(), calls().end(), wanted);
    REQUIRE_MESSAGE(found != calls().end(), wanted.name, " ", wanted.path);
    return (int)(found - calls().begin()) + 1;
}

// Resumes `out` after an accident and runs to the end. Folders of unfinished checkpoints must be reported.
void check_resumes(const std::string& out) {
    check_checkpoints(out);
    Strings unfinished;
    for (const std::string& name : names_in(out))
        if (is_unfinished(name)) unfinished.push_back(name);
    const Result result = train_gpt(resume(out));
    CAPTURE(result.err);
    CHECK(result.status == 0);
    CHECK(lines_of(result.err).size() == unfinished.size());
    for (const std::string& name : unfinished) CHECK(contains(result.err, out + "/" + name + ": incomplete"));
    check_same_end(out);
    CHECK(names_in(out) == std::set<std::string>{"metrics.jsonl", "step_00000040", "step_00000050"});
}

}  // namespace

TEST_CASE("resume: a checkpoint gets its name when it is on the disk, and only then the old one goes") {
    const int renamed = call_number({"rename", step_name(30)}),
              folder_synced = call_number({"fsync", step_name(30) + ".tmp"});
    CHECK(folder_synced < renamed);
    CHECK(calls()[renamed] == Call{"fsync", ""});
    CHECK(call_number({"fsync", "metrics.jsonl"}) < renamed);  // the log is never behind a checkpoint
    CHECK(call_number({"rename", step_name(10) + ".tmp"}) > renamed + 1);
    Strings files = kModelFiles;
    files.push_back("trainer.json");
    for (const std::string& name : files) {
        const std::string path = step_name(30) + ".tmp/" + name;
        const int opened = call_number({"open", path}), synced = call_number({"fsync", path});
        CHECK(opened < call_number({"write", path}));
        CHECK(synced < folder_synced);
        for (int n = synced; n < (int)calls().size(); n++) CHECK(calls()[n].path != path);
    }
}

TEST_CASE("resume: killed at any moment, a run goes on as if it had not been") {
    const TempFolder folder;
    const std::string out = folder / "out";
    REQUIRE(calls().size() > 40);
    for (int n = 1; n <= (int)calls().size(); n++) {
        if (repeated(n)) continue;
        CAPTURE(n);
        const Call& call = calls()[n - 1];
        CAPTURE(call.name);
        CAPTURE(call.path);
        copy_begun(out);
        CHECK(train_gpt(resume(out), {}, fault(out, n, "signal", SIGKILL)).status == -SIGKILL);
        check_resumes(out);
        if (call.name != "write") continue;
        copy_begun(out);
        CHECK(train_gpt(resume(out), {}, fault(out, n, "half")).status == -SIGKILL);
        check_resumes(out);
    }
}

TEST_CASE("resume: a disk that is full or fails stops the run and leaves what was whole") {
    const TempFolder folder;
    const std::string out = folder / "out";
    std::set<std::set<std::string>>
        resumed;  // the files that were left; the test resumes once from each such set
    auto check_fault = [&](int n, const std::string& what) {
        CAPTURE(n);
        CAPTURE(what);
        const Call& call = calls()[n - 1];
        CAPTURE(call.name);
        CAPTURE(call.path);
        copy_begun(out);
        const Result result = train_gpt(resume(out), {}, fault(out, n, what, EIO));
        // A run does not stop if it cannot delete something.
        if (call.name == "unlink" || (call.name == "rename" && is_unfinished(call.path))) {
            CHECK(result.status == 0);
        } else {
            if (what == "full")
                check_failed(result, 1, {out, "No space left on device"});
            else
                check_failed(result, 1,
                             {call.path.empty() ? out : out + "/" + call.path, "Input/output error"});
            for (const std::string& name : names_in(out)) CHECK_FALSE(is_unfinished(name));
        }
        check_checkpoints(out);
        if (resumed.insert(names_in(out)).second) check_resumes(out);
    };
    for (int n = 1; n <= (int)calls().size(); n++) {
        if (repeated(n)) continue;
        check_fault(n, "error");
        const std::string& name = calls()[n - 1].name;
        if (name == "write" || name == "open" || name == "mkdir") check_fault(n, "full");
    }
    CHECK(resumed.size() >= 3);
}

TEST_CASE("resume: a full disk at the start, and under dump") {
    const TempFolder folder;
    const std::string out = folder / "out";
    check_failed(train_gpt(runs().train(out), {}, fault(out, 1, "full")), 1, {out, "No space left"});
    CHECK_FALSE(fs::exists(out));
    // A new folder is synced to the disk before a file is made in it.
    const TempFolder logs;
    const std::string made = folder / "made";
    check_done(train_gpt(runs().train(made), {}, fault(folder.path(), 0, "", 0, logs / "log")));
    const Strings begin = lines_of(get_file(logs / "log"));
    REQUIRE(begin.size() > 2);
    CHECK(begin[0] == "mkdir " + made);
    CHECK(begin[1] == "fsync " + folder.path());
    fs::create_directory(out);
    const std::string dump = "dump --threads 2 --batch 1 --seq 16 --data " + runs().data + " --model " +
                             runs().whole + " --file " + out + "/dump";
    int n = 0;
    for (;;) {
        const Result result = train_gpt(dump, {}, fault(out, ++n, "full"));
        if (result.status == 0) break;
        check_failed(result, 1, {out, "No space left"});
        CHECK_FALSE(fs::exists(out + "/dump.tmp"));
        REQUIRE(n < 50);
    }
    CHECK(n > 3);
    CHECK(names_in(out) == std::set<std::string>{"dump"});
}

TEST_CASE("resume: killed a dozen times at random, a run still ends as if it had not been") {
    const TempFolder folder;
    const std::string out = folder / "out";
    using Clock = std::chrono::steady_clock;
    const Clock::time_point start = Clock::now();
    check_done(train_gpt(runs().train(folder / "timed")));
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    std::mt19937 random(1);
    int killed = 0;
    for (int i = 0; i < 12; i++) {
        Run run;
        run.kill_after = seconds * (1 + random() % 1000) / 1000;
        const int status = train_gpt(runs().train(out) + " --resume", {}, run).status;
        killed += status == -SIGKILL;
        if (status == -SIGKILL) continue;
        CHECK(status == 0);  // the run had ended before the signal
        fs::remove_all(out);
    }
    CHECK(killed > 0);
    CHECK(train_gpt(runs().train(out) + " --resume").status == 0);
    check_same_end(out);
}

TEST_CASE("resume: SIGTERM and Ctrl-C finish the step and write a checkpoint") {
    const TempFolder folder;
    for (int signal : {SIGTERM, SIGINT}) {
        // Calls 1 to 4 are mkdir, open, the first validation and step 1. A checkpoint begins with call 14.
        for (int n : {4, 10, 16}) {
            CAPTURE(n);
            const std::string out = folder / str("out", signal, "_", n);
            const int step = std::min(n - 3, 10);
            const Result result = train_gpt(runs().train(out), {}, fault(out, n, "signal", signal));
            CHECK(result.status == 130);
            CHECK(result.err == "");
            CHECK(contains(result.out, str("stopped after step ", step, ";")));
            CHECK(timeless_metrics(out).back().at("step") == step);
            CHECK(names_in(out) == std::set<std::string>{"metrics.jsonl", step_name(step)});
            check_done(train_gpt(resume(out)));
            check_same_end(out);
        }
    }
    // A signal in a validation after step 3. Calls 1 to 6 are mkdir, open, a validation and three steps.
    const std::string validating = folder / "validating";
    const Result during =
        train_gpt("train --threads 2 --batch 2 --steps 9 --val-every 3 --checkpoint-every 9 --data " +
                      runs().data + " --out " + validating + kSizes,
                  {}, fault(validating, 7, "signal", SIGTERM));
    CHECK(during.status == 130);
    CHECK(contains(during.out, "stopped after step 3; continue with --resume"));
    CHECK(names_in(validating) == std::set<std::string>{"metrics.jsonl", step_name(3)});
    // A second Ctrl-C ends the program at once. There is no checkpoint yet, so --resume starts from the
    // beginning.
    const std::string out = folder / "twice";
    CHECK(train_gpt(runs().train(out), {}, fault(out, 10, "twice", SIGINT)).status == -SIGINT);
    CHECK(names_in(out) == std::set<std::string>{"metrics.jsonl"});
    check_failed(train_gpt(runs().train(out)), 2, {"--out " + out, "no checkpoint", "add --resume"});
    check_failed(train_gpt(resume(out)), 2, {"--data is required", out + " holds no checkpoint"});
    const Result again = train_gpt(runs().train(out) + " --resume");
    check_done(again);
    CHECK(contains(again.out, "nothing to resume in " + out));
    check_same_end(out);
    // Without a checkpoint the run cannot be resumed, so the program must not say that it can.
    const std::string early = folder / "early";  // call 3 is the first validation
    const Result before = train_gpt(runs().train(early), {}, fault(early, 3, "signal", SIGTERM));
    CHECK(before.status == 130);
    CHECK(contains(before.out, "stopped after step 0"));
    CHECK_FALSE(contains(before.out, "--resume"));
    const std::string none = folder / "none";
    const Result stopped = train_gpt(
        "train --threads 2 --batch 2 --checkpoint-every 0 --data " + runs().data + " --out " + none + kSizes,
        {}, fault(none, 10, "signal", SIGTERM));
    CHECK(stopped.status == 130);
    CHECK(contains(stopped.out, "stopped after step 7"));
    CHECK_FALSE(contains(stopped.out, "--resume"));
}

TEST_CASE("resume: with nothing to resume, with a checkpoint's name, and after the end") {
    const TempFolder folder;
    const std::string out = folder / "out", other = folder / "other";
    const Result fresh = train_gpt(runs().train(out) + " --resume --keep-checkpoints 2");
    check_done(fresh);
    CHECK(contains(fresh.out, "nothing to resume in " + out));
    check_same_end(out);
    CHECK(names_in(out) == std::set<std::string>{"metrics.jsonl", "step_00000040", "step_00000050"});

    const std::string log = get_file(out + "/metrics.jsonl");
    check_done(train_gpt(resume(out)));
    CHECK((get_file(out + "/metrics.jsonl") == log));
    check_checkpoints(out);

    const Result named =
        train_gpt("train --threads 2 --out " + other + " --resume " + runs().whole + "/step_00000030");
    check_done(named);
    CHECK(contains(named.out, "step_00000030 after step 30"));
    check_checkpoints(other);
    CHECK(names_in(other).count("step_00000050") == 1);
    std::vector<Json> rest = runs().metrics;
    rest.erase(rest.begin(),
               std::find_if(rest.begin(), rest.end(), [](const Json& e) { return e.at("step") == 31; }));
    check_same_metrics(timeless_metrics(other), rest);
    // A model alone is not a checkpoint.
    copy_model(runs().whole + "/step_00000030", folder / "model");
    check_failed(train_gpt("train --out " + (folder / "new") + " --resume " + (folder / "model")), 1,
                 {folder / "model", "trainer.json"});
    check_failed(train_gpt("train --out " + (folder / "new") + " --resume " + (folder / "lost")), 1,
                 {folder / "lost"});
    check_failed(train_gpt("train --resume --out " + (folder / "new")), 2, {"--data"});
    CHECK_FALSE(fs::exists(folder / "new"));
}

TEST_CASE("resume: from further back, later checkpoints no longer count") {
    const TempFolder folder;
    const std::string out = folder / "out", back = " --resume " + out + "/step_00000020";
    fs::copy(runs().whole, out, fs::copy_options::recursive);
    // Runs with another learning rate to step 30, of which there is already a checkpoint.
    const Result result =
        train_gpt("train --threads 2 --steps 30 --lr 1e-3 --keep-checkpoints 2 --out " + out + back);
    CHECK(result.status == 0);
    CHECK(contains(result.out, "--lr 0.001 (was 0.01)"));
    CHECK(timeless_metrics(out).back().at("step") == 30);
    CHECK((get_file(out + "/step_00000030/model.safetensors") !=
           get_file(runs().whole + "/step_00000030/model.safetensors")));
    const Result on = train_gpt(resume(out, "--steps 31"));
    CHECK(on.status == 0);
    CHECK(contains(on.out, "step_00000030 after step 30"));
    std::vector<int> steps;
    for (const Json& entry : timeless_metrics(out))
        if (entry.contains("loss")) steps.push_back(entry.at("step"));
    REQUIRE(steps.size() == 31);
    for (int i = 0; i < 31; i++) CHECK(steps[i] == i + 1);
}

TEST_CASE("resume: from further back, and killed before the first checkpoint from there") {
    const TempFolder folder;
    const std::string out = folder / "out", back = " --resume " + out + "/step_00000020";
    fs::copy(runs().whole, out, fs::copy_options::recursive);
    // The 40th call comes while a checkpoint is written, after the later checkpoints have been set aside.
    CHECK(train_gpt("train --threads 2 --out " + out + back, {}, fault(out, 40, "signal", SIGKILL)).status ==
          -SIGKILL);
    CHECK_FALSE(fs::exists(out + "/step_00000030"));
    CHECK(fs::exists(out + "/step_00000030.old"));
    const Result on = train_gpt(resume(out));
    CHECK(on.status == 0);
    CHECK(contains(on.out, "step_00000020 after step 20"));
    check_same_end(out);
}

TEST_CASE("resume: a folder that holds another run, or a running one, is left alone") {
    const TempFolder folder;
    const std::string out = folder / "out", other = folder / "other";
    fs::copy(runs().whole, out, fs::copy_options::recursive);
    fs::copy(runs().whole, other, fs::copy_options::recursive);
    const std::string before = get_file(out + "/metrics.jsonl");
    check_failed(train_gpt("train --threads 2 --out " + out + " --resume " + other + "/step_00000020"), 2,
                 {"--out", out, "--resume", other});
    const int held = ::open(out.c_str(), O_RDONLY | O_DIRECTORY);
    REQUIRE(::flock(held, LOCK_EX) == 0);
    check_failed(train_gpt("train --threads 2 --resume --steps 60 --out " + out), 1,
                 {out, "another train_gpt"});
    ::close(held);
    CHECK(get_file(out + "/metrics.jsonl") == before);
}

TEST_CASE("resume: a checkpoint says which program wrote it, and another program may go on from it") {
    const TempFolder folder;
    const std::string out = folder / "out", path = out + "/step_00000020/trainer.json";
    copy_begun(out);
    Json trainer = Json::parse(get_file(path));
    const Strings lines = lines_of(train_gpt("--version").out);
    REQUIRE(!lines.empty());
    const std::string version = lines[0];
    CHECK(trainer.value("program", "") == version);
    CHECK_FALSE(contains(train_gpt(resume(out, "--steps 20")).out, "written by"));
    auto write = [&] {
        trainer.erase("crc32");
        const std::string text = trainer.dump();
        trainer["crc32"] = crc32(0, (const unsigned char*)text.data(), (unsigned)text.size());
        put_file(path, trainer.dump(2));
    };
    trainer["program"] = "polygpt 9.9.9";
    write();
    const Result other = train_gpt(resume(out, "--steps 20"));
    check_done(other);
    CHECK(contains(other.out, "\nwritten by polygpt 9.9.9, continued by " + version + "\n"));
    trainer.erase("program");  // older checkpoints do not have this key
    write();
    check_done(train_gpt(resume(out, "--steps 20")));
}

TEST_CASE("resume: a damaged checkpoint is reported and the one before it used") {
    const TempFolder folder;
    const std::string out = folder / "out";
    auto flipped = [](std::string text) { return text[text.size() / 2] ^= 1, text; };
    auto cut = [](const std::string& text) { return text.substr(0, text.size() / 2); };
    auto longer = [](const std::string& text) { return text + "x"; };
    auto other_samples = [](std::string text) {
        const std::string samples = "\"samples\": 80";
        const size_t at = text.find(samples);
        REQUIRE(at != std::string::npos);
        return text.replace(at, samples.size(), "\"samples\": 81");
    };
    struct Damage {
        std::string file;
        std::function<std::string(const std::string&)> damage;  // if empty, the file is removed
    };
    std::vector<Damage> table = {
        {"trainer.json", cut}, {"trainer.json", nullptr}, {"trainer.json", other_samples}};
    for (const std::string& file : kModelFiles)
        for (const Damage& damage :
             {Damage{file, flipped}, Damage{file, cut}, Damage{file, longer}, Damage{file, nullptr}})
            table.push_back(damage);
    auto spoil = [&](int step, const Damage& damage) {
        const std::string path = out + "/" + step_name(step) + "/" + damage.file, text = get_file(path);
        fs::remove(path);
        if (damage.damage) put_file(path, damage.damage(text));
    };
    auto begin = [&] {
        copy_begun(out);
        fs::remove_all(out + "/step_00000030.tmp");
    };
    const std::string eval = "eval --threads 2 --data " + runs().data + " --model " + out;
    begin();
    const Result before = train_gpt(eval + "/step_00000010");
    for (size_t i = 0; i < table.size(); i++) {
        CAPTURE(table[i].file);
        begin();
        spoil(20, table[i]);
        Strings commands = {eval};
        if (i + 1 == table.size() || i == 2) commands.push_back(resume(out));
        for (const std::string& command : commands) {
            const Result result = train_gpt(command);
            CAPTURE(result.err);
            CHECK(result.status == 0);
            CHECK(result.err.rfind("warning: ", 0) == 0);
            CHECK(contains(result.err, out + "/step_00000020"));
            CHECK(contains(result.err, table[i].file));
            if (command == eval) {
                CHECK(result.out == before.out);
            } else {
                CHECK(contains(result.out, "step_00000010 after step 10"));
                check_same_end(out);
            }
        }
    }
    begin();
    spoil(20, table.back());
    spoil(10, table.front());
    const std::string log = get_file(out + "/metrics.jsonl");
    const Result result = train_gpt(resume(out));
    check_failed(result, 1, {out});
    CHECK(contains(result.err, "step_00000010"));
    CHECK(contains(result.err, "step_00000020"));
    CHECK((get_file(out + "/metrics.jsonl") == log));
    CHECK(names_in(out) == std::set<std::string>{"metrics.jsonl", "step_00000010", "step_00000020"});
}

TEST_CASE("resume: a trainer.json that is not one is refused though its checksum is right") {
    const TempFolder folder;
    const std::string checkpoint = folder / "step_00000020", path = checkpoint + "/trainer.json";
    fs::copy(runs().whole + "/step_00000020", checkpoint);
    const Json good = Json::parse(get_file(path));
    auto write = [&](const char* key, const Json& value) {
        Json json = good;
        json[key] = value;
        json.erase("crc32");
        const std::string text = json.dump();
        json["crc32"] = ::crc32(0, (const Bytef*)text.data(), text.size());
        put_file(path, json.dump());
    };
    const std::string eval = "eval --threads 2 --data " + runs().data + " --model " + checkpoint;
    write("step", 20);
    check_done(train_gpt(eval));
    struct Bad {
        const char* key;
        Json value;
    };
    for (const Bad& bad : {Bad{"version", 2}, Bad{"step", -1}, Bad{"samples", -1}}) {
        CAPTURE(bad.key);
        write(bad.key, bad.value);
        check_failed(train_gpt(eval), 1, {path, bad.key});
    }
}

TEST_CASE("resume: a damaged checkpoint does not count among those to keep") {
    const TempFolder folder;
    const std::string out = folder / "out";
    copy_begun(out);
    fs::remove(out + "/step_00000020/model.safetensors");
    CHECK(train_gpt("train --resume --threads 2 --steps 15 --keep-checkpoints 1 --out " + out).status == 0);
    const Result result = train_gpt("train --resume --threads 2 --steps 16 --out " + out);
    CHECK(result.status == 0);
    CHECK(contains(result.out, "step_00000015 after step 15"));
}

TEST_CASE("resume: an old checkpoint that cannot be deleted is named as it is, each time, until it can be") {
    const TempFolder folder;
    const std::string out = folder / "out";
    copy_begun(out);
    fs::remove_all(out + "/step_00000030.tmp");
    const Result stuck = train_gpt(resume(out), {}, fault(out, 1, "stuck", EIO));
    CHECK(stuck.status == 0);
    std::multiset<std::string> found, expected;
    for (const std::string& line : lines_of(stuck.err)) found.insert(line);
    for (int old : {10, 10, 10, 20, 20, 30})  // left after the checkpoints of steps 30, 40 and 50
        expected.insert("warning: " + out + "/" + step_name(old) + ".tmp: cannot delete: Input/output error");
    CHECK(found == expected);
    check_same_end(out);
    const Result result = train_gpt(resume(out));
    CHECK(result.status == 0);
    CHECK(lines_of(result.err).size() == 3);
    CHECK(contains(result.err, out + "/step_00000010.tmp: incomplete"));
    CHECK(names_in(out) == std::set<std::string>{"metrics.jsonl", "step_00000040", "step_00000050"});
}

TEST_CASE("resume: a run that goes on can be read, whatever it is writing or deleting") {
    const TempFolder folder;
    const std::string out = folder / "out";
    auto generate = [&](const std::string& model, const Run& run = {}) {
        return train_gpt("generate --temperature 0 --tokens 20 --threads 2 --model " + model, {}, run);
    };
    const std::string step_10 = generate(runs().begun + "/step_00000010").out,
                      step_20 = generate(runs().begun + "/step_00000020").out;
    CHECK(step_10 != step_20);
    copy_begun(out);
    // A running program writes step_00000030.tmp, and a stopped one may have left it.
    const int held = ::open(out.c_str(), O_RDONLY | O_DIRECTORY);
    REQUIRE(::flock(held, LOCK_EX) == 0);
    const Result beside = generate(out);
    check_done(beside);
    CHECK(beside.out == step_20);
    ::close(held);
    const Result stopped = generate(out);
    CHECK(stopped.err ==
          "warning: " + out + "/step_00000030.tmp: incomplete, left by a run that was stopped; ignored\n");
    CHECK(stopped.out == step_20);
    // The newest checkpoint disappears when this file of it has been opened. The program opens all files of a
    // checkpoint before it uses one, or it takes another checkpoint.
    fs::remove_all(out + "/step_00000030.tmp");
    for (const char* file :
         {"trainer.json", "config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"}) {
        CAPTURE(file);
        const std::string newest = out + "/step_00000020";
        Run run = fault("", 0, "");
        run.environment.push_back("FAULT_GONE=" + newest + "/" + file);
        const Result result = generate(out, run);
        check_done(result);
        CHECK(result.out == (file == std::string("tokenizer.json") ? step_20 : step_10));
        CHECK_FALSE(fs::exists(newest));
        fs::rename(newest + ".gone", newest);
    }
}

TEST_CASE("resume: flags that would make another run are refused, others change it and are named") {
    const TempFolder folder;
    const std::string out = folder / "out";
    struct Bad {
        std::string flags;
        Strings parts;
    };
    const Bad table[] = {{"--seed 2", {"--seed", "2", "1", "trainer.json"}},
                         {"--seq 8", {"--seq", "8", "16", "trainer.json"}},
                         {"--total-batch 128", {"--total-batch", "128", "64", "trainer.json"}},
                         {"--attention softmax", {"attention", "softmax", "poly2", "config.json"}},
                         {"--attention-scale mean", {"attention_scale", "mean", "row", "config.json"}},
                         {"--softmax-every 2", {"softmax_every", "2", "0", "config.json"}},
                         {"--positions learned", {"positions", "learned", "rope", "config.json"}},
                         {"--qk-norm false", {"qk_norm", "false", "true", "config.json"}},
                         {"--q-gain 0.5", {"q_gain", "0.5", "0.25", "config.json"}},
                         {"--output-gate false", {"output_gate", "false", "true", "config.json"}},
                         {"--decay learned", {"decay", "learned", "gate", "config.json"}},
                         {"--short-conv 3", {"short_conv", "3", "0", "config.json"}},
                         {"--layers 2", {"layer", "2", "1", "config.json"}},
                         {"--heads 4", {"head", "4", "2", "config.json"}},
                         {"--channels 32", {"embd", "32", "16", "config.json"}},
                         {"--mlp-channels 32", {"n_inner", "32", "null", "config.json"}},
                         {"--context 32", {"positions", "32", "16", "config.json"}},
                         {"--preset gpt2", {"12", "1", "config.json"}},
                         {"--steps 19", {"--steps", "19", "20"}},
                         {"--batch 3", {"--total-batch", "64", "48"}}};
    copy_begun(out);
    const auto names = names_in(out);
    for (const Bad& bad : table) {
        CAPTURE(bad.flags);
        check_failed(train_gpt("train --resume --threads 2 --out " + out + " " + bad.flags), 2, bad.parts);
        CHECK(names_in(out) == names);
        CHECK((get_file(out + "/metrics.jsonl") == get_file(runs().begun + "/metrics.jsonl")));
    }
    const Result result = train_gpt(resume(out, "--steps 24 --seed 1 --batch 4 --schedule constant"));
    CHECK(result.status == 0);
    for (const char* part : {"--steps 24 (was 50)", "--batch 4 (was 2)", "\"constant\" (was \"cosine\")"})
        CHECK(contains(result.out, part));
    CHECK_FALSE(contains(result.out, "--seed"));
    CHECK(names_in(out) == std::set<std::string>{"metrics.jsonl", "step_00000020", "step_00000024"});
    // The samples of a step do not depend on the micro-batch.
    const auto same_step = [](const Json& entry) { return entry.at("step") == 21; };
    const std::vector<Json> after = timeless_metrics(out);
    CHECK(std::find_if(after.begin(), after.end(), same_step)->at("loss").get<double>() ==
          doctest::Approx(
              std::find_if(runs().metrics.begin(), runs().metrics.end(), same_step)->at("loss").get<double>())
              .epsilon(1e-5));
}
