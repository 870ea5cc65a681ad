#include "llmc/dataloader.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "llmc/recall.h"
#include "tests/helpers.h"

namespace {

constexpr int32_t kMagic16 = 20240520, kMagic32 = 20240801;

template <class Token>
std::string shard_text(int32_t magic, int32_t version, int32_t count, const std::vector<Token>& tokens) {
    std::vector<int32_t> header(256);
    header[0] = magic;
    header[1] = version;
    header[2] = count;
    std::string text(reinterpret_cast<const char*>(header.data()), 1024);
    text.append(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(Token));
    return text;
}

// Writes a shard with the tokens first, first+1, ...
void write_shard(const std::string& path, int first, int count) {
    std::vector<uint16_t> tokens(count);
    for (int i = 0; i < count; i++) tokens[i] = (uint16_t)(first + i);
    put_file(path, shard_text(kMagic16, 1, count, tokens));
}

// The first token of each of the samples first .. first+B-1. Checks that the other tokens follow it.
std::vector<int> first_tokens(const DataLoader& loader, int64_t first, int B, int T) {
    std::vector<int> inputs(B * T, -1), targets(B * T, -1), out;
    loader.batch(first, B, inputs.data(), targets.data());
    for (int b = 0; b < B; b++) {
        out.push_back(inputs[b * T]);
        for (int t = 0; t < T; t++) {
            REQUIRE(inputs[b * T + t] == out[b] + t);
            REQUIRE(targets[b * T + t] == out[b] + t + 1);
        }
    }
    return out;
}

// A chi-square test. If all counts are fair, the statistic is about `degrees`, with a standard deviation of
// sqrt(2 degrees). The seeds are fixed, so the result is always the same.
void check_fair(const std::vector<int>& counts, double expected, double degrees) {
    double chi_square = 0;
    for (int count : counts) chi_square += (count - expected) * (count - expected) / expected;
    CHECK(std::abs(chi_square - degrees) < 4 * std::sqrt(2 * degrees));
}

}  // namespace

TEST_CASE("TokenDataset: sequences of a shard, neighbours sharing one token, none across shards") {
    const TempFolder folder;
    write_shard(folder / "train_000001.bin", 500, 9);   // 2 sequences of 4
    write_shard(folder / "train_000000.bin", 100, 12);  // 2 sequences, and 3 tokens are left
    write_shard(folder / "fineweb_train_000001.bin", 900, 5);
    write_shard(folder / "val_000000.bin", 700, 13);  // 3 sequences
    write_shard(folder / "retrieval_train_000009.bin", 1000, 5);
    put_file(folder / "train.txt", "no shard");
    put_file(folder / "notes.bin", "no shard");

    const TokenDataset train(folder.path(), "train", 50257, 4);
    CHECK(train.tokens() == 9 + 12 + 5 + 5);
    CHECK(train.sequences() == 6);
    CHECK(train.sequence_length() == 4);
    const DataLoader in_order(train, 1, false);
    CHECK(first_tokens(in_order, 0, 6, 4) == std::vector<int>{900, 1000, 100, 104, 500, 504});
    CHECK(first_tokens(in_order, 5, 3, 4) == std::vector<int>{504, 900, 1000});

    const TokenDataset val(folder.path(), "val", 50257, 4);
    CHECK(first_tokens(DataLoader(val, 1, false), 0, 3, 4) == std::vector<int>{700, 704, 708});
    int inputs[4], targets[4];
    check_error([&] { val.read(3, inputs, targets); }, {"sequence 3 of 3"});
    check_error([&] { val.read(-1, inputs, targets); }, {"sequence -1"});
    check_error([&] { in_order.sequence_of(-1); }, {"sample -1"});
}

