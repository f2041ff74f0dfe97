// What torch asks a device of: guard, hooks, streams, events and generators. Everything has run when a call returns, so
// streams and events keep their identity and order nothing.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "dry.h"
#include "memory.h"

namespace sim {
namespace {

using c10::Device;
using c10::DeviceIndex;

int g_device_count = 2;
thread_local int t_device = 0;
thread_local int64_t t_streams[kMaxDevices] = {0};
std::atomic<int64_t> g_next_stream{1};

constexpr int32_t kInvalidDevice = 101;  // cudaErrorInvalidDevice

Device sim_device(int index) { return Device(kSim, static_cast<DeviceIndex>(index)); }

// Draws what the host draws with the same seed: it forwards everything to a host generator of its own.
struct Generator final : at::CPUGeneratorImpl {
  at::Generator inner;

  explicit Generator(int index) : inner(at::detail::createCPUGenerator()) {
    device_ = sim_device(index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
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
    if (device.has_index()) set_current_device(device.index());
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) t_device = device.index();
  }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(g_device_count); }
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
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex device) const override { resolve_device(device); }

  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag flag) const override {
    if (!*event) *event = new Event{{}, flag == c10::EventFlag::BACKEND_DEFAULT};
    static_cast<Event*>(*event)->time = std::chrono::steady_clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* first, void* second, const DeviceIndex) const override {
    const auto& from = *static_cast<Event*>(first);
    const auto& to = *static_cast<Event*>(second);
    TORCH_CHECK_VALUE(from.timed && to.timed, "Both events must be created with argument 'enable_timing=True'.");
    return std::chrono::duration<double, std::milli>(to.time - from.time).count();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }

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

  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(*storage.unsafeGetStorageImpl(), bytes);
  }
};

}  // namespace

int device_count() { return g_device_count; }
int current_device() { return t_device; }

void check_device(int64_t index) {
  if (index >= 0 && index < g_device_count) return;
  throw c10::AcceleratorError(
      {__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, kInvalidDevice,
      "sim error: invalid device ordinal\nGPU device may be out of range, do you have enough GPUs?\nFound sim:" +
          std::to_string(index) + "; there are " + std::to_string(g_device_count) +
          " simulated devices (DIFFOPT_SIM_DEVICES says how many).");
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
      generator.device().type() == kSim, "Expected a 'sim' device type for generator but found '",
      generator.device().type(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}

void set_device_count(int64_t count) {
  TORCH_CHECK_VALUE(count >= 1 && count <= kMaxDevices, "device count: found ", count, "; it takes 1 to ", kMaxDevices);
  g_device_count = static_cast<int>(count);
}

namespace {
struct Registration {
  Registration() {
    at::RegisterPrivateUse1HooksInterface(new Hooks());
    install_allocators();
  }
} g_registration;
}  // namespace

}  // namespace sim
