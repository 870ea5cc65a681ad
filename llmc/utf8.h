// Reads UTF-8 character by character.
#pragma once
#include <string_view>

// The first character of a text that is not empty.
struct Utf8Char {
    enum Kind { whole, cut, bad } kind;  // cut: the text ends inside it
    int bytes;                           // its length; if bad, the number of bytes that one U+FFFD replaces
};

// "Whole" means well-formed as in table 3-7 of the Unicode standard: no overlong forms, no surrogates,
// nothing above U+10FFFF.
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

// The place of the first byte of `text` that belongs to no whole character; text.size() if there is none.
inline size_t first_bad_utf8(std::string_view text) {
    size_t at = 0;
    while (at < text.size()) {
        const Utf8Char c = next_utf8(text.substr(at));
        if (c.kind != Utf8Char::whole) break;
        at += c.bytes;
    }
    return at;
}
