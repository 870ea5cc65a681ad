#include "dev/ptxsim/nccl_work.h"

#if __has_include(<nccl.h>)
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "dev/ptxsim/floats.h"
#include "dev/ptxsim/memory.h"
#include "dev/ptxsim/operand.h"
#include "dev/ptxsim/report.h"

namespace ptxsim {
namespace {

void found(Fault fault, const std::string& text) {
    Report r;
    r.fault = fault;
    r.text = text;
    report(std::move(r));
}

const char* name_of(int type) {
    switch (type) {
        case ncclInt8:
            return "int8";
        case ncclUint8:
            return "uint8";
        case ncclInt32:
            return "int32";
        case ncclUint32:
            return "uint32";
        case ncclInt64:
            return "int64";
        case ncclUint64:
            return "uint64";
        case ncclFloat16:
            return "f16";
        case ncclFloat32:
            return "float32";
        case ncclFloat64:
            return "float64";
        case ncclBfloat16:
            return "bf16";
        default:
            return "float8";
    }
}

// ---- sums. NCCL rounds to the type after every rank, and for an average multiplies each rank's floats by
// 1/ranks first. The order of ranks differs there; here it is always 0, 1, 2 and so on, so that results do
// not depend on time.

template <class T>
struct Arithmetic {
    using Wide = T;
    static T load(T x) { return x; }
    static T store(T x) { return x; }
};
template <class T>
requires(std::is_same_v<T, f16> || std::is_same_v<T, bf16>) struct Arithmetic<T> {
    using Wide = float;
    static float load(T x) { return decode(x); }
    static T store(float x) { return to_half<T>(x); }
};

template <class W>
W combine(W a, W b, int op) {
    if (op == ncclMax || op == ncclMin) {
        if constexpr (std::is_floating_point_v<W>) return op == ncclMax ? std::fmax(a, b) : std::fmin(a, b);
        return op == ncclMax ? std::max(a, b) : std::min(a, b);
    }
    if constexpr (std::is_integral_v<W>) {  // overflow wraps around
        uint64_t x = (uint64_t)a, y = (uint64_t)b;
        return (W)(op == ncclProd ? x * y : x + y);
    }
    return op == ncclProd ? a * b : a + b;
}

template <class T>
void reduce_as(std::byte* out, const std::vector<const std::byte*>& from, size_t count, int op) {
    using A = Arithmetic<T>;
    using W = typename A::Wide;
    const int ranks = (int)from.size();
    bool scaled = op == ncclAvg && std::is_floating_point_v<W>;
    for (size_t i = 0; i < count; i++) {
        auto element = [&](int r) {
            T x;
            std::memcpy(&x, from[r] + i * sizeof x, sizeof x);
            return scaled ? A::store(A::load(x) * (W(1) / (W)ranks)) : x;
        };
        T sum = element(0);
        for (int r = 1; r < ranks; r++) sum = A::store(combine<W>(A::load(sum), A::load(element(r)), op));
        if (op == ncclAvg && !scaled) sum = A::store((W)(A::load(sum) / (W)ranks));
        std::memcpy(out + i * sizeof sum, &sum, sizeof sum);
    }
}

void reduce(std::byte* out, const std::vector<const std::byte*>& from, size_t count, int type, int op) {
    switch (type) {
        case ncclInt8:
            return reduce_as<int8_t>(out, from, count, op);
        case ncclUint8:
            return reduce_as<uint8_t>(out, from, count, op);
        case ncclInt32:
            return reduce_as<int32_t>(out, from, count, op);
        case ncclUint32:
            return reduce_as<uint32_t>(out, from, count, op);
        case ncclInt64:
            return reduce_as<int64_t>(out, from, count, op);
        case ncclUint64:
            return reduce_as<uint64_t>(out, from, count, op);
        case ncclFloat16:
            return reduce_as<f16>(out, from, count, op);
        case ncclBfloat16:
            return reduce_as<bf16>(out, from, count, op);
        case ncclFloat32:
            return reduce_as<float>(out, from, count, op);
        case ncclFloat64:
            return reduce_as<double>(out, from, count, op);
    }
}

// ---- the work

using Clock = std::chrono::steady_clock;

class Work {
  public:
    Work(std::shared_ptr<NcclComm> comm, std::vector<NcclPart> parts)
        : comm_(std::move(comm)), parts_(std::move(parts)), peers_(*comm_->peers) {}

