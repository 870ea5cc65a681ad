// Attention of a few new tokens to all earlier ones, whose keys and values are kept: for generation. The
// formulas are those of attention.h. A token costs O(T), and its output is that of attention_forward except
// for rounding.
#pragma once
#include "llmc/config.h"
#include "llmc/cuda/attention/decay.h"
#include "llmc/cuda/common.h"

namespace gpu {

template <class Real>
void attention_cached_forward(
    Real* out,               // (n,C)
    float* scores,           // (n,H,start+n), scratch
    const Real* qkv,         // (n,3C): tokens start .. start+n-1, of which only q is read
    const Real* cache,       // (start+n,2C): k and v of every token so far
    const float* decay,      // (H): delta, or null
    const float* row_scale,  // (n,H): c_i of the new rows; softmax and `sum` ignore it
    const AttentionConfig& config, int start, int n, int H, int D, cudaStream_t stream,
    const double* gate_sums = nullptr /*with gates, (start+n,H): of log f, as cached_gates() makes them*/);

// Goes on with what generation needs of gates: the sums of log f from the first token to each token, and c_i,
// which with the scale `row` depends on all gates before. The sums are double, so that differences of two
// keep their digits.
void cached_gates(double* gate_sums,    // (start+n,H), of which n rows are written; null: not wanted
                  double* row_lengths,  // (H): n_i of the last token
                  float* row_scale,     // (n,H): c_i of the new rows
                  const float* log_f,   // (H,n): of the new tokens
                  const AttentionConfig& config, int start, int n, int H, int D, cudaStream_t stream);

// Makes log f of the first n tokens again.
void gates_of_sums(float* log_f /*(H,n)*/, const double* gate_sums /*(n,H)*/, int n, int H,
                   cudaStream_t stream);

}  // namespace gpu
