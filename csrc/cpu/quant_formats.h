// Quantised weights as fp32 values: ggml's blocks (github.com/ggml-org/ggml, ggml-quants.c), int8 and
// fp8 with scales; kernels/sora_kernels/quant/formats.py has the same as tables.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace SORA_ISA {
namespace {

SORA_INLINE float half_at(const uint8_t* p) {
  _Float16 h;
  memcpy(&h, p, 2);
  return (float)h;
}

// 32 codes of 4 bits, and `high`: bits that are a fifth one, 16 each.
template <bool kFifth>
SORA_INLINE void codes_of_32(const uint8_t* q, const uint8_t* high, float* out, float d, float m) {
  uint32_t bits = 0;
  if constexpr (kFifth) memcpy(&bits, high, 4);
  for (int j = 0; j < 16; ++j) {
    const int low = (q[j] & 15) | (kFifth ? ((bits >> j) & 1) << 4 : 0);
    const int upper = (q[j] >> 4) | (kFifth ? ((bits >> (j + 16)) & 1) << 4 : 0);
    out[j] = d * (float)low + m;
    out[j + 16] = d * (float)upper + m;
  }
}

SORA_INLINE void q8_0(const uint8_t* p, float* out) {
  const float d = half_at(p);
  const int8_t* q = (const int8_t*)(p + 2);
  for (int j = 0; j < 32; ++j) out[j] = d * (float)q[j];
}

SORA_INLINE void q2_k(const uint8_t* p, float* out) {
  const float d = half_at(p + 80), dmin = half_at(p + 82);
  for (int s = 0; s < 16; ++s) {
    const float factor = d * (float)(p[s] & 15), least = dmin * (float)(p[s] >> 4);
    const uint8_t* q = p + 16 + s / 8 * 32 + s % 2 * 16;
    const int shift = s % 8 / 2 * 2;
    for (int j = 0; j < 16; ++j) out[16 * s + j] = factor * (float)((q[j] >> shift) & 3) - least;
  }
}

SORA_INLINE void q3_k(const uint8_t* p, float* out) {
  const float d = half_at(p + 108);
  for (int s = 0; s < 16; ++s) {
    const int low = s < 8 ? p[96 + s] & 15 : p[96 + s - 8] >> 4;
    const int scale = (low | ((p[104 + s % 4] >> (s / 4 * 2)) & 3) << 4) - 32;
    const float factor = d * (float)scale;
    const uint8_t* q = p + 32 + s / 8 * 32 + s % 2 * 16;
    const uint8_t* mask = p + s % 2 * 16;
    const int shift = s % 8 / 2 * 2, plane = s / 2;
    for (int j = 0; j < 16; ++j) {
      const int code = ((q[j] >> shift) & 3) + 4 * ((mask[j] >> plane) & 1) - 4;
      out[16 * s + j] = factor * (float)code;
    }
  }
}

// Q4_K, and Q5_K with a fifth bit.
template <bool kFifth>
SORA_INLINE void q4_k(const uint8_t* p, float* out) {
  const float d = half_at(p), dmin = half_at(p + 2);
  const uint8_t* s = p + 4;
  const uint8_t* high = p + 16;
  const uint8_t* q = kFifth ? p + 48 : p + 16;
  for (int i = 0; i < 8; ++i) {
    const int scale = i < 4 ? s[i] & 63 : (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
    const int least = i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | (s[i] >> 6) << 4;
    const float factor = d * (float)scale, m = -dmin * (float)least;
    const uint8_t* own = q + i / 2 * 32;
    const int shift = i % 2 * 4;
    for (int j = 0; j < 32; ++j) {
      const int code = ((own[j] >> shift) & 15) | (kFifth ? ((high[j] >> i) & 1) << 4 : 0);
      out[32 * i + j] = factor * (float)code + m;
    }
  }
}

SORA_INLINE void q6_k(const uint8_t* p, float* out) {
  const float d = half_at(p + 208);
  const int8_t* scales = (const int8_t*)(p + 192);
  for (int s = 0; s < 16; ++s) {
    const float factor = d * (float)scales[s];
    const int n = s / 8, quarter = s % 8 / 2, first = s % 2 * 16;
    const uint8_t* q = p + n * 64 + quarter % 2 * 32 + first;
    const uint8_t* high = p + 128 + n * 32 + first;
    const int shift = quarter / 2 * 4, pair = quarter * 2;
    for (int j = 0; j < 16; ++j) {
      const int code = (((q[j] >> shift) & 15) | ((high[j] >> pair) & 3) << 4) - 32;
      out[16 * s + j] = factor * (float)code;
    }
  }
}

// e4m3 by way of float16: the same bits one exponent's width up, 2^8 too small. NaN is set apart.
SORA_INLINE void e4m3(const uint8_t* q, float* out, int64_t n, float scale) {
  for (int64_t i = 0; i < n; i += kLanes) {
    uint16_t bits[kLanes];
    int32_t nan[kLanes];
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    for (int64_t j = 0; j < kLanes; ++j) {
      const uint8_t b = j < left ? q[i + j] : 0;
      bits[j] = (uint16_t)((b & 0x80) << 8 | (b & 0x7f) << 7);
      nan[j] = (b & 0x7f) == 0x7f ? 0x7fc00000 : 0;
    }
    Vec v = load((const Half*)bits) * 256.0f * scale;
    VecI mask;
    memcpy(&mask, nan, sizeof(mask));
    store(floats(out + i), (Vec)((VecI)v | mask), left);
  }
}

SORA_INLINE void e5m2(const uint8_t* q, float* out, int64_t n, float scale) {
  for (int64_t i = 0; i < n; i += kLanes) {
    uint16_t bits[kLanes];
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    for (int64_t j = 0; j < kLanes; ++j) bits[j] = j < left ? (uint16_t)(q[i + j] << 8) : 0;
    store(floats(out + i), load((const Half*)bits) * scale, left);
  }
}

// Values `from` to `to` of a row, ends of blocks, whose bytes begin at p.
inline void decode(const sora::UnpackArgs& a, const uint8_t* p, const float* scale, int64_t from,
                   int64_t to, float* out) {
  using F = sora::Format;
  const auto blocks = [&](int64_t values, int64_t bytes, auto decode) {
    p += from / values * bytes;
    for (int64_t i = from; i < to; i += values, p += bytes) decode(p, out + (i - from));
  };
  const auto stretches = [&](auto decode) {
    const int64_t length = a.ins / a.stretches;
    for (int64_t i = from; i < to;) {
      const int64_t end = (i / length + 1) * length < to ? (i / length + 1) * length : to;
      decode(p + i, out + (i - from), end - i, scale ? scale[i / length] : 1.0f);
      i = end;
    }
  };
  switch (a.format) {
    case F::int8:
      return stretches([](const uint8_t* __restrict q, float* __restrict o, int64_t n, float s) {
        for (int64_t j = 0; j < n; ++j) o[j] = s * (float)(int8_t)q[j];
      });
    case F::e4m3: return stretches(e4m3);
    case F::e5m2: return stretches(e5m2);
    case F::q4_0:
      return blocks(32, 18, [](const uint8_t* b, float* o) {
        const float d = half_at(b);
        codes_of_32<false>(b + 2, nullptr, o, d, -8.0f * d);
      });
    case F::q4_1:
      return blocks(32, 20, [](const uint8_t* b, float* o) {
        codes_of_32<false>(b + 4, nullptr, o, half_at(b), half_at(b + 2));
      });
    case F::q5_0:
      return blocks(32, 22, [](const uint8_t* b, float* o) {
        const float d = half_at(b);
        codes_of_32<true>(b + 6, b + 2, o, d, -16.0f * d);
      });
    case F::q5_1:
      return blocks(32, 24, [](const uint8_t* b, float* o) {
        codes_of_32<true>(b + 8, b + 4, o, half_at(b), half_at(b + 2));
      });
    case F::q8_0: return blocks(32, 34, q8_0);
    case F::q2_k: return blocks(256, 84, q2_k);
    case F::q3_k: return blocks(256, 110, q3_k);
    case F::q4_k: return blocks(256, 144, q4_k<false>);
    case F::q5_k: return blocks(256, 176, q4_k<true>);
    case F::q6_k: return blocks(256, 210, q6_k);
  }
}

}  // namespace
}  // namespace SORA_ISA
