#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>
#include <c10/util/llvmMathExtras.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <list>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include <sys/mman.h>

#include "caching.h"
#include "device.h"
#include "dry.h"
#include "ledger.h"

namespace sim {
namespace {

constexpr int64_t kDefaultCapacity = int64_t(16) << 30;
constexpr int kHost = -1;

// A block that a device holds.
struct Live {
  int64_t charged = 0, requested = 0;
  const Block* block = nullptr;       // null if it was not taken through the cache
  std::atomic<int64_t> address{0};    // where its data begins; 0 for a kernel's workspace
};

struct Memory {
  std::list<Live> live;
  Counters counters;
  CachingModel cache;
  int64_t uncached = 0;  // reserved for blocks that were taken while caching was off
  int64_t whole = kDefaultCapacity;  // what it began with
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
std::atomic<bool> g_counts_host{false};

// Stands right before each block, on the device and on the host: the same layout lets a host block change sides.
struct Header {
  int64_t requested;
  int64_t charged;
  Block* block;  // null if it was not taken through the cache
  int64_t number;
  int32_t device;
  bool pinned;
  bool counted;    // among what the host holds: taken while that is counted
  bool unknown;    // on the host: something was copied into it that nobody computed
  int64_t mapped;  // pages of its own, so many bytes; else 0
  std::list<Live>::iterator live;  // of a device's block
};
constexpr size_t kHeaderBytes = 64;  // keeps torch's alignment of host memory
static_assert(sizeof(Header) <= kHeaderBytes);

std::atomic<int64_t> g_next_number{1};

HostCounters g_host;

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
    if (ledger_open()) note_empty_cache();
    update_reserved(memory);
    c.out_of_memory++;
    const auto share = memory.allowed < memory.capacity ? in_units(memory.allowed) + " allowed; " : std::string();
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", in_units(bytes), ". GPU ", device,
        " has a total capacity of ", in_units(memory.capacity), " of which ",
        in_units(memory.capacity - c.reserved), " is free. Including non-PyTorch memory, this process has ",
        in_units(c.reserved), " memory in use. ", share, "Of the allocated memory ", in_units(c.allocated),
        " is allocated by PyTorch, and ", in_units(c.reserved - c.allocated),
        " is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
        "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory Management "
        " (https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)");
  }
  const int64_t charged = block ? block->size : bytes;
  header.requested = bytes;
  header.charged = charged;
  header.block = block;
  header.device = device;
  if (!block) memory.uncached += charged;
  auto& live = memory.live.emplace_front();
  live.charged = charged;
  live.requested = bytes;
  live.block = block;
  header.live = memory.live.begin();
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
  memory.live.erase(header.live);
  if (header.block) {
    memory.cache.give_back(header.block);
  } else {
    memory.uncached -= header.charged;
  }
  update_reserved(memory);
  if (ledger_open()) note_memory(header.number, -header.charged, header.device);
}

void count_host(const Header& header, int64_t sign);

std::atomic<MemoryListener> g_listener{nullptr};

int64_t address_of(const Live& live) { return live.block ? kModelAddresses + live.block->address : live.address.load(); }

// No lock is held: who listens may free a block.
void tell(MemoryAction action, int device, int64_t address, int64_t bytes, int64_t free = 0) {
  if (const auto listener = g_listener.load()) listener(static_cast<int>(action), device, address, bytes, free);
}

void tell_segments(int device) {
  if (!g_listener.load()) return;
  std::vector<std::pair<int64_t, int64_t>> seen;
  {
    std::lock_guard<std::mutex> held(lock());
    seen.swap(memories()[device].cache.segments_seen);
  }
  for (const auto& [address, bytes] : seen)
    tell(bytes > 0 ? MemoryAction::SegmentAlloc : MemoryAction::SegmentFree, device, kModelAddresses + address,
         std::abs(bytes));
}

