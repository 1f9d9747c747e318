// What one instruction set offers: a table of plain functions, filled by one file per target.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_KERNELS_H_
#define OWL_DEPLOY_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "gated_linear_unit.h"
#include "packed_matrix.h"

namespace owl {

// X as the kernels want it; which fields are set follows from `Layout`.
enum class Layout : uint8_t {
  kRows,       // floats: (m, padded K) float32, zeros from K on
  kTiles,      // floats, many rows: tiles of `tile` rows of X, each (K, tile) float32, zeros from m on
  kByteRows,   // (m, padded K) int8 and (m, n_blocks, 2) scales
  kByteTiles,  // tiles of `tile` rows of X, each (n_blocks, 2, 8, tile, 4) bytes and (n_blocks, 2, 2, tile)
               // scales, each tile of them followed by as many int32 that sums of products begin with; or,
               // paired, (n_blocks, 8, tile, 2, 4) bytes and (n_blocks, tile, 2) scales followed as above
};

// Everything a piece of work needs to know; the same for all pieces of one product.
struct Product {
  const PackedMatrix* w = nullptr;
  size_t m = 0;
  Layout layout = Layout::kRows;
  size_t tile = 0;    // rows of X per tile
  size_t stride = 0;  // kRows, kByteRows: elements from one row of X to the next
  const float* floats = nullptr;
  const uint8_t* bytes = nullptr;
  const float* scales = nullptr;
  const float* bias = nullptr;  // (N) or null
  float* y = nullptr;           // (m, N)
};

constexpr size_t kAttentionRows = 64;  // queries of a tile
constexpr size_t kAttentionKeys = 64;  // positions scored at a time

// Attention in tiles of queries. Item i is share i % n_shares of the positions of tile i / n_shares % n_tiles of head
// i / n_shares / n_tiles; heads are those of keys and values, counted through the batch. A tile's rows are queries,
// token after token, the heads of one token next to each other.
struct AttentionTask {
  const AttentionShape* shape = nullptr;
  const AttentionTensors* tensors = nullptr;
  size_t n_tiles = 0;
  size_t n_shares = 0;
  float* queries = nullptr;  // (n_batch n_kv_heads, n_tokens n_heads / n_kv_heads, head_dim), turned and scaled
  float* parts = nullptr;    // with several shares: (items, kAttentionRows, 2 + head_dim): largest score, sum, values
};

// Where the result of a row of queries goes.
static inline float* AttentionOutput(const AttentionTask& task, size_t head, size_t row) {
  const AttentionShape& shape = *task.shape;
  const size_t group = shape.n_heads / shape.n_kv_heads;
  const size_t token = head / shape.n_kv_heads * task.tensors->n_tokens + row / group;
  return task.tensors->y + (token * shape.n_heads + head % shape.n_kv_heads * group + row % group) * shape.head_dim;
}

struct Kernels {
  const char* name;
  // How X is laid out for m rows, and how many rows of X a tile takes.
  Layout (*layout)(const PackedMatrix& w, size_t m, size_t* tile);
  // Writes tile or row `i` of the prepared X.
  void (*prepare)(const Product& product, const float* x, size_t i, float* floats, uint8_t* bytes, float* scales);
  // Bytes of scratch memory that `multiply` needs for each piece of W, 64-byte aligned.
  size_t (*scratch_bytes)(const Product& product);
  // Rows [begin, end) of W. With kTiles, `product` is one tile of X: `floats` and `y` begin there, and m is at most
  // `tile`; the same rows of W may meet several tiles at the same time.
  void (*multiply)(const Product& product, size_t begin, size_t end, uint8_t* scratch);
  // Attention: a token's queries, keys and values put in their places; then items, each with its own scratch memory.
  void (*prepare_token)(const AttentionTask& task, size_t token);
  size_t (*attention_scratch_floats)(const AttentionShape& shape);
  void (*attend)(const AttentionTask& task, size_t item, float* scratch);
  // y = activation(gate) * up, n of each.
  void (*gate)(Activation activation, const float* gate, const float* up, size_t n, float* y);
};

}  // namespace owl

#endif  // OWL_DEPLOY_KERNELS_H_
