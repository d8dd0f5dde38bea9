// 128-bit loads and stores of fp32, fp16 and bf16 as fp32 values, and sums over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sora::cuda {

// Eight 16-bit values or four fp32 ones: one 128-bit access.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T narrow(float value);
template <>
__device__ inline float narrow<float>(float value) { return value; }
template <>
__device__ inline __half narrow<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// kCount values from `from`, which is aligned to 16 bytes when kCount fills whole packs.
template <int kCount, typename T>
__device__ inline void load(const T* from, float* to) {
  constexpr int kSize = Pack<T>::kSize;
  static_assert(kCount % kSize == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += kSize) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + i);
#pragma unroll
    for (int j = 0; j < kSize; ++j) to[i + j] = widen(pack.values[j]);
  }
}

template <int kCount, typename T>
__device__ inline void store(T* to, const float* from) {
  constexpr int kSize = Pack<T>::kSize;
  static_assert(kCount % kSize == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += kSize) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < kSize; ++j) pack.values[j] = narrow<T>(from[i + j]);
    *reinterpret_cast<Pack<T>*>(to + i) = pack;
  }
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

// The sum over all threads of a block, in every thread. `shared` holds a float a warp.
__device__ inline float block_sum(float value, float* shared) {
  value = warp_sum(value);
  const int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) shared[warp] = value;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : 0.0f);
}

}  // namespace sora::cuda
