// Attention over short sequences: one (sequence, head) at a time, all of it in the cache.
//
// Temporal attention of a video transformer has thousands of sequences of a few frames each, where
// a blocked kernel spends its time on set-up. Here keys are transposed once into a small buffer,
// and both products are the same register tile: kRows queries by one vector of columns.
#include "kernels.h"
#include "vec.h"

namespace SORA_ISA {
namespace {

constexpr int kRows = 8;  // 8 accumulators hide the latency of two FMA ports

// C[kRows, kLanes] = A[kRows, n] B[n, kLanes]
SORA_INLINE void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n, Vec* c) {
  Vec acc[kRows] = {};
  for (int64_t i = 0; i < n; ++i) {
    const Vec column = load(floats(b + i * ldb));
    for (int r = 0; r < kRows; ++r) acc[r] += a[r * lda + i] * column;
  }
  for (int r = 0; r < kRows; ++r) c[r] = acc[r];
}

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

// Rows of a sequence into the second-level cache: they lie whole frames apart, which no hardware
// prefetcher follows.
template <bool kToWrite, typename T>
SORA_INLINE void fetch(const T* base, int64_t stride, int64_t rows, int64_t d) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < d; i += kLine) __builtin_prefetch(base + r * stride + i, kToWrite, 2);
}

template <typename T>
void attend(const sora::AttentionArgs& a, sora::Span q, sora::Span k, int64_t head, float* scratch) {
  const int64_t d = a.head_dim, wide_d = round_up(d, kLanes), keys = round_up(k.count, kLanes);
  float* k_turned = scratch;                   // [wide_d, keys]
  float* values = k_turned + wide_d * keys;    // [keys, wide_d]
  float* queries = values + keys * wide_d;     // [kRows, wide_d]
  float* weights = queries + kRows * wide_d;   // [kRows, keys]

  const T* k_base = (const T*)a.k + k.first * a.k_stride + head * a.k_head_stride;
  const T* v_base = (const T*)a.v + k.first * a.v_stride + head * a.v_head_stride;
  for (int64_t j = 0; j < keys; j += kLanes) {
    const int64_t some = k.count - j < kLanes ? k.count - j : kLanes;
    for (int64_t i = 0; i < d; i += kLanes) {
      Vec block[kLanes] = {};
      for (int64_t r = 0; r < some; ++r)
        block[r] = load(k_base + (j + r) * k.step * a.k_stride + i, d - i);
      transpose(block);
      for (int64_t r = 0; r < kLanes; ++r) store(floats(k_turned + (i + r) * keys + j), block[r]);
      for (int64_t r = 0; r < some; ++r)
        store(floats(values + (j + r) * wide_d + i),
              load(v_base + (j + r) * k.step * a.v_stride + i, d - i));
    }
  }

  const T* q_base = (const T*)a.q + q.first * a.q_stride + head * a.q_head_stride;
  // The next head is most often computed next.
  const bool ahead = head + 1 < a.heads;
  if (ahead) fetch<false>(k_base + a.k_head_stride, k.step * a.k_stride, k.count, d);
  bool streams = false;
  if constexpr (sizeof(T) == 4)
    streams = a.past_caches && d % kLanes == 0 && aligned(a.out);
  if (!streams) {
    const int64_t step = q.step * a.heads * d;
    fetch<true>((T*)a.out + (q.first * a.heads + head) * d, step, q.count, d);
  }
  for (int64_t start = 0; start < q.count; start += kRows) {
    const int64_t rows = q.count - start < kRows ? q.count - start : kRows;
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t i = 0; i < d; i += kLanes)
        store(floats(queries + r * wide_d + i),
              r < rows ? load(q_base + (start + r) * q.step * a.q_stride + i, d - i) * a.scale
                       : Vec{});
    Vec top[kRows];
    for (int r = 0; r < kRows; ++r) top[r] = splat(-__builtin_inff());
    for (int64_t j = 0; j < keys; j += kLanes) {
      Vec scores[kRows];
      tile(queries, wide_d, k_turned + j, keys, d, scores);
      if (j + kLanes > k.count)
        for (int r = 0; r < kRows; ++r)
          for (int64_t lane = k.count - j; lane < kLanes; ++lane)
            scores[r][lane] = -__builtin_inff();
      for (int r = 0; r < kRows; ++r) {
        top[r] = maximum(top[r], scores[r]);
        store(floats(weights + r * keys + j), scores[r]);
      }
    }
    if (ahead && start == 0) fetch<false>(v_base + a.v_head_stride, k.step * a.v_stride, k.count, d);
    float inverse[kRows];
    for (int r = 0; r < kRows; ++r) {
      const float most = largest(top[r]);
      Vec total = {};
      for (int64_t j = 0; j < keys; j += kLanes) {
        const Vec weight = exp_nonpositive(load(floats(weights + r * keys + j)) - most);
        store(floats(weights + r * keys + j), weight);
        total += weight;
      }
      const float l = sum(total);
      inverse[r] = 1.0f / l;
      if (a.lse && r < rows)
        a.lse[(q.first + (start + r) * q.step) * a.heads + head] = most + __builtin_logf(l);
    }
    if (ahead) {
      const int64_t step = q.step * a.q_stride;
      fetch<false>(q_base + a.q_head_stride + start * step, step, rows, d);
    }
    for (int64_t i = 0; i < d; i += kLanes) {
      Vec result[kRows];
      tile(weights, keys, values + i, wide_d, k.count, result);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t token = q.first + (start + r) * q.step;
        T* to = (T*)a.out + (token * a.heads + head) * d + i;
        if constexpr (sizeof(T) == 4) {
          if (streams) {
            stream(to, result[r] * inverse[r]);
            continue;
          }
        }
        store(to, result[r] * inverse[r], d - i);
      }
    }
  }
}

}  // namespace

int64_t attention_scratch(int64_t queries, int64_t keys, int64_t head_dim) {
  const int64_t wide_d = round_up(head_dim, kLanes), wide_keys = round_up(keys, kLanes);
  return 2 * wide_d * wide_keys + kRows * (wide_d + wide_keys) + kLanes;
}

void attention(const sora::AttentionArgs& a, sora::Span q, sora::Span k, int64_t head,
               float* scratch) {
  switch (a.type) {
    case sora::Type::f32: return attend<Float>(a, q, k, head, scratch);
    case sora::Type::f16: return attend<Half>(a, q, k, head, scratch);
    case sora::Type::bf16: return attend<BFloat16>(a, q, k, head, scratch);
  }
}

}  // namespace SORA_ISA
