// Every target of this machine against a scalar loop in double precision over weights that the test itself packed.
//
//   sparse_matmul_test [share]     share: run every share-th case only, for slow builds and emulators (default 1)
//
// One line per target: cases, and the largest error as a fraction of what was allowed. Exit code 1 on a failure.
//
// SPDX-License-Identifier: Apache-2.0
#include "sparse_matmul.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <thread>

#include "test_packer.h"

namespace owl_test {
namespace {

constexpr size_t kRowCounts[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 257};
constexpr size_t kShapes[][2] = {{1, 1},    {3, 5},    {7, 63},   {5, 64},   {9, 65},
                                 {17, 127}, {33, 129}, {64, 192}, {31, 577}, {130, 320}};
constexpr double kDensities[] = {0, 0.02, 0.3, 0.5, 0.9, 1};

// Takes numbers from a counter, as a pool does, on threads that really are different ones.
void ThreadedFor(void* pool, size_t n, void (*body)(void* state, size_t i), void* state) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < n; i = next++) body(state, i);
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < *static_cast<size_t*>(pool); ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
}

// Exactly m * K numbers, with all that is awkward: zeros, runs of 64 zeros, outliers, large and small rows.
std::unique_ptr<float[]> MakeX(size_t m, size_t K, Random* random) {
  std::unique_ptr<float[]> x(new float[m * K]);
  for (size_t i = 0; i < m; ++i) {
    const double row_size = std::ldexp(1.0, static_cast<int>(Below(random, 13)) - 6);
    bool is_zero_block = false;
    for (size_t k = 0; k < K; ++k) {
      if (k % 64 == 0) is_zero_block = Below(random, 6) == 0;
      double value = (Uniform(random) + Uniform(random) - 1.0) * row_size;
      const uint64_t draw = Below(random, 64);
      if (draw == 0) value *= 1000;
      if (draw < 8 && draw > 0) value = 0;
      x[i * K + k] = is_zero_block ? 0.0f : static_cast<float>(value);
    }
  }
  return x;
}

// X as the rule in FORMAT.md rounds it. `slack`: what an element may differ by, since a quotient that lies halfway
// between two numbers goes either way with the last bit of the division.
struct RoundedX {
  std::vector<double> value, slack, half_step;
};

RoundedX RoundX(const float* x, size_t m, size_t K) {
  RoundedX rounded{std::vector<double>(m * K), std::vector<double>(m * K), std::vector<double>(m * K)};
  for (size_t i = 0; i < m; ++i) {
    for (size_t first = 0; first < K; first += first % 64 == 0 ? 4 : 60) {  // 0, 4, 64, 68, ...
      std::vector<size_t> columns;
      for (size_t four = first; four < std::min(K, first / 64 * 64 + 64); four += 8) {
        for (size_t k = four; k < std::min(K, four + 4); ++k) columns.push_back(i * K + k);
      }
      double largest = 0;
      for (const size_t at : columns) largest = std::max(largest, std::fabs(static_cast<double>(x[at])));
      const double scale = largest / 127;
      for (const size_t at : columns) {
        const double quotient = largest == 0 ? 0 : x[at] / scale, below = std::floor(quotient);
        rounded.value[at] = (quotient - below < 0.5 ? below : below + 1) * scale;
        rounded.slack[at] = std::fabs(quotient - below - 0.5) < 1e-4 ? scale : 0;
        rounded.half_step[at] = 0.51 * scale;
      }
    }
  }
  return rounded;
}

// What Y should be and how far each number may be off; `loose` are the same with X not rounded. `slack`, what elements
// of X halfway between two numbers may move it, comes on top of the tolerance.
struct Expected {
  std::vector<double> y, slack, tolerance, loose_y, loose_tolerance;

  // 1 is the most that is allowed.
  double Error(size_t at, float found) const {
    const double error = std::fabs(static_cast<double>(found) - y[at]);
    return error <= slack[at] ? 0 : (error - slack[at]) / tolerance[at];
  }
  double LooseError(size_t at, float found) const {
    return std::fabs(static_cast<double>(found) - loose_y[at]) / loose_tolerance[at];
  }
};

