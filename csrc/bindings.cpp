// The native ops as torch.ops.sora.native_*: their schemas, and their bindings for CPU tensors.
// Arguments arrive validated by sora_kernels' Python API; what is checked here is what memory
// safety needs.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "tensors.h"

#ifndef SORA_SOURCES
#define SORA_SOURCES "unknown"
#endif

namespace {

// Found in the file by sora_kernels.csrc, before it loads the library.
[[gnu::used]] const char kSources[] = "sora_kernels csrc " SORA_SOURCES;

using at::Tensor;
using sora::as_float;
using sora::data_of;
using sora::dense_rows;
using sora::grain;
using sora::MaybeTensor;
using sora::result;
using sora::type_of;

sora::Table table_of(const Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.const_data_ptr<float>(), tensor.size(0) == 1 ? 0 : tensor.stride(0)};
}

Tensor result_like(const Tensor& tensor) { return result(tensor.sizes(), tensor.options()); }

// A result that is larger than most processors' caches is gone from them before it is read.
bool past_caches(const Tensor& result) { return result.nbytes() >= (32u << 20); }

// Fills what both norms share, then runs them over the tokens. Holds converted tensors alive.
void run_norm(sora::NormArgs args, const Tensor& x, const MaybeTensor& gate,
              const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& index,
              const std::string& kind, const MaybeTensor& weight, const MaybeTensor& bias,
              double eps) {
  const int64_t tokens = x.size(0), channels = x.size(1);
  const Tensor rows[] = {as_float(gate), as_float(scale), as_float(shift)};
  const Tensor weights = as_float(weight), biases = as_float(bias);
  const Tensor indices = index.has_value() ? index->to(at::kLong).contiguous() : Tensor();
  args.gate = table_of(rows[0]);
  args.scale = table_of(rows[1]);
  args.shift = table_of(rows[2]);
  for (const Tensor& table : rows) {
    if (!table.defined()) continue;
    TORCH_CHECK(table.size(1) == channels, "sora: modulation of ", table.size(1), " channels");
    if (!indices.defined() && table.size(0) != 1) {
      TORCH_CHECK(table.size(0) == tokens, "sora: ", table.size(0), " rows, ", tokens, " tokens");
      args.row_step = 1;
    }
  }
  args.index = indices.defined() ? indices.const_data_ptr<int64_t>() : nullptr;
  args.weight = data_of(weights);
  args.bias = data_of(biases);
  args.channels = channels;
  args.rms = kind == "rms";
  args.eps = static_cast<float>(eps);
  const auto& kernels = sora::kernels();
  at::parallel_for(0, tokens, grain(channels), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(sora::norm_scratch(channels));
    kernels.norm(args, begin, end, scratch.data());
  });
}

Tensor norm_modulate(const Tensor& x_in, const MaybeTensor& scale, const MaybeTensor& shift,
                     const MaybeTensor& index, std::string kind, const MaybeTensor& weight,
                     const MaybeTensor& bias, double eps) {
  const Tensor x = dense_rows(x_in);
  Tensor y = result_like(x);
  sora::NormArgs args;
  args.type = args.residual_type = type_of(x);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.y = y.mutable_data_ptr();
  args.past_caches = past_caches(y);
  run_norm(args, x, {}, scale, shift, index, kind, weight, bias, eps);
  return y;
}

std::tuple<Tensor, Tensor> gate_residual_norm_modulate(
    const Tensor& x_in, const Tensor& residual_in, const MaybeTensor& gate,
    const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& index, std::string kind,
    const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
  const Tensor x = dense_rows(x_in), residual = dense_rows(residual_in);
  TORCH_CHECK(x.sizes() == residual.sizes(), "sora: residual of another shape");
  Tensor y = result_like(x);
  Tensor residual_out = result_like(residual);
  sora::NormArgs args;
  args.type = type_of(x);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.y = y.mutable_data_ptr();
  args.past_caches = past_caches(y);
  args.residual_type = type_of(residual);
  args.residual = residual.const_data_ptr();
  args.residual_stride = residual.stride(0);
  args.residual_out = residual_out.mutable_data_ptr();
  run_norm(args, x, gate, scale, shift, index, kind, weight, bias, eps);
  return {residual_out, y};
}

