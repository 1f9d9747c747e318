// activation(gate) * up, of gate and up side by side.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_GATED_LINEAR_UNIT_H_
#define OWL_DEPLOY_GATED_LINEAR_UNIT_H_

#include <cstddef>
#include <cstdint>

#include "parallel_for.h"

namespace owl {

enum class Activation : uint8_t {
  kSilu,     // x / (1 + exp(-x))
  kGeluTanh  // x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
};

// y = activation(x[:, :n]) * x[:, n:], for x (m, 2 n) and y (m, n). Does not throw.
void GatedLinearUnit(Activation activation, const float* x, size_t m, size_t n, float* y, ParallelFor parallel_for,
                     void* pool);

}  // namespace owl

#endif  // OWL_DEPLOY_GATED_LINEAR_UNIT_H_
