// fp32 vectors by the compiler's vector extension, and loads and stores of fp32, fp16 and bf16.
//
// Every file of csrc/cpu but the planner is compiled once for each instruction set, into the
// namespace SORA_ISA, and one is picked at run time (dispatch.cpp). So these files include no
// PyTorch header and no C++ template that the linker could merge across instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef SORA_ISA
#define SORA_ISA baseline
#endif

#define SORA_INLINE inline __attribute__((always_inline))

namespace SORA_ISA {
namespace {

// One register each: GCC 12 spills wider vectors to the stack, at a tenth of the speed.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * kLanes)));

struct Float { float value; };
struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

SORA_INLINE Vec splat(float value) { return value - Vec{}; }

SORA_INLINE Vec select(VecI mask, Vec yes, Vec no) {
  return (Vec)((mask & (VecI)yes) | (~mask & (VecI)no));
}

// b where either is NaN, as the instruction has it.
SORA_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

SORA_INLINE Vec load(const Float* p) {
  Vec v;
  memcpy(&v, p, sizeof(v));
  return v;
}

SORA_INLINE Vec load(const BFloat16* p) {
  VecU16 bits;
  memcpy(&bits, p, sizeof(bits));
  return (Vec)(__builtin_convertvector(bits, VecU) << 16);
}

SORA_INLINE Vec load(const Half* p) {
  Vec v;
#if defined(__AVX512F__)
  v = (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  v = (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  for (int i = 0; i < kLanes; ++i) {
    _Float16 h;
    memcpy(&h, p + i, 2);
    v[i] = (float)h;
  }
#endif
  return v;
}

SORA_INLINE void store(Float* p, Vec v) { memcpy(p, &v, sizeof(v)); }

SORA_INLINE void store(BFloat16* p, Vec v) {
  // To nearest, ties to even. NaN is set apart: rounding could carry its mantissa into infinity.
  const VecU bits = (VecU)v;
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU nan = (VecU)(v != v);
  const VecU result = (rounded & ~nan) | (0x7fc0u & nan);
  const VecU16 half = __builtin_convertvector(result, VecU16);
  memcpy(p, &half, sizeof(half));
}

SORA_INLINE void store(Half* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) {
    const _Float16 h = (_Float16)v[i];
    memcpy(p + i, &h, 2);
  }
#endif
}

// The last, partial vector of a row: lanes past `n` read as zero and are not written.
template <typename T>
SORA_INLINE Vec load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T part[kLanes] = {};
  memcpy(part, p, n * sizeof(T));
  return load(part);
}

template <typename T>
SORA_INLINE void store(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  memcpy(p, part, n * sizeof(T));
}

#if defined(__AVX512F__)
// A call of memcpy for every tail costs more than the rows before it.
SORA_INLINE __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }

SORA_INLINE Vec load(const Float* p, int64_t n) {
  return n >= kLanes ? load(p) : (Vec)_mm512_maskz_loadu_ps(first_lanes(n), p);
}

SORA_INLINE void store(Float* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
#endif

SORA_INLINE const Float* floats(const float* p) { return (const Float*)p; }
SORA_INLINE Float* floats(float* p) { return (Float*)p; }

// Lanes exchanged with those kStep away: log2(kLanes) steps reduce a vector into all its lanes.
template <int kStep>
SORA_INLINE Vec swap_lanes(Vec v) {
#if defined(__clang__)
  Vec result;
  for (int i = 0; i < kLanes; ++i) result[i] = v[i ^ kStep];
  return result;
#else
  VecI index;
  for (int i = 0; i < kLanes; ++i) index[i] = i ^ kStep;
  return __builtin_shuffle(v, index);
#endif
}

SORA_INLINE float sum(Vec v) {
  if constexpr (kLanes > 8) v += swap_lanes<8>(v);
  if constexpr (kLanes > 4) v += swap_lanes<4>(v);
  v += swap_lanes<2>(v);
  v += swap_lanes<1>(v);
  return v[0];
}

SORA_INLINE float largest(Vec v) {
  if constexpr (kLanes > 8) v = maximum(v, swap_lanes<8>(v));
  if constexpr (kLanes > 4) v = maximum(v, swap_lanes<4>(v));
  v = maximum(v, swap_lanes<2>(v));
  v = maximum(v, swap_lanes<1>(v));
  return v[0];
}

// Past the caches: for results too large to be found there again. Reading a line before writing all
// of it would cost as much as the write.
SORA_INLINE void stream(Float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps((float*)p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps((float*)p, (__m256)v);
#else
  store(p, v);
#endif
}

// After the last of them: what was streamed is seen by other threads before what is written next.
SORA_INLINE void end_of_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <bool kStreams, typename T>
SORA_INLINE void put(T* p, Vec v, int64_t n) {
  if constexpr (kStreams && sizeof(T) == 4)
    stream(p, v);
  else
    store(p, v, n);
}

SORA_INLINE bool aligned(const void* p) { return (uintptr_t)p % sizeof(Vec) == 0; }

// e^x for x <= 0 (Cephes' polynomial after Cody-Waite reduction); below -87 it is 0.
SORA_INLINE Vec exp_nonpositive(Vec x) {
  const VecI tiny = x < splat(-87.0f);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * 1.44269504088896341f + magic) - magic;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const VecI exponent = (__builtin_convertvector(n, VecI) + 127) << 23;
  return select(tiny, Vec{}, p * (Vec)exponent);
}

// 0.5 * (1 + tanh(u / 2)) is 1 / (1 + e^-u).
SORA_INLINE Vec gelu_tanh(Vec v) {
  const Vec u = 1.5957691216057308f * (v + 0.044715f * v * v * v);
  const VecI negative = u < Vec{};
  const Vec e = exp_nonpositive(select(negative, u, -u));
  return v * select(negative, e, splat(1.0f)) / (e + 1.0f);
}

// erf by Abramowitz and Stegun 7.1.26: 1.5e-7 off at most, an ulp of what gelu gives.
SORA_INLINE Vec gelu_erf(Vec v) {
  const VecI negative = v < Vec{};
  const Vec x = select(negative, -v, v) * 0.7071067811865476f;
  const Vec t = 1.0f / (1.0f + 0.3275911f * x);
  Vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec rest = p * t * exp_nonpositive(-x * x);  // 1 - erf(x)
  return 0.5f * v * select(negative, rest, 2.0f - rest);
}

// Rows and columns of kLanes vectors exchanged.
template <int kStep>
SORA_INLINE void transpose_step(Vec* rows) {
  // Swaps the off-diagonal kStep x kStep blocks of every 2 kStep x 2 kStep block.
  VecI low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (i & kStep) ? kLanes + i - kStep : i;
    high[i] = (i & kStep) ? kLanes + i : i + kStep;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Vec a = rows[i], b = rows[i + kStep];
#if defined(__clang__)
    Vec top, bottom;
    for (int j = 0; j < kLanes; ++j) {
      top[j] = low[j] < kLanes ? a[low[j]] : b[low[j] - kLanes];
      bottom[j] = high[j] < kLanes ? a[high[j]] : b[high[j] - kLanes];
    }
    rows[i] = top;
    rows[i + kStep] = bottom;
#else
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kStep] = __builtin_shuffle(a, b, high);
#endif
  }
}

SORA_INLINE void transpose(Vec* rows) {
  if constexpr (kLanes > 8) transpose_step<8>(rows);
  if constexpr (kLanes > 4) transpose_step<4>(rows);
  transpose_step<2>(rows);
  transpose_step<1>(rows);
}

SORA_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace
}  // namespace SORA_ISA
