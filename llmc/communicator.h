// What the ranks of a data-parallel training say to each other. A rank is a process that has the whole model
// and computes a part of each step's batch. This class is the communicator of a process that is alone; each
// backend may have one for several ranks (llmc/cpu/mpi.h, llmc/cuda/nccl.h).
//
// All ranks must make the same calls in the same order. If a rank fails, abort() ends the others.
//
// Collectives have a queue of their own. A call only puts one into the queue. It runs after what the model
// has queued before that call, and after the collectives before it, while the model goes on. So the arrays
// of a collective must stay as they are until wait() or join().
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "llmc/error.h"
#include "llmc/slice.h"

class Communicator {
  public:
    const int rank, ranks;

    explicit Communicator(int rank = 0, int ranks = 1) : rank(rank), ranks(ranks) {}
    virtual ~Communicator() = default;
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    // They work in place. Part r of x belongs to rank r; the parts follow one another and cover x, and some
    // may be empty.
    virtual void all_reduce(Span /*x*/) {}  // x becomes the sum over all ranks
    // The own part becomes the sum over all ranks. Elements of the other parts become a sum over some of the
    // ranks, so that zeros everywhere stay zeros.
    virtual void reduce_scatter(Span /*x*/, const std::vector<Slice>& /*parts*/) {}
    virtual void all_gather(Span /*x*/, const std::vector<Slice>& /*parts*/) {}  // every rank gets all parts

    // Lets what is in the queue go on. Takes little time.
    virtual void progress() {}
    // How many collectives have been put into the queue since the start.
    virtual int64_t queued() const { return 0; }
    // What the model does next comes after the first n collectives.
    virtual void wait(int64_t /*n*/) {}
    void join() { wait(queued()); }
    // Milliseconds that the model has been waiting for collectives since the last call. Waits for the model.
    virtual double take_exposed_ms() { return 0; }

    // These wait for all ranks, and every rank gets the same answer.
    virtual double sum(double x) { return x; }
    virtual bool any(bool x) { return x; }
    virtual std::vector<std::string> gather(const std::string& text) { return {text}; }  // of every rank

    // For the message if another rank is lost: the number of steps done.
    virtual void set_step(int /*step*/) {}
    // Ends the processes of all other ranks, in the middle of whatever they do.
    virtual void abort(int /*status*/) {}
};

// "1, 3 to 7"
inline std::string list_of(const std::vector<int>& sorted) {
    std::string text;
    for (size_t i = 0, end; i < sorted.size(); i = end) {
        for (end = i + 1; end < sorted.size() && sorted[end] == sorted[end - 1] + 1;) end++;
        text += str(i ? ", " : "", sorted[i]);
        if (end - i > 1) text += str(end - i > 2 ? " to " : ", ", sorted[end - 1]);
    }
    return text;
}

inline std::string ranks_text(const std::vector<int>& sorted) {
    return (sorted.size() == 1 ? "rank " : "ranks ") + list_of(sorted);
}

// A failure that all ranks know of.
struct AgreedError : Error {
    using Error::Error;
};

// A failure in the middle of a collective: another rank is lost, or this one cannot go on. The ranks can
// agree on nothing then, so only abort() ends them all.
struct CollectiveError : Error {
    using Error::Error;
};

// Calls f(), which communicates.
template <class F>
void collectively(F f) {
    try {
        f();
    } catch (const Error& e) {
        throw CollectiveError(e.status, e.what());
    }
}

// Calls f() on every rank. If it fails on one, all ranks end with the error of the first rank that failed.
// What f does collectively() must not depend on whether the rest of it fails.
template <class F>
void together(Communicator& communicator, F f) {
    if (communicator.ranks == 1) return f();
    std::string error;
    try {
        f();
    } catch (const CollectiveError&) {
        throw;
    } catch (const Error& e) {
        error = str((char)e.status, e.what());
    }
    const std::vector<std::string> errors = communicator.gather(error);
    for (int rank = 0; rank < communicator.ranks; rank++) {
        if (errors[rank].empty()) continue;
        const bool all = std::count(errors.begin(), errors.end(), errors[rank]) == communicator.ranks;
        throw AgreedError(errors[rank][0], (all ? "" : str("rank ", rank, ": ")) + errors[rank].substr(1));
    }
}