    // Begins a run. A graph may run the work several times.
    cudaError_t begin() {
        waited_ = 0;
        for (NcclPart& p : parts_) {
            p.number = 0, p.matched = p.over = false;
            const char* call = p.call.name;
            if (!check_range(call, "the send buffer", p.from, p.sent, alignment(p)))
                p.from = 0;  // NaN instead
            p.bad_target = !check_range(call, "the receive buffer", p.to, p.received, alignment(p));
            check_overlap(p);
            post(&p);
        }
        return cudaSuccess;
    }

    std::optional<cudaError_t> over() {
        if (comm_->aborted) {
            for (const NcclPart& p : parts_) spoil(p);
            return cudaSuccess;
        }
        const NcclPart* late = nullptr;
        for (NcclPart& p : parts_) {
            if (p.over) continue;
            if (!p.number) post(&p);
            if (p.number && !(is_pairwise(p) ? advance_pair(&p) : advance_collective(&p))) {
                comm_->error = ncclInvalidUsage;
                return cudaErrorLaunchFailure;
            }
            if (!p.over && !late) late = &p;
        }
        return late ? check_time(*late) : cudaSuccess;
    }

  private:
    static bool is_pairwise(const NcclPart& p) {
        return p.kind == NcclKind::send || p.kind == NcclKind::receive;
    }
    static size_t alignment(const NcclPart& p) { return size_of((ncclDataType_t)p.call.type); }

    int lane(const NcclPart& p) const {
        return !is_pairwise(p)            ? peers_.collectives()
               : p.kind == NcclKind::send ? peers_.to(p.peer)
                                          : peers_.from(p.peer);
    }

    void post(NcclPart* p) {
        peers_.post(lane(*p), p->call, p->from, p->sent, is_pairwise(*p) ? 1 : peers_.ranks, &p->number);
    }

    // Only the forms in place that the documentation allows.
    void check_overlap(const NcclPart& p) const {
        if (!p.from || !p.to || !p.sent || !p.received || p.from >= p.to + p.received ||
            p.to >= p.from + p.sent)
            return;
        uint64_t rank = (uint64_t)peers_.rank;
        bool in_place = p.kind == NcclKind::all_gather       ? p.from == p.to + rank * p.sent
                        : p.kind == NcclKind::reduce_scatter ? p.to == p.from + rank * p.received
                                                             : p.to == p.from;
        if (!in_place)
            found(Fault::collective,
                  in_words(p.call) +
                      ": the send and the receive buffer overlap, but not as a call in place has them");
    }

    std::string place(const NcclPart& p) const {
        if (is_pairwise(p))
            return (p.kind == NcclKind::send ? " to" : " from") + std::string(" rank ") +
                   std::to_string(p.peer);
        return " as collective " + std::to_string(p.number) + " of the communicator";
    }

    bool mismatch(const NcclPart& p, int rank, const NcclCall& other) {
        found(Fault::collective, in_words(p.call) + ": rank " + std::to_string(peers_.rank) + " calls this" +
                                     place(p) + ", but rank " + std::to_string(rank) + " calls " +
                                     in_words(other) + " there");
        return false;
    }

    // False if the ranks' calls do not fit together.
    bool advance_collective(NcclPart* p) {
        std::vector<NcclPost*> posts;
        for (int r = 0; r < peers_.ranks; r++) {
            NcclPost* post = peers_.find(r, peers_.collectives(), p->number);
            if (post && post->call != p->call) return mismatch(*p, r, post->call);
            posts.push_back(post);
        }
        if (std::count(posts.begin(), posts.end(), nullptr)) return true;
        if (p->to && !p->bad_target) receive(*p, posts);
        for (NcclPost* post : posts) NcclPeers::read(post);
        p->over = true;
        return true;
    }

