// All ranks of a run meet before it starts: rank 0 listens, the others connect to it, and each learns that it
// talks to a rank of the same run and the same build. Then rank 0 can hand out a few bytes, such as the id of
// an NCCL communicator. What ranks say to each other after that is in llmc/links.h.
//
// The network is not trusted to be quiet. A peer that is slow, silent, or no rank at all has a few seconds for
// its greeting and delays nobody else. A peer of another run is refused and told why, and rank 0 goes on
// waiting. If two ranks of this run cannot work together, all ranks end. Every operation ends within the
// timeout, except that the system's look-up of a host's name cannot be interrupted.
//
// The first message in each direction begins with kMagic and kProtocol, which later versions keep, so that
// they can refuse each other.
#pragma once
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "llmc/communicator.h"
#include "llmc/connection.h"
#include "llmc/error.h"
#include "llmc/launch.h"

namespace net {

constexpr std::string_view kMagic = "polygpt\n";
constexpr uint32_t kProtocol = 1;
constexpr size_t kLongestGreeting = 4096;  // bytes in the first message of anybody

inline std::string opening() {
    std::string text(kMagic);
    put(text, kProtocol);
    return text;
}

// Takes the opening from the front of `in` when it is there. Returns what is wrong with it: "" if nothing,
// and none if more bytes are needed.
inline std::optional<std::string> take_opening(std::string& in) {
    const size_t magic = std::min(in.size(), kMagic.size());
    if (std::string_view(in).substr(0, magic) != kMagic.substr(0, magic)) return "is not a rank of polygpt";
    Unpacker unpacker{std::string_view(in).substr(magic)};
    const uint32_t protocol = unpacker.number();
    if (!unpacker.good) return {};
    in.erase(0, kMagic.size() + 4);
    if (protocol != kProtocol)
        return str("speaks version ", protocol, " of polygpt's protocol, expected ", kProtocol);
    return "";
}

struct AddressList {
    addrinfo* first = nullptr;
    AddressList() = default;
    AddressList(const AddressList&) = delete;
    AddressList& operator=(const AddressList&) = delete;
    ~AddressList() {
        if (first) ::freeaddrinfo(first);
    }
    // Returns 0 or the error.
    int find(const char* host, int port, int flags) {
        addrinfo hints = {};
        hints.ai_socktype = SOCK_STREAM;
        hints.ai_flags = flags | AI_NUMERICSERV;
        return ::getaddrinfo(host, std::to_string(port).c_str(), &hints, &first);
    }
};

// The host without the brackets that an IPv6 address may have.
inline std::string host_of(const std::string& master) {
    const bool brackets = master.size() > 2 && master.front() == '[' && master.back() == ']';
    return brackets ? master.substr(1, master.size() - 2) : master;
}

}  // namespace net

class Rendezvous {
  public:
    struct Limits {
        double timeout = 600;  // seconds for all ranks to come, and for the broadcast after that
        double greeting = 5;   // seconds for a peer to say who it is, or for rank 0 to answer
    };

    // Returns when all ranks have come. `build` names the program; all ranks must have the same.
    Rendezvous(const Launch& launch, const std::string& build, const Limits& limits)
        : launch(launch), build(build), limits(limits) {
        if (launch.ranks == 1) return;
        if (launch.master.empty())
            fail("MASTER_ADDR is not set: expected the name or the address of rank 0's machine, because ",
                 launch.launcher, " does not say where that is");
        const Clock::time_point deadline = net::after(limits.timeout);
        if (launch.rank == 0)
            gather_ranks(deadline);
        else
            join(deadline);
    }
    Rendezvous(const Rendezvous&) = delete;
    Rendezvous& operator=(const Rendezvous&) = delete;

