// Quantised weights as bf16, 32 values at a time (AVX512-BF16).
//
// A block of 4 or 5 bits has few values: they are computed once, in fp32, and looked up by codes.
// Others are widened, multiplied and rounded. Formats that are not here go by way of fp32.
#pragma once

#include "quant_formats.h"

#if defined(__AVX512BF16__)

namespace SORA_ISA {
namespace {

SORA_INLINE __m512i bf16_of(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

SORA_INLINE __m512 counted() {
  return _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}

// factor * code + least, of 16 codes; of 32.
SORA_INLINE __m512i table_of_16(float factor, float least) {
  const __m512 v = _mm512_fmadd_ps(counted(), _mm512_set1_ps(factor), _mm512_set1_ps(least));
  return _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(v));
}

SORA_INLINE __m512i table_of_32(float factor, float least) {
  const __m512 by = _mm512_set1_ps(factor), add = _mm512_set1_ps(least);
  const __m512 low = _mm512_fmadd_ps(counted(), by, add);
  const __m512 high = _mm512_fmadd_ps(_mm512_add_ps(counted(), _mm512_set1_ps(16)), by, add);
  return bf16_of(low, high);
}

SORA_INLINE __m512i words(const uint8_t* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
}

// 32 signed bytes, times a factor for each half.
SORA_INLINE __m512i scaled(__m256i bytes, float first, float second) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
  return bf16_of(_mm512_mul_ps(low, _mm512_set1_ps(first)),
                 _mm512_mul_ps(high, _mm512_set1_ps(second)));
}

template <bool kFifth>
SORA_INLINE void pairs_of_32(const uint8_t* q, const uint8_t* high, uint16_t* out, float d,
                             float m) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)q), mask = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(bytes, mask);
  const __m128i upper = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  __m512i codes = _mm512_cvtepu8_epi16(_mm256_set_m128i(upper, low));
  __m512i table;
  if constexpr (kFifth) {
    uint32_t bits;
    memcpy(&bits, high, 4);
    codes = _mm512_mask_add_epi16(codes, bits, codes, _mm512_set1_epi16(16));
    table = table_of_32(d, m);
  } else {
    table = table_of_16(d, m);
  }
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(codes, table));
}

// Q4_K, and Q5_K with a fifth bit.
template <bool kFifth>
SORA_INLINE void pairs_q4_k(const uint8_t* p, uint16_t* out) {
  uint32_t s[3], six[4];
  memcpy(s, p + 4, 12);
  six[0] = s[0] & 0x3f3f3f3f;
  six[1] = (s[2] & 0x0f0f0f0f) | (s[0] >> 6 & 0x03030303) << 4;
  six[2] = s[1] & 0x3f3f3f3f;
  six[3] = (s[2] >> 4 & 0x0f0f0f0f) | (s[1] >> 6 & 0x03030303) << 4;
  const float d = half_at(p), dmin = half_at(p + 2);
  float factors[16];  // of eight stretches, then their minima
  __m128i bytes;
  memcpy(&bytes, six, 16);
  const __m512 by = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(d), _mm512_set1_ps(-dmin));
  _mm512_storeu_ps(factors, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), by));
  const uint8_t* q = kFifth ? p + 48 : p + 16;
  const __m512i low = _mm512_set1_epi16(15), one = _mm512_set1_epi16(1);
  const __m512i fifths = kFifth ? words(p + 16) : _mm512_setzero_si512();
  for (int i = 0; i < 8; i += 2) {
    const __m512i both = words(q + i / 2 * 32);
    __m512i first = _mm512_and_si512(both, low), second = _mm512_srli_epi16(both, 4);
    __m512i tables[2];
    for (int j = 0; j < 2; ++j)
      tables[j] = kFifth ? table_of_32(factors[i + j], factors[8 + i + j])
                         : table_of_16(factors[i + j], factors[8 + i + j]);
    if constexpr (kFifth) {
      const __m512i own = _mm512_srli_epi16(fifths, i);
      first = _mm512_or_si512(first, _mm512_slli_epi16(_mm512_and_si512(own, one), 4));
      const __m512i next = _mm512_srli_epi16(own, 1);
      second = _mm512_or_si512(second, _mm512_slli_epi16(_mm512_and_si512(next, one), 4));
    }
    _mm512_storeu_si512(out + 32 * i, _mm512_permutexvar_epi16(first, tables[0]));
    _mm512_storeu_si512(out + 32 * i + 32, _mm512_permutexvar_epi16(second, tables[1]));
  }
}

