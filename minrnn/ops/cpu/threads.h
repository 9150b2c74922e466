// Shares the work of a call out over threads: whole sequences where there are enough of them, else
// the tiles of all sequences, taken in their order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace minrnn {

// Channels are independent: a row wider than a tile is cut, so that a tile holds some steps at least.
struct Lines {
  int64_t sequences, D, width, blocks;

  Lines(int64_t sequences_, int64_t D_) : sequences(sequences_), D(D_) {
    blocks = std::max<int64_t>(1, (D + tile_numbers - 1) / tile_numbers);
    constexpr int64_t cache_line = 16;
    width = (D + blocks * cache_line - 1) / (blocks * cache_line) * cache_line;
    width = std::max<int64_t>(1, std::min(width, tile_numbers));
    blocks = (D + width - 1) / width;
  }
};

// Steps [first, first + steps) of sequence n and channels [c, c + width).
struct Share {
  int64_t n, c, width, first, steps;
  const Turn* turn;
};

// Calls f(share) until all steps are done. `length(n)` is that of a sequence; `back` takes tiles from
// the last to the first.
//
// Where tiles are shared out, a thread takes the next in order and waits, for the length of `recur`,
// until the one before has passed its state on. That one was taken earlier, by a thread that is at
// work or done; so nobody waits for ever, whatever number of threads really runs.
template <class Length, class F>
void share_out(const Lines& lines, const Length& length, bool back, const F& f) {
  constexpr int64_t worth_a_thread = 1 << 14;
  const int64_t count = lines.sequences * lines.blocks;
  if (count == 0) return;
  const auto line = [&](int64_t i) {
    const int64_t n = i % lines.sequences, c = i / lines.sequences * lines.width;
    return Share{n, c, std::min(lines.width, lines.D - c), 0, length(n), nullptr};
  };
  int64_t numbers = 0;
  for (int64_t n = 0; n < lines.sequences; ++n) numbers += length(n) * lines.D;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(),
                                            1 + numbers / worth_a_thread);
  const auto whole = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(line(i));
  };
  if (threads == 1) return whole(0, count);
  if (count % threads == 0 || count >= 8 * threads)
    return torch::stable::parallel_for(0, count, (count + threads - 1) / threads, whole);

  std::vector<int64_t> tiles_before(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    const Share all = line(i);
    const int64_t most = tile_steps(all.width);
    tiles_before[i + 1] = tiles_before[i] + (all.steps + most - 1) / most;
  }
  std::atomic<int64_t> taken{0}, done{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t ticket = taken.fetch_add(1, std::memory_order_relaxed);
      if (ticket >= tiles_before.back()) return;
      const auto after = std::upper_bound(tiles_before.begin(), tiles_before.end(), ticket);
      Share part = line(after - tiles_before.begin() - 1);
      const int64_t most = tile_steps(part.width);
      const int64_t tile = back ? *after - 1 - ticket : ticket - *(after - 1);
      const Turn turn{&done, ticket};
      part.first = tile * most;
      part.steps = std::min(most, part.steps - part.first);
      part.turn = &turn;
      f(part);
    }
  });
}

}  // namespace minrnn
