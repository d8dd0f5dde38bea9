// Attention of some queries of one (sequence, head), on blocks of keys that stay in the cache.
//
// A vector holds as many queries as it has lanes: those are transposed once into a small buffer,
// scores are key by key, and the softmax runs over queries side by side, with nothing to reduce
// inside a vector. So it costs no set-up, which is what temporal attention of a video transformer
// needs: it has thousands of sequences of a few frames each.
#include "kernels.h"
#include "vec.h"

namespace SORA_ISA {
namespace {

constexpr int kRows = 8;  // 8 accumulators hide the latency of two FMA ports
constexpr int64_t kKeys = 512;  // with their values 512 KiB at head_dim 128, of the second cache

// With 32 registers: 16 sums at a time, whose operands take fewer loads a product than the ports have.
constexpr bool kMany = kLanes == 16;

// C[kTile, kLanes] = sum over i < n of A[r, i] B[i], where A[r, i] lies at a[r * row + i * step].
template <int kTile = kRows>
SORA_INLINE void tile(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb,
                      int64_t n, Vec* c) {
  Vec acc[kTile] = {};
  for (int64_t i = 0; i < n; ++i) {
    const Vec column = load(floats(b + i * ldb));
    for (int r = 0; r < kTile; ++r) acc[r] += a[r * row + i * step] * column;
  }
  for (int r = 0; r < kTile; ++r) c[r] = acc[r];
}

// The same for two columns of B, which lie `apart`: C[2, kRows, kLanes].
SORA_INLINE void tile_pair(const float* a, int64_t row, int64_t step, const float* b, int64_t apart,
                           int64_t ldb, int64_t n, Vec* c) {
  Vec first[kRows] = {}, second[kRows] = {};
  for (int64_t i = 0; i < n; ++i) {
    const Vec left = load(floats(b + i * ldb)), right = load(floats(b + apart + i * ldb));
    for (int r = 0; r < kRows; ++r) {
      const Vec both = splat(a[r * row + i * step]);
      first[r] += both * left;
      second[r] += both * right;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    c[r] = first[r];
    c[kRows + r] = second[r];
  }
}

// Rows of a sequence into the second-level cache: they lie whole frames apart, which no hardware
// prefetcher follows.
template <bool kToWrite, typename T>
SORA_INLINE void fetch(const T* base, int64_t stride, int64_t rows, int64_t d) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < d; i += kLine) __builtin_prefetch(base + r * stride + i, kToWrite, 2);
}

// Rows of a sequence as fp32; those from `rows` to `padded` are zero. Element (r, i) goes to
// to[r * row + i * column], where i is a multiple of kLanes and the lanes lie side by side. Where the
// frames of a video lie a multiple of 4 KiB apart, its rows would push one another out of the cache.
template <typename T>
SORA_INLINE void gather(const T* base, int64_t stride, int64_t rows, int64_t padded, int64_t d,
                        float* to, int64_t row, int64_t column) {
  for (int64_t r = 0; r < padded; ++r)
    for (int64_t i = 0; i < d; i += kLanes)
      store(floats(to + r * row + i * column),
            r < rows ? load(base + r * stride + i, d - i) : Vec{});
}

// Keys come in blocks, which a running softmax joins (FlashAttention, arXiv 2205.14135): what is
// known of the queries so far, their greatest score, the sum of weights and the weighted sum of
// values, waits in `state` for the next block. Padding's key, and its value with a weight of 1, are
// what is known before the first.
template <typename T>
void attend(const sora::AttentionArgs& a, sora::Span q, sora::Span k, int64_t head, float padding,
            float* scratch) {
  const int64_t d = a.head_dim, wide_d = round_up(d, kLanes);
  const int64_t most = round_up(k.count < kKeys ? k.count : kKeys, kRows);
  float* rows_of_k = scratch;                     // [most, wide_d]
  float* panels_of_v = rows_of_k + most * wide_d; // [wide_d / kLanes, most, kLanes]
  float* q_turned = panels_of_v + most * wide_d;  // [wide_d, kLanes]
  float* weights = q_turned + wide_d * kLanes;    // [most, kLanes]
  float* state = weights + most * kLanes;         // [queries / kLanes, 2 + wide_d, kLanes]

  const T* k_base = (const T*)a.k + k.first * a.k_stride + head * a.k_head_stride;
  const T* v_base = (const T*)a.v + k.first * a.v_stride + head * a.v_head_stride;
  const T* q_base = (const T*)a.q + q.first * a.q_stride + head * a.q_head_stride;
  const int64_t k_step = k.step * a.k_stride, v_step = k.step * a.v_stride;
  // The next head is most often computed next.
  const bool ahead = head + 1 < a.heads && k.count <= kKeys;
  const bool padded = padding > -3.4028235e38f;
  const float* padding_key = a.padding_key + (padded ? head * d : 0);
  const float* padding_value = a.padding_value + (padded ? head * d : 0);
  bool streams = false;
  if constexpr (sizeof(T) == 4)
    streams = a.past_caches && d % kLanes == 0 && aligned(a.out);

  int64_t begin = 0;
  do {  // once for padding alone
    const int64_t keys = k.count - begin < kKeys ? k.count - begin : kKeys;
    const bool is_first = begin == 0, is_last = begin + keys == k.count;
    gather(k_base + begin * k_step, k_step, keys, round_up(keys, kRows), d, rows_of_k, wide_d, 1);
    gather(v_base + begin * v_step, v_step, keys, keys, d, panels_of_v, kLanes, most);
    if (ahead) fetch<false>(k_base + a.k_head_stride, k_step, keys, d);
    if (is_last && !streams) {
      const int64_t step = q.step * a.heads * d;
      fetch<true>((T*)a.out + (q.first * a.heads + head) * d, step, q.count, d);
    }
    for (int64_t start = 0; start < q.count; start += kLanes) {
      const int64_t rows = q.count - start < kLanes ? q.count - start : kLanes;
      const T* q_rows = q_base + start * q.step * a.q_stride;
      for (int64_t i = 0; i < d; i += kLanes) {
        Vec block[kLanes];
        for (int r = 0; r < kLanes; ++r)
          block[r] = r < rows ? load(q_rows + r * q.step * a.q_stride + i, d - i) * a.scale : Vec{};
        transpose(block);
        for (int r = 0; r < kLanes; ++r) store(floats(q_turned + (i + r) * kLanes), block[r]);
      }
      float* tops = state + start * (2 + wide_d);
      float* totals = tops + kLanes;
      float* sums = totals + kLanes;  // [kLanes, wide_d]
      Vec before = is_first ? splat(-3.4028235e38f) : load(floats(tops));
      if (is_first && padded) {
        before = splat(padding);
        for (int64_t i = 0; i < d; ++i) before += padding_key[i] * load(floats(q_turned + i * kLanes));
      }
      Vec top = before;
      for (int64_t j = 0, step; j < keys; j += step) {
        Vec scores[2 * kRows];
        step = kMany && keys - j > kRows ? 2 * kRows : kRows;
        if (step > kRows)
          tile<2 * kRows>(rows_of_k + j * wide_d, wide_d, 1, q_turned, kLanes, d, scores);
        else
          tile(rows_of_k + j * wide_d, wide_d, 1, q_turned, kLanes, d, scores);
        for (int r = 0; r < step; ++r) {
          if (j + r < keys) top = maximum(top, scores[r]);
          store(floats(weights + (j + r) * kLanes), scores[r]);
        }
      }
      if (ahead && start == 0) fetch<false>(v_base + a.v_head_stride, v_step, keys, d);
      Vec total = {};
      for (int64_t j = 0; j < keys; ++j) {
        const Vec weight = exp_nonpositive(load(floats(weights + j * kLanes)) - top);
        store(floats(weights + j * kLanes), weight);
        total += weight;
      }
      Vec shrunk = {};  // how much less what was before weighs under the new greatest score
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
      // Lanes past the last query hold weights of zero queries, which are not stored.
      for (int64_t first = 0; first < rows; first += kRows) {
        for (int64_t i = 0, columns; i < d; i += columns) {
          Vec result[2 * kRows];
          columns = kMany && d - i > kLanes ? 2 * kLanes : kLanes;
          const float* panel = panels_of_v + i * most;
          if (columns > kLanes)
            tile_pair(weights + first, 1, kLanes, panel, kLanes * most, kLanes, keys, result);
          else
            tile(weights + first, 1, kLanes, panel, kLanes, keys, result);
          for (int64_t at = i; at < i + columns; at += kLanes)
            for (int64_t r = 0; r < kRows && first + r < rows; ++r) {
              Vec value = result[(at - i) / kLanes * kRows + r];
              float* sum = sums + (first + r) * wide_d + at;
              if (!is_first)
                value += load(floats(sum)) * shrunk[first + r];
              else if (padded)
                value += load(floats(padding_value + at), d - at) * shrunk[first + r];
              if (!is_last) {
                store(floats(sum), value);
                continue;
              }
              const int64_t token = q.first + (start + first + r) * q.step;
              T* to = (T*)a.out + (token * a.heads + head) * d + at;
              value *= inverse[first + r];
              if (streams)
                put<true>(to, value, d - at);
              else
                put<false>(to, value, d - at);
            }
        }
      }
    }
    begin += kKeys;
  } while (begin < k.count);
  if (streams) end_of_stream();
}

}  // namespace
}  // namespace SORA_ISA

#include "attention_bf16.h"

namespace SORA_ISA {

int64_t attention_scratch(int64_t queries, int64_t keys, int64_t head_dim) {
  const int64_t wide_d = round_up(head_dim, kLanes);
  const int64_t most = round_up(keys < kKeys ? keys : kKeys, kRows);
  const int64_t kept = keys > kKeys ? round_up(queries, kLanes) : kLanes;
  return 2 * wide_d * most + kLanes * (2 * wide_d + most) + kept * (2 + wide_d);
}

void attention(const sora::AttentionArgs& a, sora::Span q, sora::Span k, int64_t head,
               float padding, float* scratch) {
  switch (a.type) {
    case sora::Type::f32: return attend<Float>(a, q, k, head, padding, scratch);
    case sora::Type::f16: return attend<Half>(a, q, k, head, padding, scratch);
#if defined(__AVX512BF16__)
    case sora::Type::bf16: return attend_pairs(a, q, k, head, padding, scratch);
#else
    case sora::Type::bf16: return attend<BFloat16>(a, q, k, head, padding, scratch);
#endif
  }
}

}  // namespace SORA_ISA
