// A checkpoint is a folder OUT/step_00001000/ with config.json, model.safetensors, tokenizer.json,
// optimizer.safetensors and trainer.json, which has the sizes and CRC-32s of the others and its own CRC-32.
//
// A checkpoint is whole or absent: it is written into OUT/step_00001000.tmp, synced, and then renamed. A
// crash leaves a folder with the .tmp name, which is reported and never used. A folder with a final name that
// does not match its trainer.json (because of a bad disk, or because somebody edited a file) is reported,
// too, and the checkpoint before it is used.
//
// If several ranks share the optimizer's arrays (llmc/sharding.h), each writes its pieces into a file of its
// own, such as optimizer-00002-of-00004.safetensors. A tensor that is cut has its pieces there, as
// "m.wte.weight[480:960]": elements 480 to 959, as a vector. Any number of ranks can load any number of such
// files.
//
// A folder without trainer.json is a model, such as Hugging Face's GPT-2. It has config.json, and either
// model.safetensors or its shards and their index.
//
// A running training deletes its old checkpoints while other programs may read them. So all files of a
// checkpoint are opened before any is used, because an open file can be read to its end even if it is
// deleted.
#pragma once
#include <fcntl.h>
#include <sys/file.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <system_error>
#include <unordered_set>
#include <utility>
#include <vector>

#include "llmc/communicator.h"
#include "llmc/config_json.h"
#include "llmc/error.h"
#include "llmc/files.h"
#include "llmc/model.h"
#include "llmc/parameters.h"
#include "llmc/safetensors.h"

constexpr int kCheckpointVersion = 1;
constexpr const char* kOptimizerFile = "optimizer.safetensors";  // if one rank has written all of it

inline std::string join_path(const std::string& folder, const std::string& name) {
    return (std::filesystem::path(folder) / name).string();
}

inline std::string checkpoint_name(int step) {
    char name[32];
    snprintf(name, sizeof(name), "step_%08d", step);
    return name;
}

// The step of the checkpoint with this name; -1 if it is not the name of a checkpoint.
inline int step_of_name(const std::string& name) {
    int step = -1;
    return sscanf(name.c_str(), "step_%d", &step) == 1 && name == checkpoint_name(step) ? step : -1;
}

// The steps of the folders in `out` that have the final name of a checkpoint, newest first.
inline std::vector<int> checkpoint_steps(const std::string& out) {
    std::vector<int> steps;
    if (!path_exists(out)) return steps;
    for (const std::string& name : names_in_folder(out))
        if (int step = step_of_name(name); step >= 0) steps.push_back(step);
    std::sort(steps.rbegin(), steps.rend());
    return steps;
}

// What a run needs besides its tensors so that it continues as if it had not stopped.
struct TrainerState {
    int step = 0;         // number of steps done
    int64_t samples = 0;  // number of sequences consumed, which is the whole state of the data loader
    nlohmann::json options;
    std::string program;  // program_version() of the program that wrote it; empty if the file has none
};

