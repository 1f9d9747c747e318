// Y = X W^T for a packed W: the interface that hides which instructions are used.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_SPARSE_MATMUL_H_
#define OWL_DEPLOY_SPARSE_MATMUL_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "packed_matrix.h"
#include "parallel_for.h"

namespace owl {

// Rows of W where the work is cut, so that all pieces move about the same number of bytes: piece i is
// rows [cuts[i], cuts[i + 1]). Made once per matrix.
std::vector<uint32_t> CutRows(const PackedMatrix& w);

// Y = X W^T (+ bias).
//
// x: (m, w.n_columns) float32, rows one after the other. y: (m, w.n_rows) float32. bias: (w.n_rows), or null.
// int8 and int4 weights multiply X rounded to int8 per row and 32 columns (not in index16).
// Sums are kept in float32, blocks of int8 products in int32. Does not throw, but for std::bad_alloc.
void SparseMatMul(const PackedMatrix& w, const std::vector<uint32_t>& cuts, const float* x, size_t m, const float* bias,
                  float* y, ParallelFor parallel_for, void* pool);

// Instruction sets this binary was built for and this machine has, best first; the last one is "portable".
std::vector<std::string> AvailableTargets();

// The instruction set in use: the best available one, or what the environment variable OWL_KERNEL_TARGET names.
// Chosen at the first call of anything here; `error` (may be null) gets a sentence when the variable names a target
// that this machine or binary does not have, and the result is then empty.
std::string ChosenTarget(std::string* error);

// Uses another target from now on (tests and benchmarks). False when it is not available.
bool ForceTarget(const std::string& name);

}  // namespace owl

#endif  // OWL_DEPLOY_SPARSE_MATMUL_H_
