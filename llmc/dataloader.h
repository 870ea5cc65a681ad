// Training data: llm.c's token shards, cut into sequences and handed out in a reproducible order.
//
// A shard is 256 int32 (magic, version, number of tokens, rest 0) and then its tokens: magic 20240520,
// version 1 for uint16, magic 20240801, version 7 for uint32. A dataset is every *.bin file of a folder that
// has the split's name as a word in its own (train_000000.bin, fineweb_train_000001.bin), sorted by name.
//
// Sequence k of a shard is its tokens kT .. kT+T: the first T are the inputs, the last T the targets. So
// neighbours share one token, no sequence crosses shards, and a shard of n tokens has floor((n-1)/T); what is
// left at its end is not used. So a shard may have none, as the last one of a dataset often has; it is an
// error where no shard has one.
//
// Sample n = 0, 1, 2, ... of a loader is place n % N of epoch n / N, N the number of sequences. In every
// epoch each sequence comes exactly once, in an order that depends on the seed and the epoch alone: not on
// the batch size, on accumulation or on how many processes share the work. All of a run's position is the one
// number n, which the caller keeps; going to any n costs the same.
#pragma once
#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "llmc/error.h"
#include "llmc/files.h"

// What a dataset folder's meta.json says:
//   {"name": .., "vocab_size": .., "eot_token": .., "tokens": {"train": .., "val": ..}, "bytes": {the same},
//    "shards": {the same}}
// Only vocab_size must be there. llm.c's published shards have no meta.json: they are GPT-2 tokens.
struct DatasetInfo {
    struct Split {
        int64_t tokens = -1;  // -1: not said
        int64_t bytes = -1;   // of text, for bits per byte
        int64_t shards = -1;
    };
    bool described = false;  // by a meta.json
    std::string name;
    int vocab_size = 50257;
    int eot_token = 50256;  // ends a document; -1: there is none
    Split train, val;
};

// The entries of a dataset folder; an error where they cannot be read.
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
    return info;
}

// One token file, mapped, its header checked against its size.
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
                 ", expected 20240520 (uint16 tokens) or 20240801 (uint32). A file of tokens without a "
                 "header, "
                 "such as nanoGPT's, is no shard; data/prepare.py makes shards from text");
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

    // Tokens begin .. begin+count-1, every one checked to lie in [0, vocab_size).
    void read(int64_t begin, int count, int vocab_size, int* out /*(count)*/) const {
        for (int i = 0; i < count; i++) {
            const std::byte* source = data_ + (begin + i) * width_;
            uint32_t token = 0;
            std::memcpy(&token, source, width_);
            if (token >= (uint32_t)vocab_size)
                fail(path(), ": token ", token, " at byte ", source - file_.data(), ", the vocabulary has ",
                     vocab_size);
            out[i] = (int)token;
        }
    }

  private:
    MappedFile file_;
    const std::byte* data_ = nullptr;  // (tokens, width)
    int64_t tokens_ = 0;
    int width_ = 2;  // bytes a token
};

class TokenDataset {
  public:
    // split: "train" or "val"; T >= 1.
    TokenDataset(const std::string& folder, const std::string& split, int vocab_size, int T)
        : vocab_size_(vocab_size), T_(T) {
        const DatasetInfo info = read_dataset_info(folder);
        const DatasetInfo::Split& said = split == "train" ? info.train : info.val;
        for (const std::string& path : find_shards(folder, split, said.shards)) {
            const TokenShard& shard = shards_.emplace_back(path);
            tokens_ += shard.tokens();
            sequences_ += std::max<int64_t>(0, shard.tokens() - 1) / T;
            ends_.push_back(sequences_);
        }
        if (said.tokens >= 0 && said.tokens != tokens_)
            fail(folder, ": the ", split, " shards hold ", tokens_, " tokens, but meta.json counts ",
                 said.tokens);
        if (sequences_ > 0) return;
        const TokenShard& longest = *std::max_element(
            shards_.begin(), shards_.end(), [](auto& a, auto& b) { return a.tokens() < b.tokens(); });
        fail(longest.path(), ": ", longest.tokens(), " tokens, a sequence of ", T, " takes ", T + int64_t{1},
             shards_.size() > 1 ? str("; no ", split, " shard is longer") : "");
    }

    int64_t sequences() const { return sequences_; }
    int64_t tokens() const { return tokens_; }
    int sequence_length() const { return T_; }

    // Sequence `index` of all shards, in [0, sequences()).
    void read(int64_t index, int* inputs /*(T)*/, int* targets /*(T)*/) const {
        if (index < 0 || index >= sequences_) fail("sequence ", index, " of ", sequences_, " does not exist");
        const size_t shard = std::upper_bound(ends_.begin(), ends_.end(), index) - ends_.begin();
        const int64_t begin = (index - (shard ? ends_[shard - 1] : 0)) * T_;
        shards_[shard].read(begin, T_, vocab_size_, inputs);
        std::copy(inputs + 1, inputs + T_, targets);
        shards_[shard].read(begin + T_, 1, vocab_size_, targets + T_ - 1);
    }

  private:
    // Is `word` in `name`, with no letter beside it? ("retrieval_train.bin" is no validation shard.)
    static bool has_word(const std::string& name, const std::string& word) {
        auto letter_at = [&](size_t i) { return i < name.size() && std::isalpha((unsigned char)name[i]); };
        for (size_t at = name.find(word); at != std::string::npos; at = name.find(word, at + 1)) {
            if (!(at > 0 && letter_at(at - 1)) && !letter_at(at + word.size())) return true;
        }
        return false;
    }

    // `said`: how many there are according to meta.json; -1: it does not say.
    static std::vector<std::string> find_shards(const std::string& folder, const std::string& split,
                                                int64_t said) {
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
        if (said >= 0 && said != (int64_t)paths.size()) {
            const std::string counts =
                str("meta.json counts ", said, " ", split, " shards, the folder has ", paths.size());
            for (int64_t i = 0; i < said; i++) {
                char name[64];  // as data/prepare.py names them
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
    std::vector<int64_t> ends_;  // sequences up to and including each shard
    int64_t tokens_ = 0;
    int64_t sequences_ = 0;
};

// A random permutation of [0, N), in constant memory: the swap-or-not shuffle of Hoang, Morris and Rogaway
// (CRYPTO 2012). Each round pairs x with key - x (mod N) and swaps the two or not, by a coin that depends on
// the pair alone. It takes any N as it is, and the rounds below are many times what mixing needs.
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

    // The output function of SplitMix64: a well-mixing bijection.
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
    // The dataset must outlive the loader. shuffle = false: in the dataset's order, every epoch.
    DataLoader(const TokenDataset& dataset, uint64_t seed, bool shuffle = true)
        : dataset_(dataset), seed_(seed), shuffle_(shuffle) {}

    // The sequence that sample number n >= 0 is.
    int64_t sequence_of(int64_t n) const {
        const int64_t N = dataset_.sequences();
        if (n < 0) fail("sample ", n, " does not exist");
        return shuffle_ ? Permutation(N, seed_, n / N)(n % N) : n % N;
    }

    // Samples first .. first+B-1.
    void batch(int64_t first, int B, int* inputs /*(B,T)*/, int* targets /*(B,T)*/) const {
        const int64_t T = dataset_.sequence_length();
        for (int b = 0; b < B; b++) dataset_.read(sequence_of(first + b), inputs + b * T, targets + b * T);
    }

  private:
    const TokenDataset& dataset_;
    uint64_t seed_;
    bool shuffle_;
};
