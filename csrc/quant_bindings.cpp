// The native ops of quant_linear, as bindings.cpp has the others.
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
using sora::dense_rows;
using sora::grain;
using sora::MaybeTensor;
using sora::result;
using sora::type_of;

// `count` rows of a quantised weight from `first` on, `ins` values each, as `dtype`.
Tensor unpack(const Tensor& weight, const MaybeTensor& scale_in, int64_t format, int64_t ins,
              int64_t first, int64_t count, at::ScalarType dtype) {
  const Tensor scale = as_float(scale_in);
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.element_size() == 1 &&
                  ins > 0 && format >= 0 && format <= static_cast<int64_t>(sora::Format::q6_k) &&
                  first >= 0 && count >= 0 && first + count <= weight.size(0),
              "sora: unpack ", weight.sizes(), " from ", first, ", ", count, " rows");
  Tensor out = result({count, ins}, weight.options().dtype(dtype));
  static constexpr int64_t kValues[] = {1, 1, 1, 32, 32, 32, 32, 32, 256, 256, 256, 256, 256};
  static constexpr int64_t kBytes[] = {1, 1, 1, 18, 20, 22, 24, 34, 84, 110, 144, 176, 210};
  sora::UnpackArgs args;
  args.format = static_cast<sora::Format>(format);
  args.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  args.row_bytes = weight.size(1);
  args.ins = ins;
  TORCH_CHECK(args.row_bytes % kBytes[format] == 0 &&
                  args.row_bytes / kBytes[format] * kValues[format] == args.ins,
              "sora: rows of ", args.row_bytes, " bytes for ", args.ins, " values");
  if (scale.defined()) {
    TORCH_CHECK(scale.dim() == 2 && scale.is_contiguous() && scale.size(1) > 0 &&
                    args.ins % scale.size(1) == 0 &&
                    (scale.size(0) == weight.size(0) || scale.numel() == 1),
                "sora: scales of ", scale.sizes(), " for ", weight.sizes());
    args.scale = data_of(scale);
    args.scale_stride = scale.numel() == 1 ? 0 : scale.size(1);
    args.stretches = scale.size(1);
  }
  args.first = first;
  args.type = type_of(out);
  args.out = out.mutable_data_ptr();
  const auto& kernels = sora::kernels();
  at::parallel_for(first, first + count, grain(ins), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(ins);
    kernels.unpack(args, begin, end, scratch.data());
  });
  return out;
}

// Rows as int8 with 128 added, and the scale of each: its largest value is 127.
std::tuple<Tensor, Tensor> quantise_rows(const Tensor& x_in) {
  const Tensor x = dense_rows(x_in);
  TORCH_CHECK(x.dim() == 2, "sora: quantise ", x.sizes());
  Tensor out = result(x.sizes(), x.options().dtype(at::kByte));
  Tensor scale = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  sora::QuantiseArgs args;
  args.type = type_of(x);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.ins = x.size(1);
  args.out = out.mutable_data_ptr<uint8_t>();
  args.scale = scale.mutable_data_ptr<float>();
  const auto& kernels = sora::kernels();
  at::parallel_for(0, x.size(0), grain(args.ins), [&](int64_t begin, int64_t end) {
    kernels.quantise(args, begin, end);
  });
  return {out, scale};
}

void run_finish(const sora::FinishArgs& args, int64_t rows) {
  const auto& kernels = sora::kernels();
  at::parallel_for(0, rows, grain(args.outs), [&](int64_t begin, int64_t end) {
    kernels.finish(args, begin, end);
  });
}

// Sums of int8 products, times each row's scale, plus bias, gelu (1 by erf, 2 by tanh).
Tensor finish_rows(const Tensor& sums, const Tensor& scale, const MaybeTensor& bias_in,
                   int64_t gelu, at::ScalarType dtype) {
  const Tensor bias = as_float(bias_in);
  TORCH_CHECK(sums.dim() == 2 && sums.is_contiguous() && sums.scalar_type() == at::kFloat &&
                  scale.is_contiguous() && scale.scalar_type() == at::kFloat &&
                  scale.numel() == sums.size(0) &&
                  (!bias.defined() || bias.numel() == sums.size(1)),
              "sora: finish ", sums.sizes(), " by ", scale.sizes());
  Tensor out = result(sums.sizes(), sums.options().dtype(dtype));
  sora::FinishArgs args;
  args.type = type_of(out);
  args.sums = sums.const_data_ptr<float>();
  args.scale = scale.const_data_ptr<float>();
  args.bias = data_of(bias);
  args.gelu = gelu;
  args.out = out.mutable_data_ptr();
  args.out_stride = args.outs = sums.size(1);
  run_finish(args, sums.size(0));
  return out;
}

// In place; a value comes out the same wherever in the rows it lies.
void gelu_rows(Tensor out, int64_t gelu) {
  TORCH_CHECK(out.dim() == 2 && (out.stride(1) == 1 || out.size(1) == 1), "sora: gelu of strides ",
              out.strides());
  sora::FinishArgs args;
  args.type = type_of(out);
  args.gelu = gelu;
  args.out = out.mutable_data_ptr();
  args.out_stride = out.stride(0);
  args.outs = out.size(1);
  run_finish(args, out.size(0));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sora, m) {
  m.def("native_unpack(Tensor weight, Tensor? scale, int format, int ins, int first, "
        "int count, ScalarType dtype) -> Tensor");
  m.def("native_quantise_rows(Tensor x) -> (Tensor, Tensor)");
  m.def("native_finish_rows(Tensor sums, Tensor scale, Tensor? bias, int gelu, ScalarType dtype) "
        "-> Tensor");
  m.def("native_gelu_rows(Tensor(a!) out, int gelu) -> ()");
}

TORCH_LIBRARY_IMPL(sora, CPU, m) {
  m.impl("native_unpack", unpack);
  m.impl("native_quantise_rows", quantise_rows);
  m.impl("native_finish_rows", finish_rows);
  m.impl("native_gelu_rows", gelu_rows);
}
