// The safetensors format: 8 bytes with the length of the header (little-endian), a JSON header, then the
// bytes of the tensors.
//
// Reading: the file is mapped, and its whole header is checked before anything is used. The rules are those
// of the reference implementation: the bytes of the tensors follow one another without holes or overlap and
// end where the file ends, and each tensor has exactly the bytes of its shape and dtype. A tensor may have no
// elements, and it may have no dimensions (a scalar). Data may be unaligned, so read them with read_floats or
// memcpy.
//
// A model may be in several files with an index (SafetensorsSet).
//
// Writing: the tensors are announced first and then appended in that order, so that none of them must be in
// memory. It is an error if the file is not complete at close().
#pragma once
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "llmc/error.h"
#include "llmc/files.h"

static_assert(std::endian::native == std::endian::little, "safetensors and token shards are little-endian");

enum class DType { F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, I16, I8, U64, U32, U16, U8, BOOL };

struct DTypeInfo {
    const char* name;  // its name in the header
    size_t size;       // bytes in an element
};
inline const DTypeInfo& dtype_info(DType dtype) {
    static const DTypeInfo infos[] = {{"F64", 8},     {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1},
                                      {"F8_E5M2", 1}, {"I64", 8}, {"I32", 4}, {"I16", 2},  {"I8", 1},
                                      {"U64", 8},     {"U32", 4}, {"U16", 2}, {"U8", 1},   {"BOOL", 1}};
    return infos[(int)dtype];
}
inline constexpr int kDTypes = (int)DType::BOOL + 1;

struct TensorView {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
    const std::byte* data;  // (bytes), inside the mapped file
    size_t bytes;
};

// "(2, 3)" for messages.
inline std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); i++) text += str(i ? ", " : "", shape[i]);
    return text + ")";
}

// Computes the number of bytes of a tensor. Returns false if a size is negative or the result is above
// 2^63 - 1.
inline bool tensor_bytes(DType dtype, const std::vector<int64_t>& shape, int64_t& bytes) {
    bytes = (int64_t)dtype_info(dtype).size;
    for (int64_t size : shape) {
        if (size < 0 || __builtin_mul_overflow(bytes, size, &bytes)) return false;
    }
    return true;
}

// Converts IEEE half to float exactly, including subnormals, infinities and NaNs.
inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x0400) return (sign ? -1.0f : 1.0f) * (float)rest * 0x1p-24f;
    return std::bit_cast<float>(sign | ((rest << 13) + (uint32_t(127 - 15) << 23)));
}

class SafetensorsFile {
  public:
    explicit SafetensorsFile(const std::string& path) : SafetensorsFile(MappedFile(path)) {}
    explicit SafetensorsFile(MappedFile opened) : file_(std::move(opened)) {
        const std::string& path = file_.path();
        const uint64_t size = file_.size();
        uint64_t header_size = 0;
        if (size < 8) fail(path, ": not a safetensors file: ", size, " bytes, expected 8 and a header");
        std::memcpy(&header_size, file_.data(), 8);
        if (header_size > kMaxHeader)
            fail(path, ": not a safetensors file: the header would be ", header_size, " bytes, but at most ",
                 kMaxHeader, " are allowed");
        if (header_size > size - 8)
            fail(path, ": the header would be ", header_size, " bytes, but only ", size - 8,
                 " follow its length");
        const std::string_view text = file_.text().substr(8, header_size);
        if (text.empty() || text[0] != '{') fail(path, ": the header does not begin with {");
        const nlohmann::json header = parse_json(text, path);
        for (const auto& [name, value] : header.items()) {
            if (name == "__metadata__")
                read_metadata(value);
            else
                read_entry(name, value, 8 + header_size);
        }
        check_layout(8 + header_size);
    }

    const std::string& path() const { return file_.path(); }
    const std::vector<TensorView>& tensors() const { return tensors_; }  // in the order of their data
    const std::map<std::string, std::string>& metadata() const { return metadata_; }

    const TensorView* find(const std::string& name) const {
        const auto found = numbers_.find(name);
        return found == numbers_.end() ? nullptr : &tensors_[found->second];
    }

