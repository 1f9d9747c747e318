// SPDX-License-Identifier: Apache-2.0
#define OWL_TARGET portable
#define OWL_KERNELS kPortableKernels

#include "lanes-tables.h"

namespace owl::portable {
static constexpr char kName[] = "portable";
}

#include "lanes-plain.h"
#include "lanes-portable.h"
#include "target-inl.h"
