// Matrix products of row groups with frozen weights, single-threaded, float32. Compiled by compiling.py.
//
// Legend: M rows, K inner width, N output width; `ends` are the end rows of contiguous groups.
//
// Every element of a result is one chain of multiply-adds over k = 0 .. K-1, whatever rows surround its row. A row's bits therefore
// depend on that row and the weights alone, so rows of all clients may share one call and still be reproducible one by one. A tile
// of 12 rows x 32 columns keeps its sums in vector registers; the 32 columns of the weights are copied into a dense panel first.
// Weights of many experts come from memory: those of the next panel are asked for while this one is multiplied.
//
// Weights may be bfloat16. A processor with AVX512-BF16 then rounds the rows to bfloat16 as well and adds up products of pairs in
// float32, at twice the rate; any other one widens the panel.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;            // floats per vector
constexpr int kPanel = 2 * kLanes;    // columns of a tile
constexpr int kRows = 12;             // rows of a tile
constexpr int kLine = 64;             // bytes of a cache line
constexpr int kAlias = 1024;          // numbers after which places in the first cache repeat

typedef float Wide __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Loose __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

// Words of weights and panels, whatever their type is elsewhere.
typedef uint32_t Word __attribute__((may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t)), may_alias));
typedef uint32_t LooseWords __attribute__((vector_size(kLanes * sizeof(uint32_t)), aligned(4), may_alias));

// The weights of the next panel, asked for two cache lines at a time: a tile has as many turns as a panel has pairs of lines.
class Ahead {
 public:
  // From the panel's first weight on; none where it is null.
  template <typename Weight>
  Ahead(const Weight* w, int64_t N, int64_t K, bool transposed) : at_(reinterpret_cast<const char*>(w)) {
    const int64_t bytes = kPanel * sizeof(Weight);
    pieces_ = w == nullptr ? 0 : (transposed ? 1 : K);
    length_ = transposed ? K * bytes : bytes;
    step_ = transposed ? 0 : N * sizeof(Weight);
  }

  void ask() {
    for (int i = 0; i < 2 && pieces_ > 0; ++i) {
      __builtin_prefetch(at_ + done_, 0, 2);
      done_ += kLine;
      if (done_ >= length_) {
        done_ = 0;
        at_ += step_;
        --pieces_;
      }
    }
  }

 private:
  const char* at_;
  int64_t pieces_, length_, step_, done_ = 0;
};

struct Nothing {
  void ask() {}
};

struct FloatTile {
  typedef float Number;

  template <int M, typename Asked>
  static void run(const float* x, int64_t ldx, const float* panel, int64_t K, float* y, int64_t N, int64_t columns, Asked ahead) {
    Wide left[M] = {}, right[M] = {};
    for (int64_t k = 0; k < K; ++k) {
      ahead.ask();
      const Wide first = *reinterpret_cast<const Wide*>(panel + k * kPanel);
      const Wide second = *reinterpret_cast<const Wide*>(panel + k * kPanel + kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const float value = x[m * ldx + k];
        left[m] += first * value;
        right[m] += second * value;
      }
    }
    for (int m = 0; m < M; ++m) {
      if (columns == kPanel) {
        *reinterpret_cast<Loose*>(y + m * N) = left[m];
        *reinterpret_cast<Loose*>(y + m * N + kLanes) = right[m];
      } else {
        float both[kPanel];
        std::memcpy(both, &left[m], sizeof(Wide));
        std::memcpy(both + kLanes, &right[m], sizeof(Wide));
        std::memcpy(y + m * N, both, columns * sizeof(float));
      }
    }
  }
};

// All rows with one panel, tile by tile: the first asks for what comes next, the others have their hands free. K counts Numbers.
template <typename Tile, typename Number = typename Tile::Number>
void all_rows(const Number* x, int64_t ldx, const Number* panel, int64_t M, int64_t K, float* y, int64_t N, int64_t columns,
              Ahead ahead) {
  const bool first = M < kRows;
  if (!first) {
    Tile::template run<kRows>(x, ldx, panel, K, y, N, columns, ahead);
    for (M -= kRows; M >= kRows; M -= kRows)
      Tile::template run<kRows>(x += kRows * ldx, ldx, panel, K, y += kRows * N, N, columns, Nothing{});
    x += kRows * ldx;
    y += kRows * N;
  }
#define LEFT_OVER(m)                                                               \
  case m:                                                                          \
    first ? Tile::template run<m>(x, ldx, panel, K, y, N, columns, ahead)          \
          : Tile::template run<m>(x, ldx, panel, K, y, N, columns, Nothing{});     \
    break;
  switch (M) {
    LEFT_OVER(1) LEFT_OVER(2) LEFT_OVER(3) LEFT_OVER(4) LEFT_OVER(5) LEFT_OVER(6)
    LEFT_OVER(7) LEFT_OVER(8) LEFT_OVER(9) LEFT_OVER(10) LEFT_OVER(11)
    default: break;
  }
}

// Numbers from row to row: rows whose places in the cache coincide push each other out of it, so they get a line between them.
int64_t spread(int64_t width) { return width % kAlias ? width : width + kLanes; }

