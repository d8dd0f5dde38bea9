// quant_linear of bf16: the weight is decoded by panels of 64 of its rows, and multiplied while they
// are in the second cache (AVX512-BF16).
//
// A panel is laid out as VDPBF16PS takes it: for each pair of inputs 64 pairs of weights. All rows of
// x go through it, six at a time: 24 accumulators, four loads of the panel for 24 products. A row's
// sums are taken over its pairs in one order, whatever rows are beside it. Denormals count as zero.
#include "quant_pairs.h"

namespace SORA_ISA {
namespace {

constexpr int64_t kPanel = 64;
constexpr int64_t kStretch = 1024;  // inputs of a panel at a time, 128 KiB: of longer weights

// Of equal parts, in multiples of 256, which no block of any format crosses.
SORA_INLINE int64_t stretch_of(int64_t ins) {
  if (ins <= 2 * kStretch) return ins;
  const int64_t parts = (ins + kStretch - 1) / kStretch;
  return round_up((ins + parts - 1) / parts, 256);
}

#if defined(__AVX512BF16__)

constexpr int kRows = 6, kVectors = 4;

// What the last stretch of inputs does with its sums.
struct Ending {
  const float* bias;  // [64], or null
  int64_t gelu, columns;
  uint16_t* out;
  int64_t stride;
};

// Rows of x through a panel. sums: [rows, 64], of stretches that are not the only one.
template <int kCount>
SORA_INLINE void rows_of_panel(const uint16_t* x, int64_t x_stride, const uint32_t* panel,
                               int64_t pairs, float* sums, bool is_first, const Ending* end) {
  __m512 acc[kCount][kVectors];
  for (int r = 0; r < kCount; ++r)
    for (int j = 0; j < kVectors; ++j)
      acc[r][j] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * kPanel + 16 * j);
  const uint16_t* next = x + kCount * x_stride;
  for (int64_t begin = 0; begin < pairs; begin += 16) {  // a line of each row of x
    for (int r = 0; r < kCount; ++r) __builtin_prefetch(next + r * x_stride + 2 * begin);
    for (int64_t i = begin; i < begin + 16; ++i) {
      __m512bh column[kVectors];
      for (int j = 0; j < kVectors; ++j)
        column[j] = (__m512bh)_mm512_load_si512(panel + (i * kVectors + j) * 16);
      for (int r = 0; r < kCount; ++r) {
        int32_t pair;
        memcpy(&pair, x + r * x_stride + 2 * i, 4);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
        for (int j = 0; j < kVectors; ++j)
          acc[r][j] = _mm512_dpbf16_ps(acc[r][j], column[j], value);
      }
    }
  }
  for (int r = 0; r < kCount; ++r)
    for (int j = 0; j < kVectors; ++j) {
      if (!end) {
        _mm512_storeu_ps(sums + r * kPanel + 16 * j, acc[r][j]);
        continue;
      }
      Vec v = (Vec)acc[r][j];
      if (end->bias) v += load(floats(end->bias + 16 * j));
      if (end->gelu == 1) v = gelu_erf(v);
      if (end->gelu == 2) v = gelu_tanh(v);
      const int64_t left = end->columns - 16 * j;
      const __mmask16 mask = left >= 16 ? (__mmask16)0xffff : left > 0 ? first_lanes(left) : 0;
      _mm256_mask_storeu_epi16(end->out + r * end->stride + 16 * j, mask,
                               (__m256i)_mm512_cvtneps_pbh((__m512)v));
    }
}

// Inputs `from` to `to` of 64 rows of the weight from `first` on; rows past the last are zero.
void decode_panel(const sora::QuantLinearArgs& a, int64_t first, int64_t from, int64_t to,
                  uint16_t* values, uint32_t* panel) {
  const sora::UnpackArgs& w = a.weight;
  constexpr int64_t kWide = 256;
  for (int j = 0; j < kVectors; ++j)
    for (int64_t begin = from; begin < to; begin += kWide) {
      const int64_t end = begin + kWide < to ? begin + kWide : to;
      for (int r = 0; r < kLanes; ++r) {
        const int64_t row = first + j * kLanes + r;
        if (row < a.outs)
          decode_pairs(w, w.weight + row * w.row_bytes,
                       w.scale ? w.scale + row * w.scale_stride : nullptr, begin, end,
                       values + r * kWide);
        else
          memset(values + r * kWide, 0, kWide * sizeof(uint16_t));
      }
      for (int64_t i = 0; i < end - begin; i += 2 * kLanes) {
        Vec block[kLanes];
        for (int r = 0; r < kLanes; ++r) memcpy(&block[r], values + r * kWide + i, 64);
        transpose(block);
        uint32_t* to_pairs = panel + ((begin - from + i) / 2 * kVectors + j) * kLanes;
        for (int r = 0; r < kLanes; ++r) memcpy(to_pairs + r * kPanel, &block[r], 64);
      }
    }
}

#endif

}  // namespace

#if defined(__AVX512BF16__)

int64_t quant_linear_scratch(int64_t ins, int64_t rows) {
  const int64_t stretch = stretch_of(ins), sums = stretch < ins ? rows * kPanel : 0;
  return 4 * (kPanel * stretch / 2 + kLanes * 256 / 2 + kPanel + sums);
}

void quant_linear(const sora::QuantLinearArgs& a, int64_t index, int64_t begin, int64_t end,
                  void* scratch) {
  const int64_t ins = a.weight.ins, stretch = stretch_of(ins), first = index * kPanel;
  uint32_t* panel = (uint32_t*)scratch;
  uint16_t* values = (uint16_t*)(panel + kPanel * stretch / 2);  // of 16 rows
  float* bias = (float*)(values + kLanes * 256);
  float* sums = bias + kPanel;
  Ending ending = {a.bias ? bias : nullptr, a.gelu, a.outs - first, nullptr, a.outs};
  for (int64_t i = 0; a.bias && i < kPanel; ++i) bias[i] = i < ending.columns ? a.bias[first + i] : 0;
  for (int64_t from = 0; from < ins; from += stretch) {
    const int64_t to = from + stretch < ins ? from + stretch : ins;
    decode_panel(a, first, from, to, values, panel);
    for (int64_t row = begin; row < end; row += kRows) {
      const uint16_t* x = (const uint16_t*)a.x + row * a.x_stride + from;
      float* own = stretch < ins ? sums + (row - begin) * kPanel : nullptr;
      ending.out = (uint16_t*)a.out + row * a.outs + first;
      const Ending* last = to == ins ? &ending : nullptr;
      const auto run = [&]<int kCount>() {
        rows_of_panel<kCount>(x, a.x_stride, panel, (to - from) / 2, own, from == 0, last);
      };
      switch (end - row) {
        case 1: run.template operator()<1>(); break;
        case 2: run.template operator()<2>(); break;
        case 3: run.template operator()<3>(); break;
        case 4: run.template operator()<4>(); break;
        case 5: run.template operator()<5>(); break;
        default: run.template operator()<kRows>();
      }
    }
  }
}

#else

int64_t quant_linear_scratch(int64_t, int64_t) { return 0; }

void quant_linear(const sora::QuantLinearArgs&, int64_t, int64_t, int64_t, void*) {}

#endif

}  // namespace SORA_ISA
