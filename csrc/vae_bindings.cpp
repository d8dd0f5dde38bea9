// The native ops of video autoencoders, as bindings.cpp has the others.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "tensors.h"

namespace {

using at::Tensor;
using sora::as_float;
using sora::data_of;
using sora::grain;
using sora::MaybeTensor;
using sora::result;
using sora::type_of;

// [batch, frames, pixels, channels], behind the frames of `past`, with the first of both `before`
// times before itself and the last `after` times behind; and the last `keep` frames as a cache.
std::tuple<Tensor, Tensor> causal_norm_silu(const Tensor& x_in, const Tensor& past_in,
                                            const MaybeTensor& weight_in,
                                            const MaybeTensor& bias_in, double eps, int64_t before,
                                            int64_t after, int64_t keep) {
  const Tensor x = x_in.contiguous(), past = past_in.contiguous();
  const Tensor weight = as_float(weight_in), bias = as_float(bias_in);
  const auto fits = [&](const Tensor& row) {
    return !row.defined() || (row.dim() == 1 && row.numel() == x.size(3));
  };
  TORCH_CHECK(x.dim() == 4 && past.dim() == 4 && x.scalar_type() == past.scalar_type() &&
                  x.size(0) == past.size(0) && x.size(2) == past.size(2) &&
                  x.size(3) == past.size(3) && fits(weight) && fits(bias),
              "sora: frames of ", x.sizes(), " behind ", past.sizes());
  const int64_t frames = past.size(1) + x.size(1), total = before + frames + after;
  TORCH_CHECK(before >= 0 && after >= 0 && keep >= 0 && keep <= total && (frames > 0 || total == 0),
              "sora: ", frames, " frames, ", before, " before, ", after, " behind, ", keep, " kept");
  Tensor joined = result({x.size(0), total, x.size(2), x.size(3)}, x.options());
  Tensor cache = at::empty({x.size(0), keep, x.size(2), x.size(3)}, x.options());
  sora::CausalArgs args;
  args.type = type_of(x);
  args.x = x.const_data_ptr();
  args.past = past.const_data_ptr();
  args.joined = joined.mutable_data_ptr();
  args.cache = cache.mutable_data_ptr();
  args.weight = data_of(weight);
  args.bias = data_of(bias);
  args.frames = x.size(1);
  args.kept = past.size(1);
  args.pixels = x.size(2);
  args.channels = x.size(3);
  args.before = before;
  args.after = after;
  args.keep = keep;
  args.eps = static_cast<float>(eps);
  const auto& kernels = sora::kernels();
  const int64_t rows = joined.size(0) * total * args.pixels;
  at::parallel_for(0, rows, grain(args.channels), [&](int64_t begin, int64_t end) {
    kernels.causal(args, begin, end);
  });
  return {joined, cache};
}

// [pictures, pixels, channels], each picture's groups of channels by their own moments.
Tensor group_norm(const Tensor& x_in, int64_t groups, const MaybeTensor& weight_in,
                  const MaybeTensor& bias_in, double eps, bool silu) {
  const Tensor x = x_in.contiguous();
  const Tensor weight = as_float(weight_in), bias = as_float(bias_in);
  TORCH_CHECK(x.dim() == 3 && groups > 0 && x.size(2) > 0 && x.size(2) % groups == 0 &&
                  (!weight.defined() || weight.numel() == x.size(2)) &&
                  (!bias.defined() || bias.numel() == x.size(2)),
              "sora: ", groups, " groups of ", x.sizes());
  Tensor y = result(x.sizes(), x.options());
  sora::GroupNormArgs args;
  args.type = type_of(x);
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.weight = data_of(weight);
  args.bias = data_of(bias);
  args.pixels = x.size(1);
  args.channels = x.size(2);
  args.groups = groups;
  args.shares = (args.pixels + sora::kPixelShare - 1) / sora::kPixelShare;
  args.eps = static_cast<float>(eps);
  args.silu = silu;
  const int64_t shares = x.size(0) * args.shares, pixels = x.size(0) * args.pixels;
  std::vector<double> parts(shares * groups * 2);
  args.parts = parts.data();
  const auto& kernels = sora::kernels();
  const auto run = [&](int64_t count, int64_t least, auto pass) {
    at::parallel_for(0, count, least, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(sora::group_norm_scratch(args.channels));
      pass(args, begin, end, scratch.data());
    });
  };
  run(shares, grain(args.channels * sora::kPixelShare), kernels.group_moments);
  run(pixels, grain(args.channels), kernels.group_norm);
  return y;
}

