// The hot loop. Compiled once per instruction set, with JAXEMBED_ISA naming the namespace.
//
// Nothing here may make a symbol that other files share (an inline function or template of the standard
// library, say): the linker would keep one of its instances, perhaps one that the processor cannot run.
#include <cstring>
#include <type_traits>

#include "bag.h"
#if defined(__AVX2__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of the header's own undefined vectors (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace jaxembed::JAXEMBED_ISA {
namespace {

// As wide as a register: wider vectors would live on the stack.
#if defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kMostVectors = 8;  // summed in registers at a time; GCC keeps longer arrays in memory
// Whole rows of a power of two are summed in wider vectors, and more of them, where there are.
#if defined(__AVX512F__)
constexpr int kWholeLanes = 16, kWholeVectors = 16;
#elif defined(__aarch64__)
constexpr int kWholeLanes = kLanes, kWholeVectors = 16;
#else
constexpr int kWholeLanes = kLanes, kWholeVectors = 8;
#endif

template <int kN>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * kN)));
  typedef int32_t Integers __attribute__((vector_size(4 * kN)));
  typedef uint32_t Words __attribute__((vector_size(4 * kN)));
  typedef uint16_t Halves __attribute__((vector_size(2 * kN)));
};
template <int kN>
using FloatsOf = typename Vector<kN>::Floats;
template <int kN>
using IntegersOf = typename Vector<kN>::Integers;
using Floats = FloatsOf<kLanes>;

// Rows fetched ahead of use: about as many lines of memory as a processor waits for at a time.
constexpr int64_t Ahead(int64_t row_bytes) { return row_bytes <= 64 ? 48 : row_bytes <= 320 ? 24 : 16; }
constexpr int64_t kRun = 32;    // entries per pass where a row takes several passes

float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  uint32_t bits;
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  } else if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

