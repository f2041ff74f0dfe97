// What the Python face calls, as torch.ops.pytest_diffopt_sim.*: plain numbers, so that no Python header is needed and
// one library serves every Python.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "device.h"
#include "dry.h"
#include "fallback.h"
#include "ledger.h"
#include "memory.h"
#include "rules.h"
#include "syncs.h"

namespace sim {
namespace {

// Not composite: torch.export puts other kernels in the place of those for a while, and torch.cuda calls these meanwhile.
struct Functions {
  torch::Library& library;
  template <typename Function>
  void def(const char* name, Function function) {
    library.def(name, torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, std::move(function)));
  }
};

}  // namespace

TORCH_LIBRARY(pytest_diffopt_sim, library) {
  Functions m{library};
  m.def("device_count", []() -> int64_t { return device_count(); });
  m.def("activate", [](int64_t devices, int64_t capability) { activate(devices, capability); });
  m.def("deactivate", []() { deactivate(); });
  m.def("capability", []() -> int64_t { return capability(); });
  m.def("set_capability", [](int64_t capability) { set_capability(capability); });
  m.def("active", []() -> bool { return active(); });
  m.def("current_device", []() -> int64_t { return current_device(); });
  m.def("set_device", [](int64_t device) { set_current_device(device); });
  m.def("check_device", [](int64_t device) { check_device(device); });
  // In the order of face.COUNTERS.
  m.def("counters", [](int64_t device) -> std::vector<int64_t> {
    const Counters c = counters(resolve_device(device));
    return {
        c.allocated,   c.peak_allocated, c.requested,      c.peak_requested, c.reserved,  c.peak_reserved,
        c.allocations, c.frees,          c.allocated_total, c.segments_made, c.segments_freed, c.out_of_memory,
        c.h2d_bytes,   c.d2h_bytes,      c.d2d_bytes,      c.h2d_calls,      c.d2h_calls, c.d2d_calls,
        c.kernels};
  });
  m.def("default_generator", [](int64_t device) -> at::Generator { return default_generator(device); });
  m.def("memory_allocated", [](int64_t device) -> int64_t { return counters(resolve_device(device)).allocated; });
  m.def("reset_peaks", [](int64_t device) { reset_peaks(resolve_device(device)); });
  m.def("reset_counts", [](int64_t device) { reset_counts(resolve_device(device)); });
  m.def("empty_cache", []() { empty_cache(); });
  m.def("allowed", [](int64_t device) -> int64_t { return allowed(resolve_device(device)); });
  m.def("capacity", [](int64_t device) -> int64_t { return capacity(resolve_device(device)); });
  m.def("set_capacity", [](int64_t device, int64_t bytes) { set_capacity(resolve_device(device), bytes); });
  m.def("set_default_capacity", [](int64_t device, int64_t bytes) {
    set_default_capacity(resolve_device(device), bytes);
  });
  m.def("resize_storage", [](const at::Tensor& of, int64_t bytes) {
    resize_storage(*of.storage().unsafeGetStorageImpl(), bytes);
  });
  m.def("set_allowed", [](int64_t device, int64_t bytes) { set_allowed(resolve_device(device), bytes); });
  m.def("set_caching", [](bool on) { set_caching(on); });
  m.def("caching", []() -> bool { return caching(); });
  m.def("record_operations", [](bool on) { record_operations(on); });
  m.def("recorded_operations", []() -> std::vector<std::string> { return recorded_operations(); });
  m.def("synchronize", []() { note_sync("cudaDeviceSynchronize", current_device(), Waits::Elsewhere); });
  m.def("set_sync_debug_mode", [](int64_t mode) { set_sync_debug_mode(mode); });
  m.def("sync_debug_mode", []() -> int64_t { return sync_debug_mode(); });
  // The address of a C function; 0 for none.
  m.def("set_sync_listener", [](int64_t address) { set_sync_listener(reinterpret_cast<SyncListener>(address)); });
  m.def("set_dry", [](bool on, int64_t real_bytes) { set_dry(on, real_bytes); });
  m.def("dry", []() -> bool { return dry(); });
  m.def("real_bytes", []() -> int64_t { return real_bytes(); });
  m.def("hollow", [](const at::Tensor& tensor) -> bool { return hollow(tensor); });
  m.def("forget_rules", []() { forget_rules(); });
  m.def("intercept", [](std::string name, std::string overload) { intercept(name, overload); });
  m.def("stop_intercepting", [](std::string name, std::string overload) { stop_intercepting(name, overload); });
  m.def("blocks_read", []() -> std::vector<int64_t> { return blocks_read(); });
  m.def("note_guess", [](std::string guess) { note_guess(std::move(guess)); });
  m.def("guesses", []() -> std::vector<std::string> { return guesses(); });
  // Held now and at most; of it, pinned.
  m.def("host_counters", []() -> std::vector<int64_t> {
    const HostCounters c = host_counters();
    return {c.allocated, c.peak_allocated, c.pinned, c.peak_pinned};
  });
  m.def("reset_host_peaks", []() { reset_host_peaks(); });
  m.def("count_host_memory", [](bool on) { count_host_memory(on); });
  m.def("empty_host_cache", []() { empty_host_cache(); });
  m.def("use_workspace", [](int64_t device, int64_t low, int64_t expected, int64_t high) {
    use_workspace(resolve_device(device), {low, expected, high});
  });
  m.def("open_ledger", [](bool open, bool only_live) { open_ledger(open, only_live); });
  m.def("replay_reserved", [](int64_t device, int64_t workspaces) -> int64_t {
    return replay_reserved(resolve_device(device), static_cast<int>(workspaces));
  });
  m.def("mark_ledger", [](int64_t mark) { mark_ledger(mark); });
  m.def("ledger_operations", []() -> std::vector<std::string> { return ledger_operations(); });
  // A row an event, in one tensor: a list of as many numbers takes a hundred times as long to cross.
  m.def("ledger_events", []() -> at::Tensor {
    const auto events = ledger_events();
    constexpr int64_t kColumns = sizeof(LedgerEvent) / sizeof(int64_t);
    auto table = at::empty({static_cast<int64_t>(events.size()), kColumns}, at::kLong);
    if (!events.empty()) std::memcpy(table.mutable_data_ptr(), events.data(), events.size() * sizeof(LedgerEvent));
    return table;
  });
  m.def("set_memory_listener", [](int64_t address) { set_memory_listener(reinterpret_cast<MemoryListener>(address)); });
  m.def("block_records", [](int64_t device) -> at::Tensor {
    const auto records = block_records(resolve_device(device));
    constexpr int64_t kColumns = sizeof(BlockRecord) / sizeof(int64_t);
    auto table = at::empty({static_cast<int64_t>(records.size()), kColumns}, at::kLong);
    if (!records.empty()) std::memcpy(table.mutable_data_ptr(), records.data(), records.size() * sizeof(BlockRecord));
    return table;
  });
  m.def("block_numbers", [](at::TensorList tensors) -> std::vector<int64_t> {
    std::vector<int64_t> numbers;
    numbers.reserve(tensors.size());
    for (const auto& tensor : tensors)
      numbers.push_back(tensor.has_storage() ? block_number(*tensor.storage().unsafeGetStorageImpl()) : 0);
    return numbers;
  });
}

}  // namespace sim