TEST_CASE("TokenDataset: number of sequences at the boundaries") {
    const TempFolder folder;
    for (int count = 5; count <= 40; count++) {
        write_shard(folder / "train_000000.bin", 0, count);
        CHECK(TokenDataset(folder.path(), "train", 50257, 4).sequences() == (count - 1) / 4);
    }
    write_shard(folder / "train_000000.bin", 0, 4);
    check_error([&] { TokenDataset(folder.path(), "train", 50257, 4); },
                {folder / "train_000000.bin", "4 tokens", "4 takes 5"});
    write_shard(folder / "train_000001.bin", 0, 3);
    check_error([&] { TokenDataset(folder.path(), "train", 50257, 4); },
                {folder / "train_000000.bin", "4 tokens", "4 takes 5", "no train shard is longer"});
    std::filesystem::remove(folder / "train_000001.bin");
    check_error([&] { TokenDataset(folder.path(), "train", 50257, std::numeric_limits<int>::max()); },
                {"4 tokens", "takes 2147483648"});
    write_shard(folder / "train_000000.bin", 0, 2);
    CHECK(first_tokens(DataLoader(TokenDataset(folder.path(), "train", 50257, 1), 3), 0, 1, 1) ==
          std::vector<int>{0});
}

TEST_CASE("TokenDataset: shards that hold no sequence are passed over where others do") {
    const TempFolder folder;
    for (int T : {1, 4}) {
        write_shard(folder / "train_000000.bin", 100, 2 * T + 1);
        write_shard(folder / "train_000001.bin", 200, T);
        write_shard(folder / "train_000002.bin", 300, 0);
        write_shard(folder / "train_000003.bin", 400, T + 1);
        write_shard(folder / "train_000004.bin", 500, 1);
        const TokenDataset train(folder.path(), "train", 50257, T);
        CHECK(train.tokens() == 4 * T + 3);
        CHECK(train.sequences() == 3);
        CHECK(first_tokens(DataLoader(train, 1, false), 0, 4, T) == std::vector<int>{100, 100 + T, 400, 100});
    }
}

TEST_CASE("TokenDataset: a folder with more or less than meta.json counts is refused") {
    const TempFolder folder;
    auto load = [&] { TokenDataset(folder.path(), "train", 50257, 4); };
    auto write = [&] {
        for (int i : {0, 1, 2}) write_shard(folder / ("train_00000" + std::to_string(i) + ".bin"), 0, 10 + i);
    };
    auto say = [&](const std::string& counts) {
        put_file(folder / "meta.json", R"({"vocab_size": 50257)" + counts + "}");
    };
    write_shard(folder / "val_000000.bin", 0, 9);  // this is another split
    write();
    for (const char* good : {"", R"(, "tokens": {"train": 33}, "shards": {"train": 3, "val": 9})",
                             R"(, "tokens": {"val": 1}, "shards": {"train": null})"}) {
        say(good);
        CHECK(error_of(load) == "");
    }
    say(R"(, "shards": {"train": 3})");
    for (const char* name : {"train_000000.bin", "train_000001.bin", "train_000002.bin"}) {
        std::filesystem::remove(folder / name);
        check_error(load, {folder / name, "missing", "counts 3 train shards", "has 2"});
        write();
    }
    say(R"(, "shards": {"train": 2})");
    check_error(load, {folder.path(), "counts 2 train shards", "has 3"});
    say(R"(, "tokens": {"train": 33})");  // the number of shards is missing
    std::filesystem::remove(folder / "train_000001.bin");
    check_error(load, {folder.path(), "train", "22 tokens", "meta.json counts 33"});
    say(R"(, "tokens": {"train": 33}, "shards": {"train": 3})");
    write_shard(folder / "train_000001.bin", 0, 12);  // this shard is from another dataset
    check_error(load, {folder.path(), "train", "34 tokens", "meta.json counts 33"});
    for (int i : {0, 1, 2}) std::filesystem::remove(folder / ("train_00000" + std::to_string(i) + ".bin"));
    check_error(load, {folder / "train_000000.bin", "missing", "has 0"});
}

TEST_CASE("TokenDataset: uint32 shards, and both kinds in one folder") {
    const TempFolder folder;
    put_file(folder / "train_000000.bin",
             shard_text<uint32_t>(kMagic32, 7, 5, {70000, 70001, 70002, 70003, 70004}));
    write_shard(folder / "train_000001.bin", 65531, 5);  // up to 65535
    const TokenDataset data(folder.path(), "train", 70005, 4);
    CHECK(first_tokens(DataLoader(data, 1, false), 0, 2, 4) == std::vector<int>{70000, 65531});
}

TEST_CASE("TokenDataset: a token outside the vocabulary is named with its place") {
    const TempFolder folder;
    int inputs[2], targets[2];
    auto check = [&](const std::string& text, int vocab_size, std::initializer_list<std::string> parts) {
        put_file(folder / "val_0.bin", text);
        const TokenDataset data(folder.path(), "val", vocab_size, 2);
        data.read(0, inputs, targets);
        check_error([&] { data.read(1, inputs, targets); }, {folder / "val_0.bin"});
        check_error([&] { data.read(1, inputs, targets); }, parts);
    };
    check(shard_text<uint16_t>(kMagic16, 1, 5, {0, 9, 8, 10, 0}), 10,
          {"token 10 at byte 1030", "vocabulary has 10"});
    check(shard_text<uint16_t>(kMagic16, 1, 5, {0, 9, 8, 0, 65535}), 10, {"token 65535 at byte 1032"});
    check(shard_text<uint32_t>(kMagic32, 7, 5, {0, 9, 8, 0, 0xffffffff}), 10,
          {"token 4294967295 at byte 1040"});
}

TEST_CASE("TokenDataset: each malformed shard or folder has its complaint") {
    const TempFolder folder;
    const std::string path = folder / "train_0.bin";
    auto load = [&] { TokenDataset(folder.path(), "train", 50257, 2); };
    check_error(load, {folder.path(), "no *train*.bin"});
    check_error([&] { TokenDataset(folder / "none", "train", 50257, 2); },
                {folder / "none", "No such file or directory"});
    put_file(folder / "file", "");
    check_error([&] { TokenDataset(folder / "file", "train", 50257, 2); },
                {folder / "file", "Not a directory"});

    auto check_bad = [&](const std::string& text, std::initializer_list<std::string> parts) {
        put_file(path, text);
        check_error(load, {path});
        check_error(load, parts);
    };
    const std::vector<uint16_t> tokens = {1, 2, 3, 4};
    const std::string good = shard_text(kMagic16, 1, 4, tokens);
    check_bad("", {"0 bytes", "header of 1024"});
    check_bad(good.substr(0, 1023), {"1023 bytes", "header of 1024"});
    check_bad(good.substr(0, 1024), {"1024 bytes, expected 1032", "4 tokens"});
    check_bad(good.substr(0, 1031), {"1031 bytes, expected 1032"});
    check_bad(good + "x", {"1033 bytes, expected 1032"});
    check_bad(shard_text(20240521, 1, 4, tokens), {"magic number 20240521", "20240520", "20240801"});
    check_bad(shard_text(kMagic16, 2, 4, tokens), {"version 2, expected 1"});
    check_bad(shard_text(kMagic16, 7, 4, tokens), {"version 7, expected 1"});
    check_bad(shard_text(kMagic32, 1, 4, tokens), {"version 1, expected 7"});
    check_bad(shard_text(kMagic32, 7, 4, tokens), {"1032 bytes, expected 1040"});
    check_bad(shard_text(kMagic16, 1, -1, tokens), {"counts -1 tokens"});
    check_bad(shard_text(kMagic16, 1, 0, tokens), {"1032 bytes, expected 1024"});
    check_bad(shard_text(kMagic16, 1, INT32_MAX, tokens), {"expected 4294968318"});
    check_bad(shard_text<uint16_t>(kMagic16, 1, 0, {}), {"0 tokens"});
    std::filesystem::remove(path);
    std::filesystem::create_directory(path);
    check_error(load, {path, "is a directory"});
}

