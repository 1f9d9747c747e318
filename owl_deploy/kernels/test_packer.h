// Random packed matrices for the tests, written from FORMAT.md alone: shares no code with the reader it tests.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef OWL_DEPLOY_TEST_PACKER_H_
#define OWL_DEPLOY_TEST_PACKER_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "packed_matrix.h"

namespace owl_test {

using owl::Encoding;
using owl::ValueType;

using Random = std::mt19937_64;  // its numbers are the same everywhere, unlike those of the standard distributions

inline uint64_t Below(Random* random, uint64_t n) { return (*random)() % n; }
inline double Uniform(Random* random) { return static_cast<double>((*random)() >> 11) * 0x1p-53; }  // [0, 1)

struct Kind {
  ValueType type;
  Encoding encoding;
  size_t group;

  bool is_scaled() const { return type == ValueType::kInt8 || type == ValueType::kInt4; }
  bool rounds_x() const { return is_scaled() && encoding != Encoding::kIndex16; }
  std::string name() const {
    static const char* const kTypes[] = {"float32", "float16", "bfloat16", "int8", "int4"};
    static const char* const kEncodings[] = {"dense", "bitmask", "index16"};
    std::string text = std::string(kTypes[static_cast<int>(type)]) + " " + kEncodings[static_cast<int>(encoding)];
    if (group != 0) text += " group " + std::to_string(group);
    return text;
  }
};

inline std::vector<Kind> AllKinds() {
  std::vector<Kind> kinds;
  for (const ValueType type :
       {ValueType::kFloat32, ValueType::kFloat16, ValueType::kBFloat16, ValueType::kInt8, ValueType::kInt4}) {
    for (const Encoding encoding : {Encoding::kDense, Encoding::kBitmask, Encoding::kIndex16}) {
      for (const size_t group : {0, 64, 128, 192}) {
        const Kind kind = {type, encoding, group};
        if (group != 0 && !kind.rounds_x()) continue;
        if (type == ValueType::kInt4 && encoding == Encoding::kIndex16) continue;
        kinds.push_back(kind);
      }
    }
  }
  return kinds;
}

struct Shape {
  Kind kind;
  size_t n_rows;
  size_t n_columns;
  double density;
  bool has_empty_rows;
};

// Bytes that end where the heap block ends, so that AddressSanitizer sees the first byte read beyond them.
class ExactBytes {
 public:
  explicit ExactBytes(const std::vector<uint8_t>& bytes, size_t offset = 0)
      : block_(new uint8_t[offset + bytes.size()]), offset_(offset), size_(bytes.size()) {
    if (!bytes.empty()) std::memcpy(block_.get() + offset, bytes.data(), bytes.size());
  }
  const uint8_t* data() const { return block_.get() + offset_; }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<uint8_t[]> block_;
  size_t offset_;
  size_t size_;
};

struct TestMatrix {
  std::vector<uint8_t> bytes;
  std::vector<double> weights;  // (n_rows, n_columns), zero where nothing is stored
  size_t n_values = 0;
};

template <typename T>
void Append(std::vector<uint8_t>* bytes, T value) {
  uint8_t raw[sizeof(T)];
  std::memcpy(raw, &value, sizeof(T));
  bytes->insert(bytes->end(), raw, raw + sizeof(T));
}

inline void PadTo(std::vector<uint8_t>* bytes, size_t multiple) {
  while (bytes->size() % multiple != 0) bytes->push_back(0);
}

// The raw number of one stored weight, and what it means before scales.
struct Value {
  uint32_t raw;
  double meaning;
};

inline Value RandomValue(ValueType type, const int8_t* codebook, Random* random) {
  switch (type) {
    case ValueType::kFloat32: {
      const float value =
          static_cast<float>((Uniform(random) - 0.5) * std::ldexp(1.0, static_cast<int>(Below(random, 6))));
      uint32_t raw;
      std::memcpy(&raw, &value, 4);
      return {raw, value};
    }
    case ValueType::kFloat16: {
      const uint32_t sign = static_cast<uint32_t>(Below(random, 2)),
                     mantissa = static_cast<uint32_t>(Below(random, 1024));
      // Every sixteenth one subnormal, the others between 2^-6 and 2^2.
      const uint32_t exponent = Below(random, 16) == 0 ? 0 : static_cast<uint32_t>(9 + Below(random, 8));
      const double size =
          exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, static_cast<int>(exponent) - 25);
      return {sign << 15 | exponent << 10 | mantissa, sign != 0 ? -size : size};
    }
    case ValueType::kBFloat16: {
      const uint32_t sign = static_cast<uint32_t>(Below(random, 2)),
                     mantissa = static_cast<uint32_t>(Below(random, 128));
      const uint32_t exponent = static_cast<uint32_t>(121 + Below(random, 8));
      const double size = std::ldexp(128 + mantissa, static_cast<int>(exponent) - 134);
      return {sign << 15 | exponent << 7 | mantissa, sign != 0 ? -size : size};
    }
    case ValueType::kInt8: {
      const int value = static_cast<int>(Below(random, 255)) - 127;
      return {static_cast<uint8_t>(value), static_cast<double>(value)};
    }
    case ValueType::kInt4: {
      const uint32_t code = static_cast<uint32_t>(Below(random, 16));
      return {code, static_cast<double>(codebook[code])};
    }
  }
  return {0, 0};
}