namespace checkpoint_detail {

struct Written {
    std::string name;
    uint64_t size;
    uint32_t crc;
};

// The name of a piece of a tensor in a file, and its shape. The elements are counted from the tensor's begin.
inline TensorSpec piece_spec(const std::string& prefix, const ParameterTensor& t, Slice piece) {
    if (piece.size() == t.size) return {prefix + t.name, DType::F32, t.shape};
    return {str(prefix, t.name, "[", piece.begin, ":", piece.end, "]"), DType::F32, {(int64_t)piece.size()}};
}

// Writes what the slices have of the tensors of the table, once for each prefix, which is put before their
// names. read(i, tensor, piece, out) gives the values of a piece for the i-th prefix. It is called for every
// piece, even if nothing can be written, because other ranks may take part in it.
//   writes: whether this rank writes the file
template <class Read>
std::optional<Written> write_tensors(bool writes, const std::string& folder, const std::string& name,
                                     const ParameterTable& table, const std::vector<Slice>& slices,
                                     const std::vector<std::string>& prefixes, Read read) {
    struct Piece {
        size_t prefix;
        const ParameterTensor* tensor;
        Slice elements;  // of the array
    };
    std::vector<Piece> pieces;
    std::vector<TensorSpec> infos;
    for (size_t i = 0; i < prefixes.size(); i++)
        for (const ParameterTensor& t : table.tensors)
            for (Slice slice : slices) {
                const Slice piece = overlap(slice, t.slice());
                if (piece.size() == 0) continue;
                pieces.push_back({i, &t, piece});
                infos.push_back(piece_spec(prefixes[i], t, {piece.begin - t.offset, piece.end - t.offset}));
            }
    std::exception_ptr failure;
    auto attempt = [&](auto action) {
        if (!writes || failure) return;
        try {
            action();
        } catch (const Error&) {
            failure = std::current_exception();
        }
    };
    std::optional<FileWriter> file;
    std::optional<SafetensorsWriter> writer;
    attempt([&] {
        file.emplace(join_path(folder, name));
        writer.emplace(*file, infos);
    });
    std::vector<float> values;
    for (const Piece& piece : pieces) {
        values.resize(piece.elements.size());
        read(piece.prefix, *piece.tensor, piece.elements, values.data());
        attempt([&] { writer->append(values.data(), values.size() * sizeof(float)); });
    }
    attempt([&] { writer->close(); });
    if (failure) std::rethrow_exception(failure);
    if (!writes) return std::nullopt;
    return Written{name, file->size(), file->crc32()};
}

// The checksum of trainer.json that is in it. It covers the object without that key, with sorted keys.
inline uint32_t json_crc32(nlohmann::json json) {
    json.erase("crc32");
    std::string text = json.dump();
    return crc32_of(reinterpret_cast<const std::byte*>(text.data()), text.size());
}

// The name of the file of one of several ranks.
inline std::string optimizer_file(int rank, int ranks) {
    char name[64];
    snprintf(name, sizeof(name), "optimizer-%05d-of-%05d.safetensors", rank + 1, ranks);
    return name;
}

inline Written write_file(const std::string& folder, const std::string& name, const std::string& text) {
    FileWriter file(join_path(folder, name));
    file.write(text.data(), text.size());
    file.close();
    return {name, file.size(), file.crc32()};
}

}  // namespace checkpoint_detail

// Writes OUT/step_<step>. `tokenizer` is the text of tokenizer.json, empty if there is none. A failure leaves
// the folder OUT as it was before. All ranks must call this. Rank 0 writes everything, except that each rank
// writes its pieces of the optimizer's arrays if it has only pieces.
inline std::string write_checkpoint(const std::string& out, const Model& model, const Optimizer& optimizer,
                                    const TrainerState& state, const std::string& tokenizer,
                                    Communicator& communicator) {
    namespace fs = std::filesystem;
    using namespace checkpoint_detail;
    std::string folder = join_path(out, checkpoint_name(state.step)), temporary = folder + ".tmp";
    std::error_code ignored;
    const bool is_root = communicator.rank == 0, is_sharded = model.sharding.level > 0;
    try {
        together(communicator, [&] {
            if (!is_root) return;
            fs::remove_all(temporary, ignored);
            std::error_code error;
            fs::create_directories(temporary, error);
            if (error) fail(temporary, ": cannot create: ", error.message());
        });
        nlohmann::json files = nlohmann::json::object();
        together(communicator, [&] {
            auto add = [&](const std::optional<Written>& f) {
                if (f) files[f->name] = {{"size", f->size}, {"crc32", f->crc}};
            };
            add(write_tensors(is_root, temporary, "model.safetensors", model.table, {model.table.all()}, {""},
                              [&](size_t, const ParameterTensor& t, Slice, float* out) {
                                  collectively([&] { model.gather(communicator, t, out); });
                              }));
            if (is_root) {
                add(write_file(temporary, "config.json", config_to_json(model.config).dump(2) + "\n"));
                if (!tokenizer.empty()) add(write_file(temporary, "tokenizer.json", tokenizer));
            }
            if (!is_root && !is_sharded) return;
            std::string name = kOptimizerFile;
            if (is_sharded) name = optimizer_file(communicator.rank, communicator.ranks);
            // All ranks keep the vectors, so only rank 0 writes them.
            std::vector<Slice> slices = model.sharding.counted;
            std::vector<std::string> prefixes;
            for (const std::string& array : optimizer.arrays()) prefixes.push_back(array + ".");
            add(write_tensors(true, temporary, name, model.table, slices, prefixes,
                              [&](size_t array, const ParameterTensor&, Slice piece, float* out) {
                                  optimizer.read(array, piece, out);
                              }));
        });
        const std::vector<std::string> written = communicator.gather(files.dump());
        together(communicator, [&] {
            if (!is_root) return;
            nlohmann::json trainer = {{"version", kCheckpointVersion},
                                      {"step", state.step},
                                      {"samples", state.samples},
                                      {"options", state.options},
                                      {"program", state.program}};
            for (int rank = 0; rank < communicator.ranks; rank++) {
                const nlohmann::json of_rank = nlohmann::json::parse(written[rank]);
                for (const auto& [name, file] : of_rank.items()) {
                    const std::string path = join_path(temporary, name);
                    std::error_code error;
                    if (fs::file_size(path, error) != file.at("size") || error)
                        fail(path, ": rank ", rank,
                             " has written it, but rank 0 does not see it: expected --out in a file system "
                             "that all ranks share");
                    trainer["files"][name] = file;
                }
            }
            trainer["crc32"] = json_crc32(trainer);
            write_file(temporary, "trainer.json", trainer.dump(2) + "\n");
            sync_folder(temporary);
            rename_synced(temporary, folder);
        });
    } catch (...) {
        if (is_root) fs::remove_all(temporary, ignored);
        throw;
    }
    return folder;
}

