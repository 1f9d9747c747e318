// Attention and the gated unit of every target of this machine against loops in double precision.
//
//   attention_test [share]     share: run every share-th case only, for slow builds and emulators (default 1)
//
// One line per target: cases, and the largest error as a fraction of what was allowed. Exit code 1 on a failure.
//
// SPDX-License-Identifier: Apache-2.0
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gated_linear_unit.h"
#include "sparse_matmul.h"

namespace owl_test {
namespace {

using Random = std::mt19937_64;  // its numbers are the same everywhere, unlike those of the standard distributions
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

size_t Below(Random* random, size_t n) { return static_cast<size_t>((*random)() % n); }
double Uniform(Random* random) { return static_cast<double>((*random)() >> 11) * 0x1p-52 - 1; }  // [-1, 1)
template <class T, size_t kN>
T AnyOf(Random* random, const T (&values)[kN]) {
  return values[Below(random, kN)];
}
std::vector<float> Numbers(Random* random, size_t n, double size) {
  std::vector<float> numbers(n);
  for (float& number : numbers) number = static_cast<float>(Uniform(random) * size);
  return numbers;
}
const float* OrNull(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

// Takes numbers from a counter, as a pool does, on threads that really are different ones.
void ThreadedFor(void*, size_t n, void (*body)(void* state, size_t i), void* state) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < n; i = next++) body(state, i);
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 3; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
}

struct Case {
  owl::AttentionShape shape;
  size_t n_batch, n_tokens, n_present;
  std::vector<size_t> past;
  bool is_shared, has_query_norm, has_key_norm, is_threaded;

  size_t group() const { return shape.n_heads / shape.n_kv_heads; }
  size_t n_past() const { return is_shared ? n_present : *std::max_element(past.begin(), past.end()); }
  size_t width() const { return (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim; }
  // First position that token i of row b sees.
  size_t begin(size_t b, size_t i) const {
    const size_t end = past[b] + i + 1;
    return shape.window != 0 && end > shape.window ? end - shape.window : 0;
  }
  std::string name() const {
    char text[300];
    std::snprintf(text, sizeof text,
                  "batch %zu, %zu tokens, past %zu.., %zu/%zu heads of %zu, %zu rotated, window %zu, cap %g%s%s%s",
                  n_batch, n_tokens, past[0], shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.n_rotated,
                  shape.window, static_cast<double>(shape.softcap), is_shared ? ", in place" : "",
                  has_query_norm ? ", norms" : "", is_threaded ? ", threads" : "");
    return text;
  }
};

Case DrawCase(Random* random) {
  Case drawn{};
  owl::AttentionShape& shape = drawn.shape;
  shape.n_kv_heads = AnyOf(random, {size_t{1}, size_t{2}, size_t{3}});
  shape.n_heads = shape.n_kv_heads * AnyOf(random, {size_t{1}, size_t{2}, size_t{3}, size_t{5}, size_t{8}});
  shape.head_dim = AnyOf(random, {size_t{4}, size_t{8}, size_t{16}, size_t{24}, size_t{64}, size_t{80}, size_t{128}});
  if (Below(random, 4) != 0) shape.n_rotated = Below(random, 3) == 0 ? shape.head_dim / 2 : shape.head_dim;
  shape.scale = 1 / std::sqrt(static_cast<float>(shape.head_dim)) * (Below(random, 2) == 0 ? 1 : 4);
  shape.softcap = Below(random, 3) == 0 ? 3.0f : 0;
  shape.norm_epsilon = 1e-5f;
  drawn.n_batch = 1 + Below(random, 3);
  drawn.n_tokens = AnyOf(random, {size_t{1}, size_t{1}, size_t{2}, size_t{3}, size_t{9}, size_t{33}, size_t{70}});
  for (size_t b = 0; b < drawn.n_batch; ++b) {
    drawn.past.push_back(
        AnyOf(random, {size_t{0}, size_t{1}, size_t{63}, size_t{64}, Below(random, 200), size_t{400}}));
  }
  shape.window = Below(random, 3) == 0 ? AnyOf(random, {size_t{1}, size_t{7}, size_t{64}, size_t{150}}) : 0;
  drawn.is_shared = Below(random, 2) == 0;
  drawn.n_present = *std::max_element(drawn.past.begin(), drawn.past.end()) + drawn.n_tokens + Below(random, 5);
  drawn.has_query_norm = Below(random, 3) == 0;
  drawn.has_key_norm = drawn.has_query_norm;
  drawn.is_threaded = Below(random, 4) == 0;
  return drawn;
}

// A case filled with numbers, in vectors of exactly the size that is stated. Cache that must not be read is no number.
struct Data {
  std::vector<float> qkv, query_norm, key_norm, cos, sin, past_key, past_value;

