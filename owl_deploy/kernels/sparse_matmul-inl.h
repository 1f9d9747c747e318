// The product with a packed matrix, written once; included by every target file behind its lanes.
//
// Lanes give: kName, kLanes (floats in a Vec), kRowsSingle and kRowsBatch (rows of W taken together), kMaxBatch (rows
// of X against one expanded block), kTileFrom (rows of X from which floats go in tiles) and kTileFromFull (the same
// where more than 40 % is stored), kLookupPercent (stored values, of a hundred, up to which X is looked up for them
// rather than they are spread out), and the types and functions used below. For bytes: kByteBatch (as kMaxBatch),
// kByteTileFrom (as kTileFrom), kByteLanes (rows of X in the smallest tile), kPairedTile (rows of the tile that is
// paired, see Layout; 0 for none), kByteRows (rows of W against a tile of one
// vector) and kWOffset (what is added to the bytes of W that a tile meets). A block is 64 columns throughout.
//
// Everything is static: an inline function of another target must not be merged with one of this.
//
// SPDX-License-Identifier: Apache-2.0
#include "vectors-inl.h"

namespace owl {
namespace OWL_TARGET {
namespace {

typedef float AnyFloat __attribute__((aligned(1), may_alias));  // in a record

constexpr size_t kGroupRows = 64;  // rows of W whose tile of Y stays in cache: 16 KiB
constexpr size_t kListsAhead = 8;  // rows whose columns are listed before the first is multiplied, see MultiplyTiles
// Bytes ahead, into the second cache: at 50 % float32 8 KiB gave 1.4x over none, 4 KiB 1.35x, 2 KiB 1.1x.
constexpr size_t kPrefetch = 8192;
constexpr size_t kMaxPrefetch = 256 * 1024;  // more would push out what was asked for

OWL_INLINE uint64_t LoadU64(const uint8_t* p) {
  uint64_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}
OWL_INLINE uint32_t LoadU32(const uint8_t* p) {
  uint32_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}
OWL_INLINE float LoadF32(const uint8_t* p) {
  float value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}
OWL_INLINE size_t CountBits(const uint8_t* mask) { return static_cast<size_t>(__builtin_popcountll(LoadU64(mask))); }
OWL_INLINE size_t BlocksOf(const PackedMatrix& w) { return (w.n_columns + kBlock - 1) / kBlock; }
OWL_INLINE size_t RecordOffset(const PackedMatrix& w, size_t row) {
  return size_t{LoadU32(w.row_starts + 4 * row)} * 8;
}

OWL_INLINE constexpr size_t SizeOf(ValueType type) {
  return type == ValueType::kFloat32 ? 4 : type == ValueType::kInt8 || type == ValueType::kInt4 ? 1 : 2;
}

// Asks for the bytes that a thread will need a little later, in step with what it multiplies now. Rows lie one after
// the other, so a piece of W is one stream; a group of rows that are read side by side must be ahead as a whole.
struct Stream {
  const uint8_t* next;    // first cache line not asked for
  const uint8_t* target;  // moves by `step` with every block
  const uint8_t* end;
  size_t step;