    // Rank 0 calls make(), and all ranks get its result. If it throws, all ranks fail with its message.
    template <class Make>
    std::string broadcast(Make make) {
        const Clock::time_point deadline = net::after(limits.timeout);
        if (launch.rank > 0) return receive(net::blob, deadline);
        std::string bytes;
        try {
            bytes = make();
        } catch (const Error& e) {
            tell_failure(str("rank 0: ", e.what()));
            throw;
        }
        send_all(net::blob, bytes, deadline);
        return bytes;
    }

    // Hands over the connections (ranks), for what comes after the start (llmc/links.h). Rank 0 has one to
    // each other rank, and another rank has only the first one, to rank 0.
    std::vector<std::unique_ptr<net::Connection>> take_connections() {
        if (launch.rank > 0) {
            peers.resize(launch.ranks);
            peers[0] = std::move(connection);
        }
        return std::move(peers);
    }

  private:
    using Clock = net::Clock;
    using Connection = net::Connection;
    using Message = net::Message;

    const Launch launch;
    const std::string build;
    const Limits limits;
    std::vector<std::unique_ptr<Connection>> peers;  // at rank 0: (ranks), of which the first is null
    std::unique_ptr<Connection> connection;          // at another rank: to rank 0

    std::string place() const { return str(launch.master, " port ", launch.port); }
    std::string name_of_master() const { return str("rank 0 at ", place()); }

    // Tells the ranks that have come why there is no start.
    void tell_failure(const std::string& why) {
        for (const auto& peer : peers)
            if (peer && !peer->closed) peer->send(net::failure, why);
        flush(net::after(std::min(1.0, limits.timeout)));
    }
    [[noreturn]] void give_up(const std::string& why) {
        tell_failure(why);
        fail(why);
    }

    // ---- at rank 0 ----

    // Sends what waits to be sent, as far as that is possible until the deadline. Returns the ranks that have
    // not taken it.
    std::vector<int> flush(Clock::time_point deadline) {
        using namespace net;
        for (;;) {
            std::vector<pollfd> fds;
            std::vector<int> left;
            for (int rank = 1; rank < (int)peers.size(); rank++) {
                if (!peers[rank] || peers[rank]->closed) continue;
                peers[rank]->progress(kLongest);
                if (peers[rank]->out.empty()) continue;
                fds.push_back({peers[rank]->fd, POLLOUT, 0});
                left.push_back(rank);
            }
            if (left.empty() || Clock::now() >= deadline) return left;
            wait(fds, deadline);
        }
    }

    void send_all(net::Type type, std::string_view body, Clock::time_point deadline) {
        for (int rank = 1; rank < launch.ranks; rank++) peers[rank]->send(type, body);
        const std::vector<int> late = flush(deadline);
        // A rank that has got everything may end now.
        for (int rank = 1; rank < launch.ranks; rank++)
            if (!peers[rank]->out.empty()) require_open(rank);
        if (!late.empty()) give_up(str(ranks_text(late), " took nothing for ", limits.timeout, " s"));
    }

    void require_open(int rank) {
        if (peers[rank]->closed)
            give_up(str("rank ", rank, " at ", peers[rank]->address, " has ended before the start"));
    }

