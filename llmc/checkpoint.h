// Checkpoint folders: OUT/step_00001000/ with config.json, model.safetensors, tokenizer.json,
// optimizer.safetensors and trainer.json, which holds the sizes and CRC-32s of the others and its own.
//
// A checkpoint is whole or absent: it is written into OUT/step_00001000.tmp, synced, and then given its name.
// What a crash leaves is a folder with the .tmp name, which is reported and never used. A folder with its
// final name that does not match its trainer.json (a bad disk, a stray edit) is reported too, and the one
// before it used.
//
// A folder without trainer.json, with config.json and model.safetensors, is a model: Hugging Face's GPT-2,
// for one.
#pragma once
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <system_error>
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

// The steps of the folders of `out` with a checkpoint's final name, newest first.
inline std::vector<int> checkpoint_steps(const std::string& out) {
    std::vector<int> steps;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(out, error)) {
        std::string name = entry.path().filename().string();
        int step = 0, length = 0;
        if (sscanf(name.c_str(), "step_%d%n", &step, &length) == 1 && name == checkpoint_name(step))
            steps.push_back(step);
    }
    std::sort(steps.rbegin(), steps.rend());
    return steps;
}

// What a run needs besides tensors to go on as if it had not stopped.
struct TrainerState {
    int step = 0;         // steps done
    int64_t samples = 0;  // sequences consumed: the data loader's state
    nlohmann::json options;
};

namespace checkpoint_detail {

struct Written {
    std::string name;
    uint64_t size;
    uint32_t crc;
};

// Tensors of the table from `store`, their names after `prefix`.
inline Written write_tensors(const std::string& folder, const std::string& name, const Model& model,
                             const std::vector<std::pair<std::string, Store>>& stores) {
    std::vector<TensorSpec> infos;
    for (const auto& [prefix, store] : stores)
        for (const ParameterTensor& t : model.table.tensors)
            infos.push_back({prefix + t.name, DType::F32, t.shape});
    FileWriter file(join_path(folder, name));
    SafetensorsWriter writer(file, infos, {{"format", "pt"}});
    std::vector<float> values;
    for (const auto& [prefix, store] : stores)
        for (const ParameterTensor& t : model.table.tensors) {
            values.resize(t.size);
            model.read(store, t, values.data());
            writer.append(values.data(), values.size() * sizeof(float));
        }
    writer.close();
    return {name, file.size(), file.crc32()};
}

// trainer.json's checksum of itself: of the object without that key, keys sorted.
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

// Writes OUT/step_<step>. `tokenizer` is the text of tokenizer.json, empty where there is none. After a
// failure the folder is as before.
inline std::string write_checkpoint(const std::string& out, const Model& model, const TrainerState& state,
                                    const std::string& tokenizer) {
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
        files.push_back(write_tensors(temporary, "model.safetensors", model, {{"", Store::weights}}));
        if (!tokenizer.empty()) files.push_back(write_file(temporary, "tokenizer.json", tokenizer));
        files.push_back(
            write_tensors(temporary, "optimizer.safetensors", model, {{"m.", Store::m}, {"v.", Store::v}}));
        nlohmann::json trainer = {{"version", kCheckpointVersion},
                                  {"step", state.step},
                                  {"samples", state.samples},
                                  {"options", state.options}};
        for (const Written& f : files) trainer["files"][f.name] = {{"size", f.size}, {"crc32", f.crc}};
        trainer["crc32"] = json_crc32(trainer);
        write_file(temporary, "trainer.json", trainer.dump(2) + "\n");
        sync_folder(temporary);
        rename_synced(temporary, folder);
    } catch (const fs::filesystem_error& e) {
        fs::remove_all(temporary, ignored);
        fail(e.what());
    } catch (...) {
        fs::remove_all(temporary, ignored);
        throw;
    }
    return folder;
}

// Deletes all but the newest `keep` checkpoints; 0 keeps all.
inline void delete_old_checkpoints(const std::string& out, int keep) {
    std::vector<int> steps = checkpoint_steps(out);
    for (size_t i = keep; keep > 0 && i < steps.size(); i++) {
        // Renamed first: a folder half deleted must not bear a checkpoint's name.
        std::string folder = join_path(out, checkpoint_name(steps[i]));
        std::error_code error;
        std::filesystem::rename(folder, folder + ".tmp", error);
        if (!error) std::filesystem::remove_all(folder + ".tmp", error);
        if (error)
            fprintf(stderr, "warning: %s: cannot delete: %s\n", folder.c_str(), error.message().c_str());
    }
}

// Before a run goes on from `step`: checkpoints of later steps, which are damaged or of a run that is given
// up by going further back, become step_<step>.old and count no more.
inline void set_aside_later_checkpoints(const std::string& out, int step) {
    for (int later : checkpoint_steps(out)) {
        if (later <= step) continue;
        std::string folder = join_path(out, checkpoint_name(later)), aside = folder + ".old";
        std::error_code ignored;
        std::filesystem::remove_all(aside, ignored);
        rename_synced(folder, aside);
        printf("set aside as %s\n", aside.c_str());
    }
}

