// Attention at linear cost of llmc/cuda against the double precision oracle: every kind that has the linear
// form, over several segments and at their edges.
#include "llmc/cuda/attention_linear.h"

#include "tests/cuda_attention.h"

using namespace cuda_test;

namespace {

// Some of them or all, of those for heads of D.
std::vector<Kind> kinds(int D, bool all) {
    std::vector<Kind> some;
    for (const Kind& kind : all_kinds())
        if (has_linear_form(kind.config, D) && (all || (one_of_each_scale(kind) && kind.decay != DecayKind::fixed)))
            some.push_back(kind);
    return some;
}

template <class Real>
void check_linear(const Kind& kind, const Size& size, int segment = 64) {
    check_attention(kind, size, random_qkv<Real>(size), decay_of(kind, size.H), 1e-5, segment);
}

}  // namespace

TEST_CASE_TEMPLATE("cuda linear attention: every kind over several segments", Real, float, gpu::bf16) {
    for (const Kind& kind : kinds(8, true)) check_linear<Real>(kind, {1, 200, 2, 8});
}

TEST_CASE_TEMPLATE("cuda linear attention: every head size and power", Real, float, gpu::bf16) {
    int n = 0;
    for (const Size& size : std::vector<Size>{{1, 1, 1, 32},
                                              {2, 65, 3, 7},
                                              {1, 64, 1, 16},
                                              {1, 130, 1, 32},
                                              {1, 129, 1, 33},
                                              {1, 193, 1, 64},
                                              {1, 100, 1, 80},
                                              {1, 72, 1, 100},
                                              {1, 130, 1, 128}})
        for (const Kind& kind : kinds(size.D, false))
            if (size.D < 32 || n++ % 2 == 0) check_linear<Real>(kind, size);
}
