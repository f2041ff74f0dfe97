// The cells of LSTM and GRU: torch takes a fused one on every accelerator, and the host has no kernel for it.
// What autograd keeps of a call (the workspace) has CUDA's layout, so that its size is CUDA's too.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "aliasing.h"
#include "dry.h"
#include "ledger.h"
#include "memory.h"
#include "rules.h"

namespace sim {
namespace {

using at::Tensor;

class Cell {
 public:
  // Runs on the device of `on`, dry if that or one of the others is hollow.
  Cell(const char* name, const Tensor& on, std::initializer_list<std::optional<Tensor>> others)
      : running_(name), aliases_(any_hollow(on, others)) {
    count_kernel(on.device().index());
    aliases_.index = on.device().index();
  }
  // The host's view of an argument; an undefined tensor where there is none.
  Tensor host(const std::optional<Tensor>& tensor) {
    if (!tensor.has_value() || !tensor->defined()) return {};
    TORCH_CHECK(
        on_sim(*tensor) && tensor->device().index() == aliases_.index,
        "Expected all tensors to be on the same device, but found at least two devices, cuda:", aliases_.index, " and ",
        tensor->device(), "! (when checking arguments of a recurrent cell)");
    return aliases_.host(*tensor);
  }
  // Takes the memory over: the host's tensor is not to be read after it.
  Tensor device(const Tensor& tensor) { return tensor.defined() ? aliases_.device(tensor.contiguous()) : Tensor(); }

 private:
  static bool any_hollow(const Tensor& on, std::initializer_list<std::optional<Tensor>> others) {
    bool found = hollow(on);
    for (const auto& one : others) found = found || (one.has_value() && hollow(*one));
    return found;
  }
  const Running running_;
  KernelScope kernel_;
  Aliases aliases_;
};

Tensor plus(const Tensor& a, const Tensor& b) { return b.defined() ? a + b : a; }
Tensor slope(const Tensor& sigmoid) { return (1 - sigmoid) * sigmoid; }

std::tuple<Tensor, Tensor, Tensor> lstm(
    const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cx, const std::optional<Tensor>& input_bias,
    const std::optional<Tensor>& hidden_bias) {
  Cell cell("aten::_thnn_fused_lstm_cell", input_gates, {hidden_gates, cx, input_bias, hidden_bias});
  const auto gates = plus(cell.host(input_gates), cell.host(input_bias)) +
      plus(cell.host(hidden_gates), cell.host(hidden_bias));
  const auto part = gates.chunk(4, 1);
  const auto in = part[0].sigmoid(), forget = part[1].sigmoid(), candidate = part[2].tanh(), out = part[3].sigmoid();
  const auto cy = forget * cell.host(cx) + in * candidate;
  return {cell.device(out * cy.tanh()), cell.device(cy), cell.device(at::cat({in, forget, candidate, out}, 1))};
}

std::tuple<Tensor, Tensor, Tensor> lstm_backward(
    const std::optional<Tensor>& grad_hy, const std::optional<Tensor>& grad_cy, const Tensor& cx, const Tensor& cy,
    const Tensor& workspace, bool has_bias) {
  if (!(grad_hy.has_value() && grad_hy->defined()) && !(grad_cy.has_value() && grad_cy->defined())) return {};
  Cell cell("aten::_thnn_fused_lstm_cell_backward_impl", cx, {grad_hy, grad_cy, cy, workspace});
  const auto part = cell.host(workspace).chunk(4, 1);
  const auto &in = part[0], &forget = part[1], &candidate = part[2], &out = part[3];
  const auto by_hy = cell.host(grad_hy), by_cy = cell.host(grad_cy), squashed = cell.host(cy).tanh();
  Tensor by_state = by_cy, by_out = at::zeros_like(out);
  if (by_hy.defined()) {
    by_state = plus(by_hy * out * (1 - squashed * squashed), by_cy);
    by_out = by_hy * squashed * slope(out);
  }
  const auto grad = at::cat(
      {by_state * candidate * slope(in), by_state * cell.host(cx) * slope(forget),
       by_state * in * (1 - candidate * candidate), by_out},
      1);
  const Tensor by_bias = has_bias ? grad.sum(0) : Tensor();
  return {cell.device(grad), cell.device(by_state * forget), cell.device(by_bias)};
}

std::tuple<Tensor, Tensor> gru(
    const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hx, const std::optional<Tensor>& input_bias,
    const std::optional<Tensor>& hidden_bias) {
  Cell cell("aten::_thnn_fused_gru_cell", input_gates, {hidden_gates, hx, input_bias, hidden_bias});
  const auto by_input = plus(cell.host(input_gates), cell.host(input_bias)).chunk(3, 1);
  const auto by_hidden = plus(cell.host(hidden_gates), cell.host(hidden_bias)).chunk(3, 1);
  const auto state = cell.host(hx);
  const auto reset = (by_input[0] + by_hidden[0]).sigmoid(), update = (by_input[1] + by_hidden[1]).sigmoid();
  const auto next = (by_input[2] + reset * by_hidden[2]).tanh();
  return {
      cell.device((state - next) * update + next), cell.device(at::cat({reset, update, next, state, by_hidden[2]}, 1))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const Tensor& grad_hy, const Tensor& workspace, bool has_bias) {
  Cell cell("aten::_thnn_fused_gru_cell_backward", grad_hy, {workspace});
  const auto part = cell.host(workspace).chunk(5, 1);
  const auto &reset = part[0], &update = part[1], &next = part[2], &state = part[3], &hidden = part[4];
  const auto by_hy = cell.host(grad_hy);
  const auto by_next = by_hy * (1 - update) * (1 - next * next);
  const auto by_reset = by_next * hidden * slope(reset), by_update = by_hy * (state - next) * slope(update);
  const auto by_input = at::cat({by_reset, by_update, by_next}, 1);
  const auto by_hidden = at::cat({by_reset, by_update, by_next * reset}, 1);
  const Tensor by_input_bias = has_bias ? by_input.sum(0) : Tensor();
  const Tensor by_hidden_bias = has_bias ? by_hidden.sum(0) : Tensor();
  return {
      cell.device(by_input), cell.device(by_hidden), cell.device(by_hy * update), cell.device(by_input_bias),
      cell.device(by_hidden_bias)};
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("_thnn_fused_lstm_cell", lstm);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_backward);
  m.impl("_thnn_fused_gru_cell", gru);
  m.impl("_thnn_fused_gru_cell_backward", gru_backward);
}

}  // namespace
}  // namespace sim
