// Files are mapped for reading, and they are written so that no error is overlooked.
//
// Every failure is an Error that begins with the path and ends with the reason that the system gives. After
// close() the file is on the disk (fsync). A file that write_text_atomically replaces is the old one or the
// new one after a crash, and never half of each. A mapped file must not be shortened while it is in use,
// because that ends the program with SIGBUS, as for every program that maps files.
#pragma once
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <unordered_set>
#include <utility>
#include <vector>

#include "llmc/error.h"
#include "llmc/utf8.h"

// Throws an Error with the reason from errno, such as "PATH: cannot open: No such file or directory".
template <class... Parts>
[[noreturn]] void fail_errno(const std::string& path, const Parts&... what) {
    const int error = errno;
    fail(path, ": ", what..., ": ", std::strerror(error));
}

// A file descriptor that closes itself.
struct Descriptor {
    int fd;
    explicit Descriptor(int fd) : fd(fd) {}
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    ~Descriptor() {
        if (fd >= 0) ::close(fd);
    }
};

// Calls fsync again if a signal interrupts it. A pipe cannot be synced (EINVAL) and does not need it.
inline bool sync_descriptor(int fd) {
    while (::fsync(fd) != 0) {
        if (errno != EINTR) return errno == EINVAL;
    }
    return true;
}

// A regular file, mapped read-only. An empty one has size 0 and data nullptr.
class MappedFile {
  public:
    explicit MappedFile(const std::string& path) : path_(path) {
        // The system would ignore everything after a NUL. O_NONBLOCK, because open() on a pipe would wait for
        // a writer.
        if (path.find('\0') != std::string::npos) fail(path, ": cannot open: no file has a NUL in its name");
        const Descriptor file(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
        if (file.fd < 0) fail_errno(path, "cannot open");
        struct stat info;
        if (::fstat(file.fd, &info) != 0) fail_errno(path, "cannot stat");
        if (S_ISDIR(info.st_mode)) fail(path, ": cannot read: is a directory, expected a file");
        if (!S_ISREG(info.st_mode)) fail(path, ": cannot read: a pipe or a device, expected a regular file");
        if (info.st_size == 0) return;
        void* memory = ::mmap(nullptr, info.st_size, PROT_READ, MAP_PRIVATE, file.fd, 0);
        if (memory == MAP_FAILED) fail_errno(path, "cannot map");
        data_ = static_cast<const std::byte*>(memory);
        size_ = info.st_size;
    }
    MappedFile(MappedFile&& other) noexcept { swap(other); }
    MappedFile& operator=(MappedFile&& other) noexcept {
        MappedFile moved(std::move(other));
        swap(moved);
        return *this;
    }
    ~MappedFile() {
        if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
    }

    const std::byte* data() const { return data_; }  // (size)
    size_t size() const { return size_; }
    const std::string& path() const { return path_; }
    std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

  private:
    void swap(MappedFile& other) {
        std::swap(path_, other.path_);
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
    }
    std::string path_;
    const std::byte* data_ = nullptr;
    size_t size_ = 0;
};

// The CRC-32 of zlib, for data of any length.
inline uint32_t crc32_of(const std::byte* data /*(size)*/, size_t size) {
    return (uint32_t)::crc32_z(0, reinterpret_cast<const Bytef*>(data), size);
}

// Creates or replaces a file. The file is whole only after close(); without it, the destructor leaves what
// was written so far. After a failure the writer is closed.
class FileWriter {
  public:
    explicit FileWriter(const std::string& path)
        : path_(path), file_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
        if (file_.fd < 0) fail_errno(path, "cannot create");
        buffer_.reserve(kBufferSize);
    }

    void write(const void* data /*(size)*/, size_t size) {
        require_open();
        if (size == 0) return;  // data may be nullptr, and for that zlib would start a new checksum
        const char* bytes = static_cast<const char*>(data);
        crc_ = (uint32_t)::crc32_z(crc_, static_cast<const Bytef*>(data), size);
        size_ += size;
        if (buffer_.size() + size > kBufferSize) flush();
        if (size > kBufferSize)
            write_through(bytes, size);
        else
            buffer_.insert(buffer_.end(), bytes, bytes + size);
    }