// The paths of the folders in `out` that have the temporary name of a checkpoint. They are being written or
// deleted, or a program was stopped while it did that.
inline std::vector<std::string> unfinished_checkpoints(const std::string& out) {
    std::vector<std::string> paths;
    if (!path_exists(out)) return paths;
    for (const std::string& name : names_in_folder(out))
        if (name.ends_with(".tmp") && step_of_name(name.substr(0, name.size() - 4)) >= 0)
            paths.push_back(join_path(out, name));
    std::sort(paths.begin(), paths.end());
    return paths;
}

// This process must have locked the run. What cannot be deleted gives a warning and is tried again next time.
inline void delete_unfinished_checkpoints(const std::string& out) {
    for (const std::string& path : unfinished_checkpoints(out)) {
        std::error_code error;
        std::filesystem::remove_all(path, error);
        if (error) warn(path, ": cannot delete: ", error.message());
    }
}

// Deletes all but the newest `keep` checkpoints; 0 keeps all.
inline void delete_old_checkpoints(const std::string& out, int keep) {
    std::vector<int> steps = checkpoint_steps(out);
    for (size_t i = keep; keep > 0 && i < steps.size(); i++) {
        // It is renamed first, because a half deleted folder must not have the name of a checkpoint.
        std::string folder = join_path(out, checkpoint_name(steps[i]));
        std::error_code error;
        std::filesystem::rename(folder, folder + ".tmp", error);
        if (error) warn(folder, ": cannot delete: ", error.message());
    }
    delete_unfinished_checkpoints(out);
}

// Renames the checkpoints of steps after `step` to step_<step>.old, so that nothing uses them. A run that
// resumes from `step` calls this. The later checkpoints are damaged, or the user has abandoned them by
// resuming from an earlier one.
inline void set_aside_later_checkpoints(const std::string& out, int step) {
    for (int later : checkpoint_steps(out)) {
        if (later <= step) continue;
        std::string folder = join_path(out, checkpoint_name(later)), aside = folder + ".old";
        std::error_code ignored;
        std::filesystem::remove_all(aside, ignored);
        rename_synced(folder, aside);
        printf("set aside as %s\n", printable(aside).c_str());
    }
}

// A folder with a model in it. The constructor checks all of it before any memory is taken for the model: it
// compares config.json with the names and shapes in the files of weights, and, if there is a trainer.json,
// all files with that.
class Checkpoint {
  public:
    std::string folder;
    GPTConfig config;
    std::optional<TrainerState> trainer;  // none if the folder has only a model

