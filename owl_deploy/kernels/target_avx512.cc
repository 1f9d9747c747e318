// SPDX-License-Identifier: Apache-2.0
#define OWL_TARGET avx512
#define OWL_KERNELS kAvx512Kernels
#define OWL_VBMI2 0

#include "lanes-tables.h"

namespace owl::avx512 {
static constexpr char kName[] = "avx512";
}

#include "lanes-avx512.h"
#include "lanes-masks.h"
#include "target-inl.h"