    void close() {
        require_open();
        flush();
        if (!sync_descriptor(file_.fd)) give_up("cannot sync");
        if (::close(std::exchange(file_.fd, -1)) != 0) fail_errno(path_, "cannot close");
    }

    bool is_open() const { return file_.fd >= 0; }
    const std::string& path() const { return path_; }
    uint64_t size() const { return size_; }  // number of bytes written so far
    uint32_t crc32() const { return crc_; }  // checksum of these bytes

  private:
    static constexpr size_t kBufferSize = 1 << 20;

    void require_open() const {
        if (file_.fd < 0) fail(path_, ": cannot write: the file is closed");
    }
    [[noreturn]] void give_up(const char* what) {
        const int error = errno;
        ::close(std::exchange(file_.fd, -1));
        errno = error;
        fail_errno(path_, what);
    }
    void write_through(const char* data /*(size)*/, size_t size) {
        while (size > 0) {
            const ssize_t written = ::write(file_.fd, data, size);
            if (written < 0 && errno != EINTR) give_up("cannot write");
            if (written > 0) data += written, size -= written;
        }
    }
    void flush() {
        write_through(buffer_.data(), buffer_.size());
        buffer_.clear();
    }

    std::string path_;
    Descriptor file_;
    std::vector<char> buffer_;
    uint64_t size_ = 0;
    uint32_t crc_ = 0;
};

// Makes sure that the names in a folder are on the disk.
inline void sync_folder(const std::string& path) {
    const Descriptor folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (folder.fd < 0) fail_errno(path, "cannot open folder");
    if (!sync_descriptor(folder.fd)) fail_errno(path, "cannot sync folder");
}

// base_name() is the last part of a path; parent_folder() is the folder that it is in ("." if the path is
// only a name). Slashes at the end are ignored.
inline std::filesystem::path without_slash(const std::string& path) {
    const std::filesystem::path normal = std::filesystem::path(path).lexically_normal();
    return normal.has_filename() ? normal : normal.parent_path();
}
inline std::string base_name(const std::string& path) {
    return without_slash(path).filename().string();
}
inline std::string parent_folder(const std::string& path) {
    const std::filesystem::path parent = without_slash(path).parent_path();
    return parent.empty() ? "." : parent.string();
}

// Renames a file or folder and makes sure that the new name is on the disk. Both names must be on the same
// filesystem.
inline void rename_synced(const std::string& from, const std::string& to) {
    if (::rename(from.c_str(), to.c_str()) != 0) fail_errno(to, "cannot rename ", from, " to this");
    sync_folder(parent_folder(to));
}

// Whether `name`, which was read from a file, can be the name of a file in the same folder.
inline bool is_file_name(const std::string& name) {
    return !name.empty() && name != "." && name != ".." &&
           name.find_first_of(std::string("/\0", 2)) == name.npos;
}

// Whether there is a file or a folder with this name. It is an error if the system cannot say.
inline bool path_exists(const std::string& path) {
    struct stat info;
    if (::stat(path.c_str(), &info) == 0) return true;
    if (errno != ENOENT && errno != ENOTDIR) fail_errno(path, "cannot open");
    return false;
}

// The names in a folder, in any order.
inline std::vector<std::string> names_in_folder(const std::string& path) {
    std::vector<std::string> names;
    std::error_code error;
    std::filesystem::directory_iterator entry(path, error), end;
    for (; !error && entry != end; entry.increment(error)) names.push_back(entry->path().filename().string());
    if (error) fail(path, ": cannot read folder: ", error.message());
    return names;
}

inline std::string read_text(const std::string& path) {
    return std::string(MappedFile(path).text());
}

inline void write_text(const std::string& path, const std::string& text) {
    FileWriter file(path);
    file.write(text.data(), text.size());
    file.close();
}

// Calls fill(FileWriter&) to write a file with a temporary name, then renames it to `path`. After a failure
// `path` is what it was before.
template <class Fill>
void write_file_atomically(const std::string& path, Fill fill) {
    const std::string temporary = path + ".tmp";
    try {
        FileWriter file(temporary);
        fill(file);
        if (file.is_open()) file.close();
        rename_synced(temporary, path);
    } catch (...) {
        ::unlink(temporary.c_str());
        throw;
    }
}

