// SPDX-License-Identifier: Apache-2.0
#include "gated_linear_unit.h"

#include <algorithm>

#include "dispatch.h"
#include "kernels.h"

namespace owl {
namespace {

// Values of y that a thread takes at once: some two microseconds' worth.
constexpr size_t kPiece = 4096;

struct Work {
  const Kernels* kernels;
  Activation activation;
  const float* x;
  size_t n, n_pieces;
  float* y;
};

}  // namespace

void GatedLinearUnit(Activation activation, const float* x, size_t m, size_t n, float* y, ParallelFor parallel_for,
                     void* pool) {
  Work work{&CurrentKernels(), activation, x, n, (n + kPiece - 1) / kPiece, y};
  const auto body = [](void* state, size_t i) {
    const Work& w = *static_cast<Work*>(state);
    const size_t row = i / w.n_pieces, first = i % w.n_pieces * kPiece;
    const float* gate = w.x + row * 2 * w.n + first;
    w.kernels->gate(w.activation, gate, gate + w.n, std::min(kPiece, w.n - first), w.y + row * w.n + first);
  };
  // A second thread costs about as much as four pieces.
  (m * n < 4 * kPiece ? SerialFor : parallel_for)(pool, m * work.n_pieces, body, &work);
}

}  // namespace owl
