// The product as a whole: X is prepared once, then pieces of W are handed to whoever has a thread.
//
// SPDX-License-Identifier: Apache-2.0
#include "sparse_matmul.h"

#include <algorithm>
#include <atomic>

#include "buffer.h"
#include "dispatch.h"
#include "kernels.h"

namespace owl {
namespace {

// A piece costs one fetch-and-add and begins with cold caches, for as many bytes as the kernels ask ahead: four rows.
// Fewer pieces leave a thread idle at the end.
constexpr size_t kPieceBytes = 96 * 1024;
constexpr size_t kPieceRows = 64;
constexpr size_t kMinPieceBytes = 12 * 1024;
constexpr size_t kMaxPieces = 64;

size_t Aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

struct Preparation {
  const Kernels* kernels;
  const Product* product;
  const float* x;
  float* floats;
  uint8_t* bytes;
  float* scales;
};

struct Multiplication {
  const Kernels* kernels;
  const Product* product;
  const std::vector<uint32_t>* cuts;
  size_t n_pieces;
  uint8_t* scratch;
  size_t scratch_bytes;
  std::atomic<size_t> next{0};
};

}  // namespace

std::vector<uint32_t> CutRows(const PackedMatrix& w) {
  const size_t begin = w.record_offset(0), bytes = w.record_offset(w.n_rows) - begin;
  size_t n_pieces = std::min(bytes / kPieceBytes, w.n_rows / kPieceRows);
  // Small matrices: two or four pieces, so that a few threads share them evenly.
  if (n_pieces < 4) n_pieces = std::min<size_t>(4, bytes / kMinPieceBytes) & ~size_t{1};
  n_pieces = std::clamp<size_t>(n_pieces, 1, std::min(kMaxPieces, w.n_rows));
  std::vector<uint32_t> cuts{0};
  size_t row = 0;
  for (size_t piece = 1; piece < n_pieces; ++piece) {
    const size_t target = begin + bytes / n_pieces * piece;
    size_t low = row, high = w.n_rows;  // the first row that starts at `target` or later
    while (low < high) {
      const size_t middle = (low + high) / 2;
      if (w.record_offset(middle) < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    row = std::min(w.n_rows, (low + 7) / 8 * 8);  // kernels take eight rows at a time
    if (row > cuts.back() && row < w.n_rows) cuts.push_back(static_cast<uint32_t>(row));
  }
  cuts.push_back(static_cast<uint32_t>(w.n_rows));
  return cuts;
}

void SparseMatMul(const PackedMatrix& w, const std::vector<uint32_t>& cuts, const float* x, size_t m, const float* bias,
                  float* y, ParallelFor parallel_for, void* pool) {
  if (m == 0) return;
  const Kernels& kernels = CurrentKernels();
  Product product;
  product.w = &w;
  product.m = m;
  product.bias = bias;
  product.y = y;
  product.layout = kernels.layout(w, m, &product.tile);

  const size_t n_blocks = w.n_blocks(), padded = n_blocks * kBlock;
  const bool is_tiled = product.layout == Layout::kTiles || product.layout == Layout::kByteTiles;
  const size_t n_units = is_tiled ? (m + product.tile - 1) / product.tile : m;
  const size_t rows = is_tiled ? n_units * product.tile : m;
  product.stride = padded;
  size_t float_bytes = 0, byte_bytes = 0, scale_bytes = 0;
  switch (product.layout) {
    case Layout::kRows:
      // Columns from K on are read with weight zero, and must be finite: only then X is copied.
      float_bytes = w.n_columns == padded || w.encoding == Encoding::kIndex16 ? 0 : Aligned(rows * padded * 4);
      break;
    case Layout::kTiles:
      float_bytes = Aligned(rows * w.n_columns * 4);
      break;
    case Layout::kByteRows:
    case Layout::kByteTiles:
      byte_bytes = Aligned(rows * padded);
      scale_bytes = Aligned(rows * n_blocks * (is_tiled ? 4 : 2) * sizeof(float));
      break;
  }
  const size_t n_pieces = cuts.size() - 1;
  const size_t scratch_bytes = Aligned(kernels.scratch_bytes(product));
  thread_local Buffer buffer;
  uint8_t* memory = buffer.Get(float_bytes + byte_bytes + scale_bytes + n_pieces * scratch_bytes + 64);
  float* floats = reinterpret_cast<float*>(memory);
  uint8_t* bytes = memory + float_bytes;
  float* scales = reinterpret_cast<float*>(bytes + byte_bytes);

  product.floats = float_bytes == 0 ? x : floats;
  if (product.layout == Layout::kRows && float_bytes == 0) product.stride = w.n_columns;
  product.bytes = bytes;
  product.scales = scales;
  if (float_bytes + byte_bytes != 0) {
    Preparation preparation{&kernels, &product, x, floats, bytes, scales};
    const auto prepare = [](void* state, size_t i) {
      const Preparation& p = *static_cast<Preparation*>(state);
      p.kernels->prepare(*p.product, p.x, i, p.floats, p.bytes, p.scales);
    };
    // Below some ten thousand numbers a second thread costs more than it brings.
    (rows * padded < 16384 ? SerialFor : parallel_for)(pool, n_units, prepare, &preparation);
  }

  // A tile of floats meets all of W before the next one: it stays in the second cache, where two would not.
  const size_t n_tiles = product.layout == Layout::kTiles ? n_units : 1;
  Multiplication work{&kernels,      &product, &cuts, n_pieces, reinterpret_cast<uint8_t*>(scales) + scale_bytes,
                      scratch_bytes, {}};
  const auto multiply = [](void* state, size_t) {
    Multiplication& p = *static_cast<Multiplication*>(state);
    // Items are taken in order by whoever is free, whatever share of the loop a thread was given.
    const size_t item = p.next.fetch_add(1, std::memory_order_relaxed);
    const size_t tile = item / p.n_pieces, piece = item % p.n_pieces;
    Product part = *p.product;
    if (part.layout == Layout::kTiles) {
      part.floats += tile * part.tile * part.w->n_columns;
      part.y += tile * part.tile * part.w->n_rows;
      part.m = std::min(part.tile, part.m - tile * part.tile);
    }
    p.kernels->multiply(part, (*p.cuts)[piece], (*p.cuts)[piece + 1], p.scratch + piece * p.scratch_bytes);
  };
  const size_t n_items = n_tiles * n_pieces;
  (n_items == 1 ? SerialFor : parallel_for)(pool, n_items, multiply, &work);
}

}  // namespace owl
