// The connections between rank 0 and every other rank while they train. Rendezvous has made them. Ranks
// exchange a few numbers over them, which needs no device. A rank that waits for others, whether for a text
// or for its device, looks at them as well, so it ends when another rank has ended, and within the timeout
// when another rank hangs.
//
// Which rank hangs: a rank that has waited for almost the whole timeout asks rank 0, and rank 0 asks all
// ranks. A rank answers only while it waits, too, so those that do not answer are what the others wait for.
//
// Only one rank says on stderr why the ranks end. It tells the others, and they end with an Error that has no
// text.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "llmc/communicator.h"
#include "llmc/connection.h"
#include "llmc/error.h"

class Links {
  public:
    using Clock = std::chrono::steady_clock;
    using Connection = net::Connection;

    // peers (ranks): at rank 0 all others, at another rank only the first one, which is rank 0
    // speaks: whether this rank says it if rank 0 is lost. The others have no connection to each other, so
    // they cannot agree on who does.
    Links(int rank, std::vector<std::unique_ptr<Connection>> peers, double timeout, bool speaks = true)
        : rank_(rank),
          ranks_((int)peers.size()),
          timeout_(timeout),
          patience_(std::min(10.0, timeout / 3)),
          speaks_(rank == 0 || speaks),
          peers_(std::move(peers)),
          texts_(ranks_),
          answered_(ranks_),
          left_(ranks_) {}

    // Waits until done() says so. Fails if that takes too long, or if another rank has ended.
    //   sleeps: the wait is for a message. Otherwise done() is called as often as possible at first.
    template <class Done>
    void wait(Done done, bool sleeps = false) {
        const Clock::time_point start = Clock::now();
        Clock::time_point looked = start;
        asked_ = false;
        for (long attempt = 0; !done(); attempt++) {
            const Clock::time_point now = Clock::now();
            if (sleeps || now - looked > std::chrono::milliseconds(1)) {
                look(sleeps ? 1 : 0);
                judge(std::chrono::duration<double>(Clock::now() - start).count());
                looked = now;
            } else if (attempt > 2000) {  // work usually ends soon, and sleeping takes longer
                ::usleep(20);
            }
        }
        asked_ = false;
    }

    // Every rank gives a text. combine(texts) at rank 0 makes the answer, which every rank gets.
    // meanwhile() is called again and again.
    template <class Combine>
    std::string exchange(
        const std::string& mine, Combine combine, const std::function<void()>& meanwhile = [] {}) {
        using namespace net;
        texts_[rank_] = mine;
        expects_ = true;
        if (rank_ > 0) peers_[0]->send(texts, mine);
        wait(
            [&] {
                meanwhile();
                if (rank_ > 0) return texts_[0].has_value();
                return std::all_of(texts_.begin(), texts_.end(), [](auto& text) { return text.has_value(); });
            },
            true);
        expects_ = false;
        std::string answer;
        if (rank_ > 0) {
            answer = std::move(*texts_[0]);
        } else {
            std::vector<std::string> all;
            for (std::optional<std::string>& text : texts_) all.push_back(std::move(*text));
            answer = combine(all);
            for (const auto& peer : peers_)
                if (peer) peer->send(texts, answer);
        }
        std::fill(texts_.begin(), texts_.end(), std::nullopt);
        if (rank_ == 0) wait([&] { return look(0), all_sent(); });
        return answer;
    }

    // The text of every rank, at every rank.
    std::vector<std::string> gather(
        const std::string& mine, const std::function<void()>& meanwhile = [] {}) {
        std::string packed = exchange(
            mine,
            [](const std::vector<std::string>& all) {
                std::string packed;
                for (const std::string& text : all) net::put(packed, text);
                return packed;
            },
            meanwhile);
        net::Unpacker unpacker{packed};
        std::vector<std::string> all(ranks_);
        for (std::string& text : all) text = unpacker.text();
        return all;
    }

    // Tells the others that they must end, because this rank fails.
    void end_others(int status) { tell(net::failure, std::string(1, (char)status)); }
    // Tells the others that this rank has done all that they expect of it. Rank 0 ends first, with what it
    // has to say, because mpirun kills the other ranks when one has ended with an error.
    void leave() {
        tell(net::goodbye, "");
        if (rank_ > 0) wait([&] { return left_[0]; }, true);
    }

  private:
    int rank_, ranks_;
    double timeout_, patience_;  // seconds; patience_: how long before the timeout a rank asks
    bool speaks_;
    std::vector<std::unique_ptr<Connection>> peers_;
    std::vector<std::optional<std::string>> texts_;  // (ranks): of the exchange
    bool expects_ = false;                           // texts
    bool asked_ = false;                             // in this wait
    Clock::time_point asks_again_, gives_up_;        // when; the first at other ranks, the second at rank 0
    std::vector<bool> answered_, left_;              // (ranks)

