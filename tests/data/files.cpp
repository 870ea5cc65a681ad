#include "llmc/files.h"

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/helpers.h"

namespace {

std::string random_text(size_t size, unsigned seed) {
    std::mt19937 random(seed);
    std::string text(size, 0);
    for (char& c : text) c = (char)random();
    return text;
}

size_t open_descriptors() {
    size_t count = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
        count += entry.exists() || true;
    return count;
}

}  // namespace

TEST_CASE("MappedFile: contents, an empty file, moving") {
    const TempFolder folder;
    write_text(folder / "a", std::string("ab\0cd", 5));
    write_text(folder / "empty", "");
    MappedFile a(folder / "a");
    CHECK(a.size() == 5);
    CHECK(a.path() == folder / "a");
    CHECK(a.text() == std::string_view("ab\0cd", 5));
    CHECK(MappedFile(folder / "empty").size() == 0);
    CHECK(read_text(folder / "empty") == "");

    MappedFile b(std::move(a));
    CHECK(b.text().substr(0, 2) == "ab");
    CHECK(a.data() == nullptr);
    b = MappedFile(folder / "empty");
    CHECK(b.size() == 0);
    CHECK(b.path() == folder / "empty");
}

TEST_CASE("MappedFile: what cannot be read is named with the reason") {
    const TempFolder folder;
    check_error([&] { MappedFile(folder / "none"); }, {folder / "none", "No such file or directory"});
    check_error([&] { MappedFile(folder.path()); }, {folder.path(), "is a directory"});
    check_error([&] { MappedFile("/dev/null"); }, {"/dev/null", "expected a regular file"});
    REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
    check_error([&] { MappedFile(folder / "pipe"); }, {folder / "pipe", "expected a regular file"});
    write_text(folder / "cut", "x");
    check_error([&] { MappedFile(std::string(folder / "cut") + std::string("\0y", 2)); },
                {"cut\\x00y", "NUL"});
    write_text(folder / "secret", "x");
    ::chmod((folder / "secret").c_str(), 0);
    if (::geteuid() != 0)
        check_error([&] { MappedFile(folder / "secret"); }, {folder / "secret", "Permission denied"});
    else
        MESSAGE("skipped the unreadable file: root reads everything");
}

TEST_CASE("crc32_of is zlib's checksum") {
    const std::string digits = "123456789";
    CHECK(crc32_of(reinterpret_cast<const std::byte*>(digits.data()), digits.size()) == 0xcbf43926);
    CHECK(crc32_of(nullptr, 0) == 0);
}

TEST_CASE("FileWriter: what was written in pieces of any size is in the file") {
    const TempFolder folder;
    const size_t MiB = 1 << 20;
    for (size_t size : {size_t{0}, size_t{1}, MiB - 1, MiB, MiB + 1, 3 * MiB + 7}) {
        for (size_t piece : {size_t{1000}, MiB, MiB + 1, 4 * MiB}) {  // every second piece has 10 bytes
            CAPTURE(size);
            CAPTURE(piece);
            const std::string text = random_text(size, (unsigned)size);
            FileWriter file(folder / "a");
            size_t at = 0;
            for (int i = 0; at < size; i++) {
                const size_t count = std::min(i % 2 ? piece : 10, size - at);
                file.write(text.data() + at, count);
                file.write(nullptr, 0);
                at += count;
            }
            CHECK(file.size() == size);
            CHECK(file.crc32() == crc32_of(reinterpret_cast<const std::byte*>(text.data()), size));
            file.close();
            CHECK((read_text(folder / "a") == text));
        }
    }
}

TEST_CASE("FileWriter: a full disk is an error, at write or at close, and ends the writer") {
    const size_t descriptors = open_descriptors();
    {
        FileWriter buffered("/dev/full");
        buffered.write("x", 1);
        check_error([&] { buffered.close(); }, {"/dev/full", "cannot write", "No space left on device"});
        check_error([&] { buffered.write("x", 1); }, {"/dev/full", "closed"});
        check_error([&] { buffered.close(); }, {"/dev/full", "closed"});

        const std::string large(3 << 20, 'x');
        FileWriter direct("/dev/full");
        check_error([&] { direct.write(large.data(), large.size()); },
                    {"/dev/full", "No space left on device"});

        FileWriter forgotten("/dev/full");
        forgotten.write("x", 1);  // never closed: the destructor must not throw
    }
    CHECK(open_descriptors() == descriptors);
    check_error([&] { write_text("/dev/full", "x"); }, {"/dev/full", "No space left on device"});
}

