// What happens to rows between matrix products, and the client optimizer: single-threaded, float32 (moments may be kept in
// bfloat16). Compiled by compiling.py.
//
// Legend: T or N rows, D model width, F expert width.
//
// One pass over memory where PyTorch makes one per operation. Vectors start at the first element of a row (of a parameter, in the
// optimizer), so bits depend on the row alone.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 16;

typedef float Wide __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef float HalfWide __attribute__((vector_size(kLanes / 2 * sizeof(float)), aligned(4)));
typedef double Doubles __attribute__((vector_size(kLanes / 2 * sizeof(double)), aligned(8)));
typedef int32_t WideInt __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4)));

Wide spread(float value) { return Wide{} + value; }

// The first `count` floats; zeros behind them, so that a row's end goes through the same instructions.
Wide load(const float* from, int64_t count) {
  if (count >= kLanes) return *reinterpret_cast<const Wide*>(from);
  Wide part = {};
  std::memcpy(&part, from, count * sizeof(float));
  return part;
}

void store(float* to, Wide value, int64_t count) {
  std::memcpy(to, &value, (count < kLanes ? count : kLanes) * sizeof(float));
}

float total(Wide value) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) value[i] += value[i + width];
  return value[0];
}

// e^x to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cody and Waite's reduction).
Wide exponential(Wide x) {
  const Wide low = spread(-87.0f), high = spread(88.0f), shift = spread(12582912.0f);  // 1.5 * 2^23 rounds to whole numbers
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Wide shifted = x * 1.44269504088896341f + shift;
  const Wide n = shifted - shift;
  const Wide r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Wide p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  WideInt bits, origin;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&origin, &shift, sizeof origin);
  bits = (bits - origin + 127) << 23;
  Wide power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

Wide sigmoid(Wide x) { return 1.0f / (1.0f + exponential(-x)); }

// Both keep what is not a number.
Wide below(Wide x, float limit) { return x > limit ? spread(limit) : x; }
Wide within(Wide x, float limit) { return x < -limit ? spread(-limit) : below(x, limit); }

float wide(float kept) { return kept; }

float wide(uint16_t kept) {
  const uint32_t pattern = static_cast<uint32_t>(kept) << 16;
  float value;
  std::memcpy(&value, &pattern, sizeof value);
  return value;
}

bool is_zero(float kept) { return kept == 0.0f; }
bool is_zero(uint16_t kept) { return (kept & 0x7fff) == 0; }

template <class Kept>
bool all_zero(const Kept* values, int64_t count) {
  constexpr int64_t kRun = 256;
  for (int64_t i = 0; i < count; i += kRun) {
    const int64_t stop = i + kRun < count ? i + kRun : count;
    int32_t seen = 0;
    for (int64_t j = i; j < stop; ++j) seen |= !is_zero(values[j]);
    if (seen) return false;
  }
  return true;
}

// `random_bits` and `rounded` of clients/stochastic_rounding.py, bit for bit.
uint32_t random_bits(uint32_t place, uint64_t key) {
  uint32_t x = place + static_cast<uint32_t>(key);
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15) ^ static_cast<uint32_t>(key >> 32)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

void keep_moment(float* to, float value, uint32_t) { *to = value; }

void keep_moment(uint16_t* to, float value, uint32_t bits) {
  uint32_t pattern;
  std::memcpy(&pattern, &value, sizeof pattern);
  const bool is_nan = (pattern & 0x7fffffffu) > 0x7f800000u;  // its fraction would carry into the sign
  *to = static_cast<uint16_t>((is_nan ? pattern | 0x400000u : pattern + (bits & 0xffffu)) >> 16);
}

template <int kParts>
void add_squares(const float* x, Doubles* part) {
  for (int p = 0; p < kParts; ++p) {
    const HalfWide some = *reinterpret_cast<const HalfWide*>(x + p * kLanes / 2);
    const Doubles value = __builtin_convertvector(some, Doubles);
    part[p] += value * value;
  }
}

// What a client's step has of its own: its place on the client axis, and factors.
struct Step {
  int64_t place;
  float clip, keep, root, rate;
};

