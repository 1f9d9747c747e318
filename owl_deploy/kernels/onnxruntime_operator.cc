// owl_deploy.SparseMatMul for ONNX Runtime: checks what it is given, then calls the product on the session's own
// threads.
//
// Inputs: X float32 [..., K]; W uint8 [bytes], a constant packed matrix (FORMAT.md) of N rows and K columns; optional
// bias float32 [N]. Attributes: N, K. Output: Y float32 [..., N].
//
// SPDX-License-Identifier: Apache-2.0
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"
#include "packed_matrix.h"
#include "sparse_matmul.h"

namespace owl {
namespace {

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

void Check(Status* status) {
  if (status != nullptr) throw StatusError(status);
}

[[noreturn]] void Fail(const Api* api, ort::ErrorCode code, const std::string& message) {
  throw StatusError(ort::CreateStatus(api, code, ("SparseMatMul: " + message).c_str()));
}

// Runs `body`; whatever it throws becomes a status, because no exception may leave a C function.
template <class Body>
Status* Guard(const Api* api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status();
  } catch (const std::exception& error) {
    return ort::CreateStatus(api, ort::kFail, (std::string("SparseMatMul: ") + error.what()).c_str());
  } catch (...) {
    return ort::CreateStatus(api, ort::kFail, "SparseMatMul: unknown error");
  }
}

std::string Text(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  return text + "]";
}

class Info {
 public:
  Info(const Api* api, const ort::Value* value) : api_(api) { Check(ort::GetTensorTypeAndShape(api, value, &info_)); }
  Info(const Info&) = delete;
  Info& operator=(const Info&) = delete;
  ~Info() { ort::ReleaseTensorInfo(api_, info_); }

  ort::ElementType type() const {
    ort::ElementType type = ort::kUndefined;
    Check(ort::GetElementType(api_, info_, &type));
    return type;
  }
  std::vector<int64_t> dims() const {
    size_t n = 0;
    Check(ort::GetDimensionsCount(api_, info_, &n));
    std::vector<int64_t> dims(n);
    if (n != 0) Check(ort::GetDimensions(api_, info_, dims.data(), n));
    return dims;
  }

 private:
  const Api* api_;
  ort::TensorInfo* info_ = nullptr;
};

struct Pool {
  const Api* api;
  ort::KernelContext* context;
  Status* status = nullptr;
};

void PoolFor(void* pool, size_t n, void (*body)(void*, size_t), void* state) {
  Pool& p = *static_cast<Pool*>(pool);
  Status* status = ort::ParallelFor(p.api, p.context, body, n, 0, state);
  if (status == nullptr) return;
  if (p.status == nullptr) {
    p.status = status;
  } else {
    ort::ReleaseStatus(p.api, status);
  }
}

struct Kernel {
  const Api* api = nullptr;
  PackedMatrix weights;
  std::vector<uint32_t> cuts;
};

void Create(const Api* api, const ort::KernelInfo* info, Kernel& kernel) {
  std::string error;
  if (ChosenTarget(&error).empty()) Fail(api, ort::kInvalidArgument, error);
  int64_t n = 0, k = 0;
  Check(ort::KernelInfoGetInt64(api, info, "N", &n));
  Check(ort::KernelInfoGetInt64(api, info, "K", &k));
  int is_constant = 0;
  const ort::Value* value = nullptr;
  Check(ort::KernelInfoGetConstantInput(api, info, 1, &is_constant, &value));
  if (is_constant == 0 || value == nullptr) Fail(api, ort::kInvalidArgument, "W must be a constant initializer");
  const Info tensor(api, value);
  const std::vector<int64_t> dims = tensor.dims();
  if (tensor.type() != ort::kUint8 || dims.size() != 1) {
    Fail(api, ort::kInvalidArgument, "W must be a one-dimensional uint8 tensor, found shape " + Text(dims));
  }
  const void* data = nullptr;
  Check(ort::GetTensorData(api, value, &data));
  error = OpenPackedMatrix(data, static_cast<size_t>(dims[0]), &kernel.weights);
  if (!error.empty()) Fail(api, ort::kInvalidArgument, "W: " + error);
  if (kernel.weights.n_rows != static_cast<size_t>(n) || kernel.weights.n_columns != static_cast<size_t>(k)) {
    Fail(api, ort::kInvalidArgument,
         "the node says N = " + std::to_string(n) + ", K = " + std::to_string(k) + " and its packed matrix N = " +
             std::to_string(kernel.weights.n_rows) + ", K = " + std::to_string(kernel.weights.n_columns));
  }
  kernel.api = api;
  kernel.cuts = CutRows(kernel.weights);
}

void Compute(const Kernel& kernel, ort::KernelContext* context) {
  const Api* api = kernel.api;
  const PackedMatrix& w = kernel.weights;
  const ort::Value* value = nullptr;
  Check(ort::GetInput(api, context, 0, &value));
  std::vector<int64_t> dims;
  {
    const Info x(api, value);
    dims = x.dims();
    if (x.type() != ort::kFloat || dims.empty() || dims.back() != static_cast<int64_t>(w.n_columns)) {
      Fail(api, ort::kInvalidArgument,
           "X must be float32 [..., " + std::to_string(w.n_columns) + "], found shape " + Text(dims));
    }
  }
  size_t m = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) m *= static_cast<size_t>(dims[i]);
  const void* x = nullptr;
  Check(ort::GetTensorData(api, value, &x));

