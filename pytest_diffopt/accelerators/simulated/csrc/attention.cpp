// Attention by CUDA's rules: which of its kernels torch would take on the GPU, and those kernels, computed by the host's
// fused one or step by step. Nothing between a kernel's arguments and its results is charged to the device.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/pad.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "aliasing.h"
#include "device.h"
#include "dry.h"
#include "half.h"
#include "ledger.h"
#include "memory.h"
#include "rules.h"

namespace sim {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ------------------------------------------------------------------------------------------- which kernel CUDA takes

// The conditions under which CUDA's kernels take a call. Metadata only: FakeTensors reach it. Source, pytorch/pytorch:
// aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, can_use_flash_attention and its neighbours.
struct CudasFused {
  const sdp::sdp_params& p;

  bool flash() const {
    return capability() >= 80 && half() && dense</*supports_gqa=*/true>() && !p.attn_mask.has_value() &&
        width(p.key) == width(p.query) && width(p.value) == width(p.query) && width(p.query) <= 256 &&
        (!p.is_causal || p.query.sym_size(2) == p.key.sym_size(2));
  }
  bool efficient() const {
    const bool known = capability() >= 80 ? half() || is({at::kFloat}) : is({at::kHalf, at::kFloat});
    // the alignment of its matrix products on tensor cores
    const int64_t aligned = p.query.scalar_type() == at::kFloat ? (capability() >= 80 ? 4 : 1) : (capability() >= 75 ? 8 : 4);
    return known && dense</*supports_gqa=*/false>() && width(p.key) == width(p.query) &&
        width(p.query) % aligned == 0 && width(p.value) % aligned == 0;
  }
  bool cudnn() const {
    return capability() >= 80 && half() && dense</*supports_gqa=*/true>() && width(p.query) <= 128 &&
        width(p.value) <= 128 && width(p.query) % 8 == 0 && width(p.value) % 8 == 0 &&
        width(p.key) == width(p.query) && p.key.sym_size(2) != 1;
  }

 private:
  template <bool supports_gqa>
  bool dense() const {
    return sdp::check_nested_tensor(p, false) && sdp::check_tensor_shapes(p, false) &&
        sdp::check_batch_size_and_num_heads_dense<supports_gqa>(p, false) &&
        sdp::check_nonzero_sequence_lengths_dense(p, false) && sdp::check_attn_mask_shape(p, false) &&
        whole_rows(p.query) && whole_rows(p.key) && whole_rows(p.value);
  }
  static c10::SymInt width(const Tensor& tensor) { return tensor.sym_size(3); }
  static bool whole_rows(const Tensor& tensor) { return tensor.sym_stride(-1) == 1 || tensor.sym_size(-1) == 1; }
  bool is(std::initializer_list<c10::ScalarType> known) const {
    const auto dtype = p.query.scalar_type();
    return p.key.scalar_type() == dtype && p.value.scalar_type() == dtype &&
        std::find(known.begin(), known.end(), dtype) != known.end();
  }
  bool half() const { return is({at::kHalf, at::kBFloat16}); }
};

// Where nobody chose an order, cuDNN comes first on Hopper and on the large Blackwell (check_prefer_cudnn_attention).
std::vector<at::SDPBackend> order() {
  using at::SDPBackend;
  const auto chosen = at::globalContext().sDPPriorityOrder();
  std::vector<SDPBackend> kernels(chosen.begin(), chosen.end());
  const int generation = capability() / 10;
  if ((generation == 9 || generation == 10) && kernels.front() == SDPBackend::flash_attention) {
    std::erase(kernels, SDPBackend::cudnn_attention);
    kernels.insert(kernels.begin(), SDPBackend::cudnn_attention);
  }
  return kernels;
}

int64_t attention_choice(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask, double dropout, bool causal,
    std::optional<double> /*scale*/, bool grouped) {
  using at::SDPBackend;
  const auto& context = at::globalContext();
  const sdp::sdp_params given{query, key, value, mask, dropout, causal, grouped};
  const CudasFused cuda{given};
  // with dropout CUDA's kernels draw for themselves; here the steps draw
  const bool drops = dropout > 0.0;
  for (const auto kernel : order()) {
    bool takes = false;
    switch (kernel) {
      case SDPBackend::flash_attention: takes = context.userEnabledFlashSDP() && cuda.flash(); break;
      case SDPBackend::efficient_attention: takes = context.userEnabledMemEfficientSDP() && cuda.efficient(); break;
      case SDPBackend::cudnn_attention: takes = context.userEnabledCuDNNSDP() && cuda.cudnn(); break;
      case SDPBackend::math: takes = context.userEnabledMathSDP(); break;
      default: break;
    }
    if (takes) return static_cast<int64_t>(drops ? SDPBackend::math : kernel);
  }
  TORCH_CHECK(false, "No available kernel. Aborting execution.");
}

// ------------------------------------------------------------------------------------------------ one call of a kernel

Tensor as_rows_of_heads(const Tensor& result) {  // in memory (batch, length, heads, width), as the memory-efficient kernel returns it
  return result.transpose(1, 2).contiguous().transpose(1, 2);
}

struct Call {
  Widening half;
  Tensor query, key, value;  // on the host, or on meta; wide
  MaybeTensor mask;
  bool causal;
  double scale;