inline void write_text_atomically(const std::string& path, const std::string& text) {
    write_file_atomically(path, [&](FileWriter& file) { file.write(text.data(), text.size()); });
}

// A JSON value as a short text that is safe to show in a message.
inline std::string brief(const nlohmann::json& value) {
    return printable(value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace), 60);
}

// Parses JSON that others have written. `where` (a path) is put in front of the one-line message. Three
// things are errors: a repeated key, because readers differ about which value counts; more than 64 levels of
// nesting, because all code that walks through a value is recursive; and a NUL, because the library would
// read it as the end.
inline nlohmann::json parse_json(std::string_view text, const std::string& where) {
    using Event = nlohmann::json::parse_event_t;
    std::vector<std::unordered_set<std::string>> keys;  // one set for every object that is open
    auto check = [&](int depth, Event event, nlohmann::json& value) {
        if (depth > 64) fail(where, ": not usable JSON: nested more than 64 levels deep");
        if (event == Event::object_start) keys.emplace_back();
        if (event == Event::object_end) keys.pop_back();
        if (event == Event::key && !keys.back().insert(value.get<std::string>()).second)
            fail(where, ": not usable JSON: the key ", brief(value), " occurs twice in one object");
        return true;
    };
    size_t bad = text.find('\0');
    if (bad == text.npos) {
        try {
            return nlohmann::json::parse(text.begin(), text.end(), check);
        } catch (const nlohmann::json::parse_error& e) {
            bad = e.byte - 1;
        } catch (const nlohmann::json::out_of_range&) {
            fail(where, ": not usable JSON: a number in it is too large");
        }
    }
    bad = std::min({bad, text.size(), first_bad_utf8(text)});
    const std::string_view before = text.substr(0, bad);
    const auto line = 1 + std::count(before.begin(), before.end(), '\n');
    const size_t column = bad - (before.rfind('\n') + 1) + 1;  // npos + 1 is 0
    std::string found = "end of text";
    if (bad < text.size()) {
        const Utf8Char c = next_utf8(text.substr(bad));
        found =
            c.kind == Utf8Char::whole ? str("'", text.substr(bad, c.bytes), "'") : "byte that is not UTF-8";
    }
    fail(where, ": not valid JSON: unexpected ", found, " at line ", line, ", byte ", column);
}

inline nlohmann::json read_json(const std::string& path) {
    const MappedFile file(path);
    return parse_json(file.text(), path);
}

// The value of `key` in a JSON object, which must be an integer from low to high. The object comes from
// `where`.
inline int64_t json_integer(const nlohmann::json& object, const std::string& key, int64_t low, int64_t high,
                            const std::string& where) {
    if (!object.contains(key)) fail(where, ": \"", key, "\" is missing");
    const nlohmann::json& value = object.at(key);
    const bool fits =
        value.is_number_integer() && !(value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX);
    if (!fits || value.get<int64_t>() < low || value.get<int64_t>() > high)
        fail(where, ": \"", key, "\" is ", brief(value), ", expected an integer from ", low, " to ", high);
    return value.get<int64_t>();
}

// JSON is UTF-8, but a path can be any bytes. A path that is UTF-8 becomes a string. Any other path becomes
// an array: strings for its parts that are UTF-8, and numbers for the bytes between them.
inline nlohmann::json json_of_path(const std::string& path) {
    if (first_bad_utf8(path) == path.size()) return path;
    nlohmann::json parts = nlohmann::json::array();
    for (size_t at = 0; at < path.size();) {
        const size_t good = first_bad_utf8(std::string_view(path).substr(at));
        if (good > 0) parts.push_back(path.substr(at, good));
        at += good;
        if (at < path.size()) parts.push_back((unsigned char)path[at++]);
    }
    return parts;
}

// The inverse of json_of_path; none if json_of_path does not make such JSON.
inline std::optional<std::string> path_of_json(const nlohmann::json& json) {
    std::string path;
    for (const nlohmann::json& part : json.is_array() ? json : nlohmann::json::array({json})) {
        if (part.is_string())
            path += part.get<std::string>();
        else if (json.is_array() && part.is_number_unsigned() && part.get<uint64_t>() < 256)
            path += (char)part.get<int>();
        else
            return {};
    }
    if (path.find('\0') != path.npos || json_of_path(path) != json) return {};
    return path;
}