    explicit Checkpoint(const std::string& folder) : folder(folder), files_(std::make_shared<Files>()) {
        if (has("trainer.json")) read_trainer(open("trainer.json"));
        const MappedFile& config_file = open("config.json");
        if (has("model.safetensors"))
            files_->weights.emplace(SafetensorsFile(take("model.safetensors")));
        else if (has("model.safetensors.index.json"))
            files_->weights.emplace(open("model.safetensors.index.json"), [&](const std::string& name) {
                return MappedFile(join_path(folder, name));
            });
        else
            fail(folder, ": neither model.safetensors nor model.safetensors.index.json is in this folder");
        for (const std::string& name : optimizer_names_) files_->optimizer.emplace_back(take(name));
        if (has("tokenizer.json")) open("tokenizer.json");
        config = config_from_json(parse_json(config_file.text(), config_file.path()), config_file.path());
        check_tensors();
    }

    // tokenizer.json; null if there is none.
    const MappedFile* tokenizer() const {
        const auto found = files_->opened.find("tokenizer.json");
        return found == files_->opened.end() ? nullptr : &found->second;
    }

    // Of all contents.
    uint32_t checksum() const {
        std::string text;
        if (trainer) {
            text = files_->opened.at("trainer.json").text();  // it has the checksums of the other files
        } else {
            for (const SafetensorsFile& file : files_->weights->files())
                for (const TensorView& tensor : file.tensors())
                    text += str(tensor.name, crc32_of((const std::byte*)tensor.data, tensor.bytes));
        }
        return crc32_of((const std::byte*)text.data(), text.size());
    }

    // Loads the weights into `model`, which must have been made from this config.
    void load_weights(Model& model) const {
        load(model.table, *files_->weights, files_->prefix,
             [&](const ParameterTensor& t, const float* in) { model.write(Store::weights, t, in); });
    }

    void load_optimizer(const Model& model, Optimizer& optimizer) const {
        std::vector<float> values;
        for (size_t array = 0; array < optimizer.arrays().size(); array++)
            for (const ParameterTensor& t : model.table.tensors) {
                values.resize(t.size);
                for (const Piece& piece : files_->pieces.at(optimizer.arrays()[array] + "." + t.name))
                    piece.file->read_floats(piece.spec.name, piece.spec.shape,
                                            values.data() + piece.elements.begin);
                optimizer.write(array, t.slice(), values.data());
            }
    }

    // Closes the files, after which nothing can be loaded. A deleted file takes space on the disk as long as
    // it is open.
    void close() const { *files_ = {}; }

  private:
    struct Piece {
        Slice elements;  // of the tensor
        TensorSpec spec;
        const SafetensorsFile* file;
    };
    struct Files {
        std::map<std::string, MappedFile> opened;  // by name
        std::optional<SafetensorsSet> weights;
        std::vector<SafetensorsFile> optimizer;            // one or more if there is a `trainer`
        std::map<std::string, std::vector<Piece>> pieces;  // of the optimizer's tensors, which they cover
        std::string prefix;                                // stands before the names of the weights
    };
    std::shared_ptr<Files> files_;              // all copies of this object share it
    std::vector<std::string> optimizer_names_;  // of the files; none without a `trainer`

    MappedFile& open(const std::string& name) const {
        const auto found = files_->opened.find(name);
        if (found != files_->opened.end()) return found->second;
        return files_->opened.emplace(name, MappedFile(join_path(folder, name))).first->second;
    }
    MappedFile take(const std::string& name) const {
        MappedFile file = std::move(open(name));
        files_->opened.erase(name);
        return file;
    }
    bool has(const std::string& name) const {
        return files_->opened.count(name) > 0 || path_exists(join_path(folder, name));
    }

    template <class Tensors, class Write>
    static void load(const ParameterTable& table, const Tensors& file, const std::string& prefix,
                     Write write) {
        std::vector<float> values;
        for (const ParameterTensor& t : table.tensors) {
            values.resize(t.size);
            file.read_floats(prefix + t.name, t.shape, values.data());
            write(t, values.data());
        }
    }