uint16_t FloatToHalf(float value) {
  uint32_t x;
  std::memcpy(&x, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((x >> 16) & 0x8000);
  x &= 0x7fffffff;
  if (x > 0x7f800000) return sign | 0x7e00;
  if (x >= 0x477ff000) return sign | 0x7c00;
  if (x < 0x38800000) {  // subnormal: let the float adder round
    float f;
    std::memcpy(&f, &x, 4);
    f += 0.5f;
    std::memcpy(&x, &f, 4);
    return sign | static_cast<uint16_t>(x - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((x - 0x38000000 + 0xfff + ((x >> 13) & 1)) >> 13);
}

inline uint16_t FloatToBfloat(float value) {  // without a branch, so that loops of it vectorize
  uint32_t x;
  std::memcpy(&x, &value, 4);
  const uint32_t nan = (x >> 16) | 0x40, rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((x & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

template <RowType T>
inline float Element(const Table& t, const uint8_t* row, int64_t d) {
  if constexpr (T == RowType::kF32) {
    float x;
    std::memcpy(&x, row + 4 * d, 4);
    return x;
  } else if constexpr (T == RowType::kBF16 || T == RowType::kF16) {
    uint16_t h;
    std::memcpy(&h, row + 2 * d, 2);
    if constexpr (T == RowType::kF16) return HalfToFloat(h);
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  } else if constexpr (T == RowType::kInt8) {
    return static_cast<float>(row[d]);
  } else if constexpr (T == RowType::kCodes8) {
    return t.codebook[row[d]];
  } else {
    const int code = (row[d >> 1] >> (4 * (d & 1))) & 15;
    if constexpr (T == RowType::kInt4) return static_cast<float>(code);
    return t.codebook[code];
  }
}

template <int kN>
inline FloatsOf<kN> Shorts(typename Vector<kN>::Halves h) {  // bfloat16
  using Words = typename Vector<kN>::Words;
#if defined(__AVX512F__)
  if constexpr (kN == 16) return (FloatsOf<kN>)((Words)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#endif
#if defined(__AVX2__)
  if constexpr (kN == 8) return (FloatsOf<kN>)((Words)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#endif
  return (FloatsOf<kN>)(__builtin_convertvector(h, Words) << 16);
}

template <int kN>
inline FloatsOf<kN> HalfFloats(typename Vector<kN>::Halves h) {  // float16
#if defined(__AVX512F__)
  if constexpr (kN == 16) return (FloatsOf<kN>)_mm512_cvtph_ps((__m256i)h);
#endif
#if defined(__AVX2__) && defined(__F16C__)
  if constexpr (kN == 8) return (FloatsOf<kN>)_mm256_cvtph_ps((__m128i)h);
#elif defined(__ARM_NEON)
  if constexpr (kN == 4) return vcvt_f32_f16((float16x4_t)h);
#endif
  FloatsOf<kN> x;
  for (int i = 0; i < kN; ++i) x[i] = HalfToFloat(h[i]);
  return x;
}

// kN bytes as integers.
template <int kN>
inline IntegersOf<kN> Bytes(const uint8_t* bytes) {
#if defined(__AVX512F__)
  if constexpr (kN == 16) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return (IntegersOf<kN>)_mm512_cvtepu8_epi32(packed);
  }
#endif
#if defined(__AVX2__)
  if constexpr (kN == 8) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    return (IntegersOf<kN>)_mm256_cvtepu8_epi32(packed);
  }
#endif
  IntegersOf<kN> x;
#if defined(__ARM_NEON)
  uint32_t word;
  std::memcpy(&word, bytes, 4);
  x = (IntegersOf<kN>)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(word))));
#else
  for (int i = 0; i < kN; ++i) x[i] = bytes[i];
#endif
  return x;
}

// kN codes of four bits, the first one lowest.
template <int kN>
inline IntegersOf<kN> Nibbles(const uint8_t* bytes) {
  using Words = typename Vector<kN>::Words;
  Words x;
  if constexpr (kN == 16) {
    uint32_t low, high;
    std::memcpy(&low, bytes, 4);
    std::memcpy(&high, bytes + 4, 4);
    for (int i = 0; i < 8; ++i) x[i] = low >> (4 * i), x[8 + i] = high >> (4 * i);
  } else {
    uint32_t word = 0;
    std::memcpy(&word, bytes, kN / 2);
    for (int i = 0; i < kN; ++i) x[i] = word >> (4 * i);
  }
  return (IntegersOf<kN>)(x & 15);
}

template <int kN>
inline FloatsOf<kN> Decoded(const float* codebook, IntegersOf<kN> codes) {
#if defined(__AVX512F__)
  if constexpr (kN == 16) return (FloatsOf<kN>)_mm512_i32gather_ps((__m512i)codes, codebook, 4);
#endif
#if defined(__AVX2__)
  if constexpr (kN == 8) return (FloatsOf<kN>)_mm256_i32gather_ps(codebook, (__m256i)codes, 4);
#endif
  FloatsOf<kN> x;
  for (int i = 0; i < kN; ++i) x[i] = codebook[codes[i]];
  return x;
}

// Columns [d, d + kN) of a row; d is a multiple of kN.
template <RowType T, int kN>
inline FloatsOf<kN> Load(const Table& t, const uint8_t* row, int64_t d) {
  if constexpr (T == RowType::kF32) {
    FloatsOf<kN> x;
    std::memcpy(&x, row + 4 * d, 4 * kN);
    return x;
  } else if constexpr (T == RowType::kBF16 || T == RowType::kF16) {
    typename Vector<kN>::Halves h;
    std::memcpy(&h, row + 2 * d, 2 * kN);
    if constexpr (T == RowType::kBF16) return Shorts<kN>(h);
    return HalfFloats<kN>(h);
  } else if constexpr (T == RowType::kInt8) {
    return __builtin_convertvector((Bytes<kN>(row + d)), FloatsOf<kN>);
  } else if constexpr (T == RowType::kCodes8) {
    return Decoded<kN>(t.codebook, Bytes<kN>(row + d));
  } else if constexpr (T == RowType::kInt4) {
    return __builtin_convertvector(Nibbles<kN>(row + d / 2), FloatsOf<kN>);
  } else {
    return Decoded<kN>(t.codebook, Nibbles<kN>(row + d / 2));
  }
}

// Scale (0) or bias (1) of a row that ends at `end`.
inline float AtEnd(const uint8_t* end, int which) {
  float x;
  std::memcpy(&x, end - kScaleBiasBytes + 4 * which, 4);
  return x;
}

template <typename Id>
struct Entries {
  const Id* ids;
  const float* weights;  // null: all ones
  int64_t count;
  const Id* ahead_end;  // rows are fetched ahead up to here
};

// Always inline: GCC takes a function that only fetches ahead for one without effect, and drops its calls.
__attribute__((always_inline)) inline void Prefetch(const Table& t, int64_t row_bytes, int64_t id) {
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(t.vocabulary)) return;
  const uint8_t* row = static_cast<const uint8_t*>(t.rows) + id * row_bytes;
  for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(row + i, 0, 3);
  __builtin_prefetch(row + row_bytes - 1, 0, 3);
}

// sum[0 .. NV kLanes) += weights * rows, columns from d on; NV = 0: `tail` columns one by one.
template <RowType T, int NV, bool kWeighted, typename Id>
inline void Block(const Table& t, int64_t row_bytes, const Entries<Id>& e, int64_t d, int64_t tail, float* sum,
                  bool first, bool fetch) {
  constexpr int kVectors = NV > 0 ? NV : 1;
  Floats acc[kVectors];
  if constexpr (NV == 0) {
    acc[0] = Floats{};
    if (!first) std::memcpy(&acc[0], sum, 4 * tail);
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      acc[v] = Floats{};
      if (!first) std::memcpy(&acc[v], sum + kLanes * v, 4 * kLanes);
    }
  }
  const uint8_t* base = static_cast<const uint8_t*>(t.rows);
  const int64_t ahead = Ahead(row_bytes);
  for (int64_t j = 0; j < e.count; ++j) {
    if (fetch && e.ids + j + ahead < e.ahead_end) Prefetch(t, row_bytes, e.ids[j + ahead]);
    const int64_t id = e.ids[j];
    const uint8_t* row = base + id * row_bytes;
    float w = 1.0f;
    if constexpr (kWeighted) w = e.weights[j];
    float bias = 0.0f;
    if constexpr (Affine(T)) {
      bias = w * AtEnd(row + row_bytes, 1);
      w *= AtEnd(row + row_bytes, 0);
    }
    if constexpr (NV == 0) {
      for (int64_t i = 0; i < tail; ++i) acc[0][i] += w * Element<T>(t, row, d + i) + bias;
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const Floats x = Load<T, kLanes>(t, row, d + kLanes * v);
        if constexpr (Affine(T)) {
          acc[v] += w * x + bias;
        } else if constexpr (kWeighted) {
          acc[v] += w * x;
        } else {
          acc[v] += x;
        }
      }
    }
  }
  if constexpr (NV == 0) {
    std::memcpy(sum, &acc[0], 4 * tail);
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) std::memcpy(sum + kLanes * v, &acc[v], 4 * kLanes);
  }
}