    // A send is over when the other rank has read its data.
    bool advance_pair(NcclPart* p) {
        bool sends = p->kind == NcclKind::send;
        if (!p->matched) {
            NcclPost* other =
                peers_.find(p->peer, sends ? peers_.from(peers_.rank) : peers_.to(peers_.rank), p->number);
            if (!other) return true;
            if (other->call.count != p->call.count || other->call.type != p->call.type)
                return mismatch(*p, p->peer, other->call);
            if (!sends && !p->bad_target && p->received) write(*p, peers_.data(*other), holes(*other));
            NcclPeers::read(other);
            p->matched = true;
        }
        p->over = !sends || peers_.find(peers_.rank, lane(*p), p->number)->unread == 0;
        return true;
    }

    // Which bytes of the data were written; null if all.
    const std::byte* holes(const NcclPost& post) const {
        return post.has_holes ? peers_.data(post) + post.bytes : nullptr;
    }

    void write(const NcclPart& p, const std::byte* data, const std::byte* written, size_t offset = 0,
               size_t bytes = SIZE_MAX) const {
        bytes = std::min(bytes, p.received);
        if (!bytes) return;
        std::memcpy(memory::view(p.to + offset), data, bytes);
        if (written && memory::written(p.to))
            std::memcpy(memory::written(p.to + offset), written, bytes);
        else
            memory::mark_written(p.to + offset, bytes);
    }

    void receive(const NcclPart& p, const std::vector<NcclPost*>& posts) const {
        if (p.kind == NcclKind::broadcast)
            return write(p, peers_.data(*posts[p.call.root]), holes(*posts[p.call.root]));
        if (p.kind == NcclKind::all_gather) {
            for (size_t r = 0; r < posts.size(); r++)
                write(p, peers_.data(*posts[r]), holes(*posts[r]), r * p.sent, p.sent);
            return;
        }
        // What nobody wrote on one rank, nobody wrote in the sum.
        size_t skipped = p.kind == NcclKind::reduce_scatter ? (size_t)peers_.rank * p.received : 0;
        std::vector<std::byte> sum(p.received), written;
        std::vector<const std::byte*> from;
        for (const NcclPost* post : posts) {
            from.push_back(peers_.data(*post) + skipped);
            const std::byte* here = holes(*post);
            if (!here) continue;
            written.resize(p.received, std::byte(1));
            for (size_t i = 0; i < p.received; i++) written[i] &= here[skipped + i];
        }
        if (posts.size() == 1)
            std::copy_n(from[0], p.received, sum.data());
        else
            reduce(sum.data(), from, p.call.count, p.call.type, p.call.op);
        write(p, sum.data(), written.empty() ? nullptr : written.data());
    }

    // What an aborted call would have received is not defined.
    static void spoil(const NcclPart& p) {
        if (p.over || !p.received || !memory::contains(p.to, p.received)) return;
        memory::fill(p.to, 0xFF, p.received);
        if (uint8_t* written = memory::written(p.to)) std::memset(written, 0, p.received);
    }

    // Whether this has lasted too long. Only the time counts in which this process waits.
    std::optional<cudaError_t> check_time(const NcclPart& late) {
        Clock::time_point now = Clock::now();
        if (waited_ > 0) waited_ += std::min(1.0, std::chrono::duration<double>(now - last_look_).count());
        waited_ = std::max(waited_, 1e-9);
        last_look_ = now;
        std::string who;
        bool gone = false;
        for (int r = 0; r < peers_.ranks; r++) {
            if (r == peers_.rank || (is_pairwise(late) && r != late.peer)) continue;
            int theirs = !is_pairwise(late)            ? peers_.collectives()
                         : late.kind == NcclKind::send ? peers_.from(peers_.rank)
                                                       : peers_.to(peers_.rank);
            uint64_t count = peers_.count(r, theirs);
            if (count >= late.number && late.number) continue;
            NcclPeers::State state = peers_.state(r);
            gone |= state == NcclPeers::left;
            const char* calls = !is_pairwise(late)            ? " collectives"
                                : late.kind == NcclKind::send ? " receives from this rank"
                                                              : " sends to this rank";
            who += (who.empty() ? "rank " : ", rank ") + std::to_string(r) +
                   (state == NcclPeers::aborted ? " has ended or aborted"
                    : state == NcclPeers::left  ? " has destroyed its communicator"
                                                : " has begun " + std::to_string(count) + calls);
        }
        if (!gone && waited_ < (double)options().nccl_timeout) return std::nullopt;
        found(Fault::collective, in_words(late.call) + ": rank " + std::to_string(peers_.rank) +
                                     " waits for this" + place(late) +
                                     (gone ? "" : " since " + std::to_string(options().nccl_timeout) + " s") +
                                     ", but " + (who.empty() ? "it does not end" : who));
        comm_->error = ncclRemoteError;
        return cudaErrorLaunchTimeout;
    }

