// Runs a program under every schedule of ptxsim that the tests use.
#pragma once
#include <functional>

#include "tests/ptxsim/helpers.h"

namespace ptxsim_test {

// The schedules are forward, reversed and seeds 1 to 3, each with eager and with lazy streams.
inline void every_schedule(const std::function<void()>& program) {
    WithOptions restore;
    for (bool lazy : {false, true})
        for (int n = 0; n < 5; n++) {
            ptxsim::Options& options = ptxsim::options();
            options.lazy = lazy;
            options.order = n == 0   ? ptxsim::Order::forward
                            : n == 1 ? ptxsim::Order::reversed
                                     : ptxsim::Order::random;
            options.seed = n == 0 ? 0 : n - 1;
            CAPTURE(lazy);
            CAPTURE(n);
            program();
            expect_no_reports();
        }
}

}  // namespace ptxsim_test
