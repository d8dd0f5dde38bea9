// norm_modulate and gate_residual_norm_modulate: one pass over memory, a row at a time.
//
// A row stays in the first-level cache between its three sweeps (sum, squares, output), so the
// mean is exact before the variance is taken, as in PyTorch's own LayerNorm.
#include "kernels.h"
#include "vec.h"

namespace SORA_ISA {
namespace {

template <typename T, typename R, bool kStreams>
void norm_rows(const sora::NormArgs& a, int64_t begin, int64_t end, float* row) {
  const int64_t n = a.channels;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t table_row = a.index ? a.index[token] : token * a.row_step;
    const T* x = (const T*)a.x + token * a.x_stride;
    Vec total = {};
    if (a.residual) {
      const R* residual = (const R*)a.residual + token * a.residual_stride;
      R* residual_out = (R*)a.residual_out + token * n;
      const float* gate = a.gate.data ? a.gate.data + table_row * a.gate.stride : nullptr;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t left = n - i;
        Vec branch = load(x + i, left);
        if (gate) branch *= load(floats(gate + i), left);
        const Vec updated = load(residual + i, left) + branch;
        put<kStreams>(residual_out + i, updated, left);
        // The norm reads the residual as it was rounded.
        const Vec rounded = sizeof(R) == 4 ? updated : load(residual_out + i, left);
        store(floats(row + i), rounded);
        total += rounded;
      }
    } else {
      for (int64_t i = 0; i < n; i += kLanes) {
        const Vec value = load(x + i, n - i);
        store(floats(row + i), value);
        total += value;
      }
    }
    const float mean = a.rms ? 0.0f : sum(total) / n;
    // The next row is fetched while this one is worked on in the cache.
    const bool more = token + 1 < end;
    const T* next = more ? x + a.x_stride : x;
    const R* next_residual =
        a.residual ? (const R*)a.residual + (token + more) * a.residual_stride : nullptr;
    Vec squares = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      __builtin_prefetch(next + i);
      if (next_residual) __builtin_prefetch(next_residual + i);
      const Vec centred = load(floats(row + i)) - mean;
      squares += centred * centred;
    }
    float square_sum = sum(squares);
    for (; i < n; ++i) square_sum += (row[i] - mean) * (row[i] - mean);
    const float inverse = 1.0f / __builtin_sqrtf(square_sum / n + a.eps);

    const float* scale = a.scale.data ? a.scale.data + table_row * a.scale.stride : nullptr;
    const float* shift = a.shift.data ? a.shift.data + table_row * a.shift.stride : nullptr;
    T* y = (T*)a.y + token * n;
    for (int64_t j = 0; j < n; j += kLanes) {
      const int64_t left = n - j;
      Vec value = (load(floats(row + j)) - mean) * inverse;
      if (a.weight) value *= load(floats(a.weight + j), left);
      if (a.bias) value += load(floats(a.bias + j), left);
      if (scale) value *= 1.0f + load(floats(scale + j), left);
      if (shift) value += load(floats(shift + j), left);
      put<kStreams>(y + j, value, left);
    }
  }
}

template <typename T, typename R>
void norm_each(const sora::NormArgs& a, int64_t begin, int64_t end, float* scratch) {
  if constexpr (sizeof(T) == 4 && sizeof(R) == 4) {
    if (a.past_caches && a.channels % kLanes == 0 && aligned(a.y) && aligned(a.residual_out)) {
      norm_rows<T, R, true>(a, begin, end, scratch);
      end_of_stream();
      return;
    }
  }
  norm_rows<T, R, false>(a, begin, end, scratch);
}

template <typename T>
void norm_typed(const sora::NormArgs& a, int64_t begin, int64_t end, float* scratch) {
  switch (a.residual_type) {
    case sora::Type::f32: return norm_each<T, Float>(a, begin, end, scratch);
    case sora::Type::f16: return norm_each<T, Half>(a, begin, end, scratch);
    case sora::Type::bf16: return norm_each<T, BFloat16>(a, begin, end, scratch);
  }
}

}  // namespace

void norm(const sora::NormArgs& a, int64_t begin, int64_t end, float* scratch) {
  switch (a.type) {
    case sora::Type::f32: return norm_typed<Float>(a, begin, end, scratch);
    case sora::Type::f16: return norm_typed<Half>(a, begin, end, scratch);
    case sora::Type::bf16: return norm_typed<BFloat16>(a, begin, end, scratch);
  }
}

}  // namespace SORA_ISA
