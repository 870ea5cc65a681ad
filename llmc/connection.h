// A TCP connection between two ranks, and the messages on it. A message is a type (1 byte), a size (4 bytes,
// little endian) and that many bytes.
#pragma once
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "llmc/error.h"

namespace net {

constexpr size_t kLongest = size_t{64} << 20;  // bytes in a message of a rank that has been accepted

using Clock = std::chrono::steady_clock;

inline Clock::time_point after(double seconds) {
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// Milliseconds for poll(), rounded up, so that it does not return just before the deadline again and again.
inline int wait_for(Clock::time_point deadline) {
    const double left = std::chrono::duration<double, std::milli>(deadline - Clock::now()).count();
    return (int)std::ceil(std::clamp(left, 0.0, 1e6));
}

// A signal may end poll() early; all callers look at the clock and wait again.
inline void wait(std::vector<pollfd>& fds, Clock::time_point deadline) {
    for (pollfd& fd : fds) fd.revents = 0;
    if (::poll(fds.data(), fds.size(), wait_for(deadline)) < 0 && errno != EINTR)
        fail("cannot wait for other ranks: ", std::strerror(errno));
}

inline void put(std::string& out, uint32_t value) {
    for (int i = 0; i < 4; i++) out += (char)(value >> 8 * i);
}
inline void put(std::string& out, std::string_view text) {
    put(out, (uint32_t)text.size());
    out += text;
}

// Takes values from the front of a message; `good` turns false if it is too short.
struct Unpacker {
    std::string_view left;
    bool good = true;

    uint32_t number() {
        if (left.size() < 4) return good = false;
        uint32_t value = 0;
        for (int i = 0; i < 4; i++) value |= (uint32_t)(unsigned char)left[i] << 8 * i;
        left.remove_prefix(4);
        return value;
    }
    std::string text() {
        const size_t size = number();
        if (size > left.size()) return good = false, "";
        std::string text(left.substr(0, size));
        left.remove_prefix(size);
        return text;
    }
};

// The last three are for llmc/links.h.
enum Type : char {
    greeting = 'g',
    welcome = 'w',
    failure = 'f',
    blob = 'b',
    texts = 't',
    question = 'q',
    here = 'h',
    goodbye = 'l'
};

struct Message {
    Type type;
    std::string body;
};

// "10.0.0.2" or "2001:db8::1"
inline std::string address_text(const sockaddr_storage& address, socklen_t size) {
    char host[NI_MAXHOST] = "";
    if (::getnameinfo((const sockaddr*)&address, size, host, sizeof(host), nullptr, 0, NI_NUMERICHOST) != 0)
        return "an unknown address";
    return host;
}

// A TCP connection that never blocks. What is to be sent waits in `out`, what has come in `in`.
class Connection {
  public:
    int fd;
    std::string address;
    std::string in, out;
    bool closed = false;  // the other side sends nothing more, or the connection is broken
    Clock::time_point deadline = Clock::time_point::max();

    Connection(int fd, std::string address) : fd(fd), address(std::move(address)) {
        const int yes = 1;
        ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
    }
    Connection(const Connection&) = delete;
    Connection& operator=(const Connection&) = delete;
    ~Connection() { ::close(fd); }

    void send(Type type, std::string_view body) {
        out += type;
        put(out, body);
    }
    pollfd waits_for() const { return {fd, (short)((closed ? 0 : POLLIN) | (out.empty() ? 0 : POLLOUT)), 0}; }
    // Sends and receives what is possible without waiting. Takes at most one greeting's bytes from a peer
    // whose greeting has not come, because it may be anybody.
    void progress(size_t longest) {
        bool broken = false;
        while (!out.empty()) {
            const ssize_t sent = ::send(fd, out.data(), out.size(), MSG_NOSIGNAL);
            if (sent > 0) out.erase(0, sent);
            if (sent >= 0 || errno == EINTR) continue;
            // The other side may have said why before it ended, so what it sent is still received.
            broken = errno != EAGAIN && errno != EWOULDBLOCK;
            break;
        }
        char buffer[16384];
        while (!closed && in.size() <= longest) {
            const ssize_t received = ::recv(fd, buffer, sizeof(buffer), 0);
            if (received > 0) in.append(buffer, received);
            if (received > 0 || (received < 0 && errno == EINTR)) continue;
            if (received == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) closed = true;
            break;
        }
        closed = closed || broken;  // `out` keeps what is lost
    }
    // The next message, if all of it has come. A text that is none breaks the connection.
    std::optional<Message> message() {
        if (in.size() < 5) return {};
        Unpacker unpacker{std::string_view(in).substr(1)};
        const size_t size = unpacker.number();
        if (size > kLongest) closed = true;
        if (size > unpacker.left.size()) return {};
        Message message{(Type)in[0], in.substr(5, size)};
        in.erase(0, 5 + size);
        return message;
    }
};

}  // namespace net
