// The parts of attention around its tiles: what each thread takes, and how shares of one tile come together.
//
// SPDX-License-Identifier: Apache-2.0
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "dispatch.h"
#include "kernels.h"

namespace owl {
namespace {

// Products of a query's value and a key's from which a second thread pays: some five microseconds of one.
constexpr size_t kParallelProducts = 64 * 1024;
constexpr size_t kParallelFloats = 16 * 1024;  // and so many numbers that are only moved
// Few tiles share out their positions as well, so that many threads have work: a share has 128 positions at least.
constexpr size_t kShareKeys = 2 * kAttentionKeys;
constexpr size_t kItems = 64;

struct Work {
  const Kernels* kernels;
  AttentionTask task;
  std::atomic<size_t> next{0};
};

// The cache so far, to where it is to be; the positions behind the new tokens become zeros.
void CopyHead(const AttentionTask& task, size_t head) {
  const AttentionTensors& t = *task.tensors;
  const size_t D = task.shape->head_dim, past = t.past[head / task.shape->n_kv_heads];
  const auto copy = [&](const float* from, float* to) {
    if (from == to) return;
    to += head * t.n_present * D;
    if (past != 0) std::memcpy(to, from + head * t.n_past * D, past * D * sizeof(float));
    std::fill(to + (past + t.n_tokens) * D, to + t.n_present * D, 0.0f);
  };
  copy(t.past_key, t.present_key);
  copy(t.past_value, t.present_value);
}

void MergeShares(const AttentionTask& task, size_t head, size_t row) {
  const size_t D = task.shape->head_dim, stride = kAttentionRows * (D + 2);
  const size_t unit = head * task.n_tiles + row / kAttentionRows;
  const float* parts = task.parts + unit * task.n_shares * stride + row % kAttentionRows * (D + 2);
  float largest = -std::numeric_limits<float>::infinity(), sum = 0;
  for (size_t i = 0; i < task.n_shares; ++i) largest = std::max(largest, parts[i * stride]);
  float* out = AttentionOutput(task, head, row);
  std::fill(out, out + D, 0.0f);
  for (size_t i = 0; i < task.n_shares; ++i) {
    const float* part = parts + i * stride;
    // A share without positions has weight 0; a score that is no number makes its sum none, and the row with it.
    const float weight = part[0] == largest ? 1 : std::exp(part[0] - largest);
    sum += weight * part[1];
    for (size_t d = 0; d < D; ++d) out[d] += weight * part[2 + d];
  }
  for (size_t d = 0; d < D; ++d) out[d] /= sum;
}

}  // namespace

void Attention(const AttentionShape& shape, const AttentionTensors& tensors, ParallelFor parallel_for, void* pool) {
  if (tensors.n_batch == 0 || tensors.n_tokens == 0) return;
  Work work;
  work.kernels = &CurrentKernels();
  AttentionTask& task = work.task;
  task.shape = &shape;
  task.tensors = &tensors;

  const size_t D = shape.head_dim, n_heads = tensors.n_batch * shape.n_kv_heads;
  const size_t n_rows = tensors.n_tokens * (shape.n_heads / shape.n_kv_heads);
  task.n_tiles = (n_rows + kAttentionRows - 1) / kAttentionRows;
  size_t n_positions = 0, most = 0;  // that keys and values are read at
  for (size_t b = 0; b < tensors.n_batch; ++b) {
    size_t n = tensors.past[b] + tensors.n_tokens;
    if (shape.window != 0) n = std::min(n, shape.window + tensors.n_tokens - 1);
    most = std::max(most, n);
    n_positions += n;
  }
  const size_t n_units = n_heads * task.n_tiles;
  task.n_shares = std::clamp<size_t>(kItems / n_units, 1, std::max<size_t>(1, most / kShareKeys));

  const size_t n_items = n_units * task.n_shares;
  const size_t query_floats = n_heads * n_rows * D;
  const size_t part_floats = task.n_shares == 1 ? 0 : n_items * kAttentionRows * (D + 2);
  thread_local Buffer buffer;
  task.queries = reinterpret_cast<float*>(buffer.Get((query_floats + part_floats) * sizeof(float)));
  task.parts = task.queries + query_floats;

  if (tensors.past_key != tensors.present_key || tensors.past_value != tensors.present_value) {
    const auto copy = [](void* state, size_t i) { CopyHead(static_cast<Work*>(state)->task, i); };
    (n_positions * shape.n_kv_heads * D < kParallelFloats ? SerialFor : parallel_for)(pool, n_heads, copy, &work);
  }
  const auto prepare = [](void* state, size_t i) {
    const Work& w = *static_cast<Work*>(state);
    w.kernels->prepare_token(w.task, i);
  };
  const size_t n_tokens = tensors.n_batch * tensors.n_tokens;
  (n_tokens * shape.n_heads * D < kParallelFloats ? SerialFor : parallel_for)(pool, n_tokens, prepare, &work);

  const auto attend = [](void* state, size_t) {
    Work& w = *static_cast<Work*>(state);
    // Items are taken in order by whoever is free, whatever share of the loop a thread was given.
    const size_t item = w.next.fetch_add(1, std::memory_order_relaxed);
    thread_local Buffer scratch;
    const size_t bytes = w.kernels->attention_scratch_floats(*w.task.shape) * sizeof(float);
    w.kernels->attend(w.task, item, reinterpret_cast<float*>(scratch.Get(bytes)));
  };
  const size_t products = n_positions * n_rows * shape.n_kv_heads * D;
  (n_items == 1 || products < kParallelProducts ? SerialFor : parallel_for)(pool, n_items, attend, &work);
  if (task.n_shares == 1) return;
  for (size_t head = 0; head < n_heads; ++head) {
    for (size_t row = 0; row < n_rows; ++row) MergeShares(task, head, row);
  }
}

}  // namespace owl
