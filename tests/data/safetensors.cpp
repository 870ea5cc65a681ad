#include "llmc/safetensors.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/helpers.h"

namespace {

// The text of a file with exactly this header and with `bytes` bytes of data: 0, 1, 2, ...
std::string file_text(const std::string& header, size_t bytes) {
    const uint64_t size = header.size();
    std::string text(reinterpret_cast<const char*>(&size), 8);
    text += header;
    for (size_t i = 0; i < bytes; i++) text += (char)i;
    return text;
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
    return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
           offsets + "}";
}

std::string braces(const std::string& entries) {
    return str("{", entries, "}");
}

template <class T>
void append(SafetensorsWriter& writer, const std::vector<T>& values) {
    writer.append(values.data(), values.size() * sizeof(T));
}

std::vector<float> floats(const SafetensorsFile& file, const std::string& name,
                          const std::vector<int64_t>& shape, size_t count) {
    std::vector<float> out(count);
    file.read_floats(name, shape, out.data());
    return out;
}

}  // namespace

TEST_CASE("safetensors: what the writer wrote the reader reads") {
    const TempFolder folder;
    const std::string path = folder / "a.safetensors";
    FileWriter file(path);
    SafetensorsWriter writer(file,
                             {{"empty at the start", DType::F64, {0}},
                              {"double", DType::F64, {2}},
                              {"empty", DType::F32, {0, 3}},
                              {"float", DType::F32, {2, 3}},
                              {"scalar", DType::F32, {}},
                              {"int", DType::I32, {3}},
                              {"half", DType::F16, {2}},
                              {"bf16", DType::BF16, {3}},
                              {"byte", DType::U8, {3}},
                              {"empty at the end", DType::U8, {0}}},
                             {{"format", "pt"}, {"note", "\u00e9\"\n"}});
    append<double>(writer, {1.5, -1e300});
    append<float>(writer, {1, 2});
    append<float>(writer, {3, 4, 5, 6});  // this is the second part of the same tensor
    append<float>(writer, {0.25f});
    append<int32_t>(writer, {-1, 0, 7});
    append<uint16_t>(writer, {0x3c00, 0xc000});
    append<uint16_t>(writer, {0x3f80, 0xc000, 0x7f80});
    append<uint8_t>(writer, {1, 2, 3});
    writer.close();
    CHECK(file.size() == read_text(path).size());

    const SafetensorsFile read(path);
    const float inf = std::numeric_limits<float>::infinity();
    CHECK(read.tensors().size() == 10);
    CHECK(read.metadata().size() == 2);
    CHECK(read.metadata().at("note") == "\u00e9\"\n");
    CHECK(floats(read, "double", {2}, 2) == std::vector<float>{1.5, -inf});
    CHECK(floats(read, "float", {2, 3}, 6) == std::vector<float>{1, 2, 3, 4, 5, 6});
    CHECK(floats(read, "scalar", {}, 1) == std::vector<float>{0.25});
    CHECK(floats(read, "half", {2}, 2) == std::vector<float>{1, -2});
    CHECK(floats(read, "bf16", {3}, 3) == std::vector<float>{1, -2, inf});
    CHECK(floats(read, "empty", {0, 3}, 0).empty());
    const TensorView* ints = read.find("int");
    REQUIRE(ints);
    CHECK(ints->dtype == DType::I32);
    CHECK(ints->shape == std::vector<int64_t>{3});
    CHECK(ints->bytes == 12);
    CHECK(std::memcmp(ints->data, std::vector<int32_t>{-1, 0, 7}.data(), 12) == 0);
    CHECK(read.find("none") == nullptr);

    FileWriter nothing(folder / "nothing");
    SafetensorsWriter(nothing, {}, {}).close();
    CHECK(SafetensorsFile(folder / "nothing").tensors().empty());
    CHECK(SafetensorsFile(folder / "nothing").metadata().empty());

    // The header is padded with spaces, so that the data begins at a multiple of 8.
    const std::string text = read_text(path);
    uint64_t header_size;
    std::memcpy(&header_size, text.data(), 8);
    CHECK(header_size % 8 == 0);
    CHECK(text[8] == '{');
    CHECK(text.find_last_not_of(' ', 8 + header_size - 1) == text.rfind('}', 8 + header_size - 1));
}

