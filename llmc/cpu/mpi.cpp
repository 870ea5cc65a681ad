#include "llmc/cpu/mpi.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <list>
#include <string>
#include <utility>
#include <vector>

#include "llmc/error.h"

#ifdef LLMC_MPI
#include <mpi.h>

namespace cpu {
namespace {

MPI_Datatype type_of(Element type) {
    return type == Element::f32 ? MPI_FLOAT : type == Element::f64 ? MPI_DOUBLE : MPI_UINT16_T;
}

// What MPI is told about parts: their sizes and where they begin, in elements.
struct Parts {
    std::vector<int> sizes, begins;

    explicit Parts(const std::vector<Slice>& parts) {
        for (Slice part : parts) {
            if (std::max(part.end, part.size() * parts.size()) > INT_MAX)
                fail("MPI: a collective of more than ", INT_MAX, " elements");
            sizes.push_back((int)part.size());
            begins.push_back((int)part.begin);
        }
    }
};

// x (n) += y (n)
template <class T>
void add(T* __restrict__ x, const T* __restrict__ y, size_t n) {
#pragma omp parallel for simd schedule(static) if (n > 1 << 16)
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

class Mpi : public Communicator {
  public:
    Mpi(int rank, int ranks, int timeout) : Communicator(rank, ranks), timeout_(timeout) {}
    ~Mpi() override {
        if (!aborted_) MPI_Finalize();
    }

    // Cut in pieces, because a count of MPI is an int.
    void all_reduce(Span x) override {
        if (x.type == Element::bf16) fail("MPI: a sum of bf16 numbers");
        Collective& collective = queue_.emplace_back();
        for (size_t done = 0; done < x.size;) {
            int count = (int)std::min<size_t>(x.size - done, 1 << 28);
            MPI_Iallreduce(MPI_IN_PLACE, x.at(done), count, type_of(x.type), MPI_SUM, MPI_COMM_WORLD,
                           &collective.requests.emplace_back());
            done += count;
        }
    }

    // Every rank sends each part to its owner, which adds up what it gets in the order of the ranks. So no
    // byte is sent twice, and the sum does not depend on who comes first.
    void reduce_scatter(Span x, const std::vector<Slice>& slices) override {
        if (x.type != Element::f32) fail("MPI: reduce_scatter of other numbers than float32");
        Collective& collective = queue_.emplace_back();
        const Parts parts(slices);
        const size_t own = slices[rank].size();
        for (int r = 0; r < ranks; r++) {
            collective.counts.sizes.push_back((int)own);
            collective.counts.begins.push_back((int)(r * own));
        }
        collective.parts = parts;
        collective.received.resize(own * ranks);
        collective.sum = (float*)x.at(slices[rank].begin);
        MPI_Ialltoallv(x.data, collective.parts.sizes.data(), collective.parts.begins.data(), MPI_FLOAT,
                       collective.received.data(), collective.counts.sizes.data(),
                       collective.counts.begins.data(), MPI_FLOAT, MPI_COMM_WORLD,
                       &collective.requests.emplace_back());
    }

    void all_gather(Span x, const std::vector<Slice>& slices) override {
        Collective& collective = queue_.emplace_back();
        collective.parts = Parts(slices);
        MPI_Iallgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, x.data, collective.parts.sizes.data(),
                        collective.parts.begins.data(), type_of(x.type), MPI_COMM_WORLD,
                        &collective.requests.emplace_back());
    }

    void progress() override {
        while (!queue_.empty() && queue_.front().test()) finish();
    }

    int64_t queued() const override { return finished_ + (int64_t)queue_.size(); }

    void wait(int64_t n) override {
        auto start = Clock::now();
        while (finished_ < n) {
            wait_for([&] { return queue_.front().test(); });
            finish();
        }
        exposed_ += Clock::now() - start;
    }

    double take_exposed_ms() override {
        return std::chrono::duration<double, std::milli>(std::exchange(exposed_, {})).count();
    }

    double sum(double x) override {
        MPI_Request request;
        MPI_Iallreduce(MPI_IN_PLACE, &x, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD, &request);
        wait_for(request);
        return x;
    }

    bool any(bool x) override { return sum(x) > 0; }

    std::vector<std::string> gather(const std::string& text) override {
        int size = (int)text.size();
        std::vector<int> sizes(ranks), begins(ranks, 0);
        MPI_Request request;
        MPI_Iallgather(&size, 1, MPI_INT, sizes.data(), 1, MPI_INT, MPI_COMM_WORLD, &request);
        wait_for(request);
        for (int r = 1; r < ranks; r++) begins[r] = begins[r - 1] + sizes[r - 1];
        std::string all((size_t)begins.back() + sizes.back(), ' ');
        MPI_Iallgatherv(text.data(), size, MPI_CHAR, all.data(), sizes.data(), begins.data(), MPI_CHAR,
                        MPI_COMM_WORLD, &request);
        wait_for(request);
        std::vector<std::string> texts;
        for (int r = 0; r < ranks; r++) texts.push_back(all.substr(begins[r], sizes[r]));
        return texts;
    }

    void abort(int status) override {
        aborted_ = true;
        MPI_Abort(MPI_COMM_WORLD, status);
    }

  private:
    using Clock = std::chrono::steady_clock;

    // Like everything that MPI has been given, it must not move until it is done.
    struct Collective {
        std::vector<MPI_Request> requests;
        Parts parts{{}}, counts{{}};
        std::vector<float> received;  // (ranks, own part) of a reduce_scatter
        float* sum = nullptr;         // (own part): where their sum goes

        bool test() {
            int done;
            MPI_Testall((int)requests.size(), requests.data(), &done, MPI_STATUSES_IGNORE);
            return done;
        }
    };

    int timeout_;  // seconds
    bool aborted_ = false;
    std::list<Collective> queue_;
    int64_t finished_ = 0;
    Clock::duration exposed_{};

    // Removes the first collective, which is done.
    void finish() {
        Collective& first = queue_.front();
        if (first.sum) {
            const size_t own = first.received.size() / ranks;
            std::copy_n(first.received.begin(), own, first.sum);
            for (int r = 1; r < ranks; r++) add(first.sum, first.received.data() + r * own, own);
        }
        queue_.pop_front();
        finished_++;
    }

    void wait_for(MPI_Request& request) const {
        wait_for([&] {
            int done;
            MPI_Test(&request, &done, MPI_STATUS_IGNORE);
            return done;
        });
    }

    // Waits until done() says so. MPI itself would wait for ever for a rank that hangs.
    template <class Done>
    void wait_for(Done done) const {
        auto start = Clock::now();
        for (long attempt = 0; !done(); attempt++) {
            if (attempt < 2000) continue;  // an answer usually comes soon, and sleeping takes longer
            usleep(20);
            if (Clock::now() - start > std::chrono::seconds(timeout_))
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