template <RowType T, bool kWeighted, typename Id>
inline void Pass(const Table& t, int64_t row_bytes, const Entries<Id>& e, float* sum, bool first) {
  int64_t d = 0;
  bool fetch = true;
  const int64_t dim = t.dim;
#define JAXEMBED_BLOCK(NV)                                                          \
  {                                                                                 \
    Block<T, NV, kWeighted, Id>(t, row_bytes, e, d, dim - d, sum + d, first, fetch); \
    d += kLanes * NV;                                                                    \
    fetch = false;                                                                  \
  }
  while (dim - d >= kMostVectors * kLanes) JAXEMBED_BLOCK(kMostVectors)
  if (dim - d >= 4 * kLanes) JAXEMBED_BLOCK(4)
  if (dim - d >= 2 * kLanes) JAXEMBED_BLOCK(2)
  if (dim - d >= kLanes) JAXEMBED_BLOCK(1)
  if (dim > d) JAXEMBED_BLOCK(0)
#undef JAXEMBED_BLOCK
}

// sum[0 .. D) = (first) or += weighted rows of all entries, which are valid.
template <RowType T, bool kWeighted, typename Id>
inline void Accumulate(const Table& t, int64_t row_bytes, Entries<Id> e, float* sum, bool first) {
  const int64_t total = e.count;
  const int64_t dim = t.dim;
  // A single block takes all columns, so that it may run through all entries.
  const bool one_pass = dim <= kLanes || (dim <= kMostVectors * kLanes && dim % kLanes == 0 && !(dim & (dim - 1)));
  const int64_t run = one_pass ? total : kRun;
  int64_t done = 0;
  do {
    e.count = total - done < run ? total - done : run;
    Pass<T, kWeighted, Id>(t, row_bytes, e, sum, first);
    first = false;
    done += e.count;
    e.ids += e.count;
    if (kWeighted) e.weights += e.count;
  } while (done < total);
}