float widened(float value) { return value; }

[[maybe_unused]] float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Exchanges the off-diagonal quarters of all squares of 2 kSpan x 2 kSpan words along the diagonal of a 16 x 16 block.
template <int kSpan>
void exchange(Words* row) {
  Words low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & kSpan ? kLanes + i - kSpan : i;
    high[i] = i & kSpan ? kLanes + i : i + kSpan;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kSpan)) {
      const Words first = row[i], second = row[i + kSpan];
      row[i] = __builtin_shuffle(first, second, low);
      row[i + kSpan] = __builtin_shuffle(first, second, high);
    }
}

// to[k][j] = w[j][k] for w with rows of K words, `columns` rows of it; whole blocks of 16 x 16 words stay in registers.
void transpose(const Word* w, int64_t K, int64_t columns, Word* to) {
  const int64_t blocks_k = K / kLanes * kLanes, blocks_j = columns / kLanes * kLanes;
  for (int64_t j = 0; j < blocks_j; j += kLanes)
    for (int64_t k = 0; k < blocks_k; k += kLanes) {
      Words row[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) row[i] = *reinterpret_cast<const LooseWords*>(w + (j + i) * K + k);
      exchange<8>(row);
      exchange<4>(row);
      exchange<2>(row);
      exchange<1>(row);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) *reinterpret_cast<Words*>(to + (k + i) * kPanel + j) = row[i];
    }
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t k = j < blocks_j ? blocks_k : 0; k < K; ++k) to[k * kPanel + j] = w[j * K + k];
}

// Room for a panel and for rows in other clothes, zeroed: columns and factors that are not there count as zeros.
class Room {
 public:
  explicit Room(int64_t bytes) : memory_(std::aligned_alloc(64, (bytes / 64 + 1) * 64)) {
    if (memory_ != nullptr) std::memset(memory_, 0, bytes);
  }
  ~Room() { std::free(memory_); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
};

// The first weight of the panel after the one at column n: of the same weights, or of those that come `after` them.
template <typename Weight>
const Weight* next_panel(const Weight* w, int64_t n, int64_t N, int64_t K, bool transposed, const Weight* after) {
  return n + kPanel >= N ? after : w + (n + kPanel) * (transposed ? K : 1);
}

// Products with a panel of floats, from weights of either type.
template <typename Weight>
struct Widening {
  Room panel, rows;
  explicit Widening(int64_t K, int64_t M) : panel(K * kPanel * 4), rows(spread(K) == K ? 1 : spread(K) * 4 * M) {}
  bool ready() const { return panel.as<float>() != nullptr && rows.as<float>() != nullptr; }

  void run(const float* x, const Weight* w, float* y, int64_t M, int64_t N, int64_t K, bool transposed, const Weight* after) {
    const int64_t ldx = spread(K);
    if (ldx != K) {
      float* to = rows.as<float>();
      for (int64_t m = 0; m < M; ++m) std::memcpy(to + m * ldx, x + m * K, K * sizeof(float));
      x = to;
    }
    for (int64_t n = 0; n < N; n += kPanel) {
      const int64_t columns = N - n < kPanel ? N - n : kPanel;
      if (transposed)
        fill_transposed(w + n * K, K, columns);
      else
        fill(w + n, N, K, columns);
      const Ahead ahead(next_panel(w, n, N, K, transposed, after), N, K, transposed);
      all_rows<FloatTile>(x, ldx, panel.as<float>(), M, K, y + n, N, columns, ahead);
    }
  }

 private:
  void fill_transposed(const Weight* w, int64_t K, int64_t columns) {
    if constexpr (sizeof(Weight) == sizeof(float)) {
      transpose(reinterpret_cast<const Word*>(w), K, columns, panel.as<Word>());
    } else {
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t k = 0; k < K; ++k) panel.as<float>()[k * kPanel + j] = widened(w[j * K + k]);
    }
  }

  void fill(const Weight* w, int64_t N, int64_t K, int64_t columns) {
    float* to = panel.as<float>();
    for (int64_t k = 0; k < K; ++k, w += N, to += kPanel) {
      for (int64_t j = 0; j < columns; ++j) to[j] = widened(w[j]);
    }
  }
};

#ifdef __AVX512BF16__
// Products of pairs: `pairs` of neighbouring factors lie in one 32-bit word, in rows as in panels.
struct PairTile {
  typedef Word Number;

  template <int M, typename Asked>
  static void run(const Word* x, int64_t ldx, const Word* panel, int64_t pairs, float* y, int64_t N, int64_t columns, Asked ahead) {
    __m512 left[M], right[M];
    for (int m = 0; m < M; ++m) left[m] = right[m] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; ++k) {
      ahead.ask();
      const __m512bh first = (__m512bh)_mm512_load_si512(panel + k * kPanel);
      const __m512bh second = (__m512bh)_mm512_load_si512(panel + k * kPanel + kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const __m512bh value = (__m512bh)_mm512_set1_epi32(x[m * ldx + k]);
        left[m] = _mm512_dpbf16_ps(left[m], value, first);
        right[m] = _mm512_dpbf16_ps(right[m], value, second);
      }
    }
    const __mmask16 low = columns >= kLanes ? 0xffff : (1u << columns) - 1;
    const __mmask16 high = columns >= kPanel ? 0xffff : (columns > kLanes ? (1u << (columns - kLanes)) - 1 : 0);
    for (int m = 0; m < M; ++m) {
      _mm512_mask_storeu_ps(y + m * N, low, left[m]);
      _mm512_mask_storeu_ps(y + m * N + kLanes, high, right[m]);
    }
  }
};

