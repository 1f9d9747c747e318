// SPDX-License-Identifier: Apache-2.0
#define OWL_TARGET avx2
#define OWL_KERNELS kAvx2Kernels

#include "lanes-tables.h"

namespace owl::avx2 {
static constexpr char kName[] = "avx2";
}

#include "lanes-avx2.h"
#include "lanes-plain.h"
#include "target-inl.h"
