#include "fallback.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/IListRef.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <unordered_set>

#include "aliasing.h"
#include "dry.h"
#include "half.h"
#include "ledger.h"
#include "memory.h"
#include "rules.h"
#include "shapes.h"
#include "syncs.h"

namespace sim {

bool takes_host_indices(const std::string& name) {
  static const std::unordered_set<std::string> names{
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
      "aten::_unsafe_index", "aten::_unsafe_index_put"};
  return names.count(name) > 0;
}

namespace {

std::atomic<bool> g_recording{false};
std::mutex g_recorded_lock;
std::map<std::string, int64_t> g_recorded;

// A number in a tensor of the host goes into elementwise operations and nowhere else, as on CUDA: these are the ones
// that torch does not tag as pointwise, though CUDA does not check their devices.
bool takes_host_numbers(const c10::OperatorHandle& op) {
  static const std::unordered_set<std::string> untagged{
      "aten::__irshift__", "aten::bernoulli_", "aten::binary_cross_entropy", "aten::copysign_", "aten::eq_",
      "aten::fill_", "aten::floor_divide", "aten::floor_divide_", "aten::ge_", "aten::gt_", "aten::heaviside_",
      "aten::index_fill_", "aten::le_", "aten::lt_", "aten::masked_fill_", "aten::mse_loss", "aten::ne_", "aten::rsub",
      "aten::smooth_l1_loss", "aten::where"};
  const auto& name = op.operator_name();
  // who wrote an operation of another library knows where its numbers lie
  return name.getNamespace() != "aten" || op.hasTag(at::Tag::pointwise) || untagged.count(name.name) ||
      takes_host_indices(name.name) || name.name.rfind("aten::_foreach_", 0) == 0 ||
      name.name.rfind("aten::_fused_", 0) == 0;
}

// Draws without a generator argument (dropout) come from the device's generator too, not from the host's.
class DrawsOf {
 public:
  explicit DrawsOf(int device) : drawing_(host_generator(default_generator(device))) {
    auto& host = at::detail::getDefaultCPUGenerator();
    kept_ = host.get_state();
    set(host, drawing_.get_state());
  }
  ~DrawsOf() {
    auto& host = at::detail::getDefaultCPUGenerator();
    set(drawing_, host.get_state());
    set(host, kept_);
  }

 private:
  static void set(const at::Generator& generator, const at::Tensor& state) {
    auto target = generator;
    target.set_state(state);
  }
  at::Generator drawing_;
  at::Tensor kept_;
};

}  // namespace

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  const size_t first = stack->size() - count;
  if (ends_shaping(op)) return end_shaping(op, stack, first);
  if (syncs_watched()) note_syncs_of(op, *stack, first);
  const bool is_dry = any_hollow(*stack, first);
  if (g_recording) {
    std::lock_guard<std::mutex> held(g_recorded_lock);
    g_recorded[toString(op.operator_name())]++;
  }

  const Running running(op.operator_name().name.c_str());
  if (is_dry) {
    if (!dry()) refuse_hollow(Running::operation());
    if (const auto rule = find_rule(Rule::Kernel, op.operator_name())) {
      run_rule(*rule, op, stack, first);
      return;
    }
    if (takes_host_indices(op.operator_name().name)) count_rows(op, (*stack)[first + 1]);
  }
  std::optional<c10::OperatorHandle> cost;
  std::vector<c10::IValue> arguments;
  if (dry() && (cost = find_rule(Rule::Cost, op.operator_name())))
    arguments.assign(stack->begin() + static_cast<int64_t>(first), stack->end());
  std::vector<at::Tensor> written_to;
  const bool shapes = is_dry && is_structured(op);
  Aliases aliases(is_dry);
  bool to_host = false, has_generator = false, host_tensor = false;
  std::optional<c10::Device> stranger;
  const bool host_numbers = takes_host_numbers(op);
  auto pass = [&](const at::Tensor& tensor, bool written) -> at::Tensor {
    if (on_sim(tensor)) {
      if (aliases.index >= 0 && tensor.device().index() != aliases.index) stranger = tensor.device();
      if (is_dry && written) written_to.push_back(tensor);
      const at::Tensor host = aliases.host(tensor);
      return shapes ? tensor : host;
    }
    if (tensor.defined() && tensor.device().is_cpu()) {
      host_tensor = true;
      const bool number = tensor.dim() == 0 && !written && host_numbers;
      if (!number && !stranger) stranger = tensor.device();
      return shapes ? tensor : aliases.keep_on_host(tensor);
    }
    return tensor;
  };
  for (size_t i = first; i < first + count; i++) {
    auto& value = (*stack)[i];
    const auto* alias = schema.arguments()[i - first].alias_info();
    const bool written = alias && alias->isWrite();
    if (value.isTensor()) {
      if (value.toTensor().defined()) value = pass(value.toTensor(), written);
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> passed;
      for (const at::Tensor& tensor : value.toTensorVector()) passed.push_back(pass(tensor, written));
      value = c10::List<at::Tensor>(std::move(passed));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> passed;
      for (const auto& tensor : value.toOptionalTensorVector())
        passed.push_back(tensor.has_value() ? std::optional<at::Tensor>(pass(*tensor, written)) : std::nullopt);
      value = std::move(passed);
    } else if (value.isGenerator()) {
      has_generator = true;
      value = is_dry ? c10::IValue() : c10::IValue(host_generator(value.toGenerator()));
    } else if (value.isDevice()) {
      const auto device = value.toDevice();
      if (device.type() == kSim) {
        if (aliases.index < 0) aliases.index = resolve_device(device.index());
        value = c10::Device(is_dry ? c10::DeviceType::Meta : c10::DeviceType::CPU);
      } else if (device.is_cpu()) {
        to_host = true;
      }
    }
  }
  if (stranger && aliases.index >= 0) {
    TORCH_CHECK(
        stranger->is_cpu() && takes_host_indices(op.operator_name().name),
        "Expected all tensors to be on the same device, but found at least two devices, cuda:", aliases.index, " and ",
        *stranger, "! (when checking arguments of ", toString(op.operator_name()), ")");
  }
  // torch comes here for the generator's sake alone
  TORCH_CHECK(
      !has_generator || !host_tensor || aliases.index >= 0,
      "Expected a 'cpu' device type for generator but found 'cuda'");
  if (aliases.index < 0) aliases.index = current_device();
  if (!shaping()) count_kernel(aliases.index);
  if (ledger_open()) credit_operation(aliases.blocks());