  OWL_INLINE Stream Of(const PackedMatrix& w, size_t begin, size_t end, size_t n_rows, size_t n_blocks) {
    const uint8_t* first = w.data + RecordOffset(w, begin);
    const uint8_t* last = w.data + RecordOffset(w, end);
    const size_t group = static_cast<size_t>(last - first) / (end - begin) * n_rows;
    const uint8_t* start = first + (group > kMaxPrefetch ? kMaxPrefetch : group > kPrefetch ? group : kPrefetch);
    return {start, start, last, (group + n_blocks - 1) / n_blocks};
  }
  inline __attribute__((always_inline)) void Advance() {
    target += step;
    const uint8_t* limit = target < end ? target : end;
    for (; next < limit; next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// ---- float values, few rows of X ----

enum class Reading { kDense, kSpread, kLookup };

template <ValueType kType, Reading kReading, size_t kRows, size_t kBatch>
OWL_INLINE Stream FloatRows(const Product& p, size_t row, size_t first, Stream stream) {
  const PackedMatrix& w = *p.w;
  constexpr bool kIsDense = kReading == Reading::kDense;
  const size_t n_blocks = BlocksOf(w), n_whole = kIsDense ? w.n_columns / kBlock : n_blocks;
  const uint8_t* masks[kRows];
  const uint8_t* values[kRows];
  Acc sums[kBatch][kRows];
  for (size_t r = 0; r < kRows; ++r) {
    masks[r] = w.data + RecordOffset(w, row + r);
    values[r] = masks[r] + (kIsDense ? 0 : 8 * n_blocks);
    for (size_t b = 0; b < kBatch; ++b) sums[b][r] = Zero();
  }
  const float* x = p.floats + first * p.stride;
  for (size_t j = 0; j < n_whole; ++j) {
    stream.Advance();
    if constexpr (kBatch == 1) {
      const XBlock x_block = LoadXBlock(x + kBlock * j);
      for (size_t r = 0; r < kRows; ++r) {
        const uint8_t* mask = masks[r] + 8 * j;
        if constexpr (kReading == Reading::kLookup) {
          LookupAdd<kType>(sums[0][r], mask, values[r], x_block);
        } else {
          MulAdd(sums[0][r], kIsDense ? LoadBlock<kType>(values[r]) : ExpandBlock<kType>(mask, values[r]), x_block);
        }
        values[r] += SizeOf(kType) * (kIsDense ? kBlock : CountBits(mask));
      }
      continue;
    }
    Block blocks[kRows];
    for (size_t r = 0; r < kRows; ++r) {
      blocks[r] = kIsDense ? LoadBlock<kType>(values[r]) : ExpandBlock<kType>(masks[r] + 8 * j, values[r]);
      values[r] += SizeOf(kType) * (kIsDense ? kBlock : CountBits(masks[r] + 8 * j));
    }
    for (size_t b = 0; b < kBatch; ++b) {
      const XBlock x_block = LoadXBlock(x + b * p.stride + kBlock * j);
      for (size_t r = 0; r < kRows; ++r) MulAdd(sums[b][r], blocks[r], x_block);
    }
  }
  if (n_whole < n_blocks) {  // the last columns of a dense row, as a block whose other columns are not stored
    const uint64_t mask = (uint64_t{1} << (w.n_columns % kBlock)) - 1;
    for (size_t r = 0; r < kRows; ++r) {
      const Block block = ExpandBlock<kType>(reinterpret_cast<const uint8_t*>(&mask), values[r]);
      for (size_t b = 0; b < kBatch; ++b) MulAdd(sums[b][r], block, x + b * p.stride + kBlock * n_whole);
    }
  }
  for (size_t b = 0; b < kBatch; ++b) {
    float* y = p.y + (first + b) * w.n_rows + row;
    Sums(sums[b], y);
    if (p.bias != nullptr) {
      for (size_t r = 0; r < kRows; ++r) y[r] += p.bias[row + r];
    }
  }
  return stream;
}

template <ValueType kType, Reading kReading, size_t kRows, size_t kBatch>
static void AllFloatRows(const Product& p, size_t begin, size_t end, size_t first) {
  Stream stream = Stream::Of(*p.w, begin, end, kRows, BlocksOf(*p.w));
  size_t row = begin;
  for (; row + kRows <= end; row += kRows) stream = FloatRows<kType, kReading, kRows, kBatch>(p, row, first, stream);
  for (; row < end; ++row) stream = FloatRows<kType, kReading, 1, kBatch>(p, row, first, stream);
}

template <ValueType kType, Reading kReading>
static void MultiplyFloatRows(const Product& p, size_t begin, size_t end) {
  if (p.m == 1) return AllFloatRows<kType, kReading, kRowsSingle, 1>(p, begin, end, 0);
  // A few rows of W at a time, so that they are still in cache for the next rows of X.
  for (size_t row = begin; row < end;) {
    const size_t until = end - row > 16 ? row + 16 : end;
    size_t first = 0;
    if constexpr (kMaxBatch >= 8) {
      for (; first + 8 <= p.m; first += 8) AllFloatRows<kType, kReading, kRowsBatch, 8>(p, row, until, first);
    }
    for (; first + 4 <= p.m; first += 4) AllFloatRows<kType, kReading, kRowsBatch, 4>(p, row, until, first);
    for (; first + 2 <= p.m; first += 2) AllFloatRows<kType, kReading, kRowsBatch, 2>(p, row, until, first);
    for (; first < p.m; ++first) AllFloatRows<kType, kReading, kRowsBatch, 1>(p, row, until, first);
    row = until;
  }
}

// ---- lists of columns, few rows of X ----

template <ValueType kType>
static void MultiplyIndexRows(const Product& p, size_t begin, size_t end) {
  constexpr size_t kRows = 4;  // side by side, so that they find the same columns of X in the first cache
  const PackedMatrix& w = *p.w;
  const uint8_t* last = w.data + RecordOffset(w, end);
  for (size_t row = begin; row < end; row += kRows) {
    const size_t n_rows = end - row < kRows ? end - row : kRows;
    IndexRow rows[kRows] = {};
    for (size_t r = 0; r < n_rows; ++r) {
      const uint8_t* record = w.data + RecordOffset(w, row + r);
      const size_t n = LoadU32(record);
      rows[r] = {record + 4, record + 4 + (2 * n + 3) / 4 * 4, n};
    }
    const uint8_t* from = w.data + RecordOffset(w, row);
    const uint8_t* until = w.data + RecordOffset(w, row + n_rows);
    const size_t ahead = static_cast<size_t>(until - from) > kPrefetch ? static_cast<size_t>(until - from) : kPrefetch;
    for (const uint8_t* at = from + ahead; at < until + ahead && at < last; at += 64) __builtin_prefetch(at, 0, 2);
    for (size_t i = 0; i < p.m; ++i) {
      float sums[kRows];
      IndexDots<kType>(rows, p.floats + i * p.stride, sums);
      float* y = p.y + i * w.n_rows + row;
      for (size_t r = 0; r < n_rows; ++r) {
        const float scale = kType == ValueType::kInt8 ? LoadF32(w.row_scales + 4 * (row + r)) : 1;
        y[r] = scale * sums[r] + (p.bias == nullptr ? 0 : p.bias[row + r]);
      }
    }
  }
}

// ---- float values, many rows of X: each stored value meets a tile of X, zeros cost nothing ----

template <size_t kVecs>
OWL_INLINE void MulTile(float* sums, const float* panel, const uint8_t* columns, const AnyFloat* values, size_t n) {
  constexpr size_t kTile = kVecs * kLanes;
  constexpr size_t kChains = kVecs >= 4 ? 1 : 4 / kVecs;  // independent sums, to cover the latency of one
  Vec acc[kChains][kVecs] = {};
  size_t e = 0;
  for (; e + kChains <= n; e += kChains) {
    for (size_t c = 0; c < kChains; ++c) {
      const float* x = panel + columns[e + c] * kTile;
      for (size_t v = 0; v < kVecs; ++v) {
        acc[c][v] += values[e + c] * *reinterpret_cast<const VecMem*>(x + v * kLanes);
      }
    }
  }
  for (; e < n; ++e) {
    const float* x = panel + columns[e] * kTile;
    for (size_t v = 0; v < kVecs; ++v) acc[0][v] += values[e] * *reinterpret_cast<const VecMem*>(x + v * kLanes);
  }
  for (size_t v = 0; v < kVecs; ++v) {
    Vec total = acc[0][v];
    for (size_t c = 1; c < kChains; ++c) total += acc[c][v];
    *reinterpret_cast<VecMem*>(sums + v * kLanes) += total;
  }
}

// The same for rows without zeros, four of them for each load of X; fewer than four repeat the first one.
template <size_t kVecs>
OWL_INLINE void MulTileDense(float* sums, const float* panel, const AnyFloat* const (&values)[4], size_t n,
                             size_t n_rows) {
  constexpr size_t kStep = kVecs > 4 ? 4 : kVecs;  // vectors at a time: four rows of them are sixteen sums
  constexpr size_t kTile = kVecs * kLanes;
  for (size_t first = 0; first < kVecs; first += kStep) {
    Vec acc[4][kStep] = {};
    for (size_t k = 0; k < n; ++k) {
      const float* x = panel + k * kTile + first * kLanes;
      for (size_t v = 0; v < kStep; ++v) {
        const Vec part = *reinterpret_cast<const VecMem*>(x + v * kLanes);
        for (size_t r = 0; r < 4; ++r) acc[r][v] += values[r][k] * part;
      }
    }
    for (size_t r = 0; r < 4; ++r) {
      if (r == n_rows) break;
      for (size_t v = 0; v < kStep; ++v) {
        *reinterpret_cast<VecMem*>(sums + r * kTile + (first + v) * kLanes) += acc[r][v];
      }
    }
  }
}

// Where a row has been read up to.
struct Cursor {
  const uint8_t* columns;  // masks, or a list of columns
  const uint8_t* values;
  size_t n_left;  // of a list
};

// The stored columns of a block, counted from its first, and their values: in the record itself where they are float32.
struct BlockList {
  const AnyFloat* values;
  size_t n;
  uint8_t columns[kBlock];
  float converted[kBlock];
};

struct TileScratch {
  float sums[kGroupRows * 64];
  BlockList lists[kListsAhead];
  Cursor cursors[kGroupRows];
};

template <ValueType kType, Encoding kEncoding>
OWL_INLINE void ReadBlock(Cursor& cursor, size_t block, size_t n_columns, BlockList& list) {
  size_t n;
  if constexpr (kEncoding == Encoding::kBitmask) {
    n = MaskColumns(LoadU64(cursor.columns), list.columns);
    cursor.columns += 8;
  } else if constexpr (kEncoding == Encoding::kDense) {
    n = n_columns - block * kBlock < kBlock ? n_columns - block * kBlock : kBlock;
  } else {
    n = BlockColumns(cursor.columns, cursor.n_left, static_cast<uint32_t>(block * kBlock), list.columns);
    cursor.columns += 2 * n;
    cursor.n_left -= n;
  }
  if constexpr (kType == ValueType::kFloat32) {
    list.values = reinterpret_cast<const AnyFloat*>(cursor.values);
  } else {
    ConvertValues<kType>(cursor.values, n, list.converted);
    list.values = list.converted;
  }
  cursor.values += n * SizeOf(kType);
  list.n = n;
}

template <ValueType kType, Encoding kEncoding, size_t kVecs>
static void MultiplyTiles(const Product& p, size_t begin, size_t end) {
  alignas(64) TileScratch scratch;  // on the stack, 22 KiB: a piece of W may meet several tiles at once
  constexpr size_t kTile = kVecs * kLanes;
  const PackedMatrix& w = *p.w;
  const size_t n_blocks = BlocksOf(w);
  for (size_t row = begin; row < end; row += kGroupRows) {
    const size_t n_rows = end - row < kGroupRows ? end - row : kGroupRows;
    __builtin_memset(scratch.sums, 0, n_rows * kTile * sizeof(float));
    for (size_t r = 0; r < n_rows; ++r) {
      Cursor& cursor = scratch.cursors[r];
      cursor.columns = cursor.values = w.data + RecordOffset(w, row + r);
      if constexpr (kEncoding == Encoding::kBitmask) cursor.values += 8 * n_blocks;
      if constexpr (kEncoding == Encoding::kIndex16) {
        cursor.n_left = LoadU32(cursor.columns);
        cursor.columns += 4;
        cursor.values = cursor.columns + (2 * cursor.n_left + 3) / 4 * 4;
      }
    }
    for (size_t j = 0; j < n_blocks; ++j) {
      const float* panel = p.floats + j * kBlock * kTile;
      // A list is read one by one from vectors just stored, which has to wait until they are in the cache (Zen 4: 50
      // instead of 32 ns per row at 70 %): so several rows are listed before the first is multiplied.
      for (size_t r = 0; r < n_rows; r += kListsAhead) {
        const size_t n_lists = n_rows - r < kListsAhead ? n_rows - r : kListsAhead;
        for (size_t i = 0; i < n_lists; ++i) {
          ReadBlock<kType, kEncoding>(scratch.cursors[r + i], j, w.n_columns, scratch.lists[i]);
          // Sixty-four rows are too many streams for a processor to foresee; X is one, and is left to it.
          __builtin_prefetch(scratch.cursors[r + i].values + 128);
          __builtin_prefetch(scratch.cursors[r + i].columns + 64);
          for (size_t t = 0; t < kTile; t += 16) __builtin_prefetch(scratch.sums + (r + i) * kTile + t, 1);
        }
        if constexpr (kEncoding == Encoding::kDense) {
          for (size_t i = 0; i < n_lists; i += 4) {
            const AnyFloat* values[4];
            for (size_t k = 0; k < 4; ++k) values[k] = scratch.lists[i + k < n_lists ? i + k : i].values;
            const size_t left = n_lists - i;
            MulTileDense<kVecs>(scratch.sums + (r + i) * kTile, panel, values, scratch.lists[i].n, left < 4 ? left : 4);
          }
          continue;
        }
        for (size_t i = 0; i < n_lists; ++i) {
          const BlockList& list = scratch.lists[i];
          MulTile<kVecs>(scratch.sums + (r + i) * kTile, panel, list.columns, list.values, list.n);
        }
      }
    }
    if constexpr (kType == ValueType::kInt8) {
      for (size_t r = 0; r < n_rows; ++r) {
        const float scale = LoadF32(w.row_scales + 4 * (row + r));
        for (size_t t = 0; t < kTile; ++t) scratch.sums[r * kTile + t] *= scale;
      }
    }
    for (size_t t = 0; t < p.m; ++t) {
      float* y = p.y + t * w.n_rows + row;
      for (size_t r = 0; r < n_rows; ++r) {
        y[r] = scratch.sums[r * kTile + t] + (p.bias == nullptr ? 0 : p.bias[row + r]);
      }
    }
  }
}

template <ValueType kType, Encoding kEncoding>
static void MultiplyAnyTiles(const Product& p, size_t begin, size_t end) {
  if (p.tile == 16) return MultiplyTiles<kType, kEncoding, 16 / kLanes>(p, begin, end);
  if (p.tile == 32) return MultiplyTiles<kType, kEncoding, 32 / kLanes>(p, begin, end);
  return MultiplyTiles<kType, kEncoding, 64 / kLanes>(p, begin, end);
}

// ---- int8 and int4 values ----

// One row of W as signed bytes in memory: where its values begin, and its group scales.
struct ByteRow {
  const uint8_t* masks;
  const int8_t* values;
  const uint8_t* groups;
};

// Finds the parts of a row; int4 codes are decoded into `decoded`, which takes K rounded up to 64, and 192 bytes more.
template <ValueType kType, bool kIsDense>
OWL_INLINE ByteRow OpenByteRow(const PackedMatrix& w, size_t row, size_t n_blocks, int8_t* decoded) {
  const uint8_t* record = w.data + RecordOffset(w, row);
  const uint8_t* groups = record + (kIsDense ? 0 : 8 * n_blocks);
  const uint8_t* values = groups + (w.group == 0 ? 0 : (w.n_columns + w.group - 1) / w.group);
  if constexpr (kType == ValueType::kInt4) {
    size_t n = kIsDense ? w.n_columns : CountMasks(record, n_blocks);
    for (int8_t* out = decoded; n != 0;) {
      const size_t run = n < kNibbleRun ? n : kNibbleRun, half = (run + 1) / 2;
      DecodeNibbles(values, w.codebook, out, out + half);
      values += half;
      out += run;
      n -= run;
    }
    return {record, decoded, groups};
  }
  return {record, reinterpret_cast<const int8_t*>(values), groups};
}

OWL_INLINE size_t DecodedBytes(const PackedMatrix& w) { return BlocksOf(w) * kBlock + 192; }

template <bool kIsDense>
OWL_INLINE Bytes NextBytes(ByteRow& row, size_t block, size_t n_whole, size_t n_tail) {
  if (!kIsDense) {
    const Bytes bytes = ExpandBytes(row.masks + 8 * block, row.values);
    row.values += CountBits(row.masks + 8 * block);
    return bytes;
  }
  if (block < n_whole) {
    const Bytes bytes = LoadBytes(row.values);
    row.values += kBlock;
    return bytes;
  }
  const uint64_t mask = (uint64_t{1} << n_tail) - 1;
  return ExpandBytes(reinterpret_cast<const uint8_t*>(&mask), row.values);
}

// `scales`: what the products of a block's halves are multiplied by; (kBatch, kRows, n_blocks, 2) with group scales,
// else those of X alone, (kBatch, n_blocks, 2).
template <bool kIsDense, size_t kRows, size_t kBatch, bool kHasGroups>
OWL_INLINE Stream IntRows(const Product& p, size_t row, const ByteRow* rows, size_t first, const float* scales,
                          Stream stream) {
  const PackedMatrix& w = *p.w;
  const size_t n_blocks = BlocksOf(w), n_whole = w.n_columns / kBlock, n_tail = w.n_columns % kBlock;
  Acc sums[kBatch][kRows];
  for (size_t b = 0; b < kBatch; ++b) {
    for (size_t r = 0; r < kRows; ++r) sums[b][r] = Zero();
  }
  const int8_t* x = reinterpret_cast<const int8_t*>(p.bytes) + first * p.stride;
  ByteRow source[kRows];
  for (size_t r = 0; r < kRows; ++r) source[r] = rows[r];
  for (size_t j = 0; j < n_blocks; ++j) {
    stream.Advance();
    Bytes blocks[kRows];
    for (size_t r = 0; r < kRows; ++r) blocks[r] = NextBytes<kIsDense>(source[r], j, n_whole, n_tail);
    for (size_t b = 0; b < kBatch; ++b) {
      const XBytes bytes = LoadX(x + b * p.stride + kBlock * j);
      for (size_t r = 0; r < kRows; ++r) {
        DotAdd(sums[b][r], blocks[r], bytes,
               LoadScales(scales + 2 * ((kHasGroups ? b * kRows + r : b) * n_blocks + j)));
      }
    }
  }
  for (size_t b = 0; b < kBatch; ++b) {
    float* y = p.y + (first + b) * w.n_rows + row;
    Sums(sums[b], y);
    for (size_t r = 0; r < kRows; ++r) {
      y[r] = y[r] * LoadF32(w.row_scales + 4 * (row + r)) + (p.bias == nullptr ? 0 : p.bias[row + r]);
    }
  }
  return stream;
}

// The scales of blocks times those of groups, for some rows of W and one of X.
OWL_INLINE void CombineScales(const PackedMatrix& w, const ByteRow* rows, size_t n_rows, const float* x_scales,
                              float* scales) {
  const size_t n_blocks = BlocksOf(w), blocks_per_group = w.group / kBlock;
  for (size_t r = 0; r < n_rows; ++r, scales += 2 * n_blocks) {
    const uint8_t* groups = rows[r].groups;
    if (blocks_per_group == 1) {
      ScalePairs(x_scales, groups, n_blocks, scales);
      continue;
    }
    for (size_t j = 0; j < n_blocks; j += blocks_per_group, ++groups) {
      const float factor = static_cast<float>(*groups);
      for (size_t i = 2 * j; i < 2 * (j + blocks_per_group) && i < 2 * n_blocks; ++i) scales[i] = x_scales[i] * factor;
    }
  }
}

template <bool kIsDense, size_t kRows, size_t kBatch, bool kHasGroups>
OWL_INLINE Stream ScaledIntRows(const Product& p, size_t row, const ByteRow* rows, size_t first, float* memory,
                                Stream stream) {
  const size_t n_blocks = BlocksOf(*p.w);
  const float* scales = p.scales + first * 2 * n_blocks;
  if (kHasGroups) {
    for (size_t b = 0; b < kBatch; ++b) {
      CombineScales(*p.w, rows, kRows, scales + b * 2 * n_blocks, memory + b * kRows * 2 * n_blocks);
    }
    scales = memory;
  }
  return IntRows<kIsDense, kRows, kBatch, kHasGroups>(p, row, rows, first, scales, stream);
}

template <bool kIsDense, size_t kBatch, bool kHasGroups>
static Stream AllIntRows(const Product& p, size_t row, size_t n, const ByteRow* rows, size_t first, float* memory,
                         Stream stream) {
  size_t r = 0;
  for (; r + kRowsSingle <= n; r += kRowsSingle) {
    stream = ScaledIntRows<kIsDense, kRowsSingle, kBatch, kHasGroups>(p, row + r, rows + r, first, memory, stream);
  }
  for (; r < n; ++r)
    stream = ScaledIntRows<kIsDense, 1, kBatch, kHasGroups>(p, row + r, rows + r, first, memory, stream);
  return stream;
}

// How many rows are decoded before the first of them is multiplied: bytes that were just stored must reach the cache
// before a load across two of those stores can have them.
OWL_INLINE size_t RowsAhead(const PackedMatrix& w) {
  const size_t rows = 8192 / (BlocksOf(w) * kBlock);
  return rows < kRowsSingle ? kRowsSingle : rows > 16 ? 16 : rows / kRowsSingle * kRowsSingle;
}

// Of the rows of X that are taken together, with group scales.
OWL_INLINE size_t ScaleBytes(const PackedMatrix& w) {
  return w.group == 0 ? 0 : (kByteBatch * kRowsSingle * 2 * BlocksOf(w) * sizeof(float) + 63) / 64 * 64;
}

template <ValueType kType, bool kIsDense, bool kHasGroups>
static void MultiplyIntRows(const Product& p, size_t begin, size_t end, uint8_t* scratch) {
  const PackedMatrix& w = *p.w;
  const size_t n_blocks = BlocksOf(w), n_ahead = RowsAhead(w);
  float* memory = reinterpret_cast<float*>(scratch);
  int8_t* decoded = reinterpret_cast<int8_t*>(scratch) + ScaleBytes(w);
  ByteRow rows[16];
  Stream stream = Stream::Of(w, begin, end, kRowsSingle, n_blocks);
  for (size_t row = begin; row < end; row += n_ahead) {
    const size_t n = end - row < n_ahead ? end - row : n_ahead;
    for (size_t r = 0; r < n; ++r) {
      rows[r] = OpenByteRow<kType, kIsDense>(w, row + r, n_blocks, decoded + r * DecodedBytes(w));
    }
    size_t first = 0;
    Stream after = stream;
    if constexpr (kByteBatch >= 4) {
      for (; first + 4 <= p.m; first += 4) {
        after = AllIntRows<kIsDense, 4, kHasGroups>(p, row, n, rows, first, memory, stream);
      }
    }
    for (; first + 2 <= p.m; first += 2) {
      after = AllIntRows<kIsDense, 2, kHasGroups>(p, row, n, rows, first, memory, stream);
    }
    for (; first < p.m; ++first) {
      after = AllIntRows<kIsDense, 1, kHasGroups>(p, row, n, rows, first, memory, stream);
    }
    stream = after;
  }
}

// Where a tile of X meets some rows of W.
struct ByteTile {
  size_t row, n_rows;    // of W
  size_t first, n_used;  // of X
};

// The first kUsed vectors of a tile of X that has kVecs of them, against kRows rows of W: dense (n_blocks, kRows,
// kBlock), factors (n_blocks, kRows) with groups, row_scales (kRows).
template <bool kHasGroups, size_t kN, size_t kVecs, size_t kUsed, size_t kRows>
OWL_INLINE void MultiplyByteTile(const Product& p, const ByteTile& tile, const int8_t* dense, const float* factors,
                                 const float* row_scales, Stream& stream) {
  using Q = Quads<kN>;
  constexpr bool kIsPaired = kN == kPairedTile;  // lanes are a row's two fours of columns in turn, see Layout
  constexpr size_t kParts = kIsPaired ? 1 : 2, kWidth = kIsPaired ? 2 * kN : kN;
  const size_t n_blocks = BlocksOf(*p.w);
  const int8_t* x = reinterpret_cast<const int8_t*>(p.bytes) + tile.first * n_blocks * kBlock;
  const float* x_scales = p.scales + tile.first * 4 * n_blocks;
  typename Q::Floats sums[kRows][kUsed] = {};
  for (size_t part = 0; part < kParts * n_blocks; ++part) {  // fours of columns with one scale: every other one
    const size_t j = part / kParts;
    typename Q::Ints products[kRows][kUsed] = {};
    if constexpr (kWOffset != 0) {
      for (size_t v = 0; v < kUsed; ++v) {
        const float* start = x_scales + ((2 * part + 1) * kVecs + v) * kWidth;
        __builtin_memcpy(&products[0][v], start, sizeof products[0][v]);
        for (size_t r = 1; r < kRows; ++r) products[r][v] = products[0][v];
      }
    }
    if (tile.first == 0 && part % kParts == 0) stream.Advance();
    const int8_t* block = dense + j * kRows * kBlock + 4 * (part % kParts);
    for (size_t k = 0; k < kBlock; k += 8, x += 4 * kVecs * kWidth) {
      typename Q::X parts[kUsed];
      for (size_t v = 0; v < kUsed; ++v) parts[v] = Q::Load(x + 4 * kWidth * v);
      for (size_t r = 0; r < kRows; ++r) {
        const typename Q::W weights = Q::Splat(block + r * kBlock + k);
        for (size_t v = 0; v < kUsed; ++v) products[r][v] = Q::Dot(products[r][v], parts[v], weights);
      }
    }
    for (size_t v = 0; v < kUsed; ++v) {
      typename Q::Floats scale;
      __builtin_memcpy(&scale, x_scales + (2 * part * kVecs + v) * kWidth, sizeof scale);
      for (size_t r = 0; r < kRows; ++r) {
        sums[r][v] += Q::ToFloats(products[r][v]) * (kHasGroups ? scale * factors[j * kRows + r] : scale);
      }
    }
  }
  alignas(64) float results[kRows][kUsed * kWidth];
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t v = 0; v < kUsed; ++v) {
      const typename Q::Floats scaled = sums[r][v] * row_scales[r];
      __builtin_memcpy(results[r] + v * kWidth, &scaled, sizeof scaled);
    }
    if constexpr (kIsPaired) {
      for (size_t t = 0; t < kN; ++t) results[r][t] = results[r][2 * t] + results[r][2 * t + 1];
    }
  }
  for (size_t t = 0; t < tile.n_used; ++t) {
    float* y = p.y + (tile.first + t) * p.w->n_rows + tile.row;
    for (size_t r = 0; r < tile.n_rows; ++r) y[r] = results[r][t] + (p.bias == nullptr ? 0 : p.bias[tile.row + r]);
  }
}

// Many rows of X: a few rows of W become dense bytes once, then meet X in tiles whose lanes are rows of X. W is shifted
// by kWOffset, and sums of products begin at what makes up for it, which Prepare has put behind the scales of X.
template <ValueType kType, bool kIsDense, bool kHasGroups, size_t kN, size_t kVecs>
static void MultiplyByteTiles(const Product& p, size_t begin, size_t end, uint8_t* scratch) {
  constexpr size_t kTile = kVecs * kN, kRows = kVecs == 1 ? kByteRows : 4;
  const PackedMatrix& w = *p.w;
  const size_t n_blocks = BlocksOf(w), n_whole = w.n_columns / kBlock, n_tail = w.n_columns % kBlock;
  const size_t padded = n_blocks * kBlock, decoded_bytes = DecodedBytes(w);
  int8_t* decoded = reinterpret_cast<int8_t*>(scratch);
  int8_t* dense = decoded + (decoded_bytes + 63) / 64 * 64;           // (n_blocks, kRows, kBlock)
  float* factors = reinterpret_cast<float*>(dense + kRows * padded);  // (n_blocks, kRows), with groups
  __builtin_memset(dense, 0, kRows * padded);
  if (kHasGroups) __builtin_memset(factors, 0, kRows * n_blocks * sizeof(float));
  Stream stream = Stream::Of(w, begin, end, kRows, n_blocks);
  for (size_t row = begin; row < end; row += kRows) {
    const size_t n_rows = end - row < kRows ? end - row : kRows;
    float row_scales[kRows] = {};
    for (size_t r = 0; r < n_rows; ++r) {
      ByteRow source = OpenByteRow<kType, kIsDense>(w, row + r, n_blocks, decoded);
      row_scales[r] = LoadF32(w.row_scales + 4 * (row + r));
      for (size_t j = 0, group = 0, left = w.group / kBlock; j < n_blocks; ++j) {
        StoreBytes(dense + (j * kRows + r) * kBlock, NextBytes<kIsDense>(source, j, n_whole, n_tail));
        if (!kHasGroups) continue;
        factors[j * kRows + r] = source.groups[group];
        if (--left == 0) {
          left = w.group / kBlock;
          ++group;
        }
      }
    }
    for (size_t first = 0; first < p.m; first += kTile) {
      const ByteTile tile = {row, n_rows, first, p.m - first < kTile ? p.m - first : kTile};
      // The last tile may need half of its lanes only: 48 rows of X then take less time than 64.
      if (kVecs > 1 && tile.n_used <= kN) {
        MultiplyByteTile<kHasGroups, kN, kVecs, 1, kRows>(p, tile, dense, factors, row_scales, stream);
      } else {
        MultiplyByteTile<kHasGroups, kN, kVecs, kVecs, kRows>(p, tile, dense, factors, row_scales, stream);
      }
    }
  }
}

template <ValueType kType, bool kIsDense, bool kHasGroups>
static void MultiplyAnyByteTiles(const Product& p, size_t begin, size_t end, uint8_t* scratch) {
  if (p.tile == kByteLanes) {
    return MultiplyByteTiles<kType, kIsDense, kHasGroups, kByteLanes, 1>(p, begin, end, scratch);
  }
  if constexpr (kLanes != kByteLanes) {
    if (p.tile == kLanes) return MultiplyByteTiles<kType, kIsDense, kHasGroups, kLanes, 1>(p, begin, end, scratch);
  }
  return MultiplyByteTiles<kType, kIsDense, kHasGroups, kLanes, 2>(p, begin, end, scratch);
}

// ---- the table ----

static Layout ChooseLayout(const PackedMatrix& w, size_t m, size_t* tile) {
  const bool is_int = w.value_type == ValueType::kInt8 || w.value_type == ValueType::kInt4;
  const bool is_bytes = is_int && w.encoding != Encoding::kIndex16;
  if (is_bytes) {
    *tile = m <= kByteLanes ? kByteLanes : m <= kLanes ? kLanes : 2 * kLanes;
    return m < kByteTileFrom ? Layout::kByteRows : Layout::kByteTiles;
  }
  *tile = m <= 16 ? 16 : m <= 32 ? 32 : 64;
  // A tile costs by stored value, rows by column.
  const bool is_full = w.encoding == Encoding::kBitmask && 5 * w.n_values > 2 * w.n_rows * w.n_columns;
  return m < (is_full ? kTileFromFull : kTileFrom) ? Layout::kRows : Layout::kTiles;
}

// A block's fours of columns to two places in turn, each `step` bytes behind the one before there; and what the sums of
// products begin with: -kWOffset times the sum of all bytes that go to the place.
OWL_INLINE void PlaceBlock(const int8_t* block, uint8_t* even, size_t step, uint8_t* odd, int32_t (&starts)[2]) {
  constexpr uint64_t kLow = 0x00FF00FF00FF00FF;
  uint64_t sums = 0;  // of bytes plus 128: two fields of sixteen bits for each place
  for (size_t k = 0; k < kBlock; k += 8, even += step, odd += step) {
    uint64_t fours;
    __builtin_memcpy(&fours, block + k, sizeof fours);
    __builtin_memcpy(even, &fours, 4);
    const uint64_t high = fours >> 32;
    __builtin_memcpy(odd, &high, 4);
    const uint64_t shifted = fours ^ 0x8080808080808080;
    sums += (shifted & kLow) + (shifted >> 8 & kLow);
  }
  for (size_t half = 0; half < 2; ++half, sums >>= 32) {
    starts[half] = -kWOffset * (static_cast<int32_t>((sums & 0xFFFF) + (sums >> 16 & 0xFFFF)) - 128 * 32);
  }
}

static void Prepare(const Product& p, const float* x, size_t i, float* floats, uint8_t* bytes, float* scales) {
  const size_t n = p.w->n_columns, n_blocks = BlocksOf(*p.w), padded = n_blocks * kBlock;
  alignas(64) int8_t block[kBlock];
  switch (p.layout) {
    case Layout::kRows:
      __builtin_memcpy(floats + i * padded, x + i * n, n * sizeof(float));
      __builtin_memset(floats + i * padded + n, 0, (padded - n) * sizeof(float));
      return;
    case Layout::kTiles: {
      float* tile = floats + i * p.tile * n;
      for (size_t begin = 0; begin < n; begin += 16) {
        const size_t end = begin + 16 < n ? begin + 16 : n;
        for (size_t t = 0; t < p.tile; ++t) {
          const size_t m = i * p.tile + t;
          for (size_t k = begin; k < end; ++k) tile[k * p.tile + t] = m < p.m ? x[m * n + k] : 0;
        }
      }
      return;
    }
    case Layout::kByteRows:
      for (size_t j = 0; j < n_blocks; ++j) {
        const size_t left = n - j * kBlock;
        RoundBlock(x + i * n + j * kBlock, left < kBlock ? left : kBlock, block, scales + 2 * (i * n_blocks + j));
        __builtin_memcpy(bytes + i * padded + j * kBlock, block, kBlock);
      }
      return;
    case Layout::kByteTiles:
      for (size_t t = 0; t < p.tile; ++t) {
        const size_t m = i * p.tile + t;
        for (size_t j = 0; j < n_blocks; ++j) {
          const size_t left = n - j * kBlock;
          float pair[2] = {};
          if (m < p.m) {
            RoundBlock(x + m * n + j * kBlock, left < kBlock ? left : kBlock, block, pair);
          } else {
            __builtin_memset(block, 0, kBlock);
          }
          uint8_t* out = bytes + (i * padded + j * kBlock) * p.tile;
          int32_t starts[2];
          if (p.tile == kPairedTile) {
            PlaceBlock(block, out + 8 * t, 8 * p.tile, out + 8 * t + 4, starts);
          } else {
            PlaceBlock(block, out + 4 * t, 4 * p.tile, out + kBlock / 2 * p.tile + 4 * t, starts);
          }
          float* scale = scales + (i * n_blocks + j) * 4 * p.tile;
          for (size_t half = 0; half < 2; ++half) {
            const bool is_paired = p.tile == kPairedTile;
            float* place = scale + (is_paired ? 2 * t + half : 2 * p.tile * half + t);
            *place = pair[half];
            __builtin_memcpy(place + (is_paired ? 2 : 1) * p.tile, &starts[half], sizeof starts[half]);
          }
        }
      }
      return;
  }
}

static size_t ScratchBytes(const Product& p) {
  const PackedMatrix& w = *p.w;
  switch (p.layout) {
    case Layout::kRows:
    case Layout::kTiles:
      return 0;
    case Layout::kByteRows:
      return ScaleBytes(w) + (w.value_type == ValueType::kInt4 ? RowsAhead(w) * DecodedBytes(w) : 0);
    case Layout::kByteTiles:
      return (DecodedBytes(w) + 63) / 64 * 64 + BlocksOf(w) * kByteRows * (kBlock + sizeof(float));
  }
  return 0;
}

template <ValueType kType>
static void MultiplyFloats(const Product& p, size_t begin, size_t end) {
  if (p.layout == Layout::kRows) {
    if (p.w->encoding == Encoding::kDense) return MultiplyFloatRows<kType, Reading::kDense>(p, begin, end);
    if (p.w->encoding == Encoding::kIndex16) return MultiplyIndexRows<kType>(p, begin, end);
    if constexpr (kLookupPercent != 0) {
      const bool is_sparse = 100 * p.w->n_values <= kLookupPercent * p.w->n_rows * p.w->n_columns;
      if (p.m == 1 && is_sparse) return AllFloatRows<kType, Reading::kLookup, kRowsSingle, 1>(p, begin, end, 0);
    }
    return MultiplyFloatRows<kType, Reading::kSpread>(p, begin, end);
  }
  if (p.w->encoding == Encoding::kDense) return MultiplyAnyTiles<kType, Encoding::kDense>(p, begin, end);
  if (p.w->encoding == Encoding::kBitmask) return MultiplyAnyTiles<kType, Encoding::kBitmask>(p, begin, end);
  return MultiplyAnyTiles<kType, Encoding::kIndex16>(p, begin, end);
}

template <ValueType kType, bool kIsDense>
static void MultiplyInts(const Product& p, size_t begin, size_t end, uint8_t* scratch) {
  if (p.layout == Layout::kByteTiles) {
    if (p.w->group == 0) return MultiplyAnyByteTiles<kType, kIsDense, false>(p, begin, end, scratch);
    return MultiplyAnyByteTiles<kType, kIsDense, true>(p, begin, end, scratch);
  }
  if (p.w->group == 0) return MultiplyIntRows<kType, kIsDense, false>(p, begin, end, scratch);
  return MultiplyIntRows<kType, kIsDense, true>(p, begin, end, scratch);
}

static void Multiply(const Product& p, size_t begin, size_t end, uint8_t* scratch) {
  const bool is_dense = p.w->encoding == Encoding::kDense;
  switch (p.w->value_type) {
    case ValueType::kFloat32:
      return MultiplyFloats<ValueType::kFloat32>(p, begin, end);
    case ValueType::kFloat16:
      return MultiplyFloats<ValueType::kFloat16>(p, begin, end);
    case ValueType::kBFloat16:
      return MultiplyFloats<ValueType::kBFloat16>(p, begin, end);
    case ValueType::kInt8:
      if (p.w->encoding == Encoding::kIndex16) {
        if (p.layout == Layout::kRows) return MultiplyIndexRows<ValueType::kInt8>(p, begin, end);
        return MultiplyAnyTiles<ValueType::kInt8, Encoding::kIndex16>(p, begin, end);
      }
      if (is_dense) return MultiplyInts<ValueType::kInt8, true>(p, begin, end, scratch);
      return MultiplyInts<ValueType::kInt8, false>(p, begin, end, scratch);
    case ValueType::kInt4:
      if (is_dense) return MultiplyInts<ValueType::kInt4, true>(p, begin, end, scratch);
      return MultiplyInts<ValueType::kInt4, false>(p, begin, end, scratch);
  }
}

}  // namespace
}  // namespace OWL_TARGET
}  // namespace owl
