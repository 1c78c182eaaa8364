// Weighted sums and their means, single-threaded: one pass over memory each. Compiled by compiling.py.
//
// Legend: N rows that have a weight of their own (layer and expert), W numbers of a row (`width`). Rows of an input lie `stride`
// numbers apart, those of sums and results W.
// exact_sum.py says what digits and windows are, and does the same in torch: both give the same bits. Powers of two scale
// exactly, so a weight may carry them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kDigitBits = 48;
constexpr int kOrigin = -39;
constexpr double kDigit = 0x1p48;
constexpr double kUnitLow = 0x1p-48;
constexpr int64_t kEmpty = -64;
constexpr uint32_t kInfinity = 0x7f800000u;

// The bits of the largest magnitude of a row: as integers they have the order of the numbers, and what is not finite is largest.
inline uint32_t largest_bits(const float* x, int64_t width) {
  uint32_t most = 0;
  for (int64_t i = 0; i < width; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffffu);
  }
  return most;
}

// The least window that holds weight times numbers of at most this magnitude (neither is zero).
inline int64_t needed_window(uint32_t bits, double weight) {
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  int of_value, of_weight;
  std::frexp(static_cast<double>(largest), &of_value);
  std::frexp(weight, &of_weight);
  const int exponent = of_value + of_weight - kOrigin;
  return exponent >= 0 ? exponent / kDigitBits : -((kDigitBits - 1 - exponent) / kDigitBits);
}

// For every row: raise its window where the new term needs it, then add the term, `take(n, x, weight in units of the window)`.
// Returns the number of rows that are not finite; they are left out.
template <typename Shift, typename Take>
int64_t fold(int64_t* windows, const float* value, const double* weight, int64_t rows, int64_t width, int64_t stride,
             Shift shift, Take take) {
  int64_t bad = 0;
  for (int64_t n = 0; n < rows; ++n) {
    if (weight[n] == 0.0) continue;
    const float* x = value + n * stride;
    const uint32_t bits = largest_bits(x, width);
    if (bits >= kInfinity) ++bad;
    if (bits == 0 || bits >= kInfinity) continue;
    const int64_t needed = needed_window(bits, weight[n]);
    if (needed > windows[n]) {
      if (windows[n] > kEmpty) shift(n, needed - windows[n]);
      windows[n] = needed;
    }
    take(n, x, std::ldexp(weight[n], static_cast<int>(-kDigitBits * windows[n]) - kOrigin));
  }
  return bad;
}

// A row of the mean: total(i) / weight where anybody trained it, else what it was; both in units of the row's window.
template <typename Total>
void mean_row(float* out, double weight, const float* old, int64_t width, Total total) {
  if (!(weight > 0.0)) {
    std::memcpy(out, old, width * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < width; ++i) out[i] = static_cast<float>(total(i) / weight);
}

}  // namespace

extern "C" {

// sums [2,N,W] += digits of weight[N] * value[N,W].
int64_t fold_exact(int64_t* sums, int64_t* windows, const float* value, const double* weight, int64_t rows, int64_t width,
                   int64_t stride) {
  const auto shift = [=](int64_t n, int64_t by) {
    int64_t* high = sums + n * width;
    int64_t* low = high + rows * width;
    if (by == 1) std::memcpy(low, high, width * sizeof(int64_t));
    else std::fill(low, low + width, 0);
    std::fill(high, high + width, 0);
  };
  const auto take = [=](int64_t n, const float* x, double scale) {
    int64_t* high = sums + n * width;
    int64_t* low = high + rows * width;
    for (int64_t i = 0; i < width; ++i) {
      const double scaled = x[i] * scale;
      const double whole = std::rint(scaled);
      high[i] += static_cast<int64_t>(whole);
      low[i] += static_cast<int64_t>(std::rint((scaled - whole) * kDigit));
    }
  };
  return fold(windows, value, weight, rows, width, stride, shift, take);
}

// sums [N,W] += weight[N] * value[N,W] in units of the window, added in float64.
int64_t fold_float(float* sums, int64_t* windows, const float* value, const double* weight, int64_t rows, int64_t width,
                   int64_t stride) {
  const auto shift = [=](int64_t n, int64_t by) {
    const double factor = std::ldexp(1.0, static_cast<int>(-kDigitBits * by));
    float* sum = sums + n * width;
    for (int64_t i = 0; i < width; ++i) sum[i] = static_cast<float>(sum[i] * factor);
  };
  const auto take = [=](int64_t n, const float* x, double scale) {
    float* sum = sums + n * width;
    for (int64_t i = 0; i < width; ++i) sum[i] = static_cast<float>(sum[i] + x[i] * scale);
  };
  return fold(windows, value, weight, rows, width, stride, shift, take);
}

void mean_exact(float* out, const int64_t* sums, const float* old, const double* weight, int64_t rows, int64_t width,
                int64_t stride) {
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t* high = sums + n * width;
    const int64_t* low = high + rows * width;
    mean_row(out + n * width, weight[n], old + n * stride, width,
             [=](int64_t i) { return static_cast<double>(high[i]) + static_cast<double>(low[i]) * kUnitLow; });
  }
}

void mean_float(float* out, const float* sums, const float* old, const double* weight, int64_t rows, int64_t width,
                int64_t stride) {
  for (int64_t n = 0; n < rows; ++n) {
    const float* sum = sums + n * width;
    mean_row(out + n * width, weight[n], old + n * stride, width, [=](int64_t i) { return static_cast<double>(sum[i]); });
  }
}

}  // extern "C"
