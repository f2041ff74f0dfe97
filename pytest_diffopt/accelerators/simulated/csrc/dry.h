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
// Rules came or went.
void forget_rules();
std::optional<c10::OperatorHandle> find_rule(Rule rule, const c10::OperatorName& name);

// Charges the workspace that a cost rule finds for this call; `arguments` as the operator got them.
void charge_cost(
    const c10::OperatorHandle& rule, int device, const std::vector<at::Tensor>& results,
    std::vector<c10::IValue> arguments);

// Where a size or value is not known, the most was taken: said in words, so that whoever reads the bytes knows.
void note_guess(std::string guess);
std::vector<std::string> guesses();

}  // namespace sim
