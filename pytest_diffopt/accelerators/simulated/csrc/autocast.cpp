// torch.autocast("sim") casts as torch.autocast("cuda") does. The lists are those of ATen/autocast_mode.h, and a test
// compares them with the installed torch's. That header's own kernels would do, but take half of the build's time.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "device.h"

namespace at::autocast {
TORCH_API bool is_autocast_enabled(at::DeviceType device_type);
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType device_type);
TORCH_API Tensor cached_cast(at::ScalarType to_type, const Tensor& arg, c10::DeviceType device_type);
}  // namespace at::autocast

namespace sim {
namespace {

using at::ScalarType;
using at::Tensor;
using c10::OperatorHandle;
using torch::jit::Stack;

// In autocast's lower precision.
const char* const kLower[] = {
    "_convolution.deprecated", "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "prelu", "addmm", "addmv", "addr", "matmul",
    "einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "_scaled_dot_product_flash_attention", "scaled_dot_product_attention"};
// In float32.
const char* const kFloat32[] = {
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div",
    "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss",
    "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist",
    "pdist", "cdist", "renorm", "logsumexp", "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d",
    "_upsample_nearest_exact2d", "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d",
    "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_bicubic2d_aa"};
// With a float32 result, unless the call says another dtype.
const char* const kFloat32Result[] = {
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList"};
// In the widest dtype of the arguments.
const char* const kWidest[] = {
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add", "stack", "cat"};

bool is_cast(const Tensor& t) {
  return t.defined() && t.device().type() == kSim && t.is_floating_point() && t.scalar_type() != at::kDouble;
}

struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(c10::DispatchKey::AutocastPrivateUse1)};
};

// Calls `visit` with every tensor argument and puts back what it returns.
template <class Visit>
void for_each_tensor(const OperatorHandle& op, Stack* stack, const Visit& visit) {
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      if (value.toTensor().defined()) value = visit(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> visited;
      for (const Tensor& t : value.toTensorVector()) visited.push_back(visit(t));
      value = c10::List<Tensor>(std::move(visited));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> visited;
      for (const auto& t : value.toOptionalTensorVector())
        visited.push_back(t.has_value() ? std::optional<Tensor>(visit(*t)) : std::nullopt);
      value = std::move(visited);
    }
  }
}

void run_in(ScalarType dtype, const OperatorHandle& op, Stack* stack) {
  NoAutocast off;
  // The cast of a weight is kept until the autocast block ends, as on CUDA.
  for_each_tensor(op, stack, [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, kSim); });
  op.callBoxed(stack);
}

void lower(const OperatorHandle& op, Stack* stack) { run_in(at::autocast::get_autocast_dtype(kSim), op, stack); }

void float32(const OperatorHandle& op, Stack* stack) { run_in(at::kFloat, op, stack); }

void widest(const OperatorHandle& op, Stack* stack) {
  auto dtype = at::autocast::get_autocast_dtype(kSim);
  for_each_tensor(op, stack, [&](const Tensor& t) {
    if (is_cast(t) && t.scalar_type() == at::kFloat) dtype = at::kFloat;
    return t;
  });
  run_in(dtype, op, stack);
}

void float32_result(const OperatorHandle& op, Stack* stack) {
  NoAutocast off;
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  if (is_cast((*stack)[first].toTensor())) {
    for (size_t i = 0; i < arguments.size(); i++)
      if (arguments[i].name() == "dtype" && (*stack)[first + i].isNone()) (*stack)[first + i] = at::kFloat;
  }
  op.callBoxed(stack);
}

// norm has overloads with no dtype argument: the ones that have it are called instead.
void norm_with_dtype(const OperatorHandle& op, Stack* stack) {
  NoAutocast off;
  const bool over_dims = op.operator_name().overload_name == "ScalarOpt_dim";
  const Tensor& input = (*stack)[stack->size() - op.schema().arguments().size()].toTensor();
  stack->emplace_back(is_cast(input) ? at::kFloat : input.scalar_type());
  c10::Dispatcher::singleton()
      .findSchemaOrThrow("aten::norm", over_dims ? "ScalarOpt_dim_dtype" : "ScalarOpt_dtype")
      .callBoxed(stack);
}

void banned(const OperatorHandle&, Stack*) {
  TORCH_CHECK(
      false,
      "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast.\n"
      "Many models use a sigmoid layer right before the binary cross entropy layer.\n"
      "In this case, combine the two layers using torch.nn.functional.binary_cross_entropy_with_logits\n"
      "or torch.nn.BCEWithLogitsLoss.  binary_cross_entropy_with_logits and BCEWithLogits are\n"
      "safe to autocast.");
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  for (const auto* name : kLower) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&lower>());
  for (const auto* name : kFloat32) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&float32>());
  for (const auto* name : kFloat32Result) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&float32_result>());
  for (const auto* name : kWidest) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&widest>());
  m.impl("norm.Scalar", torch::CppFunction::makeFromBoxedFunction<&norm_with_dtype>());
  m.impl("norm.ScalarOpt_dim", torch::CppFunction::makeFromBoxedFunction<&norm_with_dtype>());
  m.impl("binary_cross_entropy", torch::CppFunction::makeFromBoxedFunction<&banned>());
}

}  // namespace
}  // namespace sim
