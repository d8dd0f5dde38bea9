// What the CUDA norms take. Every row must start at a multiple of 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sora::cuda {

enum class Type : int { f32, f16, bf16 };
constexpr int64_t kMaxChannels = 8192;  // a row is held in the registers of 256 threads

// Modulation rows [rows, channels] in fp32. Without data the term is left out.
struct Table {
  const float* data;
  int64_t stride;
};

struct NormArgs {
  Type type, residual_type;
  const void* x;  // [tokens, channels]
  void* y;
  const void* residual;  // null for the plain norm
  void* residual_out;
  int64_t x_stride, residual_stride;
  Table gate, scale, shift;
  const void* index;  // int32 or int64 [tokens]; null: row_step * token
  int64_t row_step, rows;
  const float *weight, *bias;  // [channels]
  int64_t tokens, channels;
  bool index_is_wide, rms;
  float eps;
};

cudaError_t norm(const NormArgs&, cudaStream_t);

}  // namespace sora::cuda