// One AdamW step on a parameter of `size` floats; its gradient is cleared. blend1 and blend2 are 1 - beta1 and 1 - beta2, which
// float32 cannot subtract. A parameter without gradient, moments or decay would not change: it is left alone. Moments in bfloat16
// are rounded by `key`, after the step has taken them.
template <class Kept>
void adamw_item(float* __restrict__ w, float* __restrict__ g, Kept* __restrict__ m, Kept* __restrict__ v, uint64_t key,
                int64_t size, const Step& step, float blend1, float beta2, float blend2, float eps) {
  const float clip = step.clip, keep = step.keep, root = step.root, rate = step.rate;
  if (keep == 1.0f && all_zero(g, size) && all_zero(m, size) && all_zero(v, size)) return;
  for (int64_t i = 0; i < size; ++i) {
    const float slope = g[i] * clip;
    const float mean = wide(m[i]) + (slope - wide(m[i])) * blend1;
    const float square = wide(v[i]) * beta2 + slope * slope * blend2;
    const uint32_t bits = random_bits(static_cast<uint32_t>(i), key);
    keep_moment(m + i, mean, bits);
    keep_moment(v + i, square, bits >> 16);
    w[i] = w[i] * keep - rate * (mean / (std::sqrt(square) / root + eps));
    g[i] = 0.0f;
  }
}

// The steps of several clients on `items` x `clients` parameters. Memory is visited in its order, item by item: client by client,
// what the processor fetches ahead would be the next client's. Keys are [steps, items].
template <class Kept>
void adamw_steps(float* value, float* grad, Kept* first, Kept* second, const uint64_t* keys, const Step* steps, int64_t count,
                 int64_t items, int64_t clients, int64_t size, float blend1, float beta2, float blend2, float eps) {
  for (int64_t item = 0; item < items; ++item)
    for (int64_t s = 0; s < count; ++s) {
      const int64_t at = (item * clients + steps[s].place) * size;
      const uint64_t key = keys == nullptr ? 0 : keys[s * items + item];
      adamw_item(value + at, grad + at, first + at, second + at, key, size, steps[s], blend1, beta2, blend2, eps);
    }
}

}  // namespace