// Writes a row, `at` values from the start of the output.
inline void Write(const Bag& bag, int64_t at, const float* sum) {
  const int64_t dim = bag.table.dim;
  if (bag.table.type == RowType::kBF16 || bag.table.type == RowType::kF16) {
    uint16_t* out = static_cast<uint16_t*>(bag.out) + at;
    if (bag.table.type == RowType::kBF16) {
      for (int64_t d = 0; d < dim; ++d) out[d] = FloatToBfloat(sum[d]);
      return;
    }
    int64_t d = 0;
#if defined(__AVX2__) && defined(__F16C__)
    for (; d + 8 <= dim; d += 8) {
      const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(sum + d), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d), h);
    }
#endif
    for (; d < dim; ++d) out[d] = FloatToHalf(sum[d]);
  } else if (sum != static_cast<float*>(bag.out) + at) {
    std::memcpy(static_cast<float*>(bag.out) + at, sum, 4 * dim);
  }
}

inline float Inverse(Combiner combiner, float divisor) {
  if (combiner == Combiner::kSum) return 1.0f;
  if (combiner == Combiner::kSqrtn) divisor = __builtin_sqrtf(divisor);
  return divisor;
}

inline void Scale(Combiner combiner, float divisor, float* sum, int64_t dim) {
  if (combiner == Combiner::kSum) return;
  divisor = Inverse(combiner, divisor);
  if (divisor == 0.0f) {
    std::memset(sum, 0, 4 * dim);
  } else {
    for (int64_t d = 0; d < dim; ++d) sum[d] /= divisor;
  }
}

// Whether an id is a row. A vocabulary counts as at most 2^31 or 2^63, so that a negative id never is.
template <typename Id>
struct Rows {
  using Unsigned = std::make_unsigned_t<Id>;
  static constexpr Unsigned kNegative = Unsigned{1} << (8 * sizeof(Id) - 1);
  Unsigned size;

  explicit Rows(int64_t vocabulary)
      : size(static_cast<uint64_t>(vocabulary) < kNegative ? static_cast<Unsigned>(vocabulary) : kNegative) {}
  bool Has(Id id) const { return static_cast<Unsigned>(id) < size; }
  bool HasAll(const Id* ids, int64_t begin, int64_t end) const {
    bool bad = false;
    for (int64_t i = begin; i < end; ++i) bad |= !Has(ids[i]);
    return !bad;
  }
};

template <RowType T, bool kWeighted, typename Id>
struct Runner {
  const Bag& bag;
  const Placed& placed;
  const Id* ids;
  const int64_t row_bytes;
  float* scratch;  // [D], or [L, D], where the output is not float32
  bool in_place;   // the entries of a bag follow each other, and weights prune none
  int64_t bad = 0;
  const Id* ahead_end = nullptr;

  int64_t At(int64_t i) const { return placed.order ? placed.order[i] : i; }

  float* Sum(int64_t at) const {
    return scratch ? scratch : static_cast<float*>(bag.out) + at;
  }

  // Whether entry i takes part.
  bool Live(int64_t i) {
    const int64_t id = ids[i];
    if (bag.prune_ids && id < 0) return false;
    if (bag.prune_weights && bag.weights && !(bag.weights[i] > 0)) return false;
    if (static_cast<uint64_t>(id) < static_cast<uint64_t>(bag.table.vocabulary)) return true;
    ++bad;
    return false;
  }

  void Divide(const float* weights, int64_t count, float& divisor) const {
    if (bag.combiner == Combiner::kSum) return;
    if (!kWeighted) {
      divisor += static_cast<float>(count);
    } else if (bag.combiner == Combiner::kMean) {
      for (int64_t j = 0; j < count; ++j) divisor += weights[j];
    } else {
      for (int64_t j = 0; j < count; ++j) divisor += weights[j] * weights[j];
    }
  }