// `picture [frames, height, width, channels]`, and `tiles [frames, rows, across, 16, channels]`.
sora::WinogradArgs tiles_of(const Tensor& picture, const Tensor& tiles, int64_t first) {
  const auto dense = [](const Tensor& t, int64_t axes) {
    return t.dim() == axes && t.scalar_type() == at::kFloat && t.is_contiguous();
  };
  TORCH_CHECK(dense(picture, 4) && dense(tiles, 5) && tiles.size(0) == picture.size(0) &&
                  tiles.size(2) == (picture.size(2) + 1) / 2 && tiles.size(3) == 16 &&
                  tiles.size(4) == picture.size(3) && first >= 0 &&
                  2 * (first + tiles.size(1)) <= picture.size(1) + 1,
              "sora: tiles ", tiles.sizes(), " from row ", first, " on of ", picture.sizes());
  sora::WinogradArgs args;
  args.height = picture.size(1);
  args.width = picture.size(2);
  args.channels = picture.size(3);
  args.first = first;
  args.rows = tiles.size(1);
  args.across = tiles.size(2);
  return args;
}

template <typename Pass>
void each_row(const Tensor& tiles, const sora::WinogradArgs& args, Pass pass) {
  const int64_t width = 16 * args.across * args.channels;
  at::parallel_for(0, tiles.size(0) * args.rows, grain(width),
                   [&](int64_t begin, int64_t end) { pass(args, begin, end); });
}

void winograd_split(const Tensor& x, Tensor tiles, int64_t first) {
  sora::WinogradArgs args = tiles_of(x, tiles, first);
  args.x = x.const_data_ptr<float>();
  args.tiles = tiles.mutable_data_ptr<float>();
  each_row(tiles, args, sora::kernels().winograd_split);
}

void winograd_join(const Tensor& products, const MaybeTensor& bias, const MaybeTensor& beside,
                   Tensor y, int64_t first) {
  sora::WinogradArgs args = tiles_of(y, products, first);
  const auto dense = [](const Tensor& t) {
    return t.scalar_type() == at::kFloat && t.is_contiguous();
  };
  TORCH_CHECK((!bias || (dense(*bias) && bias->numel() == args.channels)) &&
                  (!beside || (dense(*beside) && beside->sizes() == y.sizes())),
              "sora: what is added to ", y.sizes());
  args.tiles = const_cast<float*>(products.const_data_ptr<float>());
  args.y = y.mutable_data_ptr<float>();
  if (bias) args.bias = bias->const_data_ptr<float>();
  if (beside) args.beside = beside->const_data_ptr<float>();
  each_row(products, args, sora::kernels().winograd_join);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sora, m) {
  m.def("native_causal_norm_silu(Tensor x, Tensor past, Tensor? weight, Tensor? bias, float eps, "
        "int before, int after, int keep) -> (Tensor, Tensor)");
  m.def("native_group_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, "
        "bool silu) -> Tensor");
  m.def("native_winograd_split(Tensor x, Tensor(a!) tiles, int first) -> ()");
  m.def("native_winograd_join(Tensor products, Tensor? bias, Tensor? beside, Tensor(a!) y, "
        "int first) -> ()");
}

TORCH_LIBRARY_IMPL(sora, CPU, m) {
  m.impl("native_causal_norm_silu", causal_norm_silu);
  m.impl("native_group_norm", group_norm);
  m.impl("native_winograd_split", winograd_split);
  m.impl("native_winograd_join", winograd_join);
}
