// What torch asks a device of: guard, hooks, streams, events and generators. Everything has run when a call returns, so
// streams and events keep their identity and order nothing.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/engine.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "dry.h"
#include "memory.h"
#include "syncs.h"

namespace sim {
namespace {

using c10::Device;
using c10::DeviceIndex;

std::atomic<bool> g_active{false};
std::atomic<int> g_device_count{1};
std::atomic<int> g_capability{80};
thread_local int t_device = 0;
std::atomic<size_t> g_threads_begun{0};  // that have been given a device once
thread_local int64_t t_streams[kMaxDevices] = {0};
std::atomic<int64_t> g_next_stream{1};

constexpr int32_t kInvalidDevice = 101;  // cudaErrorInvalidDevice

Device sim_device(int index) { return Device(kSim, static_cast<DeviceIndex>(index)); }

// Draws what the host draws with the same seed: it forwards everything to a host generator of its own.
struct Generator final : at::CPUGeneratorImpl {
  at::Generator inner;

  explicit Generator(int index) : inner(at::detail::createCPUGenerator()) {
    device_ = sim_device(index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  }
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.unsafeGetGeneratorImpl()->seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }

 private:
  Generator* clone_impl() const override {
    auto* copy = new Generator(device_.index());
    copy->inner = inner.clone();
    return copy;
  }
};

struct Event {
  std::chrono::steady_clock::time_point time;
  bool timed;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kSim;

  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kSim; }

  Device exchangeDevice(Device device) const override {
    const Device old = sim_device(t_device);
    if (device.has_index()) set_current_device(device.index());
    return old;
  }
  Device getDevice() const override { return sim_device(t_device); }
  void setDevice(Device device) const override {
    static thread_local const bool counted [[maybe_unused]] = (g_threads_begun++, true);
    if (device.has_index()) t_device = device.index();  // each thread of the autograd engine, whether its GPU is there or not
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) t_device = device.index();
  }
  // The autograd engine starts as many threads when it first runs, and never asks again.
  DeviceIndex deviceCount() const noexcept override { return g_active ? kMaxDevices : 0; }
  c10::DeviceCapability getDeviceCapability(Device) const override { return c10::DeviceCapability(); }

  c10::Stream stream(Device device, int64_t id) const {
    return c10::Stream(c10::Stream::UNSAFE, sim_device(resolve_device(device.index())), id);
  }
  c10::Stream getStream(Device device) const override {
    return stream(device, t_streams[resolve_device(device.index())]);
  }
  c10::Stream getDefaultStream(Device device) const override { return stream(device, 0); }
  c10::Stream getNewStream(Device device, int) const override { return stream(device, g_next_stream++); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return stream(device, g_next_stream++); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const c10::Stream old = getStream(next.device());
    t_streams[old.device_index()] = next.id();
    return old;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& stream) const override {
    note_sync("cudaStreamSynchronize", stream.device_index(), Waits::InTorch);
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    note_sync("cudaDeviceSynchronize", resolve_device(device), Waits::Elsewhere);
  }

  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag flag) const override {
    if (!*event) *event = new Event{{}, flag == c10::EventFlag::BACKEND_DEFAULT};
    static_cast<Event*>(*event)->time = std::chrono::steady_clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { note_sync("cudaEventSynchronize", t_device, Waits::Elsewhere); }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* first, void* second, const DeviceIndex) const override {
    const auto& from = *static_cast<Event*>(first);
    const auto& to = *static_cast<Event*>(second);
    TORCH_CHECK_VALUE(from.timed && to.timed, "Both events must be created with argument 'enable_timing=True'.");
    return std::chrono::duration<double, std::milli>(to.time - from.time).count();
  }
};
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex device) const override { return device >= 0 && device < g_device_count; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  // torch chooses a convolution's kernel, its layout and attention's kernel by these
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return g_capability >= 80; }
  bool supportsBFloat16RNNWithCuDNN() const override { return g_capability >= 80; }
  long versionCuDNN() const override { return kCudnnVersion; }
  long versionRuntimeCuDNN() const override { return kCudnnVersion; }
  long versionCUDART() const override { return kCudaVersion; }
  double batchnormMinEpsilonCuDNN() const override { return 1e-5; }
  std::string showConfig() const override { return "Simulated CUDA, computed by the host"; }
  DeviceIndex current_device() const override { return static_cast<DeviceIndex>(t_device); }
  int getNumGPUs() const override { return g_device_count; }
  at::Allocator* getCUDADeviceAllocator() const override { return device_allocator(); }
  void deviceSynchronize(DeviceIndex device) const override {
    note_sync("cudaDeviceSynchronize", resolve_device(device), Waits::Elsewhere);
  }

  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(g_device_count); }
  DeviceIndex getCurrentDevice() const override { return static_cast<DeviceIndex>(t_device); }
  void setCurrentDevice(DeviceIndex device) const override { set_current_device(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    const auto old = static_cast<DeviceIndex>(t_device);
    set_current_device(device);
    return old;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    const auto old = static_cast<DeviceIndex>(t_device);
    if (device >= 0 && device < g_device_count) t_device = device;
    return old;
  }

  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  Device getDeviceFromPtr(void*) const override { return sim_device(t_device); }

  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<Generator>(resolve_device(device));
  }
};

}  // namespace

