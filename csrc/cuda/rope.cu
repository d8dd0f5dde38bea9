// qk_norm_rope: a block a token. Each thread holds eight channels whose partners are in the same
// thread: 8 consecutive ones where pairs are interleaved, 4 and 4 from both halves where they are
// split.
#include "rope.h"
#include "vec.cuh"

namespace sora::cuda {
namespace {

constexpr int kChunk = 8;
constexpr int kSteps = 4;

// Loads n values one half at a time; halves of a 16-bit head are 64-bit accesses.
template <typename T>
__device__ inline void load_pair(const T* low, const T* high, float* to) {
  struct alignas(4 * sizeof(T)) Four { T values[4]; };
  const Four a = *reinterpret_cast<const Four*>(low), b = *reinterpret_cast<const Four*>(high);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = widen(a.values[i]);
    to[2 * i + 1] = widen(b.values[i]);
  }
}

template <typename T>
__device__ inline void store_pair(T* low, T* high, const float* from) {
  struct alignas(4 * sizeof(T)) Four { T values[4]; };
  Four a, b;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a.values[i] = narrow<T>(from[2 * i]);
    b.values[i] = narrow<T>(from[2 * i + 1]);
  }
  *reinterpret_cast<Four*>(low) = a;
  *reinterpret_cast<Four*>(high) = b;
}

template <typename T>
__global__ void __launch_bounds__(256) rope_kernel(const RopeArgs a) {
  __shared__ float shared[32];
  const int64_t token = blockIdx.x;
  const int d = a.head_dim, half = d / 2, per_head = d / kChunk, chunks = a.heads * per_head;
  const T* x = static_cast<const T*>(a.x) + token * a.token_stride;
  T* y = static_cast<T*>(a.y) + token * a.heads * d;
  float values[kSteps][kChunk] = {};
  float squares[kSteps] = {};
  float total = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int chunk = step * blockDim.x + threadIdx.x;
    if (chunk >= chunks) continue;
    const int head = chunk / per_head, part = chunk % per_head;
    const T* from = x + head * a.head_stride;
    if (a.interleaved)
      load<kChunk>(from + part * kChunk, values[step]);
    else
      load_pair(from + part * 4, from + half + part * 4, values[step]);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) squares[step] += values[step][i] * values[step][i];
    total += squares[step];
  }
  float inverse = 0;
  if (a.across_heads) inverse = rsqrtf(block_sum(total, shared) / (a.heads * d) + a.eps);
  if (!a.across_heads) {
    // A head lies in per_head neighbouring lanes, a power of two. Threads past the end take part.
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      for (int lane = per_head / 2; lane > 0; lane /= 2)
        squares[step] += __shfl_xor_sync(0xffffffffu, squares[step], lane);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int chunk = step * blockDim.x + threadIdx.x;
    if (chunk >= chunks) continue;
    const int head = chunk / per_head, part = chunk % per_head;
    if (!a.across_heads) inverse = rsqrtf(squares[step] / d + a.eps);
    const float* weight = a.weight;
    if (weight && a.across_heads) weight += head * d;
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) {
      const int pair = part * 4 + i / 2;
      float first = values[step][i] * inverse, second = values[step][i + 1] * inverse;
      if (weight) {
        first *= weight[a.interleaved ? 2 * pair : pair];
        second *= weight[a.interleaved ? 2 * pair + 1 : pair + half];
      }
      if (a.cos) {
        const float cos = a.cos[token * a.cos_stride + pair];
        const float sin = a.sin[token * a.sin_stride + pair];
        const float turned = first * cos - second * sin;
        second = first * sin + second * cos;
        first = turned;
      }
      values[step][i] = first;
      values[step][i + 1] = second;
    }
    T* to = y + head * d;
    if (a.interleaved)
      store<kChunk>(to + part * kChunk, values[step]);
    else
      store_pair(to + part * 4, to + half + part * 4, values[step]);
  }
}

template <typename T>
cudaError_t launch(const RopeArgs& a, cudaStream_t stream) {
  const int chunks = a.heads * a.head_dim / kChunk;
  const int threads = chunks < 256 ? (chunks + 31) / 32 * 32 : 256;
  if ((chunks + threads - 1) / threads > kSteps) return cudaErrorInvalidValue;
  rope_kernel<T><<<static_cast<unsigned>(a.tokens), threads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rope(const RopeArgs& a, cudaStream_t stream) {
  if (a.tokens == 0) return cudaSuccess;
  const int per_head = a.head_dim / kChunk;
  if (a.head_dim % 16) return cudaErrorInvalidValue;
  if (!a.across_heads && (per_head > 32 || (per_head & (per_head - 1))))
    return cudaErrorInvalidValue;
  switch (a.type) {
    case Type::f32: return launch<float>(a, stream);
    case Type::f16: return launch<__half>(a, stream);
    default: return launch<__nv_bfloat16>(a, stream);
  }
}

}  // namespace sora::cuda
