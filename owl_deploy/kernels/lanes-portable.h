// Plain C++: four floats in a vector of the compiler's own, bytes one by one.
//
// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

namespace owl {
namespace OWL_TARGET {
namespace {

constexpr size_t kLanes = 4;
constexpr size_t kRowsSingle = 1;
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

typedef float Vec4 __attribute__((vector_size(16)));

struct Acc {
  Vec4 v[4];
};
struct Block {
  Vec4 v[16];
};
struct Bytes {
  int8_t v[64];
};
using XBytes = Bytes;

static inline Acc Zero() { return {}; }
static inline float Sum(const Acc& acc) {
  const Vec4 sum = (acc.v[0] + acc.v[1]) + (acc.v[2] + acc.v[3]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
template <size_t kRows>
static inline void Sums(const Acc (&acc)[kRows], float* out) {
  for (size_t r = 0; r < kRows; ++r) out[r] = Sum(acc[r]);
}

static inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, fraction = half & 0x3FF;
  uint32_t bits;
  if (exponent == 0) {
    const float small = static_cast<float>(fraction) * 5.9604644775390625e-8F;  // 2^-24
    __builtin_memcpy(&bits, &small, sizeof bits);
  } else {
    bits = (exponent == 31 ? 0x7F800000 : (exponent + 112) << 23) | fraction << 13;
  }
  bits |= sign;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Value `i` of a record.
template <ValueType kType>
static inline float ValueAt(const uint8_t* values, size_t i) {
  if constexpr (kType == ValueType::kFloat32) {
    float value;
    __builtin_memcpy(&value, values + 4 * i, sizeof value);
    return value;
  } else if constexpr (kType == ValueType::kInt8) {
    return static_cast<int8_t>(values[i]);
  } else {
    uint16_t half;
    __builtin_memcpy(&half, values + 2 * i, sizeof half);
    if constexpr (kType == ValueType::kFloat16) return HalfToFloat(half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
}

template <ValueType kType>
static inline Block LoadBlock(const uint8_t* values) {
  Block block;
  for (size_t i = 0; i < 64; ++i) block.v[i / 4][i % 4] = ValueAt<kType>(values, i);
  return block;
}

template <ValueType kType>
static inline Block ExpandBlock(const uint8_t* mask, const uint8_t* values) {
  uint64_t bits;
  __builtin_memcpy(&bits, mask, sizeof bits);
  alignas(16) float dense[64] = {};
  for (size_t i = 0; bits != 0; bits &= bits - 1, ++i) dense[__builtin_ctzll(bits)] = ValueAt<kType>(values, i);
  Block block;
  __builtin_memcpy(&block, dense, sizeof block);
  return block;
}

static inline void MulAdd(Acc& acc, const Block& block, const float* x) {
  for (size_t i = 0; i < 16; ++i) {
    Vec4 part;
    __builtin_memcpy(&part, x + 4 * i, sizeof part);
    acc.v[i % 4] += block.v[i] * part;
  }
}

template <ValueType kType>
static inline float IndexDot(const uint8_t* columns, const uint8_t* values, size_t n, const float* x) {
  float sums[4] = {};
  for (size_t i = 0; i < n; ++i) {
    uint16_t column;
    __builtin_memcpy(&column, columns + 2 * i, sizeof column);
    sums[i % 4] += ValueAt<kType>(values, i) * x[column];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}
template <ValueType kType>
static inline void IndexDots(const IndexRow (&rows)[4], const float* x, float* sums) {
  for (size_t r = 0; r < 4; ++r) sums[r] = IndexDot<kType>(rows[r].columns, rows[r].values, rows[r].n, x);
}

template <ValueType kType>
static inline void ConvertValues(const uint8_t* values, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = ValueAt<kType>(values, i);
}

// ---- bytes ----

static inline Bytes LoadBytes(const int8_t* values) {
  Bytes bytes;
  __builtin_memcpy(bytes.v, values, sizeof bytes.v);
  return bytes;
}
static inline void StoreBytes(int8_t* out, const Bytes& bytes) { __builtin_memcpy(out, bytes.v, sizeof bytes.v); }
static inline Bytes ExpandBytes(const uint8_t* mask, const int8_t* values) {
  uint64_t bits;
  __builtin_memcpy(&bits, mask, sizeof bits);
  Bytes bytes = {};
  for (; bits != 0; bits &= bits - 1) bytes.v[__builtin_ctzll(bits)] = *values++;
  return bytes;
}
static inline XBytes LoadX(const int8_t* x) { return LoadBytes(x); }
struct Scales {
  float v[2];
};
static inline Scales LoadScales(const float* pair) { return {{pair[0], pair[1]}}; }
static inline void DotAdd(Acc& acc, const Bytes& w, const XBytes& x, const Scales& scales) {
  int32_t dots[2] = {};
  for (size_t i = 0; i < 64; ++i) dots[i / 4 % 2] += w.v[i] * x.v[i];
  for (size_t half = 0; half < 2; ++half) acc.v[0][half] += scales.v[half] * static_cast<float>(dots[half]);
}

static inline void DecodeNibbles(const uint8_t* codes, const int8_t* codebook, int8_t* low, int8_t* high) {
  // `high` may begin inside the sixty-four bytes that go to `low`: it is written last.
  for (size_t i = 0; i < 64; ++i) low[i] = codebook[codes[i] & 15];
  for (size_t i = 0; i < 64; ++i) high[i] = codebook[codes[i] >> 4];
}

template <size_t>
struct Quads {
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef float Floats __attribute__((vector_size(16)));
  struct X {
    int8_t v[16];
  };
  struct W {
    int8_t v[4];
  };
  static Floats ToFloats(Ints v) { return __builtin_convertvector(v, Floats); }
  static W Splat(const int8_t* w) { return {{w[0], w[1], w[2], w[3]}}; }
  static X Load(const int8_t* x) {
    X quads;
    __builtin_memcpy(quads.v, x, sizeof quads.v);
    return quads;
  }
  static Ints Dot(Ints acc, const X& x, const W& w) {
    for (size_t lane = 0; lane < 4; ++lane) {
      for (size_t k = 0; k < 4; ++k) acc[lane] += x.v[4 * lane + k] * w.v[k];
    }
    return acc;
  }
};

static inline void RoundBlock(const float* x, size_t n, int8_t* out, float* scales) {
  float largest[2] = {};
  for (size_t i = 0; i < n; ++i) {
    float& top = largest[i / 4 % 2];
    const float magnitude = __builtin_fabsf(x[i]);
    if (!(magnitude <= top) && top == top) top = magnitude;  // also takes what is not a number, and stays with it
  }
  const RoundingScale rounding[2] = {ScaleOf(largest[0]), ScaleOf(largest[1])};
  for (size_t i = 0; i < 64; ++i) {
    const float inverse = rounding[i / 4 % 2].inverse;
    const float scaled = i < n && inverse != 0 ? x[i] * inverse : 0;
    out[i] = static_cast<int8_t>(__builtin_rintf(scaled));
  }
  for (size_t half = 0; half < 2; ++half) scales[half] = rounding[half].scale;
}

}  // namespace
}  // namespace OWL_TARGET
}  // namespace owl
