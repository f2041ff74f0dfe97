// How many simulated devices there are, which is current on this thread, and their generators.
#pragma once
#include <ATen/core/Generator.h>
#include <c10/core/Device.h>

namespace sim {

constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr int kMaxDevices = 16;

int device_count();
int current_device();

// Raises torch.AcceleratorError, in CUDA's words, for a device that is not there.
void check_device(int64_t index);
void set_current_device(int64_t index);

// A negative index means the current device, as everywhere in torch.
int resolve_device(int64_t index);

const at::Generator& default_generator(int64_t index);

// The host generator that draws for `generator`. Raises for a generator of another device, as CUDA does.
at::Generator host_generator(const at::Generator& generator);

// Once, before the first tensor: the autograd engine starts one thread a device and never asks again.
void set_device_count(int64_t count);

}  // namespace sim
