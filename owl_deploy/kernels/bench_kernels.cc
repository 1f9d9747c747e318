// How fast the kernels are beside a dense float32 loop at memory speed. Proves nothing about correctness.
//
//   bench_kernels [--rows N] [--columns K] [--threads T] [--m M[,M...]] [--sparsity S[,S...]] [--bytes B] [--rounds R]
//
// For each number of rows of X, sparsity, value type and encoding: the median time of one product, over matrices that
// are taken in turn so that together they are larger than the caches; GB/s of packed bytes, GFLOP/s of the stored
// values, and the ratio to the dense loop of the same round (for M above 1: to M times that loop's arithmetic, that is
// to this library's own dense float32 product). All cases take turns in every round.
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "packed_matrix.h"
#include "sparse_matmul.h"

namespace {

using owl::Encoding;
using owl::ValueType;

struct Options {
  size_t rows = 4096, columns = 11008, threads = 2, rounds = 9;
  size_t bytes = size_t{192} << 20;  // of dense float32, all matrices of a case together
  std::vector<size_t> m{1};
  std::vector<double> sparsity{0.5, 0.7, 0.8, 0.9};
};

// A pool that spins, as the one of ONNX Runtime does between operators.
class Pool {
 public:
  explicit Pool(size_t n) {
    for (size_t i = 1; i < n; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Pool() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
  }
  static void For(void* pool, size_t n, void (*body)(void*, size_t), void* state) {
    static_cast<Pool*>(pool)->Run(n, body, state);
  }

 private:
  void Run(size_t n, void (*body)(void*, size_t), void* state) {
    body_ = body;
    state_ = state;
    n_ = n;
    next_ = 0;
    busy_ = threads_.size();
    generation_.fetch_add(1, std::memory_order_release);
    Drain();
    while (busy_.load(std::memory_order_acquire) != 0) {
    }
  }
  void Drain() {
    for (size_t i; (i = next_.fetch_add(1)) < n_;) body_(state_, i);
  }
  void Work() {
    size_t seen = 0;
    while (!stop_) {
      const size_t now = generation_.load(std::memory_order_acquire);
      if (now == seen) continue;
      seen = now;
      Drain();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }
  std::vector<std::thread> threads_;
  std::atomic<size_t> generation_{0}, next_{0}, busy_{0};
  std::atomic<bool> stop_{false};
  size_t n_ = 0;
  void (*body_)(void*, size_t) = nullptr;
  void* state_ = nullptr;
};

// A random matrix, written as FORMAT.md says.
std::vector<uint8_t> RandomMatrix(size_t rows, size_t columns, double sparsity, ValueType type, Encoding encoding,
                                  uint64_t seed) {
  std::mt19937_64 random(seed);
  const bool is_int = type == ValueType::kInt8 || type == ValueType::kInt4;
  const size_t blocks = (columns + 63) / 64;
  const size_t group = type == ValueType::kInt4 ? 64 : 0;
  const auto aligned = [](size_t n) { return (n + 63) / 64 * 64; };
  const size_t scales = aligned(64 + 4 * (rows + 1));
  const size_t codebook = is_int ? aligned(scales + 4 * rows) : scales;
  const size_t records = type == ValueType::kInt4 ? codebook + 64 : codebook;
  std::vector<uint8_t> data(records);
  const uint64_t limit = static_cast<uint64_t>((1 - sparsity) * 4294967296.0);
  uint64_t n_values = 0;
  for (size_t r = 0; r < rows; ++r) {
    const uint32_t start = static_cast<uint32_t>(data.size() / 8);
    std::memcpy(&data[64 + 4 * r], &start, 4);
    std::vector<uint64_t> masks(blocks);
    std::vector<uint16_t> list;
    for (size_t k = 0; k < columns; ++k) {
      if (encoding != Encoding::kDense && (random() & 0xFFFFFFFF) >= limit) continue;
      masks[k / 64] |= uint64_t{1} << (k % 64);
      list.push_back(static_cast<uint16_t>(k));
    }
    const auto append = [&](const void* from, size_t n) {
      data.insert(data.end(), static_cast<const uint8_t*>(from), static_cast<const uint8_t*>(from) + n);
    };
    if (encoding == Encoding::kBitmask) append(masks.data(), 8 * blocks);
    if (encoding == Encoding::kIndex16) {
      const uint32_t n = static_cast<uint32_t>(list.size());
      append(&n, 4);
      append(list.data(), 2 * list.size());
      data.resize((data.size() + 3) / 4 * 4);
    }
    if (group != 0) data.insert(data.end(), (columns + group - 1) / group, 200);
    const size_t n = list.size(), begin = data.size();
    n_values += n;
    data.resize(begin + owl::ValueBytes(type, n));
    for (size_t i = 0; i < n; ++i) {
      const float value = static_cast<float>(static_cast<int>(random() % 255) - 127) / 127;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (type == ValueType::kFloat32) std::memcpy(&data[begin + 4 * i], &value, 4);
      const uint16_t half = static_cast<uint16_t>(0x3C00 | (random() & 0x3FF)),
                     brain = static_cast<uint16_t>(bits >> 16);
      if (type == ValueType::kFloat16) std::memcpy(&data[begin + 2 * i], &half, 2);
      if (type == ValueType::kBFloat16) std::memcpy(&data[begin + 2 * i], &brain, 2);
      if (type == ValueType::kInt8) data[begin + i] = static_cast<uint8_t>(static_cast<int>(random() % 255) - 127);
    }
    if (type == ValueType::kInt4) {
      for (size_t i = begin; i < data.size(); ++i) data[i] = static_cast<uint8_t>(random());
    }
    data.resize((data.size() + 7) / 8 * 8);
  }
  const uint32_t end = static_cast<uint32_t>(data.size() / 8);
  std::memcpy(&data[64 + 4 * rows], &end, 4);
  for (size_t r = 0; is_int && r < rows; ++r) {
    const float scale = 0.01F;
    std::memcpy(&data[scales + 4 * r], &scale, 4);
  }
  for (int i = 0; type == ValueType::kInt4 && i < 16; ++i) data[codebook + i] = static_cast<uint8_t>(16 * i - 120);
  data.resize(data.size() + 64);
  std::memcpy(&data[0], "OWLSPMM", 8);
  const uint32_t version = 1;
  const uint16_t group16 = static_cast<uint16_t>(group);
  const uint64_t numbers[] = {rows, columns, n_values, records, data.size(), 0};
  std::memcpy(&data[8], &version, 4);
  data[12] = static_cast<uint8_t>(type);
  data[13] = static_cast<uint8_t>(encoding);
  std::memcpy(&data[14], &group16, 2);
  std::memcpy(&data[16], numbers, sizeof numbers);
  return data;
}

struct Case {
  std::string name;
  std::vector<std::vector<uint8_t>> data;
  std::vector<owl::PackedMatrix> matrices;
  std::vector<std::vector<uint32_t>> cuts;
  std::vector<double> seconds;  // per product, one per round

  double Median() const {
    std::vector<double> sorted = seconds;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }
  double Best() const { return *std::min_element(seconds.begin(), seconds.end()); }
};

Case MakeCase(const Options& options, const char* name, double sparsity, ValueType type, Encoding encoding) {
  Case result;
  result.name = name;
  const size_t n = std::max<size_t>(2, options.bytes / (4 * options.rows * options.columns));
  result.data.resize(n);
  for (size_t i = 0; i < n; ++i) {
    result.data[i] = RandomMatrix(options.rows, options.columns, sparsity, type, encoding, i);
    result.matrices.emplace_back();
    const std::string error =
        owl::OpenPackedMatrix(result.data[i].data(), result.data[i].size(), &result.matrices.back());
    if (!error.empty()) {
      std::fprintf(stderr, "%s\n", error.c_str());
      std::exit(1);
    }
    result.cuts.push_back(owl::CutRows(result.matrices.back()));
  }
  return result;
}

void Round(Case& c, const std::vector<float>& x, size_t m, std::vector<float>& y, Pool& pool) {
  const auto begin = std::chrono::steady_clock::now();
  for (size_t i = 0; i < c.matrices.size(); ++i) {
    owl::SparseMatMul(c.matrices[i], c.cuts[i], x.data(), m, nullptr, y.data(), Pool::For, &pool);
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  c.seconds.push_back(took.count() / static_cast<double>(c.matrices.size()));
}

template <class T>
std::vector<T> List(const char* text, T (*parse)(const char*)) {
  std::vector<T> values;
  for (const char* at = text; at != nullptr; at = std::strchr(at, ',')) {
    if (*at == ',') ++at;
    values.push_back(parse(at));
  }
  return values;
}
size_t ParseSize(const char* text) { return static_cast<size_t>(std::atoll(text)); }
double ParseDouble(const char* text) { return std::atof(text); }

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    const char* value = argv[i + 1];
    if (flag == "--rows") options.rows = ParseSize(value);
    if (flag == "--columns") options.columns = ParseSize(value);
    if (flag == "--threads") options.threads = ParseSize(value);
    if (flag == "--rounds") options.rounds = ParseSize(value);
    if (flag == "--bytes") options.bytes = ParseSize(value);
    if (flag == "--m") options.m = List(value, ParseSize);
    if (flag == "--sparsity") options.sparsity = List(value, ParseDouble);
  }
  std::printf("target %s, %zu threads, W %zu x %zu\n", owl::ChosenTarget(nullptr).c_str(), options.threads,
              options.rows, options.columns);
  Pool pool(options.threads);
  const double positions = static_cast<double>(options.rows * options.columns);
  for (const double sparsity : options.sparsity) {
    std::vector<Case> cases;
    cases.push_back(MakeCase(options, "float32 dense", 0, ValueType::kFloat32, Encoding::kDense));
    cases.push_back(MakeCase(options, "float32 bitmask", sparsity, ValueType::kFloat32, Encoding::kBitmask));
    cases.push_back(MakeCase(options, "float32 index16", sparsity, ValueType::kFloat32, Encoding::kIndex16));
    cases.push_back(MakeCase(options, "float16 bitmask", sparsity, ValueType::kFloat16, Encoding::kBitmask));
    cases.push_back(MakeCase(options, "float16 index16", sparsity, ValueType::kFloat16, Encoding::kIndex16));
    cases.push_back(MakeCase(options, "int8 dense", 0, ValueType::kInt8, Encoding::kDense));
    cases.push_back(MakeCase(options, "int8 bitmask", sparsity, ValueType::kInt8, Encoding::kBitmask));
    cases.push_back(MakeCase(options, "int8 index16", sparsity, ValueType::kInt8, Encoding::kIndex16));
    cases.push_back(MakeCase(options, "int4 dense", 0, ValueType::kInt4, Encoding::kDense));
    cases.push_back(MakeCase(options, "int4 bitmask", sparsity, ValueType::kInt4, Encoding::kBitmask));
    for (const size_t m : options.m) {
      std::mt19937 random(7);
      std::vector<float> x(m * options.columns), y(m * options.rows);
      for (float& value : x) value = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 1000;
      for (Case& c : cases) {
        c.seconds.clear();
        Round(c, x, m, y, pool);
        c.seconds.clear();
      }
      for (size_t round = 0; round < options.rounds; ++round) {
        for (Case& c : cases) Round(c, x, m, y, pool);
      }
      std::printf("\nsparsity %.2f, M = %zu\n%-18s %10s %10s %8s %9s %8s %16s\n", sparsity, m, "weights", "ms",
                  "best ms", "GB/s", "GFLOP/s", "ratio", "best ns/64");
      for (const Case& c : cases) {
        const double seconds = c.Median();
        std::vector<double> ratios;
        for (size_t i = 0; i < c.seconds.size(); ++i) ratios.push_back(cases[0].seconds[i] / c.seconds[i]);
        std::sort(ratios.begin(), ratios.end());
        std::printf("%-18s %10.3f %10.3f %8.1f %9.1f %7.2fx %16.2f\n", c.name.c_str(), seconds * 1e3, c.Best() * 1e3,
                    static_cast<double>(c.matrices[0].total_bytes) / seconds / 1e9,
                    2e-9 * static_cast<double>(c.matrices[0].n_values * m) / seconds, ratios[ratios.size() / 2],
                    c.Best() * 1e9 * static_cast<double>(options.threads) / (positions / 64));
        std::fflush(stdout);
      }
    }
  }
  return 0;
}
