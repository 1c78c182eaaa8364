// Low-rank products of row groups, single-threaded, float32. Compiled by compiling.py for the processor at hand.
//
// Legend: N rows, G groups (contiguous rows, `ends` are their end rows), I and O widths, R adapter rank.
// A general matrix library treats a product with 8 columns as a corner case; these loops keep the R values of a row in one vector
// register. Every row goes through the same instructions whatever rows surround it, and sums over rows run in row order, so a
// result depends on its own group only.
//
// Groups are small and many, and their rows and weights come from memory: while one is computed, the next one's are asked for.
// Rows of all groups lie one behind the other, so those asked for may be past the last one: such a request does nothing.

#include <cstdint>
#include <vector>

namespace {

constexpr int kRows = 8;    // rows that share one load of the weights
constexpr int kLanes = 16;  // floats per vector along a row, and per cache line
constexpr int kRead = 0, kWrite = 1;

typedef float Wide __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef int32_t Places __attribute__((vector_size(kLanes * sizeof(int32_t))));

template <int R>
struct Ranked {
  typedef float Vec __attribute__((vector_size(R * sizeof(float)), aligned(4)));
};

// Asks for `count` cache lines, `step` floats apart.
template <int kUse>
void ask(const float* from, int count, int64_t step) {
  for (int i = 0; i < count; ++i) __builtin_prefetch(from + i * step, kUse, 2);
}

// Transposes 16 R numbers in registers: kTo = R turns [R,16] into [16,R], kTo = 16 turns it back. A stage moves the upper half in
// between the lower half, which rotates the bits of all places by one; there are log2(16 R) of them, so either way comes round.
template <int R, int kTo>
void turn(Wide* v) {
  const Places low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const Places high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int done = 1; done < kTo; done *= 2) {
    Wide next[R];
    for (int i = 0; i < R / 2; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[R / 2 + i], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[R / 2 + i], high);
    }
    for (int i = 0; i < R; ++i) v[i] = next[i];
  }
}

// to[I,R] = from[R,I]
template <int R>
void columns_to_rows(const float* from, float* to, int64_t width) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    Wide v[R];
    for (int r = 0; r < R; ++r) v[r] = *reinterpret_cast<const Wide*>(from + r * width + i);
    turn<R, R>(v);
    for (int r = 0; r < R; ++r) *reinterpret_cast<Wide*>(to + i * R + r * kLanes) = v[r];
  }
  for (int64_t i = whole; i < width; ++i)
    for (int r = 0; r < R; ++r) to[i * R + r] = from[r * width + i];
}

// to[R,O] = from[O,R]
template <int R>
void rows_to_columns(const float* from, float* to, int64_t width) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t o = 0; o < whole; o += kLanes) {
    Wide v[R];
    for (int r = 0; r < R; ++r) v[r] = *reinterpret_cast<const Wide*>(from + o * R + r * kLanes);
    turn<R, kLanes>(v);
    for (int r = 0; r < R; ++r) *reinterpret_cast<Wide*>(to + r * width + o) = v[r];
  }
  for (int64_t o = whole; o < width; ++o)
    for (int r = 0; r < R; ++r) to[r * width + o] = from[o * R + r];
}

// m[N,R] = scale * x[N,I] w[I,R]. A short block repeats its last row, so that the code path is the same.
template <int R>
void reduce_rows(const float* x, const float* w, float* m, int64_t rows, int64_t width, float scale, const float* next_w) {
  typedef typename Ranked<R>::Vec Vec;
  for (int64_t n = 0; n < rows; n += kRows) {
    const float* row[kRows];
    for (int j = 0; j < kRows; ++j) row[j] = x + (n + j < rows ? n + j : rows - 1) * width;
    Vec sum[kRows] = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      ask<kRead>(x + (n + kRows) * width + i, kRows, width);
      if (n == 0) ask<kRead>(next_w + i * R, R, kLanes);
      const int64_t stop = i + kLanes < width ? i + kLanes : width;
      for (int64_t k = i; k < stop; ++k) {
        const Vec weight = *reinterpret_cast<const Vec*>(w + k * R);
        for (int j = 0; j < kRows; ++j) sum[j] += weight * row[j][k];
      }
    }
    for (int j = 0; j < kRows && n + j < rows; ++j) *reinterpret_cast<Vec*>(m + (n + j) * R) = sum[j] * scale;
  }
}

