#include "rules.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "aliasing.h"
#include "dry.h"
#include "ledger.h"
#include "memory.h"

namespace sim {
namespace {

using Key = std::pair<Rule, c10::OperatorName>;
struct Before {
  bool operator()(const Key& a, const Key& b) const {
    if (a.first != b.first) return a.first < b.first;
    if (a.second.name != b.second.name) return a.second.name < b.second.name;
    return a.second.overload_name < b.second.overload_name;
  }
};
struct Rules {
  std::mutex lock;
  std::map<Key, std::optional<c10::OperatorHandle>, Before> found;  // those that were looked for, there or not
  std::map<std::pair<std::string, std::string>, c10::RegistrationHandleRAII> intercepted;
};
Rules& rules() {
  static auto* the = new Rules();  // never destroyed: tensors outlive static destructors
  return *the;
}

std::vector<int64_t> blocks_from(const torch::jit::Stack& stack, size_t first) {
  std::vector<int64_t> blocks;
  for (size_t i = first; i < stack.size(); i++)
    each_tensor(stack[i], [&](const at::Tensor& tensor) {
      if (on_sim(tensor)) blocks.push_back(block_number(*tensor.storage().unsafeGetStorageImpl()));
    });
  return blocks;
}

std::string rule_name(Rule rule, const std::string& name) {
  std::string mangled = name;
  if (const auto at = mangled.find("::"); at != std::string::npos) mangled.replace(at, 2, "__");
  return std::string("pytest_diffopt_dry::") + (rule == Rule::Kernel ? "kernel__" : "cost__") + mangled;
}

// The composite kernel is that of every device of a third party that has no kernel of its own.
void rule_or_composite(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  if (dry() && any_hollow(*stack, first))
    if (const auto rule = find_rule(Rule::Kernel, op.operator_name())) return run_rule(*rule, op, stack, first);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::PrivateUse3), stack);
}

}  // namespace

bool any_hollow(const torch::jit::Stack& stack, size_t first) {
  bool found = false;
  for (size_t i = first; i < stack.size() && !found; i++)
    each_tensor(stack[i], [&](const at::Tensor& tensor) { found = found || hollow(tensor); });
  return found;
}

void run_rule(const c10::OperatorHandle& rule, const c10::OperatorHandle& op, torch::jit::Stack* stack, size_t first) {
  const Running running(op.operator_name().name.c_str());
  for (size_t i = first; i < stack->size(); i++) {
    if (!(*stack)[i].isTensor() || !on_sim((*stack)[i].toTensor())) continue;
    count_kernel((*stack)[i].toTensor().device().index());
    break;
  }
  if (ledger_open()) credit_operation(blocks_from(*stack, first));
  std::vector<at::Tensor> arguments, written;
  for (size_t i = first; i < stack->size(); i++) {
    const auto* alias = op.schema().arguments()[i - first].alias_info();
    each_tensor((*stack)[i], [&](const at::Tensor& tensor) {
      if (!on_sim(tensor)) return;
      arguments.push_back(tensor);
      if (alias && alias->isWrite()) written.push_back(tensor);
    });
  }
  KernelScope kernel;
  rule.callBoxed(stack);
  // whoever wrote the rule knows sizes and no values: what comes out is hollow, however small it is
  for (const auto& tensor : written) make_hollow(*tensor.storage().unsafeGetStorageImpl());
  const size_t results = stack->size() - op.schema().returns().size();
  for (size_t i = results; i < stack->size(); i++)
    each_tensor((*stack)[i], [&](const at::Tensor& tensor) {
      const bool given = std::any_of(arguments.begin(), arguments.end(), [&](const at::Tensor& argument) {
        return argument.storage().unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl();
      });
      if (on_sim(tensor) && !given) make_hollow(*tensor.storage().unsafeGetStorageImpl());
    });
  if (ledger_open()) credit_operation(blocks_from(*stack, results));
}

void intercept(const std::string& name, const std::string& overload) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  if (op.hasKernelForDispatchKey(c10::DispatchKey::CUDA) || !op.hasComputedKernelForDispatchKey(c10::DispatchKey::PrivateUse3))
    return;
  auto handle = c10::Dispatcher::singleton().registerImpl(
      op.operator_name(), c10::DispatchKey::CUDA,
      c10::KernelFunction::makeFromBoxedFunction<&rule_or_composite>(), std::nullopt, nullptr,
      "a rule of the dry simulated device");
  std::lock_guard<std::mutex> held(rules().lock);
  rules().intercepted.insert_or_assign({name, overload}, std::move(handle));
}

void stop_intercepting(const std::string& name, const std::string& overload) {
  std::optional<c10::RegistrationHandleRAII> gone;
  std::lock_guard<std::mutex> held(rules().lock);
  auto& all = rules().intercepted;
  if (const auto found = all.find({name, overload}); found != all.end()) {
    gone.emplace(std::move(found->second));
    all.erase(found);
  }
}

void forget_rules() {
  std::lock_guard<std::mutex> held(rules().lock);
  rules().found.clear();
}

std::optional<c10::OperatorHandle> find_rule(Rule rule, const c10::OperatorName& name) {
  auto& the = rules();
  std::lock_guard<std::mutex> held(the.lock);
  const Key key{rule, name};
  auto found = the.found.find(key);
  if (found == the.found.end()) {
    const auto op = c10::Dispatcher::singleton().findSchema({rule_name(rule, name.name), name.overload_name});
    found = the.found.emplace(key, op).first;
  }
  return found->second;
}

void charge_cost(
    const c10::OperatorHandle& rule, int device, const std::vector<at::Tensor>& results,
    std::vector<c10::IValue> arguments) {
  torch::jit::Stack stack;
  stack.emplace_back(results);
  for (auto& argument : arguments) stack.push_back(std::move(argument));
  rule.callBoxed(&stack);
  const auto numbers = stack.back().toIntVector();
  TORCH_CHECK_VALUE(
      numbers.size() == 3 && 0 <= numbers[0] && numbers[0] <= numbers[1] && numbers[1] <= numbers[2],
      "The cost of an operation is three numbers of bytes in rising order: at the least, expected, at the most; found ",
      numbers);
  use_workspace(device, {numbers[0], numbers[1], numbers[2]});
}

}  // namespace sim
