// Whether a model retrieves what it has read. data/prepare.py recall makes the examples, and its meta.json
// says which tokens are keys and which are values. An answer is a value that follows a key which was in the
// same example before. Only answers are scored, because all other tokens are random.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "llmc/dataloader.h"

// The positions of a sequence (T) whose targets are answers. An example begins at the end-of-text token.
inline std::vector<int> answer_positions(const DatasetInfo& info, const int* inputs, const int* targets,
                                         int T) {
    std::vector<int> positions;
    std::unordered_set<int> seen;  // keys of this example
    for (int t = 0; t < T; t++) {
        if (inputs[t] == info.eot_token) seen.clear();
        if (!info.recall->keys.has(inputs[t])) continue;
        const bool first = seen.insert(inputs[t]).second;
        if (!first && info.recall->values.has(targets[t])) positions.push_back(t);
    }
    return positions;
}

// Leaves only the answers among the targets of B sequences, so that a loss counts nothing else. Returns how
// many there are.
inline int keep_answers(const DatasetInfo& info, const int* inputs /*(B,T)*/, int* targets /*(B,T)*/, int B,
                        int T) {
    int answers = 0;
    for (int b = 0; b < B; b++, inputs += T, targets += T) {
        std::vector<int> kept(T, -1);
        for (int t : answer_positions(info, inputs, targets, T)) kept[t] = targets[t], answers++;
        std::copy(kept.begin(), kept.end(), targets);
    }
    return answers;
}

struct RecallScore {
    int64_t answers = 0, right = 0;  // right: the most probable token is the answer
    double loss = 0;                 // sum over the answers

    void add(const float* logits /*(V)*/, int V, int target) {
        const float* most = std::max_element(logits, logits + V);
        double sum = 0;
        for (int i = 0; i < V; i++) sum += std::exp(logits[i] - *most);
        answers++;
        right += most == logits + target;
        loss += std::log(sum) + *most - logits[target];
    }
};
