// The domain owl_deploy of ONNX Runtime: what it finds when it loads this library.
//
// SPDX-License-Identifier: Apache-2.0
#include <mutex>

#include "operator.h"

namespace owl {

const Api* g_api = nullptr;

namespace {

// ONNX Runtime keeps a pointer to the domain for as long as the session options live, and no longer needs it when the
// process ends: one for the whole process, never released.
Status* Register(ort::SessionOptions* options, const Api* api) {
  static std::mutex mutex;
  static ort::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  g_api = api;
  return Guard(api, "owl_deploy", [&] {
    if (domain == nullptr) {
      ort::CustomOpDomain* created = nullptr;
      Check(ort::CreateCustomOpDomain(api, "owl_deploy", &created));
      for (const ort::CustomOp* op : {&kSparseMatMulOperator, &kAttentionOperator, &kGatedLinearUnitOperator}) {
        if (Status* status = ort::CustomOpDomainAdd(api, created, op); status != nullptr) {
          ort::ReleaseCustomOpDomain(api, created);
          throw StatusError(status);
        }
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
