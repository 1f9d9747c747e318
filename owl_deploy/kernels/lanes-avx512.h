// AVX-512: sixteen floats, sixty-four bytes. OWL_VBMI2 adds VBMI2 (byte expansion) and VNNI (byte products); a target
// without it takes lanes-masks.h as well.
//
// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "kernels.h"

namespace owl {
namespace OWL_TARGET {
namespace {

constexpr size_t kLanes = 16;
constexpr size_t kRowsSingle = 4;  // x, its signs and scales are loaded once for four rows: loads bound the int8 loop
constexpr size_t kRowsBatch = 2;
constexpr size_t kMaxBatch = 8;
constexpr size_t kTileFrom = 9;
constexpr size_t kTileFromFull = 25;
constexpr size_t kByteTileFrom = 5;
constexpr size_t kByteBatch = 4;
constexpr size_t kByteLanes = 8;
constexpr size_t kPairedTile = OWL_VBMI2 ? 8 : 0;
constexpr size_t kByteRows = 8;  // as many sums as hide how long a product takes

struct Acc {
  __m512 v;
};
struct Block {
  __m512 v[4];
};
struct Bytes {
  __m512i v;
};

// Keeps a load out of the instruction that uses it: expansion from memory is microcode on some processors.
static inline __m512 Loaded(__m512 v) {
  asm("" : "+v"(v));
  return v;
}
static inline __m512i Loaded(__m512i v) {
  asm("" : "+v"(v));
  return v;
}
// A zero the compiler does not see through. Expansion with zeroing waits for the register it writes to (Zen 4: 7.0
// instead of 4.4 ns per 64 float32 columns); merging into a freshly cleared one does not.
static inline __m512i ClearedInt() {
  __m512i zero = _mm512_setzero_si512();
  asm("" : "+v"(zero));
  return zero;
}
static inline __m512 Cleared() { return _mm512_castsi512_ps(ClearedInt()); }

static inline Acc Zero() { return {_mm512_setzero_ps()}; }
template <size_t kRows>
static inline void Sums(const Acc (&acc)[kRows], float* out) {
  if constexpr (kRows == 4) {  // four sums in the time of two: rows of 576 columns have only nine blocks
    const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(acc[0].v, acc[1].v), _mm512_unpackhi_ps(acc[0].v, acc[1].v));
    const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(acc[2].v, acc[3].v), _mm512_unpackhi_ps(acc[2].v, acc[3].v));
    const __m512d first = _mm512_unpacklo_pd(_mm512_castps_pd(low), _mm512_castps_pd(high));
    const __m512d second = _mm512_unpackhi_pd(_mm512_castps_pd(low), _mm512_castps_pd(high));
    const __m512 sums = _mm512_add_ps(_mm512_castpd_ps(first), _mm512_castpd_ps(second));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  } else {
    for (size_t r = 0; r < kRows; ++r) out[r] = _mm512_reduce_add_ps(acc[r].v);
  }
}

// Sixteen values as floats.
template <ValueType kType>
static inline __m512 Load16(const uint8_t* values) {
  if constexpr (kType == ValueType::kFloat32) {
    return Loaded(_mm512_loadu_ps(values));
  } else if constexpr (kType == ValueType::kFloat16) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  } else if constexpr (kType == ValueType::kBFloat16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  } else {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
}

template <ValueType kType>
static inline Block LoadBlock(const uint8_t* values) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : 2;
  return {{Load16<kType>(values), Load16<kType>(values + 16 * kSize), Load16<kType>(values + 32 * kSize),
           Load16<kType>(values + 48 * kSize)}};
}

// Sixteen bits of a mask, straight from memory.
static inline __mmask16 Mask16(const uint8_t* mask) {
  typedef uint16_t Mask __attribute__((may_alias, aligned(1)));
  __mmask16 bits;
  asm("kmovw %1, %0" : "=k"(bits) : "m"(*reinterpret_cast<const Mask*>(mask)));
  return bits;
}

#if OWL_VBMI2
static inline __mmask32 Mask32(const uint8_t* mask) {
  typedef uint32_t Mask __attribute__((may_alias, aligned(1)));
  __mmask32 bits;
  asm("kmovd %1, %0" : "=k"(bits) : "m"(*reinterpret_cast<const Mask*>(mask)));
  return bits;
}
// By way of a general register it takes twice as long (Zen 4: 0.27 against 0.49 ns).
static inline __mmask64 Mask64(const uint8_t* mask) {
  typedef uint64_t Mask __attribute__((may_alias, aligned(1)));
  __mmask64 bits;
  asm("kmovq %1, %0" : "=k"(bits) : "m"(*reinterpret_cast<const Mask*>(mask)));
  return bits;
}
#endif

