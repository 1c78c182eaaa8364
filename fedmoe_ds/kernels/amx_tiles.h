// AMX tiles: products of rows with bfloat16 weights on a processor with AMX-BF16. Rows are rounded
// once per call.
//
// Legend: M rows, K inner width, N output width.
//
// A tile holds 16 rows of 64 bytes. The processor multiplies a left tile of 16 rows x 32 factors with a right tile of 16
// pairs of factors x 16 columns and adds the result to a tile of 16 x 16 floats: an element is one chain over k in steps of
// 32, whatever its row and column are. What is not there (rows, columns, factors) counts as zeros.
//
// Weights [N,K] are left tiles as they lie in memory; the rows, packed as right tiles, give the result's transpose. Weights
// [K,N] are packed as right tiles, two rows of them interleaved, and the rows are left tiles.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "words.h"

namespace {

constexpr int kSide = 16;         // rows of a tile, and columns of a result
constexpr int kFactors = 32;      // factors of a tile
constexpr int64_t kTile = 1024;   // bytes of a tile
// Bytes that are packed at a time: they stay in the second cache, which has 2 MiB on processors with AMX.
constexpr int64_t kRowsBytes = 1 << 20, kWeightsBytes = 1 << 20;

inline int64_t count(int64_t numbers, int64_t side) { return (numbers + side - 1) / side; }

// Asks the system for the tiles' registers, once per process; false where it refuses.
inline bool tiles_permitted() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// All eight tiles at full size while this lives. They belong to the thread.
class Configured {
 public:
  Configured() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  Configured(const Configured&) = delete;
  ~Configured() { asm volatile("tilerelease"); }
};

// Not the compiler's intrinsics: those of GCC do not say that a tile reads and writes memory.
template <int kTo>
inline void load(const void* at, int64_t step) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(step), "i"(kTo) : "memory");
}
template <int kFrom>
inline void store(void* at, int64_t step) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(step), "i"(kFrom) : "memory");
}
template <int kTo>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTo));
}
template <int kTo, int kLeft, int kRight>
inline void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kLeft), "i"(kRight));
}

// One or two neighbouring tiles of an operand: those of the next 32 factors are `step` bytes on, a tile's rows `row` bytes
// apart.
struct Operand {
  const char *first, *second;
  int64_t row, step;
};

// Sums 0 to 3 = left tiles 4 and 5 x right tiles 6 and 7, over `depth` tiles; of either side there may be one alone.
template <bool kTwoLeft, bool kTwoRight>
void multiply_all(Operand left, Operand right, int64_t depth, Ahead weights, Ahead result) {
  zero<0>();
  zero<1>();
  zero<2>();
  zero<3>();
  for (int64_t k = 0; k < depth; ++k) {
    weights.ask<32>();  // as many lines as two tiles have
    result.ask<4>();
    load<6>(right.first + k * right.step, right.row);
    load<4>(left.first + k * left.step, left.row);
    multiply<0, 4, 6>();
    if constexpr (kTwoRight) {
      load<7>(right.second + k * right.step, right.row);
      multiply<1, 4, 7>();
    }
    if constexpr (kTwoLeft) {
      load<5>(left.second + k * left.step, left.row);
      multiply<2, 5, 6>();
      if constexpr (kTwoRight) multiply<3, 5, 7>();
    }
  }
}

class Tiles {
 public:
  Tiles(int64_t K, int64_t M)
      : depth_(std::max<int64_t>(count(K, kFactors), 1)),
        chunk_(fitting(kRowsBytes)),
        wide_(fitting(kWeightsBytes)),
        rows_(0, 2 * count(std::min(M, chunk_), 2 * kSide) * depth_ * kTile),
        weights_(1, wide_ / kSide * depth_ * kTile) {}
  bool ready() const { return rows_.ready() && weights_.ready(); }

  // `after` are the weights of the next product, null where there is none.
  void run(const float* x, const uint16_t* w, float* y, int64_t M, int64_t N, int64_t K, bool transposed,
           const uint16_t* after) {
    for (int64_t m = 0; m < M; m += chunk_) {
      const int64_t rows = std::min(M - m, chunk_);
      pack_rows(x + m * K, rows, K, transposed);
      if (transposed)
        weights_left(w, y + m * N, rows, N, K, m + rows < M ? w : after);
      else
        weights_right(w, y + m * N, rows, N, K);
    }
  }

