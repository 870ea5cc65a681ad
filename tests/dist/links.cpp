// What ranks say to each other while they train (llmc/links.h), as threads of this process.
#include "llmc/links.h"

#include <doctest/doctest.h>

#include <atomic>
#include <functional>
#include <thread>

#include "llmc/rendezvous.h"
#include "tests/helpers.h"

namespace {

struct Outcome {
    std::string error = "none";
    int status = 0;
};

// Runs f(rank, links) as every rank.
std::vector<Outcome> on_ranks(int ranks, double timeout, const std::function<void(int, Links&)>& f) {
    static int port = 31000 + getpid() % 1000;
    port++;
    std::vector<Outcome> outcomes(ranks);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; rank++)
        threads.emplace_back([&, rank] {
            try {
                Launch launch;
                launch.rank = rank, launch.ranks = ranks, launch.master = "localhost", launch.port = port;
                Rendezvous meeting(launch, "a test", {.timeout = 20});
                meeting.broadcast([] { return "an id"; });
                Links links(rank, meeting.take_connections(), timeout);
                f(rank, links);
            } catch (const Error& e) {
                outcomes[rank] = {e.what(), e.status};
            }
        });
    for (std::thread& thread : threads) thread.join();
    return outcomes;
}

}  // namespace

TEST_CASE("links: texts of all ranks, however early they come") {
    // A rank may be so fast that rank 0 has its text before it has told the last one where to go on.
    for (int start = 0; start < 10; start++) {
        const std::vector<Outcome> outcomes = on_ranks(3, 20, [&](int rank, Links& links) {
            for (int i = 0; i < 20; i++) {
                const std::string all = str(i, " 0"), one = str(i, " 1"), two = str(i, " 2");
                if (links.gather(str(i, " ", rank)) != std::vector<std::string>{all, one, two})
                    fail("other texts");
            }
            links.leave();
        });
        for (const Outcome& outcome : outcomes) CHECK(outcome.error == "none");
    }
}

TEST_CASE("links: one rank says which rank has ended, failed or hangs") {
    // Rank 2 ends without a word. Rank 1 waits for something else than a text.
    std::vector<Outcome> outcomes = on_ranks(3, 20, [&](int rank, Links& links) {
        if (rank == 0) links.gather("");
        if (rank == 1) links.wait([] { return false; });
    });
    CHECK(outcomes[0].error == "rank 2 has ended");
    CHECK(outcomes[1].error == "");
    CHECK(outcomes[1].status == kExitFailure);

    outcomes = on_ranks(3, 20, [&](int rank, Links& links) {
        if (rank == 2) links.end_others(kExitDiverged);
        if (rank == 2) fail("a NaN");
        links.gather("");
    });
    for (int rank : {0, 1}) {
        CHECK(outcomes[rank].error == "");
        CHECK(outcomes[rank].status == kExitDiverged);
    }

    // Ranks 0 and 1 wait for rank 2, and then all for rank 0.
    std::atomic<bool> over = false;
    auto waits = [&](int hangs) {
        return [&, hangs](int rank, Links& links) {
            if (rank == hangs) {
                while (!over) usleep(1000);
                return;
            }
            try {
                links.wait([] { return false; });
            } catch (...) {
                over = true;
                throw;
            }
        };
    };
    outcomes = on_ranks(3, 0.5, waits(2));
    CHECK(outcomes[0].error == "rank 2 has not answered for 0.5 seconds (--comm-timeout)");
    CHECK(outcomes[1].error == "");
    over = false;
    outcomes = on_ranks(2, 0.5, waits(0));
    CHECK(outcomes[1].error == "rank 0 has not answered for 0.5 seconds (--comm-timeout)");
    outcomes = on_ranks(2, 0.5, waits(-1));
    CHECK(outcomes[0].error ==
          "the GPUs of all ranks have waited for each other for 0.5 seconds (--comm-timeout)");
    CHECK(outcomes[1].error == "");
}
