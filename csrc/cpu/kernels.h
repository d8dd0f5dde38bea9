// What the CPU kernels take, and the table of their entry points, one for each instruction set.
#pragma once

#include <cstdint>

namespace sora {

enum class Type : int { f32, f16, bf16 };

// Modulation rows [rows, channels] in fp32. Without data the term is left out.
struct Table {
  const float* data = nullptr;
  int64_t stride = 0;
};

struct NormArgs {
  Type type;                       // of x and y
  const void* x;                   // [tokens, channels]
  int64_t x_stride;
  void* y;                         // [tokens, channels], dense
  Type residual_type;
  const void* residual = nullptr;  // [tokens, channels]; null for the plain norm
  int64_t residual_stride = 0;
  void* residual_out = nullptr;    // dense
  Table gate, scale, shift;
  const int64_t* index = nullptr;  // each token's row; null: row_step * token
  int64_t row_step = 0;            // 0: one row for all, 1: one row a token
  const float* weight = nullptr;   // [channels]
  const float* bias = nullptr;
  int64_t channels;
  bool rms;
  float eps;
  bool past_caches = false;        // a result is too large to be found in the caches again
};

struct RopeArgs {
  Type type;
  const void* x;  // [tokens, heads, head_dim], head_dim dense
  int64_t token_stride, head_stride;
  void* y;        // dense
  int64_t heads, head_dim;
  const float* weight = nullptr;  // [heads * head_dim] across heads, else [head_dim]
  const float* cos = nullptr;     // [tokens, head_dim / 2]
  const float* sin = nullptr;
  int64_t cos_stride = 0, sin_stride = 0;
  bool across_heads, interleaved;
  float eps;
  bool past_caches = false;  // as of NormArgs
};

struct AttentionArgs {
  Type type;
  const void *q, *k, *v;  // [tokens, heads, head_dim], head_dim dense
  int64_t q_stride, k_stride, v_stride;                 // of tokens
  int64_t q_head_stride, k_head_stride, v_head_stride;
  void* out;              // dense
  float* lse = nullptr;   // [tokens, heads]
  int64_t heads, head_dim;
  float scale;
  const float* padding_key = nullptr;    // [heads, head_dim], dense: one more key of a sequence
  const float* padding_value = nullptr;
  bool past_caches = false;  // as of NormArgs
};

struct CausalArgs {
  Type type;                      // of all but weight and bias
  const void* x;                  // [batch, frames, pixels, channels], dense like the others
  const void* past;               // [batch, kept, pixels, channels]
  void* joined;                   // [batch, before + kept + frames + after, pixels, channels]
  void* cache;                    // [batch, keep, pixels, channels]
  const float* weight = nullptr;  // [channels]
  const float* bias = nullptr;
  int64_t frames, kept, pixels, channels;
  int64_t before, after;          // how often the first frame stands before itself, the last behind
  int64_t keep;
  float eps;
};

// Pixels whose moments are one task: a picture's do not depend on the number of threads.
constexpr int64_t kPixelShare = 64;

struct GroupNormArgs {
  Type type;                      // of x and y
  const void* x;                  // [pictures, pixels, channels], dense
  void* y;
  const float* weight = nullptr;  // [channels]
  const float* bias = nullptr;
  int64_t pixels, channels, groups;
  int64_t shares;                 // of a picture's pixels
  double* parts;                  // [pictures, shares, groups, 2]: mean, sum of squares about it
  float eps;
  bool silu;
};

// Rows of tiles of 2x2 pixels, `first` and those below it, of all frames; float32, channels last.
struct WinogradArgs {
  const float* x = nullptr;       // [frames, height, width, channels], dense: what is split
  float* tiles = nullptr;         // [frames, rows, across, 16, channels]: split, or to be joined
  float* y = nullptr;             // [frames, height, width, channels], dense: what is joined
  const float* beside = nullptr;  // as y; may be y
  const float* bias = nullptr;    // [channels]
  int64_t height, width, channels;
  int64_t first, rows, across;
};

struct LoraArgs {
  Type type;          // of x, base and out
  const void* x;      // [rows, ins]
  int64_t x_stride;
  const void* base;   // [rows, outs]
  int64_t base_stride;
  void* out;          // [rows, outs], dense
  int64_t ins, outs;
};

// A width that vectors of any instruction set divide.
inline int64_t lora_padded(int64_t width) { return (width + 15) / 16 * 16; }

// One adapter: `down` and `up` transposed, [ins, lora_padded(rank)] and [rank, lora_padded(outs)].
struct LoraGroup {
  const float *down, *up;
  int64_t rank;
  float scale;
};

// In the order of kernels/sora_kernels/quant/formats.py.
enum class Format : int { int8, e4m3, e5m2, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k,
                          q6_k };

struct UnpackArgs {
  Format format;
  const uint8_t* weight;         // [rows, row_bytes]
  int64_t row_bytes;
  const float* scale = nullptr;  // of int8 and fp8: [rows, stretches], or one for all (stride 0)
  int64_t scale_stride = 0, stretches = 1;
  int64_t ins;                   // values of a row
  int64_t first;                 // the row that stands first in `out`
  Type type;                     // of out
  void* out;                     // [.., ins], dense
};

// x @ weight.T + bias, and gelu, of bf16: the weight is decoded by panels.
struct QuantLinearArgs {
  UnpackArgs weight;            // without `out`
  int64_t outs;                 // rows of the weight
  const void* x;                // [rows, ins], bf16
  int64_t x_stride, rows;
  const float* bias = nullptr;  // [outs]
  int64_t gelu = 0;             // 1 by erf, 2 by tanh
  void* out;                    // [rows, outs], bf16, dense
};

struct QuantiseArgs {
  Type type;       // of x
  const void* x;   // [rows, ins]
  int64_t x_stride, ins;
  uint8_t* out;    // [rows, ins]: int8 and 128
  float* scale;    // [rows]
};

// What int8 sums become: times the row's scale, plus bias, gelu. Without sums, `out` itself.
struct FinishArgs {
  Type type;                     // of out
  const float* sums = nullptr;   // [rows, outs], dense
  const float* scale = nullptr;  // [rows]
  const float* bias = nullptr;   // [outs]
  int64_t gelu = 0;              // 1 by erf, 2 by tanh
  void* out;                     // [rows, outs]
  int64_t out_stride, outs;
};

// Tokens first, first + step, ...: `count` of them.
struct Span {
  int64_t first, step, count;
};

struct Kernels {
  const char* name;
  void (*norm)(const NormArgs&, int64_t begin, int64_t end, float* scratch);
  void (*rope)(const RopeArgs&, int64_t begin, int64_t end, float* scratch);
  // padding: what is added to the score of padding's key; -inf leaves the key out.
  void (*attention)(const AttentionArgs&, Span q, Span k, int64_t head, float padding,
                    float* scratch);
  void (*causal)(const CausalArgs&, int64_t begin, int64_t end);  // rows of `joined`
  void (*group_moments)(const GroupNormArgs&, int64_t begin, int64_t end, float* scratch);  // shares
  void (*group_norm)(const GroupNormArgs&, int64_t begin, int64_t end, float* scratch);  // pixels
  void (*winograd_split)(const WinogradArgs&, int64_t begin, int64_t end);  // rows of all frames
  void (*winograd_join)(const WinogradArgs&, int64_t begin, int64_t end);
  void (*lora)(const LoraArgs&, const LoraGroup* groups, int64_t count, int64_t begin,
               int64_t end, float* scratch);  // rows that all of the groups change
  // out[c, r] = in[r, c], `lora_padded(rows)` wide.
  void (*lora_transpose)(Type, const void* in, int64_t rows, int64_t columns, float* out);
  void (*unpack)(const UnpackArgs&, int64_t begin, int64_t end, float* scratch);  // [ins]
  // Columns of the result by panels of 64, and rows of it. Scratch: `quant_linear_scratch` bytes on a
  // line of the cache, which is 0 where the instruction set has no such product.
  void (*quant_linear)(const QuantLinearArgs&, int64_t panel, int64_t begin, int64_t end,
                       void* scratch);
  int64_t (*quant_linear_scratch)(int64_t ins);
  void (*quantise)(const QuantiseArgs&, int64_t begin, int64_t end);
  void (*finish)(const FinishArgs&, int64_t begin, int64_t end);
  int64_t (*attention_scratch)(int64_t queries, int64_t keys, int64_t head_dim);
};

// Floats of scratch that `norm` and `rope` want.
inline int64_t norm_scratch(int64_t channels) { return channels + 16; }
inline int64_t rope_scratch(int64_t heads, int64_t head_dim) {
  return heads * head_dim + 2 * head_dim + 48;
}

inline int64_t group_norm_scratch(int64_t channels) { return 3 * (channels + 16); }

constexpr int64_t kLoraRows = 8;  // a tile, of which each instruction set takes one or two

// ranks: of all groups, each padded.
inline int64_t lora_scratch(int64_t ranks) { return kLoraRows * (256 + ranks); }

// The best table for this processor.
const Kernels& kernels();

}  // namespace sora