// A value that weighs nothing, for the zeros of a dense matrix.
inline Value ZeroValue(ValueType type, const int8_t* codebook) {
  if (type != ValueType::kInt4) return {0, 0};
  uint32_t code = 0;
  while (codebook[code] != 0) ++code;
  return {code, 0};
}

inline void AppendValues(std::vector<uint8_t>* bytes, ValueType type, const std::vector<uint32_t>& raws) {
  if (type != ValueType::kInt4) {
    for (const uint32_t raw : raws) {
      if (type == ValueType::kFloat32) Append<uint32_t>(bytes, raw);
      if (type == ValueType::kFloat16 || type == ValueType::kBFloat16)
        Append<uint16_t>(bytes, static_cast<uint16_t>(raw));
      if (type == ValueType::kInt8) Append<uint8_t>(bytes, static_cast<uint8_t>(raw));
    }
    return;
  }
  for (size_t begin = 0; begin < raws.size(); begin += 128) {
    const size_t c = raws.size() - begin < 128 ? raws.size() - begin : 128, h = (c + 1) / 2;
    for (size_t j = 0; j < h; ++j) {
      const uint32_t high = h + j < c ? raws[begin + h + j] : 0;
      bytes->push_back(static_cast<uint8_t>(raws[begin + j] | high << 4));
    }
  }
}

