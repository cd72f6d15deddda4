// Loops on torch's threads, where those are worth their cost.
//
// A parallel loop ends when its last thread has ended. On an idle machine this costs microseconds.
// Where other processes use the CPUs as well, the calling thread may wait a time slice of some
// milliseconds for a thread that was to save it a few microseconds. So loops of little work stay on
// the calling thread, and the last wait says what is little.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace torch_q4::cpu {

// Work is counted in products of a weight and an activation. With AVX-512 a thread makes about 13
// of them a nanosecond. What other loops do is counted as so many products an element.
constexpr double kNanosecondsOfWork = 0.08;
constexpr int64_t kConvertWork = 4, kDecodeWork = 8, kQuantizeWork = 128;

// The least work that is worth a thread of its own: about ten microseconds.
constexpr int64_t kThreadWork = 1 << 17;

// What is known of the other threads: how long the caller of the last parallel loop waited for
// them. All times are in nanoseconds.
//
// A loop whose wait was longer than the time that the threads saved is a failure. After a failure
// loops that would save less than that wait stay on their caller, for eight times the wait at
// first and twice as long after each further failure: one disturbance on an idle machine costs
// little, and a machine that stays busy is asked seldom.
class Waits {
 public:
  static int64_t clock() {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
  }
  bool worth_threads(int64_t saved) const {
    return saved > last_.load(kRelaxed) || clock() >= retry_at_.load(kRelaxed);
  }
  void add(int64_t wait, int64_t saved) {
    last_.store(wait, kRelaxed);
    const int64_t pause = pause_.load(kRelaxed);
    if (wait <= saved) return pause_.store(pause / 2, kRelaxed);
    const int64_t next = std::min(std::max(2 * pause, 8 * wait), kLongestPause);
    pause_.store(next, kRelaxed);
    retry_at_.store(clock() + next, kRelaxed);
  }

 private:
  static constexpr int64_t kLongestPause = 1'000'000'000;
  static constexpr auto kRelaxed = std::memory_order_relaxed;
  // Several callers may overwrite each other's: each of them is as good as the other.
  std::atomic<int64_t> last_{0}, pause_{0}, retry_at_{0};
};

inline Waits waits;

// body(begin, end) over parts of the range, of which each item is so much work. Which parts there
// are depends on the machine's load: what body computes must not depend on them.
template <class Body>
inline void parallel_for(int64_t begin, int64_t end, int64_t work, const Body& body) {
  if (begin >= end) return;
  const int64_t grain = work >= kThreadWork ? 1 : kThreadWork / std::max<int64_t>(work, 1);
  if (end - begin <= grain) return body(begin, end);  // no call into torch
  const double serial =
      static_cast<double>(end - begin) * static_cast<double>(work) * kNanosecondsOfWork;
  const auto threads = static_cast<double>(torch::stable::get_num_threads());
  const auto saved = static_cast<int64_t>(serial * (1 - 1 / threads));
  if (saved == 0 || !waits.worth_threads(saved)) return body(begin, end);
  const auto caller = std::this_thread::get_id();
  int64_t done = 0;  // when the caller had nothing left to do
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    body(first, last);
    if (std::this_thread::get_id() == caller) done = Waits::clock();
  });
  waits.add(Waits::clock() - done, saved);
}

}  // namespace torch_q4::cpu