Expected Multiply(const TestMatrix& matrix, const Kind& kind, size_t N, size_t K, const float* x, size_t m,
                  const float* bias) {
  // Sums of K products in float32, in any order: an error grows like the square root of K of roundings, each of them
  // at most half a unit in the last place of the sum of magnitudes.
  const double factor = 0x1p-24 * (8 + 2 * std::sqrt(static_cast<double>(K)));
  const bool rounds = kind.rounds_x();
  const RoundedX rounded = rounds ? RoundX(x, m, K) : RoundedX{};
  Expected expected;
  for (std::vector<double>* values :
       {&expected.y, &expected.slack, &expected.tolerance, &expected.loose_y, &expected.loose_tolerance}) {
    values->resize(m * N);
  }
  for (size_t i = 0; i < m; ++i) {
    for (size_t n = 0; n < N; ++n) {
      const double* w = &matrix.weights[n * K];
      const float* row = x + i * K;
      const double start = bias == nullptr ? 0 : bias[n];
      double exact = start, norm = std::fabs(start);
      for (size_t k = 0; k < K; ++k) {
        exact += w[k] * row[k];
        norm += std::fabs(w[k] * row[k]);
      }
      const size_t at = i * N + n;
      expected.loose_y[at] = expected.y[at] = exact;
      expected.loose_tolerance[at] = expected.tolerance[at] = norm * factor + 1e-35;
      if (!rounds) continue;
      double tight = start, tight_norm = std::fabs(start), slack = 0, half_steps = 0;
      const double *value = &rounded.value[i * K], *either = &rounded.slack[i * K], *half = &rounded.half_step[i * K];
      for (size_t k = 0; k < K; ++k) {
        const double size = std::fabs(w[k]);
        tight += w[k] * value[k];
        tight_norm += size * std::fabs(value[k]);
        slack += size * either[k];
        half_steps += size * half[k];
      }
      expected.y[at] = tight;
      expected.slack[at] = slack;
      expected.tolerance[at] = (tight_norm + slack) * factor + 1e-35;
      expected.loose_tolerance[at] = (norm + half_steps) * factor + half_steps + 1e-35;
    }
  }
  return expected;
}

struct Case {
  Shape shape;
  size_t m;
  size_t offset;  // of the matrix in memory, beyond a multiple of 16
  bool has_bias;
  size_t n_threads;  // 0: SerialFor

  std::string name() const {
    char text[200];
    std::snprintf(text, sizeof(text), "%s, N %zu, K %zu, M %zu, density %.2f%s%s, offset %zu, %zu threads",
                  shape.kind.name().c_str(), shape.n_rows, shape.n_columns, m, shape.density,
                  shape.has_empty_rows ? ", empty rows" : "", has_bias ? ", bias" : "", offset, n_threads);
    return text;
  }
};

struct Tally {
  size_t n_cases = 0;
  double worst = 0;
  std::string worst_case;
};

std::map<std::string, int> n_failures;  // by target and kind of matrix

void Fail(const std::string& target, const std::string& kind, const std::string& where, const std::string& what) {
  // Two say what is wrong; the others are counted.
  if (++n_failures[target + ", " + kind] <= 2) {
    std::printf("FAILED %s: %s: %s\n", target.c_str(), where.c_str(), what.c_str());
  }
}

std::unique_ptr<float[]> Run(const owl::PackedMatrix& w, const float* x, size_t m, const float* bias,
                             size_t n_threads) {
  std::unique_ptr<float[]> y(new float[m * w.n_rows]);
  // What is left as it was shows up as an error, also where zero is expected.
  std::fill(y.get(), y.get() + m * w.n_rows, std::numeric_limits<float>::quiet_NaN());
  owl::SparseMatMul(w, owl::CutRows(w), x, m, bias, y.get(), n_threads == 0 ? owl::SerialFor : ThreadedFor, &n_threads);
  return y;
}

bool Open(const std::string& where, const ExactBytes& bytes, owl::PackedMatrix* w) {
  const std::string refusal = owl::OpenPackedMatrix(bytes.data(), bytes.size(), w);
  if (!refusal.empty()) Fail("reader", "all", where, refusal);
  return refusal.empty();
}

void RunCase(const Case& test, uint64_t seed, std::vector<Tally>* tallies) {
  Random random(seed);
  const size_t N = test.shape.n_rows, K = test.shape.n_columns, m = test.m;
  const TestMatrix matrix = MakeMatrix(test.shape, &random);
  const ExactBytes bytes(matrix.bytes, test.offset);
  const std::unique_ptr<float[]> x = MakeX(m, K, &random);
  std::unique_ptr<float[]> bias;
  if (test.has_bias) {
    bias.reset(new float[N]);
    for (size_t n = 0; n < N; ++n) bias[n] = static_cast<float>(Uniform(&random) * 4 - 2);
  }
  owl::PackedMatrix w;
  if (!Open(test.name(), bytes, &w)) return;
  const Expected expected = Multiply(matrix, test.shape.kind, N, K, x.get(), m, bias.get());

  const std::vector<std::string> targets = owl::AvailableTargets();
  for (size_t t = 0; t < targets.size(); ++t) {
    if (!owl::ForceTarget(targets[t]))
      Fail(targets[t], test.shape.kind.name(), test.name(), "ForceTarget says it is not available");
    const std::unique_ptr<float[]> y = Run(w, x.get(), m, bias.get(), test.n_threads);
    Tally& tally = (*tallies)[t];
    ++tally.n_cases;
    for (size_t at = 0; at < m * N; ++at) {
      const double error = expected.Error(at, y[at]);
      if (!(error <= 1) || !(expected.LooseError(at, y[at]) <= 1)) {
        char what[200];
        std::snprintf(what, sizeof(what),
                      "Y[%zu][%zu] is %.9g and should be %.9g +- %.2g (X not rounded: %.9g +- %.2g)", at / N, at % N,
                      static_cast<double>(y[at]), expected.y[at], expected.slack[at] + expected.tolerance[at],
                      expected.loose_y[at], expected.loose_tolerance[at]);
        Fail(targets[t], test.shape.kind.name(), test.name(), what);
        break;
      }
      if (error > tally.worst) {
        tally.worst = error;
        tally.worst_case = test.name();
      }
    }
  }
}

