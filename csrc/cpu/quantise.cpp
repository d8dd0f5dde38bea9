// quant_linear: rows of quantised weights as floating-point values, and rows of activations as int8.
#include "quant_formats.h"

namespace SORA_ISA {
namespace {

template <typename T>
void convert_row(const float* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(floats(from + i), n - i), n - i);
}

template <typename T>
void int8_rows(const sora::QuantiseArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)a.x + row * a.x_stride;
    Vec most = {};
    for (int64_t i = 0; i < a.ins; i += kLanes) {
      const Vec v = load(x + i, a.ins - i);
      most = maximum(most, maximum(v, -v));
    }
    const float top = largest(most);
    const float scale = top / 127.0f, inverse = top > 0.0f ? 127.0f / top : 0.0f;
    a.scale[row] = scale;
    uint8_t* out = a.out + row * a.ins;
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    for (int64_t i = 0; i < a.ins; i += kLanes) {
      const Vec v = (load(x + i, a.ins - i) * inverse + magic) - magic;
      typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
      const Bytes b = __builtin_convertvector(__builtin_convertvector(v, VecI) + 128, Bytes);
      const int64_t left = a.ins - i;
      memcpy(out + i, &b, left < kLanes ? left : kLanes);
    }
  }
}

template <typename T>
void finish_rows(const sora::FinishArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* out = (T*)a.out + row * a.out_stride;
    const Vec scale = splat(a.scale ? a.scale[row] : 1.0f);
    for (int64_t i = 0; i < a.outs; i += kLanes) {
      const int64_t left = a.outs - i;
      Vec v = a.sums ? load(floats(a.sums + row * a.outs + i), left) * scale : load(out + i, left);
      if (a.bias) v += load(floats(a.bias + i), left);
      if (a.gelu == 1) v = gelu_erf(v);
      if (a.gelu == 2) v = gelu_tanh(v);
      store(out + i, v, left);
    }
  }
}

}  // namespace

void unpack(const sora::UnpackArgs& a, int64_t begin, int64_t end, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* p = a.weight + row * a.row_bytes;
    const float* scale = a.scale ? a.scale + row * a.scale_stride : nullptr;
    const int64_t at = (row - a.first) * a.ins;
    float* values = a.type == sora::Type::f32 ? (float*)a.out + at : scratch;
    decode(a, p, scale, 0, a.ins, values);
    if (a.type == sora::Type::bf16) convert_row(values, (BFloat16*)a.out + at, a.ins);
    if (a.type == sora::Type::f16) convert_row(values, (Half*)a.out + at, a.ins);
  }
}

void quantise(const sora::QuantiseArgs& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case sora::Type::f32: return int8_rows<Float>(a, begin, end);
    case sora::Type::f16: return int8_rows<Half>(a, begin, end);
    case sora::Type::bf16: return int8_rows<BFloat16>(a, begin, end);
  }
}

void finish(const sora::FinishArgs& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case sora::Type::f32: return finish_rows<Float>(a, begin, end);
    case sora::Type::f16: return finish_rows<Half>(a, begin, end);
    case sora::Type::bf16: return finish_rows<BFloat16>(a, begin, end);
  }
}

}  // namespace SORA_ISA