    bool all_sent() const {
        return std::all_of(peers_.begin(), peers_.end(),
                           [](auto& peer) { return !peer || peer->closed || peer->out.empty(); });
    }

    // Sends to all that can be reached, without waiting for long.
    void tell(net::Type type, const std::string& body) {
        for (const auto& peer : peers_)
            if (peer && !peer->closed) peer->send(type, body);
        const Clock::time_point deadline = net::after(std::min(1.0, patience_));
        for (;;) {
            for (const auto& peer : peers_)
                if (peer) peer->progress(net::kLongest);
            if (all_sent() || Clock::now() > deadline) return;
            ::usleep(1000);
        }
    }

    // This rank is the one that says why.
    [[noreturn]] void give_up(const std::string& why) {
        end_others(kExitFailure);
        throw Error(kExitFailure, speaks_ ? why : "");
    }

    // Sends and takes messages. Waits for one for at most so many milliseconds.
    void look(int ms) {
        std::vector<pollfd> fds(ranks_, pollfd{-1, 0, 0});  // poll() skips what is below 0
        for (int r = 0; r < ranks_; r++)
            if (peers_[r] && !peers_[r]->closed) fds[r] = peers_[r]->waits_for();
        ::poll(fds.data(), fds.size(), ms);
        for (int r = 0; r < ranks_; r++) {
            if (!peers_[r]) continue;
            const bool has_come = !peers_[r]->in.empty(), has_gone = peers_[r]->closed && !left_[r];
            if (fds[r].revents || has_come || has_gone) take_from(r);
        }
        for (int r = 0; expects_ && r < ranks_; r++)
            if (left_[r] && !texts_[r]) give_up(str("rank ", r, " has ended"));
    }

    void take_from(int r) {
        using namespace net;
        peers_[r]->progress(kLongest);
        while (std::optional<Message> message = peers_[r]->message()) switch (message->type) {
                case texts:
                    texts_[r] = std::move(message->body);
                    break;
                case failure: {
                    const int status = message->body.empty() ? (int)kExitFailure : message->body[0];
                    if (rank_ == 0) end_others(status);
                    throw Error(status, "");
                }
                case question:
                    if (rank_ == 0)
                        ask(std::strtod(message->body.c_str(), nullptr));
                    else
                        peers_[r]->send(here, ""), peers_[r]->progress(kLongest);
                    break;
                case here:
                    answered_[r] = true;
                    break;
                case goodbye:
                    left_[r] = true;
                    break;
                default:
                    give_up(str("rank ", r, " sent what was not expected"));
            }
        if (peers_[r]->closed && !left_[r]) give_up(str("rank ", r, " has ended"));
    }

    // Rank 0 asks all ranks, because it or another one has waited for so many seconds.
    void ask(double waited) {
        if (std::exchange(asked_, true)) return;
        // It gives up a little before the timeout of the rank that has waited, but not before an answer can
        // come.
        gives_up_ = net::after(std::max(timeout_ - waited - 0.1 * patience_, 0.1 * patience_));
        std::fill(answered_.begin(), answered_.end(), false);
        for (const auto& peer : peers_)
            if (peer && !peer->closed) peer->send(net::question, ""), peer->progress(0);
    }

    // Asks or gives up if this rank has waited for so many seconds.
    void judge(double waited) {
        if (rank_ > 0) {
            if (waited > timeout_) give_up(late("rank 0 has"));
            // It asks again and again, because rank 0 may stop to wait, and wait anew.
            if (waited < timeout_ - patience_ || Clock::now() < asks_again_) return;
            peers_[0]->send(net::question, std::to_string(waited));
            asks_again_ = net::after(0.1 * patience_);
            return;
        }
        if (waited > timeout_ - patience_) ask(waited);
        if (!asked_ || Clock::now() < gives_up_) return;
        std::vector<int> silent;
        for (int r = 1; r < ranks_; r++)
            if (!answered_[r] && !left_[r]) silent.push_back(r);
        give_up(silent.empty() ? str("the GPUs of all ranks have waited for each other for ", timeout_,
                                     " seconds (--comm-timeout)")
                               : late(ranks_text(silent) + (silent.size() > 1 ? " have" : " has")));
    }
    std::string late(const std::string& who) const {
        return str(who, " not answered for ", timeout_, " seconds (--comm-timeout)");
    }
};
