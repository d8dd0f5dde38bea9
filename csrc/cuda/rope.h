// What the CUDA qk_norm_rope takes. Every head must start at a multiple of 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "norm.h"

namespace sora::cuda {

struct RopeArgs {
  Type type;
  const void* x;  // [tokens, heads, head_dim], head_dim dense and a multiple of 16
  void* y;        // dense
  int64_t token_stride, head_stride;
  int64_t tokens;
  int heads, head_dim;
  const float* weight;  // [heads * head_dim] across heads, else [head_dim]; null is 1
  const float *cos, *sin;  // [tokens, head_dim / 2]; null leaves the rotation out
  int64_t cos_stride, sin_stride;
  bool across_heads, interleaved;
  float eps;
};

cudaError_t rope(const RopeArgs&, cudaStream_t);

}  // namespace sora::cuda
