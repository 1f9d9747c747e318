// Masks read bit by bit, for targets without instructions that list the columns of one.
//
// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

namespace owl {
namespace OWL_TARGET {
namespace {

// X is never looked up for the stored values.
constexpr size_t kLookupPercent = 0;
template <ValueType, class Acc, class XBlock>
void LookupAdd(Acc&, const uint8_t*, const uint8_t*, const XBlock&) = delete;

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

}  // namespace
}  // namespace OWL_TARGET
}  // namespace owl
