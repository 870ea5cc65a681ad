// Ranks that meet over TCP, as threads of this process: the good case, and every peer that disturbs it.
#include "llmc/rendezvous.h"

#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "llmc/links.h"
#include "tests/helpers.h"

namespace {

using namespace net;
using Seconds = std::chrono::duration<double>;

double now() {
    return Seconds(Clock::now().time_since_epoch()).count();
}

// A port that nothing listens at, below those of outgoing connections.
int free_port() {
    static int next = 10000 + ::getpid() % 10000;
    for (;; next++) {
        const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        REQUIRE(fd >= 0);
        sockaddr_in address = {};
        address.sin_family = AF_INET;
        address.sin_port = htons((uint16_t)next);
        const bool free = ::bind(fd, (const sockaddr*)&address, sizeof(address)) == 0;
        ::close(fd);
        if (free) return next++;
    }
}

Launch rank_of(int rank, int ranks, int port, const std::string& master = "127.0.0.1") {
    Launch launch;
    launch.launcher = "a test";
    launch.rank = rank, launch.ranks = ranks;
    launch.master = master, launch.port = port;
    launch.run_id = "run 7";
    return launch;
}

// What a rank has got, or the text of its error.
struct Outcome {
    std::string blob, error;
    std::vector<std::string> texts;
};

// The bytes of an NCCL id, with zeros among them.
std::string id() {
    std::string bytes(128, '\0');
    for (int i = 0; i < 128; i++) bytes[i] = (char)(i * 37);
    return bytes;
}

Outcome meet(const Launch& launch, double timeout, const std::string& build = "build A",
             double greeting = 1) {
    Outcome outcome;
    try {
        Rendezvous all(launch, build, {timeout, greeting});
        outcome.blob = all.broadcast(id);
        if (launch.ranks == 1) return outcome;
        Links links(launch.rank, all.take_connections(), timeout);
        outcome.texts = links.gather(str("text of ", launch.rank));
        links.leave();
    } catch (const Error& e) {
        outcome.error = e.what();
    }
    return outcome;
}

// Runs every rank in a thread.
std::vector<Outcome> meet_all(const std::vector<Launch>& launches, double timeout) {
    std::vector<Outcome> outcomes(launches.size());
    std::vector<std::thread> threads;
    for (size_t i = 0; i < launches.size(); i++)
        threads.emplace_back([&, i] { outcomes[i] = meet(launches[i], timeout); });
    for (std::thread& thread : threads) thread.join();
    return outcomes;
}

void check_met(const Outcome& outcome, int ranks) {
    CHECK(outcome.error == "");
    CHECK(outcome.blob == id());
    if (ranks == 1) return;  // it has nobody to say anything to
    REQUIRE(outcome.texts.size() == (size_t)ranks);
    for (int rank = 0; rank < ranks; rank++) CHECK(outcome.texts[rank] == str("text of ", rank));
}

void check_says(const std::string& error, std::initializer_list<std::string> parts) {
    check_error([&] { fail(error); }, parts);
}

// A peer that is not a Rendezvous: a connection that sends bytes and receives what comes.
class Peer {
  public:
    explicit Peer(int port) {
        sockaddr_in address = {};
        address.sin_family = AF_INET;
        address.sin_port = htons((uint16_t)port);
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        for (int i = 0; i < 200; i++) {  // rank 0 may not listen yet
            fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (::connect(fd, (const sockaddr*)&address, sizeof(address)) == 0) return;
            ::close(fd);
            ::usleep(10000);
        }
        fd = -1;
    }
    Peer(const Peer&) = delete;
    ~Peer() { ::close(fd); }
    void send(const std::string& bytes) { (void)!::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL); }
    // What comes within these seconds, or until the other side closes.
    std::string receive(double seconds) {
        std::string all;
        const double end = now() + seconds;
        char buffer[4096];
        while (now() < end) {
            const ssize_t size = ::recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT);
            if (size == 0) break;
            if (size > 0) all.append(buffer, size);
            if (size < 0) ::usleep(2000);
        }
        return all;
    }

  private:
    int fd = -1;
};

std::string greeting_of(uint32_t rank, uint32_t ranks, const std::string& run_id = "run 7",
                        const std::string& build = "build A") {
    std::string body, bytes = opening();
    put(body, rank), put(body, ranks), put(body, run_id), put(body, build);
    bytes += greeting;
    put(bytes, body);
    return bytes;
}

// Two ranks of which one comes when disturb(port) has done its work. Both must meet nevertheless.
void check_not_disturbed(const std::function<void(int)>& disturb) {
    const int port = free_port();
    Outcome first, second;
    std::thread zero([&] { first = meet(rank_of(0, 2, port), 5); });
    disturb(port);
    second = meet(rank_of(1, 2, port), 5);
    zero.join();
    check_met(first, 2);
    check_met(second, 2);
}

}  // namespace