// y[N,O] += m[N,R] w[R,O].
template <int R>
void spread_rows(float* y, const float* m, const float* w, int64_t rows, int64_t width, const float* next_w) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t n = 0; n < rows; ++n) {
    float* out = y + n * width;
    const float* middle = m + n * R;
    for (int64_t o = 0; o < whole; o += kLanes) {
      if (n == 0) ask<kRead>(next_w + o * R, R, kLanes);
      Wide sum = *reinterpret_cast<Wide*>(out + o);
      for (int r = 0; r < R; ++r) sum += *reinterpret_cast<const Wide*>(w + r * width + o) * middle[r];
      *reinterpret_cast<Wide*>(out + o) = sum;
    }
    for (int64_t o = whole; o < width; ++o) {
      float sum = out[o];
      for (int r = 0; r < R; ++r) sum += w[r * width + o] * middle[r];
      out[o] = sum;
    }
  }
}

// sum[R] = m[N,R]^T x[N,16], 16 columns from x on.
template <int R>
void outer_columns(const float* m, const float* x, int64_t rows, int64_t width, Wide* sum) {
  constexpr int kPart = R < 8 ? R : 8;
  for (int first = 0; first < R; first += kPart) {
    Wide part[kPart] = {};
    for (int64_t n = 0; n < rows; ++n) {
      const Wide value = *reinterpret_cast<const Wide*>(x + n * width);
      if (first == 0) ask<kRead>(x + (n + rows) * width, 1, 0);
      for (int r = 0; r < kPart; ++r) part[r] += value * m[n * R + first + r];
    }
    for (int r = 0; r < kPart; ++r) sum[first + r] = part[r];
  }
}

// One element of it.
template <int R>
float outer_element(const float* m, const float* x, int64_t rows, int64_t width) {
  float sum = 0;
  for (int64_t n = 0; n < rows; ++n) sum += x[n * width] * m[n * R];
  return sum;
}

// g[R,I] += m[N,R]^T x[N,I].
template <int R>
void outer_to_columns(float* g, const float* m, const float* x, int64_t rows, int64_t width, const float* next_g) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    Wide sum[R];
    outer_columns<R>(m, x + i, rows, width, sum);
    ask<kWrite>(next_g + i, R, width);
    for (int r = 0; r < R; ++r) *reinterpret_cast<Wide*>(g + r * width + i) += sum[r];
  }
  for (int64_t i = whole; i < width; ++i)
    for (int r = 0; r < R; ++r) g[r * width + i] += outer_element<R>(m + r, x + i, rows, width);
}

// g[O,R] += y[N,O]^T m[N,R].
template <int R>
void outer_to_rows(float* g, const float* m, const float* y, int64_t rows, int64_t width, const float* next_g) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t o = 0; o < whole; o += kLanes) {
    Wide sum[R];
    outer_columns<R>(m, y + o, rows, width, sum);
    turn<R, R>(sum);
    ask<kWrite>(next_g + o * R, R, kLanes);
    for (int r = 0; r < R; ++r) *reinterpret_cast<Wide*>(g + o * R + r * kLanes) += sum[r];
  }
  for (int64_t o = whole; o < width; ++o)
    for (int r = 0; r < R; ++r) g[o * R + r] += outer_element<R>(m + r, y + o, rows, width);
}

// Visits every group that has rows, with the first of its rows and how many; `next` is the one after it, at the end itself.
template <typename Visit>
void each_group(const int32_t* ends, int64_t groups, Visit visit) {
  const auto with_rows = [&](int64_t g) {
    while (g < groups && ends[g] == (g > 0 ? ends[g - 1] : 0)) ++g;
    return g;
  };
  for (int64_t g = with_rows(0); g < groups;) {
    const int64_t start = g > 0 ? ends[g - 1] : 0, next = with_rows(g + 1);
    visit(g, next < groups ? next : g, start, ends[g] - start);
    g = next;
  }
}