// A block that was charged has its place now.
void settle(const Header& header, const void* data) {
  header.live->address = static_cast<int64_t>(reinterpret_cast<intptr_t>(data));
  if (!g_listener.load()) return;
  const int64_t address = address_of(*header.live);
  if (header.block) {
    tell_segments(header.device);
  } else {
    tell(MemoryAction::SegmentAlloc, header.device, address, header.charged);
  }
  tell(MemoryAction::Alloc, header.device, address, header.charged);
}

// Out of memory is told once the lock is free.
void charge_alone(Header& header, int device, int64_t bytes) {
  try {
    std::lock_guard<std::mutex> held(lock());
    const Header before = header;
    charge(header, device, bytes);
    if (before.counted) count_host(before, -1);
  } catch (const c10::OutOfMemoryError&) {
    tell_segments(device);
    tell(MemoryAction::OutOfMemory, device, 0, bytes, std::max<int64_t>(capacity(device) - counters(device).reserved, 0));
    throw;
  }
}

// Of pinned blocks of each power of two: those in use, and those that the allocator holds.
struct PinnedBlocks {
  int64_t used = 0, held = 0;
};
std::array<PinnedBlocks, 64> g_pinned_blocks;

// The lock is held. As CachingHostAllocator.h does: a size is rounded up to a power of two, and what is freed is kept for
// the next block of that size. Returns what the allocator takes of the host for this.
int64_t count_pinned(int64_t bytes, int64_t sign) {
  const auto power = static_cast<size_t>(c10::llvm::Log2_64_Ceil(static_cast<uint64_t>(bytes)));
  auto& blocks = g_pinned_blocks[power];
  blocks.used += sign;
  if (blocks.used <= blocks.held) return 0;
  blocks.held++;
  return int64_t(1) << power;
}

// The lock is held. What the host's allocators hold, with its peak; counted while the device is dry or somebody asks for it,
// for the time that it takes.
void count_host(const Header& header, int64_t sign) {
  if (!header.counted) return;
  const int64_t held = header.pinned ? count_pinned(header.requested, sign) : sign * header.requested;
  g_host.allocated += held;
  g_host.peak_allocated = std::max(g_host.peak_allocated, g_host.allocated);
  if (!header.pinned) return;
  g_host.pinned += held;
  g_host.peak_pinned = std::max(g_host.peak_pinned, g_host.pinned);
}

void give_back(const Header& header) {
  if (header.device == kHost && !header.counted) return;
  if (header.device == kHost) {
    std::lock_guard<std::mutex> held(lock());
    count_host(header, -1);
    return;
  }
  const int64_t address = g_listener.load() ? address_of(*header.live) : 0;
  {
    std::lock_guard<std::mutex> held(lock());
    discharge(header);
  }
  if (!address) return;
  tell(MemoryAction::Free, header.device, address, header.charged);
  if (!header.block) tell(MemoryAction::SegmentFree, header.device, address, header.charged);
}

void release(void* data) {
  if (!data) return;
  const Header header = header_of(data);
  give_back(header);
  void* base = static_cast<char*>(data) - kHeaderBytes;
  if (header.mapped) {
    munmap(base, header.mapped);
  } else {
    c10::free_cpu(base);
  }
}

Header charged_header(size_t bytes, int device, bool pinned) {
  Header header{static_cast<int64_t>(bytes), 0, nullptr, g_next_number++, kHost, pinned, dry() || g_counts_host, false, 0};
  if (device == kHost && !header.counted) return header;
  if (device == kHost) {
    std::lock_guard<std::mutex> held(lock());
    count_host(header, 1);
  } else {
    const bool counted = std::exchange(header.counted, false);
    charge_alone(header, device, static_cast<int64_t>(bytes));
    header.counted = counted;
  }
  return header;
}