  const void* bias = nullptr;
  size_t n_inputs = 0;
  Check(ort::GetInputCount(api, context, &n_inputs));
  const ort::Value* bias_value = nullptr;
  if (n_inputs > 2) Check(ort::GetInput(api, context, 2, &bias_value));
  if (bias_value != nullptr) {
    const Info info(api, bias_value);
    const std::vector<int64_t> shape = info.dims();
    if (info.type() != ort::kFloat || shape.size() != 1 || shape[0] != static_cast<int64_t>(w.n_rows)) {
      Fail(api, ort::kInvalidArgument,
           "bias must be float32 [" + std::to_string(w.n_rows) + "], found shape " + Text(shape));
    }
    Check(ort::GetTensorData(api, bias_value, &bias));
  }

  dims.back() = static_cast<int64_t>(w.n_rows);
  ort::Value* y_value = nullptr;
  Check(ort::GetOutput(api, context, 0, dims.data(), dims.size(), &y_value));
  void* y = nullptr;
  Check(ort::GetTensorMutableData(api, y_value, &y));
  Pool pool{api, context};
  SparseMatMul(w, kernel.cuts, static_cast<const float*>(x), m, static_cast<const float*>(bias), static_cast<float*>(y),
               PoolFor, &pool);
  Check(pool.status);
}

void InferShape(const Api* api, ort::ShapeContext* context) {
  ort::TensorInfo* info = nullptr;
  Check(ort::ShapeGetInput(api, context, 0, &info));  // belongs to the context
  size_t rank = 0;
  Check(ort::GetDimensionsCount(api, info, &rank));
  if (rank == 0) return;  // nothing is known of X
  std::vector<int64_t> dims(rank);
  Check(ort::GetDimensions(api, info, dims.data(), rank));
  std::vector<const char*> names(rank);
  Check(ort::GetSymbolicDimensions(api, info, names.data(), rank));
  int64_t n = 0, k = 0;
  const ort::OpAttribute* attribute = nullptr;
  Check(ort::ShapeGetAttribute(api, context, "N", &attribute));
  Check(ort::ReadInt64(api, attribute, &n));
  Check(ort::ShapeGetAttribute(api, context, "K", &attribute));
  Check(ort::ReadInt64(api, attribute, &k));
  if (dims.back() > 0 && dims.back() != k) {
    Fail(api, ort::kInvalidArgument, "X must have " + std::to_string(k) + " columns, found shape " + Text(dims));
  }
  dims.back() = n;
  names.back() = "";
  for (size_t i = 0; i < rank; ++i) {
    // An unknown length is -1 here, and written out it would be taken for a number: it needs a name, or nothing is
    // said.
    if (dims[i] < 0 && (names[i] == nullptr || *names[i] == '\0')) return;
  }
  ort::TensorInfo* output = nullptr;
  Check(ort::CreateTensorInfo(api, &output));
  const auto release = [api](ort::TensorInfo* info) { ort::ReleaseTensorInfo(api, info); };
  const std::unique_ptr<ort::TensorInfo, decltype(release)> keeper(output, release);
  Check(ort::SetElementType(api, output, ort::kFloat));
  Check(ort::SetDimensions(api, output, dims.data(), dims.size()));
  Check(ort::SetSymbolicDimensions(api, output, names.data(), names.size()));
  Check(ort::ShapeSetOutput(api, context, 0, output));
}

