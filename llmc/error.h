// The exception for everything that can go wrong for a user. main() prints its text as one line on stderr and
// exits with its status. So a message must name the file, flag or value that is wrong, and what was expected.
// Whatever these contain, the message is one line of limited length without control characters.
#pragma once
#include <cstdio>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "llmc/utf8.h"

enum ExitStatus : int {
    kExitDone = 0,
    kExitFailure = 1,       // a file, the disk, memory, ...
    kExitUsage = 2,         // bad flag or value on the command line
    kExitDiverged = 3,      // NaN or Inf in training
    kExitInterrupted = 130  // Ctrl-C or SIGTERM, after a checkpoint
};

// Makes `text` safe to show in a message. Control characters and bytes that are not UTF-8 become escapes like
// \n or \x1b. Control characters include those of Unicode that break a line or change its direction. A text
// longer than `longest` bytes loses its middle.
inline std::string printable(std::string_view text, size_t longest = 1000) {
    std::string out;
    for (size_t at = 0; at < text.size();) {
        const Utf8Char next = next_utf8(text.substr(at));
        const std::string_view c = text.substr(at, next.bytes);
        at += c.size();
        const bool control = (unsigned char)c[0] < 0x20 || c[0] == 0x7f ||
                             (c >= "\xc2\x80" && c < "\xc2\xa0") ||
                             (c >= "\xe2\x80\xa8" && c <= "\xe2\x80\xae") ||  // U+2028 to U+202E
                             (c >= "\xe2\x81\xa6" && c <= "\xe2\x81\xa9");    // U+2066 to U+2069
        if (next.kind == Utf8Char::whole && !control) {
            out += c;
            continue;
        }
        for (const char byte : c) {
            char escape[5];
            snprintf(escape, sizeof(escape), "\\x%02x", (unsigned char)byte);
            out += byte == '\n' ? "\\n" : byte == '\r' ? "\\r" : byte == '\t' ? "\\t" : escape;
        }
    }
    if (out.size() <= longest) return out;
    auto inside = [&](size_t at) { return (out[at] & 0xc0) == 0x80; };  // not the first byte of a character
    size_t begin = (longest - 3) / 2, end = out.size() - begin;
    while (inside(begin)) begin--;
    while (inside(end)) end++;
    return out.substr(0, begin) + "..." + out.substr(end);
}

// Puts a value of a flag, or a name from a file, into quotes and makes it safe to show in a message.
inline std::string shown(std::string_view text) {
    std::string quoted_text = "\"";  // append() instead of +, because GCC 12 warns about + (its bug 105651)
    return quoted_text.append(printable(text, 60)).append("\"");
}

struct Error : std::runtime_error {
    int status;
    Error(int status, const std::string& what) : std::runtime_error(printable(what)), status(status) {}
};

// str("a", 1, 2.5) is "a12.5".
template <class... Parts>
std::string str(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// fail("file.bin: expected ", a, ", found ", b) throws a run-time failure with exit status 1.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    throw Error(kExitFailure, str(parts...));
}

// The same for a bad command line, with exit status 2.
template <class... Parts>
[[noreturn]] void usage_error(const Parts&... parts) {
    throw Error(kExitUsage, str(parts...));
}

// Whether this process prints warnings. With several ranks only rank 0 does, because all would print the
// same.
inline bool g_warns = true;

// Prints a line on stderr about something that does not stop the program.
template <class... Parts>
void warn(const Parts&... parts) {
    if (!g_warns) return;
    fprintf(stderr, "warning: %s\n", printable(str(parts...)).c_str());
}
