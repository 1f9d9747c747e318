// Tables and rules that several targets share; static, so that each target has its own.
//
// SPDX-License-Identifier: Apache-2.0
#include <cstddef>
#include <cstdint>

namespace owl {
namespace OWL_TARGET {
namespace {

// For each mask of eight columns, from which stored value each column comes; 0x80 where the column is not stored, which
// byte shuffles of all instruction sets turn into zero.
struct ShuffleTable {
  alignas(64) uint8_t rows[256][8];
};
constexpr ShuffleTable MakeShuffleTable() {
  ShuffleTable table{};
  for (int mask = 0; mask < 256; ++mask) {
    uint8_t next = 0;
    for (int bit = 0; bit < 8; ++bit) table.rows[mask][bit] = (mask >> bit & 1) != 0 ? next++ : 0x80;
  }
  return table;
}
static constexpr ShuffleTable kShuffle = MakeShuffleTable();

// A row of W as a list of columns (uint16) and their values.
struct IndexRow {
  const uint8_t* columns;
  const uint8_t* values;
  size_t n;
};

// How a block of X becomes int8: x * inverse rounded, and scale to go back. A block with a number that is not finite
// becomes zeros with a scale that is not one, so that its row of Y is not a number either.
struct RoundingScale {
  float inverse;
  float scale;
};
static inline RoundingScale ScaleOf(float largest) {
  if (!(largest <= 3.402823466e38F)) return {0, __builtin_nanf("")};
  const float scale = largest / 127;
  // 1e-36: below, the inverse would overflow, and the products are lost in any float32 sum.
  return largest < 1e-36F ? RoundingScale{0, 0} : RoundingScale{127 / largest, scale};
}

}  // namespace
}  // namespace OWL_TARGET
}  // namespace owl
