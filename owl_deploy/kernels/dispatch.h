// The one place that asks the processor what it can do.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_DISPATCH_H_
#define OWL_DEPLOY_DISPATCH_H_

#include "kernels.h"

namespace owl {

// The table in use. See ChosenTarget in sparse_matmul.h.
const Kernels& CurrentKernels();

}  // namespace owl

#endif  // OWL_DEPLOY_DISPATCH_H_