template <int R>
struct Products {
  // m = scale * x A^T, A [R,I] per group
  static void project(const float* x, const float* a, float* m, const int32_t* ends, int64_t groups, int64_t stride,
                      int64_t width, float scale) {
    std::vector<float> flipped(R * width);
    each_group(ends, groups, [&](int64_t g, int64_t next, int64_t start, int64_t rows) {
      columns_to_rows<R>(a + g * stride, flipped.data(), width);
      reduce_rows<R>(x + start * width, flipped.data(), m + start * R, rows, width, scale, a + next * stride);
    });
  }
  // y += m B^T, B [O,R] per group
  static void expand(float* y, const float* m, const float* b, const int32_t* ends, int64_t groups, int64_t stride,
                     int64_t width) {
    std::vector<float> flipped(R * width);
    each_group(ends, groups, [&](int64_t g, int64_t next, int64_t start, int64_t rows) {
      rows_to_columns<R>(b + g * stride, flipped.data(), width);
      spread_rows<R>(y + start * width, m + start * R, flipped.data(), rows, width, b + next * stride);
    });
  }
  // dm = scale * dy B
  static void back_project(const float* dy, const float* b, float* dm, const int32_t* ends, int64_t groups, int64_t stride,
                           int64_t width, float scale) {
    each_group(ends, groups, [&](int64_t g, int64_t next, int64_t start, int64_t rows) {
      reduce_rows<R>(dy + start * width, b + g * stride, dm + start * R, rows, width, scale, b + next * stride);
    });
  }
  // dx += dm A
  static void back_expand(float* dx, const float* dm, const float* a, const int32_t* ends, int64_t groups, int64_t stride,
                          int64_t width) {
    each_group(ends, groups, [&](int64_t g, int64_t next, int64_t start, int64_t rows) {
      spread_rows<R>(dx + start * width, dm + start * R, a + g * stride, rows, width, a + next * stride);
    });
  }
  // dA += dm^T x
  static void grad_a(float* da, const float* dm, const float* x, const int32_t* ends, int64_t groups, int64_t stride,
                     int64_t width) {
    each_group(ends, groups, [&](int64_t g, int64_t next, int64_t start, int64_t rows) {
      outer_to_columns<R>(da + g * stride, dm + start * R, x + start * width, rows, width, da + next * stride);
    });
  }
  // dB += dy^T m
  static void grad_b(float* db, const float* m, const float* dy, const int32_t* ends, int64_t groups, int64_t stride,
                     int64_t width) {
    each_group(ends, groups, [&](int64_t g, int64_t next, int64_t start, int64_t rows) {
      outer_to_rows<R>(db + g * stride, m + start * R, dy + start * width, rows, width, db + next * stride);
    });
  }
};

}  // namespace

#define FOR_RANK(CALL)                   \
  switch (rank) {                        \
    case 4: Products<4>::CALL; break;    \
    case 8: Products<8>::CALL; break;    \
    case 16: Products<16>::CALL; break;  \
    case 32: Products<32>::CALL; break;  \
    default: return 1;                   \
  }                                      \
  return 0;

#define SHAPE const int32_t *ends, int64_t groups, int64_t stride, int64_t width, int64_t rank

extern "C" {
int project(const float* x, const float* a, float* m, SHAPE, float scale) {
  FOR_RANK(project(x, a, m, ends, groups, stride, width, scale))
}
int expand(float* y, const float* m, const float* b, SHAPE) { FOR_RANK(expand(y, m, b, ends, groups, stride, width)) }
int back_project(const float* dy, const float* b, float* dm, SHAPE, float scale) {
  FOR_RANK(back_project(dy, b, dm, ends, groups, stride, width, scale))
}
int back_expand(float* dx, const float* dm, const float* a, SHAPE) {
  FOR_RANK(back_expand(dx, dm, a, ends, groups, stride, width))
}
int grad_a(float* da, const float* dm, const float* x, SHAPE) { FOR_RANK(grad_a(da, dm, x, ends, groups, stride, width)) }
int grad_b(float* db, const float* m, const float* dy, SHAPE) { FOR_RANK(grad_b(db, m, dy, ends, groups, stride, width)) }
}
