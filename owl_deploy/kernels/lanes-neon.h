// AArch64 with dot products: four floats, sixteen bytes. Expansion is a table look-up and a shuffle per eight columns.
//
// SPDX-License-Identifier: Apache-2.0
#include <arm_neon.h>

#include "kernels.h"

namespace owl {
namespace OWL_TARGET {
namespace {

constexpr size_t kLanes = 4;
constexpr size_t kRowsSingle = 2;
constexpr size_t kRowsBatch = 1;
constexpr size_t kMaxBatch = 4;
constexpr size_t kTileFrom = 5;
constexpr size_t kTileFromFull = 5;
constexpr size_t kByteTileFrom = 5;
constexpr size_t kByteBatch = 2;
constexpr size_t kByteLanes = 4;
constexpr size_t kPairedTile = 0;
constexpr size_t kByteRows = 4;
constexpr int32_t kWOffset = 0;

struct Acc {
  float32x4_t v[4];
};
struct Block {
  float32x4_t v[16];
};
struct Bytes {
  int8x16_t v[4];
};
using XBytes = Bytes;

static inline Acc Zero() {
  const float32x4_t zero = vdupq_n_f32(0);
  return {{zero, zero, zero, zero}};
}
static inline float Sum(const Acc& acc) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(acc.v[0], acc.v[1]), vaddq_f32(acc.v[2], acc.v[3])));
}
template <size_t kRows>
static inline void Sums(const Acc (&acc)[kRows], float* out) {
  for (size_t r = 0; r < kRows; ++r) out[r] = Sum(acc[r]);
}

// Eight values as floats.
struct Eight {
  float32x4_t low, high;
};
template <ValueType kType>
static inline Eight Load8(const uint8_t* values) {
  if constexpr (kType == ValueType::kFloat32) {
    return {vreinterpretq_f32_u8(vld1q_u8(values)), vreinterpretq_f32_u8(vld1q_u8(values + 16))};
  } else if constexpr (kType == ValueType::kFloat16) {
    const float16x8_t halves = vreinterpretq_f16_u8(vld1q_u8(values));
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  } else if constexpr (kType == ValueType::kBFloat16) {
    const uint16x8_t halves = vreinterpretq_u16_u8(vld1q_u8(values));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16))};
  } else {
    const int16x8_t words = vmovl_s8(vreinterpret_s8_u8(vld1_u8(values)));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))};
  }
}

template <ValueType kType>
static inline Block LoadBlock(const uint8_t* values) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : 2;
  Block block;
  for (size_t i = 0; i < 8; ++i) {
    const Eight eight = Load8<kType>(values + 8 * i * kSize);
    block.v[2 * i] = eight.low;
    block.v[2 * i + 1] = eight.high;
  }
  return block;
}

template <ValueType kType>
static inline Block ExpandBlock(const uint8_t* mask, const uint8_t* values) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : 2;
  // Column c of eight comes from bytes 4 s to 4 s + 3 of thirty-two; 0x80 and more give zero.
  static constexpr uint8_t kRepeat[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  static constexpr uint8_t kByte[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
  const uint8x16_t repeat = vld1q_u8(kRepeat), byte = vld1q_u8(kByte);
  Block block;
  for (size_t i = 0; i < 8; ++i) {
    const Eight eight = Load8<kType>(values);
    const uint8x16x2_t source = {{vreinterpretq_u8_f32(eight.low), vreinterpretq_u8_f32(eight.high)}};
    const uint8x8_t order = vld1_u8(kShuffle.rows[mask[i]]);
    // Saturation keeps 0x80 out of range where a shift would bring it back.
    const uint8x8_t offsets = vqshl_n_u8(order, 2);
    const uint8x16_t both = vcombine_u8(offsets, offsets);
    const uint8x16_t low = vqaddq_u8(vqtbl1q_u8(both, repeat), byte);
    const uint8x16_t high = vqaddq_u8(vqtbl1q_u8(both, vaddq_u8(repeat, vdupq_n_u8(4))), byte);
    block.v[2 * i] = vreinterpretq_f32_u8(vqtbl2q_u8(source, low));
    block.v[2 * i + 1] = vreinterpretq_f32_u8(vqtbl2q_u8(source, high));
    values += kSize * static_cast<size_t>(__builtin_popcount(mask[i]));
  }
  return block;
}

static inline void MulAdd(Acc& acc, const Block& block, const float* x) {
  for (size_t i = 0; i < 16; ++i) acc.v[i % 4] = vfmaq_f32(acc.v[i % 4], block.v[i], vld1q_f32(x + 4 * i));
}

template <ValueType kType>
static inline void ConvertValues(const uint8_t* values, size_t n, float* out) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : kType == ValueType::kInt8 ? 1 : 2;
  for (size_t e = 0; e < n; e += 8) {
    const Eight eight = Load8<kType>(values + e * kSize);
    vst1q_f32(out + e, eight.low);
    vst1q_f32(out + e + 4, eight.high);
  }
}