TEST_CASE("safetensors: a file by the reference implementation") {
    const TempFolder folder;
    const std::string header =
        R"({"__metadata__":{"format":"pt"},"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},)"
        R"("b":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},"e":{"dtype":"F32","shape":[0,3],)"
        R"("data_offsets":[32,32]},"h":{"dtype":"F16","shape":[2],"data_offsets":[32,36]}}   )";
    const std::string data("\7\0\0\0\0\0\0\0\0\0\200?\0\0\0@\0\0@@\0\0\200@\0\0\240@\0\0\300@\0008\0\300",
                           36);
    put_file(folder / "a", file_text(header, 0) + data);
    const SafetensorsFile file(folder / "a");
    CHECK(floats(file, "b", {2, 3}, 6) == std::vector<float>{1, 2, 3, 4, 5, 6});
    CHECK(floats(file, "h", {2}, 2) == std::vector<float>{0.5, -2});
    CHECK(file.find("a")->data[0] == std::byte{7});
    CHECK(file.metadata().at("format") == "pt");
}

TEST_CASE("safetensors: every half is converted exactly") {
    for (int half = 0; half < 65536; half++) {
        const int exponent = half >> 10 & 31, mantissa = half & 1023;
        const double sign = half & 0x8000 ? -1 : 1;
        const float f = half_to_float((uint16_t)half);
        CAPTURE(half);
        REQUIRE(std::signbit(f) == (sign < 0));
        if (exponent == 31 && mantissa)
            REQUIRE(std::isnan(f));
        else if (exponent == 31)
            REQUIRE(std::isinf(f));
        else if (exponent == 0)
            REQUIRE(f == sign * std::ldexp(mantissa, -24));
        else
            REQUIRE(f == sign * std::ldexp(1024 + mantissa, exponent - 25));
    }
}

TEST_CASE("safetensors: read_floats refuses what is not as expected") {
    const TempFolder folder;
    put_file(
        folder / "a",
        file_text(braces(entry("w", "F32", "[2]", "[0,8]") + "," + entry("i", "I32", "[1]", "[8,12]")), 12));
    const SafetensorsFile file(folder / "a");
    float out[2];
    check_error([&] { file.read_floats("h.0.w", {2}, out); }, {folder / "a", "\"h.0.w\" (2)", "missing"});
    check_error(
        [&] {
            file.read_floats("w", {1, 2}, out);
        },
        {folder / "a", "\"w\"", "(2)", "expected (1, 2)"});
    check_error([&] { file.read_floats("i", {1}, out); }, {folder / "a", "\"i\"", "I32", "expected F32"});
}

