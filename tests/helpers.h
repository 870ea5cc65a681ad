// What several tests need: whether to be thorough, a temporary folder, and checks of the text of an error.
#pragma once
#include <doctest/doctest.h>
#include <stdlib.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <string>
#include <system_error>

#include "llmc/error.h"

// Whether `make test-thorough` runs the test. Otherwise a test that goes through many kinds, sizes or
// schedules takes a sample of them that finds the same kinds of faults.
inline bool thorough() {
    return std::getenv("LLMC_THOROUGH") != nullptr;
}

// A new folder, which is removed with the object.
class TempFolder {
  public:
    TempFolder() {
        std::string name = (std::filesystem::temp_directory_path() / "llmc_test_XXXXXX").string();
        if (!::mkdtemp(name.data())) fail("cannot create ", name);
        path_ = name;
    }
    TempFolder(const TempFolder&) = delete;
    TempFolder& operator=(const TempFolder&) = delete;
    ~TempFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    const std::string& path() const { return path_; }
    std::string operator/(const std::string& name) const { return path_ + "/" + name; }

  private:
    std::string path_;
};

// Writes a file without the syncs of write_text(), because some tests write thousands of files. It makes a
// new file each time, because some filesystems sync a file that is truncated and written again.
inline void put_file(const std::string& path, const std::string& text) {
    std::filesystem::remove(path);
    std::ofstream file(path, std::ios::binary);
    file.write(text.data(), (std::streamsize)text.size());
    if (!file.flush()) fail("cannot write ", path);
}

// The text of the Error that f throws, or "" if it throws none.
template <class F>
std::string error_of(F f) {
    try {
        f();
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}

// Checks that f throws an Error, and that its text is one line that contains every part.
template <class F>
void check_error(F f, std::initializer_list<std::string> parts) {
    const std::string error = error_of(f);
    CAPTURE(error);
    CHECK(error != "");
    CHECK(error.find('\n') == std::string::npos);
    for (const std::string& part : parts) {
        CAPTURE(part);
        CHECK(error.find(part) != std::string::npos);
    }
}
