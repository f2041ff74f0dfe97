#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "caching.h"
#include "device.h"
#include "ledger.h"

namespace sim {
namespace {

constexpr int64_t kDefaultCapacity = int64_t(16) << 30;
constexpr int kHost = -1;

struct Memory {
  Counters counters;
  CachingModel cache;
  int64_t uncached = 0;  // reserved for blocks that were taken while caching was off
  int64_t capacity = kDefaultCapacity;
  int64_t allowed = kDefaultCapacity;
};

// One lock for everything: blocks are freed by whichever thread drops the last reference.
std::mutex& lock() {
  static auto* mutex = new std::mutex();  // never destroyed: tensors outlive static destructors
  return *mutex;
}
std::array<Memory, kMaxDevices>& memories() {
  static auto* all = new std::array<Memory, kMaxDevices>();
  return *all;
}
bool g_caching = false;

// Stands right before each block, on the device and on the host: the same layout lets a host block change sides.
struct Header {
  int64_t requested;
  int64_t charged;
  Block* block;  // null if it was not taken through the cache
  int64_t number;
  int32_t device;
};
constexpr size_t kHeaderBytes = 64;  // keeps torch's alignment of host memory
static_assert(sizeof(Header) <= kHeaderBytes);

std::atomic<int64_t> g_next_number{1};

Header& header_of(void* data) { return *reinterpret_cast<Header*>(static_cast<char*>(data) - kHeaderBytes); }

std::string in_units(int64_t bytes) {
  char text[64];
  if (bytes <= 1024) {
    std::snprintf(text, sizeof text, "%lld bytes", static_cast<long long>(bytes));
  } else if (bytes <= (int64_t(1) << 20)) {
    std::snprintf(text, sizeof text, "%.2f KiB", bytes / 1024.0);
  } else if (bytes <= (int64_t(1) << 30)) {
    std::snprintf(text, sizeof text, "%.2f MiB", bytes / 1048576.0);
  } else {
    std::snprintf(text, sizeof text, "%.2f GiB", bytes / 1073741824.0);
  }
  return text;
}

void update_reserved(Memory& memory) {
  auto& c = memory.counters;
  c.reserved = memory.uncached + memory.cache.reserved();
  c.peak_reserved = std::max(c.peak_reserved, c.reserved);
  c.segments_made = memory.cache.segments_made();
  c.segments_freed = memory.cache.segments_freed();
}

// The lock is held. Fills the header, or raises and leaves everything as it was.
void charge(Header& header, int device, int64_t bytes) {
  auto& memory = memories()[device];
  auto& c = memory.counters;
  const auto room = [&] { return memory.allowed - memory.uncached - memory.cache.reserved(); };
  Block* block = nullptr;
  bool fits = false;
  if (g_caching) {
    block = memory.cache.take(bytes, room());
    if (!block) {  // as CUDA's allocator: give back what is cached, then try once more
      memory.cache.empty();
      block = memory.cache.take(bytes, room());
    }
    fits = block != nullptr;
  } else {
    if (bytes > room()) memory.cache.empty();
    fits = bytes <= room();
  }
  if (!fits) {
    update_reserved(memory);
    c.out_of_memory++;
    const auto share = memory.allowed < memory.capacity ? in_units(memory.allowed) + " allowed; " : std::string();
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "sim out of memory. Tried to allocate ", in_units(bytes), ". GPU ", device,
        " has a total capacity of ", in_units(memory.capacity), " of which ",
        in_units(memory.capacity - c.reserved), " is free. ", share, "Of the allocated memory ",
        in_units(c.allocated), " is allocated by PyTorch, and ", in_units(c.reserved - c.allocated),
        " is reserved by PyTorch but unallocated.");
  }
  const int64_t charged = block ? block->size : bytes;
  header = Header{bytes, charged, block, header.number, device};
  if (!block) memory.uncached += charged;
  c.allocated += charged;
  c.requested += bytes;
  c.allocated_total += charged;
  c.allocations++;
  c.peak_allocated = std::max(c.peak_allocated, c.allocated);
  c.peak_requested = std::max(c.peak_requested, c.requested);
  update_reserved(memory);
  if (ledger_open()) note_memory(header.number, charged, device);
}

// The lock is held.
void discharge(const Header& header) {
  auto& memory = memories()[header.device];
  auto& c = memory.counters;
  c.allocated -= header.charged;
  c.requested -= header.requested;
  c.frees++;
  if (header.block) {
    memory.cache.give_back(header.block);
  } else {
    memory.uncached -= header.charged;
  }
  update_reserved(memory);
  if (ledger_open()) note_memory(header.number, -header.charged, header.device);
}

void release(void* data) {
  if (!data) return;
  const Header header = header_of(data);
  if (header.device != kHost) {
    std::lock_guard<std::mutex> held(lock());
    discharge(header);
  }
  c10::free_cpu(static_cast<char*>(data) - kHeaderBytes);
}

void* take(size_t bytes, int device) {
  Header header{static_cast<int64_t>(bytes), 0, nullptr, g_next_number++, kHost};
  if (device != kHost) {
    std::lock_guard<std::mutex> held(lock());
    charge(header, device, static_cast<int64_t>(bytes));
  }
  void* base = nullptr;
  try {
    base = c10::alloc_cpu(bytes + kHeaderBytes);
  } catch (...) {
    if (device != kHost) {
      std::lock_guard<std::mutex> held(lock());
      discharge(header);
    }
    throw;
  }
  void* data = static_cast<char*>(base) + kHeaderBytes;
  header_of(data) = header;
  return data;
}

// A DeviceAllocator, not an Allocator: torch.accelerator's memory functions ask for one.
struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    const int index = current_device();
    const c10::Device device(kSim, static_cast<c10::DeviceIndex>(index));
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    void* data = take(bytes, index);
    return {data, data, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override { empty_cache(); }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    check_device(device);
    const Counters c = counters(device);
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto fill = [](auto& stat, int64_t current, int64_t peak, int64_t total) {
      stat[0].current = current;
      stat[0].peak = peak;
      stat[0].allocated = total;
      stat[0].freed = total - current;
    };
    fill(stats.allocated_bytes, c.allocated, c.peak_allocated, c.allocated_total);
    fill(stats.active_bytes, c.allocated, c.peak_allocated, c.allocated_total);
    fill(stats.requested_bytes, c.requested, c.peak_requested, c.requested);
    fill(stats.reserved_bytes, c.reserved, c.peak_reserved, c.reserved);
    stats.num_ooms = c.out_of_memory;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    check_device(device);
    reset_counts(device);
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    check_device(device);
    reset_peaks(device);
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    check_device(device);
    const int64_t total = capacity(device);
    return {static_cast<size_t>(std::max<int64_t>(total - counters(device).reserved, 0)), static_cast<size_t>(total)};
  }
};
DeviceMemory g_device_memory;