  Call(
      Aliases& aliases, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& attn_mask, bool is_causal,
      std::optional<double> given_scale)
      : half({aliases.host(q), aliases.host(k), aliases.host(v)}),
        query(half.wide(aliases.host(q))),
        key(heads_of(q, half.wide(aliases.host(k)))),
        value(heads_of(q, half.wide(aliases.host(v)))),
        causal(is_causal),
        scale(given_scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(-1))))) {
    if (attn_mask.has_value() && attn_mask->defined()) mask = half.wide(aliases.host(*attn_mask));
  }

  // The host's fused kernel takes heads of one width.
  bool fused() const {
    return key.size(-1) == value.size(-1) && query.stride(-1) == 1 && key.stride(-1) == 1 && value.stride(-1) == 1 &&
        !(causal && mask.has_value());
  }

  // (batch, heads, length, width), and the logarithm of each row's sum of exponentials, float32.
  std::pair<Tensor, Tensor> forward() const {
    if (fused()) {
      auto [output, sums] =
          at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, mask, scale);
      return {half.rounded(output), sums.to(at::kFloat).contiguous()};
    }
    const auto [weights, sums] = softmax();
    return {half.rounded(at::matmul(weights, value)), sums.contiguous()};
  }

  // By query, key, value and mask, wide.
  std::array<Tensor, 4> backward(const Tensor& by_output, const Tensor& output, const Tensor& sums, bool by_mask) const {
    const Tensor grad = half.wide(by_output);
    if (fused() && !by_mask) {
      auto [by_query, by_key, by_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          grad, query, key, value, half.wide(output), sums, 0.0, causal, mask, scale);
      return {by_query, by_key, by_value, Tensor()};
    }
    const auto [weights, unused] = softmax();
    const Tensor by_value = at::matmul(weights.transpose(-2, -1), grad);
    const Tensor by_weights = at::matmul(grad, value.transpose(-2, -1));
    const Tensor by_scores = weights * (by_weights - (by_weights * weights).sum(-1, /*keepdim=*/true));
    return {
        at::matmul(by_scores, key) * scale, at::matmul(by_scores.transpose(-2, -1), query) * scale, by_value,
        by_mask ? by_scores : Tensor()};
  }

 private:
  // Several heads of a query may share one of key and value.
  static Tensor heads_of(const Tensor& q, const Tensor& shared) {
    if (shared.dim() != 4 || shared.size(1) == q.size(1)) return shared;
    return shared.repeat_interleave(q.size(1) / shared.size(1), 1);
  }

  std::pair<Tensor, Tensor> softmax() const {
    Tensor scores = at::matmul(query, key.transpose(-2, -1)) * scale;
    if (mask.has_value()) scores = scores + *mask;
    if (causal) {
      const Tensor kept = at::ones({query.size(-2), key.size(-2)}, scores.options().dtype(at::kBool)).tril();
      scores = scores.masked_fill(kept.logical_not(), -std::numeric_limits<double>::infinity());
    }
    const Tensor sums = at::logsumexp(scores, -1);
    // a row that is masked as a whole has no weights
    const Tensor weights = at::exp(scores - sums.unsqueeze(-1)).nan_to_num(0.0);
    return {weights, sums};
  }
};

