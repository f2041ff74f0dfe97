#include "half.h"

#include <algorithm>
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
  if (!is_product(op.operator_name().name)) return op.redispatchBoxed(host, stack);
  const auto& arguments = op.schema().arguments();
  const auto first = stack->end() - static_cast<int64_t>(arguments.size());
  std::vector<Tensor> tensors;
  std::for_each(first, stack->end(), [&](const c10::IValue& value) {
    if (value.isTensor()) tensors.push_back(value.toTensor());
  });
  const Widening half(tensors);
  if (!half) return op.redispatchBoxed(host, stack);
  Tensor given, written;  // what the operation writes to, and the copy that the kernel writes to
  for (size_t i = 0; i < arguments.size(); i++) {
    auto& value = first[static_cast<int64_t>(i)];
    if (!value.isTensor()) continue;
    const Tensor argument = value.toTensor();
    value = half.wide(argument);
    if (arguments[i].alias_info() && arguments[i].alias_info()->isWrite()) given = argument, written = value.toTensor();
  }
  op.redispatchBoxed(host, stack);
  auto& result = stack->back();
  if (!given.defined()) {
    result = half.rounded(result.toTensor());
    return;
  }
  if (given.sizes() != written.sizes()) given.resize_(written.sizes());  // the kernel has warned of it
  given.copy_(written);
  result = given;
}

}  // namespace sim
