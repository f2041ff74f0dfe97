// Half precision as tensor cores compute it: products are accumulated in float32, and each result is rounded once. The
// host's own kernels for it are tens of times slower, and how they accumulate depends on the host. The float32 copies are
// the host's memory: none of it is charged to the device.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/ArrayRef.h>

#include <optional>

namespace sim {

// One call's arguments as the kernel sees them, on the host or on meta: in float32, if all that are defined have one half
// precision. What is mixed is the kernel's to refuse.
class Widening {
 public:
  explicit Widening(c10::ArrayRef<at::Tensor> arguments);
  // That half precision.
  std::optional<c10::ScalarType> dtype() const { return dtype_; }
  at::Tensor wide(const at::Tensor& argument) const;
  // Back in the precision of the arguments.
  at::Tensor rounded(const at::Tensor& result) const;

 private:
  std::optional<c10::ScalarType> dtype_;
};

// The host's kernel of an operation on host tensors; the one for float32, where none in half precision rounds once.
void run_host_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace sim
