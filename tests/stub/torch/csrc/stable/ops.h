// What threads.h needs of torch, made of std::thread: sanitizers see through these, not through
// OpenMP. As many threads as the test says.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline uint32_t num_threads = 1;

inline uint32_t get_num_threads() { return num_threads; }

// Calls f(first, last) for pieces of `grain` numbers from begin to end, each in a thread of its
// own.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += grain)
    threads.emplace_back(f, first, first + grain < end ? first + grain : end);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable
