// Training data: reads token shards in the format of llm.c, cuts them into sequences and delivers these in a
// reproducible order.
//
// A shard is 256 int32 (magic, version, number of tokens, the rest 0), followed by its tokens. These are
// uint16 with magic 20240520 and version 1, and uint32 with magic 20240801 and version 7. A dataset consists
// of all *.bin files of a folder whose names have the name of the split as a word (train_000000.bin,
// fineweb_train_000001.bin), sorted by name.
//
// Sequence k of a shard is its tokens kT .. kT+T. The first T of them are the inputs, the last T the targets.
// So neighbouring sequences share one token, no sequence crosses shards, and a shard of n tokens has
// floor((n-1)/T) sequences. The tokens that are left at its end are not used. A shard may have no sequence at
// all, which is frequent for the last shard of a dataset. It is an error if no shard has one.
//
// If there are N sequences, sample n = 0, 1, 2, ... of a loader is number n % N in epoch n / N. Every epoch
// has each sequence exactly once. The order depends only on the seed and the epoch, not on the batch size, on
// accumulation or on the number of processes. So the number n, which the caller keeps, is the whole position
// of a run in its data, and every n is reached at the same cost.
#pragma once
#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "llmc/error.h"
#include "llmc/files.h"

// The meta.json of a dataset folder has
//   {"name": .., "vocab_size": .., "eot_token": .., "tokens": {"train": .., "val": ..}, "bytes": {the same},
//    "shards": {the same}, "recall": {"keys": [begin, end], "values": [begin, end], "seq": N}}
// Only vocab_size must be present. llmc/recall.h says what "recall" means. The shards that llm.c publishes
// have no meta.json; they have GPT-2 tokens.
struct DatasetInfo {
    struct Split {
        int64_t tokens = -1;  // -1: meta.json does not say it
        int64_t bytes = -1;   // bytes of text, for bits per byte
        int64_t shards = -1;
    };
    struct Range {
        int begin = 0, end = 0;
        bool has(int token) const { return token >= begin && token < end; }
    };
    struct Recall {
        Range keys, values;  // tokens
        int seq = 0;         // tokens of an example; 0: not known
    };
    bool described = false;  // there is a meta.json
    std::string name;
    int vocab_size = 50257;
    int eot_token = 50256;  // ends a document; -1: there is none
    Split train, val;
    std::optional<Recall> recall;
};

// Returns the entries of a dataset folder; an error if they cannot be read.
inline std::filesystem::directory_iterator open_folder(const std::string& folder) {
    std::error_code error;
    std::filesystem::directory_iterator entries(folder, error);
    if (error) fail(folder, ": cannot read folder: ", error.message());
    return entries;
}

inline DatasetInfo read_dataset_info(const std::string& folder) {
    DatasetInfo info;
    info.name = base_name(folder);
    const std::string path = (std::filesystem::path(folder) / "meta.json").string();
    if (!path_exists(path)) return info;
    info.described = true;
    const nlohmann::json json = read_json(path);
    if (!json.is_object()) fail(path, ": expected a JSON object");
    auto integer = [&](const nlohmann::json& object, const std::string& key, int64_t low, int64_t high,
                       auto& out) {
        if (!object.is_object() || !object.contains(key) || object.at(key).is_null()) return;
        const auto& value = object.at(key);
        if (!value.is_number_integer() || value < low || value > high)
            fail(path, ": \"", key, "\" is ", brief(value), ", expected an integer from ", low, " to ", high);
        out = value.get<std::remove_reference_t<decltype(out)>>();
    };
    if (!json.contains("vocab_size")) fail(path, ": \"vocab_size\" is missing");
    integer(json, "vocab_size", 2, 1 << 24, info.vocab_size);
    info.eot_token = -1;
    integer(json, "eot_token", -1, info.vocab_size - 1, info.eot_token);
    if (json.contains("name") && json.at("name").is_string()) info.name = json.at("name").get<std::string>();
    for (const auto& [key, member] :
         {std::pair("tokens", &DatasetInfo::Split::tokens), std::pair("bytes", &DatasetInfo::Split::bytes),
          std::pair("shards", &DatasetInfo::Split::shards)}) {
        if (!json.contains(key)) continue;
        integer(json.at(key), "train", 0, INT64_MAX, info.train.*member);
        integer(json.at(key), "val", 0, INT64_MAX, info.val.*member);
    }
    if (json.contains("recall")) {
        const auto range = [&](const std::string& key) {
            const nlohmann::json& recall = json.at("recall");
            const nlohmann::json value = recall.is_object() ? recall.value(key, nlohmann::json()) : recall;
            const bool pair = value.is_array() && value.size() == 2 && value[0].is_number_unsigned() &&
                              value[1].is_number_unsigned();
            if (!pair || value[0] > value[1] || value[1] > info.vocab_size)
                fail(path, ": \"recall\": \"", key, "\" is ", brief(value),
                     ", expected two tokens, [begin, end], up to ", info.vocab_size);
            return DatasetInfo::Range{value[0], value[1]};
        };
        info.recall = {range("keys"), range("values")};
        integer(json.at("recall"), "seq", 1, INT32_MAX, info.recall->seq);
    }
    return info;
}

// One token file. It is mapped, and its header must match its size.
class TokenShard {
  public:
    explicit TokenShard(const std::string& path) : file_(path) {
        constexpr size_t kHeaderBytes = 256 * sizeof(int32_t);
        if (file_.size() < kHeaderBytes)
            fail(path, ": ", file_.size(), " bytes, expected a shard's header of ", kHeaderBytes);
        int32_t header[3];  // magic, version, tokens
        std::memcpy(header, file_.data(), sizeof(header));
        if (header[0] != 20240520 && header[0] != 20240801)
            fail(path, ": magic number ", header[0],
                 ", expected 20240520 (uint16 tokens) or 20240801 (uint32 tokens). A file of tokens "
                 "without a header, such as one of nanoGPT, is not a shard; data/prepare.py makes shards "
                 "from text");
        width_ = header[0] == 20240520 ? 2 : 4;
        const int version = width_ == 2 ? 1 : 7;
        if (header[1] != version) fail(path, ": version ", header[1], ", expected ", version);
        if (header[2] < 0) fail(path, ": the header counts ", header[2], " tokens");
        tokens_ = header[2];
        const uint64_t expected = kHeaderBytes + (uint64_t)tokens_ * width_;
        if (file_.size() != expected)
            fail(path, ": ", file_.size(), " bytes, expected ", expected, " for the ", tokens_,
                 " tokens that the header counts");
        data_ = file_.data() + kHeaderBytes;
    }

    const std::string& path() const { return file_.path(); }
    int64_t tokens() const { return tokens_; }

    // Reads tokens begin .. begin+count-1. It is an error if one is not in [0, vocab_size).
    void read(int64_t begin, int count, int vocab_size, int* out /*(count)*/) const {
        for (int i = 0; i < count; i++) {
            const std::byte* source = data_ + (begin + i) * width_;
            uint32_t token = 0;
            std::memcpy(&token, source, width_);
            if (token >= (uint32_t)vocab_size)
                fail(path(), ": token ", token, " at byte ", source - file_.data(),
                     ", but the vocabulary has ", vocab_size, " tokens");
            out[i] = (int)token;
        }
    }

  private:
    MappedFile file_;
    const std::byte* data_ = nullptr;  // (tokens, width)
    int64_t tokens_ = 0;
    int width_ = 2;  // bytes in a token
};

class TokenDataset {
  public:
    // split: "train" or "val"; T >= 1.
    TokenDataset(const std::string& folder, const std::string& split, int vocab_size, int T)
        : vocab_size_(vocab_size), T_(T) {
        const DatasetInfo info = read_dataset_info(folder);
        const DatasetInfo::Split& expected = split == "train" ? info.train : info.val;
        for (const std::string& path : find_shards(folder, split, expected.shards)) {
            const TokenShard& shard = shards_.emplace_back(path);
            tokens_ += shard.tokens();
            sequences_ += std::max<int64_t>(0, shard.tokens() - 1) / T;
            ends_.push_back(sequences_);
        }
        if (expected.tokens >= 0 && expected.tokens != tokens_)
            fail(folder, ": the ", split, " shards have ", tokens_, " tokens, but meta.json counts ",
                 expected.tokens);
        if (sequences_ > 0) return;
        const TokenShard& longest = *std::max_element(
            shards_.begin(), shards_.end(), [](auto& a, auto& b) { return a.tokens() < b.tokens(); });
        fail(longest.path(), ": ", longest.tokens(), " tokens, but a sequence of ", T, " takes ",
             T + int64_t{1}, shards_.size() > 1 ? str("; no ", split, " shard is longer") : "");
    }

    int64_t sequences() const { return sequences_; }
    int64_t tokens() const { return tokens_; }
    int sequence_length() const { return T_; }

    // Reads sequence `index`, which counts through all shards and is in [0, sequences()).
    void read(int64_t index, int* inputs /*(T)*/, int* targets /*(T)*/) const {
        if (index < 0 || index >= sequences_) fail("sequence ", index, " of ", sequences_, " does not exist");
        const size_t shard = std::upper_bound(ends_.begin(), ends_.end(), index) - ends_.begin();
        const int64_t begin = (index - (shard ? ends_[shard - 1] : 0)) * T_;
        shards_[shard].read(begin, T_, vocab_size_, inputs);
        std::copy(inputs + 1, inputs + T_, targets);
        shards_[shard].read(begin + T_, 1, vocab_size_, targets + T_ - 1);
    }

