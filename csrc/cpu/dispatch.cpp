// Picks the kernels of the best instruction set that this processor has.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

#define SORA_DECLARE(isa)                                                                   \
  namespace isa {                                                                           \
  void norm(const sora::NormArgs&, int64_t, int64_t, float*);                               \
  void rope(const sora::RopeArgs&, int64_t, int64_t, float*);                               \
  void attention(const sora::AttentionArgs&, sora::Span, sora::Span, int64_t, float, float*); \
  void causal(const sora::CausalArgs&, int64_t, int64_t);                                   \
  void group_moments(const sora::GroupNormArgs&, int64_t, int64_t, float*);                 \
  void group_norm(const sora::GroupNormArgs&, int64_t, int64_t, float*);                    \
  void winograd_split(const sora::WinogradArgs&, int64_t, int64_t);                         \
  void winograd_join(const sora::WinogradArgs&, int64_t, int64_t);                          \
  void lora(const sora::LoraArgs&, const sora::LoraGroup*, int64_t, int64_t, int64_t,       \
            float*);                                                                        \
  void lora_transpose(sora::Type, const void*, int64_t, int64_t, float*);                   \
  void unpack(const sora::UnpackArgs&, int64_t, int64_t, float*);                           \
  void quant_linear(const sora::QuantLinearArgs&, int64_t, int64_t, int64_t, void*);        \
  int64_t quant_linear_scratch(int64_t);                                                    \
  void quantise(const sora::QuantiseArgs&, int64_t, int64_t);                               \
  void finish(const sora::FinishArgs&, int64_t, int64_t);                                   \
  int64_t attention_scratch(int64_t, int64_t, int64_t);                                     \
  }                                                                                         \
  static const sora::Kernels isa##_kernels = {#isa, isa::norm, isa::rope, isa::attention,   \
                                              isa::causal, isa::group_moments, isa::group_norm, \
                                              isa::winograd_split, isa::winograd_join,          \
                                              isa::lora, isa::lora_transpose, isa::unpack,      \
                                              isa::quant_linear, isa::quant_linear_scratch,     \
                                              isa::quantise, isa::finish, isa::attention_scratch};

SORA_DECLARE(baseline)
#ifdef SORA_X86
SORA_DECLARE(avx2)
SORA_DECLARE(avx512)
SORA_DECLARE(avx512bf16)
#endif

namespace sora {

static const Kernels& pick() {
  // SORA_CPU_ISA holds a test or a comparison to a lesser set; it cannot raise it.
  const char* wanted = std::getenv("SORA_CPU_ISA");
  const auto allowed = [wanted](const char* name) {
    return wanted == nullptr || std::strcmp(wanted, name) == 0;
  };
  (void)allowed;
#ifdef SORA_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_bf16 && allowed("avx512bf16")) return avx512bf16_kernels;
  if (has_avx512 && (allowed("avx512") || allowed("avx512bf16"))) return avx512_kernels;
  if (has_avx2 && !(wanted != nullptr && std::strcmp(wanted, "baseline") == 0)) return avx2_kernels;
#endif
  return baseline_kernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = pick();
  return chosen;
}

}  // namespace sora
