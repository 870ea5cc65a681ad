// The tiles of attention (llmc/cpu/tile.h), of floats and of pairs of bf16, compared with plain loops.
#include "llmc/cpu/tile.h"

#include "tests/reference.h"

using namespace reference;
using cpu::bf16;
using cpu::bf16_pair;
using cpu::kLanes;
using cpu::kTile;

namespace {

const float kNan = std::numeric_limits<float>::quiet_NaN();

// An array of words that hold NaN, between guards.
template <class Word>
class Poisoned {
  public:
    explicit Poisoned(size_t n) : words_(n + 2 * kGuard) { std::memset(words_.data(), 0xFF, bytes()); }
    Word* get() { return words_.data() + kGuard; }
    bool guards_are_whole() const {
        std::vector<char> ones(kGuard * sizeof(Word), (char)0xFF);
        return !std::memcmp(words_.data(), ones.data(), ones.size()) &&
               !std::memcmp(words_.data() + words_.size() - kGuard, ones.data(), ones.size());
    }

  private:
    static constexpr size_t kGuard = 16;
    std::vector<Word> words_;
    size_t bytes() const { return words_.size() * sizeof(Word); }
};

// Number i of a word, which has 1 or 2 numbers.
float number(float word, int) {
    return word;
}
float number(bf16_pair word, int n) {
    return std::bit_cast<float>(n == 0 ? word.bits << 16 : word.bits & 0xFFFF0000u);
}

bf16_pair pair_of(bf16 first, bf16 second) {
    return {first.bits | (uint32_t)second.bits << 16};
}
void set_word(float& word, float x, float) {
    word = x;
}
void set_word(bf16_pair& word, float x, float y) {
    word = pair_of(x, y);
}

// A tile of Real is an array of Word. The rows of src have D numbers, are `stride` apart, and nothing follows
// the last row.
template <class Word, class Real>
void check_loads(int rows, int D, int stride) {
    CAPTURE(rows);
    CAPTURE(D);
    CAPTURE(stride);
    constexpr int N = cpu::kDepth<Word>;
    const int Dp = cpu::padded(D);
    const std::vector<Real> src = convert<Real>(normal((size_t)(rows - 1) * stride + D, 1));
    const Floats factors = normal(rows, 2);
    auto expected = [&](int r, int d, bool scaled) {  // the number that the tile must have
        if (r >= rows || d >= D) return 0.0f;
        float x = src[(size_t)r * stride + d];
        if (scaled) x *= factors[r];
        return N > 1 ? (float)bf16(x) : x;
    };
    for (bool scaled : {false, true}) {
        CAPTURE(scaled);
        Poisoned<Word> tile((size_t)kTile * Dp / N);
        cpu::load_tile(tile.get(), src.data(), stride, rows, D, scaled ? factors.data() : nullptr);
        int wrong = 0;
        for (int r = 0; r < kTile; r++)
            for (int d = 0; d < Dp; d++)
                wrong += number(tile.get()[(r * Dp + d) / N], d % N) != expected(r, d, scaled);
        CHECK(wrong == 0);
        CHECK(tile.guards_are_whole());
    }
    Poisoned<Word> tile((size_t)Dp / N * kTile);
    cpu::load_tile_transposed(tile.get(), src.data(), stride, rows, D);
    int wrong = 0;
    for (int r = 0; r < kTile; r++)
        for (int d = 0; d < Dp; d++)
            wrong += number(tile.get()[d / N * kTile + r], d % N) != expected(r, d, false);
    CHECK(wrong == 0);
    CHECK(tile.guards_are_whole());
}

// Compares one product with sums in double. The strides are larger than the sizes, and `a` may be transposed.
template <bool kTransA, bool kAccumulate, class Word>
void check_product(int N, int K) {
    CAPTURE(N);
    CAPTURE(K);
    CAPTURE(kTransA);
    CAPTURE(kAccumulate);
    constexpr int M = cpu::kTileRows, kNumbers = cpu::kDepth<Word>;
    const int c_stride = N + 16, b_stride = N + 32, a_stride = (kTransA ? M : K) + 3;
    auto random_words = [](size_t n, int seed) {
        const Floats x = normal(2 * n, seed);
        std::vector<Word> words(n);
        for (size_t i = 0; i < n; i++) set_word(words[i], x[2 * i], x[2 * i + 1]);
        return words;
    };
    const std::vector<Word> a = random_words((size_t)(kTransA ? K : M) * a_stride, 1);
    const std::vector<Word> b = random_words((size_t)(K - 1) * b_stride + N, 2);
    Floats c = kAccumulate ? normal((size_t)M * c_stride, 3) : Floats((size_t)M * c_stride, kNan);
    const Floats before = c;
    cpu::tile_product<kTransA, kAccumulate>(c.data(), c_stride, a.data(), a_stride, b.data(), b_stride, N, K);
    Vector got, expected;
    bool stays_inside = true;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < c_stride; n++) {
            size_t at = (size_t)m * c_stride + n;
            if (n >= N) {
                stays_inside &= std::bit_cast<uint32_t>(c[at]) == std::bit_cast<uint32_t>(before[at]);
                continue;
            }
            double sum = kAccumulate ? before[at] : 0;
            for (int k = 0; k < K; k++) {
                Word amk = kTransA ? a[(size_t)k * a_stride + m] : a[(size_t)m * a_stride + k];
                for (int i = 0; i < kNumbers; i++)
                    sum += (double)number(amk, i) * number(b[(size_t)k * b_stride + n], i);
            }
            got.push_back(c[at]);
            expected.push_back(sum);
        }
    CHECK(stays_inside);
    CHECK(relative_error(got, expected) < 1e-6);
}

}  // namespace