void* take(size_t bytes, int device, bool pinned = false) {
  Header header = charged_header(bytes, device, pinned);
  void* base = nullptr;
  try {
    if (dry() && device == kHost && bytes >= kLazyBytes) {
      header.mapped = static_cast<int64_t>(bytes + kHeaderBytes);
      base = mmap(nullptr, header.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      TORCH_CHECK(base != MAP_FAILED, "DefaultCPUAllocator: can't map memory: you tried to allocate ", bytes, " bytes.");
    } else {
      base = c10::alloc_cpu(bytes + kHeaderBytes);
    }
  } catch (...) {
    give_back(header);
    throw;
  }
  void* data = static_cast<char*>(base) + kHeaderBytes;
  header_of(data) = header;
  if (device != kHost) settle(header, data);
  // what is small enough to be computed is the same on every dry run
  if (dry() && device != kHost) std::memset(data, 0, bytes);
  return data;
}

// A hollow block's header has nowhere to stand: this is the context of its pointer.
struct Hollow {
  Header header;
};

void release_hollow(void* context) {
  auto* block = static_cast<Hollow*>(context);
  give_back(block->header);
  delete block;
}

// An address of its own for each block, none of which may be touched. They are spaced by less than a large block's size:
// nothing lies there, and only where a block begins tells it from another.
void* hollow_address(size_t bytes) {
  constexpr size_t kSpan = size_t(1) << 44, kLargest = size_t(1) << 42;
  static char* const base = static_cast<char*>(
      mmap(nullptr, kSpan, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  static size_t next = 0;
  TORCH_CHECK(base != MAP_FAILED, "The simulated device cannot run dry: no address space is left for it.");
  TORCH_CHECK(bytes < kLargest, "CUDA out of memory. Tried to allocate ", in_units(static_cast<int64_t>(bytes)), ".");
  std::lock_guard<std::mutex> held(lock());
  if (next > kSpan - kLargest) next = 0;
  char* address = base + next;
  next += std::min<size_t>((bytes + 4095) / 4096 * 4096, 1 << 20);
  return address;
}

c10::Device on_device(int device) { return c10::Device(kSim, static_cast<c10::DeviceIndex>(device)); }

// The header of a block of ours, whether it is hollow or not; else null.
Header* known_header(const c10::DataPtr& data);

int64_t number_in(const char* file, const char* before) {
  std::ifstream lines(file);
  std::string word;
  while (lines >> word) {
    if (*before && word != before) continue;
    if (*before && !(lines >> word)) break;
    return std::isdigit(static_cast<unsigned char>(word[0])) ? std::stoll(word) : -1;  // cgroups write "max"
  }
  return -1;
}

// What the host can still give, in bytes, by the system and by the group that the process is in; -1 where nobody says.
int64_t available_on_the_host() {
  const int64_t system = number_in("/proc/meminfo", "MemAvailable:");
  int64_t available = system < 0 ? -1 : system * 1024;
  const int64_t limit = number_in("/sys/fs/cgroup/memory.max", ""), used = number_in("/sys/fs/cgroup/memory.current", "");
  if (limit >= 0 && used >= 0) {
    const int64_t cached = std::max<int64_t>(number_in("/sys/fs/cgroup/memory.stat", "inactive_file"), 0);
    const int64_t left = limit - used + cached;
    available = available < 0 ? left : std::min(available, left);
  }
  return available;
}

// A device that is larger than the host: without this the system ends the process once the memory is written to.
void check_the_host_has(int64_t bytes, int device) {
  constexpr int64_t kAsked = int64_t(64) << 20;  // below that it costs more than it tells
  if (bytes < kAsked || bytes > capacity(device) - counters(device).reserved) return;  // the GPU itself has no room
  const int64_t available = available_on_the_host();
  if (available < 0 || bytes < available) return;
  {
    std::lock_guard<std::mutex> held(lock());
    memories()[device].counters.out_of_memory++;
  }
  TORCH_CHECK_WITH(
      OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", in_units(bytes), ". GPU ", device,
      " is simulated: its memory lies on the host, which has ", in_units(available),
      " left. A forecast needs no memory: diffopt forecast.");
}

// A DeviceAllocator, not an Allocator: torch.accelerator's memory functions ask for one.
struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    // in a CUDA build, on a machine with a GPU, torch gets here
    TORCH_CHECK(
        active(),
        "CUDA was simulated in this process, and its kernels stand where those of the real GPU stood: use that one in a "
        "process of its own.");
    const int index = current_device();
    const c10::Device device(kSim, static_cast<c10::DeviceIndex>(index));
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    if (dry_size(bytes)) return take_hollow(bytes, index);
    if (!dry()) check_the_host_has(static_cast<int64_t>(bytes), index);
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
    void* data = take(bytes, kHost, /*pinned=*/true);
    std::lock_guard<std::mutex> held(lock());
    pinned()[static_cast<const char*>(data)] = bytes;
    return {data, data, &release_pinned, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedMemory g_pinned_memory;

Header* known_header(const c10::DataPtr& data) {
  if (!data.get()) return nullptr;
  const auto deleter = data.get_deleter();
  if (deleter == &release_hollow) return &static_cast<Hollow*>(data.get_context())->header;
  if (deleter == &release || deleter == &release_pinned) return &header_of(data.get());
  return nullptr;
}

}  // namespace


c10::Allocator* device_allocator() { return &g_device_memory; }
c10::Allocator* host_allocator() { return &g_host_memory; }
c10::Allocator* pinned_allocator() { return &g_pinned_memory; }

namespace {
// SetAllocator never gives a place to a lower priority again.
constexpr uint8_t kPriority = 200;
c10::Allocator *g_their_host = nullptr, *g_their_device = nullptr;
}  // namespace

void install_allocators() {
  g_their_host = c10::GetCPUAllocator();
  try {
    g_their_device = c10::GetAllocator(kSim);
  } catch (const c10::Error&) {  // a build of torch for the CPU has none
    g_their_device = nullptr;
  }
  c10::SetCPUAllocator(&g_host_memory, kPriority);
  c10::SetAllocator(kSim, &g_device_memory, kPriority);
}

void uninstall_allocators() {
  c10::SetCPUAllocator(g_their_host, kPriority);
  c10::SetAllocator(kSim, g_their_device, kPriority);
}

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
  if (const auto* header = known_header(data)) return header->number;
  return -static_cast<int64_t>(reinterpret_cast<intptr_t>(data.get()));
}

bool hollow(const c10::StorageImpl& storage) { return storage.data_ptr().get_deleter() == &release_hollow; }

c10::DataPtr take_hollow(size_t bytes, int device) {
  const c10::Device on = on_device(device);
  if (bytes == 0) return {nullptr, nullptr, &release, on};
  void* address = hollow_address(bytes);
  auto* block = new Hollow{charged_header(bytes, device, false)};
  settle(block->header, address);
  return {address, block, &release_hollow, on};
}

void make_hollow(c10::StorageImpl& storage) {
  auto* known = known_header(storage.data_ptr());
  if (!known || hollow(storage)) return;
  void* address = hollow_address(static_cast<size_t>(known->requested));
  auto* block = new Hollow{*known};
  block->header.mapped = 0;
  if (block->header.device != kHost) block->header.live->address = static_cast<int64_t>(reinterpret_cast<intptr_t>(address));
  {
    std::lock_guard<std::mutex> held(lock());
    known->device = kHost;  // what is freed now is the memory alone: the charge goes on with the block
    known->counted = false;
  }
  storage.set_data_ptr_noswap({address, block, &release_hollow, on_device(block->header.device)});
}

bool unknown_on_host(const c10::StorageImpl& storage) {
  const auto* header = known_header(storage.data_ptr());
  return header && header->unknown;
}

void mark_unknown_on_host(const c10::StorageImpl& storage) {
  if (auto* header = known_header(storage.data_ptr())) header->unknown = true;
}

void mark_known_on_host(const c10::StorageImpl& storage) {
  if (auto* header = known_header(storage.data_ptr())) header->unknown = false;
}

void resize_storage(c10::StorageImpl& storage, size_t bytes) {
  TORCH_CHECK(storage.resizable(), "Trying to resize storage that is not resizable");
  const int device = storage.device().index();
  const bool unknown = hollow(storage) || (bytes && dry_size(bytes));
  c10::DataPtr data(nullptr, nullptr, &release, on_device(device));
  if (unknown) {
    data = take_hollow(bytes, device);
  } else if (bytes) {
    void* taken = take(bytes, device);
    data = {taken, taken, &release, on_device(device)};
    if (const size_t kept = std::min(bytes, storage.nbytes()); kept && storage.data())
      std::memcpy(taken, storage.data(), kept);
  }
  storage.set_data_ptr_noswap(std::move(data));
  storage.set_nbytes(bytes);
}

void use_workspace(int device, const Workspace& workspace) {
  Header header{};
  header.number = g_next_number++;
  header.device = kHost;
  std::lock_guard<std::mutex> held(lock());
  if (workspace.expected > 0) charge(header, device, workspace.expected);
  if (ledger_open()) note_workspace(header.number, workspace.low, workspace.high, device);
  if (workspace.expected > 0) discharge(header);
}

c10::DataPtr adopt(c10::StorageImpl& host, int device) {
  const c10::Device on(kSim, static_cast<c10::DeviceIndex>(device));
  const size_t bytes = host.nbytes();
  if (bytes == 0 || host.data() == nullptr) return {nullptr, nullptr, &release, on};
  if (dry_size(bytes)) return take_hollow(bytes, device);
  if (host.data_ptr().get_deleter() == &release) {
    auto& header = header_of(host.mutable_data());
    if (header.device == kHost) {
      charge_alone(header, device, static_cast<int64_t>(bytes));
      settle(header, host.data());
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

HostCounters host_counters() {
  std::lock_guard<std::mutex> held(lock());
  return g_host;
}

void count_host_memory(bool on) { g_counts_host = on; }

void empty_host_cache() {
  std::lock_guard<std::mutex> held(lock());
  for (size_t power = 0; power < g_pinned_blocks.size(); power++) {
    auto& blocks = g_pinned_blocks[power];
    const int64_t freed = (blocks.held - blocks.used) << power;
    g_host.allocated -= freed;
    g_host.pinned -= freed;
    blocks.held = blocks.used;
  }
}

void reset_host_peaks() {
  std::lock_guard<std::mutex> held(lock());
  g_host.peak_allocated = g_host.allocated;
  g_host.peak_pinned = g_host.pinned;
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
  {
    std::lock_guard<std::mutex> held(lock());
    if (ledger_open()) note_empty_cache();
    for (auto& memory : memories()) {
      memory.cache.empty();
      update_reserved(memory);
    }
  }
  for (int device = 0; device < kMaxDevices; device++) tell_segments(device);
}

void set_memory_listener(MemoryListener listener) {
  std::lock_guard<std::mutex> held(lock());
  for (auto& memory : memories()) {
    memory.cache.keeps_segments = listener != nullptr;
    memory.cache.segments_seen.clear();
  }
  g_listener = listener;
}

std::vector<BlockRecord> block_records(int device) {
  std::lock_guard<std::mutex> held(lock());
  auto& memory = memories()[device];
  std::map<const Block*, int64_t> requested;
  std::vector<BlockRecord> records;
  for (const auto& live : memory.live) {
    const int64_t address = live.address;
    if (live.block) {
      requested[live.block] = live.requested;
    } else if (address) {
      records.push_back({address, live.charged, live.charged <= (1 << 20), address, live.charged, live.requested, true});
    }
  }
  for (const Block* head : memory.cache.segments()) {
    int64_t whole = 0;
    for (const Block* block = head; block; block = block->after) whole += block->size;
    const int64_t begin = kModelAddresses + head->address;
    for (const Block* block = head; block; block = block->after)
      records.push_back(
          {begin, whole, head->small, kModelAddresses + block->address, block->size,
           block->taken ? requested[block] : 0, block->taken});
  }
  return records;
}

int64_t capacity(int device) {
  std::lock_guard<std::mutex> held(lock());
  return memories()[device].capacity;
}

void set_capacity(int device, int64_t bytes) {
  std::lock_guard<std::mutex> held(lock());
  auto& memory = memories()[device];
  memory.capacity = memory.allowed = bytes < 0 ? memory.whole : bytes;
}

void set_default_capacity(int device, int64_t bytes) {
  std::lock_guard<std::mutex> held(lock());
  memories()[device].whole = bytes;
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