template <ValueType kType>
static inline Block ExpandBlock(const uint8_t* mask, const uint8_t* values) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : 2;
  uint64_t bits;
  __builtin_memcpy(&bits, mask, sizeof bits);
#if OWL_VBMI2
  if constexpr (kType == ValueType::kFloat16) {  // two expansions instead of four: 3.5 instead of 4.1 ns on Zen 4
    const uint8_t* half = values + kSize * static_cast<size_t>(__builtin_popcountll(bits << 32));
    const __m512i low = _mm512_mask_expand_epi16(ClearedInt(), Mask32(mask), Loaded(_mm512_loadu_si512(values)));
    const __m512i high = _mm512_mask_expand_epi16(ClearedInt(), Mask32(mask + 4), Loaded(_mm512_loadu_si512(half)));
    return {{_mm512_cvtph_ps(_mm512_castsi512_si256(low)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(low, 1)),
             _mm512_cvtph_ps(_mm512_castsi512_si256(high)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(high, 1))}};
  }
#endif
  const uint8_t* second = values + kSize * static_cast<size_t>(__builtin_popcountll(bits << 48));
  const uint8_t* third = values + kSize * static_cast<size_t>(__builtin_popcountll(bits << 32));
  const uint8_t* fourth = values + kSize * static_cast<size_t>(__builtin_popcountll(bits << 16));
  return {{_mm512_mask_expand_ps(Cleared(), Mask16(mask), Load16<kType>(values)),
           _mm512_mask_expand_ps(Cleared(), Mask16(mask + 2), Load16<kType>(second)),
           _mm512_mask_expand_ps(Cleared(), Mask16(mask + 4), Load16<kType>(third)),
           _mm512_mask_expand_ps(Cleared(), Mask16(mask + 6), Load16<kType>(fourth))}};
}

static inline void MulAdd(Acc& acc, const Block& block, const float* x) {
  for (size_t i = 0; i < 4; ++i) acc.v = _mm512_fmadd_ps(block.v[i], _mm512_loadu_ps(x + 16 * i), acc.v);
}

// A block of X in registers, for several rows of W: loads bound the expansion.
using XBlock = Block;
static inline XBlock LoadXBlock(const float* x) {
  return LoadBlock<ValueType::kFloat32>(reinterpret_cast<const uint8_t*>(x));
}
static inline void MulAdd(Acc& acc, const Block& block, const XBlock& x) {
  for (size_t i = 0; i < 4; ++i) acc.v = _mm512_fmadd_ps(block.v[i], x.v[i], acc.v);
}

#if OWL_VBMI2
static inline __m512i AllColumns() {
  alignas(64) static constexpr uint8_t kColumns[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                       16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                                       32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                                       48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  return _mm512_load_si512(kColumns);
}

// Few values in a block: the columns of X that they meet are looked up, sixteen at a time, instead of spreading the
// values (Zen 4, nanoseconds per 64 columns: 2.1 at 80 % and 1.9 at 90 %, against 3.4). From 75 % down a second round
// is needed too often.
constexpr size_t kLookupPercent = 22;
template <ValueType kType>
static inline void LookupAdd(Acc& acc, const uint8_t* mask, const uint8_t* values, const XBlock& x) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : 2;
  uint64_t bits;
  __builtin_memcpy(&bits, mask, sizeof bits);
  const uint32_t n = static_cast<uint32_t>(__builtin_popcountll(bits));
  const auto add = [&](__m128i columns, const uint8_t* at, uint32_t left) {
    const __m512i column = _mm512_cvtepu8_epi32(columns);
    const __m512 low = _mm512_permutex2var_ps(x.v[0], column, x.v[1]);
    const __m512 high = _mm512_permutex2var_ps(x.v[2], column, x.v[3]);
    const __mmask16 is_high = _mm512_test_epi32_mask(column, _mm512_set1_epi32(32));
    const __mmask16 valid = static_cast<__mmask16>(_bzhi_u32(0xFFFF, left));
    acc.v = _mm512_mask3_fmadd_ps(_mm512_mask_mov_ps(low, is_high, high), Load16<kType>(at), acc.v, valid);
  };
  const __m512i columns = _mm512_mask_compress_epi8(ClearedInt(), Mask64(mask), AllColumns());
  add(_mm512_castsi512_si128(columns), values, n);
  if (n <= 16) return;
  add(_mm512_extracti32x4_epi32(columns, 1), values + 16 * kSize, n - 16);
  if (n <= 32) return;
  add(_mm512_extracti32x4_epi32(columns, 2), values + 32 * kSize, n - 32);
  if (n <= 48) return;
  add(_mm512_extracti32x4_epi32(columns, 3), values + 48 * kSize, n - 48);
}