Tensor norm_rope(const Tensor& x_in, const MaybeTensor& weight, const MaybeTensor& cos,
                 const MaybeTensor& sin, bool across_heads, bool interleaved, double eps) {
  const Tensor x = dense_rows(x_in);
  Tensor y = result_like(x);
  const Tensor weights = as_float(weight), cosines = as_float(cos), sines = as_float(sin);
  sora::RopeArgs args;
  args.type = type_of(x);
  args.x = x.const_data_ptr();
  args.token_stride = x.stride(0);
  args.head_stride = x.stride(1);
  args.y = y.mutable_data_ptr();
  args.past_caches = past_caches(y);
  args.heads = x.size(1);
  args.head_dim = x.size(2);
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
  const auto& kernels = sora::kernels();
  at::parallel_for(0, x.size(0), grain(x.size(1) * x.size(2)), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(sora::rope_scratch(args.heads, args.head_dim));
    kernels.rope(args, begin, end, scratch.data());
  });
  return y;
}

// Queries of a sequence that are one task. Shares begin at multiples of it, whatever else there is:
// a sequence's result does not depend on its company.
constexpr int64_t kShare = 256;

int64_t shares_of(int64_t queries) { return (queries + kShare - 1) / kShare; }

// Sequences are (q first, q step, q count, k first, k step, k count), int64 [sequences, 6].
// Padding's key and value are [heads, head_dim]; padding_in is what is added to its score in each
// sequence, float [sequences].
std::tuple<Tensor, Tensor> attention(const Tensor& q_in, const Tensor& k_in,
                                     const Tensor& v_in, const Tensor& sequences_in, double scale,
                                     bool return_lse, const MaybeTensor& padding_key,
                                     const MaybeTensor& padding_value,
                                     const MaybeTensor& padding_in) {
  const Tensor q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  const Tensor sequences = sequences_in.to(at::kLong).contiguous();
  Tensor out = result_like(q);
  Tensor lse = at::empty({return_lse ? q.size(0) : 0, return_lse ? q.size(1) : 0},
                         q.options().dtype(at::kFloat));
  sora::AttentionArgs args;
  args.type = type_of(q);
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.q_stride = q.stride(0);
  args.k_stride = k.stride(0);
  args.v_stride = v.stride(0);
  args.q_head_stride = q.stride(1);
  args.k_head_stride = k.stride(1);
  args.v_head_stride = v.stride(1);
  args.out = out.mutable_data_ptr();
  args.lse = return_lse ? lse.mutable_data_ptr<float>() : nullptr;
  args.heads = q.size(1);
  args.head_dim = q.size(2);
  args.scale = static_cast<float>(scale);
  args.past_caches = past_caches(out);

  const int64_t count = sequences.size(0);
  const Tensor biases = as_float(padding_in);
  Tensor key, value;
  if (biases.defined()) {
    TORCH_CHECK(padding_key.has_value() && padding_value.has_value(), "sora: padding without key");
    key = as_float(padding_key).contiguous();
    value = as_float(padding_value).contiguous();
    TORCH_CHECK(biases.numel() == count && key.numel() == args.heads * args.head_dim &&
                    value.numel() == key.numel(),
                "sora: padding of ", biases.numel(), " sequences; there are ", count);
    args.padding_key = key.const_data_ptr<float>();
    args.padding_value = value.const_data_ptr<float>();
  }
  const float* padding = data_of(biases);
  const auto* spans = reinterpret_cast<const sora::Span*>(sequences.const_data_ptr<int64_t>());
  int64_t most_q = 0, most_k = 0, work = 0;
  const auto inside = [](const sora::Span& span, int64_t tokens) {
    return span.count == 0 || (span.count > 0 && span.first >= 0 && span.step >= 1 &&
                               span.first + (span.count - 1) * span.step < tokens);
  };
  // The first item of each sequence. An item is a share of the queries of one head.
  std::vector<int64_t> first_item(count + 1);
  for (int64_t i = 0; i < count; ++i) {
    const sora::Span &qs = spans[2 * i], &ks = spans[2 * i + 1];
    TORCH_CHECK(inside(qs, q.size(0)) && inside(ks, k.size(0)),
                "sora: sequence ", i, " reads past the tokens");
    most_q = std::max(most_q, std::min(qs.count, kShare));
    most_k = std::max(most_k, ks.count);
    work += qs.count * ks.count;
    first_item[i + 1] = first_item[i] + args.heads * shares_of(qs.count);
  }
  const int64_t items = first_item[count];
  const int64_t cost = std::max<int64_t>(
      1, work * args.heads / std::max<int64_t>(1, items) * args.head_dim / 8);
  const auto& kernels = sora::kernels();
  const bool half = args.type != sora::Type::f32;
  // Sequences differ in length, so that threads take what is next and not equal numbers of items.
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), items / grain(cost) + 1);
  const int64_t taken = std::clamp<int64_t>(items / (8 * threads), 1, grain(cost));
  std::atomic<int64_t> next{0};
  const auto attend = [&](int64_t item, int64_t sequence, float* scratch) {
    const sora::Span &whole = spans[2 * sequence], &ks = spans[2 * sequence + 1];
    const int64_t shares = shares_of(whole.count);
    const int64_t head = (item - first_item[sequence]) / shares;
    const int64_t share = (item - first_item[sequence]) % shares;
    const int64_t start = share * kShare;
    const sora::Span qs{whole.first + start * whole.step, whole.step,
                        std::min(whole.count - start, kShare)};
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    const float bias = padding ? padding[sequence] : kNone;
    if (ks.count > 0 || bias > kNone) return kernels.attention(args, qs, ks, head, bias, scratch);
    for (int64_t i = 0; i < qs.count; ++i) {
      const int64_t row = (qs.first + i * qs.step) * args.heads + head;
      const int64_t bytes = args.head_dim * (half ? 2 : 4);
      std::memset(static_cast<char*>(args.out) + row * bytes, 0, bytes);
      if (args.lse) args.lse[row] = kNone;
    }
  };
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    std::vector<float> scratch(kernels.attention_scratch(most_q, most_k, args.head_dim));
    for (int64_t begin = next.fetch_add(taken); begin < items; begin = next.fetch_add(taken)) {
      const int64_t end = std::min(begin + taken, items);
      // Sequences without queries have no items: the last that begins here is the one.
      int64_t sequence =
          std::upper_bound(first_item.begin(), first_item.end(), begin) - first_item.begin() - 1;
      for (int64_t item = begin; item < end; ++item) {
        while (item >= first_item[sequence + 1]) ++sequence;
        attend(item, sequence, scratch.data());
      }
    }
    // Results that went past the caches are there before other threads are told.
    std::atomic_thread_fence(std::memory_order_seq_cst);
  });
  return {out, lse};
}

