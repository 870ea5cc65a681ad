// Small products of tiles that are in the cache: the inner loops of attention.
//
// Tiles are row-major. They are padded with zeros to kTile rows and to a multiple of kLanes channels, so the
// loops need no remainder. They are in aligned memory, because a load that crosses a cache line costs twice
// as much. A tile consists of words. A word is a float, or a pair of bf16 that are neighbours in the
// direction of the product's sum: along the channels in load_tile and load_tile_transposed, along the rows in
// pair_rows.
#pragma once
#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "llmc/cpu/isa.h"
#include "llmc/cpu/vector.h"

namespace cpu::inline LLMC_ISA {

constexpr int kTile = 64;  // rows of a tile: queries or keys

// Rows and vectors of a block of sums that stays in registers. kTileRows is even and divides kLanes and
// kTile.
#ifdef __AVX512F__
constexpr int kTileRows = 8, kTileVectors = 2;  // 16 of 32 registers
#else
constexpr int kTileRows = 4, kTileVectors = 1;  // 8 of 16 registers, because a vector takes two
#endif

struct bf16_pair {
    uint32_t bits;  // the first number is in the lower half
};

#ifdef __AVX512BF16__
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif

// The word of a tile of Real: a pair if the instruction set can multiply pairs, otherwise a float.
template <class Real>
using TileWord = std::conditional_t<kMultipliesPairs && std::is_same_v<Real, bf16>, bf16_pair, float>;

template <class Word>
constexpr int kDepth = std::is_same_v<Word, float> ? 1 : 2;  // numbers in a word

inline int padded(int channels) {
    return (channels + kLanes - 1) / kLanes * kLanes;
}

// tile (kTile,padded(D)) = row_factors[r] src[r], with zeros outside of (rows,D).
template <class Real>
inline void load_tile(float* tile,
                      const Real* src,  // `rows` rows of D numbers at a distance of `stride`
                      int stride, int rows, int D, const float* row_factors = nullptr) {
    int Dp = padded(D);
    for (int r = 0; r < rows; r++) {
        float factor = row_factors ? row_factors[r] : 1.0f;
        for_vectors(D, [&](int d, int n) {
            store(tile + r * Dp + d, load(src + (size_t)r * stride + d, n) * factor);
        });
    }
    memset(tile + rows * Dp, 0, sizeof(float) * (kTile - rows) * Dp);
}

// One of the four steps that transpose 16 x 16 words: swaps the off-diagonal blocks of kStep x kStep words.
template <int kStep, int... kLane>
inline void swap_blocks(vec* rows, std::integer_sequence<int, kLane...>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
        if (i & kStep) continue;
        vec a = rows[i], b = rows[i + kStep];
        rows[i] = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane - kStep : kLane)...);
        rows[i + kStep] = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane : kLane + kStep)...);
    }
}

inline void transpose_block(vec* rows) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
    swap_blocks<8>(rows, lanes);
    swap_blocks<4>(rows, lanes);
    swap_blocks<2>(rows, lanes);
    swap_blocks<1>(rows, lanes);
}

// Transposes rows x columns words. Both sizes are multiples of kLanes. row(r, c) returns the 16 words of row
// r from column c on, and put(c, r, words) takes those of column c from row r on.
template <class Row, class Put>
inline void transpose(int rows, int columns, Row row, Put put) {
    for (int r = 0; r < rows; r += kLanes)
        for (int c = 0; c < columns; c += kLanes) {
            vec block[kLanes];
            for (int i = 0; i < kLanes; i++) block[i] = row(r + i, c);
            transpose_block(block);
            for (int i = 0; i < kLanes; i++) put(c + i, r, block[i]);
        }
}

// The transpose of what load_tile() writes: tile (padded(D),kTile).
template <class Real>
inline void load_tile_transposed(float* tile, const Real* src, int stride, int rows, int D) {
    auto row = [&](int r, int d) {
        if (r >= rows) return vec{};
        return load(src + (size_t)r * stride + d, D - d < kLanes ? D - d : kLanes);
    };
    transpose(kTile, padded(D), row, [&](int d, int r, vec x) { store(tile + d * kTile + r, x); });
}

// load_tile() in pairs of channels: tile (kTile,padded(D)/2).
inline void load_tile(bf16_pair* tile, const bf16* src, int stride, int rows, int D,
                      const float* row_factors = nullptr) {
    int Dp = padded(D);
    bf16* out = (bf16*)tile;
    for (int r = 0; r < rows; r++)
        for_vectors(D, [&](int d, int n) {
            const bf16* from = src + (size_t)r * stride + d;
            if (!row_factors && n == kLanes) {
                memcpy((void*)(out + r * Dp + d), from, sizeof(bf16) * kLanes);
            } else {
                store(out + r * Dp + d, load(from, n) * (row_factors ? row_factors[r] : 1.0f));
            }
        });
    memset((void*)(out + rows * Dp), 0, sizeof(bf16) * (kTile - rows) * Dp);
}

