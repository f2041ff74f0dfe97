#include "half.h"

#include <string>
#include <unordered_set>
#include <vector>

namespace sim {
namespace {

using at::Tensor;

bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

bool is_product(const std::string& name) {
  static const std::unordered_set<std::string> names{
      "aten::mm", "aten::addmm", "aten::addmm_", "aten::_addmm_activation", "aten::bmm", "aten::baddbmm", "aten::baddbmm_",
      "aten::addbmm", "aten::addbmm_", "aten::addmv", "aten::addmv_", "aten::dot", "aten::vdot"};
  return names.count(name) > 0;
}

// What the result is rounded to, if the host's kernel is to run in float32 for it.
std::optional<c10::ScalarType> rounded_to(const std::string& name, c10::IValue* arguments, size_t count) {
  if (is_product(name)) {
    std::vector<Tensor> tensors;
    for (auto* value = arguments; value != arguments + count; ++value)
      if (value->isTensor()) tensors.push_back(value->toTensor());
    return Widening(tensors).dtype();
  }
  // CUDA has kernels for a softmax of float16 in float32, and for its gradient; the host's refuse both
  if ((name == "aten::_softmax" || name == "aten::_log_softmax") && arguments[2].toBool()) {
    arguments[2] = false;
    return at::kFloat;
  }
  if ((name == "aten::_softmax_backward_data" || name == "aten::_log_softmax_backward_data") &&
      arguments[0].toTensor().scalar_type() == at::kFloat && arguments[3].toScalarType() == at::kHalf) {
    arguments[3] = at::kFloat;
    return at::kHalf;
  }
  return std::nullopt;
}

}  // namespace

Widening::Widening(c10::ArrayRef<Tensor> arguments) {
  for (const auto& argument : arguments) {
    if (!argument.defined()) continue;
    if (!is_half(argument) || dtype_.value_or(argument.scalar_type()) != argument.scalar_type()) {
      dtype_.reset();
      return;
    }
    dtype_ = argument.scalar_type();
  }
}

Tensor Widening::wide(const Tensor& argument) const {
  return dtype_ && argument.defined() && is_half(argument) ? argument.to(at::kFloat) : argument;
}

Tensor Widening::rounded(const Tensor& result) const {
  return dtype_ && result.defined() ? result.to(*dtype_) : result;
}

void run_host_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto host = c10::DispatchKeySet(c10::DispatchKey::CPU);
  const auto& arguments = op.schema().arguments();
  auto* first = stack->data() + stack->size() - arguments.size();
  const auto dtype = rounded_to(op.operator_name().name, first, arguments.size());
  if (!dtype) return op.redispatchBoxed(host, stack);
  Tensor given, written;  // what the operation writes to, and the copy that the kernel writes to
  for (size_t i = 0; i < arguments.size(); i++) {
    if (!first[i].isTensor() || !is_half(first[i].toTensor())) continue;
    const Tensor argument = first[i].toTensor();
    first[i] = argument.to(at::kFloat);
    if (arguments[i].alias_info() && arguments[i].alias_info()->isWrite()) given = argument, written = first[i].toTensor();
  }
  op.redispatchBoxed(host, stack);
  auto& result = stack->back();
  if (!given.defined()) {
    result = result.toTensor().to(*dtype);
    return;
  }
  if (given.sizes() != written.sizes()) given.resize_(written.sizes());  // the kernel has warned of it
  given.copy_(written);
  result = given;
}

}  // namespace sim
