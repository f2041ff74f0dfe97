#include "dry.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <utility>

#include "memory.h"

namespace sim {

std::atomic<bool> g_dry{false};

namespace {

std::atomic<int64_t> g_real_bytes{0};

using Key = std::pair<Rule, c10::OperatorName>;
struct Before {
  bool operator()(const Key& a, const Key& b) const {
    if (a.first != b.first) return a.first < b.first;
    if (a.second.name != b.second.name) return a.second.name < b.second.name;
    return a.second.overload_name < b.second.overload_name;
  }
};
struct Shared {
  std::mutex lock;
  std::map<Key, std::optional<c10::OperatorHandle>, Before> rules;  // those that were looked for, found or not
  std::vector<std::string> guesses;
};
Shared& shared() {
  static auto* the = new Shared();  // never destroyed: tensors outlive static destructors
  return *the;
}

std::string rule_name(Rule rule, const std::string& name) {
  std::string mangled = name;
  if (const auto at = mangled.find("::"); at != std::string::npos) mangled.replace(at, 2, "__");
  return std::string("pytest_diffopt_dry::") + (rule == Rule::Kernel ? "kernel__" : "cost__") + mangled;
}

}  // namespace

void set_dry(bool on, int64_t real_bytes) {
  if (on && !dry()) {
    std::lock_guard<std::mutex> held(shared().lock);
    shared().guesses.clear();
  }
  g_real_bytes = real_bytes;
  g_dry = on;
}

int64_t real_bytes() { return g_real_bytes.load(std::memory_order_relaxed); }

bool hollow(const at::Tensor& tensor) {
  return tensor.defined() && tensor.has_storage() && hollow(*tensor.storage().unsafeGetStorageImpl());
}

void refuse_hollow(const char* operation) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !dry(), "On the dry device the value of a tensor is needed that nobody computed, and there is no rule for it (when "
              "running ", operation, "). torch.sim.register_dry_kernel gives it one.");
  TORCH_CHECK(
      false, "A tensor of the simulated device was made while it was dry and has no data; the device is not dry any more "
             "(when running ", operation, ").");
}

void forget_rules() {
  std::lock_guard<std::mutex> held(shared().lock);
  shared().rules.clear();
}

std::optional<c10::OperatorHandle> find_rule(Rule rule, const c10::OperatorName& name) {
  auto& the = shared();
  std::lock_guard<std::mutex> held(the.lock);
  const Key key{rule, name};
  auto found = the.rules.find(key);
  if (found == the.rules.end()) {
    const auto op = c10::Dispatcher::singleton().findSchema({rule_name(rule, name.name), name.overload_name});
    found = the.rules.emplace(key, op).first;
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

void note_guess(std::string guess) {
  auto& the = shared();
  std::lock_guard<std::mutex> held(the.lock);
  for (const auto& known : the.guesses)
    if (known == guess) return;
  the.guesses.push_back(std::move(guess));
}

std::vector<std::string> guesses() {
  std::lock_guard<std::mutex> held(shared().lock);
  return shared().guesses;
}

}  // namespace sim