// A folder with a model in it, checked against its trainer.json where it has one.
class Checkpoint {
  public:
    std::string folder;
    GPTConfig config;
    std::optional<TrainerState> trainer;  // absent in a folder that holds only a model

    explicit Checkpoint(const std::string& folder) : folder(folder) {
        if (!std::filesystem::is_directory(folder))
            fail(folder, ": not a folder, expected a checkpoint or a model");
        std::string path = join_path(folder, "trainer.json");
        if (std::filesystem::exists(path)) read_trainer(path);
        path = join_path(folder, "config.json");
        config = config_from_json(read_json(path), path);
    }

    // Weights into `model`, whose config is this one's.
    void load_weights(Model& model) const {
        SafetensorsFile file(join_path(folder, "model.safetensors"));
        bool prefixed = !file.find("wte.weight") && file.find("transformer.wte.weight");
        load(model, file, prefixed ? "transformer." : "", Store::weights);
    }

    void load_optimizer(Model& model) const {
        SafetensorsFile file(join_path(folder, "optimizer.safetensors"));
        load(model, file, "m.", Store::m);
        load(model, file, "v.", Store::v);
    }

  private:
    static void load(Model& model, const SafetensorsFile& file, const std::string& prefix, Store store) {
        std::vector<float> values;
        for (const ParameterTensor& t : model.table.tensors) {
            values.resize(t.size);
            file.read_floats(prefix + t.name, t.shape, values.data());
            model.write(store, t, values.data());
        }
    }

    void read_trainer(const std::string& path) {
        nlohmann::json json = read_json(path);
        try {
            if (json.at("version") != kCheckpointVersion)
                fail(path, ": version ", json.at("version").dump(), ", expected ", kCheckpointVersion);
            if (json.at("crc32") != checkpoint_detail::json_crc32(json))
                fail(path, ": its checksum is not the one it names: the file is damaged");
            for (const auto& [name, expected] : json.at("files").items()) {
                if (name.empty() || name.find('/') != std::string::npos)
                    fail(path, ": bad file name \"", name, "\"");
                MappedFile file(join_path(folder, name));
                if (file.size() != expected.at("size").get<uint64_t>())
                    fail(file.path(), ": ", file.size(), " bytes, but trainer.json says ",
                         expected.at("size").dump());
                if (crc32_of(file.data(), file.size()) != expected.at("crc32").get<uint32_t>())
                    fail(file.path(), ": its checksum is not the one in trainer.json: the file is damaged");
            }
            trainer.emplace();
            trainer->step = json.at("step").get<int>();
            trainer->samples = json.at("samples").get<int64_t>();
            trainer->options = json.at("options");
            if (trainer->step < 0 || trainer->samples < 0) fail(path, ": negative step or samples");
        } catch (const nlohmann::json::exception& e) {
            fail(path, ": not a checkpoint's trainer.json: ", e.what());
        }
    }
};

inline bool is_leftover(const std::filesystem::directory_entry& entry) {
    std::string name = entry.path().filename().string();
    return name.starts_with("step_") && name.ends_with(".tmp") && entry.is_directory();
}

// What interrupted writes left, which newest_checkpoint reports.
inline void delete_leftovers(const std::string& out) {
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(out, error))
        if (is_leftover(entry)) std::filesystem::remove_all(entry.path(), error);
}

// The newest whole checkpoint of a run; none where it has written none. What is broken is reported on stderr,
// and an error only where nothing else is left.
inline std::optional<Checkpoint> newest_checkpoint(const std::string& out) {
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(out, error)) {
        if (is_leftover(entry))
            fprintf(stderr, "warning: %s: incomplete, left by a run that was stopped; ignored\n",
                    entry.path().c_str());
    }
    std::vector<int> steps = checkpoint_steps(out);
    for (int step : steps) {
        std::string folder = join_path(out, checkpoint_name(step));
        try {
            Checkpoint checkpoint(folder);
            if (!checkpoint.trainer) fail(folder, ": trainer.json is missing");
            return checkpoint;
        } catch (const Error& e) {
            fprintf(stderr, "warning: broken checkpoint ignored: %s\n", e.what());
        }
    }
    if (!steps.empty()) fail(out, ": none of its ", steps.size(), " checkpoints is whole");
    return std::nullopt;
}

// A model to generate with or to evaluate: the folder itself, or the newest checkpoint of a run.
inline Checkpoint open_model(const std::string& folder) {
    if (!std::filesystem::exists(join_path(folder, "config.json")))
        if (std::optional<Checkpoint> newest = newest_checkpoint(folder)) return *newest;
    return Checkpoint(folder);
}
