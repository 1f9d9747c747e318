// owl_deploy.GatedLinearUnit for ONNX Runtime.
//
// Input: X float32 [..., 2 N], gate and up side by side. Attribute: activation, silu or gelu_tanh. Output: Y float32
// [..., N], activation(gate) * up.
//
// SPDX-License-Identifier: Apache-2.0
#include "gated_linear_unit.h"
#include "operator.h"

namespace owl {
namespace {

class GatedLinearUnitOperator {
 public:
  static constexpr char kName[] = "GatedLinearUnit";
  static constexpr InputKind kInputs[] = {{ort::kFloat}};
  static constexpr size_t kNOutputs = 1;

  GatedLinearUnitOperator(const Api* api, const ort::KernelInfo* info) : api_(api) {
    size_t size = 0;
    Check(ort::KernelInfoGetString(api, info, "activation", nullptr, &size));
    std::string name(size, '\0');
    Check(ort::KernelInfoGetString(api, info, "activation", name.data(), &size));
    name.resize(size - 1);  // without its end
    if (name != "silu" && name != "gelu_tanh") throw Refusal("activation must be silu or gelu_tanh, found " + name);
    activation_ = name == "silu" ? Activation::kSilu : Activation::kGeluTanh;
  }

  const Api* api() const { return api_; }

  void Compute(ort::KernelContext* context) const {
    const std::unique_ptr<Tensor> x = Input(api_, context, 0);
    std::vector<int64_t> dims = x->dims();
    if (x->type() != ort::kFloat || dims.empty() || dims.back() % 2 != 0) {
      throw Refusal("X must be float32 with an even last dimension, found shape " + Text(dims));
    }
    dims.back() /= 2;
    size_t m = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) m *= x->dim(i);
    float* y = Output(api_, context, 0, dims);
    Pool pool{api_, context};
    GatedLinearUnit(activation_, x->data<float>(), m, static_cast<size_t>(dims.back()), y, Pool::For, &pool);
    Check(pool.status);
  }

  static void InferShape(const Api* api, ort::ShapeContext* context) {
    InferLastDimension(api, context, [](int64_t found) { return found < 0 ? found : found / 2; });
  }

 private:
  const Api* api_;
  Activation activation_ = Activation::kSilu;
};

}  // namespace

const ort::CustomOp kGatedLinearUnitOperator = MakeOperator<GatedLinearUnitOperator>();

}  // namespace owl