TEST_CASE("rendezvous: all ranks get the bytes of rank 0 and the text of each") {
    for (const char* master : {"127.0.0.1", "::1", "[::1]", "localhost"}) {
        CAPTURE(master);
        for (const int ranks : {1, 2, 5}) {
            const int port = free_port();
            std::vector<Launch> launches;
            for (int rank = ranks - 1; rank >= 0; rank--)
                launches.push_back(rank_of(rank, ranks, port, master));
            for (const Outcome& outcome : meet_all(launches, 5)) check_met(outcome, ranks);
        }
    }
}

TEST_CASE("rendezvous: the name of this machine, at which rank 0 listens on all addresses") {
    char host[256] = "";
    REQUIRE(::gethostname(host, sizeof(host) - 1) == 0);
    AddressList addresses;
    if (addresses.find(host, 1, 0) != 0) {
        MESSAGE("skipped: this machine does not know its own name");
        return;
    }
    const int port = free_port();
    for (const Outcome& outcome : meet_all({rank_of(0, 2, port, host), rank_of(1, 2, port, host)}, 5))
        check_met(outcome, 2);
}

TEST_CASE("rendezvous: long texts, and the same port again at once") {
    const int port = free_port();
    for (int run = 0; run < 2; run++) {
        std::vector<std::thread> threads;
        std::atomic<int> good = 0;
        for (int rank = 0; rank < 3; rank++)
            threads.emplace_back([&, rank] {
                Rendezvous all(rank_of(rank, 3, port), "build A", {5, 1});
                Links links(rank, all.take_connections(), 5);
                for (int round = 0; round < 3; round++) {
                    const auto texts = links.gather(std::string(1 << 20, (char)('a' + rank + round)));
                    for (int i = 0; i < 3; i++)
                        good += texts[i] == std::string(1 << 20, (char)('a' + i + round));
                }
                links.leave();
            });
        for (std::thread& thread : threads) thread.join();
        CHECK(good == 27);
    }
}

TEST_CASE("rendezvous: rank 0 comes last, and the others try again") {
    const int port = free_port();
    Outcome outcomes[3];
    std::vector<std::thread> threads;
    for (const int rank : {1, 2})
        threads.emplace_back([&, rank] { outcomes[rank] = meet(rank_of(rank, 3, port), 5); });
    ::usleep(200000);
    outcomes[0] = meet(rank_of(0, 3, port), 5);
    for (std::thread& thread : threads) thread.join();
    for (const Outcome& outcome : outcomes) check_met(outcome, 3);
}

TEST_CASE("rendezvous: ranks that never come are named at all others") {
    const int port = free_port();
    const double start = now();
    for (const Outcome& outcome : meet_all({rank_of(0, 7, port), rank_of(2, 7, port)}, 0.4))
        check_says(outcome.error, {"ranks 1, 3 to 6 have not come to 127.0.0.1 port", "within 0.4 s"});
    CHECK(now() - start < 3);
    check_says(meet(rank_of(1, 2, free_port()), 0.3).error,
               {"cannot reach rank 0 at 127.0.0.1 port", "within 0.3 s", "Connection refused"});
    check_says(meet(rank_of(1, 2, free_port(), "no-such-host.invalid"), 0.1).error,
               {"cannot reach rank 0 at no-such-host.invalid", "the host is unknown"});
    check_says(meet(rank_of(1, 2, 0, ""), 5).error, {"MASTER_ADDR is not set", "a test"});
    check_says(meet(rank_of(0, INT_MAX, 1), 5).error, {"ulimit -Hn is", "expected at least 2147483711"});
}

TEST_CASE("rendezvous: ranks of this run that differ end the start for all") {
    const struct {
        int rank, ranks;
        const char* build;
        std::vector<std::string> parts;
    } cases[] = {{2, 3, "build B", {"rank 2 is \"build B\"", "rank 0 is \"build A\""}},
                 {2, 4, "build A", {"it is one of 4 ranks", "rank 0 one of 3"}},
                 {1, 3, "build A", {"rank 1 has come already, from 127.0.0.1"}}};
    for (const auto& bad : cases) {
        const int port = free_port();
        Outcome zero, one, other;
        std::thread first([&] { zero = meet(rank_of(0, 3, port), 5); });
        std::thread second([&] { one = meet(rank_of(1, 3, port), 5); });
        ::usleep(100000);  // until rank 1 has come
        const double start = now();
        other = meet(rank_of(bad.rank, bad.ranks, port), 5, bad.build);
        first.join(), second.join();
        CHECK(now() - start < 3);
        check_says(other.error, {"rank 0 at 127.0.0.1 port", "refuses this rank"});
        for (const std::string& part : bad.parts)
            for (const Outcome* outcome : {&zero, &one, &other}) check_says(outcome->error, {part});
    }
}