// Set bits of `n` masks.
static inline size_t CountMasks(const uint8_t* masks, size_t n) {
  __m512i counts = _mm512_setzero_si512();
  for (size_t i = 0; i < n; i += 8) {
    const __mmask8 mask = static_cast<__mmask8>(n - i < 8 ? (1U << (n - i)) - 1 : 0xFF);
    counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(_mm512_maskz_loadu_epi64(mask, masks + 8 * i)));
  }
  return static_cast<size_t>(_mm512_reduce_add_epi64(counts));
}

static inline size_t MaskColumns(uint64_t mask, uint8_t* columns) {
  const size_t n = static_cast<size_t>(__builtin_popcountll(mask));
  _mm512_storeu_si512(columns, _mm512_mask_compress_epi8(ClearedInt(), mask, AllColumns()));
  return n;
}
#endif

template <ValueType kType>
static inline void IndexDots(const IndexRow (&rows)[4], const float* x, float* sums) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : kType == ValueType::kInt8 ? 1 : 2;
  __m512 acc[4];
  size_t shared = rows[0].n;
  for (size_t r = 0; r < 4; ++r) {
    acc[r] = _mm512_setzero_ps();
    shared = rows[r].n < shared ? rows[r].n : shared;
  }
  const auto add = [&](size_t r, size_t e) {
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r].columns + 2 * e));
    const __m512 found = _mm512_i32gather_ps(_mm512_cvtepu16_epi32(at), x, 4);
    acc[r] = _mm512_fmadd_ps(found, Load16<kType>(rows[r].values + e * kSize), acc[r]);
  };
  size_t e = 0;
  for (; e + 16 <= shared; e += 16) {
    for (size_t r = 0; r < 4; ++r) add(r, e);
  }
  for (size_t r = 0; r < 4; ++r) {
    size_t rest = e;
    for (; rest + 16 <= rows[r].n; rest += 16) add(r, rest);
    if (rest == rows[r].n) continue;
    // The last columns: what lies behind the list is neither a column nor a value.
    const __mmask16 mask = static_cast<__mmask16>((1U << (rows[r].n - rest)) - 1);
    const __m256i at = _mm256_maskz_loadu_epi16(mask, rows[r].columns + 2 * rest);
    const __m512 found = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, _mm512_cvtepu16_epi32(at), x, 4);
    const __m512 values = _mm512_maskz_mov_ps(mask, Load16<kType>(rows[r].values + rest * kSize));
    acc[r] = _mm512_fmadd_ps(found, values, acc[r]);
  }
  const Acc all[4] = {{acc[0]}, {acc[1]}, {acc[2]}, {acc[3]}};
  Sums(all, sums);
}

template <ValueType kType>
static inline void ConvertValues(const uint8_t* values, size_t n, float* out) {
  constexpr size_t kSize = kType == ValueType::kFloat32 ? 4 : kType == ValueType::kInt8 ? 1 : 2;
  for (size_t e = 0; e < n; e += 16) _mm512_storeu_ps(out + e, Load16<kType>(values + e * kSize));
}

static inline size_t BlockColumns(const uint8_t* list, size_t n_left, uint32_t first, uint8_t* columns) {
  const __m512i begin = _mm512_set1_epi16(static_cast<int16_t>(first)), size = _mm512_set1_epi16(kBlock);
  size_t n = 0;
  for (size_t e = 0; e < kBlock; e += 32) {  // a block has no more than sixty-four
    const size_t left = n_left > e ? n_left - e : 0;
    const __mmask32 valid = left < 32 ? (1U << left) - 1 : ~0U;
    const __m512i at = _mm512_sub_epi16(_mm512_maskz_loadu_epi16(valid, list + 2 * e), begin);
    const __mmask32 inside = _mm512_mask_cmplt_epu16_mask(valid, at, size);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns + e), _mm512_cvtepi16_epi8(at));
    n += static_cast<size_t>(__builtin_popcount(inside));
    if (inside != ~0U) break;
  }
  return n;
}