  std::optional<DrawsOf> draws;
  if (!is_dry && !has_generator && op.hasTag(at::Tag::nondeterministic_seeded)) {
    bool given = false;
    for (size_t i = 0; i < count; i++) {
      const auto& type = *schema.arguments()[i].type();
      const auto optional = type.cast<c10::OptionalType>();
      if (optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType) {
        (*stack)[first + i] = host_generator(default_generator(aliases.index));
        given = true;
      }
    }
    if (!given) draws.emplace(aliases.index);
  }
  {
    KernelScope kernel;
    if (shapes) {
      run_shapes(op, stack);
    } else if (is_dry) {
      run_meta_kernel(op, stack);
    } else {
      run_host_kernel(op, stack);
    }
  }
  draws.reset();
  if (!shapes) aliases.carry_back();
  for (const auto& tensor : written_to) make_hollow(*tensor.storage().unsafeGetStorageImpl());
  if (to_host) return;
  std::vector<at::Tensor> results;
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (shapes) {  // they are on the device already
      each_tensor(value, [&](const at::Tensor& tensor) {
        if (on_sim(tensor) && !aliases.holds(tensor)) make_hollow(*tensor.storage().unsafeGetStorageImpl());
      });
    } else if (value.isTensor()) {
      if (value.toTensor().defined()) value = aliases.device(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> returned;
      for (const at::Tensor& tensor : value.toTensorVector()) returned.push_back(aliases.device(tensor));
      value = c10::List<at::Tensor>(std::move(returned));
    }
    if (cost) each_tensor(value, [&](const at::Tensor& tensor) { results.push_back(tensor); });
  }
  if (cost) charge_cost(*cost, aliases.index, results, std::move(arguments));
}

void record_operations(bool on) {
  std::lock_guard<std::mutex> held(g_recorded_lock);
  if (on) g_recorded.clear();
  g_recording = on;
}

std::vector<std::string> recorded_operations() {
  std::lock_guard<std::mutex> held(g_recorded_lock);
  std::vector<std::string> lines;
  for (const auto& [name, times] : g_recorded) lines.push_back(name + " " + std::to_string(times));
  return lines;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// Operations that have a kernel for the CPU besides a composite one: the composite one would be taken. Of structured
// operations it works out shapes, allocates and calls the out= variant, which works them out again; of others its result
// differs from the host's in the last bits, or it looks for a kernel of CUDA's in a table of its own.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto key :
       {c10::DispatchKey::CompositeExplicitAutogradNonFunctional, c10::DispatchKey::CompositeExplicitAutograd,
        c10::DispatchKey::CompositeImplicitAutograd}) {
    for (const auto& name : dispatcher.getRegistrationsForDispatchKey(key)) {
      const auto op = dispatcher.findOp(name);
      // advanced indexing checks its own devices, in words of its own
      if (name.getNamespace() != "aten" || takes_host_indices(name.name) || !op ||
          !op->hasKernelForDispatchKey(c10::DispatchKey::CPU) || op->hasKernelForDispatchKey(c10::DispatchKey::CUDA))
        continue;
      m.impl(toString(name).c_str() + 6, torch::CppFunction::makeFromBoxedFunction<&fallback>());
    }
  }
}

// Composite ones that look for a kernel of CUDA's in a table of its own: ldexp since torch 2.14.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  const auto op = c10::Dispatcher::singleton().findOp({"aten::ldexp", "Tensor"});
  if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd)) return;
  for (const auto* name : {"ldexp.Tensor", "ldexp.out", "ldexp_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// bitsandbytes' kernels for a device that it does not know go through torch.compile and fall back in silence if that
// fails: its kernels for the CPU, but for gemv_4bit, which takes weights in an order of its own on some hosts.
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, m) {
  for (const auto* name :
       {"dequantize_4bit", "dequantize_blockwise", "quantize_blockwise", "int8_linear_matmul"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace sim
