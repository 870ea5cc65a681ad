// What llmc/tokenizer.h knows of Unicode: where words are cut, and characters that arrive in parts.
#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

#include "llmc/tokenizer.h"

TEST_CASE("split_words: GPT-2's words, with Unicode's white space") {
    auto words = [&](const std::string& text) {
        std::vector<std::string> out;
        split_words(text, [&](std::string_view word) { out.emplace_back(word); });
        return out;
    };
    using Words = std::vector<std::string>;
    CHECK(words("I'll say it's 12th  of 2024!?\n\n x") ==
          Words{"I", "'ll", " say", " it", "'s", " 12", "th", " ", " of", " 2024", "!?", "\n\n", " x"});
    CHECK(words("'LL 'd'\t\ty  ") == Words{"'", "LL", " '", "d", "'", "\t", "\t", "y", "  "});
    CHECK(words("\u00e9\u0301 \u65e5\u672c\u0663\u2167_") ==
          Words{"\u00e9", "\u0301", " \u65e5\u672c", "\u0663\u2167", "_"});
    CHECK(words("").empty());
    for (const char* space : {"\t", "\n", "\v", "\f", "\r", "\u0085", "\u00a0", "\u1680", "\u2000", "\u2005",
                              "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"}) {
        const std::string s = space;
        CHECK(words("!" + s + s + "!") == Words{"!", s, s, "!"});
    }
    for (const char* other :
         {"\b", "\x1c", "\x1f", "\u0084", "\u0086", "\u180e", "\u200b", "\u2060", "\ufeff"}) {
        const std::string o = other;
        CHECK(words("!" + o + o + "!") == Words{"!" + o + o + "!"});
    }
}

// dev/unicode_classes.py computes the same checksum with the tokenizers library.
TEST_CASE("split_words: every code point is cut off as by Hugging Face tokenizers") {
    auto utf8 = [](char32_t c) -> std::string {
        if (c < 0x80) return {(char)c};
        const char last = (char)(0x80 | (c & 0x3f)), third = (char)(0x80 | (c >> 6 & 0x3f));
        if (c < 0x800) return {(char)(0xc0 | c >> 6), last};
        if (c < 0x10000) return {(char)(0xe0 | c >> 12), third, last};
        return {(char)(0xf0 | c >> 18), (char)(0x80 | (c >> 12 & 0x3f)), third, last};
    };
    std::string lengths;
    for (char32_t start = 0; start < 0x110000; start += 4096) {
        std::string text;
        for (char32_t c = start; c < start + 4096; c++) {
            if (c >= 0xd800 && c < 0xe000) continue;
            const std::string character = utf8(c);
            text += 'a';
            text += character;
            text += '1';
            text += character;
            text += '!';
        }
        split_words(text, [&](std::string_view word) { lengths += (char)word.size(); });
    }
    CHECK(crc32_of(reinterpret_cast<const std::byte*>(lengths.data()), lengths.size()) == 0xdb5eef09);
}

TEST_CASE("Utf8Stream: whole characters pass at once, cut ones wait") {
    const std::string text = "a\u00e9\u65e5\U0001f600\u0301z";
    for (size_t step = 1; step <= text.size(); step++) {
        Utf8Stream stream;
        std::string out;
        for (size_t at = 0; at < text.size(); at += step) {
            out += stream.push(text.substr(at, step));
            for (size_t i = 0; i < out.size(); i += next_utf8(std::string_view(out).substr(i)).bytes)
                REQUIRE(next_utf8(std::string_view(out).substr(i)).kind == Utf8Char::whole);
        }
        CHECK(out == text);
        CHECK(stream.finish() == "");
    }
    Utf8Stream stream;
    CHECK(stream.push("a\xf0\x9f") == "a");
    CHECK(stream.push("\x98") == "");
    CHECK(stream.push("\x80") == "\U0001f600");
    CHECK(stream.push("") == "");
    CHECK(stream.push("\xe6\x97") == "");
    CHECK(stream.finish() == "\ufffd");
    CHECK(stream.finish() == "");
}

TEST_CASE("Utf8Stream: what can be no character becomes U+FFFD, as in Python's errors=\"replace\"") {
    const std::pair<std::string, std::string> cases[] = {
        {"a\xff"
         "b",
         "a\ufffdb"},
        {"\x80\x80", "\ufffd\ufffd"},
        {"\xc0\x80", "\ufffd\ufffd"},
        {"\xe6\x97x", "\ufffdx"},
        {"\xf0\x80\x80"
         "a\xff\xe6\x97",
         "\ufffd\ufffd\ufffda\ufffd\ufffd"},
        {"\xed\xa0\x80", "\ufffd\ufffd\ufffd"},
        {"\xf4\x90\x80\x80", "\ufffd\ufffd\ufffd\ufffd"},
        {"\xf0\x9f\x98\xf0\x9f\x98\x80", "\ufffd\U0001f600"},
        {"\xc3\xc3\xa9", "\ufffd\u00e9"},
    };
    for (const auto& [bytes, expected] : cases) {
        for (size_t step : {size_t{1}, size_t{2}, bytes.size()}) {
            Utf8Stream stream;
            std::string out;
            for (size_t at = 0; at < bytes.size(); at += step) out += stream.push(bytes.substr(at, step));
            CHECK(out + stream.finish() == expected);
        }
    }
}