struct Pairing {
  Room panel, rows;
  explicit Pairing(int64_t K, int64_t M) : panel((K + 1) / 2 * kPanel * 4), rows(spread((K + 1) / 2) * 4 * M) {}
  bool ready() const { return panel.as<char>() != nullptr && rows.as<char>() != nullptr; }

  void run(const float* x, const uint16_t* w, float* y, int64_t M, int64_t N, int64_t K, bool transposed, const uint16_t* after) {
    const int64_t pairs = (K + 1) / 2;
    round_rows(x, M, K, pairs);
    for (int64_t n = 0; n < N; n += kPanel) {
      const int64_t columns = N - n < kPanel ? N - n : kPanel;
      if (transposed)
        fill_transposed(w + n * K, K, columns);
      else
        fill(w + n, N, K, columns);
      const Ahead ahead(next_panel(w, n, N, K, transposed, after), N, K, transposed);
      all_rows<PairTile>(rows.as<Word>(), spread(pairs), panel.as<Word>(), M, pairs, y + n, N, columns, ahead);
    }
  }

 private:
  void fill_transposed(const uint16_t* w, int64_t K, int64_t columns) {
    if (K % 2 == 0) {
      transpose(reinterpret_cast<const Word*>(w), K / 2, columns, panel.as<Word>());
      return;
    }
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t k = 0; k < K; ++k) panel.as<uint16_t>()[(k / 2 * kPanel + j) * 2 + k % 2] = w[j * K + k];
  }

  // Two rows of weights become one row of words; the last of an odd number of rows is paired with zeros.
  void fill(const uint16_t* w, int64_t N, int64_t K, int64_t columns) {
    Word* to = panel.as<Word>();
    for (int64_t k = 0; k < K; k += 2, w += 2 * N, to += kPanel) {
      const uint32_t other = k + 1 < K ? 0xffffffff : 0;
      const uint16_t* next = other ? w + N : w;
      for (int64_t j = 0; j < columns; ++j) to[j] = w[j] | ((static_cast<uint32_t>(next[j]) << 16) & other);
    }
  }

  void round_rows(const float* x, int64_t M, int64_t K, int64_t pairs) {
    uint16_t* to = rows.as<uint16_t>();
    for (int64_t m = 0; m < M; ++m, x += K, to += 2 * spread(pairs)) {
      for (int64_t k = 0; k < K; k += kLanes) {
        const __mmask16 there = K - k >= kLanes ? 0xffff : (1u << (K - k)) - 1;
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, x + k));
        uint16_t part[kLanes];
        std::memcpy(part, &half, sizeof part);
        std::memcpy(to + k, part, (K - k >= kLanes ? kLanes : K - k) * sizeof(uint16_t));
      }
      if (K % 2) to[K] = 0;
    }
  }
};
using Halves = Pairing;
#else
using Halves = Widening<uint16_t>;
#endif

template <typename Product, typename Weight>
int each_group(const float* x, const Weight* w, float* y, const int32_t* ends, int64_t groups, int64_t stride, int64_t N,
               int64_t K, bool transposed) {
  int64_t most = 0, start = 0;
  for (int64_t g = 0; g < groups; start = ends[g++])
    if (ends[g] - start > most) most = ends[g] - start;
  Product product(K, most);
  if (!product.ready()) return 1;
  start = 0;
  for (int64_t g = 0, after = 0; g < groups; start = ends[g], g = after) {
    for (after = g + 1; after < groups && ends[after] == ends[after - 1];) ++after;  // the next group that has rows
    const Weight* next = after < groups ? w + after * stride : nullptr;
    if (ends[g] > start) product.run(x + start * K, w + g * stride, y + start * N, ends[g] - start, N, K, transposed, next);
  }
  return 0;
}

}  // namespace

extern "C" {

// y = x W_g for the rows of every group g, its weights at w + g * stride: [N,K] read as the transpose where `transposed`, else
// [K,N]. Returns 0, or 1 without memory.
int product_groups(const float* x, const float* w, float* y, const int32_t* ends, int64_t groups, int64_t stride, int64_t N,
                   int64_t K, int64_t transposed) {
  return each_group<Widening<float>>(x, w, y, ends, groups, stride, N, K, transposed != 0);
}

// The same with bfloat16 weights.
int half_product_groups(const float* x, const uint16_t* w, float* y, const int32_t* ends, int64_t groups, int64_t stride,
                        int64_t N, int64_t K, int64_t transposed) {
  return each_group<Halves>(x, w, y, ends, groups, stride, N, K, transposed != 0);
}
}
