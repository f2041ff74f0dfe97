// Any operation on the simulated device, run by the CPU's own kernel on the same memory.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

namespace sim {

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// CUDA takes index tensors from the host in advanced indexing, and nowhere else.
bool takes_host_indices(const std::string& name);

// Which operations ran, and how often, since the recording was switched on.
void record_operations(bool on);
std::vector<std::string> recorded_operations();

}  // namespace sim