template <ValueType kType>
static inline float IndexDot(const uint8_t* columns, const uint8_t* values, size_t n, const float* x) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : kType == ValueType::kInt8 ? 1 : 2;
  float sums[4] = {}, eight[8];
  for (size_t e = 0; e < n; e += 8) {
    ConvertValues<kType>(values + e * kSize, 8, eight);
    for (size_t i = 0; i < 8 && e + i < n; ++i) {
      uint16_t column;
      __builtin_memcpy(&column, columns + 2 * (e + i), sizeof column);
      sums[i % 4] += eight[i] * x[column];
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}
template <ValueType kType>
static inline void IndexDots(const IndexRow (&rows)[4], const float* x, float* sums) {
  for (size_t r = 0; r < 4; ++r) sums[r] = IndexDot<kType>(rows[r].columns, rows[r].values, rows[r].n, x);
}

// ---- bytes ----

static inline Bytes LoadBytes(const int8_t* values) {
  return {{vld1q_s8(values), vld1q_s8(values + 16), vld1q_s8(values + 32), vld1q_s8(values + 48)}};
}
static inline void StoreBytes(int8_t* out, const Bytes& bytes) {
  for (size_t i = 0; i < 4; ++i) vst1q_s8(out + 16 * i, bytes.v[i]);
}
static inline int8x8_t ExpandEight(uint8_t mask, const int8_t*& values) {
  const int8x8_t expanded = vtbl1_s8(vld1_s8(values), vreinterpret_s8_u8(vld1_u8(kShuffle.rows[mask])));
  values += __builtin_popcount(mask);
  return expanded;
}
static inline Bytes ExpandBytes(const uint8_t* mask, const int8_t* values) {
  Bytes bytes;
  for (size_t i = 0; i < 4; ++i) {
    const int8x8_t low = ExpandEight(mask[2 * i], values);
    const int8x8_t high = ExpandEight(mask[2 * i + 1], values);
    bytes.v[i] = vcombine_s8(low, high);
  }
  return bytes;
}
static inline XBytes LoadX(const int8_t* x) { return LoadBytes(x); }
// Lanes are fours of columns, and the two scales of a block take turns.
using Scales = float32x4_t;
static inline Scales LoadScales(const float* pair) {
  const float32x2_t both = vld1_f32(pair);
  return vcombine_f32(both, both);
}
static inline void DotAdd(Acc& acc, const Bytes& w, const XBytes& x, Scales scales) {
  int32x4_t dot = vdupq_n_s32(0);
  for (size_t i = 0; i < 4; ++i) dot = vdotq_s32(dot, w.v[i], x.v[i]);
  acc.v[0] = vfmaq_f32(acc.v[0], vcvtq_f32_s32(dot), scales);
}

static inline void DecodeNibbles(const uint8_t* codes, const int8_t* codebook, int8_t* low, int8_t* high) {
  const int8x16_t table = vld1q_s8(codebook);
  int8x16_t upper[4];
  for (size_t i = 0; i < 4; ++i) {
    const uint8x16_t bytes = vld1q_u8(codes + 16 * i);
    vst1q_s8(low + 16 * i, vqtbl1q_s8(table, vandq_u8(bytes, vdupq_n_u8(15))));
    upper[i] = vqtbl1q_s8(table, vshrq_n_u8(bytes, 4));
  }
  // `high` may begin inside the sixty-four bytes that go to `low`: it is written last.
  for (size_t i = 0; i < 4; ++i) vst1q_s8(high + 16 * i, upper[i]);
}

template <size_t>
struct Quads {
  using Ints = int32x4_t;
  using Floats = float32x4_t;
  using X = int8x16_t;
  using W = int8x16_t;
  static Floats ToFloats(Ints v) { return vcvtq_f32_s32(v); }
  static W Splat(const int8_t* w) {
    int32_t quad;
    __builtin_memcpy(&quad, w, sizeof quad);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
  }
  static X Load(const int8_t* x) { return vld1q_s8(x); }
  static Ints Dot(Ints acc, X x, W w) { return vdotq_s32(acc, x, w); }
};

static inline void RoundBlock(const float* x, size_t n, int8_t* out, float* scales) {
  float block[64] = {};
  __builtin_memcpy(block, x, n * sizeof(float));
  float32x4_t largest[2] = {vdupq_n_f32(0), vdupq_n_f32(0)};
  for (size_t i = 0; i < 64; i += 4) {
    float32x4_t& top = largest[i / 4 % 2];
    top = vmaxq_f32(top, vabsq_f32(vld1q_f32(block + i)));  // keeps a NaN
  }
  const RoundingScale even = ScaleOf(vmaxvq_f32(largest[0])), odd = ScaleOf(vmaxvq_f32(largest[1]));
  for (size_t i = 0; i < 64; i += 8) {
    const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(block + i), even.inverse));
    const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(block + i + 4), odd.inverse));
    vst1_s8(out + i, vqmovn_s16(vcombine_s16(vqmovn_s32(low), vqmovn_s32(high))));
  }
  scales[0] = even.scale;
  scales[1] = odd.scale;
}

}  // namespace
}  // namespace OWL_TARGET
}  // namespace owl
