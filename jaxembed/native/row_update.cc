// Row-sparse SGD and Adagrad on one CPU device, the table and its accumulators updated in place.
//
//   for every row r that an entry names, once:
//     g = sum over entries i with rows[i] == r, in their order, of weights[i] gradients[segments[i]]
//     g = clip(g, low, high);  w = table[r] - decay table[r]
//     SGD:      w -= lr g                    Adagrad:  a[r] += g^2;  w -= lr g / sqrt(a[r]), 0 / 0 = 0
//     table[r] = clip(w, weight_low, weight_high)
//
// Entries with a row outside [0, V) or a segment outside [0, S) are padding. Entries are sorted by their row
// (a stable radix sort, so that sums have one order whatever the number of threads), then each thread takes
// runs of rows that no other has.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "schedule.h"
#include "xla/ffi/api/ffi.h"

// Clones for levels of x86-64 came with GCC 12.
#if defined(JAXEMBED_X86_64) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define JAXEMBED_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define JAXEMBED_CLONES
#endif

namespace jaxembed {
namespace {

namespace ffi = xla::ffi;

constexpr int kRadixBits = 11;
constexpr size_t kAhead = 12;         // entries whose rows are fetched ahead
constexpr size_t kMinEntries = 2048;  // fewer are not worth another thread

// An entry: its row in the upper half, its index in the lower one.
using Key = uint64_t;

struct Update {
  float* table;
  float* accumulators;  // null for SGD
  const int32_t* segments;
  const float* weights;  // null where all are 1
  const float* gradients;
  int64_t dim;
  float learning_rate, decay, low, high, weight_low, weight_high;
};

JAXEMBED_CLONES
void AddRow(float* sum, const float* row, float weight, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) sum[d] += weight * row[d];
}

// Without decay a weight is not touched: 0 times an infinite one is NaN.
__attribute__((always_inline)) inline float Decayed(float w, const Update& u) {
  return u.decay == 0.0f ? w : w - u.decay * w;
}

JAXEMBED_CLONES
void StepSgd(float* row, const float* sum, const Update& u) {
  for (int64_t d = 0; d < u.dim; ++d) {
    const float g = std::min(std::max(sum[d], u.low), u.high);
    const float w = Decayed(row[d], u) - u.learning_rate * g;
    row[d] = std::min(std::max(w, u.weight_low), u.weight_high);
  }
}

JAXEMBED_CLONES
void StepAdagrad(float* row, float* accumulator, const float* sum, const Update& u) {
  for (int64_t d = 0; d < u.dim; ++d) {
    const float g = std::min(std::max(sum[d], u.low), u.high);
    const float a = accumulator[d] + g * g;
    const float step = a == 0.0f ? 0.0f : u.learning_rate * g / std::sqrt(a);
    const float w = Decayed(row[d], u) - step;
    accumulator[d] = a;
    row[d] = std::min(std::max(w, u.weight_low), u.weight_high);
  }
}

__attribute__((always_inline)) inline void Fetch(const float* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(row + d, 1);
}

int64_t RowOf(Key key) { return static_cast<int64_t>(key >> 32); }

// Updates the rows of keys [begin, end), which starts and ends at a border between rows.
void RunRows(const Update& u, const std::vector<Key>& keys, size_t begin, size_t end, std::vector<float>& sum) {
  sum.resize(u.dim);
  for (size_t i = begin; i < end;) {
    const int64_t row = RowOf(keys[i]);
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (; i < end && RowOf(keys[i]) == row; ++i) {
      if (i + kAhead < end) {
        const int64_t next = RowOf(keys[i + kAhead]);
        Fetch(u.table + next * u.dim, u.dim);
        if (u.accumulators) Fetch(u.accumulators + next * u.dim, u.dim);
      }
      const uint32_t entry = static_cast<uint32_t>(keys[i]);
      AddRow(sum.data(), u.gradients + u.segments[entry] * u.dim, u.weights ? u.weights[entry] : 1.0f, u.dim);
    }
    if (u.accumulators) {
      StepAdagrad(u.table + row * u.dim, u.accumulators + row * u.dim, sum.data(), u);
    } else {
      StepSgd(u.table + row * u.dim, sum.data(), u);
    }
  }
}

// Stable, by row; 11 bits a pass, as many passes as the largest row has digits.
void SortByRow(std::vector<Key>* keys, int64_t vocabulary) {
  if (keys->empty()) return;  // as of a table without rows, whose largest one is -1
  std::vector<Key> other(keys->size());
  for (int shift = 32; (vocabulary - 1) >> (shift - 32); shift += kRadixBits) {
    std::array<size_t, 1 << kRadixBits> starts{};
    const auto digit = [shift](Key key) { return (key >> shift) & ((1 << kRadixBits) - 1); };
    for (Key key : *keys) ++starts[digit(key)];
    size_t total = 0;
    for (size_t& start : starts) total += std::exchange(start, total);
    for (Key key : *keys) other[starts[digit(key)]++] = key;
    keys->swap(other);
  }
}

struct Work {
  Update update;
  std::vector<Key> keys;
  std::vector<size_t> borders;  // task t is keys [borders[t], borders[t + 1])
  std::atomic<size_t> next{0}, done{0};
  std::atomic<bool> out_of_memory{false};

