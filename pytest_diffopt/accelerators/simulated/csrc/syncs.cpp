#include "syncs.h"

#include <c10/util/Exception.h>

#include <string_view>
#include <unordered_map>

#include "aliasing.h"
#include "device.h"
#include "memory.h"
#include "rules.h"
#include "shapes.h"

namespace sim {

std::atomic<bool> g_syncs_watched{false};

namespace {

std::atomic<int> g_mode{0};
std::atomic<SyncListener> g_listener{nullptr};

void look_again() { g_syncs_watched = g_mode != 0 || g_listener.load() != nullptr; }

// CUDA puts a host block of at most so many bytes into its command buffer, and stages larger ones that are not pinned.
constexpr int64_t kStagedBytes = 64 * 1024;

struct Found {
  int times = 0;
  Waits waits = Waits::InTorch;
};

using Arguments = c10::ArrayRef<c10::IValue>;

bool is_mask(const at::Tensor& index) { return index.scalar_type() == at::kBool || index.scalar_type() == at::kByte; }

// A mask on the device is turned into positions, whose number the host reads; positions on the host are sent there. A mask
// on the host is counted there, and its positions are sent from pinned memory.
int of_indices(const c10::IValue& indices) {
  int times = 0;
  each_tensor(indices, [&](const at::Tensor& index) {
    if (index.defined()) times += on_sim(index) ? is_mask(index) : !is_mask(index) && index.numel() > 0;
  });
  return times;
}

Found of_index_put(Arguments given) {
  const auto& value = given[2].toTensor();
  const bool accumulate = given[3].toBool();
  if (!accumulate && value.numel() == 1 && value.device().is_cpu()) {  // as torch: one mask and a number is masked_fill_
    int indices = 0, masks = 0;
    each_tensor(given[1], [&](const at::Tensor& index) {
      if (!index.defined()) return;
      indices++;
      masks += is_mask(index) && on_sim(index);
    });
    if (indices == 1 && masks == 1) return {};
  }
  return {of_indices(given[1]) + (value.device().is_cpu() && value.numel() > 0)};
}

Found once(Arguments) { return {1}; }

Found once_unless_empty(Arguments given) { return {given[0].toTensor().numel() > 0}; }

// thrust sorts and counts rows, and waits for it by itself
Found by_rows(Arguments given) { return {given[0].toTensor().numel() > 0, Waits::Elsewhere}; }

Found of_unique_consecutive(Arguments given) { return given[3].isNone() ? once_unless_empty(given) : by_rows(given); }

Found of_equal(Arguments given) {
  const auto &a = given[0].toTensor(), &b = given[1].toTensor();
  const bool same = a.is_alias_of(b) && a.storage_offset() == b.storage_offset() && a.dtype() == b.dtype() &&
      a.strides().equals(b.strides()) && a.is_conj() == b.is_conj() && a.is_neg() == b.is_neg();
  return {a.sizes().equals(b.sizes()) && a.numel() > 0 && !same};
}

// the sum of all, and whether one is negative
Found of_repeats(Arguments given) { return {given[1].isNone() && given[0].toTensor().numel() > 0 ? 2 : 0}; }

// the least, unless it cannot be negative, and the greatest
Found of_bincount(Arguments given) {
  const auto& values = given[0].toTensor();
  return {values.numel() == 0 ? 0 : values.scalar_type() == at::kByte ? 1 : 2};
}

Found of_histc(Arguments given) { return {given[2].toScalar().toDouble() == given[3].toScalar().toDouble() ? 2 : 0}; }

// whether they are probabilities, and whether their sum is nought
Found of_multinomial(Arguments given) { return {!given[2].toBool() || given[1].toInt() == 1 ? 2 : 0}; }


// whether a deviation is negative
Found of_normal(Arguments given) { return {given[1].isTensor() && given[1].toTensor().numel() > 0}; }

const std::unordered_map<std::string_view, Found (*)(Arguments)>& kernels_that_wait() {
  static const std::unordered_map<std::string_view, Found (*)(Arguments)> all{
      {"aten::_index_put_impl_", of_index_put},
      {"aten::_unique", once_unless_empty},
      {"aten::_unique2", once_unless_empty},
      {"aten::bincount", of_bincount},
      {"aten::equal", of_equal},
      {"aten::histc", of_histc},
      {"aten::masked_select", once},
      {"aten::mode", by_rows},
      {"aten::multinomial", of_multinomial},
      {"aten::nonzero", once},
      {"aten::normal", of_normal},
      {"aten::repeat_interleave", of_repeats},
      {"aten::unique_consecutive", of_unique_consecutive},
      {"aten::unique_dim", by_rows},
      {"aten::unique_dim_consecutive", by_rows},
  };
  return all;
}

}  // namespace

void set_sync_debug_mode(int64_t mode) {
  TORCH_CHECK(mode >= 0 && mode <= 2, "invalid value of debug_mode, expected one of 0,1,2");
  g_mode = static_cast<int>(mode);
  look_again();
}

int64_t sync_debug_mode() { return g_mode; }

void set_sync_listener(SyncListener listener) {
  g_listener = listener;
  look_again();
}

void note_sync(const char* operation, int device, Waits waits) {
  if (!syncs_watched()) return;
  if (const auto listener = g_listener.load()) listener(operation, device, waits == Waits::InTorch);
  if (waits != Waits::InTorch) return;
  TORCH_CHECK(g_mode != 2, "called a synchronizing CUDA operation");
  if (g_mode == 1) TORCH_WARN("called a synchronizing CUDA operation");
}

void note_copy_sync(const at::Tensor& to, const at::Tensor& from, bool non_blocking, int device) {
  if (!syncs_watched() || on_sim(to) == on_sim(from) || to.numel() == 0) return;
  const char* name = on_sim(to) ? "aten::copy_ to the device" : "aten::copy_ to the host";
  if (!non_blocking) return note_sync(name, device, Waits::InTorch);
  const auto& host = on_sim(to) ? from : to;
  // what is laid out or shaped otherwise crosses in a block of its own, which is not pinned
  const bool pinned = is_pinned(host.storage().data()) && host.is_contiguous() && to.sizes().equals(from.sizes());
  if (pinned || (on_sim(to) && static_cast<int64_t>(from.nbytes()) <= kStagedBytes)) return;
  note_sync(name, device, Waits::Elsewhere);
}

void note_syncs_of(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t first) {
  const auto& name = op.operator_name().name;
  const auto& all = kernels_that_wait();
  const auto found = all.find(name);
  if (found == all.end() || shaping()) return;
  const Arguments given(stack.data() + first, stack.size() - first);
  int device = -1;
  for (const auto& value : given)
    each_tensor(value, [&](const at::Tensor& tensor) {
      if (device < 0 && on_sim(tensor)) device = tensor.device().index();
    });
  if (device < 0) return;
  const Found wait = found->second(given);
  for (int i = 0; i < wait.times; i++) note_sync(name.c_str(), device, wait.waits);
}

}  // namespace sim