    // Returns the tensor `name`. It is an error if it is missing, has another shape, or has a dtype that
    // read_floats cannot read.
    const TensorView& expect(const std::string& name, const std::vector<int64_t>& shape) const {
        const TensorView* tensor = find(name);
        if (!tensor) fail(path(), ": tensor ", shown(name), " ", shape_text(shape), " is missing");
        if (tensor->shape != shape)
            fail_at(name, "its shape is ", shape_text(tensor->shape), ", expected ", shape_text(shape));
        const DType dtype = tensor->dtype;
        if (dtype != DType::F32 && dtype != DType::F16 && dtype != DType::BF16 && dtype != DType::F64)
            fail_at(name, "its dtype is ", dtype_info(dtype).name, ", expected F32, F16, BF16 or F64");
        return *tensor;
    }

    // Reads the tensor that expect() returns, as floats.
    void read_floats(const std::string& name, const std::vector<int64_t>& shape,
                     float* out /*(shape)*/) const {
        const TensorView* tensor = &expect(name, shape);
        switch (tensor->dtype) {
            case DType::F32:
                if (tensor->bytes > 0) std::memcpy(out, tensor->data, tensor->bytes);
                break;
            case DType::F64:
                return convert<double>(*tensor, out, [](double x) { return (float)x; });
            case DType::F16:
                return convert<uint16_t>(*tensor, out, half_to_float);
            case DType::BF16:
                return convert<uint16_t>(*tensor, out,
                                         [](uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); });
            default:  // expect() has refused it
                break;
        }
    }

  private:
    static constexpr uint64_t kMaxHeader = 100'000'000;  // as in the reference implementation

    template <class... Parts>
    [[noreturn]] void fail_at(const std::string& tensor, const Parts&... parts) const {
        fail(path(), ": tensor ", shown(tensor), ": ", parts...);
    }

    template <class Raw, class Convert>
    static void convert(const TensorView& tensor, float* out /*(bytes / sizeof(Raw))*/, Convert to_float) {
        for (size_t i = 0; i < tensor.bytes / sizeof(Raw); i++) {
            Raw raw;
            std::memcpy(&raw, tensor.data + i * sizeof(Raw), sizeof(Raw));
            out[i] = to_float(raw);
        }
    }

    void read_metadata(const nlohmann::json& value) {
        if (!value.is_object()) fail(path(), ": __metadata__ is not an object of strings");
        for (const auto& [key, text] : value.items()) {
            if (!text.is_string()) fail(path(), ": __metadata__ is not an object of strings");
            metadata_[key] = text.get<std::string>();
        }
    }

    std::vector<int64_t> read_integers(const std::string& name, const nlohmann::json& value,
                                       const char* key) const {
        std::vector<int64_t> integers;
        bool good = value.contains(key) && value.at(key).is_array();
        if (good) {
            for (const auto& x : value.at(key)) {
                good = good && x.is_number_unsigned() && x.get<uint64_t>() <= INT64_MAX;
                if (good) integers.push_back(x.get<int64_t>());
            }
        }
        if (!good) fail_at(name, key, " is not an array of integers from 0 to 2^63-1");
        return integers;
    }

    void read_entry(const std::string& name, const nlohmann::json& value, uint64_t data_start) {
        if (!value.is_object()) fail_at(name, "its header entry is not an object");
        if (!value.contains("dtype") || !value.at("dtype").is_string())
            fail_at(name, "dtype is not a string");
        const std::string dtype_name = value.at("dtype").get<std::string>();
        int dtype = 0;
        while (dtype < kDTypes && dtype_name != dtype_info((DType)dtype).name) dtype++;
        if (dtype == kDTypes) fail_at(name, "unknown dtype ", shown(dtype_name));

        TensorView tensor{name, (DType)dtype, read_integers(name, value, "shape"), nullptr, 0};
        const std::vector<int64_t> offsets = read_integers(name, value, "data_offsets");
        if (offsets.size() != 2 || offsets[0] > offsets[1])
            fail_at(name, "data_offsets are not [begin, end] with begin <= end");
        const uint64_t available = file_.size() - data_start;
        if ((uint64_t)offsets[1] > available)
            fail_at(name, "its data end at byte ", offsets[1], " of ", available,
                    "; the end of the file is missing");
        int64_t expected = 0;
        if (!tensor_bytes(tensor.dtype, tensor.shape, expected))
            fail_at(name, "a shape of ", shape_text(tensor.shape), " is more than 2^63-1 bytes");
        tensor.bytes = offsets[1] - offsets[0];
        if (tensor.bytes != (uint64_t)expected)
            fail_at(name, "it has ", tensor.bytes, " bytes of data, expected ", expected, " for ", dtype_name,
                    " ", shape_text(tensor.shape));
        tensor.data = file_.data() + data_start + offsets[0];
        tensors_.push_back(std::move(tensor));
    }

    // Sorts the tensors by the place of their data, and checks that each begins where the one before it ends.
    void check_layout(uint64_t data_start) {
        std::sort(tensors_.begin(), tensors_.end(), [](const TensorView& a, const TensorView& b) {
            return std::pair(a.data, a.bytes) < std::pair(b.data, b.bytes);
        });
        const std::byte* begin = file_.data() + data_start;
        const std::byte* end = begin;
        for (const TensorView& tensor : tensors_) {
            if (tensor.data != end)
                fail_at(tensor.name, "its data begin at byte ", tensor.data - begin, ", expected ",
                        end - begin,
                        tensor.data < end ? " (they overlap those of another tensor)"
                                          : " (there is a hole before them)");
            end = tensor.data + tensor.bytes;
        }
        for (size_t i = 0; i < tensors_.size(); i++) numbers_[tensors_[i].name] = i;
        const auto unused = file_.data() + file_.size() - end;
        if (unused != 0) fail(path(), ": ", unused, " bytes after the last tensor's data, expected none");
    }

    MappedFile file_;
    std::vector<TensorView> tensors_;
    std::unordered_map<std::string, size_t> numbers_;  // name -> index in tensors_
    std::map<std::string, std::string> metadata_;
};

