// Work on several threads of the CPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lamp {

// Handing work to another thread costs about as much as this many multiply-adds: some microseconds
// to one of OpenMP's, which waits for it, and some tens of them to start one.
#ifdef _OPENMP
constexpr int64_t kWorkPerThread = 1 << 18;
#else
constexpr int64_t kWorkPerThread = 1 << 21;
#endif

// Whether this process was forked from one that had loaded this module: OpenMP's threads stayed with
// the parent, and a region would wait for them forever.
bool forked();

// How many threads serve so many multiply-adds in so many parts.
inline int64_t useful_threads(int64_t threads, int64_t work, int64_t parts) {
  return std::max<int64_t>(1, std::min({threads, work / kWorkPerThread, parts}));
}

// Calls work(thread) once on each of so many threads that start for it. Where the machine gives no
// more of them, on fewer.
template <typename Work>
void on_new_threads(int64_t threads, const Work& work) {
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

// Calls run(part, thread) for every part, with thread < threads. A thread takes the next part when
// it is through with one, so a part must not depend on who runs it.
//
// The threads are OpenMP's, and so torch's own: between two of torch's ops they wait awake for some
// milliseconds, and others would share the cores with them. All of torch's `team` are called, though
// some may have nothing to do: a smaller team would end the others.
template <typename Run>
void for_each_part(int64_t parts, int64_t threads, [[maybe_unused]] int64_t team,
                   const Run& run) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t thread) {
    for (int64_t part = next++; part < parts; part = next++) run(part, thread);
  };
  if (threads == 1) return work(0);
#ifdef _OPENMP
  if (!forked()) {
#pragma omp parallel num_threads(static_cast<int>(team))
    if (omp_get_thread_num() < threads) work(omp_get_thread_num());
    return;
  }
#endif
  on_new_threads(threads, work);
}

}  // namespace lamp
