// SPDX-License-Identifier: Apache-2.0
#define OWL_TARGET neon
#define OWL_KERNELS kNeonKernels

#include "lanes-tables.h"

namespace owl::neon {
static constexpr char kName[] = "neon";
}

#include "lanes-lists.h"
#include "lanes-neon.h"
#include "sparse_matmul-inl.h"