// Adapter i changes the rows from rows[2 i] to below rows[2 i + 1].
Tensor lora_linear(const Tensor& x_in, const Tensor& base_in, at::TensorList down,
                   at::TensorList up, at::IntArrayRef rows, at::ArrayRef<double> scale) {
  const Tensor x = dense_rows(x_in), base = dense_rows(base_in);
  const int64_t tokens = x.size(0), count = down.size();
  TORCH_CHECK(base.size(0) == tokens && base.scalar_type() == x.scalar_type() &&
                  static_cast<int64_t>(up.size()) == count &&
                  static_cast<int64_t>(rows.size()) == 2 * count &&
                  static_cast<int64_t>(scale.size()) == count,
              "sora: ", count, " adapters on ", x.sizes(), " and ", base.sizes());
  Tensor out = result({tokens, base.size(1)}, x.options());
  sora::LoraArgs args;
  args.type = type_of(x);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.base = base.const_data_ptr();
  args.base_stride = base.stride(0);
  args.out = out.mutable_data_ptr();
  args.ins = x.size(1);
  args.outs = base.size(1);
  const auto& kernels = sora::kernels();
  std::vector<Tensor> factors(2 * count), turned(2 * count);
  std::vector<sora::LoraGroup> groups(count);
  std::vector<int64_t> cuts = {0, tokens};
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK(down[i].dim() == 2 && up[i].dim() == 2 && down[i].size(1) == args.ins &&
                    up[i].size(0) == args.outs && up[i].size(1) == down[i].size(0) &&
                    0 <= rows[2 * i] && rows[2 * i] <= rows[2 * i + 1] &&
                    rows[2 * i + 1] <= tokens,
                "sora: adapter ", i, " of ", down[i].sizes(), " and ", up[i].sizes());
    factors[2 * i] = down[i].contiguous();
    factors[2 * i + 1] = up[i].contiguous();
    for (int64_t j = 2 * i; j < 2 * i + 2; ++j)
      turned[j] = at::empty({factors[j].size(1), sora::lora_padded(factors[j].size(0))},
                            x.options().dtype(at::kFloat));
    groups[i].down = turned[2 * i].const_data_ptr<float>();
    groups[i].up = turned[2 * i + 1].const_data_ptr<float>();
    groups[i].rank = down[i].size(0);
    groups[i].scale = static_cast<float>(scale[i]);
    cuts.insert(cuts.end(), {rows[2 * i], rows[2 * i + 1]});
  }
  at::parallel_for(0, 2 * count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      kernels.lora_transpose(type_of(factors[j]), factors[j].const_data_ptr(), factors[j].size(0),
                             factors[j].size(1), turned[j].mutable_data_ptr<float>());
  });
  // Tiles of rows that one set of adapters changes; those that none does are copied.
  struct Tile {
    int64_t begin, end;
    const std::vector<sora::LoraGroup>* groups;
  };
  std::sort(cuts.begin(), cuts.end());
  std::vector<std::vector<sora::LoraGroup>> sets(cuts.size());
  std::vector<Tile> tiles;
  int64_t most = 0;
  for (size_t cut = 0; cut + 1 < cuts.size(); ++cut) {
    const int64_t start = cuts[cut], stop = cuts[cut + 1];
    if (start == stop) continue;
    int64_t ranks = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (rows[2 * i] > start || rows[2 * i + 1] < stop) continue;
      sets[cut].push_back(groups[i]);
      ranks += sora::lora_padded(groups[i].rank);
    }
    most = std::max(most, ranks);
    for (int64_t row = start; row < stop; row += sora::kLoraRows)
      tiles.push_back({row, std::min(row + sora::kLoraRows, stop), &sets[cut]});
  }
  // Each thread takes every n-th tile: stretches without adapters cost next to nothing.
  const int64_t work = sora::kLoraRows * (args.outs + most * (args.ins + args.outs) / 4);
  const int64_t all = tiles.size();
  const int64_t threads = std::clamp<int64_t>(all / grain(work), 1, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(sora::lora_scratch(most));
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = thread; i < all; i += threads)
        kernels.lora(args, tiles[i].groups->data(), tiles[i].groups->size(), tiles[i].begin,
                     tiles[i].end, scratch.data());
  });
  return out;
}