  // A thread that comes late finds no task left and touches nothing.
  void Run() {
    std::vector<float> sum;
    for (size_t t = next.fetch_add(1); t + 1 < borders.size(); t = next.fetch_add(1)) {
      try {
        RunRows(update, keys, borders[t], borders[t + 1], sum);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

void Cut(size_t num_tasks, Work* work) {
  const size_t size = work->keys.size();
  work->borders = {0};
  for (size_t t = 1; t <= num_tasks; ++t) {
    size_t at = size * t / num_tasks;
    if (at <= work->borders.back()) continue;  // in a row that the task before ends with
    while (at && at < size && RowOf(work->keys[at]) == RowOf(work->keys[at - 1])) ++at;
    work->borders.push_back(at);
  }
}

ffi::Error Invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("jaxembed: update of rows: " + what);
}

using Rows = ffi::Buffer<ffi::F32, 2>;
using Floats = ffi::Buffer<ffi::F32, 1>;
using Ints = ffi::Buffer<ffi::S32, 1>;

ffi::Error UpdateRows(ffi::ThreadPool pool, Rows table, Rows accumulators, Ints rows, Ints segments, Floats weights,
                      Rows gradients, Floats scalars, ffi::Result<Rows> new_table,
                      ffi::Result<Rows> new_accumulators) try {
  const int64_t vocabulary = table.dimensions()[0], dim = table.dimensions()[1];
  const int64_t entries = rows.dimensions()[0], num_segments = gradients.dimensions()[0];
  const bool adagrad = accumulators.dimensions()[0] != 0;
  if (new_table->typed_data() != table.typed_data() ||
      (adagrad && new_accumulators->typed_data() != accumulators.typed_data())) {
    return Invalid("table and accumulators must be updated in place; donate them");
  }
  if (adagrad && (accumulators.dimensions()[0] != vocabulary || accumulators.dimensions()[1] != dim)) {
    return Invalid("accumulators must be of the table's shape");
  }
  if (gradients.dimensions()[1] != dim || segments.dimensions()[0] != entries || scalars.dimensions()[0] != 6 ||
      (weights.dimensions()[0] != 0 && weights.dimensions()[0] != entries)) {
    return Invalid("N rows, segments and weights (N or 0), gradients [S, D] and 6 numbers must fit each other; got " +
                   std::to_string(entries) + " rows, " + std::to_string(segments.dimensions()[0]) + " segments, " +
                   std::to_string(weights.dimensions()[0]) + " weights, gradients [" + std::to_string(num_segments) +
                   ", " + std::to_string(gradients.dimensions()[1]) + "] for D = " + std::to_string(dim) + ", and " +
                   std::to_string(scalars.dimensions()[0]) + " numbers");
  }
  if (entries > std::numeric_limits<int32_t>::max() || vocabulary > std::numeric_limits<int32_t>::max()) {
    return Invalid("at most 2^31 - 1 entries and rows");
  }
  const float* s = scalars.typed_data();
  auto work = std::make_shared<Work>();
  work->update = {new_table->typed_data(),
                  adagrad ? new_accumulators->typed_data() : nullptr,
                  segments.typed_data(),
                  weights.dimensions()[0] ? weights.typed_data() : nullptr,
                  gradients.typed_data(),
                  dim, s[0], s[1], s[2], s[3], s[4], s[5]};
  work->keys.reserve(entries);
  for (int64_t i = 0; i < entries; ++i) {
    const int32_t row = rows.typed_data()[i], segment = segments.typed_data()[i];
    if (row < 0 || row >= vocabulary || segment < 0 || segment >= num_segments) continue;
    work->keys.push_back(static_cast<Key>(row) << 32 | static_cast<uint32_t>(i));
  }
  SortByRow(&work->keys, vocabulary);
  const size_t threads = std::max<int64_t>(pool.num_threads(), 1);
  Cut(std::max<size_t>(1, std::min(8 * threads, work->keys.size() / kMinEntries)), work.get());
  const size_t tasks = work->borders.size() - 1;
  ScheduleAll(pool, static_cast<int64_t>(std::min(threads, tasks)) - 1, [work] { work->Run(); });
  work->Run();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < tasks; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
  if (work->out_of_memory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxembed: out of memory");
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxembed: out of memory");
}

}  // namespace
}  // namespace jaxembed

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* JaxembedUpdateRows(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxembedUpdateRows, jaxembed::UpdateRows,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxembed::Rows>()
                                  .Arg<jaxembed::Rows>()
                                  .Arg<jaxembed::Ints>()
                                  .Arg<jaxembed::Ints>()
                                  .Arg<jaxembed::Floats>()
                                  .Arg<jaxembed::Rows>()
                                  .Arg<jaxembed::Floats>()
                                  .Ret<jaxembed::Rows>()
                                  .Ret<jaxembed::Rows>());