inline TestMatrix MakeMatrix(const Shape& shape, Random* random) {
  const size_t N = shape.n_rows, K = shape.n_columns, group = shape.kind.group;
  const ValueType type = shape.kind.type;
  const Encoding encoding = shape.kind.encoding;
  TestMatrix matrix;
  matrix.weights.assign(N * K, 0.0);

  int8_t codebook[16];
  for (int i = 0; i < 16; ++i) codebook[i] = static_cast<int8_t>(static_cast<int>(Below(random, 255)) - 127);
  codebook[Below(random, 8)] = -127;
  codebook[8 + Below(random, 4)] = 127;
  codebook[12 + Below(random, 4)] = 0;

  std::vector<float> row_scales(N);
  for (float& scale : row_scales) scale = static_cast<float>(Uniform(random) * 0.02 + 1e-4);
  if (N > 4) row_scales[2] = -row_scales[2];
  if (N > 6) row_scales[5] = 0.0f;

  std::vector<uint8_t> records;
  std::vector<uint64_t> starts;
  for (size_t r = 0; r < N; ++r) {
    starts.push_back(records.size());
    std::vector<uint8_t> group_scales(group == 0 ? 0 : (K + group - 1) / group);
    for (uint8_t& scale : group_scales) scale = static_cast<uint8_t>(Below(random, 256));

    const double density = shape.has_empty_rows && r % 3 == 1 ? 0.0 : shape.density;
    std::vector<uint32_t> raws;
    std::vector<size_t> columns;
    for (size_t k = 0; k < K; ++k) {
      const bool is_drawn = Uniform(random) < density;
      if (!is_drawn && encoding != Encoding::kDense) continue;
      const Value value = is_drawn ? RandomValue(type, codebook, random) : ZeroValue(type, codebook);
      raws.push_back(value.raw);
      columns.push_back(k);
      double weight = value.meaning;
      if (shape.kind.is_scaled()) weight *= static_cast<double>(row_scales[r]);
      if (group != 0) weight *= group_scales[k / group];
      matrix.weights[r * K + k] = weight;
    }
    matrix.n_values += raws.size();

    switch (encoding) {
      case Encoding::kDense:
        records.insert(records.end(), group_scales.begin(), group_scales.end());
        AppendValues(&records, type, raws);
        break;
      case Encoding::kBitmask: {
        std::vector<uint64_t> masks((K + 63) / 64, 0);
        for (const size_t k : columns) masks[k / 64] |= uint64_t{1} << (k % 64);
        for (const uint64_t mask : masks) Append<uint64_t>(&records, mask);
        records.insert(records.end(), group_scales.begin(), group_scales.end());
        AppendValues(&records, type, raws);
        break;
      }
      case Encoding::kIndex16:
        Append<uint32_t>(&records, static_cast<uint32_t>(columns.size()));
        for (const size_t k : columns) Append<uint16_t>(&records, static_cast<uint16_t>(k));
        PadTo(&records, 4);
        AppendValues(&records, type, raws);
        break;
    }
    PadTo(&records, 8);
  }
  starts.push_back(records.size());

  // Sections before the records; their sizes are known, so the offset of the records is.
  std::vector<uint8_t> sections;
  sections.resize((N + 1) * 4);
  PadTo(&sections, 64);
  if (shape.kind.is_scaled()) {
    for (const float scale : row_scales) Append<float>(&sections, scale);
    PadTo(&sections, 64);
  }
  if (type == ValueType::kInt4) {
    for (const int8_t entry : codebook) sections.push_back(static_cast<uint8_t>(entry));
    PadTo(&sections, 64);
  }
  const uint64_t records_offset = 64 + sections.size();
  for (size_t r = 0; r <= N; ++r) {
    const uint32_t start = static_cast<uint32_t>((records_offset + starts[r]) / 8);
    std::memcpy(&sections[4 * r], &start, 4);
  }

  std::vector<uint8_t>& bytes = matrix.bytes;
  for (const char c : {'O', 'W', 'L', 'S', 'P', 'M', 'M', '\0'}) bytes.push_back(static_cast<uint8_t>(c));
  Append<uint32_t>(&bytes, 1);
  Append<uint8_t>(&bytes, static_cast<uint8_t>(type));
  Append<uint8_t>(&bytes, static_cast<uint8_t>(encoding));
  Append<uint16_t>(&bytes, static_cast<uint16_t>(group));
  Append<uint64_t>(&bytes, N);
  Append<uint64_t>(&bytes, K);
  Append<uint64_t>(&bytes, matrix.n_values);
  Append<uint64_t>(&bytes, records_offset);
  Append<uint64_t>(&bytes, records_offset + records.size() + 64);
  Append<uint64_t>(&bytes, 0);
  bytes.insert(bytes.end(), sections.begin(), sections.end());
  bytes.insert(bytes.end(), records.begin(), records.end());
  bytes.resize(bytes.size() + 64, 0);
  return matrix;
}

}  // namespace owl_test

#endif  // OWL_DEPLOY_TEST_PACKER_H_
