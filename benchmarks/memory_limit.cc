// How fast this machine reads memory: in a stream, and given rows, with all threads of OpenMP.
//
// Rows follow an array of int32 row numbers, as a lookup does. With each cache line of a row that is read, the same line
// of one some rows ahead is fetched: as evenly as can be. Nothing is done with a row but adding it up. A lookup also has
// its results to write: as many bytes as each takes are stored after each share of the rows, where that is wanted.
#include <cstdint>
#include <cstring>

namespace {

typedef uint64_t Words __attribute__((vector_size(32)));  // not an array, which GCC adds up one by one

inline Words Load(const char* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

// Of the rows ids[begin .. end), rows up to ids[last] fetched ahead; kBytes is the size of one, or 0 where it is known
// at run time only.
template <int64_t kBytes>
Words AddRows(const char* table, int64_t row_bytes, const int32_t* ids, int64_t begin, int64_t end, int64_t last,
              int64_t ahead) {
  const int64_t bytes = kBytes ? kBytes : row_bytes, lines = bytes / 64 * 64;
  Words low = {}, high = {};
  uint64_t rest = 0;
  for (int64_t i = begin; i < end; ++i) {
    const char* next = table + ids[i + ahead < last ? i + ahead : i] * bytes;
    const char* row = table + ids[i] * bytes;
    for (int64_t at = 0; at < lines; at += 64) {
      __builtin_prefetch(next + at);
      low += Load(row + at), high += Load(row + at + 32);
    }
    if (bytes % 64) __builtin_prefetch(next + bytes - 1);
    for (int64_t at = lines; at < bytes; at += 8) {
      uint64_t word;
      std::memcpy(&word, row + at, 8);
      rest += word;
    }
  }
  low += high;
  low[0] += rest;
  return low;
}

using Adder = Words (*)(const char*, int64_t, const int32_t*, int64_t, int64_t, int64_t, int64_t);

Adder AdderFor(int64_t row_bytes) {
  switch (row_bytes) {
    case 16: return AddRows<16>;
    case 32: return AddRows<32>;
    case 40: return AddRows<40>;
    case 64: return AddRows<64>;
    case 72: return AddRows<72>;
    case 128: return AddRows<128>;
    case 136: return AddRows<136>;
    case 256: return AddRows<256>;
    case 264: return AddRows<264>;
    case 512: return AddRows<512>;
    case 1024: return AddRows<1024>;
    default: return AddRows<0>;
  }
}

}  // namespace

// The sum of the 8-byte words of rows ids[0 .. count); row_bytes is a multiple of 8. `results` (null: none) takes
// a result of result_bytes, a multiple of 16, for each of `shares`; a thread has room for `room` of them, in turns.
extern "C" uint64_t ReadRows(const char* table, int64_t row_bytes, const int32_t* ids, int64_t count, int64_t ahead,
                             char* results, int64_t result_bytes, int64_t shares, int64_t room,
                             int threads) {
  const Adder add = AdderFor(row_bytes);
  if (!results) shares = threads;
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum)
  for (int t = 0; t < threads; ++t) {
    const int64_t first = shares * t / threads, past = shares * (t + 1) / threads, last = count * past / shares;
    for (int64_t share = first; share < past; ++share) {
      const Words words = add(table, row_bytes, ids, count * share / shares, count * (share + 1) / shares, last, ahead);
      sum += words[0] + words[1] + words[2] + words[3];
      if (!results) continue;
      char* result = results + (t * room + share % room) * result_bytes;
      for (int64_t at = 0; at < result_bytes; at += 16) std::memcpy(result + at, &words, 16);
    }
  }
  return sum;
}

// The sum of the 8-byte words of `bytes` bytes, a multiple of 64.
extern "C" uint64_t ReadStream(const char* memory, int64_t bytes, int threads) {
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum)
  for (int t = 0; t < threads; ++t) {
    Words low = {}, high = {};
    for (int64_t line = bytes / 64 * t / threads; line < bytes / 64 * (t + 1) / threads; ++line) {
      low += Load(memory + line * 64), high += Load(memory + line * 64 + 32);
    }
    low += high;
    sum += low[0] + low[1] + low[2] + low[3];
  }
  return sum;
}
