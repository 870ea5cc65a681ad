"""Writes llmc/unicode.h: which characters the tokenizers library treats as letters, numbers and white space.

    python dev/unicode_classes.py

GPT-2's pattern uses these classes, and each Unicode version adds characters to them. The C++ tokenizer must cut words in
the same places as the library, because that has encoded the shards. So this asks the library about every code point. If
tests/dev/test_unicode_classes.py says that a new version of the library differs, run this, raise the library's version
in requirements.txt, and put the checksum that this prints into tests/data/unicode.cpp.
"""
import zlib
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

HEADER = Path(__file__).resolve().parents[1] / "llmc/unicode.h"
CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]  # all except surrogates
words = ByteLevel(add_prefix_space=False).pre_tokenize_str  # [(word, one character for each byte, (begin, end)), ...]
# One character newer than each version of Unicode, with the first version that has it.
NEWEST = {0x323B0: "17.0", 0x105C0: "16.0", 0x2EBF0: "15.1", 0x31350: "15.0", 0x10570: "14.0"}


def class_of(character: str) -> str:
    """A character joins a word of its own class. White space joins no word."""
    for name, neighbour in ("letter", "a"), ("number", "1"), ("other", "!"):
        if len(words(neighbour + character + neighbour)) == 1:
            return name
    return "space"


def class_ranges() -> dict[str, list[list[int]]]:
    """The first and the last code point of each range of a class."""
    ranges: dict[str, list[list[int]]] = {"letter": [], "number": [], "space": [], "other": []}
    for start in range(0, len(CODES), 4096):
        codes = CODES[start:start + 4096]
        # All characters of a word have one class, but a space may come first. So spaces are replaced by tabs.
        for _, (begin, end) in words("".join(map(chr, codes)).replace(" ", "\t")):
            mine = ranges[class_of(chr(codes[begin]))]
            if mine and mine[-1][1] == codes[begin] - 1:
                mine[-1][1] = codes[end - 1]
            else:
                mine.append([codes[begin], codes[end - 1]])
    return ranges


def unicode_version(ranges: dict[str, list[list[int]]]) -> str:
    for code, version in NEWEST.items():
        if any(first <= code <= last for first, last in ranges["letter"]):
            return version
    return "before 14.0"


def table(name: str, ranges: list[list[int]]) -> Iterator[str]:
    yield f"inline constexpr CodeRange {name}[] = {{"
    line = "   "
    for first, last in ranges:
        item = f" {{0x{first:x}, 0x{last:x}}},"
        if len(line + item) > 110:
            yield line
            line = "   "
        line += item
    yield line
    yield "};"


def header() -> str:
    ranges = class_ranges()
    return "\n".join([
        f"// Letters, numbers and white space of Unicode {unicode_version(ranges)}, as the tokenizers library has them.",
        "// Written by dev/unicode_classes.py; do not edit.",
        "#pragma once",
        "",
        "struct CodeRange {",
        "    char32_t first, last;",
        "};",
        "",
        "// clang-format off",
        *table("kLetters", ranges["letter"]),
        *table("kNumbers", ranges["number"]),
        *table("kSpaces", ranges["space"]),
        "// clang-format on"]) + "\n"


def checksum() -> int:
    """CRC-32 of the lengths in bytes of all words of a text. For each code point the text has `a?1?!`, which puts it
    next to a letter, a number and a punctuation mark."""
    crc = 0
    for start in range(0, len(CODES), 4096):
        text = "".join(f"a{chr(code)}1{chr(code)}!" for code in CODES[start:start + 4096])
        crc = zlib.crc32(bytes(len(word) for word, _ in words(text)), crc)
    return crc


if __name__ == "__main__":
    HEADER.write_text(header())
    print(f"{HEADER}: by tokenizers {tokenizers.__version__}; checksum of all words: 0x{checksum():08x}")
