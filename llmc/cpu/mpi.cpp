#include "llmc/cpu/mpi.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "llmc/error.h"

#ifdef LLMC_MPI
#include <mpi.h>

namespace cpu {
namespace {

using Clock = std::chrono::steady_clock;

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

// Ends this process if MPI itself waits for another rank for too long, at its start or its end. These are the
// only calls that block.
class Alarm {
  public:
    // Rank 0 is first, so that only one says it. Small values of --comm-timeout are not meant for the start.
    Alarm(int rank, int timeout, const std::string& what) {
        timeout = std::max(timeout, 10);
        text() = str("train_gpt: error: rank ", rank, ": MPI did not ", what, " within ", timeout,
                     " seconds (--comm-timeout), because another rank does not answer\n");
        signal(SIGALRM, [](int) {
            [[maybe_unused]] ssize_t written = write(STDERR_FILENO, text().data(), text().size());
            _exit(kExitFailure);
        });
        alarm(timeout + (rank > 0 ? 2 : 0));
    }
    ~Alarm() { alarm(0); }

  private:
    static std::string& text() {
        static std::string text;
        return text;
    }
};

// Finds out which rank is lost when another one waits.
//
// A rank that has been waiting for half of --comm-timeout calls the roll, and those that wait as well answer.
// After the other half it knows which ranks hang. The lowest rank that is left prints it and ends all. The
// others only tell it, so that there is one message.
//
// A rank on the same machine that has died is noticed at once, because mpirun leaves no time: it sends
// SIGCONT to the others when one has died, SIGTERM after a second and SIGKILL after another
// (odls_base_sigkill_timeout).
class RollCall {
  public:
    RollCall(int rank, int ranks, int timeout)
        : rank_(rank), timeout_(timeout), processes_(ranks, 0), present_(ranks) {
        MPI_Comm_dup(MPI_COMM_WORLD, &comm_);
        MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);  // a rank may be dead
        // Processes can see each other if they are on one machine and in one container.
        std::string machine;
        const bool known{std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), machine)};
        std::error_code none;
        machine += std::filesystem::read_symlink("/proc/self/ns/pid", none).string();
        const int64_t mine[2] = {(int64_t)std::hash<std::string>()(machine), getpid()};
        std::vector<int64_t> all(2 * ranks);
        MPI_Allgather(mine, 2, MPI_INT64_T, all.data(), 2, MPI_INT64_T, MPI_COMM_WORLD);
        for (int r = 0; r < ranks; r++)
            if (known && all[2 * r] == mine[0]) processes_[r] = (pid_t)all[2 * r + 1];
    }

    void begin() {
        begin_ = Clock::now();
        called_ = {};
    }

    // To be called often between begin() and the end of waiting. It is an error if another rank is lost; if
    // another rank says so, the error has no text.
    void look() {
        receive();
        look_for_dead();
        const auto now = Clock::now();
        const auto half = std::chrono::milliseconds(500 * timeout_);
        if (!called_) {
            if (now - begin_ > half) call();
        } else if (now - *called_ > half) {
            std::vector<int> lost;
            for (int r = 0; r < (int)present_.size(); r++)
                if (r != rank_ && !present_[r]) lost.push_back(r);
            give_up(lost, lost.size() == 1 ? " has" : " have",
                    str(" not answered for ", timeout_, " seconds (--comm-timeout)"));
        }
    }

    // To be called often. Looks every few milliseconds.
    void look_for_dead() {
        if (Clock::now() - looked_ < std::chrono::milliseconds(5)) return;
        looked_ = Clock::now();
        std::vector<int> dead;
        for (int r = 0; r < (int)processes_.size(); r++)
            if (processes_[r] && kill(processes_[r], 0) != 0 && errno == ESRCH) dead.push_back(r);
        if (dead.empty()) return;
        receive();  // it may have said why it ends
        give_up(dead, dead.size() == 1 ? " has" : " have", " died");
    }

    // Tells all other ranks that this one has said why all end.
    void said() {
        for (int r = 0; r < (int)present_.size(); r++)
            if (r != rank_) send(r, error);
        const auto begin = Clock::now();
        while (!all_sent() && Clock::now() - begin < std::chrono::milliseconds(200)) usleep(100);
    }

  private:
    enum Kind : int { call_, answer, error };
    struct Message {
        std::string text;
        MPI_Request request;
    };

    int rank_, timeout_;  // seconds
    MPI_Comm comm_;
    std::vector<pid_t> processes_;             // of each rank that this one can see; otherwise 0
    Clock::time_point looked_;                 // for dead ones
    Clock::time_point begin_;                  // of waiting
    std::optional<Clock::time_point> called_;  // when this wait's roll was called
    int roll_ = 0;                             // its number
    std::vector<bool> present_;                // who has answered it
    std::list<Message> messages_;              // that are being sent

    void send(int to, Kind kind, const std::string& text = "") {
        Message& message = messages_.emplace_back(Message{text, MPI_REQUEST_NULL});
        MPI_Isend(message.text.data(), (int)text.size(), MPI_CHAR, to, kind, comm_, &message.request);
    }

    bool all_sent() {
        messages_.remove_if([](Message& message) {
            int done;
            return MPI_Test(&message.request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done;
        });
        return messages_.empty();
    }

    void call() {
        called_ = Clock::now();
        roll_++;
        present_.assign(present_.size(), false);
        for (int r = 0; r < (int)present_.size(); r++)
            if (r != rank_) send(r, call_, std::to_string(roll_));
    }

    // Takes what the other ranks have sent.
    void receive() {
        std::optional<std::string> failure;
        for (;;) {
            int found = 0, size;
            MPI_Status status;
            if (MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, comm_, &found, &status) != MPI_SUCCESS || !found)
                break;
            MPI_Get_count(&status, MPI_CHAR, &size);
            std::string text(size, ' ');
            MPI_Recv(text.data(), size, MPI_CHAR, status.MPI_SOURCE, status.MPI_TAG, comm_,
                     MPI_STATUS_IGNORE);
            if (status.MPI_TAG == call_) {
                all_sent();
                send(status.MPI_SOURCE, answer, text);
            } else if (status.MPI_TAG == answer) {
                if (text == std::to_string(roll_)) present_[status.MPI_SOURCE] = true;
            } else if (!failure || text.empty()) {
                failure = text;
            }
        }
        if (failure) throw CollectiveError(kExitFailure, *failure);
    }

    [[noreturn]] void give_up(const std::vector<int>& lost, const char* have, const std::string& what) {
        const std::string text = lost.empty() ? str("all ranks wait, but nothing has come for ", timeout_,
                                                    " seconds (--comm-timeout)")
                                              : ranks_text(lost) + have + what;
        int first = 0;
        while (std::find(lost.begin(), lost.end(), first) != lost.end()) first++;
        if (first != rank_) {
            send(first, error, text);
            const auto begin = Clock::now();
            while (Clock::now() - begin < std::chrono::seconds(1)) receive(), usleep(100);
        }
        throw CollectiveError(kExitFailure, text);
    }
};