extern "C" {

// y = w x / sqrt(mean(x^2) + eps); `inverse` [T] keeps 1 / sqrt(...).
void norm(const float* x, const float* w, float* y, float* inverse, int64_t T, int64_t D, float eps) {
  for (int64_t t = 0; t < T; ++t, x += D, y += D) {
    Wide square = {};
    for (int64_t d = 0; d < D; d += kLanes) {
      const Wide value = load(x + d, D - d);
      square += value * value;
    }
    const float scale = 1.0f / std::sqrt(total(square) / static_cast<float>(D) + eps);
    inverse[t] = scale;
    for (int64_t d = 0; d < D; d += kLanes) store(y + d, load(w + d, D - d) * (load(x + d, D - d) * scale), D - d);
  }
}

// dx = s w dy - x s^3 mean(w dy x), with s = 1 / sqrt(...).
void norm_backward(const float* dy, const float* x, const float* w, const float* inverse, float* dx, int64_t T, int64_t D) {
  for (int64_t t = 0; t < T; ++t, dy += D, x += D, dx += D) {
    Wide dot = {};
    for (int64_t d = 0; d < D; d += kLanes) dot += load(w + d, D - d) * load(dy + d, D - d) * load(x + d, D - d);
    const float scale = inverse[t];
    const float along = total(dot) / static_cast<float>(D) * scale * scale * scale;
    for (int64_t d = 0; d < D; d += kLanes)
      store(dx + d, load(w + d, D - d) * load(dy + d, D - d) * scale - load(x + d, D - d) * along, D - d);
  }
}

// y = x cos + rotate_half(x) sin for heads of width K; x is [T, H, K], cos and sin are [T, K]. `sign` -1 turns back (the gradient).
void rotate(const float* x, const float* cosine, const float* sine, float* y, int64_t T, int64_t H, int64_t K, float sign) {
  const int64_t half = K / 2;
  for (int64_t t = 0; t < T; ++t, cosine += K, sine += K)
    for (int64_t h = 0; h < H; ++h, x += K, y += K)
      for (int64_t k = 0; k < half; k += kLanes) {
        const int64_t left = half - k;
        const Wide first = load(x + k, left), second = load(x + half + k, left);
        const Wide low = load(sine + k, left) * sign, high = load(sine + half + k, left) * sign;
        // The gradient of y_first = c1 x1 - s1 x2, y_second = c2 x2 + s2 x1 takes the other half's sine.
        const Wide to_first = sign > 0 ? low : high, to_second = sign > 0 ? high : low;
        store(y + k, first * load(cosine + k, left) - second * to_first, left);
        store(y + half + k, second * load(cosine + half + k, left) + first * to_second, left);
      }
}

// pa = p silu(gate) up, h = [gate, up].
void swiglu(const float* h, const float* p, float* pa, int64_t N, int64_t F) {
  for (int64_t n = 0; n < N; ++n, h += 2 * F, pa += F)
    for (int64_t f = 0; f < F; f += kLanes) {
      const Wide gate = load(h + f, F - f), up = load(h + F + f, F - f);
      store(pa + f, gate * sigmoid(gate) * up * p[n], F - f);
    }
}

// From the gradient of pa: dh [N, 2F] and dp [N].
void swiglu_backward(const float* h, const float* p, const float* dpa, float* dh, float* dp, int64_t N, int64_t F) {
  for (int64_t n = 0; n < N; ++n, h += 2 * F, dpa += F, dh += 2 * F) {
    Wide sum = {};
    for (int64_t f = 0; f < F; f += kLanes) {
      const Wide gate = load(h + f, F - f), up = load(h + F + f, F - f), grad = load(dpa + f, F - f);
      const Wide share = sigmoid(gate), silu = gate * share, da = grad * p[n];
      sum += grad * (silu * up);
      store(dh + f, da * up * (share + silu * (1.0f - share)), F - f);
      store(dh + F + f, da * silu, F - f);
    }
    dp[n] = total(sum);
  }
}

// pa = p g s(g (slope + cubic g^2)) (u + shift), where s is the logistic function, g = min(gate, limit) and u is `up` clamped to
// [-limit, limit]; h = [gate, up]. SwiGLU (slope 1, cubic and shift 0, no limit) has kernels of its own above: every wave runs them.
void gated(const float* h, const float* p, float* pa, int64_t N, int64_t F, float slope, float cubic, float shift, float limit) {
  for (int64_t n = 0; n < N; ++n, h += 2 * F, pa += F)
    for (int64_t f = 0; f < F; f += kLanes) {
      const Wide gate = below(load(h + f, F - f), limit), up = within(load(h + F + f, F - f), limit);
      store(pa + f, gate * sigmoid(gate * (slope + cubic * gate * gate)) * (up + shift) * p[n], F - f);
    }
}

// From the gradient of pa: dh [N, 2F] and dp [N]. What a limit cut off has no gradient.
void gated_backward(const float* h, const float* p, const float* dpa, float* dh, float* dp, int64_t N, int64_t F, float slope,
                    float cubic, float shift, float limit) {
  const Wide none = {};
  for (int64_t n = 0; n < N; ++n, h += 2 * F, dpa += F, dh += 2 * F) {
    Wide sum = {};
    for (int64_t f = 0; f < F; f += kLanes) {
      const Wide raw_gate = load(h + f, F - f), raw_up = load(h + F + f, F - f), grad = load(dpa + f, F - f);
      const Wide gate = below(raw_gate, limit), up = within(raw_up, limit) + shift, square = gate * gate;
      const Wide share = sigmoid(gate * (slope + cubic * square)), unit = gate * share, da = grad * p[n];
      sum += grad * (unit * up);
      const Wide dgate = da * up * (share + unit * (1.0f - share) * (slope + 3.0f * cubic * square)), dup = da * unit;
      store(dh + f, raw_gate > limit ? none : dgate, F - f);
      store(dh + F + f, (raw_up > limit) | (raw_up < -limit) ? none : dup, F - f);
    }
    dp[n] = total(sum);
  }
}

// Squares of every item of `size` floats, summed up in float64.
void squared_norms(const float* x, double* sums, int64_t items, int64_t size) {
  constexpr int kParts = 4, kRun = kParts * kLanes / 2;  // chains of additions side by side
  for (int64_t item = 0; item < items; ++item, x += size) {
    Doubles part[kParts] = {};
    const int64_t whole = size / kRun * kRun;
    for (int64_t i = 0; i < whole; i += kRun) add_squares<kParts>(x + i, part);
    if (whole < size) {  // zeros behind the end add nothing
      float rest[kRun] = {};
      std::memcpy(rest, x + whole, (size - whole) * sizeof(float));
      add_squares<kParts>(rest, part);
    }
    const Doubles sum = (part[0] + part[1]) + (part[2] + part[3]);
    sums[item] = 0.0;
    for (int lane = 0; lane < kLanes / 2; ++lane) sums[item] += sum[lane];
  }
}

// Moments in float32.
void adamw(float* value, float* grad, float* first, float* second, const Step* steps, int64_t count, int64_t items,
           int64_t clients, int64_t size, float blend1, float beta2, float blend2, float eps) {
  adamw_steps(value, grad, first, second, nullptr, steps, count, items, clients, size, blend1, beta2, blend2, eps);
}

// Moments in bfloat16; one key per step and item.
void adamw_half(float* value, float* grad, uint16_t* first, uint16_t* second, const uint64_t* keys, const Step* steps,
                int64_t count, int64_t items, int64_t clients, int64_t size, float blend1, float beta2, float blend2, float eps) {
  adamw_steps(value, grad, first, second, keys, steps, count, items, clients, size, blend1, beta2, blend2, eps);
}
}