  // Entries [begin, end) into sum; returns the divisor.
  float Combine(int64_t begin, int64_t end, float* sum) {
    float divisor = 0;
    if (in_place && Rows<Id>(bag.table.vocabulary).HasAll(ids, begin, end)) {
      const float* weights = kWeighted ? bag.weights + begin : nullptr;
      Accumulate<T, kWeighted, Id>(bag.table, row_bytes, {ids + begin, weights, end - begin, ahead_end}, sum, true);
      Divide(weights, end - begin, divisor);
      return divisor;
    }
    Id live_ids[kRun];
    float live_weights[kRun];
    bool first = true;
    int64_t i = begin;
    do {
      int64_t count = 0;
      for (; i < end && count < kRun; ++i) {
        const int64_t at = At(i);
        if (!Live(at)) continue;
        Prefetch(bag.table, row_bytes, ids[at]);
        live_ids[count] = ids[at];
        if (kWeighted) live_weights[count] = bag.weights[at];
        ++count;
      }
      Accumulate<T, kWeighted, Id>(bag.table, row_bytes, {live_ids, live_weights, count, live_ids}, sum, first);
      Divide(live_weights, count, divisor);
      first = false;
    } while (i < end);
    return divisor;
  }

  // Rows are fetched up to the entry `fetch_end`.
  void Sequence(int64_t b, int64_t begin, int64_t end, int64_t fetch_end) {
    const int64_t length = bag.sequence_length, dim = bag.table.dim, ahead = Ahead(row_bytes);
    float* sum = Sum(b * bag.out_stride);
    std::memset(sum, 0, 4 * length * dim);
    if (!bag.columns.data && end - begin > length) end = begin + length;
    for (int64_t i = begin; i < end; ++i) {
      if (i + ahead < fetch_end) Prefetch(bag.table, row_bytes, ids[At(i + ahead)]);
      const int64_t at = At(i);
      const int64_t l = bag.columns.data ? bag.columns[at] : i - begin;
      if (l < 0 || l >= length || !Live(at)) continue;
      Accumulate<T, false, Id>(bag.table, row_bytes, {ids + at, nullptr, 1, ids}, sum + l * dim, false);
    }
    for (int64_t l = 0; l < length; ++l) Write(bag, b * bag.out_stride + l * dim, sum + l * dim);
  }

  // Nothing is added to a row, so that it keeps its bits: zeros their sign, and XLA's threads take subnormals for zeros.
  void Dense(int64_t i) {
    constexpr bool kHalf = T == RowType::kBF16 || T == RowType::kF16;
    const int64_t dim = bag.table.dim, size = kHalf ? 2 : 4;
    uint8_t* out = static_cast<uint8_t*>(bag.out) + i * bag.out_stride * size;
    if (!Live(i)) {
      std::memset(out, 0, size * dim);
    } else if constexpr (Affine(T)) {
      Accumulate<T, false, Id>(bag.table, row_bytes, {ids + i, nullptr, 1, ids}, reinterpret_cast<float*>(out), true);
    } else {
      const uint8_t* row = static_cast<const uint8_t*>(bag.table.rows) + ids[i] * row_bytes;
      if constexpr (kHalf || T == RowType::kF32) {
        std::memcpy(out, row, size * dim);
      } else {
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) {
          const Floats x = Load<T, kLanes>(bag.table, row, d);
          std::memcpy(out + 4 * d, &x, sizeof x);
        }
        for (; d < dim; ++d) {
          const float x = Element<T>(bag.table, row, d);
          std::memcpy(out + 4 * d, &x, 4);
        }
      }
    }
  }

  void Run(const Task& task) {
    const int64_t ahead = Ahead(row_bytes);
    if (task.partial) {
      task.partial[bag.table.dim] = Combine(task.begin, task.end, task.partial);
      return;
    }
    for (int64_t b = task.first_bag; b < task.last_bag; ++b) {
      if (bag.layout == Layout::kDense) {
        if (b + ahead < task.last_bag) Prefetch(bag.table, row_bytes, ids[b + ahead]);
        Dense(b);
        continue;
      }
      const int64_t begin = placed.splits[b], end = placed.splits[b + 1];
      if (bag.sequence_length) {
        Sequence(b, begin, end, task.end);
        continue;
      }
      float* sum = Sum(b * bag.out_stride);
      const float divisor = Combine(begin, end, sum);
      Scale(bag.combiner, divisor, sum, bag.table.dim);
      Write(bag, b * bag.out_stride, sum);
    }
  }
};

constexpr int64_t BytesOf(RowType type, int64_t columns) {
  switch (type) {
    case RowType::kF32: return 4 * columns;
    case RowType::kBF16:
    case RowType::kF16: return 2 * columns;
    case RowType::kInt8:
    case RowType::kCodes8: return columns;
    default: return columns / 2;
  }
}

