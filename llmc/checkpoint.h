// A checkpoint is a folder OUT/step_00001000/ with config.json, model.safetensors, tokenizer.json,
// optimizer.safetensors and trainer.json, which has the sizes and CRC-32s of the others and its own CRC-32.
//
// A checkpoint is whole or absent: it is written into OUT/step_00001000.tmp, synced, and then renamed. A
// crash leaves a folder with the .tmp name, which is reported and never used. A folder with a final name that
// does not match its trainer.json (because of a bad disk, or because somebody edited a file) is reported,
// too, and the checkpoint before it is used.
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

#include "llmc/config_json.h"
#include "llmc/error.h"
#include "llmc/files.h"
#include "llmc/model.h"
#include "llmc/parameters.h"
#include "llmc/safetensors.h"

constexpr int kCheckpointVersion = 1;

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

// Writes the tensors of the table once for each prefix, which is put before their names. read(i, tensor, out)
// gives the values for the i-th prefix.
template <class Read>
Written write_tensors(const std::string& folder, const std::string& name, const ParameterTable& table,
                      const std::vector<std::string>& prefixes, Read read) {
    std::vector<TensorSpec> infos;
    for (const std::string& prefix : prefixes)
        for (const ParameterTensor& t : table.tensors)
            infos.push_back({prefix + t.name, DType::F32, t.shape});
    FileWriter file(join_path(folder, name));
    SafetensorsWriter writer(file, infos, {{"format", "pt"}});
    std::vector<float> values;
    for (size_t i = 0; i < prefixes.size(); i++)
        for (const ParameterTensor& t : table.tensors) {
            values.resize(t.size);
            read(i, t, values.data());
            writer.append(values.data(), values.size() * sizeof(float));
        }
    writer.close();
    return {name, file.size(), file.crc32()};
}

// The checksum of trainer.json that is in it. It covers the object without that key, with sorted keys.
inline uint32_t json_crc32(nlohmann::json json) {
    json.erase("crc32");
    std::string text = json.dump();
    return crc32_of(reinterpret_cast<const std::byte*>(text.data()), text.size());
}

inline Written write_file(const std::string& folder, const std::string& name, const std::string& text) {
    FileWriter file(join_path(folder, name));
    file.write(text.data(), text.size());
    file.close();
    return {name, file.size(), file.crc32()};
}

}  // namespace checkpoint_detail

// Writes OUT/step_<step>. `tokenizer` is the text of tokenizer.json, empty if there is none. A failure leaves
// the folder OUT as it was before.
inline std::string write_checkpoint(const std::string& out, const Model& model, const Optimizer& optimizer,
                                    const TrainerState& state, const std::string& tokenizer) {
    namespace fs = std::filesystem;
    using namespace checkpoint_detail;
    std::string folder = join_path(out, checkpoint_name(state.step)), temporary = folder + ".tmp";
    std::error_code ignored;
    try {
        fs::remove_all(temporary, ignored);
        std::error_code error;
        fs::create_directories(temporary, error);
        if (error) fail(temporary, ": cannot create: ", error.message());
        std::vector<Written> files;
        files.push_back(write_file(temporary, "config.json", config_to_json(model.config).dump(2) + "\n"));
        files.push_back(write_tensors(
            temporary, "model.safetensors", model.table, {""},
            [&](size_t, const ParameterTensor& t, float* out) { model.read(Store::weights, t, out); }));
        if (!tokenizer.empty()) files.push_back(write_file(temporary, "tokenizer.json", tokenizer));
        std::vector<std::string> prefixes;
        for (const std::string& array : optimizer.arrays()) prefixes.push_back(array + ".");
        files.push_back(write_tensors(
            temporary, "optimizer.safetensors", model.table, prefixes,
            [&](size_t array, const ParameterTensor& t, float* out) { optimizer.read(array, t, out); }));
        nlohmann::json trainer = {{"version", kCheckpointVersion},
                                  {"step", state.step},
                                  {"samples", state.samples},
                                  {"options", state.options},
                                  {"program", state.program}};
        for (const Written& f : files) trainer["files"][f.name] = {{"size", f.size}, {"crc32", f.crc}};
        trainer["crc32"] = json_crc32(trainer);
        write_file(temporary, "trainer.json", trainer.dump(2) + "\n");
        sync_folder(temporary);
        rename_synced(temporary, folder);
    } catch (...) {
        fs::remove_all(temporary, ignored);
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
        if (trainer) files_->optimizer.emplace(SafetensorsFile(take("optimizer.safetensors")));
        if (has("tokenizer.json")) open("tokenizer.json");
        config = config_from_json(parse_json(config_file.text(), config_file.path()), config_file.path());
        check_tensors();
    }

    // tokenizer.json; null if there is none.
    const MappedFile* tokenizer() const {
        const auto found = files_->opened.find("tokenizer.json");
        return found == files_->opened.end() ? nullptr : &found->second;
    }

    // Loads the weights into `model`, which must have been made from this config.
    void load_weights(Model& model) const {
        load(model.table, *files_->weights, files_->prefix,
             [&](const ParameterTensor& t, const float* in) { model.write(Store::weights, t, in); });
    }

    void load_optimizer(const Model& model, Optimizer& optimizer) const {
        for (size_t array = 0; array < optimizer.arrays().size(); array++)
            load(model.table, *files_->optimizer, optimizer.arrays()[array] + ".",
                 [&](const ParameterTensor& t, const float* in) { optimizer.write(array, t, in); });
    }

    // Closes the files, after which nothing can be loaded. A deleted file takes space on the disk as long as
    // it is open.
    void close() const { *files_ = {}; }

  private:
    struct Files {
        std::map<std::string, MappedFile> opened;  // by name
        std::optional<SafetensorsSet> weights;
        std::optional<SafetensorsFile> optimizer;  // present if `trainer` is
        std::string prefix;                        // stands before the names of the weights
    };
    std::shared_ptr<Files> files_;  // all copies of this object share it

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
            for (const ParameterTensor& t : table.tensors) {
                files_->optimizer->expect(array + "." + t.name, t.shape);
                known.insert(array + "." + t.name);
            }
        check_known(*files_->optimizer, known);
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