    void check_tensors() const {
        const ParameterTable table(config, config.vocab_size);
        const SafetensorsSet& weights = *files_->weights;
        const bool prefixed = !weights.find("wte.weight") && weights.find("transformer.wte.weight");
        const std::string prefix = files_->prefix = prefixed ? "transformer." : "";
        std::unordered_set<std::string> known;
        for (const ParameterTensor& t : table.tensors) {
            weights.expect(prefix + t.name, t.shape);
            known.insert(prefix + t.name);
        }
        // Files of Hugging Face may also have the causal mask, and the embedding under a second name.
        for (int l = 0; l < config.layers; l++)
            for (const char* mask : {".attn.bias", ".attn.masked_bias"})
                known.insert(str(prefix, "h.", l, mask));
        known.insert("lm_head.weight");
        for (const SafetensorsFile& file : weights.files()) check_known(file, known);
        const TensorView *head = weights.find("lm_head.weight"), *wte = weights.find(prefix + "wte.weight");
        if (head && (head->shape != wte->shape || head->dtype != wte->dtype ||
                     std::memcmp(head->data, wte->data, wte->bytes) != 0))
            fail(weights.path(), ": lm_head.weight is not the same as ", prefix,
                 "wte.weight; this trainer needs them to be the same");
        if (!trainer) return;
        known.clear();
        for (const std::string array : kAdamWArrays)
            for (const ParameterTensor& t : table.tensors) find_pieces(array + ".", t, known);
        for (const SafetensorsFile& file : files_->optimizer) check_known(file, known);
    }

    // Finds the pieces of a tensor of the optimizer in its files, checks that they cover it, and adds their
    // names to `known`.
    void find_pieces(const std::string& prefix, const ParameterTensor& t,
                     std::unordered_set<std::string>& known) const {
        const std::string name = prefix + t.name;
        std::vector<Piece>& pieces = files_->pieces[name];
        auto add = [&](Slice elements, const SafetensorsFile& file) {
            const TensorSpec spec = checkpoint_detail::piece_spec(prefix, t, elements);
            file.expect(spec.name, spec.shape);
            known.insert(spec.name);
            pieces.push_back({elements, spec, &file});
        };
        if (optimizer_names_[0] == kOptimizerFile) return add({0, t.size}, files_->optimizer[0]);
        for (const SafetensorsFile& file : files_->optimizer)
            for (const TensorView& tensor : file.tensors()) {
                Slice elements = {0, t.size};
                if (tensor.name != name &&
                    (!tensor.name.starts_with(name + "[") ||
                     sscanf(tensor.name.c_str() + name.size(), "[%zu:%zu]", &elements.begin, &elements.end) !=
                         2 ||
                     elements.begin >= elements.end || elements.end > t.size ||
                     tensor.name != checkpoint_detail::piece_spec(prefix, t, elements).name))
                    continue;
                add(elements, file);
            }
        std::sort(pieces.begin(), pieces.end(),
                  [](const Piece& a, const Piece& b) { return a.elements.begin < b.elements.begin; });
        size_t end = 0;
        for (const Piece& piece : pieces)
            if (piece.elements.begin <= end) end = std::max(end, piece.elements.end);
        if (end != t.size)
            fail(folder, ": the files of the optimizer lack ", name, " from element ", end, " on");
    }

    void check_known(const SafetensorsFile& file, const std::unordered_set<std::string>& known) const {
        for (const TensorView& tensor : file.tensors())
            if (!known.count(tensor.name))
                fail(file.path(), ": tensor ", shown(tensor.name), " ", shape_text(tensor.shape),
                     " does not belong to the model that ", join_path(folder, "config.json"), " describes");
    }

