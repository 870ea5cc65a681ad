// The connection between the ranks of a communicator: a file of shared memory that all ranks map.
//
// The file's name comes from the communicator's id, and the last rank that comes removes the name. So nothing
// is left when the processes end, however they end. Each rank holds a lock on one byte of the file, which the
// system releases when the process ends; so the others see that.
//
// A rank posts what it contributes to a call, with the data that it sends, and reads what the others have
// posted. Posts are numbered in lanes: a lane for collectives, one for what the rank sends to each other
// rank, and one for what it receives from each.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ptxsim {

// What a rank says about its call. All ranks have to say the same.
struct NcclCall {
    char name[24] = {};
    uint64_t count = 0;
    int32_t type = 0;
    int32_t op = -1, root = -1;  // -1: the call has none
    bool operator==(const NcclCall&) const = default;
};

struct NcclPost {
    std::atomic<uint64_t> number;  // in its lane, from 1
    std::atomic<int32_t> unread;   // how many ranks have not read it yet
    NcclCall call;
    uint64_t offset, bytes;  // its data; bytes may be 0
    bool has_holes;          // the data is followed by as many bytes that say which of it was written
};

class NcclPeers {
  public:
    enum State : int32_t { absent, connected, left, aborted };

    // Joins the communicator `id`, without waiting for other ranks. Null if that is impossible, and *why says
    // why.
    //   device: two ranks may not have the same one; -1: this process has its own
    static std::unique_ptr<NcclPeers> join(const std::string& id, int ranks, int rank, int device,
                                           std::string* why);
    ~NcclPeers();
    NcclPeers(const NcclPeers&) = delete;

    const int ranks, rank;
    bool all_joined() const;
    State state(int rank) const;  // aborted also if the process has ended
    void set_state(State state);
    // Names a rank that has aborted or whose process has ended, or returns an empty text.
    std::string lost() const;

    int collectives() const { return 0; }
    int to(int rank) const { return 1 + rank; }
    int from(int rank) const { return 1 + ranks + rank; }

    // Posts the next call of a lane, for `readers` ranks that call read() on it. False if earlier ones have
    // not been read yet. Sets *number. The data at `address` has been checked; 0: there is none.
    bool post(int lane, const NcclCall& call, uint64_t address, size_t bytes, int readers, uint64_t* number);
    // The post with this number, or null if the rank has not made it yet.
    NcclPost* find(int owner, int lane, uint64_t number) const;
    const std::byte* data(const NcclPost& post) const { return base_ + post.offset; }
    static void read(NcclPost* post) { post->unread.fetch_sub(1); }
    uint64_t count(int owner, int lane) const;  // how many posts it has made

  private:
    struct Header;
    struct Rank;
    struct Lane;
    NcclPeers(int ranks, int rank) : ranks(ranks), rank(rank) {}
    Rank& of(int rank) const;
    Lane& lane(int owner, int lane) const;
    void release();

    int file_ = -1;
    std::string name_;  // of the file; empty if it has none
    std::byte* base_ = nullptr;
    size_t bytes_ = 0;
    // Where this rank's data begins and where the next goes, and how many bytes others have not read yet.
    uint64_t begin_ = 0, next_ = 0, held_ = 0;
    std::vector<NcclPost*> unread_;
};

}  // namespace ptxsim