// Writes kN columns of a result in the type of the output.
template <RowType T, int kN>
inline void Store(void* out, int64_t at, FloatsOf<kN> x) {
  using Halves = typename Vector<kN>::Halves;
  using Words = typename Vector<kN>::Words;
  if constexpr (T == RowType::kBF16) {
    const Words bits = (Words)x, high = bits >> 16, nan = (Words)((bits & 0x7fffffff) > 0x7f800000);
    const Words rounded = (bits + 0x7fff + (high & 1)) >> 16;
    const Halves halves = __builtin_convertvector(((high | 0x40) & nan) | (rounded & ~nan), Halves);
    std::memcpy(static_cast<uint16_t*>(out) + at, &halves, sizeof halves);
  } else if constexpr (T == RowType::kF16) {
    uint16_t* halves = static_cast<uint16_t*>(out) + at;
#if defined(__AVX512F__)
    if constexpr (kN == 16) {
      const __m256i h = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves), h);
    }
#endif
#if defined(__AVX2__) && defined(__F16C__)
    if constexpr (kN == 8) {
      const __m128i h = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
      return _mm_storeu_si128(reinterpret_cast<__m128i*>(halves), h);
    }
#endif
    for (int i = 0; i < kN; ++i) halves[i] = FloatToHalf(x[i]);
  } else {
    std::memcpy(static_cast<float*>(out) + at, &x, sizeof x);
  }
}

// Whether NV vectors of a row are loaded two at a time: bfloat16 columns as the halves of words, the even ones in
// the first vector and the odd ones in the second. That takes no shuffles, neither here nor where they are stored.
template <RowType T, int NV>
constexpr bool kPaired = T == RowType::kBF16 && NV % 2 == 0;

template <int kN>
inline bool AnyNan(FloatsOf<kN> a, FloatsOf<kN> b) {
#if defined(__AVX512F__)
  if constexpr (kN == 16) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q);
#endif
#if defined(__AVX2__)
  if constexpr (kN == 8) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q));
#endif
  const IntegersOf<kN> nan = (a != a) | (b != b);
  int any = 0;
  for (int i = 0; i < kN; ++i) any |= nan[i];
  return any;
}

// Columns [0, NV kN) of a row, `step` (vector, its number) at a time.
template <RowType T, int kN, int NV, typename Step>
__attribute__((always_inline)) inline void EachVector(const Table& t, const uint8_t* row, Step step) {
  if constexpr (kPaired<T, NV>) {
    using Words = typename Vector<kN>::Words;
#pragma GCC unroll 16
    for (int v = 0; v < NV; v += 2) {
      Words words;
      std::memcpy(&words, row + 2 * kN * v, sizeof words);
      step((FloatsOf<kN>)(words << 16), v);
      step((FloatsOf<kN>)(words & 0xffff0000u), v + 1);
    }
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) step(Load<T, kN>(t, row, kN * v), v);
  }
}

// Writes what EachVector's vectors became, in the type of the output.
template <RowType T, int kN, int NV>
__attribute__((always_inline)) inline void StoreAll(void* out, int64_t at, const FloatsOf<kN> (&acc)[NV]) {
  if constexpr (kPaired<T, NV>) {
    using Words = typename Vector<kN>::Words;
    uint16_t* to = static_cast<uint16_t*>(out) + at;
    bool any_nan = false;
#pragma GCC unroll 16
    for (int v = 0; v < NV; v += 2) any_nan |= AnyNan<kN>(acc[v], acc[v + 1]);
    if (__builtin_expect(any_nan, false)) {
      for (int v = 0; v < NV; ++v) {
        for (int i = 0; i < kN; ++i) to[kN * (v & ~1) + 2 * i + (v & 1)] = FloatToBfloat(acc[v][i]);
      }
      return;
    }
#pragma GCC unroll 16
    for (int v = 0; v < NV; v += 2) {
      Words even = (Words)acc[v], odd = (Words)acc[v + 1];
      even += 0x7fff + ((even >> 16) & 1);
      odd += 0x7fff + ((odd >> 16) & 1);
      even = (even >> 16) | (odd & 0xffff0000u);
      std::memcpy(to + kN * v, &even, sizeof even);
    }
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) Store<T, kN>(out, at + kN * v, acc[v]);
  }
}

// Entries that RunWhole takes through all blocks of columns before the next ones. What is fetched of one block holds
// the beginning of the next, which a long bag would have lost by then; rows of float32 are whole lines.
template <RowType T>
constexpr int64_t kBlockRun = T == RowType::kF32 ? INT64_MAX : 16;

