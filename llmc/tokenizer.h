// Byte-level BPE as in a Hugging Face tokenizer.json: text to token ids and back.
//
// encode: added tokens such as <|endoftext|> are cut out first (leftmost, then longest), the rest is split
// into words by GPT-2's pattern, and the bytes of each word are merged pair by pair, lowest rank first. Every
// byte is a token of its own, so every text has an encoding, and decode(encode(text)) == text.
// Anything in the file that would change the ids and is not implemented here is an error at loading.
#pragma once
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <nlohmann/json.hpp>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "llmc/error.h"
#include "llmc/files.h"

// The character at the start of a text that is not empty.
struct Utf8Char {
    enum Kind { whole, cut, bad } kind;  // cut: the text ends inside it
    int bytes;                           // its length; where bad, how many bytes to replace by one U+FFFD
};

// Well-formed as in table 3-7 of the Unicode standard: nothing overlong, no surrogates, none past U+10FFFF.
inline Utf8Char next_utf8(std::string_view text) {
    const unsigned char lead = text[0];
    if (lead < 0x80) return {Utf8Char::whole, 1};
    if (lead < 0xc2 || lead > 0xf4) return {Utf8Char::bad, 1};
    const int length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    for (int i = 1; i < length; i++) {
        if ((size_t)i == text.size()) return {Utf8Char::cut, i};
        unsigned char low = 0x80, high = 0xbf;
        if (i == 1 && lead == 0xe0) low = 0xa0;
        if (i == 1 && lead == 0xed) high = 0x9f;
        if (i == 1 && lead == 0xf0) low = 0x90;
        if (i == 1 && lead == 0xf4) high = 0x8f;
        const unsigned char byte = text[i];
        if (byte < low || byte > high) return {Utf8Char::bad, i};
    }
    return {Utf8Char::whole, length};
}

// Makes a stream of bytes printable: a character that is not whole yet is held back, what can never become
// one is replaced by U+FFFD.
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
    // What is still held back, at the end of the stream.
    std::string finish() { return std::exchange(held_, "").empty() ? "" : kReplacement; }

  private:
    static constexpr const char* kReplacement = "\xef\xbf\xbd";
    std::string held_;
};

// GPT-2's pattern. \s is spelled out as Unicode's White_Space: PCRE2's own \s is another set.
class WordSplitter {
  public:
    WordSplitter() {
        const std::string space =
            R"(\x09-\x0d\x20\x85\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
        const std::string pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{L}\p{N})" + space +
                                    "]+|[" + space + "]+(?![^" + space + "])|[" + space + "]+";
        int error = 0;
        PCRE2_SIZE offset = 0;
        code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                  PCRE2_UTF | PCRE2_ANCHORED, &error, &offset, nullptr));
        if (!code_)
            fail("PCRE2 (built with Unicode?) rejects the word pattern, error ", error, " at ", offset);
        pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // where there is no JIT, matching is only slower
    }

    // Calls word(std::string_view) for each word of a text of well-formed UTF-8; together they are the text.
    template <class Word>
    void split(std::string_view text, Word word) const {
        const std::unique_ptr<pcre2_match_data, Free> match(
            pcre2_match_data_create_from_pattern(code_.get(), nullptr));
        if (!match) fail("out of memory for a PCRE2 match");
        const PCRE2_SIZE* span = pcre2_get_ovector_pointer(match.get());
        for (size_t at = 0; at < text.size(); at = span[1]) {
            const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                          at, PCRE2_NO_UTF_CHECK, match.get(), nullptr);
            if (found < 1)
                fail("PCRE2 error ", found, " at byte ", at, " of a text of ", text.size(), " bytes");
            word(text.substr(at, span[1] - at));
        }
    }

  private:
    struct Free {
        void operator()(pcre2_code* code) const { pcre2_code_free(code); }
        void operator()(pcre2_match_data* match) const { pcre2_match_data_free(match); }
    };
    std::unique_ptr<pcre2_code, Free> code_;
};

