// What the operators have in common: errors on their way to ONNX Runtime, its values, its threads.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_OPERATOR_H_
#define OWL_DEPLOY_OPERATOR_H_

#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"

namespace owl {

using ort::Api;
using ort::Status;

// A status of ONNX Runtime on its way out: thrown here, caught at the boundary.
class StatusError {
 public:
  explicit StatusError(Status* status) : status_(status) {}
  Status* status() const { return status_; }

 private:
  Status* status_;
};

inline void Check(Status* status) {
  if (status != nullptr) throw StatusError(status);
}

// What a model did wrong; the name of the operator is put before it.
class Refusal : public std::exception {
 public:
  explicit Refusal(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// Runs `body`; whatever it throws becomes a status, because no exception may leave a C function.
template <class Body>
Status* Guard(const Api* api, const char* name, Body body) noexcept {
  const auto create = [&](ort::ErrorCode code, const char* message) {
    return ort::CreateStatus(api, code, (std::string(name) + ": " + message).c_str());
  };
  try {
    body();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status();
  } catch (const Refusal& error) {
    return create(ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return create(ort::kFail, error.what());
  } catch (...) {
    return create(ort::kFail, "unknown error");
  }
}

inline std::string Text(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  return text + "]";
}

// A tensor of the model, of a known type.
class Tensor {
 public:
  Tensor(const Api* api, const ort::Value* value) {
    ort::TensorInfo* info = nullptr;
    Check(ort::GetTensorTypeAndShape(api, value, &info));
    const auto release = [api](ort::TensorInfo* held) { ort::ReleaseTensorInfo(api, held); };
    const std::unique_ptr<ort::TensorInfo, decltype(release)> keeper(info, release);
    Check(ort::GetElementType(api, info, &type_));
    size_t n = 0;
    Check(ort::GetDimensionsCount(api, info, &n));
    dims_.resize(n);
    if (n != 0) Check(ort::GetDimensions(api, info, dims_.data(), n));
    Check(ort::GetTensorData(api, value, &data_));
  }

  ort::ElementType type() const { return type_; }
  const std::vector<int64_t>& dims() const { return dims_; }
  size_t dim(size_t i) const { return static_cast<size_t>(dims_[i]); }
  template <class T>
  const T* data() const {
    return static_cast<const T*>(data_);
  }

 private:
  ort::ElementType type_ = ort::kUndefined;
  std::vector<int64_t> dims_;
  const void* data_ = nullptr;
};

// Input `index` of a node, or nothing where it was left out.
inline std::unique_ptr<Tensor> Input(const Api* api, const ort::KernelContext* context, size_t index) {
  size_t n_inputs = 0;
  Check(ort::GetInputCount(api, context, &n_inputs));
  if (index >= n_inputs) return nullptr;
  const ort::Value* value = nullptr;
  Check(ort::GetInput(api, context, index, &value));
  return value == nullptr ? nullptr : std::make_unique<Tensor>(api, value);
}

// Output `index`, allocated for these dimensions.
inline float* Output(const Api* api, ort::KernelContext* context, size_t index, const std::vector<int64_t>& dims) {
  ort::Value* value = nullptr;
  Check(ort::GetOutput(api, context, index, dims.data(), dims.size(), &value));
  void* data = nullptr;
  Check(ort::GetTensorMutableData(api, value, &data));
  return static_cast<float*>(data);
}

// The threads of the session that runs a node, as a ParallelFor. What went wrong is kept in `status`.
struct Pool {
  const Api* api;
  ort::KernelContext* context;
  Status* status = nullptr;

  static void For(void* pool, size_t n, void (*body)(void*, size_t), void* state) {
    Pool& p = *static_cast<Pool*>(pool);
    Status* status = ort::ParallelFor(p.api, p.context, body, n, 0, state);
    if (status == nullptr) return;
    if (p.status == nullptr) {
      p.status = status;
    } else {
      ort::ReleaseStatus(p.api, status);
    }
  }
};

// During shape inference.
inline int64_t InferredInt(const Api* api, ort::ShapeContext* context, const char* name) {
  const ort::OpAttribute* attribute = nullptr;
  int64_t value = 0;
  Check(ort::ShapeGetAttribute(api, context, name, &attribute));
  Check(ort::ReadInt64(api, attribute, &value));
  return value;
}

// Says that output 0 has the shape of input 0 but for its last dimension, `last(found)`, where found may be below 0.
template <class Last>
void InferLastDimension(const Api* api, ort::ShapeContext* context, Last last) {
  ort::TensorInfo* info = nullptr;
  Check(ort::ShapeGetInput(api, context, 0, &info));  // belongs to the context
  size_t rank = 0;
  Check(ort::GetDimensionsCount(api, info, &rank));
  if (rank == 0) return;  // nothing is known of it
  std::vector<int64_t> dims(rank);
  Check(ort::GetDimensions(api, info, dims.data(), rank));
  std::vector<const char*> names(rank);
  Check(ort::GetSymbolicDimensions(api, info, names.data(), rank));
  dims.back() = last(dims.back());
  names.back() = "";
  for (size_t i = 0; i < rank; ++i) {
    // An unknown length is -1 here, and written out it would be taken for a number: it needs a name, or nothing is
    // said.
    if (dims[i] < 0 && (names[i] == nullptr || *names[i] == '\0')) return;
  }
  ort::TensorInfo* output = nullptr;
  Check(ort::CreateTensorInfo(api, &output));
  const auto release = [api](ort::TensorInfo* held) { ort::ReleaseTensorInfo(api, held); };
  const std::unique_ptr<ort::TensorInfo, decltype(release)> keeper(output, release);
  Check(ort::SetElementType(api, output, ort::kFloat));
  Check(ort::SetDimensions(api, output, dims.data(), dims.size()));
  Check(ort::SetSymbolicDimensions(api, output, names.data(), names.size()));
  Check(ort::ShapeSetOutput(api, context, 0, output));
}

// Set at registration; shape inference is not handed one.
extern const Api* g_api;

struct InputKind {
  ort::ElementType type;
  ort::Characteristic characteristic = ort::kRequired;
};

// How ONNX Runtime is told of an operator. `Op` has kName, kInputs (InputKind) and kNOutputs (all of them float32), is
// constructed from (api, kernel info), and has Compute(context) const and a static InferShape(api, context).
template <class Op>
constexpr ort::CustomOp MakeOperator() {
  ort::CustomOp op{};
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp*) { return Op::kName; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) { return static_cast<const char*>("CPUExecutionProvider"); };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return std::size(Op::kInputs); };
  op.GetInputType = [](const ort::CustomOp*, size_t i) { return Op::kInputs[i].type; };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t i) { return Op::kInputs[i].characteristic; };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return Op::kNOutputs; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.GetVariadicInputMinArity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return 2147483647; };
  op.CreateKernelV2 = [](const ort::CustomOp*, const Api* api, const ort::KernelInfo* info, void** out) {
    return Guard(api, Op::kName, [&] { *out = new Op(api, info); });
  };
  op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
    const Op& k = *static_cast<const Op*>(kernel);
    return Guard(k.api(), Op::kName, [&] { k.Compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
  op.InferOutputShape = [](const ort::CustomOp*, ort::ShapeContext* context) {
    return Guard(g_api, Op::kName, [&] { Op::InferShape(g_api, context); });
  };
  op.GetMayInplace = [](int**, int**) -> size_t { return 0; };
  op.ReleaseMayInplace = [](int*, int*) {};
  op.GetAliasMap = [](int**, int**) -> size_t { return 0; };
  op.ReleaseAliasMap = [](int*, int*) {};
  return op;
}

// One per file beside this one.
extern const ort::CustomOp kSparseMatMulOperator;
extern const ort::CustomOp kAttentionOperator;
extern const ort::CustomOp kGatedLinearUnitOperator;

}  // namespace owl

#endif  // OWL_DEPLOY_OPERATOR_H_