TEST_CASE("rendezvous: a rank of another run is refused, and this run goes on") {
    check_not_disturbed([](int port) {
        Launch stale = rank_of(1, 2, port);
        stale.run_id = "run 6";
        check_says(meet(stale, 5).error, {"refuses this rank", "\"run 6\"", "\"run 7\""});
    });
    // Without an id nobody knows whether it is of this run.
    const int port = free_port();
    Launch launches[] = {rank_of(0, 2, port), rank_of(1, 2, port)};
    for (Launch& launch : launches) launch.run_id = "";
    Outcome zero;
    std::thread first([&] { zero = meet(launches[0], 5); });
    check_says(meet(launches[1], 5, "build B").error, {"\"build B\"", "\"build A\""});
    check_met(meet(launches[1], 5), 2);
    first.join();
    check_met(zero, 2);
}

TEST_CASE("rendezvous: another version of the protocol is refused on both sides") {
    std::string other(kMagic);
    put(other, kProtocol + 1);
    check_not_disturbed([&](int port) {
        Peer peer(port);
        peer.send(other + "what a later version says");
        const std::string answer = peer.receive(1);
        CHECK(answer.starts_with(opening()));
        CHECK(answer.find("speaks version 2 of polygpt's protocol, expected 1") != answer.npos);
    });
    // A rank 0 of another version, and another program that listens.
    for (const std::string& says : {other, std::string("SSH-2.0-OpenSSH\r\n"), std::string()}) {
        const int port = free_port(), listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
        sockaddr_in address = {};
        address.sin_family = AF_INET;
        address.sin_port = htons((uint16_t)port);
        ::setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
        REQUIRE(::bind(listener, (const sockaddr*)&address, sizeof(address)) == 0);
        REQUIRE(::listen(listener, 8) == 0);
        std::thread server([&] {  // until the listener is shut down
            std::vector<int> open;
            for (int fd; (fd = ::accept(listener, nullptr, nullptr)) >= 0; open.push_back(fd))
                (void)!::write(fd, says.data(), says.size());
            for (const int fd : open) ::close(fd);
        });
        const std::string error = meet(rank_of(1, 2, port), 0.4).error;
        check_says(error, {"rank 0 at 127.0.0.1 port"});
        check_says(error, {says == other ? "speaks version 2 of polygpt's protocol, expected 1"
                           : says == ""  ? "what listens there does not answer"
                                         : "what listens there is not a rank of polygpt"});
        check_says(meet(rank_of(0, 2, port), 0.4).error,
                   {str("port ", port), "in use by another program", "MASTER_PORT"});
        ::shutdown(listener, SHUT_RDWR);
        server.join();
        ::close(listener);
    }
}

TEST_CASE("rendezvous: slow, silent and odd peers delay nobody") {
    const double start = now();
    check_not_disturbed([](int port) {
        static std::vector<std::unique_ptr<Peer>> open;  // stay connected while the ranks meet
        open.clear();
        const std::string whole = greeting_of(1, 2);
        std::string huge = opening() + "g";
        put(huge, 0xffffffffu);
        const std::string wrong_type = opening() + "t" + whole.substr(opening().size() + 1);
        for (const std::string& bytes :
             {std::string(), whole.substr(0, 5), whole.substr(0, 14), whole.substr(0, whole.size() / 2),
              std::string("GET / HTTP/1.1\r\n\r\n"), std::string("\x16\x03\x01", 3), std::string(100000, 'x'),
              huge, huge + std::string(100000, 'x'), wrong_type, greeting_of(7, 2, "other")}) {
            open.push_back(std::make_unique<Peer>(port));
            open.back()->send(bytes);
        }
        for (int i = 0; i < 100; i++) Peer(port).send(whole.substr(0, i % 20));  // they leave at once
    });
    CHECK(now() - start < 4);
    // A silent peer is told so after its time, and named when a rank does not come.
    const int port = free_port();
    Outcome zero;
    std::thread first([&] { zero = meet(rank_of(0, 2, port), 0.8, "build A", 0.3); });
    Peer silent(port);
    silent.send(greeting_of(1, 2).substr(0, 20));
    CHECK(silent.receive(0.7).find("it sent no greeting") != std::string::npos);
    first.join();
    check_says(zero.error, {"rank 1 has not come", "refused a peer from 127.0.0.1: it sent no greeting"});
}

