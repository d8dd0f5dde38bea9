// lora_linear: what adapters add to the rows of a linear layer's result.
//
// Both products are taken by tiles of rows and 2 vectors of columns, whose sums stay in registers:
// factors are laid out anew beforehand, a line of columns for each input. A row is summed in one
// order whatever rows are beside it, and where fewer are left the last one is taken again: its bits
// do not depend on its company.
#include "kernels.h"
#include "vec.h"

namespace SORA_ISA {
namespace {

constexpr int64_t kRows = kLanes > 8 ? 8 : 4;  // with 2 vectors of each, what registers hold
constexpr int64_t kStretch = 256;              // inputs whose sums are added up apart

// sums += rows @ factors. factors: [count, stride]; row t of a tile begins at rows + t * row_stride.
template <int kVecs>
SORA_INLINE void multiply(const float* rows, int64_t row_stride, const float* factors,
                          int64_t stride, int64_t count, Vec sums[kRows][kVecs]) {
  for (int64_t i = 0; i < count; ++i) {
    Vec line[kVecs];
    for (int v = 0; v < kVecs; ++v) line[v] = load(floats(factors + i * stride + v * kLanes));
    for (int64_t t = 0; t < kRows; ++t)
      for (int v = 0; v < kVecs; ++v) sums[t][v] += line[v] * rows[t * row_stride + i];
  }
}

// A stretch of inputs of the tile's rows, by `down`: added to middle, [rows, stride].
template <int kVecs>
SORA_INLINE void into_middle(const float* rows, const sora::LoraGroup& group, int64_t from,
                             int64_t count, int64_t rank, float* middle, int64_t stride) {
  Vec sums[kRows][kVecs] = {};
  const int64_t width = sora::lora_padded(group.rank);
  multiply<kVecs>(rows, kStretch, group.down + from * width + rank, width, count, sums);
  for (int64_t t = 0; t < kRows; ++t)
    for (int v = 0; v < kVecs; ++v) {
      Float* at = floats(middle + t * stride + v * kLanes);
      store(at, load(at) + sums[t][v]);
    }
}

// Columns of the result of a tile's rows, base and all changes; `left` of them are there.
template <int kVecs, typename T>
SORA_INLINE void out_of_middle(const sora::LoraArgs& a, const sora::LoraGroup* groups,
                               int64_t count, const int64_t* rows, int64_t taken, int64_t column,
                               const float* middle, int64_t stride) {
  Vec sums[kRows][kVecs];
  for (int64_t t = 0; t < kRows; ++t)
    for (int v = 0; v < kVecs; ++v)
      sums[t][v] = load((const T*)a.base + rows[t] * a.base_stride + column + v * kLanes,
                        a.outs - column - v * kLanes);
  const int64_t width = sora::lora_padded(a.outs);
  for (int64_t g = 0; g < count; ++g) {
    multiply<kVecs>(middle, stride, groups[g].up + column, width, groups[g].rank, sums);
    middle += sora::lora_padded(groups[g].rank);
  }
  for (int64_t t = 0; t < taken; ++t)
    for (int v = 0; v < kVecs; ++v)
      store((T*)a.out + rows[t] * a.outs + column + v * kLanes, sums[t][v],
            a.outs - column - v * kLanes);
}

template <typename T>
void lora_rows(const sora::LoraArgs& a, const sora::LoraGroup* groups, int64_t count,
               int64_t begin, int64_t end, float* scratch) {
  int64_t stride = 0;  // of a row's inner values, of all adapters
  for (int64_t g = 0; g < count; ++g) stride += sora::lora_padded(groups[g].rank);
  float* part = scratch;                    // [rows, kStretch]
  float* middle = part + kRows * kStretch;  // [rows, stride]
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t taken = end - row < kRows ? end - row : kRows;
    int64_t rows[kRows];
    for (int64_t t = 0; t < kRows; ++t) rows[t] = row + (t < taken ? t : taken - 1);
    for (int64_t i = 0; i < kRows * stride; ++i) middle[i] = 0.0f;
    for (int64_t from = 0; count && from < a.ins; from += kStretch) {
      const int64_t length = a.ins - from < kStretch ? a.ins - from : kStretch;
      for (int64_t t = 0; t < kRows; ++t) {
        const T* x = (const T*)a.x + rows[t] * a.x_stride + from;
        for (int64_t i = 0; i < length; i += kLanes)
          store(floats(part + t * kStretch + i), load(x + i, length - i));
      }
      float* own = middle;
      for (int64_t g = 0; g < count; ++g) {
        const int64_t width = sora::lora_padded(groups[g].rank);
        int64_t rank = 0;
        for (; rank + 2 * kLanes <= width; rank += 2 * kLanes)
          into_middle<2>(part, groups[g], from, length, rank, own + rank, stride);
        for (; rank < width; rank += kLanes)
          into_middle<1>(part, groups[g], from, length, rank, own + rank, stride);
        own += width;
      }
    }
    float* own = middle;
    for (int64_t g = 0; g < count; ++g) {
      const int64_t width = sora::lora_padded(groups[g].rank);
      for (int64_t t = 0; t < kRows; ++t)
        for (int64_t r = 0; r < width; ++r) own[t * stride + r] *= groups[g].scale;
      own += width;
    }
    int64_t column = 0;
    for (; column + 2 * kLanes <= a.outs; column += 2 * kLanes)
      out_of_middle<2, T>(a, groups, count, rows, taken, column, middle, stride);
    for (; column < a.outs; column += kLanes)
      out_of_middle<1, T>(a, groups, count, rows, taken, column, middle, stride);
  }
}

// out[c, r] = in[r, c] in fp32, zero in the padding of a row of `out`.
template <typename T>
void transposed(const T* in, int64_t rows, int64_t columns, float* out) {
  const int64_t width = sora::lora_padded(rows);
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t r = 0; r < width; r += kLanes) {
      Vec block[kLanes];
      for (int64_t j = 0; j < kLanes; ++j)
        block[j] = r + j < rows ? load(in + (r + j) * columns + c, columns - c) : Vec{};
      transpose(block);
      for (int64_t j = 0; j < kLanes && c + j < columns; ++j)
        store(floats(out + (c + j) * width + r), block[j]);
    }
}

}  // namespace

void lora(const sora::LoraArgs& a, const sora::LoraGroup* groups, int64_t count, int64_t begin,
          int64_t end, float* scratch) {
  switch (a.type) {
    case sora::Type::f32: return lora_rows<Float>(a, groups, count, begin, end, scratch);
    case sora::Type::f16: return lora_rows<Half>(a, groups, count, begin, end, scratch);
    case sora::Type::bf16: return lora_rows<BFloat16>(a, groups, count, begin, end, scratch);
  }
}

void lora_transpose(sora::Type type, const void* in, int64_t rows, int64_t columns, float* out) {
  switch (type) {
    case sora::Type::f32: return transposed((const Float*)in, rows, columns, out);
    case sora::Type::f16: return transposed((const Half*)in, rows, columns, out);
    case sora::Type::bf16: return transposed((const BFloat16*)in, rows, columns, out);
  }
}

}  // namespace SORA_ISA
