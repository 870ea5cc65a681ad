// --zero: training, checkpoints and resuming with ranks that divide the state among them, compared with one
// rank that has it all.
#include "llmc/checkpoint.h"
#include "tests/dist/ranks.h"

using namespace ranks_test;

namespace {

struct Layout {
    int ranks, zero, batch;
    std::string name() const { return str("ranks", ranks, "_zero", zero, "_batch", batch); }
};

Result train(const Layout& layout, const std::string& out, const std::string& more = "") {
    return on_ranks(layout.ranks, program() + " " + fixture().train(out, layout.batch, 20, 10, more) +
                                      str(" --zero ", layout.zero));
}

Result resume(const Layout& layout, const std::string& out, const std::string& more = "") {
    return on_ranks(layout.ranks, str(program(), " train --resume --threads 1 --out ", out, " --batch ",
                                      layout.batch, " --zero ", layout.zero, " ", more));
}

std::string optimizer_file(int rank, int ranks) {
    return str("optimizer-0000", rank + 1, "-of-0000", ranks, ".safetensors");
}

void check_same_files(const std::string& out, const std::string& other, int ranks) {
    Strings names = {"model.safetensors"};
    for (int rank = 0; rank < ranks; rank++) names.push_back(optimizer_file(rank, ranks));
    for (const std::string& name : names) {
        CAPTURE(name);
        CHECK((get_file(out + kLast + "/" + name) == get_file(other + kLast + "/" + name)));
    }
}

}  // namespace

TEST_CASE("zero: every level, number of ranks and accumulation gives the training of one rank") {
    if (!has_mpi()) return;
    // In 1, 2, 4 or more micro-batches a rank.
    std::vector<Layout> layouts = {{2, 0, 24}, {3, 0, 2}, {2, 1, 12}, {2, 2, 24},
                                   {3, 1, 4},  {3, 2, 4}, {4, 2, 3}};
    if (thorough()) {
        layouts.clear();
        for (int ranks : {1, 2, 3, 4})
            for (int zero : {0, 1, 2})
                for (int passes : {1, 2, 4}) layouts.push_back({ranks, zero, 48 / ranks / passes});
    }
    for (const Layout& layout : layouts) {
        CAPTURE(layout.name());
        const std::string out = fixture().folder / layout.name();
        const Result result = train(layout, out);
        check_done(result);
        if (layout.ranks > 1) {
            CHECK(contains(result.out, str("ranks      ", layout.ranks, ", started by mpirun")));
            CHECK(contains(result.out, str("--zero ", layout.zero, ";")));
            const size_t last = result.out.find("step 20/20 | loss ");  // from one rank only
            CHECK(last != std::string::npos);
            CHECK(result.out.find("step 20/20 | loss ", last + 1) == std::string::npos);
            CHECK(contains(result.out, "% hidden"));
        }
        check_like_one(out);
    }
}

TEST_CASE("zero: the same layout gives the same bits, also when it is resumed") {
    if (!has_mpi()) return;
    const Layout layout{3, 2, 4};
    const std::string out = fixture().folder / "whole", again = fixture().folder / "again";
    for (const std::string& folder : {out, again}) check_done(train(layout, folder));
    check_same_files(out, again, 3);
    // A third of two moments is in each file.
    const double all = fs::file_size(fixture().one + kLast + "/optimizer.safetensors");
    for (int rank = 0; rank < 3; rank++)
        CHECK(fs::file_size(out + kLast + "/" + optimizer_file(rank, 3)) < 0.36 * all);
    fs::remove_all(again + kLast);
    check_done(resume(layout, again));
    check_same_files(out, again, 3);
    CHECK(timeless_metrics(again) == timeless_metrics(out));
}

TEST_CASE("zero: what 4 ranks have written goes on with 1, 2 or 3, at any level, with the very next sample") {
    if (!has_mpi()) return;
    const std::string written = fixture().folder / "written";
    check_done(train({4, 2, 3}, written));
    fs::remove_all(written + kLast);
    for (const Layout& layout : {Layout{1, 0, 24}, Layout{2, 1, 6}, Layout{3, 2, 4}, Layout{3, 0, 4}}) {
        CAPTURE(layout.name());
        const std::string out = fixture().folder / ("resumed_" + layout.name());
        fs::copy(written, out, fs::copy_options::recursive);
        check_done(resume(layout, out));
        CHECK(Json::parse(get_file(out + kLast + "/trainer.json")).at("samples") == 20 * 48);
        check_like_one(out);
    }
    if (const char* cuda = getenv("LLMC_TRAIN_GPTCU")) {
        const std::string out = fixture().folder / "resumed_cuda";
        fs::copy(written, out, fs::copy_options::recursive);
        Run run;
        run.program = cuda;
        check_done(train_gpt("train --resume --batch 24 --out " + out, {}, run));
        check_like_one(out);
    }
}