    std::shared_ptr<NcclComm> comm_;
    std::vector<NcclPart> parts_;
    NcclPeers& peers_;
    double waited_ = 0;
    Clock::time_point last_look_;
};

// The calls of a group run at the same time, so none may write what another one uses. A rank may send an
// array to itself in place.
void check_group(const std::vector<NcclPart>& parts, int rank) {
    auto meet = [](uint64_t a, size_t n, uint64_t b, size_t m) { return n && m && a < b + m && b < a + n; };
    for (const NcclPart& a : parts)
        for (const NcclPart& b : parts) {
            if (&a == &b || (a.peer == rank && b.peer == rank && a.to == b.from)) continue;
            if (meet(a.to, a.received, b.from, b.sent) ||
                (&a < &b && meet(a.to, a.received, b.to, b.received)))
                found(Fault::collective, in_words(a.call) + " writes memory that " + in_words(b.call) +
                                             " of the same group uses");
        }
}

}  // namespace

size_t size_of(ncclDataType_t type) {
    switch (type) {
        case ncclInt8:
        case ncclUint8:
        case ncclFloat8e4m3:
        case ncclFloat8e5m2:
            return 1;
        case ncclFloat16:
        case ncclBfloat16:
            return 2;
        case ncclInt32:
        case ncclUint32:
        case ncclFloat32:
            return 4;
        case ncclInt64:
        case ncclUint64:
        case ncclFloat64:
            return 8;
        default:
            return 0;
    }
}

bool can_reduce(ncclDataType_t type) {
    return type != ncclFloat8e4m3 && type != ncclFloat8e5m2;
}

std::string in_words(const NcclCall& call) {
    const char* ops[] = {"sum", "prod", "max", "min", "avg"};
    return std::string(call.name) + "(" + std::to_string(call.count) + " " + name_of(call.type) +
           (call.op >= 0 ? std::string(", ") + ops[call.op] : "") +
           (call.root >= 0 ? ", root " + std::to_string(call.root) : "") + ")";
}

ncclResult_t enqueue(const std::shared_ptr<NcclComm>& comm, std::vector<NcclPart> parts) {
    std::vector<CUstream_st*> streams;
    Task task;
    for (const NcclPart& p : parts) {
        CUstream_st* stream = find_stream(p.stream);
        if (!stream) return refuse(ncclInvalidArgument, p.call.name, "there is no such stream");
        if (std::find(streams.begin(), streams.end(), stream) == streams.end()) streams.push_back(stream);
        if (p.sent && p.from) task.uses.push_back({p.from, p.sent, Use::read});
        if (p.received && p.to) task.uses.push_back({p.to, p.received, Use::write});
        if (task.what.size() < 200) task.what += (task.what.empty() ? "" : ", ") + in_words(p.call);
    }
    check_group(parts, comm->peers->rank);
    task.type = cudaGraphNodeTypeKernel;
    auto work = std::make_shared<Work>(comm, std::move(parts));
    task.run = [work] { return work->begin(); };
    task.over = [work] { return work->over(); };
    task.given_up = std::shared_ptr<const std::atomic<bool>>(comm, &comm->aborted);
    std::vector<OperationRef> before;
    if (comm->last && !comm->last->done) before.push_back(comm->last);
    OperationRef op;
    cudaError_t e = api([&] { return enqueue(streams, std::move(task), std::move(before), &op); });
    if (e != cudaSuccess) return ncclUnhandledCudaError;
    if (op) comm->last = op;
    return ncclSuccess;
}

}  // namespace ptxsim
#endif
