// Operations that torch calls on CUDA alone, where cuDNN is there: by those that stand for them elsewhere.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/grid_sampler_2d.h>
#include <ATen/ops/grid_sampler_2d_backward.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <torch/library.h>

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

bool takes_ctc_loss(const Tensor&, const Tensor&, at::IntArrayRef, at::IntArrayRef, int64_t) { return false; }
bool takes_ctc_loss_of_tensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t) { return false; }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("cudnn_batch_norm", batch_norm);
  m.impl("cudnn_batch_norm_backward", batch_norm_backward);
  m.impl("cudnn_grid_sampler", grid_sampler);
  m.impl("cudnn_grid_sampler_backward", grid_sampler_backward);
  m.impl("cudnn_is_acceptable", is_acceptable);
  m.impl("_use_cudnn_ctc_loss", takes_ctc_loss);
  m.impl("_use_cudnn_ctc_loss.Tensor", takes_ctc_loss_of_tensors);
}

}  // namespace
}  // namespace sim
