// Attention, written once; included by every target file behind its lanes.
//
// A tile is up to kTileRows queries that read the same keys: all heads of one key and value head, at successive tokens.
// Its scores are made for kKeys positions at a time, with the largest score so far subtracted (the "online" softmax of
// Milakov and Gimelshein, arXiv 1805.02867, as FlashAttention tiles it): no matrix of scores is ever whole in memory,
// and the keys and values of a head are read once for all its queries.
//
// SPDX-License-Identifier: Apache-2.0
#include "vectors-inl.h"

namespace owl {
namespace OWL_TARGET {
namespace {

constexpr size_t kKeys = kAttentionKeys;
constexpr size_t kVecsInRow = kLanes == 8 ? 2 : 4;  // sums of four rows that registers hold: AVX2 has half as many
// From so many queries on, keys are transposed once for all of them; fewer take the dot product with each key.
constexpr size_t kTransposeFrom = 7;
constexpr size_t kAhead = 32;  // keys

// c[r] (+)= a[r] b, for kRows rows of a (n_k) and kVecs vectors of columns of b (n_k, ...).
template <bool kAdds, size_t kRows, size_t kVecs>
OWL_INLINE void MulColumns(const float* a, size_t a_stride, const float* b, size_t b_stride, size_t n_k, float* c,
                           size_t c_stride) {
  Vec sums[kRows][kVecs] = {};
  for (size_t k = 0; k < n_k; ++k) {
    Vec part[kVecs];
    for (size_t v = 0; v < kVecs; ++v) part[v] = LoadVec(b + k * b_stride + v * kLanes);
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t v = 0; v < kVecs; ++v) sums[r][v] += a[r * a_stride + k] * part[v];
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t v = 0; v < kVecs; ++v) {
      float* out = c + r * c_stride + v * kLanes;
      StoreVec(out, kAdds ? LoadVec(out) + sums[r][v] : sums[r][v]);
    }
  }
}

template <bool kAdds, size_t kRows>
static void MulRows(const float* a, size_t a_stride, const float* b, size_t b_stride, size_t n_k, float* c,
                    size_t c_stride, size_t n) {
  size_t j = 0;
  for (; j + kVecsInRow * kLanes <= n; j += kVecsInRow * kLanes) {
    MulColumns<kAdds, kRows, kVecsInRow>(a, a_stride, b + j, b_stride, n_k, c + j, c_stride);
  }
  for (; j + kLanes <= n; j += kLanes) {
    MulColumns<kAdds, kRows, 1>(a, a_stride, b + j, b_stride, n_k, c + j, c_stride);
  }
  for (; j < n; ++j) {
    for (size_t r = 0; r < kRows; ++r) {
      float sum = kAdds ? c[r * c_stride + j] : 0;
      for (size_t k = 0; k < n_k; ++k) sum += a[r * a_stride + k] * b[k * b_stride + j];
      c[r * c_stride + j] = sum;
    }
  }
}

// c (n_rows, n) (+)= a (n_rows, n_k) b (n_k, n).
template <bool kAdds>
static void Mul(const float* a, size_t a_stride, size_t n_rows, const float* b, size_t b_stride, size_t n_k, float* c,
                size_t c_stride, size_t n) {
  for (; n_rows >= 4; n_rows -= 4, a += 4 * a_stride, c += 4 * c_stride) {
    MulRows<kAdds, 4>(a, a_stride, b, b_stride, n_k, c, c_stride, n);
  }
  if (n_rows == 3) return MulRows<kAdds, 3>(a, a_stride, b, b_stride, n_k, c, c_stride, n);
  if (n_rows == 2) return MulRows<kAdds, 2>(a, a_stride, b, b_stride, n_k, c, c_stride, n);
  if (n_rows == 1) return MulRows<kAdds, 1>(a, a_stride, b, b_stride, n_k, c, c_stride, n);
}

// Scores of a few queries, eight keys at a time: the last key is repeated, and written behind n_keys. Asks meanwhile
// for keys a little ahead, of which there are n_left from the first on, and for the values: left to itself the
// processor waits for both (Emerald Rapids, 8 rows of 256 positions: 6.9 instead of 5.3 ms for 95 MB).
static void DotKeys(const float* queries, size_t n_rows, const float* keys, const float* values, size_t n_keys,
                    size_t n_left, size_t head_dim, float* scores) {
  for (size_t first = 0; first < n_keys; first += 8) {
    const size_t n = n_keys - first < 8 ? n_keys - first : 8;
    for (size_t d = 0; d < n * head_dim; d += 16) __builtin_prefetch(values + first * head_dim + d, 0, 2);
    if (first + kAhead + 8 <= n_left) {
      for (size_t d = 0; d < 8 * head_dim; d += 16) __builtin_prefetch(keys + (first + kAhead) * head_dim + d, 0, 2);
    }
    const float* at[8];
    for (size_t i = 0; i < 8; ++i) at[i] = keys + (first + (i < n ? i : n - 1)) * head_dim;
    for (size_t r = 0; r < n_rows; ++r) {
      const float* query = queries + r * head_dim;
      Vec sums[8] = {};
      size_t d = 0;
      for (; d + kLanes <= head_dim; d += kLanes) {
        const Vec part = LoadVec(query + d);
        for (size_t i = 0; i < 8; ++i) sums[i] += part * LoadVec(at[i] + d);
      }
      Quad low = SumsOfFour(sums[0], sums[1], sums[2], sums[3]);
      Quad high = SumsOfFour(sums[4], sums[5], sums[6], sums[7]);
      for (; d < head_dim; ++d) {
        low += query[d] * Quad{at[0][d], at[1][d], at[2][d], at[3][d]};
        high += query[d] * Quad{at[4][d], at[5][d], at[6][d], at[7][d]};
      }
      *reinterpret_cast<QuadMem*>(scores + r * kKeys + first) = low;
      *reinterpret_cast<QuadMem*>(scores + r * kKeys + first + 4) = high;
    }
  }
}

// out (head_dim, kKeys): four keys by four values at a time; the last key is repeated.
static void TransposeKeys(const float* keys, size_t n_keys, size_t head_dim, float* out) {
  for (size_t first = 0; first < n_keys; first += 4) {
    const float* at[4];
    for (size_t i = 0; i < 4; ++i) at[i] = keys + (first + i < n_keys ? first + i : n_keys - 1) * head_dim;
    for (size_t d = 0; d < head_dim; d += 4) {
      Quad row[4];
      for (size_t i = 0; i < 4; ++i) row[i] = *reinterpret_cast<const QuadMem*>(at[i] + d);
      const Quad a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
      const Quad b = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
      const Quad c = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
      const Quad e = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
      const Quad columns[4] = {__builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
                               __builtin_shufflevector(b, e, 0, 1, 4, 5), __builtin_shufflevector(b, e, 2, 3, 6, 7)};
      for (size_t i = 0; i < 4; ++i) *reinterpret_cast<QuadMem*>(out + (d + i) * kKeys + first) = columns[i];
    }
  }
}

// What a row of a tile has seen of its positions so far.
struct RowState {
  float largest;
  float sum;
};

// Turns scores of positions [0, padded), of which [low, high) count, into weights, and brings what the row summed up
// before to the same largest score.
static void Soften(const AttentionShape& shape, float* scores, size_t low, size_t high, size_t padded, RowState* state,
                   float* sums) {
  constexpr float kNone = -__builtin_inff();
  if (shape.softcap != 0) {
    for (size_t j = 0; j < padded; j += kLanes) {
      StoreVec(scores + j, shape.softcap * Tanh(LoadVec(scores + j) / shape.softcap));
    }
  }
  for (size_t j = 0; j < low; ++j) scores[j] = kNone;
  for (size_t j = high; j < padded; ++j) scores[j] = kNone;
  Vec most = LoadVec(scores);
  for (size_t j = kLanes; j < padded; j += kLanes) most = Larger(LoadVec(scores + j), most);
  const float largest = Largest(most), before = state->largest;
  if (largest > before) {
    const float kept = Exp(Vec{} + (before - largest))[0];
    for (size_t d = 0; d < shape.head_dim; ++d) sums[d] *= kept;
    state->sum *= kept;
    state->largest = largest;
  }
  Vec total = {};
  for (size_t j = 0; j < padded; j += kLanes) {
    const Vec weights = Exp(LoadVec(scores + j) - state->largest);
    total += weights;
    StoreVec(scores + j, weights);
  }
  state->sum += Sum(total);
}

static size_t AttentionScratchFloats(const AttentionShape& shape) {
  return kAttentionRows * (kKeys + shape.head_dim) + shape.head_dim * kKeys;
}

// One tile over one share of its positions: see AttentionTask.
static void Attend(const AttentionTask& task, size_t item, float* scratch) {
  const AttentionShape& shape = *task.shape;
  const AttentionTensors& t = *task.tensors;
  const size_t D = shape.head_dim, group = shape.n_heads / shape.n_kv_heads;
  const size_t unit = item / task.n_shares, share = item % task.n_shares;
  const size_t head = unit / task.n_tiles, first_row = unit % task.n_tiles * kAttentionRows;  // head: of the batch too
  const size_t left = t.n_tokens * group - first_row, n_rows = left < kAttentionRows ? left : kAttentionRows;
  const size_t past = t.past[head / shape.n_kv_heads];
  const float* queries = task.queries + (head * t.n_tokens * group + first_row) * D;
  const float* keys = t.present_key + head * t.n_present * D;
  const float* values = t.present_value + head * t.n_present * D;

  // Row r sees positions [begins(r), ends(r)).
  const auto ends = [&](size_t r) { return past + (first_row + r) / group + 1; };
  const auto begins = [&](size_t r) {
    return shape.window != 0 && ends(r) > shape.window ? ends(r) - shape.window : 0;
  };
  const size_t begin = begins(0), end = ends(n_rows - 1);
  const size_t step = ((end - begin + task.n_shares - 1) / task.n_shares + kKeys - 1) / kKeys * kKeys;
  const size_t from = begin + share * step < end ? begin + share * step : end;
  const size_t until = from + step < end ? from + step : end;

  float* scores = scratch;                        // (kAttentionRows, kKeys)
  float* sums = scores + kAttentionRows * kKeys;  // (kAttentionRows, D)
  float* panel = sums + kAttentionRows * D;       // (D, kKeys)
  RowState states[kAttentionRows];
  for (size_t r = 0; r < n_rows; ++r) states[r] = {-__builtin_inff(), 0};
  __builtin_memset(sums, 0, n_rows * D * sizeof(float));
  for (size_t first = from; first < until; first += kKeys) {
    const size_t n_keys = until - first < kKeys ? until - first : kKeys;
    const size_t padded = (n_keys + kLanes - 1) / kLanes * kLanes;
    const float* block = keys + first * D;
    if (n_rows >= kTransposeFrom) {
      TransposeKeys(block, n_keys, D, panel);
      Mul<false>(queries, D, n_rows, panel, kKeys, D, scores, kKeys, padded);
    } else {
      DotKeys(queries, n_rows, block, values + first * D, n_keys, until - first, D, scores);
    }
    for (size_t r = 0; r < n_rows; ++r) {
      const size_t low = begins(r) > first ? begins(r) - first : 0;
      const size_t high = ends(r) < first + n_keys ? (ends(r) > first ? ends(r) - first : 0) : n_keys;
      if (low < high) {
        Soften(shape, scores + r * kKeys, low, high, padded, &states[r], sums + r * D);
      } else {
        __builtin_memset(scores + r * kKeys, 0, padded * sizeof(float));
      }
    }
    Mul<true>(scores, kKeys, n_rows, values + first * D, D, n_keys, sums, D, D);
  }

  for (size_t r = 0; r < n_rows; ++r) {
    const float* row = sums + r * D;
    if (task.n_shares == 1) {
      float* out = AttentionOutput(task, head, first_row + r);
      for (size_t d = 0; d < D; ++d) out[d] = row[d] / states[r].sum;
    } else {
      float* part = task.parts + (item * kAttentionRows + r) * (D + 2);
      part[0] = states[r].largest;
      part[1] = states[r].sum;
      __builtin_memcpy(part + 2, row, D * sizeof(float));
    }
  }
}

// One head of one token: normalised where it has a norm, turned where there are tables, times `scale`.
OWL_INLINE void PrepareHead(const AttentionShape& shape, const float* in, const float* norm, const float* cos,
                            const float* sin, float scale, float* out) {
  const size_t D = shape.head_dim, half = shape.n_rotated / 2;
  if (norm != nullptr) {
    float squares = 0;
    for (size_t d = 0; d < D; ++d) squares += in[d] * in[d];
    const float factor = scale / __builtin_sqrtf(squares / static_cast<float>(D) + shape.norm_epsilon);
    for (size_t d = 0; d < D; ++d) out[d] = in[d] * factor * norm[d];
  } else {
    for (size_t d = 0; d < D; ++d) out[d] = in[d] * scale;
  }
  for (size_t d = 0; d < half; ++d) {
    const float x = out[d], y = out[d + half];
    out[d] = x * cos[d] - y * sin[d];
    out[d + half] = y * cos[d] + x * sin[d];
  }
}

// Token `token`, counted through the batch: its queries into the task's, its keys and values into the cache.
static void PrepareToken(const AttentionTask& task, size_t token) {
  const AttentionShape& shape = *task.shape;
  const AttentionTensors& t = *task.tensors;
  const size_t D = shape.head_dim, group = shape.n_heads / shape.n_kv_heads, half = shape.n_rotated / 2;
  const size_t b = token / t.n_tokens, at = token % t.n_tokens, position = t.past[b] + at;
  const float* in = t.qkv + token * (shape.n_heads + 2 * shape.n_kv_heads) * D;
  const float *cos = t.cos + position * half, *sin = t.sin + position * half;
  for (size_t h = 0; h < shape.n_heads; ++h, in += D) {
    const size_t head = b * shape.n_kv_heads + h / group, row = at * group + h % group;
    PrepareHead(shape, in, t.query_norm, cos, sin, shape.scale, task.queries + (head * t.n_tokens * group + row) * D);
  }
  for (size_t h = 0; h < shape.n_kv_heads; ++h, in += D) {
    const size_t head = b * shape.n_kv_heads + h;
    PrepareHead(shape, in, t.key_norm, cos, sin, 1, t.present_key + (head * t.n_present + position) * D);
  }
  for (size_t h = 0; h < shape.n_kv_heads; ++h, in += D) {
    const size_t head = b * shape.n_kv_heads + h;
    __builtin_memcpy(t.present_value + (head * t.n_present + position) * D, in, D * sizeof(float));
  }
}

}  // namespace
}  // namespace OWL_TARGET
}  // namespace owl
