#include "aliasing.h"

#include "device.h"
#include "dry.h"
#include "ledger.h"
#include "memory.h"

namespace sim {
namespace {

void nothing(void*) {}

// Views that only mark themselves as conjugated or negated stay marked on the other side.
void copy_marks(c10::TensorImpl& to, const c10::TensorImpl& from) {
  if (from.is_conj()) to._set_conj(true);
  if (from.is_neg()) to._set_neg(true);
}

at::Tensor tensor_over(
    const c10::intrusive_ptr<c10::StorageImpl>& storage, c10::DispatchKey key, const at::Tensor& like) {
  const auto* from = like.unsafeGetTensorImpl();
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  impl->set_sizes_and_strides(from->sizes(), from->strides(), from->storage_offset());
  copy_marks(*impl, *from);
  return at::Tensor(std::move(impl));
}

}  // namespace

bool hollow(const at::Tensor& tensor) {
  return tensor.defined() && tensor.has_storage() && hollow(*tensor.storage().unsafeGetStorageImpl());
}

Aliases::Aliases(bool dry) : dry_(dry) {
  check_active();
  if (dry && !sim::dry()) refuse_hollow(Running::operation());
}

c10::intrusive_ptr<c10::StorageImpl> Aliases::kernel_storage(const c10::StorageImpl& storage) const {
  if (dry_)
    return c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), storage.nbytes(), c10::DataPtr(nullptr, c10::Device(c10::DeviceType::Meta)),
        c10::GetAllocator(c10::DeviceType::Meta), /*resizable=*/true);
  if (hollow(storage)) refuse_hollow(Running::operation());
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(const_cast<void*>(storage.data()), nullptr, &nothing, c10::Device(c10::DeviceType::CPU)),
      host_allocator(), /*resizable=*/true);
}

at::Tensor Aliases::host(const at::Tensor& tensor) {
  const auto* impl = tensor.unsafeGetTensorImpl();
  for (auto& pair : tensors_)
    if (pair.device.unsafeGetTensorImpl() == impl) return pair.host;
  if (index < 0) index = tensor.device().index();
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  c10::intrusive_ptr<c10::StorageImpl> alias;
  for (auto& pair : storages_)
    if (pair.device.get() == storage) alias = pair.host;
  if (!alias) {
    alias = kernel_storage(*storage);
    storages_.push_back(
        {c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage), alias, storage->data()});
  }
  at::Tensor view = tensor_over(alias, dry_ ? c10::DispatchKey::Meta : c10::DispatchKey::CPU, tensor);
  // Only when true: setting it on a tensor that has dimensions asserts.
  if (impl->is_wrapped_number()) view.unsafeGetTensorImpl()->set_wrapped_number(true);
  tensors_.push_back({tensor, view});
  return view;
}

at::Tensor Aliases::keep_on_host(const at::Tensor& tensor) {
  const auto* impl = tensor.unsafeGetTensorImpl();
  if (!dry_ || impl->is_wrapped_number()) {  // a Python number is what it is
    host_arguments_.push_back(tensor);
    return tensor;
  }
  for (auto& pair : tensors_)
    if (pair.device.unsafeGetTensorImpl() == impl) return pair.host;
  const at::Tensor view =
      tensor_over(kernel_storage(*tensor.storage().unsafeGetStorageImpl()), c10::DispatchKey::Meta, tensor);
  tensors_.push_back({tensor, view});
  return view;
}

const c10::intrusive_ptr<c10::StorageImpl>& Aliases::device_storage(const at::Tensor& host) {
  auto* storage = host.storage().unsafeGetStorageImpl();
  for (auto& pair : storages_)
    if (pair.host.get() == storage) return pair.device;
  const size_t bytes = storage->nbytes();
  auto made = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, dry_ ? take_hollow(bytes, index) : adopt(*storage, index),
      device_allocator(), /*resizable=*/true);
  storages_.push_back({std::move(made), c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage), nullptr});
  return storages_.back().device;
}

at::Tensor Aliases::device(const at::Tensor& tensor) {
  if (!tensor.defined() || !(dry_ ? tensor.is_meta() : tensor.is_cpu())) return tensor;
  TORCH_CHECK_NOT_IMPLEMENTED(
      tensor.layout() == c10::kStrided && !tensor.is_quantized(), "The simulated device holds dense tensors only; found ",
      tensor.is_quantized() ? "a quantized" : "a sparse", " one.");
  const auto* impl = tensor.unsafeGetTensorImpl();
  for (auto& pair : tensors_)
    if (pair.host.unsafeGetTensorImpl() == impl) return pair.device;
  for (auto& argument : host_arguments_)
    if (argument.is_alias_of(tensor)) return tensor;
  return tensor_over(device_storage(tensor), c10::DispatchKey::CUDA, tensor);
}

bool Aliases::holds(const at::Tensor& device) const {
  const auto* storage = device.storage().unsafeGetStorageImpl();
  for (const auto& pair : storages_)
    if (pair.device.get() == storage) return true;
  return false;
}

std::vector<int64_t> Aliases::blocks() const {
  std::vector<int64_t> numbers;
  for (const auto& pair : storages_) numbers.push_back(block_number(*pair.device));
  return numbers;
}

void Aliases::carry_back() {
  for (auto& pair : storages_) {
    const size_t bytes = pair.host->nbytes();
    if (dry_ ? bytes <= pair.device->nbytes() : pair.host->data() == pair.data) continue;
    const int on = pair.device->device().index();
    pair.device->set_data_ptr_noswap(dry_ ? take_hollow(bytes, on) : adopt(*pair.host, on));
    pair.device->set_nbytes(bytes);
    // What returns from here on is a view of this memory.
    pair.data = nullptr;
  }
  for (size_t i = 0; i < tensors_.size(); i++) {
    if (!on_sim(tensors_[i].device)) continue;
    auto* device = tensors_[i].device.unsafeGetTensorImpl();
    const auto* host = tensors_[i].host.unsafeGetTensorImpl();
    const auto& storage = device_storage(tensors_[i].host);
    if (storage.get() != device->storage().unsafeGetStorageImpl())
      device->set_storage_keep_dtype(c10::Storage(storage));
    if (device->sizes() != host->sizes() || device->strides() != host->strides() ||
        device->storage_offset() != host->storage_offset())
      device->set_sizes_and_strides(host->sizes(), host->strides(), host->storage_offset());
  }
}

}  // namespace sim
