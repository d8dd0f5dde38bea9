// How the bindings read PyTorch's tensors: their types, dense rows and fp32 data.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
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

// An output, on huge pages where the system gives them: first touching a 50 MB result page by page
// takes longer than computing it.
inline Tensor result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor result = at::empty(sizes, options);
#ifdef __linux__
  constexpr std::uintptr_t kHuge = 2 << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(result.mutable_data_ptr());
  const std::uintptr_t end = (begin + result.nbytes()) / kHuge * kHuge;
  const std::uintptr_t start = (begin + kHuge - 1) / kHuge * kHuge;
  if (end >= start + 4 * kHuge) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
  return result;
}

// About 32k elements a task: less than that and starting a thread costs more than it saves.
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)); }

}  // namespace sora
