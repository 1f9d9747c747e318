// AVX2 with FMA and F16C: eight floats, thirty-two bytes. Expansion is a table look-up and a shuffle per eight columns.
//
// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "kernels.h"

namespace owl {
namespace OWL_TARGET {
namespace {

constexpr size_t kLanes = 8;
constexpr size_t kRowsSingle = 2;
constexpr size_t kRowsBatch = 1;
constexpr size_t kMaxBatch = 4;
constexpr size_t kTileFrom = 5;
constexpr size_t kTileFromFull = 5;
constexpr size_t kByteTileFrom = 5;
constexpr size_t kByteBatch = 2;
constexpr size_t kByteLanes = 8;
constexpr size_t kPairedTile = 0;
constexpr size_t kByteRows = 4;
constexpr int32_t kWOffset = 0;

struct Acc {
  __m256 v[2];
};
struct Block {
  __m256 v[8];
};
struct Bytes {
  __m256i v[2];
};

static inline Acc Zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
static inline float Sum8(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
static inline float Sum(Acc acc) { return Sum8(_mm256_add_ps(acc.v[0], acc.v[1])); }
template <size_t kRows>
static inline void Sums(const Acc (&acc)[kRows], float* out) {
  for (size_t r = 0; r < kRows; ++r) out[r] = Sum(acc[r]);
}

// Eight values as floats.
template <ValueType kType>
static inline __m256 Load8(const uint8_t* values) {
  if constexpr (kType == ValueType::kFloat32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(values));
  } else if constexpr (kType == ValueType::kFloat16) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  } else if constexpr (kType == ValueType::kBFloat16) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  } else {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))));
  }
}

template <ValueType kType>
static inline Block LoadBlock(const uint8_t* values) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : 2;
  Block block;
  for (size_t i = 0; i < 8; ++i) block.v[i] = Load8<kType>(values + 8 * i * kSize);
  return block;
}

template <ValueType kType>
static inline Block ExpandBlock(const uint8_t* mask, const uint8_t* values) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : 2;
  Block block;
  for (size_t i = 0; i < 8; ++i) {
    const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffle.rows[mask[i]]));
    const __m256i wide = _mm256_cvtepi8_epi32(order);  // negative: not stored
    const __m256 moved = _mm256_permutevar8x32_ps(Load8<kType>(values), wide);
    block.v[i] = _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(wide));
    values += kSize * static_cast<size_t>(__builtin_popcount(mask[i]));
  }
  return block;
}

static inline void MulAdd(Acc& acc, const Block& block, const float* x) {
  for (size_t i = 0; i < 8; ++i) acc.v[i % 2] = _mm256_fmadd_ps(block.v[i], _mm256_loadu_ps(x + 8 * i), acc.v[i % 2]);
}

template <ValueType kType>
static inline float IndexDot(const uint8_t* columns, const uint8_t* values, size_t n, const float* x) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : kType == ValueType::kInt8 ? 1 : 2;
  __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
  const auto gather = [&](size_t e) {
    const __m128i at = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + 2 * e));
    return _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(at), 4);
  };
  size_t e = 0;
  for (; e + 16 <= n; e += 16) {
    even = _mm256_fmadd_ps(gather(e), Load8<kType>(values + e * kSize), even);
    odd = _mm256_fmadd_ps(gather(e + 8), Load8<kType>(values + (e + 8) * kSize), odd);
  }
  float sum = Sum8(_mm256_add_ps(even, odd));
  alignas(32) float rest[8];
  for (; e < n; e += 8) {
    _mm256_store_ps(rest, Load8<kType>(values + e * kSize));
    for (size_t i = e; i < n && i < e + 8; ++i) {
      uint16_t column;
      __builtin_memcpy(&column, columns + 2 * i, sizeof column);
      sum += rest[i - e] * x[column];
    }
  }
  return sum;
}
template <ValueType kType>
static inline void IndexDots(const IndexRow (&rows)[4], const float* x, float* sums) {
  for (size_t r = 0; r < 4; ++r) sums[r] = IndexDot<kType>(rows[r].columns, rows[r].values, rows[r].n, x);
}

template <ValueType kType>
static inline void ConvertValues(const uint8_t* values, size_t n, float* out) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : kType == ValueType::kInt8 ? 1 : 2;
  for (size_t e = 0; e < n; e += 8) _mm256_storeu_ps(out + e, Load8<kType>(values + e * kSize));
}

// ---- bytes ----

