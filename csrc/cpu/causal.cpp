// causal_norm_silu: SiLU of an RMS norm behind the frames that came before, and the last frames
// kept for the call after. Each value is read once and written where it is needed.
#include "kernels.h"
#include "vec.h"

#include <cstring>

namespace SORA_ISA {
namespace {

SORA_INLINE Vec silu(Vec x) {
  const VecI negative = x < Vec{};
  const Vec e = exp_nonpositive(select(negative, x, -x));
  return x * select(negative, e, splat(1.0f)) / (1.0f + e);
}

template <typename T>
void causal_rows(const sora::CausalArgs& a, int64_t begin, int64_t end) {
  const int64_t n = a.channels, kept = a.kept * a.pixels, fresh = a.frames * a.pixels;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t video = row / (kept + fresh), at = row % (kept + fresh);
    T* y = (T*)a.joined + row * n;
    if (at < kept) {
      memcpy(y, (const T*)a.past + (video * kept + at) * n, n * sizeof(T));
    } else {
      const T* x = (const T*)a.x + (video * fresh + at - kept) * n;
      Vec squares = {};
      for (int64_t i = 0; i < n; i += kLanes) {
        const Vec value = load(x + i, n - i);
        squares += value * value;
      }
      const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / n + a.eps);
      for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t left = n - i;
        store(y + i, silu(load(x + i, left) * inverse * load(floats(a.weight + i), left)), left);
      }
    }
    if (at >= fresh) memcpy((T*)a.cache + (video * kept + at - fresh) * n, y, n * sizeof(T));
  }
}

}  // namespace

void causal(const sora::CausalArgs& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case sora::Type::f32: return causal_rows<Float>(a, begin, end);
    case sora::Type::f16: return causal_rows<Half>(a, begin, end);
    case sora::Type::bf16: return causal_rows<BFloat16>(a, begin, end);
  }
}

}  // namespace SORA_ISA