// ---- bytes ----

static inline Bytes LoadBytes(const int8_t* values) { return {_mm512_loadu_si512(values)}; }

#if OWL_VBMI2
static inline Bytes ExpandBytes(const uint8_t* mask, const int8_t* values) {
  return {_mm512_mask_expand_epi8(ClearedInt(), Mask64(mask), Loaded(_mm512_loadu_si512(values)))};
}
#else
static inline uint64_t ExpandEight(uint8_t mask, const int8_t* values) {
  const __m128i source = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
  const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffle.rows[mask]));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_shuffle_epi8(source, order)));
}
static inline Bytes ExpandBytes(const uint8_t* mask, const int8_t* values) {
  alignas(64) uint64_t out[8];
  for (size_t i = 0; i < 8; ++i) {
    out[i] = ExpandEight(mask[i], values);
    values += __builtin_popcount(mask[i]);
  }
  return {_mm512_load_si512(out)};
}
#endif

// Lanes are fours of columns, and the two scales of a block take turns.
using Scales = __m512;
static inline Scales LoadScales(const float* pair) {
  double both;
  __builtin_memcpy(&both, pair, sizeof both);
  return _mm512_castpd_ps(_mm512_set1_pd(both));
}

// Both scales of `n` blocks, each times its block's factor.
static inline void ScalePairs(const float* pairs, const uint8_t* factors, size_t n, float* out) {
  for (size_t j = 0; j < n; j += 8) {
    const __mmask8 valid = static_cast<__mmask8>(n - j < 8 ? (1U << (n - j)) - 1 : 0xFF);
    const __m512i wide = _mm512_cvtepu8_epi64(_mm_maskz_loadu_epi8(valid, factors + j));
    const __m512 twice = _mm512_cvtepi32_ps(_mm512_shuffle_epi32(wide, _MM_PERM_CCAA));
    const __m512d both = _mm512_maskz_loadu_pd(valid, pairs + 2 * j);
    const __m512 product = _mm512_mul_ps(_mm512_castpd_ps(both), twice);
    _mm512_mask_storeu_pd(out + 2 * j, valid, _mm512_castps_pd(product));
  }
}

// The product of bytes wants one unsigned factor.
#if OWL_VBMI2
// w + 128, made up for by beginning at -128 x.
struct XBytes {
  __m512i x;
  __m512i start;
};
static inline XBytes LoadX(const int8_t* x) {
  const __m512i bytes = _mm512_loadu_si512(x), offset = _mm512_set1_epi8(-128);
  const __m512i zero = _mm512_setzero_si512();
  return {bytes, _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, offset, bytes))};
}
static inline void DotAdd(Acc& acc, Bytes w, const XBytes& x, Scales scales) {
  const __m512i dot = _mm512_dpbusd_epi32(x.start, _mm512_xor_si512(w.v, _mm512_set1_epi8(-128)), x.x);
  acc.v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scales, acc.v);
}
#else
// |x|, with the sign of x moved to w. Pairs of products fit int16: 2 * 127 * 127 < 2^15.
struct XBytes {
  __m512i magnitude;
  __mmask64 is_negative;
};
static inline XBytes LoadX(const int8_t* x) {
  const __m512i bytes = _mm512_loadu_si512(x);
  return {_mm512_abs_epi8(bytes), _mm512_movepi8_mask(bytes)};
}
static inline __m512i DotSigned(__m512i acc, const XBytes& x, __m512i w) {
  const __m512i like_x = _mm512_mask_sub_epi8(w, x.is_negative, _mm512_setzero_si512(), w);
  const __m512i pairs = _mm512_maddubs_epi16(x.magnitude, like_x);
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
static inline void DotAdd(Acc& acc, Bytes w, const XBytes& x, Scales scales) {
  acc.v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(DotSigned(_mm512_setzero_si512(), x, w.v)), scales, acc.v);
}
#endif

// Sixty-four bytes hold the codes of `low` (their lower halves) and of `high`; more is written than a short run has.
static inline void DecodeNibbles(const uint8_t* codes, const int8_t* codebook, int8_t* low, int8_t* high) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
  const __m512i bytes = _mm512_loadu_si512(codes), nibble = _mm512_set1_epi8(15);
  _mm512_storeu_si512(low, _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, nibble)));
  _mm512_storeu_si512(high, _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble)));
}

