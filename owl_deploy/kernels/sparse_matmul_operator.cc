// owl_deploy.SparseMatMul for ONNX Runtime: checks what it is given, then calls the product on the session's own
// threads.
//
// Inputs: X float32 [..., K]; W uint8 [bytes], a constant packed matrix (FORMAT.md) of N rows and K columns; optional
// bias float32 [N]. Attributes: N, K. Output: Y float32 [..., N].
//
// SPDX-License-Identifier: Apache-2.0
#include "operator.h"
#include "packed_matrix.h"
#include "sparse_matmul.h"

namespace owl {
namespace {

class SparseMatMulOperator {
 public:
  static constexpr char kName[] = "SparseMatMul";
  static constexpr InputKind kInputs[] = {{ort::kFloat}, {ort::kUint8}, {ort::kFloat, ort::kOptional}};
  static constexpr size_t kNOutputs = 1;

  SparseMatMulOperator(const Api* api, const ort::KernelInfo* info) : api_(api) {
    std::string error;
    if (ChosenTarget(&error).empty()) throw Refusal(error);
    int64_t n = 0, k = 0;
    Check(ort::KernelInfoGetInt64(api, info, "N", &n));
    Check(ort::KernelInfoGetInt64(api, info, "K", &k));
    int is_constant = 0;
    const ort::Value* value = nullptr;
    Check(ort::KernelInfoGetConstantInput(api, info, 1, &is_constant, &value));
    if (is_constant == 0 || value == nullptr) throw Refusal("W must be a constant initializer");
    const Tensor tensor(api, value);
    if (tensor.type() != ort::kUint8 || tensor.dims().size() != 1) {
      throw Refusal("W must be a one-dimensional uint8 tensor, found shape " + Text(tensor.dims()));
    }
    error = OpenPackedMatrix(tensor.data<uint8_t>(), tensor.dim(0), &weights_);
    if (!error.empty()) throw Refusal("W: " + error);
    if (weights_.n_rows != static_cast<size_t>(n) || weights_.n_columns != static_cast<size_t>(k)) {
      throw Refusal("the node says N = " + std::to_string(n) + ", K = " + std::to_string(k) +
                    " and its packed matrix N = " + std::to_string(weights_.n_rows) +
                    ", K = " + std::to_string(weights_.n_columns));
    }
    cuts_ = CutRows(weights_);
  }

  const Api* api() const { return api_; }

  void Compute(ort::KernelContext* context) const {
    const std::unique_ptr<Tensor> x = Input(api_, context, 0), bias = Input(api_, context, 2);
    std::vector<int64_t> dims = x->dims();
    if (x->type() != ort::kFloat || dims.empty() || dims.back() != static_cast<int64_t>(weights_.n_columns)) {
      throw Refusal("X must be float32 [..., " + std::to_string(weights_.n_columns) + "], found shape " + Text(dims));
    }
    size_t m = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) m *= x->dim(i);
    if (bias != nullptr &&
        (bias->type() != ort::kFloat || bias->dims().size() != 1 || bias->dim(0) != weights_.n_rows)) {
      throw Refusal("bias must be float32 [" + std::to_string(weights_.n_rows) + "], found shape " +
                    Text(bias->dims()));
    }
    dims.back() = static_cast<int64_t>(weights_.n_rows);
    float* y = Output(api_, context, 0, dims);
    Pool pool{api_, context};
    SparseMatMul(weights_, cuts_, x->data<float>(), m, bias == nullptr ? nullptr : bias->data<float>(), y, Pool::For,
                 &pool);
    Check(pool.status);
  }

  static void InferShape(const Api* api, ort::ShapeContext* context) {
    const int64_t n = InferredInt(api, context, "N"), k = InferredInt(api, context, "K");
    InferLastDimension(api, context, [&](int64_t found) {
      if (found > 0 && found != k) {
        throw Refusal("X must have " + std::to_string(k) + " columns, found " + std::to_string(found));
      }
      return n;
    });
  }

 private:
  const Api* api_;
  PackedMatrix weights_;
  std::vector<uint32_t> cuts_;
};

}  // namespace

const ort::CustomOp kSparseMatMulOperator = MakeOperator<SparseMatMulOperator>();

}  // namespace owl
