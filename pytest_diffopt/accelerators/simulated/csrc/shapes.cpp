#include "shapes.h"

#include <ATen/core/IListRef.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/empty.h>

#include <string_view>

#include "aliasing.h"
#include "dry.h"
#include "ledger.h"
#include "memory.h"
#include "rules.h"

namespace sim {
namespace {

thread_local const c10::OperatorHandle* t_shaping = nullptr;

class Shaping {
 public:
  explicit Shaping(const c10::OperatorHandle* op) : outer_(t_shaping) { t_shaping = op; }
  ~Shaping() { t_shaping = outer_; }
  Shaping(const Shaping&) = delete;

 private:
  const c10::OperatorHandle* outer_;
};

}  // namespace

bool shaping() { return t_shaping != nullptr; }

void count_rows(const c10::OperatorHandle& op, c10::IValue& indices) {
  c10::List<std::optional<at::Tensor>> taken;
  for (const auto& index : indices.toOptionalTensorVector()) {
    const bool mask = index.has_value() && index->defined() &&
        (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte);
    if (!mask) {
      taken.push_back(index);
      continue;
    }
    int64_t rows = index->numel();
    if (hollow(*index)) {
      note_guess(toString(op.operator_name()) + " by a mask: every element of the mask was taken");
    } else {
      Aliases aliases;
      KernelScope kernel;
      rows = at::count_nonzero(on_sim(*index) ? aliases.host(*index) : *index).item<int64_t>();
    }
    for (int64_t dimension = 0; dimension < index->dim(); dimension++)
      taken.push_back(at::empty({rows}, at::TensorOptions(at::kLong).device(c10::DeviceType::Meta)));
  }
  indices = std::move(taken);
}

bool is_structured(const c10::OperatorHandle& op) {
  return op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional);
}

void run_shapes(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Shaping shaping(&op);
  // the composite kernel is that of every device of a third party that has no kernel of its own
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::PrivateUse3), stack);
}

bool ends_shaping(const c10::OperatorHandle& op) {
  if (!t_shaping) return false;
  std::string_view shaped = t_shaping->operator_name().name;
  if (shaped.back() == '_') shaped.remove_suffix(1);
  return op.operator_name().name == shaped && op.schema().is_mutable();
}

void end_shaping(const c10::OperatorHandle& op, torch::jit::Stack* stack, size_t first) {
  const auto& arguments = op.schema().arguments();
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); i++)
    if (arguments[i].alias_info() && arguments[i].alias_info()->isWrite())
      each_tensor((*stack)[first + i], [&](const at::Tensor& tensor) { written.push_back(tensor); });
  const Running running(t_shaping->operator_name().name.c_str());
  std::vector<int64_t> blocks;
  for (const auto& tensor : written) {
    auto& storage = *tensor.storage().unsafeGetStorageImpl();
    make_hollow(storage);
    blocks.push_back(block_number(storage));
  }
  if (ledger_open()) credit_operation(blocks);
  stack->resize(first);
  if (op.schema().returns().size() == written.size())
    for (auto& tensor : written) stack->emplace_back(std::move(tensor));
}

void run_meta_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool known = op.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta);
  try {
    if (known) op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), stack);
  } catch (const std::exception& error) {
    // torch has one meta kernel for all operations that lack one, which says so; repeat_interleave's needs values
    const std::string_view said(error.what());
    if (said.find("no fake impl or Meta kernel registered") == std::string_view::npos &&
        said.find("repeat_interleave a meta tensor") == std::string_view::npos)
      throw;
    known = false;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      known, "On the dry device ", toString(op.operator_name()),
      " has neither a meta kernel nor a rule, so nobody knows what it returns. pytest_diffopt.accelerators.simulated.register_dry_kernel gives it one.");
}

}  // namespace sim