TEST_CASE("tile: loads, in rows and transposed, are padded with zeros") {
    for (int rows : {1, 7, 63, 64})
        for (int D : {1, 7, 8, 16, 33, 64, 80})
            for (int extra : {0, 5}) {
                check_loads<float, float>(rows, D, 3 * D + extra);
                check_loads<float, bf16>(rows, D, 3 * D + extra);
                check_loads<bf16_pair, bf16>(rows, D, 3 * D + extra);
            }
}

TEST_CASE("tile: pair_rows pairs each number with the one below it") {
    for (int D : {1, 16, 33, 80}) {
        CAPTURE(D);
        const int Dp = cpu::padded(D);
        const std::vector<bf16> rows = convert<bf16>(normal((size_t)kTile * Dp, 1));
        std::vector<bf16_pair> words((size_t)kTile * Dp / 2);
        std::memcpy(words.data(), rows.data(), rows.size() * sizeof(bf16));
        Poisoned<bf16_pair> pairs(words.size());
        cpu::pair_rows(pairs.get(), words.data(), D);
        int wrong = 0;
        for (int r = 0; r < kTile; r += 2)
            for (int d = 0; d < Dp; d++)
                wrong += pairs.get()[r / 2 * Dp + d].bits !=
                         pair_of(rows[(size_t)r * Dp + d], rows[(size_t)(r + 1) * Dp + d]).bits;
        CHECK(wrong == 0);
        CHECK(pairs.guards_are_whole());
    }
}

TEST_CASE("tile: store_pairs rounds as a conversion does") {
    for (int seed = 0; seed < 50; seed++) {
        Floats first = normal(kLanes, seed), second = normal(kLanes, seed + 100);
        first[3] = std::bit_cast<float>(0x3F808000u);  // halfway: rounds down; the one below rounds up
        second[3] = std::bit_cast<float>(0x3F818000u);
        first[5] = INFINITY, second[5] = -INFINITY, first[6] = 3.4e38f, second[6] = -0.0f;
        first[9] = kNan, second[10] = kNan;
        Poisoned<bf16_pair> out(kLanes);
        cpu::store_pairs(out.get(), cpu::load(first.data()), cpu::load(second.data()));
        for (int i = 0; i < kLanes; i++) CHECK(out.get()[i].bits == pair_of(first[i], second[i]).bits);
        CHECK(out.guards_are_whole());
    }
}

TEST_CASE_TEMPLATE("tile: products", Word, float, bf16_pair) {
    for (int N : {16, 32, 48, 64, 80})
        for (int K : {1, 5, 32, 64}) {
            check_product<false, false, Word>(N, K);
            check_product<false, true, Word>(N, K);
            check_product<true, false, Word>(N, K);
            check_product<true, true, Word>(N, K);
        }
}
