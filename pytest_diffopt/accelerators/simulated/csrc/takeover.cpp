// A CUDA build of torch has kernels for a GPU under the key that the simulated one takes. Before this library registers its
// own, each of them gives way to what a build for the CPU has there. In such a build nothing happens here.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <array>
#include <map>
#include <string>

#include "fallback.h"

namespace sim {
namespace {

constexpr std::array kNamespaces{"aten", "quantized", "quantization"};

// What an operation does on a device that has no kernel of its own for it, which PrivateUse1 is here.
void run_composite(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), stack);
}

bool is_composite(const c10::OperatorHandle& op) {
  return !op.hasKernelForDispatchKey(c10::DispatchKey::CPU) &&
      (op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
       op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd));
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
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const auto* space : kNamespaces)
      libraries_.try_emplace(space, torch::Library::IMPL, space, c10::DispatchKey::CUDA, __FILE__, __LINE__);
    for (const auto& name : dispatcher.getRegistrationsForDispatchKey(c10::DispatchKey::CUDA)) {
      const auto op = dispatcher.findOp(name);
      const auto space = libraries_.find(std::string(name.getNamespace().value_or("")));
      if (!op || space == libraries_.end()) continue;
      space->second.impl(
          toString(name).c_str(),
          is_composite(*op) ? torch::CppFunction::makeFromBoxedFunction<&run_composite>()
                            : torch::CppFunction::makeFromBoxedFunction<&fallback>());
    }
  }

 private:
  std::map<std::string, torch::Library> libraries_;
};

// Before the registrations of the other files: the latest of an operation is the one that counts.
#ifdef __linux__
__attribute__((init_priority(200)))
#endif
Takeover takeover;

}  // namespace
}  // namespace sim