TEST_CASE("safetensors: each malformed file has its complaint") {
    const TempFolder folder;
    const std::string path = folder / "bad.safetensors";
    auto check_bad = [&](const std::string& text, std::initializer_list<std::string> parts) {
        put_file(path, text);
        CAPTURE(text);
        check_error([&] { SafetensorsFile{path}; }, {path});
        check_error([&] { SafetensorsFile{path}; }, parts);
    };
    auto check_header = [&](const std::string& header, size_t bytes,
                            std::initializer_list<std::string> parts) {
        check_bad(file_text(header, bytes), parts);
    };
    auto number = [](uint64_t n) { return std::string(reinterpret_cast<const char*>(&n), 8); };
    check_bad("", {"0 bytes"});
    check_bad("1234567", {"7 bytes"});
    check_bad(number(10) + "{}", {"10 bytes", "only 2 follow"});
    check_bad(number(100'000'001) + "{}", {"100000001 bytes", "at most 100000000"});
    check_bad(number(UINT64_MAX) + "{}", {"at most 100000000"});
    check_bad(number(UINT64_MAX - 7) + "{}", {"at most 100000000"});
    check_bad(number(0), {"does not begin with {"});
    check_header("[]", 0, {"does not begin with {"});
    check_header(" {}", 0, {"does not begin with {"});
    check_header("{\"w\":", 0, {"not valid JSON"});
    check_header("{} x", 0, {"not valid JSON"});
    check_header(R"({"w":1})", 0, {"\"w\"", "not an object"});
    check_header(R"({"a\nb":{}})", 0, {"tensor \"a\\nb\""});
    check_header(R"({"w":{}})", 0, {"\"w\"", "dtype is not a string"});
    check_header(R"({"w":{"dtype":"F32","data_offsets":[0,4]}})", 4, {"\"w\"", "shape is not"});
    check_header(R"({"w":{"dtype":"F32","shape":[1]}})", 4, {"\"w\"", "data_offsets is not"});
    check_header(R"({"__metadata__":[]})", 0, {"__metadata__"});
    check_header(R"({"__metadata__":{"a":1}})", 0, {"__metadata__ is not an object of strings"});
    auto check_entry = [&](const std::string& dtype, const std::string& shape, const std::string& offsets,
                           size_t bytes, std::initializer_list<std::string> parts) {
        check_header(braces(entry("w", dtype, shape, offsets)), bytes, {"\"w\""});
        check_header(braces(entry("w", dtype, shape, offsets)), bytes, parts);
    };
    check_entry("F31", "[1]", "[0,4]", 4, {"unknown dtype \"F31\""});
    check_entry("F\\n", "[1]", "[0,4]", 4, {"unknown dtype \"F\\n\""});
    check_entry("f32", "[1]", "[0,4]", 4, {"unknown dtype \"f32\""});
    check_entry("F32", "[-1]", "[0,4]", 4, {"shape is not"});
    check_entry("F32", "[1.0]", "[0,4]", 4, {"shape is not"});
    check_entry("F32", "[\"1\"]", "[0,4]", 4, {"shape is not"});
    check_entry("F32", "[9223372036854775808]", "[0,4]", 4, {"shape is not"});
    check_entry("F32", "{\"a\":1}", "[0,4]", 4, {"shape is not"});
    check_entry("F32", "[1]", "[0]", 4, {"[begin, end]"});
    check_entry("F32", "[1]", "[0,4,8]", 4, {"[begin, end]"});
    check_entry("F32", "[1]", "[4,0]", 4, {"begin <= end"});
    check_entry("F32", "[1]", "[-4,0]", 4, {"data_offsets is not"});
    check_entry("F32", "[1]", "[0,8]", 4, {"end at byte 8 of 4"});
    check_entry("F32", "[2]", "[0,8]", 7, {"end at byte 8 of 7", "the end of the file is missing"});
    check_entry("F32", "[1]", "[9223372036854775804,9223372036854775807]", 4,
                {"the end of the file is missing"});
    check_entry("F32", "[2]", "[0,4]", 4, {"4 bytes", "expected 8 for F32 (2)"});
    check_entry("F32", "[]", "[0,8]", 8, {"8 bytes", "expected 4 for F32 ()"});
    check_entry("F32", "[4294967296,4294967296]", "[0,4]", 4, {"(4294967296, 4294967296)", "2^63-1"});
    check_entry("F32", "[2305843009213693952]", "[0,4]", 4, {"2^63-1"});
    // The sizes are 2^64 + 1, which wraps around to 1, and 2^64, although a factor of zero follows.
    check_entry("U8", "[274177,67280421310721]", "[0,1]", 1, {"2^63-1"});
    check_entry("U8", "[4294967296,4294967296,0]", "[0,0]", 0, {"2^63-1"});
    check_entry("F32", "[1]", "[4,8]", 8, {"begin at byte 4, expected 0", "hole"});
    check_header(braces(entry("w", "F32", "[1]", "[0,4]")), 5, {"1 bytes after"});
    const std::string a = entry("a", "F32", "[2]", "[0,8]");
    check_header(braces(a + "," + entry("b", "F32", "[2]", "[4,12]")), 12,
                 {"\"b\"", "expected 8", "overlap"});
    check_header(braces(a + "," + entry("b", "F32", "[2]", "[0,8]")), 8, {"expected 8", "overlap"});
    check_header(braces(a + "," + entry("b", "F32", "[1]", "[12,16]")), 16, {"\"b\"", "expected 8", "hole"});
    check_header(braces(a + "," + a), 8, {"\"a\"", "twice"});
}

