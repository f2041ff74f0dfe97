// Memory of the simulated devices: ordinary host memory, with every byte charged to the device that holds it.
#pragma once
#include <c10/core/Allocator.h>
#include <c10/core/StorageImpl.h>

#include <cstdint>
#include <string>
#include <vector>

namespace sim {

// What happens to a device's memory, as torch's history of it has it.
enum class MemoryAction { Alloc, Free, SegmentAlloc, SegmentFree, OutOfMemory };
// Called with an action, the device, an address, bytes and, out of memory, the bytes that are free; null for nobody.
using MemoryListener = void (*)(int action, int device, int64_t address, int64_t bytes, int64_t free);
void set_memory_listener(MemoryListener listener);

// A block in a segment; without the caching allocator each is a segment of its own, and has its data's address.
struct BlockRecord {
  int64_t segment, segment_bytes, small;
  int64_t address, bytes, requested, taken;
};
std::vector<BlockRecord> block_records(int device);
// Where the addresses of the caching allocator's book-keeping begin: nothing lies there.
constexpr int64_t kModelAddresses = int64_t(0x7e) << 40;

// What one device has counted. `allocated` is what tensors hold; `reserved` is what the device has set aside for them.
struct Counters {
  int64_t allocated = 0, peak_allocated = 0;
  int64_t requested = 0, peak_requested = 0;
  int64_t reserved = 0, peak_reserved = 0;
  int64_t allocated_total = 0;
  int64_t allocations = 0, frees = 0;
  int64_t segments_made = 0, segments_freed = 0;
  int64_t out_of_memory = 0;
  int64_t h2d_bytes = 0, d2h_bytes = 0, d2d_bytes = 0;
  int64_t h2d_calls = 0, d2h_calls = 0, d2d_calls = 0;
  int64_t kernels = 0;
};

// What torch's allocators hold of the host's memory.
struct HostCounters {
  int64_t allocated = 0, peak_allocated = 0;
  int64_t pinned = 0, peak_pinned = 0;
};

// A host block from this size on has fresh pages of its own while the device is dry: they cost nothing until they are
// touched, and are noughts.
constexpr size_t kLazyBytes = size_t(1) << 20;

enum class Direction { HostToDevice, DeviceToHost, DeviceToDevice };

c10::Allocator* device_allocator();
c10::Allocator* host_allocator();
c10::Allocator* pinned_allocator();

// The host allocator becomes torch's own for the CPU, so that what a CPU kernel allocates can be handed to a device.
void install_allocators();
// torch's own allocator for the host is in its place again. Blocks of ours live on.
void uninstall_allocators();

bool is_pinned(const void* pointer);

// A number that no other block of this process ever has, on the host too. Memory that our allocators did not make has its
// address, negative: another may have it later.
int64_t block_number(const c10::StorageImpl& storage);

// Takes the memory of a host storage for a device, without a copy if our host allocator made it. May raise out of memory.
c10::DataPtr adopt(c10::StorageImpl& host, int device);

// A block may be hollow: charged like any other, with no memory behind it, as nobody computed what it would hold. Where
// its data would begin is an address that faults when it is touched.
bool hollow(const c10::StorageImpl& storage);
c10::DataPtr take_hollow(size_t bytes, int device);
// What a device's storage holds is not known from here on; its block stays the same one.
void make_hollow(c10::StorageImpl& storage);

// Another size for a device's storage, which keeps what it holds. As torch's own, but it reads no hollow block.
void resize_storage(c10::StorageImpl& storage, size_t bytes);

// Host memory into which something unknown was copied. Told only of memory that our allocators made.
bool unknown_on_host(const c10::StorageImpl& storage);
void mark_unknown_on_host(const c10::StorageImpl& storage);
// All of it was overwritten by something known.
void mark_known_on_host(const c10::StorageImpl& storage);

// What a kernel takes while it runs: at the least, as expected, at the most. The expected is charged and given back.
struct Workspace {
  int64_t low = 0, expected = 0, high = 0;
};
void use_workspace(int device, const Workspace& workspace);

void count_copy(int device, Direction direction, int64_t bytes);
void count_kernel(int device);

Counters counters(int device);
HostCounters host_counters();
void reset_host_peaks();
void empty_host_cache();
void count_host_memory(bool on);
void reset_peaks(int device);
void reset_counts(int device);
void empty_cache();

int64_t capacity(int device);
// Negative for what it began with.
void set_capacity(int device, int64_t bytes);
void set_default_capacity(int device, int64_t bytes);
// What this process may reserve of it.
int64_t allowed(int device);
void set_allowed(int device, int64_t bytes);

// Round and keep blocks as CUDA's caching allocator does, or (false) count each byte as it was asked for.
void set_caching(bool caching);
bool caching();

}  // namespace sim
