// Sizes and rules are those of c10/cuda/CUDACachingAllocator.cpp with its default settings.
#include "caching.h"

namespace sim {
namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kSmallestBlock = 512;
constexpr int64_t kSmallRequest = kMiB;        // requests up to this share small segments
constexpr int64_t kSmallSegment = 2 * kMiB;
constexpr int64_t kLargeSegment = 20 * kMiB;   // for requests from 1 to 10 MiB
constexpr int64_t kLargeRequest = 10 * kMiB;
constexpr int64_t kSegmentRounding = 2 * kMiB;

int64_t round_up(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

int64_t segment_size(int64_t size) {
  if (size <= kSmallRequest) return kSmallSegment;
  if (size < kLargeRequest) return kLargeSegment;
  return round_up(size, kSegmentRounding);
}

}  // namespace

Block* CachingModel::take(int64_t bytes, int64_t room) {
  const int64_t size = bytes < kSmallestBlock ? kSmallestBlock : round_up(bytes, kSmallestBlock);
  const bool small = size <= kSmallRequest;
  auto& unused = pool(small);
  Block wanted;
  wanted.size = size;
  wanted.address = -1;
  Block* block = nullptr;
  if (auto found = unused.lower_bound(&wanted); found != unused.end()) {
    block = *found;
    unused.erase(found);
  } else {
    const int64_t segment = segment_size(size);
    if (segment > room) return nullptr;
    block = new Block{next_address_, segment, small};
    segments_.insert(block);
    if (keeps_segments) segments_seen.emplace_back(block->address, segment);
    next_address_ += segment;
    reserved_ += segment;
    made_++;
  }
  const int64_t rest = block->size - size;
  if (small ? rest >= kSmallestBlock : rest > kSmallRequest) {
    auto* tail = new Block{block->address + size, rest, small, false, block, block->after};
    if (tail->after) tail->after->before = tail;
    block->after = tail;
    block->size = size;
    unused.insert(tail);
  }
  block->taken = true;
  return block;
}

void CachingModel::merge(Block* into, Block* gone) {
  into->size += gone->size;
  into->after = gone->after;
  if (into->after) into->after->before = into;
  delete gone;
}

void CachingModel::give_back(Block* block) {
  auto& unused = pool(block->small);
  block->taken = false;
  if (Block* next = block->after; next && !next->taken) {
    unused.erase(next);
    merge(block, next);
  }
  if (Block* previous = block->before; previous && !previous->taken) {
    unused.erase(previous);
    merge(previous, block);
    block = previous;
  }
  unused.insert(block);
}

void CachingModel::empty() {
  for (auto* unused : {&small_, &large_}) {
    for (auto at = unused->begin(); at != unused->end();) {
      Block* block = *at;
      if (block->before || block->after) {
        ++at;
        continue;
      }
      reserved_ -= block->size;
      freed_++;
      segments_.erase(block);
      if (keeps_segments) segments_seen.emplace_back(block->address, -block->size);
      at = unused->erase(at);
      delete block;
    }
  }
}

}  // namespace sim