class Tokenizer {
  public:
    explicit Tokenizer(const std::string& path) : path_(path) {
        const nlohmann::json json = read_json(path);
        check_supported(json);
        Ids ids = read_vocabulary(json.at("model").at("vocab"));
        read_merges(json.at("model").at("merges"), ids);
        if (json.contains("added_tokens")) read_added_tokens(json.at("added_tokens"), ids);
        const auto eot = ids.find("<|endoftext|>");
        if (eot != ids.end()) eot_token_ = eot->second;
    }

    // The ids of a text, which must be well-formed UTF-8.
    std::vector<int> encode(const std::string& text) const {
        if (text.size() > INT32_MAX)
            fail("cannot encode a text of ", text.size(), " bytes, at most ", INT32_MAX);
        const std::string_view all = text;
        for (size_t at = 0; at < all.size();) {
            const Utf8Char c = next_utf8(all.substr(at));
            if (c.kind != Utf8Char::whole)
                fail("cannot encode text that is not valid UTF-8 at byte offset ", at);
            at += c.bytes;
        }
        std::vector<int> ids;
        auto encode_plain = [&](std::string_view part) {
            splitter_.split(part, [&](std::string_view word) { encode_word(word, ids); });
        };
        size_t begin = 0;  // of the text since the last added token
        for (size_t at = 0; at < all.size();) {
            const AddedToken* added = added_token_at(all.substr(at));
            if (!added) {
                at++;
                continue;
            }
            encode_plain(all.substr(begin, at - begin));
            ids.push_back(added->id);
            begin = at += added->content.size();
        }
        encode_plain(all.substr(begin));
        return ids;
    }

    // The bytes of a token: not always whole characters (see Utf8Stream).
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
    int eot_token() const { return eot_token_; }  // <|endoftext|>; -1: there is none

  private:
    struct AddedToken {
        std::string content;
        int id;
    };
    struct Merge {
        int rank;  // lower comes first
        int id;    // of the two together
    };

    using Ids = std::unordered_map<std::string, int>;  // by the name in the file

    static uint64_t pair_key(int left, int right) { return (uint64_t)(uint32_t)left << 32 | (uint32_t)right; }

    const AddedToken* added_token_at(std::string_view text) const {
        for (const AddedToken& token : added_) {  // longest first
            if (text.substr(0, token.content.size()) == token.content) return &token;
        }
        return nullptr;
    }