class Mpi : public Communicator {
  public:
    Mpi(int rank, int ranks, int timeout)
        : Communicator(rank, ranks), timeout_(timeout), roll_call_(rank, ranks, timeout) {}
    ~Mpi() override {
        if (aborted_) return;
        Alarm alarm(rank, timeout_, "end");
        MPI_Finalize();
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
        // What is received takes memory, so few are on their way at a time.
        while (std::count_if(queue_.begin(), queue_.end(), [](auto& c) { return c.sum != nullptr; }) >=
               kReductions)
            wait(finished_ + 1);
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
        roll_call_.look_for_dead();
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
        sum_ = x;
        MPI_Request request;
        MPI_Iallreduce(MPI_IN_PLACE, &sum_, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD, &request);
        wait_for(request);
        return sum_;
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
        roll_call_.said();
        MPI_Abort(MPI_COMM_WORLD, status);
    }

  private:
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

    static constexpr int kReductions = 3;

    int timeout_;  // seconds
    bool aborted_ = false;
    double sum_;  // no local variable, because MPI may still write to it after an exception
    RollCall roll_call_;
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

    void wait_for(MPI_Request& request) {
        wait_for([&] {
            int done;
            MPI_Test(&request, &done, MPI_STATUS_IGNORE);
            return done;
        });
    }

    // Waits until done() says so. MPI itself would wait for ever for a rank that hangs.
    template <class Done>
    void wait_for(Done done) {
        roll_call_.begin();
        const auto begin = Clock::now();
        while (!done()) {
            // An answer usually comes soon, and sleeping takes longer.
            if (Clock::now() - begin < std::chrono::milliseconds(1)) continue;
            usleep(20);
            roll_call_.look();
        }
    }
};

}  // namespace

std::unique_ptr<Communicator> connect(const Launch& launch, int timeout) {
    if (launch.ranks == 1) return std::make_unique<Communicator>();
    int provided, rank, ranks;
    std::unique_ptr<Mpi> communicator;
    {
        Alarm alarm(launch.rank, timeout, "start");
        MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
        MPI_Comm_size(MPI_COMM_WORLD, &ranks);
        communicator = std::make_unique<Mpi>(rank, ranks, timeout);
    }
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
        refuse_ranks(launch, "this train_gpt was built without MPI: expected libopenmpi-dev and a new build");
    return std::make_unique<Communicator>();
}

std::string mpi_version() {
    return "no MPI";
}

}  // namespace cpu
#endif