TEST_CASE("zero: bf16, where each rank has only its part of the float32 weights") {
    if (!has_mpi()) return;
    const std::string one = fixture().folder / "bf16_one", many = fixture().folder / "bf16_many";
    check_done(train({1, 0, 12}, one, "--dtype bf16"));
    check_done(train({2, 2, 12}, many, "--dtype bf16"));
    std::vector<Json> expected = timeless_metrics(one), found = timeless_metrics(many);
    REQUIRE(expected.size() == found.size());
    for (size_t i = 0; i < found.size(); i++)
        if (found[i].contains("loss"))
            CHECK(found[i].at("loss").get<double>() ==
                  doctest::Approx(expected[i].at("loss").get<double>()).epsilon(1e-3));
    CHECK(weights_error(many + kLast, one + kLast) < 1e-2);
    // The file has float32 weights, which are no bf16 numbers.
    const std::vector<float> weights = Safetensors(many + kLast + "/model.safetensors").values("wte.weight");
    CHECK(std::any_of(weights.begin(), weights.end(), [](float x) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        return (bits & 0xFFFF) != 0;
    }));
    fs::remove_all(many + kLast);
    check_done(resume({3, 1, 8}, many));
    CHECK(weights_error(many + kLast, one + kLast) < 1e-2);
}

TEST_CASE("zero: a file of the optimizer that is damaged, missing or incomplete is found") {
    if (!has_mpi()) return;
    const std::string written = fixture().folder / "to_damage", out = fixture().folder / "damaged";
    check_done(train({2, 1, 12}, written));
    const std::string file = out + kLast + "/" + optimizer_file(1, 2);
    auto check_ignored = [&](const std::function<void()>& damage, const std::string& why) {
        fs::remove_all(out);
        fs::copy(written, out, fs::copy_options::recursive);
        damage();
        const Result result = train_gpt("train --resume --threads 1 --steps 11 --out " + out);
        CHECK(result.status == 0);
        CHECK(contains(result.err, "ignored a broken checkpoint: "));
        CHECK(contains(result.err, why));
        CHECK(contains(result.out, kFirst.substr(1) + " after step 10"));
    };
    check_ignored(
        [&] {
            std::string text = get_file(file);
            text.back() ^= 1;
            put_file(file, text);
        },
        file + ": its checksum");
    check_ignored([&] { fs::remove(file); }, file + ": cannot open");
    // Files that are as trainer.json says, but do not hold all elements.
    check_ignored(
        [&] {
            const std::string trainer = out + kLast + "/trainer.json";
            Json json = Json::parse(get_file(trainer));
            json["files"].erase(optimizer_file(1, 2));
            json["crc32"] = checkpoint_detail::json_crc32(json);
            put_file(trainer, json.dump(2) + "\n");
        },
        "the files of the optimizer lack m.wte.weight from element ");
}

TEST_CASE("zero: a disk that is full at one rank ends all, and nothing is left") {
    const char* preload = getenv("LLMC_FAULT_PRELOAD");
    if (!has_mpi() || !preload) return;
    const std::string out = fixture().folder / "full", line = fixture().train(out, 12) + " --zero 1";
    // The second call of rank 1 that changes the disk is in its file of the first checkpoint.
    std::string faults;
    for (const std::string& variable : fault(out, 2, "error", ENOSPC).environment)
        faults += " -x " + variable;
    const Result result =
        on_ranks(1, program() + " " + line + " : -n 1" + faults + " " + program() + " " + line);
    check_failed(result, 1,
                 {"rank 1: " + out + kFirst + ".tmp/" + optimizer_file(1, 2) + ": cannot", "No space left"});
    CHECK(names_in(out) == std::set<std::string>{"metrics.jsonl"});
    check_done(on_ranks(2, program() + " " + line + " --resume"));
    check_like_one(out);
}