// The usual case: the entries of a bag follow each other and all count, and a row is `blocks` times NV vectors. With
// these known at compile time a row costs little more than its loads, and a bag than its stores.
//
// The first rows of the task must be there, those that each row would fetch ahead of it. The others are looked at as they
// are fetched: to run through all ids before would wait for each line of them. Returns the first bag that was not
// written, which is not the last if an id is no row.
//
// A function of its own for each, so that GCC gives the loop all registers.
template <RowType T, int kN, int NV, bool kWeighted, typename Id>
__attribute__((noinline)) int64_t RunWhole(const Bag& bag, const Placed& placed, const Task& task, int64_t blocks) {
  constexpr int64_t kColumns = NV * kN, kBytes = BytesOf(T, kColumns);
  const Table& t = bag.table;
  const int64_t row_bytes = blocks * kBytes + (Affine(T) ? kScaleBiasBytes : 0);
  const Id* ids = static_cast<const Id*>(bag.ids.data);
  const Rows<Id> rows(t.vocabulary);
  const Combiner combiner = bag.combiner;
  const int64_t ahead = Ahead(row_bytes), fetch_end = task.end - ahead;
  void* const out = bag.out;  // what is stored there cannot change these
  const int64_t out_stride = bag.out_stride;
  const int64_t run = blocks == 1 ? INT64_MAX : kBlockRun<T>;
  float* const sums = run == INT64_MAX ? nullptr : ThreadFloats(blocks * kColumns);  // of a bag between its runs
  int64_t end = placed.splits[task.first_bag];
  for (int64_t b = task.first_bag; b < task.last_bag; ++b) {
    const int64_t begin = end;
    end = placed.splits[b + 1];
    float divisor = 0;
    int64_t first = begin;
    do {
      const int64_t last = end - first <= run ? end : first + run;
      for (int64_t block = 0; block < blocks; ++block) {
        const uint8_t* base = static_cast<const uint8_t*>(t.rows) + block * kBytes;
        // From the block to the end of its row.
        const int64_t to_end = row_bytes - block * kBytes;
        FloatsOf<kN> acc[NV];
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) {
          acc[v] = FloatsOf<kN>{};
          if (first != begin) std::memcpy(&acc[v], sums + block * kColumns + kN * v, sizeof acc[v]);
        }
        for (int64_t i = first; i < last; ++i) {
          if (i < fetch_end) {
            const Id id = ids[i + ahead];
            if (__builtin_expect(!rows.Has(id), false)) return b;
            const uint8_t* row = base + id * row_bytes;
#pragma GCC unroll 16
            for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(row + line, 0, 3);
            if (Affine(T) && block == 0) __builtin_prefetch(row + to_end - 1, 0, 3);
          }
          const uint8_t* row = base + ids[i] * row_bytes;
          float w = 1.0f, bias = 0.0f;
          if constexpr (kWeighted) {
            w = bag.weights[i];
            if (block == 0) divisor += combiner == Combiner::kSqrtn ? w * w : w;
          }
          if constexpr (Affine(T)) {
            bias = w * AtEnd(row + to_end, 1);
            w *= AtEnd(row + to_end, 0);
          }
          EachVector<T, kN, NV>(t, row, [&](FloatsOf<kN> x, int v) {
            if constexpr (Affine(T)) {
              acc[v] += w * x + bias;  // not the biases apart: two large sums would cancel
            } else if constexpr (kWeighted) {
              acc[v] += w * x;
            } else {
              acc[v] += x;
            }
          });
        }
        if (last != end) {
#pragma GCC unroll 16
          for (int v = 0; v < NV; ++v) std::memcpy(sums + block * kColumns + kN * v, &acc[v], sizeof acc[v]);
          continue;
        }
        if (combiner != Combiner::kSum) {
          const float by = Inverse(combiner, kWeighted ? divisor : static_cast<float>(end - begin));
#pragma GCC unroll 16
          for (int v = 0; v < NV; ++v) acc[v] = by == 0.0f ? FloatsOf<kN>{} : acc[v] / by;
        }
        StoreAll<T, kN, NV>(out, b * out_stride + block * kColumns, acc);
      }
      first = last;
    } while (first < end);
  }
  return task.last_bag;
}

