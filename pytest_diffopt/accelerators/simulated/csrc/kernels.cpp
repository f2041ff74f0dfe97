// The operations that the fallback cannot run: they allocate, share or move memory, or choose by device.
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/as_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/strides.h>
#include <torch/library.h>

#include <algorithm>

#include "aliasing.h"
#include "device.h"
#include "dry.h"
#include "fallback.h"
#include "half.h"
#include "ledger.h"
#include "memory.h"
#include "rules.h"
#include "shapes.h"
#include "syncs.h"

namespace sim {
namespace {

using at::Tensor;
using c10::IntArrayRef;

constexpr auto kKeys = c10::DispatchKeySet(c10::DispatchKey::CUDA);

void check_options(std::optional<c10::Layout> layout, std::optional<bool> pin) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      c10::layout_or_default(layout) == c10::kStrided, "The simulated device holds dense tensors only; found layout ",
      c10::layout_or_default(layout), ".");
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
}

Tensor empty(
    IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
    std::optional<c10::Device> device, std::optional<bool> pin, std::optional<c10::MemoryFormat> format) {
  check_options(layout, pin);
  const Running running("aten::empty");
  c10::DeviceGuard on(c10::device_or_default(device));
  return at::detail::empty_generic(size, device_allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
    std::optional<c10::Device> device, std::optional<bool> pin) {
  check_options(layout, pin);
  const Running running("aten::empty_strided");
  c10::DeviceGuard on(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKeys, c10::dtype_or_default(dtype));
}

// Autograd's noughts that are never written out: no memory stands behind them, here as on CUDA.
Tensor efficient_zeros(
    IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
    std::optional<c10::Device> device, std::optional<bool> pin) {
  check_options(layout, pin);
  c10::DeviceGuard on(c10::device_or_default(device));
  at::native::ZeroTensorAllocator none(c10::Device(kSim, static_cast<c10::DeviceIndex>(current_device())));
  return at::detail::empty_generic(
      size, &none, kKeys | c10::DispatchKeySet(c10::DispatchKey::ZeroTensor), c10::dtype_or_default(dtype),
      std::nullopt);
}

bool unknown_on_host(const Tensor& tensor) {
  return tensor.is_cpu() && tensor.has_storage() && sim::unknown_on_host(*tensor.storage().unsafeGetStorageImpl());
}

// A known copy into host memory that was unknown: all of it is known now, if nothing of it was left out.
void know_on_host(const Tensor& to) {
  if (unknown_on_host(to) && to.is_non_overlapping_and_dense() && to.nbytes() == to.storage().nbytes())
    mark_known_on_host(*to.storage().unsafeGetStorageImpl());
}

// A copy of what nobody computed: only whether it could be copied is seen, and that it is not known there either.
void copy_unknown(const Tensor& to, const Tensor& from) {
  if (!dry()) refuse_hollow("aten::copy_");
  TORCH_CHECK(
      at::is_expandable_to(from.sizes(), to.sizes()), "The size of tensor a ", to.sizes(),
      " must match the size of tensor b ", from.sizes());
  if (to.numel() == 0) return;
  auto& storage = *to.storage().unsafeGetStorageImpl();
  if (on_sim(to)) {
    make_hollow(storage);
    return;
  }
  if (on_sim(from)) note_read(block_number(*from.storage().unsafeGetStorageImpl()));
  // large host memory has pages of noughts by itself
  if (to.nbytes() < kLazyBytes) Tensor(to).zero_();
  mark_unknown_on_host(storage);
}

// torch's own functions copy what a storage holds when it grows: here it has grown before they look.
void grow(c10::StorageImpl& storage, size_t bytes) {
  if (bytes > storage.nbytes()) resize_storage(storage, bytes);
}

bool all_sizes(IntArrayRef size) {
  return std::all_of(size.begin(), size.end(), [](int64_t one) { return one >= 0; });
}

const Tensor& resize(const Tensor& self, IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  const Running running("aten::resize_");
  check_active();
  if (all_sizes(size) && c10::multiply_integers(size) > 0)
    grow(
        *self.storage().unsafeGetStorageImpl(),
        at::detail::computeStorageNbytesContiguous(size, self.element_size(), self.storage_offset()));
  return at::native::resize_(self, size, format);
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  const bool to_sim = on_sim(to), from_sim = on_sim(from);
  const int device = (to_sim ? to : from).device().index();
  if (shaping()) {  // what it holds is not known, and the real kernel makes no copy
    if (to_sim) make_hollow(*to.storage().unsafeGetStorageImpl());
    return to;
  }
  note_copy_sync(to, from, non_blocking, device);
  // As on CUDA, what crosses is in the target's dtype; one device's own copy and a copy to another are both d2d.
  const auto bytes = static_cast<int64_t>(to.numel() * to.element_size());
  count_copy(
      device,
      to_sim && from_sim ? Direction::DeviceToDevice
          : to_sim       ? Direction::HostToDevice
                         : Direction::DeviceToHost,
      bytes);
  const Running running("aten::copy_");
  if (ledger_open() && to.has_storage() && from.has_storage())
    note_copy(*to.storage().unsafeGetStorageImpl(), *from.storage().unsafeGetStorageImpl(), device);
  if (hollow(to) || hollow(from) || (to_sim && unknown_on_host(from))) {
    copy_unknown(to, from);
    return to;
  }
  Aliases aliases;
  KernelScope kernel;
  Tensor target = to_sim ? aliases.host(to) : to;
  target.copy_(from_sim ? aliases.host(from) : from, non_blocking);
  if (!to_sim) know_on_host(to);
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  copy_(target, from, non_blocking);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  resize(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

c10::Scalar local_scalar(const Tensor& tensor) {
  note_sync("aten::_local_scalar_dense", tensor.device().index(), Waits::InTorch);
  count_copy(tensor.device().index(), Direction::DeviceToHost, static_cast<int64_t>(tensor.element_size()));
  const Running running("aten::_local_scalar_dense");
  KernelScope kernel;
  if (hollow(tensor)) {
    if (const auto rule = find_rule(Rule::Kernel, {"aten::_local_scalar_dense", ""})) {
      torch::jit::Stack stack{tensor};
      rule->callBoxed(&stack);
      return stack.back().toScalar();
    }
  }
  Aliases aliases;
  return at::_local_scalar_dense(aliases.host(tensor));
}

// Between host tensors: what is large is not copied while the device is dry, since only weights are.
Tensor& copy_on_host(Tensor& to, const Tensor& from, bool non_blocking) {
  if (dry() && to.is_cpu() && from.is_cpu() && to.nbytes() >= kLazyBytes) {
    copy_unknown(to, from);
    return to;
  }
  at::native::copy_(to, from, non_blocking);
  if (unknown_on_host(from)) {
    mark_unknown_on_host(*to.storage().unsafeGetStorageImpl());
  } else {
    know_on_host(to);
  }
  return to;
}


Tensor& set_nothing(Tensor& self) {
  c10::DeviceGuard on(self.device());
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), 0, device_allocator()->allocate(0), device_allocator(), /*resizable=*/true);
  return at::native::set_storage_cpu_(self, std::move(storage), 0, {0}, {});
}

Tensor& set_storage_at(Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  const Running running("aten::set_");
  const bool valid = storage.device() == self.device() && offset >= 0 && all_sizes(size) && all_sizes(stride) &&
      (stride.empty() || stride.size() == size.size());
  if (valid && c10::multiply_integers(size) > 0)
    grow(
        *storage.unsafeGetStorageImpl(),
        stride.size() == size.size() ? at::detail::computeStorageNbytes(size, stride, self.element_size(), offset)
                                     : at::detail::computeStorageNbytesContiguous(size, self.element_size(), offset));
  return at::native::set_storage_cpu_(self, std::move(storage), offset, size, stride);
}

Tensor& set_storage(Tensor& self, at::Storage storage) { return at::native::set_(self, std::move(storage)); }

// Lets `parameter.data = ...` cross between host and device, which is how group offloading moves weights.
bool may_swap(const Tensor& a, const Tensor& b) {
  auto fits = [](const Tensor& t) {
    return t.layout() == c10::kStrided && (t.device().type() == kSim || t.device().is_cpu());
  };
  return fits(a) && fits(b);
}

void record_stream(Tensor&, at::Stream) {}

// ------------------------------------------------------------------------------------------------ convolution

// The host's kernels would see two host tensors and notice nothing.
void check_same_device(const Tensor& first, const Tensor& other) {
  TORCH_CHECK(
      !other.defined() || first.device() == other.device(),
      "Expected all tensors to be on the same device, but found at least two devices, ", first.device(), " and ",
      other.device(), "! (when checking arguments of a convolution)");
}

// The layout that CUDA's own choice of a kernel gives a convolution's result; FakeTensors foretell the same one.
struct Layout {
  c10::MemoryFormat format;

  Layout(
      const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
      IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups,
      at::OptionalIntArrayRef bias_sizes = std::nullopt) {
    const auto sym = [](IntArrayRef numbers) { return c10::fromIntArrayRefSlow(numbers); };
    at::OptionalSymIntArrayRef sizes;
    if (bias_sizes.has_value()) sizes = sym(*bias_sizes);
    const auto backend = at::native::select_conv_backend(
        input, weight, bias, sym(stride), sym(padding), sym(dilation), transposed, sym(output_padding), groups, sizes);
    format = at::native::_determine_backend_memory_format(input, weight, backend);
  }

  // Whatever the host's kernel returned is brought into it, the strides of dimensions of size 1 as well.
  Tensor of(const Tensor& result) const {
    if (!result.defined()) return result;
    const Tensor laid_out = result.contiguous(format);
    const auto sizes = laid_out.sizes();
    if (format == c10::MemoryFormat::ChannelsLast)
      return laid_out.as_strided(sizes, c10::get_channels_last_strides_2d(sizes));
    if (format == c10::MemoryFormat::ChannelsLast3d)
      return laid_out.as_strided(sizes, c10::get_channels_last_strides_3d(sizes));
    return laid_out.as_strided(sizes, c10::contiguous_strides(sizes));
  }
};

Tensor run_convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups) {
  check_same_device(input, weight);
  if (bias.has_value()) check_same_device(input, *bias);
  const Running running("aten::convolution");
  Aliases aliases(hollow(input) || hollow(weight) || (bias.has_value() && hollow(*bias)));
  count_kernel(input.device().index());
  KernelScope kernel;
  std::optional<Tensor> host_bias;
  const Tensor host_input = aliases.host(input), host_weight = aliases.host(weight);
  if (bias.has_value() && bias->defined()) host_bias = aliases.host(*bias);
  const Widening half({host_input, host_weight, host_bias.value_or(Tensor())});
  if (host_bias.has_value()) host_bias = half.wide(*host_bias);
  const Tensor result = half.rounded(at::convolution(
      half.wide(host_input), half.wide(host_weight), host_bias, stride, padding, dilation, transposed, output_padding,
      groups));
  const Layout layout(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
  const Tensor returned = aliases.device(layout.of(result));
  if (dry())
    if (const auto rule = find_rule(Rule::Cost, {"aten::convolution", ""}))
      charge_cost(
          *rule, input.device().index(), {returned},
          {input, weight, bias, stride, padding, dilation, transposed, output_padding, groups});
  return returned;
}

Tensor convolution_with_flags(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups,
    bool /*benchmark*/, bool /*deterministic*/, bool /*cudnn_enabled*/, bool /*allow_tf32*/) {
  return run_convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
}

std::tuple<Tensor, Tensor, Tensor> run_convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, at::OptionalIntArrayRef bias_sizes,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> wanted) {
  check_same_device(input, weight);
  check_same_device(input, grad);
  const Running running("aten::convolution_backward");
  Aliases aliases(hollow(input) || hollow(weight) || hollow(grad));
  count_kernel(input.device().index());
  KernelScope kernel;
  const Tensor host_grad = aliases.host(grad), host_input = aliases.host(input), host_weight = aliases.host(weight);
  const Widening half({host_grad, host_input, host_weight});
  auto [by_input, by_weight, by_bias] = at::convolution_backward(
      half.wide(host_grad), half.wide(host_input), half.wide(host_weight), bias_sizes, stride, padding, dilation,
      transposed, output_padding, groups, wanted);
  const Layout layout(
      input, weight, std::nullopt, stride, padding, dilation, transposed, output_padding, groups, bias_sizes);
  return {
      aliases.device(layout.of(half.rounded(by_input))), aliases.device(layout.of(half.rounded(by_weight))),
      aliases.device(half.rounded(by_bias))};
}

// CUDA's group norm makes its arguments contiguous, the host's keeps their layout.
void group_norm(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().defined()) value = value.toTensor().contiguous();
  }
  fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("copy_", copy_on_host); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_efficientzerotensor", efficient_zeros);
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("resize_", resize);
  m.impl("set_", set_nothing);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_at);
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("_has_compatible_shallow_copy_type", may_swap);
  m.impl("record_stream", record_stream);
  m.impl("convolution", run_convolution);
  m.impl("_convolution", convolution_with_flags);
  m.impl("convolution_backward", run_convolution_backward);
  for (const auto* name : {"native_group_norm", "native_group_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&group_norm>());
}

}  // namespace
}  // namespace sim
