// One call's tensors on both sides: the same memory seen as a host tensor by the CPU's kernel, and as a device tensor
// by everybody else. Nothing is copied. In a dry call the kernel is torch's meta kernel: it sees meta tensors, which have
// the same shapes and share storages alike, and what it returns becomes hollow memory.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>

#include <vector>

#include "device.h"

namespace sim {

inline bool on_sim(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kSim; }

// The work below is the device's own: no gradient of it, and no cast by a host autocast that happens to be on.
class KernelScope {
  c10::impl::ExcludeDispatchKeyGuard autograd_{c10::autograd_dispatch_keyset};
  c10::impl::ExcludeDispatchKeyGuard autocast_{c10::autocast_dispatch_keyset};
};

class Aliases {
 public:
  explicit Aliases(bool dry = false) : dry_(dry) {}
  // The kernel's view of a device tensor; the same one if it is asked for again. Raises for a hollow one in a real call.
  at::Tensor host(const at::Tensor& tensor);
  // A host tensor that is an argument: it stays on the host if it comes back. A meta kernel gets a meta tensor for it.
  at::Tensor keep_on_host(const at::Tensor& tensor);
  // The device's view of what a kernel returned: an argument, a view of one, or new memory, which is taken over.
  at::Tensor device(const at::Tensor& tensor);
  // Whether it shares memory with an argument.
  bool holds(const at::Tensor& device) const;
  // The device's blocks among the arguments.
  std::vector<int64_t> blocks() const;
  // After the kernel: reallocated memory and changed shapes (out=, resize_, set_) of arguments, carried to the device.
  void carry_back();

  // The device that the call runs on; -1 until a tensor or a device argument says so.
  int index = -1;

 private:
  struct TensorPair {
    at::Tensor device, host;
  };
  struct StoragePair {
    c10::intrusive_ptr<c10::StorageImpl> device, host;
    const void* data;  // at the beginning of the call
  };
  const c10::intrusive_ptr<c10::StorageImpl>& device_storage(const at::Tensor& host);
  c10::intrusive_ptr<c10::StorageImpl> kernel_storage(const c10::StorageImpl& storage) const;

  const bool dry_;
  c10::SmallVector<TensorPair, 6> tensors_;
  c10::SmallVector<StoragePair, 6> storages_;
  c10::SmallVector<at::Tensor, 2> host_arguments_;
};

}  // namespace sim
