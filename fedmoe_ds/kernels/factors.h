// Factors: what rows and weights are turned into before they are multiplied, and one step of the sum.
//
// Legend: M rows, K inner width, N output width; `depth` x `columns` is the block of weights that a panel holds.
//
// `Floats` are float32 as they are, and bfloat16 weights widened. `Pairs` are two neighbouring bfloat16 factors in one word,
// for a processor with AVX512-BF16, which adds their products to a float; the rows are rounded to bfloat16.

#pragma once

#include <algorithm>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "words.h"

namespace {

// Numbers from row to row: rows whose places in the cache coincide push each other out of it, so they get a line between them.
inline int64_t spread(int64_t width) { return width % kAlias ? width : width + kLine / 4; }

inline float widened(float value) { return value; }

inline float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename Number>
struct Floats {
  typedef Number Weight;
  typedef float Factor;
  static constexpr int64_t kIn = 1;  // weights in a factor

  static Wide add(Wide sum, Wide weights, float value) { return sum + weights * value; }

  // The rows themselves, or a copy of them in `room`.
  static const float* rows(const float* x, int64_t M, int64_t K, float* room) {
    if (spread(K) == K) return x;
    for (int64_t m = 0; m < M; ++m) std::memcpy(room + m * spread(K), x + m * K, K * sizeof(float));
    return room;
  }
  static int64_t room(int64_t M, int64_t K) { return spread(K) == K ? 0 : M * spread(K); }

  // Weights [K,N] from their corner on.
  static void fill(const Weight* w, int64_t N, int64_t depth, int64_t columns, float* panel) {
    for (int64_t k = 0; k < depth; ++k, w += N, panel += kPanel) {
      const int64_t there = columns == kPanel ? kPanel : columns;  // a constant, in most cases
      for (int64_t j = 0; j < there; ++j) panel[j] = widened(w[j]);
    }
  }

  // Weights [N,K].
  static void fill_transposed(const Weight* w, int64_t K, int64_t depth, int64_t columns, float* panel) {
    if constexpr (sizeof(Weight) == sizeof(float)) {
      transpose(reinterpret_cast<const Word*>(w), K, depth, columns, reinterpret_cast<Word*>(panel));
    } else {
      alignas(kLine) float wide[kPanel * kDepth];
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t k = 0; k < depth; ++k) wide[j * kDepth + k] = widened(w[j * K + k]);
      transpose(reinterpret_cast<const Word*>(wide), kDepth, depth, columns, reinterpret_cast<Word*>(panel));
    }
  }
};

#ifdef __AVX512BF16__
struct Pairs {
  typedef uint16_t Weight;
  typedef Word Factor;
  static constexpr int64_t kIn = 2;

  static Wide add(Wide sum, Wide weights, Word value) {
    return (Wide)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(value), (__m512bh)weights);
  }

  static const Word* rows(const float* x, int64_t M, int64_t K, Word* room) {
    const int64_t ldx = spread((K + 1) / 2);
    for (int64_t m = 0; m < M; ++m, x += K) {
      uint16_t* to = reinterpret_cast<uint16_t*>(room + m * ldx);
      for (int64_t k = 0; k < K; k += kLanes) {
        const int64_t count = std::min<int64_t>(K - k, kLanes);
        const __mmask16 there = (1u << count) - 1;
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, x + k));
        std::memcpy(to + k, &half, count * sizeof(uint16_t));
      }
      if (K % 2) to[K] = 0;
    }
    return room;
  }
  static int64_t room(int64_t M, int64_t K) { return M * spread((K + 1) / 2); }

  // Two rows of weights become one row of words; the last of an odd number of rows is paired with zeros.
  static void fill(const uint16_t* w, int64_t N, int64_t depth, int64_t columns, Word* panel) {
    for (int64_t k = 0; k < depth; k += 2, w += 2 * N, panel += kPanel) {
      const uint32_t other = k + 1 < depth ? 0xffffffff : 0;
      const uint16_t* next = other ? w + N : w;
      for (int64_t j = 0; j < columns; ++j) panel[j] = w[j] | ((static_cast<uint32_t>(next[j]) << 16) & other);
    }
  }

  static void fill_transposed(const uint16_t* w, int64_t K, int64_t depth, int64_t columns, Word* panel) {
    if (K % 2 == 0) {
      transpose(reinterpret_cast<const Word*>(w), K / 2, depth / 2, columns, panel);
      return;
    }
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t k = 0; k < depth; k += 2)
        panel[k / 2 * kPanel + j] = w[j * K + k] | (k + 1 < depth ? static_cast<uint32_t>(w[j * K + k + 1]) << 16 : 0);
  }
};
#endif

}  // namespace
