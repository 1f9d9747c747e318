// What targets do plainly whose vectors do not do it faster: columns one by one, X from memory.
//
// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

namespace owl {
namespace OWL_TARGET {
namespace {

// A block of X, for several rows of W.
using XBlock = const float*;
static inline XBlock LoadXBlock(const float* x) { return x; }

constexpr size_t kLookupPercent = 0;
template <ValueType, class Acc>
void LookupAdd(Acc&, const uint8_t*, const uint8_t*, const XBlock&) = delete;

// Both scales of `n` blocks, each times its block's factor.
static inline void ScalePairs(const float* pairs, const uint8_t* factors, size_t n, float* out) {
  for (size_t j = 0; j < n; ++j) {
    const float factor = static_cast<float>(factors[j]);
    out[2 * j] = pairs[2 * j] * factor;
    out[2 * j + 1] = pairs[2 * j + 1] * factor;
  }
}

// Set bits of `n` masks.
static inline size_t CountMasks(const uint8_t* masks, size_t n) {
  size_t count = 0;
  for (size_t i = 0; i < n; ++i) {
    uint64_t mask;
    __builtin_memcpy(&mask, masks + 8 * i, sizeof mask);
    count += static_cast<size_t>(__builtin_popcountll(mask));
  }
  return count;
}

// Writes the columns whose bits are set; returns how many.
static inline size_t MaskColumns(uint64_t mask, uint8_t* columns) {
  size_t n = 0;
  for (; mask != 0; mask &= mask - 1) columns[n++] = static_cast<uint8_t>(__builtin_ctzll(mask));
  return n;
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