// What a kernel allocates on the host is charged when it is handed to a device, and never as scratch:
// how much scratch a CPU kernel takes depends on its number of threads.
struct HostMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    void* data = take(bytes, kHost);
    return {data, data, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
HostMemory g_host_memory;

std::map<const char*, size_t>& pinned() {
  static auto* blocks = new std::map<const char*, size_t>();
  return *blocks;
}

void release_pinned(void* data) {
  if (!data) return;
  {
    std::lock_guard<std::mutex> held(lock());
    pinned().erase(static_cast<const char*>(data));
  }
  release(data);
}

// Ordinary memory, remembered so that is_pinned() tells the truth.
struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release_pinned, device};
    void* data = take(bytes, kHost);
    std::lock_guard<std::mutex> held(lock());
    pinned()[static_cast<const char*>(data)] = bytes;
    return {data, data, &release_pinned, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedMemory g_pinned_memory;

}  // namespace

REGISTER_ALLOCATOR(kSim, &g_device_memory);

c10::Allocator* device_allocator() { return &g_device_memory; }
c10::Allocator* host_allocator() { return &g_host_memory; }
c10::Allocator* pinned_allocator() { return &g_pinned_memory; }

void install_allocators() { c10::SetCPUAllocator(&g_host_memory, /*priority=*/200); }

bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> held(lock());
  auto at = pinned().upper_bound(static_cast<const char*>(pointer));
  if (at == pinned().begin()) return false;
  --at;
  return static_cast<const char*>(pointer) < at->first + at->second;
}

int64_t block_number(const c10::StorageImpl& storage) {
  const auto& data = storage.data_ptr();
  if (!data.get()) return 0;
  const auto deleter = data.get_deleter();
  if (deleter == &release || deleter == &release_pinned) return header_of(data.get()).number;
  return -static_cast<int64_t>(reinterpret_cast<intptr_t>(data.get()));
}

c10::DataPtr adopt(c10::StorageImpl& host, int device) {
  const c10::Device on(kSim, static_cast<c10::DeviceIndex>(device));
  const size_t bytes = host.nbytes();
  if (bytes == 0 || host.data() == nullptr) return {nullptr, nullptr, &release, on};
  if (host.data_ptr().get_deleter() == &release) {
    auto& header = header_of(host.mutable_data());
    if (header.device == kHost) {
      std::lock_guard<std::mutex> held(lock());
      charge(header, device, static_cast<int64_t>(bytes));
    }
    c10::DataPtr taken = host.set_data_ptr(c10::DataPtr(nullptr, c10::Device(c10::DeviceType::CPU)));
    taken.unsafe_set_device(on);
    return taken;
  }
  // Memory of another allocator: it was made before ours was installed, or is shared or mapped.
  void* data = take(bytes, device);
  std::memcpy(data, host.data(), bytes);
  return {data, data, &release, on};
}

void count_copy(int device, Direction direction, int64_t bytes) {
  std::lock_guard<std::mutex> held(lock());
  auto& c = memories()[device].counters;
  switch (direction) {
    case Direction::HostToDevice: c.h2d_bytes += bytes; c.h2d_calls++; break;
    case Direction::DeviceToHost: c.d2h_bytes += bytes; c.d2h_calls++; break;
    case Direction::DeviceToDevice: c.d2d_bytes += bytes; c.d2d_calls++; break;
  }
}

void count_kernel(int device) {
  std::lock_guard<std::mutex> held(lock());
  memories()[device].counters.kernels++;
}

Counters counters(int device) {
  std::lock_guard<std::mutex> held(lock());
  return memories()[device].counters;
}

void reset_peaks(int device) {
  std::lock_guard<std::mutex> held(lock());
  auto& c = memories()[device].counters;
  c.peak_allocated = c.allocated;
  c.peak_requested = c.requested;
  c.peak_reserved = c.reserved;
}

void reset_counts(int device) {
  std::lock_guard<std::mutex> held(lock());
  auto& c = memories()[device].counters;
  c.allocations = c.frees = c.out_of_memory = c.kernels = 0;
  c.allocated_total = c.allocated;
  c.h2d_bytes = c.d2h_bytes = c.d2d_bytes = c.h2d_calls = c.d2h_calls = c.d2d_calls = 0;
}

void empty_cache() {
  std::lock_guard<std::mutex> held(lock());
  for (auto& memory : memories()) {
    memory.cache.empty();
    update_reserved(memory);
  }
}

int64_t capacity(int device) {
  std::lock_guard<std::mutex> held(lock());
  return memories()[device].capacity;
}

void set_capacity(int device, int64_t bytes) {
  std::lock_guard<std::mutex> held(lock());
  auto& memory = memories()[device];
  memory.capacity = memory.allowed = bytes < 0 ? kDefaultCapacity : bytes;
}

int64_t allowed(int device) {
  std::lock_guard<std::mutex> held(lock());
  return memories()[device].allowed;
}

void set_allowed(int device, int64_t bytes) {
  std::lock_guard<std::mutex> held(lock());
  memories()[device].allowed = bytes;
}

void set_caching(bool on) {
  std::lock_guard<std::mutex> held(lock());
  g_caching = on;
}

bool caching() {
  std::lock_guard<std::mutex> held(lock());
  return g_caching;
}

}  // namespace sim