  private:
    // Whether `word` is in `name` with no letter next to it. ("retrieval_train.bin" is not a validation
    // shard.)
    static bool has_word(const std::string& name, const std::string& word) {
        auto letter_at = [&](size_t i) { return i < name.size() && std::isalpha((unsigned char)name[i]); };
        for (size_t at = name.find(word); at != std::string::npos; at = name.find(word, at + 1)) {
            if (!(at > 0 && letter_at(at - 1)) && !letter_at(at + word.size())) return true;
        }
        return false;
    }

    // expected: how many shards meta.json counts; -1: it does not say.
    static std::vector<std::string> find_shards(const std::string& folder, const std::string& split,
                                                int64_t expected) {
        std::error_code error;
        std::filesystem::directory_iterator entry = open_folder(folder), end;
        std::vector<std::string> paths;
        while (entry != end) {
            const std::filesystem::path& path = entry->path();
            if (path.extension() == ".bin" && has_word(path.stem().string(), split))
                paths.push_back(path.string());
            entry.increment(error);
            if (error) fail(folder, ": cannot read folder: ", error.message());
        }
        std::sort(paths.begin(), paths.end());
        if (expected >= 0 && expected != (int64_t)paths.size()) {
            const std::string counts =
                str("meta.json counts ", expected, " ", split, " shards, but the folder has ", paths.size());
            for (int64_t i = 0; i < expected; i++) {
                char name[64];  // data/prepare.py uses these names
                snprintf(name, sizeof(name), "%s_%06lld.bin", split.c_str(), (long long)i);
                const std::string path = (std::filesystem::path(folder) / name).string();
                if (!std::filesystem::exists(path, error)) fail(path, ": this shard is missing: ", counts);
            }
            fail(folder, ": ", counts);
        }
        if (paths.empty()) fail(folder, ": no *", split, "*.bin token shard in this folder");
        return paths;
    }

    int vocab_size_;
    int T_;
    std::vector<TokenShard> shards_;
    std::vector<int64_t> ends_;  // number of sequences in this shard and all before it
    int64_t tokens_ = 0;
    int64_t sequences_ = 0;
};

// A random permutation of [0, N) that needs no memory: the swap-or-not shuffle of Hoang, Morris and Rogaway
// (CRYPTO 2012). Each round pairs x with key - x (mod N) and swaps the two if a random bit, which depends
// only on the pair, is 1. It works for any N, and kRounds is many times what good mixing needs.
class Permutation {
  public:
    Permutation(int64_t N, uint64_t seed, uint64_t stream) : N_((uint64_t)N), key_(mix(mix(seed) + stream)) {}

    int64_t operator()(int64_t index) const {
        uint64_t x = (uint64_t)index;
        for (uint64_t round = 0; round < kRounds; round++) {
            const uint64_t round_key = mix(key_ + round);
            const uint64_t partner = (round_key % N_ + N_ - x) % N_;
            if (mix(round_key ^ mix(std::max(x, partner))) >> 63) x = partner;
        }
        return (int64_t)x;
    }

  private:
    static constexpr uint64_t kRounds = 128;

    // The output function of SplitMix64, a bijection that mixes well.
    static uint64_t mix(uint64_t x) {
        x += 0x9e3779b97f4a7c15;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
        return x ^ (x >> 31);
    }

    uint64_t N_, key_;
};

class DataLoader {
  public:
    // The dataset must outlive the loader. With shuffle = false every epoch has the order of the dataset.
    DataLoader(const TokenDataset& dataset, uint64_t seed, bool shuffle = true)
        : dataset_(dataset), seed_(seed), shuffle_(shuffle) {}

    // The index of the sequence that is sample number n >= 0.
    int64_t sequence_of(int64_t n) const {
        const int64_t N = dataset_.sequences();
        if (n < 0) fail("sample ", n, " does not exist");
        return shuffle_ ? Permutation(N, seed_, n / N)(n % N) : n % N;
    }

    // Reads samples first .. first+B-1.
    void batch(int64_t first, int B, int* inputs /*(B,T)*/, int* targets /*(B,T)*/) const {
        const int64_t T = dataset_.sequence_length();
        for (int b = 0; b < B; b++) dataset_.read(sequence_of(first + b), inputs + b * T, targets + b * T);
    }

  private:
    const TokenDataset& dataset_;
    uint64_t seed_;
    bool shuffle_;
};
