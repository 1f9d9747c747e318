// owl_deploy.GroupQueryAttention for ONNX Runtime: what com.microsoft's of the same name computes for stacked queries,
// keys and values, and norms of heads besides.
//
// Inputs, float32 but where stated: QKV [B, T, (num_heads + 2 kv_num_heads) D]; past_key and past_value [B,
// kv_num_heads, P, D]; seqlens_k int32 [B], the number of positions of each row, less one, new tokens included;
// total_sequence_length int32, the largest number of positions; optional cos_cache and sin_cache [positions, R], which
// turn the first 2 R values of a head; optional query_norm and key_norm [D], weights of RMS norms of each head.
// Attributes: num_heads, kv_num_heads, scale, softcap (0: none), local_window_size (-1: none), epsilon of the norms.
// Outputs: Y [B, T, num_heads D]; present_key and present_value [B, kv_num_heads, max(P, total_sequence_length), D],
// which may be past_key and past_value.
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "attention.h"
#include "operator.h"

namespace owl {
namespace {

enum InputIndex : size_t {
  kQkv,
  kPastKey,
  kPastValue,
  kLastPositions,
  kTotalLength,
  kCos,
  kSin,
  kQueryNorm,
  kKeyNorm,
};

class AttentionOperator {
 public:
  static constexpr char kName[] = "GroupQueryAttention";
  static constexpr InputKind kInputs[] = {
      {ort::kFloat},
      {ort::kFloat},
      {ort::kFloat},
      {ort::kInt32},
      {ort::kInt32},
      {ort::kFloat, ort::kOptional},
      {ort::kFloat, ort::kOptional},
      {ort::kFloat, ort::kOptional},
      {ort::kFloat, ort::kOptional},
  };
  static constexpr size_t kNOutputs = 3;

  AttentionOperator(const Api* api, const ort::KernelInfo* info) : api_(api) {
    int64_t n_heads = 0, n_kv_heads = 0, window = 0;
    Check(ort::KernelInfoGetInt64(api, info, "num_heads", &n_heads));
    Check(ort::KernelInfoGetInt64(api, info, "kv_num_heads", &n_kv_heads));
    Check(ort::KernelInfoGetInt64(api, info, "local_window_size", &window));
    Check(ort::KernelInfoGetFloat(api, info, "scale", &shape_.scale));
    Check(ort::KernelInfoGetFloat(api, info, "softcap", &shape_.softcap));
    Check(ort::KernelInfoGetFloat(api, info, "epsilon", &shape_.norm_epsilon));
    constexpr int64_t kMost = 1 << 20;
    if (n_kv_heads < 1 || n_heads < n_kv_heads || n_heads > kMost || n_heads % n_kv_heads != 0) {
      throw Refusal("num_heads must be a multiple of kv_num_heads, found " + std::to_string(n_heads) + " and " +
                    std::to_string(n_kv_heads));
    }
    shape_.n_heads = static_cast<size_t>(n_heads);
    shape_.n_kv_heads = static_cast<size_t>(n_kv_heads);
    shape_.window = window > 0 ? static_cast<size_t>(window) : 0;
  }

  const Api* api() const { return api_; }

