// What is not a packed matrix is refused with a sentence; what is accepted can be multiplied, whatever its bytes are.
// Small matrices of every kind, each damaged in every byte; with AddressSanitizer this shows that nothing outside is
// ever read.
//
//   packed_matrix_test [share]     share: damage every share-th byte only, for emulators (default 1)
//
// SPDX-License-Identifier: Apache-2.0
#include "packed_matrix.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "sparse_matmul.h"
#include "test_packer.h"

namespace owl_test {
namespace {

int n_failures = 0;

void Fail(const std::string& where, const std::string& what) {
  std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
  if (++n_failures >= 20) {
    std::printf("FAILED: stopped after 20 failures\n");
    std::exit(1);
  }
}

template <typename T>
void Put(std::vector<uint8_t>* bytes, size_t offset, T value) {
  std::memcpy(bytes->data() + offset, &value, sizeof(value));
}

template <typename T>
T Get(const std::vector<uint8_t>& bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

std::string Open(const std::vector<uint8_t>& bytes, owl::PackedMatrix* w) {
  const ExactBytes exact(bytes);
  return owl::OpenPackedMatrix(exact.data(), exact.size(), w);
}

std::string Refusal(const std::vector<uint8_t>& bytes) {
  owl::PackedMatrix w;
  return Open(bytes, &w);
}

bool IsSentence(const std::string& text) {
  return text.size() > 24 && text.rfind("packed matrix: ", 0) == 0 && text.find('\n') == std::string::npos;
}

struct Counts {
  size_t n_refused = 0;
  size_t n_accepted = 0;
};

// Opens the bytes as they are and, when they are accepted, multiplies. Damage to n_columns can go unnoticed where
// nothing depends on it: the masks or columns fit another width just as well.
void OpenAndMultiply(const std::string& where, const std::vector<uint8_t>& bytes, const Shape& shape, bool may_widen,
                     Counts* counts) {
  const ExactBytes exact(bytes);
  owl::PackedMatrix w;
  const std::string refusal = owl::OpenPackedMatrix(exact.data(), exact.size(), &w);
  if (!refusal.empty()) {
    ++counts->n_refused;
    if (!IsSentence(refusal)) Fail(where, "the refusal is no sentence: " + refusal);
    if (w.data != nullptr) Fail(where, "was refused and filled in all the same");
    return;
  }
  ++counts->n_accepted;
  if (w.n_rows != shape.n_rows || (w.n_columns != shape.n_columns && !may_widen)) {
    Fail(where, "was accepted as " + std::to_string(w.n_rows) + " x " + std::to_string(w.n_columns));
    return;
  }
  static const std::vector<std::string> targets = owl::AvailableTargets();
  owl::ForceTarget(targets[counts->n_accepted % targets.size()]);
  const std::vector<uint32_t> cuts = owl::CutRows(w);
  for (const size_t m : {1, 20}) {
    const std::unique_ptr<float[]> x(new float[m * w.n_columns]), y(new float[m * w.n_rows]);
    for (size_t i = 0; i < m * w.n_columns; ++i) x[i] = static_cast<float>(i % 11) - 5.0f;
    owl::SparseMatMul(w, cuts, x.get(), m, nullptr, y.get(), owl::SerialFor, nullptr);
  }
}

// Bytes of n_columns, which may change unnoticed where columns are listed or masked.
bool MayWiden(const Shape& shape, size_t byte) {
  return shape.kind.encoding != Encoding::kDense && byte >= 24 && byte < 32;
}

void DamageEveryByte(const Shape& shape, size_t share, Counts* counts) {
  Random random(3);
  const TestMatrix matrix = MakeMatrix(shape, &random);
  const std::string name = shape.kind.name();
  owl::PackedMatrix w;
  const std::string refusal = Open(matrix.bytes, &w);
  if (!refusal.empty()) return Fail(name, refusal);
  if (w.n_rows != shape.n_rows || w.n_columns != shape.n_columns || w.n_values != matrix.n_values ||
      w.value_type != shape.kind.type || w.encoding != shape.kind.encoding || w.group != shape.kind.group ||
      w.total_bytes != matrix.bytes.size() || (w.row_scales != nullptr) != shape.kind.is_scaled() ||
      (w.codebook != nullptr) != (shape.kind.type == ValueType::kInt4)) {
    Fail(name, "was opened as something else");
  }

  for (size_t byte = 0; byte < matrix.bytes.size(); byte += share) {
    std::vector<uint8_t> damaged = matrix.bytes;
    const auto check = [&](uint8_t value, const char* how) {
      damaged[byte] = value;
      const std::string where = name + ", byte " + std::to_string(byte) + " " + how + " " + std::to_string(value);
      OpenAndMultiply(where, damaged, shape, MayWiden(shape, byte), counts);
    };
    for (int bit = 0; bit < 8; ++bit) check(static_cast<uint8_t>(matrix.bytes[byte] ^ (1 << bit)), "flipped to");
    check(0x00, "set to");
    check(0xff, "set to");
  }
  for (size_t size = 0; size < matrix.bytes.size(); ++size) {
    std::vector<uint8_t> cut(matrix.bytes.begin(), matrix.bytes.begin() + static_cast<std::ptrdiff_t>(size));
    const std::string where = name + ", cut to " + std::to_string(size) + " bytes";
    if (!IsSentence(Refusal(cut))) Fail(where, "was accepted");
    if (size < 56) continue;
    Put<uint64_t>(&cut, 48, size);  // and the header says so
    if (!IsSentence(Refusal(cut))) Fail(where + " with total_bytes", "was accepted");
  }
  std::vector<uint8_t> longer = matrix.bytes;
  longer.push_back(0);
  if (!IsSentence(Refusal(longer))) Fail(name + ", one byte more", "was accepted");
}

void ExpectRefusal(const std::vector<uint8_t>& bytes, const std::string& expected) {
  const std::string refusal = Refusal(bytes);
  if (refusal.find(expected) == std::string::npos) {
    Fail("refusal", "\"" + refusal + "\" does not say \"" + expected + "\"");
  }
}

// One broken rule each.
void CheckRefusals() {
  const auto make = [](ValueType type, Encoding encoding, size_t group = 0) {
    Random random(5);
    return MakeMatrix({{type, encoding, group}, 3, 70, 0.5, false}, &random).bytes;
  };
  const auto with = [](std::vector<uint8_t> bytes, size_t offset, auto value) {
    Put(&bytes, offset, value);
    return bytes;
  };
  const std::vector<uint8_t> floats = make(ValueType::kFloat32, Encoding::kBitmask);
  const std::vector<uint8_t> columns = make(ValueType::kFloat32, Encoding::kIndex16);
  const std::vector<uint8_t> bytes = make(ValueType::kInt8, Encoding::kBitmask, 64);
  const std::vector<uint8_t> dense = make(ValueType::kInt4, Encoding::kDense);
  const size_t records = 128;  // of the matrices of floats
  const size_t row1 = 8 * Get<uint32_t>(columns, 64 + 4);

  owl::PackedMatrix w;
  if (!IsSentence(owl::OpenPackedMatrix(nullptr, 0, &w))) Fail("null", "was accepted");
  if (!IsSentence(owl::OpenPackedMatrix(nullptr, 4096, &w))) Fail("null", "was accepted");
  ExpectRefusal({}, "there are 0 bytes and a header alone takes 64");
  ExpectRefusal(with(floats, 0, 'o'), "6f 57 4c 53 50 4d 4d 00 and should be 4f");
  ExpectRefusal(with(floats, 8, uint32_t{2}), "version is 2 and should be 1");
  ExpectRefusal(with(floats, 12, uint8_t{5}), "value_type is 5");
  ExpectRefusal(with(floats, 13, uint8_t{3}), "encoding is 3");
  ExpectRefusal(with(columns, 12, uint8_t{4}), "value_type is 4 and should be 0 to 3 in index16");
  ExpectRefusal(with(bytes, 14, uint16_t{63}), "group is 63 and should be a multiple of 64");
  ExpectRefusal(with(floats, 14, uint16_t{64}), "group is 64 and should be 0 for floats");
  ExpectRefusal(with(make(ValueType::kInt8, Encoding::kIndex16), 14, uint16_t{64}), "should be 0 in index16");
  for (const uint64_t hostile : {uint64_t{0}, uint64_t{1} << 31, uint64_t{1} << 62, ~uint64_t{0}}) {
    ExpectRefusal(with(floats, 16, hostile), "n_rows is " + std::to_string(hostile) + " and should be 1 to");
    ExpectRefusal(with(floats, 24, hostile), "n_columns is " + std::to_string(hostile) + " and should be 1 to");
  }
  const uint64_t largest = 0x7fffffff;
  ExpectRefusal(with(floats, 16, largest), "records_offset is 128 and should be 8589934656");
  ExpectRefusal(with(floats, 24, largest), "its masks and group scales alone take 268435456");
  ExpectRefusal(with(with(dense, 16, largest), 24, largest), "n_values is 210 and should be 4611686014132420609");
  std::vector<uint8_t> huge = with(with(dense, 16, largest), 24, largest);
  huge = with(huge, 32, largest * largest);
  ExpectRefusal(with(with(huge, 40, uint64_t{17179869376}), 48, ~uint64_t{0}), "should be 17179869");
  ExpectRefusal(with(columns, 24, uint64_t{65537}), "n_columns is 65537 and should be 1 to 65536 in index16");
  ExpectRefusal(with(columns, 24, uint64_t{60}), " of 60");
  ExpectRefusal(with(dense, 32, uint64_t{209}), "n_values is 209 and should be 210, rows times columns");
  ExpectRefusal(with(floats, 32, uint64_t{1}), "what the rows store");
  ExpectRefusal(with(floats, 40, uint64_t{192}), "records_offset is 192 and should be 128");
  ExpectRefusal(with(floats, 48, uint64_t{1} << 63), "total_bytes is 9223372036854775808 and should be ");
  ExpectRefusal(with(floats, 56, uint64_t{1}), "the reserved number is 1");
  ExpectRefusal(with(floats, 64, uint32_t{17}), "the start of row 0 is 136 and should be 128");
  ExpectRefusal(with(floats, 68, uint32_t{15}), "row 0 ends at byte 120 and should end between bytes 128 and");
  ExpectRefusal(with(floats, 68, ~uint32_t{0}), "row 0 ends at byte 34359738360 and should end between");
  ExpectRefusal(with(floats, 68, uint32_t{17}), "row 0 takes 8 bytes and its masks and group scales alone take 16");
  ExpectRefusal(with(floats, 76, uint32_t{16}), "the end of the last row is 128 and should be ");
  ExpectRefusal(with(floats, records, uint64_t{0}), "bytes and its masks say ");
  ExpectRefusal(with(floats, records + 8, Get<uint64_t>(floats, records + 8) | uint64_t{1} << 6),
                "the masks of row 0 store column 70 of 70");
  ExpectRefusal(with(columns, row1, uint32_t{1}), "bytes and its count says 16");
  ExpectRefusal(with(columns, row1, ~uint32_t{0}), "row 1 stores 4294967295 values and has 70 columns");
  ExpectRefusal(with(columns, row1 + 4, Get<uint16_t>(columns, row1 + 6)), "and columns should ascend");
  const size_t n_in_row1 = Get<uint32_t>(columns, row1);
  ExpectRefusal(with(columns, row1 + 2 + 2 * n_in_row1, uint16_t{70}), "row 1 stores column 70 of 70");
  ExpectRefusal(with(bytes, 128 + 4, uint32_t{0x7f800000}), "the scale of row 1 is infinite");
  ExpectRefusal(with(bytes, 128 + 8, uint32_t{0xffc00000}), "the scale of row 2 is NaN");
}

int Main(size_t share) {
  CheckRefusals();
  Counts counts;
  for (const Kind& kind : AllKinds()) {
    DamageEveryByte({kind, 3, 70, 0.5, false}, share, &counts);
    DamageEveryByte({kind, 2, 129, 0.9, true}, share, &counts);
  }
  std::printf("packed matrices: %zu damaged ones refused, %zu accepted and multiplied\n", counts.n_refused,
              counts.n_accepted);
  return n_failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace owl_test

int main(int argc, char** argv) {
  const long share = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 1;
  return owl_test::Main(share < 1 ? 1 : static_cast<size_t>(share));
}
