// SPDX-License-Identifier: Apache-2.0
#define OWL_TARGET neon
#define OWL_KERNELS kNeonKernels

#include "lanes-tables.h"

namespace owl::neon {
static constexpr char kName[] = "neon";
}

#include "lanes-neon.h"
#include "lanes-plain.h"
#include "target-inl.h"