TEST_CASE("TokenDataset: thousands of damaged shards load or throw Error") {
    const TempFolder folder;
    std::mt19937 random(5);
    const std::string good16 = shard_text<uint16_t>(kMagic16, 1, 9, {1, 2, 3, 4, 5, 6, 7, 8, 9});
    const std::string good32 = shard_text<uint32_t>(kMagic32, 7, 9, {1, 2, 3, 4, 5, 6, 7, 8, 9});
    const int32_t likely[] = {0, 1, 7, 8, 9, 10, -1, kMagic16, kMagic32, INT32_MAX, INT32_MIN, 1 << 30};
    int read = 0, refused = 0;
    for (int round = 0; round < 4000; round++) {
        std::string text = random() % 2 ? good16 : good32;
        switch (random() % 4) {
            case 0:
                text[random() % 12] = (char)random();
                break;
            case 1:
                std::memcpy(&text[random() % 3 * 4], &likely[random() % 12], 4);
                break;
            case 2:
                text[1024 + random() % (text.size() - 1024)] = (char)random();
                break;
            case 3:
                text.resize(random() % 2 ? random() % text.size() : text.size() + random() % 9);
                break;
        }
        put_file(folder / "train_0.bin", text);
        try {
            const TokenDataset data(folder.path(), "train", 16, 2);
            const DataLoader loader(data, 1);
            int inputs[2], targets[2];
            for (int64_t n = 0; n < data.sequences(); n++) {
                loader.batch(n, 1, inputs, targets);
                for (int token : {inputs[0], inputs[1], targets[0], targets[1]})
                    REQUIRE((token >= 0 && token < 16));
            }
            read++;
        } catch (const Error&) {
            refused++;
        }
    }
    CHECK(read > 100);
    CHECK(refused > 1000);
}

TEST_CASE("DataLoader: every epoch has every sequence once, whatever the batch") {
    const TempFolder folder;
    write_shard(folder / "train_0.bin", 0, 3 * 5 + 2);     // 5 sequences of 3
    write_shard(folder / "train_1.bin", 1000, 3 * 7 + 1);  // 7
    write_shard(folder / "train_2.bin", 2000, 3 + 1);      // 1
    const TokenDataset data(folder.path(), "train", 50257, 3);
    REQUIRE(data.sequences() == 13);
    const DataLoader loader(data, 42), other_seed(data, 43);
    const std::vector<int> in_order = first_tokens(DataLoader(data, 0, false), 0, 13, 3);
    const std::vector<int> samples = first_tokens(loader, 0, 13 * 6, 3);
    std::set<std::vector<int>> orders;
    for (int epoch = 0; epoch < 6; epoch++) {
        std::vector<int> order(samples.begin() + 13 * epoch, samples.begin() + 13 * (epoch + 1));
        orders.insert(order);
        std::sort(order.begin(), order.end());
        CHECK(order == in_order);
    }
    CHECK(orders.size() == 6);
    CHECK(first_tokens(other_seed, 0, 13, 3) != first_tokens(loader, 0, 13, 3));
    CHECK(orders.count(in_order) == 0);

    // Batches may have any size and begin at any place, and each may come from its own loader, as in a
    // resumed run.
    for (int B : {1, 2, 3, 5, 8, 13, 20, 78}) {
        for (int first = 0; first + B <= 78; first += B) {
            const std::vector<int> expected(samples.begin() + first, samples.begin() + first + B);
            CHECK(first_tokens(DataLoader(data, 42), first, B, 3) == expected);
        }
    }
}

TEST_CASE("DataLoader: one sequence alone, and far samples") {
    const TempFolder folder;
    write_shard(folder / "train_0.bin", 7, 4);
    const TokenDataset data(folder.path(), "train", 50257, 3);
    const DataLoader loader(data, 1);
    CHECK(first_tokens(loader, 0, 4, 3) == std::vector<int>{7, 7, 7, 7});
    CHECK(first_tokens(loader, INT64_MAX - 1, 1, 3) == std::vector<int>{7});
}

