// Operations that torch calls on CUDA alone: by those that stand for them elsewhere.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/grid_sampler_2d.h>
#include <ATen/ops/grid_sampler_2d_backward.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <torch/library.h>

#include <algorithm>

#include "aliasing.h"
#include "dry.h"
#include "ledger.h"
#include "memory.h"

namespace sim {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kBilinear = 0, kZeros = 0;

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm(
    const Tensor& input, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& mean,
    const MaybeTensor& variance, bool training, double momentum, double eps) {
  auto [output, save_mean, save_inverse] =
      at::native_batch_norm(input, weight, bias, mean, variance, training, momentum, eps);
  return {output, save_mean, save_inverse, at::empty({0}, input.options().dtype(at::kByte))};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& input, const Tensor& grad, const Tensor& weight, const MaybeTensor& mean, const MaybeTensor& variance,
    const MaybeTensor& save_mean, const MaybeTensor& save_inverse, double eps, const Tensor& /*reserved*/) {
  return at::native_batch_norm_backward(
      grad, input, weight, mean, variance, save_mean, save_inverse, /*train=*/true, eps, {true, true, true});
}

Tensor grid_sampler(const Tensor& input, const Tensor& grid) {
  return at::grid_sampler_2d(input, grid, kBilinear, kZeros, /*align_corners=*/true);
}

std::tuple<Tensor, Tensor> grid_sampler_backward(const Tensor& input, const Tensor& grid, const Tensor& grad) {
  return at::grid_sampler_2d_backward(grad, input, grid, kBilinear, kZeros, /*align_corners=*/true, {true, true});
}

// Recurrent networks go through their cells.
bool is_acceptable(const Tensor&) { return false; }

// Products of half precision with a result in float32.
struct Product {
  const char* name;
  at::ScalarType dtype;

  template <typename Compute>
  Tensor operator()(at::ArrayRef<Tensor> given, const MaybeTensor& out, Compute compute) const {
    for (const auto& one : given)
      TORCH_CHECK(
          one.device() == given.front().device(), "Expected all tensors to be on the same device, but found at least two devices, ",
          given.front().device(), " and ", one.device(), "! (when checking arguments of ", name, ")");
    const Running running(name);
    Aliases aliases(std::any_of(given.begin(), given.end(), [](const Tensor& one) { return hollow(one); }));
    aliases.index = given.front().device().index();
    count_kernel(aliases.index);
    KernelScope kernel;
    std::vector<Tensor> wide;
    for (const auto& one : given) wide.push_back(aliases.host(one).to(dtype));
    const Tensor result = compute(wide);
    if (!out.has_value()) return aliases.device(result);
    if (out->sizes() != result.sizes()) out->resize_(result.sizes());
    aliases.host(*out).copy_(result);
    return *out;
  }
};

using Operands = std::vector<Tensor>;
using at::Scalar, at::ScalarType;

Tensor mm(const Tensor& a, const Tensor& b, ScalarType dtype) {
  return Product{"aten::mm", dtype}({a, b}, std::nullopt, [](const Operands& x) { return at::mm(x[0], x[1]); });
}
Tensor& mm_out(const Tensor& a, const Tensor& b, ScalarType dtype, Tensor& out) {
  Product{"aten::mm", dtype}({a, b}, out, [](const Operands& x) { return at::mm(x[0], x[1]); });
  return out;
}
Tensor bmm(const Tensor& a, const Tensor& b, ScalarType dtype) {
  return Product{"aten::bmm", dtype}({a, b}, std::nullopt, [](const Operands& x) { return at::bmm(x[0], x[1]); });
}
Tensor& bmm_out(const Tensor& a, const Tensor& b, ScalarType dtype, Tensor& out) {
  Product{"aten::bmm", dtype}({a, b}, out, [](const Operands& x) { return at::bmm(x[0], x[1]); });
  return out;
}
Tensor addmm(
    const Tensor& self, const Tensor& a, const Tensor& b, ScalarType dtype, const Scalar& beta, const Scalar& alpha) {
  return Product{"aten::addmm", dtype}(
      {self, a, b}, std::nullopt, [&](const Operands& x) { return at::addmm(x[0], x[1], x[2], beta, alpha); });
}
Tensor& addmm_out(
    const Tensor& self, const Tensor& a, const Tensor& b, ScalarType dtype, const Scalar& beta, const Scalar& alpha,
    Tensor& out) {
  Product{"aten::addmm", dtype}(
      {self, a, b}, out, [&](const Operands& x) { return at::addmm(x[0], x[1], x[2], beta, alpha); });
  return out;
}
Tensor baddbmm(
    const Tensor& self, const Tensor& a, const Tensor& b, ScalarType dtype, const Scalar& beta, const Scalar& alpha) {
  return Product{"aten::baddbmm", dtype}(
      {self, a, b}, std::nullopt, [&](const Operands& x) { return at::baddbmm(x[0], x[1], x[2], beta, alpha); });
}
Tensor& baddbmm_out(
    const Tensor& self, const Tensor& a, const Tensor& b, ScalarType dtype, const Scalar& beta, const Scalar& alpha,
    Tensor& out) {
  Product{"aten::baddbmm", dtype}(
      {self, a, b}, out, [&](const Operands& x) { return at::baddbmm(x[0], x[1], x[2], beta, alpha); });
  return out;
}

bool takes_ctc_loss(const Tensor&, const Tensor&, at::IntArrayRef, at::IntArrayRef, int64_t) { return false; }
bool takes_ctc_loss_of_tensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t) { return false; }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("cudnn_batch_norm", batch_norm);
  m.impl("cudnn_batch_norm_backward", batch_norm_backward);
  m.impl("cudnn_grid_sampler", grid_sampler);
  m.impl("cudnn_grid_sampler_backward", grid_sampler_backward);
  m.impl("cudnn_is_acceptable", is_acceptable);
  for (const auto* name : {"_use_cudnn_ctc_loss", "_use_miopen_ctc_loss"}) m.impl(name, takes_ctc_loss);
  for (const auto* name : {"_use_cudnn_ctc_loss.Tensor", "_use_miopen_ctc_loss.Tensor"})
    m.impl(name, takes_ctc_loss_of_tensors);
  m.impl("mm.dtype", mm);
  m.impl("mm.dtype_out", mm_out);
  m.impl("bmm.dtype", bmm);
  m.impl("bmm.dtype_out", bmm_out);
  m.impl("addmm.dtype", addmm);
  m.impl("addmm.dtype_out", addmm_out);
  m.impl("baddbmm.dtype", baddbmm);
  m.impl("baddbmm.dtype_out", baddbmm_out);
}

}  // namespace
}  // namespace sim
