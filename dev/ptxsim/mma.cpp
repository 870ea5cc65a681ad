// mma.sync: products of matrices whose elements are spread over the lanes of a warp.
//
// Fragments are those of the PTX ISA, "Matrix Fragments for mma.m16n8k*". With g = lane / 4: register r of A
// holds elements of row g + 8 (r % 2), the registers of B elements of column g, those of C elements of rows g
// and g + 8. A register holds two 16-bit elements: neighbours in a row of A, or in a column of B.
#include <algorithm>

#include "dev/ptxsim/floats.h"
#include "dev/ptxsim/lanes.h"

namespace ptxsim {

namespace {

typedef double Row __attribute__((vector_size(64)));  // 8 columns

enum Element { kTf32, kF16, kBf16 };

float half_value(Element type, uint16_t bits) {
    return type == kBf16 ? decode(bf16{bits}) : decode(f16{bits});
}
float tf32_value(uint32_t bits) {
    return std::bit_cast<float>(bits & 0xFFFFE000u);
}

// The operands o are the registers of D, A, B and C, in this order.
template <Element kType, int K, bool kHalfResult, bool kHalfSum>
void run_mma(Warp& w, const Instruction& in, Mask lanes) {
    constexpr bool kIsHalf = kType != kTf32;
    constexpr int kA = kIsHalf ? K / 4 : K / 2, kB = kA / 2;  // numbers of registers
    constexpr int kD = kHalfResult ? 2 : 4;
    float a[16][K];
    Row b[K], sums[16];
    const int32_t *at_a = in.o + kD, *at_b = at_a + kA, *at_c = at_b + kB;
    alignas(64) float low[kWarpSize], high[kWarpSize];  // a register's two elements; tf32 has only low
    auto unpack = [&](const uint32_t* x) {
        for (int lane = 0; lane < kWarpSize; lane++) {
            low[lane] = kIsHalf ? half_value(kType, (uint16_t)x[lane]) : tf32_value(x[lane]);
            if (kIsHalf) high[lane] = half_value(kType, (uint16_t)(x[lane] >> 16));
        }
    };
    for (int r = 0; r < kA; r++) {
        unpack(w.src<uint32_t>(at_a[r]));
        for (int lane = 0; lane < kWarpSize; lane++) {
            int row = lane / 4 + 8 * (r % 2), t = lane % 4;
            if (kIsHalf) {
                a[row][2 * t + 8 * (r / 2)] = low[lane];
                a[row][2 * t + 8 * (r / 2) + 1] = high[lane];
            } else {
                a[row][t + 4 * (r / 2)] = low[lane];
            }
        }
    }
    for (int r = 0; r < kB; r++) {
        unpack(w.src<uint32_t>(at_b[r]));
        for (int lane = 0; lane < kWarpSize; lane++) {
            int column = lane / 4, t = lane % 4;
            if (kIsHalf) {
                b[2 * t + 8 * r][column] = low[lane];
                b[2 * t + 8 * r + 1][column] = high[lane];
            } else {
                b[t + 4 * r][column] = low[lane];
            }
        }
    }
    for (int e = 0; e < 4; e++)
        for (int lane = 0; lane < kWarpSize; lane++) {
            int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
            if (kHalfSum) {
                sums[row][column] =
                    decode(f16{(uint16_t)(w.src<uint32_t>(at_c[e / 2])[lane] >> (16 * (e % 2)))});
            } else {
                sums[row][column] = w.src<float>(at_c[e])[lane];
            }
        }
    for (int row = 0; row < 16; row++) {
        Row total = sums[row];
        for (int k = 0; k < K; k++) total += (double)a[row][k] * b[k];
        sums[row] = total;
    }
    for (int r = 0; r < kD; r++) {
        uint32_t values[kWarpSize];
        for (int lane = 0; lane < kWarpSize; lane++) {
            if (kHalfResult) {
                const double* pair = (const double*)&sums[lane / 4 + 8 * r] + 2 * (lane % 4);
                values[lane] = (uint32_t)to_half<f16>(pair[1]).bits << 16 | to_half<f16>(pair[0]).bits;
            } else {
                values[lane] =
                    std::bit_cast<uint32_t>((float)sums[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2]);
            }
        }
        put(w.reg<uint32_t>(in.o[r]), values, lanes);
    }
    Figures& f = w.block->grid->figures;
    f.mma++;
    f.tensor_flops += 2 * 16 * 8 * K;
}

template <Element kType, int K>
Handler by_sums(const std::string& d, const std::string& c) {
    if (d == "f32" && c == "f32") return &run_mma<kType, K, false, false>;
    if constexpr (kType == kF16) {
        if (d == "f16" && c == "f16") return &run_mma<kType, K, true, true>;
        if (d == "f32" && c == "f16") return &run_mma<kType, K, false, true>;
        if (d == "f16" && c == "f32") return &run_mma<kType, K, true, false>;
    }
    return nullptr;
}

}  // namespace

// Finds instructions like mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32.
bool find_mma(const Statement& s, Instruction* in) {
    const std::vector<std::string>& m = s.modifiers;
    if (m.size() != 9 || m[0] != "sync" || m[1] != "aligned" || m[3] != "row" || m[4] != "col" ||
        m[6] != m[7])
        return false;
    const std::string &shape = m[2], &d = m[5], &type = m[6], &c = m[8];
    if (type == "bf16" && shape == "m16n8k16") in->run = by_sums<kBf16, 16>(d, c);
    if (type == "bf16" && shape == "m16n8k8") in->run = by_sums<kBf16, 8>(d, c);
    if (type == "f16" && shape == "m16n8k16") in->run = by_sums<kF16, 16>(d, c);
    if (type == "f16" && shape == "m16n8k8") in->run = by_sums<kF16, 8>(d, c);
    if (type == "tf32" && shape == "m16n8k8") in->run = by_sums<kTf32, 8>(d, c);
    if (type == "tf32" && shape == "m16n8k4") in->run = by_sums<kTf32, 4>(d, c);
    in->flow = Flow::sync;
    in->sync_mask = kConvergedLanes;
    return in->run != nullptr;
}

}  // namespace ptxsim