// Counts, charges what a rule says of the kernel's own memory, and gives results to the device.
class Kernel {
 public:
  Kernel(const char* name, const Tensor& on, bool is_dry) : on_(on), running_(name), aliases(is_dry) {
    count_kernel(on.device().index());
    aliases.index = on.device().index();
  }
  Tensor empty(c10::IntArrayRef size, c10::ScalarType dtype) const {
    return at::empty(size, on_.options().dtype(dtype));
  }
  // The costs of every fused kernel stand under one name.
  void charge(
      const Tensor& result, const Tensor& query, const Tensor& key, const Tensor& value, double dropout, bool causal,
      const MaybeTensor& mask, std::optional<double> scale) const {
    if (!dry()) return;
    if (const auto rule = find_rule(Rule::Cost, {"aten::_scaled_dot_product_flash_attention_for_cpu", ""}))
      charge_cost(*rule, on_.device().index(), {result}, {query, key, value, dropout, causal, mask, scale});
  }

 private:
  const Tensor& on_;
  const Running running_;
  KernelScope scope_;

 public:
  Aliases aliases;
};

bool any_is_hollow(std::initializer_list<MaybeTensor> tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const MaybeTensor& one) { return one && hollow(*one); });
}

void check_together(const Tensor& query, std::initializer_list<MaybeTensor> others) {
  for (const auto& other : others)
    TORCH_CHECK(
        !other.has_value() || !other->defined() || other->device() == query.device(),
        "Expected all tensors to be on the same device, but found at least two devices, ", query.device(), " and ",
        other->device(), "! (when checking arguments of scaled_dot_product_attention)");
}

// ------------------------------------------------------------------------------------------------------------ flash

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>;

// In the strides of a new tensor like the query.
Tensor as_the_query(const Tensor& output, const Tensor& query) {
  if (output.sizes() != query.sizes()) return as_rows_of_heads(output);
  const Tensor like = at::empty_like(query, query.options().device(at::kMeta));
  if (like.strides() == output.strides()) return output;
  return at::empty_strided(output.sizes(), like.strides(), output.options()).copy_(output);
}

std::pair<Tensor, Tensor> attend(
    const Kernel& kernel, Aliases& aliases, const Tensor& query, const Tensor& key, const Tensor& value,
    const MaybeTensor& mask, double dropout, bool causal, std::optional<double> scale, bool like_query) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      dropout == 0.0, "The simulated GPU has no fused attention with dropout; scaled_dot_product_attention takes the steps.");
  check_together(query, {key, value, mask});
  auto [output, sums] = Call(aliases, query, key, value, mask, causal, scale).forward();
  const Tensor result = aliases.device(like_query ? as_the_query(output, query) : as_rows_of_heads(output));
  kernel.charge(result, query, key, value, dropout, causal, mask, scale);
  return {result, sums};
}

Nine flash(
    const Tensor& query, const Tensor& key, const Tensor& value, double dropout, bool causal, bool /*debug*/,
    std::optional<double> scale) {
  Kernel kernel(
      "aten::_scaled_dot_product_flash_attention", query, any_is_hollow({query, key, value}));
  auto [output, sums] = attend(kernel, kernel.aliases, query, key, value, std::nullopt, dropout, causal, scale, true);
  return {
      output, kernel.aliases.device(sums), Tensor(), Tensor(), query.sym_size(2), key.sym_size(2),
      kernel.empty({2}, at::kUInt64).zero_(), kernel.empty({0}, at::kUInt64), kernel.empty({0}, query.scalar_type())};
}

