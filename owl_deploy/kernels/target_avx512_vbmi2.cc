// SPDX-License-Identifier: Apache-2.0
#define OWL_TARGET avx512_vbmi2
#define OWL_KERNELS kAvx512Vbmi2Kernels
#define OWL_VBMI2 1

#include "lanes-tables.h"

namespace owl::avx512_vbmi2 {
static constexpr char kName[] = "avx512-vbmi2";
}

#include "lanes-avx512.h"
#include "target-inl.h"