// The tensors of one file, or of several files with Hugging Face's index: {"weight_map": {tensor: file}}. The
// index must name the right file for every tensor of its files.
class SafetensorsSet {
  public:
    explicit SafetensorsSet(SafetensorsFile file) : path_(file.path()) { files_.push_back(std::move(file)); }

    // open(name) returns the MappedFile of a file in the folder of the index.
    SafetensorsSet(const MappedFile& index, const std::function<MappedFile(const std::string&)>& open)
        : path_(index.path()) {
        const nlohmann::json json = parse_json(index.text(), path_);
        if (!json.is_object() || !json.contains("weight_map") || !json.at("weight_map").is_object())
            fail(path_, ": weight_map is not an object");
        const nlohmann::json& map = json.at("weight_map");
        std::map<std::string, size_t> numbers;  // name -> index in files_
        for (const auto& [tensor, name] : map.items()) {
            if (!name.is_string() || !is_file_name(name.get<std::string>()))
                fail(path_, ": the file of tensor ", shown(tensor), " is ", brief(name),
                     ", expected the name of a file in the same folder");
            numbers[name.get<std::string>()] = 0;
        }
        for (auto& [name, number] : numbers) {
            number = files_.size();
            const SafetensorsFile& file = files_.emplace_back(open(name));
            for (const TensorView& tensor : file.tensors()) {
                const auto named = map.find(tensor.name);
                if (named == map.end())
                    fail(file.path(), ": tensor ", shown(tensor.name), " is not in ", path_);
                if (*named != name)
                    fail(file.path(), ": tensor ", shown(tensor.name), " is here, but ", path_,
                         " says that it is in ", brief(*named));
            }
        }
        for (const auto& [tensor, name] : map.items()) {
            const SafetensorsFile& file = files_[numbers.at(name.get<std::string>())];
            if (!file.find(tensor))
                fail(file.path(), ": tensor ", shown(tensor), " is not here, but ", path_,
                     " says that it is");
        }
    }

