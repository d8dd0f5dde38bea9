// causal_norm_silu: SiLU of an RMS norm behind the frames that came before, and the last frames
// kept for the call after. Each value is read once and written where it is needed.
#include "kernels.h"
#include "silu.h"

#include <cstring>

namespace SORA_ISA {
namespace {

template <typename T>
void causal_rows(const sora::CausalArgs& a, int64_t begin, int64_t end) {
  const int64_t n = a.channels, frames = a.kept + a.frames;
  const int64_t total = a.before + frames + a.after;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t frame = row / a.pixels, pixel = row % a.pixels;
    const int64_t video = frame / total, at = frame % total;
    // The frame of the past and of x, end to end, that stands here: the first and the last repeat.
    int64_t from = at - a.before;
    from = from < 0 ? 0 : from >= frames ? frames - 1 : from;
    T* y = (T*)a.joined + row * n;
    if (from < a.kept) {
      memcpy(y, (const T*)a.past + ((video * a.kept + from) * a.pixels + pixel) * n, n * sizeof(T));
    } else {
      const T* x = (const T*)a.x + ((video * a.frames + from - a.kept) * a.pixels + pixel) * n;
      Vec squares = {};
      for (int64_t i = 0; i < n; i += kLanes) {
        const Vec value = load(x + i, n - i);
        squares += value * value;
      }
      const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / n + a.eps);
      for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t left = n - i;
        Vec value = load(x + i, left) * inverse;
        if (a.weight) value *= load(floats(a.weight + i), left);
        if (a.bias) value += load(floats(a.bias + i), left);
        store_silu(y + i, value, left);
      }
    }
    const int64_t kept_at = at - (total - a.keep);
    if (kept_at >= 0)
      memcpy((T*)a.cache + ((video * a.keep + kept_at) * a.pixels + pixel) * n, y, n * sizeof(T));
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
