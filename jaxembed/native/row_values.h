// The columns of a row of any type as float32, and results in the type of the output.
// A part of run_task.cc, which says what must not be in here.
#ifndef JAXEMBED_ROW_VALUES_H_
#define JAXEMBED_ROW_VALUES_H_

#include <cstring>

#include "bag.h"
#include "sums.h"
#include "vectors.h"

namespace jaxembed::JAXEMBED_ISA {
namespace {

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
JAXEMBED_INLINE inline void EachVector(const Table& t, const uint8_t* row, Step step) {
  if constexpr (kPaired<T, NV>) {
    using Words = typename Vector<kN>::Words;
    Each<NV, 2>([&](auto v) JAXEMBED_INLINE {
      Words words;
      std::memcpy(&words, row + 2 * kN * v.value, sizeof words);
      step((FloatsOf<kN>)(words << 16), v);
      step((FloatsOf<kN>)(words & 0xffff0000u), Number<v.value + 1>());
    });
  } else {
    Each<NV>([&](auto v) JAXEMBED_INLINE { step(Load<T, kN>(t, row, kN * v.value), v); });
  }
}

// Writes what EachVector's vectors became, in the type of the output.
template <RowType T, int kN, int NV>
JAXEMBED_INLINE inline void StoreAll(void* out, int64_t at, const FloatsOf<kN> (&sums)[NV]) {
  if constexpr (kPaired<T, NV>) {
    using Words = typename Vector<kN>::Words;
    uint16_t* to = static_cast<uint16_t*>(out) + at;
    bool any_nan = false;
    Each<NV, 2>([&](auto v) JAXEMBED_INLINE { any_nan |= AnyNan<kN>(sums[v.value], sums[v.value + 1]); });
    if (__builtin_expect(any_nan, false)) {
      float copy[NV * kN];
      SaveSums<kN>(sums, copy);
      for (int v = 0; v < NV; ++v) {
        for (int i = 0; i < kN; ++i) to[kN * (v & ~1) + 2 * i + (v & 1)] = FloatToBfloat(copy[kN * v + i]);
      }
      return;
    }
    Each<NV, 2>([&](auto v) JAXEMBED_INLINE {
      Words even = (Words)sums[v.value], odd = (Words)sums[v.value + 1];
      even += 0x7fff + ((even >> 16) & 1);
      odd += 0x7fff + ((odd >> 16) & 1);
      even = (even >> 16) | (odd & 0xffff0000u);
      std::memcpy(to + kN * v.value, &even, sizeof even);
    });
  } else {
    Each<NV>([&](auto v) JAXEMBED_INLINE { Store<T, kN>(out, at + kN * v.value, sums[v.value]); });
  }
}

}  // namespace
}  // namespace jaxembed::JAXEMBED_ISA

#endif  // JAXEMBED_ROW_VALUES_H_
