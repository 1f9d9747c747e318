// What targets do plainly whose vectors do not do it faster: columns one by one, X from memory.
//
// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"
#include "lanes-masks.h"

namespace owl {
namespace OWL_TARGET {
namespace {

// A block of X, for several rows of W.
using XBlock = const float*;
static inline XBlock LoadXBlock(const float* x) { return x; }

// Both scales of `n` blocks, each times its block's factor.
static inline void ScalePairs(const float* pairs, const uint8_t* factors, size_t n, float* out) {
  for (size_t j = 0; j < n; ++j) {
    const float factor = static_cast<float>(factors[j]);
    out[2 * j] = pairs[2 * j] * factor;
    out[2 * j + 1] = pairs[2 * j + 1] * factor;
  }
}

// Of the next `n_left` ascending columns of a list, writes those of the block that begins at `first`, counted from
// there; returns how many.
static inline size_t BlockColumns(const uint8_t* list, size_t n_left, uint32_t first, uint8_t* columns) {
  size_t n = 0;
  for (; n < n_left; ++n) {
    uint16_t column;
    __builtin_memcpy(&column, list + 2 * n, sizeof column);
    if (column - first >= kBlock) break;
    columns[n] = static_cast<uint8_t>(column - first);
  }
  return n;
}

}  // namespace
}  // namespace OWL_TARGET
}  // namespace owl