TEST_CASE("FileWriter: what cannot be created is named with the reason") {
    const TempFolder folder;
    check_error([&] { FileWriter(folder / "no/file"); }, {folder / "no/file", "No such file or directory"});
    check_error([&] { FileWriter(folder.path()); }, {folder.path(), "Is a directory"});
    write_text(folder / "file", "");
    check_error([&] { FileWriter(folder / "file/x"); }, {folder / "file/x", "Not a directory"});
    std::filesystem::create_directory(folder / "locked");
    ::chmod((folder / "locked").c_str(), 0555);
    if (::geteuid() != 0)
        check_error([&] { FileWriter(folder / "locked/x"); }, {folder / "locked/x", "Permission denied"});
    else
        MESSAGE("skipped the unwritable folder: root writes everywhere");
}

TEST_CASE("FileWriter: interrupted and short writes go on where they stopped") {
    const TempFolder folder;
    const std::string pipe = folder / "pipe", text = random_text(5 << 20, 1);
    REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
    sigset_t alarm;
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    std::string received;
    ::pthread_sigmask(SIG_BLOCK, &alarm, nullptr);  // the reader thread inherits the mask
    std::thread reader([&] {
        const Descriptor in(::open(pipe.c_str(), O_RDONLY));
        std::vector<char> part(50000);
        for (ssize_t n; (n = ::read(in.fd, part.data(), part.size())) > 0;) {
            received.append(part.data(), n);
            ::usleep(300);
        }
    });
    FileWriter file(pipe);
    ::pthread_sigmask(SIG_UNBLOCK, &alarm, nullptr);
    static volatile sig_atomic_t signals;
    signals = 0;
    struct sigaction action = {}, old_action;
    action.sa_handler = [](int) { signals = signals + 1; };  // no SA_RESTART: write() returns early
    ::sigaction(SIGALRM, &action, &old_action);
    const itimerval often = {{0, 500}, {0, 500}}, never = {};
    ::setitimer(ITIMER_REAL, &often, nullptr);
    const std::string error = error_of([&] {
        for (size_t at = 0; at < text.size(); at += 2 << 20)
            file.write(text.data() + at, std::min<size_t>(2 << 20, text.size() - at));
        file.close();
    });
    ::setitimer(ITIMER_REAL, &never, nullptr);
    ::sigaction(SIGALRM, &old_action, nullptr);
    reader.join();
    CHECK(error == "");
    CHECK(signals > 5);
    CHECK((received == text));
}

TEST_CASE("write_text_atomically replaces a file, or leaves it as it was") {
    const TempFolder folder;
    write_text_atomically(folder / "a", "one");
    write_text_atomically(folder / "a", "two");
    CHECK(read_text(folder / "a") == "two");
    CHECK(!std::filesystem::exists(folder / "a.tmp"));

    std::filesystem::create_directory(folder / "b");
    check_error([&] { write_text_atomically(folder / "b", "x"); }, {folder / "b", "cannot rename"});
    CHECK(std::filesystem::is_directory(folder / "b"));
    CHECK(!std::filesystem::exists(folder / "b.tmp"));
    check_error([&] { write_text_atomically(folder / "none/c", "x"); }, {folder / "none/c", "No such file"});
}

TEST_CASE("rename_synced and sync_folder") {
    const TempFolder folder;
    std::filesystem::create_directory(folder / "new");
    write_text(folder / "new/file", "x");
    rename_synced(folder / "new", folder / "final");
    CHECK(read_text(folder / "final/file") == "x");
    check_error([&] { rename_synced(folder / "gone", folder / "x"); },
                {folder / "gone", folder / "x", "No such file or directory"});
    check_error([&] { sync_folder(folder / "gone"); }, {folder / "gone", "No such file or directory"});
    check_error([&] { sync_folder(folder / "final/file"); }, {folder / "final/file", "Not a directory"});
}

