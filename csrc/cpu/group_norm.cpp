// group_norm: of pictures with their channels last, with SiLU behind it. Two passes: moments by
// shares of a picture's pixels, and the result.
#include "kernels.h"
#include "silu.h"

namespace SORA_ISA {
namespace {

// Sums are of what differs from the share's first pixel, so that a large mean takes no digits from
// the variance.
template <typename T>
void moments_of(const sora::GroupNormArgs& a, int64_t share, float* scratch) {
  const int64_t n = a.channels, wide = round_up(n, kLanes);
  const int64_t picture = share / a.shares, first = share % a.shares * sora::kPixelShare;
  const int64_t left = a.pixels - first;
  const int64_t pixels = left < sora::kPixelShare ? left : sora::kPixelShare;
  const T* x = (const T*)a.x + (picture * a.pixels + first) * n;
  float *origin = scratch, *sums = origin + wide, *squares = sums + wide;
  for (int64_t i = 0; i < n; i += kLanes) {
    store(floats(origin + i), load(x + i, n - i));
    store(floats(sums + i), Vec{});
    store(floats(squares + i), Vec{});
  }
  for (int64_t pixel = 1; pixel < pixels; ++pixel) {
    const T* row = x + pixel * n;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec off = load(row + i, n - i) - load(floats(origin + i));
      store(floats(sums + i), load(floats(sums + i)) + off);
      store(floats(squares + i), load(floats(squares + i)) + off * off);
    }
  }
  // Of equal numbers of pixels, so a group's mean is that of its channels' means.
  const int64_t inside = n / a.groups;
  for (int64_t group = 0; group < a.groups; ++group) {
    const float* start = scratch + group * inside;
    double mean = 0, spread = 0;
    for (int64_t i = 0; i < inside; ++i) mean += start[i] + (double)start[wide + i] / pixels;
    mean /= inside;
    for (int64_t i = 0; i < inside; ++i) {
      const double off = (double)start[wide + i] / pixels, from = start[i] + off - mean;
      spread += start[2 * wide + i] + pixels * (from * from - off * off);
    }
    double* to = a.parts + (share * a.groups + group) * 2;
    to[0] = mean;
    to[1] = spread;
  }
}

// The whole picture's mean and what its channels are divided by, as a shift and a factor for each
// channel: [2, wide].
void lay_out(const sora::GroupNormArgs& a, int64_t picture, float* mean, float* gain) {
  const int64_t inside = a.channels / a.groups;
  const double* parts = a.parts + picture * a.shares * a.groups * 2;
  for (int64_t group = 0; group < a.groups; ++group) {
    const auto part = [&](int64_t share) { return parts + (share * a.groups + group) * 2; };
    const auto pixels = [&](int64_t share) {
      const int64_t left = a.pixels - share * sora::kPixelShare;
      return (double)(left < sora::kPixelShare ? left : sora::kPixelShare);
    };
    double middle = 0, spread = 0;
    for (int64_t share = 0; share < a.shares; ++share) middle += part(share)[0] * pixels(share);
    middle /= a.pixels;
    for (int64_t share = 0; share < a.shares; ++share) {
      const double off = part(share)[0] - middle;
      spread += part(share)[1] + off * off * pixels(share) * inside;
    }
    const double variance = spread / ((double)a.pixels * inside);
    const float inverse = (float)(1.0 / __builtin_sqrt((variance > 0 ? variance : 0) + a.eps));
    for (int64_t i = group * inside; i < (group + 1) * inside; ++i) {
      mean[i] = (float)middle;
      gain[i] = a.weight ? inverse * a.weight[i] : inverse;
    }
  }
}

template <typename T>
void group_rows(const sora::GroupNormArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = a.channels, wide = round_up(n, kLanes);
  float *mean = scratch, *gain = mean + wide, *bias = gain + wide;
  for (int64_t i = 0; i < wide; i += kLanes) store(floats(bias + i), Vec{});
  if (a.bias) memcpy(bias, a.bias, n * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    if (row == begin || row % a.pixels == 0) lay_out(a, row / a.pixels, mean, gain);
    const T* x = (const T*)a.x + row * n;
    T* y = (T*)a.y + row * n;
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t left = n - i;
      const Vec centred = load(x + i, left) - load(floats(mean + i));
      const Vec value = centred * load(floats(gain + i)) + load(floats(bias + i));
      if (a.silu)
        store_silu(y + i, value, left);
      else
        store(y + i, value, left);
    }
  }
}

}  // namespace

void group_moments(const sora::GroupNormArgs& a, int64_t begin, int64_t end, float* scratch) {
  for (int64_t share = begin; share < end; ++share) {
    switch (a.type) {
      case sora::Type::f32: moments_of<Float>(a, share, scratch); break;
      case sora::Type::f16: moments_of<Half>(a, share, scratch); break;
      case sora::Type::bf16: moments_of<BFloat16>(a, share, scratch); break;
    }
  }
}

void group_norm(const sora::GroupNormArgs& a, int64_t begin, int64_t end, float* scratch) {
  switch (a.type) {
    case sora::Type::f32: return group_rows<Float>(a, begin, end, scratch);
    case sora::Type::f16: return group_rows<Half>(a, begin, end, scratch);
    case sora::Type::bf16: return group_rows<BFloat16>(a, begin, end, scratch);
  }
}

}  // namespace SORA_ISA
