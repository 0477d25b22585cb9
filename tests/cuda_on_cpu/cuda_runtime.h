// Runs CUDA kernels on the CPU, to test what they compute: the part of CUDA's C++ that csrc/*.cu
// use, on top of which those files compile unchanged with a host compiler.
//
// A block's threads are fibers on one thread. Each runs until it waits for others (a barrier, or a
// shuffle or vote of its warp) and another one goes on, so that threads diverge as far as they can.
// In which order they get their turn is set by set_order: a result that depends on it is a race.
// A wait that never ends, votes that do not belong together and traps end the launch with an error.
// Shared memory holds garbage when a block begins.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// One block runs at a time, so that a static stands for its shared memory. The section is for
// finding it.
#define __shared__ static __attribute__((section("cuda_shared"), used))

using std::isnan;
using std::max;
using std::min;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

extern char __start_cuda_shared[] __attribute__((weak));
extern char __stop_cuda_shared[] __attribute__((weak));

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 64 << 10;

// What a thread brings to its warp. Lanes are at most one operation apart, so two slots do.
struct Offer {
  std::uint64_t number = 0;  // of the lane's operations in this block
  int kind = 0;
  alignas(8) unsigned char bytes[8] = {};
};

struct Fiber {
  ucontext_t context;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  bool started = false;
  bool done = false;
  std::uint64_t barriers = 0;    // this thread's so far
  std::uint64_t operations = 0;  // with its warp
  Offer offers[2];
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  // 0: ascending; 1: descending; others: shuffled anew for each block, with this seed.
  void set_order(unsigned order) { order_ = order; }
  const std::string& error() const { return error_; }
  std::uint64_t blocks() const { return blocks_; }

  cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
    if (grid.x == 0 || grid.x > 0x7fffffff || block.x == 0 || block.x > 1024) {
      error_ = "invalid configuration argument";
      return cudaErrorInvalidConfiguration;
    }
    error_.clear();
    kernel_ = &kernel;
    gridDim = grid;
    blockDim = block;
    std::mt19937 generator(order_);
    for (unsigned index : permutation(grid.x, generator)) {
      run_block(index, generator);
      if (!error_.empty()) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
  }

  void barrier() {
    const std::uint64_t number = ++current().barriers;
    wait([this, number] {
      return std::all_of(fibers_.begin(), fibers_.begin() + blockDim.x,
                         [number](const Fiber& fiber) { return fiber.barriers >= number; });
    });
  }

  // Offers a value to the warp and returns once all lanes have; read(lane) gives theirs.
  template <typename T, typename Read>
  auto exchange(unsigned mask, int kind, T value, const Read& read) {
    static_assert(sizeof(T) <= sizeof(Offer::bytes));
    if (mask != 0xffffffff || blockDim.x % kWarp) fail("only whole warps are supported");
    const unsigned first = running_ / kWarp * kWarp;
    const std::uint64_t number = ++current().operations;
    Offer& offer = current().offers[number % 2];
    offer.number = number;
    offer.kind = kind;
    std::memcpy(offer.bytes, &value, sizeof value);
    wait([this, first, number] {
      for (unsigned lane = 0; lane < kWarp; ++lane)
        if (fibers_[first + lane].offers[number % 2].number != number) return false;
      return true;
    });
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (fibers_[first + lane].offers[number % 2].kind != kind)
        fail("lanes of a warp meet in different operations");
    return read([this, first, number](unsigned lane) {
      T theirs;
      std::memcpy(&theirs, fibers_[first + lane].offers[number % 2].bytes, sizeof theirs);
      return theirs;
    });
  }

  void fail(const std::string& error) {
    error_ = error;
    _longjmp(scheduler_, 1);
  }

 private:
  Fiber& current() { return fibers_[running_]; }

  std::vector<unsigned> permutation(unsigned size, std::mt19937& generator) const {
    std::vector<unsigned> indices(size);
    std::iota(indices.begin(), indices.end(), 0u);
    if (order_ == 1) std::reverse(indices.begin(), indices.end());
    if (order_ > 1) std::shuffle(indices.begin(), indices.end(), generator);
    return indices;
  }

  void run_block(unsigned index, std::mt19937& generator) {
    ++blocks_;
    blockIdx = dim3(index);
    if (__start_cuda_shared)
      std::fill(__start_cuda_shared, __stop_cuda_shared, static_cast<char>(0xa5));
    while (fibers_.size() < blockDim.x) fibers_.emplace_back();
    for (unsigned thread = 0; thread < blockDim.x; ++thread) {
      Fiber& fiber = fibers_[thread];
      fiber.done = false;
      fiber.barriers = fiber.operations = 0;
      for (Offer& offer : fiber.offers) offer.number = 0;
    }
    const std::vector<unsigned> order = permutation(blockDim.x, generator);
    for (unsigned left = blockDim.x; left > 0;) {
      progress_ = false;
      for (unsigned thread : order) {
        if (fibers_[thread].done) continue;
        resume(thread);
        if (!error_.empty()) {
          // The others are stuck in the middle of a kernel: begin them anew next time.
          for (Fiber& fiber : fibers_) fiber.started = false;
          return;
        }
        if (fibers_[thread].done) {
          --left;
          progress_ = true;
        }
      }
      if (!progress_ && left > 0) {
        error_ = "deadlock: threads wait for others that do not come";
        for (Fiber& fiber : fibers_) fiber.started = false;
        return;
      }
    }
  }

  template <typename Condition>
  void wait(const Condition& condition) {
    while (!condition()) {
      if (_setjmp(current().state) == 0) _longjmp(scheduler_, 1);
    }
    progress_ = true;
  }

  void resume(unsigned thread) {
    running_ = thread;
    threadIdx = dim3(thread, 0, 0);
    Fiber& fiber = fibers_[thread];
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Machine::live, 0);
    setcontext(&fiber.context);
  }

  // A fiber's life: one thread of a block after another.
  static void live() {
    for (;;) {
      Machine& machine = get();
      (*machine.kernel_)();
      machine.current().done = true;
      if (_setjmp(machine.current().state) == 0) _longjmp(machine.scheduler_, 1);
    }
  }

  std::vector<Fiber> fibers_;
  const std::function<void()>* kernel_ = nullptr;
  jmp_buf scheduler_;
  unsigned running_ = 0;
  unsigned order_ = 0;
  bool progress_ = false;
  std::uint64_t blocks_ = 0;
  std::string error_;
};

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::Machine::get().barrier(); }

inline void __trap() { cuda_on_cpu::Machine::get().fail("a kernel trapped"); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp;
  return cuda_on_cpu::Machine::get().exchange(mask, distance, value,
                                              [=](const auto& of) { return of(lane ^ distance); });
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  return cuda_on_cpu::Machine::get().exchange(mask, -1, value, [](const auto& of) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < cuda_on_cpu::kWarp; ++lane) ballot |= unsigned{of(lane)} << lane;
    return ballot;
  });
}

inline int __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cuda_on_cpu::Machine::get().run(config->gridDim, config->blockDim,
                                         [&] { kernel(arguments...); });
}

inline cudaError_t cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return cuda_on_cpu::Machine::get().error().c_str();
}
