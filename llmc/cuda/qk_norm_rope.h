// What stands between the qkv projection and attention, in one pass: RMS norm of every head of q and k, with
// a learned gain for every head of q, then rotary positions (arXiv 2104.09864), which pair channel i with i +
// D/2. Each of the two is optional. A row of qkv is q (H,D), k (H,D), v (H,D). v passes through.
//
// A warp takes a row, so that it reads the row's angles once. It takes several heads at a time, each by a few
// lanes. A lane has the same channels of both halves of a head.
#pragma once
#include <bit>
#include <cstddef>

#include "llmc/cuda/column_sums.h"
#include "llmc/cuda/reduce.h"
#include "llmc/cuda/vector.h"
#include "llmc/layer_constants.h"
#include "llmc/rope.h"

namespace gpu {

constexpr int kHeadThreads = 128;

// A lane's share of the two halves of a head: kChunks times kWidth channels of each. A half has (D+1)/2
// channels; if D is odd, which needs a head without rotation, the upper half is one shorter.
template <int kWidth, int kChunks>
struct HeadShare {
    Vec<kWidth> low[kChunks], high[kChunks];

    template <class F>  // f(chunk, channel in the half, whether the upper half has it)
    static __device__ void for_chunks(int lane, int lanes, int D, F f) {
        int half = (D + 1) / 2;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; chunk++) {
            int i = (chunk * lanes + lane) * kWidth;
            if (i < half) f(chunk, i, half + i < D);
        }
    }
    template <class Real>
    __device__ void load(const Real* at, int lane, int lanes, int D) {
        for_chunks(lane, lanes, D, [&](int chunk, int i, bool has_high) {
            low[chunk] = load_vec<kWidth>(at + i);
            if (has_high) high[chunk] = load_vec<kWidth>(at + (D + 1) / 2 + i);
        });
    }
    template <class Real>
    __device__ void store(Real* at, int lane, int lanes, int D) const {
        for_chunks(lane, lanes, D, [&](int chunk, int i, bool has_high) {
            store_vec(at + i, low[chunk]);
            if (has_high) store_vec(at + (D + 1) / 2 + i, high[chunk]);
        });
    }
    __device__ float dot(const HeadShare& other) const {
        float sum = 0;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; chunk++)
#pragma unroll
            for (int i = 0; i < kWidth; i++)
                sum += low[chunk][i] * other.low[chunk][i] + high[chunk][i] * other.high[chunk][i];
        return sum;
    }
    // Rotates by the angles whose cosines and sines are given, or back.
    __device__ void rotate(const HeadShare& angles, bool back) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; chunk++)
#pragma unroll
            for (int i = 0; i < kWidth; i++) {
                float a = low[chunk][i], b = high[chunk][i];
                float c = angles.low[chunk][i], s = back ? -angles.high[chunk][i] : angles.high[chunk][i];
                low[chunk][i] = a * c - b * s;
                high[chunk][i] = b * c + a * s;
            }
    }
    // = x * this + y * other
    __device__ void combine(float x, float y, const HeadShare& other) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; chunk++)
#pragma unroll
            for (int i = 0; i < kWidth; i++) {
                low[chunk][i] = x * low[chunk][i] + y * other.low[chunk][i];
                high[chunk][i] = x * high[chunk][i] + y * other.high[chunk][i];
            }
    }
    __device__ void scale(float x) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; chunk++)
#pragma unroll
            for (int i = 0; i < kWidth; i++) {
                low[chunk][i] *= x;
                high[chunk][i] *= x;
            }
    }
};

template <class Real, int kWidth, int kChunks>
__global__ void __launch_bounds__(kHeadThreads)
    qk_norm_rope_forward_kernel(Real* out, float* rstd, const Real* inp, const float* q_gain,
                                const float* rope, int lanes, int N, int T, int H, int D) {
    using Share = HeadShare<kWidth, kChunks>;
    int bt = (blockIdx.x * kHeadThreads + threadIdx.x) / kWarp;
    if (bt >= N) return;
    int lane = threadIdx.x % kWarp % lanes, group = threadIdx.x % kWarp / lanes;
    Share angles{};
    if (rope) angles.load(rope + (size_t)(bt % T) * D, lane, lanes, D);
    for (int first = 0; first < 3 * H; first += kWarp / lanes) {
        int h = first + group;
        size_t at = ((size_t)bt * 3 * H + h) * D;
        Share x{};
        if (h < 3 * H) x.load(inp + at, lane, lanes, D);
        if (q_gain) {
            float r = rsqrtf(group_sum(x.dot(x), lanes) / D + kQkNormEps);
            if (h < 2 * H) {
                if (lane == 0) rstd[(size_t)bt * 2 * H + h] = r;
                x.scale(h < H ? r * q_gain[h] : r);
            }
        }
        if (rope && h < 2 * H) x.rotate(angles, false);
        if (h < 3 * H) x.store(out + at, lane, lanes, D);
    }
}

