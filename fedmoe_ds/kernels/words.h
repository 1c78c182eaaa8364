// Words: vectors of 32-bit words and of floats, blocks of words transposed in registers, and memory for packed operands.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;  // numbers per vector
constexpr int kRows = 12;   // rows of a tile: two vectors of sums each, with room for one of weights in 32 registers
#else
constexpr int kLanes = 8;  // 256 bits
constexpr int kRows = 6;   // in 16 registers
#endif
constexpr int kPanel = 2 * kLanes;  // columns of a tile
constexpr int64_t kDepth = 128;     // factors of a panel
constexpr int kLine = 64;           // bytes of a cache line
constexpr int kAlias = 1024;        // numbers after which places in the first cache repeat

typedef float Wide __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Loose __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

// Words of weights and panels, whatever their type is elsewhere.
typedef uint32_t Word __attribute__((may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t)), may_alias));
typedef uint32_t LooseWords __attribute__((vector_size(kLanes * sizeof(uint32_t)), aligned(2), may_alias));

// Exchanges the off-diagonal quarters of all squares of 2 kSpan x 2 kSpan words along the diagonal of a block.
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

// Transposes a block of kLanes x kLanes words in registers.
inline void transpose_block(Words* row) {
  if constexpr (kLanes == 16) exchange<8>(row);
  exchange<4>(row);
  exchange<2>(row);
  exchange<1>(row);
}

// to[k][j] = w[j][k] for `columns` rows of `width` words that lie `step` words apart; to has rows of kPanel words.
inline void transpose(const Word* w, int64_t step, int64_t width, int64_t columns, Word* to) {
  const int64_t blocks_k = width / kLanes * kLanes, blocks_j = columns / kLanes * kLanes;
  for (int64_t k = 0; k < blocks_k; k += kLanes)
    for (int64_t j = 0; j < blocks_j; j += kLanes) {
      Words row[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) row[i] = *reinterpret_cast<const LooseWords*>(w + (j + i) * step + k);
      transpose_block(row);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) *reinterpret_cast<Words*>(to + (k + i) * kPanel + j) = row[i];
    }
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t k = j < blocks_j ? blocks_k : 0; k < width; ++k) to[k * kPanel + j] = w[j * step + k];
}

// Memory that a thread keeps from one call to the next.
struct Kept {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Kept() { std::free(memory); }
};
thread_local Kept kept_rooms[2];

// Memory for packed operands, as it was left by the call before. Small ones are kept: fresh pages cost more than a
// product of a few rows does.
class Room {
 public:
  // `number` tells the rooms of one product apart.
  Room(int number, int64_t bytes) {
    Kept& kept = kept_rooms[number];
    if (bytes > kept.bytes && bytes <= kMost) {
      std::free(kept.memory);
      kept.memory = allocate(bytes);
      kept.bytes = kept.memory == nullptr ? 0 : bytes;
    }
    own_ = bytes > kMost;
    memory_ = own_ ? allocate(bytes) : bytes <= kept.bytes ? kept.memory : nullptr;
    ready_ = memory_ != nullptr || bytes == 0;
  }
  Room(const Room&) = delete;
  ~Room() {
    if (own_) std::free(memory_);
  }
  bool ready() const { return ready_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  static constexpr int64_t kMost = 3 << 20;
  static void* allocate(int64_t bytes) { return std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine); }

  void* memory_;
  bool own_, ready_;
};

// Lines of memory that are needed next, asked for a few at a time while something else is multiplied.
class Ahead {
 public:
  // `rows` rows of `bytes` that lie `step` bytes apart; none where `at` is null.
  Ahead(const void* at, int64_t rows, int64_t step, int64_t bytes)
      : at_(static_cast<const char*>(at)), rows_(at == nullptr ? 0 : rows), step_(step), bytes_(bytes) {}

  static Ahead nothing() { return Ahead(nullptr, 0, 0, 0); }

  template <int kLines>
  void ask() {
    for (int i = 0; i < kLines && rows_ > 0; ++i) {
      __builtin_prefetch(at_ + done_, 0, 2);
      done_ += kLine;
      if (done_ >= bytes_) {
        done_ = 0;
        at_ += step_;
        --rows_;
      }
    }
  }

 private:
  const char* at_;
  int64_t rows_, step_, bytes_, done_ = 0;
};

// Asks for nothing, at no cost in a loop.
struct Nothing {
  template <int>
  void ask() {}
};

}  // namespace
