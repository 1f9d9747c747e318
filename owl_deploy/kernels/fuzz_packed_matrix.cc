// Opens whatever bytes it is given and multiplies, on every target, what is accepted.
//
// With clang's -fsanitize=fuzzer (and OWL_LIBFUZZER defined) libFuzzer drives it. Otherwise it drives itself:
//
//   fuzz_packed_matrix [seconds] [seed]     damages valid matrices that it makes, until the time is up (default 10, 1)
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "sparse_matmul.h"
#include "test_packer.h"

namespace {

constexpr size_t kMaxWork = 1 << 18;  // multiply-adds, and numbers of X, beyond which a matrix is only opened

bool OpenAndMultiply(const uint8_t* data, size_t size) {
  owl::PackedMatrix w;
  const std::string refusal = owl::OpenPackedMatrix(data, size, &w);
  if (!refusal.empty()) return false;
  if (w.n_columns > kMaxWork || w.n_rows > kMaxWork || w.n_rows * w.n_columns > kMaxWork) return true;
  for (const std::string& target : owl::AvailableTargets()) {
    owl::ForceTarget(target);
    const std::vector<uint32_t> cuts = owl::CutRows(w);
    for (const size_t m : {1, 6, 20}) {
      const std::unique_ptr<float[]> x(new float[m * w.n_columns]), y(new float[m * w.n_rows]);
      for (size_t i = 0; i < m * w.n_columns; ++i) x[i] = static_cast<float>(i % 23) - 11.0f;
      owl::SparseMatMul(w, cuts, x.get(), m, nullptr, y.get(), owl::SerialFor, nullptr);
    }
  }
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  OpenAndMultiply(data, size);
  return 0;
}

#ifndef OWL_LIBFUZZER

namespace owl_test {
namespace {

std::vector<uint8_t> RandomMatrix(Random* random) {
  static const std::vector<Kind> kinds = AllKinds();
  const Kind& kind = kinds[Below(random, kinds.size())];
  const size_t n_rows = 1 + Below(random, 12), n_columns = 1 + Below(random, Below(random, 4) == 0 ? 700 : 140);
  return MakeMatrix({kind, n_rows, n_columns, Uniform(random) * 1.2 - 0.1, Below(random, 4) == 0}, random).bytes;
}

// Mostly where a reader takes its bearings: header, row starts, the first bytes of the records.
size_t Position(const std::vector<uint8_t>& bytes, Random* random) {
  const size_t size = bytes.size();
  switch (Below(random, 4)) {
    case 0:
      return Below(random, std::min<size_t>(size, 64));
    case 1:
      return Below(random, std::min<size_t>(size, 192));
    default:
      return Below(random, size);
  }
}

void Damage(std::vector<uint8_t>* bytes, Random* random) {
  constexpr uint64_t kTelling[] = {0,
                                   1,
                                   2,
                                   7,
                                   8,
                                   63,
                                   64,
                                   65,
                                   127,
                                   128,
                                   255,
                                   65535,
                                   65536,
                                   0x7fffffff,
                                   0x80000000,
                                   0xffffffff,
                                   uint64_t{1} << 32,
                                   uint64_t{1} << 62,
                                   ~uint64_t{0}};
  const size_t at = Position(*bytes, random);
  uint8_t* byte = bytes->data() + at;
  switch (Below(random, 6)) {
    case 0:
      *byte ^= static_cast<uint8_t>(1u << Below(random, 8));
      break;
    case 1:
      *byte = static_cast<uint8_t>((*random)());
      break;
    case 2:
      *byte = static_cast<uint8_t>(*byte + (Below(random, 2) == 0 ? 1 : 255));
      break;
    case 3: {  // a whole number
      const uint64_t value = kTelling[Below(random, std::size(kTelling))];
      const size_t n = size_t{1} << Below(random, 4), aligned = at / n * n;
      if (aligned + n <= bytes->size()) std::memcpy(bytes->data() + aligned, &value, n);
      break;
    }
    case 4: {  // two bytes change places, so that a mask keeps its count
      const size_t other = at / 8 * 8 + Below(random, 8);
      if (other < bytes->size()) std::swap(*byte, (*bytes)[other]);
      break;
    }
    default:  // another length, and a header that agrees
      if (Below(random, 8) != 0 || bytes->size() < 65) break;
      bytes->resize(64 + Below(random, bytes->size() + 64));
      const uint64_t size = bytes->size();
      std::memcpy(bytes->data() + 48, &size, 8);
      break;
  }
}

int Main(double seconds, uint64_t seed) {
  Random random(seed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  size_t n_refused = 0, n_accepted = 0;
  while (std::chrono::steady_clock::now() < end) {
    const std::vector<uint8_t> valid = RandomMatrix(&random);
    for (int i = 0; i < 64; ++i) {
      std::vector<uint8_t> bytes = valid;
      for (uint64_t n = i == 0 ? 0 : 1 + Below(&random, 4); n > 0; --n) Damage(&bytes, &random);
      const ExactBytes exact(bytes, Below(&random, 8));
      const bool is_accepted = OpenAndMultiply(exact.data(), exact.size());
      ++(is_accepted ? n_accepted : n_refused);
      if (i == 0 && !is_accepted) {
        std::printf("FAILED: a valid matrix was refused\n");
        return 1;
      }
    }
  }
  std::printf("fuzz: %zu refused, %zu accepted and multiplied, seed %llu\n", n_refused, n_accepted,
              static_cast<unsigned long long>(seed));
  return 0;
}

}  // namespace
}  // namespace owl_test

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  return owl_test::Main(seconds, seed);
}

#endif  // OWL_LIBFUZZER
