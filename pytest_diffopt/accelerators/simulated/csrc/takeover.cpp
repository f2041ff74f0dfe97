// A CUDA build of torch has kernels for a GPU under the key that the simulated one takes. Before this library registers its
// own, each of them gives way to what a build for the CPU has there. In such a build nothing happens here.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "fallback.h"

namespace sim {
namespace {

const std::set<std::string_view>& namespaces() {
  static const std::set<std::string_view> torchs{"aten", "quantized", "quantization"};
  return torchs;
}

// What an operation does on a device that has no kernel of its own for it, which PrivateUse1 is here.
template <c10::DispatchKey key>
void run_composite(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  op.redispatchBoxed(c10::DispatchKeySet(key), stack);
}

// The others go to the host's kernel.
bool is_composite(const c10::OperatorHandle& op) {
  if (op.hasKernelForDispatchKey(c10::DispatchKey::CPU) && !takes_host_indices(op.operator_name().name)) return false;
  for (const auto key :
       {c10::DispatchKey::CompositeExplicitAutogradNonFunctional, c10::DispatchKey::CompositeExplicitAutograd,
        c10::DispatchKey::CompositeImplicitAutograd})
    if (op.hasKernelForDispatchKey(key)) return true;
  return false;
}

struct Unheard final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

class Takeover {
 public:
  Takeover() {
    // torch warns of the first kernel of a process that is overridden
    Unheard unheard;
    c10::WarningUtils::WarningHandlerGuard quiet(&unheard);
    for (const auto& name : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(c10::DispatchKey::CUDA)) {
      const auto op = c10::Dispatcher::singleton().findOp(name);
      if (!op || !namespaces().count(name.getNamespace().value_or(""))) continue;
      using Function = torch::CppFunction;
      if (!is_composite(*op)) {
        put(name, c10::DispatchKey::CUDA, Function::makeFromBoxedFunction<&fallback>());
        continue;
      }
      put(name, c10::DispatchKey::CUDA, Function::makeFromBoxedFunction<&run_composite<c10::DispatchKey::PrivateUse1>>());
      // an operation that has its gradient by what it is made of; with a kernel of CUDA's it has one of its own
      if (op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd))
        put(name, c10::DispatchKey::AutogradCUDA,
            Function::makeFromBoxedFunction<&run_composite<c10::DispatchKey::AutogradPrivateUse1>>());
    }
  }

 private:
  void put(const c10::OperatorName& name, c10::DispatchKey key, torch::CppFunction kernel) {
    const std::string space(name.getNamespace().value_or(""));
    libraries_.try_emplace({space, key}, torch::Library::IMPL, space, key, __FILE__, __LINE__)
        .first->second.impl(toString(name).c_str(), std::move(kernel));
  }
  std::map<std::pair<std::string, c10::DispatchKey>, torch::Library> libraries_;
};

// Before the registrations of the other files: the latest of an operation is the one that counts.
#ifdef __linux__
__attribute__((init_priority(200)))
#endif
Takeover takeover;

}  // namespace
}  // namespace sim
