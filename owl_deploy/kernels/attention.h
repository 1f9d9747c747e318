// Attention of new tokens over a cache: rotary embedding, scores, softmax and the weighted sum of values in one pass.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_ATTENTION_H_
#define OWL_DEPLOY_ATTENTION_H_

#include <cstddef>
#include <cstdint>

#include "parallel_for.h"

namespace owl {

// The same for every token. Query head i reads key and value head i / (n_heads / n_kv_heads).
struct AttentionShape {
  size_t n_heads = 0;
  size_t n_kv_heads = 0;  // divides n_heads
  size_t head_dim = 0;    // a multiple of 4
  size_t n_rotated = 0;   // values of a head that are turned, i with i + n_rotated / 2: even, at most head_dim
  float scale = 0;        // scores are multiplied by it
  float softcap = 0;      // c of c tanh(score / c), after the scale; 0 for none
  size_t window = 0;      // positions a token looks back upon, itself included; 0 for all
  float norm_epsilon = 0;
};

// Row b of a batch has T new tokens behind past[b] positions of cache. Floats throughout.
struct AttentionTensors {
  size_t n_batch = 0;
  size_t n_tokens = 0;                // T
  size_t n_past = 0;                  // positions there are in past_key and past_value
  size_t n_present = 0;               // positions there are in present_key and present_value: past[b] + T fit
  const float* qkv = nullptr;         // (n_batch, T, (n_heads + 2 n_kv_heads) head_dim): queries, keys, values
  const float* query_norm = nullptr;  // (head_dim): weights of an RMS norm of every query head; null for none
  const float* key_norm = nullptr;    // the same of key heads
  const float* cos = nullptr;         // (positions, n_rotated / 2)
  const float* sin = nullptr;         // (positions, n_rotated / 2)
  const size_t* past = nullptr;       // (n_batch): positions of each row that are in the cache already
  const float* past_key = nullptr;    // (n_batch, n_kv_heads, n_past, head_dim)
  const float* past_value = nullptr;
  float* present_key = nullptr;  // (n_batch, n_kv_heads, n_present, head_dim); may be past_key
  float* present_value = nullptr;
  float* y = nullptr;  // (n_batch, T, n_heads head_dim)
};

// Writes the new keys and values into `present` (and the old ones, where that is other memory), and y. Sums are kept in
// float32. Does not throw, but for std::bad_alloc.
void Attention(const AttentionShape& shape, const AttentionTensors& tensors, ParallelFor parallel_for, void* pool);

}  // namespace owl

#endif  // OWL_DEPLOY_ATTENTION_H_