  Data(const Case& test, Random* random) {
    const owl::AttentionShape& shape = test.shape;
    const size_t D = shape.head_dim;
    qkv = Numbers(random, test.n_batch * test.n_tokens * test.width(), 2);
    if (test.has_query_norm) query_norm = Numbers(random, D, 2);
    if (test.has_key_norm) key_norm = Numbers(random, D, 2);
    cos = Numbers(random, test.n_present * shape.n_rotated / 2, 1);
    sin = Numbers(random, test.n_present * shape.n_rotated / 2, 1);
    past_key = Numbers(random, test.n_batch * shape.n_kv_heads * test.n_past() * D, 2);
    past_value = Numbers(random, past_key.size(), 2);
    for (size_t at = 0; at < past_key.size(); ++at) {
      const size_t position = at / D % test.n_past(), b = at / D / test.n_past() / shape.n_kv_heads;
      if (position >= test.past[b] || position < test.begin(b, 0)) past_key[at] = past_value[at] = kNaN;
    }
  }
};

struct Expected {
  std::vector<double> keys, values, y, tolerance;  // caches as past and new tokens together, n_present positions
};

std::vector<double> Head(const Case& test, const Data& data, const float* in, const std::vector<float>& norm,
                         size_t position) {
  const size_t D = test.shape.head_dim, half = test.shape.n_rotated / 2;
  std::vector<double> head(in, in + D);
  if (!norm.empty()) {
    double squares = 0;
    for (const double x : head) squares += x * x;
    const double root = std::sqrt(squares / static_cast<double>(D) + static_cast<double>(test.shape.norm_epsilon));
    for (size_t d = 0; d < D; ++d) head[d] *= norm[d] / root;
  }
  for (size_t d = 0; d < half; ++d) {
    const double x = head[d], y = head[d + half], cos = data.cos[position * half + d],
                 sin = data.sin[position * half + d];
    head[d] = x * cos - y * sin;
    head[d + half] = y * cos + x * sin;
  }
  return head;
}

Expected Compute(const Case& test, const Data& data) {
  const owl::AttentionShape& shape = test.shape;
  const size_t D = shape.head_dim, T = test.n_tokens, n_past = test.n_past();
  Expected expected;
  expected.keys.assign(test.n_batch * shape.n_kv_heads * test.n_present * D, 0);
  expected.values = expected.keys;
  expected.y.assign(test.n_batch * T * shape.n_heads * D, 0);
  expected.tolerance = expected.y;
  for (size_t b = 0; b < test.n_batch; ++b) {
    for (size_t h = 0; h < shape.n_kv_heads; ++h) {
      const size_t head = b * shape.n_kv_heads + h;
      double* keys = &expected.keys[head * test.n_present * D];
      double* values = &expected.values[head * test.n_present * D];
      for (size_t at = 0; at < test.past[b] * D; ++at) {
        keys[at] = data.past_key[head * n_past * D + at];
        values[at] = data.past_value[head * n_past * D + at];
      }
      for (size_t i = 0; i < T; ++i) {
        const float* row = &data.qkv[(b * T + i) * test.width()];
        const size_t position = test.past[b] + i;
        const std::vector<double> key = Head(test, data, row + (shape.n_heads + h) * D, data.key_norm, position);
        std::copy(key.begin(), key.end(), keys + position * D);
        const float* value = row + (shape.n_heads + shape.n_kv_heads + h) * D;
        std::copy(value, value + D, values + position * D);
      }
    }
    for (size_t i = 0; i < T; ++i) {
      for (size_t h = 0; h < shape.n_heads; ++h) {
        const size_t head = b * shape.n_kv_heads + h / test.group(), begin = test.begin(b, i),
                     end = test.past[b] + i + 1;
        const float* in = &data.qkv[(b * T + i) * test.width() + h * D];
        const std::vector<double> query = Head(test, data, in, data.query_norm, test.past[b] + i);
        const double* keys = &expected.keys[head * test.n_present * D];
        const double* values = &expected.values[head * test.n_present * D];
        std::vector<double> scores;
        double largest = -1e300, magnitude = 0;
        for (size_t p = begin; p < end; ++p) {
          double score = 0, size = 0;
          for (size_t d = 0; d < D; ++d) {
            score += query[d] * keys[p * D + d];
            size += std::fabs(query[d] * keys[p * D + d]);
          }
          score *= shape.scale;
          const double cap = shape.softcap;
          if (cap != 0) score = cap * std::tanh(score / cap);
          scores.push_back(score);
          largest = std::max(largest, score);
          magnitude = std::max(magnitude, size * shape.scale);
        }
        double sum = 0, most = 0;
        for (double& score : scores) sum += score = std::exp(score - largest);
        double* y = &expected.y[((b * T + i) * shape.n_heads + h) * D];
        for (size_t p = begin; p < end; ++p) {
          for (size_t d = 0; d < D; ++d) {
            y[d] += scores[p - begin] / sum * values[p * D + d];
            most = std::max(most, std::fabs(values[p * D + d]));
          }
        }
        // Scores are off by a few roundings of their magnitudes, and weights by as much of themselves.
        const double tolerance = most * 0x1p-24 * (16 + 8 * magnitude);
        std::fill_n(&expected.tolerance[((b * T + i) * shape.n_heads + h) * D], D, tolerance);
      }
    }
  }
  return expected;
}

size_t n_failures = 0;

void Fail(const std::string& target, const std::string& where, const std::string& what) {
  if (++n_failures <= 20) std::printf("FAILED %s: %s: %s\n", target.c_str(), where.c_str(), what.c_str());
}

double RunCase(const std::string& target, const Case& test, const Data& data, const Expected& expected) {
  const owl::AttentionShape& shape = test.shape;
  const size_t D = shape.head_dim;
  std::vector<float> keys = data.past_key, values = data.past_value;  // exactly sized, for the sanitizer
  std::vector<float> present_key(test.is_shared ? 0 : expected.keys.size(), kNaN), present_value = present_key;
  std::vector<float> y(expected.y.size(), kNaN);
  owl::AttentionTensors t;
  t.n_batch = test.n_batch;
  t.n_tokens = test.n_tokens;
  t.n_past = test.n_past();
  t.n_present = test.n_present;
  t.qkv = data.qkv.data();
  t.query_norm = OrNull(data.query_norm);
  t.key_norm = OrNull(data.key_norm);
  t.cos = OrNull(data.cos);
  t.sin = OrNull(data.sin);
  t.past = test.past.data();
  t.past_key = keys.data();
  t.past_value = values.data();
  t.present_key = test.is_shared ? keys.data() : present_key.data();
  t.present_value = test.is_shared ? values.data() : present_value.data();
  t.y = y.data();
  owl::Attention(shape, t, test.is_threaded ? ThreadedFor : owl::SerialFor, nullptr);

  double worst = 0;
  char what[200];
  for (size_t at = 0; at < y.size(); ++at) {
    const double error = std::fabs(y[at] - expected.y[at]) / expected.tolerance[at];
    if (!(error <= 1)) {
      std::snprintf(what, sizeof what, "y[%zu] is %.9g and should be %.9g +- %.2g", at, static_cast<double>(y[at]),
                    expected.y[at], expected.tolerance[at]);
      Fail(target, test.name(), what);
      break;
    }
    worst = std::max(worst, error);
  }
  for (size_t at = 0; at < expected.keys.size(); ++at) {
    const size_t position = at / D % test.n_present, b = at / D / test.n_present / shape.n_kv_heads;
    const bool is_seen = position < test.past[b] + test.n_tokens && position >= test.begin(b, 0);
    const bool is_behind = position >= test.past[b] + test.n_tokens && !test.is_shared;  // zeros
    if (!is_seen && !is_behind) continue;
    const double size = std::max(1.0, std::fabs(expected.keys[at])) * 8e-6;
    if (!(std::fabs(t.present_key[at] - expected.keys[at]) <= size) || t.present_value[at] != expected.values[at]) {
      std::snprintf(what, sizeof what, "position %zu of the cache is %.9g, %.9g and should be %.9g, %.9g", position,
                    static_cast<double>(t.present_key[at]), static_cast<double>(t.present_value[at]), expected.keys[at],
                    expected.values[at]);
      Fail(target, test.name(), what);
      break;
    }
  }
  return worst;
}

// What is no number in one row of a batch stays there.
void CheckRowsStayApart(const std::string& target) {
  Random random(3);
  Case test{};
  test.shape = {6, 2, 64, 64, 0.125f, 0, 0, 0};
  test.n_batch = 3;
  test.n_tokens = 1;
  test.past = {300, 300, 300};
  test.n_present = 320;
  test.is_shared = true;
  Data data(test, &random);
  const Expected expected = Compute(test, data);
  data.qkv[test.width() + 3] = kNaN;
  std::vector<float> y(expected.y.size());
  owl::AttentionTensors t;
  t.n_batch = 3;
  t.n_tokens = 1;
  t.n_past = t.n_present = 320;
  t.qkv = data.qkv.data();
  t.cos = data.cos.data();
  t.sin = data.sin.data();
  t.past = test.past.data();
  t.past_key = t.present_key = data.past_key.data();
  t.past_value = t.present_value = data.past_value.data();
  t.y = y.data();
  owl::Attention(test.shape, t, owl::SerialFor, nullptr);
  const size_t width = y.size() / 3;
  for (size_t at = 0; at < y.size(); ++at) {
    const bool is_its_head = at >= width && at < width + 64;
    if (is_its_head ? !std::isnan(y[at]) : !(std::fabs(y[at] - expected.y[at]) <= expected.tolerance[at])) {
      return Fail(target, "NaN in the first head of the second row", "y[" + std::to_string(at) + "]");
    }
  }
}

double CheckGates(const std::string& target) {
  Random random(5);
  double worst = 0;
  for (const owl::Activation activation : {owl::Activation::kSilu, owl::Activation::kGeluTanh}) {
    for (const size_t n : {1, 7, 16, 100, 4096, 9000}) {
      for (const size_t m : {1, 3}) {
        std::vector<float> x = Numbers(&random, m * 2 * n, 3), y(m * n, kNaN);
        for (size_t i = 0; i < x.size(); i += 5) x[i] *= 60;
        owl::GatedLinearUnit(activation, x.data(), m, n, y.data(), n == 9000 ? ThreadedFor : owl::SerialFor, nullptr);
        for (size_t at = 0; at < y.size(); ++at) {
          const double gate = x[at / n * 2 * n + at % n], up = x[at / n * 2 * n + n + at % n];
          const double z = activation == owl::Activation::kSilu
                               ? -gate
                               : -2 * std::sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate);
          const double exact = gate / (1 + std::exp(z)) * up;
          // The exponent is rounded to float32 first, which its exponential multiplies by its own size.
          const double tolerance = std::fabs(exact) * 0x1p-24 * (12 + 4 * std::fabs(z)) + 1e-33;
          const double error = std::fabs(y[at] - exact) / tolerance;
          if (!(error <= 1)) {
            char what[200];
            std::snprintf(what, sizeof what, "gate %.9g, up %.9g gives %.9g and should be %.9g", gate, up,
                          static_cast<double>(y[at]), exact);
            Fail(target, activation == owl::Activation::kSilu ? "SiLU" : "GELU", what);
            break;
          }
          worst = std::max(worst, error);
        }
      }
    }
  }
  return worst;
}

int Main(size_t share) {
  const std::vector<std::string> targets = owl::AvailableTargets();
  std::vector<double> worst(targets.size());
  size_t n_cases = 0;
  Random random(1);
  for (size_t i = 0; i < 400; ++i) {
    const Case test = DrawCase(&random);
    const Data data(test, &random);
    if (i % share != 0) continue;
    const Expected expected = Compute(test, data);
    ++n_cases;
    for (size_t t = 0; t < targets.size(); ++t) {
      owl::ForceTarget(targets[t]);
      worst[t] = std::max(worst[t], RunCase(targets[t], test, data, expected));
    }
  }
  for (size_t t = 0; t < targets.size(); ++t) {
    owl::ForceTarget(targets[t]);
    CheckRowsStayApart(targets[t]);
    const double gates = CheckGates(targets[t]);
    std::printf("%-16s %zu cases, worst error / tolerance %.3f, of gates %.3f\n", targets[t].c_str(), n_cases, worst[t],
                gates);
  }
  return n_failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace owl_test

int main(int argc, char** argv) {
  const long share = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 1;
  return owl_test::Main(share < 1 ? 1 : static_cast<size_t>(share));
}
