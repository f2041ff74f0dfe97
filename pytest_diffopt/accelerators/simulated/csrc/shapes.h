// What comes out of an operation on hollow tensors, without computing it.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

namespace sim {

// Structured operations work out their results' shapes, strides and dtypes, and take the memory, before anything is
// computed: torch's composite kernel does that on the device's own tensors and then calls the out= variant, which has
// nothing left to do on a dry device. torch's meta kernels in Python stride some results otherwise than its real ones.
bool is_structured(const c10::OperatorHandle& op);
void run_shapes(const c10::OperatorHandle& op, torch::jit::Stack* stack);
// Whether this thread is in there: what is called meanwhile is no operation of its own.
bool shaping();
// Whether this is the out= variant that the operation's composite kernel calls once it knows its results; those are what
// it was given to write to, and nobody knows what they hold.
bool ends_shaping(const c10::OperatorHandle& op);
void end_shaping(const c10::OperatorHandle& op, torch::jit::Stack* stack, size_t first);

// Every other operation: torch's meta kernel, on meta tensors. Raises where there is none.
void run_meta_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// Advanced indexing by a mask takes as many rows as the mask has ones: where nobody knows how many, it takes all.
void count_rows(const c10::OperatorHandle& op, c10::IValue& indices);

}  // namespace sim