template <class Real, int kWidth, int kChunks>
__global__ void __launch_bounds__(kHeadThreads)
    qk_norm_rope_backward_kernel(Real* dinp,
                                 float* dots,  // (N,H): what a row adds to the gradient of q_gain
                                 const Real* dout, const Real* inp, const float* rstd, const float* q_gain,
                                 const float* rope, int lanes, int N, int T, int H, int D) {
    using Share = HeadShare<kWidth, kChunks>;
    int bt = (blockIdx.x * kHeadThreads + threadIdx.x) / kWarp;
    if (bt >= N) return;
    int lane = threadIdx.x % kWarp % lanes, group = threadIdx.x % kWarp / lanes;
    int heads = dinp == dout ? 2 * H : 3 * H;  // in place, v is there already
    Share angles{};
    if (rope) angles.load(rope + (size_t)(bt % T) * D, lane, lanes, D);
    for (int first = 0; first < heads; first += kWarp / lanes) {
        int h = first + group;
        size_t at = ((size_t)bt * 3 * H + h) * D;
        Share d{};
        if (h < heads) d.load(dout + at, lane, lanes, D);
        if (rope && h < 2 * H) d.rotate(angles, true);
        if (q_gain) {
            Share x{};
            float r = 0;
            if (h < 2 * H) {
                x.load(inp + at, lane, lanes, D);
                r = rstd[(size_t)bt * 2 * H + h];
            }
            float dot = group_sum(d.dot(x), lanes) * r;
            if (h < H && lane == 0) dots[(size_t)bt * H + h] = dot;
            // gain r (d - xhat mean(d xhat)), with xhat = x r
            float gain_r = h < H ? q_gain[h] * r : r;
            if (h < 2 * H) d.combine(gain_r, -gain_r * r * dot / D, x);
        }
        if (h < heads) d.store(dinp + at, lane, lanes, D);
    }
}

// Calls run(width, chunks, lanes) with what suits heads of D channels.
template <class Real, class Run>
void choose_head_share(int D, bool packs, Run run) {
    int half = ceil_div(D, 2);
    constexpr int kPack = Pack<Real>::size;
    auto lanes = [](int n) { return (int)std::bit_ceil((unsigned)n); };
    using One = std::integral_constant<int, 1>;
    if (packs && half % kPack == 0 && half / kPack <= kWarp) {
        run(std::integral_constant<int, kPack>(), One(), lanes(half / kPack));
    } else if (half <= kWarp) {
        run(One(), One(), lanes(half));
    } else if (half <= 4 * kWarp) {
        run(One(), std::integral_constant<int, 4>(), kWarp);
    } else if (half <= 16 * kWarp) {
        run(One(), std::integral_constant<int, 16>(), kWarp);
    } else {
        fail("qk-norm and RoPE on the GPU: heads of ", D, ": expected at most ", 32 * kWarp);
    }
}

// out may not be inp. Without a norm rstd stays as it is.
template <class Real>
void qk_norm_rope_forward(Real* out,            // (B,T,3C)
                          float* rstd,          // (B,T,2H): those of q, then those of k
                          const Real* inp,      // (B,T,3C)
                          const float* q_gain,  // (H), or null: no norm
                          const float* rope,    // (T,D) from rope_table, or null: no rotation
                          int B, int T, int H, int D, cudaStream_t stream) {
    bool packs = D % 2 == 0 && in_packs<Real>(D, out, inp) && (uintptr_t)rope % 16 == 0;
    choose_head_share<Real>(D, packs, [&](auto width, auto chunks, int lanes) {
        qk_norm_rope_forward_kernel<Real, width(), chunks()>
            <<<ceil_div(B * T, kHeadThreads / kWarp), kHeadThreads, 0, stream>>>(out, rstd, inp, q_gain, rope,
                                                                                 lanes, B * T, T, H, D);
        check_launch();
    });
}

// The number of floats of scratch that qk_norm_rope_backward() needs.
inline size_t qk_norm_rope_scratch(int B, int T, int H) {
    return (size_t)B * T * H + kColumnSumsScratch;
}

template <class Real>
void qk_norm_rope_backward(Real* dinp,           // (B,T,3C), may be dout
                           float* dq_gain,       // (H) +=, or null if q_gain is null
                           float* scratch,       // (qk_norm_rope_scratch), or null if q_gain is null
                           const Real* dout,     // (B,T,3C)
                           const Real* inp,      // (B,T,3C)
                           const float* rstd,    // (B,T,2H)
                           const float* q_gain,  // (H), or null
                           const float* rope,    // (T,D), or null
                           int B, int T, int H, int D, cudaStream_t stream) {
    bool packs = D % 2 == 0 && in_packs<Real>(D, dinp, dout, inp) && (uintptr_t)rope % 16 == 0;
    float* dots = q_gain ? scratch + kColumnSumsScratch : nullptr;
    choose_head_share<Real>(D, packs, [&](auto width, auto chunks, int lanes) {
        qk_norm_rope_backward_kernel<Real, width(), chunks()>
            <<<ceil_div(B * T, kHeadThreads / kWarp), kHeadThreads, 0, stream>>>(
                dinp, dots, dout, inp, rstd, q_gain, rope, lanes, B * T, T, H, D);
        check_launch();
    });
    if (q_gain) add_column_sums(dq_gain, scratch, dots, B * T, H, stream);
}

}  // namespace gpu