static inline Bytes LoadBytes(const int8_t* values) {
  return {{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)),
           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32))}};
}
static inline void StoreBytes(int8_t* out, Bytes bytes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes.v[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), bytes.v[1]);
}
static inline __m128i ExpandEight(uint8_t mask, const int8_t*& values) {
  const __m128i source = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
  const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffle.rows[mask]));
  values += __builtin_popcount(mask);
  return _mm_shuffle_epi8(source, order);
}
static inline Bytes ExpandBytes(const uint8_t* mask, const int8_t* values) {
  __m128i parts[4];
  for (size_t i = 0; i < 4; ++i) {
    const __m128i low = ExpandEight(mask[2 * i], values);
    const __m128i high = ExpandEight(mask[2 * i + 1], values);
    parts[i] = _mm_unpacklo_epi64(low, high);
  }
  return {{_mm256_set_m128i(parts[1], parts[0]), _mm256_set_m128i(parts[3], parts[2])}};
}

// The product of bytes wants one unsigned factor: |x|, with the sign of x moved to w. Pairs of products fit int16:
// 2 * 127 * 127 < 2^15.
static inline __m256i Dot(__m256i acc, __m256i magnitude, __m256i x, __m256i w) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(w, x));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

struct XBytes {
  __m256i x[2];
  __m256i magnitude[2];
};
static inline XBytes LoadX(const int8_t* x) {
  const Bytes bytes = LoadBytes(x);
  return {{bytes.v[0], bytes.v[1]}, {_mm256_abs_epi8(bytes.v[0]), _mm256_abs_epi8(bytes.v[1])}};
}
// Lanes are fours of columns, and the two scales of a block take turns.
using Scales = __m256;
static inline Scales LoadScales(const float* pair) {
  double both;
  __builtin_memcpy(&both, pair, sizeof both);
  return _mm256_castpd_ps(_mm256_set1_pd(both));
}
static inline void DotAdd(Acc& acc, Bytes w, const XBytes& x, Scales scales) {
  __m256i dot = Dot(_mm256_setzero_si256(), x.magnitude[0], x.x[0], w.v[0]);
  dot = Dot(dot, x.magnitude[1], x.x[1], w.v[1]);
  acc.v[0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scales, acc.v[0]);
}

static inline void DecodeNibbles(const uint8_t* codes, const int8_t* codebook, int8_t* low, int8_t* high) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i upper[2];
  for (size_t i = 0; i < 2; ++i) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * i));
    const __m256i lower = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble));
    upper[i] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + 32 * i), lower);
  }
  // `high` may begin inside the sixty-four bytes that go to `low`: it is written last.
  for (size_t i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + 32 * i), upper[i]);
}

template <size_t>
struct Quads {
  using Ints = __m256i;
  using Floats = __m256;
  using W = __m256i;
  struct X {
    __m256i x;
    __m256i magnitude;
  };
  static Floats ToFloats(Ints v) { return _mm256_cvtepi32_ps(v); }
  static W Splat(const int8_t* w) {
    int32_t quad;
    __builtin_memcpy(&quad, w, sizeof quad);
    return _mm256_set1_epi32(quad);
  }
  static X Load(const int8_t* x) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return {bytes, _mm256_abs_epi8(bytes)};
  }
  static Ints Dot(Ints acc, const X& x, W w) { return ::owl::OWL_TARGET::Dot(acc, x.magnitude, x.x, w); }
};

static inline void RoundBlock(const float* x, size_t n, int8_t* out, float* scales) {
  alignas(32) float block[64] = {};
  __builtin_memcpy(block, x, n * sizeof(float));
  __m256 largest = _mm256_setzero_ps();
  const __m256 infinite = _mm256_set1_ps(__builtin_inff()), sign = _mm256_set1_ps(-0.0F);
  for (size_t i = 0; i < 64; i += 8) {
    const __m256 part = _mm256_load_ps(block + i);
    largest = _mm256_max_ps(_mm256_andnot_ps(sign, part), largest);  // which is kept where `part` is not a number
    largest = _mm256_blendv_ps(largest, infinite, _mm256_cmp_ps(part, part, _CMP_UNORD_Q));
  }
  largest = _mm256_max_ps(largest, _mm256_shuffle_ps(largest, largest, _MM_SHUFFLE(1, 0, 3, 2)));
  largest = _mm256_max_ps(largest, _mm256_shuffle_ps(largest, largest, _MM_SHUFFLE(2, 3, 0, 1)));
  alignas(32) float tops[8];
  _mm256_store_ps(tops, largest);
  const RoundingScale even = ScaleOf(tops[0]), odd = ScaleOf(tops[4]);
  const __m256 inverse = _mm256_set_m128(_mm_set1_ps(odd.inverse), _mm_set1_ps(even.inverse));
  for (size_t i = 0; i < 64; i += 8) {
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(block + i), inverse));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), _mm_packs_epi16(words, words));
  }
  scales[0] = even.scale;
  scales[1] = odd.scale;
}

}  // namespace
}  // namespace OWL_TARGET
}  // namespace owl
