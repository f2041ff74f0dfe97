// Dry kernels: what depends on values that nobody computed is not computed either, and everything is counted.
//
// While the device is dry, blocks of more than `real_bytes` are hollow (see memory.h). An operation runs for real unless
// an argument is hollow; then torch's meta kernel says what comes out, and that is hollow, whatever its size. So
// time steps, positions, masks and schedules are right, and no weight is ever needed.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace at {
class Tensor;
}

namespace sim {

extern std::atomic<bool> g_dry;
inline bool dry() { return g_dry.load(std::memory_order_relaxed); }
void set_dry(bool on, int64_t real_bytes);
int64_t real_bytes();
// Whether a new block of that size has no memory behind it.
inline bool dry_size(size_t bytes) { return dry() && static_cast<int64_t>(bytes) > real_bytes(); }

bool hollow(const at::Tensor& tensor);

// Raises: a hollow tensor is of no use to an operation that computes.
[[noreturn]] void refuse_hollow(const char* operation);

// The host was given a copy of a block that nobody computed.
void note_read(int64_t block);
std::vector<int64_t> blocks_read();

// Where a size or value is not known, the most was taken: said in words, so that whoever reads the bytes knows.
void note_guess(std::string guess);
std::vector<std::string> guesses();

}  // namespace sim
