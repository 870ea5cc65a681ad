// The ranks of a training with one GPU each: collectives by NCCL, and everything else over the connections
// that the ranks have met with (llmc/links.h).
//
// Collectives have a stream of their own. It waits by events for what the model's stream had to do at the
// call, and the model's stream waits by events for collectives. NCCL's calls do not block
// (ncclConfig_t::blocking), and the host waits by asking again and again, so that it notices when another
// rank has ended or hangs. Then it aborts the collectives, because the driver would wait for them for ever:
// when memory is freed, for example.
#pragma once
#include <nccl.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <deque>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "llmc/communicator.h"
#include "llmc/cuda/runtime.h"
#include "llmc/links.h"

namespace gpu {

class Nccl : public Communicator, public Waiter {
  public:
    Nccl(int rank, int ranks, Links links) : Communicator(rank, ranks), links_(std::move(links)) {
        int least, greatest;
        check(cudaDeviceGetStreamPriorityRange(&least, &greatest));
        // The model's kernels fill the GPU, and a collective that comes between them delays all ranks less.
        check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
        check(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming));
        waiter = this;
    }
    ~Nccl() override {
        try {
            if (comm_) {
                complete(ncclCommFinalize(comm_));
                ncclCommDestroy(std::exchange(comm_, nullptr));
                links_.leave();
            }
        } catch (const Error&) {  // the training is over
        }
        abort_collectives();
        waiter = nullptr;
        for (auto* events : {&done_, &free_done_, &exposed_, &free_exposed_})
            for (cudaEvent_t event : *events) cudaEventDestroy(event);
        cudaEventDestroy(ready_);
        cudaStreamDestroy(stream_);
    }

    // Connects the ranks' GPUs. All ranks have the same id.
    void start(const ncclUniqueId& id) {
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.blocking = 0;
        complete(ncclCommInitRankConfig(&comm_, ranks, id, rank, &config));
    }

    void all_reduce(Span x) override {
        enqueue([&] { return ncclAllReduce(x.data, x.data, x.size, type_of(x), ncclSum, comm_, stream_); });
    }

    void reduce_scatter(Span x, const std::vector<Slice>& parts) override {
        by_parts(
            parts,
            [&](size_t even) {
                return ncclReduceScatter(x.data, x.at(rank * even), even, type_of(x), ncclSum, comm_,
                                         stream_);
            },
            [&](int owner, Slice part) {
                return ncclReduce(x.at(part.begin), x.at(part.begin), part.size(), type_of(x), ncclSum, owner,
                                  comm_, stream_);
            });
    }

    void all_gather(Span x, const std::vector<Slice>& parts) override {
        by_parts(
            parts,
            [&](size_t even) {
                return ncclAllGather(x.at(rank * even), x.data, even, type_of(x), comm_, stream_);
            },
            [&](int owner, Slice part) {
                return ncclBroadcast(x.at(part.begin), x.at(part.begin), part.size(), type_of(x), owner,
                                     comm_, stream_);
            });
    }

    int64_t queued() const override { return queued_; }

    void wait(int64_t n) override {
        if (n <= waited_) return;
        // The host must not run far ahead of a collective that may never end, because the driver blocks the
        // host when a thousand kernels or so wait.
        record(exposed_, free_exposed_, cudaEventDefault, model_stream);
        if (n - kAhead > waited_)
            wait_until([&] { return is_done(cudaEventQuery(done_[n - kAhead - waited_ - 1])); });
        check(cudaStreamWaitEvent(model_stream, done_[n - waited_ - 1]));
        record(exposed_, free_exposed_, cudaEventDefault, model_stream);
        for (; waited_ < n; waited_++) free_done_.push_back(done_.front()), done_.pop_front();
    }

    double take_exposed_ms() override {
        wait_for(model_stream);
        double total = 0;
        for (size_t i = 0; i < exposed_.size(); i += 2) {
            float ms;
            check(cudaEventElapsedTime(&ms, exposed_[i], exposed_[i + 1]));
            total += ms;
        }
        free_exposed_.insert(free_exposed_.end(), exposed_.begin(), exposed_.end());
        exposed_.clear();
        return total;
    }

    double sum(double x) override {
        auto value = [](const std::string& bytes) {
            double x = 0;
            std::memcpy(&x, bytes.data(), std::min(bytes.size(), sizeof x));
            return x;
        };
        auto bytes = [](double x) { return std::string((const char*)&x, sizeof x); };
        return value(guarded([&] {
            return links_.exchange(
                bytes(x),
                [&](const std::vector<std::string>& all) {
                    double total = 0;
                    for (const std::string& one : all) total += value(one);
                    return bytes(total);
                },
                [&] { progress(); });
        }));
    }

    bool any(bool x) override { return sum(x) > 0; }

    std::vector<std::string> gather(const std::string& text) override {
        return guarded([&] { return links_.gather(text, [&] { progress(); }); });
    }

    // The simulator's streams go on only when they are asked.
    void progress() override { is_done(cudaStreamQuery(stream_)); }

    void abort(int status) override {
        links_.end_others(status);
        abort_collectives();
    }

