// metrics.jsonl has one JSON object in each line. Each line is written to the file at once.
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "llmc/error.h"
#include "llmc/files.h"
#include "llmc/norms.h"

class MetricsLog {
  public:
    // Appends to `path`. First it removes the lines after last_step, which a stopped run wrote after its last
    // checkpoint, and an incomplete last line, so that no step is there twice. With last_step -1, which means
    // that there was no checkpoint, it removes everything.
    MetricsLog(const std::string& path, int last_step) : path_(path) {
        if (path_exists(path)) {
            std::istringstream lines(read_text(path));
            std::string kept;
            for (std::string line; std::getline(lines, line);) {
                try {
                    json_integer(parse_json(line, path), "step", 0, last_step, path);
                    kept += line + "\n";
                } catch (const Error&) {
                    // The line belongs to a later step, or it is incomplete.
                }
            }
            write_text_atomically(path, kept);
        }
        file_.fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        if (file_.fd < 0) fail_errno(path, "cannot open");
    }

    void write(const nlohmann::ordered_json& entry) {
        std::string line = entry.dump() + "\n";
        for (size_t done = 0; done < line.size();) {
            ssize_t written = ::write(file_.fd, line.data() + done, line.size() - done);
            if (written < 0 && errno != EINTR) fail_errno(path_, "cannot write");
            if (written > 0) done += written;
        }
    }

    // Makes sure that the lines are on the disk. Called before a checkpoint is written, so that no checkpoint
    // exists without the lines before it.
    void sync() {
        if (::fsync(file_.fd) != 0 && errno != EINVAL) fail_errno(path_, "cannot sync");
    }

  private:
    std::string path_;
    Descriptor file_{-1};
};

// Appends the norms that exist for this kind of attention to a line of metrics.jsonl. NaN and Inf become
// null.
inline void append_norms(nlohmann::ordered_json& line, const AttentionNorms& norms,
                         const AttentionConfig& config) {
    line["attention_norm"] = norms.norm;
    line["jacobian_norm"] = norms.jacobian_norm;
    line["max_weight"] = norms.max_weight;
    line["negative_mass"] = norms.negative_mass;
    line["effective_keys"] = norms.effective_keys;
    if (config.softmax()) line["entropy"] = norms.entropy;
    line["score_std"] = norms.score_std;
    line["max_score"] = norms.max_score;
    if (config.polynomial()) line["moment_excess"] = norms.moment_excess;
    if (norms.mean_gate > 0) line["mean_gate"] = norms.mean_gate;
}