// A tile of `block` queries for each entry: (segment, first query of the tile in its segment).
Tensor plan_tiles(const Tensor& offsets_in, int64_t block) {
  const Tensor offsets = offsets_in.to(at::kLong).contiguous();
  const auto* cu = offsets.const_data_ptr<int64_t>();
  const int64_t segments = offsets.size(0) - 1;
  TORCH_CHECK(block > 0 && segments >= 0, "sora: no offsets, or block ", block);
  int64_t tiles = 0;
  for (int64_t i = 0; i < segments; ++i) {
    TORCH_CHECK(cu[i + 1] >= cu[i], "sora: offsets fall at ", i + 1);
    tiles += (cu[i + 1] - cu[i] + block - 1) / block;
  }
  Tensor table = at::empty({tiles, 2}, at::TensorOptions().dtype(at::kInt));
  int32_t* entry = table.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < segments; ++i) {
    for (int64_t start = 0; start < cu[i + 1] - cu[i]; start += block) {
      *entry++ = static_cast<int32_t>(i);
      *entry++ = static_cast<int32_t>(start);
    }
  }
  return table;
}

std::string native_isa() { return sora::kernels().name; }

// On how many threads the kernels run: 1 where this file was compiled without OpenMP.
int64_t native_threads() {
  std::atomic<int64_t> found{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++found; });
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sora, m) {
  m.def("native_norm_modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor? index, str kind, "
        "Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def("native_gate_residual_norm_modulate(Tensor x, Tensor residual, Tensor? gate, "
        "Tensor? scale, Tensor? shift, Tensor? index, str kind, Tensor? weight, Tensor? bias, "
        "float eps) -> (Tensor, Tensor)");
  m.def("native_norm_rope(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, bool across_heads, "
        "bool interleaved, float eps) -> Tensor");
  m.def("native_attention(Tensor q, Tensor k, Tensor v, Tensor sequences, float scale, "
        "bool return_lse, Tensor? padding_key=None, Tensor? padding_value=None, "
        "Tensor? padding=None) "
        "-> (Tensor, Tensor)");
  m.def("native_lora_linear(Tensor x, Tensor base, Tensor[] down, Tensor[] up, int[] rows, "
        "float[] scale) -> Tensor");
  m.def("native_plan_tiles(Tensor offsets, int block) -> Tensor");
  m.def("native_isa() -> str", native_isa);
  m.def("native_threads() -> int", native_threads);
}

TORCH_LIBRARY_IMPL(sora, CPU, m) {
  m.impl("native_norm_modulate", norm_modulate);
  m.impl("native_gate_residual_norm_modulate", gate_residual_norm_modulate);
  m.impl("native_norm_rope", norm_rope);
  m.impl("native_attention", attention);
  m.impl("native_lora_linear", lora_linear);
  m.impl("native_plan_tiles", plan_tiles);
}