    void await(cudaStream_t stream) override {
        wait_until([&] { return is_done(cudaStreamQuery(stream)); });
    }
    void await(cudaEvent_t event) override {
        wait_until([&] { return is_done(cudaEventQuery(event)); });
    }
    void await_all() override {
        for (cudaStream_t stream : {model_stream, stream_, cudaStream_t()}) await(stream);
    }

  protected:
    // Puts a collective into the queue, after what is in the model's stream. Tests replace it.
    virtual void follow_model() {
        check(cudaEventRecord(ready_, model_stream));
        check(cudaStreamWaitEvent(stream_, ready_));
    }

  private:
    using Clock = std::chrono::steady_clock;
    using Events = std::deque<cudaEvent_t>;

    static constexpr int64_t kAhead = 2;  // collectives

    Links links_;
    ncclComm_t comm_ = nullptr;
    cudaStream_t stream_;  // of the collectives
    cudaEvent_t ready_;    // recorded in the model's stream at a call
    // The collectives so far, and those that the model's stream has waited for.
    int64_t queued_ = 0, waited_ = 0;
    Events done_, free_done_;        // recorded after each collective since then
    Events exposed_, free_exposed_;  // recorded before and after each wait of the model's stream
    Clock::time_point failed_{};     // when NCCL reported an error

    static ncclDataType_t type_of(Span x) {
        return x.type == Element::f32 ? ncclFloat32 : x.type == Element::f64 ? ncclFloat64 : ncclBfloat16;
    }

    // The size of the parts if they are equal, except that the last one may be longer. Otherwise 0.
    static size_t even_size(const std::vector<Slice>& parts) {
        for (const Slice& part : parts)
            if (part.size() != parts[0].size() && (&part != &parts.back() || part.size() < parts[0].size()))
                return 0;
        return parts[0].size();
    }

    // NCCL has calls for equal parts only. What parts have beyond that goes by a call for each owner. They
    // all run as one.
    template <class Even, class Part>
    void by_parts(const std::vector<Slice>& parts, Even equal_parts, Part one_part) {
        const size_t even = even_size(parts);
        enqueue([&] {
            ncclResult_t error = ncclGroupStart();
            auto call = [&](ncclResult_t result) {
                if (error == ncclSuccess && result != ncclInProgress) error = result;
            };
            if (even) call(equal_parts(even));
            for (int r = 0; r < ranks; r++)
                if (const Slice rest{parts[r].begin + even, parts[r].end}; rest.size())
                    call(one_part(r, rest));
            const ncclResult_t result = ncclGroupEnd();
            return error == ncclSuccess ? result : error;
        });
    }

    static bool is_done(cudaError_t status) {
        if (status == cudaErrorNotReady) return cudaGetLastError(), false;  // it is no error
        check(status);
        return true;
    }

    // Records an event, an unused one if there is one.
    static void record(Events& events, Events& unused, unsigned flags, cudaStream_t stream) {
        cudaEvent_t event;
        if (unused.empty())
            check(cudaEventCreateWithFlags(&event, flags));
        else
            event = unused.front(), unused.pop_front();
        events.push_back(event);
        check(cudaEventRecord(event, stream));
    }

    template <class Call>
    void enqueue(Call call) {
        follow_model();
        complete(call());  // the event must come after NCCL's kernel
        record(done_, free_done_, cudaEventDisableTiming, stream_);
        queued_++;
    }

    // Waits until a call of NCCL, which may go on after it has returned, has done what it has to do here.
    void complete(ncclResult_t result) {
        wait_until([&] {
            if (result == ncclInProgress) ncclCommGetAsyncError(comm_, &result);
            return !has_failed(result) && result == ncclSuccess;
        });
    }

    template <class Done>
    void wait_until(Done done) {
        guarded([&] {
            links_.wait([&] {
                if (done()) return true;
                ncclResult_t result = ncclSuccess;
                if (comm_) ncclCommGetAsyncError(comm_, &result);
                has_failed(result);
                return false;
            });
        });
    }

    // If another rank has ended, its connection says so at about the same time, and says which. So an error
    // of NCCL ends this rank a second later.
    bool has_failed(ncclResult_t result) {
        if (result == ncclSuccess || result == ncclInProgress) return false;
        if (failed_ == Clock::time_point()) failed_ = Clock::now();
        if (Clock::now() - failed_ > std::chrono::seconds(1))
            fail("NCCL: ", ncclGetErrorString(result), " ", ncclGetLastError(comm_));
        return true;
    }

    // Does what may fail because of another rank, and aborts the collectives before that goes further.
    template <class F>
    std::invoke_result_t<F> guarded(F f) {
        try {
            return f();
        } catch (const Error& e) {
            abort_collectives();
            throw CollectiveError(e.status, e.what());
        }
    }

    void abort_collectives() {
        if (!comm_) return;
        // The driver or NCCL may hang here, too. Then the process ends without them.
        std::signal(SIGALRM, [](int) {
            static const char text[] = "error: the collectives could not be aborted\n";
            if (::write(STDERR_FILENO, text, sizeof text - 1)) {
            }
            ::_exit(kExitFailure);
        });
        ::alarm(10);
        ncclCommAbort(std::exchange(comm_, nullptr));
        ::alarm(0);
    }
};

}  // namespace gpu
