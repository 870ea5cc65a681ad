// What the ranks of a data-parallel training say to each other. A rank is a process that has the whole model
// and computes a part of each step's batch. This class is the communicator of a process that is alone; each
// backend may have one for several ranks (llmc/cpu/mpi.h).
//
// All ranks must make the same calls in the same order. If a rank fails, abort() ends the others.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

class Communicator {
  public:
    const int rank, ranks;

    explicit Communicator(int rank = 0, int ranks = 1) : rank(rank), ranks(ranks) {}
    virtual ~Communicator() = default;
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    // Replaces x (n), in the memory of the backend, by its sum over all ranks. Only puts this into a queue:
    // x must stay as it is until join().
    virtual void all_reduce(float* /*x*/, size_t /*n*/) {}
    // Lets what is in the queue go on. Takes little time.
    virtual void progress() {}
    // Waits until the queue is empty.
    virtual void join() {}

    // These wait for all ranks, and every rank gets the same answer.
    virtual double sum(double x) { return x; }
    virtual bool any(bool x) { return x; }
    virtual std::vector<std::string> gather(const std::string& text) { return {text}; }  // of every rank

    // Ends the processes of all other ranks, in the middle of whatever they do.
    virtual void abort(int /*status*/) {}
};
