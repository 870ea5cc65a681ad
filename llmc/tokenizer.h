// Byte-level BPE as in a tokenizer.json of Hugging Face: turns text into token ids and back.
//
// encode() first cuts out added tokens such as <|endoftext|> (the leftmost, and of those the longest). It
// splits the rest into words by GPT-2's pattern and merges the bytes of each word pair by pair, lowest rank
// first. Every byte is also a token, so every text has an encoding, and decode(encode(text)) == text.
// It is an error if the file asks for something that would change the ids and that encode() does not do.
// Special tokens that a post-processor would put around a text are no part of an encoding here or in shards.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <queue>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <utility>
#include <vector>

#include "llmc/error.h"
#include "llmc/files.h"
#include "llmc/unicode.h"
#include "llmc/utf8.h"

// Makes a stream of bytes printable. It waits for the rest of an incomplete character, and it replaces bytes
// that can never be a character by U+FFFD.
class Utf8Stream {
  public:
    std::string push(const std::string& bytes) {
        held_ += bytes;
        std::string out;
        size_t at = 0;
        while (at < held_.size()) {
            const Utf8Char c = next_utf8(std::string_view(held_).substr(at));
            if (c.kind == Utf8Char::cut) break;
            out += c.kind == Utf8Char::bad ? kReplacement : held_.substr(at, c.bytes);
            at += c.bytes;
        }
        held_.erase(0, at);
        return out;
    }
    // Must be called at the end of the stream. Returns U+FFFD if an incomplete character is left.
    std::string finish() { return std::exchange(held_, "").empty() ? "" : kReplacement; }

  private:
    static constexpr const char* kReplacement = "\xef\xbf\xbd";
    std::string held_;
};

enum class CharClass { letter, number, space, other };

// The class of the first character of a text, which must be valid UTF-8 and not empty.
inline CharClass class_of(std::string_view text) {
    const int bytes = next_utf8(text).bytes;
    char32_t code = (unsigned char)text[0];
    if (bytes > 1) code &= 0x7f >> bytes;
    for (int i = 1; i < bytes; i++) code = code << 6 | ((unsigned char)text[i] & 0x3f);
    auto in = [&](const auto& ranges) {
        const CodeRange* after = std::upper_bound(std::begin(ranges), std::end(ranges), code,
                                                  [](char32_t c, const CodeRange& r) { return c < r.first; });
        return after != std::begin(ranges) && code <= after[-1].last;
    };
    if (in(kLetters)) return CharClass::letter;
    if (in(kNumbers)) return CharClass::number;
    return in(kSpaces) ? CharClass::space : CharClass::other;
}

