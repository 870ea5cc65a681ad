#include "dev/ptxsim/nccl_peers.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "dev/ptxsim/memory.h"

namespace ptxsim {
namespace {

constexpr int kMostRanks = 64, kSlots = 256;
constexpr uint64_t kPage = 4096,
                   kData = 32ull << 30;  // for each rank, of which only what is in use takes memory

uint64_t round_up(uint64_t n) {
    return (n + kPage - 1) / kPage * kPage;
}

}  // namespace

struct NcclPeers::Rank {
    std::atomic<int32_t> state;
    int32_t device, process;
};
struct NcclPeers::Lane {
    std::atomic<uint64_t> count;
    NcclPost posts[kSlots];
};
struct NcclPeers::Header {
    std::atomic<int32_t> ranks, joined, broken;  // broken: a process could not join
    Rank all[kMostRanks];
};

NcclPeers::Rank& NcclPeers::of(int r) const {
    return ((Header*)base_)->all[r];
}

NcclPeers::Lane& NcclPeers::lane(int owner, int lane) const {
    return ((Lane*)(base_ + round_up(sizeof(Header))))[(size_t)owner * (1 + 2 * ranks) + lane];
}

std::unique_ptr<NcclPeers> NcclPeers::join(const std::string& id, int ranks, int rank, int device,
                                           std::string* why) {
    std::unique_ptr<NcclPeers> p(new NcclPeers(ranks, rank));
    auto failed = [&](const std::string& text) {
        *why = text;
        if (p->base_) ((Header*)p->base_)->broken = 1;
        return nullptr;
    };
    if (ranks > kMostRanks)
        return failed("more than " + std::to_string(kMostRanks) + " ranks are not simulated");
    if (ranks == 1) {
        p->file_ = memfd_create("ptxsim-nccl", MFD_CLOEXEC);
    } else {
        p->name_ = "/ptxsim-nccl-" + id;
        p->file_ = shm_open(p->name_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    }
    uint64_t lanes = round_up(sizeof(Header)) + round_up(sizeof(Lane) * ranks * (1 + 2 * ranks));
    p->bytes_ = lanes + ranks * kData;
    if (p->file_ < 0 || ftruncate(p->file_, (off_t)p->bytes_) != 0)
        return failed("cannot make shared memory " + p->name_ + ": " + std::strerror(errno));
    void* base = mmap(nullptr, p->bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, p->file_, 0);
    if (base == MAP_FAILED) return failed(std::string("cannot map shared memory: ") + std::strerror(errno));
    p->base_ = (std::byte*)base;
    p->begin_ = p->next_ = lanes + rank * kData;

    Header& header = *(Header*)base;
    int32_t none = 0;
    if (!header.ranks.compare_exchange_strong(none, ranks) && none != ranks)
        return failed("this rank says that there are " + std::to_string(ranks) + " ranks, another one says " +
                      std::to_string(none));
    struct flock lock = {};
    lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = rank, lock.l_len = 1;
    if (fcntl(p->file_, F_OFD_SETLK, &lock) != 0 || header.all[rank].state != absent)
        return failed("another process is rank " + std::to_string(rank) + " already");
    Rank& self = header.all[rank];
    self.device = device;
    self.process = getpid();
    self.state = connected;
    for (int r = 0; r < ranks; r++) {
        const Rank& other = header.all[r];
        if (r == rank || other.state == absent) continue;
        if (other.process == self.process || (device >= 0 && other.device == device)) {
            return failed("ranks " + std::to_string(std::min(r, rank)) + " and " +
                          std::to_string(std::max(r, rank)) + " use the same device" +
                          (device >= 0 ? " " + std::to_string(device) : ", because they are in one process"));
        }
    }
    if (header.joined.fetch_add(1) + 1 == ranks && !p->name_.empty()) {
        shm_unlink(p->name_.c_str());
        p->name_.clear();
    }
    return p;
}

NcclPeers::~NcclPeers() {
    if (!name_.empty() && base_ && ((Header*)base_)->joined < ranks) shm_unlink(name_.c_str());
    if (base_) munmap(base_, bytes_);
    if (file_ >= 0) close(file_);
}

bool NcclPeers::all_joined() const {
    return ((Header*)base_)->joined == ranks;
}

NcclPeers::State NcclPeers::state(int r) const {
    State s = (State)of(r).state.load();
    if (s != connected || r == rank) return s;
    struct flock lock = {};
    lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = r, lock.l_len = 1;
    if (fcntl(file_, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK) {
        s = (State)of(r).state.load();  // it may have left in the meantime
        return s == connected ? aborted : s;
    }
    return s;
}

void NcclPeers::set_state(State state) {
    of(rank).state = state;
}

std::string NcclPeers::lost() const {
    for (int r = 0; r < ranks; r++)
        if (r != rank && state(r) == aborted)
            return "rank " + std::to_string(r) +
                   (of(r).state == aborted ? " has aborted the communicator" : " has ended without a word");
    return ((Header*)base_)->broken ? "a process could not join the communicator" : "";
}

void NcclPeers::release() {
    std::erase_if(unread_, [&](NcclPost* post) {
        if (post->unread > 0) return false;
        size_t bytes = round_up(post->bytes * (1 + post->has_holes));
        fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)post->offset, (off_t)bytes);
        held_ -= bytes;
        return true;
    });
}

bool NcclPeers::post(int lane_number, const NcclCall& call, uint64_t address, size_t bytes, int readers,
                     uint64_t* number) {
    release();
    Lane& l = lane(rank, lane_number);
    NcclPost& post = l.posts[l.count % kSlots];
    if (post.unread > 0) return false;
    const uint8_t* written = address ? memory::written(address) : nullptr;
    post.has_holes = written && bytes && std::memchr(written, 0, bytes);
    size_t total = round_up(bytes * (1 + post.has_holes));
    if (total > kData - held_) return false;
    // The data of a rank is a ring. What is in use is far less than its size, so it never meets itself.
    if (next_ + total > begin_ + kData) next_ = begin_;
    post.call = call;
    post.offset = next_;
    post.bytes = bytes;
    if (total) {
        // Without this, a full file system would end the process at the first write.
        if (int error = posix_fallocate(file_, (off_t)next_, (off_t)total)) {
            std::fprintf(stderr, "ptxsim: NCCL: shared memory for %zu bytes: %s\n", total,
                         std::strerror(error));
            std::exit(2);
        }
        std::byte* to = base_ + next_;
        if (address)
            std::memcpy(to, memory::view(address), bytes);
        else
            std::memset(to, 0xFF, bytes);
        if (post.has_holes) std::memcpy(to + bytes, written, bytes);
        next_ += total;
        held_ += total;
        unread_.push_back(&post);
    }
    post.unread = readers;
    *number = l.count + 1;
    post.number = *number;  // from here on, others may read it
    l.count = *number;
    return true;
}

NcclPost* NcclPeers::find(int owner, int lane_number, uint64_t number) const {
    NcclPost& post = lane(owner, lane_number).posts[(number - 1) % kSlots];
    return post.number == number ? &post : nullptr;
}

uint64_t NcclPeers::count(int owner, int lane_number) const {
    return lane(owner, lane_number).count;
}

}  // namespace ptxsim
