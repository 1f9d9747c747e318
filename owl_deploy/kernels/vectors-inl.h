// Vectors of the compiler, as wide as the target's, and what both attention and the gated unit compute with them.
// Included behind the lanes of a target, which give kLanes.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_VECTORS_INL_H_
#define OWL_DEPLOY_VECTORS_INL_H_

namespace owl {
namespace OWL_TARGET {
namespace {

#define OWL_INLINE static inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float VecMem __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));  // in memory, anywhere
typedef uint32_t BitsVec __attribute__((vector_size(4 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));
typedef float QuadMem __attribute__((vector_size(16), aligned(4), may_alias));

OWL_INLINE Vec LoadVec(const float* p) { return *reinterpret_cast<const VecMem*>(p); }
OWL_INLINE void StoreVec(float* p, Vec v) { *reinterpret_cast<VecMem*>(p) = v; }

// e^x to 2 units in the last place; 0 below -87, where float32 would lose digits, and e^88 above 88. NaN stays NaN.
OWL_INLINE Vec Exp(Vec x) {
  const Vec kept = x > 88.0f ? Vec{} + 88.0f : x;
  // Adding 1.5 x 2^23 leaves the nearest whole number in the last bits.
  const Vec shifted = kept * 1.44269504f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  const Vec r = (kept - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts, the first exact times n
  // Taylor up to r^7 / 7!, |r| <= ln 2 / 2: the rest is below 1e-8.
  Vec sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const BitsVec bits = reinterpret_cast<BitsVec>(sum) + (reinterpret_cast<BitsVec>(shifted) << 23);
  return x < -87.0f ? Vec{} : reinterpret_cast<Vec>(bits);
}

OWL_INLINE Vec Tanh(Vec x) { return 1.0f - 2.0f / (Exp(2.0f * x) + 1.0f); }

OWL_INLINE Vec Larger(Vec a, Vec b) { return a > b ? a : b; }

// Adds the quarters (halves, or the whole) of a vector: four floats are left.
OWL_INLINE Quad Fold(Vec v) {
  Quad parts[kLanes / 4];
  __builtin_memcpy(parts, &v, sizeof v);
  for (size_t n = kLanes / 8; n > 0; n /= 2) {
    for (size_t i = 0; i < n; ++i) parts[i] += parts[i + n];
  }
  return parts[0];
}

// The sums of four vectors.
OWL_INLINE Quad SumsOfFour(Vec a, Vec b, Vec c, Vec d) {
  const Quad p = Fold(a), q = Fold(b), r = Fold(c), s = Fold(d);
  const Quad pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const Quad rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

OWL_INLINE float Sum(Vec v) {
  const Quad sums = Fold(v);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

OWL_INLINE float Largest(Vec v) {
  float largest = v[0];
  for (size_t i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

}  // namespace
}  // namespace OWL_TARGET
}  // namespace owl

#endif  // OWL_DEPLOY_VECTORS_INL_H_