TEST_CASE("base_name and parent_folder") {
    CHECK(base_name("a") == "a");
    CHECK(base_name("./a/") == "a");
    CHECK(base_name("/a//b.c/") == "b.c");
    CHECK(parent_folder("a") == ".");
    CHECK(parent_folder("a/") == ".");
    CHECK(parent_folder("./a") == ".");
    CHECK(parent_folder("a/b") == "a");
    CHECK(parent_folder("a//b/") == "a");
    CHECK(parent_folder("/a/b/c") == "/a/b");
    CHECK(parent_folder("/a") == "/");
}

TEST_CASE("read_json: a value, or one line that says where and what") {
    const TempFolder folder;
    const std::string path = folder / "a.json";
    auto check_bad = [&](const std::string& text, std::initializer_list<std::string> parts) {
        put_file(path, text);
        check_error([&] { read_json(path); }, {path});
        check_error([&] { read_json(path); }, parts);
    };
    put_file(path, R"({"a": [1, 2.5, "x"], "b": {"a": null, "c": 0}, "c": {"a": 1}})");
    CHECK(read_json(path).at("a").at(1) == 2.5);
    CHECK(read_json(path).at("c").at("a") == 1);
    check_bad("{\n  \"a\": 1,\n  \"b\": ]\n}", {"not valid JSON: unexpected ']' at line 3, byte 8"});
    check_bad("{\"a\": 1", {"unexpected end of text at line 1, byte 8"});
    check_bad("", {"unexpected end of text at line 1, byte 1"});
    check_bad("{} {}", {"not valid JSON: unexpected '{' at line 1, byte 4"});
    check_bad("{\"a\": 1e999}", {"a number in it is too large"});
    check_bad("{\"a\":\n \"\xff\"}", {"unexpected byte that is not UTF-8 at line 2, byte 3"});
    check_bad(std::string("{}\0", 3), {"not valid JSON: unexpected '\\x00' at line 1, byte 3"});
    check_bad(std::string("{\"a\": 1}\0rubbish", 16), {"unexpected '\\x00' at line 1, byte 9"});
    check_bad("{\"a\": \"b\nc\"}", {"unexpected '\\n' at line 1, byte 9"});
    check_bad("{\"a\": \u4e2d}", {"unexpected '\u4e2d' at line 1, byte 7"});
    check_bad(R"({"x": [{"a": 1, "a": 1}]})", {"the key \"a\" occurs twice"});
    check_bad(R"({"a": 1, "x": {"b": 1}, "a": 1})", {"the key \"a\" occurs twice"});
    check_bad(std::string(1000000, '['), {"64 levels"});
    check_bad(std::string(100, '[') + std::string(100, ']'), {"64 levels"});
    put_file(path, std::string(60, '[') + std::string(60, ']'));
    CHECK(read_json(path).is_array());
    check_error([&] { read_json(folder / "none"); }, {folder / "none", "No such file or directory"});
}

