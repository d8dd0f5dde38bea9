// norm_modulate and gate_residual_norm_modulate: a block a token, which reads its row once, keeps
// it in registers and writes it once, eight channels a thread and step.
#include "norm.h"
#include "vec.cuh"

namespace sora::cuda {
namespace {

constexpr int kChunk = 8;  // channels a thread takes at a time: 128 bits of a 16-bit type

template <typename T, typename R, int kSteps>
__global__ void __launch_bounds__(256) norm_kernel(const NormArgs a) {
  __shared__ float shared[32];
  const int64_t token = blockIdx.x;
  const int channels = static_cast<int>(a.channels);
  int64_t row = token * a.row_step;
  if (a.index) {
    // Reading the index on the host would wait for the device, so a bad one is held in bounds.
    row = a.index_is_wide ? static_cast<const int64_t*>(a.index)[token]
                          : static_cast<const int32_t*>(a.index)[token];
    row = min(max(row, int64_t{0}), a.rows - 1);
  }
  const T* x = static_cast<const T*>(a.x) + token * a.x_stride;
  float values[kSteps][kChunk];
  float total = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int at = (step * blockDim.x + threadIdx.x) * kChunk;
    if (at >= channels) continue;
    load<kChunk>(x + at, values[step]);
    if (a.residual) {
      float other[kChunk];
      if (a.gate.data) {
        load<kChunk>(a.gate.data + row * a.gate.stride + at, other);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) values[step][i] *= other[i];
      }
      load<kChunk>(static_cast<const R*>(a.residual) + token * a.residual_stride + at, other);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        // The norm reads the residual as it was rounded.
        values[step][i] = widen(narrow<R>(other[i] + values[step][i]));
      store<kChunk>(static_cast<R*>(a.residual_out) + token * channels + at, values[step]);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) total += values[step][i];
  }
  const float mean = a.rms ? 0.0f : block_sum(total, shared) / channels;
  float squares = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int at = (step * blockDim.x + threadIdx.x) * kChunk;
    if (at >= channels) continue;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      values[step][i] -= mean;
      squares += values[step][i] * values[step][i];
    }
  }
  const float inverse = rsqrtf(block_sum(squares, shared) / channels + a.eps);
  T* y = static_cast<T*>(a.y) + token * channels;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int at = (step * blockDim.x + threadIdx.x) * kChunk;
    if (at >= channels) continue;
    float other[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[step][i] *= inverse;
    if (a.weight) {
      load<kChunk>(a.weight + at, other);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[step][i] *= other[i];
    }
    if (a.bias) {
      load<kChunk>(a.bias + at, other);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[step][i] += other[i];
    }
    if (a.scale.data) {
      load<kChunk>(a.scale.data + row * a.scale.stride + at, other);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[step][i] *= 1.0f + other[i];
    }
    if (a.shift.data) {
      load<kChunk>(a.shift.data + row * a.shift.stride + at, other);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[step][i] += other[i];
    }
    store<kChunk>(y + at, values[step]);
  }
}

template <typename T, typename R>
cudaError_t launch(const NormArgs& a, cudaStream_t stream) {
  const int chunks = static_cast<int>(a.channels / kChunk);
  const int threads = chunks < 256 ? (chunks + 31) / 32 * 32 : 256;
  const int steps = (chunks + threads - 1) / threads;
  const dim3 grid(static_cast<unsigned>(a.tokens));
  if (steps <= 1)
    norm_kernel<T, R, 1><<<grid, threads, 0, stream>>>(a);
  else if (steps <= 2)
    norm_kernel<T, R, 2><<<grid, threads, 0, stream>>>(a);
  else if (steps <= 4)
    norm_kernel<T, R, 4><<<grid, threads, 0, stream>>>(a);
  else
    return cudaErrorInvalidValue;
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_typed(const NormArgs& a, cudaStream_t stream) {
  switch (a.residual_type) {
    case Type::f32: return launch<T, float>(a, stream);
    case Type::f16: return launch<T, __half>(a, stream);
    default: return launch<T, __nv_bfloat16>(a, stream);
  }
}

}  // namespace

cudaError_t norm(const NormArgs& a, cudaStream_t stream) {
  if (a.tokens == 0) return cudaSuccess;
  if (a.channels % kChunk || a.channels > kMaxChannels) return cudaErrorInvalidValue;
  switch (a.type) {
    case Type::f32: return launch_typed<float>(a, stream);
    case Type::f16: return launch_typed<__half>(a, stream);
    default: return launch_typed<__nv_bfloat16>(a, stream);
  }
}

}  // namespace sora::cuda