// What RunWhole returns; the task's first bag if its rows are of a width that it does not take.
template <RowType T, bool kWeighted, typename Id>
int64_t TryWhole(const Bag& bag, const Placed& placed, const Task& task) {
  const int64_t dim = bag.table.dim;
#define JAXEMBED_WHOLE(N, NV) \
  if (dim == N * NV) return RunWhole<T, N, NV, kWeighted, Id>(bag, placed, task, 1);
  JAXEMBED_WHOLE(kLanes, 1)
  if constexpr (kWholeLanes > kLanes) JAXEMBED_WHOLE(kWholeLanes, 1)
  JAXEMBED_WHOLE(kWholeLanes, 2)
  JAXEMBED_WHOLE(kWholeLanes, 4)
  if constexpr (kWholeVectors > 8) JAXEMBED_WHOLE(kWholeLanes, 8)
#undef JAXEMBED_WHOLE
  constexpr int64_t kMost = kWholeLanes * kWholeVectors;
  if (dim % kMost) return task.first_bag;
  return RunWhole<T, kWholeLanes, kWholeVectors, kWeighted, Id>(bag, placed, task, dim / kMost);
}

template <RowType T, bool kWeighted, typename Id>
int64_t RunAs(const Bag& bag, const Placed& placed, const Task& task) {
  const Id* ids = static_cast<const Id*>(bag.ids.data);
  Runner<T, kWeighted, Id> runner{bag, placed, ids, bag.table.row_bytes(), nullptr, false};
  runner.in_place = !placed.order && !(bag.prune_weights && bag.weights);
  runner.ahead_end = ids + task.end;
  Task rest = task;
  if (runner.in_place) {  // each row fetches the one so far ahead of it, so the first ones are left
    const int64_t ahead = Ahead(runner.row_bytes);
    const int64_t first = task.end - task.begin < ahead ? task.end : task.begin + ahead;
    for (int64_t i = task.begin; i < first; ++i) Prefetch(bag.table, runner.row_bytes, ids[i]);
    const bool combined = bag.layout != Layout::kDense && !bag.sequence_length && !task.partial;
    if (combined && Rows<Id>(bag.table.vocabulary).HasAll(ids, task.begin, first)) {
      rest.first_bag = TryWhole<T, kWeighted, Id>(bag, placed, task);
      if (rest.first_bag == task.last_bag) return 0;
    }
  }
  if (bag.table.type == RowType::kBF16 || bag.table.type == RowType::kF16) {
    runner.scratch = ThreadFloats(bag.table.dim * (bag.sequence_length ? bag.sequence_length : 1));
  }
  runner.Run(rest);
  return runner.bad;
}

template <RowType T>
int64_t RunTyped(const Bag& bag, const Placed& placed, const Task& task) {
  const bool weighted = bag.weights && !bag.sequence_length && bag.layout != Layout::kDense;
  if (bag.ids.wide) {
    return weighted ? RunAs<T, true, int64_t>(bag, placed, task) : RunAs<T, false, int64_t>(bag, placed, task);
  }
  return weighted ? RunAs<T, true, int32_t>(bag, placed, task) : RunAs<T, false, int32_t>(bag, placed, task);
}

}  // namespace

int64_t Run(const Bag& bag, const Placed& placed, const Task& task) {
  switch (bag.table.type) {
    case RowType::kF32: return RunTyped<RowType::kF32>(bag, placed, task);
    case RowType::kBF16: return RunTyped<RowType::kBF16>(bag, placed, task);
    case RowType::kF16: return RunTyped<RowType::kF16>(bag, placed, task);
    case RowType::kInt8: return RunTyped<RowType::kInt8>(bag, placed, task);
    case RowType::kInt4: return RunTyped<RowType::kInt4>(bag, placed, task);
    case RowType::kCodes8: return RunTyped<RowType::kCodes8>(bag, placed, task);
    case RowType::kCodes4: return RunTyped<RowType::kCodes4>(bag, placed, task);
  }
  return 0;
}

void Finish(const Bag& bag, int64_t b, float* partials, int64_t count) {
  const int64_t dim = bag.table.dim;
  for (int64_t p = 1; p < count; ++p) {
    for (int64_t d = 0; d <= dim; ++d) partials[d] += partials[p * (dim + 1) + d];
  }
  Scale(bag.combiner, partials[dim], partials, dim);
  Write(bag, b * bag.out_stride, partials);
}

}  // namespace jaxembed::JAXEMBED_ISA