    // Sockets that listen at the port: on the loopback if MASTER_ADDR is that, else on all addresses, because
    // a machine's own name may lead to its loopback there.
    std::vector<std::unique_ptr<Connection>> listen_at_port() const {
        using namespace net;
        const std::string host = host_of(launch.master);
        const bool loopback = host == "localhost" || host == "::1" || host.starts_with("127.");
        AddressList addresses;
        if (const int error = addresses.find(loopback ? host.c_str() : nullptr, launch.port, AI_PASSIVE))
            fail("cannot listen at ", place(), ": ", ::gai_strerror(error));
        std::vector<std::unique_ptr<Connection>> sockets;
        std::string why;
        for (const addrinfo* a = addresses.first; a; a = a->ai_next) {
            const int fd = ::socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
            if (fd < 0) {  // a system without IPv6
                why = std::strerror(errno);
                continue;
            }
            auto socket = std::make_unique<Connection>(fd, "");
            const int yes = 1;  // a port of a run that has just ended can be used again at once
            ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
            if (a->ai_family == AF_INET6) ::setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &yes, sizeof(yes));
            if (::bind(fd, a->ai_addr, a->ai_addrlen) == 0 && ::listen(fd, SOMAXCONN) == 0) {
                sockets.push_back(std::move(socket));
                continue;
            }
            if (errno == EADDRINUSE)
                fail("port ", launch.port,
                     " of this machine is in use by another program: expected a free port "
                     "for rank 0; MASTER_PORT chooses another");
            why = std::strerror(errno);
        }
        if (sockets.empty()) fail("cannot listen at ", place(), ": ", why);
        return sockets;
    }

    // What rank 0 has while ranks come.
    struct Door {
        std::vector<std::unique_ptr<Connection>> listeners;
        std::list<std::unique_ptr<Connection>> strangers;  // whose greeting has not come
        std::list<std::unique_ptr<Connection>> refused;    // that take the answer before they are closed
        std::string refusals;  // who was refused and why, for the message of a timeout
    };

    void accept_all(Door& door, int listener) {
        for (;;) {
            sockaddr_storage address;
            socklen_t size = sizeof(address);
            const int fd = ::accept4(listener, (sockaddr*)&address, &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
            const bool full = fd < 0 && (errno == EMFILE || errno == ENFILE);
            if (full && door.strangers.empty())
                give_up(str("cannot accept ", launch.ranks,
                            " ranks: too many open files; expected a larger ulimit -n"));
            // So many strangers are not ranks; the oldest makes room.
            if (full || door.strangers.size() > (size_t)launch.ranks + 64) door.strangers.pop_front();
            if (fd < 0) return;
            door.strangers.push_back(std::make_unique<Connection>(fd, net::address_text(address, size)));
            door.strangers.back()->deadline = net::after(limits.greeting);
            door.strangers.back()->out = net::opening();
        }
    }

    struct Verdict {
        bool accepted = false, ends_the_start = false;
        int rank = 0;
        std::string why = {};  // what differs
    };

    // Judges the greeting of a peer.
    Verdict judge(const std::string& body) {
        net::Unpacker unpacker{body};
        const uint32_t rank = unpacker.number(), ranks = unpacker.number();
        const std::string run_id = unpacker.text(), its_build = unpacker.text();
        if (!unpacker.good || !unpacker.left.empty()) return {.why = "its greeting cannot be read"};
        if (run_id != launch.run_id)
            return {.why = str("it belongs to the run ", shown(run_id), ", and rank 0 to ",
                               shown(launch.run_id))};
        // Without an id it may still belong to another run, so this one goes on.
        Verdict verdict{.ends_the_start = !run_id.empty()};
        if (ranks != (uint32_t)launch.ranks)
            verdict.why = str("it is one of ", ranks, " ranks, and rank 0 one of ", launch.ranks);
        else if (its_build != build)
            verdict.why = str("rank ", rank, " is ", shown(its_build), ", and rank 0 is ", shown(build));
        else if (rank == 0 || rank >= ranks)
            verdict.why = str("it calls itself rank ", rank, ", which is not one of 1 to ", launch.ranks - 1);
        else if (peers[rank] && !peers[rank]->closed)
            verdict.why = str("rank ", rank, " has come already, from ", peers[rank]->address);
        else
            verdict = {.accepted = true, .rank = (int)rank};
        return verdict;
    }

    // Waits for all other ranks.
    void gather_ranks(Clock::time_point deadline) {
        using namespace net;
        // Each rank takes a descriptor, and the usual limit is 1,024.
        const rlim_t needed = (rlim_t)launch.ranks + 64;
        rlimit files;
        if (::getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < needed) {
            if (files.rlim_max < needed)
                fail("ulimit -Hn is ", files.rlim_max, ": expected at least ", needed,
                     ", because rank 0 has a connection to each of the ", launch.ranks, " ranks");
            files.rlim_cur = needed;
            ::setrlimit(RLIMIT_NOFILE, &files);
        }
        Door door;
        door.listeners = listen_at_port();
        peers.resize(launch.ranks);
        for (;;) {
            std::vector<int> missing;
            for (int rank = 1; rank < launch.ranks; rank++)
                if (!peers[rank] || peers[rank]->closed) missing.push_back(rank);
            if (missing.empty()) break;
            if (Clock::now() >= deadline)
                give_up(str(ranks_text(missing), missing.size() == 1 ? " has" : " have", " not come to ",
                            place(), " within ", limits.timeout, " s",
                            door.refusals.empty() ? "" : "; rank 0 has refused " + door.refusals));
            Clock::time_point next = deadline;
            std::vector<pollfd> fds;
            for (const auto& listener : door.listeners) fds.push_back({listener->fd, POLLIN, 0});
            for (const auto* list : {&door.strangers, &door.refused})
                for (const auto& peer : *list) {
                    fds.push_back(peer->waits_for());
                    next = std::min(next, peer->deadline);
                }
            for (const auto& peer : peers)
                if (peer && !peer->closed) fds.push_back(peer->waits_for());
            wait(fds, next);

            for (const auto& listener : door.listeners) accept_all(door, listener->fd);
            for (const auto& peer : peers)
                if (peer) peer->progress(kLongest);
            hear_strangers(door);
            // A refused peer closes the connection when it has read why. If this side closed first while
            // bytes of the peer are unread, the system would discard the answer.
            std::erase_if(door.refused, [](const auto& peer) {
                peer->progress(kLongest);
                peer->in.clear();
                return peer->closed || Clock::now() >= peer->deadline;
            });
            if (door.refused.size() > 64) door.refused.pop_front();
        }
        send_all(welcome, "", deadline);
    }

    // Makes strangers whose greeting has come ranks, or refuses them.
    void hear_strangers(Door& door) {
        using namespace net;
        for (auto i = door.strangers.begin(); i != door.strangers.end();) {
            Connection& peer = **i;
            peer.progress(kLongestGreeting);
            std::optional<Verdict> verdict = judge_stranger(peer);
            if (!verdict && (peer.closed || Clock::now() >= peer.deadline))
                verdict = Verdict{.why = peer.closed ? "it left without a greeting" : "it sent no greeting"};
            if (!verdict) {
                ++i;
                continue;
            }
            peer.send(verdict->accepted ? welcome : failure, verdict->why);
            peer.progress(kLongest);
            if (verdict->accepted) {
                peers[verdict->rank] = std::move(*i);
            } else {
                const std::string why = str("a peer from ", peer.address, ": ", verdict->why);
                if (verdict->ends_the_start) give_up(why);
                if (door.refusals.size() < 300) door.refusals += (door.refusals.empty() ? "" : "; ") + why;
                peer.deadline = after(limits.greeting);
                door.refused.push_back(std::move(*i));
            }
            i = door.strangers.erase(i);
        }
    }

    // The verdict about a peer whose greeting has come, or which cannot have one.
    std::optional<Verdict> judge_stranger(Connection& peer) {
        using namespace net;
        std::string rest = peer.in;
        const std::optional<std::string> wrong = take_opening(rest);
        if (!wrong) return {};
        if (!wrong->empty()) return Verdict{.why = "it " + *wrong};
        if (rest.size() > kLongestGreeting) return Verdict{.why = "its greeting is too long"};
        std::swap(peer.in, rest);
        std::optional<Message> message = peer.message();
        if (!message) {
            std::swap(peer.in, rest);
            return {};
        }
        if (message->type != greeting) return Verdict{.why = "it sent no greeting"};
        return judge(message->body);
    }

    // ---- at the other ranks ----

    // Waits for the next message of rank 0, which must be of this type. A failure that it tells ends this
    // rank.
    std::string receive(net::Type type, Clock::time_point deadline) {
        using namespace net;
        // A little longer than rank 0 waits, because rank 0 can say which rank is missing.
        deadline += std::chrono::milliseconds((int)(1000 * std::min(2.0, limits.timeout / 2)));
        for (;;) {
            connection->progress(kLongest);
            if (std::optional<Message> message = connection->message()) {
                if (message->type == failure) fail(message->body);
                if (message->type != type) fail(name_of_master(), " sent what was not expected");
                return std::move(message->body);
            }
            if (connection->closed) fail(name_of_master(), " has ended before the start");
            if (Clock::now() >= deadline)
                fail(name_of_master(), " did not answer within ", limits.timeout, " s");
            std::vector<pollfd> fds = {connection->waits_for()};
            wait(fds, deadline);
        }
    }

    // Connects to rank 0, which may start later than this rank, and waits until all ranks have come.
    void join(Clock::time_point deadline) {
        using namespace net;
        const std::string host = host_of(launch.master);
        std::string why;
        double pause = 0.02;
        while (!connection) {
            AddressList addresses;
            if (const int error = addresses.find(host.c_str(), launch.port, 0))
                why = str("the host is unknown (", ::gai_strerror(error), ")");
            for (const addrinfo* a = addresses.first; a && !connection && Clock::now() < deadline;
                 a = a->ai_next)
                connection = greet(*a, deadline, why);
            if (connection) break;
            if (Clock::now() >= deadline)
                fail("cannot reach ", name_of_master(), " within ", limits.timeout, " s: ", why);
            std::this_thread::sleep_until(std::min(deadline, after(pause)));
            pause = std::min(1.0, 1.5 * pause);
        }
        receive(welcome, deadline);
    }

    // Connects to one address and greets. Null if nobody answers as rank 0 does; `why` says what happened.
    std::unique_ptr<Connection> greet(const addrinfo& address, Clock::time_point deadline, std::string& why) {
        using namespace net;
        deadline = std::min(deadline, after(limits.greeting));
        const int fd = ::socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0) return why = std::strerror(errno), nullptr;
        auto peer = std::make_unique<Connection>(fd, "");
        if (::connect(fd, address.ai_addr, address.ai_addrlen) != 0) {
            if (errno != EINPROGRESS && errno != EINTR) return why = std::strerror(errno), nullptr;
            std::vector<pollfd> fds = {{fd, POLLOUT, 0}};
            while (fds[0].revents == 0 && Clock::now() < deadline) wait(fds, deadline);
            int error = fds[0].revents ? 0 : ETIMEDOUT;
            socklen_t size = sizeof(error);
            if (fds[0].revents) ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
            if (error) return why = std::strerror(error), nullptr;
        }
        std::string greetings;
        put(greetings, (uint32_t)launch.rank);
        put(greetings, (uint32_t)launch.ranks);
        put(greetings, launch.run_id);
        put(greetings, build);
        peer->out = opening();
        peer->send(greeting, greetings);
        bool opened = false;
        for (;;) {
            peer->progress(kLongestGreeting);
            if (!opened) {
                const bool polygpt = peer->in.starts_with(kMagic);
                const std::optional<std::string> wrong = take_opening(peer->in);
                if (polygpt && wrong && !wrong->empty()) fail(name_of_master(), " ", *wrong);
                if (wrong && !wrong->empty()) return why = "what listens there " + *wrong, nullptr;
                opened = wrong.has_value();
            }
            if (std::optional<Message> message = opened ? peer->message() : std::nullopt) {
                if (message->type == welcome) return peer;
                if (message->type == failure) fail(name_of_master(), " refuses this rank: ", message->body);
                return why = "what listens there sent what was not expected", nullptr;
            }
            if (peer->closed) return why = "what listens there has closed the connection", nullptr;
            if (Clock::now() >= deadline) return why = "what listens there does not answer", nullptr;
            std::vector<pollfd> fds = {peer->waits_for()};
            wait(fds, deadline);
        }
    }
};
