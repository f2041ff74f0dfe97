// Which simulated GPUs there are and since when, which is current on this thread, and their generators.
#pragma once
#include <ATen/core/Generator.h>
#include <c10/core/Device.h>

namespace sim {

constexpr auto kSim = c10::DeviceType::CUDA;
constexpr int kMaxDevices = 16;
constexpr int kCudaVersion = 13000;   // what the simulated GPU says of its libraries
constexpr int kCudnnVersion = 91900;

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

// Of the GPU that is simulated: 89 is sm_89.
int capability();
void set_capability(int64_t capability);

// From activate to deactivate the device is there: hooks, guard and allocators of torch's key CUDA are ours.
bool active();
// Raises for a tensor that has outlived the GPU that it is on.
void check_active();
void activate(int64_t devices, int64_t capability);
void deactivate();

}  // namespace sim
