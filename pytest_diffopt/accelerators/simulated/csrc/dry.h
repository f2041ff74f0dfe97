// Dry kernels: what depends on values that nobody computed is not computed either, and everything is counted.
//
// While the device is dry, blocks of more than `real_bytes` are hollow (see memory.h). An operation runs for real unless
// an argument is hollow; then torch's meta kernel says what comes out, and that is hollow, whatever its size. So
// time steps, positions, masks and schedules are right, and no weight is ever needed.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>
#include <string>
#include <vector>

namespace sim {

extern std::atomic<bool> g_dry;
inline bool dry() { return g_dry.load(std::memory_order_relaxed); }
void set_dry(bool on, int64_t real_bytes);
int64_t real_bytes();
// Whether a new block of that size has no memory behind it.
inline bool dry_size(size_t bytes) { return dry() && static_cast<int64_t>(bytes) > real_bytes(); }

bool hollow(const at::Tensor& tensor);

// Raises: a hollow tensor is of no use to an operation that computes.
[[noreturn]] void refuse_hollow(const char* operation);

// Rules are operators of the library `pytest_diffopt_dry`, which Python defines, named after the operators that they are
// for: `kernel__aten__nonzero` stands for aten::nonzero (same schema); `cost__aten__convolution` gets the results before
// the arguments and returns the three numbers of a Workspace.
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

// The host was given a copy of a block that nobody computed.
void note_read(int64_t block);
std::vector<int64_t> blocks_read();

// Where a size or value is not known, the most was taken: said in words, so that whoever reads the bytes knows.
void note_guess(std::string guess);
std::vector<std::string> guesses();

}  // namespace sim