// The number of bytes of the first word of a text that is not empty, by GPT-2's pattern:
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
inline size_t first_word(std::string_view text) {
    for (std::string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
        if (text.starts_with(ending)) return ending.size();
    size_t begin = text[0] == ' ' && text.size() > 1 && class_of(text.substr(1)) != CharClass::space;
    const CharClass kind = class_of(text.substr(begin));
    size_t last = begin, end = begin;  // where the last character of this class begins, and where it ends
    for (; end < text.size() && class_of(text.substr(end)) == kind; end += next_utf8(text.substr(end)).bytes)
        last = end;
    const bool leaves_one = kind == CharClass::space && end < text.size() && last > 0;
    return leaves_one ? last : end;
}

// Calls word(std::string_view) for each word of a text, which must be valid UTF-8. Together the words are the
// text.
template <class Word>
void split_words(std::string_view text, Word word) {
    while (!text.empty()) {
        const size_t size = first_word(text);
        word(text.substr(0, size));
        text.remove_prefix(size);
    }
}

// The error for a tokenizer.json that is correct but of a kind that this tokenizer does not implement.
struct UnsupportedTokenizer : Error {
    explicit UnsupportedTokenizer(const std::string& what) : Error(kExitFailure, what) {}
};

// Reads the JSON of a tokenizer.json of any kind.
inline nlohmann::json read_tokenizer(const MappedFile& file) {
    const std::string& path = file.path();
    nlohmann::json json = parse_json(file.text(), path);
    if (!json.is_object()) fail(path, ": expected a JSON object");
    if (!json.contains("model") || !json.at("model").is_object()) fail(path, ": model is not an object");
    return json;
}

class Tokenizer {
  public:
    explicit Tokenizer(const std::string& path) : Tokenizer(MappedFile(path)) {}
    explicit Tokenizer(const MappedFile& file) : path_(file.path()) {
        const nlohmann::json json = read_tokenizer(file);
        check_supported(json);
        Ids ids = read_vocabulary(json.at("model").at("vocab"));
        read_merges(json.at("model").at("merges"), ids);
        if (json.contains("added_tokens")) read_added_tokens(json.at("added_tokens"), ids);
        const auto eot = ids.find("<|endoftext|>");
        if (eot != ids.end()) eot_token_ = eot->second;
    }

    // Returns the ids of a text, which must be valid UTF-8.
    std::vector<int> encode(const std::string& text) const {
        if (text.size() > INT32_MAX)
            fail("cannot encode a text of ", text.size(), " bytes, expected at most ", INT32_MAX);
        const std::string_view all = text;
        if (const size_t bad = first_bad_utf8(all); bad < all.size())
            fail("cannot encode text that is not valid UTF-8 at byte offset ", bad);
        std::vector<int> ids;
        encode_part(all, 0, ids);
        return ids;
    }

    // Returns the bytes of a token. They are not always whole characters (see Utf8Stream).
    const std::string& decode(int id) const {
        if (id < 0 || id >= vocab_size())
            fail(path_, ": token id ", id, " is outside the vocabulary of ", vocab_size());
        return bytes_[id];
    }
    std::string decode(const std::vector<int>& ids) const {
        std::string text;
        for (int id : ids) text += decode(id);
        return text;
    }

    int vocab_size() const { return (int)bytes_.size(); }
    int eot_token() const { return eot_token_; }  // the id of <|endoftext|>; -1: there is none

  private:
    struct AddedToken {
        std::string content;
        int id;
    };
    struct Merge {
        int rank;  // merges with a lower rank come first
        int id;    // of the merged token
    };

    using Ids = std::unordered_map<std::string, int>;  // name in the file -> id

    static uint64_t pair_key(int left, int right) { return (uint64_t)(uint32_t)left << 32 | (uint32_t)right; }

    void encode_part(std::string_view text, size_t round, std::vector<int>& ids) const {
        if (round == added_.size())
            return split_words(text, [&](std::string_view word) { encode_word(word, ids); });
        size_t begin = 0;  // where the last added token ended
        for (size_t at = 0; at < text.size();) {
            const AddedToken* added = added_token_at(text.substr(at), round);
            if (!added) {
                at++;
                continue;
            }
            encode_part(text.substr(begin, at - begin), round + 1, ids);
            ids.push_back(added->id);
            begin = at += added->content.size();
        }
        encode_part(text.substr(begin), round + 1, ids);
    }

    const AddedToken* added_token_at(std::string_view text, size_t round) const {
        for (const AddedToken& token : added_[round]) {  // longest first
            if (text.substr(0, token.content.size()) == token.content) return &token;
        }
        return nullptr;
    }

    // The tokens of the word are a linked list. A queue has the pairs that can be merged, ordered by rank and
    // then from left to right. A merge can make entries of the queue invalid; they stay in it and are
    // skipped. The time is O(n log n).
    void encode_word(std::string_view word, std::vector<int>& ids) const {
        struct Node {
            int id, previous, next;  // id -1: this node was merged into the one before it
        };
        struct Candidate {
            int rank, left, right, id;  // left, right: nodes; id: of the merged token
            uint64_t pair;              // pair_key of the nodes' tokens when this entry was made
            bool operator>(const Candidate& other) const {
                return std::pair(rank, left) > std::pair(other.rank, other.left);
            }
        };
        const int n = (int)word.size();
        std::vector<Node> nodes(n);
        for (int i = 0; i < n; i++)
            nodes[i] = {byte_ids_[(unsigned char)word[i]], i - 1, i + 1 < n ? i + 1 : -1};
        std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
        auto consider = [&](int left) {
            const int right = left < 0 ? -1 : nodes[left].next;
            if (right < 0) return;
            const uint64_t pair = pair_key(nodes[left].id, nodes[right].id);
            const auto merge = merges_.find(pair);
            if (merge != merges_.end()) queue.push({merge->second.rank, left, right, merge->second.id, pair});
        };
        for (int i = 0; i < n; i++) consider(i);
        while (!queue.empty()) {
            const Candidate best = queue.top();
            queue.pop();
            Node &left = nodes[best.left], &right = nodes[best.right];
            if (pair_key(left.id, right.id) != best.pair) continue;
            left.id = best.id;
            left.next = right.next;
            if (right.next >= 0) nodes[right.next].previous = best.left;
            right.id = -1;
            consider(left.previous);
            consider(best.left);
        }
        for (int i = 0; i >= 0; i = nodes[i].next) ids.push_back(nodes[i].id);
    }

    template <class... Parts>
    [[noreturn]] void unsupported(const Parts&... what) const {
        throw UnsupportedTokenizer(str(path_, ": ", what...));
    }

    // Whether the post-processor keeps all ids of a text, and adds no ids except special tokens.
    static bool keeps_the_ids(const nlohmann::json& processor) {
        if (processor.is_null()) return true;
        if (!processor.is_object()) return false;
        auto list = [&](const char* key) { return processor.value(key, nlohmann::json::array()); };
        const nlohmann::json type = processor.value("type", nlohmann::json());
        if (type == "Sequence") {
            const nlohmann::json parts = list("processors");
            return std::all_of(parts.begin(), parts.end(), keeps_the_ids);
        }
        if (type == "TemplateProcessing") {  // allowed if it has the text exactly once besides special tokens
            const nlohmann::json::json_pointer text("/Sequence/id");
            int texts = 0, others = 0;
            for (const nlohmann::json& piece : list("single")) {
                if (piece.is_object() && piece.contains("SpecialToken")) continue;
                (piece.contains(text) && piece.at(text) == "A" ? texts : others)++;
            }
            return texts == 1 && others == 0;
        }
        return type == "ByteLevel" || type == "BertProcessing" || type == "RobertaProcessing";
    }

    // An error if the file asks for anything that encode() does not do.
    void check_supported(const nlohmann::json& json) const {
        using Json = nlohmann::json;
        auto expect = [&](const Json& object, const std::string& where, const char* key,
                          std::initializer_list<Json> allowed) {
            const Json value = object.value(key, Json());
            if (std::find(allowed.begin(), allowed.end(), value) == allowed.end())
                unsupported(where, key, " is ", brief(value), ", but this program supports only ",
                            allowed.begin()->dump());
        };
        auto expect_byte_level = [&](const char* key) {
            const Json value = json.value(key, Json());
            if (!value.is_object() || value.value("type", Json()) != "ByteLevel")
                unsupported(key, " is ", brief(value),
                            ", but this program supports only the type \"ByteLevel\"");
        };
        expect(json, "", "normalizer", {nullptr});
        expect_byte_level("pre_tokenizer");
        expect(json.at("pre_tokenizer"), "pre_tokenizer.", "add_prefix_space", {false});
        expect(json.at("pre_tokenizer"), "pre_tokenizer.", "use_regex", {true, nullptr});
        if (json.contains("decoder") && !json.at("decoder").is_null()) expect_byte_level("decoder");
        if (const Json processor = json.value("post_processor", Json()); !keeps_the_ids(processor))
            unsupported("post_processor is ", brief(processor),
                        ", but this program supports only those that neither add nor drop tokens of a text");
        const Json& model = json.at("model");
        expect(model, "model.", "type", {"BPE", nullptr});
        for (const char* key : {"byte_fallback", "ignore_merges"})
            expect(model, "model.", key, {false, nullptr});
        for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
            expect(model, "model.", key, {"", nullptr});
        expect(model, "model.", "dropout", {nullptr, 0.0});
        if (!model.contains("vocab") || !model.at("vocab").is_object())
            fail(path_, ": model.vocab is not an object");
        if (!model.contains("merges") || !model.at("merges").is_array())
            fail(path_, ": model.merges is not an array");
    }

    // The vocabulary has a character for each byte. A byte that is printable in Latin-1 is that character.
    // The other bytes, in their order, are U+0100, U+0101, ...
    static std::string byte_character(int byte) {
        auto printable = [](int b) {
            return (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xff && b != 0xad);
        };
        int code = byte;
        if (!printable(byte)) {
            code = 256;
            for (int b = 0; b < byte; b++) code += !printable(b);
        }
        if (code < 0x80) return {(char)code};
        return {(char)(0xc0 | code >> 6), (char)(0x80 | (code & 0x3f))};
    }

    Ids read_vocabulary(const nlohmann::json& vocab) {
        Ids ids;
        std::unordered_map<std::string, char> byte_of;
        for (int byte = 0; byte < 256; byte++) byte_of[byte_character(byte)] = (char)byte;
        std::vector<bool> taken(vocab.size());
        bytes_.resize(vocab.size());
        for (const auto& [name, value] : vocab.items()) {
            const bool good = value.is_number_unsigned() && value.get<uint64_t>() < vocab.size();
            if (!good || taken[value.get<size_t>()])
                unsupported("model.vocab: the id of ", brief(name), " is ", brief(value),
                            ", expected each of 0 to ", vocab.size() - 1, " once");
            const int id = value.get<int>();
            taken[id] = true;
            ids[name] = id;
            for (std::string_view rest = name; !rest.empty(); rest.remove_prefix(next_utf8(rest).bytes)) {
                const auto byte = byte_of.find(std::string(rest.substr(0, next_utf8(rest).bytes)));
                if (byte == byte_of.end()) {  // the name is not made of bytes, so it is the text itself
                    bytes_[id] = name;
                    break;
                }
                bytes_[id] += byte->second;
            }
        }
        for (int byte = 0; byte < 256; byte++) {
            const auto token = ids.find(byte_character(byte));
            if (token == ids.end())
                unsupported("model.vocab: byte ", byte, " is not a token (", brief(byte_character(byte)),
                            " is missing), so some texts would have no encoding");
            byte_ids_[byte] = token->second;
        }
        return ids;
    }

    // Each merge is "a b" or ["a", "b"]. They are in the order of their ranks.
    void read_merges(const nlohmann::json& merges, const Ids& ids) {
        for (const nlohmann::json& merge : merges) {
            std::string left, right;
            if (merge.is_string()) {
                const std::string text = merge.get<std::string>();
                const size_t space = text.find(' ');
                left = text.substr(0, space);
                if (space != std::string::npos) right = text.substr(space + 1);
            } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
                       merge[1].is_string()) {
                left = merge[0].get<std::string>();
                right = merge[1].get<std::string>();
            }
            const auto a = ids.find(left), b = ids.find(right), both = ids.find(left + right);
            const int rank = (int)merges_.size();
            if (a == ids.end() || b == ids.end() || both == ids.end())
                fail(path_, ": model.merges[", rank, "]: ", brief(merge),
                     " does not merge two tokens into one");
            if (!merges_.emplace(pair_key(a->second, b->second), Merge{rank, both->second}).second)
                fail(path_, ": model.merges[", rank, "]: ", brief(merge), " occurs twice");
        }
    }

    void read_added_tokens(const nlohmann::json& tokens, Ids& ids) {
        if (!tokens.is_array()) fail(path_, ": added_tokens is not an array");
        for (const nlohmann::json& token : tokens) {
            const std::string where =
                str("added_tokens[", added_[0].size() + added_[1].size(), "]: ", brief(token), ": ");
            if (!token.is_object() || !token.contains("content") || !token.at("content").is_string() ||
                token.at("content") == "")
                fail(path_, ": ", where, "it has no content");
            for (const char* flag : {"single_word", "lstrip", "rstrip"}) {
                if (token.value(flag, nlohmann::json(false)) != false)
                    unsupported(where, flag, " is set, but this program supports only false");
            }
            const std::string content = token.at("content").get<std::string>();
            const int id = ids.emplace(content, vocab_size()).first->second;
            if (token.value("id", nlohmann::json()) != id) unsupported(where, "its id should be ", id);
            if (id == vocab_size()) bytes_.push_back(content);
            if (bytes_[id] != content) unsupported(where, "this token has other bytes in model.vocab");
            added_[token.value("normalized", nlohmann::json(false)) != false].push_back({content, id});
        }
        for (std::vector<AddedToken>& round : added_)
            std::stable_sort(round.begin(), round.end(), [](const AddedToken& a, const AddedToken& b) {
                return a.content.size() > b.content.size();
            });
    }

    std::string path_;
    std::array<int, 256> byte_ids_{};             // the token of each byte
    std::vector<std::string> bytes_;              // (vocab_size): the bytes of each token
    std::unordered_map<uint64_t, Merge> merges_;  // pair_key -> merge
    // First the tokens that are not "normalized". The others are searched in the text between those. The
    // longest come first in each.
    std::array<std::vector<AddedToken>, 2> added_;
    int eot_token_ = -1;
};

