// Weighted sums and their means, single-threaded: one pass over memory each. Compiled for the processor at hand by compiled.py.
//
// Legend: N rows that have a weight of their own (layer and expert), W numbers of a row (`width`). Rows of an input lie `stride`
// numbers apart, those of sums and results W.
// exact.py says what the integers mean, and does the same in torch: both give the same bits. Powers of two scale exactly, so a
// weight may carry them.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr double kHigh = 0x1p30;      // first integer: x * 2^30
constexpr double kRest = 0x1p49;      // second integer: what is left of that, * 2^49
constexpr double kUnitHigh = 0x1p-30;
constexpr double kUnitLow = 0x1p-79;

// A row of the mean: total(i) / weight where anybody trained it, else what it was.
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

// sums [2,N,W] += integers of weight[N] * value[N,W].
void fold_exact(int64_t* sums, const float* value, const double* weight, int64_t rows, int64_t width, int64_t stride) {
  for (int64_t n = 0; n < rows; ++n) {
    const double scale = weight[n] * kHigh;
    if (scale == 0.0) continue;
    const float* x = value + n * stride;
    int64_t* high = sums + n * width;
    int64_t* low = high + rows * width;
    for (int64_t i = 0; i < width; ++i) {
      const double scaled = x[i] * scale;
      const double whole = std::rint(scaled);
      high[i] += static_cast<int64_t>(whole);
      low[i] += static_cast<int64_t>(std::rint((scaled - whole) * kRest));
    }
  }
}

// sums [N,W] += weight[N] * value[N,W], added in float64.
void fold_float(float* sums, const float* value, const double* weight, int64_t rows, int64_t width, int64_t stride) {
  for (int64_t n = 0; n < rows; ++n) {
    if (weight[n] == 0.0) continue;
    const float* x = value + n * stride;
    float* sum = sums + n * width;
    for (int64_t i = 0; i < width; ++i) sum[i] = static_cast<float>(sum[i] + x[i] * weight[n]);
  }
}

void mean_exact(float* out, const int64_t* sums, const float* old, const double* weight, int64_t rows, int64_t width,
                int64_t stride) {
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t* high = sums + n * width;
    const int64_t* low = high + rows * width;
    mean_row(out + n * width, weight[n], old + n * stride, width,
             [=](int64_t i) { return static_cast<double>(high[i]) * kUnitHigh + static_cast<double>(low[i]) * kUnitLow; });
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
