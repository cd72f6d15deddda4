// The part of libgomp that torch uses, made of std::thread, for ThreadSanitizer: it follows what
// threads do to each other through pthreads, and not through libgomp, whose barriers are futexes of
// its own; every parallel loop would look like a race. Loaded before libgomp (LD_PRELOAD), each
// parallel region starts its threads and joins them.
#include <pthread.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace {

struct Team {
  int size;
  pthread_barrier_t barrier;
};

thread_local int threads_wanted = std::max(2u, std::thread::hardware_concurrency());
thread_local int thread_number = 0;
thread_local Team* team = nullptr;

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team own;
  own.size = threads ? static_cast<int>(threads) : team != nullptr ? 1 : threads_wanted;
  pthread_barrier_init(&own.barrier, nullptr, own.size);
  Team* const outer_team = team;
  const int outer_number = thread_number;
  const auto run = [&](int number) {
    thread_number = number;
    team = &own;
    body(data);
  };
  std::vector<std::thread> others;
  for (int number = 1; number < own.size; ++number) others.emplace_back(run, number);
  run(0);
  for (std::thread& other : others) other.join();
  pthread_barrier_destroy(&own.barrier);
  team = outer_team;
  thread_number = outer_number;
}

void GOMP_barrier() {
  if (team != nullptr && team->size > 1) pthread_barrier_wait(&team->barrier);
}

int omp_get_thread_num() { return thread_number; }
int omp_get_num_threads() { return team != nullptr ? team->size : 1; }
int omp_get_max_threads() { return threads_wanted; }
int omp_in_parallel() { return team != nullptr && team->size > 1; }
void omp_set_num_threads(int count) { threads_wanted = count; }
}