TEST_CASE("Permutation: one to one for every N") {
    for (int64_t N = 1; N <= 300; N++) {
        std::vector<bool> seen(N);
        const Permutation permutation(N, 5, N);
        for (int64_t i = 0; i < N; i++) {
            const int64_t x = permutation(i);
            REQUIRE((x >= 0 && x < N));
            REQUIRE(!seen[x]);
            seen[x] = true;
        }
    }
    const int64_t huge = INT64_MAX;
    const Permutation permutation(huge, 1, 2);
    std::set<int64_t> values;
    for (int64_t i = 0; i < 1000; i++)
        values.insert(permutation(i)), values.insert(permutation(huge - 1 - i));
    CHECK(values.size() == 2000);
    CHECK(*values.begin() >= 0);
    CHECK(*values.rbegin() < huge);
}

TEST_CASE("Permutation: all orders of a few are equally likely, over seeds and over epochs") {
    for (bool epochs : {false, true}) {
        for (int N : {2, 3, 4, 5}) {
            std::map<std::vector<int64_t>, int> count_of;
            std::vector<int64_t> order(N);
            for (int i = 0; i < N; i++) order[i] = i;
            do count_of[order] = 0;
            while (std::next_permutation(order.begin(), order.end()));
            const int rounds = 100 * (int)count_of.size();
            for (int round = 0; round < rounds; round++) {
                const Permutation permutation(N, epochs ? 1337 : round, epochs ? round : 0);
                for (int i = 0; i < N; i++) order[i] = permutation(i);
                count_of.at(order)++;
            }
            std::vector<int> counts;
            for (const auto& [_, count] : count_of) counts.push_back(count);
            CAPTURE(N);
            CAPTURE(epochs);
            check_fair(counts, 100, (double)counts.size() - 1);
        }
    }
}

TEST_CASE("Permutation: places, neighbours and successive epochs are unrelated") {
    constexpr int N = 50, kEpochs = 1500;
    std::vector<int> at(N * N), step(N), again(N);
    for (int epoch = 0; epoch < kEpochs; epoch++) {
        const Permutation permutation(N, 1337, epoch), next(N, 1337, epoch + 1);
        for (int i = 0; i < N; i++) {
            const int x = (int)permutation(i);
            at[i * N + x]++;
            if (i + 1 < N) step[(permutation(i + 1) - x + N) % N]++;
            again[(next(i) - x + N) % N]++;
        }
    }
    check_fair(at, kEpochs / N, N * (N - 1));  // a little more than (N - 1)^2: rows and columns are exact
    CHECK(step[0] == 0);
    step.erase(step.begin());
    check_fair(step, kEpochs, N - 2);
    check_fair(again, kEpochs, N - 1);
}

