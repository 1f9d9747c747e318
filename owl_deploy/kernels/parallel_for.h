// How the kernels are given threads.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_PARALLEL_FOR_H_
#define OWL_DEPLOY_PARALLEL_FOR_H_

#include <cstddef>

namespace owl {

// Runs body(state, i) once for every i in [0, n), on whatever threads the caller has.
using ParallelFor = void (*)(void* pool, size_t n, void (*body)(void* state, size_t i), void* state);

// Runs the loop on the calling thread.
static inline void SerialFor(void*, size_t n, void (*body)(void* state, size_t i), void* state) {
  for (size_t i = 0; i < n; ++i) body(state, i);
}

}  // namespace owl

#endif  // OWL_DEPLOY_PARALLEL_FOR_H_
