#include "tests/cuda/helpers.h"

#include <cstdlib>
#include <limits>
#include <typeindex>
#include <typeinfo>

#include "dev/ptxsim/options.h"
#include "dev/ptxsim/report.h"

namespace cuda_test {

namespace {

bool every_schedule() {
    return thorough() && std::string(std::getenv("LLMC_THOROUGH")) == "schedules";
}

// Each caller takes the four other schedules in turn.
void under_every_schedule(const std::function<void()>& f, const std::type_info& caller) {
    static std::map<std::type_index, int> calls;
    const ptxsim::Options before = ptxsim::options();
    int other = 1 + calls[caller]++ % 4;
    for (int schedule = 0; schedule < 5; schedule++) {
        if (schedule > 0 && schedule != other && !every_schedule()) continue;
        CAPTURE(schedule);
        ptxsim::options().order = schedule == 0   ? ptxsim::Order::forward
                                  : schedule == 1 ? ptxsim::Order::reversed
                                                  : ptxsim::Order::random;
        ptxsim::options().seed = (uint64_t)schedule;
        f();
    }
    ptxsim::options() = before;
}

}  // namespace

void under_every_schedule(const std::function<void()>& f) {
    under_every_schedule(f, f.target_type());
}

void check_layer(const std::vector<Expected>& outputs,
                 const std::function<void(std::map<std::string, Pointer>&)>& call) {
    std::vector<std::vector<char>> first;
    auto run = [&] {
        std::vector<Device<float>> floats;
        std::vector<Device<gpu::bf16>> halves;
        floats.reserve(outputs.size()), halves.reserve(outputs.size());
        std::vector<Floats> initial;
        std::map<std::string, Pointer> out;
        for (size_t o = 0; o < outputs.size(); o++) {
            const Expected& e = outputs[o];
            size_t n = e.values.size();
            double rms = reference::norm(e.values) / std::sqrt((double)std::max<size_t>(n, 1));
            initial.push_back(e.added ? reference::normal(n, 77 + o, rms > 0 ? rms : 1)
                                      : Floats(n, std::numeric_limits<float>::quiet_NaN()));
            if (e.is_bf16) {
                halves.emplace_back(convert<gpu::bf16>(initial[o]));
                out[e.name] = {halves.back().get()};
            } else {
                floats.emplace_back(initial[o]);
                out[e.name] = {floats.back().get()};
            }
        }
        call(out);
        gpu::check(cudaDeviceSynchronize());
        std::string reports;
        for (const ptxsim::Report& r : ptxsim::take_reports()) reports += r.text + "\n";
        CHECK_MESSAGE(reports.empty(), reports);
        size_t f = 0, h = 0;
        for (size_t o = 0; o < outputs.size(); o++) {
            const Expected& e = outputs[o];
            INFO("output ", e.name);
            std::vector<char> bytes;
            Vector got;
            auto take = [&](const auto& x) {
                got = to_double(x);
                bytes.assign((const char*)x.data(), (const char*)(x.data() + x.size()));
            };
            if (e.is_bf16) {
                take(halves[h++].host());
            } else {
                take(floats[f++].host());
            }
            if (e.added)
                for (size_t i = 0; i < got.size(); i++) got[i] -= initial[o][i];
            CHECK(reference::relative_error(got, e.values, e.floor) < e.tolerance);
            if (first.size() == o) first.push_back(bytes);
            CHECK_MESSAGE(bytes == first[o], "other bits than under the first schedule");
        }
    };
    under_every_schedule(run, call.target_type());
}

}  // namespace cuda_test
