// Work on several threads of the CPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace lamp {

// Starting a thread costs about as much as this many multiply-adds, some tens of microseconds.
constexpr int64_t kWorkPerThread = 1 << 21;

// How many threads serve so many multiply-adds in so many parts.
inline int64_t useful_threads(int64_t threads, int64_t work, int64_t parts) {
  return std::max<int64_t>(1, std::min({threads, work / kWorkPerThread, parts}));
}

// Calls run(part, thread) for every part, with thread < threads. A thread takes the next part when
// it is through with one, so a part must not depend on who runs it.
template <typename Run>
void for_each_part(int64_t parts, int64_t threads, const Run& run) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t thread) {
    for (int64_t part = next++; part < parts; part = next++) run(part, thread);
  };
  // Threads live for one call: a pool would be lost, and waited for, in a forked data worker.
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  } catch (const std::system_error&) {
    // The machine gives no more threads: those that there are do it all.
  }
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace lamp