int device_count() { return g_device_count; }
int current_device() { return t_device; }

void check_device(int64_t index) {
  if (index >= 0 && index < g_device_count) return;
  throw c10::AcceleratorError(
      {__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, kInvalidDevice,
      "CUDA error: invalid device ordinal\nGPU device may be out of range, do you have enough GPUs?\nFound cuda:" +
          std::to_string(index) + "; there are " + std::to_string(g_device_count.load()) + " simulated GPUs.");
}

void set_current_device(int64_t index) {
  check_device(index);
  t_device = static_cast<int>(index);
}

int resolve_device(int64_t index) {
  if (index < 0) return t_device;
  check_device(index);
  return static_cast<int>(index);
}

const at::Generator& default_generator(int64_t index) {
  static auto* generators = [] {
    auto* made = new std::vector<at::Generator>();
    for (int i = 0; i < kMaxDevices; i++) made->push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return (*generators)[resolve_device(index)];
}

at::Generator host_generator(const at::Generator& generator) {
  TORCH_CHECK(
      generator.device().type() == kSim, "Expected a 'cuda' device type for generator but found '",
      generator.device().type(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}

int capability() { return g_capability; }
void set_capability(int64_t capability) { g_capability = static_cast<int>(capability); }

// ------------------------------------------------------------------------------------------- borrowed and given back

namespace {

// The autograd engine, which starts the threads of its devices when it first runs: where that was before there was one,
// they are started now.
struct Engine : torch::autograd::Engine {
  static void have_device_threads() {
    auto& engine = torch::autograd::Engine::get_default_engine();
    const bool ran = (engine.*&Engine::thread_pool_shared_) != nullptr;
    const bool has_threads = !(engine.*&Engine::device_ready_queues_).empty();
    if (ran && !has_threads) (engine.*&Engine::start_device_threads)();
  }

  // A thread of its that still waits for Python's lock when Python ends brings the process down. They have had it when they
  // are given their device.
  static void wait_for_device_threads() {
    auto& engine = torch::autograd::Engine::get_default_engine();
    const size_t threads = (engine.*&Engine::device_ready_queues_).size();
    for (int tries = 0; g_threads_begun < threads && tries < 1000; tries++)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
};

// torch made its hooks before this library was loaded, as one object without members: it takes our functions for a while.
class BorrowedHooks {
 public:
  void take() {
    static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface) && sizeof(Hooks) == sizeof(void*));
    std::memcpy(&theirs_, place(), sizeof theirs_);
    new (place()) Hooks();
  }
  void give_back() { std::memcpy(place(), &theirs_, sizeof theirs_); }

 private:
  static void* place() { return const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()); }
  void* theirs_ = nullptr;
} g_hooks;

// torch initializes a device once, by the hooks of the time, and writes it down where nobody else may look: whoever comes
// after us initializes it again.
template <auto kFlags>
struct Initialized {
  friend auto& initialized(at::Context& context) { return context.*kFlags; }
};
template struct Initialized<&at::Context::init_>;
auto& initialized(at::Context& context);

void forget_initialization() {
  auto& flag = initialized(at::globalContext())[static_cast<size_t>(kSim)];
  std::destroy_at(&flag);
  std::construct_at(&flag);
}

const c10::impl::DeviceGuardImplInterface* g_their_guard = nullptr;
Guard g_guard;

std::atomic<const c10::impl::DeviceGuardImplInterface*>& guard_place() {
  return c10::impl::device_guard_impl_registry[static_cast<size_t>(kSim)];
}

}  // namespace

bool active() { return g_active; }

void check_active() {
  TORCH_CHECK(
      g_active,
      "PyTorch is not linked with support for cuda devices: this tensor is on a simulated GPU that is not in use any more.");
}

void activate(int64_t devices, int64_t capability) {
  TORCH_CHECK(!g_active, "The simulated GPU is in use already.");
  TORCH_CHECK_VALUE(devices >= 1 && devices <= kMaxDevices, "devices: found ", devices, "; it takes 1 to ", kMaxDevices);
  g_device_count = static_cast<int>(devices);
  g_capability = static_cast<int>(capability);
  t_device = 0;
  std::fill_n(t_streams, kMaxDevices, 0);
  install_allocators();
  g_hooks.take();
  g_their_guard = guard_place().exchange(&g_guard);
  g_active = true;
  Engine::have_device_threads();
}

void deactivate() {
  TORCH_CHECK(g_active, "The simulated GPU is not in use.");
  Engine::wait_for_device_threads();
  g_active = false;
  set_sync_debug_mode(0);
  set_sync_listener(nullptr);
  set_memory_listener(nullptr);
  guard_place().store(g_their_guard);
  g_hooks.give_back();
  forget_initialization();
  uninstall_allocators();
}

}  // namespace sim
