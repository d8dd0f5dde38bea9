// SiLU of a vector, and its store.
#pragma once

#include "vec.h"

namespace SORA_ISA {
namespace {

// x / (1 + e^-x).
SORA_INLINE Vec silu(Vec x) {
#if defined(__AVX512F__)
  // e^-x to its end, so that nothing is selected: past 88 it is infinity, and the quotient zero. The
  // reciprocal comes of an estimate of 14 bits and one step of Newton's, to 2 units in the last place.
  const __m512 t = _mm512_mul_ps((__m512)x, _mm512_set1_ps(-1.44269504088896341f));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 minus_x = _mm512_sub_ps(_mm512_setzero_ps(), (__m512)x);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), minus_x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  // 2^126 at the most, where the quotient is below 1e-36 and its reciprocal no denormal number.
  const __m512 e = _mm512_scalef_ps(p, _mm512_min_ps(n, _mm512_set1_ps(125.0f)));
  const __m512 d = _mm512_add_ps(e, _mm512_set1_ps(1.0f));
  const __m512 guess = _mm512_rcp14_ps(d);
  const __m512 inverse = _mm512_mul_ps(guess, _mm512_fnmadd_ps(d, guess, _mm512_set1_ps(2.0f)));
  return (Vec)_mm512_mul_ps((__m512)x, inverse);
#else
  const VecI negative = x < Vec{};
  const Vec e = exp_nonpositive(select(negative, x, -x));
  return x * select(negative, e, splat(1.0f)) / (1.0f + e);
#endif
}

template <typename T>
SORA_INLINE void store_silu(T* p, Vec x, int64_t n) {
  store(p, silu(x), n);
}

#if defined(__AVX512BF16__)
// For results of 8 bits: 2^f by a cubic (minimax, 7e-5 at the most), and the reciprocal as estimated.
// The instruction that rounds takes denormal numbers for zero.
SORA_INLINE void store_silu(BFloat16* p, Vec x, int64_t n) {
  const __m512 t = _mm512_mul_ps((__m512)x, _mm512_set1_ps(-1.44269504088896341f));
  const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(t, whole);
  __m512 power = _mm512_set1_ps(0.0551716564f);
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.2426111251f));
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.6932609858f));
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.9999280752f));
  const __m512 e = _mm512_scalef_ps(power, _mm512_min_ps(whole, _mm512_set1_ps(125.0f)));
  const __m512 inverse = _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(1.0f)));
  const __m256i y = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps((__m512)x, inverse));
  if (n >= kLanes)
    _mm256_storeu_si256((__m256i*)p, y);
  else
    _mm256_mask_storeu_epi16(p, first_lanes(n), y);
}
#endif

}  // namespace
}  // namespace SORA_ISA