SORA_INLINE void pairs_q6_k(const uint8_t* p, uint16_t* out) {
  const __m512 d = _mm512_set1_ps(half_at(p + 208));
  float factors[16];
  const __m128i scales = _mm_loadu_si128((const __m128i*)(p + 192));
  _mm512_storeu_ps(factors, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scales)), d));
  const __m256i low = _mm256_set1_epi8(15), upper = _mm256_set1_epi8(48);
  const __m256i middle = _mm256_set1_epi8(32);
  for (int n = 0; n < 2; ++n) {
    const __m256i high = _mm256_loadu_si256((const __m256i*)(p + 128 + 32 * n));
    const __m256i four[2] = {_mm256_loadu_si256((const __m256i*)(p + 64 * n)),
                             _mm256_loadu_si256((const __m256i*)(p + 64 * n + 32))};
    const __m256i tops[4] = {_mm256_slli_epi16(high, 4), _mm256_slli_epi16(high, 2), high,
                             _mm256_srli_epi16(high, 2)};
    for (int k = 0; k < 4; ++k) {
      const __m256i own = k < 2 ? four[k] : _mm256_srli_epi16(four[k - 2], 4);
      const __m256i codes = _mm256_or_si256(_mm256_and_si256(own, low),
                                            _mm256_and_si256(tops[k], upper));
      const int at = 8 * n + 2 * k;
      _mm512_storeu_si512(out + 16 * at, scaled(_mm256_sub_epi8(codes, middle), factors[at],
                                                factors[at + 1]));
    }
  }
}

// e4m3 and e5m2 by way of fp16, as quant_formats.h has them.
template <bool kE4M3>
SORA_INLINE __m512i of_fp8(const uint8_t* p, float scale) {
  const __m512i wide = words(p);
  __m512i bits = _mm512_slli_epi16(wide, 8);
  __mmask32 nan = 0;
  if constexpr (kE4M3) {
    const __m512i rest = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
    nan = _mm512_cmpeq_epi16_mask(rest, _mm512_set1_epi16(0x7f));
    bits = _mm512_or_si512(_mm512_and_si512(bits, _mm512_set1_epi16((short)0x8000)),
                           _mm512_slli_epi16(rest, 7));
  }
  const __m512 by = _mm512_set1_ps(scale), up = _mm512_set1_ps(kE4M3 ? 256.0f : 1.0f);
  const auto half = [&](__m256i h) {
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtph_ps(h), up), by);
  };
  const __m512i out = bf16_of(half(_mm512_castsi512_si256(bits)),
                              half(_mm512_extracti64x4_epi64(bits, 1)));
  return _mm512_mask_mov_epi16(out, nan, _mm512_set1_epi16(0x7fc0));
}

// Values `from` to `to` of a row as bf16: `decode` of quant_formats.h, at most 256 of them and a
// multiple of 32.
SORA_INLINE void decode_pairs(const sora::UnpackArgs& a, const uint8_t* p, const float* scale,
                              int64_t from, int64_t to, uint16_t* out) {
  using F = sora::Format;
  const auto blocks = [&](int64_t values, int64_t bytes, auto each) {
    p += from / values * bytes;
    for (int64_t i = 0; i < to - from; i += values, p += bytes) each(p, out + i);
  };
  const auto plain = [&](auto each) {
    const float own = scale ? scale[a.stretches == 1 ? 0 : from / (a.ins / a.stretches)] : 1.0f;
    for (int64_t i = 0; i < to - from; i += 32)
      _mm512_storeu_si512(out + i, each(p + from + i, own));
  };
  const int64_t length = a.ins / a.stretches;  // a scale may change within these values
  const bool is_one = a.stretches == 1 || from / length == (to - 1) / length;
  switch (a.format) {
    case F::q4_k: return blocks(256, 144, pairs_q4_k<false>);
    case F::q5_k: return blocks(256, 176, pairs_q4_k<true>);
    case F::q6_k: return blocks(256, 210, pairs_q6_k);
    case F::q8_0:
      return blocks(32, 34, [](const uint8_t* b, uint16_t* o) {
        const float d = half_at(b);
        _mm512_storeu_si512(o, scaled(_mm256_loadu_si256((const __m256i*)(b + 2)), d, d));
      });
    case F::q4_0:
      return blocks(32, 18, [](const uint8_t* b, uint16_t* o) {
        const float d = half_at(b);
        pairs_of_32<false>(b + 2, nullptr, o, d, -8.0f * d);
      });
    case F::q4_1:
      return blocks(32, 20, [](const uint8_t* b, uint16_t* o) {
        pairs_of_32<false>(b + 4, nullptr, o, half_at(b), half_at(b + 2));
      });
    case F::q5_0:
      return blocks(32, 22, [](const uint8_t* b, uint16_t* o) {
        const float d = half_at(b);
        pairs_of_32<true>(b + 6, b + 2, o, d, -16.0f * d);
      });
    case F::q5_1:
      return blocks(32, 24, [](const uint8_t* b, uint16_t* o) {
        pairs_of_32<true>(b + 8, b + 4, o, half_at(b), half_at(b + 2));
      });
    case F::int8:
      if (!is_one) break;
      return plain([](const uint8_t* q, float s) {
        return scaled(_mm256_loadu_si256((const __m256i*)q), s, s);
      });
    case F::e4m3:
      if (!is_one) break;
      return plain(of_fp8<true>);
    case F::e5m2:
      if (!is_one) break;
      return plain(of_fp8<false>);
    default: break;
  }
  float values[256];
  decode(a, p, scale, from, to, values);
  for (int64_t i = 0; i < to - from; i += 32)
    _mm512_storeu_si512(out + i, bf16_of(_mm512_loadu_ps(values + i),
                                         _mm512_loadu_ps(values + i + 16)));
}

}  // namespace
}  // namespace SORA_ISA

#endif