TEST_CASE("read_dataset_info: from meta.json, GPT-2's without one") {
    const TempFolder folder;
    std::filesystem::create_directory(folder / "fineweb");
    const DatasetInfo gpt2 = read_dataset_info(folder / "fineweb/");
    CHECK_FALSE(gpt2.described);
    CHECK(gpt2.name == "fineweb");
    CHECK(gpt2.vocab_size == 50257);
    CHECK(gpt2.eot_token == 50256);
    CHECK(gpt2.train.tokens == -1);

    auto read = [&](const std::string& text) {
        put_file(folder / "meta.json", text);
        return read_dataset_info(folder.path());
    };
    const DatasetInfo info =
        read(R"({"name": "shakespeare", "vocab_size": 1024, "eot_token": 0, "source": "x",
        "tokens": {"train": 5000000000, "val": 7}, "bytes": {"val": 20}, "shards": {"train": 50, "val": 1}})");
    CHECK(info.described);
    CHECK(info.name == "shakespeare");
    CHECK(info.vocab_size == 1024);
    CHECK(info.eot_token == 0);
    CHECK(info.train.tokens == 5000000000);
    CHECK(info.val.tokens == 7);
    CHECK(info.train.bytes == -1);
    CHECK(info.val.bytes == 20);
    CHECK(info.train.shards == 50);
    CHECK(info.val.shards == 1);
    CHECK(read(R"({"vocab_size": 65, "eot_token": null})").eot_token == -1);
    check_error([&] { read("[]"); }, {folder / "meta.json", "object"});
    check_error([&] { read("{}"); }, {folder / "meta.json", "vocab_size", "missing"});
    check_error([&] { read(R"({"vocab_size": 1})"); }, {folder / "meta.json", "\"vocab_size\" is 1"});
    check_error([&] { read(R"({"vocab_size": "9"})"); }, {"\"vocab_size\" is \"9\""});
    check_error([&] { read(R"({"vocab_size": 9, "eot_token": 9})"); }, {"\"eot_token\" is 9", "-1 to 8"});
    check_error([&] { read(R"({"vocab_size": 18446744073709551615})"); },
                {"\"vocab_size\" is 18446744073709551615"});
    check_error([&] { read(R"({"vocab_size": 9, "tokens": {"val": -1}})"); }, {"\"val\" is -1"});

    CHECK_FALSE(info.recall);
    const DatasetInfo recall =
        read(R"({"vocab_size": 9, "recall": {"task": "mqar", "keys": [0, 4], "values": [4, 9]}})");
    REQUIRE(recall.recall);
    CHECK(recall.recall->keys.end == 4);
    CHECK(recall.recall->values.begin == 4);
    CHECK(recall.recall->values.end == 9);
    for (const char* keys : {"[0]", "[0,10]", "[5,4]", "[-1,4]", "[0,4.5]", "[0,4,5]", "\"0-4\"", "null"})
        check_error(
            [&] { read(str(R"({"vocab_size": 9, "recall": {"values": [4, 9], "keys": )", keys, "}}")); },
            {folder / "meta.json", "\"keys\" is ", keys, "[begin, end], up to 9"});
    check_error([&] { read(R"({"vocab_size": 9, "recall": {"keys": [0, 4]}})"); }, {"\"values\" is null"});
    check_error([&] { read(R"({"vocab_size": 9, "recall": 3})"); }, {"\"keys\" is 3"});
}

TEST_CASE("answer_positions: values after keys that the same example had before") {
    DatasetInfo info;
    info.eot_token = 19;
    info.recall = {{0, 8}, {8, 16}};  // 18 is a blank
    auto positions = [&](const std::vector<int>& tokens) {
        return answer_positions(info, tokens.data(), tokens.data() + 1, (int)tokens.size() - 1);
    };
    CHECK(positions({19, 3, 9, 4, 8, 18, 4, 8, 18, 18, 3, 9, 18, 4, 8, 19}) == std::vector<int>{6, 10, 13});
    CHECK(positions({3, 9, 19, 3, 9, 4, 8, 3, 9}) == std::vector<int>{7});  // 3 is in the example before, too
    CHECK(positions({3, 9, 3, 18, 3, 19, 3, 9}).empty());                   // no value follows a known key
    CHECK(positions({9, 8, 9, 8, 18, 18, 19, 19}).empty());                 // no keys
    info.recall = {{0, 18}, {0, 18}};
    CHECK(positions({19, 18, 5, 7, 6, 18, 18, 5, 7, 6, 18, 18}) == std::vector<int>{7, 8});
    CHECK(positions({19, 5, 7, 6, 5, 7, 6, 19}) == std::vector<int>{4, 5});
}

TEST_CASE("RecallScore: the most probable token, and the loss of the answers") {
    RecallScore score;
    const float logits[] = {1, 3, 2, 3};
    for (int target = 0; target < 4; target++) score.add(logits, 4, target);
    CHECK(score.answers == 4);
    CHECK(score.right == 1);  // of equal ones the first
    const double sum = std::log(std::exp(1) + 2 * std::exp(3) + std::exp(2));
    CHECK(score.loss == doctest::Approx(4 * sum - 9).epsilon(1e-6));
    RecallScore large;
    const float far[] = {1000, -1000};
    large.add(far, 2, 0);
    CHECK(large.loss == 0);
    large.add(far, 2, 1);
    CHECK(large.loss == 2000);
}
