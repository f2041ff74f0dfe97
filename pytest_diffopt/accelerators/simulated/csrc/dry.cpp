#include "dry.h"

#include <c10/util/Exception.h>

#include <mutex>

namespace sim {

std::atomic<bool> g_dry{false};

namespace {

std::atomic<int64_t> g_real_bytes{0};

struct Shared {
  std::mutex lock;
  std::vector<std::string> guesses;
  std::vector<int64_t> read;
};
Shared& shared() {
  static auto* the = new Shared();  // never destroyed: tensors outlive static destructors
  return *the;
}

}  // namespace

void set_dry(bool on, int64_t real_bytes) {
  if (on && !dry()) {
    std::lock_guard<std::mutex> held(shared().lock);
    shared().guesses.clear();
    shared().read.clear();
  }
  g_real_bytes = real_bytes;
  g_dry = on;
}

int64_t real_bytes() { return g_real_bytes.load(std::memory_order_relaxed); }

void refuse_hollow(const char* operation) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !dry(), "On the dry device the value of a tensor is needed that nobody computed, and there is no rule for it (when "
              "running ", operation, "). pytest_diffopt.accelerators.simulated.register_dry_kernel gives it one.");
  TORCH_CHECK(
      false, "A tensor of the simulated device was made while it was dry and has no data; the device is not dry any more "
             "(when running ", operation, ").");
}

void note_guess(std::string guess) {
  auto& the = shared();
  std::lock_guard<std::mutex> held(the.lock);
  for (const auto& known : the.guesses)
    if (known == guess) return;
  the.guesses.push_back(std::move(guess));
}

void note_read(int64_t block) {
  std::lock_guard<std::mutex> held(shared().lock);
  shared().read.push_back(block);
}

std::vector<int64_t> blocks_read() {
  std::lock_guard<std::mutex> held(shared().lock);
  return shared().read;
}

std::vector<std::string> guesses() {
  std::lock_guard<std::mutex> held(shared().lock);
  return shared().guesses;
}

}  // namespace sim