 private:
  // Rounded rows become left tiles [m][k]; right ones, transposed by words, where the weights are left tiles.
  void pack_rows(const float* x, int64_t M, int64_t K, bool transposed) {
    for (int64_t m = 0; m < M; m += kSide)
      for (int64_t k = 0; k < depth_ * kFactors; k += kFactors) {
        Words block[kSide];
        const __mmask16 low = first(K - k), high = first(K - k - kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) {
          const float* at = x + (m + i) * K + k;
          __builtin_prefetch(at + kSide * K, 0, 2);
          __builtin_prefetch(at + kSide * K + kLanes, 0, 2);
          const bool there = m + i < M;
          block[i] = (Words)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(there ? high : 0, at + kLanes),
                                                _mm512_maskz_loadu_ps(there ? low : 0, at));
        }
        if (transposed) transpose_block(block);
        std::memcpy(rows_.as<char>() + place(m, k), block, kTile);
      }
  }

  // Left tiles are weights [N,K] where they lie.
  void weights_left(const uint16_t* w, float* y, int64_t M, int64_t N, int64_t K, const uint16_t* after) {
    for (int64_t n = 0; n < N; n += 2 * kSide) {
      const uint16_t* next = n + 2 * kSide < N ? w + (n + 2 * kSide) * K : after;
      Ahead ahead(next, 1, 0, 2 * kSide * K * 2);
      const char* at = reinterpret_cast<const char*>(w + n * K);
      int64_t row = K * 2;
      if (n + 2 * kSide > N || K % kFactors != 0 || K == 0) {
        // The processor would read on past the last row or into the next one: a copy has zeros there.
        row = depth_ * kFactors * 2;
        char* to = weights_.as<char>();
        std::memset(to, 0, 2 * kSide * row);
        for (int64_t j = 0; j < std::min<int64_t>(N - n, 2 * kSide); ++j) std::memcpy(to + j * row, w + (n + j) * K, K * 2);
        at = to;
      }
      for (int64_t m = 0; m < M; m += 2 * kSide) {
        left_block({at, at + kSide * row, row, 2 * kFactors}, m, y + m * N + n, N, M - m, N - n, ahead);
        ahead = Ahead::nothing();  // asked for once
      }
    }
  }

  // 32 columns x 32 rows of the result, whose transpose is in the tiles.
  void left_block(Operand weights, int64_t m, float* y, int64_t N, int64_t rows, int64_t columns, Ahead ahead) {
    const Operand right = packed(rows_, m);
    if (rows > kSide)
      multiply_all<true, true>(weights, right, depth_, ahead, result(y, N, rows));
    else
      multiply_all<true, false>(weights, right, depth_, ahead, result(y, N, rows));
    alignas(kLine) float sums[4][kSide * kSide];
    store_all(sums);
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t row = i % 2 * kSide, column = i / 2 * kSide;
      turn(sums[i], y + row * N + column, N, rows - row, columns - column);
    }
  }

  static void turn(const float* sums, float* y, int64_t N, int64_t rows, int64_t columns) {
    if (rows <= 0 || columns <= 0) return;
    Words block[kSide];
    std::memcpy(block, sums, sizeof block);
    transpose_block(block);
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i)
      if (i < rows) _mm512_mask_storeu_ps(y + i * N, first(columns), (__m512)block[i]);
  }

  // Right tiles are packed weights [K,N], as many columns at a time as the second cache holds.
  void weights_right(const uint16_t* w, float* y, int64_t M, int64_t N, int64_t K) {
    for (int64_t n = 0; n < N; n += wide_) {
      const int64_t wide = std::min(N - n, wide_);
      for (int64_t k = 0; k < depth_ * kFactors; k += kFactors)
        for (int64_t j = 0; j < wide; j += 2 * kSide) {
          char* to = weights_.as<char>() + place(j, k);
          interleave(w + k * N + n + j, N, K - k, N - n - j, to, to + depth_ * kTile);
        }
      for (int64_t m = 0; m < M; m += 2 * kSide)
        for (int64_t j = 0; j < wide; j += 2 * kSide) right_block(m, j, y + m * N + n + j, N, M - m, N - n - j);
    }
  }

  // 32 rows x 32 columns of weights: pairs of neighbouring rows become words. The rows after them are asked for.
  static void interleave(const uint16_t* w, int64_t N, int64_t rows, int64_t columns, char* left, char* right) {
    alignas(kLine) uint16_t places[2][2 * kSide];
    for (int i = 0; i < 2 * kSide; ++i)
      for (int half = 0; half < 2; ++half) places[half][i] = i / 2 + i % 2 * 2 * kSide + half * kSide;
    const __m512i low = _mm512_load_si512(places[0]), high = _mm512_load_si512(places[1]);
    const __mmask32 there = columns >= 2 * kSide ? 0xffffffff : (1u << columns) - 1;
#pragma GCC unroll 4
    for (int64_t k = 0; k < kFactors; k += 2, w += 2 * N, left += kLine, right += kLine) {
      __builtin_prefetch(w + kFactors * N, 0, 2);
      __builtin_prefetch(w + (kFactors + 1) * N, 0, 2);
      const __m512i one = _mm512_maskz_loadu_epi16(k < rows ? there : 0, w);
      const __m512i two = _mm512_maskz_loadu_epi16(k + 1 < rows ? there : 0, w + N);
      _mm512_store_si512(left, _mm512_permutex2var_epi16(one, low, two));
      _mm512_store_si512(right, _mm512_permutex2var_epi16(one, high, two));
    }
  }

  // 32 rows x 32 columns of the result.
  void right_block(int64_t m, int64_t j, float* y, int64_t N, int64_t rows, int64_t columns) {
    const Operand left = packed(rows_, m), right = packed(weights_, j);
    const Ahead nothing = Ahead::nothing();
    if (rows > kSide)
      multiply_all<true, true>(left, right, depth_, nothing, result(y, N, rows));
    else
      multiply_all<false, true>(left, right, depth_, nothing, result(y, N, rows));
    if (rows >= 2 * kSide && columns >= 2 * kSide) {
      store<0>(y, N * 4);
      store<1>(y + kSide, N * 4);
      store<2>(y + kSide * N, N * 4);
      store<3>(y + kSide * N + kSide, N * 4);
      return;
    }
    alignas(kLine) float sums[4][kSide * kSide];
    store_all(sums);
    for (int64_t i = 0; i < std::min<int64_t>(rows, 2 * kSide); ++i) {
      const float* row = sums[i / kSide * 2] + i % kSide * kSide;
      _mm512_mask_storeu_ps(y + i * N, first(columns), _mm512_load_ps(row));
      _mm512_mask_storeu_ps(y + i * N + kSide, first(columns - kSide), _mm512_load_ps(row + kSide * kSide));
    }
  }

  static void store_all(float (*sums)[kSide * kSide]) {
    store<0>(sums[0], kLine);
    store<1>(sums[1], kLine);
    store<2>(sums[2], kLine);
    store<3>(sums[3], kLine);
  }

  // Where a block of the result will be written: asked for while it is computed.
  static Ahead result(float* y, int64_t N, int64_t rows) {
    return Ahead(y, std::min<int64_t>(rows, 2 * kSide), N * 4, 2 * kLine);
  }

  // Two packed tiles, from row (or column) `number` on.
  Operand packed(const Room& room, int64_t number) const {
    const char* at = room.as<char>() + place(number, 0);
    return {at, at + depth_ * kTile, kLine, kTile};
  }

  int64_t place(int64_t number, int64_t k) const { return (number / kSide * depth_ + k / kFactors) * kTile; }

  // Rows (or columns) whose packed tiles take so many bytes: pairs of tiles, one at least.
  int64_t fitting(int64_t bytes) const { return std::max<int64_t>(bytes / (2 * depth_ * kTile), 1) * 2 * kSide; }

  static __mmask16 first(int64_t lanes) { return lanes >= kSide ? 0xffff : lanes <= 0 ? 0 : (1u << lanes) - 1; }

  const Configured configured_;
  const int64_t depth_, chunk_, wide_;
  const Room rows_, weights_;
};

}  // namespace
