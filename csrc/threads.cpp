// Knows whether the process was forked.

#include "threads.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace lamp {
namespace {

std::atomic<bool> was_forked{false};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { was_forked = true; });
#endif

}  // namespace

bool forked() { return was_forked; }

}  // namespace lamp
