// Low-rank products of row groups, single-threaded, float32. Compiled by native.py for the processor at hand.
//
// Legend: N rows, G groups (contiguous rows, `ends` are their end rows), I and O widths, R adapter rank.
// A general matrix library treats a product with 8 columns as a corner case; these loops keep the R values of a row in one vector
// register. Every row goes through the same instructions whatever rows surround it, and sums over rows run in row order, so a
// result depends on its own group only.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kRows = 8;    // rows that share one load of the weights
constexpr int kLanes = 16;  // floats per vector along a row

typedef float Wide __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

template <int R>
struct Ranked {
  typedef float Vec __attribute__((vector_size(R * sizeof(float)), aligned(4)));
};

// m[N,R] = scale * x[N,I] w[I,R]. A short block repeats its last row, so that the code path is the same.
template <int R>
void reduce_rows(const float* x, const float* w, float* m, int64_t rows, int64_t width, float scale) {
  typedef typename Ranked<R>::Vec Vec;
  for (int64_t n = 0; n < rows; n += kRows) {
    const float* row[kRows];
    for (int j = 0; j < kRows; ++j) row[j] = x + (n + j < rows ? n + j : rows - 1) * width;
    Vec sum[kRows] = {};
    for (int64_t i = 0; i < width; ++i) {
      const Vec weight = *reinterpret_cast<const Vec*>(w + i * R);
      for (int j = 0; j < kRows; ++j) sum[j] += weight * row[j][i];
    }
    for (int j = 0; j < kRows && n + j < rows; ++j) *reinterpret_cast<Vec*>(m + (n + j) * R) = sum[j] * scale;
  }
}

// y[N,O] += m[N,R] w[R,O].
template <int R>
void spread_rows(float* y, const float* m, const float* w, int64_t rows, int64_t width) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t n = 0; n < rows; ++n) {
    float* out = y + n * width;
    const float* middle = m + n * R;
    for (int64_t o = 0; o < whole; o += kLanes) {
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

// g[R,I] += m[N,R]^T x[N,I].
template <int R>
void outer_rows(float* g, const float* m, const float* x, int64_t rows, int64_t width) {
  constexpr int kPart = R < 8 ? R : 8;
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int first = 0; first < R; first += kPart) {
      Wide sum[kPart] = {};
      for (int64_t n = 0; n < rows; ++n) {
        const Wide value = *reinterpret_cast<const Wide*>(x + n * width + i);
        for (int r = 0; r < kPart; ++r) sum[r] += value * m[n * R + first + r];
      }
      for (int r = 0; r < kPart; ++r) *reinterpret_cast<Wide*>(g + (first + r) * width + i) += sum[r];
    }
  }
  for (int64_t i = whole; i < width; ++i)
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int64_t n = 0; n < rows; ++n) sum += x[n * width + i] * m[n * R + r];
      g[r * width + i] += sum;
    }
}

void transpose(const float* from, float* to, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
}

template <typename Visit>
void each_group(const int32_t* ends, int64_t groups, Visit visit) {
  int64_t start = 0;
  for (int64_t g = 0; g < groups; ++g) {
    if (ends[g] > start) visit(g, start, ends[g] - start);
    start = ends[g];
  }
}

template <int R>
struct Products {
  // m = scale * x A^T, A [R,I] per group
  static void project(const float* x, const float* a, float* m, const int32_t* ends, int64_t groups, int64_t stride,
                      int64_t width, float scale) {
    std::vector<float> flipped(R * width);
    each_group(ends, groups, [&](int64_t g, int64_t start, int64_t rows) {
      transpose(a + g * stride, flipped.data(), R, width);
      reduce_rows<R>(x + start * width, flipped.data(), m + start * R, rows, width, scale);
    });
  }
  // y += m B^T, B [O,R] per group
  static void expand(float* y, const float* m, const float* b, const int32_t* ends, int64_t groups, int64_t stride,
                     int64_t width) {
    std::vector<float> flipped(R * width);
    each_group(ends, groups, [&](int64_t g, int64_t start, int64_t rows) {
      transpose(b + g * stride, flipped.data(), width, R);
      spread_rows<R>(y + start * width, m + start * R, flipped.data(), rows, width);
    });
  }
  // dm = scale * dy B
  static void back_project(const float* dy, const float* b, float* dm, const int32_t* ends, int64_t groups, int64_t stride,
                           int64_t width, float scale) {
    each_group(ends, groups, [&](int64_t g, int64_t start, int64_t rows) {
      reduce_rows<R>(dy + start * width, b + g * stride, dm + start * R, rows, width, scale);
    });
  }
  // dx += dm A
  static void back_expand(float* dx, const float* dm, const float* a, const int32_t* ends, int64_t groups, int64_t stride,
                          int64_t width) {
    each_group(ends, groups, [&](int64_t g, int64_t start, int64_t rows) {
      spread_rows<R>(dx + start * width, dm + start * R, a + g * stride, rows, width);
    });
  }
  // dA += dm^T x
  static void grad_a(float* da, const float* dm, const float* x, const int32_t* ends, int64_t groups, int64_t stride,
                     int64_t width) {
    each_group(ends, groups, [&](int64_t g, int64_t start, int64_t rows) {
      outer_rows<R>(da + g * stride, dm + start * R, x + start * width, rows, width);
    });
  }
  // dB += dy^T m
  static void grad_b(float* db, const float* m, const float* dy, const int32_t* ends, int64_t groups, int64_t stride,
                     int64_t width) {
    std::vector<float> sum(R * width);
    each_group(ends, groups, [&](int64_t g, int64_t start, int64_t rows) {
      std::memset(sum.data(), 0, sum.size() * sizeof(float));
      outer_rows<R>(sum.data(), m + start * R, dy + start * width, rows, width);
      float* grad = db + g * stride;
      for (int64_t o = 0; o < width; ++o)
        for (int r = 0; r < R; ++r) grad[o * R + r] += sum[r * width + o];
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
