#include "ledger.h"

#include <algorithm>
#include <limits>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

#include "caching.h"
#include "memory.h"

namespace sim {

thread_local const char* Running::t_operation = "";
std::atomic<bool> g_ledger_open{false};

namespace {

constexpr int64_t kEmptiedCache = -1;  // stands for the device of such an event
constexpr size_t kFewEvents = 1 << 16;

struct Ledger {
  std::mutex lock;
  std::vector<LedgerEvent> events;
  std::vector<std::string> operations{""};
  std::unordered_map<std::string, int64_t> numbers{{"", 0}};
  int64_t mark = 0;
  int64_t recording = 0;  // how many there were
  size_t most_events = std::numeric_limits<size_t>::max();  // before those of blocks that are gone are forgotten
};
Ledger& ledger() {
  static auto* the = new Ledger();  // never destroyed: tensors outlive static destructors
  return *the;
}

// Events of this thread that wait for the operation that asked for the memory.
struct Waiting {
  int64_t recording = 0;
  std::vector<size_t> events;
};
thread_local Waiting t_waiting;

// The lock is held.
int64_t number_of_operation(Ledger& the) {
  const auto [at, is_new] =
      the.numbers.try_emplace(Running::operation(), static_cast<int64_t>(the.operations.size()));
  if (is_new) the.operations.push_back(at->first);
  return at->second;
}

// The lock is held.
void forget_freed(Ledger& the) {
  std::unordered_set<int64_t> freed;
  for (const auto& event : the.events)
    if (event.bytes < 0) freed.insert(event.block);
  std::vector<LedgerEvent> live;
  for (const auto& event : the.events)
    if (event.bytes > 0 && !event.low && !event.high && !freed.count(event.block)) live.push_back(event);
  the.events.swap(live);
  the.most_events = 2 * the.events.size() + kFewEvents;
  the.recording++;  // what waits for its operation knows events by their places
}

void add(int64_t block, int64_t bytes, int64_t source, bool pinned, int device) {
  auto& the = ledger();
  std::lock_guard<std::mutex> held(the.lock);
  if (the.events.size() >= the.most_events) forget_freed(the);
  the.events.push_back({block, bytes, source, pinned, number_of_operation(the), the.mark, device, 0, 0});
  const std::string_view name = Running::operation();
  if (bytes <= 0 || (name != "aten::empty" && name != "aten::empty_strided")) return;
  if (t_waiting.recording != the.recording) t_waiting = {the.recording, {}};
  t_waiting.events.push_back(the.events.size() - 1);
}

}  // namespace

void open_ledger(bool open, bool only_live) {
  auto& the = ledger();
  std::lock_guard<std::mutex> held(the.lock);
  if (open) {
    the.events.clear();
    the.operations.assign(1, "");
    the.numbers = {{"", 0}};
    the.mark = 0;
    the.recording++;
    the.most_events = only_live ? kFewEvents : std::numeric_limits<size_t>::max();
  }
  g_ledger_open = open;
}

void mark_ledger(int64_t mark) {
  auto& the = ledger();
  std::lock_guard<std::mutex> held(the.lock);
  the.mark = mark;
}

void note_memory(int64_t block, int64_t bytes, int device) { add(block, bytes, 0, false, device); }

void note_workspace(int64_t block, int64_t low, int64_t high, int device) {
  auto& the = ledger();
  std::lock_guard<std::mutex> held(the.lock);
  if (the.events.empty() || the.events.back().block != block)
    the.events.push_back({block, 0, 0, false, number_of_operation(the), the.mark, device, 0, 0});
  the.events.back().low = low;
  the.events.back().high = high;
}

void credit_operation(const std::vector<int64_t>& blocks) {
  if (t_waiting.events.empty()) return;
  auto& the = ledger();
  std::lock_guard<std::mutex> held(the.lock);
  if (t_waiting.recording == the.recording) {
    for (const size_t event : t_waiting.events)
      if (std::find(blocks.begin(), blocks.end(), the.events[event].block) != blocks.end())
        the.events[event].operation = number_of_operation(the);
  }
  t_waiting.events.clear();
}

void note_copy(const c10::StorageImpl& to, const c10::StorageImpl& from, int device) {
  const int64_t target = block_number(to);
  credit_operation({target});
  add(target, 0, block_number(from), is_pinned(from.data()), device);
}

void note_empty_cache() {
  auto& the = ledger();
  std::lock_guard<std::mutex> held(the.lock);
  the.events.push_back({0, 0, 0, false, 0, the.mark, kEmptiedCache, 0, 0});
}

int64_t replay_reserved(int device, int workspaces) {
  constexpr int64_t kRoom = std::numeric_limits<int64_t>::max();
  CachingModel cache;
  std::unordered_map<int64_t, Block*> taken;
  int64_t highest = 0;
  for (const auto& event : ledger_events()) {
    if (event.device == kEmptiedCache) {
      cache.empty();
    } else if (event.device != device) {
      continue;
    } else if (event.low || event.high) {  // a workspace: it comes and goes
      const int64_t bytes = workspaces == 0 ? event.low : workspaces == 1 ? event.bytes : event.high;
      if (bytes > 0) cache.give_back(cache.take(bytes, kRoom));
    } else if (event.bytes > 0) {
      taken[event.block] = cache.take(event.bytes, kRoom);
    } else if (const auto found = taken.find(event.block); event.bytes < 0 && found != taken.end()) {
      cache.give_back(found->second);
      taken.erase(found);
    }
    highest = std::max(highest, cache.reserved());
  }
  for (const auto& [block, held] : taken) cache.give_back(held);
  cache.empty();
  return highest;
}

std::vector<LedgerEvent> ledger_events() {
  auto& the = ledger();
  std::lock_guard<std::mutex> held(the.lock);
  return the.events;
}

std::vector<std::string> ledger_operations() {
  auto& the = ledger();
  std::lock_guard<std::mutex> held(the.lock);
  return the.operations;
}

}  // namespace sim