TEST_CASE("printable: one line, of bounded length, that a terminal only shows") {
    CHECK(printable("plain \u00e9 \u4e2d \\ \"x\"") == "plain \u00e9 \u4e2d \\ \"x\"");
    CHECK(printable("a\nb\tc\rd") == "a\\nb\\tc\\rd");
    CHECK(printable(std::string("\0\x1b[31m\x7f", 7)) == "\\x00\\x1b[31m\\x7f");
    CHECK(printable("\xff\xc3 \xe4\xb8") == "\\xff\\xc3 \\xe4\\xb8");
    CHECK(printable("\u0085\u009f\u00a0") == "\\xc2\\x85\\xc2\\x9f\u00a0");
    CHECK(printable("\u2027\u2028\u202e\u202f") == "\u2027\\xe2\\x80\\xa8\\xe2\\x80\\xae\u202f");
    CHECK(printable("\u2065\u2066\u2069\u206a") == "\u2065\\xe2\\x81\\xa6\\xe2\\x81\\xa9\u206a");
    const std::string once = printable("a\n\xff");
    CHECK(printable(once) == once);
    CHECK(printable("12345678", 8) == "12345678");
    CHECK(printable("123456789", 8) == "12...89");
    std::string wide;
    for (int i = 0; i < 100; i++) wide += "\u4e2d";
    for (size_t longest : {8, 9, 10, 11, 60}) {
        const std::string cut = printable(wide, longest);
        CHECK(cut.size() <= longest);
        CHECK(first_bad_utf8(cut) == cut.size());
        CHECK(cut.find("...") != cut.npos);
    }
    CHECK(shown("a\n") == "\"a\\n\"");
    CHECK(shown(std::string(100, 'x')).size() <= 62);
    CHECK(brief({{"a", std::string(100, 'x')}}).size() <= 60);
    CHECK(brief("\xff").size() > 0);
    check_error([] { fail(std::string(5000, 'x'), "\n: expected y"); }, {"xxx...xxx", "x\\n: expected y"});
    CHECK(error_of([] { fail(std::string(5000, 'x')); }).size() <= 1000);
}

TEST_CASE("a path in JSON: any bytes, and every one back") {
    CHECK(json_of_path("a/\u00e9") == "a/\u00e9");
    CHECK(json_of_path("") == "");
    CHECK(json_of_path("a\xff\xfe/b\xc3").dump() == R"(["a",255,254,"/b",195])");
    std::mt19937 random(3);
    for (int round = 0; round < 2000; round++) {
        std::string path;
        for (int i = random() % 8; i > 0; i--) path += (char)(1 + random() % 255);
        CHECK(path_of_json(nlohmann::json::parse(json_of_path(path).dump())) == path);
    }
    for (const char* bad :
         {"1", "null", "{}", "[256]", "[-1]", "[1.5]", "[[]]", "[\"a\", null]", "[0]", R"("a\u0000b")"}) {
        CAPTURE(bad);
        CHECK_FALSE(path_of_json(nlohmann::json::parse(bad)).has_value());
    }
}

TEST_CASE("json_integer: in range, or one line that says what was expected") {
    const nlohmann::json json = {{"a", 5},   {"b", -5},  {"c", UINT64_MAX},
                                 {"d", 5.0}, {"e", "5"}, {"f", INT64_MAX}};
    CHECK(json_integer(json, "a", 0, 5, "F") == 5);
    CHECK(json_integer(json, "b", -5, 5, "F") == -5);
    CHECK(json_integer(json, "f", 0, INT64_MAX, "F") == INT64_MAX);
    check_error([&] { json_integer(json, "a", 0, 4, "F"); },
                {"F: \"a\" is 5, expected an integer from 0 to 4"});
    for (const char* key : {"b", "c", "d", "e"})
        check_error([&] { json_integer(json, key, 0, INT64_MAX, "F"); },
                    {"F: \"", key, "expected an integer from 0"});
    check_error([&] { json_integer(json, "x", 0, 1, "F"); }, {"F: \"x\" is missing"});
    check_error([&] { json_integer(5, "x", 0, 1, "F"); }, {"F: \"x\" is missing"});
}

TEST_CASE("path_exists and names_in_folder say what the system says") {
    const TempFolder folder;
    put_file(folder / "\xff", "");
    CHECK(path_exists(folder / "\xff"));
    CHECK_FALSE(path_exists(folder / "none"));
    CHECK_FALSE(path_exists(folder / "\xff/none"));
    CHECK(names_in_folder(folder.path()) == std::vector<std::string>{"\xff"});
    check_error([&] { names_in_folder(folder / "none"); }, {folder / "none", "No such file or directory"});
    const std::string loop = folder / "loop";
    std::filesystem::create_symlink(loop, loop);
    check_error([&] { path_exists(loop); }, {loop, "Too many levels of symbolic links"});
    check_error([] { path_exists(std::string(5000, 'x')); }, {"File name too long"});
}