  void Compute(ort::KernelContext* context) const {
    std::unique_ptr<Tensor> inputs[std::size(kInputs)];
    for (size_t i = 0; i < std::size(kInputs); ++i) {
      inputs[i] = Input(api_, context, i);
      if (inputs[i] != nullptr && inputs[i]->type() != kInputs[i].type) {
        throw Refusal("input " + std::to_string(i) + " is of another type than it must be");
      }
    }
    AttentionShape shape = shape_;
    AttentionTensors t;
    const Tensor& qkv = *inputs[kQkv];
    const size_t n_stacked = shape.n_heads + 2 * shape.n_kv_heads;
    if (qkv.dims().size() != 3 || qkv.dim(2) == 0 || qkv.dim(2) % (4 * n_stacked) != 0) {
      throw Refusal("QKV must be [B, T, " + std::to_string(n_stacked) + " D], D a multiple of 4, found shape " +
                    Text(qkv.dims()));
    }
    t.n_batch = qkv.dim(0);
    t.n_tokens = qkv.dim(1);
    t.qkv = qkv.data<float>();
    shape.head_dim = qkv.dim(2) / n_stacked;
    const Tensor& past = *inputs[kPastKey];
    const std::vector<int64_t> cache = {qkv.dims()[0], static_cast<int64_t>(shape.n_kv_heads),
                                        past.dims().size() == 4 ? past.dims()[2] : -1,
                                        static_cast<int64_t>(shape.head_dim)};
    if (past.dims() != cache || inputs[kPastValue]->dims() != cache) {
      throw Refusal("past_key and past_value must be [B, kv_num_heads, P, D], found shapes " + Text(past.dims()) +
                    " and " + Text(inputs[kPastValue]->dims()) + " beside QKV " + Text(qkv.dims()));
    }
    t.n_past = past.dim(2);
    t.past_key = past.data<float>();
    t.past_value = inputs[kPastValue]->data<float>();
    size_t n_positions = SIZE_MAX;  // that there are angles for
    if (inputs[kCos] != nullptr) {
      const Tensor& cos = *inputs[kCos];
      if (inputs[kSin] == nullptr || cos.dims().size() != 2 || inputs[kSin]->dims() != cos.dims() ||
          2 * cos.dim(1) > shape.head_dim) {
        throw Refusal("cos_cache and sin_cache must be [positions, R], 2 R at most D, found shape " + Text(cos.dims()));
      }
      n_positions = cos.dim(0);
      shape.n_rotated = 2 * cos.dim(1);
      t.cos = cos.data<float>();
      t.sin = inputs[kSin]->data<float>();
    }
    t.query_norm = NormWeights(inputs[kQueryNorm], shape.head_dim);
    t.key_norm = NormWeights(inputs[kKeyNorm], shape.head_dim);

    const Tensor &last = *inputs[kLastPositions], &total = *inputs[kTotalLength];
    if (last.dims().size() > 2 || Count(last) != t.n_batch || Count(total) != 1) {
      throw Refusal("seqlens_k must have one number a row and total_sequence_length one, found shapes " +
                    Text(last.dims()) + " and " + Text(total.dims()));
    }
    t.n_present = std::max(t.n_past, static_cast<size_t>(std::max(0, *total.data<int32_t>())));
    std::vector<size_t> before(t.n_batch);
    for (size_t b = 0; b < t.n_batch; ++b) {
      // A row that is shorter than its new tokens begins with them, and ends before they do.
      const int64_t length = int64_t{last.data<int32_t>()[b]} + 1;
      before[b] = static_cast<size_t>(std::max(int64_t{0}, length - qkv.dims()[1]));
      if (length < 1 || before[b] > t.n_past || before[b] + t.n_tokens > std::min(t.n_present, n_positions)) {
        throw Refusal("row " + std::to_string(b) + " of " + std::to_string(length) + " positions with " +
                      std::to_string(t.n_tokens) + " new tokens does not fit: past " + std::to_string(t.n_past) +
                      ", present " + std::to_string(t.n_present) +
                      (t.cos == nullptr ? "" : ", angles for " + std::to_string(n_positions)));
      }
    }
    t.past = before.data();

    t.y =
        Output(api_, context, 0, {qkv.dims()[0], qkv.dims()[1], static_cast<int64_t>(shape.n_heads * shape.head_dim)});
    const std::vector<int64_t> present = {cache[0], cache[1], static_cast<int64_t>(t.n_present), cache[3]};
    t.present_key = Output(api_, context, 1, present);
    t.present_value = Output(api_, context, 2, present);
    if ((t.present_key == t.past_key) != (t.present_value == t.past_value) ||
        (t.present_key == t.past_key && t.n_past != t.n_present && t.n_batch * shape.n_kv_heads != 1)) {
      throw Refusal("past and present share memory in part only");
    }
    Pool pool{api_, context};
    Attention(shape, t, Pool::For, &pool);
    Check(pool.status);
  }

  static void InferShape(const Api* api, ort::ShapeContext* context) {
    const int64_t n_heads = InferredInt(api, context, "num_heads");
    const int64_t n_stacked = n_heads + 2 * InferredInt(api, context, "kv_num_heads");
    InferLastDimension(api, context, [&](int64_t found) {
      return found < 0 || n_stacked <= 0 ? int64_t{-1} : found / n_stacked * n_heads;
    });
  }

 private:
  static size_t Count(const Tensor& tensor) {
    size_t n = 1;
    for (size_t i = 0; i < tensor.dims().size(); ++i) n *= tensor.dim(i);
    return n;
  }
  static const float* NormWeights(const std::unique_ptr<Tensor>& weights, size_t head_dim) {
    if (weights == nullptr) return nullptr;
    if (weights->dims().size() != 1 || weights->dim(0) != head_dim) {
      throw Refusal("weights of norms must be [" + std::to_string(head_dim) + "], found shape " +
                    Text(weights->dims()));
    }
    return weights->data<float>();
  }

  const Api* api_;
  AttentionShape shape_;
};

}  // namespace

const ort::CustomOp kAttentionOperator = MakeOperator<AttentionOperator>();

}  // namespace owl
