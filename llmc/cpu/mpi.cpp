#include "llmc/cpu/mpi.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <string>
#include <vector>

#include "llmc/error.h"

#ifdef LLMC_MPI
#include <mpi.h>

namespace cpu {
namespace {

class Mpi : public Communicator {
  public:
    Mpi(int rank, int ranks, int timeout) : Communicator(rank, ranks), timeout_(timeout) {}
    ~Mpi() override {
        if (!aborted_) MPI_Finalize();
    }

    // Cut in pieces, because a count of MPI is an int.
    void all_reduce(float* x, size_t n) override {
        for (size_t done = 0; done < n;) {
            int count = (int)std::min<size_t>(n - done, 1 << 28);
            MPI_Request& request = queue_.emplace_back();
            MPI_Iallreduce(MPI_IN_PLACE, x + done, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD, &request);
            done += count;
        }
    }

    void progress() override {
        int done;
        if (!queue_.empty()) MPI_Testall((int)queue_.size(), queue_.data(), &done, MPI_STATUSES_IGNORE);
    }

    void join() override {
        wait(queue_);
        queue_.clear();
    }

    double sum(double x) override {
        std::vector<MPI_Request> request(1);
        MPI_Iallreduce(MPI_IN_PLACE, &x, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD, request.data());
        wait(request);
        return x;
    }

    bool any(bool x) override { return sum(x) > 0; }

    std::vector<std::string> gather(const std::string& text) override {
        int size = (int)text.size();
        std::vector<int> sizes(ranks), begins(ranks, 0);
        std::vector<MPI_Request> request(1);
        MPI_Iallgather(&size, 1, MPI_INT, sizes.data(), 1, MPI_INT, MPI_COMM_WORLD, request.data());
        wait(request);
        for (int r = 1; r < ranks; r++) begins[r] = begins[r - 1] + sizes[r - 1];
        std::string all((size_t)begins.back() + sizes.back(), ' ');
        MPI_Iallgatherv(text.data(), size, MPI_CHAR, all.data(), sizes.data(), begins.data(), MPI_CHAR,
                        MPI_COMM_WORLD, request.data());
        wait(request);
        std::vector<std::string> texts;
        for (int r = 0; r < ranks; r++) texts.push_back(all.substr(begins[r], sizes[r]));
        return texts;
    }

    void abort(int status) override {
        aborted_ = true;
        MPI_Abort(MPI_COMM_WORLD, status);
    }

  private:
    int timeout_;  // seconds
    bool aborted_ = false;
    std::vector<MPI_Request> queue_;

    // MPI itself would wait for ever for a rank that hangs.
    void wait(std::vector<MPI_Request>& requests) const {
        auto start = std::chrono::steady_clock::now();
        for (long attempt = 0;; attempt++) {
            int done = 0;
            MPI_Testall((int)requests.size(), requests.data(), &done, MPI_STATUSES_IGNORE);
            if (done) return;
            if (attempt < 2000) continue;  // an answer usually comes soon, and sleeping takes longer
            usleep(20);
            if (std::chrono::steady_clock::now() - start > std::chrono::seconds(timeout_))
                fail("another rank has not answered for ", timeout_, " seconds (--comm-timeout)");
        }
    }
};

}  // namespace

std::unique_ptr<Communicator> connect(const Launch& launch, int timeout) {
    if (launch.ranks == 1) return std::make_unique<Communicator>();
    int provided, rank, ranks;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    auto communicator = std::make_unique<Mpi>(rank, ranks, timeout);
    if (rank != launch.rank || ranks != launch.ranks)
        fail("the environment says rank ", launch.rank, " of ", launch.ranks, " (", launch.launcher,
             "), but MPI says rank ", rank, " of ", ranks,
             ": expected a start by mpirun of the same MPI, or by srun --mpi=pmix");
    return communicator;
}

std::string mpi_version() {
    char text[MPI_MAX_LIBRARY_VERSION_STRING];
    int length;
    MPI_Get_library_version(text, &length);
    return std::string(text, std::find(text, text + length, ','));
}

}  // namespace cpu

#else

namespace cpu {

std::unique_ptr<Communicator> connect(const Launch& launch, int) {
    if (launch.ranks > 1)
        fail(launch.launcher, " has started ", launch.ranks,
             " ranks, but this train_gpt was built without MPI: expected libopenmpi-dev and a new build");
    return std::make_unique<Communicator>();
}

std::string mpi_version() {
    return "no MPI";
}

}  // namespace cpu
#endif