    void read_trainer(const MappedFile& file) {
        const std::string& path = file.path();
        const nlohmann::json json = parse_json(file.text(), path);
        if (!json.is_object()) fail(path, ": expected a JSON object");
        const int64_t version = json_integer(json, "version", 0, INT64_MAX, path);
        if (version != kCheckpointVersion)
            fail(path, ": version ", version, ", expected ", kCheckpointVersion);
        if (json_integer(json, "crc32", 0, UINT32_MAX, path) != checkpoint_detail::json_crc32(json))
            fail(path, ": its checksum is not the one in the file: the file is damaged");
        const nlohmann::json files = json.value("files", nlohmann::json());
        if (!files.is_object()) fail(path, ": \"files\" is ", brief(files), ", expected an object");
        for (const auto& [name, expected] : files.items()) {
            if (!is_file_name(name) || !expected.is_object())
                fail(path, ": \"files\" has ", shown(name), ": ", brief(expected),
                     ", expected the name of a file with its size and crc32");
            open(name);
        }
        for (const auto& [name, expected] : files.items()) {
            const MappedFile& found = open(name);
            const int64_t size = json_integer(expected, "size", 0, INT64_MAX, path);
            if (found.size() != (uint64_t)size)
                fail(found.path(), ": ", found.size(), " bytes, but trainer.json says ", size);
            if (crc32_of(found.data(), found.size()) != json_integer(expected, "crc32", 0, UINT32_MAX, path))
                fail(found.path(), ": its checksum is not the one in trainer.json: the file is damaged");
        }
        for (const auto& [name, expected] : files.items())
            if (name.starts_with("optimizer-")) optimizer_names_.push_back(name);
        if (optimizer_names_.empty()) optimizer_names_ = {kOptimizerFile};
        trainer.emplace();
        trainer->step = (int)json_integer(json, "step", 0, INT_MAX, path);
        trainer->samples = json_integer(json, "samples", 0, INT64_MAX, path);
        trainer->options = json.value("options", nlohmann::json());
        const nlohmann::json program = json.value("program", nlohmann::json());
        if (program.is_string()) trainer->program = program.get<std::string>();
    }
};

// Deletes what stopped runs have left in `out`, which this process must have locked.
inline void delete_leftovers(const std::string& out) {
    for (const std::string& path : unfinished_checkpoints(out))
        warn(path, ": incomplete, left by a run that was stopped; deleted");
    delete_unfinished_checkpoints(out);
}

// The newest whole checkpoint of a run; none if the run has written none. A broken checkpoint gives a warning
// on stderr. It is an error if all of them are broken.
inline std::optional<Checkpoint> newest_checkpoint(const std::string& out) {
    const std::vector<int> steps = checkpoint_steps(out);
    for (int step : steps) {
        std::string folder = join_path(out, checkpoint_name(step));
        try {
            Checkpoint checkpoint(folder);
            if (!checkpoint.trainer) fail(folder, ": trainer.json is missing");
            return checkpoint;
        } catch (const Error& e) {
            // A running training may have written a newer checkpoint and then deleted this one.
            const std::vector<int> now = checkpoint_steps(out);
            if (std::find(now.begin(), now.end(), step) == now.end()) return newest_checkpoint(out);
            warn("ignored a broken checkpoint: ", e.what());
        }
    }
    if (!steps.empty()) fail(out, ": all of its ", steps.size(), " checkpoints are broken");
    return std::nullopt;
}

// Whether a process is training in this folder. It has a lock on the folder for all that time
// (llmc/run_folder.h).
inline bool is_training_in(const std::string& out) {
    const Descriptor folder(::open(out.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    return folder.fd >= 0 && ::flock(folder.fd, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
}

// Opens a model for generation or evaluation: the folder itself, or the newest checkpoint of a run.
inline Checkpoint open_model(const std::string& folder) {
    std::error_code error;
    if (!path_exists(folder) || !std::filesystem::is_directory(folder, error))
        fail(folder, ": not a folder, expected a checkpoint or a model");
    if (path_exists(join_path(folder, "config.json"))) return Checkpoint(folder);
    const std::vector<std::string> unfinished = unfinished_checkpoints(folder);
    if (!unfinished.empty() && !is_training_in(folder))
        for (const std::string& path : unfinished)
            if (path_exists(path)) warn(path, ": incomplete, left by a run that was stopped; ignored");
    if (std::optional<Checkpoint> newest = newest_checkpoint(folder)) return *newest;
    fail(folder, ": there is neither a config.json nor a checkpoint in this folder");
}
