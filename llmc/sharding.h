// How the ranks of a run divide the state of the training among them (ZeRO, arXiv 1910.02054).
//
//   level 0: every rank keeps everything
//   level 1: a rank keeps its pieces of the optimizer's arrays and, where the matrix products have a copy of
//            the weights, of the float32 weights
//   level 2: and of the sums of the gradients
//
// Each bucket (ParameterTable::buckets) is cut into a part for each rank, which does the optimizer's step of
// that part. All ranks keep the vectors, and each one does their step.
#pragma once
#include <algorithm>
#include <vector>

#include "llmc/parameters.h"
#include "llmc/slice.h"

// Cuts a bucket into a part for each rank. The parts follow one another and may be empty. It is a choice of
// the optimizer: one that needs whole matrices cuts between tensors.
using CutPolicy = std::vector<Slice> (*)(const ParameterTable& table, Slice bucket, int ranks);

// For optimizers that treat every element on its own: parts of equal size, a multiple of 16. The last one has
// what is left, so nothing has to divide evenly.
inline std::vector<Slice> equal_parts(const ParameterTable&, Slice bucket, int ranks) {
    const size_t size = bucket.size() / ranks / 16 * 16;
    std::vector<Slice> parts;
    for (int r = 0; r < ranks; r++)
        parts.push_back(
            {bucket.begin + r * size, r + 1 < ranks ? bucket.begin + (r + 1) * size : bucket.end});
    return parts;
}

struct ShardOptions {
    int level = 0, rank = 0, ranks = 1;
    CutPolicy cut = equal_parts;
};

// The pieces of the table that a rank keeps. In an array of them they lie one after another.
class Kept {
  public:
    explicit Kept(std::vector<Slice> pieces) : pieces_(std::move(pieces)) {
        for (Slice piece : pieces_) size_ += piece.size();
    }
    size_t size() const { return size_; }  // elements of such an array
    const std::vector<Slice>& pieces() const { return pieces_; }

    // Calls f(piece, place) for each piece of the slice that is kept. It begins at element `place` of an
    // array of all that is kept.
    template <class F>
    void for_each(Slice slice, F f) const {
        size_t place = 0;
        for (Slice kept : pieces_) {
            const Slice piece = overlap(kept, slice);
            if (piece.size() > 0) f(piece, place + (piece.begin - kept.begin));
            place += kept.size();
        }
    }

  private:
    std::vector<Slice> pieces_;
    size_t size_ = 0;
};

class Sharding {
  public:
    const int level;                              // 0 if there is one rank
    const std::vector<Slice> buckets;             // as in the table
    const std::vector<std::vector<Slice>> parts;  // (buckets, ranks), at level 1 and 2
    const Kept kept;                              // by this rank
    const std::vector<Slice> counted;             // the pieces that it adds to a sum over all parameters

    Sharding(const ParameterTable& table, const ShardOptions& options)
        : level(options.ranks > 1 ? options.level : 0),
          buckets(table.buckets()),
          parts(cut(table, options)),
          kept(pieces_of(table, options.rank, true)),
          counted(pieces_of(table, options.rank, options.rank == 0)),
          rank_(options.rank) {}

    Slice own(int bucket) const { return level > 0 ? parts[bucket][rank_] : buckets[bucket]; }

    // At level 2: the buffer that has the gradients of a bucket while they are computed and sent: 0 and 1 are
    // for the blocks in turn, 2 is for the embeddings.
    int buffer_of(int bucket) const { return bucket + 2 < (int)buckets.size() ? bucket % 2 : 2; }

    // The parts of a slice of a bucket, counted from its begin.
    std::vector<Slice> parts_of(int bucket, Slice slice) const {
        std::vector<Slice> all;
        for (Slice part : parts[bucket]) {
            part.begin = std::clamp(part.begin, slice.begin, slice.end) - slice.begin;
            part.end = std::clamp(part.end, slice.begin, slice.end) - slice.begin;
            all.push_back(part);
        }
        return all;
    }

  private:
    const int rank_;

    std::vector<std::vector<Slice>> cut(const ParameterTable& table, const ShardOptions& options) const {
        std::vector<std::vector<Slice>> parts;
        if (level == 0) return parts;
        for (Slice bucket : buckets) parts.push_back(options.cut(table, bucket, options.ranks));
        parts.back().assign(options.ranks, table.vectors());
        return parts;
    }

    // In the order of the table.
    std::vector<Slice> pieces_of(const ParameterTable& table, int rank, bool with_vectors) const {
        if (level == 0) return {table.all()};
        std::vector<Slice> pieces;
        for (const std::vector<Slice>& of_ranks : parts)
            if (of_ranks[rank].size() > 0) pieces.push_back(of_ranks[rank]);
        if (!with_vectors) pieces.pop_back();
        std::sort(pieces.begin(), pieces.end(), [](Slice a, Slice b) { return a.begin < b.begin; });
        return pieces;
    }
};