// Set at registration; shape inference is not handed one.
const Api* g_api = nullptr;

constexpr ort::CustomOp MakeOperator() {
  ort::CustomOp op{};
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp*) { return "SparseMatMul"; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) { return static_cast<const char*>("CPUExecutionProvider"); };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return 3; };
  op.GetInputType = [](const ort::CustomOp*, size_t i) { return i == 1 ? ort::kUint8 : ort::kFloat; };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t i) { return i == 2 ? ort::kOptional : ort::kRequired; };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.GetVariadicInputMinArity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return 2147483647; };
  op.CreateKernelV2 = [](const ort::CustomOp*, const Api* api, const ort::KernelInfo* info, void** out) {
    return Guard(api, [&] {
      auto kernel = std::make_unique<Kernel>();
      Create(api, info, *kernel);
      *out = kernel.release();
    });
  };
  op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
    const Kernel& k = *static_cast<const Kernel*>(kernel);
    return Guard(k.api, [&] { Compute(k, context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShape = [](const ort::CustomOp*, ort::ShapeContext* context) {
    return Guard(g_api, [&] { InferShape(g_api, context); });
  };
  op.GetMayInplace = [](int**, int**) -> size_t { return 0; };
  op.ReleaseMayInplace = [](int*, int*) {};
  op.GetAliasMap = [](int**, int**) -> size_t { return 0; };
  op.ReleaseAliasMap = [](int*, int*) {};
  return op;
}

constexpr ort::CustomOp kOperator = MakeOperator();

// ONNX Runtime keeps a pointer to the domain for as long as the session options live, and no longer needs it when the
// process ends: one for the whole process, never released.
Status* Register(ort::SessionOptions* options, const Api* api) {
  static std::mutex mutex;
  static ort::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  g_api = api;
  return Guard(api, [&] {
    if (domain == nullptr) {
      ort::CustomOpDomain* created = nullptr;
      Check(ort::CreateCustomOpDomain(api, "owl_deploy", &created));
      if (Status* status = ort::CustomOpDomainAdd(api, created, &kOperator); status != nullptr) {
        ort::ReleaseCustomOpDomain(api, created);
        throw StatusError(status);
      }
      domain = created;
    }
    Check(ort::AddCustomOpDomain(api, options, domain));
  });
}

}  // namespace
}  // namespace owl

extern "C" __attribute__((visibility("default"))) owl::ort::Status* RegisterCustomOps(owl::ort::SessionOptions* options,
                                                                                      const owl::ort::ApiBase* base) {
  const owl::ort::Api* api = base->GetApi(owl::ort::kApiVersion);
  if (api != nullptr) return owl::Register(options, api);
  // CreateStatus has been first in the table since version 1.
  const owl::ort::Api* oldest = base->GetApi(1);
  const std::string message = std::string("this operator library needs ONNX Runtime 1.31 or newer and found ") +
                              base->GetVersionString() + ": upgrade onnxruntime (or onnxruntime-genai)";
  return owl::ort::CreateStatus(oldest, owl::ort::kFail, message.c_str());
}
