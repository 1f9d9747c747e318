// A packed weight matrix, as FORMAT.md lays it out: what a reader may ask of it, and the check that
// makes every later access safe. Knows nothing of arithmetic, threads or ONNX Runtime.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_PACKED_MATRIX_H_
#define OWL_DEPLOY_PACKED_MATRIX_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace owl {

enum class ValueType : uint8_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kInt4 = 4 };
enum class Encoding : uint8_t { kDense = 0, kBitmask = 1, kIndex16 = 2 };

constexpr size_t kBlock = 64;       // columns of one mask word, and of two activation scales
constexpr size_t kSlack = 64;       // bytes behind the last record, so that a 64-byte load never leaves the matrix
constexpr size_t kNibbleRun = 128;  // int4 codes that lie interleaved in 64 bytes

// A view of bytes that somebody else keeps alive. Only `OpenPackedMatrix` makes one.
struct PackedMatrix {
  const uint8_t* data = nullptr;
  ValueType value_type = ValueType::kFloat32;
  Encoding encoding = Encoding::kDense;
  size_t group = 0;  // columns per group scale; 0: none
  size_t n_rows = 0;
  size_t n_columns = 0;
  size_t n_values = 0;
  size_t total_bytes = 0;
  const uint8_t* row_starts = nullptr;  // uint32 in units of 8 bytes
  const uint8_t* row_scales = nullptr;  // float32; null for float types
  const int8_t* codebook = nullptr;     // int8 x 16; null unless int4

  size_t n_blocks() const { return (n_columns + kBlock - 1) / kBlock; }
  size_t n_groups() const { return group == 0 ? 0 : (n_columns + group - 1) / group; }
  // Where record `row` begins; `row` may be n_rows, which gives the end of the last one.
  size_t record_offset(size_t row) const;
};

// Bytes that `n` values of a type take in a record.
size_t ValueBytes(ValueType type, size_t n);

// Checks every number that a reader will follow: version, sizes, row starts, masks against the lengths
// of their records, ascending columns, finite scales. Reads the header, the sections and the masks or
// columns; never the values.
//
// Returns an empty string and fills `matrix`, or one sentence that says what is wrong.
std::string OpenPackedMatrix(const void* data, size_t size, PackedMatrix* matrix);

}  // namespace owl

#endif  // OWL_DEPLOY_PACKED_MATRIX_H_
