// Where the host waits for the device, as it would for a real GPU: torch's debug mode for it, and who listens.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>
#include <cstdint>

namespace sim {

// torch.cuda.set_sync_debug_mode sees what torch itself waits for. It does not see where CUDA's runtime or a library waits.
enum class Waits { InTorch, Elsewhere };

extern std::atomic<bool> g_syncs_watched;
inline bool syncs_watched() { return g_syncs_watched.load(std::memory_order_relaxed); }

// 0: nothing, 1: warn, 2: raise.
void set_sync_debug_mode(int64_t mode);
int64_t sync_debug_mode();

// Called with the operation, the device and whether torch's debug mode sees it; null for nobody. A plain C function, which
// ctypes makes of a Python one.
using SyncListener = void (*)(const char* operation, int device, int in_torch);
void set_sync_listener(SyncListener listener);

// The host is about to wait. Raises where the debug mode says so.
void note_sync(const char* operation, int device, Waits waits);
// A copy between host and device is about to be made.
void note_copy_sync(const at::Tensor& to, const at::Tensor& from, bool non_blocking, int device);
// What CUDA's kernel for this operation reads on the host: sizes that depend on values, checks of values.
void note_syncs_of(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t first);

}  // namespace sim
