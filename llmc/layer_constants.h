// Constants of the layers, the same for every backend.
#pragma once

constexpr float kLayerNormEps = 1e-5f;
constexpr float kQkNormEps = 1e-6f;

// GELU in its tanh form, "gelu_new" (arXiv 1606.08415): gelu(x) = x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x +
// 0.044715 x^3). Backends compute x sigmoid(u2) with u2 = 2 u = x kGeluScale (1 + kGeluCubic x^2). It is the
// same function, and keeps its digits where 1 + tanh(u) would cancel.
constexpr float kGeluScale = 1.5957691216057308f;  // 2 sqrt(2/pi)
constexpr float kGeluCubic = 0.044715f;

// The derivative is 0 or 1 long before x is this far from 0. Beyond it x^3 would overflow.
constexpr float kGeluFar = 1e4f;
