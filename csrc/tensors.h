// How the bindings read PyTorch's tensors: their types, dense rows and fp32 data.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/kernels.h"

namespace sora {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kHalf: return Type::f16;
    case at::kBFloat16: return Type::bf16;
    default: TORCH_CHECK(false, "sora: native kernels take fp32, fp16 and bf16, not ",
                         tensor.scalar_type());
  }
}

// Dense in the last dimension, which the kernels read as vectors.
inline Tensor dense_rows(const Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) == 1 ? tensor : tensor.contiguous();
}

// Modulation tables, weights and rotations are read as fp32; they are small beside the tokens.
inline Tensor as_float(const MaybeTensor& tensor) {
  return tensor.has_value() ? dense_rows(tensor->to(at::kFloat)) : Tensor();
}

inline const float* data_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

}  // namespace sora
