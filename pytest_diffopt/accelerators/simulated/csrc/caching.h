// The book-keeping of CUDA's caching allocator (one stream), with no memory behind it.
#pragma once
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

namespace sim {

// A piece of a segment. Addresses are made up: they only put neighbours in order.
struct Block {
  int64_t address = 0;
  int64_t size = 0;
  bool small = false;
  bool taken = false;
  Block* before = nullptr;  // neighbours in the same segment
  Block* after = nullptr;
};

class CachingModel {
 public:
  // The block for a request of `bytes`, from what is cached or from a new segment of at most `room` bytes;
  // null if neither has enough.
  Block* take(int64_t bytes, int64_t room);
  void give_back(Block* block);
  // Gives whole unused segments back to the device.
  void empty();

  // The first block of each segment.
  const std::set<Block*>& segments() const { return segments_; }
  // While `keeps_segments`: address and bytes of those that came, and of those that went, negative.
  bool keeps_segments = false;
  std::vector<std::pair<int64_t, int64_t>> segments_seen;

  int64_t reserved() const { return reserved_; }
  int64_t segments_made() const { return made_; }
  int64_t segments_freed() const { return freed_; }

 private:
  struct Order {
    bool operator()(const Block* a, const Block* b) const {
      return a->size != b->size ? a->size < b->size : a->address < b->address;
    }
  };
  using Pool = std::set<Block*, Order>;

  Pool& pool(bool small) { return small ? small_ : large_; }
  void merge(Block* into, Block* gone);

  Pool small_, large_;
  std::set<Block*> segments_;
  int64_t reserved_ = 0, made_ = 0, freed_ = 0;
  int64_t next_address_ = 0;
};

}  // namespace sim
