// How fast this machine reads memory: in a stream, and given rows, with all threads of OpenMP.
//
// Rows follow an array of int32 row numbers, as a lookup does. With each cache line of a row that is read, the same line
// of one some rows ahead is fetched: as evenly as can be. Nothing is done with a row but adding it up.
#include <cstdint>
#include <cstring>

namespace {

// kWords is the row size in 8-byte words, or 0 where it is known at run time only.
template <int64_t kWords>
uint64_t AddRows(const char* table, int64_t row_bytes, const int32_t* ids, int64_t count, int64_t ahead) {
  const int64_t words = kWords ? kWords : row_bytes / 8, bytes = words * 8;
  uint64_t lanes[8] = {};
  for (int64_t i = 0; i < count; ++i) {
    const char* next = table + ids[i + ahead < count ? i + ahead : i] * row_bytes;
    const char* row = table + ids[i] * row_bytes;
    int64_t word = 0;
    for (; word + 8 <= words; word += 8) {
      __builtin_prefetch(next + word * 8);
      uint64_t block[8];
      std::memcpy(block, row + word * 8, sizeof block);
      for (int lane = 0; lane < 8; ++lane) lanes[lane] += block[lane];
    }
    __builtin_prefetch(next + bytes - 1);
    for (; word < words; ++word) {
      uint64_t value;
      std::memcpy(&value, row + word * 8, 8);
      lanes[word % 8] += value;
    }
  }
  uint64_t sum = 0;
  for (uint64_t lane : lanes) sum += lane;
  return sum;
}

using Adder = uint64_t (*)(const char*, int64_t, const int32_t*, int64_t, int64_t);

Adder AdderFor(int64_t row_bytes) {
  switch (row_bytes) {
    case 16: return AddRows<2>;
    case 32: return AddRows<4>;
    case 40: return AddRows<5>;
    case 64: return AddRows<8>;
    case 72: return AddRows<9>;
    case 128: return AddRows<16>;
    case 136: return AddRows<17>;
    case 256: return AddRows<32>;
    case 264: return AddRows<33>;
    case 512: return AddRows<64>;
    case 1024: return AddRows<128>;
    default: return AddRows<0>;
  }
}

}  // namespace

// The sum of the 8-byte words of rows ids[0 .. count); row_bytes is a multiple of 8.
extern "C" uint64_t ReadRows(const char* table, int64_t row_bytes, const int32_t* ids, int64_t count, int64_t ahead,
                             int threads) {
  const Adder add = AdderFor(row_bytes);
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum)
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = count * t / threads, end = count * (t + 1) / threads;
    sum += add(table, row_bytes, ids + begin, end - begin, ahead);
  }
  return sum;
}

// The sum of the 8-byte words of `bytes` bytes, a multiple of 64.
extern "C" uint64_t ReadStream(const char* memory, int64_t bytes, int threads) {
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum)
  for (int t = 0; t < threads; ++t) {
    uint64_t lanes[8] = {};
    for (int64_t line = bytes / 64 * t / threads; line < bytes / 64 * (t + 1) / threads; ++line) {
      uint64_t block[8];
      std::memcpy(block, memory + line * 64, sizeof block);
      for (int lane = 0; lane < 8; ++lane) lanes[lane] += block[lane];
    }
    for (uint64_t lane : lanes) sum += lane;
  }
  return sum;
}