// Every kind with every number of rows of X, then every kind with every shape and density; what is not named by the
// loops is drawn, so that each value of it comes up many times.
std::vector<Case> AllCases() {
  Random random(1);
  const auto draw = [&](const Kind& kind, const size_t* shape, double density, size_t m) {
    const Shape drawn = {kind, shape[0], shape[1], density, Below(&random, 3) == 0};
    const size_t offset = Below(&random, 2) == 0 ? 0 : Below(&random, 8);
    return Case{drawn, m, offset, Below(&random, 2) == 0, Below(&random, 3) == 0 ? size_t{3} : size_t{0}};
  };
  std::vector<Case> cases;
  for (const Kind& kind : AllKinds()) {
    for (const size_t m : kRowCounts) {
      for (int i = 0; i < 2; ++i) {
        const size_t* shape = kShapes[Below(&random, std::size(kShapes))];
        cases.push_back(draw(kind, shape, kDensities[Below(&random, std::size(kDensities))], m));
      }
      // The two shapes with several blocks and an odd rest, or rows enough for several threads.
      cases.push_back(draw(kind, kShapes[8 + Below(&random, 2)], 0.5, m));
    }
    for (const auto& shape : kShapes) {
      for (const double density : kDensities) {
        cases.push_back(draw(kind, shape, density, 1));
        cases.push_back(draw(kind, shape, density, kRowCounts[1 + Below(&random, std::size(kRowCounts) - 1)]));
      }
    }
  }
  return cases;
}

// A row of X with something that is not a number leaves all other rows of Y as they are, and marks its own.
void CheckRowsStayApart(uint64_t seed) {
  Random random(seed);
  for (const Kind& kind : AllKinds()) {
    for (const size_t m : {5, 20, 70}) {
      const size_t N = 19, K = 150, column = 77;
      const TestMatrix matrix = MakeMatrix({kind, N, K, 0.5, false}, &random);
      const ExactBytes bytes(matrix.bytes);
      const std::unique_ptr<float[]> x = MakeX(m, K, &random);
      const Expected expected = Multiply(matrix, kind, N, K, x.get(), m, nullptr);
      x[2 * K + column] = std::numeric_limits<float>::quiet_NaN();
      x[3 * K + column] = std::numeric_limits<float>::infinity();
      const std::string where = kind.name() + ", M " + std::to_string(m) + ", NaN in row 2 and Inf in row 3";
      owl::PackedMatrix w;
      if (!Open(where, bytes, &w)) return;
      for (const std::string& target : owl::AvailableTargets()) {
        owl::ForceTarget(target);
        const std::unique_ptr<float[]> y = Run(w, x.get(), m, nullptr, 0);
        for (size_t at = 0; at < m * N; ++at) {
          const size_t i = at / N, n = at % N;
          const bool is_odd_row = i == 2 || i == 3;
          if (!is_odd_row && !(expected.Error(at, y[at]) <= 1)) {
            Fail(target, kind.name(), where, "row " + std::to_string(i) + " of Y changed");
            break;
          }
          // What becomes of X rounded to int8 is not laid down.
          if (is_odd_row && !kind.rounds_x() && matrix.weights[n * K + column] != 0 && std::isfinite(y[at])) {
            Fail(target, kind.name(), where, "Y[" + std::to_string(i) + "][" + std::to_string(n) + "] is finite");
            break;
          }
        }
      }
    }
  }
}

int Main(size_t share) {
  const std::vector<std::string> targets = owl::AvailableTargets();
  if (targets.empty() || targets.back() != "portable") {
    Fail("dispatch", "all", "AvailableTargets", "the last target is not portable");
    return 1;
  }
  if (owl::ForceTarget("no such target")) Fail("dispatch", "all", "ForceTarget", "took a target that does not exist");
  std::vector<Tally> tallies(targets.size());
  const std::vector<Case> cases = AllCases();
  for (size_t i = 0; i < cases.size(); i += share) RunCase(cases[i], i, &tallies);
  CheckRowsStayApart(7);
  for (size_t t = 0; t < targets.size(); ++t) {
    std::printf("%-16s %zu cases, worst error / tolerance %.3f (%s)\n", targets[t].c_str(), tallies[t].n_cases,
                tallies[t].worst, tallies[t].worst_case.c_str());
  }
  for (const auto& [where, n] : n_failures) std::printf("FAILED %s: %d times\n", where.c_str(), n);
  return n_failures.empty() ? 0 : 1;
}

}  // namespace
}  // namespace owl_test

int main(int argc, char** argv) {
  const long share = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 1;
  return owl_test::Main(share < 1 ? 1 : static_cast<size_t>(share));
}
