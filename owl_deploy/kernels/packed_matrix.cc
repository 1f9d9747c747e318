// The check of a packed matrix, rule by rule in the order of FORMAT.md.
//
// SPDX-License-Identifier: Apache-2.0
#include "packed_matrix.h"

#include <cstring>

namespace owl {
namespace {

constexpr char kMagic[8] = {'O', 'W', 'L', 'S', 'P', 'M', 'M', '\0'};
constexpr uint64_t kHeaderBytes = 64;
constexpr uint64_t kCodebookBytes = 16;
constexpr uint64_t kMaxDimension = 0x7fffffff;
constexpr uint64_t kMaxIndexedColumns = 65536;
constexpr char kMagicHex[] = "4f 57 4c 53 50 4d 4d 00";

template <typename T>
T Load(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// Sizes are at most 2^33 here, so that no sum below wraps around.
uint64_t RoundUp(uint64_t n, uint64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

uint64_t BytesOfValues(ValueType type, uint64_t n) {
  switch (type) {
    case ValueType::kFloat32:
      return 4 * n;
    case ValueType::kFloat16:
    case ValueType::kBFloat16:
      return 2 * n;
    case ValueType::kInt8:
      return n;
    case ValueType::kInt4:
      return n / kNibbleRun * (kNibbleRun / 2) + (n % kNibbleRun + 1) / 2;
  }
  return 0;
}

std::string Text(uint64_t number) { return std::to_string(number); }

std::string Refuse(const std::string& what) { return "packed matrix: " + what; }

std::string RefuseField(const char* name, uint64_t found, const std::string& expected) {
  return Refuse(std::string(name) + " is " + Text(found) + " and should be " + expected);
}

std::string Hex(const uint8_t* bytes, size_t n) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < n; ++i) {
    if (i > 0) text += ' ';
    text += kDigits[bytes[i] >> 4];
    text += kDigits[bytes[i] & 15];
  }
  return text;
}

bool IsFinite(uint32_t float_bits) { return (float_bits & 0x7f800000u) != 0x7f800000u; }

// One record, which lies inside the matrix: its bytes, and what to call it.
struct Record {
  const uint8_t* begin;
  uint64_t n_bytes;
  uint64_t row;
};

std::string RefuseLength(const Record& record, const char* why, uint64_t expected) {
  return Refuse("row " + Text(record.row) + " takes " + Text(record.n_bytes) + " bytes and " + why + " " +
                Text(expected));
}

std::string CheckBitmaskRecord(const PackedMatrix& w, const Record& record, uint64_t* n_stored) {
  const uint64_t mask_bytes = 8 * static_cast<uint64_t>(w.n_blocks());
  const uint64_t least = RoundUp(mask_bytes + w.n_groups(), 8);
  if (record.n_bytes < least) return RefuseLength(record, "its masks and group scales alone take", least);
  uint64_t n = 0;
  for (uint64_t offset = 0; offset < mask_bytes; offset += 8) {
    n += static_cast<uint64_t>(__builtin_popcountll(Load<uint64_t>(record.begin + offset)));
  }
  const unsigned n_last = static_cast<unsigned>(w.n_columns % kBlock);
  if (n_last != 0) {
    const uint64_t beyond = Load<uint64_t>(record.begin + mask_bytes - 8) >> n_last;
    if (beyond != 0) {
      const uint64_t column = w.n_columns + static_cast<uint64_t>(__builtin_ctzll(beyond));
      return Refuse("the masks of row " + Text(record.row) + " store column " + Text(column) + " of " +
                    Text(w.n_columns));
    }
  }
  const uint64_t n_bytes = RoundUp(mask_bytes + w.n_groups() + BytesOfValues(w.value_type, n), 8);
  if (record.n_bytes != n_bytes) return RefuseLength(record, "its masks say", n_bytes);
  *n_stored = n;
  return "";
}

std::string CheckIndex16Record(const PackedMatrix& w, const Record& record, uint64_t* n_stored) {
  if (record.n_bytes < 8) return RefuseLength(record, "its count alone takes", 8);
  const uint64_t n = Load<uint32_t>(record.begin);
  if (n > w.n_columns) {
    return Refuse("row " + Text(record.row) + " stores " + Text(n) + " values and has " + Text(w.n_columns) +
                  " columns");
  }
  const uint64_t n_bytes = RoundUp(RoundUp(4 + 2 * n, 4) + BytesOfValues(w.value_type, n), 8);
  if (record.n_bytes != n_bytes) return RefuseLength(record, "its count says", n_bytes);
  const uint8_t* columns = record.begin + 4;
  uint64_t next = 0;  // the least column that may follow
  for (uint64_t i = 0; i < n; ++i) {
    const uint64_t column = Load<uint16_t>(columns + 2 * i);
    if (column < next) {
      return Refuse("row " + Text(record.row) + " stores column " + Text(column) + " behind column " + Text(next - 1) +
                    ", and columns should ascend");
    }
    next = column + 1;
  }
  if (next > w.n_columns) {
    return Refuse("row " + Text(record.row) + " stores column " + Text(next - 1) + " of " + Text(w.n_columns));
  }
  *n_stored = n;
  return "";
}

std::string CheckRecords(const PackedMatrix& w, uint64_t records_offset) {
  const uint64_t records_end = w.total_bytes - kSlack;
  const uint64_t first = 8 * static_cast<uint64_t>(Load<uint32_t>(w.row_starts));
  if (first != records_offset) return RefuseField("the start of row 0", first, Text(records_offset));
  const uint64_t end_of_last = 8 * static_cast<uint64_t>(Load<uint32_t>(w.row_starts + 4 * w.n_rows));
  if (end_of_last != records_end) {
    return RefuseField("the end of the last row", end_of_last, Text(records_end) + ", 64 bytes before the end");
  }
  const uint64_t dense_bytes = RoundUp(w.n_groups() + BytesOfValues(w.value_type, w.n_columns), 8);
  uint64_t n_values = 0;
  uint64_t begin = first;
  for (uint64_t row = 0; row < w.n_rows; ++row) {
    const uint64_t end = 8 * static_cast<uint64_t>(Load<uint32_t>(w.row_starts + 4 * (row + 1)));
    if (end < begin || end > records_end) {
      return Refuse("row " + Text(row) + " ends at byte " + Text(end) + " and should end between bytes " + Text(begin) +
                    " and " + Text(records_end));
    }
    const Record record = {w.data + begin, end - begin, row};
    uint64_t n_stored = w.n_columns;
    std::string refusal;
    switch (w.encoding) {
      case Encoding::kDense:
        if (record.n_bytes != dense_bytes) refusal = RefuseLength(record, "its columns say", dense_bytes);
        break;
      case Encoding::kBitmask:
        refusal = CheckBitmaskRecord(w, record, &n_stored);
        break;
      case Encoding::kIndex16:
        refusal = CheckIndex16Record(w, record, &n_stored);
        break;
    }
    if (!refusal.empty()) return refusal;
    n_values += n_stored;
    begin = end;
  }
  if (n_values != w.n_values) return RefuseField("n_values", w.n_values, Text(n_values) + ", what the rows store");
  return "";
}

std::string CheckRowScales(const PackedMatrix& w) {
  if (w.row_scales == nullptr) return "";
  for (uint64_t row = 0; row < w.n_rows; ++row) {
    const uint32_t bits = Load<uint32_t>(w.row_scales + 4 * row);
    if (!IsFinite(bits)) {
      const char* name = (bits & 0x007fffffu) != 0 ? "NaN" : "infinite";
      return Refuse("the scale of row " + Text(row) + " is " + name + " and should be finite");
    }
  }
  return "";
}

}  // namespace

size_t PackedMatrix::record_offset(size_t row) const {
  return static_cast<size_t>(Load<uint32_t>(row_starts + 4 * row)) * 8;
}

size_t ValueBytes(ValueType type, size_t n) { return static_cast<size_t>(BytesOfValues(type, n)); }

std::string OpenPackedMatrix(const void* data, size_t size, PackedMatrix* matrix) {
  if (data == nullptr) return Refuse("there are no bytes");
  if (size < kHeaderBytes) return Refuse("there are " + Text(size) + " bytes and a header alone takes 64");
  const uint8_t* header = static_cast<const uint8_t*>(data);

  if (std::memcmp(header, kMagic, sizeof(kMagic)) != 0) {
    return Refuse("the first bytes are " + Hex(header, sizeof(kMagic)) + " and should be " + kMagicHex);
  }
  const uint32_t version = Load<uint32_t>(header + 8);
  if (version != 1) return RefuseField("version", version, "1");
  const uint8_t value_type = header[12];
  if (value_type > static_cast<uint8_t>(ValueType::kInt4)) return RefuseField("value_type", value_type, "0 to 4");
  const uint8_t encoding = header[13];
  if (encoding > static_cast<uint8_t>(Encoding::kIndex16)) return RefuseField("encoding", encoding, "0 to 2");

  PackedMatrix w;
  w.data = header;
  w.value_type = static_cast<ValueType>(value_type);
  w.encoding = static_cast<Encoding>(encoding);
  const bool is_scaled = w.value_type == ValueType::kInt8 || w.value_type == ValueType::kInt4;
  const bool is_index16 = w.encoding == Encoding::kIndex16;
  if (is_index16 && w.value_type == ValueType::kInt4) {
    return RefuseField("value_type", value_type, "0 to 3 in index16");
  }

  const uint16_t group = Load<uint16_t>(header + 14);
  if (group % kBlock != 0) return RefuseField("group", group, "a multiple of 64");
  if (group != 0 && !is_scaled) return RefuseField("group", group, "0 for floats");
  if (group != 0 && is_index16) return RefuseField("group", group, "0 in index16");
  const uint64_t n_rows = Load<uint64_t>(header + 16);
  if (n_rows < 1 || n_rows > kMaxDimension) return RefuseField("n_rows", n_rows, "1 to 2147483647");
  const uint64_t n_columns = Load<uint64_t>(header + 24);
  const uint64_t max_columns = is_index16 ? kMaxIndexedColumns : kMaxDimension;
  if (n_columns < 1 || n_columns > max_columns) {
    return RefuseField("n_columns", n_columns, "1 to " + Text(max_columns) + (is_index16 ? " in index16" : ""));
  }
  const uint64_t n_values = Load<uint64_t>(header + 32);
  if (w.encoding == Encoding::kDense && n_values != n_rows * n_columns) {  // less than 2^62
    return RefuseField("n_values", n_values, Text(n_rows * n_columns) + ", rows times columns");
  }
  const uint64_t reserved = Load<uint64_t>(header + 56);
  if (reserved != 0) return RefuseField("the reserved number", reserved, "0");

  const uint64_t row_scales_offset = RoundUp(kHeaderBytes + 4 * (n_rows + 1), 64);
  const uint64_t codebook_offset = RoundUp(row_scales_offset + (is_scaled ? 4 * n_rows : 0), 64);
  const bool has_codebook = w.value_type == ValueType::kInt4;
  const uint64_t records_offset = RoundUp(codebook_offset + (has_codebook ? kCodebookBytes : 0), 64);
  const uint64_t found_offset = Load<uint64_t>(header + 40);
  if (found_offset != records_offset) return RefuseField("records_offset", found_offset, Text(records_offset));
  const uint64_t total_bytes = Load<uint64_t>(header + 48);
  if (total_bytes != size) return RefuseField("total_bytes", total_bytes, Text(size) + ", the bytes there are");
  if (total_bytes < records_offset + kSlack) {
    return Refuse("there are " + Text(size) +
                  " bytes and everything before the first row, with 64 behind the last, takes " +
                  Text(records_offset + kSlack));
  }

  w.group = group;
  w.n_rows = static_cast<size_t>(n_rows);
  w.n_columns = static_cast<size_t>(n_columns);
  w.n_values = static_cast<size_t>(n_values);
  w.total_bytes = size;
  w.row_starts = header + kHeaderBytes;
  if (is_scaled) w.row_scales = header + row_scales_offset;
  if (has_codebook) w.codebook = reinterpret_cast<const int8_t*>(header + codebook_offset);

  std::string refusal = CheckRowScales(w);
  if (refusal.empty()) refusal = CheckRecords(w, records_offset);
  if (refusal.empty()) *matrix = w;
  return refusal;
}

}  // namespace owl
