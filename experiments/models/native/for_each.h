// What both handlers need: it shares the work of one call among XLA's threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

#define INLINE __attribute__((always_inline))

using Buffer = xla::ffi::Buffer<xla::ffi::F32>;

// Calls task(0), …, task(count - 1) from this thread and from XLA's threads.
inline void ForEach(xla::ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> task) {
  struct State {
    std::function<void(int64_t)> task;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
    std::exception_ptr error;
  };
  const auto state = std::make_shared<State>();
  state->task = std::move(task);
  const auto work = [state, count] {
    for (int64_t index; (index = state->next++) < count;) {
      std::exception_ptr error;
      try {
        state->task(index);
      } catch (...) {
        error = std::current_exception();
      }
      const std::lock_guard<std::mutex> lock(state->mutex);
      if (error) state->error = error;
      if (++state->done == count) state->all_done.notify_all();
    }
  };
  const int64_t helpers = std::min<int64_t>(count, pool.num_threads()) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == count; });
  if (state->error) std::rethrow_exception(state->error);
}
