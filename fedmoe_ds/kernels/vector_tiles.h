// Vector tiles: products of rows with weights by vector instructions, on every processor.
//
// Legend: M rows, K inner width, N output width.
//
// An element is one chain of additions over k = 0 .. K-1. A tile of kRows rows x kPanel columns keeps its sums in registers
// for the factors of a panel; the sums then wait in the result for those of the next panel, which changes no bit of them. A
// panel is a dense copy of kDepth x kPanel factors of the weights and stays in the first cache for all rows.
//
// Weights [N,K] are read kPanel rows at a time from their first to their last column. Of weights [K,N], the panels of a
// piece of kPiece columns come one after the other: narrow strips from top to bottom would visit every page of memory many
// times.

#pragma once

#include <algorithm>
#include <type_traits>

#include "factors.h"

namespace {

constexpr int64_t kPiece = 512;

// The two vectors of a row of sums: at a whole tile where it is, else by way of a copy.
inline void take(const float* y, int64_t columns, Wide& left, Wide& right) {
  float part[kPanel] = {};
  if (columns < kPanel) y = static_cast<const float*>(std::memcpy(part, y, columns * sizeof(float)));
  left = *reinterpret_cast<const Loose*>(y);
  right = *reinterpret_cast<const Loose*>(y + kLanes);
}

inline void give(Wide left, Wide right, int64_t columns, float* y) {
  float part[kPanel];
  float* to = columns < kPanel ? part : y;
  *reinterpret_cast<Loose*>(to) = left;
  *reinterpret_cast<Loose*>(to + kLanes) = right;
  if (columns < kPanel) std::memcpy(y, part, columns * sizeof(float));
}

// Sums of kM rows with a panel; the first panel begins them, the others go on with what is in y. Whole tiles know when they are
// compiled whether they begin, and whether they ask for anything.
template <typename Factors, int kM, typename Factor = typename Factors::Factor, typename Begins, typename Asked>
void tile(const Factor* x, int64_t ldx, const Factor* panel, int64_t depth, float* y, int64_t N, int64_t columns, Begins begins,
          Asked ahead) {
  Wide left[kM] = {}, right[kM] = {};
  if (!begins)
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) take(y + m * N, columns, left[m], right[m]);
  for (int64_t k = 0; k < depth; ++k) {
    ahead.template ask<2>();
    const Wide first = *reinterpret_cast<const Wide*>(panel + k * kPanel);
    const Wide second = *reinterpret_cast<const Wide*>(panel + k * kPanel + kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      left[m] = Factors::add(left[m], first, x[m * ldx + k]);
      right[m] = Factors::add(right[m], second, x[m * ldx + k]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) give(left[m], right[m], columns, y + m * N);
}

// The tile of M rows, fewer than kRows.
template <typename Factors, int kM = kRows - 1, typename... More>
void rest(int64_t M, More... more) {
  if (M == kM) return tile<Factors, kM>(more...);
  if constexpr (kM > 1) rest<Factors, kM - 1>(M, more...);
}

template <typename Factors>
class Vectors {
  typedef typename Factors::Weight Weight;
  typedef typename Factors::Factor Factor;
  static constexpr int64_t kPanelBytes = kDepth * kPanel * sizeof(Factor);

 public:
  Vectors(int64_t K, int64_t M) : rows_(0, Factors::room(M, K) * sizeof(Factor)), panel_(1, kPanelBytes) {
    // Columns that are not there are computed as well: what was left in their place may be no number, which takes long.
    if (panel_.ready()) std::memset(panel_.template as<char>(), 0, kPanelBytes);
  }
  bool ready() const { return panel_.ready() && rows_.ready(); }

  // `after` are the weights of the next product, null where there is none.
  void run(const float* x, const Weight* w, float* y, int64_t M, int64_t N, int64_t K, bool transposed, const Weight* after) {
    const Factor* rows = Factors::rows(x, M, K, rows_.template as<Factor>());
    const int64_t ldx = spread(count_factors(K)), depth = kDepth * Factors::kIn;
    const Shape shape{N, K, transposed ? kPanel : kPiece, depth, transposed};
    for (Place at; at.j < N;) {
      const int64_t columns = std::min<int64_t>(N - at.j, kPanel), there = std::min(K - at.k, depth);
      fill(w, shape, at, there, columns);
      const Place next = shape.after(at);
      const Ahead ahead = next.j < N ? block(w, shape, next) : block(after, shape, Place{});
      const int64_t factors = count_factors(there);
      if (at.k == 0)
        all_rows(rows, ldx, factors, y + at.j, M, N, columns, std::true_type{}, ahead);
      else
        all_rows(rows + at.k / Factors::kIn, ldx, factors, y + at.j, M, N, columns, std::false_type{}, ahead);
      at = next;
    }
  }

 private:
  static int64_t count_factors(int64_t weights) { return (weights + Factors::kIn - 1) / Factors::kIn; }

  // A block of weights: its piece of columns, its first factor and column.
  struct Place {
    int64_t piece = 0, k = 0, j = 0;
  };

  struct Shape {
    int64_t N, K, wide, depth;
    bool transposed;

    // All columns of a piece, then further factors of these, then the next piece.
    Place after(Place at) const {
      at.j += kPanel;
      if (at.j < std::min(N, at.piece + wide)) return at;
      at.j = at.piece;
      at.k += depth;
      if (at.k < K) return at;
      at.piece += wide;
      return {at.piece, 0, at.piece};
    }
  };

  void fill(const Weight* w, const Shape& shape, Place at, int64_t depth, int64_t columns) {
    if (shape.transposed)
      Factors::fill_transposed(w + at.j * shape.K + at.k, shape.K, depth, columns, panel_.template as<Factor>());
    else
      Factors::fill(w + at.k * shape.N + at.j, shape.N, depth, columns, panel_.template as<Factor>());
  }

  static Ahead block(const Weight* w, const Shape& shape, Place at) {
    if (w == nullptr) return Ahead::nothing();
    const int64_t depth = std::min(shape.K - at.k, shape.depth), size = sizeof(Weight);
    const int64_t columns = std::min<int64_t>(shape.N - at.j, kPanel);
    return shape.transposed ? Ahead(w + at.j * shape.K + at.k, columns, shape.K * size, depth * size)
                            : Ahead(w + at.k * shape.N + at.j, depth, shape.N * size, columns * size);
  }

  // The first tile asks for the block that comes next, the others have their hands free.
  template <typename Begins>
  void all_rows(const Factor* x, int64_t ldx, int64_t depth, float* y, int64_t M, int64_t N, int64_t columns, Begins begins,
                Ahead ahead) {
    const Factor* panel = panel_.template as<Factor>();
    if (M >= kRows) {
      tile<Factors, kRows>(x, ldx, panel, depth, y, N, columns, begins, ahead);
      ahead = Ahead::nothing();
      for (M -= kRows; M >= kRows; M -= kRows)
        tile<Factors, kRows>(x += kRows * ldx, ldx, panel, depth, y += kRows * N, N, columns, begins, Nothing{});
      x += kRows * ldx;
      y += kRows * N;
    }
    rest<Factors>(M, x, ldx, panel, depth, y, N, columns, static_cast<bool>(begins), ahead);
  }

  const Room rows_, panel_;
};

}  // namespace
