// lora_linear: what adapters add to the rows of a linear layer's result.
//
// Rows go through by fours, so that a factor that comes out of a cache serves four of them. A row
// is summed in one order whatever rows are beside it, and where fewer are left the last one is
// taken again: its bits do not depend on its company.
#include "kernels.h"
#include "vec.h"

namespace SORA_ISA {
namespace {

constexpr int64_t kRows = 4;

template <typename T>
void lora_rows(const sora::LoraArgs& a, const sora::LoraGroup* groups, int64_t count,
               int64_t begin, int64_t end, float* scratch) {
  const int64_t padded = round_up(a.ins, kLanes);
  float* rows = scratch;                // [4, in], zero behind it
  float* middle = rows + kRows * padded;  // [4, rank] of each group in turn
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t taken = end - row < kRows ? end - row : kRows;
    for (int64_t t = 0; t < kRows; ++t) {
      const T* x = (const T*)a.x + (row + (t < taken ? t : taken - 1)) * a.x_stride;
      for (int64_t i = 0; i < a.ins; i += kLanes)
        store(floats(rows + t * padded + i), load(x + i, a.ins - i));
    }
    float* h = middle;
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t r = 0; r < groups[g].rank; ++r, h += kRows) {
        const float* down = groups[g].down + r * a.ins;
        Vec sums[kRows] = {};
        for (int64_t i = 0; i < a.ins; i += kLanes) {
          const Vec factor = load(floats(down + i), a.ins - i);
          for (int64_t t = 0; t < kRows; ++t)
            sums[t] += factor * load(floats(rows + t * padded + i));
        }
        for (int64_t t = 0; t < kRows; ++t) h[t] = groups[g].scale * sum(sums[t]);
      }
    }
    for (int64_t i = 0; i < a.outs; i += kLanes) {
      const int64_t left = a.outs - i;
      Vec values[kRows];
      for (int64_t t = 0; t < kRows; ++t) {
        const int64_t own = row + (t < taken ? t : taken - 1);
        values[t] = load((const T*)a.base + own * a.base_stride + i, left);
      }
      const float* of_row = middle;
      for (int64_t g = 0; g < count; ++g) {
        for (int64_t r = 0; r < groups[g].rank; ++r, of_row += kRows) {
          const Vec factor = load(floats(groups[g].up + r * a.outs + i), left);
          for (int64_t t = 0; t < kRows; ++t) values[t] += factor * of_row[t];
        }
      }
      for (int64_t t = 0; t < taken; ++t)
        store((T*)a.out + (row + t) * a.outs + i, values[t], left);
    }
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

}  // namespace SORA_ISA