// load_tile_transposed() in pairs of channels: tile (padded(D)/2,kTile).
inline void load_tile_transposed(bf16_pair* tile, const bf16* src, int stride, int rows, int D) {
    for (int r = 0; r < kTile; r += kLanes)
        for (int d = 0; d < D; d += 2 * kLanes) {
            vec block[kLanes];
            const int channels = std::min(D - d, 2 * kLanes);
            const bf16* from = src + (size_t)r * stride + d;
            if (r + kLanes <= rows && channels == 2 * kLanes) {
                for (int i = 0; i < kLanes; i++) block[i] = load((const float*)(from + (size_t)i * stride));
            } else {
                for (int i = 0; i < kLanes; i++) {
                    bf16 words[2 * kLanes] = {};
                    if (r + i < rows)
                        memcpy((void*)words, from + (size_t)i * stride, sizeof(bf16) * channels);
                    memcpy(&block[i], words, sizeof(vec));
                }
            }
            transpose_block(block);
            for (int i = 0; i < (padded(D) - d) / 2 && i < kLanes; i++)
                memcpy(tile + (d / 2 + i) * kTile + r, &block[i], sizeof(vec));
        }
}

// Makes pairs of neighbouring rows, (kTile/2,padded(D)), from pairs of channels, (kTile,padded(D)/2).
//   stride: of the rows, in words; 0: padded(D)/2
inline void pair_rows(bf16_pair* pairs, const bf16_pair* rows, int D, size_t stride = 0) {
    int Dp = padded(D);
    if (stride == 0) stride = Dp / 2;
    for (int r = 0; r < kTile; r += 2)
        for (int d = 0; d < Dp; d += kLanes) {
            const bf16 *a = (const bf16*)(rows + r * stride) + d, *b = a + 2 * stride;
            vuint first = (vuint)load(a), second = (vuint)load(b);
            vuint words = first >> 16 | second;
            memcpy(pairs + r / 2 * Dp + d, &words, sizeof(words));
        }
}

// The numbers of a tile of words as floats, in rows of kTile: `tile` itself, or (2 rows,kTile) in `memory`.
inline const float* floats_of(float*, const float* tile, int) {
    return tile;
}
inline const float* floats_of(float* memory, const bf16_pair* tile, int rows) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < kTile; i += kLanes) {
            vuint words;
            memcpy(&words, tile + r * kTile + i, sizeof(words));
            store(memory + 2 * r * kTile + i, (vec)(words << 16));
            store(memory + (2 * r + 1) * kTile + i, (vec)(words & 0xFFFF0000u));
        }
    return memory;
}

// Stores two rows of floats as one row of pairs.
inline void store_pairs(bf16_pair* out, vec first, vec second) {
#ifdef __AVX512BF16__
    typedef uint16_t halves __attribute__((vector_size(2 * sizeof(vhalf))));
    auto both = (halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);  // all of `first`, then `second`
    halves words = __builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
    vuint words = round_to_bf16(first) >> 16 | (round_to_bf16(second) & 0xFFFF0000u);
#endif
    memcpy(out, &words, sizeof(words));
}

inline vec multiply_add(vec sum, float a, vec b) {
    return sum + a * b;
}

// The same for pairs: adds both products. b has the words of 16 pairs.
inline vec multiply_add(vec sum, bf16_pair a, vec b) {
#ifdef __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a.bits), (__m512bh)(__m512)b);
#else
    vuint words = (vuint)b;
    sum += std::bit_cast<float>(a.bits << 16) * (vec)(words << 16);
    return sum + std::bit_cast<float>(a.bits & 0xFFFF0000u) * (vec)(words & 0xFFFF0000u);
#endif
}

// Computes R rows and V vectors of c, whose sums stay in registers all the time.
template <int R, int V, bool kTransA, bool kAccumulate, class Word>
inline void block_product(float* c,  // (R, V vectors)
                          int c_stride,
                          const Word* a,  // (R,K), or (K,R) with kTransA
                          int a_stride,
                          const Word* b,  // (K, V vectors)
                          int b_stride, int K, float kept) {
    vec sums[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            sums[r][v] = kAccumulate ? load(c + r * c_stride + v * kLanes) * kept : vec{};
    for (int k = 0; k < K; k++) {
        vec bk[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) bk[v] = load((const float*)(b + k * b_stride + v * kLanes));
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            Word ark = kTransA ? a[k * a_stride + r] : a[r * a_stride + k];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sums[r][v] = multiply_add(sums[r][v], ark, bk[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(c + r * c_stride + v * kLanes, sums[r][v]);
}

// c (kTileRows,N) = a (kTileRows,K) b (K,N), with kAccumulate plus `kept` times what c was. With kTransA, a
// is stored as (K,kTileRows). N is a multiple of kLanes, and K counts words.
template <bool kTransA, bool kAccumulate, class Word>
inline void tile_product(float* c, int c_stride, const Word* a, int a_stride, const Word* b, int b_stride,
                         int N, int K, float kept = 1) {
    constexpr int kStep = kTileVectors * kLanes;
    int n = 0;
    for (; n + kStep <= N; n += kStep)
        block_product<kTileRows, kTileVectors, kTransA, kAccumulate>(c + n, c_stride, a, a_stride, b + n,
                                                                     b_stride, K, kept);
    for (; n < N; n += kLanes)
        block_product<kTileRows, 1, kTransA, kAccumulate>(c + n, c_stride, a, a_stride, b + n, b_stride, K,
                                                          kept);
}

}  // namespace cpu
