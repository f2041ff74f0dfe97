// What happened to each device's memory, in order: what was allocated, freed and copied, and which operation did it.
#pragma once
#include <c10/core/StorageImpl.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace sim {

// The name of the operation that this thread is in, for as long as it stands; an inner one takes its place.
class Running {
 public:
  explicit Running(const char* operation) : outer_(t_operation) { t_operation = operation; }
  ~Running() { t_operation = outer_; }
  Running(const Running&) = delete;
  static const char* operation() { return t_operation; }

 private:
  const char* outer_;
  static thread_local const char* t_operation;
};

struct LedgerEvent {
  int64_t block;   // the block that came, went or was written to
  int64_t bytes;   // charged; negative where it was freed, 0 for a copy
  int64_t source;  // the block that a copy reads, else 0
  int64_t pinned;  // whether that is pinned
  int64_t operation;
  int64_t mark;
  int64_t device;
  int64_t low, high;  // of a kernel's workspace, which is given back at once: at the least and at the most; else 0
};

extern std::atomic<bool> g_ledger_open;
inline bool ledger_open() { return g_ledger_open.load(std::memory_order_relaxed); }

// Begins (forgetting the last recording) or ends to write events down; with only_live the blocks that are gone again are
// forgotten from time to time, so that a recording may go on for hours.
void open_ledger(bool open, bool only_live);
// Stands in every later event.
void mark_ledger(int64_t mark);
void note_memory(int64_t block, int64_t bytes, int device);
// The block that was taken last, or none if that is expected to take nothing, is a kernel's workspace.
void note_workspace(int64_t block, int64_t low, int64_t high, int device);
// Most operations get the memory for their result from aten::empty: what this thread took there is the doing of the
// operation that comes next, if that is given it.
void credit_operation(const std::vector<int64_t>& blocks);
void note_copy(const c10::StorageImpl& to, const c10::StorageImpl& from, int device);
// The cache of every device was given back.
void note_empty_cache();
std::vector<LedgerEvent> ledger_events();
// The most that CUDA's caching allocator reserves on a device for what was written down, in bytes: with kernels' workspaces
// at the least (0), as expected (1) or at the most (2).
int64_t replay_reserved(int device, int workspaces);
// What LedgerEvent.operation counts through; the first is "", memory that no operation took or gave back.
std::vector<std::string> ledger_operations();

}  // namespace sim
