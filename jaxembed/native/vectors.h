// Vectors of the instruction set that is compiled for, and what bytes of a row become in them.
// A part of run_task.cc, which says what must not be in here.
#ifndef JAXEMBED_VECTORS_H_
#define JAXEMBED_VECTORS_H_

#include <cstring>

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
// Whole rows of a power of two are summed in wider vectors where there are, and in sixteen of them at most. Wider rows
// are taken by blocks of as many as there are registers for.
#if defined(__AVX512F__)
constexpr int kWholeLanes = 16, kBlockVectors = 16;
#elif defined(__aarch64__)
constexpr int kWholeLanes = kLanes, kBlockVectors = 16;
#else
constexpr int kWholeLanes = kLanes, kBlockVectors = 8;
#endif
constexpr int kWholeVectors = 16;

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

}  // namespace
}  // namespace jaxembed::JAXEMBED_ISA

#endif  // JAXEMBED_VECTORS_H_
