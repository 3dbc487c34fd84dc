// The kernel's own tests, without XLA: every instance of the hot loop against a scalar loop.
//
// Each array has its own stretch of memory, at a start that is aligned to its elements only, with guards on
// both sides. Padding and guards are poisoned while the kernel runs, so that AddressSanitizer sees every read
// or write out of bounds; without it, the guards around the output are compared.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../../jaxembed/native/bag.h"
#include "../../jaxembed/native/instances.h"
#include "../../jaxembed/native/place.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

static int64_t allocations = 0;

void* operator new(size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace jaxembed {
namespace {

using Random = std::mt19937_64;
constexpr int64_t kGuard = 64;

int64_t Below(Random& random, int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }

// `size` bytes at an address that is a multiple of `align` and of nothing larger.
class Stretch {
 public:
  Stretch(int64_t size, int64_t align) : size_(size), memory_(size + 2 * kGuard + 64 + align, 0xA5) {
    const auto base = reinterpret_cast<uintptr_t>(memory_.data());
    start_ = static_cast<int64_t>((64 - base % 64) % 64) + kGuard + align % 64;
    Poison(-kGuard, 0);
    Poison(size_, size_ + kGuard);
  }
  ~Stretch() { ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size()); }
  Stretch(const Stretch&) = delete;

  uint8_t* data() { return memory_.data() + start_; }
  void Poison(int64_t from, int64_t to) {
    if (to > from) ASAN_POISON_MEMORY_REGION(data() + from, static_cast<size_t>(to - from));
  }
  bool GuardsHold() {
    ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size());
    for (int64_t i = 0; i < static_cast<int64_t>(memory_.size()); ++i) {
      if ((i < start_ || i >= start_ + size_) && memory_[i] != 0xA5) return false;
    }
    return true;
  }

 private:
  int64_t size_, start_ = 0;
  std::vector<uint8_t> memory_;
};

uint16_t Half(double value, bool bf16) {  // exact for the values used here
  const float x = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (bf16) return static_cast<uint16_t>(bits >> 16);
  if (x == 0) return 0;
  return static_cast<uint16_t>(((bits >> 16) & 0x8000) | ((((bits >> 23) & 255) - 112) << 10) | ((bits >> 13) & 1023));
}

double FromHalf(uint16_t h, bool bf16) {
  if (bf16) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = (h >> 10) & 31;
  const double magnitude = exponent ? std::ldexp(1024 + (h & 1023), exponent - 25) : std::ldexp(h & 1023, -24);
  return h & 0x8000 ? -magnitude : magnitude;
}

// One random lookup with its memory, and what it must give.
struct Case {
  Bag bag;
  std::vector<double> values;  // [V - first_row, D]
  int64_t first_row = 0;
  bool wide = false, weighted = false;  // ids, and bags that are combined
  std::vector<std::unique_ptr<Stretch>> stretches;
  Stretch* out = nullptr;
  uint8_t* start = nullptr;  // of the output, in which this feature's columns begin at `column`
  int64_t column = 0, size = 4, out_values = 0;
  bool half = false;
  std::string name;

  uint8_t* Memory(int64_t size, int64_t align) {
    stretches.push_back(std::make_unique<Stretch>(size, align));
    return stretches.back()->data();
  }
  float* Floats(int64_t count) { return reinterpret_cast<float*>(Memory(4 * count, 4)); }
  Ints Integers(const std::vector<int64_t>& values, bool wide) {
    const int64_t size = wide ? 8 : 4;
    uint8_t* data = Memory(size * static_cast<int64_t>(values.size()), size);
    for (size_t i = 0; i < values.size(); ++i) {
      const auto narrow = static_cast<int32_t>(values[i]);
      std::memcpy(data + i * size, wide ? static_cast<const void*>(&values[i]) : &narrow, size);
    }
    return {data, wide};
  }
};

void MakeTable(Case& c, RowType type, int64_t vocabulary, int64_t dim) {
  Table& t = c.bag.table;
  t.type = type, t.vocabulary = vocabulary, t.dim = dim;
  const int64_t width = t.row_bytes();
  c.half = type == RowType::kBF16 || type == RowType::kF16;
  uint8_t* rows = c.Memory(vocabulary * width, type == RowType::kF32 ? 4 : c.half ? 2 : 1);
  std::memset(rows, 0, vocabulary * width);
  t.rows = rows;
  std::vector<float> pairs(2 * vocabulary);
  float* codebook = nullptr;
  if (Affine(type)) {
    for (int64_t r = 0; r < vocabulary; ++r) {
      pairs[2 * r] = (r % 2 ? 0.25f : 0.5f) * (type == RowType::kInt8 ? 0.25f : 1.0f);
      pairs[2 * r + 1] = static_cast<float>(r % 5);
      std::memcpy(rows + (r + 1) * width - kScaleBiasBytes, &pairs[2 * r], kScaleBiasBytes);
    }
  } else if (!c.half && type != RowType::kF32) {
    const int codes = type == RowType::kCodes8 ? 256 : 16;
    t.codebook = codebook = c.Floats(codes);
    for (int i = 0; i < codes; ++i) codebook[i] = 0.25f * static_cast<float>((i * 37) % 61 - 30);
  }
  for (int64_t r = 0; r < vocabulary; ++r) {
    for (int64_t d = 0; d < dim; ++d) {
      const int code = static_cast<int>((r * 31 + d * 7) % 61);
      double value = 0.25 * (code - 30);
      if (type == RowType::kF32) {
        const float x = static_cast<float>(value);
        std::memcpy(rows + r * width + 4 * d, &x, 4);
      } else if (c.half) {
        const uint16_t h = Half(value, type == RowType::kBF16);
        std::memcpy(rows + r * width + 2 * d, &h, 2);
      } else if (type == RowType::kInt8) {
        rows[r * width + d] = static_cast<uint8_t>(code * 4);
        value = (code * 4) * pairs[2 * r] + pairs[2 * r + 1];
      } else if (type == RowType::kCodes8) {
        rows[r * width + d] = static_cast<uint8_t>(code * 4);
        value = codebook[code * 4];
      } else {
        rows[r * width + d / 2] |= static_cast<uint8_t>((code % 16) << (4 * (d % 2)));
        value = type == RowType::kInt4 ? (code % 16) * pairs[2 * r] + pairs[2 * r + 1] : codebook[code % 16];
      }
      c.values.push_back(value);
    }
  }
}

// How many ids each bag has, none in some.
std::vector<int64_t> Lengths(const Bag& bag, Random& random, int64_t mean) {
  std::vector<int64_t> lengths(bag.num_bags, 1);
  if (bag.layout == Layout::kDense) return lengths;
  for (int64_t& length : lengths) length = Below(random, 3) ? Below(random, 2 * mean + 1) : 0;
  return lengths;
}

// Ids, one of `bad_of` of them bad (0: none), in bags; garbage before the first bag and after the last.
void MakeIds(Case& c, Random& random, const std::vector<int64_t>& lengths, int64_t bad_of) {
  Bag& bag = c.bag;
  const bool dense = bag.layout == Layout::kDense, sparse = bag.layout == Layout::kSparse;
  const int64_t before = dense ? 0 : Below(random, 4), after = dense ? 0 : Below(random, 4);
  std::vector<int64_t> splits(1, before), rows(before, -1), columns;
  for (int64_t b = 0; b < bag.num_bags; ++b) {
    splits.push_back(splits.back() + lengths[b]);
    rows.insert(rows.end(), lengths[b], b);
  }
  rows.insert(rows.end(), after, bag.num_bags + 3);
  const int64_t n = bag.num_ids = dense ? bag.num_bags : static_cast<int64_t>(rows.size());
  // The last ones only where ids are wide; their lower halves are rows.
  constexpr int64_t kAbove32 = int64_t{1} << 32;
  const int64_t garbage[] = {-1,       -7,           bag.table.vocabulary, INT32_MAX, INT32_MIN,
                             kAbove32, kAbove32 + 1, -256 * kAbove32};
  std::vector<int64_t> ids(n);
  for (int64_t& id : ids) {
    const bool bad = bag.table.vocabulary == 0 || (bad_of && Below(random, bad_of) == 0);
    id = bad ? garbage[Below(random, c.wide ? 8 : 5)] : c.first_row + Below(random, bag.table.vocabulary - c.first_row);
  }
  if (sparse && Below(random, 2)) {
    for (int64_t i = n - 1; i > 0; --i) std::swap(rows[i], rows[Below(random, i + 1)]);
  }
  for (int64_t i = 0; i < n; ++i) columns.push_back(Below(random, 7) - 1);
  bag.ids = c.Integers(ids, c.wide);
  const int64_t size = c.wide ? 8 : 4, end = splits.back();
  const bool padded = bag.layout == Layout::kRagged;
  if (padded) c.stretches.back()->Poison(0, before * size), c.stretches.back()->Poison(end * size, n * size);
  if (c.weighted && !dense && !bag.sequence_length) {
    float* weights = c.Floats(n);
    for (int64_t i = 0; i < n; ++i) {
      weights[i] = 0.25f * static_cast<float>(Below(random, 12) - (bad_of ? 2 : 0));
      if (bag.prune_weights && Below(random, 8) == 0) weights[i] = NAN;
    }
    bag.weights = weights;
    if (padded) c.stretches.back()->Poison(0, before * 4), c.stretches.back()->Poison(end * 4, n * 4);
  }
  if (padded) bag.bags = c.Integers(splits, Below(random, 2));
  if (sparse) bag.bags = c.Integers(rows, Below(random, 2));
  if (sparse && bag.sequence_length) bag.columns = c.Integers(columns, Below(random, 2));
}

// Of one feature alone, or some of the columns of an output that features share.
void MakeOutput(Case& c, Random& random) {
  Bag& bag = c.bag;
  const int64_t width = (bag.sequence_length ? bag.sequence_length : 1) * bag.table.dim;
  c.column = Below(random, 2) ? Below(random, 9) : 0;
  bag.out_stride = c.column + width + (c.column ? Below(random, 9) : 0);
  c.out_values = bag.num_bags * width;
  c.size = c.half ? 2 : 4;
  c.start = c.Memory(bag.num_bags * bag.out_stride * c.size, c.size);
  bag.out = c.start + c.column * c.size;
  c.out = c.stretches.back().get();
}

double Got(const Case& c, int64_t at) {
  const uint8_t* value = c.start + at * c.size;
  if (c.half) {
    uint16_t h;
    std::memcpy(&h, value, 2);
    return FromHalf(h, c.bag.table.type == RowType::kBF16);
  }
  float x;
  std::memcpy(&x, value, 4);
  return x;
}

// The contract of bag.h, word for word, in double precision.
std::vector<double> Reference(const Case& c, int64_t* bad) {
  const Bag& bag = c.bag;
  const int64_t dim = bag.table.dim, length = bag.sequence_length;
  std::vector<double> out(c.out_values, 0.0), divisors(bag.num_bags, 0.0);
  *bad = 0;
  int64_t ragged = 0;
  for (int64_t i = 0; i < bag.num_ids; ++i) {
    int64_t b = i, l = 0;
    if (bag.layout == Layout::kSparse) {
      b = bag.bags[i];
      if (b < 0 || b >= bag.num_bags) continue;
      if (length) l = bag.columns[i];
    } else if (bag.layout == Layout::kRagged) {
      if (i < bag.bags[0] || i >= bag.bags[bag.num_bags]) continue;
      while (i >= bag.bags[ragged + 1]) ++ragged;
      b = ragged;
      l = i - bag.bags[b];
    }
    if (length && (l < 0 || l >= length)) continue;
    const int64_t id = bag.ids[i];
    if (bag.prune_ids && id < 0) continue;
    if (bag.prune_weights && bag.weights && !(bag.weights[i] > 0)) continue;
    if (id < 0 || id >= bag.table.vocabulary) {
      ++*bad;
      continue;
    }
    const double w = bag.weights ? bag.weights[i] : 1;
    divisors[b] += bag.combiner == Combiner::kSqrtn ? w * w : w;
    const double* const row = c.values.data() + (id - c.first_row) * dim;
    for (int64_t d = 0; d < dim; ++d) out[(length ? b * length + l : b) * dim + d] += w * row[d];
  }
  if (length || bag.layout == Layout::kDense || bag.combiner == Combiner::kSum) return out;
  for (int64_t b = 0; b < bag.num_bags; ++b) {
    const double divisor = bag.combiner == Combiner::kSqrtn ? std::sqrt(divisors[b]) : divisors[b];
    for (int64_t d = 0; d < dim; ++d) out[b * dim + d] = divisor == 0 ? 0 : out[b * dim + d] / divisor;
  }
  return out;
}

void Fail(const Case& c, const char* isa, const std::string& what) {
  std::fprintf(stderr, "%s on %s: %s\n", c.name.c_str(), isa, what.c_str());
  std::exit(1);
}

// Runs a case by the tasks of a cut, in any order; returns the number of bad ids.
int64_t Run(Case& c, const Instance& instance, const Placed& placed, Cut cut, Random& random) {
  std::memset(c.start, 0xFF, c.bag.num_bags * c.bag.out_stride * c.size);
  Plan plan;
  AddTasks(0, c.bag, placed, &cut, &plan);
  PlacePartials(&c.bag, &plan);
  for (size_t i = plan.tasks.size(); i > 1; --i) std::swap(plan.tasks[i - 1], plan.tasks[Below(random, i)]);
  int64_t bad = 0;
  for (const Task& task : plan.tasks) bad += instance.run(c.bag, placed, task);
  for (const Shared& shared : plan.shared) {
    FinishBag(c.bag, shared.bag, plan.partials.data() + shared.first_partial, shared.count);
  }
  return bad;
}

// Runs a case on every instance, cut into tasks of `chunk` bytes.
void Check(Case& c, Random& random, int64_t chunk) {
  Scratch scratch;
  Placed placed;
  const std::string wrong = Place(c.bag, scratch, &placed);
  if (!wrong.empty()) Fail(c, "any", wrong);
  int64_t expected_bad = 0;
  const std::vector<double> expected = Reference(c, &expected_bad);
  for (const Instance& instance : FindInstances().of) {
    if (!instance.run) continue;
    const int64_t stride = c.bag.out_stride, bytes = c.bag.num_bags * stride * c.size;
    const int64_t bad = Run(c, instance, placed, Cut{1, 0, chunk}, random);
    if (bad != expected_bad) {
      Fail(c, instance.name, std::to_string(bad) + " bad ids, expected " + std::to_string(expected_bad));
    }
    const int64_t width = c.bag.num_bags ? c.out_values / c.bag.num_bags : 0;
    const double tolerance = c.half ? (c.bag.table.type == RowType::kBF16 ? 0x1p-8 : 0x1p-11) : 1e-5;
    for (int64_t i = 0; i < c.out_values; ++i) {
      const double got = Got(c, i / width * stride + c.column + i % width);
      if (!(std::abs(got - expected[i]) <= tolerance * std::max(1.0, std::abs(expected[i])))) {
        Fail(c, instance.name, "value " + std::to_string(i) + " is " + std::to_string(got) + ", expected " +
                                   std::to_string(expected[i]));
      }
    }
    for (int64_t i = 0; i < bytes; ++i) {
      const int64_t column = i / c.size % stride - c.column;
      if ((column < 0 || column >= width) && c.start[i] != 0xFF) Fail(c, instance.name, "another feature's column was written");
    }
  }
  if (!c.out->GuardsHold()) Fail(c, "any", "a guard beside the output was written");
}

void Sweep(Random& random, int64_t* cases) {
  for (int64_t dim = 1; dim <= 257; ++dim) {
    for (int type = 0; type <= static_cast<int>(RowType::kCodes4); ++type) {
      for (int layout = 0; layout <= 2; ++layout) {
        Case c;
        Bag& bag = c.bag;
        bag.layout = static_cast<Layout>(layout);
        bag.combiner = static_cast<Combiner>(Below(random, 3));
        bag.prune_ids = Below(random, 2), bag.prune_weights = Below(random, 2);
        bag.num_bags = Below(random, 9);
        bag.sequence_length = layout && Below(random, 3) == 0 ? 1 + Below(random, 5) : 0;
        MakeTable(c, static_cast<RowType>(type), Below(random, 16) ? 1 + Below(random, 40) : 0, dim);
        c.wide = Below(random, 2), c.weighted = Below(random, 2);
        MakeIds(c, random, Lengths(bag, random, Below(random, 8) ? 3 : 40), Below(random, 2) ? 8 : 0);
        MakeOutput(c, random);
        c.name = "dim " + std::to_string(dim) + " type " + std::to_string(type) + " layout " + std::to_string(layout) +
                 " combiner " + std::to_string(static_cast<int>(bag.combiner)) + " case " + std::to_string(*cases);
        Check(c, random, 1 + Below(random, 4096));
        ++*cases;
      }
    }
  }
}

// Rows of several blocks of columns in bags of many ids, which are summed a run of them at a time, up to a bad one.
void LongBags(Random& random, int64_t* cases) {
  for (int64_t dim : {8, 64, 96, 128, 192, 256, 384, 512, 1024}) {
    for (int type = 0; type <= static_cast<int>(RowType::kCodes4); ++type) {
      for (int combiner = 0; combiner <= 2; ++combiner) {
        Case c;
        c.bag.layout = Layout::kRagged, c.bag.combiner = static_cast<Combiner>(combiner);
        c.bag.num_bags = 1 + Below(random, 12);
        MakeTable(c, static_cast<RowType>(type), 1 + Below(random, 40), dim);
        c.wide = Below(random, 2), c.weighted = Below(random, 2);
        MakeIds(c, random, Lengths(c.bag, random, 1 + Below(random, 60)), Below(random, 2) ? 300 : 0);
        if (Below(random, 2)) c.bag.prune_ids = true;
        MakeOutput(c, random);
        c.name = "long bags, dim " + std::to_string(dim) + " type " + std::to_string(type) + " combiner " +
                 std::to_string(combiner);
        Check(c, random, Cut::kMost);
        ++*cases;
      }
    }
  }
}

// One bag of many ids beside empty ones: it is cut into pieces, whatever the chunk. So few ids are bad that some pieces
// have none.
void HugeBag(Random& random, RowType type, Combiner combiner, Layout layout, bool weighted, int64_t* cases) {
  Case c;
  c.bag.layout = layout, c.bag.combiner = combiner, c.bag.num_bags = 1000;
  c.bag.prune_ids = Below(random, 2), c.bag.prune_weights = Below(random, 2);
  MakeTable(c, type, 50, Below(random, 2) ? 8 : 33);
  std::vector<int64_t> lengths(1000, 0);
  lengths[400] = 50'000;
  c.wide = Below(random, 2), c.weighted = weighted;
  MakeIds(c, random, lengths, 20'000);
  MakeOutput(c, random);
  c.name = "huge bag, type " + std::to_string(static_cast<int>(type)) + " combiner " +
           std::to_string(static_cast<int>(combiner)) + " layout " + std::to_string(static_cast<int>(layout));
  Scratch scratch;
  Placed placed;
  Place(c.bag, scratch, &placed);
  Plan plan;
  Cut cut{3, Cost(c.bag, placed)};
  AddTasks(0, c.bag, placed, &cut, &plan);
  if (plan.shared.size() != 1 || plan.shared[0].count < 4) Fail(c, "any", "the bag was not cut");
  Check(c, random, 1 << 16);
  ++*cases;
  // Weights whose sums are rounded: its bits are the same for however many threads it was cut.
  float* weights = c.Floats(c.bag.num_ids);
  for (int64_t i = 0; i < c.bag.num_ids; ++i) weights[i] = 1.0f / static_cast<float>(1 + Below(random, 1000));
  c.bag.weights = weights, c.bag.prune_weights = false;
  for (const Instance& instance : FindInstances().of) {
    if (!instance.run) continue;
    std::vector<uint8_t> bits[2];
    for (const int many : {0, 1}) {
      Run(c, instance, placed, Cut{many ? 24 : 3, Cost(c.bag, placed)}, random);
      bits[many].assign(c.start, c.start + c.bag.num_bags * c.bag.out_stride * c.size);
    }
    if (bits[0] != bits[1]) Fail(c, instance.name, "its bits depend on the number of threads");
  }
}

void HugeBags(Random& random, int64_t* cases) {
  for (int type = 0; type <= static_cast<int>(RowType::kCodes4); ++type) {
    for (int combiner = 0; combiner <= 2; ++combiner) {
      const int variant = 3 * type + combiner;
      if (type == static_cast<int>(RowType::kF16) && !combiner) continue;  // it cannot hold such sums
      HugeBag(random, static_cast<RowType>(type), static_cast<Combiner>(combiner),
              variant % 2 ? Layout::kSparse : Layout::kRagged, variant / 2 % 2, cases);
    }
  }
}

// Rows more than 2^32 bytes from the first one, in memory of which no other page is touched.
void FarRows(Random& random, int64_t* cases) {
  constexpr int64_t kBytes = int64_t{5} << 30, kRows = 40;
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (memory == MAP_FAILED) {
    std::printf("no addresses for 5 GiB: rows beyond 2^32 bytes were not looked up\n");
    return;
  }
  for (RowType type : {RowType::kF32, RowType::kInt8}) {
    for (int64_t dim : {8, 33, 256}) {
      for (int variant = 0; variant < 10; ++variant) {  // of layouts, those with sequences apart, and ids
        const int layout = variant < 6 ? variant / 2 : variant / 2 - 2;
        Case c;
        c.bag.layout = static_cast<Layout>(layout), c.bag.num_bags = 9, c.bag.sequence_length = variant < 6 ? 0 : 3;
        MakeTable(c, type, kRows, dim);
        Table& t = c.bag.table;
        t.vocabulary = kBytes / t.row_bytes();
        c.first_row = t.vocabulary - kRows;
        std::memcpy(static_cast<uint8_t*>(memory) + c.first_row * t.row_bytes(), t.rows, kRows * t.row_bytes());
        t.rows = memory;
        c.wide = variant % 2, c.weighted = Below(random, 2);
        MakeIds(c, random, Lengths(c.bag, random, 20), 300);
        MakeOutput(c, random);
        c.name = "far rows, dim " + std::to_string(dim) + " type " + std::to_string(static_cast<int>(type)) +
                 " variant " + std::to_string(variant);
        Check(c, random, Cut::kMost);
        ++*cases;
      }
    }
  }
  munmap(memory, kBytes);
}

// Pieces of work get smaller, and make up all of it.
void PiecesGetSmaller() {
  Case c;
  c.bag.num_bags = 10'000, c.bag.num_ids = 20'000, c.bag.table.dim = 64;
  std::vector<int64_t> splits(c.bag.num_bags + 1);
  for (size_t b = 0; b < splits.size(); ++b) splits[b] = 2 * static_cast<int64_t>(b);
  c.bag.bags = c.Integers(splits, false);
  c.name = "pieces";
  Scratch scratch;
  Placed placed;
  Place(c.bag, scratch, &placed);
  Plan plan;
  Cut cut{3, Cost(c.bag, placed)};
  AddTasks(0, c.bag, placed, &cut, &plan);
  int64_t next = 0, before = c.bag.num_bags;
  for (const Task& task : plan.tasks) {
    const int64_t bags = task.last_bag - task.first_bag;
    if (task.first_bag != next || bags > before) Fail(c, "any", "a piece is out of place, or larger than the one before");
    next = task.last_bag, before = bags;
  }
  if (next != c.bag.num_bags || cut.rest) Fail(c, "any", "the pieces are not all of the work");
  if (plan.tasks[0].last_bag < 10 * before) Fail(c, "any", "the first piece is small");
}

// Once a thread has been through a task, it has what memory such a task takes, and so it is with finding its bags.
void TasksAllocateNothing(Random& random) {
  for (int type = 0; type <= static_cast<int>(RowType::kCodes4); ++type) {
    for (int64_t dim : {8, 33, 256}) {
      for (int layout = 0; layout <= 2; ++layout) {
        for (bool sequences : {false, true}) {
          if (sequences && !layout) continue;
          Case c;
          c.bag.layout = static_cast<Layout>(layout), c.bag.num_bags = 100, c.bag.sequence_length = sequences ? 3 : 0;
          MakeTable(c, static_cast<RowType>(type), 40, dim);
          c.wide = Below(random, 2), c.weighted = Below(random, 2);
          MakeIds(c, random, Lengths(c.bag, random, 8), 100);
          MakeOutput(c, random);
          c.name = "allocations, dim " + std::to_string(dim) + " type " + std::to_string(type) + " layout " +
                   std::to_string(layout);
          Scratch scratch;
          Placed placed;
          Place(c.bag, scratch, &placed);
          const int64_t placing = allocations;
          Place(c.bag, scratch, &placed);
          if (allocations != placing) {
            Fail(c, "any", "to find its bags allocated " + std::to_string(allocations - placing) + " times");
          }
          const bool dense = c.bag.layout == Layout::kDense;
          const Task all = {0, 0, 100, dense ? 0 : placed.splits[0], dense ? 100 : placed.splits[100], nullptr};
          for (const Instance& instance : FindInstances().of) {
            if (!instance.run) continue;
            instance.run(c.bag, placed, all);
            const int64_t before = allocations;
            instance.run(c.bag, placed, all);
            if (allocations != before) {
              Fail(c, instance.name, "a task allocated " + std::to_string(allocations - before) + " times");
            }
          }
        }
      }
    }
  }
}

void RefusedSplits() {
  for (const std::vector<int64_t>& splits : {std::vector<int64_t>{0, 2, 1}, {-1, 0, 2}, {0, 1, 4}, {0, INT64_MAX, 3}}) {
    Case c;
    c.bag.num_bags = 2, c.bag.num_ids = 3, c.bag.table.dim = 4;
    c.bag.bags = c.Integers(splits, true);
    c.name = "splits";
    Scratch scratch;
    Placed placed;
    if (Place(c.bag, scratch, &placed).empty()) Fail(c, "any", "bad splits were taken");
  }
}

}  // namespace
}  // namespace jaxembed

int main() {
  using namespace jaxembed;
  Random random(20261125);
  int64_t cases = 0;
  Sweep(random, &cases);
  HugeBags(random, &cases);
  LongBags(random, &cases);
  FarRows(random, &cases);
  PiecesGetSmaller();
  TasksAllocateNothing(random);
  RefusedSplits();
  std::printf("%lld cases on", static_cast<long long>(cases));
  for (const Instance& instance : FindInstances().of) {
    if (instance.run) std::printf(" %s", instance.name);
  }
  std::printf("\n");
}
