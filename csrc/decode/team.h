// Threads that go through the phases of one pass together. They live as long as the pass: a process that forks between
// two passes, as the launcher's do, leaves none behind.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace llm_parallel::decode {

class Team {
  public:
    explicit Team(int size) : size_(size < 1 ? 1 : size) {}

    int size() const { return size_; }

    // Calls work(worker) on all threads and returns when all have ended.
    template <typename Work>
    void run(Work&& work) {
        std::vector<std::thread> others;
        for (int worker = 1; worker < size_; ++worker) others.emplace_back([&work, worker] { work(worker); });
        work(0);
        for (std::thread& other : others) other.join();
    }

    // Waits until all threads have come here. Waiting ones look often at first, then let others have the processor.
    void meet() {
        if (size_ == 1) return;
        const uint32_t turn = turn_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int looks = 0; turn_.load(std::memory_order_acquire) == turn; ++looks) {
            if (looks > 2000) std::this_thread::yield();
        }
    }

    // This worker's part of count things, in whole units.
    std::pair<int64_t, int64_t> share(int64_t count, int64_t unit, int worker) const {
        const int64_t units = (count + unit - 1) / unit;
        const int64_t begin = units * worker / size_ * unit, end = units * (worker + 1) / size_ * unit;
        return {begin < count ? begin : count, end < count ? end : count};
    }

  private:
    const int size_;
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> turn_{0};
};

}  // namespace llm_parallel::decode
