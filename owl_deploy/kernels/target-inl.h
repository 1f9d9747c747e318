// All that a target compiles, and the table of it. A target file defines OWL_TARGET and OWL_KERNELS, includes its lanes
// and then this.
//
// SPDX-License-Identifier: Apache-2.0
#include "attention-inl.h"
#include "gated_linear_unit-inl.h"
#include "sparse_matmul-inl.h"

namespace owl {

extern const Kernels OWL_KERNELS;
const Kernels OWL_KERNELS = {OWL_TARGET::kName,
                             OWL_TARGET::ChooseLayout,
                             OWL_TARGET::Prepare,
                             OWL_TARGET::ScratchBytes,
                             OWL_TARGET::Multiply,
                             OWL_TARGET::PrepareToken,
                             OWL_TARGET::AttentionScratchFloats,
                             OWL_TARGET::Attend,
                             OWL_TARGET::Gate};

}  // namespace owl