    const std::string& path() const { return path_; }  // path of the file, or of the index
    const std::vector<SafetensorsFile>& files() const { return files_; }

    const TensorView* find(const std::string& name) const {
        const TensorView* tensor = nullptr;
        for (const SafetensorsFile& file : files_)
            if (!tensor) tensor = file.find(name);
        return tensor;
    }

    // The same as in SafetensorsFile.
    const TensorView& expect(const std::string& name, const std::vector<int64_t>& shape) const {
        return file_of(name, shape).expect(name, shape);
    }
    void read_floats(const std::string& name, const std::vector<int64_t>& shape,
                     float* out /*(shape)*/) const {
        file_of(name, shape).read_floats(name, shape, out);
    }

  private:
    const SafetensorsFile& file_of(const std::string& name, const std::vector<int64_t>& shape) const {
        for (const SafetensorsFile& file : files_)
            if (file.find(name)) return file;
        fail(path_, ": tensor ", shown(name), " ", shape_text(shape), " is missing");
    }

    std::string path_;
    std::vector<SafetensorsFile> files_;
};

struct TensorSpec {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
};

class SafetensorsWriter {
  public:
    // Writes the header. The file must be empty, and it must outlive the writer.
    SafetensorsWriter(FileWriter& file, const std::vector<TensorSpec>& tensors,
                      const std::map<std::string, std::string>& metadata = {{"format", "pt"}})
        : file_(file) {
        nlohmann::ordered_json header = nlohmann::ordered_json::object();
        if (!metadata.empty()) header["__metadata__"] = metadata;
        int64_t end = 0;
        for (const TensorSpec& tensor : tensors) {
            const int64_t begin = end;
            int64_t bytes = 0;
            if (!tensor_bytes(tensor.dtype, tensor.shape, bytes) || __builtin_add_overflow(end, bytes, &end))
                fail_at(tensor.name, "no file can hold a shape of ", shape_text(tensor.shape));
            // Readers use the data in place, so every tensor must begin at a multiple of its element's size.
            if (begin % dtype_info(tensor.dtype).size != 0)
                fail_at(tensor.name, "its data would not be aligned");
            if (header.contains(tensor.name)) fail_at(tensor.name, "the name occurs twice");
            header[tensor.name] = {{"dtype", dtype_info(tensor.dtype).name},
                                   {"shape", tensor.shape},
                                   {"data_offsets", {begin, end}}};
            pending_.push_back({tensor.name, (uint64_t)bytes});
        }
        std::string text = header.dump();
        text.resize((text.size() + 7) / 8 * 8, ' ');
        const uint64_t size = text.size();
        file_.write(&size, 8);
        file_.write(text.data(), text.size());
        skip_finished();
    }

    // Appends the next bytes: a whole tensor or a piece of one, but not bytes of two tensors.
    void append(const void* data /*(bytes)*/, size_t bytes) {
        if (bytes == 0) return;
        if (current_ == pending_.size()) fail(file_.path(), ": ", bytes, " bytes after the last tensor");
        Pending& tensor = pending_[current_];
        if (bytes > tensor.bytes)
            fail_at(tensor.name, bytes, " more bytes of data, expected at most ", tensor.bytes);
        file_.write(data, bytes);
        tensor.bytes -= bytes;
        skip_finished();
    }

    // Closes the file, which must be complete.
    void close() {
        if (current_ < pending_.size())
            fail_at(pending_[current_].name, pending_[current_].bytes, " bytes of data were not written");
        file_.close();
    }

  private:
    struct Pending {
        std::string name;
        uint64_t bytes;  // bytes that are not yet written
    };

    template <class... Parts>
    [[noreturn]] void fail_at(const std::string& tensor, const Parts&... parts) const {
        fail(file_.path(), ": tensor ", shown(tensor), ": ", parts...);
    }
    void skip_finished() {
        while (current_ < pending_.size() && pending_[current_].bytes == 0) current_++;
    }

    FileWriter& file_;
    std::vector<Pending> pending_;
    size_t current_ = 0;
};