// Opens FOLDER/tokenizer.json if there is one.
inline std::optional<MappedFile> find_tokenizer(const std::string& folder) {
    const std::string path = (std::filesystem::path(folder) / "tokenizer.json").string();
    if (!path_exists(path)) return std::nullopt;
    return MappedFile(path);
}

// Opens a tokenizer that the program can do without. If its kind is not supported, a warning says so, and
// says that there will be no `without`.
inline std::optional<Tokenizer> open_if_supported(const MappedFile& file, const char* without) {
    try {
        return Tokenizer(file);
    } catch (const UnsupportedTokenizer& e) {
        warn("no ", without, ": ", e.what());
        return std::nullopt;
    }
}

namespace tokenizer_detail {

// Removes the setting of offsets from a pre-tokenizer, and from those inside it, and adds a missing default.
inline void unify_pre_tokenizer(nlohmann::json& json) {
    if (json.is_object()) {
        json.erase("trim_offsets");
        if (json.value("type", nlohmann::json()) == "ByteLevel" && !json.contains("use_regex"))
            json["use_regex"] = true;
    }
    if (json.is_structured())
        for (nlohmann::json& part : json) unify_pre_tokenizer(part);
}

// Returns everything in a tokenizer.json, of any kind, that the ids of a text depend on. It is equal for
// files with the same ids that different libraries or conversions have written.
inline nlohmann::ordered_json what_decides_ids(const nlohmann::json& file) {
    using Json = nlohmann::json;
    auto member = [](const Json& json, const char* key) {
        return json.is_object() ? json.value(key, Json()) : Json();
    };
    Json model = file.at("model"), vocabulary = member(model, "vocab"), merges = member(model, "merges");
    const Json normalizer = member(file, "normalizer");
    Json pre_tokenizer = member(file, "pre_tokenizer"), added = Json::object();
    unify_pre_tokenizer(pre_tokenizer);
    if (merges.is_array())
        for (Json& merge : merges) {
            const std::string text = merge.is_string() ? merge.get<std::string>() : "";
            const size_t space = text.find(' ');
            if (space != std::string::npos) merge = {text.substr(0, space), text.substr(space + 1)};
        }
    std::set<bool> normalized;  // the values that occur
    for (const Json& token : member(file, "added_tokens")) {
        const Json content = member(token, "content");
        if (!content.is_string()) continue;
        const std::string name = content.get<std::string>();
        added[name] = {{"id", member(token, "id")}};
        if (vocabulary.is_object()) vocabulary[name] = member(token, "id");  // some files have it there, too
        for (const char* flag : {"single_word", "lstrip", "rstrip", "normalized"})
            added[name][flag] = member(token, flag) == true;
        normalized.insert(member(token, "normalized") == true);
    }
    if (normalizer.is_null() && normalized.size() == 1)  // all of them are searched in the same text
        for (Json& token : added) token.erase("normalized");
    for (const char* key : {"vocab", "merges"}) model.erase(key);
    if (!merges.is_null() && !model.contains("type")) model["type"] = "BPE";  // as the library does
    if (member(model, "type") == "BPE")  // these are for unknown bytes, but a byte-level BPE knows all bytes
        for (const char* key : {"unk_token", "fuse_unk"}) model.erase(key);
    Json settings = Json::object();  // only those that differ from the default
    for (const auto& [key, value] : model.items())
        if (value != nullptr && value != false && value != "" && value != 0) settings[key] = value;
    return {{"vocabulary", vocabulary},       {"merges", merges},      {"normalizer", normalizer},
            {"pre-tokenizer", pre_tokenizer}, {"added tokens", added}, {"settings of the model", settings}};
}

}  // namespace tokenizer_detail

// An error if two tokenizers give different ids to a text. `data` belongs to the dataset, `model` to the
// model. If there is no file for one of them, it is null and nothing is checked. `advice` is put at the end
// of the message.
inline void require_same_tokenizer(const MappedFile* data, const MappedFile* model,
                                   const std::string& advice = "") {
    if (!data || !model || data->text() == model->text()) return;
    const nlohmann::ordered_json found = tokenizer_detail::what_decides_ids(read_tokenizer(*data));
    const nlohmann::ordered_json expected = tokenizer_detail::what_decides_ids(read_tokenizer(*model));
    for (const auto& [part, value] : expected.items())
        if (found.at(part) != value)
            fail(data->path(), ": this is not the model's tokenizer, ", model->path(),
                 ": they differ in their ", part, ", so the model would misunderstand the tokens of the data",
                 advice);
}