TEST_CASE("SafetensorsWriter refuses what would be no good file") {
    const TempFolder folder;
    const std::string path = folder / "a";
    const float values[4] = {};
    FileWriter file(path);
    SafetensorsWriter writer(file, {{"a", DType::F32, {2}}, {"b", DType::F32, {2}}});
    writer.append(values, 4);
    check_error([&] { writer.append(values, 8); }, {path, "\"a\"", "8 more bytes", "expected at most 4"});
    check_error([&] { writer.close(); }, {path, "\"a\"", "4 bytes", "not written"});
    writer.append(values, 4);
    check_error([&] { writer.close(); }, {path, "\"b\"", "8 bytes", "not written"});
    writer.append(values, 8);
    check_error([&] { writer.append(values, 1); }, {path, "1 bytes after the last tensor"});
    writer.close();
    CHECK(SafetensorsFile(path).tensors().size() == 2);

    auto refused = [&](const std::vector<TensorSpec>& tensors, std::initializer_list<std::string> parts) {
        FileWriter other(folder / "b");
        check_error([&] { SafetensorsWriter(other, tensors); }, parts);
    };
    refused({{"a", DType::U8, {1}}, {"b", DType::F32, {1}}}, {"\"b\"", "aligned"});
    refused({{"a", DType::U8, {1}}, {"a", DType::U8, {1}}}, {"\"a\"", "the name occurs twice"});
    refused({{"a", DType::F32, {-1}}}, {"\"a\"", "(-1)"});
    refused({{"a", DType::F32, {1LL << 40, 1LL << 40}}}, {"\"a\"", "no file can hold"});
    refused({{"a", DType::U8, {INT64_MAX}}, {"b", DType::U8, {1}}}, {"\"b\"", "no file can hold"});
}

TEST_CASE("safetensors: thousands of damaged files load whole or throw Error") {
    const TempFolder folder;
    const std::string path = folder / "fuzz";
    const std::string good =
        file_text(R"({"__metadata__":{"a":"b"},)" + entry("a", "F32", "[2,3]", "[0,24]") + "," +
                      entry("b", "F16", "[]", "[24,26]") + "," + entry("c", "BF16", "[0,5]", "[26,26]") +
                      "," + entry("d", "I8", "[3]", "[26,29]") + "}",
                  29);
    std::mt19937 random(7);
    int loaded = 0, refused = 0;
    for (int round = 0; round < 6000; round++) {
        std::string text = good;
        for (int edits = 1 + random() % 3; edits > 0 && !text.empty(); edits--) {
            const size_t at = random() % std::min<size_t>(text.size(), random() % 4 ? text.size() : 16);
            const char likely = "0123456789{}[]\",:-eF "[random() % 21];
            switch (random() % 5) {
                case 0:
                    text[at] = (char)random();
                    break;
                case 1:
                    text[at] = likely;
                    break;
                case 2:
                    text.insert(at, 1, likely);
                    break;
                case 3:
                    text.erase(at, 1 + random() % 8);
                    break;
                case 4:
                    if (random() % 4 == 0) text.resize(at + 1);
                    break;
            }
        }
        put_file(path, text);
        try {
            const SafetensorsFile file(path);
            uint64_t header_size, bytes = 0;
            std::memcpy(&header_size, text.data(), 8);
            for (const TensorView& tensor : file.tensors()) {
                bytes += tensor.bytes;
                std::vector<float> out(tensor.bytes);
                if (tensor.dtype == DType::F32 || tensor.dtype == DType::F16)
                    file.read_floats(tensor.name, tensor.shape, out.data());
            }
            REQUIRE(8 + header_size + bytes == text.size());
            loaded++;
        } catch (const Error& e) {
            REQUIRE(std::string(e.what()).find('\n') == std::string::npos);
            refused++;
        }
    }
    CHECK(loaded > 50);
    CHECK(refused > 3000);
}