TEST_CASE("rendezvous: a rank that ends after it has come") {
    // Before all have come it may come again, as after a restart.
    {
        const int port = free_port();
        Outcome outcomes[3];
        std::vector<std::thread> threads;
        threads.emplace_back([&] { outcomes[0] = meet(rank_of(0, 3, port), 5); });
        {
            Peer peer(port);
            peer.send(greeting_of(1, 3));
            CHECK(peer.receive(0.1).size() > opening().size());
        }
        for (const int rank : {1, 2})
            threads.emplace_back([&, rank] { outcomes[rank] = meet(rank_of(rank, 3, port), 5); });
        for (std::thread& thread : threads) thread.join();
        for (const Outcome& outcome : outcomes) check_met(outcome, 3);
    }
    // After that all others end.
    const int port = free_port();
    Outcome zero, one;
    std::thread first([&] { zero = meet(rank_of(0, 3, port), 5); });
    std::thread second([&] { one = meet(rank_of(1, 3, port), 5); });
    const double start = now();
    {
        Peer peer(port);
        peer.send(greeting_of(2, 3));
        peer.receive(0.2);
    }
    first.join(), second.join();
    CHECK(now() - start < 3);
    // One of them says it, and the other ends without a text.
    check_says(zero.error, {"rank 2 has ended"});
    CHECK(one.error == "");
    CHECK(one.texts.empty());
}

TEST_CASE("rendezvous: a rank that hangs after it has come") {
    const int port = free_port();
    Outcome zero, one;
    std::thread first([&] { zero = meet(rank_of(0, 3, port), 0.4); });
    std::thread second([&] { one = meet(rank_of(1, 3, port), 0.8); });
    Peer peer(port);
    peer.send(greeting_of(2, 3));
    first.join(), second.join();
    check_says(zero.error, {"rank 2 has not answered for 0.4 seconds (--comm-timeout)"});
    CHECK(one.error == "");
    CHECK(one.texts.empty());
}

TEST_CASE("rendezvous: if rank 0 cannot make the bytes, all ranks know why") {
    const int port = free_port();
    std::string errors[2];
    std::vector<std::thread> threads;
    for (const int rank : {0, 1})
        threads.emplace_back([&, rank] {
            errors[rank] = error_of([&] {
                Rendezvous all(rank_of(rank, 2, port), "build A", {5, 1});
                all.broadcast([]() -> std::string { fail("no network device"); });
            });
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(errors[0] == "no network device");
    CHECK(errors[1] == "rank 0: no network device");
}

TEST_CASE("rendezvous: signals interrupt nothing") {
    struct sigaction action = {}, before;
    action.sa_handler = [](int) {};  // without SA_RESTART, so that system calls return EINTR
    ::sigaction(SIGUSR1, &action, &before);
    const int port = free_port();
    Outcome zero, one;
    std::atomic<bool> done = false;
    std::thread first([&] { zero = meet(rank_of(0, 2, port), 5); });
    const pthread_t target = first.native_handle();
    std::thread disturber([&] {
        while (!done) ::pthread_kill(target, SIGUSR1), ::usleep(500);
    });
    ::usleep(50000);
    one = meet(rank_of(1, 2, port), 5);
    done = true;
    disturber.join(), first.join();
    ::sigaction(SIGUSR1, &before, nullptr);
    check_met(zero, 2);
    check_met(one, 2);
}

TEST_CASE("rendezvous: lists of ranks") {
    CHECK(ranks_text({3}) == "rank 3");
    CHECK(ranks_text({1, 2}) == "ranks 1, 2");
    CHECK(ranks_text({1, 3, 4, 5, 9, 10}) == "ranks 1, 3 to 5, 9, 10");
}

TEST_CASE("rendezvous: one rank of the next test, on a host of its own" * doctest::skip()) {
    const Launch launch = launch_from(environment_of(environ), false);
    CHECK(launch.ranks == 2);
    check_met(meet(launch, 5), 2);
}

TEST_CASE("rendezvous: two hosts with addresses of their own, as torchrun starts them") {
    const std::string program = std::filesystem::read_symlink("/proc/self/exe");
    for (const char* master : {"10.77.0.1", "fd77::1"}) {
        CAPTURE(master);
        std::string command = "tests/dist/two_hosts.sh";
        for (const int rank : {0, 1})
            command +=
                str(" 'RANK=", rank, " WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=", master,
                    " MASTER_PORT=29500 TORCHELASTIC_RUN_ID=test ", program,
                    " --no-skip --minimal -tc=\"rendezvous: one rank of the next test*\"'");
        const int status = ::system(command.c_str());
        REQUIRE(WIFEXITED(status));
        if (WEXITSTATUS(status) == 77) return;  // it has printed why
        CHECK(WEXITSTATUS(status) == 0);
    }
}
