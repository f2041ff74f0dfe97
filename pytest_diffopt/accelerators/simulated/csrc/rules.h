// The rules of a dry device, which Python adds: kernels that stand for operations, and what operations cost.
//
// A rule is an operator of the library `pytest_diffopt_dry`, which Python defines, named after the operator that it is for:
// `kernel__aten__nonzero` stands for aten::nonzero (same schema); `cost__aten__convolution` gets the results before the
// arguments and returns the three numbers of a Workspace.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <vector>

namespace sim {

enum class Rule { Kernel, Cost };

template <class Visit>
void each_tensor(const c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) visit(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const auto& tensor : value.toOptionalTensorVector())
      if (tensor.has_value()) visit(*tensor);
  }
}
// Whether one of the arguments is, from `first` on.
bool any_hollow(const torch::jit::Stack& stack, size_t first);
// Rules came or went.
void forget_rules();
std::optional<c10::OperatorHandle> find_rule(Rule rule, const c10::OperatorName& name);

// Runs the rule for an operation. It allocates with aten::empty: that is the doing of the operation that it stands for.
void run_rule(const c10::OperatorHandle& rule, const c10::OperatorHandle& op, torch::jit::Stack* stack, size_t first);

// An operator with a composite kernel and none of the device's own never asks for a rule: from here on it does, and where
// there is none its composite kernel runs as before.
void intercept(const std::string& name, const std::string& overload);
void stop_intercepting(const std::string& name, const std::string& overload);

// Charges the workspace that a cost rule finds for this call; `arguments` as the operator got them.
void charge_cost(
    const c10::OperatorHandle& rule, int device, const std::vector<at::Tensor>& results,
    std::vector<c10::IValue> arguments);

}  // namespace sim