std::array<Tensor, 4> attend_backward(
    const char* name, const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    const MaybeTensor& mask, const Tensor& output, const Tensor& sums, bool causal, std::optional<double> scale,
    bool by_mask) {
  check_together(query, {key, value, mask, grad});
  Kernel kernel(name, query, any_is_hollow({grad, query, key, value, mask, output, sums}));
  auto& aliases = kernel.aliases;
  const Call call(aliases, query, key, value, mask, causal, scale);
  const Tensor host_sums = aliases.host(sums).narrow(2, 0, query.size(2));
  auto found = call.backward(aliases.host(grad), aliases.host(output), host_sums, by_mask);
  for (const int at : {1, 2}) {  // shared heads take the sum of what their queries ask
    const auto& shared = at == 1 ? key : value;
    if (shared.size(1) != query.size(1))
      found[at] = found[at]
                      .view({shared.size(0), shared.size(1), -1, shared.size(2), shared.size(3)})
                      .sum(2);
  }
  for (auto& one : found)
    if (one.defined()) one = aliases.device(call.half.rounded(one).contiguous());
  return found;
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& sums, const Tensor&, const Tensor&, int64_t, int64_t, double /*dropout*/, bool causal,
    const Tensor&, const Tensor&, std::optional<double> scale) {
  auto by = attend_backward(
      "aten::_scaled_dot_product_flash_attention_backward", grad, query, key, value, std::nullopt, output, sums, causal,
      scale, false);
  return {by[0], by[1], by[2]};
}

// ------------------------------------------------------------------------------------------------- memory-efficient

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask, bool with_sums, double dropout,
    bool causal, std::optional<double> scale) {
  Kernel kernel(
      "aten::_scaled_dot_product_efficient_attention", query, any_is_hollow({query, key, value, mask}));
  auto [output, sums] = attend(kernel, kernel.aliases, query, key, value, mask, dropout, causal, scale, false);
  const int64_t length = query.size(2);
  // rows of it begin at multiples of 32
  Tensor kept = with_sums
      ? kernel.aliases.device(at::pad(sums, {0, (length + 31) / 32 * 32 - length}).contiguous())
      : kernel.empty({query.size(0), query.size(1), 0}, at::kFloat);
  return {
      output, std::move(kept), at::empty({}, at::TensorOptions(at::kLong)), at::empty({}, at::TensorOptions(at::kLong))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask,
    const Tensor& output, const Tensor& sums, const Tensor&, const Tensor&, double /*dropout*/,
    std::array<bool, 4> wanted, bool causal, std::optional<double> scale) {
  if (!grad.defined()) return {};
  const MaybeTensor given = mask.defined() ? MaybeTensor(mask) : std::nullopt;
  auto by = attend_backward(
      "aten::_scaled_dot_product_efficient_attention_backward", grad, query, key, value, given, output, sums, causal,
      scale, wanted[3] && mask.defined());
  return {by[0], by[1], by[2], by[3]};
}

// ------------------------------------------------------------------------------------------------------------ cuDNN

Nine cudnn(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask, bool /*with_sums*/,
    double dropout, bool causal, bool /*debug*/, std::optional<double> scale) {
  Kernel kernel(
      "aten::_scaled_dot_product_cudnn_attention", query, any_is_hollow({query, key, value, mask}));
  auto [output, sums] = attend(kernel, kernel.aliases, query, key, value, mask, dropout, causal, scale, true);
  return {
      output, kernel.aliases.device(sums), Tensor(), Tensor(), query.sym_size(2), key.sym_size(2),
      at::empty({}, at::TensorOptions(at::kLong)), at::empty({}, at::TensorOptions(at::kLong)), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> cudnn_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& sums, const Tensor&, const Tensor&, const Tensor& mask, const Tensor&, const Tensor&, int64_t, int64_t,
    double /*dropout*/, bool causal, std::optional<double> scale) {
  const MaybeTensor given = mask.defined() ? MaybeTensor(mask) : std::nullopt;
  auto by = attend_backward(
      "aten::_scaled_dot_product_cudnn_attention_backward", grad, query, key, value, given, output, sums, causal, scale,
      false);
  return {by[0], by[1], by[2]};
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("_fused_sdp_choice", attention_choice);
  m.impl("_scaled_dot_product_flash_attention", flash);
  m.impl("_scaled_dot_product_flash_attention_backward", flash_backward);
  m.impl("_scaled_dot_product_efficient_attention", efficient);
  m.impl("_scaled_dot_product_efficient_attention_backward", efficient_backward);
  m.impl("_scaled_dot_product_cudnn_attention", cudnn);
  m.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward);
}

}  // namespace

int64_t choose_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask, double dropout, bool causal,
    std::optional<double> scale, bool grouped) {
  return attention_choice(query, key, value, mask, dropout, causal, scale, grouped);
}

}  // namespace sim

namespace at::native {
// scaled_dot_product_attention asks this table, not the dispatcher.
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &sim::choose_attention)
}  // namespace at::native
