// quant_linear of bf16: the weight is decoded by panels of 64 of its rows, and multiplied while they
// are in the second cache (AVX512-BF16).
//
// A panel is laid out as VDPBF16PS takes it: for each pair of inputs 64 pairs of weights. All rows of
// x go through it, six at a time: 24 accumulators, four loads of the panel for 24 products. Longer
// panels are taken a stretch of inputs at a time, whose sums over 96 rows stay in the first caches.
// A row's sums are taken over its pairs in one order, whatever rows are beside it. Denormals count as
// zero.
#include "quant_pairs.h"

namespace SORA_ISA {
namespace {

constexpr int64_t kPanel = 64;
constexpr int64_t kStretch = 1024;  // inputs at a time, 128 KiB of a panel: of longer weights
constexpr int64_t kBlock = 96;      // rows whose sums wait for the next stretch
constexpr int64_t kWide = 256;      // inputs that are decoded at a time

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
// values: of 16 rows.
void decode_panel(const sora::QuantLinearArgs& a, int64_t first, int64_t from, int64_t to,
                  uint16_t* values, uint32_t* panel) {
  const sora::UnpackArgs& w = a.weight;
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
        uint32_t* pairs = panel + ((begin + i) / 2 * kVectors + j) * kLanes;
        for (int r = 0; r < kLanes; ++r) memcpy(pairs + r * kPanel, &block[r], 64);
      }
    }
}

// Bytes of the weight that will be decoded next, fetched a few lines at a time while others are
// multiplied: its rows lie too far apart for the processor to see them coming.
struct Ahead {
  const uint8_t* at = nullptr;
  int64_t row_bytes = 0, lines = 1, left = 0, done = 0;

  SORA_INLINE void plan(const sora::QuantLinearArgs& a, int64_t first, int64_t from, int64_t to) {
    if (first >= a.outs) return;
    // Bytes are in proportion to values, whichever the format.
    row_bytes = a.weight.row_bytes;
    const int64_t begin = row_bytes * from / a.weight.ins, end = row_bytes * to / a.weight.ins;
    at = a.weight.weight + first * row_bytes + begin;
    lines = (end - begin) / 64 + 1;
    left = lines * (a.outs - first < kPanel ? a.outs - first : kPanel);
  }

  SORA_INLINE void fetch(int64_t count) {
    for (; count > 0 && left > 0; --count, --left, ++done)
      __builtin_prefetch(at + done / lines * row_bytes + done % lines * 64, 0, 2);
  }
};

#endif

}  // namespace

#if defined(__AVX512BF16__)

int64_t quant_linear_scratch(int64_t ins) {
  return 4 * (kPanel * ins / 2 + kLanes * kWide / 2 + kPanel + kBlock * kPanel);
}

void quant_linear(const sora::QuantLinearArgs& a, int64_t index, int64_t begin, int64_t end,
                  void* scratch) {
  const int64_t ins = a.weight.ins, stretch = stretch_of(ins), first = index * kPanel;
  uint32_t* panel = (uint32_t*)scratch;
  uint16_t* values = (uint16_t*)(panel + kPanel * ins / 2);
  float* bias = (float*)(values + kLanes * kWide);
  float* sums = bias + kPanel;
  Ending ending = {a.bias ? bias : nullptr, a.gelu, a.outs - first, nullptr, a.outs};
  for (int64_t i = 0; a.bias && i < kPanel; ++i) bias[i] = i < ending.columns ? a.bias[first + i] : 0;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t last = block + kBlock < end ? block + kBlock : end;
    for (int64_t from = 0; from < ins; from += stretch) {
      const int64_t to = from + stretch < ins ? from + stretch : ins;
      if (block == begin) decode_panel(a, first, from, to, values, panel);
      Ahead ahead;
      if (block == begin && to < ins)
        ahead.plan(a, first, to, to + stretch < ins ? to + stretch : ins);
      else if (last == end && to == ins)
        ahead.plan(a, first + kPanel, 0, stretch < ins ? stretch : ins);
      const int64_t each = ahead.left / ((last - block + kRows - 1) / kRows) + 1;
      for (int64_t row = block; row < last; row += kRows) {
        ahead.fetch(each);
        const uint16_t* x = (const uint16_t*)a.x + row * a.x_stride + from;
        ending.out = (uint16_t*)a.out + row * a.outs + first;
        const auto run = [&]<int kCount>() {
          rows_of_panel<kCount>(x, a.x_stride, panel + kPanel * from / 2, (to - from) / 2,
                                sums + (row - block) * kPanel, from == 0,
                                to == ins ? &ending : nullptr);
        };
        switch (last - row) {
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
}

#else

int64_t quant_linear_scratch(int64_t) { return 0; }

void quant_linear(const sora::QuantLinearArgs&, int64_t, int64_t, int64_t, void*) {}

#endif

}  // namespace SORA_ISA
