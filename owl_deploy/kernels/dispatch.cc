// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <atomic>
#include <cstdlib>

#include "sparse_matmul.h"

#if defined(OWL_HAVE_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace owl {

#ifdef OWL_HAVE_X86
extern const Kernels kAvx512Vbmi2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
#endif
#ifdef OWL_HAVE_NEON
extern const Kernels kNeonKernels;
#endif
extern const Kernels kPortableKernels;

namespace {

// Every target of this binary that this machine runs, best first.
std::vector<const Kernels*> Available() {
  std::vector<const Kernels*> found;
#ifdef OWL_HAVE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bitalg") &&
      __builtin_cpu_supports("avx512vpopcntdq")) {
    found.push_back(&kAvx512Vbmi2Kernels);
  }
  if (avx512) found.push_back(&kAvx512Kernels);
  if (avx2) found.push_back(&kAvx2Kernels);
#endif
#ifdef OWL_HAVE_NEON
  bool has_dot_product = true;  // Apple's processors all have it
#ifdef __linux__
  has_dot_product = (getauxval(AT_HWCAP) & (1 << 20)) != 0;  // HWCAP_ASIMDDP
#endif
  if (has_dot_product) found.push_back(&kNeonKernels);
#endif
  found.push_back(&kPortableKernels);
  return found;
}

const Kernels* Find(const std::string& name) {
  for (const Kernels* kernels : Available()) {
    if (name == kernels->name) return kernels;
  }
  return nullptr;
}

// Set once from the environment, and by ForceTarget.
std::atomic<const Kernels*>& Current() {
  static std::atomic<const Kernels*> current = [] {
    const char* name = std::getenv("OWL_KERNEL_TARGET");
    return name == nullptr || *name == '\0' ? Available().front() : Find(name);
  }();
  return current;
}

}  // namespace

const Kernels& CurrentKernels() {
  const Kernels* kernels = Current().load(std::memory_order_relaxed);
  return kernels == nullptr ? kPortableKernels : *kernels;
}

std::vector<std::string> AvailableTargets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : Available()) names.emplace_back(kernels->name);
  return names;
}

std::string ChosenTarget(std::string* error) {
  const Kernels* kernels = Current().load();
  if (kernels != nullptr) return kernels->name;
  if (error != nullptr) {
    const char* name = std::getenv("OWL_KERNEL_TARGET");
    *error = std::string("OWL_KERNEL_TARGET is ") + (name == nullptr ? "" : name) + ", and this machine has";
    for (const std::string& available : AvailableTargets()) *error += " " + available;
    *error += ": unset it or name one of these";
  }
  return "";
}

bool ForceTarget(const std::string& name) {
  const Kernels* kernels = Find(name);
  if (kernels != nullptr) Current().store(kernels);
  return kernels != nullptr;
}

}  // namespace owl
