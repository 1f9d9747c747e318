// The gated unit, written once; included by every target file behind its lanes.
//
// SPDX-License-Identifier: Apache-2.0
#include "vectors-inl.h"

namespace owl {
namespace OWL_TARGET {
namespace {

template <Activation kActivation>
OWL_INLINE Vec Activate(Vec x) {
  if constexpr (kActivation == Activation::kSilu) {
    return x / (1.0f + Exp(-x));
  } else {
    // x / 2 (1 + tanh(z)) is x / (1 + exp(-2 z)).
    return x / (1.0f + Exp(x * (-1.59576912f - 0.0713548163f * x * x)));
  }
}

template <Activation kActivation>
static void GateValues(const float* gate, const float* up, size_t n, float* y) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreVec(y + i, Activate<kActivation>(LoadVec(gate + i)) * LoadVec(up + i));
  if (i == n) return;
  float last[kLanes] = {};
  for (size_t k = 0; i + k < n; ++k) last[k] = gate[i + k];
  StoreVec(last, Activate<kActivation>(LoadVec(last)));
  for (size_t k = 0; i + k < n; ++k) y[i + k] = last[k] * up[i + k];
}

static void Gate(Activation activation, const float* gate, const float* up, size_t n, float* y) {
  if (activation == Activation::kSilu) return GateValues<Activation::kSilu>(gate, up, n, y);
  GateValues<Activation::kGeluTanh>(gate, up, n, y);
}

}  // namespace
}  // namespace OWL_TARGET
}  // namespace owl
