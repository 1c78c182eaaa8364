// Matrix products of row groups with frozen weights, single-threaded, float32. Compiled by compiling.py for a processor
// class.
//
// Legend: M rows, K inner width, N output width; `ends` are the end rows of contiguous groups.
//
// A row's bits depend on that row and the weights alone, so rows of all clients may share one call and still be reproducible
// one by one. Weights of many experts come from memory: those of the next product are asked for while this one is computed.
//
// Weights may be bfloat16. A processor with AMX-BF16 or AVX512-BF16 then rounds the rows to bfloat16 as well and adds up in
// float32, each in its own way; any other one widens the weights. Products with float32 weights are the same in
// all classes with fused multiply-adds.

#include <cstdint>

#include "vector_tiles.h"
#ifdef __AMX_BF16__
#include "amx_tiles.h"
#endif

namespace {

#if defined(__AMX_BF16__)
typedef Tiles Halves;
#elif defined(__AVX512BF16__)
typedef Vectors<Pairs> Halves;
#else
typedef Vectors<Floats<uint16_t>> Halves;
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

// Whether the system lets this process use the registers of its class; asked before the first product.
int permitted() {
#ifdef __AMX_BF16__
  return tiles_permitted();
#else
  return 1;
#endif
}

// y = x W_g for the rows of every group g, its weights at w + g * stride: [N,K] read as the transpose where `transposed`, else
// [K,N]. Returns 0, or 1 without memory.
int product_groups(const float* x, const float* w, float* y, const int32_t* ends, int64_t groups, int64_t stride, int64_t N,
                   int64_t K, int64_t transposed) {
  return each_group<Vectors<Floats<float>>>(x, w, y, ends, groups, stride, N, K, transposed != 0);
}

// The same with bfloat16 weights.
int half_product_groups(const float* x, const uint16_t* w, float* y, const int32_t* ends, int64_t groups, int64_t stride,
                        int64_t N, int64_t K, int64_t transposed) {
  return each_group<Halves>(x, w, y, ends, groups, stride, N, K, transposed != 0);
}
}
