// Attention of bf16 by products of pairs (AVX512-BF16), of the shape that attention.cpp describes.
//
// VDPBF16PS adds two products of bf16 to each fp32 lane: where attention.cpp goes element by element,
// this goes by pairs of channels (scores) and pairs of keys (sums), in half as many instructions.
// Queries and keys are taken as they are, and the scale comes after, in fp32. Weights are rounded to
// bf16 for the second product, as by every kernel that has such products. Denormal numbers count as
// zero.
#pragma once

#include "kernels.h"
#include "vec.h"

#if defined(__AVX512BF16__)

namespace SORA_ISA {
namespace {

SORA_INLINE __mmask32 first_halves(int64_t n) {
  return n >= 32 ? (__mmask32)~0u : (__mmask32)((1u << n) - 1);
}

// C[kRows, kLanes] = sum over pairs i < n of A[r, i] B[i], where A[r, i] lies at a[r * row + i * step].
SORA_INLINE void tile_pairs(const uint32_t* a, int64_t row, int64_t step, const uint32_t* b,
                            int64_t n, Vec* c) {
  __m512 acc[kRows];
  for (int r = 0; r < kRows; ++r) acc[r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; ++i) {
    const __m512bh column = (__m512bh)_mm512_loadu_si512(b + i * kLanes);
    for (int r = 0; r < kRows; ++r)
      acc[r] = _mm512_dpbf16_ps(acc[r], column,
                                (__m512bh)_mm512_set1_epi32((int)a[r * row + i * step]));
  }
  for (int r = 0; r < kRows; ++r) c[r] = (Vec)acc[r];
}

// Two vectors as pairs: the first in the lower halves.
SORA_INLINE __m512i pairs_of(Vec first, Vec second) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

void attend_pairs(const sora::AttentionArgs& a, sora::Span q, sora::Span k, int64_t head,
                  float padding, float* scratch) {
  const int64_t d = a.head_dim, wide_d = round_up(d, kLanes), pairs_d = round_up(d, 32) / 2;
  const int64_t most = round_up(k.count < kKeys ? k.count : kKeys, kRows);
  float* weights = scratch;                         // [most, kLanes]; then pairs, in its first half
  float* state = weights + most * kLanes;           // [queries / kLanes, 2 + wide_d, kLanes]
  const int64_t kept = k.count > kKeys ? round_up(q.count, kLanes) : kLanes;
  uint32_t* q_turned = (uint32_t*)(state + kept * (2 + wide_d));  // [pairs_d, kLanes]
  uint32_t* rows_of_k = q_turned + pairs_d * kLanes;              // [most, pairs_d]
  uint32_t* panels_of_v = rows_of_k + most * pairs_d;  // [wide_d / kLanes, most / 2, kLanes]

  const uint16_t* k_base = (const uint16_t*)a.k + k.first * a.k_stride + head * a.k_head_stride;
  const uint16_t* v_base = (const uint16_t*)a.v + k.first * a.v_stride + head * a.v_head_stride;
  const uint16_t* q_base = (const uint16_t*)a.q + q.first * a.q_stride + head * a.q_head_stride;
  const int64_t k_step = k.step * a.k_stride, v_step = k.step * a.v_stride;
  const bool ahead = head + 1 < a.heads && k.count <= kKeys;
  const bool padded = padding > -3.4028235e38f;
  const float* padding_key = a.padding_key + (padded ? head * d : 0);
  const float* padding_value = a.padding_value + (padded ? head * d : 0);

  int64_t begin = 0;
  do {  // once for padding alone
    const int64_t keys = k.count - begin < kKeys ? k.count - begin : kKeys;
    const int64_t key_pairs = (keys + 1) / 2;
    const bool is_first = begin == 0, is_last = begin + keys == k.count;
    for (int64_t r = 0; r < round_up(keys, kRows); ++r) {
      const uint16_t* from = k_base + (begin + r) * k_step;
      for (int64_t i = 0; i < pairs_d; i += kLanes)
        _mm512_storeu_si512(rows_of_k + r * pairs_d + i,
                            r < keys ? _mm512_maskz_loadu_epi16(
                                           first_halves(d > 2 * i ? d - 2 * i : 0), from + 2 * i)
                                     : _mm512_setzero_si512());
    }
    for (int64_t j = 0; j < key_pairs; ++j) {
      const uint16_t* low = v_base + (begin + 2 * j) * v_step;
      const uint16_t* high = low + v_step;
      for (int64_t i = 0; i < d; i += kLanes) {
        const __mmask16 mask = d - i >= kLanes ? (__mmask16)0xffff : first_lanes(d - i);
        const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low + i));
        const __m512i second =
            2 * j + 1 < keys ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, high + i))
                             : _mm512_setzero_si512();
        _mm512_storeu_si512(panels_of_v + i * (most / 2) + j * kLanes,
                            _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
      }
    }
    if (ahead) fetch<false>(k_base + a.k_head_stride, k_step, keys, d);
    if (is_last) {
      const int64_t step = q.step * a.heads * d;
      fetch<true>((uint16_t*)a.out + (q.first * a.heads + head) * d, step, q.count, d);
    }
    for (int64_t start = 0; start < q.count; start += kLanes) {
      const int64_t rows = q.count - start < kLanes ? q.count - start : kLanes;
      const uint16_t* q_rows = q_base + start * q.step * a.q_stride;
      for (int64_t i = 0; i < pairs_d; i += kLanes) {
        const __mmask32 mask = first_halves(d > 2 * i ? d - 2 * i : 0);
        Vec block[kLanes];
        for (int r = 0; r < kLanes; ++r)
          block[r] = r < rows ? (Vec)_mm512_maskz_loadu_epi16(
                                    mask, q_rows + r * q.step * a.q_stride + 2 * i)
                              : Vec{};
        transpose(block);
        for (int r = 0; r < kLanes; ++r) memcpy(q_turned + (i + r) * kLanes, &block[r], 64);
      }
      float* tops = state + (kept > kLanes ? start : 0) * (2 + wide_d);
      float* totals = tops + kLanes;
      float* sums = totals + kLanes;  // [kLanes, wide_d]
      Vec before = is_first ? splat(-3.4028235e38f) : load(floats(tops));
      if (is_first && padded) {
        before = Vec{};
        for (int64_t i = 0; i < d; ++i) {
          VecU bits;
          memcpy(&bits, q_turned + i / 2 * kLanes, sizeof(bits));
          before += padding_key[i] * (Vec)(i % 2 ? bits & 0xffff0000u : bits << 16);
        }
        before = before * a.scale + padding;
      }
      Vec top = before;
      for (int64_t j = 0; j < keys; j += kRows) {
        Vec scores[kRows];
        tile_pairs(rows_of_k + j * pairs_d, pairs_d, 1, q_turned, pairs_d, scores);
        for (int r = 0; r < kRows; ++r) {
          scores[r] *= a.scale;
          if (j + r < keys) top = maximum(top, scores[r]);
          store(floats(weights + (j + r) * kLanes), scores[r]);
        }
      }
      if (ahead && start == 0) fetch<false>(v_base + a.v_head_stride, v_step, keys, d);
      Vec total = {};
      uint32_t* weight_pairs = (uint32_t*)weights;  // row j is written when rows 2j, 2j + 1 are read
      for (int64_t j = 0; j < key_pairs; ++j) {
        const Vec first = exp_nonpositive(load(floats(weights + 2 * j * kLanes)) - top);
        Vec second = {};
        if (2 * j + 1 < keys) second = exp_nonpositive(load(floats(weights + (2 * j + 1) * kLanes)) - top);
        total += first + second;
        const __m512i both = pairs_of(first, second);
        memcpy(weight_pairs + j * kLanes, &both, sizeof(both));
      }
      Vec shrunk = {};
      if (!is_first || padded) {
        shrunk = exp_nonpositive(before - top);
        total += is_first ? shrunk : shrunk * load(floats(totals));
      }
      const Vec inverse = 1.0f / total;
      if (!is_last) {
        store(floats(tops), top);
        store(floats(totals), total);
      } else if (a.lse) {
        for (int64_t r = 0; r < rows; ++r)
          a.lse[(q.first + (start + r) * q.step) * a.heads + head] =
              top[r] + __builtin_logf(total[r]);
      }
      if (ahead) fetch<false>(q_rows + a.q_head_stride, q.step * a.q_stride, rows, d);
      for (int64_t first = 0; first < rows; first += kRows) {
        for (int64_t i = 0; i < d; i += kLanes) {
          Vec result[kRows];
          tile_pairs(weight_pairs + first, 1, kLanes, panels_of_v + i * (most / 2), key_pairs,
                     result);
          for (int64_t r = 0; r < kRows && first + r < rows; ++r) {
            float* sum = sums + (first + r) * wide_d + i;
            if (!is_first)
              result[r] += load(floats(sum)) * shrunk[first + r];
            else if (padded)
              result[r] += load(floats(padding_value + i), d - i) * shrunk[first + r];
            if (!is_last) {
              store(floats(sum), result[r]);
              continue;
            }
            const int64_t token = q.first + (start + first + r) * q.step;
            store((BFloat16*)a.out + (token * a.heads + head) * d + i,
                  result[r] * inverse[first + r], d - i);
          }
        }
      }
    }
    begin += kKeys;
  } while (begin < k.count);
}

}  // namespace
}  // namespace SORA_ISA

#endif