// Tiles: lanes are rows of X, four columns in each.
template <size_t kN>
struct Quads;
#if OWL_VBMI2
constexpr int32_t kWOffset = 128;  // in W, so that what makes up for it is known from X alone
static inline void StoreBytes(int8_t* out, Bytes bytes) {
  _mm512_storeu_si512(out, _mm512_xor_si512(bytes.v, _mm512_set1_epi8(-128)));
}
template <>
struct Quads<16> {
  using Ints = __m512i;
  using Floats = __m512;
  using X = __m512i;
  using W = __m512i;
  static Floats ToFloats(Ints v) { return _mm512_cvtepi32_ps(v); }
  static W Splat(const int8_t* w) {
    int32_t quad;
    __builtin_memcpy(&quad, w, sizeof quad);
    return _mm512_set1_epi32(quad);
  }
  static X Load(const int8_t* x) { return _mm512_loadu_si512(x); }
  // Not the intrinsic: gcc 12 then copies every sum twice per round of a loop (8 rows, Zen 4: 0.094 instead of 0.078
  // ms).
  static Ints Dot(Ints acc, X x, W w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }
};
// Eight rows, two fours of columns of each side by side: half as many products as with half a register each (a step of
// eight rows of SmolLM2 on Emerald Rapids takes 0.86 of the time).
template <>
struct Quads<8> : Quads<16> {
  static W Splat(const int8_t* w) {
    int64_t both;
    __builtin_memcpy(&both, w, sizeof both);
    return _mm512_set1_epi64(both);
  }
};
#else
constexpr int32_t kWOffset = 0;
static inline void StoreBytes(int8_t* out, Bytes bytes) { _mm512_storeu_si512(out, bytes.v); }
template <>
struct Quads<16> {
  using Ints = __m512i;
  using Floats = __m512;
  using X = XBytes;
  using W = __m512i;
  static Floats ToFloats(Ints v) { return _mm512_cvtepi32_ps(v); }
  static W Splat(const int8_t* w) {
    int32_t quad;
    __builtin_memcpy(&quad, w, sizeof quad);
    return _mm512_set1_epi32(quad);
  }
  static X Load(const int8_t* x) { return LoadX(x); }
  static Ints Dot(Ints acc, const X& x, W w) { return DotSigned(acc, x, w); }
};
template <>
struct Quads<8> {
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
  static Ints Dot(Ints acc, const X& x, W w) {
    const __m256i pairs = _mm256_maddubs_epi16(x.magnitude, _mm256_sign_epi8(w, x.x));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
#endif

static inline void RoundBlock(const float* x, size_t n, int8_t* out, float* scales) {
  __m512 parts[4];
  __m512 largest = _mm512_setzero_ps();
  for (size_t i = 0; i < 4; ++i) {
    const size_t left = n > 16 * i ? n - 16 * i : 0;
    const __mmask16 mask = static_cast<__mmask16>(left < 16 ? (1U << left) - 1 : 0xFFFF);
    parts[i] = _mm512_maskz_loadu_ps(mask, x + 16 * i);
    // The second operand is kept where one is not a number.
    largest = _mm512_max_ps(_mm512_abs_ps(parts[i]), largest);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(parts[i], parts[i], _CMP_UNORD_Q);
    largest = _mm512_mask_mov_ps(largest, is_nan, _mm512_set1_ps(__builtin_inff()));
  }
  // Fours of lanes 0 and 2 share a scale, and 1 and 3.
  largest = _mm512_max_ps(largest, _mm512_shuffle_f32x4(largest, largest, _MM_SHUFFLE(1, 0, 3, 2)));
  largest = _mm512_max_ps(largest, _mm512_shuffle_ps(largest, largest, _MM_SHUFFLE(1, 0, 3, 2)));
  largest = _mm512_max_ps(largest, _mm512_shuffle_ps(largest, largest, _MM_SHUFFLE(2, 3, 0, 1)));
  alignas(64) float tops[16];
  _mm512_store_ps(tops, largest);
  const RoundingScale even = ScaleOf(tops[0]), odd = ScaleOf(tops[4]);
  const __m512 inverse = _mm512_mask_mov_ps(_mm512_set1_ps(even.inverse), 0xF0F0, _mm512_set1_ps(odd.inverse));
  for (size_t i = 0; i < 4; ++i) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(parts[i], inverse));
    _mm_store_si128(reinterpret_cast<__m128i*>(out + 16 * i), _mm512_cvtsepi32_epi8(rounded));
  }
  scales[0] = even.scale;
  scales[1] = odd.scale;
}

}  // namespace
}  // namespace OWL_TARGET
}  // namespace owl
