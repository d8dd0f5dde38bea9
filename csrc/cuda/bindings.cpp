// The fused ops of torch.ops.sora.native_* for CUDA tensors, by the schemas in csrc/bindings.cpp.
// Here too, what is checked is what memory safety needs.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "../tensors.h"
#include "norm.h"
#include "rope.h"

namespace {

using at::Tensor;
using sora::as_float;
using sora::data_of;
using sora::MaybeTensor;
using sora::type_of;

// The CUDA kernels read and write 16 bytes at a time: the base and every row start at a multiple
// of that. Others are copied.
Tensor aligned_rows(const Tensor& tensor) {
  const int64_t size = tensor.element_size();
  bool fits = tensor.stride(-1) == 1 &&
              reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i)
    fits = fits && (tensor.size(i) == 1 || tensor.stride(i) * size % 16 == 0);
  return fits ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

Tensor aligned_float(const MaybeTensor& tensor) {
  return tensor.has_value() ? aligned_rows(tensor->to(at::kFloat)) : Tensor();
}

sora::cuda::Type cuda_type_of(const Tensor& tensor) {
  switch (type_of(tensor)) {
    case sora::Type::f32: return sora::cuda::Type::f32;
    case sora::Type::f16: return sora::cuda::Type::f16;
    default: return sora::cuda::Type::bf16;
  }
}

// Launches on the tensor's device and its current stream. PyTorch's generic interface gives both,
// so that this file compiles against any build of PyTorch.
template <typename Args>
void launch(cudaError_t (*kernel)(const Args&, cudaStream_t), const Args& args,
            const Tensor& tensor, const char* op) {
  const c10::DeviceGuard guard(tensor.device());
  const c10::Stream stream = c10::impl::VirtualGuardImpl(at::kCUDA).getStream(tensor.device());
  const cudaError_t error = kernel(args, static_cast<cudaStream_t>(stream.native_handle()));
  TORCH_CHECK(error == cudaSuccess, "sora: ", op, " of ", tensor.sizes(), ": ",
              cudaGetErrorString(error));
}

void launch_norm(sora::cuda::NormArgs args, const Tensor& x, const MaybeTensor& gate,
                 const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& index,
                 const std::string& kind, const MaybeTensor& weight, const MaybeTensor& bias,
                 double eps) {
  const Tensor tables[] = {aligned_float(gate), aligned_float(scale), aligned_float(shift)};
  const Tensor weights = aligned_float(weight), biases = aligned_float(bias);
  const Tensor indices = index.has_value() ? index->contiguous() : Tensor();
  sora::cuda::Table* const rows[] = {&args.gate, &args.scale, &args.shift};
  args.rows = 1;
  for (int i = 0; i < 3; ++i) {
    const Tensor& table = tables[i];
    if (!table.defined()) continue;
    TORCH_CHECK(table.size(1) == x.size(1), "sora: modulation of ", table.size(1), " channels");
    TORCH_CHECK(indices.defined() || table.size(0) == 1 || table.size(0) == x.size(0), "sora: ",
                table.size(0), " rows, ", x.size(0), " tokens");
    *rows[i] = {table.const_data_ptr<float>(), table.size(0) == 1 ? 0 : table.stride(0)};
    args.rows = table.size(0);
  }
  args.row_step = indices.defined() || args.rows == 1 ? 0 : 1;
  args.index = indices.defined() ? indices.const_data_ptr() : nullptr;
  args.index_is_wide = indices.defined() && indices.scalar_type() == at::kLong;
  args.weight = data_of(weights);
  args.bias = data_of(biases);
  args.tokens = x.size(0);
  args.channels = x.size(1);
  args.rms = kind == "rms";
  args.eps = static_cast<float>(eps);
  launch(sora::cuda::norm, args, x, "norm");
}

Tensor norm_modulate(const Tensor& x_in, const MaybeTensor& scale, const MaybeTensor& shift,
                          const MaybeTensor& index, std::string kind, const MaybeTensor& weight,
                          const MaybeTensor& bias, double eps) {
  const Tensor x = aligned_rows(x_in);
  Tensor y = at::empty(x.sizes(), x.options());
  sora::cuda::NormArgs args{};
  args.type = args.residual_type = cuda_type_of(x);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.y = y.mutable_data_ptr();
  launch_norm(args, x, {}, scale, shift, index, kind, weight, bias, eps);
  return y;
}

std::tuple<Tensor, Tensor> gate_residual_norm_modulate(
    const Tensor& x_in, const Tensor& residual_in, const MaybeTensor& gate,
    const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& index, std::string kind,
    const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
  const Tensor x = aligned_rows(x_in), residual = aligned_rows(residual_in);
  TORCH_CHECK(x.sizes() == residual.sizes(), "sora: residual of another shape");
  Tensor y = at::empty(x.sizes(), x.options());
  Tensor residual_out = at::empty(residual.sizes(), residual.options());
  sora::cuda::NormArgs args{};
  args.type = cuda_type_of(x);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.y = y.mutable_data_ptr();
  args.residual_type = cuda_type_of(residual);
  args.residual = residual.const_data_ptr();
  args.residual_stride = residual.stride(0);
  args.residual_out = residual_out.mutable_data_ptr();
  launch_norm(args, x, gate, scale, shift, index, kind, weight, bias, eps);
  return {residual_out, y};
}

Tensor norm_rope(const Tensor& x_in, const MaybeTensor& weight, const MaybeTensor& cos,
                      const MaybeTensor& sin, bool across_heads, bool interleaved, double eps) {
  const Tensor x = aligned_rows(x_in);
  Tensor y = at::empty(x.sizes(), x.options());
  const Tensor weights = as_float(weight), cosines = as_float(cos), sines = as_float(sin);
  sora::cuda::RopeArgs args{};
  args.type = cuda_type_of(x);
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.token_stride = x.stride(0);
  args.head_stride = x.stride(1);
  args.tokens = x.size(0);
  args.heads = static_cast<int>(x.size(1));
  args.head_dim = static_cast<int>(x.size(2));
  args.weight = data_of(weights);
  args.cos = data_of(cosines);
  args.sin = data_of(sines);
  if (cosines.defined()) {
    TORCH_CHECK(sines.defined() && cosines.sizes() == sines.sizes() &&
                    cosines.size(0) == x.size(0) && cosines.size(1) * 2 == x.size(2),
                "sora: rotation tables of ", cosines.sizes(), " for ", x.sizes());
    args.cos_stride = cosines.stride(0);
    args.sin_stride = sines.stride(0);
  }
  args.across_heads = across_heads;
  args.interleaved = interleaved;
  args.eps = static_cast<float>(eps);
  launch(sora::cuda::rope, args, x, "norm and rotation");
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(sora, CUDA, m) {
  m.impl("native_norm_modulate", norm_modulate);
  m.impl("native_gate_residual_norm_modulate", gate_residual_norm_modulate);
  m.impl("native_norm_rope", norm_rope);
}
