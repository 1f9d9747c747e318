// The part of ONNX Runtime's C interface that the operator calls, declared here because no package carries the headers.
//
// Nothing is linked: ONNX Runtime hands over a table of function pointers, which only ever grows at its end. The
// numbers below are positions in that table, as of version 29 of the interface (ONNX Runtime 1.31).
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_ONNXRUNTIME_ABI_H_
#define OWL_DEPLOY_ONNXRUNTIME_ABI_H_

#include <cstddef>
#include <cstdint>

namespace owl::ort {

constexpr uint32_t kApiVersion = 29;

struct Status;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct CustomOpDomain;
struct SessionOptions;
struct OpAttribute;

enum ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt32 = 6 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

struct Api {
  const void* functions[512];
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// `Call<Position, Function>(api, ...)`; the wrappers below give them names.
template <size_t kPosition, class Function>
Function At(const Api* api) {
  return reinterpret_cast<Function>(const_cast<void*>(api->functions[kPosition]));
}

inline Status* CreateStatus(const Api* api, ErrorCode code, const char* message) {
  return At<0, Status* (*)(ErrorCode, const char*)>(api)(code, message);
}
inline Status* CreateCustomOpDomain(const Api* api, const char* name, CustomOpDomain** out) {
  return At<26, Status* (*)(const char*, CustomOpDomain**)>(api)(name, out);
}
inline Status* CustomOpDomainAdd(const Api* api, CustomOpDomain* domain, const void* op) {
  return At<27, Status* (*)(CustomOpDomain*, const void*)>(api)(domain, op);
}
inline Status* AddCustomOpDomain(const Api* api, SessionOptions* options, CustomOpDomain* domain) {
  return At<28, Status* (*)(SessionOptions*, CustomOpDomain*)>(api)(options, domain);
}
inline Status* GetTensorMutableData(const Api* api, Value* value, void** out) {
  return At<51, Status* (*)(Value*, void**)>(api)(value, out);
}
inline Status* CreateTensorInfo(const Api* api, TensorInfo** out) {
  return At<57, Status* (*)(TensorInfo**)>(api)(out);
}
inline Status* SetElementType(const Api* api, TensorInfo* info, ElementType type) {
  return At<58, Status* (*)(TensorInfo*, ElementType)>(api)(info, type);
}
inline Status* SetDimensions(const Api* api, TensorInfo* info, const int64_t* dims, size_t n) {
  return At<59, Status* (*)(TensorInfo*, const int64_t*, size_t)>(api)(info, dims, n);
}
inline Status* GetElementType(const Api* api, const TensorInfo* info, ElementType* out) {
  return At<60, Status* (*)(const TensorInfo*, ElementType*)>(api)(info, out);
}
inline Status* GetDimensionsCount(const Api* api, const TensorInfo* info, size_t* out) {
  return At<61, Status* (*)(const TensorInfo*, size_t*)>(api)(info, out);
}
inline Status* GetDimensions(const Api* api, const TensorInfo* info, int64_t* dims, size_t n) {
  return At<62, Status* (*)(const TensorInfo*, int64_t*, size_t)>(api)(info, dims, n);
}
inline Status* GetSymbolicDimensions(const Api* api, const TensorInfo* info, const char** names, size_t n) {
  return At<63, Status* (*)(const TensorInfo*, const char**, size_t)>(api)(info, names, n);
}
inline Status* GetTensorTypeAndShape(const Api* api, const Value* value, TensorInfo** out) {
  return At<65, Status* (*)(const Value*, TensorInfo**)>(api)(value, out);
}
inline Status* KernelInfoGetFloat(const Api* api, const KernelInfo* info, const char* name, float* out) {
  return At<85, Status* (*)(const KernelInfo*, const char*, float*)>(api)(info, name, out);
}
inline Status* KernelInfoGetInt64(const Api* api, const KernelInfo* info, const char* name, int64_t* out) {
  return At<86, Status* (*)(const KernelInfo*, const char*, int64_t*)>(api)(info, name, out);
}
inline Status* KernelInfoGetString(const Api* api, const KernelInfo* info, const char* name, char* out, size_t* size) {
  return At<87, Status* (*)(const KernelInfo*, const char*, char*, size_t*)>(api)(info, name, out, size);
}
inline Status* GetInputCount(const Api* api, const KernelContext* context, size_t* out) {
  return At<88, Status* (*)(const KernelContext*, size_t*)>(api)(context, out);
}
inline Status* GetInput(const Api* api, const KernelContext* context, size_t index, const Value** out) {
  return At<90, Status* (*)(const KernelContext*, size_t, const Value**)>(api)(context, index, out);
}
inline Status* GetOutput(const Api* api, KernelContext* context, size_t index, const int64_t* dims, size_t n,
                         Value** out) {
  return At<91, Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(api)(context, index, dims, n,
                                                                                           out);
}
inline void ReleaseStatus(const Api* api, Status* status) { At<93, void (*)(Status*)>(api)(status); }
inline void ReleaseTensorInfo(const Api* api, TensorInfo* info) { At<99, void (*)(TensorInfo*)>(api)(info); }
inline void ReleaseCustomOpDomain(const Api* api, CustomOpDomain* domain) {
  At<101, void (*)(CustomOpDomain*)>(api)(domain);
}
inline Status* KernelInfoGetConstantInput(const Api* api, const KernelInfo* info, size_t index, int* is_constant,
                                          const Value** out) {
  return At<249, Status* (*)(const KernelInfo*, size_t, int*, const Value**)>(api)(info, index, is_constant, out);
}
inline Status* ShapeGetInput(const Api* api, const ShapeContext* context, size_t index, TensorInfo** out) {
  return At<268, Status* (*)(const ShapeContext*, size_t, TensorInfo**)>(api)(context, index, out);
}
inline Status* ShapeGetAttribute(const Api* api, const ShapeContext* context, const char* name,
                                 const OpAttribute** out) {
  return At<269, Status* (*)(const ShapeContext*, const char*, const OpAttribute**)>(api)(context, name, out);
}
inline Status* ShapeSetOutput(const Api* api, ShapeContext* context, size_t index, TensorInfo* info) {
  return At<270, Status* (*)(ShapeContext*, size_t, TensorInfo*)>(api)(context, index, info);
}
inline Status* SetSymbolicDimensions(const Api* api, TensorInfo* info, const char** names, size_t n) {
  return At<271, Status* (*)(TensorInfo*, const char**, size_t)>(api)(info, names, n);
}
inline Status* ReadInt64(const Api* api, const OpAttribute* attribute, int64_t* out) {
  constexpr int kInt = 1;
  size_t size = 0;
  return At<272, Status* (*)(const OpAttribute*, int, void*, size_t, size_t*)>(api)(attribute, kInt, out, sizeof *out,
                                                                                    &size);
}
inline Status* ParallelFor(const Api* api, const KernelContext* context, void (*body)(void*, size_t), size_t total,
                           size_t n_batches, void* state) {
  return At<274, Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(api)(
      context, body, total, n_batches, state);
}
inline Status* GetTensorData(const Api* api, const Value* value, const void** out) {
  return At<378, Status* (*)(const Value*, const void**)>(api)(value, out);
}

// How an operator describes itself.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShape)(const CustomOp*, ShapeContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};
static_assert(sizeof(CustomOp) == 208, "the interface lays this structure out");

}  // namespace owl::ort

#endif  // OWL_DEPLOY_ONNXRUNTIME_ABI_H_