    // The word's tokens are a linked list. A queue holds the pairs that can merge, first the lowest rank,
    // then the leftmost; entries that a later merge made stale stay in it and are skipped. O(n log n).
    void encode_word(std::string_view word, std::vector<int>& ids) const {
        struct Node {
            int id, previous, next;  // id -1: merged into the node before it
        };
        struct Candidate {
            int rank, left, right, id;  // left, right: nodes; id: of the two together
            uint64_t pair;              // the tokens the nodes had
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

    // A value for a message, in one line of ASCII and not too long.
    static std::string brief(const nlohmann::json& value) {
        const std::string text = value.dump(-1, ' ', true);
        return text.size() <= 60 ? text : text.substr(0, 57) + "...";
    }

    // An error wherever the file asks for something else than what encode does.
    void check_supported(const nlohmann::json& json) const {
        using Json = nlohmann::json;
        auto expect = [&](const Json& object, const std::string& where, const char* key,
                          std::initializer_list<Json> allowed) {
            const Json value = object.value(key, Json());
            if (std::find(allowed.begin(), allowed.end(), value) == allowed.end())
                fail(path_, ": ", where, key, " is ", brief(value), ", this tokenizer has only ",
                     allowed.begin()->dump());
        };
        auto expect_byte_level = [&](const char* key) {
            const Json value = json.value(key, Json());
            if (!value.is_object() || value.value("type", Json()) != "ByteLevel")
                fail(path_, ": ", key, " is ", brief(value),
                     ", this tokenizer has only the type \"ByteLevel\"");
        };
        if (!json.is_object()) fail(path_, ": expected a JSON object");
        for (const char* key : {"normalizer", "truncation", "padding"}) expect(json, "", key, {nullptr});
        expect_byte_level("pre_tokenizer");
        expect(json.at("pre_tokenizer"), "pre_tokenizer.", "add_prefix_space", {false});
        expect(json.at("pre_tokenizer"), "pre_tokenizer.", "use_regex", {true, nullptr});
        for (const char* key : {"decoder", "post_processor"}) {
            if (json.contains(key) && !json.at(key).is_null()) expect_byte_level(key);
        }
        if (!json.contains("model") || !json.at("model").is_object()) fail(path_, ": model is not an object");
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

    // In the vocabulary a byte is written as a character: what is printable in Latin-1 as itself, the others,
    // in their order, as U+0100, U+0101, ...
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
                fail(path_, ": model.vocab: the id of ", brief(name), " is ", brief(value),
                     ", expected each of 0 to ", vocab.size() - 1, " once");
            const int id = value.get<int>();
            taken[id] = true;
            ids[name] = id;
            for (std::string_view rest = name; !rest.empty(); rest.remove_prefix(next_utf8(rest).bytes)) {
                const auto byte = byte_of.find(std::string(rest.substr(0, next_utf8(rest).bytes)));
                if (byte == byte_of.end()) {  // not made of bytes: stands for itself
                    bytes_[id] = name;
                    break;
                }
                bytes_[id] += byte->second;
            }
        }
        for (int byte = 0; byte < 256; byte++) {
            const auto token = ids.find(byte_character(byte));
            if (token == ids.end())
                fail(path_, ": model.vocab: byte ", byte, " is no token (", brief(byte_character(byte)),
                     " is missing), so some texts would have no encoding");
            byte_ids_[byte] = token->second;
        }
        return ids;
    }

    // Each "a b" or ["a", "b"], in the order of rank.
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
                fail(path_, ": model.merges[", rank, "]: ", brief(merge), " does not make one token of two");
            if (!merges_.emplace(pair_key(a->second, b->second), Merge{rank, both->second}).second)
                fail(path_, ": model.merges[", rank, "]: ", brief(merge), " stands twice");
        }
    }

    void read_added_tokens(const nlohmann::json& tokens, Ids& ids) {
        if (!tokens.is_array()) fail(path_, ": added_tokens is not an array");
        for (const nlohmann::json& token : tokens) {
            const std::string where = str(path_, ": added_tokens[", added_.size(), "]: ", brief(token), ": ");
            if (!token.is_object() || !token.contains("content") || !token.at("content").is_string() ||
                token.at("content") == "")
                fail(where, "there is no content");
            for (const char* flag : {"single_word", "lstrip", "rstrip"}) {
                if (token.value(flag, nlohmann::json(false)) != false)
                    fail(where, flag, " is set, this tokenizer has only false");
            }
            // Hugging Face cuts out all those with one value before it looks for the others.
            if (token.value("normalized", nlohmann::json()) !=
                tokens[0].value("normalized", nlohmann::json()))
                fail(where, "normalized is not the same for all added tokens, as this tokenizer needs it");
            const std::string content = token.at("content").get<std::string>();
            const int id = ids.emplace(content, vocab_size()).first->second;
            if (token.value("id", nlohmann::json()) != id) fail(where, "its id should be ", id);
            if (id == vocab_size()) bytes_.push_back(content);
            if (bytes_[id] != content) fail(where, "in model.vocab this token stands for other bytes");
            added_.push_back({content, id});
        }
        std::stable_sort(added_.begin(), added_.end(), [](const AddedToken& a, const AddedToken& b) {
            return a.content.size() > b.content.size();
        });
    }

    std::string path_;
    WordSplitter splitter_;
    std::array<int, 256> byte_ids_{};             // the token of each byte
    std::vector<std::string> bytes_;              // (vocab_size), what each token decodes to
    std::unordered_map<uint64_t, Merge> merges_;  // by pair_key
    std::vector<AddedToken> added_;               // longest first
    int eot_token_ = -1;
};
