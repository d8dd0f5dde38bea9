// qk_norm_rope: RMSNorm of queries or keys, across heads or per head, and rotation of pairs.
#include "kernels.h"
#include "vec.h"

namespace SORA_ISA {
namespace {

SORA_INLINE Vec swap_pairs(Vec v) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif defined(__AVX2__)
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
}

// The sum of squares of `n` values of `row`, whose lanes past `n` may hold anything.
float sum_of_squares(const float* row, int64_t n) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec value = load(floats(row + i));
    squares += value * value;
  }
  float total = sum(squares);
  for (; i < n; ++i) total += row[i] * row[i];
  return total;
}

template <typename T, bool kStreams>
void rope_rows(const sora::RopeArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t d = a.head_dim, half = d / 2;
  float* row = scratch;  // [heads, head_dim] and a vector of slack
  float* cos = row + a.heads * d + kLanes;
  float* sin = cos + d + kLanes;
  for (int64_t token = begin; token < end; ++token) {
    const T* x = (const T*)a.x + token * a.token_stride;
    T* y = (T*)a.y + token * a.heads * d;
    for (int64_t head = 0; head < a.heads; ++head)
      for (int64_t i = 0; i < d; i += kLanes)
        store(floats(row + head * d + i), load(x + head * a.head_stride + i, d - i), d - i);
    if (a.cos) {
      // Written out to head_dim once a token, so that the loop over heads is plain vectors:
      // y[i] = x[i] * cos[i] + x[partner of i] * sin[i], the sign inside sin.
      const float* token_cos = a.cos + token * a.cos_stride;
      const float* token_sin = a.sin + token * a.sin_stride;
      for (int64_t i = 0; i < half; ++i) {
        const int64_t first = a.interleaved ? 2 * i : i;
        const int64_t second = a.interleaved ? 2 * i + 1 : i + half;
        cos[first] = cos[second] = token_cos[i];
        sin[first] = -token_sin[i];
        sin[second] = token_sin[i];
      }
    }
    float inverse = 0;
    if (a.across_heads) {
      const int64_t n = a.heads * d;
      inverse = 1.0f / __builtin_sqrtf(sum_of_squares(row, n) / n + a.eps);
    }
    for (int64_t head = 0; head < a.heads; ++head) {
      float* values = row + head * d;
      const float* weight = a.weight;
      if (a.across_heads) {
        if (weight) weight += head * d;
      } else {
        inverse = 1.0f / __builtin_sqrtf(sum_of_squares(values, d) / d + a.eps);
      }
      for (int64_t i = 0; i < d; i += kLanes) {
        const int64_t left = d - i;
        Vec value = load(floats(values + i), left) * inverse;
        if (weight) value *= load(floats(weight + i), left);
        if (!a.cos) {
          put<kStreams>(y + head * d + i, value, left);
        } else if (a.interleaved) {
          const Vec turned =
              value * load(floats(cos + i)) + swap_pairs(value) * load(floats(sin + i));
          put<kStreams>(y + head * d + i, turned, left);
        } else {
          store(floats(values + i), value, left);
        }
      }
      if (a.cos && !a.interleaved) {
        for (int64_t i = 0; i < half; i += kLanes) {
          const int64_t left = half - i;
          const Vec first = load(floats(values + i), left);
          const Vec second = load(floats(values + half + i), left);
          const Vec c = load(floats(cos + i), left), s = load(floats(sin + half + i), left);
          put<kStreams>(y + head * d + i, first * c - second * s, left);
          put<kStreams>(y + head * d + half + i, first * s + second * c, left);
        }
      }
    }
  }
}

template <typename T>
void rope_each(const sora::RopeArgs& a, int64_t begin, int64_t end, float* scratch) {
  if constexpr (sizeof(T) == 4) {
    // Split pairs are written half a head at a time.
    const int64_t run = a.cos && !a.interleaved ? a.head_dim / 2 : a.head_dim;
    if (a.past_caches && run % kLanes == 0 && aligned(a.y)) {
      rope_rows<T, true>(a, begin, end, scratch);
      end_of_stream();
      return;
    }
  }
  rope_rows<T, false>(a, begin, end, scratch);
}

}  // namespace

void rope(const sora::RopeArgs& a, int64_t begin, int64_t end, float* scratch) {
  switch (a.type) {
    case sora::Type::f32: return rope_each<Float>(a, begin, end, scratch);
    case sora::Type::f16: return rope_each<Half>(a, begin, end, scratch);
    case sora::Type::bf16: return rope_each<BFloat16>(a, begin, end, scratch);
  }
}

}  // namespace SORA_ISA
