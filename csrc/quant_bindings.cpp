// The native ops of quant_linear, as bindings.cpp has the others.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
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

// What the kernels are told of a quantised weight.
sora::UnpackArgs weight_args(const Tensor& weight, const Tensor& scale, int64_t format,
                             int64_t ins) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.element_size() == 1 &&
                  ins > 0 && format >= 0 && format <= static_cast<int64_t>(sora::Format::q6_k),
              "sora: a weight of ", weight.sizes(), " for rows of ", ins);
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
  return args;
}

// `count` rows of a quantised weight from `first` on, `ins` values each, as `dtype`.
Tensor unpack(const Tensor& weight, const MaybeTensor& scale_in, int64_t format, int64_t ins,
              int64_t first, int64_t count, at::ScalarType dtype) {
  const Tensor scale = as_float(scale_in);
  TORCH_CHECK(first >= 0 && count >= 0 && first + count <= weight.size(0), "sora: unpack ",
              weight.sizes(), " from ", first, ", ", count, " rows");
  sora::UnpackArgs args = weight_args(weight, scale, format, ins);
  Tensor out = result({count, ins}, weight.options().dtype(dtype));
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

bool quant_linear_serves() { return sora::kernels().quant_linear_scratch(32) > 0; }

// x @ weight.T + bias of bf16, gelu behind it. Rows of x may be strided; `ins` is a multiple of 32.
Tensor quant_linear(const Tensor& x_in, const Tensor& weight, const MaybeTensor& scale_in,
                    const MaybeTensor& bias_in, int64_t format, int64_t gelu) {
  const Tensor x = dense_rows(x_in), scale = as_float(scale_in), bias = as_float(bias_in);
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kBFloat16 && x.size(1) % 32 == 0 &&
                  (!bias.defined() || bias.numel() == weight.size(0)) && quant_linear_serves(),
              "sora: quant_linear ", x.sizes(), " by ", weight.sizes());
  sora::QuantLinearArgs args;
  args.weight = weight_args(weight, scale, format, x.size(1));
  args.outs = weight.size(0);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.rows = x.size(0);
  args.bias = data_of(bias);
  args.gelu = gelu;
  Tensor out = result({args.rows, args.outs}, x.options());
  args.out = out.mutable_data_ptr();
  // A panel of columns is decoded once for all rows; for more threads than panels, rows are halved.
  constexpr int64_t kPanel = 64, kLeastRows = 256;
  const int64_t panels = (args.outs + kPanel - 1) / kPanel, threads = at::get_num_threads();
  const int64_t most = std::max<int64_t>(1, args.rows / kLeastRows);
  const int64_t parts = std::clamp<int64_t>(4 * threads / panels, 1, most);
  const int64_t each = (args.rows + parts - 1) / parts;
  const auto& kernels = sora::kernels();
  const int64_t scratch = kernels.quant_linear_scratch(x.size(1));
  at::parallel_for(0, panels * parts, 1, [&](int64_t begin, int64_t end) {
    // Kept by each thread: fresh memory would cost its pages in every call.
    static thread_local std::vector<char> memory;
    if (memory.size() < static_cast<std::size_t>(scratch + 64)) memory.resize(scratch + 64);
    const auto at = reinterpret_cast<std::uintptr_t>(memory.data());
    void* aligned = memory.data() + ((at + 63) / 64 * 64 - at);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % parts * each;
      kernels.quant_linear(args, i / parts, first, std::min(first + each, args.rows), aligned);
    }
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
  m.def("native_quant_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int format, "
        "int gelu) -> Tensor");
  m.def("native_quant_linear_serves() -> bool", quant_linear_serves);
  m.def("native_quantise_rows(Tensor x) -> (Tensor, Tensor)");
  m.def("native_finish_rows(Tensor sums, Tensor scale, Tensor? bias, int gelu, ScalarType dtype) "
        "-> Tensor");
  m.def("native_gelu_rows(Tensor(a!) out, int gelu) -> ()");
}

TORCH_LIBRARY_IMPL(sora, CPU, m) {
  m.impl("native_unpack", unpack);
  m.impl("native_quant_linear", quant_linear);
  m.impl("native_quantise_rows", quantise_rows);
  m.impl("native_finish_rows", finish_rows);
  m.impl("native_gelu_rows", gelu_rows);
}
